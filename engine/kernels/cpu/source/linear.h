/* Matrix products with packed weights, and rows of packed weights.
 *
 * A weight [out, in] is held in panels of PANEL (32) output columns. A panel is a run of steps of 128 bytes; a step
 * holds, column after column, the 4 bytes of each column that meet 4 bytes of a row of x: one float32, two bfloat16 or
 * four int8 of consecutive input channels. Missing columns and channels are zeros. With a gate, a panel holds 16
 * columns of the gate and then the 16 columns of up that they multiply. `bias` and the scales of columns are padded and
 * ordered likewise.
 *
 * Several weights of one shape may lie one behind the other, each with rows of x of its own, which lie likewise: the
 * products of all are one operation, so that threads share the work however unevenly rows fall to weights. Their biases,
 * scales and sums of columns lie one behind the other too.
 *
 * Every output is summed over the input channels in one order, whatever the number of tokens, so a token's result does
 * not depend on the tokens beside it.
 */
#ifndef MANTA_LINEAR_H
#define MANTA_LINEAR_H

#include "step.h"

/* y = x weight^T + bias, summed in float32; with a gate, y[., j] = gate(column j) * (column out / 2 + j). */
struct linear_dense {
    const void *x;                  /* [rows, in]; rows x_stride elements apart; without offsets, a row is a token */
    int64_t x_stride;
    int64_t dtype;                  /* of x and of the packed weight */
    const void *weight;             /* packed by pack_dense */
    const float *bias;              /* [panels * PANEL] in the order of the panels, or NULL */
    int64_t in;
    int64_t out;                    /* columns of the weight: with a gate, twice those of y */
    int64_t weights;                /* how many there are; `in` and `out` are of each */
    const int64_t *offsets;         /* [weights + 1] where the rows of each begin; NULL: the only weight has all tokens */
    int64_t gate;                   /* enum activation */
    void *y;                        /* [rows, out], or [rows, out / 2] with a gate; contiguous */
    int64_t y_dtype;
};
OPERATION(linear_dense);

/* The same with an int8 weight and rows of x that are quantized on the way: x[t] ~ values[t] * scales[t] with
 * scales[t] = max |x[t]| / 127, rounded to the nearest, ties to even. The sums of products are exact. */
struct linear_int8 {
    const void *x;                  /* [rows, in]; rows x_stride elements apart */
    int64_t x_stride;
    int64_t dtype;                  /* of x */
    const void *weight;             /* packed by pack_dense */
    const float *scales;            /* [panels * PANEL] of the columns */
    const int32_t *column_sums;     /* [panels * PANEL] sum of each column's int8 */
    const float *bias;
    int64_t in;                     /* at most 2^17 */
    int64_t out;
    int64_t weights;
    const int64_t *offsets;
    int64_t gate;
    void *x_values;                 /* scratch: [rows, in rounded up to 64] bytes */
    float *x_scales;                /* scratch: [rows] */
    void *y;
    int64_t y_dtype;
};
OPERATION(linear_int8);

/* The same with an int4 weight. Each panel is a run of bundles of 4 groups, the last of which may have fewer: their
 * scales in float16; with zero points, of each column 8 - zero in int8; and their steps by turns, the first of each
 * group, the second of each and so on. A step holds 8 input channels: of each column two halves of 16 bits, the four even
 * channels and the four odd ones, low bits first.
 *
 * Rows of x may be quantized on the way, group by group: scale = max |x| / 127 over the group, rounded to the nearest, ties
 * to even. The sum of a group's products is exact. */
struct linear_int4 {
    const void *x;                  /* [rows, in]; rows x_stride elements apart */
    int64_t x_stride;
    int64_t dtype;                  /* of x */
    const void *weight;             /* packed by pack_int4 */
    const float *bias;
    int64_t in;
    int64_t out;
    int64_t weights;
    const int64_t *offsets;
    int64_t group;                  /* input channels; a multiple of 32 */
    int64_t zeros;                  /* whether there are zero points */
    int64_t gate;
    void *x_values;                 /* scratch: [rows, in] int8, if x is to be quantized; NULL: it stays as it is */
    float *x_sums;                  /* scratch: [rows, in / group] with zero points; twice that if x is quantized */
    void *y;
    int64_t y_dtype;
};
OPERATION(linear_int4);

/* y[., i] = x[., order[i]]. */
struct gather_columns {
    const void *x;                  /* [tokens, in]; rows x_stride elements apart */
    int64_t x_stride;
    int64_t dtype;
    const int64_t *order;           /* [in] */
    int64_t in;
    void *y;                        /* [tokens, in], contiguous */
};
OPERATION(gather_columns);

/* y[t] = row token_ids[t] - first of a weight without a gate, whose first `rows` rows are meant; zeros for any other. */
struct embed_dense {
    const void *weight;             /* packed by pack_dense */
    int64_t first;
    int64_t rows;
    int64_t dtype;
    int64_t in;
    void *y;                        /* [tokens, in], contiguous */
    int64_t y_dtype;
};
OPERATION(embed_dense);

/* The same, dequantized. */
struct embed_int8 {
    const void *weight;
    int64_t first;
    int64_t rows;
    const float *scales;
    int64_t in;
    void *y;                        /* [tokens, in], contiguous */
    int64_t y_dtype;
};
OPERATION(embed_int8);

/* The same, dequantized, every channel i at order[i]. */
struct embed_int4 {
    const void *weight;
    int64_t first;
    int64_t rows;
    int64_t in;
    int64_t group;
    int64_t zeros;
    const int64_t *order;           /* [in], or NULL: as they are */
    void *y;                        /* [tokens, in], contiguous */
    int64_t y_dtype;
};
OPERATION(embed_int4);

#endif
