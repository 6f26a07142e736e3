/* Rows of packed weights, as embeddings. */
#include "linear_tile.h"

enum { RUN = 4 * INT4_STEP };       /* channels of int4 at a time; every group has some such runs */

/* Where column `row` of a weight without a gate begins. */
static const char *column_of(const void *weight, int64_t row, int64_t panel_bytes) {
    return (const char *)weight + row / PANEL * panel_bytes + row % PANEL * 4;
}

static void put_zeros(void *y, int64_t y_dtype, int64_t width, int64_t token) {
    const int64_t row_bytes = width * (y_dtype == F32 ? 4 : 2);
    memset((char *)y + token * row_bytes, 0, (size_t)row_bytes);
}

/* ---- dense ---- */

INLINE void dense_row(const struct embed_dense *args, int64_t dtype, int64_t y_dtype, int64_t row, int64_t token) {
    const int64_t width = dtype == F32 ? 4 : 2, channels = 4 / width;
    const char *column = column_of(args->weight, row, (args->in * width + 3) / 4 * STEP_BYTES);
    for (int64_t i = 0; i < args->in; i += VF) {
        const int64_t count = args->in - i < VF ? args->in - i : VF;
        char values[4 * VF] = {0};
        for (int64_t step = 0; step * channels < count; step++) {
            memcpy(values + 4 * step, column + (i / channels + step) * STEP_BYTES, 4);
        }
        vf_put(args->y, y_dtype, token * args->in + i, count, vf_get(values, dtype, 0, VF));
    }
}

void embed_dense(const struct embed_dense *args, const struct step *step, struct team *team) {
    int64_t begin, end;
    team_share(team, step->tokens, &begin, &end);
    for (int64_t token = begin; token < end; token++) {
        const int64_t row = held_row(step->token_ids[token], args->first, args->rows);
        if (row < 0) {
            put_zeros(args->y, args->y_dtype, args->in, token);
        } else if (args->dtype == F32) {
            args->y_dtype == F32 ? dense_row(args, F32, F32, row, token) : dense_row(args, F32, BF16, row, token);
        } else {
            args->y_dtype == F32 ? dense_row(args, BF16, F32, row, token) : dense_row(args, BF16, BF16, row, token);
        }
    }
}

/* ---- quantized ---- */

static void put_value(void *y, int64_t y_dtype, int64_t at, float value) {
    if (y_dtype == F32) {
        vf_put(y, F32, at, 1, vf_set(value));
    } else {
        vf_put(y, BF16, at, 1, vf_set(value));
    }
}

void embed_int8(const struct embed_int8 *args, const struct step *step, struct team *team) {
    int64_t begin, end;
    team_share(team, step->tokens, &begin, &end);
    for (int64_t token = begin; token < end; token++) {
        const int64_t row = held_row(step->token_ids[token], args->first, args->rows);
        if (row < 0) {
            put_zeros(args->y, args->y_dtype, args->in, token);
            continue;
        }
        const char *column = column_of(args->weight, row, (args->in + 3) / 4 * STEP_BYTES);
        for (int64_t i = 0; i < args->in; i++) {
            const int8_t value = (int8_t)column[i / 4 * STEP_BYTES + i % 4];
            put_value(args->y, args->y_dtype, token * args->in + i, (float)value * args->scales[row]);
        }
    }
}

/* A run's values of one column, whose steps lie `stride` bytes apart. */
INLINE void dequantize_run(const char *steps, int64_t stride, int32_t shift, float scale, float *values) {
    for (int64_t step = 0; step < RUN / INT4_STEP; step++) {
        uint32_t halves;
        memcpy(&halves, steps + step * stride, sizeof halves);
#pragma GCC unroll 8
        for (int64_t channel = 0; channel < INT4_STEP; channel++) {
            const int32_t value = (int32_t)(halves >> (channel % 2 * 16 + channel / 2 * 4) & 15) - 8 + shift;
            values[step * INT4_STEP + channel] = (float)value * scale;
        }
    }
}

static void put_run(const struct embed_int4 *args, int64_t token, int64_t first, const float *values) {
    const int64_t row = token * args->in;
    if (args->order == NULL) {
        for (int64_t i = 0; i < RUN; i += VF) {
            vf_put(args->y, args->y_dtype, row + first + i, VF, vf_load(values + i));
        }
        return;
    }
    for (int64_t i = 0; i < RUN; i++) {
        put_value(args->y, args->y_dtype, row + args->order[first + i], values[i]);
    }
}

static void int4_row(const struct embed_int4 *args, int64_t row, int64_t token) {
    const int64_t groups = args->in / args->group, zeros = args->zeros, column = row % PANEL;
    const char *panel = (const char *)args->weight + row / PANEL * int4_panel_bytes(args->group, groups, zeros);
    for (int64_t group = 0; group < groups; group++) {
        const int64_t index = group % INT4_BUNDLE, first = group - index, place = index * PANEL + column;
        const int64_t count = groups - first < INT4_BUNDLE ? groups - first : INT4_BUNDLE;
        const char *bundle = panel + first / INT4_BUNDLE * int4_bundle_bytes(args->group, INT4_BUNDLE, zeros);
        const char *steps = bundle + int4_header_bytes(count, zeros) + 4 * place;
        const int32_t shift = zeros ? (int8_t)bundle[2 * PANEL * count + place] : 0;
        vh scale = {0};
        memcpy(&scale, bundle + 2 * place, sizeof scale[0]);
        for (int64_t i = 0; i < args->group; i += RUN) {
            float values[RUN];
            const char *at = steps + i / INT4_STEP * count * STEP_BYTES;
            dequantize_run(at, count * STEP_BYTES, shift, vf_from_f16(scale)[0], values);
            put_run(args, token, group * args->group + i, values);
        }
    }
}

void embed_int4(const struct embed_int4 *args, const struct step *step, struct team *team) {
    int64_t begin, end;
    team_share(team, step->tokens, &begin, &end);
    for (int64_t token = begin; token < end; token++) {
        const int64_t row = held_row(step->token_ids[token], args->first, args->rows);
        if (row < 0) {
            put_zeros(args->y, args->y_dtype, args->in, token);
        } else {
            int4_row(args, row, token);
        }
    }
}
