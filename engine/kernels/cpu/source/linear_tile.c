/* Divides a product among threads and takes a tile through it. Knows no form of a weight. */
#include "linear_tile.h"

/* Rows of a tile, where a weight has so many: as many as share a panel well, and few enough that all threads have
 * something to do. */
static int64_t tile_rows(const struct product *product, int64_t rows, int64_t panels, int64_t threads) {
    int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    while (tiles * panels < 2 * threads && tiles * product->block_rows < rows) {
        tiles++;
    }
    return tiles == 0 ? 1 : (rows + tiles - 1) / tiles;
}

/* One chunk of a panel for all rows of a tile, in blocks of equal height. `block` has what they share; `next` is the
 * chunk that this thread multiplies next, or NULL. */
static void multiply_chunk(struct block block, int64_t rows, const char *next) {
    const struct product *product = block.product;
    const int64_t blocks = (rows + product->block_rows - 1) / product->block_rows;
    const int64_t lines = block.units * product->unit_bytes / STEP_BYTES;
    const struct block first = block;
    block.ahead_step = next == NULL ? 0 : (STEP_BYTES + blocks - 1) / blocks;
    /* The first cache waits for a dozen or two of lines at a time, which keeps memory no more than half busy, and a
     * chunk does not fit beside the rows of x. Where arithmetic takes longer, it is served best from there: a short
     * panel stays, and of a long one the lines that leave are in the second. */
    block.near = rows > product->far_rows;
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t begin = rows * i / blocks, end = rows * (i + 1) / blocks;
        block.rows = end - begin;
        block.x = first.x + begin * block.x_stride;
        block.x_sums = first.x_sums == NULL ? NULL : first.x_sums + begin * product->x_sums_stride;
        block.sums = first.sums + begin * PANEL;
        block.ahead = next == NULL ? block.weight : next + i * lines * block.ahead_step;
        if (blocks == 1) {
            /* Used once, the weight is one stream from panel to panel: what comes soon is what must be fetched. */
            block.ahead = block.weight + SINGLE_AHEAD;
            block.ahead_step = STEP_BYTES;
        }
        product->multiply(&block);
    }
}

static void multiply_tile(
    const struct product *product, int64_t panel, int64_t next_panel, int64_t row, int64_t rows, float *sums) {
    const char *weight = product->weight + panel * product->panel_bytes;
    const char *next = next_panel < 0 ? NULL : product->weight + next_panel * product->panel_bytes;
    /* Chunks of equal length, because each fetches as much as it has itself. */
    const int64_t panel_units = product->units > 0 ? product->units : 1;
    const int64_t chunks = (panel_units * product->unit_bytes + CHUNK_BYTES - 1) / CHUNK_BYTES;
    const int64_t chunk = (panel_units + chunks - 1) / chunks;
    int64_t unit = 0;
    do {
        const int64_t left = product->units - unit;
        const struct block block = {
            .x = product->x + row * product->x_stride + unit * product->x_unit_bytes,
            .x_stride = product->x_stride,
            .weight = weight + unit * product->unit_bytes,
            .units = left < chunk ? left : chunk,
            .tail_bytes = left <= chunk ? product->tail_bytes : 0,
            .x_sums = product->x_sums == NULL
                ? NULL
                : product->x_sums + row * product->x_sums_stride + unit * product->x_unit_sums,
            .sums = sums,
            .resume = unit > 0,
            .product = product,
        };
        unit += block.units;
        multiply_chunk(block, rows, unit < product->units ? weight + unit * product->unit_bytes : next);
    } while (unit < product->units);
}

/* ---- a finished tile: bias, gate, and rounding into y ---- */

struct tile {
    const struct product *product;
    int64_t panel;                  /* over all weights; -1: there is no tile left */
    int64_t own_panel;              /* of its weight */
    int64_t row;
    int64_t rows;
    const float *sums;
};

/* VF columns of one row of a tile with their bias. */
INLINE vf biased(const struct tile *tile, int64_t row, int64_t column) {
    const vf sums = vf_load(tile->sums + row * PANEL + column);
    const float *bias = tile->product->bias;
    return bias == NULL ? sums : sums + vf_load(bias + tile->panel * PANEL + column);
}

/* `gate` and `dtype` are constants. */
INLINE void finish_rows(const struct tile *tile, int64_t gate, int64_t dtype) {
    const struct product *product = tile->product;
    const int64_t span = gate == NO_ACTIVATION ? PANEL : PANEL / 2;
    const int64_t width = gate == NO_ACTIVATION ? product->out : product->out / 2;
    const int64_t first = tile->own_panel * span, columns = width - first < span ? width - first : span;
    for (int64_t i = 0; i < tile->rows; i++) {
        for (int64_t column = 0; column < columns; column += VF) {
            vf value = biased(tile, i, column);
            if (gate != NO_ACTIVATION) {
                value = activation_of(gate, value) * biased(tile, i, span + column);
            }
            vf_put(product->y, dtype, (tile->row + i) * width + first + column, columns - column, value);
        }
    }
}

