/* What attention.c is given. */
#ifndef SPECTOOL_ATTENTION_H
#define SPECTOOL_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

#include "types.h"

struct attention {
    const void *q, *k, *v;               /* [B, H, N, D], [B, G, S, D] and the same, of `type` */
    const float *mask;                   /* [B, N, S], added to the scores */
    void *y;                             /* [B, N, H, D] of `type` */
    ptrdiff_t q_strides[3], k_strides[3], v_strides[3]; /* elements; the last axis is dense */
    ptrdiff_t heads, key_heads, num_rows, num_keys, width;
    float scaling, hidden;               /* a mask of at most `hidden` hides a key */
    float cap; /* scores s are cap tanh(s / cap) before the mask is added; 0: as they are */
    int32_t type;
};

/* Compute y = softmax(q k^T scaling + mask) v, for `texts` texts. */
void spectool_attention(const struct attention *a, ptrdiff_t texts, int threads);

#endif
