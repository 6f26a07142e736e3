/* Scores, softmax and weighted values of a block of keys. */
#include "attention_block.h"

enum { BLOCK_VECTORS = KEY_BLOCK / VF, MAXIMUM = 0, SUM = 1 };

/* Of a row that has seen no key yet, and of keys that it does not see: finite, since infinities have no difference.
 * Maxima count in powers of two. */
static const float no_score = -1e30f, hidden_score = -3e38f;

/* How far scores may rise above a row's maximum before its state is made relative to the larger one, which costs more
 * than the row itself where it is not foreseen: 2^8 more takes no digit from floats. Quads count weights in steps up to 1
 * and so bear nothing. */
static const float tolerated = 8.0f;

/* 2^r for r up to 1/2 to both sides: a minimax polynomial with a relative error below 3e-7 if `precise`, else 3e-6, which
 * words of fewer than 24 bits round away. */
INLINE vf power_of_fraction(bool precise, vf r) {
    if (precise) {
        vf p = vf_fma(r, vf_set(0.00132647273f), vf_set(0.00967151299f));
        p = vf_fma(r, p, vf_set(0.0555073359f));
        p = vf_fma(r, p, vf_set(0.240222424f));
        p = vf_fma(r, p, vf_set(0.693147004f));
        return vf_fma(r, p, vf_set(1.0f));
    }
    vf p = vf_fma(r, vf_set(0.0095701f), vf_set(0.05591786f));
    p = vf_fma(r, p, vf_set(0.24024745f));
    p = vf_fma(r, p, vf_set(0.69312181f));
    return vf_fma(r, p, vf_set(0.99999926f));
}

/* 2^x for x up to 127; far below the range of floats it is 0 or 2^-126, and NaN stays NaN. The exponent is x to the
 * nearest whole number; `precise` is about what is left. */
INLINE vf power_of_two(bool precise, vf x) {
#ifdef VECTOR_AVX512
    const vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (vf)_mm512_scalef_ps((__m512)power_of_fraction(precise, x - n), (__m512)n);
#else
    const float shift = 0x1.8p23f + 127, smallest = -126.0f;    /* adding it leaves 127 + n in the lowest bits */
    x = vf_max(vf_set(smallest), x);
    const vf shifted = x + shift;
    return power_of_fraction(precise, x - (shifted - shift)) * (vf)((vi)shifted << 23);
#endif
}

void begin_states(const struct shape *shape, float *states, float *sums) {
    const int64_t padded = padded_dim(shape->head_dim), stride = state_stride(shape->head_dim);
    for (int64_t row = 0; row < shape->rows; row++) {
        memset(states + row * stride, 0, (size_t)padded * sizeof *states);
        states[row * stride + padded + MAXIMUM] = no_score;
    }
    memset(sums, 0, (size_t)(shape->rows * VF) * sizeof *sums);
}

void end_states(const struct shape *shape, float *states, const float *sums) {
    const int64_t padded = padded_dim(shape->head_dim), stride = state_stride(shape->head_dim);
    for (int64_t row = 0; row < shape->rows; row++) {
        states[row * stride + padded + SUM] = vf_sum(vf_load(sums + row * VF));
    }
}

void merge_state(float *state, const float *other, int64_t head_dim) {
    const int64_t padded = padded_dim(head_dim);
    float *own = state + padded;
    const float *theirs = other + padded;
    const float largest = own[MAXIMUM] > theirs[MAXIMUM] ? own[MAXIMUM] : theirs[MAXIMUM];
    const vf weight = power_of_two(true, vf_set(own[MAXIMUM] - largest));
    const vf other_weight = power_of_two(true, vf_set(theirs[MAXIMUM] - largest));
    for (int64_t i = 0; i < padded; i += VF) {
        vf_store(state + i, vf_load(state + i) * weight + vf_load(other + i) * other_weight);
    }
    own[SUM] = own[SUM] * weight[0] + theirs[SUM] * other_weight[0];
    own[MAXIMUM] = largest;
}

void state_result(const float *state, int64_t head_dim, int64_t dtype, void *y, int64_t at) {
    const float factor = 1.0f / state[padded_dim(head_dim) + SUM];
    for (int64_t i = 0; i < head_dim; i += VF) {
        const vf value = vf_load(state + i) * factor;
        if (dtype == F32) {
            vf_put(y, F32, at + i, head_dim - i, value);
        } else {
            vf_put(y, BF16, at + i, head_dim - i, value);
        }
    }
}

