/* Computes recorded products: reads them from the standard input, writes their results.
 *
 * A number is 8 bytes; a tensor is its number of bytes, 0 for null, and these. A product is its
 * number of segments and of rows, inputs, outputs and tiles, the bytes of a row, precision, type and
 * threads, the tensors x, order and bias; and of each segment the number of its numbers, these, and
 * its tensors. */
#include "panels.h"

#include <stdio.h>
#include <stdlib.h>

void spectool_products(const struct product *given, int count);

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

/* The members of a segment: pointers, then numbers. */
static void read_segment(struct segment *s) {
    const size_t pointers = offsetof(struct segment, num_blocks) / sizeof(void *);
    int32_t *numbers = &s->num_blocks;
    for (int64_t count = read_number(); count > 0; count--) *numbers++ = (int32_t)read_number();
    for (size_t i = 0; i < pointers; i++) ((void **)s)[i] = read_tensor();
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
        spectool_products(&p, 1);
        if (fwrite(p.y, size, 1, stdout) != 1) return 1;
    }
}
