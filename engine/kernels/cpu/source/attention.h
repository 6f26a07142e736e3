/* Rotary positions, the write of keys and values into pages, and attention over pages. */
#ifndef MANTA_ATTENTION_H
#define MANTA_ATTENTION_H

#include "step.h"

enum { LARGEST_HEAD_DIM = 256 };    /* of both operations; every head_dim is a multiple of 8 */

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
    void *k;                        /* first page; pages page_stride bytes apart, inside [page_tokens, kv_heads, head_dim] */
    void *v;
    int64_t page_stride;
    float *k_scales;                /* [page_tokens, kv_heads] in each page, page_stride bytes apart: k and v are int8; or NULL */
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
    void *scratch;                  /* for partial results; its size is the business of attention.py */
    void *y;                        /* [tokens, heads, head_dim], contiguous */
};
OPERATION(attend);

#endif
