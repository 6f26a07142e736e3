/* What the parts of attention's arithmetic share: the words that products run on, the shape of a tile, a block of
 * keys.
 *
 * A word has 32 bits: a float, two neighbouring bf16 that the processor multiplies and adds as one (AVX-512 BF16), or
 * four neighbouring int8 (AVX-512 VNNI). An int8 cache is read as it is: the other factor, a query or the weights of
 * values, is split into two bytes, 15 bits together, which make two rows of the product.
 */
#ifndef MANTA_ATTENTION_WORDS_H
#define MANTA_ATTENTION_WORDS_H

#include <stdbool.h>

#include "attention_plan.h"
#include "vector.h"

enum words { FLOATS, PAIRS, QUADS };

#if defined(VECTOR_AVX512) && defined(__AVX512BF16__)
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0                 /* every bf16 becomes a float */
#endif
#if HAS_PAIRS && defined(__AVX512VNNI__)
#define HAS_QUADS 1
#else
#define HAS_QUADS 0                 /* every int8 becomes a bf16 or a float */
#endif

enum {
    LINE = 64,                      /* bytes of memory that are read at once */
    LOW_BITS = 7,                   /* of the lower byte of a factor that is split */
    QUERY_STEPS = 127 << LOW_BITS,  /* the largest query, whose bytes have a sign */
    WEIGHT_STEPS = 255 << LOW_BITS, /* the largest weight, whose bytes have none */
};

enum cache { CACHE_F32, CACHE_BF16, CACHE_INT8 };

/* What all blocks of a tile have in common. */
struct shape {
    int64_t rows;                   /* queries * group: the heads of a query are neighbours */
    int64_t group;
    int64_t head_dim;
    enum words words;
    enum cache cache;
    int64_t position;               /* of the first query */
    int64_t window;                 /* 0: none */
    float scale;
};

/* A block of keys of one head, wherever they lie. */
struct keys {
    int64_t first;                  /* position of the first key */
    int64_t count;                  /* <= KEY_BLOCK */
    const char *k;
    const char *v;
    const int64_t *offsets;         /* [count] bytes from k and v to each key's and value's head */
    const char *k_scales;           /* NULL unless CACHE_INT8 */
    const char *v_scales;
    const int64_t *scale_offsets;
};

/* The words for a cache and queries of a dtype. */
INLINE enum words choose_words(enum cache cache, int64_t dtype, int64_t head_dim) {
    if (HAS_QUADS && dtype == BF16 && cache == CACHE_INT8 && head_dim % 16 == 0) {
        return QUADS;
    }
    return HAS_PAIRS && dtype == BF16 ? PAIRS : FLOATS;
}

/* Elements in a word. */
INLINE int64_t word_items(enum words words) {
    return words == QUADS ? 4 : words == PAIRS ? 2 : 1;
}

/* Rows of a product for each row of a tile. */
INLINE int64_t word_rows(enum words words) {
    return words == QUADS ? 2 : 1;
}

INLINE int64_t padded_dim(int64_t head_dim) {
    return divide_up(head_dim, VF) * VF;
}

/* Keys and values that will be needed soon. They are asked for a few lines at a time between other work: a processor
 * tracks some dozens of reads of memory, and more than that at once hold it up. */
struct ahead {
    const char *k;
    const char *v;
    const int64_t *offsets;         /* bytes from k and v, of each token */
    int64_t bytes;                  /* to read of each token */
    int64_t token, end;             /* the tokens to ask for */
    int64_t at;                     /* bytes of the first of them that were asked for */
    int64_t lines;                  /* of k, and as many of v, to ask for at a time */
};

/* Asks for the next lines. */
INLINE void fetch_ahead(struct ahead *ahead) {
    for (int64_t i = 0; i < ahead->lines && ahead->token < ahead->end; i++) {
        const int64_t offset = ahead->offsets[ahead->token] + ahead->at;
        __builtin_prefetch(ahead->k + offset, 0, 3);
        __builtin_prefetch(ahead->v + offset, 0, 3);
        ahead->at += LINE;
        if (ahead->at >= ahead->bytes) {
            ahead->at = 0;
            ahead->token++;
        }
    }
}

#endif
