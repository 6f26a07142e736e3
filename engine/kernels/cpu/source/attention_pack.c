/* Queries as rows of words, and panels of keys and values over the words of their pages. */
#include "attention_pack.h"

/* ---- queries ---- */

#if HAS_QUADS
/* One head as two rows of bytes. What is not finite gives a scale of NaN. */
static void split_query(const bf16 *head, int64_t dim, void *upper, void *lower, float *scale, int32_t *bias) {
    vf largest = {0}, poison = {0};
    for (int64_t i = 0; i < dim; i += VF) {
        const vf x = vf_load_bf16(head + i);
        largest = vf_max(largest, vf_abs(x));
        poison += x * 0.0f;
    }
    *scale = vf_largest(largest) / QUERY_STEPS + vf_sum(poison);
    const float inverse = *scale > 0.0f ? 1.0f / *scale : 0.0f;
    const vi half = (vi){0} + (1 << (LOW_BITS - 1));
    vi sum = {0};
    for (int64_t i = 0; i < dim; i += VF) {
        const vi steps = (vi)_mm512_cvtps_epi32((__m512)(vf_load_bf16(head + i) * inverse));
        const vi high = (steps + half) >> LOW_BITS, low = steps - (high << LOW_BITS);
        _mm_storeu_si128((__m128i *)((char *)upper + i), _mm512_cvtepi32_epi8((__m512i)high));
        _mm_storeu_si128((__m128i *)((char *)lower + i), _mm512_cvtepi32_epi8((__m512i)low));
        sum += steps;
    }
    *bias = 128 * _mm512_reduce_add_epi32((__m512i)sum);
}

INLINE void pack_quad_queries(
    const struct shape *shape, const bf16 *q, int64_t row, int64_t count, const struct queries *to) {
    const int64_t dim = shape->head_dim, words = dim / word_items(QUADS);
    for (int64_t i = row; i < row + count; i++, q += dim) {
        uint32_t *upper = to->words + i * words, *lower = upper + shape->rows * words;
        split_query(q, dim, upper, lower, &to->scales[i], &to->biases[i]);
    }
}
#else
INLINE void pack_quad_queries(
    const struct shape *shape, const bf16 *q, int64_t row, int64_t count, const struct queries *to) {
    (void)shape, (void)q, (void)row, (void)count, (void)to;
}
#endif

void pack_queries(
    const struct shape *shape, const void *q, int64_t dtype, int64_t at, int64_t row, int64_t count,
    const struct queries *to) {
    const int64_t dim = shape->head_dim, words = dim / word_items(shape->words);
    uint32_t *begin = to->words + row * words;
    if (shape->words == QUADS) {
        pack_quad_queries(shape, (const bf16 *)q + at, row, count, to);
    } else if (dtype == F32) {
        memcpy(begin, (const float *)q + at, (size_t)(count * dim) * sizeof(float));
    } else if (shape->words == PAIRS) {
        memcpy(begin, (const bf16 *)q + at, (size_t)(count * dim) * sizeof(bf16));
    } else {
        for (int64_t i = 0; i < count * dim; i += VF) {
            vf_put(begin, F32, i, count * dim - i, vf_get(q, BF16, at + i, count * dim - i));
        }
    }
}

/* ---- keys and values ---- */

/* Whether products take the words of the cache as they are. */
INLINE bool is_native(const struct shape *shape) {
    return word_items(shape->words) == cache_items(shape->cache);
}

/* Element `item` of each word; `flip` turns bits of the words before. */
INLINE vf item_of(enum cache cache, vu words, int item, uint32_t flip) {
    switch (cache) {
    case CACHE_F32:
        return (vf)words;
    case CACHE_BF16:
        return (vf)(item == 0 ? words << 16 : words & 0xffff0000);
    default:
        return __builtin_convertvector((vi)((words ^ flip) << (24 - 8 * item)) >> 24, vf);
    }
}

INLINE vu load_words(const char *from, int64_t count) {
    return (vu)(count >= VF ? vf_load((const float *)(const void *)from)
                            : vf_load_some((const float *)(const void *)from, count));
}

