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

/* What a task needs of one block of its strip. */
struct weights {
    ints codes[BLOCK_SLICES][STRIP];
    floats scale[STRIP], zero[STRIP], offset[STRIP];
    const float *levels[STRIP];
    int slices;
};

/* Unpack one block of the first `tiles` tiles of a strip; fetch the next block of as many lines. */
static void unpack_block(const uint8_t *lines, int bits, int chunks, int tiles, struct weights *w) {
    const ptrdiff_t next = (ptrdiff_t)chunks * STRIP * bits * LINE;
    w->slices = chunks * SLICES;
    for (int chunk = 0; chunk < chunks; chunk++)
        for (int v = 0; v < STRIP; v++, lines += bits * LINE) {
            for (int line = 0; line < bits; line++)
                __builtin_prefetch(lines + next + line * LINE, 0, 3);
            ints *to = &w->codes[chunk * SLICES][v];
            if (v >= tiles) continue;
            switch (bits) {
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

INLINE void block_int8(const int columns, const int height, const int first,
                       const struct segment *s, const struct weights *w, const int8_t *x,
                       const float *scale, const int32_t *total, float *sum) {
    ints acc[COLUMNS][TALL];
    EACH (c, columns)
        EACH (v, height) acc[c][v] = splat_int((DOT_CENTER - s->center) * total[c]);
    for (int slice = 0; slice < w->slices; slice++, x += columns * 4)
        EACH (c, columns)
            EACH (v, height) acc[c][v] = dot(acc[c][v], w->codes[slice][first + v], x + c * 4);
    EACH (c, columns) {
        const floats by = splat(scale[c]), of = splat((float)total[c]);
        EACH (v, height) {
            float *at = sum + (c * STRIP + first + v) * LANES;
            floats value = to_floats(acc[c][v]);
            if (s->zero) value = subtract(value, multiply(w->zero[first + v], of));
            value = multiply(value, multiply(w->scale[first + v], by));
            if (s->offset) value = add(value, multiply(w->offset[first + v], multiply(of, by)));
            store_floats(at, add(load_floats(at), value));
        }
    }
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
    for (int slice = 0; slice < w->slices; slice++)
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

INLINE void block_of(const int precision, const int kind, const int columns, const int height,
                     int first, const struct segment *s, const struct weights *w, const char *x,
                     ptrdiff_t begin, int block, float *sum) {
    const char *ends = x + (ptrdiff_t)s->chunks * CHUNK * columns * (precision == INT8 ? 1 : 4);
    if (precision == INT8)
        block_int8(columns, height, first, s, w, (const int8_t *)x + begin * columns,
                   (const float *)ends + 2 * block * columns,
                   (const int32_t *)ends + (2 * block + 1) * columns, sum);
    else
        block_exact(columns, height, first, kind, s, w, (const float *)x + begin * columns,
                    (const float *)ends + block * columns, sum);
}

typedef void block_function(int, const struct segment *, const struct weights *, const char *,
                            ptrdiff_t, int, float *);

/* A function for each size of a tile, so that the sums stay in registers. */
#define FUNCTION(NAME, PRECISION, KIND, C, HEIGHT)                                                 \
    static void NAME##_##C##_##HEIGHT(int first, const struct segment *s, const struct weights *w, \
                                      const char *x, ptrdiff_t begin, int block, float *sum) {     \
        block_of(PRECISION, KIND, C, HEIGHT, first, s, w, x, begin, block, sum);                   \
    }
#define NAMED(NAME, PRECISION, KIND, C, HEIGHT) NAME##_##C##_##HEIGHT,
#define UP_TO_2(F, NAME, P, K, H) F(NAME, P, K, 1, H) F(NAME, P, K, 2, H)
#define UP_TO_4(F, NAME, P, K, H) UP_TO_2(F, NAME, P, K, H) F(NAME, P, K, 3, H) F(NAME, P, K, 4, H)
#define UP_TO_8(F, NAME, P, K, H)                                                                  \
    UP_TO_4(F, NAME, P, K, H)                                                                      \
    F(NAME, P, K, 5, H) F(NAME, P, K, 6, H) F(NAME, P, K, 7, H) F(NAME, P, K, 8, H)
#if COLUMNS == 8
#define EACH_WIDE UP_TO_8
#define EACH_TALL UP_TO_4
#else
#define EACH_WIDE UP_TO_4
#define EACH_TALL UP_TO_2
#endif
#define FUNCTIONS(NAME, P, K)                                                                      \
    EACH_WIDE(FUNCTION, NAME, P, K, WIDE)                                                          \
    EACH_TALL(FUNCTION, NAME, P, K, TALL)                                                          \
    static block_function *const NAME##_wide[] = {EACH_WIDE(NAMED, NAME, P, K, WIDE)};             \
    static block_function *const NAME##_tall[] = {EACH_TALL(NAMED, NAME, P, K, TALL)};

FUNCTIONS(table, EXACT, TABLE)
FUNCTIONS(centered, EXACT, CENTERED)
FUNCTIONS(plain, EXACT, PLAIN)
FUNCTIONS(paired, EXACT, PAIRED)
FUNCTIONS(column, EXACT, COLUMN)
FUNCTIONS(integer, INT8, TABLE)

static block_function *const *functions(const struct segment *s, int precision, int is_tall) {
    if (precision == INT8) return is_tall ? integer_tall : integer_wide;
    switch (s->kind) {
    case TABLE: return is_tall ? table_tall : table_wide;
    case CENTERED: return is_tall ? centered_tall : centered_wide;
    case PLAIN: return is_tall ? plain_tall : plain_wide;
    case PAIRED: return is_tall ? paired_tall : paired_wide;
    default: return is_tall ? column_tall : column_wide;
    }
}

#endif
