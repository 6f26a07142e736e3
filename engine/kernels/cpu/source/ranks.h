/* What the ranks of one host that share a model do together, through memory that they share. */
#ifndef MANTA_RANKS_H
#define MANTA_RANKS_H

#include "step.h"

/* The memory: a head of RANKS_HEAD bytes that is zeros at first, then two halves, used by turns, of `size` places of
 * `capacity` bytes. A rank writes its place of one half, meets the others, and reads theirs; it comes to write there again
 * only after the next meeting, which nobody reaches before having read. All ranks run the same operations in the same
 * order, on as many tokens.
 *
 * Nobody waits longer than `timeout` seconds for the others. After that the segment is broken: every operation on it, of
 * every rank, returns at once and its results mean nothing (ranks_broken). */
#define RANKS_HEAD 256

/* y = the sum of every rank's x, in float32, in the order of the ranks: the same bits in all of them. */
struct sum_ranks {
    void *segment;
    int64_t capacity;
    int64_t rank;
    int64_t size;
    double timeout;
    const void *x;                  /* [tokens, width] */
    void *y;                        /* [tokens, width] */
    int64_t width;
    int64_t dtype;                  /* of x and y */
};
OPERATION(sum_ranks);

/* y[t] = row t of every rank's x, in the order of the ranks. */
struct gather_ranks {
    void *segment;
    int64_t capacity;
    int64_t rank;
    int64_t size;
    double timeout;
    const void *x;                  /* [tokens, row_bytes] */
    int64_t row_bytes;
    void *y;                        /* [tokens, size, row_bytes]; NULL: this rank only gives */
};
OPERATION(gather_ranks);

/* Whether somebody has waited in vain. */
int64_t ranks_broken(const void *segment);

#endif
