/* What a processor can do at most: multiply-adds of an instruction, and bytes read from memory.
 *
 * Each function works for a while and returns how much it did. Independent chains of sums hide the
 * latency of the instructions.
 */
#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define CHAINS 16

#if defined(__AVX512F__)
#define BYTES 64
#define IN_REGISTER "+v"
#elif defined(__AVX2__)
#define BYTES 32
#define IN_REGISTER "+x"
#elif defined(__x86_64__)
#define BYTES 16
#define IN_REGISTER "+x"
#else
#define BYTES 16
#define IN_REGISTER "+w"
#endif

typedef int32_t ints __attribute__((vector_size(BYTES)));
typedef float floats __attribute__((vector_size(BYTES)));
typedef uint64_t words __attribute__((vector_size(BYTES)));

/* Sums of products of 8-bit integers: one instruction, or the three of AVX2. */
static inline ints int8_step(ints sum, ints a, ints b) {
#if defined(__AVX512VNNI__)
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__) && BYTES == 32
    return (ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__) && BYTES == 32
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)a, (__m256i)b);
    return (ints)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#elif defined(__ARM_FEATURE_DOTPROD)
    return (ints)vdotq_s32((int32x4_t)sum, (int8x16_t)a, (int8x16_t)b);
#else
    return sum + a * b;
#endif
}
#if defined(__AVX512VNNI__) || defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
#define INT8_PRODUCTS BYTES
#else
#define INT8_PRODUCTS (BYTES / 4)
#endif

static inline floats float_step(floats sum, floats a, floats b) {
#if defined(__AVX512F__)
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__)
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__ARM_NEON)
    return (floats)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + sum;
#endif
}

/* Sums of products of bfloat16, as float where there is no instruction for them. */
static inline floats bfloat16_step(floats sum, floats a, floats b) {
#if defined(__AVX512BF16__)
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    return float_step(sum, a, b);
#endif
}
#if defined(__AVX512BF16__)
#define BFLOAT16_PRODUCTS (BYTES / 2)
#else
#define BFLOAT16_PRODUCTS (BYTES / 4)
#endif

#define MEASURE(name, type, step, products)                                                        \
    int64_t name(int64_t rounds) {                                                                 \
        type sum[CHAINS] = {{0}}, a, b;                                                            \
        for (int i = 0; i < (int)(BYTES / 4); i++) a[i] = 1.5f + i, b[i] = 0.75f - i;              \
        _Pragma("GCC unroll 16") for (int i = 0; i < CHAINS; i++)                                  \
            __asm__ volatile("" : IN_REGISTER(sum[i])); /* Or equal chains would become one. */    \
        for (int64_t round = 0; round < rounds; round++) {                                         \
            __asm__ volatile("" : IN_REGISTER(a), IN_REGISTER(b));                                 \
            _Pragma("GCC unroll 16") for (int i = 0; i < CHAINS; i++) sum[i] = step(sum[i], a, b); \
        }                                                                                          \
        _Pragma("GCC unroll 16") for (int i = 0; i < CHAINS; i++)                                  \
            __asm__ volatile("" : IN_REGISTER(sum[i]));                                            \
        return rounds * CHAINS * (products);                                                       \
    }

MEASURE(int8_peak, ints, int8_step, INT8_PRODUCTS)
MEASURE(bfloat16_peak, floats, bfloat16_step, BFLOAT16_PRODUCTS)
MEASURE(float32_peak, floats, float_step, BYTES / 4)

/* Read `bytes` at p in `streams` equal parts side by side, prefetching `ahead` bytes. The bytes are
 * rounded down to whole lines of each part. */
int64_t read_peak(const char *p, int64_t bytes, int64_t streams, int64_t ahead) {
    const int64_t part = bytes / streams / 256 * 256;
    words sum[4] = {{0}};
    for (int64_t at = 0; at < part; at += 256)
        for (int64_t stream = 0; stream < streams; stream++) {
            const char *line = p + stream * part + at;
            if (ahead)
                for (int i = 0; i < 256; i += 64) __builtin_prefetch(line + ahead + i, 0, 2);
            for (int i = 0; i < 256 / BYTES; i++) sum[i % 4] += *(const words *)(line + i * BYTES);
        }
    for (int i = 0; i < 4; i++) __asm__ volatile("" : IN_REGISTER(sum[i]));
    return streams * part;
}
