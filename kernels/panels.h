/* What products.c is given, and how it stores activations.
 *
 * A panel of C columns of activations is stored for each segment as
 * int8: bytes [chunks, 8, C, 4], then the scale and the sum of each block [blocks, 2, C];
 * int16: the same, with two columns for a row, first that of the higher bytes;
 * exact: floats [chunks, 32, C], then the sum of each block [blocks, C], or, of bfloat16 for
 * products in pairs, pairs [chunks, 16, C], the first of a pair in the higher bits.
 * Other precisions than int16 have a column for each row.
 */
#ifndef SPECTOOL_PANELS_H
#define SPECTOOL_PANELS_H

#include "product.h"
#include "types.h"
#include "vectors.h"

#define SLICES 8
#define CHUNK 32
#define BLOCK 128
#define BLOCK_SLICES (BLOCK / 4)
#define STRIP 4
/* Rows whose sums a task keeps; more rows are computed in parts. */
#define MOST_ROWS 128

enum precision { EXACT, INT8, INT16 };
/* How a code becomes a value. TABLE: 16 levels. CENTERED: 16 levels less the zero. PLAIN: the code
 * less the zero. OUTLIERS: 32 levels, the upper ones where the neighbour in a pair is 8. COLUMN: 16
 * levels of each input. */
enum kind {
    TABLE,
    CENTERED,
    PLAIN,
    OUTLIERS,
    COLUMN,
    /* Codes below 16 less an integer, times pairs of bfloat16. */
    PAIRS,
    PAIRS_2,
    PAIRS_4,
    /* integer products of codes below 16, unpacked before, whose sums begin in 16 bits. */
    NIBBLES,
    /* integer products, of codes unpacked before or, by their bits, in registers. */
    INTEGER,
    INTEGER_1,
    INTEGER_2,
    INTEGER_4,
    INTEGER_8,
    LEVELS_1,
    LEVELS_2,
    LEVELS_4
};
struct block {
    int32_t chunks, group;
};

struct segment {
    const uint8_t *codes;       /* [strips, chunks, 4, bits, 64] */
    const void *scale;          /* [strips, groups, 4, 16] of `parameters` */
    const void *zero, *offset;  /* the same, or null */
    const float *levels;        /* exact: [tables, 16 or 32], or [chunks, 32, 16] by input */
    const uint8_t *byte_levels; /* integers: [tables, 64], 16 levels four times; or null */
    const float *level_scale;   /* integers: [tables], with `byte_levels` */
    const int32_t *table;       /* [strips, 4]: the table of a tile; null: the first */
    const struct block *blocks; /* [num_blocks] */
    const int32_t *columns;     /* [chunks, 32]: the inputs, -1 for padding; null: in order */
    const float *column_scale;  /* [chunks, 32] or null */
    int32_t num_blocks, chunks, groups, bits, kind, parameters;
    int32_t center;   /* integers: subtracted from every unsigned value, if there is no zero */
    int32_t is_whole; /* whether there is a zero, of integers that codes can have */
    int32_t is_grid;  /* whether values are codes less an integer */
};

