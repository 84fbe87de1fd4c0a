/* Blocks of weights, unpacked, and their products with panels of activations. */
#ifndef SPECTOOL_TILES_H
#define SPECTOOL_TILES_H

#include "panels.h"

/* A loop that is unrolled, so that the sums of a tile stay in registers. */
#define EACH(i, count) _Pragma("GCC unroll 8") for (int i = 0; i < (count); i++)

/* The codes of one slice of a plane of `width` bits. */
INLINE ints plane_slice(const uint8_t *lines, const int width, const int slice) {
    const int line = slice * width / 8, shift = slice * width % 8;
    const ints v = load_ints(lines + line * LINE);
    if (width == 8) return v;
    return both(shift_right(v, shift), splat_int(0x01010101 * ((1 << width) - 1)));
}

/* Unpack one chunk of a tile of codes of `bits`: planes of a, b and c bits. */
INLINE void unpack_chunk(const uint8_t *lines, const int a, const int b, const int c, ints *out) {
    EACH (s, SLICES) {
        ints v = plane_slice(lines, a, s);
        if (b) v = either(v, shift_left(plane_slice(lines + a * LINE, b, s), a));
        if (c) v = either(v, shift_left(plane_slice(lines + (a + b) * LINE, c, s), a + b));
        out[s * STRIP] = v;
    }
}

/* Fetch lines into the cache before they are read. */
INLINE void fetch(const uint8_t *lines, const int count) {
    for (int line = 0; line < count; line++) __builtin_prefetch(lines + line * LINE, 0, 3);
}

/* What a task needs of one block of its strip. */
struct weights {
    ints codes[BLOCK_SLICES][STRIP]; /* unpacked, unless the product unpacks them itself */
    const uint8_t *lines;
    floats scale[STRIP], zero[STRIP], offset[STRIP];
    ints whole_zero[STRIP]; /* the zero, or the center, if that is an integer */
    ints byte_levels[STRIP];
    const float *levels[STRIP];
    int chunks;
};

/* Unpack one block of the first `tiles` tiles of a strip; fetch the next block of as many lines. */
static void unpack_block(const struct segment *s, int tiles, struct weights *w) {
    const ptrdiff_t size = (ptrdiff_t)s->bits * LINE, next = w->chunks * STRIP * size;
    for (int chunk = 0; chunk < w->chunks; chunk++)
        for (int v = 0; v < tiles; v++) {
            const uint8_t *lines = w->lines + (chunk * STRIP + v) * size;
            ints *to = &w->codes[chunk * SLICES][v];
            fetch(lines + next, s->bits);
            switch (s->bits) {
            case 1: unpack_chunk(lines, 1, 0, 0, to); break;
            case 2: unpack_chunk(lines, 2, 0, 0, to); break;
            case 3: unpack_chunk(lines, 2, 1, 0, to); break;
            case 4: unpack_chunk(lines, 4, 0, 0, to); break;
            case 5: unpack_chunk(lines, 4, 1, 0, to); break;
            case 6: unpack_chunk(lines, 4, 2, 0, to); break;
            case 7: unpack_chunk(lines, 4, 2, 1, to); break;
            default: unpack_chunk(lines, 8, 0, 0, to);
            }
        }
}

/* The 16 parameters of a tile's group. */
INLINE floats parameters(const struct segment *s, const void *of, ptrdiff_t strip, int group,
                         int v) {
    const ptrdiff_t at = ((strip * s->groups + group) * STRIP + v) * LANES;
    return s->parameters == HALF ? load_halves((const uint16_t *)of + at)
                                 : load_floats((const float *)of + at);
}

/* The products of one block: `columns` rows times the `height` tiles of a strip from `first` on. */

/* The sums of integer products begin with those of the zeros. */
INLINE void begin_int8(const int columns, const int height, const int first,
                       const struct weights *w, const int32_t *total, ints acc[COLUMNS][TALL]) {
    EACH (c, columns)
        EACH (v, height) acc[c][v] = multiply_small(w->whole_zero[first + v], -total[c]);
}

