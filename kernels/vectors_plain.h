/* Vectors of 16 lanes that the compiler makes of what there is; see vectors.h. */

#define COLUMNS 4
#define WIDE 1
#define NARROW 2
#define TALL 2
#define DOT_CENTER 0
/* Long functions: with a copy in each of the many tiles, compilation took 16 s instead of 5. */
#define SHARED static __attribute__((noinline))

typedef uint32_t ints __attribute__((vector_size(LINE)));
typedef int32_t signed_ints __attribute__((vector_size(LINE)));
typedef int16_t shorts __attribute__((vector_size(LINE)));
typedef float floats __attribute__((vector_size(LINE)));
typedef double doubles __attribute__((vector_size(2 * LINE)));
typedef int64_t longs __attribute__((vector_size(2 * LINE)));
typedef uint64_t ulongs __attribute__((vector_size(2 * LINE)));

INLINE ints load_ints(const void *p) {
    ints out;
    memcpy(&out, p, sizeof out);
    return out;
}
INLINE ints splat_int(int32_t v) { return (uint32_t)v - (ints){0}; }
INLINE ints both(ints a, ints b) { return a & b; }
INLINE ints either(ints a, ints b) { return a | b; }
INLINE ints shift_left(ints v, const int by) { return v << by; }
INLINE ints shift_right(ints v, const int by) { return v >> by; }

INLINE ints look_up_bytes(ints table, ints codes) {
    uint8_t bytes[LINE], from[LINE];
    memcpy(bytes, &codes, LINE);
    memcpy(from, &table, LINE);
    for (int i = 0; i < LINE; i++) bytes[i] = from[bytes[i]];
    return load_ints(bytes);
}

INLINE ints mark_neighbours(ints codes) {
    uint8_t bytes[LINE], marks[LINE];
    memcpy(bytes, &codes, LINE);
    for (int i = 0; i < LINE; i++) marks[i] = bytes[i ^ 1] == 8 ? 16 : 0;
    return load_ints(marks);
}

/* The sum of the products of each lane's bytes 0 and 2 with a and b. 16 bits hold 255 127. */
INLINE ints dot_pair(ints w, int8_t a, int8_t b) {
    const ints x = splat_int((uint16_t)a | (int32_t)((uint32_t)b << 16));
    const ints products = (ints)((shorts)(w & 0x00ff00ff) * (shorts)x);
    return (ints)((signed_ints)(products << 16) >> 16) + (ints)((signed_ints)products >> 16);
}
SHARED ints dot(ints sum, ints w, const int8_t *x) {
    return sum + dot_pair(w, x[0], x[2]) + dot_pair(w >> 8, x[1], x[3]);
}

INLINE ints multiply_small(ints v, int32_t by) { return v * splat_int(by); }

INLINE floats load_floats(const float *p) {
    floats out;
    memcpy(&out, p, sizeof out);
    return out;
}
INLINE void store_floats(float *p, floats v) { memcpy(p, &v, sizeof v); }

INLINE float half_to_float(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    /* As a float with an exponent 112 too low, which the product corrects; also subnormals. */
    uint32_t bits = rest >= 0x7c00 ? 0x7f800000 | rest << 13 : rest << 13;
    float value;
    memcpy(&value, &bits, sizeof value);
    if (rest < 0x7c00) value *= 0x1p112f;
    memcpy(&bits, &value, sizeof value);
    bits |= sign;
    memcpy(&value, &bits, sizeof value);
    return value;
}
INLINE floats load_halves(const uint16_t *p) {
    floats out;
    for (int i = 0; i < LANES; i++) out[i] = half_to_float(p[i]);
    return out;
}
INLINE floats splat(float v) { return (floats)splat_int(0) + v; }
INLINE floats to_floats(ints v) { return __builtin_convertvector((signed_ints)v, floats); }
INLINE ints to_ints(floats v) { return (ints)__builtin_convertvector(v, signed_ints); }
INLINE floats add(floats a, floats b) { return a + b; }
INLINE floats subtract(floats a, floats b) { return a - b; }
INLINE floats multiply(floats a, floats b) { return a * b; }

SHARED floats fused(floats a, floats b, floats c) {
#ifdef __FP_FAST_FMAF
    for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    /* A double holds the product, not the sum. An inexact sum is moved to its odd neighbour on the
     * error's side, if it is even: then rounding to a float rounds as from the exact sum (Boldo and
     * Melquiond, "Emulation of a FMA and correctly rounded sums", 2008). */
    const doubles product =
        __builtin_convertvector(a, doubles) * __builtin_convertvector(b, doubles);
    const doubles addend = __builtin_convertvector(c, doubles), sum = product + addend;
    const doubles back = sum - product, error = (product - (sum - back)) + (addend - back);
    const longs bits = (longs)sum, is_inexact = (error > 0) | (error < 0);
    const longs is_even = (bits & 1) - 1, inward = (longs)((ulongs)(bits ^ (longs)error) >> 63);
    const longs moved = bits + (is_inexact & is_even & (1 - inward - inward));
    return __builtin_convertvector((doubles)moved, floats);
#endif
}

SHARED floats look_up_16(const float *table, ints lanes) {
    floats out;
    for (int i = 0; i < LANES; i++) out[i] = table[lanes[i] & 15];
    return out;
}
SHARED floats look_up_32(const float *table, ints lanes) {
    floats out;
    for (int i = 0; i < LANES; i++) out[i] = table[lanes[i] & 31];
    return out;
}
