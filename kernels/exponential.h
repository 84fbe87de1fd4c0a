#ifndef SPECTOOL_EXPONENTIAL_H
#define SPECTOOL_EXPONENTIAL_H

#include "vectors.h"

/* e^x for x of at most 0, within 2 units of the last place; 0 below -87. Without conditions on
 * floats, so that compilers make vectors of it. */
INLINE float exponential(float x) {
    uint32_t bits, power;
    memcpy(&bits, &x, sizeof bits);
    /* From the next number below -87 to minus infinity. */
    const uint32_t kept = (uint32_t)(bits - 0xc2ae0001u <= 0xff800000u - 0xc2ae0001u) - 1;
    bits &= kept;
    memcpy(&x, &bits, sizeof x);
    /* To the nearest integer. */
    const float n = (x * 1.44269504f + 0x1.8p23f) - 0x1.8p23f;
    const float r = __builtin_fmaf(n, -1.42860677e-6f, __builtin_fmaf(n, -0.693145752f, x));
    float p = 1.98756915e-4f;
    p = __builtin_fmaf(p, r, 1.39819995e-3f);
    p = __builtin_fmaf(p, r, 8.33345190e-3f);
    p = __builtin_fmaf(p, r, 4.16657962e-2f);
    p = __builtin_fmaf(p, r, 1.66666657e-1f);
    p = __builtin_fmaf(p, r, 0.5f);
    p = __builtin_fmaf(p * r, r, r) + 1;
    power = (uint32_t)((int32_t)n + 127) << 23 & kept;
    float scale;
    memcpy(&scale, &power, sizeof scale);
    return p * scale;
}

#endif
