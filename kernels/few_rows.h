/* y[i][j] = scale[j] sum over k of x[i][k] w[j][k] + bias[j], for few rows of x and many of w; w is
 * read once.
 *
 * A kernel's file defines NAME, WEIGHT_BYTES(half), the bytes of a stored weight when x is bfloat16
 * (half = 1) or float (half = 0), and the functions `read_weights` and `read_x` below, and includes
 * this file, which exports NAME_float32 and NAME_bfloat16.
 *
 * Every product is summed along k in a fixed order, so a row's result does not depend on the other
 * rows. A tile of ROWS rows of w and up to COLUMNS rows of x keeps its sums in registers. x is
 * copied into contiguous panels, because rows a power of two apart would evict each other from the
 * cache. While a tile computes, the next rows of w are prefetched, to keep the memory busy.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "pool.h"

#define COLUMNS 4
#ifdef __AVX512F__
#define LANES 16
#define ROWS 6
#else
#define LANES 8
#define ROWS 2
#endif
#ifdef __AVX512BF16__
#define PAIRED 1 /* one instruction multiplies bfloat16 and adds the products in pairs */
#else
#define PAIRED 0
#endif
#define BYTES (4 * LANES)
#define LINE 64 /* bytes that one prefetch reads */
/* A step along k takes LANES floats, or 2 LANES bfloat16 as PARTS vectors of x and of w. */
#define STEP(half) (half ? 2 * LANES : LANES)
#define PARTS(half) (half && !PAIRED ? 2 : 1)
#define INLINE static inline __attribute__((always_inline))

/* Threads take parts of w, several each, so that one that the system delays leaves some to the
 * others; a part takes longer than to wake a thread. */
#define THREAD_PARTS 4
#define PART_BYTES (64 << 10)

