/* Reads queries, keys and values of any format from where they lie, and turns them into panels of words. */
#include "attention_pack.h"

typedef uint16_t v16 __attribute__((vector_size(4 * VF)));
typedef uint64_t v64 __attribute__((vector_size(4 * VF)));

/* Lanes of two vectors, by number; `type` is theirs. */
#ifdef __clang__
#define SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif

INLINE vu load_words(const void *from) {
    vu x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store_words(uint32_t *to, vu x) {
    memcpy(to, &x, sizeof x);
}

/* ---- elements of a head ---- */

INLINE vf floats_of_int8(const int8_t *from) {
#if defined(VECTOR_AVX512)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)from)));
#elif defined(VECTOR_AVX2)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)from)));
#else
    vf x;
    for (int i = 0; i < VF; i++) {
        x[i] = (float)from[i];
    }
    return x;
#endif
}

/* The first `count` elements, if that is less than a vector; the other lanes are 0. */
INLINE vf load_int8(const int8_t *from, int64_t count) {
    if (count >= VF) {
        return floats_of_int8(from);
    }
    int8_t some[VF] = {0};
    memcpy(some, from, (size_t)count);
    return floats_of_int8(some);
}

INLINE vf load_floats(enum cache cache, const void *head, int64_t at, int64_t count) {
    switch (cache) {
    case CACHE_F32:
        return vf_get(head, F32, at, count);
    case CACHE_BF16:
        return vf_get(head, BF16, at, count);
    default:
        return load_int8((const int8_t *)head + at, count);
    }
}

/* Two vectors of floats, one after the other, as bf16; an int8 is exact in it. */
INLINE vu pairs_of(vf lower, vf upper) {
#if HAS_PAIRS
    return (vu)_mm512_cvtne2ps_pbh((__m512)upper, (__m512)lower);
#else
    (void)lower, (void)upper;
    return (vu){0};
#endif
}

/* `count` words of a head from word `at` on: floats or pairs; the other lanes are 0. */
INLINE vu load_row(enum words words, enum cache cache, const void *head, int64_t at, int64_t count) {
    if (words == FLOATS) {
        return (vu)load_floats(cache, head, at, count);
    }
    if (cache == CACHE_BF16) {
        const bf16 *from = (const bf16 *)head + 2 * at;
        return count >= VF ? load_words(from) : (vu)vf_load_some((const float *)(const void *)from, count);
    }
    const vf lower = load_floats(cache, head, 2 * at, 2 * count);
    const vf upper = 2 * count > VF ? load_floats(cache, head, 2 * at + VF, 2 * count - VF) : (vf){0};
    return pairs_of(lower, upper);
}

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

/* ---- keys ---- */

/* Lower or upper halves of each 128 bits of two vectors, interleaved. */
#if VF == 16
#define LOWER_WORDS(a, b) SHUFFLE(vu, a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define UPPER_WORDS(a, b) SHUFFLE(vu, a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define LOWER_DOUBLES(a, b) SHUFFLE(v64, a, b, 0, 8, 2, 10, 4, 12, 6, 14)
#define UPPER_DOUBLES(a, b) SHUFFLE(v64, a, b, 1, 9, 3, 11, 5, 13, 7, 15)
#else
#define LOWER_WORDS(a, b) SHUFFLE(vu, a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define UPPER_WORDS(a, b) SHUFFLE(vu, a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define LOWER_DOUBLES(a, b) SHUFFLE(v64, a, b, 0, 4, 2, 6)
#define UPPER_DOUBLES(a, b) SHUFFLE(v64, a, b, 1, 5, 3, 7)
#endif

#if defined(VECTOR_AVX512) || defined(VECTOR_AVX2)
INLINE __m128i load_quad(const char *from) {
    return _mm_loadu_si128((const __m128i *)(const void *)from);
}
#endif

/* Four words of VF / 4 rows, every fourth one, side by side. */
INLINE vu load_quads(const char *const *row, int64_t at) {
#if defined(VECTOR_AVX512)
    __m512i x = _mm512_castsi128_si512(load_quad(row[0] + at));
    x = _mm512_mask_broadcast_i32x4(x, 0x00f0, load_quad(row[4] + at));
    x = _mm512_mask_broadcast_i32x4(x, 0x0f00, load_quad(row[8] + at));
    return (vu)_mm512_mask_broadcast_i32x4(x, 0xf000, load_quad(row[12] + at));
#elif defined(VECTOR_AVX2)
    return (vu)_mm256_inserti128_si256(_mm256_castsi128_si256(load_quad(row[0] + at)), load_quad(row[4] + at), 1);
#else
    vu x;
    memcpy(&x, row[0] + at, sizeof x / 2);
    memcpy((char *)&x + sizeof x / 2, row[4] + at, sizeof x / 2);
    return x;
#endif
}

/* Four words of VF rows, from byte `at` on, to four vectors of VF rows each, with bits of `flip` turned. Lanes of 128
 * bits are transposed by themselves, which takes half the shuffles of whole vectors; load_quads has put each row where
 * it must end. */
INLINE void transpose(const char *const rows[VF], int64_t at, uint32_t flip, uint32_t *to) {
    const vu a = load_quads(rows, at) ^ flip, b = load_quads(rows + 1, at) ^ flip;
    const vu c = load_quads(rows + 2, at) ^ flip, d = load_quads(rows + 3, at) ^ flip;
    const v64 lower = (v64)LOWER_WORDS(a, b), next = (v64)LOWER_WORDS(c, d);
    const v64 upper = (v64)UPPER_WORDS(a, b), last = (v64)UPPER_WORDS(c, d);
    store_words(to, (vu)LOWER_DOUBLES(lower, next));
    store_words(to + KEY_BLOCK, (vu)UPPER_DOUBLES(lower, next));
    store_words(to + 2 * KEY_BLOCK, (vu)LOWER_DOUBLES(upper, last));
    store_words(to + 3 * KEY_BLOCK, (vu)UPPER_DOUBLES(upper, last));
}

/* A head that is not in words yet. */
INLINE void convert(enum words words, enum cache cache, const char *head, int64_t count, uint32_t *to) {
    for (int64_t word = 0; word < count; word += VF) {
        const vu x = load_row(words, cache, head, word, count - word);
        if (count - word >= VF) {
            store_words(to + word, x);
        } else {
            memcpy(to + word, &x, (size_t)(count - word) * sizeof *to);
        }
    }
}

INLINE void pack_keys_of(
    enum words words, enum cache cache, const struct keys *keys, int64_t dim, uint32_t *to, struct ahead *ahead) {
    static const uint32_t zeros[LARGEST_HEAD_DIM];
    const bool converts = words != QUADS && (cache == CACHE_INT8 || (cache == CACHE_BF16 && words == FLOATS));
    const int64_t count = dim / word_items(words);
    uint32_t converted[VF * LARGEST_HEAD_DIM];
    const char *rows[VF];
    for (int64_t key = 0; key < keys->count; key += VF) {
        for (int i = 0; i < VF; i++) {
            rows[i] = key + i < keys->count ? keys->k + keys->offsets[key + i] : (const char *)zeros;
            if (converts && key + i < keys->count) {
                convert(words, cache, rows[i], count, converted + i * count);
                rows[i] = (const char *)(converted + i * count);
            }
        }
        for (int64_t word = 0; word < count; word += 4) {
            fetch_ahead(ahead);
            const int64_t at = word * (int64_t)sizeof *to;
            transpose(rows, at, words == QUADS ? 0x80808080 : 0, to + word * KEY_BLOCK + key);
        }
    }
}

void pack_keys(const struct shape *shape, const struct keys *keys, uint32_t *to, struct ahead *ahead) {
    const int64_t dim = shape->head_dim;
    if (HAS_QUADS && shape->words == QUADS) {
        pack_keys_of(QUADS, CACHE_INT8, keys, dim, to, ahead);
    } else if (HAS_PAIRS && shape->words == PAIRS) {
        if (shape->cache == CACHE_BF16) {
            pack_keys_of(PAIRS, CACHE_BF16, keys, dim, to, ahead);
        } else {
            pack_keys_of(PAIRS, CACHE_INT8, keys, dim, to, ahead);
        }
    } else if (shape->cache == CACHE_F32) {
        pack_keys_of(FLOATS, CACHE_F32, keys, dim, to, ahead);
    } else if (shape->cache == CACHE_BF16) {
        pack_keys_of(FLOATS, CACHE_BF16, keys, dim, to, ahead);
    } else {
        pack_keys_of(FLOATS, CACHE_INT8, keys, dim, to, ahead);
    }
}

/* ---- values ---- */

INLINE void pack_floats(enum cache cache, const struct keys *keys, int64_t dim, uint32_t *to, struct ahead *ahead) {
    const int64_t padded = padded_dim(dim);
    for (int64_t key = 0; key < keys->count; key++) {
        fetch_ahead(ahead);
        const char *head = keys->v + keys->offsets[key];
        for (int64_t i = 0; i < dim; i += VF) {
            store_words(to + key * padded + i, (vu)load_floats(cache, head, i, dim - i));
        }
    }
}

#if HAS_PAIRS
/* The lower or upper 16 elements of two vectors, interleaved. */
#define LOWER_HALVES(a, b) \
    SHUFFLE(v16, a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, \
        12, 44, 13, 45, 14, 46, 15, 47)
#define UPPER_HALVES(a, b) \
    SHUFFLE(v16, a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, \
        27, 59, 28, 60, 29, 61, 30, 62, 31, 63)

INLINE void pack_pairs(enum cache cache, const struct keys *keys, int64_t dim, uint32_t *to, struct ahead *ahead) {
    const int64_t padded = padded_dim(dim);
    for (int64_t key = 0; key < keys->count; key += 2, to += padded) {
        fetch_ahead(ahead);
        const char *head = keys->v + keys->offsets[key];
        const char *next = key + 1 < keys->count ? keys->v + keys->offsets[key + 1] : NULL;
        for (int64_t i = 0; i < dim; i += 2 * VF) {
            const int64_t words = (dim - i) / 2;
            const v16 a = (v16)load_row(PAIRS, cache, head, i / 2, words);
            const v16 b = next != NULL ? (v16)load_row(PAIRS, cache, next, i / 2, words) : (v16){0};
            store_words(to + i, (vu)LOWER_HALVES(a, b));
            if (words > VF / 2) {
                store_words(to + i + VF, (vu)UPPER_HALVES(a, b));
            }
        }
    }
}
#endif

#if HAS_QUADS
/* Up to 64 values of a head, its words in an order that interleaving within lanes of 128 bits puts right again. */
INLINE __m512i load_lanes(const char *head, int64_t count) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __mmask64 mask = count >= 64 ? ~0ull : (1ull << count) - 1;
    return _mm512_permutexvar_epi32(order, _mm512_maskz_loadu_epi8(mask, head));
}

