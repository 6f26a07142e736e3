/* Reductions over the vocabulary. See vocabulary.h. */
#include "vocabulary.h"

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "team.h"
#include "vector.h"

/* Neighbouring logits that are first looked at together: their maximum tells whether any of them matters. */
#define BLOCK 64
#define SMALL_BLOCK 16
/* Logits for which it pays to wake another thread. */
#define LOGITS_PER_THREAD 32768

/* ---- blocks ---- */

/* A block that may reach past the end of its row: there, copied to `room` and filled up with -inf. */
INLINE const float *whole_block(const float *logits, int64_t count, int64_t size, float *room) {
    if (count >= size) {
        return logits;
    }
    for (int64_t i = 0; i < size; i++) {
        room[i] = i < count ? logits[i] : -INFINITY;
    }
    return room;
}

/* The largest of a block, leaving NaN out; lanes in which there is one are added to `nan`. `size` is a constant. */
INLINE float block_maximum(const float *block, int64_t size, vi *nan) {
    vf best = vf_set(-INFINITY);
#pragma GCC unroll 8
    for (int64_t i = 0; i < size; i += VF) {
        const vf x = vf_load(block + i);
        *nan |= x != x;
        best = vf_max(x, best);
    }
    return vf_largest(best);
}

/* ---- threads: each takes row after row ---- */

struct rows {
    void (*reduce)(const struct rows *rows, int64_t row, void *scratch);
    const struct logits *logits;
    void *values;
    int64_t *ids;
    int64_t k;
    char *scratch;                  /* of each thread, scratch_bytes apart */
    int64_t scratch_bytes;
    _Atomic int64_t taken;
};

static const float *row_of(const struct rows *rows, int64_t row) {
    return rows->logits->values + row * rows->logits->stride;
}

static void reduce_rows(void *data, struct team *team) {
    struct rows *rows = data;
    team->taken = &rows->taken;
    for (int64_t row = team_take(team, 1); row < rows->logits->rows; row = team_take(team, 1)) {
        rows->reduce(rows, row, rows->scratch + team->index * rows->scratch_bytes);
    }
}

static int64_t useful_threads(const struct logits *logits, int64_t threads) {
    const int64_t useful = logits->rows * logits->vocabulary / LOGITS_PER_THREAD;
    const int64_t most = useful < logits->rows ? useful : logits->rows;
    return most < 1 ? 1 : most < threads ? most : threads;
}

/* ---- the largest ---- */

static void reduce_to_largest(const struct rows *rows, int64_t row, void *scratch) {
    (void)scratch;
    const float *logits = row_of(rows, row);
    const int64_t vocabulary = rows->logits->vocabulary;
    vi nan = {0};
    float room[BLOCK], largest = -INFINITY;
    int64_t block = 0;
    for (int64_t i = 0; i < vocabulary; i += BLOCK) {
        const float maximum = block_maximum(whole_block(logits + i, vocabulary - i, BLOCK, room), BLOCK, &nan);
        if (maximum > largest) {
            largest = maximum;
            block = i;
        }
    }
    bool has_nan = false;
    for (int i = 0; i < VF; i++) {
        has_nan |= nan[i] != 0;
    }
    int64_t id = has_nan ? 0 : block;
    while (has_nan ? logits[id] == logits[id] : logits[id] != largest) {
        id++;
    }
    ((float *)rows->values)[row] = logits[id];
    rows->ids[row] = id;
}

void largest_of_rows(const struct logits *logits, int64_t threads, float *values, int64_t *ids) {
    struct rows rows = {.reduce = reduce_to_largest, .logits = logits, .values = values, .ids = ids};
    run_team(reduce_rows, &rows, useful_threads(logits, threads));
}

/* ---- the k largest ----
 *
 * As in LightSeq's hierarchical search (Wang et al., 2021, section 3.2): a row is divided into blocks; the k-th largest of
 * their maxima is at most the k-th largest logit, so only what reaches it can be among the k, and only the blocks whose
 * maxima reach it have to be looked at again. That leaves little more than k candidates, which are sorted. */

struct candidate {
    uint32_t key;                   /* rises as the value falls */
    int32_t id;
};

struct search {
    float *maxima;                  /* of each block */
    struct candidate *candidates;
    struct candidate *room;         /* for as many */
};

static struct candidate candidate_of(float value, int64_t id) {
    union {
        float value;
        uint32_t bits;
    } number = {value > -INFINITY ? value + 0.0f : -INFINITY};  /* NaN is -inf; -0 equals 0, so it becomes 0 */
    const uint32_t negative = number.bits >> 31;
    return (struct candidate){negative ? number.bits : ~number.bits & INT32_MAX, (int32_t)id};
}

/* Sorts by rising key, equal ones in the order in which they came: a radix sort, the lowest byte first. */
static void sort_candidates(struct candidate *candidates, struct candidate *room, int64_t count) {
    enum { DIGITS = 256, DIGIT_BITS = 8 };
    struct candidate *from = candidates, *to = room;
    for (int shift = 0; shift < 32; shift += DIGIT_BITS) {
        int64_t places[DIGITS] = {0}, before = 0;
        for (int64_t i = 0; i < count; i++) {
            places[from[i].key >> shift & (DIGITS - 1)]++;
        }
        if (places[from[0].key >> shift & (DIGITS - 1)] == count) {
            continue;               /* all have this digit */
        }
        for (int64_t digit = 0; digit < DIGITS; digit++) {
            const int64_t here = places[digit];
            places[digit] = before;
            before += here;
        }
        for (int64_t i = 0; i < count; i++) {
            to[places[from[i].key >> shift & (DIGITS - 1)]++] = from[i];
        }
        struct candidate *const sorted = to;
        to = from;
        from = sorted;
    }
    if (from != candidates) {
        memcpy(candidates, from, (size_t)count * sizeof *candidates);
    }
}

