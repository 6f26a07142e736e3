/* How the attention of one step is cut into tasks. Pure: reads lengths alone, and every thread that plans the same
 * step for the same number of threads finds the same tasks.
 *
 * A tile is some consecutive queries of one sequence with all of their heads. Its keys are cut into segments whose
 * bounds follow from the tile alone; each segment is attended by itself and the results are merged in order
 * (flash-decoding; Dao et al., 2023). So whether a tile is one task or many, and beside which other sequences it lies,
 * changes no bit of it. Where results are to be deterministic, segments are the same for all tiles of a sequence: then not
 * even the chunks that it comes in do.
 */
#ifndef MANTA_ATTENTION_PLAN_H
#define MANTA_ATTENTION_PLAN_H

#include <stdbool.h>

#include "attention.h"

enum {
    KEY_BLOCK = 64,                 /* keys that are scored, weighted and summed at once */
    TILE_ROWS = 96,                 /* rows (queries * heads of a group) of a tile at most, or one whole group */
    LIGHT_ROWS = 16,                /* up to so many rows, reading the keys takes longer than the arithmetic */
    LEAST_SEGMENT = 512,            /* keys */
    LEAST_HEAVY_SEGMENT = 2048,     /* of more than LIGHT_ROWS rows: their tiles are many, and merging costs by the row */
    MOST_SEGMENTS = 16,
    FIXED_SEGMENT = 1024,           /* where bounds must not follow from the tile either */
};

struct tile {
    int64_t sequence;
    int64_t token;                  /* of the first query, on the flat axis */
    int64_t queries;
    int64_t position;               /* of the first query, in its sequence */
    int64_t begin, end;             /* keys that some query sees, from a multiple of GROUP on */
    int64_t segment;                /* keys in a segment, a multiple of KEY_BLOCK */
    int64_t segments;
    int64_t key_parts, head_parts;  /* tasks: their product */
    int64_t first_task;
    int64_t first_partial;          /* row of partial results, where there are several key_parts */
};

/* A walk over the tiles of a step, large ones first. */
struct plan {
    const struct attend *args;
    const struct step *step;
    int64_t threads;
    int64_t partial_rows;           /* rows that there is memory for */
    int64_t remaining;              /* cost of the tiles still to come */
    int64_t tasks;                  /* of the tiles so far */
    int64_t partials;               /* rows that the tiles so far use */
    bool light;                     /* the walk is past the chunks, and at the sequences with few queries */
    int64_t sequence;
    int64_t tiles;                  /* of the sequence, still to come */
    struct tile tile;               /* where the walk is */
};

/* Begins a walk. */
struct plan plan_attention(
    const struct attend *args, const struct step *step, int64_t threads, int64_t partial_rows);

/* Goes to the next tile; false if there is none. */
bool next_tile(struct plan *plan);

/* Goes on to the tile of task `number`; false if there are not so many tasks. */
bool seek_task(struct plan *plan, int64_t number);

/* Whether what follows the tile keeps all threads busy for longer than the tile takes. */
bool has_plenty(const struct plan *plan);

/* The largest number of rows in a tile. */
int64_t tile_rows(int64_t heads, int64_t kv_heads);

static inline int64_t at_most(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static inline int64_t at_least(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static inline int64_t divide_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

#endif
