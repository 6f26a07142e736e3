/* Products with int4 weights, and what rows of x need before them. */
#include "linear_int4_block.h"

enum {
    EXACT_ROWS = 2,                 /* for float32 x, which is there for comparisons rather than for speed */
    OWN_SUMS = 256,                 /* as many a thread computes sooner than it waits for the others */
    OWN_BYTES = 8192                /* likewise, to quantize */
};

static void multiply_bf16(const struct block *block) {
    multiply_int4(BF16, block);
}

static void multiply_f32(const struct block *block) {
    if (block->rows == 1) {
        multiply_rows(F32, 1, 1, block);
    } else {
        multiply_rows(F32, EXACT_ROWS, 1, block);
    }
}

/* Sums of x over each group, for rows [begin, end). */
static void sum_groups(const struct linear_int4 *args, int64_t begin, int64_t end, float *sums) {
    const int64_t groups = args->in / args->group;
    for (int64_t row = begin; row < end; row++) {
        for (int64_t group = 0; group < groups; group++) {
            vf sum = {0};
            for (int64_t i = 0; i < args->group; i += VF) {
                const int64_t at = row * args->x_stride + group * args->group + i;
                sum += args->dtype == F32 ? vf_get(args->x, F32, at, VF) : vf_get(args->x, BF16, at, VF);
            }
            sums[row * groups + group] = vf_sum(sum);
        }
    }
}

/* x as it is. `own_sums` has room for OWN_SUMS. */
static void take_floats(
    const struct linear_int4 *args, int64_t rows, float *own_sums, struct product *product, struct team *team) {
    const int64_t width = args->dtype == F32 ? 4 : 2, groups = args->in / args->group;
    product->multiply = args->dtype == F32 ? multiply_f32 : multiply_bf16;
    product->block_rows = args->dtype == F32 ? EXACT_ROWS : BLOCK_ROWS;
    product->x = args->x;
    product->x_stride = args->x_stride * width;
    product->x_unit_bytes = INT4_BUNDLE * args->group * width;
    product->x_sums_stride = groups;
    product->x_unit_sums = INT4_BUNDLE;
    if (args->zeros && rows * groups <= OWN_SUMS) {
        sum_groups(args, 0, rows, own_sums);
        product->x_sums = own_sums;
    } else if (args->zeros) {
        int64_t begin, end;
        team_share(team, rows, &begin, &end);
        sum_groups(args, begin, end, args->x_sums);
        team_wait();
        product->x_sums = args->x_sums;
    }
}

/* x as int8. `own_values` has room for OWN_BYTES, `own_groups` for OWN_SUMS. */
static void take_bytes(
    const struct linear_int4 *args, int64_t rows, int8_t *own_values, struct int8_group *own_groups,
    struct product *product, struct team *team) {
    const int64_t groups = args->in / args->group;
    int8_t *values = args->x_values;
    struct int8_group *x_groups = (struct int8_group *)args->x_sums;
    if (rows * args->in <= OWN_BYTES && rows * groups <= OWN_SUMS) {
        values = own_values;
        x_groups = own_groups;
        quantize_groups(args, 0, rows, values, x_groups);
    } else {
        int64_t begin, end;
        team_share(team, rows, &begin, &end);
        quantize_groups(args, begin, end, values, x_groups);
        team_wait();
    }
    product->multiply = multiply_int4_int8;
    product->block_rows = BLOCK_ROWS;
    product->far_rows = BLOCK_ROWS;
    product->x = (const char *)values;
    product->x_stride = args->in;
    product->x_unit_bytes = INT4_BUNDLE * args->group;
    product->x_sums = (const float *)x_groups;
    product->x_sums_stride = 2 * groups;
    product->x_unit_sums = 2 * INT4_BUNDLE;
}

void linear_int4(const struct linear_int4 *args, const struct step *step, struct team *team) {
    const int64_t all[] = {0, step->tokens}, *offsets = args->offsets == NULL ? all : args->offsets;
    const int64_t rows = offsets[args->weights], groups = args->in / args->group;
    const struct int4_groups layout = {args->group, args->zeros};
    int8_t own_values[OWN_BYTES] __attribute__((aligned(CACHE_LINE)));
    struct int8_group own_groups[OWN_SUMS];
    float own_sums[OWN_SUMS];
    struct product product = {
        .args = &layout,
        .weights = args->weights,
        .offsets = offsets,
        .weight = args->weight,
        .units = groups / INT4_BUNDLE,
        .unit_bytes = int4_bundle_bytes(args->group, INT4_BUNDLE, args->zeros),
        .panel_bytes = int4_panel_bytes(args->group, groups, args->zeros),
        .bias = args->bias,
        .out = args->out,
        .gate = args->gate,
        .y = args->y,
        .y_dtype = args->y_dtype,
    };
    if (args->x_values == NULL) {
        take_floats(args, rows, own_sums, &product, team);
    } else {
        take_bytes(args, rows, own_values, own_groups, &product, team);
    }
    product.tail_bytes = groups % INT4_BUNDLE * (product.x_unit_bytes / INT4_BUNDLE);
    run_product(&product, team);
}

INLINE void gather_row(const struct gather_columns *args, int64_t width, int64_t row) {
    const char *x = (const char *)args->x + row * args->x_stride * width;
    char *y = (char *)args->y + row * args->in * width;
    for (int64_t i = 0; i < args->in; i++) {
        memcpy(y + i * width, x + args->order[i] * width, (size_t)width);
    }
}

void gather_columns(const struct gather_columns *args, const struct step *step, struct team *team) {
    int64_t begin, end;
    team_share(team, step->tokens, &begin, &end);
    for (int64_t row = begin; row < end; row++) {
        if (args->dtype == F32) {
            gather_row(args, 4, row);
        } else {
            gather_row(args, 2, row);
        }
    }
}
