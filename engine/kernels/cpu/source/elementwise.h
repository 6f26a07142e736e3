/* Embedding rows, rotary angles, sums and activations. */
#ifndef MANTA_ELEMENTWISE_H
#define MANTA_ELEMENTWISE_H

#include "step.h"

/* y[t] = table[id of t]; the id is the token's id, or its position. */
struct embed {
    const void *table;              /* [rows, width] */
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

/* y = a + b. */
struct add {
    const void *a;                  /* [tokens, width] */
    const void *b;
    void *y;
    int64_t width;
    int64_t dtype;
};
OPERATION(add);

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
