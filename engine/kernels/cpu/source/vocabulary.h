/* Reductions over the vocabulary: the largest logits of each row, and the logarithm of its sum of exponentials.
 *
 * Logits are float32 [rows, vocabulary], rows `stride` elements apart. No row's result depends on the rows beside it, or on
 * the number of threads. These are functions by themselves, not operations of a program: what follows them is decided in
 * Python. */
#ifndef MANTA_VOCABULARY_H
#define MANTA_VOCABULARY_H

#include <stdint.h>

struct logits {
    const float *values;
    int64_t rows;
    int64_t vocabulary;
    int64_t stride;
};

/* The largest value of each row and the lowest id that has it, to values [rows] and ids [rows]; NaN and the id of one if
 * the row has any. */
void largest_of_rows(const struct logits *logits, int64_t threads, float *values, int64_t *ids);

/* The `k` largest values of each row, largest first, equal ones by rising id, to values [rows, k] and ids [rows, k].
 * 1 <= k <= vocabulary. A NaN counts as -inf. Returns 0, or ENOMEM. */
int64_t k_largest_of_rows(const struct logits *logits, int64_t k, int64_t threads, float *values, int64_t *ids);

/* log(sum(exp(row))) to sums [rows]; NaN if the row has a NaN or +inf, -inf if it is all -inf. */
void log_sum_exp_of_rows(const struct logits *logits, int64_t threads, double *sums);

#endif
