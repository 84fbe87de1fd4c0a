/* Vectors of 16 lanes as four of NEON each; see vectors.h. */
#include <arm_neon.h>

#define COLUMNS 4
#define WIDE 1
#define NARROW 2
#define TALL 2

typedef struct {
    uint32x4_t part[4];
} ints;
typedef struct {
    float32x4_t part[4];
} floats;

/* A vector whose parts are `value`, an expression of their number i. */
#define EACH_PART(type, value)                                                                     \
    type out;                                                                                      \
    for (int i = 0; i < 4; i++) out.part[i] = value;                                               \
    return out;
#define BYTES(v) vreinterpretq_u8_u32(v)
#define WORDS(v) vreinterpretq_u32_u8(v)

INLINE ints load_ints(const void *p) {
    EACH_PART(ints, WORDS(vld1q_u8((const uint8_t *)p + 16 * i)))
}
INLINE ints splat_int(int32_t v) {
    EACH_PART(ints, vdupq_n_u32((uint32_t)v))
}
INLINE ints both(ints a, ints b) {
    EACH_PART(ints, vandq_u32(a.part[i], b.part[i]))
}
INLINE ints either(ints a, ints b) {
    EACH_PART(ints, vorrq_u32(a.part[i], b.part[i]))
}
/* Not the shifts by a constant, which must be one before functions are put in place. */
INLINE ints shift_left(ints v, const int by) {
    EACH_PART(ints, vshlq_u32(v.part[i], vdupq_n_s32(by)))
}
INLINE ints shift_right(ints v, const int by) {
    EACH_PART(ints, vshlq_u32(v.part[i], vdupq_n_s32(-by)))
}

INLINE ints look_up_bytes(ints table, ints codes) {
    EACH_PART(ints, WORDS(vqtbl1q_u8(BYTES(table.part[0]), BYTES(codes.part[i]))))
}

INLINE uint8x16_t mark_part(uint8x16_t codes) {
    return vandq_u8(vceqq_u8(vrev16q_u8(codes), vdupq_n_u8(8)), vdupq_n_u8(16));
}
INLINE ints mark_neighbours(ints codes) {
    EACH_PART(ints, WORDS(mark_part(BYTES(codes.part[i]))))
}

#if defined(__ARM_FEATURE_MATMUL_INT8)
#define DOT_CENTER 0
INLINE int32x4_t dot_part(int32x4_t sum, uint8x16_t w, int8x16_t x) { return vusdotq_s32(sum, w, x); }
#else
#define DOT_CENTER 128
INLINE int32x4_t dot_part(int32x4_t sum, uint8x16_t w, int8x16_t x) {
    const int8x16_t centered = vreinterpretq_s8_u8(veorq_u8(w, vdupq_n_u8(128)));
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sum, centered, x);
#else
    /* Pairs of products are added in 16 bits, which hold 2 128 127. */
    const int16x8_t low = vmull_s8(vget_low_s8(centered), vget_low_s8(x));
    return vpadalq_s16(sum, vpaddq_s16(low, vmull_high_s8(centered, x)));
#endif
}
#endif

INLINE ints dot(ints sum, ints w, const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    const int8x16_t splat = vreinterpretq_s8_s32(vdupq_n_s32(four));
    EACH_PART(ints, vreinterpretq_u32_s32(dot_part(vreinterpretq_s32_u32(sum.part[i]),
                                                   BYTES(w.part[i]), splat)))
}

INLINE ints multiply_small(ints v, int32_t by) {
    EACH_PART(ints, vmulq_n_u32(v.part[i], (uint32_t)by))
}

INLINE floats load_floats(const float *p) {
    EACH_PART(floats, vld1q_f32(p + 4 * i))
}
INLINE void store_floats(float *p, floats v) {
    for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, v.part[i]);
}
INLINE floats load_halves(const uint16_t *p) {
    EACH_PART(floats, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))))
}
INLINE floats splat(float v) {
    EACH_PART(floats, vdupq_n_f32(v))
}
INLINE floats to_floats(ints v) {
    EACH_PART(floats, vcvtq_f32_s32(vreinterpretq_s32_u32(v.part[i])))
}
INLINE ints to_ints(floats v) {
    EACH_PART(ints, vreinterpretq_u32_s32(vcvtq_s32_f32(v.part[i])))
}
INLINE floats add(floats a, floats b) {
    EACH_PART(floats, vaddq_f32(a.part[i], b.part[i]))
}
INLINE floats subtract(floats a, floats b) {
    EACH_PART(floats, vsubq_f32(a.part[i], b.part[i]))
}
INLINE floats multiply(floats a, floats b) {
    EACH_PART(floats, vmulq_f32(a.part[i], b.part[i]))
}
INLINE floats fused(floats a, floats b, floats c) {
    EACH_PART(floats, vfmaq_f32(c.part[i], a.part[i], b.part[i]))
}

/* The numbers of the four bytes of a float in a table, of each lane. */
INLINE uint8x16_t byte_numbers(uint32x4_t lanes, uint32_t mask) {
    const uint32x4_t index = vandq_u32(lanes, vdupq_n_u32(mask));
    return BYTES(vmlaq_u32(vdupq_n_u32(0x03020100), index, vdupq_n_u32(0x04040404)));
}
INLINE float32x4_t choose_16(const float *table, uint32x4_t lanes) {
    const uint8x16x4_t bytes = vld1q_u8_x4((const uint8_t *)table);
    return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, byte_numbers(lanes, 15)));
}
INLINE float32x4_t choose_32(const float *table, uint32x4_t lanes) {
    const uint8x16x4_t low = vld1q_u8_x4((const uint8_t *)table);
    const uint8x16x4_t high = vld1q_u8_x4((const uint8_t *)(table + LANES));
    const uint8x16_t at = byte_numbers(lanes, 31);
    /* Numbers from 64 on find nothing in a table, and leave what the other found. */
    const uint8x16_t found = vqtbl4q_u8(low, at);
    return vreinterpretq_f32_u8(vqtbx4q_u8(found, high, vsubq_u8(at, vdupq_n_u8(64))));
}
INLINE floats look_up_16(const float *table, ints lanes) {
    EACH_PART(floats, choose_16(table, lanes.part[i]))
}
INLINE floats look_up_32(const float *table, ints lanes) {
    EACH_PART(floats, choose_32(table, lanes.part[i]))
}