INLINE float read(const void *x, ptrdiff_t at, int type) {
    if (type == FLOAT) return ((const float *)x)[at];
    const uint32_t bits = (uint32_t)((const uint16_t *)x)[at] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The bytes of a column of activations. */
INLINE ptrdiff_t column_bytes(const struct segment *s, int precision) {
    return precision != EXACT ? (ptrdiff_t)s->chunks * CHUNK + (ptrdiff_t)s->num_blocks * 8
                              : (ptrdiff_t)s->chunks * CHUNK * 4 + (ptrdiff_t)s->num_blocks * 4;
}

/* The columns of a row. */
INLINE int num_parts(const struct product *p) { return p->precision == INT16 ? 2 : 1; }

/* Copy the inputs of one block of a row into `out`; inputs of padding are zeros. */
INLINE void gather(const struct product *p, const struct segment *s, ptrdiff_t row, ptrdiff_t begin,
                   int count, float *out) {
    const ptrdiff_t base = row * p->num_inputs;
    if (s->columns == 0)
        for (int k = 0; k < count; k++) out[k] = read(p->x, base + begin + k, p->type);
    else
        for (int k = 0; k < count; k++) {
            const int32_t column = s->columns[begin + k];
            out[k] = column < 0 ? 0 : read(p->x, base + column, p->type);
        }
    if (s->column_scale)
        for (int k = 0; k < count; k++) out[k] *= s->column_scale[begin + k];
}

/* The largest magnitude; NaN if there is one, as its bits are the largest. */
INLINE float largest(const float *x, int count) {
    uint32_t most = 0, bits;
    for (int k = 0; k < count; k++) {
        memcpy(&bits, x + k, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float value;
    memcpy(&value, &most, sizeof value);
    return value;
}

/* The largest code of so many bytes, of which each is from -127 to 127: h, or 255 h + l. */
#define BASE 255
INLINE float largest_code(int parts) { return parts == 1 ? 127 : 127 * BASE + 127; }

/* Round the inputs of a block to codes of one or two bytes; a column of `out` has four of them every
 * `columns` fours. `scale` and `sum` have a number for each of the columns. */
INLINE void pack_codes(const float *x, int count, int parts, int columns, int8_t *out, float *scale,
                       int32_t *sum) {
    const float most = largest(x, count), limit = largest_code(parts);
    /* Below, the quotient would not be finite. */
    const float inverse = most > limit * 1e-38f ? limit / most : 0;
    float codes[BLOCK];
    int8_t bytes[BLOCK];
    for (int k = 0; k < count; k++) {
        /* To the nearest, ties to even. What is not finite becomes any code. */
        float code = __builtin_rintf(x[k] * inverse);
        code = code >= -limit ? code : -limit;
        codes[k] = code <= limit ? code : limit;
    }
    /* A scale that is not finite makes all of the row's sums NaN. */
    float step = most <= 3.4028235e38f ? most / limit : __builtin_nanf("");
    for (int part = parts - 1; part >= 0; part--) {
        int32_t total = 0;
        for (int k = 0; k < count; k++) {
            /* Never a tie, since the base is odd. */
            const float above = part ? __builtin_rintf(codes[k] * (1.0f / BASE)) : 0;
            bytes[k] = (int8_t)(codes[k] - above * BASE);
            codes[k] = part ? above : codes[k];
            total += bytes[k];
        }
        for (int k = 0; k < count; k += 4) memcpy(out + part * 4 + k * columns, bytes + k, 4);
        scale[part] = step;
        sum[part] = total;
        step *= BASE;
    }
}

/* Whether exact products take bfloat16 in pairs, by an instruction that multiplies and adds the
 * first of each pair, then the second, with the rounding of two fused multiply-adds. It takes
 * activations and sums below 2^-126 as zeros, which the other variants do not. */
INLINE int has_pairs(const struct product *p, const struct segment *s) {
    return HAS_PAIRS && p->precision == EXACT && p->type == BFLOAT16 && s->is_grid &&
           s->bits <= 4 && !s->column_scale && !s->offset;
}

/* Whether integer products begin their sums in 16 bits. */
INLINE int has_words(const struct segment *s) {
    return HAS_WORDS && s->bits <= 4 && !s->byte_levels;
}

INLINE ptrdiff_t num_panels(const struct product *p) {
    const ptrdiff_t rows = COLUMNS / num_parts(p);
    return p->num_rows * num_parts(p) <= NARROW ? 1 : (p->num_rows + rows - 1) / rows;
}

/* The first row of a panel; all have as many rows, or one more. */
INLINE ptrdiff_t first_row(const struct product *p, ptrdiff_t panel) {
    return panel * p->num_rows / num_panels(p);
}

static void pack_panel(void *context, ptrdiff_t panel) {
    const struct product *p = context;
    const ptrdiff_t first = first_row(p, panel);
    const int parts = num_parts(p), columns = parts * (int)(first_row(p, panel + 1) - first);
    char *out = p->scratch + first * p->row_bytes;
    float x[BLOCK];
    for (int i = 0; i < p->num_segments; i++) {
        const struct segment *s = p->segments + i;
        const ptrdiff_t unit = p->precision != EXACT ? 1 : 4;
        char *ends = out + (ptrdiff_t)s->chunks * CHUNK * unit * columns;
        for (int c = 0; c < columns; c += parts) {
            ptrdiff_t begin = 0;
            for (int b = 0; b < s->num_blocks; b++) {
                const int count = s->blocks[b].chunks * CHUNK;
                gather(p, s, first + c / parts, begin, count, x);
                if (p->precision != EXACT) {
                    pack_codes(x, count, parts, columns, (int8_t *)out + begin * columns + c * 4,
                               (float *)ends + 2 * b * columns + c,
                               (int32_t *)ends + (2 * b + 1) * columns + c);
                } else if (has_pairs(p, s)) {
                    uint32_t *pairs = (uint32_t *)out + begin / 2 * columns + c, bits[2];
                    for (int k = 0; k < count; k += 2, pairs += columns) {
                        memcpy(bits, x + k, sizeof bits);
                        *pairs = bits[0] | bits[1] >> 16;
                    }
                } else {
                    float total = 0;
                    for (int k = 0; k < count; k++)
                        ((float *)out)[(begin + k) * columns + c] = x[k];
                    for (int k = 0; s->offset && k < count; k++) total += x[k];
                    ((float *)ends)[b * columns + c] = total;
                }
                begin += count;
            }
        }
        out += column_bytes(s, p->precision) * columns;
    }
}

#endif
