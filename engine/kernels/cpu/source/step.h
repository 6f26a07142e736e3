/* What every operation of a step program is given, and how threads share its work.
 *
 * A program is a list of operations. All threads of a team run every operation, each taking a share of its work, with a
 * barrier between one operation and the next: what an operation writes, the next may read.
 *
 * An operation NAME is declared in a header as
 *
 *     struct NAME { ... };
 *     OPERATION(NAME);
 *
 * and library.py reads the header to build the same structure, so its fields are of int64_t, double or pointer type only,
 * one declaration a field. Rows are tokens: an operation works on step->tokens rows.
 *
 * A program runs on two steps: the one of all tokens, and the one of those whose results are wanted, which is a part of
 * it or the same. Each operation is given one of them, and need not know which.
 */
#ifndef MANTA_STEP_H
#define MANTA_STEP_H

#include <stdatomic.h>
#include <stdint.h>

struct step {
    int64_t tokens;
    int64_t sequences;
    const int64_t *rows;            /* [tokens] where they are among all tokens; NULL: they are all of them */
    const int64_t *token_ids;       /* [tokens] */
    const int64_t *positions;       /* [tokens] */
    const int64_t *slots;           /* [tokens] page * page_tokens + offset */
    const int32_t *cu_seq_q;        /* [sequences + 1] */
    const int32_t *context_lens;    /* [sequences] */
    const int32_t *page_table;      /* [sequences, page_table_stride] */
    int64_t page_table_stride;
    const float *cos_sin;           /* [tokens, rotary_dim] */
};

struct team {
    int index;                      /* this thread */
    int size;                       /* threads that run the operation */
    _Atomic int64_t *taken;         /* items of the operation that some thread has taken; 0 when it begins */
};

/* The first of `count` consecutive items that no other thread has; the caller stops once it is past the last item.
 * Handing work out as threads come for it keeps a thread that the system has slowed from holding up the others. */
static inline int64_t team_take(struct team *team, int64_t count) {
    return atomic_fetch_add_explicit(team->taken, count, memory_order_relaxed);
}

/* A fixed share of `items` for this thread: [*begin, *end). */
static inline void team_share(const struct team *team, int64_t items, int64_t *begin, int64_t *end) {
    *begin = items * team->index / team->size;
    *end = items * (team->index + 1) / team->size;
}

/* Where the row of an id is in a table of those of `rows` ids from `first` on; -1: it has none there. */
static inline int64_t held_row(int64_t id, int64_t first, int64_t rows) {
    return id >= first && id < first + rows ? id - first : -1;
}

/* Waits inside an operation until every thread of the team has come here; every thread must call it. */
void team_wait(void);

#define OPERATION(NAME) void NAME(const struct NAME *args, const struct step *step, struct team *team)

/* Values of the `dtype` fields. */
enum dtype { F32 = 0, BF16 = 1 };

/* Values of the `activation` and `gate` fields; NO_ACTIVATION where there is none. */
enum activation { NO_ACTIVATION = -1, SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };

#endif
