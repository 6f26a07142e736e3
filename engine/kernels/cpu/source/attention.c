/* Attention over pages: runs the tasks of the plan, block of keys after block, and merges what was cut.
 * Owns the scratch memory and the way from a sequence's positions to the addresses of its keys. */
#include "attention.h"

#include "attention_block.h"
#include "attention_plan.h"

enum {
    PASS_BYTES = 1 << 18,           /* keys and values of a block of a pass; two of them stay in the L2 cache */
    PARTIAL_TILES = 2,              /* cut tiles that there is memory for, for each thread */
};

/* What a thread works in. */
struct workspace {
    struct block_buffers block;
    struct queries queries;         /* of all heads of a pass, one after the other */
    float *sums;                    /* [heads of a pass * rows][VF] */
    float *total;                   /* [heads of a pass * rows][state_stride] */
    float *segment;                 /* the same */
};

/* The key block that is attended, or the one after it. */
struct block {
    int64_t first, count;
    int64_t pages[KEY_GROUPS];      /* bytes from the first page to that of each group */
    int64_t slots[KEY_GROUPS];      /* tokens from there to the group */
};

/* Some heads, all queries and some segments of a tile. */
struct task {
    const struct attend *args;
    const struct step *step;
    const struct tile *tile;
    struct shape shape;
    struct workspace *workspace;
    float *partials;                /* of the tile; NULL if the tile is one task */
    int64_t head, heads;            /* of a pass */
    const struct tile *next;        /* what this thread attends afterwards, from key next_first on; NULL: unknown */
    int64_t next_first;
};

/* Rows of all heads of a pass. */
static int64_t pass_rows(const struct attend *args) {
    return tile_rows(args->heads, args->kv_heads);
}

static int64_t partial_rows(int64_t heads, int64_t threads) {
    return threads > 1 ? threads * PARTIAL_TILES * MOST_SEGMENTS * at_least(heads, TILE_ROWS) : 0;
}

/* ---- scratch ---- */

/* The next `bytes` of memory at `*offset`. */
static void *place(char *memory, int64_t *offset, int64_t bytes) {
    void *begin = memory + *offset;
    *offset += divide_up(bytes, LINE) * LINE;
    return begin;
}

/* A thread's workspace at `*offset` of `memory`, which is moved past it. */
static struct workspace workspace_at(
    char *memory, int64_t *offset, int64_t heads, int64_t kv_heads, int64_t head_dim) {
    const int64_t rows = tile_rows(heads, kv_heads), padded = padded_dim(head_dim), word = sizeof(uint32_t);
    const int64_t most_rows = rows * word_rows(QUADS);
    struct workspace workspace;
    workspace.block.k = place(memory, offset, head_dim * KEY_BLOCK * word);
    workspace.block.v = place(memory, offset, padded * KEY_BLOCK * word);
    workspace.block.scores = place(memory, offset, most_rows * KEY_BLOCK * word);
    workspace.block.weights = place(memory, offset, rows * KEY_BLOCK * word);
    workspace.block.values = place(memory, offset, most_rows * padded * word);
    workspace.queries.words = place(memory, offset, rows * head_dim * word);
    workspace.queries.scales = place(memory, offset, rows * word);
    workspace.queries.biases = place(memory, offset, rows * word);
    workspace.sums = place(memory, offset, rows * VF * word);
    workspace.total = place(memory, offset, rows * state_stride(head_dim) * word);
    workspace.segment = place(memory, offset, rows * state_stride(head_dim) * word);
    return workspace;
}

int64_t attend_scratch_bytes(int64_t threads, int64_t heads, int64_t kv_heads, int64_t head_dim) {
    int64_t bytes = 0;
    static char nowhere[1];
    workspace_at(nowhere, &bytes, heads, kv_heads, head_dim);
    return threads * bytes + partial_rows(heads, threads) * state_stride(head_dim) * (int64_t)sizeof(float);
}

/* ---- keys ---- */

static enum cache cache_of(const struct attend *args) {
    return args->k_scales != NULL ? CACHE_INT8 : args->dtype == F32 ? CACHE_F32 : CACHE_BF16;
}

