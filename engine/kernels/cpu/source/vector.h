/* One vocabulary of vectors for all kernels: VF floats at a time, on GCC and clang vector extensions.
 *
 * The width and the few intrinsics follow the instruction set that the file is compiled for: AVX-512 (16 lanes), AVX2 with
 * FMA (8), and anything else that the compiler can cut into pieces (8). Arithmetic is written with the operators of C;
 * only what they cannot say is a function here. Knows no operation of a program.
 */
#ifndef MANTA_VECTOR_H
#define MANTA_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "step.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define VECTOR_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__)
#define VECTOR_AVX2 1
#endif

/* What an operator is told of it; the dot products of pairs that AVX512_BF16 adds carry most of the work. */
#if defined(VECTOR_AVX512) && defined(__AVX512BF16__)
#define VECTOR_NAME "AVX-512 BF16"
#elif defined(VECTOR_AVX512)
#define VECTOR_NAME "AVX-512"
#elif defined(VECTOR_AVX2)
#define VECTOR_NAME "AVX2"
#else
#define VECTOR_NAME "portable C"
#endif

#if defined(VECTOR_AVX512) || defined(VECTOR_AVX2)
#include <immintrin.h>
#endif

#ifdef VECTOR_AVX512
#define VF 16
#else
#define VF 8
#endif

typedef uint16_t bf16;              /* the upper half of a float */
typedef float vf __attribute__((vector_size(4 * VF)));
typedef int32_t vi __attribute__((vector_size(4 * VF)));    /* also a mask: all bits of a lane, or none */
typedef uint32_t vu __attribute__((vector_size(4 * VF)));
typedef uint16_t vh __attribute__((vector_size(2 * VF)));

#define INLINE static inline __attribute__((always_inline))

/* Keeps a pointer that a loop moves apart from others. GCC would make of them one and what the others are beside it, which
 * takes more registers than there are. */
#define OWN_REGISTER(pointer) __asm__("" : "+r"(pointer))

/* ---- lanes ---- */

INLINE vf vf_set(float value) {
    return value - (vf){0};         /* x - 0 is x for every x, also -0; the compiler makes it a broadcast */
}

INLINE vf vf_select(vi mask, vf yes, vf no) {
    return (vf)((mask & (vi)yes) | (~mask & (vi)no));
}

/* a * b + c, rounded once where the machine can. */
INLINE vf vf_fma(vf a, vf b, vf c) {
    return a * b + c;
}

/* a * b + c, rounded once. Left to the compiler, some copies of an inlined loop would round once and others twice, and
 * a token's result would depend on the tokens beside it. */
INLINE vf vf_fused(vf a, vf b, vf c) {
#if defined(VECTOR_AVX512)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(VECTOR_AVX2)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return vf_fma(a, b, c);
#endif
}

/* a > b ? a : b, so a NaN in b stays and a NaN in a gives b. */
INLINE vf vf_max(vf a, vf b) {
#if defined(VECTOR_AVX512)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(VECTOR_AVX2)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return vf_select(a > b, a, b);
#endif
}

/* a < b ? a : b; NaN as in vf_max. */
INLINE vf vf_min(vf a, vf b) {
#if defined(VECTOR_AVX512)
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(VECTOR_AVX2)
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return vf_select(a < b, a, b);
#endif
}

INLINE vf vf_abs(vf x) {
    return (vf)((vi)x & INT32_MAX);
}

/* The lanes are summed in halves: (0 + 8) + (4 + 12) and so on. */
INLINE float vf_sum(vf x) {
#ifdef VECTOR_AVX512
    return _mm512_reduce_add_ps((__m512)x);
#else
    for (int half = VF / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) {
            x[i] += x[i + half];
        }
    }
    return x[0];
#endif
}

/* The largest lane; unspecified if one is NaN. */
INLINE float vf_largest(vf x) {
#ifdef VECTOR_AVX512
    return _mm512_reduce_max_ps((__m512)x);
#else
    for (int half = VF / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) {
            x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
        }
    }
    return x[0];
#endif
}

/* ---- loads and stores; addresses need no alignment. `_some` touches the first `count` < VF elements alone. ---- */

