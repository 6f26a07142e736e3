/* Products with int8 weights, and the quantization of rows of x that they need.
 *
 * The machine multiplies unsigned by signed bytes, so x + 128 is what is stored, and 128 times the column's sum is
 * taken off in the end. A sum may wrap on the way; the result, below 127 * 127 * 2^17 < 2^31, is exact all the same.
 */
#include "bytes.h"
#include "linear_block.h"
#include "team.h"

enum {
    ZERO = 128,                     /* the byte of 0 */
    ROW_ALIGNMENT = 64,             /* bytes of quantized rows */
    OWN_BYTES = 8192,               /* to quantize no more takes a thread less than to wait for the others */
    OWN_ROWS = 64
};

INLINE vf add_int8(vf sums, vu x, vu columns) {
    return (vf)add_bytes((vi)sums, x, columns);
}

static void multiply_int8(const struct block *block) {
    multiply_block(add_int8, 0, block);
}

/* ---- sums of columns, for packing ---- */

struct summing {
    const char *packed;
    int64_t panels;
    int64_t units;
    int32_t *sums;
};

static void sum_share(void *data, struct team *team) {
    const struct summing *summing = data;
    const vu ones = 0x01010101 - (vu){0};
    int64_t begin, end;
    team_share(team, summing->panels, &begin, &end);
    for (int64_t panel = begin; panel < end; panel++) {
        const char *weight = summing->packed + panel * summing->units * STEP_BYTES;
        vf sums[PANEL_VECTORS] = {0};
        for (int64_t unit = 0; unit < summing->units; unit++) {
#pragma GCC unroll 4
            for (int64_t j = 0; j < PANEL_VECTORS; j++) {
                const vu columns = (vu)vf_load((const float *)(weight + unit * STEP_BYTES) + VF * j);
                sums[j] = add_int8(sums[j], ones, columns);
            }
        }
        memcpy(summing->sums + panel * PANEL, sums, sizeof sums);
    }
}

/* The sum of the int8 of every column of `panels` packed panels of `in` channels. */
void sum_int8_columns(const char *packed, int64_t in, int64_t panels, int64_t threads, int32_t *sums) {
    struct summing summing = {packed, panels, (in + 3) / 4, sums};
    run_team(sum_share, &summing, threads);
}

/* ---- the product ---- */

static void scale_int8(const struct product *product, int64_t panel, int64_t row, int64_t rows, float *sums) {
    const struct linear_int8 *args = product->args;
    for (int64_t column = 0; column < PANEL; column += VF) {
        const vf scales = vf_load(args->scales + panel * PANEL + column);
        const vu excess = (vu)vf_load((const float *)args->column_sums + panel * PANEL + column) * ZERO;
        for (int64_t i = 0; i < rows; i++) {
            float *at = sums + i * PANEL + column;
            const vi exact = (vi)((vu)vf_load(at) - excess);
            vf_store(at, __builtin_convertvector(exact, vf) * (scales * product->x_scales[row + i]));
        }
    }
}

/* ---- rows of x ---- */

/* Rows [begin, end) of x into `values`, rows `stride` bytes apart, and `scales`. */
INLINE void quantize(
    const struct linear_int8 *args, int64_t dtype, int64_t begin, int64_t end, uint8_t *values, int64_t stride,
    float *scales) {
    for (int64_t row = begin; row < end; row++) {
        const int64_t first = row * args->x_stride;
        const float largest = largest_magnitude(args->x, dtype, first, args->in);
        const float inverse = largest > 0 ? 127 / largest : 0;
        scales[row] = largest / 127;
        for (int64_t i = 0; i < args->in; i += VF) {
            const vf x = vf_get(args->x, dtype, first + i, args->in - i);
            const vf shifted = vf_fused(x, vf_set(inverse), vf_set(rounding_shift));
            const vb bytes = __builtin_convertvector((vu)shifted + ZERO, vb);
            memcpy(values + row * stride + i, &bytes, sizeof bytes);
        }
    }
}

static void quantize_rows(
    const struct linear_int8 *args, int64_t begin, int64_t end, uint8_t *values, int64_t stride, float *scales) {
    if (args->dtype == F32) {
        quantize(args, F32, begin, end, values, stride, scales);
    } else {
        quantize(args, BF16, begin, end, values, stride, scales);
    }
}

void linear_int8(const struct linear_int8 *args, const struct step *step, struct team *team) {
    const int64_t all[] = {0, step->tokens}, *offsets = args->offsets == NULL ? all : args->offsets;
    const int64_t rows = offsets[args->weights];
    const int64_t stride = (args->in + ROW_ALIGNMENT - 1) / ROW_ALIGNMENT * ROW_ALIGNMENT;
    uint8_t own_values[OWN_BYTES] __attribute__((aligned(64)));
    float own_scales[OWN_ROWS];
    uint8_t *values = args->x_values;
    float *scales = args->x_scales;
    if (rows * stride <= OWN_BYTES && rows <= OWN_ROWS) {
        values = own_values;
        scales = own_scales;
        quantize_rows(args, 0, rows, values, stride, scales);
    } else {
        int64_t begin, end;
        team_share(team, rows, &begin, &end);
        quantize_rows(args, begin, end, values, stride, scales);
        team_wait();
    }
    const struct product product = {
        .multiply = multiply_int8,
        .scale = scale_int8,
        .args = args,
        .block_rows = BLOCK_ROWS,
        .far_rows = FAR_ROWS,
        .x = (const char *)values,
        .x_stride = stride,
        .x_unit_bytes = 4,
        .x_scales = scales,
        .weights = args->weights,
        .offsets = offsets,
        .weight = args->weight,
        .units = (args->in + 3) / 4,
        .unit_bytes = STEP_BYTES,
        .panel_bytes = (args->in + 3) / 4 * STEP_BYTES,
        .bias = args->bias,
        .out = args->out,
        .gate = args->gate,
        .y = args->y,
        .y_dtype = args->y_dtype,
    };
    run_product(&product, team);
}
