/* Rotary positions, the write of keys and values into pages, and attention over pages.
 *
 * A page holds the keys of page_tokens tokens of a layer, and elsewhere their values. Both lie head after head in words of 32 bits, ready to be multiplied: U = 1 float, 2 bf16 or 4 int8.
 *
 *     keys    [kv_heads][head_dim / U][page_tokens] words of U channels of one token
 *     values  [kv_heads][page_tokens / U][head_dim] words of U tokens of one channel
 *
 * An int8 key is stored 128 too large, as the instruction wants it. Scales are [kv_heads][page_tokens]. Of the tokens of
 * a word of values, those that are not written yet are 0: the write of the first one clears the others.
 */
#ifndef MANTA_ATTENTION_H
#define MANTA_ATTENTION_H

#include "step.h"

enum {
    LARGEST_HEAD_DIM = 256,         /* of both operations; every head_dim is a multiple of 8 */
    GROUP = 16                      /* page_tokens is a multiple of it: so many tokens are attended from one page */
};

/* Normalises and rotates the query and key heads of each token in place, and stores its keys and values at its slot. */
struct write_kv {
    void *qkv;                      /* [tokens, heads + 2 * kv_heads, head_dim]; rows qkv_stride elements apart */
    int64_t qkv_stride;
    int64_t dtype;                  /* of qkv, the norm weights, and k and v unless they have scales */
    int64_t heads;
    int64_t kv_heads;
    int64_t head_dim;
    int64_t rotary_dim;             /* 0: nothing is rotated and step->cos_sin is not read */
    const void *q_norm;             /* [head_dim], or NULL: no norm */
    const void *k_norm;
    double norm_eps;
    void *k;                        /* first page; pages page_stride bytes apart */
    void *v;
    int64_t page_stride;
    float *k_scales;                /* of the first page, if k and v are int8; or NULL */
    float *v_scales;
    int64_t page_tokens;
};
OPERATION(write_kv);

/* Causal attention of every token's query heads to the keys of its own sequence. */
struct attend {
    const void *q;                  /* [tokens, heads, head_dim]; rows q_stride elements apart */
    int64_t q_stride;
    int64_t dtype;                  /* of q and y, and of k and v unless they have scales */
    const void *k;                  /* as in write_kv */
    const void *v;
    int64_t page_stride;
    const float *k_scales;
    const float *v_scales;
    int64_t page_tokens;
    int64_t heads;
    int64_t kv_heads;
    int64_t head_dim;
    double scale;
    int64_t window;                 /* keys that a query sees, itself included; 0: all before it */
    int64_t deterministic;          /* whether a query's result is the same in whatever chunk of its sequence it comes */
    void *scratch;                  /* for partial results; its size is the business of attention.py */
    void *y;                        /* [tokens, heads, head_dim], contiguous */
};
OPERATION(attend);

#endif
