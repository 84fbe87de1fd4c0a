/* Products of few rows with a matrix of x's own type. */
#define NAME dense
#define WEIGHT_BYTES(half) (half ? 2 : 4)
#include "few_rows.h"

INLINE void read_weights(const int half, const char *p, ptrdiff_t rest, vec *out) {
    const vec v = load(p, rest * WEIGHT_BYTES(half));
    out[0] = PARTS(half) == 2 ? even(v) : v;
    if (PARTS(half) == 2) out[1] = odd(v);
}

INLINE void read_x(const int half, const char *p, ptrdiff_t rest, vec *out) {
    read_weights(half, p, rest, out);
}
