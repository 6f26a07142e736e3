/* Mixtures of experts: which tokens each expert runs, and what becomes of its results. The products in between are those
 * of linear.h with one weight for each expert.
 *
 * Tables take the place of one-hot matrices (Rajbhandari et al., 2022): a counting sort of the (token, expert) pairs gives
 * every pair a row, by expert and then by token, and every token the rows of its experts. Nothing is multiplied by zero,
 * and no expert has a capacity that tokens could overflow.
 */
#ifndef MANTA_EXPERTS_H
#define MANTA_EXPERTS_H

#include "step.h"

/* The `per_token` experts with the largest logits of each token, equal ones by rising number, and the table of those of
 * them that are here: experts [first, first + held) of all. NaN counts as -inf when experts are chosen, and makes the
 * token's weights NaN. */
struct route {
    const float *logits;            /* [tokens, experts] */
    int64_t experts;
    int64_t per_token;              /* at most `experts` */
    int64_t renormalised;           /* whether a token's weights are made to add up to 1 */
    int64_t first;
    int64_t held;
    float *weights;                 /* [tokens, per_token] softmax over all experts, the largest first */
    int64_t *rows;                  /* [tokens, per_token] the row of each of a token's experts; -1: it is not here */
    int64_t *offsets;               /* [held + 1] where the rows of each expert begin */
    int64_t *sources;               /* [tokens * per_token] the token of each row */
    int64_t *tallies;               /* scratch: [2, threads, held] */
};
OPERATION(route);

/* y[r] = x[sources[r]] for every row of the table. */
struct gather_rows {
    const void *x;                  /* [tokens]; rows x_stride bytes apart */
    int64_t x_stride;
    int64_t row_bytes;
    const int64_t *sources;
    const int64_t *offsets;         /* [held + 1] */
    int64_t held;
    void *y;                        /* [offsets[held]], rows of row_bytes */
};
OPERATION(gather_rows);

/* y[t] = sum of weights[t, i] * results[rows[t, i]] in the order of i, which is the token's own: the sum does not depend on
 * the tokens beside it. */
struct sum_experts {
    const float *results;           /* [rows of the table, width] */
    const float *weights;           /* [tokens, per_token] */
    const int64_t *rows;            /* [tokens, per_token]; -1 adds nothing */
    int64_t per_token;
    int64_t width;
    void *y;                        /* [tokens, width] */
    int64_t dtype;                  /* of y */
};
OPERATION(sum_experts);

#endif
