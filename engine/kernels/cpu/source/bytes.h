/* Rows of x as int8, and products with them.
 *
 * Private to linear_*.c.
 */
#ifndef MANTA_BYTES_H
#define MANTA_BYTES_H

#include "vector.h"

typedef uint8_t vb __attribute__((vector_size(VF)));

/* Adding it to a float below 2^22 rounds that to a whole number, ties to even, in the lowest bits. */
static const float rounding_shift = 0x1.8p23f;

/* To each sum, the products of the four bytes of a lane: of `a` they have no sign, of `b` they do. Sums may wrap. */
INLINE vi add_bytes(vi sums, vu a, vu b) {
#if defined(VECTOR_AVX512) && defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif defined(VECTOR_AVX2) && defined(__AVXVNNI__)
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)a, (__m256i)b);
#else
    vu total = (vu)sums;
#pragma GCC unroll 4
    for (int byte = 0; byte < 4; byte++) {
        total += (a >> 8 * byte & 255) * (vu)((vi)(b << (24 - 8 * byte)) >> 24);
    }
    return (vi)total;
#endif
}

/* Of `count` elements from `begin` on; NaN if one is NaN or an infinity: a byte could not say so. */
INLINE float largest_magnitude(const void *array, int64_t dtype, int64_t begin, int64_t count) {
    vf largest = {0}, poison = {0};
    for (int64_t i = 0; i < count; i += VF) {
        const vf x = vf_get(array, dtype, begin + i, count - i);
        largest = vf_max(vf_abs(x), largest);
        poison += x * 0.0f;
    }
    return vf_largest(largest) + vf_sum(poison);
}

#endif
