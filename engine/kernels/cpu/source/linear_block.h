/* The inner loop of products whose panels need no unpacking: a block of rows whose sums live in registers. A unit is
 * one step: 4 bytes of each column.
 *
 * Private to linear_dense.c and linear_int8.c.
 */
#ifndef MANTA_LINEAR_BLOCK_H
#define MANTA_LINEAR_BLOCK_H

#include "linear_tile.h"

enum {
#ifdef VECTOR_AVX512
    BLOCK_ROWS = 12,                /* 12 x 2 sums of 32 registers */
#else
    BLOCK_ROWS = 3,                 /* 3 x 4 of 16 */
#endif
    ROW_GROUPS = BLOCK_ROWS / 3,
    FAR_ROWS = 20                   /* see product */
};

/* A vector of sums, plus what 4 bytes of a row, in every lane, and 4 bytes of each of VF columns give. */
typedef vf multiply_add(vf sums, vu x, vu columns);

/* One unit for `rows` rows, of which `bytes` bytes take part; both are constants. */
INLINE void multiply_unit(
    multiply_add *add, int64_t rows, size_t bytes, const char *const x[], int64_t x_stride, const char *weight,
    vf sums[][PANEL_VECTORS]) {
    vu columns[PANEL_VECTORS];
#pragma GCC unroll 4
    for (int64_t j = 0; j < PANEL_VECTORS; j++) {
        columns[j] = (vu)vf_load((const float *)weight + VF * j);
    }
#pragma GCC unroll 12
    for (int64_t i = 0; i < rows; i++) {
        uint32_t value = 0;
        memcpy(&value, x[i / 3] + i % 3 * x_stride, bytes);
        const vu lanes = value - (vu){0};
#pragma GCC unroll 4
        for (int64_t j = 0; j < PANEL_VECTORS; j++) {
            sums[i][j] = add(sums[i][j], lanes, columns[j]);
        }
    }
}

/* `tail` is whether an incomplete unit, of 2 bytes of x, can follow. */
INLINE void multiply_rows(multiply_add *add, int64_t rows, int64_t tail, const struct block *block) {
    vf sums[BLOCK_ROWS][PANEL_VECTORS];
#pragma GCC unroll 12
    for (int64_t i = 0; i < rows; i++) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < PANEL_VECTORS; j++) {
            sums[i][j] = block->resume ? vf_load(block->sums + i * PANEL + j * VF) : (vf){0};
        }
    }
    const int64_t x_stride = block->x_stride, units = block->units, ahead_step = block->ahead_step, near = block->near;
    const char *weight = block->weight, *ahead = block->ahead;
    /* A pointer for every third row: addresses of 12 rows would not leave enough general registers. */
    const char *x[ROW_GROUPS];
#pragma GCC unroll 4
    for (int64_t i = 0; i < ROW_GROUPS; i++) {
        x[i] = block->x + 3 * i * x_stride;
    }
    for (int64_t unit = 0; unit < units; unit++) {
        fetch_lines(ahead, 1, near);
        if (ahead_step > CACHE_LINE) {
            fetch_lines(ahead + CACHE_LINE, 1, near);
        }
        multiply_unit(add, rows, 4, x, x_stride, weight, sums);
#pragma GCC unroll 4
        for (int64_t i = 0; i < ROW_GROUPS; i++) {
            x[i] += 4;
        }
        weight += STEP_BYTES;
        ahead += ahead_step;
    }
    if (tail && block->tail_bytes > 0) {
        multiply_unit(add, rows, 2, x, x_stride, weight, sums);
    }
#pragma GCC unroll 12
    for (int64_t i = 0; i < rows; i++) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < PANEL_VECTORS; j++) {
            vf_store(block->sums + i * PANEL + j * VF, sums[i][j]);
        }
    }
}

/* The number of rows is a constant in each case: only then do the sums live in registers. */
INLINE void multiply_block(multiply_add *add, int64_t tail, const struct block *block) {
#define ROWS(COUNT)                                                                                                    \
    case COUNT:                                                                                                        \
        multiply_rows(add, COUNT, tail, block);                                                                        \
        break;
    switch (block->rows) {
        ROWS(1)
        ROWS(2)
        ROWS(3)
#ifdef VECTOR_AVX512
        ROWS(4)
        ROWS(5)
        ROWS(6)
        ROWS(7)
        ROWS(8)
        ROWS(9)
        ROWS(10)
        ROWS(11)
        ROWS(12)
#endif
    }
#undef ROWS
}

#endif
