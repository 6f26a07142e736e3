/* What the forms of a matrix product share: how threads divide it into tiles, and what happens to a finished tile.
 *
 * A tile is up to TILE_ROWS tokens by the PANEL columns of one panel. Its sums wait in the first cache while it passes
 * over the panel chunk by chunk. While a chunk is multiplied, the next one is fetched from memory, a little with each
 * step, so that memory never waits for arithmetic.
 *
 * Private to linear_*.c.
 */
#ifndef MANTA_LINEAR_TILE_H
#define MANTA_LINEAR_TILE_H

#include "linear.h"
#include "vector.h"

enum {
    PANEL = 32,                     /* columns of a panel */
    STEP_BYTES = 4 * PANEL,         /* 4 bytes of each column of a panel */
    CACHE_LINE = 64,
    PANEL_VECTORS = PANEL / VF,
    INT4_STEP = 8,                  /* channels of int4 in a step */
    INT4_BUNDLE = 4,                /* groups of int4 that lie interleaved */
    TILE_ROWS = 96,                 /* at 4096 channels 768 KB of x: it stays in the second cache from panel to panel */
    SINGLE_AHEAD = 8192,            /* bytes, of a tile of one block; the least that keeps 66 GB/s busy */
    CHUNK_BYTES = 1024 * STEP_BYTES /* a chunk, and the one that is fetched ahead, stay in the second cache as well */
};

/* Some rows of x times a run of units of one panel. A unit is the smallest part that a form multiplies as a whole. */
struct block {
    const char *x;                  /* the first row, at the first unit */
    int64_t x_stride;               /* bytes */
    int64_t rows;
    const char *weight;
    int64_t units;                  /* whole ones */
    int64_t tail_bytes;             /* of x that meet one more, incomplete unit; 0: there is none */
    const float *x_sums;            /* of the first row, at the first unit; see product */
    float *sums;                    /* [rows, PANEL]; int32 for int8 weights */
    int64_t resume;                 /* whether the sums go on from what they hold, rather than from 0 */
    const char *ahead;              /* what to fetch meanwhile: ahead_step bytes with each STEP_BYTES of the weight */
    int64_t ahead_step;
    int64_t near;                   /* whether to fetch it into the first cache */
    const struct product *product;
};

/* A product as tiles see it. */
struct product {
    void (*multiply)(const struct block *block);
    /* Makes floats of a tile's sums where they are not yet, or NULL. Panels are counted over all weights. */
    void (*scale)(const struct product *product, int64_t panel, int64_t row, int64_t rows, float *sums);
    const void *args;               /* of the operation */
    int64_t block_rows;             /* rows that `multiply` takes at once */
    int64_t far_rows;               /* up to so many rows, a tile takes memory longer than arithmetic */
    const char *x;
    int64_t x_stride;               /* bytes */
    int64_t x_unit_bytes;           /* of a row of x that meet one unit */
    const float *x_sums;            /* [rows, x_sums_stride], x_unit_sums a unit, for forms that need sums of x; or NULL */
    int64_t x_sums_stride;
    int64_t x_unit_sums;
    const float *x_scales;          /* [rows], for `scale` */
    int64_t weights;
    const int64_t *offsets;         /* [weights + 1] where the rows of each begin */
    const char *weight;             /* of the first; the panels of the others follow */
    int64_t units;                  /* whole ones of a panel */
    int64_t unit_bytes;
    int64_t tail_bytes;
    int64_t panel_bytes;
    const float *bias;
    int64_t out;
    int64_t gate;
    void *y;
    int64_t y_dtype;
};

/* Panels of a weight with `out` columns. */
static inline int64_t panel_count(int64_t out, int64_t gated) {
    return gated ? (out / 2 + PANEL / 2 - 1) / (PANEL / 2) : (out + PANEL - 1) / PANEL;
}

/* The row of the unpacked weight that is column `column` of panel `panel`; -1 for padding. */
static inline int64_t panel_row(int64_t panel, int64_t column, int64_t out, int64_t gated) {
    if (!gated) {
        const int64_t row = panel * PANEL + column;
        return row < out ? row : -1;
    }
    const int64_t half = PANEL / 2;
    const int64_t row = panel * half + column % half;
    return row < out / 2 ? row + (column < half ? 0 : out / 2) : -1;
}

/* Bytes before the steps of a bundle of `count` groups of int4: of each a step's columns of scales in float16, then of
 * each the columns' 8 - zero in int8; up to a whole cache line. */
static inline int64_t int4_header_bytes(int64_t count, int64_t zeros) {
    const int64_t lines = (zeros ? PANEL : 0) * count + CACHE_LINE - 1;
    return 2 * PANEL * count + lines / CACHE_LINE * CACHE_LINE;
}

static inline int64_t int4_bundle_bytes(int64_t group, int64_t count, int64_t zeros) {
    return int4_header_bytes(count, zeros) + count * (group / INT4_STEP) * STEP_BYTES;
}

static inline int64_t int4_panel_bytes(int64_t group, int64_t groups, int64_t zeros) {
    return groups / INT4_BUNDLE * int4_bundle_bytes(group, INT4_BUNDLE, zeros) +
        int4_bundle_bytes(group, groups % INT4_BUNDLE, zeros);
}

/* Asks for `count` lines, a constant: into the first cache, or only into the second. */
INLINE void fetch_lines(const char *first, int64_t count, int64_t near) {
    if (near) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < count; i++) {
            __builtin_prefetch(first + i * CACHE_LINE, 0, 3);
        }
    } else {
#pragma GCC unroll 8
        for (int64_t i = 0; i < count; i++) {
            __builtin_prefetch(first + i * CACHE_LINE, 0, 2);
        }
    }
}

/* This thread's part of the product. */
void run_product(const struct product *product, struct team *team);

#endif
