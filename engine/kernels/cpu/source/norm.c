/* RMSNorm and LayerNorm of a sum, a row at a time. See norm.h.
 *
 * Each row is passed over two or three times, the first time from memory and then from the nearest cache. Statistics are
 * float32, in several partial sums, which add up in an order that depends on the width alone. */
#include "norm.h"

#include <stddef.h>

#include "vector.h"

/* Sums that grow side by side, so that an addition need not wait for the one before. */
#define SUMS 4

/* One row of `total`, which is in `row` of `array` once it has been summed. */
struct total {
    const void *array;
    int64_t row;                    /* elements before it */
    int64_t width;
    int64_t dtype;
};

INLINE vf total_at(const struct total *total, int64_t i) {
    return vf_get(total->array, total->dtype, total->row + i, total->width - i);
}

/* x with 0 in all lanes but the first `count`. */
INLINE vf only_first(vf x, int64_t count) {
    vi lane;
    for (int i = 0; i < VF; i++) {
        lane[i] = i;
    }
    return vf_select(lane < (int32_t)count, x, vf_set(0.0f));
}

/* The row of x + residual, rounded and stored; x itself without a residual. */
INLINE struct total sum_rows(
    const void *x, const void *residual, void *stored, int64_t row, int64_t width, int64_t dtype) {
    if (residual == NULL) {
        return (struct total){x, row, width, dtype};
    }
    for (int64_t i = 0; i < width; i += VF) {
        const int64_t at = row + i, count = width - i;
        vf_put(stored, dtype, at, count, vf_get(x, dtype, at, count) + vf_get(residual, dtype, at, count));
    }
    return (struct total){stored, row, width, dtype};
}

/* Sum over the row of (total - center), to the power of 1 or 2. */
INLINE float sum_of_powers(const struct total *total, float center, int power) {
    vf sums[SUMS] = {0};
    int64_t i = 0;
    for (; i + SUMS * VF <= total->width; i += SUMS * VF) {
#pragma GCC unroll 4
        for (int j = 0; j < SUMS; j++) {
            const vf value = total_at(total, i + j * VF) - center;
            sums[j] = power == 1 ? sums[j] + value : vf_fma(value, value, sums[j]);
        }
    }
    for (; i < total->width; i += VF) {
        const vf value = only_first(total_at(total, i) - center, total->width - i < VF ? total->width - i : VF);
        sums[0] = power == 1 ? sums[0] + value : vf_fma(value, value, sums[0]);
    }
    return vf_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

INLINE void rms_norm_row(const struct rms_norm *args, int64_t dtype, int64_t token) {
    const int64_t width = args->width, row = token * width;
    const struct total total = sum_rows(args->x, args->residual, args->total, row, width, dtype);
    const float mean = sum_of_powers(&total, 0.0f, 2) / (float)width;
    const float scale = 1.0f / sqrtf(mean + (float)args->eps);
    for (int64_t i = 0; i < width; i += VF) {
        const vf weight = vf_get(args->weight, dtype, i, width - i);
        vf_put(args->y, dtype, row + i, width - i, total_at(&total, i) * scale * weight);
    }
}

void rms_norm(const struct rms_norm *args, const struct step *step, struct team *team) {
    int64_t begin, end;
    team_share(team, step->tokens, &begin, &end);
    for (int64_t token = begin; token < end; token++) {
        if (args->dtype == F32) {
            rms_norm_row(args, F32, token);
        } else {
            rms_norm_row(args, BF16, token);
        }
    }
}

INLINE void layer_norm_row(const struct layer_norm *args, int64_t dtype, int64_t token) {
    const int64_t width = args->width, row = token * width;
    const struct total total = sum_rows(args->x, args->residual, args->total, row, width, dtype);
    const float mean = sum_of_powers(&total, 0.0f, 1) / (float)width;
    const float variance = sum_of_powers(&total, mean, 2) / (float)width;
    const float scale = 1.0f / sqrtf(variance + (float)args->eps);
    for (int64_t i = 0; i < width; i += VF) {
        const vf weight = vf_get(args->weight, dtype, i, width - i), bias = vf_get(args->bias, dtype, i, width - i);
        vf_put(args->y, dtype, row + i, width - i, vf_fma((total_at(&total, i) - mean) * scale, weight, bias));
    }
}

void layer_norm(const struct layer_norm *args, const struct step *step, struct team *team) {
    int64_t begin, end;
    team_share(team, step->tokens, &begin, &end);
    for (int64_t token = begin; token < end; token++) {
        if (args->dtype == F32) {
            layer_norm_row(args, F32, token);
        } else {
            layer_norm_row(args, BF16, token);
        }
    }
}