/* Where the keys of a tile from `first` on lie, up to a block of them. */
static void locate(const struct task *task, const struct tile *tile, int64_t first, struct block *block) {
    const struct attend *args = task->args;
    const int32_t *pages = task->step->page_table + tile->sequence * task->step->page_table_stride;
    block->first = first;
    block->count = at_least(0, at_most(KEY_BLOCK, tile->end - first));
    for (int64_t i = 0; i * GROUP < block->count; i++) {
        const int64_t position = first + i * GROUP;
        block->pages[i] = pages[position / args->page_tokens] * args->page_stride;
        block->slots[i] = position % args->page_tokens;
    }
}

/* One head of a block. */
static void head_keys(const struct attend *args, const struct block *block, int64_t head, struct keys *keys) {
    const int64_t head_words = args->head_dim / cache_items(cache_of(args)) * args->page_tokens;
    const int64_t head_bytes = head_words * (int64_t)sizeof(uint32_t), token_bytes = head_bytes / args->page_tokens;
    keys->first = block->first;
    keys->count = block->count;
    for (int64_t i = 0; i * GROUP < block->count; i++) {
        const int64_t begin = block->pages[i] + head * head_bytes, slot = block->slots[i];
        keys->k[i] = (const char *)args->k + begin + slot * (int64_t)sizeof(uint32_t);
        keys->v[i] = (const char *)args->v + begin + slot * token_bytes;
        if (args->k_scales != NULL) {
            const int64_t scales = block->pages[i] + (head * args->page_tokens + slot) * (int64_t)sizeof(float);
            keys->k_scales[i] = (const float *)(const void *)((const char *)args->k_scales + scales);
            keys->v_scales[i] = (const float *)(const void *)((const char *)args->v_scales + scales);
        }
    }
}

/* What to ask for while a head of the block before is attended: the same head. */
static struct ahead ahead_of(const struct shape *shape, const struct keys *next) {
    const int64_t group_lines = shape->head_dim / cache_items(shape->cache);
    struct ahead ahead = {
        .runs = 2 * divide_up(next->count, GROUP),
        .run_lines = divide_up(group_lines, AHEAD_LINES) * AHEAD_LINES,
        .steps = {shape->page_tokens * (int64_t)sizeof(uint32_t), LINE},
    };
    for (int64_t run = 0; run < ahead.runs; run++) {
        ahead.begin[run] = run % 2 == 0 ? next->k[run / 2] : next->v[run / 2];
    }
    ahead.run = next_run(&ahead);
    return ahead;
}

/* ---- one pass over the keys ---- */

/* The queries of one head of the pass. */
static struct queries head_queries(const struct task *task, int64_t head) {
    const struct shape *shape = &task->shape;
    const int64_t words = shape->head_dim / word_items(shape->words), first = head * shape->rows;
    const struct queries *all = &task->workspace->queries;
    return (struct queries){
        .words = all->words + first * word_rows(shape->words) * words,
        .scales = all->scales + first,
        .biases = all->biases + first,
    };
}

static void load_pass(const struct task *task) {
    const struct attend *args = task->args;
    const int64_t group = task->shape.group;
    for (int64_t head = 0; head < task->heads; head++) {
        const struct queries queries = head_queries(task, head);
        const int64_t first_head = (task->head + head) * group;
        for (int64_t query = 0; query < task->tile->queries; query++) {
            const int64_t at = (task->tile->token + query) * args->q_stride + first_head * args->head_dim;
            pack_queries(&task->shape, args->q, args->dtype, at, query * group, group, &queries);
        }
    }
}

/* All heads of the pass against one block. */
static void attend_heads(const struct task *task, const struct block *block, const struct block *next, float *states) {
    const struct shape *shape = &task->shape;
    const int64_t stride = state_stride(shape->head_dim);
    for (int64_t head = 0; head < task->heads; head++) {
        struct keys keys, next_keys;
        head_keys(task->args, block, task->head + head, &keys);
        head_keys(task->args, next, task->head + head, &next_keys);
        struct ahead ahead = ahead_of(shape, &next_keys);
        const struct queries queries = head_queries(task, head);
        const int64_t row = head * shape->rows;
        attend_block(
            shape, &keys, &queries, &task->workspace->block, states + row * stride,
            task->workspace->sums + row * VF, &ahead);
    }
}