typedef float vec __attribute__((vector_size(BYTES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(BYTES), aligned(4)));
/* In memory, where a vector may begin at any element. */
typedef float stored __attribute__((vector_size(BYTES), aligned(1), may_alias));

/* Read STEP weights at p, or the `rest` that there are and zeros, as PARTS vectors. */
INLINE void read_weights(const int half, const char *p, ptrdiff_t rest, vec *out);
/* The same of a row of x, in the order of the weights. */
INLINE void read_x(const int half, const char *p, ptrdiff_t rest, vec *out);

/* a b + c. Explicit, because the compiler would fuse it in some tiles and not in others. */
INLINE vec fused(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

INLINE vec paired(vec a, vec b, vec c) {
#if PAIRED
    return (vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
    return c;
#endif
}

/* The even and the odd elements of a vector of bfloat16, as float. */
INLINE vec even(vec v) { return (vec)((words)v << 16); }
INLINE vec odd(vec v) { return (vec)((words)v & 0xffff0000u); }

/* Load the vector at p, of which only the first `rest` bytes are valid; zeros beyond them. */
INLINE vec load(const char *p, ptrdiff_t rest) {
    if (rest >= BYTES) return *(const stored *)p;
    vec v = {0};
    memcpy(&v, p, rest);
    return v;
}

INLINE float total(vec v) {
#if LANES == 16
    typedef float half __attribute__((vector_size(32)));
    half parts[2];
    memcpy(parts, &v, sizeof v);
    half s = parts[0] + parts[1];
#else
    vec s = v;
#endif
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

/* Take one step of a tile along k: STEP weights of each row, or the `rest` that there are. */
INLINE void step(const int rows, const int columns, const int half, const vec *x, const char *w,
                 ptrdiff_t size, ptrdiff_t rest, vec sum[ROWS][COLUMNS]) {
    vec from[2];
    for (int r = 0; r < rows; r++) {
        read_weights(half, w + r * size, rest, from);
        for (int c = 0; c < columns; c++)
            if (half && PAIRED)
                sum[r][c] = paired(from[0], x[c], sum[r][c]);
            else
                for (int part = 0; part < PARTS(half); part++)
                    sum[r][c] = fused(from[part], x[PARTS(half) * c + part], sum[r][c]);
    }
}

/* Compute one tile. A row of w has `width` weights; bytes >> share of each row at `next` are
 * prefetched. */
INLINE void tile(const int rows, const int columns, const int half, const vec *x, const char *w,
                 const float *scale, const float *bias, float *y, ptrdiff_t width, ptrdiff_t height,
                 const char *next, int share) {
    const ptrdiff_t size = width * WEIGHT_BYTES(half);
    vec sum[ROWS][COLUMNS] = {{{0}}};
    ptrdiff_t k = 0;
    for (; k + STEP(half) <= width; k += STEP(half)) {
        const ptrdiff_t at = k * WEIGHT_BYTES(half);
        if (at % LINE == 0)
            for (int r = 0; r < rows; r++)
                __builtin_prefetch(next + r * size + (at >> share), 0, 2);
        step(rows, columns, half, x, w + at, size, STEP(half), sum);
        x += columns * PARTS(half);
    }
    if (k < width)
        step(rows, columns, half, x, w + k * WEIGHT_BYTES(half), size, width - k, sum);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++)
            y[c * height + r] =
                total(sum[r][c]) * (scale ? scale[r] : 1.0f) + (bias ? bias[r] : 0.0f);
}

/* Copy the rows of x into panels of up to COLUMNS rows, step by step along k. */
INLINE void fill_panels(const int half, const char *x, vec *out, ptrdiff_t count, ptrdiff_t width,
                        ptrdiff_t panels) {
    for (ptrdiff_t p = 0; p < panels; p++)
        for (ptrdiff_t k = 0; k < width; k += STEP(half))
            for (ptrdiff_t i = p * count / panels; i < (p + 1) * count / panels; i++) {
                read_x(half, x + (i * width + k) * (half ? 2 : 4), width - k, out);
                out += PARTS(half);
            }
}

/* A product that threads share. */
struct product {
    const char *w;
    const float *scale, *bias;
    float *y;
    const vec *x; /* in panels */
    ptrdiff_t count, width, height, panels, parts;
};

/* Compute `rows` rows of w from row j on. */
INLINE void block(const int half, const struct product *of, const int rows, ptrdiff_t j) {
    const ptrdiff_t size = of->width * WEIGHT_BYTES(half), height = of->height;
    const ptrdiff_t vectors = (of->width + STEP(half) - 1) / STEP(half) * PARTS(half);
    const float *scale = of->scale ? of->scale + j : 0, *bias = of->bias ? of->bias + j : 0;
    /* Each panel prefetches its share of the next rows. */
    int share = 0;
    while (of->panels >> (share + 1)) share++;
    for (ptrdiff_t p = 0; p < of->panels; p++) {
        const ptrdiff_t i = p * of->count / of->panels;
        const char *next = of->w + (j + rows) * size + p * (size >> share);
#define TILE(C)                                                                                    \
    tile(rows, C, half, of->x + i * vectors, of->w + j * size, scale, bias, of->y + i * height + j, \
         of->width, height, next, share)
        switch ((p + 1) * of->count / of->panels - i) {
        case 1: TILE(1); break;
        case 2: TILE(2); break;
        case 3: TILE(3); break;
        default: TILE(4);
        }
    }
}

/* Compute one part of the rows of w: blocks of ROWS rows; the last part has the rest. */
INLINE void compute_part(const int half, const struct product *of, ptrdiff_t part) {
    const ptrdiff_t whole = of->height / ROWS, last = (part + 1) * whole / of->parts;
    for (ptrdiff_t s = part * whole / of->parts; s < last; s++) block(half, of, ROWS, s * ROWS);
    if (part + 1 == of->parts)
        for (ptrdiff_t j = whole * ROWS; j < of->height; j++) block(half, of, 1, j);
}

static void compute_part_float(void *of, ptrdiff_t part) { compute_part(0, of, part); }
static void compute_part_bfloat16(void *of, ptrdiff_t part) { compute_part(1, of, part); }

INLINE void product(const int half, const char *x, const char *w, const float *scale,
                    const float *bias, float *y, float *scratch, ptrdiff_t count, ptrdiff_t width,
                    ptrdiff_t height, int threads) {
    const ptrdiff_t panels = (count + COLUMNS - 1) / COLUMNS;
    ptrdiff_t parts = height * width * WEIGHT_BYTES(half) * panels / PART_BYTES;
    if (parts > threads * THREAD_PARTS) parts = threads * THREAD_PARTS;
    if (parts < 1) parts = 1;
    fill_panels(half, x, (vec *)scratch, count, width, panels);
    struct product of = {w,     scale, bias,   y,      (const vec *)scratch,
                         count, width, height, panels, parts};
    pool_run(half ? compute_part_bfloat16 : compute_part_float, &of, parts, threads);
}

#define JOIN(name, type) name##_##type
#define EXPORTED(name, type) JOIN(name, type)

/* x [count, width] of one type; w [height, width] as the kernel stores it; scale and bias [height]
 * (or null) and y [count, height] float; scratch: count times (width rounded up to 32) floats. */
void EXPORTED(NAME, float32)(const void *x, const void *w, const float *scale, const float *bias,
                             float *y, float *scratch, ptrdiff_t count, ptrdiff_t width,
                             ptrdiff_t height, int threads) {
    product(0, x, w, scale, bias, y, scratch, count, width, height, threads);
}

void EXPORTED(NAME, bfloat16)(const void *x, const void *w, const float *scale, const float *bias,
                              float *y, float *scratch, ptrdiff_t count, ptrdiff_t width,
                              ptrdiff_t height, int threads) {
    product(1, x, w, scale, bias, y, scratch, count, width, height, threads);
}