INLINE vf vf_load(const float *from) {
    vf x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void vf_store(float *to, vf x) {
    memcpy(to, &x, sizeof x);
}

/* The other lanes are 0. */
INLINE vf vf_load_some(const float *from, int64_t count) {
#ifdef VECTOR_AVX512
    return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
#else
    vf x = {0};
    memcpy(&x, from, (size_t)count * sizeof *from);
    return x;
#endif
}

INLINE void vf_store_some(float *to, vf x, int64_t count) {
#ifdef VECTOR_AVX512
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)x);
#else
    memcpy(to, &x, (size_t)count * sizeof *to);
#endif
}

/* Exact. */
INLINE vf vf_from_bf16(vh x) {
    return (vf)(__builtin_convertvector(x, vu) << 16);
}

/* Exact, of finite float16. */
INLINE vf vf_from_f16(vh x) {
#if defined(VECTOR_AVX512)
    return (vf)_mm512_cvtph_ps((__m256i)x);
#elif defined(VECTOR_AVX2) && defined(__F16C__)
    return (vf)_mm256_cvtph_ps((__m128i)x);
#else
    /* Put into a float's places, the exponent is short of 127 - 15; a product makes it good, for subnormals as well. */
    const vu bits = __builtin_convertvector(x, vu);
    return (vf)((bits & 0x8000) << 16 | (bits & 0x7fff) << 13) * 0x1p112f;
#endif
}

/* Rounds to the nearest, ties to even; NaN stays NaN. AVX-512 BF16 takes subnormal floats (below 1.2e-38) as 0. */
INLINE vh vf_to_bf16(vf x) {
#if defined(VECTOR_AVX512) && defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    const vu bits = (vu)x;
    const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const vu nan = (bits >> 16) | 0x40;
    const vu is_nan = (vu)(x != x);
    const vu result = (is_nan & nan) | (~is_nan & rounded);
#if defined(VECTOR_AVX512)
    return (vh)_mm512_cvtepi32_epi16((__m512i)result);
#elif defined(VECTOR_AVX2)
    const __m256i packed = _mm256_packus_epi32((__m256i)result, (__m256i)result);
    return (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
    return __builtin_convertvector(result, vh);
#endif
#endif
}

INLINE vf vf_load_bf16(const bf16 *from) {
    vh x;
    memcpy(&x, from, sizeof x);
    return vf_from_bf16(x);
}

INLINE void vf_store_bf16(bf16 *to, vf x) {
    const vh rounded = vf_to_bf16(x);
    memcpy(to, &rounded, sizeof rounded);
}

/* By hand: GCC 12 converts bytes one by one. */
INLINE vf vf_load_i8(const int8_t *from) {
#if defined(VECTOR_AVX512)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#elif defined(VECTOR_AVX2)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#else
    vf x;
    for (int i = 0; i < VF; i++) {
        x[i] = from[i];
    }
    return x;
#endif
}

INLINE vf vf_load_bf16_some(const bf16 *from, int64_t count) {
#ifdef VECTOR_AVX512
    return vf_from_bf16((vh)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), from));
#else
    vh x = {0};
    memcpy(&x, from, (size_t)count * sizeof *from);
    return vf_from_bf16(x);
#endif
}

INLINE void vf_store_bf16_some(bf16 *to, vf x, int64_t count) {
    const vh rounded = vf_to_bf16(x);
#ifdef VECTOR_AVX512
    _mm256_mask_storeu_epi16(to, (__mmask16)((1u << count) - 1), (__m256i)rounded);
#else
    memcpy(to, &rounded, (size_t)count * sizeof *to);
#endif
}

/* Elements [at, at + VF) of an array of `dtype`, or [at, at + count) if fewer are left; the other lanes are 0. Give a
 * constant dtype: a kernel calls its always inlined body once for each. */
INLINE vf vf_get(const void *array, int64_t dtype, int64_t at, int64_t count) {
    if (dtype == F32) {
        const float *from = (const float *)array + at;
        return count >= VF ? vf_load(from) : vf_load_some(from, count);
    }
    const bf16 *from = (const bf16 *)array + at;
    return count >= VF ? vf_load_bf16(from) : vf_load_bf16_some(from, count);
}

