/* Queries, keys and values as the products take them. */
#ifndef MANTA_ATTENTION_PACK_H
#define MANTA_ATTENTION_PACK_H

#include "attention_words.h"

/* Queries of one key head in a tile. */
struct queries {
    uint32_t *words;                /* [rows][words of a head]; of quads the upper bytes, then rows of the lower ones */
    float *scales;                  /* [rows] of quads: query = scale * (upper << LOW_BITS + lower) */
    int32_t *biases;                /* [rows] of quads: what keys that are 128 too large add to a product */
};

/* Puts `count` heads that lie one after another, from element `at` of q on, into rows [row, row + count). */
void pack_queries(
    const struct shape *shape, const void *q, int64_t dtype, int64_t at, int64_t row, int64_t count,
    const struct queries *to);

/* Keys, transposed: to[word][key], up to a whole vector of keys; of quads every byte is 128 too large, and so
 * unsigned. Asks for lines ahead, packs(shape) times together with pack_values. */
void pack_keys(const struct shape *shape, const struct keys *keys, uint32_t *to, struct ahead *ahead);

/* Values: to[key, or pair or four of keys][padded head_dim], 0 past the head's end and past the block's. */
void pack_values(const struct shape *shape, const struct keys *keys, uint32_t *to, struct ahead *ahead);

/* How often a whole block asks for lines ahead. */
int64_t packs(const struct shape *shape);

#endif