/* Where the states of the pass in segment `number` go: the tile's partial results, or the thread's own memory. */
static float *segment_states(const struct task *task, int64_t number, bool is_first) {
    if (task->partials == NULL) {
        return is_first ? task->workspace->total : task->workspace->segment;
    }
    const int64_t row = (number * task->args->kv_heads + task->head) * task->shape.rows;
    return task->partials + row * state_stride(task->args->head_dim);
}

static struct shape pass_shape(const struct task *task) {
    struct shape shape = task->shape;
    shape.rows *= task->heads;
    return shape;
}

static void attend_segment(const struct task *task, int64_t number, float *states, struct block blocks[2]) {
    const struct tile *tile = task->tile;
    const struct shape all = pass_shape(task);
    const int64_t begin = tile->begin + number * tile->segment, end = at_most(tile->end, begin + tile->segment);
    begin_states(&all, states, task->workspace->sums);
    for (int64_t first = begin; first < end; first += KEY_BLOCK) {
        const int64_t index = (first - tile->begin) / KEY_BLOCK;
        struct block *block = &blocks[index % 2], *next = &blocks[(index + 1) % 2];
        if (first + KEY_BLOCK >= tile->end && task->next != NULL) {
            locate(task, task->next, task->next_first, next);
        } else {
            locate(task, tile, first + KEY_BLOCK, next);
        }
        attend_heads(task, block, next, states);
    }
    end_states(&all, states, task->workspace->sums);
}

static void store_pass(const struct task *task) {
    const struct attend *args = task->args;
    const int64_t stride = state_stride(args->head_dim), group = task->shape.group;
    for (int64_t head = 0; head < task->heads; head++) {
        for (int64_t row = 0; row < task->shape.rows; row++) {
            const int64_t token = task->tile->token + row / group;
            const int64_t q_head = (task->head + head) * group + row % group;
            const float *state = task->workspace->total + (head * task->shape.rows + row) * stride;
            state_result(state, args->head_dim, args->dtype, args->y, (token * args->heads + q_head) * args->head_dim);
        }
    }
}

/* Segments [begin, end) for the heads of the pass. */
static void run_pass(const struct task *task, int64_t begin, int64_t end) {
    const struct tile *tile = task->tile;
    const int64_t stride = state_stride(task->args->head_dim);
    struct block blocks[2];
    const int64_t first = tile->begin + begin * tile->segment;
    locate(task, tile, first, &blocks[(first - tile->begin) / KEY_BLOCK % 2]);
    load_pass(task);
    for (int64_t number = begin; number < end; number++) {
        float *states = segment_states(task, number, number == begin);
        attend_segment(task, number, states, blocks);
        if (task->partials == NULL && number > begin) {
            for (int64_t row = 0; row < task->heads * task->shape.rows; row++) {
                merge_state(task->workspace->total + row * stride, states + row * stride, task->args->head_dim);
            }
        }
    }
    if (task->partials == NULL) {
        store_pass(task);
    }
}

/* ---- tasks ---- */

/* Heads of a pass: those whose rows fit a workspace and whose keys fit the cache; reads of all heads together are long
 * runs of memory. */
static int64_t pass_heads(const struct attend *args, int64_t rows) {
    const int64_t bytes = 2 * KEY_BLOCK * args->head_dim * (int64_t)sizeof(uint32_t) / cache_items(cache_of(args));
    return at_least(1, at_most(pass_rows(args) / rows, PASS_BYTES / bytes));
}

static struct shape tile_shape(const struct attend *args, const struct tile *tile) {
    const int64_t group = args->heads / args->kv_heads;
    const enum cache cache = cache_of(args);
    return (struct shape){
        .rows = tile->queries * group,
        .group = group,
        .head_dim = args->head_dim,
        .words = choose_words(cache, args->dtype, args->head_dim, args->deterministic),
        .cache = cache,
        .page_tokens = args->page_tokens,
        .position = tile->position,
        .window = args->window,
        .scale = (float)args->scale,
    };
}

