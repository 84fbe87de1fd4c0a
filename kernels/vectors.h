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

/* Convert to bfloat16: to the nearest, ties to even; NaN stays NaN. */
INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)(value != value ? 0x7fc0 : rounded);
}

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

/* sum + the products of each lane's four unsigned bytes, less DOT_CENTER, with the four signed ones
 * at x, from -127 to 127. */
#define DOT_CENTER 0
INLINE ints dot(ints sum, ints w, const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    /* Not the intrinsic: GCC copies all sums of a loop from register to register with it. */
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(_mm512_set1_epi32(four)));
    return sum;
}

/* The products of lanes with a number, all of 16 bits with a sign. */
INLINE ints multiply_small(ints v, int32_t by) {
    /* One of two 16-bit products must be zero: a mask of v is outside of the loops. */
    const ints low = _mm512_and_si512(v, _mm512_set1_epi32(0xffff));
    return _mm512_madd_epi16(low, _mm512_set1_epi32(by));
}

INLINE floats load_floats(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store_floats(float *p, floats v) { _mm512_storeu_ps(p, v); }
INLINE floats load_halves(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
INLINE floats load_bfloats(const uint16_t *p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE floats splat(float v) { return _mm512_set1_ps(v); }
INLINE floats to_floats(ints v) { return _mm512_cvtepi32_ps(v); }
/* Of floats that are integers. */
INLINE ints to_ints(floats v) { return _mm512_cvtps_epi32(v); }
INLINE floats add(floats a, floats b) { return _mm512_add_ps(a, b); }
INLINE floats subtract(floats a, floats b) { return _mm512_sub_ps(a, b); }
INLINE floats multiply(floats a, floats b) { return _mm512_mul_ps(a, b); }
/* a b + c with one rounding. */
INLINE floats fused(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }

/* The sums of the lanes of each of 16 vectors. Of four lanes a, b, c, d the sum is (a + c) +
 * (b + d); of four such sums, (s + t) + (u + v). */
#define HAS_ADD_LANES 1
INLINE floats add_lanes(const floats v[LANES]) {
    floats four[4];
    for (int i = 0; i < 4; i++) {
        const floats *w = v + 4 * i;
        const __m512d ab = _mm512_castps_pd(
            add(_mm512_unpacklo_ps(w[0], w[1]), _mm512_unpackhi_ps(w[0], w[1])));
        const __m512d cd = _mm512_castps_pd(
            add(_mm512_unpacklo_ps(w[2], w[3]), _mm512_unpackhi_ps(w[2], w[3])));
        four[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                      _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    }
    const floats low = add(_mm512_shuffle_f32x4(four[0], four[1], 0x88),
                           _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
    const floats high = add(_mm512_shuffle_f32x4(four[2], four[3], 0x88),
                            _mm512_shuffle_f32x4(four[2], four[3], 0xdd));
    return add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

/* table[lane] of 16 floats, by the lowest four bits of a lane. */
INLINE floats look_up_16(const float *table, ints lanes) {
    return _mm512_permutexvar_ps(lanes, _mm512_loadu_ps(table));
}
/* table[lane] of 32 floats, by the lowest five bits. */
INLINE floats look_up_32(const float *table, ints lanes) {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(table), lanes, _mm512_loadu_ps(table + LANES));
}

#ifdef __AVX512BF16__
#define HAS_PAIRS 1
/* Bytes 0 and 1 of each lane as its higher and its lower half, or bytes 2 and 3. */
INLINE ints widen_pair(ints bytes, const int upper) {
    const int32_t first = (int32_t)0x80008001, next = 0x00040004, by = upper * 0x00020002;
    return _mm512_shuffle_epi8(bytes,
                               _mm512_set4_epi32(first + by + 3 * next, first + by + 2 * next,
                                                 first + by + next, first + by));
}
INLINE ints add_words(ints a, ints b) { return _mm512_add_epi16(a, b); }
/* table[word] of 32 words, by the lowest five bits of each. */
INLINE ints look_up_words(ints table, ints words) { return _mm512_permutexvar_epi16(words, table); }
/* sum + the product of the higher halves with that of x + the product of the lower ones. */
INLINE floats dot_pair(floats sum, ints pairs, const uint32_t *x) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(pairs), "v"(_mm512_set1_epi32((int32_t)*x)));
    return sum;
}
#endif

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "vectors_avx2.h"
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include "vectors_neon.h"
#else
#include "vectors_plain.h"
#endif

#ifndef HAS_ADD_LANES
INLINE floats load_bfloats(const uint16_t *p) {
    float out[LANES];
    for (int i = 0; i < LANES; i++) {
        const uint32_t bits = (uint32_t)p[i] << 16;
        memcpy(out + i, &bits, sizeof bits);
    }
    return load_floats(out);
}
INLINE floats add_lanes(const floats v[LANES]) {
    float out[LANES];
    for (int i = 0; i < LANES; i++) {
        float x[LANES], sums[4];
        store_floats(x, v[i]);
        for (int k = 0; k < 4; k++)
            sums[k] = (x[4 * k] + x[4 * k + 2]) + (x[4 * k + 1] + x[4 * k + 3]);
        out[i] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    return load_floats(out);
}
#endif

/* One of the bytes of each lane, as an integer. */
#ifndef HAS_BYTE_OF
INLINE ints byte_of(ints v, const int byte) {
    return both(byte ? shift_right(v, 8 * byte) : v, splat_int(0xff));
}
#endif

/* Whether codes that are values are converted faster than looked up. */
#ifndef HAS_SLOW_TABLES
#define HAS_SLOW_TABLES 0
#endif

/* Whether there are instructions for pairs of bfloat16 in a lane. */
#ifndef HAS_PAIRS
#define HAS_PAIRS 0
#endif

/* Whether sums of 16 bits are faster than `dot`: `dot_words` adds the products of each lane's four
 * codes, below 16 and not centered, to two words a lane, and `widen_words` adds these to a sum. */
#ifndef HAS_WORDS
#define HAS_WORDS 0
#endif

#endif
