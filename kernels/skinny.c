/* y[i][j] = sum over k of x[i][k] w[j][k]: few rows of x, many of w, which is read from memory once.
 *
 * Every product is summed along k in the same order whatever the other rows are, so a row's result
 * does not depend on its mates. A tile of 3 x 4 sums fills the 16 registers of AVX2.
 */
#include <stddef.h>
#include <stdint.h>
#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#endif

#define LANES 8
#define ROWS 3
#define COLUMNS 4

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));

/* a b + c. Left to itself the compiler fuses it in some tiles and not in others. */
static inline __attribute__((always_inline)) vec fused(vec a, vec b, vec c) {
#if defined(__AVX2__) && defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

static inline __attribute__((always_inline)) vec widen(halves h) {
    return (vec)(__builtin_convertvector(h, bits) << 16);
}

static inline __attribute__((always_inline)) vec load(const void *w, ptrdiff_t at, const int half) {
    if (half) return widen(*(const halves *)((const uint16_t *)w + at));
    return *(const vec *)((const float *)w + at);
}

/* The last lanes of a row, zeros beyond it. */
static inline __attribute__((always_inline)) vec load_end(const void *w, ptrdiff_t at, int count,
                                                          const int half) {
    if (half) {
        halves h = {0};
        for (int l = 0; l < count; l++) h[l] = ((const uint16_t *)w)[at + l];
        return widen(h);
    }
    vec v = {0};
    for (int l = 0; l < count; l++) v[l] = ((const float *)w)[at + l];
    return v;
}

static inline __attribute__((always_inline)) void tile(
    const int rows, const int columns, const int half, const float *x, const void *w,
    const float *bias, float *y, ptrdiff_t width, ptrdiff_t i, ptrdiff_t j, ptrdiff_t height) {
    vec sum[ROWS][COLUMNS] = {{{0}}};
    ptrdiff_t k = 0;
    for (; k + LANES <= width; k += LANES) {
        vec from[ROWS];
        for (int r = 0; r < rows; r++) from[r] = load(w, (j + r) * width + k, half);
        for (int c = 0; c < columns; c++) {
            vec v = load(x, (i + c) * width + k, 0);
            for (int r = 0; r < rows; r++) sum[r][c] = fused(from[r], v, sum[r][c]);
        }
    }
    if (k < width) {
        int count = (int)(width - k);
        for (int r = 0; r < rows; r++) {
            vec from = load_end(w, (j + r) * width + k, count, half);
            for (int c = 0; c < columns; c++)
                sum[r][c] = fused(from, load_end(x, (i + c) * width + k, count, 0), sum[r][c]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) {
            vec s = sum[r][c];
            float total = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
            y[(i + c) * height + j + r] = total + (bias ? bias[j + r] : 0.0f);
        }
}

static inline __attribute__((always_inline)) void strip(
    const int rows, const int half, const float *x, const void *w, const float *bias, float *y,
    ptrdiff_t count, ptrdiff_t width, ptrdiff_t j, ptrdiff_t height) {
    ptrdiff_t i = 0;
    for (; i + 4 <= count; i += 4) tile(rows, 4, half, x, w, bias, y, width, i, j, height);
    switch (count - i) {
    case 3: tile(rows, 3, half, x, w, bias, y, width, i, j, height); break;
    case 2: tile(rows, 2, half, x, w, bias, y, width, i, j, height); break;
    case 1: tile(rows, 1, half, x, w, bias, y, width, i, j, height); break;
    }
}

static inline __attribute__((always_inline)) void product(
    const int half, const float *x, const void *w, const float *bias, float *y, ptrdiff_t count,
    ptrdiff_t width, ptrdiff_t height, int threads) {
    ptrdiff_t strips = (height + ROWS - 1) / ROWS;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (ptrdiff_t s = 0; s < strips; s++) {
        ptrdiff_t j = s * ROWS;
        switch (height - j) {
        case 1: strip(1, half, x, w, bias, y, count, width, j, height); break;
        case 2: strip(2, half, x, w, bias, y, count, width, j, height); break;
        default: strip(ROWS, half, x, w, bias, y, count, width, j, height);
        }
    }
}

/* x [count, width] and bias [height] (or null) float; w [height, width]; y [count, height] float. */
void product_float(const float *x, const void *w, const float *bias, float *y, ptrdiff_t count,
                   ptrdiff_t width, ptrdiff_t height, int threads) {
    product(0, x, w, bias, y, count, width, height, threads);
}

void product_bfloat16(const float *x, const void *w, const float *bias, float *y, ptrdiff_t count,
                      ptrdiff_t width, ptrdiff_t height, int threads) {
    product(1, x, w, bias, y, count, width, height, threads);
}
