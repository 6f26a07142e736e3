/* Products with int4 weights: values are expanded in registers, summed group by group, and scaled once a group.
 *
 * What meets x is value - 8, exact in bfloat16. With zero points, (8 - zero) times the group's sum of x is added.
 */
#include "linear_tile.h"

enum {
#if defined(VECTOR_AVX512) && defined(__AVX512BF16__)
    BLOCK_ROWS = 12,                /* 12 x 2 sums of 32 registers */
#elif defined(VECTOR_AVX512)
    BLOCK_ROWS = 6,
#else
    BLOCK_ROWS = 3,                 /* 3 x 4 of 16 */
#endif
    EXACT_ROWS = 2,                 /* for float32 x, which is there for comparisons rather than for speed */
    ROW_GROUPS = 4,
    REGISTER_ROWS = 2,
    MAX_SPAN = INT4_BUNDLE,         /* groups at once */
    PAIRS = INT4_STEP / 2,          /* of channels, in a step */
    OWN_SUMS = 256                  /* as many a thread computes sooner than it waits for the others */
};

/* -8 to -1 and 0 to 7 in bfloat16. */
#define NEGATIVE 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80
#define POSITIVE 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0

/* Of one row, in a panel's sums. */
typedef vf vf_sums __attribute__((may_alias));

/* Two consecutive channels of VF columns. */
struct pair {
#if defined(VECTOR_AVX512) && defined(__AVX512BF16__)
    __m512bh both;
#endif
    vf even;
    vf odd;
};

/* The lowest int4 of both halves of each lane, less 8. `dtype`, of x, is a constant. */
INLINE struct pair expand(int64_t dtype, vu halves) {
    struct pair pair;
#if defined(VECTOR_AVX512) && defined(__AVX512BF16__)
    if (dtype == BF16) {
        /* Of each index vpermw reads five bits; the fifth belongs to the next channel, so all is there twice. */
        static const bf16 table[32] __attribute__((aligned(64))) = {NEGATIVE, POSITIVE, NEGATIVE, POSITIVE};
        pair.both = (__m512bh)_mm512_permutexvar_epi16((__m512i)halves, _mm512_load_si512(table));
        return pair;
    }
#endif
    (void)dtype;
    pair.even = __builtin_convertvector((vi)(halves & 15) - 8, vf);
    pair.odd = __builtin_convertvector((vi)(halves >> 16 & 15) - 8, vf);
    return pair;
}

