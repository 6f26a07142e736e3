/* The walk over a step's tiles and the choice of how many tasks each becomes. */
#include "attention_plan.h"

enum {
    KEY_COST = 5,                   /* of reading and packing a key, in rows of arithmetic with it; measured */
    SMALLEST_TASK = 4096,           /* cost below which a task is not cut further: a few microseconds */
    SHARES = 2,                     /* tasks that each thread should still find when a large one is handed out */
};

int64_t tile_rows(int64_t heads, int64_t kv_heads) {
    return at_least(TILE_ROWS, heads / kv_heads);
}

/* Queries of a sequence that make a tile. */
static int64_t tile_queries(const struct attend *args) {
    return at_least(1, TILE_ROWS * args->kv_heads / args->heads);
}

static int64_t num_queries(const struct plan *plan, int64_t sequence) {
    return plan->step->cu_seq_q[sequence + 1] - plan->step->cu_seq_q[sequence];
}

static bool are_light(const struct attend *args, int64_t queries) {
    return queries * args->heads <= LIGHT_ROWS * args->kv_heads;
}

static int64_t cost(const struct plan *plan, const struct tile *tile) {
    const int64_t rows = tile->queries * plan->args->heads;
    return (tile->end - tile->begin) * (KEY_COST * plan->args->kv_heads + rows);
}

/* Goes to the next sequence of the walk that has tiles: chunks first, then the light ones. */
static bool next_sequence(struct plan *plan) {
    for (;;) {
        plan->sequence++;
        if (plan->sequence == plan->step->sequences) {
            if (plan->light) {
                return false;
            }
            plan->light = true;
            plan->sequence = -1;
            continue;
        }
        const int64_t queries = num_queries(plan, plan->sequence);
        if (queries > 0 && are_light(plan->args, queries) == plan->light) {
            plan->tiles = divide_up(queries, tile_queries(plan->args));
            return true;
        }
    }
}

/* The bounds of the tile that `plan` is at. */
static struct tile bounds(const struct plan *plan) {
    const int64_t size = tile_queries(plan->args), queries = num_queries(plan, plan->sequence);
    const int64_t first = plan->tiles * size;
    struct tile tile = {
        .sequence = plan->sequence,
        .token = plan->step->cu_seq_q[plan->sequence] + first,
        .queries = at_most(size, queries - first),
        .position = plan->step->context_lens[plan->sequence] - queries + first,
        .key_parts = 1,
        .head_parts = 1,
    };
    const int64_t seen = plan->args->window > 0 ? at_least(0, tile.position - plan->args->window + 1) : 0;
    const int64_t unit = plan->args->deterministic ? FIXED_SEGMENT : GROUP;
    tile.begin = seen / unit * unit;
    tile.end = tile.position + tile.queries;
    const int64_t keys = tile.end - tile.begin;
    const int64_t even = divide_up(divide_up(keys, MOST_SEGMENTS), KEY_BLOCK) * KEY_BLOCK;
    tile.segment = at_least(are_light(plan->args, tile.queries) ? LEAST_SEGMENT : LEAST_HEAVY_SEGMENT, even);
    if (plan->args->deterministic) {
        tile.segment = FIXED_SEGMENT;
    }
    tile.segments = divide_up(keys, tile.segment);
    return tile;
}

/* Cuts a tile that is large beside what remains, so that the threads end together (guided self-scheduling;
 * Polychronopoulos & Kuck, 1987). Few rows are cut by keys first, which keeps reads of memory in long runs; many rows
 * by heads, which needs no merge. */
static void cut(struct plan *plan, struct tile *tile, int64_t tile_cost) {
    const int64_t share = at_least(SMALLEST_TASK, plan->remaining / (SHARES * plan->threads));
    if (plan->threads == 1 || tile_cost <= share) {
        return;
    }
    const struct attend *args = plan->args;
    const int64_t parts = divide_up(tile_cost, share);
    const int64_t rows = tile->segments * tile->queries * args->heads;
    const int64_t most_key_parts = plan->partials + rows <= plan->partial_rows ? tile->segments : 1;
    if (plan->light) {
        tile->key_parts = at_most(parts, most_key_parts);
        tile->head_parts = at_most(divide_up(parts, tile->key_parts), args->kv_heads);
    } else {
        tile->head_parts = at_most(parts, args->kv_heads);
        tile->key_parts = at_most(divide_up(parts, tile->head_parts), most_key_parts);
    }
    if (tile->key_parts > 1) {
        tile->first_partial = plan->partials;
        plan->partials += rows;
    }
}

static bool next_bounds(struct plan *plan) {
    if (plan->tiles == 0 && !next_sequence(plan)) {
        return false;
    }
    plan->tiles--;
    plan->tile = bounds(plan);
    return true;
}

static void rewind_plan(struct plan *plan) {
    plan->light = false;
    plan->sequence = -1;
    plan->tiles = 0;
}

struct plan plan_attention(
    const struct attend *args, const struct step *step, int64_t threads, int64_t partial_rows) {
    struct plan plan = {.args = args, .step = step, .threads = threads, .partial_rows = partial_rows};
    rewind_plan(&plan);
    while (next_bounds(&plan)) {
        plan.remaining += cost(&plan, &plan.tile);
    }
    rewind_plan(&plan);
    return plan;
}

bool next_tile(struct plan *plan) {
    const int64_t first_task = plan->tasks;
    if (!next_bounds(plan)) {
        return false;
    }
    const int64_t tile_cost = cost(plan, &plan->tile);
    cut(plan, &plan->tile, tile_cost);
    plan->remaining -= tile_cost;
    plan->tile.first_task = first_task;
    plan->tasks += plan->tile.key_parts * plan->tile.head_parts;
    return true;
}

bool seek_task(struct plan *plan, int64_t number) {
    while (plan->tasks <= number) {
        if (!next_tile(plan)) {
            return false;
        }
    }
    return true;
}

bool has_plenty(const struct plan *plan) {
    return plan->remaining > 2 * plan->threads * cost(plan, &plan->tile);
}
