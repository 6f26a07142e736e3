/* The inner loop of products with int4 weights: values are expanded in registers, summed group by group, and scaled once a
 * group.
 *
 * What meets floats is value - 8, exact in bfloat16; with zero points, (8 - zero) times the group's sum of x is added. What
 * meets int8 is the value as it is, since the machine multiplies unsigned by signed bytes: all of the zero point is taken
 * off.
 *
 * Private to linear_int4.c and linear_int4_int8.c.
 */
#ifndef MANTA_LINEAR_INT4_BLOCK_H
#define MANTA_LINEAR_INT4_BLOCK_H

#include "bytes.h"
#include "linear_tile.h"

enum {
#if defined(VECTOR_AVX512) && defined(__AVX512BF16__)
    BLOCK_ROWS = 8,                 /* 8 x 2 sums of 32 registers: the compiler needs the others */
    SUM_ROWS = 12,                  /* of several groups at once */
#elif defined(VECTOR_AVX512)
    BLOCK_ROWS = 6,
    SUM_ROWS = BLOCK_ROWS,
#else
    BLOCK_ROWS = 3,                 /* 3 x 4 of 16 */
    SUM_ROWS = BLOCK_ROWS,
#endif
    ROW_GROUPS = 4,
    REGISTER_ROWS = 2,
    MAX_SPAN = INT4_BUNDLE,         /* groups at once */
    INT8 = BF16 + 1,                /* beside the dtypes of floats: what x can be */
    NO_ZERO = 8                     /* the zero point of weights that have none */
};

/* The groups of a weight; `args` of a product with it. */
struct int4_groups {
    int64_t size;                   /* input channels */
    int64_t zeros;                  /* whether there are zero points */
};

/* What a group of a row of x is multiplied by, and its sum: `x_sums` of a product with int8. */
struct int8_group {
    float scale;
    int32_t sum;
};

/* -8 to -1 and 0 to 7 in bfloat16. */
#define NEGATIVE 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80
#define POSITIVE 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0

/* Of one row, in a panel's sums. */
typedef vf vf_sums __attribute__((may_alias));

/* Some channels of VF columns, as they meet x: two consecutive ones, or four for int8. */
struct part {
#if defined(VECTOR_AVX512) && defined(__AVX512BF16__)
    __m512bh pair;
#endif
    vf even, odd;
    vu bytes;
};

/* Bytes of x that meet a part, and parts of a step. `kind` of x is a constant, here and below. */
INLINE int64_t part_bytes(int64_t kind) {
    return kind == F32 ? 8 : 4;
}

INLINE int64_t step_parts(int64_t kind) {
    return kind == INT8 ? INT4_STEP / 4 : INT4_STEP / 2;
}

INLINE int64_t x_width(int64_t kind) {
    return kind == F32 ? 4 : kind == BF16 ? 2 : 1;
}

/* The lowest int4 of both halves of each lane, less 8; for int8 the lowest of every byte. */
INLINE struct part expand(int64_t kind, vu halves) {
    struct part part;
    if (kind == INT8) {
        part.bytes = halves & 0x0f0f0f0f;
        return part;
    }
#if defined(VECTOR_AVX512) && defined(__AVX512BF16__)
    if (kind == BF16) {
        /* Of each index vpermw reads five bits; the fifth belongs to the next channel, so all is there twice. */
        static const bf16 table[32] __attribute__((aligned(64))) = {NEGATIVE, POSITIVE, NEGATIVE, POSITIVE};
        part.pair = (__m512bh)_mm512_permutexvar_epi16((__m512i)halves, _mm512_load_si512(table));
        return part;
    }
#endif
    part.even = __builtin_convertvector((vi)(halves & 15) - 8, vf);
    part.odd = __builtin_convertvector((vi)(halves >> 16 & 15) - 8, vf);
    return part;
}