/* The first segment of task `number`, which is one of the tile's. */
static int64_t first_segment(const struct tile *tile, int64_t number) {
    return tile->segments * ((number - tile->first_task) % tile->key_parts) / tile->key_parts;
}

/* Task `number` of a step, which is one of the tile's. Task `next_number`, of tile `next`, is to follow, unless that is
 * NULL. */
static void run_task(
    const struct attend *args, const struct step *step, const struct tile *tile, int64_t number,
    const struct tile *next, int64_t next_number, float *partials, struct workspace *workspace) {
    const int64_t part = number - tile->first_task;
    const int64_t key_part = part % tile->key_parts, head_part = part / tile->key_parts;
    const int64_t begin = first_segment(tile, number);
    const int64_t end = tile->segments * (key_part + 1) / tile->key_parts;
    const int64_t last_head = args->kv_heads * (head_part + 1) / tile->head_parts;
    struct task task = {
        .args = args,
        .step = step,
        .tile = tile,
        .shape = tile_shape(args, tile),
        .workspace = workspace,
        .partials = tile->key_parts > 1 ? partials + tile->first_partial * state_stride(args->head_dim) : NULL,
    };
    const int64_t heads = pass_heads(args, task.shape.rows);
    for (task.head = args->kv_heads * head_part / tile->head_parts; task.head < last_head; task.head += heads) {
        task.heads = at_most(heads, last_head - task.head);
        if (next != NULL && task.head + task.heads == last_head) {
            task.next = next;
            task.next_first = next->begin + first_segment(next, next_number) * next->segment;
        }
        run_pass(&task, begin, end);
    }
}

/* Merges the segments of one row, of [kv_heads][queries][group], into the first and stores the result. */
static void merge_row(const struct attend *args, const struct tile *tile, float *partials, int64_t row) {
    const int64_t group = args->heads / args->kv_heads, rows = tile->queries * args->heads;
    const int64_t stride = state_stride(args->head_dim);
    float *state = partials + (tile->first_partial + row) * stride;
    for (int64_t number = 1; number < tile->segments; number++) {
        merge_state(state, state + number * rows * stride, args->head_dim);
    }
    const int64_t head = row / (tile->queries * group), query = row / group % tile->queries;
    const int64_t q_head = head * group + row % group;
    const int64_t at = ((tile->token + query) * args->heads + q_head) * args->head_dim;
    state_result(state, args->head_dim, args->dtype, args->y, at);
}

static void merge_parts(const struct attend *args, struct plan plan, struct team *team, float *partials) {
    while (next_tile(&plan)) {
        if (plan.tile.key_parts > 1) {
            int64_t begin, end;
            team_share(team, plan.tile.queries * args->heads, &begin, &end);
            for (int64_t row = begin; row < end; row++) {
                merge_row(args, &plan.tile, partials, row);
            }
        }
    }
}

OPERATION(attend) {
    int64_t bytes = 0;
    struct workspace workspace = workspace_at(args->scratch, &bytes, args->heads, args->kv_heads, args->head_dim);
    int64_t offset = team->index * bytes;
    workspace = workspace_at(args->scratch, &offset, args->heads, args->kv_heads, args->head_dim);
    float *partials = (float *)((char *)args->scratch + team->size * bytes);
    const struct plan begin = plan_attention(args, step, team->size, partial_rows(args->heads, team->size));
    struct plan plan = begin;
    int64_t taken = team_take(team, 1);
    bool found = seek_task(&plan, taken);
    while (found) {
        /* Knowing the next task early, its first keys can be fetched; but near the end a thread that has nothing to do
         * may come for it first. */
        const struct tile tile = plan.tile;
        const int64_t number = taken;
        const bool early = has_plenty(&plan);
        if (early) {
            taken = team_take(team, 1);
            found = seek_task(&plan, taken);
        }
        const struct tile *next = early && found ? &plan.tile : NULL;
        run_task(args, step, &tile, number, next, taken, partials, &workspace);
        if (!early) {
            taken = team_take(team, 1);
            found = seek_task(&plan, taken);
        }
    }
    if (plan.partials > 0) {
        team_wait();
        merge_parts(args, begin, team, partials);
    }
}
