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
    ints minus_zero[STRIP]; /* less the zero, or the center, if that is an integer */
    ints byte_levels[STRIP];
    ints pair_shift[STRIP]; /* 16 less the whole zero, in both halves of a lane */
    const float *levels[STRIP];
    int chunks;
    int is_double; /* whether a row of activations has two columns */
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
INLINE void begin_integers(const int columns, const int height, const int first,
                           const struct weights *w, const int32_t *total, ints acc[COLUMNS][TALL]) {
    EACH (c, columns)
        EACH (v, height) acc[c][v] = multiply_small(w->minus_zero[first + v], total[c]);
}

/* Scale the sums of integer products, and add them to the sums of the rows. */
INLINE void scale_integers(const int columns, const int height, const int first, const int has_zero,
                           const int has_offset, const struct weights *w, const float *scale,
                           const int32_t *total, ints acc[COLUMNS][TALL], float *sum) {
    EACH (c, columns) {
        const floats by = splat(scale[c]);
        EACH (v, height) {
            float *at = sum + ((c >> w->is_double) * STRIP + first + v) * LANES;
            floats value = to_floats(acc[c][v]);
            if (has_zero)
                value = subtract(value, multiply(w->zero[first + v], splat((float)total[c])));
            value = multiply(value, multiply(w->scale[first + v], by));
            if (has_offset) {
                const floats both_sums = multiply(splat((float)total[c]), by);
                value = add(value, multiply(w->offset[first + v], both_sums));
            }
            store_floats(at, add(load_floats(at), value));
        }
    }
}

/* Scale and add the sums; most formats have neither zeros beside integers nor an offset. */
INLINE void end_integers(const int columns, const int height, const int first,
                         const struct segment *s, const struct weights *w, const float *scale,
                         const int32_t *total, ints acc[COLUMNS][TALL], float *sum) {
    const int has_zero = s->zero && !s->is_whole, has_offset = s->offset != 0;
    if (has_zero || has_offset)
        scale_integers(columns, height, first, has_zero, has_offset, w, scale, total, acc, sum);
    else
        scale_integers(columns, height, first, 0, 0, w, scale, total, acc, sum);
}

/* The codes of a slice of tile v: of `bits`, unpacked in registers; or, with 0, unpacked before. */
INLINE ints codes_of(const int bits, const struct weights *w, int chunk, const int slice, int v) {
    if (!bits) return w->codes[chunk * SLICES + slice][v];
    return plane_slice(w->lines + (chunk * STRIP + v) * bits * LINE, bits, slice);
}

/* Fetch the lines of the next block, if nothing else reads the lines of this one. */
INLINE void fetch_next(const int bits, const int height, const int first, const struct weights *w,
                       int chunk) {
    fetch(w->lines + ((w->chunks + chunk) * STRIP + first) * bits * LINE, height * bits);
}

INLINE void block_integers(const int columns, const int height, const int first, const int bits,
                           const int has_levels, const struct segment *s, const struct weights *w,
                           const int8_t *x, const float *scale, const int32_t *total, float *sum) {
    ints acc[COLUMNS][TALL];
    begin_integers(columns, height, first, w, total, acc);
    for (int chunk = 0; chunk < w->chunks; chunk++) {
        fetch_next(bits, height, first, w, chunk);
        EACH (slice, SLICES) {
            EACH (v, height) {
                ints codes = codes_of(bits, w, chunk, slice, first + v);
                if (has_levels) codes = look_up_bytes(w->byte_levels[first + v], codes);
                EACH (c, columns) acc[c][v] = dot(acc[c][v], codes, x + c * 4);
            }
            x += columns * 4;
        }
    }
    end_integers(columns, height, first, s, w, scale, total, acc, sum);
}