INLINE float channel(int64_t kind, const char *x, int64_t index) {
    float value = 0;
    if (kind == F32) {
        memcpy(&value, x + 4 * index, sizeof value);
        return value;
    }
    bf16 half;
    memcpy(&half, x + 2 * index, sizeof half);
    const uint32_t bits = (uint32_t)half << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE vf add_part(int64_t kind, vf sums, const char *x, struct part part) {
    uint32_t value;
    memcpy(&value, x, sizeof value);
    const vu lanes = value - (vu){0};
    if (kind == INT8) {
        return (vf)add_bytes((vi)sums, part.bytes, lanes);
    }
#if defined(VECTOR_AVX512) && defined(__AVX512BF16__)
    if (kind == BF16) {
        return (vf)_mm512_dpbf16_ps((__m512)sums, (__m512bh)lanes, part.pair);
    }
#endif
    return vf_fused(vf_set(channel(kind, x, 1)), part.odd, vf_fused(vf_set(channel(kind, x, 0)), part.even, sums));
}

/* A block of rows at one bundle of a panel. */
struct walk {
    const struct block *block;
    const struct int4_groups *groups;
    int64_t count;                  /* groups of the bundle */
    const char *bundle;
    const char *x;                  /* the first row, at the first group */
    const float *x_sums;            /* likewise, or NULL */
    const char *ahead;
};

/* Group `index` of the bundle in row `row` of the block. */
INLINE struct int8_group int8_group(const struct walk *walk, int64_t row, int64_t index) {
    struct int8_group group;
    memcpy(&group, walk->x_sums + row * walk->block->product->x_sums_stride + 2 * index, sizeof group);
    return group;
}

/* What the zero points of group `index` of the bundle add. */
INLINE void begin_group(
    int64_t kind, int64_t rows, vf sums[][PANEL_VECTORS], const struct walk *walk, int64_t index) {
    if (kind != INT8 && !walk->groups->zeros) {
        memset(sums, 0, (size_t)rows * sizeof *sums);
        return;
    }
    const int8_t *shifts = (const int8_t *)walk->bundle + 2 * PANEL * walk->count + index * PANEL;
#pragma GCC unroll 4
    for (int64_t j = 0; j < PANEL_VECTORS; j++) {
        const vf shift = walk->groups->zeros ? vf_load_i8(shifts + VF * j) : (vf){0};
        const vi zero = __builtin_convertvector(shift, vi) - NO_ZERO;
#pragma GCC unroll 12
        for (int64_t i = 0; i < rows; i++) {
            if (kind == INT8) {
                sums[i][j] = (vf)(zero * int8_group(walk, i, index).sum);
            } else {
                sums[i][j] = vf_set(walk->x_sums[i * walk->block->product->x_sums_stride + index]) * shift;
            }
        }
    }
}

/* total = total + sums * scale for group `index` of the bundle. */
INLINE void add_group(
    int64_t kind, int64_t rows, vf sums[][PANEL_VECTORS], const struct walk *walk, int64_t index,
    vf_sums totals[][PANEL_VECTORS]) {
    const bf16 *scales = (const bf16 *)walk->bundle + index * PANEL;
#pragma GCC unroll 4
    for (int64_t j = 0; j < PANEL_VECTORS; j++) {
        vh halves;
        memcpy(&halves, scales + VF * j, sizeof halves);
        const vf scale = vf_from_f16(halves);
#pragma GCC unroll 12
        for (int64_t i = 0; i < rows; i++) {
            vf sum = sums[i][j];
            if (kind == INT8) {
                sum = __builtin_convertvector((vi)sum, vf) * int8_group(walk, i, index).scale;
            }
            totals[i][j] = vf_fused(sum, scale, totals[i][j]);
        }
    }
}

/* One step of `span` groups for `rows` rows. */
INLINE void multiply_step(
    int64_t kind, int64_t rows, int64_t span, const char *weight, const char *x[], int64_t x_stride,
    vf sums[][PANEL_VECTORS]) {
    const int64_t row_groups = (rows + 2) / 3;
    vu halves[MAX_SPAN][PANEL_VECTORS];
#pragma GCC unroll 8
    for (int64_t i = 0; i < span * PANEL_VECTORS; i++) {
        const int64_t s = i / PANEL_VECTORS, j = i % PANEL_VECTORS;
        halves[s][j] = (vu)vf_load((const float *)(weight + s * STEP_BYTES) + VF * j);
    }
#pragma GCC unroll 4
    for (int64_t part = 0; part < step_parts(kind); part++) {
#pragma GCC unroll 4
        for (int64_t s = 0; s < span; s++) {
            struct part columns[PANEL_VECTORS];
#pragma GCC unroll 4
            for (int64_t j = 0; j < PANEL_VECTORS; j++) {
                columns[j] = expand(kind, halves[s][j]);
                halves[s][j] >>= 4;
            }
#pragma GCC unroll 12
            for (int64_t i = 0; i < rows; i++) {
                const char *at = x[s * row_groups + i / 3] + i % 3 * x_stride;
#pragma GCC unroll 4
                for (int64_t j = 0; j < PANEL_VECTORS; j++) {
                    sums[s * rows + i][j] = add_part(kind, sums[s * rows + i][j], at, columns[j]);
                }
            }
        }
#pragma GCC unroll 4
        for (int64_t i = 0; i < span * row_groups; i++) {
            x[i] += part_bytes(kind);
        }
        if (kind == INT8) {
            /* Loads of the next part's x would take the registers of sums. */
            __asm__ volatile("" ::: "memory");
        }
    }
}

/* Groups [first, first + span) of a bundle at once for `rows` rows; rows and span are constants. Until they are added,
 * the groups depend on nothing of each other: their chains of additions run side by side, and the result is that of one
 * after the other. As their steps lie by turns, what is read is one stream, which prefetchers follow. */
INLINE void walk_groups(
    int64_t kind, int64_t rows, int64_t span, int64_t first, struct walk *walk, vf_sums totals[][PANEL_VECTORS]) {
    const struct block *block = walk->block;
    const int64_t size = walk->groups->size, steps = size / INT4_STEP, row_groups = (rows + 2) / 3;
    vf sums[SUM_ROWS][PANEL_VECTORS];               /* [span][rows] */
    const char *x[ROW_GROUPS], *ahead = walk->ahead;
    const char *weight = walk->bundle + int4_header_bytes(walk->count, walk->groups->zeros) + first * STEP_BYTES;
#pragma GCC unroll 4
    for (int64_t s = 0; s < span; s++) {
        begin_group(kind, rows, sums + s * rows, walk, first + s);
#pragma GCC unroll 4
        for (int64_t i = 0; i < row_groups; i++) {
            x[s * row_groups + i] = walk->x + (first + s) * size * x_width(kind) + 3 * i * block->x_stride;
        }
    }
    for (int64_t step = 0; step < steps; step++) {
        fetch_lines(ahead, 2 * span, block->near);
        ahead += span * block->ahead_step;
        multiply_step(kind, rows, span, weight, x, block->x_stride, sums);
        weight += walk->count * STEP_BYTES;
    }
    walk->ahead = ahead;
#pragma GCC unroll 4
    for (int64_t s = 0; s < span; s++) {
        add_group(kind, rows, sums + s * rows, walk, first + s, totals);
    }
}

/* A bundle of `count` groups, at most `span` at once. */
INLINE void walk_bundle(
    int64_t kind, int64_t rows, int64_t span, int64_t count, struct walk *walk, vf_sums totals[][PANEL_VECTORS]) {
    const int64_t header = int4_header_bytes(count, walk->groups->zeros), ahead_step = walk->block->ahead_step;
    walk->count = count;
    for (int64_t i = 0; i < header * ahead_step / STEP_BYTES; i += CACHE_LINE) {
        fetch_lines(walk->ahead + i, 1, walk->block->near);
    }
    walk->ahead += header * ahead_step / STEP_BYTES;
    int64_t first = 0;
    while (span > 1 && first + span <= count) {
        walk_groups(kind, rows, span, first, walk, totals);
        first += span;
    }
    while (first < count) {
        walk_groups(kind, rows, 1, first, walk, totals);
        first++;
    }
}

INLINE void multiply_rows(int64_t kind, int64_t rows, int64_t span, const struct block *block) {
    const struct product *product = block->product;
    struct walk walk = {
        .block = block,
        .groups = product->args,
        .bundle = block->weight,
        .x = block->x,
        .x_sums = block->x_sums,
        .ahead = block->ahead,
    };
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
        walk_bundle(kind, rows, span, unit < block->units ? INT4_BUNDLE : last, &walk, totals);
        walk.bundle += product->unit_bytes;
        walk.x += product->x_unit_bytes;
        walk.x_sums += product->x_sums == NULL ? 0 : product->x_unit_sums;
    }
    if (rows <= REGISTER_ROWS) {
        memcpy(block->sums, totals, total_bytes);
    }
}

/* Numbers of rows and of groups at once are constants in each case: only then do the sums live in registers. */
INLINE void multiply_int4(int64_t kind, const struct block *block) {
#define ROWS(COUNT, SPAN)                                                                                              \
    case COUNT:                                                                                                        \
        multiply_rows(kind, COUNT, SPAN, block);                                                                       \
        break;
    switch (block->rows) {
#if defined(VECTOR_AVX512) && defined(__AVX512BF16__)
        ROWS(1, 4)
        ROWS(2, 4)
        ROWS(3, 2)
        ROWS(4, 2)
        ROWS(5, kind == INT8 ? 1 : 2)
        ROWS(6, kind == INT8 ? 1 : 2)
        ROWS(7, 1)
        ROWS(8, 1)
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

/* ---- linear_int4_int8.c ---- */

void multiply_int4_int8(const struct block *block);

/* Rows [begin, end) of x as int8, [rows, in] with channels as they meet a step, and their groups, [rows, in / group]. What
 * is not finite gives a scale of NaN. */
void quantize_groups(
    const struct linear_int4 *args, int64_t begin, int64_t end, int8_t *values, struct int8_group *groups);

#endif
