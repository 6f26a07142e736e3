/* Products of int4 weights with x in int8, and the rows of x for them: each group of each row has a scale of its own. */
#include "linear_int4_block.h"

void multiply_int4_int8(const struct block *block) {
    multiply_int4(INT8, block);
}

/* Of every 8 channels 0, 4, 1, 5, 2, 6, 3, 7: so they meet the bytes of a step, of which the second four are the upper
 * halves of the first. */
INLINE vb in_step_order(vb bytes) {
#if defined(VECTOR_AVX512)
    const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    return (vb)_mm_shuffle_epi8((__m128i)bytes, order);
#else
    static const int8_t order[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    vb ordered;
    for (int i = 0; i < VF; i++) {
        ordered[i] = bytes[i / 8 * 8 + order[i % 8]];
    }
    return ordered;
#endif
}

/* `dtype` is a constant. */
INLINE void quantize(
    const struct linear_int4 *args, int64_t dtype, int64_t begin, int64_t end, int8_t *values,
    struct int8_group *groups) {
    for (int64_t row = begin; row < end; row++) {
        int8_t *to = values + row * args->in;
        for (int64_t first = 0; first < args->in; first += args->group, groups++) {
            const int64_t from = row * args->x_stride + first;
            const float largest = largest_magnitude(args->x, dtype, from, args->group);
            const vf inverse = vf_set(largest > 0 ? 127 / largest : 0);
            vi sum = {0};
            for (int64_t i = 0; i < args->group; i += VF) {
                const vf shifted = vf_fused(vf_get(args->x, dtype, from + i, VF), inverse, vf_set(rounding_shift));
                const vi steps = (vi)shifted - (vi)vf_set(rounding_shift);
                const vb bytes = in_step_order(__builtin_convertvector((vu)steps, vb));
                memcpy(to + first + i, &bytes, sizeof bytes);
                sum += steps;
            }
            /* A sum of steps is below 2^24 and so exact. */
            groups->scale = largest / 127;
            groups->sum = (int32_t)vf_sum(__builtin_convertvector(sum, vf));
        }
    }
}

void quantize_groups(
    const struct linear_int4 *args, int64_t begin, int64_t end, int8_t *values, struct int8_group *groups) {
    struct int8_group *first = groups + begin * (args->in / args->group);
    if (args->dtype == F32) {
        quantize(args, F32, begin, end, values, first);
    } else {
        quantize(args, BF16, begin, end, values, first);
    }
}