/* The number of each lane. */
INLINE vi lanes(void) {
#if VF == 16
    return (vi){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
    return (vi){0, 1, 2, 3, 4, 5, 6, 7};
#endif
}

/* The keys of a block that one query sees: [from, to). */
struct span {
    int64_t from, to;
};

INLINE struct span visible(const struct shape *shape, const struct keys *keys, int64_t query) {
    const int64_t own = shape->position + query - keys->first;
    return (struct span){
        .from = shape->window > 0 ? at_least(0, own - shape->window + 1) : 0,
        .to = at_most(keys->count, own + 1),
    };
}

/* The scales of a block's keys or values, 0 past its end. */
INLINE void gather_scales(const struct keys *keys, const float *const from[], float *to) {
    for (int64_t i = 0; i < keys->count; i += GROUP) {
        memcpy(to + i, from[i / GROUP], GROUP * sizeof *to);
    }
    memset(to + keys->count, 0, (size_t)(KEY_BLOCK - keys->count) * sizeof *to);
}

/* NaN if one of them is not finite. */
INLINE float largest_scale(const float *scales) {
    vf largest = {0}, poison = {0};
    for (int v = 0; v < BLOCK_VECTORS; v++) {
        const vf x = vf_load(scales + v * VF);
        largest = vf_max(largest, x);
        poison += x * 0.0f;
    }
    return vf_largest(largest) + vf_sum(poison);
}

/* What turns the rows of a block's first product into those of its second. */
struct softening {
    const struct shape *shape;
    int64_t rows;
    float scale;                    /* of scores, as powers of two */
    const float *query_scales;      /* of quads, as in struct queries */
    const int32_t *query_biases;
    const float *k_scales;          /* [KEY_BLOCK]; NULL unless CACHE_INT8 */
    const float *v_scales;
    const float *scores;
    uint32_t *weights;
    int64_t block_words;            /* of a row of weights */
    int64_t padded;
    float steps;                    /* of quads: of a weight of 1 that has a scale of 1 */
};

/* The scores of one row; returns the factor that makes powers of two of them. */
INLINE float load_scores(enum words words, const struct softening *softening, int64_t row, vf *x) {
    const float *scores = softening->scores + row * KEY_BLOCK, *lower_scores = scores + softening->rows * KEY_BLOCK;
    const bool scaled = softening->k_scales != NULL;
    const float scale = words == QUADS ? softening->scale * softening->query_scales[row] : softening->scale;
    for (int v = 0; v < BLOCK_VECTORS; v++) {
        x[v] = vf_load(scores + v * VF);
        if (words == QUADS) {
            const vi sum = ((vi)x[v] << LOW_BITS) + (vi)vf_load(lower_scores + v * VF) - softening->query_biases[row];
            x[v] = __builtin_convertvector(sum, vf);
        }
        if (scaled) {
            x[v] *= vf_load(softening->k_scales + v * VF) * scale;
        }
    }
    return scaled ? 1.0f : scale;
}

/* Puts `hidden` in place of keys outside of the span. */
INLINE void hide(struct span span, float hidden, vf *x) {
    for (int v = 0; v < BLOCK_VECTORS; v++) {
        const vi lane = lanes() + v * VF;
        x[v] = vf_select((lane >= (int32_t)span.from) & (lane < (int32_t)span.to), x[v], vf_set(hidden));
    }
}

/* Vector `v` of a row of weights, in words. */
INLINE void store_weights(enum words words, const struct softening *softening, int64_t row, int v, vf weights) {
    uint32_t *to = softening->weights + row * softening->block_words;
    if (softening->v_scales != NULL) {
        weights *= vf_load(softening->v_scales + v * VF);
    }
    if (words == FLOATS) {
        vf_store((float *)to + v * VF, weights);
    } else if (words == PAIRS) {
        vf_store_bf16((bf16 *)to + v * VF, weights);
    } else {
#if HAS_QUADS
        const __m512i steps = _mm512_cvtps_epi32((__m512)(weights * softening->steps));
        uint32_t *lower = to + softening->rows * softening->block_words;
        const __m512i low = _mm512_and_si512(steps, _mm512_set1_epi32((1 << LOW_BITS) - 1));
        const __m512i high = _mm512_srli_epi32(steps, LOW_BITS);
        _mm_storeu_si128((__m128i *)(void *)(to + v * VF / 4), _mm512_cvtepi32_epi8(high));
        _mm_storeu_si128((__m128i *)(void *)(lower + v * VF / 4), _mm512_cvtepi32_epi8(low));
#endif
    }
}

INLINE float largest_of(const vf *x) {
    vf largest = x[0];
    for (int v = 1; v < BLOCK_VECTORS; v++) {
        largest = vf_max(largest, x[v]);
    }
    return vf_largest(largest);
}

/* A row's state for a new largest score. */
INLINE void rescale(float *state, int64_t padded, float *sums, float largest) {
    const vf weight = power_of_two(true, vf_set(state[padded + MAXIMUM] - largest));
    for (int64_t i = 0; i < padded; i += VF) {
        vf_store(state + i, vf_load(state + i) * weight);
    }
    vf_store(sums, vf_load(sums) * weight);
    state[padded + MAXIMUM] = largest;
}

/* One row: its scores become weights relative to the largest score so far, and its state follows. */
INLINE void soften_row(
    enum words words, const struct softening *softening, int64_t row, struct span span, float *state, float *sums) {
    const int64_t padded = softening->padded;
    const bool partial = span.from > 0 || span.to < KEY_BLOCK;
    vf x[BLOCK_VECTORS];
    const float factor = load_scores(words, softening, row, x);
    if (partial) {
        hide(span, hidden_score, x);
    }
    const float largest = largest_of(x) * factor;
    if (largest > state[padded + MAXIMUM] + (words == QUADS ? 0.0f : tolerated)) {
        rescale(state, padded, sums, largest);
    }
    const vf maximum = vf_set(-state[padded + MAXIMUM]);
    for (int v = 0; v < BLOCK_VECTORS; v++) {
        x[v] = power_of_two(words == FLOATS, vf_fma(x[v], vf_set(factor), maximum));
    }
    if (partial) {
        hide(span, 0.0f, x);
    }
    vf sum = vf_load(sums);
    for (int v = 0; v < BLOCK_VECTORS; v++) {
        sum += x[v];
        store_weights(words, softening, row, v, x[v]);
    }
    vf_store(sums, sum);
}

/* `softening` is copied, so that the compiler knows that no store of a weight changes it. */
INLINE void soften_rows(
    enum words words, struct softening softening, const struct keys *keys, float *states, float *sums) {
    const struct shape *shape = softening.shape;
    const int64_t stride = state_stride(shape->head_dim);
    for (int64_t row = 0, query = 0; row < shape->rows; query++) {
        const struct span span = visible(shape, keys, query);
        for (const int64_t end = row + shape->group; row < end; row++) {
            soften_row(words, &softening, row, span, states + row * stride, sums + row * VF);
        }
    }
}

static void soften(const struct softening *softening, const struct keys *keys, float *states, float *sums) {
    if (HAS_QUADS && softening->shape->words == QUADS) {
        soften_rows(QUADS, *softening, keys, states, sums);
    } else if (HAS_PAIRS && softening->shape->words == PAIRS) {
        soften_rows(PAIRS, *softening, keys, states, sums);
    } else {
        soften_rows(FLOATS, *softening, keys, states, sums);
    }
}

/* Adds the products of weights in steps, two rows of bytes each, to the states. */
static void add_values(const struct shape *shape, const float *values, float factor, float *states) {
    const int64_t rows = shape->rows, padded = padded_dim(shape->head_dim), stride = state_stride(shape->head_dim);
    for (int64_t row = 0; row < rows; row++) {
        const float *upper = values + row * padded, *lower = upper + rows * padded;
        for (int64_t i = 0; i < padded; i += VF) {
            const vi sum = ((vi)vf_load(upper + i) << LOW_BITS) + (vi)vf_load(lower + i);
            float *state = states + row * stride + i;
            vf_store(state, vf_load(state) + __builtin_convertvector(sum, vf) * factor);
        }
    }
}

void attend_block(
    const struct shape *shape, const struct keys *keys, const struct queries *queries,
    const struct block_buffers *buffers, float *states, float *sums, struct ahead *ahead) {
    const int64_t items = word_items(shape->words), rows = shape->rows * word_rows(shape->words);
    const int64_t words = shape->head_dim / items, padded = padded_dim(shape->head_dim);
    const bool quads = shape->words == QUADS, pairs = shape->words == PAIRS;
    float k_scales[KEY_BLOCK], v_scales[KEY_BLOCK], largest = 0.0f;
    struct softening softening = {
        .shape = shape,
        .rows = shape->rows,
        .scale = shape->scale * 1.44269504f,            /* log2 e */
        .query_scales = queries->scales,
        .query_biases = queries->biases,
        .scores = buffers->scores,
        .weights = buffers->weights,
        .block_words = KEY_BLOCK / items,
        .padded = padded,
    };
    if (shape->cache == CACHE_INT8) {
        gather_scales(keys, keys->k_scales, k_scales);
        gather_scales(keys, keys->v_scales, v_scales);
        largest = largest_scale(v_scales);
        softening.k_scales = k_scales;
        softening.v_scales = v_scales;
        softening.steps = largest > 0.0f ? WEIGHT_STEPS / largest : 0.0f;
    }
    struct panel panel;
    key_panel(shape, keys, buffers->k, &panel);
    multiply(quads ? SIGNED_UNSIGNED : pairs ? PAIR_PAIR : FLOAT_FLOAT, &(struct product){
        .rows = rows, .columns = KEY_BLOCK, .depth = words,
        .a = queries->words, .a_stride = words, .b = &panel,
        .c = buffers->scores, .c_stride = KEY_BLOCK,
    }, ahead);
    soften(&softening, keys, states, sums);
    value_panel(shape, keys, buffers->v, &panel);
    multiply(quads ? UNSIGNED_SIGNED : pairs ? PAIR_PAIR : FLOAT_FLOAT, &(struct product){
        .rows = rows, .columns = padded, .depth = divide_up(keys->count, items),
        .a = buffers->weights, .a_stride = KEY_BLOCK / items, .b = &panel,
        .c = quads ? buffers->values : states, .c_stride = quads ? padded : state_stride(shape->head_dim),
        .add = !quads,
    }, ahead);
    /* A block of few keys and rows is done before all was asked for. */
    while (ahead->run.step != 0) {
        fetch_ahead(&ahead->run, ahead);
    }
    if (quads) {
        add_values(shape, buffers->values, largest / WEIGHT_STEPS, states);
    }
}
