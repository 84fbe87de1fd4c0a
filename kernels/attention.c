/* Attention of rows of queries over cached keys and values.
 *
 * A row's scores, their exponentials and the weighted sum of its values are computed in float32 in
 * the order of the keys that it sees, so the result does not depend on the other rows, nor on keys
 * that the mask hides: a node of a tree attends as the same token alone does.
 *
 * A task has QUERIES rows and heads of one head of keys. It reads keys, then values, in blocks that
 * the first cache holds for all of them, in tiles of queries whose sums are in registers, and of a
 * tile only the keys between the first and the last that one of its rows sees.
 *
 * Shapes: B texts, H heads of queries, G of keys and values, N rows, S keys, D width of a head.
 */
#include <stdlib.h>

#include "attention.h"
#include "exponential.h"
#include "pool.h"
#include "vectors.h"

/* A loop that is unrolled, so that the sums of a tile stay in registers. */
#define EACH(i, count) _Pragma("GCC unroll 8") for (int i = 0; i < (count); i++)

/* Queries that a task takes together, and keys of a block. */
#define QUERIES 24
#define KEYS (4 * LANES)
/* A tile of scores: queries times keys. A tile of values: queries times vectors. Their sums are in
 * registers, of which vectors take two each where they are in halves. */
#if COLUMNS == 8
#define TILE 4
#define TILE_KEYS 4
#define PARTS 4
#else
#define TILE 3
#define TILE_KEYS 2
#define PARTS 2
#endif

/* The keys that a row sees: none before the first, none from the end on. */
struct range {
    ptrdiff_t first, end;
};

struct call {
    const struct attention *a;
    struct range *ranges; /* [B, N] */
};

/* What a task computes with: `count` queries, padded to whole vectors, and their weights. */
struct task {
    const struct attention *a;
    ptrdiff_t padded, lanes;             /* width and number of keys, up to whole vectors */
    ptrdiff_t row[QUERIES], head[QUERIES];
    struct range seen[QUERIES];
    float *query, *weight;               /* [QUERIES, padded], [QUERIES, lanes] */
    float *sum, *total;                  /* [QUERIES, padded], [QUERIES] */
    float *block;                        /* [KEYS, padded] */
};

INLINE ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

INLINE ptrdiff_t whole(ptrdiff_t size) { return (size + LANES - 1) / LANES * LANES; }

/* Copy a row of numbers as floats, with zeros up to `padded`. */
INLINE void copy_row(const struct attention *a, const void *from, ptrdiff_t at, ptrdiff_t padded,
                     float *to) {
    ptrdiff_t d = 0;
    for (; d + LANES <= a->width; d += LANES)
        store_floats(to + d, a->type == FLOAT ? load_floats((const float *)from + at + d)
                                              : load_bfloats((const uint16_t *)from + at + d));
    for (; d < padded; d++) {
        uint32_t bits = 0;
        if (d < a->width && a->type == FLOAT)
            memcpy(&bits, (const float *)from + at + d, sizeof bits);
        else if (d < a->width)
            bits = (uint32_t)((const uint16_t *)from)[at + d] << 16;
        memcpy(to + d, &bits, sizeof bits);
    }
}

/* Return rows `first` to `end` of keys or values as floats, `stride` apart: where they are, if they
 * are floats of whole vectors, or copied. */
INLINE const float *read_rows(const struct task *t, const void *from, ptrdiff_t at,
                              ptrdiff_t row_stride, ptrdiff_t first, ptrdiff_t end,
                              ptrdiff_t *stride) {
    if (t->a->type == FLOAT && t->a->width == t->padded) {
        *stride = row_stride;
        return (const float *)from + at + first * row_stride;
    }
    for (ptrdiff_t j = first; j < end; j++)
        copy_row(t->a, from, at + j * row_stride, t->padded, t->block + (j - first) * t->padded);
    *stride = t->padded;
    return t->block;
}

/* The keys that `count` queries from number q on see together. */
INLINE struct range range_of(const struct task *t, ptrdiff_t q, ptrdiff_t count) {
    struct range found = t->seen[q];
    for (ptrdiff_t i = q + 1; i < q + count; i++) {
        found.first = least(found.first, t->seen[i].first);
        if (t->seen[i].end > found.end) found.end = t->seen[i].end;
    }
    return found;
}

