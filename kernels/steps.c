/* A decoder layer as one call: steps over buffers that have a row for each node of a pass.
 *
 * Every step computes a row from that row alone, in float32 and in a fixed order, and stores it in
 * the type of the activations; attention reads the cached keys and values that the row's mask
 * shows. So a row's result does not depend on the other rows, nor on the number of threads.
 *
 * Buffer 0 holds the hidden states: the input at the beginning, the output at the end.
 *
 * Shapes: B texts, n nodes of each, N = B n rows, S keys, D width of a head, R rotary width.
 */
#include "attention.h"
#include "dense.h"
#include "exponential.h"
#include "pool.h"
#include "product.h"
#include "types.h"

#define PIECE 256 /* elements of a row that are widened to float32 at once */
#define MOST_ROTARY (4 * PIECE)
/* Elements of a step that one thread computes sooner than another would wake. */
#define FEW 32768

enum op { RMS_NORM, LAYER_NORM, PRODUCTS, ROTATE_HALVES, ROTATE_PAIRS, STORE, ATTEND, ACTIVATE, GATE, ADD };
enum activation { IDENTITY, SILU, GELU, GELU_TANH, RELU };

/* Heads of `width` elements in each row of a buffer, `stride` elements apart, from `column` on. */
struct view {
    int32_t buffer, column, heads, stride;
};

/* A product of a PRODUCTS step: packed, or with a dense matrix of the activations' type. */
struct linear {
    const struct product *packed; /* or null */
    const void *weight;           /* dense [n, m] */
    const float *bias;            /* dense [n] or null */
    ptrdiff_t num_inputs, num_outputs;
    int32_t to, is_joined; /* its buffer; whether it reads the panels of the product before */
};

struct step {
    const float *weight, *bias; /* of a norm [width]; null: ones, zeros */
    const struct linear *linears;
    struct view from, other, to;
    ptrdiff_t width;
    float number, cap; /* a norm's epsilon, or the scale of scores; their cap (`attention.h`) */
    int32_t op, activation, num_linears;
};

struct layer {
    const struct step *steps;
    const ptrdiff_t *widths; /* of the buffers */
    int32_t num_steps, num_buffers, type;
};

struct pass {
    const struct layer *layer;
    const void *x; /* [N, width of buffer 0] of `type` */
    void *y;       /* the same: buffer 0 */
    char *arena;   /* the other buffers, one after the other, each N rows; then scratch */
    const float *cosine, *sine; /* [N, R] */
    const float *mask;          /* [B, n, S] */
    void *keys, *values;        /* of `type`, by text, head and column; null: those of the pass */
    const int64_t *starts;      /* [B]: the columns that the first nodes are stored at */
    ptrdiff_t strides[3];       /* elements, of keys and values */
    ptrdiff_t texts, num_nodes, num_keys, rotary;
    float hidden; /* a mask of at most that hides a key */
    int32_t threads;
};

INLINE ptrdiff_t unit_of(const struct pass *p) { return p->layer->type == FLOAT ? 4 : 2; }
INLINE ptrdiff_t num_rows(const struct pass *p) { return p->texts * p->num_nodes; }

/* Bytes of a buffer, in whole cache lines. */
INLINE ptrdiff_t buffer_bytes(const struct pass *p, int buffer) {
    return (num_rows(p) * p->layer->widths[buffer] * unit_of(p) + LINE - 1) / LINE * LINE;
}

/* The address of a buffer; that of scratch, for the number of buffers. */
static char *address(const struct pass *p, int buffer) {
    if (buffer == 0) return p->y;
    char *at = p->arena;
    for (int i = 1; i < buffer; i++) at += buffer_bytes(p, i);
    return at;
}

/* The first element of a head of a row. */
INLINE char *head_of(const struct pass *p, const struct view *v, ptrdiff_t row, ptrdiff_t head) {
    const ptrdiff_t at = row * p->layer->widths[v->buffer] + v->column + head * v->stride;
    return address(p, v->buffer) + at * unit_of(p);
}

/* Widen up to PIECE elements; zeros follow them up to a whole vector. */
INLINE void widen(const char *from, int type, ptrdiff_t count, float *out) {
    if (type == FLOAT) {
        memcpy(out, from, count * 4);
    } else {
        uint16_t halves[PIECE];
        memcpy(halves, from, count * 2);
        for (ptrdiff_t i = 0; i < count; i++) {
            const uint32_t bits = (uint32_t)halves[i] << 16;
            memcpy(out + i, &bits, sizeof bits);
        }
    }
    for (ptrdiff_t i = count; i % LANES; i++) out[i] = 0;
}

INLINE void narrow(const float *from, int type, ptrdiff_t count, char *to) {
    if (type == FLOAT) {
        memcpy(to, from, count * 4);
        return;
    }
    uint16_t halves[PIECE];
    for (ptrdiff_t i = 0; i < count; i++) halves[i] = to_bfloat16(from[i]);
    memcpy(to, halves, count * 2);
}

