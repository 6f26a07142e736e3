/* What the parts of attention's arithmetic share: the words that products run on, the shape of a tile, a block of
 * keys.
 *
 * A word has 32 bits: a float, two neighbouring bf16 that the processor multiplies and adds as one (AVX-512 BF16), or
 * four neighbouring int8 (AVX-512 VNNI). An int8 cache is read as it is: the other factor, a query or the weights of
 * values, is split into two bytes, 15 bits together, which make two rows of the product. Where the processor has no
 * such instructions, the words of the cache become floats.
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
#define HAS_QUADS 0                 /* every int8 becomes a float */
#endif

enum {
    LINE = 64,                      /* bytes of memory that are read at once */
    KEY_GROUPS = KEY_BLOCK / GROUP,
    AHEAD_LINES = 4,                /* asked for at a time, with each word of the depth of a product */
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
    int64_t page_tokens;
    int64_t position;               /* of the first query */
    int64_t window;                 /* 0: none */
    float scale;
};

/* A block of keys of one head: groups of GROUP, wherever they lie (see the layout of a page in attention.h). */
struct keys {
    int64_t first;                  /* position of the first key */
    int64_t count;                  /* <= KEY_BLOCK */
    const char *k[KEY_GROUPS];      /* the first words of a group's keys; the next ones page_tokens words on */
    const char *v[KEY_GROUPS];
    const float *k_scales[KEY_GROUPS];          /* [GROUP] each; not set unless CACHE_INT8 */
    const float *v_scales[KEY_GROUPS];
};

/* The words for a cache and queries of a dtype. The weights of quads are rounded in steps that follow all keys of a block,
 * also those that a query does not see yet: that is not deterministic. */
INLINE enum words choose_words(enum cache cache, int64_t dtype, int64_t head_dim, bool deterministic) {
    if (HAS_QUADS && dtype == BF16 && cache == CACHE_INT8 && head_dim % 16 == 0 && !deterministic) {
        return QUADS;
    }
    return HAS_PAIRS && cache == CACHE_BF16 ? PAIRS : FLOATS;
}

/* Elements in a word of a product. */
INLINE int64_t word_items(enum words words) {
    return words == QUADS ? 4 : words == PAIRS ? 2 : 1;
}

/* Elements in a word of the cache. */
INLINE int64_t cache_items(enum cache cache) {
    return cache == CACHE_INT8 ? 4 : cache == CACHE_BF16 ? 2 : 1;
}

/* Rows of a product for each row of a tile. */
INLINE int64_t word_rows(enum words words) {
    return words == QUADS ? 2 : 1;
}

INLINE int64_t padded_dim(int64_t head_dim) {
    return divide_up(head_dim, VF) * VF;
}

/* Keys and values that will be needed soon, in runs of lines: a group's keys, its values, the next group's keys and so
 * on. They are asked for a few at a time between other work: a processor tracks some dozens of reads of memory, and more
 * than that at once hold it up. They go to the second cache, which tracks more of them than the first: what a block of
 * all heads has would not stay in the first anyway. */
struct ahead {
    struct run {
        const char *line;           /* the next one to ask for */
        int64_t step;               /* bytes from line to line; 0 once all lines of all runs were asked for */
        const char *end;
    } run;
    int64_t begun, runs;            /* how many were begun, and how many there are */
    int64_t run_lines;              /* a multiple of AHEAD_LINES; the last ones may lie past a group */
    const char *begin[2 * KEY_GROUPS];
    int64_t steps[2];               /* of keys, of values */
};

/* The next run. Once there is none, the same line is asked for again and again, which costs nothing. */
INLINE struct run next_run(struct ahead *ahead) {
    if (ahead->begun == ahead->runs) {
        return (struct run){.line = (const char *)ahead};
    }
    const char *begin = ahead->begin[ahead->begun];
    const int64_t step = ahead->steps[ahead->begun % 2];
    ahead->begun++;
    return (struct run){begin, step, begin + ahead->run_lines * step};
}

/* Asks for AHEAD_LINES of the run; `run` is a copy of ahead->run, in registers. */
INLINE void fetch_ahead(struct run *run, struct ahead *ahead) {
#pragma GCC unroll 4
    for (int i = 0; i < AHEAD_LINES; i++) {
        __builtin_prefetch(run->line + i * run->step, 0, 2);
    }
    run->line += AHEAD_LINES * run->step;
    if (__builtin_expect(run->line == run->end, 0)) {
        *run = next_run(ahead);
    }
}

#endif
