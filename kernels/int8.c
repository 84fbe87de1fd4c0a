/* Products of few rows with a matrix of 8-bit codes and one scale per row.
 *
 * A code is exact as float and as bfloat16, so only sums and the final scaling round.
 */
#define NAME int8
#define WEIGHT_BYTES(half) 1
#include "few_rows.h"

/* Widen LANES codes to float. */
INLINE vec widen(const int8_t *p) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    vec v;
    for (int i = 0; i < LANES; i++) v[i] = p[i];
    return v;
#endif
}

INLINE void read_weights(const int half, const char *p, ptrdiff_t rest, vec *out) {
    int8_t tail[2 * LANES] = {0};
    if (rest < STEP(half)) p = memcpy(tail, p, rest);
    out[0] = widen((const int8_t *)p);
    if (half) out[1] = widen((const int8_t *)p + LANES);
#if PAIRED
    if (half) out[0] = (vec)_mm512_cvtne2ps_pbh((__m512)out[1], (__m512)out[0]);
#endif
}

/* Without paired products, bfloat16 is widened in the order of the codes. */
INLINE void read_x(const int half, const char *p, ptrdiff_t rest, vec *out) {
    if (PARTS(half) == 1) {
        out[0] = load(p, rest * (half ? 2 : 4));
        return;
    }
    uint16_t v[2 * LANES] = {0};
    memcpy(v, p, sizeof *v * (rest < 2 * LANES ? rest : 2 * LANES));
    for (int part = 0; part < 2; part++) {
        words wide;
        for (int i = 0; i < LANES; i++) wide[i] = (uint32_t)v[part * LANES + i] << 16;
        out[part] = (vec)wide;
    }
}