/* Scale the sums of integer products, and add them to the sums of the rows. */
INLINE void end_int8(const int columns, const int height, const int first, const struct segment *s,
                     const struct weights *w, const float *scale, const int32_t *total,
                     ints acc[COLUMNS][TALL], float *sum) {
    EACH (c, columns) {
        const floats by = splat(scale[c]);
        EACH (v, height) {
            float *at = sum + (c * STRIP + first + v) * LANES;
            floats value = to_floats(acc[c][v]);
            if (s->zero && !s->is_whole)
                value = subtract(value, multiply(w->zero[first + v], splat((float)total[c])));
            value = multiply(value, multiply(w->scale[first + v], by));
            if (s->offset) {
                const floats both_sums = multiply(splat((float)total[c]), by);
                value = add(value, multiply(w->offset[first + v], both_sums));
            }
            store_floats(at, add(load_floats(at), value));
        }
    }
}

/* With codes of a block that were unpacked for several panels. */
INLINE void block_int8(const int columns, const int height, const int first,
                       const struct segment *s, const struct weights *w, const int8_t *x,
                       const float *scale, const int32_t *total, float *sum) {
    ints acc[COLUMNS][TALL];
    begin_int8(columns, height, first, w, total, acc);
    for (int slice = 0; slice < w->chunks * SLICES; slice++, x += columns * 4)
        EACH (c, columns)
            EACH (v, height) acc[c][v] = dot(acc[c][v], w->codes[slice][first + v], x + c * 4);
    end_int8(columns, height, first, s, w, scale, total, acc, sum);
}

/* With codes of `bits`, unpacked in registers. */
INLINE void block_direct(const int columns, const int height, const int first, const int bits,
                         const int has_levels, const struct segment *s, const struct weights *w,
                         const int8_t *x, const float *scale, const int32_t *total, float *sum) {
    ints acc[COLUMNS][TALL];
    begin_int8(columns, height, first, w, total, acc);
    const uint8_t *lines = w->lines + first * bits * LINE;
    for (int chunk = 0; chunk < w->chunks; chunk++, lines += STRIP * bits * LINE) {
        fetch(lines + w->chunks * STRIP * bits * LINE, height * bits);
        EACH (slice, SLICES) {
            EACH (v, height) {
                ints codes = plane_slice(lines + v * bits * LINE, bits, slice);
                if (has_levels) codes = look_up_bytes(w->byte_levels[first + v], codes);
                EACH (c, columns) acc[c][v] = dot(acc[c][v], codes, x + c * 4);
            }
            x += columns * 4;
        }
    }
    end_int8(columns, height, first, s, w, scale, total, acc, sum);
}

INLINE floats value_of(const int kind, ints code, const int byte, const float *levels,
                       floats zero) {
    const ints lane = byte ? shift_right(code, 8 * byte) : code;
    switch (kind) {
    case PAIRED: return look_up_32(levels, lane);
    case CENTERED: return subtract(look_up_16(levels, lane), zero);
    case PLAIN: return subtract(to_floats(both(lane, splat_int(0xff))), zero);
    default: return look_up_16(levels, lane);
    }
}

INLINE void block_exact(const int columns, const int height, const int first, const int kind,
                        const struct segment *s, const struct weights *w, const float *x,
                        const float *total, float *sum) {
    floats acc[COLUMNS][TALL];
    EACH (c, columns)
        EACH (v, height) acc[c][v] = splat(0);
    for (int slice = 0; slice < w->chunks * SLICES; slice++)
        EACH (byte, 4) {
            floats value[TALL];
            EACH (v, height) {
                const float *levels = kind == COLUMN ? w->levels[0] + (slice * 4 + byte) * LANES
                                                     : w->levels[first + v];
                value[v] =
                    value_of(kind, w->codes[slice][first + v], byte, levels, w->zero[first + v]);
            }
            EACH (c, columns)
                EACH (v, height) acc[c][v] = fused(value[v], splat(x[c]), acc[c][v]);
            x += columns;
        }
    EACH (c, columns)
        EACH (v, height) {
            float *at = sum + (c * STRIP + first + v) * LANES;
            floats value = multiply(acc[c][v], w->scale[first + v]);
            if (s->offset) value = add(value, multiply(w->offset[first + v], splat(total[c])));
            store_floats(at, add(load_floats(at), value));
        }
}

