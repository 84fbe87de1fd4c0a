/* Products with a matrix whose rows are sums of shared vectors: y[i][j] = bias[j] + the sum over
 * entries e of x[i]'s part of e times vector codes[j][e] of codebook e.
 *
 * An entry is a stage and a group of columns; entries e and e + groups are stages of one group. The
 * products of x with all vectors are tabulated, then each output adds up those that its codes name.
 * Rows of x are lanes of a vector, and a table has them side by side: one load and one addition
 * serve up to 16 rows. Products and sums have a fixed order, so a row's result depends neither on
 * the other rows nor on the instruction set.
 */
#include <stdint.h>
#include <string.h>

#include "pool.h"

#define INLINE static inline __attribute__((always_inline))
/* Vectors and columns multiplied at a time, and outputs added up at a time. */
#define VECTORS 8
#define COLUMNS 64
#define OUTPUTS 4
#if defined(__AVX512F__)
#define MOST_LANES 16
#elif defined(__AVX2__)
#define MOST_LANES 8
#else
#define MOST_LANES 4
#endif
/* Bytes of the table that are in use at a time: less than the second cache. */
#define TABLE_BYTES (128 << 10)
#define THREAD_PARTS 4

struct lookup {
    const float *x;           /* [columns, lanes], zeros beyond the rows */
    const uint16_t *codebook; /* float16 [entries, vectors, width] */
    const void *codes;        /* unsigned, of 1 or 2 bytes [outputs, entries] */
    const float *bias;
    float *y, *table, *sums; /* [rows, outputs], [entries, vectors, lanes], [outputs, lanes] */
    ptrdiff_t rows, outputs, entries, groups, vectors, width, parts;
    int lanes;
};

INLINE ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

/* Convert float16 to float, exact for finite numbers. */
INLINE void widen(const uint16_t *half, float *out, ptrdiff_t count) {
    for (ptrdiff_t k = 0; k < count; k++) {
        uint32_t bits = (uint32_t)(half[k] & 0x7fff) << 13;
        float value;
        memcpy(&value, &bits, sizeof value);
        value *= 0x1p112f;
        memcpy(&bits, &value, sizeof value);
        bits |= (uint32_t)(half[k] & 0x8000) << 16;
        memcpy(out + k, &bits, sizeof bits);
    }
}

/* Tabulate a part of the vectors, up to VECTORS of an entry at a time. */
#define TABULATE(LANES)                                                                            \
    static void tabulate_##LANES(void *context, ptrdiff_t part) {                                  \
        typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));                   \
        const struct lookup *of = context;                                                         \
        const ptrdiff_t all = of->entries * of->vectors, end = (part + 1) * all / of->parts;       \
        ptrdiff_t count;                                                                           \
        for (ptrdiff_t v = part * all / of->parts; v < end; v += count) {                          \
            count = least(least(VECTORS, end - v), of->vectors - v % of->vectors);                 \
            const float *x = of->x + v / of->vectors % of->groups * of->width * LANES;             \
            lanes sum[VECTORS] = {{0}};                                                            \
            float values[VECTORS][COLUMNS];                                                        \
            for (ptrdiff_t k = 0; k < of->width; k += COLUMNS) {                                   \
                const ptrdiff_t columns = least(COLUMNS, of->width - k);                           \
                for (ptrdiff_t i = 0; i < VECTORS; i++)                                            \
                    widen(of->codebook + (v + least(i, count - 1)) * of->width + k, values[i],     \
                          columns);                                                                \
                for (ptrdiff_t c = 0; c < columns; c++, x += LANES)                                \
                    for (int i = 0; i < VECTORS; i++)                                              \
                        sum[i] += *(const lanes *)x * values[i][c];                                \
            }                                                                                      \
            for (ptrdiff_t i = 0; i < count; i++)                                                  \
                *(lanes *)(of->table + (v + i) * LANES) = sum[i];                                  \
        }                                                                                          \
    }

