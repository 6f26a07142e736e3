/* Products with dense weights, bfloat16 or float32. */
#include "linear_block.h"

INLINE vf add_f32(vf sums, vu x, vu columns) {
    return vf_fused((vf)x, (vf)columns, sums);
}

/* The lower half of the 4 bytes is the earlier channel. */
INLINE vf add_bf16(vf sums, vu x, vu columns) {
#ifdef __AVX512BF16__
    return (vf)_mm512_dpbf16_ps((__m512)sums, (__m512bh)x, (__m512bh)columns);
#else
    const uint32_t later = 0xffff0000;
    return vf_fused((vf)(x & later), (vf)(columns & later), vf_fused((vf)(x << 16), (vf)(columns << 16), sums));
#endif
}

static void multiply_f32(const struct block *block) {
    multiply_block(add_f32, 0, block);
}

static void multiply_bf16(const struct block *block) {
    multiply_block(add_bf16, 1, block);
}

void linear_dense(const struct linear_dense *args, const struct step *step, struct team *team) {
    const int64_t width = args->dtype == F32 ? 4 : 2, row_bytes = args->in * width;
    const int64_t all[] = {0, step->tokens};
    const struct product product = {
        .multiply = args->dtype == F32 ? multiply_f32 : multiply_bf16,
        .block_rows = BLOCK_ROWS,
        .far_rows = FAR_ROWS,
        .x = args->x,
        .x_stride = args->x_stride * width,
        .x_unit_bytes = 4,
        .weights = args->weights,
        .offsets = args->offsets == NULL ? all : args->offsets,
        .weight = args->weight,
        .units = row_bytes / 4,
        .unit_bytes = STEP_BYTES,
        .tail_bytes = row_bytes % 4,
        .panel_bytes = (row_bytes + 3) / 4 * STEP_BYTES,
        .bias = args->bias,
        .out = args->out,
        .gate = args->gate,
        .y = args->y,
        .y_dtype = args->y_dtype,
    };
    run_product(&product, team);
}