INLINE void block_of(const int kind, const int columns, const int height, int first,
                     const struct segment *s, const struct weights *w, const char *x,
                     ptrdiff_t begin, int block, float *sum) {
    const char *ends = x + (ptrdiff_t)s->chunks * CHUNK * columns * (kind < INTEGER ? 4 : 1);
    const int8_t *codes = (const int8_t *)x + begin * columns;
    const float *scale = (const float *)ends + 2 * block * columns;
    const int32_t *total = (const int32_t *)scale + columns;
    switch (kind) {
    case INTEGER: block_int8(columns, height, first, s, w, codes, scale, total, sum); break;
#define DIRECT(KIND, BITS, HAS_LEVELS)                                                             \
    case KIND:                                                                                     \
        block_direct(columns, height, first, BITS, HAS_LEVELS, s, w, codes, scale, total, sum);    \
        break;
        DIRECT(INTEGER_1, 1, 0)
        DIRECT(INTEGER_2, 2, 0)
        DIRECT(INTEGER_4, 4, 0)
        DIRECT(INTEGER_8, 8, 0)
        DIRECT(LEVELS_1, 1, 1)
        DIRECT(LEVELS_2, 2, 1)
        DIRECT(LEVELS_4, 4, 1)
    default:
        block_exact(columns, height, first, kind, s, w, (const float *)x + begin * columns,
                    (const float *)ends + block * columns, sum);
    }
}

typedef void block_function(int, const struct segment *, const struct weights *, const char *,
                            ptrdiff_t, int, float *);

/* A function for each size of a tile, so that the sums stay in registers. */
#define FUNCTION(NAME, KIND, C, HEIGHT)                                                            \
    static void NAME##_##C##_##HEIGHT(int first, const struct segment *s, const struct weights *w, \
                                      const char *x, ptrdiff_t begin, int block, float *sum) {     \
        block_of(KIND, C, HEIGHT, first, s, w, x, begin, block, sum);                              \
    }
#define NAMED(NAME, KIND, C, HEIGHT) NAME##_##C##_##HEIGHT,
#define UP_TO_2(F, NAME, K, H) F(NAME, K, 1, H) F(NAME, K, 2, H)
#define UP_TO_4(F, NAME, K, H) UP_TO_2(F, NAME, K, H) F(NAME, K, 3, H) F(NAME, K, 4, H)
#define UP_TO_8(F, NAME, K, H)                                                                     \
    UP_TO_4(F, NAME, K, H)                                                                         \
    F(NAME, K, 5, H) F(NAME, K, 6, H) F(NAME, K, 7, H) F(NAME, K, 8, H)
#if COLUMNS == 8
#define EACH_WIDE UP_TO_8
#define EACH_TALL UP_TO_4
#else
#define EACH_WIDE UP_TO_4
#define EACH_TALL UP_TO_2
#endif
#define FUNCTIONS(NAME, K)                                                                         \
    EACH_WIDE(FUNCTION, NAME, K, WIDE)                                                             \
    EACH_TALL(FUNCTION, NAME, K, TALL)                                                             \
    static block_function *const NAME##_wide[] = {EACH_WIDE(NAMED, NAME, K, WIDE)};                \
    static block_function *const NAME##_tall[] = {EACH_TALL(NAMED, NAME, K, TALL)};
#define EACH_KIND(F)                                                                               \
    F(table, TABLE)                                                                                \
    F(centered, CENTERED)                                                                          \
    F(plain, PLAIN)                                                                                \
    F(paired, PAIRED) F(column, COLUMN) F(integer, INTEGER) F(integer_1, INTEGER_1)                \
        F(integer_2, INTEGER_2) F(integer_4, INTEGER_4) F(integer_8, INTEGER_8)                    \
            F(levels_1, LEVELS_1) F(levels_2, LEVELS_2) F(levels_4, LEVELS_4)
EACH_KIND(FUNCTIONS)

#define WIDE_TABLE(NAME, K) [K] = NAME##_wide,
#define TALL_TABLE(NAME, K) [K] = NAME##_tall,
static block_function *const *const wide[] = {EACH_KIND(WIDE_TABLE)};
static block_function *const *const tall[] = {EACH_KIND(TALL_TABLE)};

/* Whether products unpack the codes of a segment in registers: for one panel of activations. */
INLINE int is_direct(const struct segment *s, int precision, ptrdiff_t panels) {
    return precision == INT8 && panels == 1 &&
           (s->bits == 1 || s->bits == 2 || s->bits == 4 || s->bits == 8);
}

/* The kind of products with a segment. */
INLINE int kind_of(const struct segment *s, int precision, int direct) {
    if (precision == EXACT) return s->kind;
    if (!direct) return INTEGER;
    switch (s->bits) {
    case 1: return s->byte_levels ? LEVELS_1 : INTEGER_1;
    case 2: return s->byte_levels ? LEVELS_2 : INTEGER_2;
    case 4: return s->byte_levels ? LEVELS_4 : INTEGER_4;
    default: return INTEGER_8;
    }
}

#endif
