/* Embedding rows, rotary angles, chosen rows, sums and activations. See elementwise.h. */
#include "elementwise.h"

#include <math.h>
#include <string.h>

#include "vector.h"

/* Elements that one thread takes at least: less is done before another core has fetched its part. */
#define BLOCK 2048

/* This thread's part of `elements` contiguous ones. */
INLINE void share_elements(const struct team *team, int64_t elements, int64_t *begin, int64_t *end) {
    team_share(team, (elements + BLOCK - 1) / BLOCK, begin, end);
    *begin *= BLOCK;
    *end = *end * BLOCK < elements ? *end * BLOCK : elements;
}

void embed(const struct embed *args, const struct step *step, struct team *team) {
    const int64_t *ids = args->from_positions ? step->positions : step->token_ids;
    const int64_t row_bytes = args->width * (args->dtype == F32 ? 4 : 2);
    int64_t begin, end;
    team_share(team, step->tokens, &begin, &end);
    for (int64_t token = begin; token < end; token++) {
        const int64_t row = held_row(ids[token], args->first, args->rows);
        char *y = (char *)args->y + token * row_bytes;
        if (row < 0) {
            memset(y, 0, (size_t)row_bytes);
        } else {
            memcpy(y, (const char *)args->table + row * row_bytes, (size_t)row_bytes);
        }
    }
}

void rotary_angles(const struct rotary_angles *args, const struct step *step, struct team *team) {
    const int64_t pairs = args->pairs;
    const float amplitude = (float)args->amplitude;
    int64_t begin, end;
    team_share(team, step->tokens, &begin, &end);
    for (int64_t token = begin; token < end; token++) {
        const float position = (float)step->positions[token];
        float *cosines = args->cos_sin + token * 2 * pairs, *sines = cosines + pairs;
        for (int64_t i = 0; i < pairs; i++) {
            const float angle = position * args->inverse_frequencies[i];
            cosines[i] = amplitude * cosf(angle);
            sines[i] = amplitude * sinf(angle);
        }
    }
}

void take_rows(const struct take_rows *args, const struct step *step, struct team *team) {
    int64_t begin, end;
    team_share(team, step->tokens, &begin, &end);
    for (int64_t token = begin; token < end; token++) {
        const int64_t row = step->rows == NULL ? token : step->rows[token];
        memcpy(
            (char *)args->y + token * args->row_bytes, (const char *)args->x + row * args->x_stride,
            (size_t)args->row_bytes);
    }
}

INLINE void add_as(const struct add *args, int64_t dtype, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += VF) {
        vf_put(args->y, dtype, i, end - i, vf_get(args->a, dtype, i, end - i) + vf_get(args->b, dtype, i, end - i));
    }
}

void add(const struct add *args, const struct step *step, struct team *team) {
    int64_t begin, end;
    share_elements(team, step->tokens * args->width, &begin, &end);
    if (args->dtype == F32) {
        add_as(args, F32, begin, end);
    } else {
        add_as(args, BF16, begin, end);
    }
}

INLINE void add_gated_row(const struct add_gated *args, int64_t dtype, int64_t token) {
    const vf share = vf_sigmoid(vf_set(args->gate[token]));
    const int64_t row = token * args->width;
    for (int64_t i = 0; i < args->width; i += VF) {
        const int64_t at = row + i, count = args->width - i;
        const vf a = vf_get(args->a, dtype, at, count), b = vf_get(args->b, dtype, at, count);
        vf_put(args->y, dtype, at, count, vf_fused(b, share, a));
    }
}

void add_gated(const struct add_gated *args, const struct step *step, struct team *team) {
    int64_t begin, end;
    team_share(team, step->tokens, &begin, &end);
    for (int64_t token = begin; token < end; token++) {
        if (args->dtype == F32) {
            add_gated_row(args, F32, token);
        } else {
            add_gated_row(args, BF16, token);
        }
    }
}

INLINE void activate_as(const struct activate *args, int64_t dtype, int64_t activation, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += VF) {
        vf_put(args->y, dtype, i, end - i, activation_of(activation, vf_get(args->x, dtype, i, end - i)));
    }
}

INLINE void activate_by(const struct activate *args, int64_t dtype, int64_t begin, int64_t end) {
    switch (args->activation) {
    case SILU:
        activate_as(args, dtype, SILU, begin, end);
        break;
    case GELU:
        activate_as(args, dtype, GELU, begin, end);
        break;
    case GELU_TANH:
        activate_as(args, dtype, GELU_TANH, begin, end);
        break;
    default:
        activate_as(args, dtype, RELU, begin, end);
    }
}

void activate(const struct activate *args, const struct step *step, struct team *team) {
    int64_t begin, end;
    share_elements(team, step->tokens * args->width, &begin, &end);
    if (args->dtype == F32) {
        activate_by(args, F32, begin, end);
    } else {
        activate_by(args, BF16, begin, end);
    }
}
