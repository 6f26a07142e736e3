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
INLINE void rotate(void *x, int64_t dtype, int64_t half, const float *cos_sin) {
    void *upper = (char *)x + half * (dtype == F32 ? 4 : 2);
    for (int64_t i = 0; i < half; i += VF) {
        const int64_t left = half - i;
        const vf cosine = vf_get(cos_sin, F32, i, left), sine = vf_get(cos_sin + half, F32, i, left);
        const vf first = vf_get(x, dtype, i, left), second = vf_get(upper, dtype, i, left);
        vf_put(x, dtype, i, left, first * cosine - second * sine);
        vf_put(upper, dtype, i, left, second * cosine + first * sine);
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
    if (norm == NULL) {
        rotate(head, dtype, args->rotary_dim / 2, cos_sin);
        return;
    }
    float x[LARGEST_HEAD_DIM];
    const int64_t dim = args->head_dim;
    for (int64_t i = 0; i < dim; i += VF) {
        vf_put(x, F32, i, dim - i, vf_get(head, dtype, i, dim - i));
    }
    normalise(x, dim, norm, args->norm_eps, dtype);
    rotate(x, F32, args->rotary_dim / 2, cos_sin);
    for (int64_t i = 0; i < dim; i += VF) {
        vf_put(head, dtype, i, dim - i, vf_get(x, F32, i, dim - i));
    }
}

/* A token's place in a page. */
struct place {
    char *begin;                    /* of the keys or values of the page */
    float *scales;                  /* or NULL */
    int64_t slot;
};

INLINE struct place place_of(const struct write_kv *args, void *pages, float *scales, int64_t slot) {
    const int64_t begin = slot / args->page_tokens * args->page_stride;
    return (struct place){
        .begin = (char *)pages + begin,
        .scales = scales == NULL ? NULL : (float *)(void *)((char *)scales + begin),
        .slot = slot % args->page_tokens,
    };
}

/* The word of each U channels of a head, page_tokens words apart. */
INLINE void store_key(const struct write_kv *args, const void *head, int64_t words, uint32_t *to) {
    for (int64_t i = 0; i < words; i++) {
        memcpy(to + i * args->page_tokens, (const char *)head + i * (int64_t)sizeof *to, sizeof *to);
    }
}

/* Each channel of a head into its own word, as element `item` of bf16; the first one clears the other. */
INLINE void store_value_bf16(const bf16 *head, int64_t dim, int64_t item, uint32_t *to) {
    for (int64_t i = 0; i < dim; i++) {
        to[i] = item == 0 ? head[i] : (to[i] & 0xffff) | (uint32_t)head[i] << 16;
    }
}

INLINE void store_value_int8(const int8_t *head, int64_t dim, int64_t item, uint32_t *to) {
    const int64_t shift = 8 * item;
    const uint32_t others = item == 0 ? 0 : ~(0xffu << shift);
    for (int64_t i = 0; i < dim; i++) {
        to[i] = (to[i] & others) | (uint32_t)(uint8_t)head[i] << shift;
    }
}

/* One token's key heads. */
INLINE void store_keys(const struct write_kv *args, const char *heads, int64_t dtype, struct place place) {
    const int64_t dim = args->head_dim, item = dtype == F32 ? 4 : 2;
    const int64_t words = dim * (place.scales != NULL ? 1 : item) / (int64_t)sizeof(uint32_t);
    for (int64_t head = 0; head < args->kv_heads; head++, heads += dim * item) {
        uint32_t *to = (uint32_t *)(void *)place.begin + head * words * args->page_tokens + place.slot;
        if (place.scales == NULL) {
            store_key(args, heads, words, to);
        } else {
            int8_t values[LARGEST_HEAD_DIM];
            place.scales[head * args->page_tokens + place.slot] = quantise(heads, dim, dtype, values);
            for (int64_t i = 0; i < dim; i++) {
                values[i] ^= INT8_MIN;          /* 128 more */
            }
            store_key(args, values, words, to);
        }
    }
}

/* One token's value heads. */
INLINE void store_values(const struct write_kv *args, const char *heads, int64_t dtype, struct place place) {
    const int64_t dim = args->head_dim, item = dtype == F32 ? 4 : 2;
    const int64_t items = place.scales != NULL ? 4 : dtype == F32 ? 1 : 2;
    for (int64_t head = 0; head < args->kv_heads; head++, heads += dim * item) {
        const int64_t row = head * args->page_tokens / items + place.slot / items;
        uint32_t *to = (uint32_t *)(void *)place.begin + row * dim;
        if (place.scales != NULL) {
            int8_t values[LARGEST_HEAD_DIM];
            place.scales[head * args->page_tokens + place.slot] = quantise(heads, dim, dtype, values);
            store_value_int8(values, dim, place.slot % items, to);
        } else if (dtype == F32) {
            memcpy(to, heads, (size_t)(dim * item));
        } else {
            store_value_bf16((const bf16 *)(const void *)heads, dim, place.slot % items, to);
        }
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
    store_keys(args, k, dtype, place_of(args, args->k, args->k_scales, step->slots[token]));
    store_values(args, v, dtype, place_of(args, args->v, args->v_scales, step->slots[token]));
}

/* The first token from `token` on that begins a group of its page, or a sequence's part of this step: tokens of one group
 * share words, so one thread must write them all. */
static int64_t next_group(const struct step *step, int64_t token) {
    while (token > 0 && token < step->tokens && step->slots[token] % GROUP != 0 &&
           step->slots[token] == step->slots[token - 1] + 1) {
        token++;
    }
    return token;
}

OPERATION(write_kv) {
    const int64_t shares = 4;                   /* of each thread, if no other one helps it */
    const int64_t count = step->tokens / (shares * team->size) + 1;
    for (int64_t begin = team_take(team, count); begin < step->tokens; begin = team_take(team, count)) {
        const int64_t end = next_group(step, begin + count < step->tokens ? begin + count : step->tokens);
        for (int64_t token = next_group(step, begin); token < end; token++) {
            if (args->dtype == F32) {
                write_token(args, step, token, F32);
            } else {
                write_token(args, step, token, BF16);
            }
        }
    }
}