/* Keys as floats: to[channel][key]. */
INLINE void expand_keys(enum cache cache, const struct shape *shape, const struct keys *keys, float *to) {
    const int items = (int)cache_items(cache);
    const int64_t step = shape->page_tokens * (int64_t)sizeof(uint32_t);
    for (int64_t key = 0; key < keys->count; key += VF) {
        const char *from = keys->k[key / GROUP] + key % GROUP * (int64_t)sizeof(uint32_t);
        for (int64_t channel = 0; channel < shape->head_dim; channel += items, from += step) {
            const vu words = load_words(from, VF);
            for (int item = 0; item < items; item++) {
                vf_store(to + (channel + item) * KEY_BLOCK + key, item_of(cache, words, item, 0x80808080));
            }
        }
    }
}

/* Values as floats: to[key][padded head_dim]. As CACHE_F32 they stay words. */
INLINE void expand_values(enum cache cache, const struct shape *shape, const struct keys *keys, float *to) {
    const int items = (int)cache_items(cache), rows = GROUP / (int)cache_items(shape->cache);
    const int64_t dim = shape->head_dim, padded = padded_dim(dim);
    for (int64_t group = 0; group * GROUP < keys->count; group++) {
        for (int64_t row = 0; row < rows; row++, to += items * padded) {
            const char *from = keys->v[group] + row * dim * (int64_t)sizeof(uint32_t);
            for (int64_t i = 0; i < dim; i += VF) {
                const vu words = load_words(from + i * (int64_t)sizeof(uint32_t), dim - i);
                for (int item = 0; item < items; item++) {
                    vf_store(to + item * padded + i, item_of(cache, words, item, 0));
                }
            }
        }
    }
}

void key_panel(const struct shape *shape, const struct keys *keys, uint32_t *buffer, struct panel *panel) {
    if (is_native(shape)) {
        panel->runs[0] = keys->k[0];
        panel->run_depth = shape->head_dim / word_items(shape->words);
        panel->stride = shape->page_tokens * (int64_t)sizeof(uint32_t);
        for (int64_t key = 0; key < KEY_BLOCK; key += VF) {
            /* Past the block's end the scores are nobody's: those of the first keys, once more. */
            const bool held = key < keys->count;
            panel->columns[key / VF] =
                held ? keys->k[key / GROUP] - keys->k[0] + key % GROUP * (int64_t)sizeof(uint32_t) : 0;
        }
        return;
    }
    panel->runs[0] = (const char *)buffer;
    panel->run_depth = shape->head_dim;
    panel->stride = KEY_BLOCK * (int64_t)sizeof(uint32_t);
    for (int64_t v = 0; v < KEY_BLOCK / VF; v++) {
        panel->columns[v] = v * VF * (int64_t)sizeof(uint32_t);
    }
    if (shape->cache == CACHE_BF16) {
        expand_keys(CACHE_BF16, shape, keys, (float *)buffer);
    } else {
        expand_keys(CACHE_INT8, shape, keys, (float *)buffer);
    }
}

void value_panel(const struct shape *shape, const struct keys *keys, uint32_t *buffer, struct panel *panel) {
    const int64_t dim = shape->head_dim, padded = padded_dim(dim);
    const bool lie_right = is_native(shape) && dim == padded;
    panel->run_depth = GROUP / word_items(shape->words);
    panel->stride = padded * (int64_t)sizeof(uint32_t);
    for (int64_t v = 0; v < padded / VF; v++) {
        panel->columns[v] = v * VF * (int64_t)sizeof(uint32_t);
    }
    for (int64_t group = 0; group * GROUP < keys->count; group++) {
        const char *packed = (const char *)buffer + group * panel->run_depth * panel->stride;
        panel->runs[group] = lie_right ? keys->v[group] : packed;
    }
    if (lie_right) {
        return;
    }
    if (is_native(shape)) {
        expand_values(CACHE_F32, shape, keys, (float *)buffer);
    } else if (shape->cache == CACHE_BF16) {
        expand_values(CACHE_BF16, shape, keys, (float *)buffer);
    } else {
        expand_values(CACHE_INT8, shape, keys, (float *)buffer);
    }
}
