/* Vectors of 16 lanes, for one output of a matrix each: `ints` (32 bits, or four bytes a lane) and
 * `floats`. Every branch computes the same bits.
 *
 * A branch states the size of its tiles: up to COLUMNS rows of activations times WIDE vectors of
 * outputs, or up to NARROW rows times TALL vectors, so that the sums stay in registers.
 */
#ifndef SPECTOOL_VECTORS_H
#define SPECTOOL_VECTORS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define LINE 64 /* bytes of a vector, and of a cache line */
#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>

#define COLUMNS 8
#define WIDE 2
#define NARROW 4
#define TALL 4

typedef __m512i ints;
typedef __m512 floats;

INLINE ints load_ints(const void *p) { return _mm512_loadu_si512(p); }
INLINE ints splat_int(int32_t v) { return _mm512_set1_epi32(v); }
INLINE ints both(ints a, ints b) { return _mm512_and_si512(a, b); }
INLINE ints either(ints a, ints b) { return _mm512_or_si512(a, b); }
INLINE ints shift_left(ints v, const int by) { return _mm512_slli_epi32(v, by); }
INLINE ints shift_right(ints v, const int by) { return _mm512_srli_epi32(v, by); }

/* table[code] of each byte; `table` repeats 16 bytes, codes are below 16. */
INLINE ints look_up_bytes(ints table, ints codes) { return _mm512_shuffle_epi8(table, codes); }

/* 16 in each byte whose neighbour in its pair is 8; else 0. */
INLINE ints mark_neighbours(ints codes) {
    const ints swapped =
        _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(codes, 8), _mm512_set1_epi16(0x00ff)),
                        _mm512_slli_epi16(codes, 8));
    return _mm512_maskz_set1_epi8(_mm512_cmpeq_epi8_mask(swapped, _mm512_set1_epi8(8)), 16);
}

/* sum + the products of each lane's four unsigned bytes with the four signed ones at x. */
INLINE ints dot(ints sum, ints w, const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    /* Not the intrinsic: GCC copies all sums of a loop from register to register with it. */
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(_mm512_set1_epi32(four)));
    return sum;
}

INLINE floats load_floats(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store_floats(float *p, floats v) { _mm512_storeu_ps(p, v); }
INLINE floats load_halves(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
INLINE floats splat(float v) { return _mm512_set1_ps(v); }
INLINE floats to_floats(ints v) { return _mm512_cvtepi32_ps(v); }
INLINE floats add(floats a, floats b) { return _mm512_add_ps(a, b); }
INLINE floats subtract(floats a, floats b) { return _mm512_sub_ps(a, b); }
INLINE floats multiply(floats a, floats b) { return _mm512_mul_ps(a, b); }
/* a b + c with one rounding. */
INLINE floats fused(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }

/* table[lane] of 16 floats, by the lowest four bits of a lane. */
INLINE floats look_up_16(const float *table, ints lanes) {
    return _mm512_permutexvar_ps(lanes, _mm512_loadu_ps(table));
}
/* table[lane] of 32 floats, by the lowest five bits. */
INLINE floats look_up_32(const float *table, ints lanes) {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(table), lanes, _mm512_loadu_ps(table + LANES));
}

#else
/* Without vectors: what the other branches compute. */
#define COLUMNS 4
#define WIDE 1
#define NARROW 2
#define TALL 2

typedef struct {
    uint32_t lane[LANES];
} ints;
typedef struct {
    float lane[LANES];
} floats;

/* A vector whose lane i is `value`. */
#define EACH_LANE(type, value)                                                                     \
    type out;                                                                                      \
    for (int i = 0; i < LANES; i++) out.lane[i] = value;                                           \
    return out;

INLINE ints load_ints(const void *p) {
    ints out;
    memcpy(&out, p, sizeof out);
    return out;
}
INLINE ints splat_int(int32_t v){EACH_LANE(ints, (uint32_t)v)} INLINE ints
    both(ints a, ints b){EACH_LANE(ints, a.lane[i] & b.lane[i])} INLINE ints
    either(ints a, ints b){EACH_LANE(ints, a.lane[i] | b.lane[i])} INLINE ints
    shift_left(ints v, const int by){EACH_LANE(ints, v.lane[i] << by)} INLINE ints
    shift_right(ints v, const int by){EACH_LANE(ints, v.lane[i] >> by)}

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

INLINE ints dot(ints sum, ints w, const int8_t *x) {
    for (int i = 0; i < LANES; i++)
        for (int byte = 0; byte < 4; byte++)
            sum.lane[i] += (uint32_t)((int32_t)(w.lane[i] >> 8 * byte & 0xff) * x[byte]);
    return sum;
}

INLINE floats load_floats(const float *p){EACH_LANE(floats, p[i])} INLINE
    void store_floats(float *p, floats v) {
    memcpy(p, &v, sizeof v);
}

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

INLINE floats load_halves(const uint16_t *p){EACH_LANE(floats, half_to_float(p[i]))} INLINE floats
    splat(float v){EACH_LANE(floats, v)} INLINE floats
    to_floats(ints v){EACH_LANE(floats, (float)(int32_t)v.lane[i])} INLINE floats
    add(floats a, floats b){EACH_LANE(floats, a.lane[i] + b.lane[i])} INLINE floats
    subtract(floats a, floats b){EACH_LANE(floats, a.lane[i] - b.lane[i])} INLINE floats
    multiply(floats a, floats b){EACH_LANE(floats, a.lane[i] * b.lane[i])} INLINE floats
    fused(floats a, floats b, floats c){
        EACH_LANE(floats, __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]))} INLINE floats
    look_up_16(const float *table,
               ints lanes){EACH_LANE(floats, table[lanes.lane[i] & 15])} INLINE floats
    look_up_32(const float *table, ints lanes) {
    EACH_LANE(floats, table[lanes.lane[i] & 31])
}
#endif

#endif