INLINE void pack_quads(const struct keys *keys, int64_t dim, uint32_t *to, struct ahead *ahead) {
    const int64_t padded = padded_dim(dim);
    for (int64_t key = 0; key < keys->count; key += 4, to += padded) {
        fetch_ahead(ahead);
        for (int64_t i = 0; i < dim; i += 4 * VF) {
            __m512i x[4];
            for (int j = 0; j < 4; j++) {
                x[j] = _mm512_setzero_si512();
                if (key + j < keys->count) {
                    x[j] = load_lanes(keys->v + keys->offsets[key + j] + i, dim - i);
                }
            }
            const __m512i a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpacklo_epi8(x[2], x[3]);
            const __m512i c = _mm512_unpackhi_epi8(x[0], x[1]), d = _mm512_unpackhi_epi8(x[2], x[3]);
            const __m512i y[4] = {
                _mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b),
                _mm512_unpacklo_epi16(c, d), _mm512_unpackhi_epi16(c, d),
            };
            for (int j = 0; j < 4 && i + j * VF < padded; j++) {
                store_words(to + i + j * VF, (vu)y[j]);
            }
        }
    }
}
#endif

void pack_values(const struct shape *shape, const struct keys *keys, uint32_t *to, struct ahead *ahead) {
    const int64_t dim = shape->head_dim;
    switch (shape->words) {
#if HAS_QUADS
    case QUADS:
        pack_quads(keys, dim, to, ahead);
        break;
#endif
#if HAS_PAIRS
    case PAIRS:
        if (shape->cache == CACHE_BF16) {
            pack_pairs(CACHE_BF16, keys, dim, to, ahead);
        } else {
            pack_pairs(CACHE_INT8, keys, dim, to, ahead);
        }
        break;
#endif
    default:
        if (shape->cache == CACHE_F32) {
            pack_floats(CACHE_F32, keys, dim, to, ahead);
        } else if (shape->cache == CACHE_BF16) {
            pack_floats(CACHE_BF16, keys, dim, to, ahead);
        } else {
            pack_floats(CACHE_INT8, keys, dim, to, ahead);
        }
    }
}

int64_t packs(const struct shape *shape) {
    const int64_t items = word_items(shape->words);
    return KEY_BLOCK / VF * divide_up(shape->head_dim / items, 4) + KEY_BLOCK / items;
}