/* The sum over a head of (x - center)^power. */
static float sum_head(const char *from, int type, ptrdiff_t width, float center, int power) {
    float x[PIECE], lanes[LANES];
    floats sum = splat(0);
    for (ptrdiff_t begin = 0; begin < width; begin += PIECE) {
        const ptrdiff_t left = width - begin, count = left < PIECE ? left : PIECE;
        widen(from + begin * (type == FLOAT ? 4 : 2), type, count, x);
        for (ptrdiff_t i = 0; i < count; i++) x[i] -= center;
        for (ptrdiff_t i = 0; i < count; i += LANES) {
            const floats v = load_floats(x + i);
            sum = power == 1 ? add(sum, v) : fused(v, v, sum);
        }
    }
    store_floats(lanes, sum);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

static void norm_head(const struct step *s, int type, const char *from, char *to) {
    const ptrdiff_t width = s->width, unit = type == FLOAT ? 4 : 2;
    const float count = (float)width;
    const float center =
        s->op == LAYER_NORM ? sum_head(from, type, width, 0, 1) / count : 0;
    const float variance = sum_head(from, type, width, center, 2) / count;
    const float scale = 1 / __builtin_sqrtf(variance + s->number);
    float x[PIECE];
    for (ptrdiff_t begin = 0; begin < width; begin += PIECE) {
        const ptrdiff_t left = width - begin, some = left < PIECE ? left : PIECE;
        widen(from + begin * unit, type, some, x);
        for (ptrdiff_t i = 0; i < some; i++) x[i] = (x[i] - center) * scale;
        if (s->weight)
            for (ptrdiff_t i = 0; i < some; i++) x[i] *= s->weight[begin + i];
        if (s->bias)
            for (ptrdiff_t i = 0; i < some; i++) x[i] += s->bias[begin + i];
        narrow(x, type, some, to + begin * unit);
    }
}

/* erf, within 2e-7: Abramowitz and Stegun, 7.1.26. */
INLINE float error_function(float x) {
    const float size = __builtin_fabsf(x), t = 1 / (1 + 0.3275911f * size);
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    return __builtin_copysignf(1 - p * t * exponential(-size * size), x);
}

/* 1 / (1 + e^-x), by the exponential of a number of at most 0. */
INLINE float logistic(float x) {
    const float e = exponential(-__builtin_fabsf(x));
    return (x < 0 ? e : 1) / (1 + e);
}

INLINE void activate(int activation, ptrdiff_t count, float *x) {
    switch (activation) {
    case SILU:
        for (ptrdiff_t i = 0; i < count; i++) x[i] *= logistic(x[i]);
        break;
    case GELU:
        for (ptrdiff_t i = 0; i < count; i++)
            x[i] = 0.5f * x[i] * (1 + error_function(x[i] * 0.707106781f));
        break;
    case GELU_TANH:
        /* (1 + tanh z) / 2 is the logistic function of 2 z. */
        for (ptrdiff_t i = 0; i < count; i++)
            x[i] *= logistic(1.59576912f * (x[i] + 0.044715f * x[i] * x[i] * x[i]));
        break;
    case RELU:
        for (ptrdiff_t i = 0; i < count; i++) x[i] = x[i] < 0 ? 0 : x[i];
        break;
    default: break;
    }
}

/* ACTIVATE: to = activation(from); GATE: times other; ADD: from + other. */
static void combine_head(const struct step *s, int type, const char *from, const char *other,
                         char *to) {
    const ptrdiff_t unit = type == FLOAT ? 4 : 2;
    float x[PIECE], y[PIECE];
    for (ptrdiff_t begin = 0; begin < s->width; begin += PIECE) {
        const ptrdiff_t left = s->width - begin, count = left < PIECE ? left : PIECE;
        widen(from + begin * unit, type, count, x);
        if (s->op != ACTIVATE) widen(other + begin * unit, type, count, y);
        activate(s->activation, count, x);
        if (s->op == GATE)
            for (ptrdiff_t i = 0; i < count; i++) x[i] *= y[i];
        if (s->op == ADD)
            for (ptrdiff_t i = 0; i < count; i++) x[i] += y[i];
        narrow(x, type, count, to + begin * unit);
    }
}

/* Turn the first R elements of a head: i with i + R / 2, or with its neighbour. */
static void rotate_head(const struct pass *p, const struct step *s, ptrdiff_t row, char *head) {
    const ptrdiff_t width = p->rotary, half = width / 2;
    const int type = p->layer->type, in_pairs = s->op == ROTATE_PAIRS;
    const float *cosine = p->cosine + row * width, *sine = p->sine + row * width;
    float x[MOST_ROTARY], y[MOST_ROTARY];
    for (ptrdiff_t begin = 0; begin < width; begin += PIECE) {
        const ptrdiff_t left = width - begin;
        widen(head + begin * unit_of(p), type, left < PIECE ? left : PIECE, x + begin);
    }
    if (in_pairs)
        for (ptrdiff_t i = 0; i < width; i += 2) {
            y[i] = x[i] * cosine[i] - x[i + 1] * sine[i];
            y[i + 1] = x[i + 1] * cosine[i + 1] + x[i] * sine[i + 1];
        }
    else
        for (ptrdiff_t i = 0; i < half; i++) {
            y[i] = x[i] * cosine[i] - x[i + half] * sine[i];
            y[i + half] = x[i + half] * cosine[i + half] + x[i] * sine[i + half];
        }
    for (ptrdiff_t begin = 0; begin < width; begin += PIECE) {
        const ptrdiff_t left = width - begin;
        narrow(y + begin, type, left < PIECE ? left : PIECE, head + begin * unit_of(p));
    }
}

/* Copy a row's keys and values to its column of the cache. */
static void store_row(const struct pass *p, const struct step *s, ptrdiff_t row) {
    const ptrdiff_t text = row / p->num_nodes, node = row % p->num_nodes, unit = unit_of(p);
    for (ptrdiff_t head = 0; head < s->from.heads; head++) {
        const ptrdiff_t at = text * p->strides[0] + head * p->strides[1] +
                             (p->starts[text] + node) * p->strides[2];
        memcpy((char *)p->keys + at * unit, head_of(p, &s->from, row, head), s->width * unit);
        memcpy((char *)p->values + at * unit, head_of(p, &s->other, row, head), s->width * unit);
    }
}

struct rows {
    const struct pass *pass;
    const struct step *step;
};

/* Compute one row of a step that needs no other rows. */
static void compute_row(void *context, ptrdiff_t row) {
    const struct rows *of = context;
    const struct pass *p = of->pass;
    const struct step *s = of->step;
    if (s->op == STORE) {
        store_row(p, s, row);
        return;
    }
    for (ptrdiff_t head = 0; head < s->from.heads; head++) {
        char *from = head_of(p, &s->from, row, head), *to = head_of(p, &s->to, row, head);
        switch (s->op) {
        case RMS_NORM:
        case LAYER_NORM: norm_head(s, p->layer->type, from, to); break;
        case ROTATE_HALVES:
        case ROTATE_PAIRS: rotate_head(p, s, row, from); break;
        default:
            combine_head(s, p->layer->type, from, head_of(p, &s->other, row, head), to);
        }
    }
}

static void compute_rows(const struct pass *p, const struct step *s) {
    struct rows of = {p, s};
    const ptrdiff_t size = num_rows(p) * s->from.heads * s->width;
    pool_run(compute_row, &of, num_rows(p), size < FEW ? 1 : p->threads);
}

static void attend(const struct pass *p, const struct step *s) {
    const ptrdiff_t *widths = p->layer->widths;
    const ptrdiff_t width = widths[s->from.buffer];
    struct attention a = {
        .q = head_of(p, &s->from, 0, 0),
        .mask = p->mask,
        .y = address(p, s->to.buffer),
        .q_strides = {p->num_nodes * width, s->from.stride, width},
        .heads = s->from.heads,
        .key_heads = s->other.heads,
        .num_rows = p->num_nodes,
        .num_keys = p->num_keys,
        .width = s->width,
        .scaling = s->number,
        .cap = s->cap,
        .hidden = p->hidden,
        .type = p->layer->type,
    };
    a.k = p->keys;
    a.v = p->values;
    memcpy(a.k_strides, p->strides, sizeof p->strides);
    memcpy(a.v_strides, p->strides, sizeof p->strides);
    spectool_attention(&a, p->texts, p->threads);
}

static void run_products(const struct pass *p, const struct step *s) {
    const void *x = address(p, s->from.buffer);
    char *scratch = address(p, p->layer->num_buffers);
    for (int i = 0, count; i < s->num_linears; i += count) {
        const struct linear *l = s->linears + i;
        count = 1;
        if (!l->packed) {
            const struct dense dense = {
                .x = x,
                .w = l->weight,
                .bias = l->bias,
                .y = address(p, l->to),
                .scratch = (float *)scratch,
                .num_rows = num_rows(p),
                .num_inputs = l->num_inputs,
                .num_outputs = l->num_outputs,
                .is_bfloat16 = p->layer->type == BFLOAT16,
                .threads = p->threads,
            };
            spectool_dense(&dense);
            continue;
        }
        while (i + count < s->num_linears && l[count].is_joined) count++;
        struct product products[MOST_JOINED];
        for (int k = 0; k < count; k++) {
            products[k] = *l[k].packed;
            products[k].x = x;
            products[k].y = address(p, l[k].to);
            products[k].scratch = scratch;
            products[k].num_rows = num_rows(p);
            products[k].type = p->layer->type;
            products[k].threads = p->threads;
        }
        spectool_products(products, count);
    }
}

/* Run the steps of a layer. */
void spectool_layer(const struct pass *given) {
    struct pass pass = *given, *p = &pass;
    memcpy(p->y, p->x, num_rows(p) * p->layer->widths[0] * unit_of(p));
    for (int i = 0; i < p->layer->num_steps; i++) {
        const struct step *s = p->layer->steps + i;
        switch (s->op) {
        case PRODUCTS: run_products(p, s); break;
        case ATTEND: attend(p, s); break;
        default: compute_rows(p, s);
        }
    }
}