/* Add the products of a tile of queries and keys, key by key the lanes. */
INLINE void score_tile(const int queries, const int keys, ptrdiff_t padded, const float *query,
                       const float *key, ptrdiff_t stride, floats partial[TILE][LANES]) {
    floats sum[TILE][TILE_KEYS];
    EACH (q, queries)
        EACH (i, keys) sum[q][i] = splat(0);
    for (ptrdiff_t d = 0; d < padded; d += LANES)
        EACH (i, keys) {
            const floats part = load_floats(key + i * stride + d);
            EACH (q, queries)
                sum[q][i] = fused(load_floats(query + q * padded + d), part, sum[q][i]);
        }
    EACH (q, queries)
        EACH (i, keys) partial[q][i] = sum[q][i];
}

/* Compute the scores of up to LANES keys for a tile of queries. */
INLINE void score_keys(const int queries, const struct task *t, ptrdiff_t q, const float *keys,
                       ptrdiff_t stride, ptrdiff_t count, float *scores) {
    const float *query = t->query + q * t->padded;
    floats partial[TILE][LANES];
    ptrdiff_t i = 0;
    for (; i + TILE_KEYS <= count; i += TILE_KEYS) {
        floats found[TILE][LANES];
        score_tile(queries, TILE_KEYS, t->padded, query, keys + i * stride, stride, found);
        EACH (c, queries)
            EACH (k, TILE_KEYS) partial[c][i + k] = found[c][k];
    }
    for (; i < LANES; i++) {
        /* Beyond the last key, that again. */
        floats found[TILE][LANES];
        const float *key = keys + least(i, count - 1) * stride;
        score_tile(queries, 1, t->padded, query, key, stride, found);
        EACH (c, queries) partial[c][i] = found[c][0];
    }
    EACH (c, queries) store_floats(scores + c * t->lanes, add_lanes(partial[c]));
}

/* Scale scores, and cap them by tanh. */
static void cap_scores(const struct attention *a, float *score, ptrdiff_t count) {
    const float scaling = a->scaling / a->cap, cap = a->cap;
    for (ptrdiff_t j = 0; j < count; j++) {
        const float x = score[j] * scaling, e = exponential(-2 * __builtin_fabsf(x));
        score[j] = cap * __builtin_copysignf((1 - e) / (1 + e), x);
    }
}

/* Turn the scores of a query into weights from key `first` on, a multiple of LANES: exponentials,
 * of the largest score 1, of hidden keys 0. */
