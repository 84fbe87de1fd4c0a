/* Products of activations with packed matrices, in three precisions.
 *
 * exact  y = sum over blocks of scale (sum of (level - zero) x) + offset (sum of x), in float32,
 *        each block by fused multiply-add in the order of its inputs.
 * int8   activations are rounded to 8 bits by row and block; a block's sum of products is an exact
 *        integer, which is scaled and added in float32, without fused multiply-add.
 * int16  activations are rounded to 16 bits, whose higher and lower byte are multiplied as two
 *        columns of int8; a block's two sums are scaled and added one after the other.
 *
 * A matrix is a list of segments, columns whose codes have one width. Outputs are in tiles of 16,
 * tiles in strips of 4, which memory holds as one stream. A group, whose weights share a scale, is
 * padded to chunks of 32 inputs; a block is a group or a part of one of at most BLOCK inputs. A
 * chunk of a tile has a line of 64 bytes a bit. A line has four bytes an output, for four inputs:
 * of 8 bits one code a byte, of 4, 2 or 1 bits the codes of 2, 4 or 8 such slices, the first in the
 * lowest bits. Other widths are planes of 4, 2 and 1 bits, the lowest bits first.
 *
 * The order of all sums of a row is fixed, so the row does not depend on its mates, on the number
 * of threads or on the variant of this code. A block is unpacked once for all rows.
 *
 * Shapes: N rows of activations, m inputs, n outputs.
 */
#include "pool.h"
#include "tiles.h"

/* Prepare one block of the first `tiles` tiles of a strip; unpack its codes unless `direct`. */
static void prepare(const struct segment *s, ptrdiff_t strip, ptrdiff_t chunk,
                    const struct block *block, int tiles, int direct, struct weights *w) {
    w->lines = s->codes + (strip * s->chunks + chunk) * STRIP * s->bits * LINE;
    w->chunks = block->chunks;
    if (!direct) unpack_block(s, tiles, w);
    const int slices = direct ? 0 : block->chunks * SLICES;
    const float dot_center = has_words(s) ? 0 : DOT_CENTER;
    for (int v = 0; v < tiles; v++) {
        const int table = s->table ? s->table[strip * STRIP + v] : 0;
        const floats center = splat((float)s->center);
        w->scale[v] = parameters(s, s->scale, strip, block->group, v);
        w->zero[v] = s->zero ? parameters(s, s->zero, strip, block->group, v) : center;
        const floats whole = s->is_whole ? w->zero[v] : center;
        w->minus_zero[v] = to_ints(subtract(splat(dot_center), whole));
#if HAS_PAIRS
        const ints shift = to_ints(subtract(splat(16), whole));
        w->pair_shift[v] = either(shift, shift_left(shift, 16));
#endif
        if (s->offset) w->offset[v] = parameters(s, s->offset, strip, block->group, v);
        if (s->kind == COLUMN)
            w->levels[v] = s->levels + chunk * CHUNK * LANES;
        else if (s->levels)
            w->levels[v] = s->levels + table * (s->kind == OUTLIERS ? 2 : 1) * LANES;
        if (s->byte_levels) {
            w->byte_levels[v] = load_ints(s->byte_levels + table * LINE);
            w->scale[v] = multiply(w->scale[v], splat(s->level_scale[table]));
            for (int i = 0; i < slices; i++)
                w->codes[i][v] = look_up_bytes(w->byte_levels[v], w->codes[i][v]);
        }
        if (s->kind == OUTLIERS)
            for (int i = 0; i < slices; i++)
                w->codes[i][v] = either(w->codes[i][v], mark_neighbours(w->codes[i][v]));
    }
    /* Tiles that there are not are computed with those that there are, and not stored. */
    for (int v = tiles; v < STRIP; v++) w->levels[v] = w->levels[0];
}