/* How many logits a block has, so that there are enough blocks for their maxima to tell something; a row that is short
 * for its k is one block, and all of it is sorted. */
static int64_t block_size(int64_t vocabulary, int64_t k) {
    return 2 * k * BLOCK <= vocabulary ? BLOCK : 2 * k * SMALL_BLOCK <= vocabulary ? SMALL_BLOCK : vocabulary;
}

INLINE void find_maxima(const float *logits, int64_t vocabulary, int64_t size, float *maxima) {
    vi nan = {0};
    float room[BLOCK];
    for (int64_t i = 0; i < vocabulary; i += size) {
        maxima[i / size] = block_maximum(whole_block(logits + i, vocabulary - i, size, room), size, &nan);
    }
}

/* Maxima of the row's blocks, and a value which at least k of its logits reach. */
static float lower_bound(const float *logits, int64_t vocabulary, int64_t k, int64_t size, const struct search *search) {
    if (size == vocabulary) {
        search->maxima[0] = INFINITY;
        return -INFINITY;
    }
    if (size == BLOCK) {
        find_maxima(logits, vocabulary, BLOCK, search->maxima);
    } else {
        find_maxima(logits, vocabulary, SMALL_BLOCK, search->maxima);
    }
    const int64_t blocks = (vocabulary + size - 1) / size;
    for (int64_t i = 0; i < blocks; i++) {
        search->candidates[i] = candidate_of(search->maxima[i], i);
    }
    sort_candidates(search->candidates, search->room, blocks);
    return search->maxima[search->candidates[k - 1].id];
}

static void reduce_to_k_largest(const struct rows *rows, int64_t row, void *scratch) {
    const float *logits = row_of(rows, row);
    const int64_t vocabulary = rows->logits->vocabulary, k = rows->k, size = block_size(vocabulary, k);
    struct candidate *candidates = scratch;
    const struct search search = {(float *)(candidates + 2 * vocabulary), candidates, candidates + vocabulary};
    const float bound = lower_bound(logits, vocabulary, k, size, &search);
    int64_t count = 0;
    for (int64_t i = 0; i < vocabulary; i += size) {
        if (search.maxima[i / size] < bound) {
            continue;
        }
        for (int64_t id = i; id < vocabulary && id < i + size; id++) {
            if (!(logits[id] < bound)) {        /* so NaN is taken, as a row may have nothing else */
                candidates[count++] = candidate_of(logits[id], id);
            }
        }
    }
    sort_candidates(candidates, search.room, count);
    for (int64_t i = 0; i < k; i++) {
        rows->ids[row * k + i] = candidates[i].id;
        ((float *)rows->values)[row * k + i] = logits[candidates[i].id];
    }
}

int64_t k_largest_of_rows(const struct logits *logits, int64_t k, int64_t threads, float *values, int64_t *ids) {
    threads = useful_threads(logits, threads);
    const int64_t blocks = logits->vocabulary / SMALL_BLOCK + 1;
    const int64_t bytes = logits->vocabulary * 2 * (int64_t)sizeof(struct candidate) + blocks * (int64_t)sizeof(float);
    /* Memory that is not touched costs nothing, and only a row of many equal logits touches much of it. */
    char *scratch = malloc((size_t)(threads * bytes));
    if (scratch == NULL) {
        return ENOMEM;
    }
    struct rows rows = {
        .reduce = reduce_to_k_largest, .logits = logits, .values = values, .ids = ids, .k = k, .scratch = scratch,
        .scratch_bytes = bytes};
    run_team(reduce_rows, &rows, threads);
    free(scratch);
    return 0;
}

/* ---- the logarithm of the sum of exponentials ---- */

static void reduce_to_log_sum_exp(const struct rows *rows, int64_t row, void *scratch) {
    (void)scratch;
    const float *logits = row_of(rows, row);
    const int64_t vocabulary = rows->logits->vocabulary;
    vi nan = {0};
    float room[BLOCK], largest = -INFINITY;
    for (int64_t i = 0; i < vocabulary; i += BLOCK) {
        const float maximum = block_maximum(whole_block(logits + i, vocabulary - i, BLOCK, room), BLOCK, &nan);
        largest = maximum > largest ? maximum : largest;
    }
    /* From a finite number, so that a row of -inf sums to 0; inf - inf and NaN make the sum NaN. */
    const float from = largest == -INFINITY ? 0.0f : largest;
    double sum = 0.0;
    for (int64_t i = 0; i < vocabulary; i += BLOCK) {
        const float *block = whole_block(logits + i, vocabulary - i, BLOCK, room);
        vf part = vf_set(0.0f);
        for (int64_t j = 0; j < BLOCK; j += VF) {
            part += vf_exp(vf_load(block + j) - from);
        }
        sum += vf_sum(part);
    }
    ((double *)rows->values)[row] = from + log(sum);
}

void log_sum_exp_of_rows(const struct logits *logits, int64_t threads, double *sums) {
    struct rows rows = {.reduce = reduce_to_log_sum_exp, .logits = logits, .values = sums};
    run_team(reduce_rows, &rows, useful_threads(logits, threads));
}
