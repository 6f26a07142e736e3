/* Queries, keys and values as the products take them. */
#ifndef MANTA_ATTENTION_PACK_H
#define MANTA_ATTENTION_PACK_H

#include "attention_product.h"

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

/* Keys as the right side of a product, a word of all keys a row: where they lie, or as floats in `buffer`, which has
 * room for [head_dim][KEY_BLOCK]. Of quads every byte is 128 too large, and so unsigned. */
void key_panel(const struct shape *shape, const struct keys *keys, uint32_t *buffer, struct panel *panel);

/* Values likewise, a channel a column, 0 past the head's end; `buffer` has room for [KEY_BLOCK][padded head_dim]. */
void value_panel(const struct shape *shape, const struct keys *keys, uint32_t *buffer, struct panel *panel);

#endif
