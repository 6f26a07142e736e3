/* The way of keys and values into their pages: norm and rotation of each head in float32, one rounding, and the store.
 * Knows nothing of how attention reads them but the layout of a page. */
#include "attention.h"
#include "vector.h"

/* Root mean square norm (Zhang & Sennrich, 2019) over one head. */
INLINE void normalise(float *x, int64_t dim, const void *weight, double eps, int64_t dtype) {
    vf squares = {0};
    for (int64_t i = 0; i < dim; i += VF) {
        const vf v = vf_get(x, F32, i, dim - i);
        squares += v * v;
    }
    const float factor = 1.0f / sqrtf(vf_sum(squares) / (float)dim + (float)eps);
    for (int64_t i = 0; i < dim; i += VF) {
        const vf v = vf_get(x, F32, i, dim - i) * factor;
        vf_put(x, F32, i, dim - i, v * vf_get(weight, dtype, i, dim - i));
    }
}

/* Rotary positions (Su et al., 2021): pairs (i, i + half) turn by the angle of cos_sin [cosines: half, sines: half]. */
INLINE void rotate(float *x, int64_t half, const float *cos_sin) {
    for (int64_t i = 0; i < half; i += VF) {
        const int64_t left = half - i;
        const vf cosine = vf_get(cos_sin, F32, i, left), sine = vf_get(cos_sin + half, F32, i, left);
        const vf first = vf_get(x, F32, i, left), second = vf_get(x + half, F32, i, left);
        vf_put(x, F32, i, left, first * cosine - second * sine);
        vf_put(x + half, F32, i, left, second * cosine + first * sine);
    }
}

/* Symmetric int8 of one head, to the nearest and ties to even; returns the scale. What is not finite gives a scale of
 * NaN, so that it is not mistaken for a number later. */
INLINE float quantise(const void *head, int64_t dim, int64_t dtype, int8_t *to) {
    vf largest = {0}, poison = {0};
    for (int64_t i = 0; i < dim; i += VF) {
        const vf x = vf_get(head, dtype, i, dim - i);
        largest = vf_max(largest, vf_abs(x));
        poison += x * 0.0f;
    }
    const float scale = vf_largest(largest) / 127.0f + vf_sum(poison);
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    const float shift = 0x1.8p23f;              /* adding it leaves the rounded number in the lowest bits */
    for (int64_t i = 0; i < dim; i += VF) {
        const vf x = vf_get(head, dtype, i, dim - i) * inverse;
        const vi whole = (vi)(x + shift) - (vi)vf_set(shift);
        const int64_t count = dim - i < VF ? dim - i : VF;
        for (int64_t j = 0; j < count; j++) {
            to[i + j] = (int8_t)whole[j];
        }
    }
    return scale;
}

/* Normalises and rotates one head where it lies. */
INLINE void turn(const struct write_kv *args, const void *norm, const float *cos_sin, int64_t dtype, void *head) {
    float x[LARGEST_HEAD_DIM];
    const int64_t dim = args->head_dim;
    for (int64_t i = 0; i < dim; i += VF) {
        vf_put(x, F32, i, dim - i, vf_get(head, dtype, i, dim - i));
    }
    if (norm != NULL) {
        normalise(x, dim, norm, args->norm_eps, dtype);
    }
    if (args->rotary_dim > 0) {
        rotate(x, args->rotary_dim / 2, cos_sin);
    }
    for (int64_t i = 0; i < dim; i += VF) {
        vf_put(head, dtype, i, dim - i, vf_get(x, F32, i, dim - i));
    }
}

/* One token's key heads, or value heads, to `offset` tokens into the page that begins at `page`. */
INLINE void store(
    const struct write_kv *args, const char *heads, int64_t dtype, char *page, char *scales, int64_t offset) {
    const int64_t item = dtype == F32 ? 4 : 2;
    const int64_t dim = args->head_dim, kv_heads = args->kv_heads;
    if (scales == NULL) {
        memcpy(page + offset * kv_heads * dim * item, heads, (size_t)(kv_heads * dim * item));
        return;
    }
    for (int64_t head = 0; head < kv_heads; head++) {
        int8_t *to = (int8_t *)page + (offset * kv_heads + head) * dim;
        ((float *)scales)[offset * kv_heads + head] = quantise(heads + head * dim * item, dim, dtype, to);
    }
}

INLINE void write_token(const struct write_kv *args, const struct step *step, int64_t token, int64_t dtype) {
    const int64_t item = dtype == F32 ? 4 : 2;
    const int64_t head_bytes = args->head_dim * item;
    char *q = (char *)args->qkv + token * args->qkv_stride * item;
    char *k = q + args->heads * head_bytes;
    char *v = k + args->kv_heads * head_bytes;
    if (args->q_norm != NULL || args->rotary_dim > 0) {
        const float *cos_sin = args->rotary_dim > 0 ? step->cos_sin + token * args->rotary_dim : NULL;
        for (int64_t head = 0; head < args->heads; head++) {
            turn(args, args->q_norm, cos_sin, dtype, q + head * head_bytes);
        }
        for (int64_t head = 0; head < args->kv_heads; head++) {
            turn(args, args->k_norm, cos_sin, dtype, k + head * head_bytes);
        }
    }
    const int64_t page = step->slots[token] / args->page_tokens, offset = step->slots[token] % args->page_tokens;
    const int64_t begin = page * args->page_stride;
    char *k_scales = args->k_scales == NULL ? NULL : (char *)args->k_scales + begin;
    char *v_scales = args->v_scales == NULL ? NULL : (char *)args->v_scales + begin;
    store(args, k, dtype, (char *)args->k + begin, k_scales, offset);
    store(args, v, dtype, (char *)args->v + begin, v_scales, offset);
}

OPERATION(write_kv) {
    const int64_t shares = 4;                   /* of each thread, if no other one helps it */
    const int64_t count = step->tokens / (shares * team->size) + 1;
    for (int64_t begin = team_take(team, count); begin < step->tokens; begin = team_take(team, count)) {
        const int64_t end = begin + count < step->tokens ? begin + count : step->tokens;
        for (int64_t token = begin; token < end; token++) {
            if (args->dtype == F32) {
                write_token(args, step, token, F32);
            } else {
                write_token(args, step, token, BF16);
            }
        }
    }
}