INLINE float channel(int64_t dtype, const char *x, int64_t index) {
    float value = 0;
    if (dtype == F32) {
        memcpy(&value, x + 4 * index, sizeof value);
        return value;
    }
    bf16 half;
    memcpy(&half, x + 2 * index, sizeof half);
    const uint32_t bits = (uint32_t)half << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE vf add_pair(int64_t dtype, vf sums, const char *x, struct pair pair) {
#if defined(VECTOR_AVX512) && defined(__AVX512BF16__)
    if (dtype == BF16) {
        uint32_t value;
        memcpy(&value, x, sizeof value);
        return (vf)_mm512_dpbf16_ps((__m512)sums, (__m512bh)(value - (vu){0}), pair.both);
    }
#endif
    return vf_fused(vf_set(channel(dtype, x, 1)), pair.odd, vf_fused(vf_set(channel(dtype, x, 0)), pair.even, sums));
}

/* A block of rows at one bundle of a panel. */
struct walk {
    const struct block *block;
    int64_t count;                  /* groups of the bundle */
    const char *bundle;
    const char *x;                  /* the first row, at the first group */
    const float *x_sums;            /* likewise, or NULL */
    const char *ahead;
};

/* What the zero points of group `index` of the bundle add: (8 - zero) times the sum of x. */
INLINE void begin_group(int64_t rows, vf sums[][PANEL_VECTORS], const struct walk *walk, int64_t index) {
    if (walk->x_sums == NULL) {
        memset(sums, 0, (size_t)rows * sizeof *sums);
        return;
    }
    const int8_t *shifts = (const int8_t *)walk->bundle + 2 * PANEL * walk->count + index * PANEL;
#pragma GCC unroll 4
    for (int64_t j = 0; j < PANEL_VECTORS; j++) {
        const vf shift = vf_load_i8(shifts + VF * j);
#pragma GCC unroll 12
        for (int64_t i = 0; i < rows; i++) {
            sums[i][j] = vf_set(walk->x_sums[i * walk->block->product->x_sums_stride + index]) * shift;
        }
    }
}

/* total = total + sums * scale for group `index` of the bundle. */
INLINE void add_group(
    int64_t rows, vf sums[][PANEL_VECTORS], const struct walk *walk, int64_t index, vf_sums totals[][PANEL_VECTORS]) {
    const bf16 *scales = (const bf16 *)walk->bundle + index * PANEL;
#pragma GCC unroll 4
    for (int64_t j = 0; j < PANEL_VECTORS; j++) {
        vh halves;
        memcpy(&halves, scales + VF * j, sizeof halves);
        const vf scale = vf_from_f16(halves);
#pragma GCC unroll 12
        for (int64_t i = 0; i < rows; i++) {
            totals[i][j] = vf_fused(sums[i][j], scale, totals[i][j]);
        }
    }
}

/* One step of `span` groups for `rows` rows. */
INLINE void multiply_step(
    int64_t dtype, int64_t rows, int64_t span, const char *weight, const char *x[], int64_t x_stride,
    vf sums[][PANEL_VECTORS]) {
    const int64_t pair_bytes = dtype == F32 ? 8 : 4, row_groups = (rows + 2) / 3;
    vu halves[MAX_SPAN][PANEL_VECTORS];
#pragma GCC unroll 8
    for (int64_t i = 0; i < span * PANEL_VECTORS; i++) {
        const int64_t s = i / PANEL_VECTORS, j = i % PANEL_VECTORS;
        halves[s][j] = (vu)vf_load((const float *)(weight + s * STEP_BYTES) + VF * j);
    }
#pragma GCC unroll 4
    for (int64_t pair = 0; pair < PAIRS; pair++) {
#pragma GCC unroll 4
        for (int64_t s = 0; s < span; s++) {
            struct pair columns[PANEL_VECTORS];
#pragma GCC unroll 4
            for (int64_t j = 0; j < PANEL_VECTORS; j++) {
                columns[j] = expand(dtype, halves[s][j]);
                halves[s][j] >>= 4;
            }
#pragma GCC unroll 12
            for (int64_t i = 0; i < rows; i++) {
                const char *at = x[s * row_groups + i / 3] + i % 3 * x_stride;
#pragma GCC unroll 4
                for (int64_t j = 0; j < PANEL_VECTORS; j++) {
                    sums[s * rows + i][j] = add_pair(dtype, sums[s * rows + i][j], at, columns[j]);
                }
            }
        }
#pragma GCC unroll 4
        for (int64_t i = 0; i < span * row_groups; i++) {
            x[i] += pair_bytes;
        }
    }
}

/* Groups [first, first + span) of a bundle at once for `rows` rows; rows and span are constants. Until they are added,
 * the groups depend on nothing of each other: their chains of additions run side by side, and the result is that of one
 * after the other. As their steps lie by turns, what is read is one stream, which prefetchers follow. */
INLINE void walk_groups(
    int64_t dtype, int64_t rows, int64_t span, int64_t first, struct walk *walk, vf_sums totals[][PANEL_VECTORS]) {
    const struct block *block = walk->block;
    const struct linear_int4 *args = block->product->args;
    const int64_t steps = args->group / INT4_STEP, row_groups = (rows + 2) / 3;
    const int64_t x_group_bytes = args->group * (dtype == F32 ? 4 : 2);
    vf sums[BLOCK_ROWS][PANEL_VECTORS];             /* [span][rows] */
    const char *x[ROW_GROUPS], *ahead = walk->ahead;
    const char *weight = walk->bundle + int4_header_bytes(walk->count, args->zeros) + first * STEP_BYTES;
#pragma GCC unroll 4
    for (int64_t s = 0; s < span; s++) {
        begin_group(rows, sums + s * rows, walk, first + s);
#pragma GCC unroll 4
        for (int64_t i = 0; i < row_groups; i++) {
            x[s * row_groups + i] = walk->x + (first + s) * x_group_bytes + 3 * i * block->x_stride;
        }
    }
    for (int64_t step = 0; step < steps; step++) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < 2 * span; i++) {
            __builtin_prefetch(ahead + i * CACHE_LINE, 0, 3);
        }
        ahead += span * block->ahead_step;
        multiply_step(dtype, rows, span, weight, x, block->x_stride, sums);
        weight += walk->count * STEP_BYTES;
    }
    walk->ahead = ahead;
#pragma GCC unroll 4
    for (int64_t s = 0; s < span; s++) {
        add_group(rows, sums + s * rows, walk, first + s, totals);
    }
}

/* A bundle of `count` groups, at most `span` at once. */
INLINE void walk_bundle(
    int64_t dtype, int64_t rows, int64_t span, int64_t count, struct walk *walk, vf_sums totals[][PANEL_VECTORS]) {
    const struct linear_int4 *args = walk->block->product->args;
    const int64_t header = int4_header_bytes(count, args->zeros), ahead_step = walk->block->ahead_step;
    walk->count = count;
    for (int64_t i = 0; i < header * ahead_step / STEP_BYTES; i += CACHE_LINE) {
        __builtin_prefetch(walk->ahead + i, 0, 3);
    }
    walk->ahead += header * ahead_step / STEP_BYTES;
    int64_t first = 0;
    while (span > 1 && first + span <= count) {
        walk_groups(dtype, rows, span, first, walk, totals);
        first += span;
    }
    while (first < count) {
        walk_groups(dtype, rows, 1, first, walk, totals);
        first++;
    }
}

