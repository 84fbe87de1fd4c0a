/* A product with a packed matrix, as products.c computes it. */
#ifndef SPECTOOL_PRODUCT_H
#define SPECTOOL_PRODUCT_H

#include <stddef.h>
#include <stdint.h>

struct segment;

struct product {
    const struct segment *segments;
    const void *x;        /* [N, m] of `type` */
    const int32_t *order; /* [strips, 4, 16]: the outputs, -1 for padding; null: in order */
    const float *bias;    /* [n] or null */
    void *y;              /* [N, n] of `type` */
    char *scratch;        /* N times `row_bytes` */
    ptrdiff_t num_rows, num_inputs, num_outputs, num_tiles, row_bytes;
    int32_t num_segments, precision, type, threads;
};

/* Products that are computed together at most. */
#define MOST_JOINED 4

/* Compute y = x W^T + bias for up to MOST_JOINED matrices, which have the same x, scratch and
 * threads, and whose segments lay activations out alike. */
void spectool_products(const struct product *given, int count);

#endif