#if HAS_WORDS
/* `block_integers` of codes below 16. A chunk's sums of 16 bits are 8 2 15 127 at most. */
INLINE void block_words(const int columns, const int height, const int first, const int bits,
                        const struct segment *s, const struct weights *w, const int8_t *x,
                        const float *scale, const int32_t *total, float *sum) {
    ints acc[COLUMNS][TALL], words[COLUMNS][TALL];
    begin_integers(columns, height, first, w, total, acc);
    for (int chunk = 0; chunk < w->chunks; chunk++) {
        fetch_next(bits, height, first, w, chunk);
        EACH (c, columns)
            EACH (v, height) words[c][v] = splat_int(0);
        EACH (slice, SLICES) {
            EACH (v, height) {
                const ints codes = codes_of(bits, w, chunk, slice, first + v);
                EACH (c, columns) words[c][v] = dot_words(words[c][v], codes, x + c * 4);
            }
            x += columns * 4;
        }
        EACH (c, columns)
            EACH (v, height) acc[c][v] = widen_words(acc[c][v], words[c][v]);
    }
    end_integers(columns, height, first, s, w, scale, total, acc, sum);
}
#endif

INLINE floats value_of(const int kind, ints code, const int byte, const float *levels,
                       floats zero) {
    const ints lane = byte ? shift_right(code, 8 * byte) : code;
    switch (kind) {
    case OUTLIERS: return look_up_32(levels, lane);
    case CENTERED: return subtract(look_up_16(levels, lane), zero);
    case PLAIN: return subtract(to_floats(byte_of(code, byte)), zero);
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

#if HAS_PAIRS
/* The numbers from -16 to 15 in bfloat16. */
static const uint16_t NUMBERS[32] = {
    0xc180, 0xc170, 0xc160, 0xc150, 0xc140, 0xc130, 0xc120, 0xc110, 0xc100, 0xc0e0, 0xc0c0,
    0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
    0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};

/* An exact product of integers with bfloat16, which equals that of `block_exact` to the bit, except
 * that subnormal numbers are zeros (`has_pairs`). */
INLINE void block_pairs(const int columns, const int height, const int first, const int bits,
                        const struct weights *w, const uint32_t *x, float *sum) {
    const ints numbers = load_ints(NUMBERS);
    floats acc[COLUMNS][TALL];
    EACH (c, columns)
        EACH (v, height) acc[c][v] = splat(0);
    for (int chunk = 0; chunk < w->chunks; chunk++) {
        fetch_next(bits, height, first, w, chunk);
        EACH (slice, SLICES) {
            EACH (v, height) {
                const ints codes = codes_of(bits, w, chunk, slice, first + v);
                EACH (half, 2) {
                    const ints words = add_words(widen_pair(codes, half), w->pair_shift[first + v]);
                    const ints value = look_up_words(numbers, words);
                    EACH (c, columns)
                        acc[c][v] = dot_pair(acc[c][v], value, x + half * columns + c);
                }
            }
            x += 2 * columns;
        }
    }
    EACH (c, columns)
        EACH (v, height) {
            float *at = sum + (c * STRIP + first + v) * LANES;
            store_floats(at, add(load_floats(at), multiply(acc[c][v], w->scale[first + v])));
        }
}
#endif

INLINE void block_of(const int kind, const int columns, const int height, int first,
                     const struct segment *s, const struct weights *w, const char *x,
                     ptrdiff_t begin, int block, float *sum) {
    const char *ends = x + (ptrdiff_t)s->chunks * CHUNK * columns * (kind < NIBBLES ? 4 : 1);
    const int8_t *codes = (const int8_t *)x + begin * columns;
    const uint32_t *pairs = (const uint32_t *)x + begin / 2 * columns;
    const float *scale = (const float *)ends + 2 * block * columns;
    const int32_t *total = (const int32_t *)scale + columns;
    switch (kind) {
#define INTEGER_CASE(KIND, BITS, HAS_LEVELS)                                                       \
    case KIND:                                                                                     \
        block_integers(columns, height, first, BITS, HAS_LEVELS, s, w, codes, scale, total, sum);  \
        break;
        INTEGER_CASE(INTEGER, 0, 0)
        INTEGER_CASE(INTEGER_8, 8, 0)
#if HAS_WORDS
#define WORDS_CASE(KIND, BITS)                                                                     \
    case KIND:                                                                                     \
        block_words(columns, height, first, BITS, s, w, codes, scale, total, sum);                 \
        break;
        WORDS_CASE(NIBBLES, 0)
        WORDS_CASE(INTEGER_1, 1)
        WORDS_CASE(INTEGER_2, 2)
        WORDS_CASE(INTEGER_4, 4)
#else
        INTEGER_CASE(INTEGER_1, 1, 0)
        INTEGER_CASE(INTEGER_2, 2, 0)
        INTEGER_CASE(INTEGER_4, 4, 0)
#endif
        INTEGER_CASE(LEVELS_1, 1, 1)
        INTEGER_CASE(LEVELS_2, 2, 1)
        INTEGER_CASE(LEVELS_4, 4, 1)
#if HAS_PAIRS
#define PAIRS_CASE(KIND, BITS)                                                                     \
    case KIND: block_pairs(columns, height, first, BITS, w, pairs, sum); break;
        PAIRS_CASE(PAIRS, 0)
        PAIRS_CASE(PAIRS_2, 2)
        PAIRS_CASE(PAIRS_4, 4)
#endif
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
#if HAS_PAIRS
#define PAIR_KINDS(F) F(pairs, PAIRS) F(pairs_2, PAIRS_2) F(pairs_4, PAIRS_4)
#else
#define PAIR_KINDS(F)
#endif
#if HAS_WORDS
#define WORD_KINDS(F) F(nibbles, NIBBLES)
#else
#define WORD_KINDS(F)
#endif
#define EACH_KIND(F)                                                                               \
    PAIR_KINDS(F)                                                                                  \
    WORD_KINDS(F)                                                                                  \
    F(table, TABLE)                                                                                \
    F(centered, CENTERED)                                                                          \
    F(plain, PLAIN)                                                                                \
    F(outliers, OUTLIERS)                                                                              \
    F(column, COLUMN)                                                                              \
    F(integer, INTEGER) F(integer_1, INTEGER_1) F(integer_2, INTEGER_2) F(integer_4, INTEGER_4)    \
        F(integer_8, INTEGER_8) F(levels_1, LEVELS_1) F(levels_2, LEVELS_2) F(levels_4, LEVELS_4)
EACH_KIND(FUNCTIONS)

#define WIDE_TABLE(NAME, K) [K] = NAME##_wide,
#define TALL_TABLE(NAME, K) [K] = NAME##_tall,
static block_function *const *const wide[] = {EACH_KIND(WIDE_TABLE)};
static block_function *const *const tall[] = {EACH_KIND(TALL_TABLE)};

/* The kind of products with a segment, for so many panels of activations. */
INLINE int kind_of(const struct product *p, const struct segment *s, ptrdiff_t panels) {
    const int bits = panels == 1 ? s->bits : 0;
    if (has_pairs(p, s)) return bits == 2 ? PAIRS_2 : bits == 4 ? PAIRS_4 : PAIRS;
    if (p->precision == EXACT) {
        const int is_code = s->kind == CENTERED || (s->kind == TABLE && s->is_grid);
        return HAS_SLOW_TABLES && is_code ? PLAIN : s->kind;
    }
    switch (bits) {
    case 1: return s->byte_levels ? LEVELS_1 : INTEGER_1;
    case 2: return s->byte_levels ? LEVELS_2 : INTEGER_2;
    case 4: return s->byte_levels ? LEVELS_4 : INTEGER_4;
    case 8: return INTEGER_8;
    default: return has_words(s) ? NIBBLES : INTEGER;
    }
}

/* Whether products of this kind unpack codes themselves. */
INLINE int is_direct(int kind) { return kind >= PAIRS_2 && kind != NIBBLES && kind != INTEGER; }

#endif
