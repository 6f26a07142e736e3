/* The matrix product inside attention: small, in cache, and on words (see attention_words.h). */
#ifndef MANTA_ATTENTION_PRODUCT_H
#define MANTA_ATTENTION_PRODUCT_H

#include "attention_words.h"

/* Which numbers are multiplied: floats, pairs of bf16, or four int8, of which those of `a` or of `b` have a sign. Sums
 * of the latter are int32. */
enum factors { FLOAT_FLOAT, PAIR_PAIR, SIGNED_UNSIGNED, UNSIGNED_SIGNED };

/* The right side of a product, where it lies: rows of words in runs of run_depth. Vector v of columns of row k of run r
 * is at runs[r] + k * stride + columns[v]; all in bytes. */
struct panel {
    const char *runs[KEY_GROUPS];
    int64_t run_depth;
    int64_t stride;
    int64_t columns[LARGEST_HEAD_DIM / VF];
};

/* c [rows][columns] = a [rows][depth] b [depth][columns]. Strides of a and c are in words. Each element is summed over
 * the depth in order, so it does not depend on the rows and columns beside it. */
struct product {
    int64_t rows;
    int64_t columns;                /* a multiple of VF */
    int64_t depth;                  /* words */
    const uint32_t *a;
    int64_t a_stride;
    const struct panel *b;
    float *c;
    int64_t c_stride;
    bool add;                       /* to what c holds; not for int8 */
};

/* Asks for lines ahead, once for each word of depth. */
void multiply(enum factors factors, const struct product *product, struct ahead *ahead);

#endif
