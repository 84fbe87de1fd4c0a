/* Vectors of 16 lanes as two of AVX2 each; see vectors.h. */
#include <immintrin.h>

#define COLUMNS 4
#define WIDE 1
#define NARROW 2
#define TALL 2

typedef struct {
    __m256i low, high;
} ints;
typedef struct {
    __m256 low, high;
} floats;

/* A function of vectors by its halves. */
#define HALVES(type, operation, a) ((type){operation((a).low), operation((a).high)})
#define PAIRS(type, operation, a, b)                                                               \
    ((type){operation((a).low, (b).low), operation((a).high, (b).high)})

INLINE ints load_ints(const void *p) {
    const __m256i *halves = p;
    return (ints){_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
INLINE ints splat_int(int32_t v) { return (ints){_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
INLINE ints both(ints a, ints b) { return PAIRS(ints, _mm256_and_si256, a, b); }
INLINE ints either(ints a, ints b) { return PAIRS(ints, _mm256_or_si256, a, b); }
INLINE ints shift_left(ints v, const int by) {
    return (ints){_mm256_slli_epi32(v.low, by), _mm256_slli_epi32(v.high, by)};
}
INLINE ints shift_right(ints v, const int by) {
    return (ints){_mm256_srli_epi32(v.low, by), _mm256_srli_epi32(v.high, by)};
}

INLINE ints look_up_bytes(ints table, ints codes) {
    return PAIRS(ints, _mm256_shuffle_epi8, table, codes);
}

/* By a shuffle, where others shift and mask. */
#define HAS_BYTE_OF 1
INLINE ints byte_of(ints v, const int byte) {
    const int32_t first = (int32_t)0x80808000 + byte;
    const __m256i at = _mm256_broadcastsi128_si256(
        _mm_setr_epi32(first, first + 4, first + 8, first + 12));
    return (ints){_mm256_shuffle_epi8(v.low, at), _mm256_shuffle_epi8(v.high, at)};
}

INLINE __m256i mark_half(__m256i codes) {
    const __m256i swapped =
        _mm256_or_si256(_mm256_srli_epi16(codes, 8), _mm256_slli_epi16(codes, 8));
    return _mm256_and_si256(_mm256_cmpeq_epi8(swapped, _mm256_set1_epi8(8)), _mm256_set1_epi8(16));
}
INLINE ints mark_neighbours(ints codes) { return HALVES(ints, mark_half, codes); }

#if defined(__AVXVNNI__)
#define DOT_CENTER 0
INLINE __m256i dot_half(__m256i sum, __m256i w, __m256i x) {
    /* Not the intrinsic: GCC copies all sums of a loop from register to register with it. */
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
    return sum;
}
#else
/* Pairs of products are added in 16 bits, which hold 2 128 127 but not 2 255 127. */
#define DOT_CENTER 128
/* Keep a sum in a register: GCC reorders the sums of an unrolled loop, and spills the summands. */
INLINE __m256i keep(__m256i sum) {
    __asm__("" : "+x"(sum));
    return sum;
}
INLINE __m256i dot_half(__m256i sum, __m256i w, __m256i x) {
    const __m256i centered = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
    const __m256i pairs =
        _mm256_maddubs_epi16(_mm256_abs_epi8(centered), _mm256_sign_epi8(x, centered));
    return keep(_mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
}
#define HAS_WORDS 1
INLINE __m256i dot_words_half(__m256i words, __m256i w, __m256i x) {
    return keep(_mm256_add_epi16(words, _mm256_maddubs_epi16(w, x)));
}
INLINE ints dot_words(ints words, ints w, const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    const __m256i splat = _mm256_set1_epi32(four);
    return (ints){dot_words_half(words.low, w.low, splat),
                  dot_words_half(words.high, w.high, splat)};
}
INLINE __m256i widen_half(__m256i sum, __m256i words) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
}
INLINE ints widen_words(ints sum, ints words) { return PAIRS(ints, widen_half, sum, words); }
#endif

INLINE ints dot(ints sum, ints w, const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    const __m256i splat = _mm256_set1_epi32(four);
    return (ints){dot_half(sum.low, w.low, splat), dot_half(sum.high, w.high, splat)};
}

INLINE ints multiply_small(ints v, int32_t by) {
    const ints low = both(v, splat_int(0xffff)), splat = splat_int(by);
    return PAIRS(ints, _mm256_madd_epi16, low, splat);
}

INLINE floats load_floats(const float *p) {
    return (floats){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
INLINE void store_floats(float *p, floats v) {
    _mm256_storeu_ps(p, v.low);
    _mm256_storeu_ps(p + 8, v.high);
}
INLINE floats load_halves(const uint16_t *p) {
    const __m128i *halves = (const __m128i *)p;
    return (floats){_mm256_cvtph_ps(_mm_loadu_si128(halves)),
                    _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
INLINE floats splat(float v) { return (floats){_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
INLINE floats to_floats(ints v) { return HALVES(floats, _mm256_cvtepi32_ps, v); }
INLINE ints to_ints(floats v) { return HALVES(ints, _mm256_cvtps_epi32, v); }
INLINE floats add(floats a, floats b) { return PAIRS(floats, _mm256_add_ps, a, b); }
INLINE floats subtract(floats a, floats b) { return PAIRS(floats, _mm256_sub_ps, a, b); }
INLINE floats multiply(floats a, floats b) { return PAIRS(floats, _mm256_mul_ps, a, b); }
INLINE floats fused(floats a, floats b, floats c) {
    return (floats){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

/* A look-up takes seven instructions, a conversion two. */
#define HAS_SLOW_TABLES 1
/* Of 8 floats by the lowest three bits of a lane, of twice as many by one bit more. */
INLINE __m256 choose_8(const float *table, __m256i lanes) {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), lanes);
}
INLINE __m256 choose_16(const float *table, __m256i lanes) {
    return _mm256_blendv_ps(choose_8(table, lanes), choose_8(table + 8, lanes),
                            _mm256_castsi256_ps(_mm256_slli_epi32(lanes, 28)));
}
INLINE __m256 choose_32(const float *table, __m256i lanes) {
    return _mm256_blendv_ps(choose_16(table, lanes), choose_16(table + 16, lanes),
                            _mm256_castsi256_ps(_mm256_slli_epi32(lanes, 27)));
}
INLINE floats look_up_16(const float *table, ints lanes) {
    return (floats){choose_16(table, lanes.low), choose_16(table, lanes.high)};
}
INLINE floats look_up_32(const float *table, ints lanes) {
    return (floats){choose_32(table, lanes.low), choose_32(table, lanes.high)};
}

INLINE __m256 load_8_bfloats(const uint16_t *p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE floats load_bfloats(const uint16_t *p) {
    return (floats){load_8_bfloats(p), load_8_bfloats(p + 8)};
}

/* Of four vectors a, b, c, d, the sums of the lanes of each half: (0 + 2) + (1 + 3). */
INLINE __m256 add_quads(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256d ab = _mm256_castps_pd(
        _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)));
    const __m256d cd = _mm256_castps_pd(
        _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)));
    return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)),
                         _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
}
/* Of eight vectors, the sums of both halves. */
INLINE __m256 add_halves(__m256 first, __m256 second) {
    return _mm256_add_ps(_mm256_permute2f128_ps(first, second, 0x20),
                         _mm256_permute2f128_ps(first, second, 0x31));
}
INLINE __m256 add_8_lanes(const floats v[8]) {
    const __m256 low = add_halves(add_quads(v[0].low, v[1].low, v[2].low, v[3].low),
                                  add_quads(v[4].low, v[5].low, v[6].low, v[7].low));
    const __m256 high = add_halves(add_quads(v[0].high, v[1].high, v[2].high, v[3].high),
                                   add_quads(v[4].high, v[5].high, v[6].high, v[7].high));
    return _mm256_add_ps(low, high);
}
#define HAS_ADD_LANES 1
INLINE floats add_lanes(const floats v[LANES]) {
    return (floats){add_8_lanes(v), add_8_lanes(v + 8)};
}