/* Stores what vf_get would read back. */
INLINE void vf_put(void *array, int64_t dtype, int64_t at, int64_t count, vf x) {
    if (dtype == F32) {
        float *to = (float *)array + at;
        if (count >= VF) {
            vf_store(to, x);
        } else {
            vf_store_some(to, x, count);
        }
        return;
    }
    bf16 *to = (bf16 *)array + at;
    if (count >= VF) {
        vf_store_bf16(to, x);
    } else {
        vf_store_bf16_some(to, x, count);
    }
}

/* ---- functions ---- */

/* e^x with a relative error below 2e-7: -inf gives 0, what overflows inf, NaN NaN.
 * x = n ln 2 + r, |r| <= ln 2 / 2; e^r is a polynomial of degree 6 (minimax, relative error 3e-9), and 2^n is put into the
 * exponent in two halves, because a quotient or product of both ends of the range has no exponent of its own. */
INLINE vf vf_exp(vf x) {
    const float smallest = -104.0f, greatest = 89.0f;   /* beyond them the result is 0 and inf */
    x = vf_max(vf_set(smallest), vf_min(vf_set(greatest), x));
    const float shift = 0x1.8p23f;                      /* adding it rounds to a whole number, in the lowest bits */
    const vf shifted = vf_fma(x, vf_set(0x1.715476p0f), vf_set(shift));
    const vf n = shifted - shift;
    const vf r = vf_fma(n, vf_set(-0x1.7f7d1cp-20f), vf_fma(n, vf_set(-0x1.62e4p-1f), x));
    vf p = vf_fma(r, vf_set(0.00138145988f), vf_set(0.00836871658f));
    p = vf_fma(r, p, vf_set(0.041668389f));
    p = vf_fma(r, p, vf_set(0.166665211f));
    p = vf_fma(r, p, vf_set(0.49999994f));
    p = vf_fma(r, p, vf_set(1.0f));
    p = vf_fma(r, p, vf_set(1.0f));
#ifdef VECTOR_AVX512
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    const vi whole = (vi)shifted - (vi)vf_set(shift);
    const vi half = whole >> 1;
    const vf first = (vf)((half + 127) << 23), second = (vf)((whole - half + 127) << 23);
    return p * first * second;
#endif
}

/* The probability that a standard normal variable is below x: 1 - erf(x / sqrt 2) is a polynomial in 1 / (1 + p |x|) times
 * e^(-x^2 / 2) (Hastings, 1955; Abramowitz & Stegun 7.1.26), which gives erf with an absolute error below 3e-7. */
INLINE vf vf_normal_cdf(vf x) {
    const vf z = vf_abs(x) * 0.70710678f;
    const vf t = 1.0f / vf_fma(z, vf_set(0.3275911f), vf_set(1.0f));
    vf p = vf_fma(t, vf_set(1.061405429f), vf_set(-1.453152027f));
    p = vf_fma(t, p, vf_set(1.421413741f));
    p = vf_fma(t, p, vf_set(-0.284496736f));
    p = vf_fma(t, p, vf_set(0.254829592f));
    const vf tail = 0.5f * t * p * vf_exp(-z * z);
    return vf_select(x > 0, 1.0f - tail, tail);
}

/* 1 / (1 + e^-x). */
INLINE vf vf_sigmoid(vf x) {
    return 1.0f / (1.0f + vf_exp(-x));
}

/* As torch.nn.functional has them. `activation` is one of enum activation; give a constant, as for vf_get. */
INLINE vf activation_of(int64_t activation, vf x) {
    switch (activation) {
    case SILU:
        return x / (1.0f + vf_exp(-x));
    case GELU:
        return x * vf_normal_cdf(x);
    case GELU_TANH:
        /* (1 + tanh u) / 2 is the sigmoid of 2 u, which keeps its digits where tanh u is near -1. */
        return x * vf_sigmoid(x * (1.5957691216f + 0.0713548162726f * x * x));
    case RELU:
        return vf_max(vf_set(0.0f), x);
    default:
        return x;
    }
}

#endif
