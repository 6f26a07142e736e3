/* The arithmetic of attention: the rows of one tile and one key head against one block of keys.
 *
 * Online softmax (Milakov & Gimelshein, 2018; Dao et al., 2022): a row's state is the largest score so far, the sum of
 * the exponentials relative to it, and the values weighted by them. Knows no sequence, page or thread.
 */
#ifndef MANTA_ATTENTION_BLOCK_H
#define MANTA_ATTENTION_BLOCK_H

#include "attention_pack.h"
#include "attention_words.h"

/* Memory for one block at a time. */
struct block_buffers {
    uint32_t *k;                    /* [head_dim][KEY_BLOCK], unless keys are multiplied where they lie */
    uint32_t *v;                    /* [KEY_BLOCK][padded head_dim], likewise */
    float *scores;                  /* [rows of the product][KEY_BLOCK] */
    uint32_t *weights;              /* [rows of the product][words of a block] */
    float *values;                  /* [rows of the product][padded head_dim], of quads alone */
};

/* A row's state: its weighted values, padded, then the largest score and the sum. */
INLINE int64_t state_stride(int64_t head_dim) {
    return padded_dim(head_dim) + 16;
}

/* States of no key at all; `sums` [rows][VF] are their sums until end_states. */
void begin_states(const struct shape *shape, float *states, float *sums);

/* Adds a block of keys to the states of queries, and asks for lines ahead. */
void attend_block(
    const struct shape *shape, const struct keys *keys, const struct queries *queries,
    const struct block_buffers *buffers, float *states, float *sums, struct ahead *ahead);

/* Completes the states. */
void end_states(const struct shape *shape, float *states, const float *sums);

/* Makes one complete state that of the keys of both. */
void merge_state(float *state, const float *other, int64_t head_dim);

/* The attention of a complete state: element [0, head_dim) of y from `at` on. */
void state_result(const float *state, int64_t head_dim, int64_t dtype, void *y, int64_t at);

#endif