INLINE void finish_gated(const struct tile *tile, int64_t gate) {
    if (tile->product->y_dtype == F32) {
        finish_rows(tile, gate, F32);
    } else {
        finish_rows(tile, gate, BF16);
    }
}

static void finish_tile(const struct tile *tile) {
    switch (tile->product->gate) {
    case SILU:
        finish_gated(tile, SILU);
        break;
    case GELU:
        finish_gated(tile, GELU);
        break;
    case GELU_TANH:
        finish_gated(tile, GELU_TANH);
        break;
    case RELU:
        finish_gated(tile, RELU);
        break;
    default:
        finish_gated(tile, NO_ACTIVATION);
    }
}

/* ---- threads ---- */

/* Consecutive items that are this thread's. Neighbouring panels are one stream of memory: what the machine's own
 * prefetchers fetch beyond a panel is then what this thread needs next, and not what another thread has. */
struct run {
    int64_t next;
    int64_t end;
};

/* This thread's next item of `items`; no less than `items` when there is none. The more is left the longer is the run,
 * so that threads end together (guided self-scheduling: Polychronopoulos and Kuck, 1987). */
static int64_t take_item(struct run *run, int64_t items, struct team *team) {
    if (run->next == run->end) {
        int64_t taken = atomic_load_explicit(team->taken, memory_order_relaxed), count;
        do {
            const int64_t part = (items - taken) / (2 * team->size);
            count = part > 1 ? part : 1;
        } while (!atomic_compare_exchange_weak_explicit(
            team->taken, &taken, taken + count, memory_order_relaxed, memory_order_relaxed));
        run->next = taken;
        run->end = taken + count;
    }
    return run->next++;
}

/* A thread's way through the tiles: weight by weight, of each the panels of its first rows, then those of the next. Items
 * come in rising order, so it never looks back. */
struct way {
    const struct product *product;
    int64_t panels;                 /* of each weight */
    int64_t items;                  /* of all weights */
    int64_t weight;                 /* that this thread has come to */
    int64_t first;                  /* item of that weight */
    int64_t count;                  /* of its items */
    int64_t height;                 /* of its tiles, but for the last ones */
    struct run run;
};

static int64_t rows_of(const struct product *product, int64_t weight) {
    return product->offsets[weight + 1] - product->offsets[weight];
}

static void come_to(struct way *way, int64_t weight, const struct team *team) {
    const int64_t rows = rows_of(way->product, weight);
    way->weight = weight;
    way->height = tile_rows(way->product, rows, way->panels, team->size);
    way->count = (rows + way->height - 1) / way->height * way->panels;
}

static struct way begin_way(const struct product *product, const struct team *team) {
    struct way way = {.product = product, .panels = panel_count(product->out, product->gate != NO_ACTIVATION)};
    for (int64_t weight = product->weights - 1; weight >= 0; weight--) {
        come_to(&way, weight, team);
        way.items += way.count;
    }
    return way;
}

static struct tile next_tile(struct way *way, struct team *team) {
    const int64_t item = take_item(&way->run, way->items, team);
    if (item >= way->items) {
        return (struct tile){.panel = -1};
    }
    while (item >= way->first + way->count) {
        way->first += way->count;
        come_to(way, way->weight + 1, team);
    }
    const int64_t inside = item - way->first, panel = inside % way->panels, row = inside / way->panels * way->height;
    const int64_t left = rows_of(way->product, way->weight) - row;
    return (struct tile){
        .product = way->product,
        .panel = way->weight * way->panels + panel,
        .own_panel = panel,
        .row = way->product->offsets[way->weight] + row,
        .rows = left < way->height ? left : way->height,
    };
}

void run_product(const struct product *product, struct team *team) {
    float sums[TILE_ROWS * PANEL] __attribute__((aligned(64)));
    struct way way = begin_way(product, team);
    /* A thread takes its next tile before it begins one: it must know what to fetch ahead. */
    struct tile tile = next_tile(&way, team);
    while (tile.panel >= 0) {
        const struct tile following = next_tile(&way, team);
        multiply_tile(product, tile.panel, following.panel, tile.row, tile.rows, sums);
        if (product->scale != NULL) {
            product->scale(product, tile.panel, tile.row, tile.rows, sums);
        }
        tile.sums = sums;
        finish_tile(&tile);
        tile = following;
    }
}