/* Add up a part of the outputs. */
#define ADD_UP(LANES, CODE)                                                                        \
    static void add_up_##LANES##_##CODE(void *context, ptrdiff_t part) {                           \
        typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));                   \
        const struct lookup *of = context;                                                         \
        const ptrdiff_t from = part * of->outputs / of->parts;                                     \
        const ptrdiff_t to = (part + 1) * of->outputs / of->parts;                                 \
        const ptrdiff_t row = of->vectors * LANES;                                                 \
        const ptrdiff_t some = 1 + (TABLE_BYTES / 4 - 1) / row;                                    \
        for (ptrdiff_t e = 0; e < of->entries; e += some) {                                        \
            const ptrdiff_t count = least(some, of->entries - e);                                  \
            for (ptrdiff_t j = from; j < to; j += OUTPUTS) {                                       \
                const CODE *codes[OUTPUTS];                                                        \
                lanes sum[OUTPUTS];                                                                \
                for (int i = 0; i < OUTPUTS; i++) {                                                \
                    const ptrdiff_t output = least(j + i, to - 1);                                 \
                    codes[i] = (const CODE *)of->codes + output * of->entries + e;                 \
                    sum[i] = e ? *(lanes *)(of->sums + output * LANES) : (lanes){0};               \
                }                                                                                  \
                const float *table = of->table + e * row;                                          \
                for (ptrdiff_t k = 0; k < count; k++, table += row)                                \
                    for (int i = 0; i < OUTPUTS; i++)                                              \
                        sum[i] += *(const lanes *)(table + codes[i][k] * (ptrdiff_t)LANES);        \
                for (int i = 0; i < OUTPUTS; i++)                                                  \
                    *(lanes *)(of->sums + least(j + i, to - 1) * LANES) = sum[i];                  \
            }                                                                                      \
        }                                                                                          \
        for (ptrdiff_t j = from; j < to; j++)                                                      \
            for (ptrdiff_t i = 0; i < of->rows; i++)                                               \
                of->y[i * of->outputs + j] =                                                       \
                    of->sums[j * LANES + i] + (of->bias ? of->bias[j] : 0.0f);                     \
    }

#define FUNCTIONS(LANES)                                                                           \
    TABULATE(LANES)                                                                                \
    ADD_UP(LANES, uint8_t)                                                                         \
    ADD_UP(LANES, uint16_t)
FUNCTIONS(4)
#if MOST_LANES > 4
FUNCTIONS(8)
#endif
#if MOST_LANES > 8
FUNCTIONS(16)
#endif

/* Multiply up to MOST_LANES rows. */
static void multiply(struct lookup *of, int code_bytes, int threads) {
    /* Short parts: a thread that the system delays leaves the rest to the others. */
    of->parts = threads > 1 ? threads * THREAD_PARTS : 1;
#define RUN(LANES)                                                                                 \
    do {                                                                                           \
        pool_run(tabulate_##LANES, of, of->parts, threads);                                        \
        pool_run(code_bytes == 1 ? add_up_##LANES##_uint8_t : add_up_##LANES##_uint16_t, of,       \
                 of->parts, threads);                                                              \
    } while (0)
#if MOST_LANES > 8
    if (of->lanes == 16) RUN(16);
#endif
#if MOST_LANES > 4
    if (of->lanes == 8) RUN(8);
#endif
    if (of->lanes == 4) RUN(4);
}

/* x [count, groups width] and y [count, outputs]; scratch: MOST_LANES times (groups width + entries
 * vectors + outputs) floats. The rest as above. */
void lookup_float32(const float *x, const uint16_t *codebook, const void *codes, const float *bias,
                    float *y, float *scratch, ptrdiff_t count, ptrdiff_t outputs, ptrdiff_t entries,
                    ptrdiff_t groups, ptrdiff_t vectors, ptrdiff_t width, int code_bytes,
                    int threads) {
    const ptrdiff_t columns = groups * width;
    struct lookup of = {scratch,
                        codebook,
                        codes,
                        bias,
                        y,
                        scratch + MOST_LANES * columns,
                        scratch + MOST_LANES * (columns + entries * vectors),
                        0,
                        outputs,
                        entries,
                        groups,
                        vectors,
                        width,
                        0,
                        0};
    for (ptrdiff_t i = 0; i < count; i += MOST_LANES) {
        of.rows = least(MOST_LANES, count - i);
        int lanes = 4;
        while (lanes < of.rows) lanes *= 2;
        of.lanes = lanes;
        for (ptrdiff_t k = 0; k < columns; k++)
            for (int lane = 0; lane < lanes; lane++)
                scratch[k * lanes + lane] = lane < of.rows ? x[(i + lane) * columns + k] : 0.0f;
        of.y = y + i * outputs;
        multiply(&of, code_bytes, threads);
    }
}
