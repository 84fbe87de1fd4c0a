/* Products of rows with a dense matrix of their own type, summed in float.
 *
 * The inputs k are the lanes of vectors. A sum goes through the vectors in a fixed order and adds
 * its lanes last, so that a row's result does not depend on the other rows.
 *
 * Threads take parts of the outputs, and these in blocks of OUTPUTS. Of a block, SPAN inputs at a
 * time meet all rows of x, which are copied into panels of up to COLUMNS rows: the span of a panel
 * stays in the first cache while that of the block passes by from the second, in tiles whose sums
 * are in registers. Meanwhile the next span of the block is fetched, and the next panel.
 *
 * Shapes: N rows of x, m inputs, n outputs.
 */
#include "dense.h"

#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "pool.h"

#define COLUMNS 4
/* Outputs of a tile with so many rows of x, so that the sums, a step of the weights and of x are in
 * registers. */
#ifdef __AVX512F__
#define LANES 16
#define HEIGHT(columns) 6
#else
#define LANES 8
#define HEIGHT(columns) ((columns) == COLUMNS ? 3 : 4)
#endif
#define MOST_HEIGHT 6
/* A multiple of all heights. */
#define UNIT 12
/* Milliseconds of 2048x2048 floats and 512 rows, one Zen 1 core (torch: 136): blocks of 24 outputs
 * 141, 48 136, 96 133, whose sums are too many for a small second cache; spans of 256 inputs 141,
 * of 1024 136, too long for the first cache with more rows a panel. */
#define OUTPUTS (4 * UNIT)
#define SPAN 512
/* Inputs of a span times rows, of a single panel, which is read from the second cache: with all of
 * long rows in one span, x and tiles whose rows have the same places in the caches push each other
 * out. */
#define LONG_SPAN (1 << 14)
/* Panels whose sums a block keeps. */
#define PANELS 16

#ifdef __AVX512BF16__
#define PAIRED 1 /* one instruction multiplies bfloat16 and adds the products in pairs */
#else
#define PAIRED 0
#endif
#define BYTES (4 * LANES)
#define LINE 64 /* bytes that one prefetch reads */
/* A step along k takes LANES floats, or 2 LANES bfloat16 as PARTS vectors of x and of w. */
#define STEP(half) ((half) ? 2 * LANES : LANES)
#define PARTS(half) ((half) && !PAIRED ? 2 : 1)
#define SIZE(half) ((half) ? 2 : 4)
#define INLINE static inline __attribute__((always_inline))

/* A thread takes several parts, so that one that the system delays leaves some to the others; a
 * part takes longer than to wake a thread. */
#define THREAD_PARTS 4
#define PART_BYTES (64 << 10)
/* Rows that are copied faster by several threads. */
#define MANY_ROWS 16

