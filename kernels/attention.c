/* Attention of a few rows of queries over cached keys and values.
 *
 * A row's scores, their exponentials and the weighted sum of its values are computed in float32 in
 * the order of the keys that it sees, so the result does not depend on the other rows, nor on keys
 * that the mask hides: a node of a tree attends as the same token alone does.
 *
 * Shapes: B texts, H heads of queries, G of keys and values, N rows, S keys, D width of a head.
 */
#include <stdlib.h>

#include "pool.h"
#include "vectors.h"

#define MOST_WIDTH 512
enum type { FLOAT, BFLOAT16 };

struct attention {
    const void *q, *k, *v;               /* [B, H, N, D], [B, G, S, D] and the same, of `type` */
    const float *mask;                   /* [B, N, S], added to the scores */
    void *y;                             /* [B, N, H, D] of `type` */
    ptrdiff_t q_strides[3], k_strides[3], v_strides[3]; /* elements; the last axis is dense */
    ptrdiff_t heads, key_heads, num_rows, num_keys, width;
    float scaling, hidden;               /* a mask of at most `hidden` hides a key */
    int32_t type;
};

/* Queries of one head of keys that a task takes together. */
#define QUERIES 4
/* Vectors of a head's values that are summed together. */
#define PARTS 4

/* What a task computes with: `count` queries, padded to whole vectors, and their weights. */
struct task {
    float query[QUERIES][MOST_WIDTH];
    float *weight[QUERIES]; /* [S padded to whole vectors] */
    ptrdiff_t row[QUERIES], head[QUERIES];
    ptrdiff_t padded, keys, values; /* padded width; the first element of keys and of values */
};

/* A vector of lanes from place d of a row of numbers, which `tail` receives if the row ends. */
INLINE floats read_lanes(const void *from, ptrdiff_t at, int type, ptrdiff_t d, ptrdiff_t width,
                         float *tail) {
    if (d + LANES <= width)
        return type == FLOAT ? load_floats((const float *)from + at + d)
                             : load_bfloats((const uint16_t *)from + at + d);
    for (ptrdiff_t i = 0; i < LANES; i++) {
        tail[i] = 0;
        if (d + i >= width) continue;
        if (type == FLOAT) {
            tail[i] = ((const float *)from)[at + d + i];
        } else {
            const uint32_t bits = (uint32_t)((const uint16_t *)from)[at + d + i] << 16;
            memcpy(tail + i, &bits, sizeof bits);
        }
    }
    return load_floats(tail);
}