/* Store the outputs of a tile for one row. */
static void store_tile(const struct product *p, ptrdiff_t tile, ptrdiff_t row, const float *sum) {
    const ptrdiff_t first = tile * LANES, left = p->num_outputs - first;
    const size_t unit = p->type == FLOAT ? 4 : 2;
    char *y = (char *)p->y + row * p->num_outputs * unit;
    const int32_t *order = p->order ? p->order + first : 0;
    const int count = order || left >= LANES ? LANES : (int)left;
    float values[LANES];
    uint16_t halves[LANES];
    memcpy(values, sum, sizeof values);
    if (p->bias)
        for (int i = 0; i < count; i++) {
            const ptrdiff_t output = order ? order[i] : first + i;
            values[i] += output < 0 ? 0 : p->bias[output];
        }
    for (int i = 0; i < LANES; i++) halves[i] = to_bfloat16(values[i]);
    const char *from = p->type == FLOAT ? (const char *)values : (const char *)halves;
    if (!order) {
        memcpy(y + first * unit, from, count * unit);
        return;
    }
    for (int i = 0; i < LANES; i++)
        if (order[i] >= 0) memcpy(y + order[i] * unit, from + i * unit, unit);
}

/* Compute a strip of outputs for all rows. */
static void multiply_strip(void *context, ptrdiff_t strip) {
    const struct product *p = context;
    const int parts = num_parts(p), is_narrow = p->num_rows * parts <= NARROW;
    const int height = is_narrow ? TALL : WIDE;
    const ptrdiff_t panels = num_panels(p), left = p->num_tiles - strip * STRIP;
    ptrdiff_t rows[MOST_ROWS + 1]; /* the first row of each panel, and the end */
    for (ptrdiff_t panel = 0; panel <= panels; panel++) rows[panel] = first_row(p, panel);
    const int tiles = left < STRIP ? (int)left : STRIP;
    struct weights w;
    float sums[MOST_ROWS * STRIP * LANES];
    memset(&w, 0, sizeof w);
    w.is_double = parts == 2;
    memset(sums, 0, sizeof *sums * p->num_rows * STRIP * LANES);
    ptrdiff_t past = 0; /* bytes of a row's activations of earlier segments */
    for (int i = 0; i < p->num_segments; i++) {
        const struct segment *s = p->segments + i;
        const int kind = kind_of(p, s, panels);
        block_function *const *run = (is_narrow ? tall : wide)[kind];
        ptrdiff_t chunk = 0;
        for (int b = 0; b < s->num_blocks; b++) {
            prepare(s, strip, chunk, s->blocks + b, tiles, is_direct(kind), &w);
            for (ptrdiff_t panel = 0; panel < panels; panel++) {
                const ptrdiff_t row = rows[panel], columns = (rows[panel + 1] - row) * parts;
                for (int first = 0; first < tiles; first += height)
                    run[columns - 1](first, s, &w, p->scratch + row * p->row_bytes + past * columns,
                                     chunk * CHUNK, b, sums + row * STRIP * LANES);
            }
            chunk += s->blocks[b].chunks;
        }
        past += column_bytes(s, p->precision);
    }
    for (ptrdiff_t row = 0; row < p->num_rows; row++)
        for (int v = 0; v < tiles; v++)
            store_tile(p, strip * STRIP + v, row, sums + (row * STRIP + v) * LANES);
}

/* Several products with panels of the same activations. */
struct joined {
    const struct product *products;
    int count;
};

INLINE ptrdiff_t num_strips(const struct product *p) { return (p->num_tiles + STRIP - 1) / STRIP; }

/* Compute a strip, counted over all of the products. */
static void multiply_joined(void *context, ptrdiff_t strip) {
    const struct joined *of = context;
    const struct product *p = of->products;
    for (; strip >= num_strips(p); p++) strip -= num_strips(p);
    multiply_strip((void *)p, strip);
}

void spectool_products(const struct product *given, int count) {
    const ptrdiff_t unit = given->type == FLOAT ? 4 : 2, num_rows = given->num_rows;
    struct product products[MOST_JOINED];
    for (ptrdiff_t row = 0; row < num_rows; row += MOST_ROWS) {
        struct joined of = {products, count};
        ptrdiff_t strips = 0;
        for (int i = 0; i < count; i++) {
            struct product *p = products + i;
            *p = given[i];
            p->x = (const char *)given[i].x + row * p->num_inputs * unit;
            p->y = (char *)given[i].y + row * p->num_outputs * unit;
            p->num_rows = num_rows - row < MOST_ROWS ? num_rows - row : MOST_ROWS;
            strips += num_strips(p);
        }
        const int threads = products->threads;
        pool_run(pack_panel, products, num_panels(products), products->num_rows < 16 ? 1 : threads);
        pool_run(multiply_joined, &of, strips, threads);
    }
}