typedef float vec __attribute__((vector_size(BYTES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(BYTES), aligned(4)));
/* In memory, where a vector may begin at any element. */
typedef float stored __attribute__((vector_size(BYTES), aligned(1), may_alias));

/* A product that threads share. */
struct product {
    const struct dense *given;
    ptrdiff_t panels, span, parts;
};

INLINE ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

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

/* Load the vector at p, of which only the first `rest` bytes are valid; zeros beyond them. */
INLINE vec load(const char *p, ptrdiff_t rest) {
    if (rest >= BYTES) return *(const stored *)p;
    vec v = {0};
    memcpy(&v, p, rest);
    return v;
}

/* Read STEP elements at p, or the `rest` that there are and zeros, as PARTS vectors: of bfloat16
 * the even ones as float, then the odd ones. */
INLINE void read_step(const int half, const char *p, ptrdiff_t rest, vec *out) {
    const vec v = load(p, rest * SIZE(half));
    out[0] = PARTS(half) == 2 ? (vec)((words)v << 16) : v;
    if (PARTS(half) == 2) out[1] = (vec)((words)v & 0xffff0000u);
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

/* Take one step of a tile along k: STEP weights of each output, or the `rest` that there are. */
INLINE void step(const int height, const int columns, const int half, const vec *x, const char *w,
                 ptrdiff_t row_bytes, ptrdiff_t rest, vec sum[MOST_HEIGHT][COLUMNS]) {
    vec from[2];
    for (int j = 0; j < height; j++) {
        read_step(half, w + j * row_bytes, rest, from);
        for (int c = 0; c < columns; c++)
            if (half && PAIRED)
                sum[j][c] = paired(from[0], x[c], sum[j][c]);
            else
                for (int part = 0; part < PARTS(half); part++)
                    sum[j][c] = fused(from[part], x[PARTS(half) * c + part], sum[j][c]);
    }
}

/* What the tiles of a block and a panel have in common: `span` inputs of the panel at x, whether
 * there are others after it, and the bytes of a row of w, of which every panel fetches a share. */
struct pass {
    const vec *x;
    ptrdiff_t row_bytes, span;
    int share, has_next;
};

/* Add the products of one tile to its sums, which are OUTPUTS apart; of each row at `next`, the
 * (1 << share)th part of a span is fetched. */
INLINE void tile(const int height, const int columns, const int half, const struct pass *p,
                 const char *w, const char *next, vec *sums) {
    vec sum[MOST_HEIGHT][COLUMNS];
    for (int j = 0; j < height; j++)
        for (int c = 0; c < columns; c++) sum[j][c] = sums[c * OUTPUTS + j];
    const vec *x = p->x;
    const ptrdiff_t fetched = ((ptrdiff_t)LINE << p->share) - 1;
    ptrdiff_t k = 0;
    for (; k + STEP(half) <= p->span; k += STEP(half)) {
        const ptrdiff_t at = k * SIZE(half);
        if ((at & fetched) == 0)
            for (int j = 0; j < height; j++)
                __builtin_prefetch(next + j * p->row_bytes + (at >> p->share), 0, 2);
        step(height, columns, half, x, w + at, p->row_bytes, STEP(half), sum);
        x += columns * PARTS(half);
    }
    if (k < p->span)
        step(height, columns, half, x, w + k * SIZE(half), p->row_bytes, p->span - k, sum);
    for (int j = 0; j < height; j++)
        for (int c = 0; c < columns; c++) sums[c * OUTPUTS + j] = sum[j][c];
}

/* Add the products of a panel with `outputs` rows of w to their sums. */
INLINE void tiles(const int columns, const int half, const struct pass *p, const char *w,
                  const char *next, ptrdiff_t outputs, vec *sums) {
    /* The panels of a span are one after another. */
    const ptrdiff_t bytes = p->span * (PARTS(half) * BYTES / STEP(half)) * columns;
    const ptrdiff_t fetched = p->has_next ? bytes : 0;
    ptrdiff_t j = 0;
    for (; j + HEIGHT(columns) <= outputs; j += HEIGHT(columns)) {
        for (ptrdiff_t at = fetched * j / outputs; at < fetched * (j + HEIGHT(columns)) / outputs;
             at += LINE)
            __builtin_prefetch((const char *)p->x + bytes + at, 0, 3);
        tile(HEIGHT(columns), columns, half, p, w + j * p->row_bytes, next + j * p->row_bytes,
             sums + j);
    }
    for (; j < outputs; j++)
        tile(1, columns, half, p, w + j * p->row_bytes, next + j * p->row_bytes, sums + j);
}

/* The first row of a panel; all have as many rows, or one more. */
INLINE ptrdiff_t first_row(const struct product *p, ptrdiff_t panel) {
    return panel * p->given->num_rows / p->panels;
}

/* The vectors of x before inputs k of row i, which begin a span of a panel. */
INLINE ptrdiff_t place(const int half, const struct product *p, ptrdiff_t k, ptrdiff_t i) {
    const ptrdiff_t span = least(p->span, p->given->num_inputs - k);
    return (k / STEP(half) * p->given->num_rows + (span + STEP(half) - 1) / STEP(half) * i) *
           PARTS(half);
}

/* Store an output: in bfloat16 to the nearest, ties to even; NaN stays NaN. */
INLINE void store(const int half, const struct dense *d, ptrdiff_t at, float value) {
    if (!half) {
        ((float *)d->y)[at] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits = value != value ? 0x7fc00000 : bits + 0x7fff + (bits >> 16 & 1);
    ((uint16_t *)d->y)[at] = (uint16_t)(bits >> 16);
}

/* Compute `outputs` of at most OUTPUTS from number j on. */
INLINE void block(const int half, const struct product *p, ptrdiff_t j, ptrdiff_t outputs) {
    const struct dense *d = p->given;
    const ptrdiff_t row_bytes = d->num_inputs * SIZE(half);
    const char *w = (const char *)d->w + j * row_bytes;
    vec sums[PANELS * COLUMNS * OUTPUTS];
    for (ptrdiff_t first = 0; first < p->panels; first += PANELS) {
        const ptrdiff_t end = least(first + PANELS, p->panels), row = first_row(p, first);
        const ptrdiff_t count = first_row(p, end) - row;
        struct pass pass = {.row_bytes = row_bytes, .share = 0, .has_next = p->panels > 1};
        while ((end - first) >> (pass.share + 1)) pass.share++;
        memset(sums, 0, count * OUTPUTS * sizeof *sums);
        for (ptrdiff_t k = 0; k < d->num_inputs; k += p->span) {
            pass.span = least(p->span, d->num_inputs - k);
            const char *from = w + k * SIZE(half);
            /* The next span, or the first one of the next block; for a single panel the next tile,
             * as all of a long span would be too much. */
            const char *next = k + pass.span < d->num_inputs ? from + pass.span * SIZE(half)
                                                             : w + outputs * row_bytes;
            if (p->panels == 1) next = from + HEIGHT(d->num_rows) * row_bytes;
            for (ptrdiff_t panel = first; panel < end; panel++) {
                const ptrdiff_t i = first_row(p, panel);
                vec *to = sums + (i - row) * OUTPUTS;
                pass.x = (const vec *)d->scratch + place(half, p, k, i);
                switch (first_row(p, panel + 1) - i) {
                case 1: tiles(1, half, &pass, from, next, outputs, to); break;
                case 2: tiles(2, half, &pass, from, next, outputs, to); break;
                case 3: tiles(3, half, &pass, from, next, outputs, to); break;
                default: tiles(COLUMNS, half, &pass, from, next, outputs, to);
                }
                next += pass.span * SIZE(half) >> pass.share;
            }
        }
        for (ptrdiff_t i = 0; i < count; i++)
            for (ptrdiff_t r = 0; r < outputs; r++)
                store(half, d, (row + i) * d->num_outputs + j + r,
                      total(sums[i * OUTPUTS + r]) + (d->bias ? d->bias[j + r] : 0.0f));
    }
}

/* Compute a part of the outputs. */
INLINE void compute_part(const int half, const struct product *p, ptrdiff_t part) {
    const ptrdiff_t units = (p->given->num_outputs + UNIT - 1) / UNIT;
    const ptrdiff_t end = least((part + 1) * units / p->parts * UNIT, p->given->num_outputs);
    for (ptrdiff_t j = part * units / p->parts * UNIT; j < end; j += OUTPUTS)
        block(half, p, j, least(OUTPUTS, end - j));
}

/* Copy the rows of a panel, step by step along k. */
INLINE void fill_panel(const int half, const struct product *p, ptrdiff_t panel) {
    const struct dense *d = p->given;
    const ptrdiff_t first = first_row(p, panel), end = first_row(p, panel + 1);
    for (ptrdiff_t begin = 0; begin < d->num_inputs; begin += p->span) {
        vec *out = (vec *)d->scratch + place(half, p, begin, first);
        for (ptrdiff_t k = begin; k < least(begin + p->span, d->num_inputs); k += STEP(half))
            for (ptrdiff_t i = first; i < end; i++, out += PARTS(half))
                read_step(half, (const char *)d->x + (i * d->num_inputs + k) * SIZE(half),
                          d->num_inputs - k, out);
    }
}

static void compute_part_float(void *of, ptrdiff_t part) { compute_part(0, of, part); }
static void compute_part_bfloat16(void *of, ptrdiff_t part) { compute_part(1, of, part); }
static void fill_panel_float(void *of, ptrdiff_t panel) { fill_panel(0, of, panel); }
static void fill_panel_bfloat16(void *of, ptrdiff_t panel) { fill_panel(1, of, panel); }

void spectool_dense(const struct dense *given) {
    const int half = given->is_bfloat16, threads = given->threads;
    const ptrdiff_t panels = (given->num_rows + COLUMNS - 1) / COLUMNS;
    const ptrdiff_t units = (given->num_outputs + UNIT - 1) / UNIT;
    const ptrdiff_t blocks = (given->num_outputs + OUTPUTS - 1) / OUTPUTS;
    const ptrdiff_t share = threads * THREAD_PARTS;
    const ptrdiff_t work = given->num_outputs * given->num_inputs * SIZE(half) * panels;
    const ptrdiff_t parts = least(least(work / PART_BYTES, units), share > blocks ? share : blocks);
    const ptrdiff_t span = panels > 1 ? SPAN : LONG_SPAN / 32 / given->num_rows * 32;
    struct product p = {given, panels, span, parts ? parts : 1};
    pool_run(half ? fill_panel_bfloat16 : fill_panel_float, &p, panels,
             given->num_rows < MANY_ROWS ? 1 : threads);
    pool_run(half ? compute_part_bfloat16 : compute_part_float, &p, p.parts, threads);
}
