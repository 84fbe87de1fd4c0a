/* A product with a dense matrix, as dense.c computes it. Shapes: N rows, m inputs, n outputs. */
#ifndef SPECTOOL_DENSE_H
#define SPECTOOL_DENSE_H

#include <stddef.h>
#include <stdint.h>

struct dense {
    const void *x, *w; /* [N, m] and [n, m], both bfloat16 or both float */
    const float *bias; /* [n] or null */
    void *y;           /* [N, n], as x */
    float *scratch;    /* N times m rounded up to a multiple of 32 */
    ptrdiff_t num_rows, num_inputs, num_outputs;
    int32_t is_bfloat16, threads;
};

/* Compute y = x W^T + bias. */
void spectool_dense(const struct dense *given);

#endif
