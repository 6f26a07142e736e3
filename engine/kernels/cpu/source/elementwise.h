/* Embedding rows, rotary angles, chosen rows, sums and activations. */
#ifndef MANTA_ELEMENTWISE_H
#define MANTA_ELEMENTWISE_H

#include "step.h"

/* y[t] = table[id of t - first], zeros where that is no row; the id is the token's id, or its position. */
struct embed {
    const void *table;              /* [rows, width] */
    int64_t first;
    int64_t rows;
    int64_t from_positions;
    int64_t width;
    int64_t dtype;                  /* of table and y */
    void *y;                        /* [tokens, width] */
};
OPERATION(embed);

/* Cosines, then sines, of every token's rotary angles: its position times each inverse frequency. */
struct rotary_angles {
    const float *inverse_frequencies;       /* [pairs] */
    int64_t pairs;
    double amplitude;                       /* multiplies the results */
    float *cos_sin;                         /* [tokens, 2 * pairs] */
};
OPERATION(rotary_angles);

/* The rows of x that the step's tokens have among all tokens. */
struct take_rows {
    const void *x;                  /* [all tokens]; rows x_stride bytes apart */
    int64_t x_stride;
    int64_t row_bytes;
    void *y;                        /* [tokens], rows of row_bytes */
};
OPERATION(take_rows);

/* y = a + b. */
struct add {
    const void *a;                  /* [tokens, width] */
    const void *b;
    void *y;
    int64_t width;
    int64_t dtype;
};
OPERATION(add);

/* y = a + b / (1 + e^-gate), with a gate for each token. */
struct add_gated {
    const void *a;                  /* [tokens, width] */
    const void *b;
    const float *gate;              /* [tokens] */
    void *y;
    int64_t width;
    int64_t dtype;                  /* of a, b and y */
};
OPERATION(add_gated);

/* y = activation(x). */
struct activate {
    const void *x;                  /* [tokens, width] */
    void *y;
    int64_t width;
    int64_t activation;
    int64_t dtype;
};
OPERATION(activate);

#endif