INLINE void multiply_rows(int64_t dtype, int64_t rows, int64_t span, const struct block *block) {
    const struct product *product = block->product;
    struct walk walk = {
        .block = block, .bundle = block->weight, .x = block->x, .x_sums = block->x_sums, .ahead = block->ahead};
    /* Totals of few rows stay in registers; those of more would push the sums out. */
    const size_t total_bytes = (size_t)(rows * PANEL) * sizeof *block->sums;
    vf_sums own[REGISTER_ROWS][PANEL_VECTORS], (*totals)[PANEL_VECTORS] = own;
    if (rows > REGISTER_ROWS) {
        totals = (vf_sums(*)[PANEL_VECTORS])block->sums;
    }
    if (!block->resume) {
        memset(totals, 0, total_bytes);
    } else if (rows <= REGISTER_ROWS) {
        memcpy(totals, block->sums, total_bytes);
    }
    const int64_t last = block->tail_bytes * INT4_BUNDLE / product->x_unit_bytes;
    for (int64_t unit = 0; unit < block->units + (last > 0); unit++) {
        walk_bundle(dtype, rows, span, unit < block->units ? INT4_BUNDLE : last, &walk, totals);
        walk.bundle += product->unit_bytes;
        walk.x += product->x_unit_bytes;
        walk.x_sums += product->x_sums == NULL ? 0 : INT4_BUNDLE;
    }
    if (rows <= REGISTER_ROWS) {
        memcpy(block->sums, totals, total_bytes);
    }
}

/* Numbers of rows and of groups at once are constants in each case: only then do the sums live in registers. */
static void multiply_bf16(const struct block *block) {
#define ROWS(COUNT, SPAN)                                                                                              \
    case COUNT:                                                                                                        \
        multiply_rows(BF16, COUNT, SPAN, block);                                                                       \
        break;
    switch (block->rows) {
#if defined(VECTOR_AVX512) && defined(__AVX512BF16__)
        ROWS(1, 4)
        ROWS(2, 4)
        ROWS(3, 2)
        ROWS(4, 2)
        ROWS(5, 2)
        ROWS(6, 2)
        ROWS(7, 1)
        ROWS(8, 1)
        ROWS(9, 1)
        ROWS(10, 1)
        ROWS(11, 1)
        ROWS(12, 1)
#else
        ROWS(1, 1)
        ROWS(2, 1)
        ROWS(3, 1)
#ifdef VECTOR_AVX512
        ROWS(4, 1)
        ROWS(5, 1)
        ROWS(6, 1)
#endif
#endif
    }
#undef ROWS
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

void linear_int4(const struct linear_int4 *args, const struct step *step, struct team *team) {
    const int64_t all[] = {0, step->tokens}, *offsets = args->offsets == NULL ? all : args->offsets;
    const int64_t rows = offsets[args->weights], groups = args->in / args->group, width = args->dtype == F32 ? 4 : 2;
    float own_sums[OWN_SUMS];
    float *x_sums = NULL;
    if (args->zeros && rows * groups <= OWN_SUMS) {
        x_sums = own_sums;
        sum_groups(args, 0, rows, x_sums);
    } else if (args->zeros) {
        int64_t begin, end;
        team_share(team, rows, &begin, &end);
        x_sums = args->x_sums;
        sum_groups(args, begin, end, x_sums);
        team_wait();
    }
    const struct product product = {
        .multiply = args->dtype == F32 ? multiply_f32 : multiply_bf16,
        .args = args,
        .block_rows = args->dtype == F32 ? EXACT_ROWS : BLOCK_ROWS,
        .x = args->x,
        .x_stride = args->x_stride * width,
        .x_unit_bytes = INT4_BUNDLE * args->group * width,
        .x_sums = x_sums,
        .x_sums_stride = groups,
        .x_unit_sums = INT4_BUNDLE,
        .weights = args->weights,
        .offsets = offsets,
        .weight = args->weight,
        .units = groups / INT4_BUNDLE,
        .unit_bytes = int4_bundle_bytes(args->group, INT4_BUNDLE, args->zeros),
        .tail_bytes = groups % INT4_BUNDLE * args->group * width,
        .panel_bytes = int4_panel_bytes(args->group, groups, args->zeros),
        .bias = args->bias,
        .out = args->out,
        .gate = args->gate,
        .y = args->y,
        .y_dtype = args->y_dtype,
    };
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
