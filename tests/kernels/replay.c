/* Computes recorded products: reads them from the standard input, writes their results.
 *
 * A number is 8 bytes; a tensor is its number of bytes, 0 for null, and these. A product is its
 * number of segments and of rows, inputs, outputs and tiles, the bytes of a row, precision, type and
 * threads, the tensors x, order and bias; and each segment its seven numbers and eleven tensors. */
#include "panels.h"

#include <stdio.h>
#include <stdlib.h>

void spectool_product(const struct product *given);

static int64_t read_number(void) {
    int64_t number;
    if (fread(&number, sizeof number, 1, stdin) != 1) exit(0);
    return number;
}

static void *read_tensor(void) {
    const size_t size = (size_t)read_number();
    void *bytes = size ? malloc(size) : 0;
    if (size && fread(bytes, size, 1, stdin) != 1) exit(1);
    return bytes;
}

static void read_segment(struct segment *s) {
    int32_t *const numbers[] = {&s->num_blocks, &s->chunks,     &s->groups, &s->bits,
                                &s->kind,       &s->parameters, &s->center};
    const void **const tensors[] = {
        (const void **)&s->codes,       (const void **)&s->scale,
        (const void **)&s->zero,        (const void **)&s->offset,
        (const void **)&s->levels,      (const void **)&s->byte_levels,
        (const void **)&s->level_scale, (const void **)&s->table,
        (const void **)&s->blocks,      (const void **)&s->columns,
        (const void **)&s->column_scale};
    for (int i = 0; i < 7; i++) *numbers[i] = (int32_t)read_number();
    for (int i = 0; i < 11; i++) *tensors[i] = read_tensor();
}

int main(void) {
    for (;;) {
        const int64_t num_segments = read_number();
        struct segment *segments = calloc((size_t)num_segments, sizeof *segments);
        struct product p = {.segments = segments, .num_segments = (int32_t)num_segments};
        p.num_rows = read_number();
        p.num_inputs = read_number();
        p.num_outputs = read_number();
        p.num_tiles = read_number();
        p.row_bytes = read_number();
        p.precision = (int32_t)read_number();
        p.type = (int32_t)read_number();
        p.threads = (int32_t)read_number();
        p.x = read_tensor();
        p.order = read_tensor();
        p.bias = read_tensor();
        for (int64_t i = 0; i < num_segments; i++) read_segment(segments + i);
        const size_t size = (size_t)(p.num_rows * p.num_outputs) * (p.type == FLOAT ? 4 : 2);
        p.y = malloc(size);
        p.scratch = malloc((size_t)(p.num_rows * p.row_bytes));
        spectool_product(&p);
        if (fwrite(p.y, size, 1, stdout) != 1) return 1;
    }
}