/* e^x for x of at most 0, within 2 units of the last place; 0 below -87. */
INLINE float exponential(float x) {
    const float bounded = x < -88 ? -88 : x, n = __builtin_rintf(bounded * 1.44269504f);
    const float r = __builtin_fmaf(n, -1.42860677e-6f, __builtin_fmaf(n, -0.693145752f, bounded));
    float p = 1.98756915e-4f;
    p = __builtin_fmaf(p, r, 1.39819995e-3f);
    p = __builtin_fmaf(p, r, 8.33345190e-3f);
    p = __builtin_fmaf(p, r, 4.16657962e-2f);
    p = __builtin_fmaf(p, r, 1.66666657e-1f);
    p = __builtin_fmaf(p, r, 0.5f);
    p = __builtin_fmaf(p * r, r, r) + 1;
    const uint32_t power = (uint32_t)((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &power, sizeof scale);
    return x < -87 ? 0 : p * scale;
}

/* Compute the scores of all keys, 16 at a time. */
INLINE void score_keys(const int count, const struct attention *a, struct task *t) {
    floats partial[QUERIES][LANES];
    float tail[LANES];
    for (ptrdiff_t first = 0; first < a->num_keys; first += LANES) {
        for (ptrdiff_t i = 0; i < LANES; i++) {
            /* Beyond the last key, that again. */
            const ptrdiff_t key = first + i < a->num_keys ? first + i : a->num_keys - 1;
            const ptrdiff_t at = t->keys + key * a->k_strides[2];
            floats sum[QUERIES];
            for (int q = 0; q < count; q++) sum[q] = splat(0);
            for (ptrdiff_t d = 0; d < t->padded; d += LANES) {
                const floats part = read_lanes(a->k, at, a->type, d, a->width, tail);
                for (int q = 0; q < count; q++)
                    sum[q] = fused(load_floats(t->query[q] + d), part, sum[q]);
            }
            for (int q = 0; q < count; q++) partial[q][i] = sum[q];
        }
        for (int q = 0; q < count; q++) store_floats(t->weight[q] + first, add_lanes(partial[q]));
    }
}

/* Turn scores into weights: exponentials, of the largest score 1, of hidden keys 0. */
static void weigh(const struct attention *a, const float *mask, float *score) {
    const float nothing = -__builtin_inff();
    const ptrdiff_t padded = (a->num_keys + LANES - 1) / LANES * LANES;
    float most[LANES];
    for (ptrdiff_t j = 0; j < a->num_keys; j++)
        score[j] = mask[j] <= a->hidden ? nothing : score[j] * a->scaling + mask[j];
    for (ptrdiff_t j = a->num_keys; j < padded; j++) score[j] = nothing;
    for (int i = 0; i < LANES; i++) most[i] = nothing;
    for (ptrdiff_t j = 0; j < padded; j += LANES)
        for (int i = 0; i < LANES; i++) most[i] = score[j + i] > most[i] ? score[j + i] : most[i];
    for (int i = 1; i < LANES; i++) most[0] = most[i] > most[0] ? most[i] : most[0];
    for (ptrdiff_t j = 0; j < padded; j++) score[j] = exponential(score[j] - most[0]);
}

/* Sum the values by their weights, PARTS vectors of a head at a time, and store the rows. */
INLINE void sum_values(const int count, const struct attention *a, const struct task *t,
                       ptrdiff_t text) {
    float tail[LANES], found[QUERIES][PARTS * LANES];
    for (ptrdiff_t begin = 0; begin < a->width; begin += PARTS * LANES) {
        floats sum[QUERIES][PARTS], total[QUERIES];
        for (int q = 0; q < count; q++) {
            total[q] = splat(0);
            for (int part = 0; part < PARTS; part++) sum[q][part] = splat(0);
        }
        for (ptrdiff_t j = 0; j < a->num_keys; j++) {
            int is_seen = 0;
            for (int q = 0; q < count; q++) is_seen |= t->weight[q][j] != 0;
            /* A hidden column may hold anything, and 0 times infinity is no number. */
            if (!is_seen) continue;
            const ptrdiff_t at = t->values + j * a->v_strides[2];
            for (int part = 0; part < PARTS; part++) {
                const ptrdiff_t d = begin + part * LANES;
                if (d >= a->width) break;
                const floats value = read_lanes(a->v, at, a->type, d, a->width, tail);
                for (int q = 0; q < count; q++)
                    sum[q][part] = fused(splat(t->weight[q][j]), value, sum[q][part]);
            }
            for (int q = 0; q < count; q++) total[q] = add(total[q], splat(t->weight[q][j]));
        }
        for (int q = 0; q < count; q++) {
            for (int part = 0; part < PARTS; part++)
                store_floats(found[q] + part * LANES, sum[q][part]);
            store_floats(tail, total[q]);
            const ptrdiff_t left = a->width - begin;
            const ptrdiff_t at =
                ((text * a->num_rows + t->row[q]) * a->heads + t->head[q]) * a->width + begin;
            for (ptrdiff_t d = 0; d < (left < PARTS * LANES ? left : PARTS * LANES); d++) {
                const float value = found[q][d] / tail[0];
                if (a->type == FLOAT)
                    ((float *)a->y)[at + d] = value;
                else
                    ((uint16_t *)a->y)[at + d] = to_bfloat16(value);
            }
        }
    }
}

INLINE void attend_with(const int count, const struct attention *a, struct task *t,
                        ptrdiff_t text) {
    score_keys(count, a, t);
    for (int q = 0; q < count; q++)
        weigh(a, a->mask + (text * a->num_rows + t->row[q]) * a->num_keys, t->weight[q]);
    sum_values(count, a, t, text);
}

/* Attend with up to QUERIES rows and heads of one head of keys. */
static void attend(void *context, ptrdiff_t index) {
    const struct attention *a = context;
    const ptrdiff_t share = a->heads / a->key_heads, queries = share * a->num_rows;
    const ptrdiff_t blocks = (queries + QUERIES - 1) / QUERIES;
    const ptrdiff_t key_head = index / blocks % a->key_heads, text = index / blocks / a->key_heads;
    const ptrdiff_t first = index % blocks * QUERIES, left = queries - first;
    const int count = left < QUERIES ? (int)left : QUERIES;
    const ptrdiff_t lanes = (a->num_keys + LANES - 1) / LANES * LANES;
    struct task t;
    float *weights = malloc(count * lanes * sizeof *weights);
    t.padded = (a->width + LANES - 1) / LANES * LANES;
    t.keys = text * a->k_strides[0] + key_head * a->k_strides[1];
    t.values = text * a->v_strides[0] + key_head * a->v_strides[1];
    for (int q = 0; q < count; q++) {
        t.row[q] = (first + q) / share;
        t.head[q] = key_head * share + (first + q) % share;
        t.weight[q] = weights + q * lanes;
        const ptrdiff_t at = text * a->q_strides[0] + t.head[q] * a->q_strides[1];
        float tail[LANES];
        for (ptrdiff_t d = 0; d < t.padded; d += LANES)
            store_floats(t.query[q] + d, read_lanes(a->q, at + t.row[q] * a->q_strides[2], a->type,
                                                    d, a->width, tail));
    }
    switch (count) {
    case 1: attend_with(1, a, &t, text); break;
    case 2: attend_with(2, a, &t, text); break;
    case 3: attend_with(3, a, &t, text); break;
    default: attend_with(QUERIES, a, &t, text);
    }
    free(weights);
}

/* Compute y = softmax(q k^T scaling + mask) v, for `texts` texts. */
void spectool_attention(const struct attention *a, ptrdiff_t texts, int threads) {
    const ptrdiff_t queries = a->heads / a->key_heads * a->num_rows;
    pool_run(attend, (void *)a, texts * a->key_heads * ((queries + QUERIES - 1) / QUERIES),
             threads);
}