static void weigh(const struct attention *a, const float *mask, float *score, ptrdiff_t first,
                  ptrdiff_t end) {
    const float nothing = -__builtin_inff(), hidden = a->hidden;
    const float scaling = a->cap ? 1 : a->scaling;
    const ptrdiff_t padded = whole(end), known = least(end, a->num_keys);
    float most[LANES], largest = nothing;
    if (a->cap) cap_scores(a, score + first, known - first);
    for (ptrdiff_t j = first; j < known; j++) {
        const float value = score[j] * scaling + mask[j];
        score[j] = mask[j] <= hidden ? nothing : value;
    }
    for (ptrdiff_t j = known; j < padded; j++) score[j] = nothing;
    for (int i = 0; i < LANES; i++) most[i] = nothing;
    for (ptrdiff_t j = first; j < padded; j += LANES)
        for (int i = 0; i < LANES; i++) most[i] = score[j + i] > most[i] ? score[j + i] : most[i];
    for (int i = 0; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
    for (ptrdiff_t j = first; j < padded; j++) score[j] = exponential(score[j] - largest);
}

/* Add up the weights of a tile of queries, in the order of the keys. */
INLINE void add_weights(const int queries, const struct task *t, ptrdiff_t q) {
    const struct range seen = range_of(t, q, queries);
    const float *weight = t->weight + q * t->lanes;
    float total[TILE] = {0};
    for (ptrdiff_t j = seen.first; j < seen.end; j++)
        EACH (c, queries) total[c] += weight[c * t->lanes + j];
    EACH (c, queries) t->total[q + c] = total[c];
}

/* Weigh the scores of a tile of queries. */
INLINE void weigh_tile(const int queries, const struct task *t, ptrdiff_t q, ptrdiff_t text) {
    const struct attention *a = t->a;
    const struct range seen = range_of(t, q, queries);
    for (int c = 0; c < queries; c++)
        weigh(a, a->mask + (text * a->num_rows + t->row[q + c]) * a->num_keys,
              t->weight + (q + c) * t->lanes, seen.first / LANES * LANES, seen.end);
    add_weights(queries, t, q);
}

/* Add the values of some keys by their weights to the sums of a tile of queries, from place d on;
 * a weight is `lanes` before that of the next query. */
INLINE void add_values(const int queries, const int parts, const struct task *t, ptrdiff_t q,
                       ptrdiff_t d, const float *values, ptrdiff_t stride, ptrdiff_t first,
                       ptrdiff_t end) {
    const float *weight = t->weight + q * t->lanes;
    float *at = t->sum + q * t->padded + d;
    floats sum[TILE][PARTS];
    EACH (c, queries)
        EACH (p, parts) sum[c][p] = load_floats(at + c * t->padded + p * LANES);
    for (ptrdiff_t j = first; j < end; j++, values += stride) {
        uint32_t is_seen = 0, bits;
        EACH (c, queries) {
            memcpy(&bits, weight + c * t->lanes + j, sizeof bits);
            is_seen |= bits;
        }
        /* A hidden column may hold anything, and 0 times infinity is no number. */
        if (!is_seen) continue;
        EACH (p, parts) {
            const floats value = load_floats(values + d + p * LANES);
            EACH (c, queries)
                sum[c][p] = fused(splat(weight[c * t->lanes + j]), value, sum[c][p]);
        }
    }
    EACH (c, queries)
        EACH (p, parts) store_floats(at + c * t->padded + p * LANES, sum[c][p]);
}

/* Compute what a tile of queries sees of the scores of a block of keys, from first to end. */
INLINE void score_block(const int queries, const struct task *t, ptrdiff_t q, const float *keys,
                        ptrdiff_t stride, ptrdiff_t first, ptrdiff_t end) {
    const struct range seen = range_of(t, q, queries);
    const ptrdiff_t begin = seen.first / LANES * LANES;
    for (ptrdiff_t j = first > begin ? first : begin; j < least(end, seen.end); j += LANES)
        score_keys(queries, t, q, keys + (j - first) * stride, stride, least(LANES, end - j),
                   t->weight + q * t->lanes + j);
}

/* Add what a tile of queries sees of a block of values. */
INLINE void value_block(const int queries, const struct task *t, ptrdiff_t q, const float *values,
                        ptrdiff_t stride, ptrdiff_t first, ptrdiff_t end) {
    const struct range seen = range_of(t, q, queries);
    const ptrdiff_t begin = first > seen.first ? first : seen.first;
    const float *from = values + (begin - first) * stride;
    ptrdiff_t d = 0;
    for (; d + PARTS * LANES <= t->padded; d += PARTS * LANES)
        add_values(queries, PARTS, t, q, d, from, stride, begin, least(end, seen.end));
    for (; d < t->padded; d += LANES)
        add_values(queries, 1, t, q, d, from, stride, begin, least(end, seen.end));
}

/* Store the outputs of a query: its sums over its total. */
static void store_query(const struct task *t, ptrdiff_t text, ptrdiff_t q) {
    const struct attention *a = t->a;
    const ptrdiff_t at = ((text * a->num_rows + t->row[q]) * a->heads + t->head[q]) * a->width;
    for (ptrdiff_t d = 0; d < a->width; d++) {
        const float value = t->sum[q * t->padded + d] / t->total[q];
        if (a->type == FLOAT)
            ((float *)a->y)[at + d] = value;
        else
            ((uint16_t *)a->y)[at + d] = to_bfloat16(value);
    }
}

/* Attend with up to QUERIES rows and heads of one head of keys. */
static void attend(void *context, ptrdiff_t index) {
    const struct call *call = context;
    const struct attention *a = call->a;
    const ptrdiff_t share = a->heads / a->key_heads, queries = share * a->num_rows;
    const ptrdiff_t blocks = (queries + QUERIES - 1) / QUERIES;
    const ptrdiff_t key_head = index / blocks % a->key_heads, text = index / blocks / a->key_heads;
    const ptrdiff_t begin = index % blocks * QUERIES, count = least(QUERIES, queries - begin);
    const ptrdiff_t k_at = text * a->k_strides[0] + key_head * a->k_strides[1];
    const ptrdiff_t v_at = text * a->v_strides[0] + key_head * a->v_strides[1];
    struct task t = {.a = a, .padded = whole(a->width), .lanes = whole(a->num_keys)};
    float *memory =
        malloc((count * (2 * t.padded + t.lanes + 1) + KEYS * t.padded) * sizeof *memory);
    t.query = memory;
    t.sum = t.query + count * t.padded;
    t.weight = t.sum + count * t.padded;
    t.block = t.weight + count * t.lanes;
    t.total = t.block + KEYS * t.padded;
    for (ptrdiff_t q = 0; q < count; q++) {
        t.row[q] = (begin + q) / share;
        t.head[q] = key_head * share + (begin + q) % share;
        t.seen[q] = call->ranges[text * a->num_rows + t.row[q]];
        const ptrdiff_t at = text * a->q_strides[0] + t.head[q] * a->q_strides[1];
        copy_row(a, a->q, at + t.row[q] * a->q_strides[2], t.padded, t.query + q * t.padded);
    }
    memset(t.sum, 0, count * t.padded * sizeof *t.sum);
    const struct range all = range_of(&t, 0, count);
#define EACH_TILE(function, ...)                                                                   \
    do {                                                                                           \
        ptrdiff_t q = 0;                                                                           \
        for (; q + TILE <= count; q += TILE) function(TILE, &t, q, __VA_ARGS__);                   \
        for (; q < count; q++) function(1, &t, q, __VA_ARGS__);                                    \
    } while (0)
    ptrdiff_t stride;
    for (ptrdiff_t j = all.first / KEYS * KEYS; j < all.end; j += KEYS) {
        const ptrdiff_t end = least(j + KEYS, a->num_keys);
        const float *keys = read_rows(&t, a->k, k_at, a->k_strides[2], j, end, &stride);
        EACH_TILE(score_block, keys, stride, j, end);
    }
    EACH_TILE(weigh_tile, text);
    for (ptrdiff_t j = all.first / KEYS * KEYS; j < all.end; j += KEYS) {
        const ptrdiff_t end = least(j + KEYS, a->num_keys);
        const float *values = read_rows(&t, a->v, v_at, a->v_strides[2], j, end, &stride);
        EACH_TILE(value_block, values, stride, j, end);
    }
    for (ptrdiff_t q = 0; q < count; q++) store_query(&t, text, q);
    free(memory);
}

/* Find the keys that a row sees. */
static void find_range(void *context, ptrdiff_t index) {
    const struct call *call = context;
    const ptrdiff_t num_keys = call->a->num_keys;
    const float *mask = call->a->mask + index * num_keys, hidden = call->a->hidden;
    struct range found = {0, num_keys};
    while (found.end > 0 && mask[found.end - 1] <= hidden) found.end--;
    while (found.first < found.end && mask[found.first] <= hidden) found.first++;
    call->ranges[index] = found;
}

/* Compute y = softmax(q k^T scaling + mask) v, for `texts` texts. */
void spectool_attention(const struct attention *a, ptrdiff_t texts, int threads) {
    const ptrdiff_t queries = a->heads / a->key_heads * a->num_rows;
    struct call call = {a, malloc(texts * a->num_rows * sizeof *call.ranges)};
    for (ptrdiff_t row = 0; row < texts * a->num_rows; row++) find_range(&call, row);
    pool_run(attend, &call, texts * a->key_heads * ((queries + QUERIES - 1) / QUERIES), threads);
    free(call.ranges);
}
