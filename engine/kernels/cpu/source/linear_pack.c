/* Packing of weights into panels. The layouts are described in linear.h. */
#include "linear_tile.h"
#include "team.h"

enum { RUN_STEPS = 64 };            /* of one row at a time: 256 bytes, which prefetchers follow; 8 KB of the panel */

struct packing {
    void (*panel)(const struct packing *packing, int64_t panel);
    const char *weight;
    int64_t row_bytes;
    int64_t out;
    int64_t gated;
    char *packed;
    _Atomic int64_t taken;
    /* of int4 */
    const uint16_t *scales;         /* [out, in / group] float16 */
    const uint8_t *zeros;           /* likewise, or NULL */
    int64_t group;
};

static void pack_share(void *data, struct team *team) {
    struct packing *packing = data;
    team->taken = &packing->taken;
    const int64_t panels = panel_count(packing->out, packing->gated);
    for (int64_t panel = team_take(team, 1); panel < panels; panel = team_take(team, 1)) {
        packing->panel(packing, panel);
    }
}

/* ---- elements of whole bytes ---- */

/* At most RUN_STEPS steps of one column, from `bytes` bytes of a row. */
static void pack_column(const char *row, int64_t bytes, char *to, int64_t steps) {
    uint32_t values[RUN_STEPS] = {0};
    memcpy(values, row, (size_t)bytes);
    for (int64_t step = 0; step < steps; step++) {
        memcpy(to + step * STEP_BYTES, &values[step], sizeof values[step]);
    }
}

static void pack_dense_panel(const struct packing *packing, int64_t panel) {
    const int64_t row_bytes = packing->row_bytes, steps = (row_bytes + 3) / 4;
    char *packed = packing->packed + panel * steps * STEP_BYTES;
    for (int64_t step = 0; step < steps; step += RUN_STEPS) {
        const int64_t count = steps - step < RUN_STEPS ? steps - step : RUN_STEPS;
        const int64_t left = row_bytes - 4 * step, bytes = left < 4 * count ? left : 4 * count;
        for (int64_t column = 0; column < PANEL; column++) {
            const int64_t row = panel_row(panel, column, packing->out, packing->gated);
            const char *from = packing->weight + (row < 0 ? 0 : row * row_bytes + 4 * step);
            pack_column(from, row < 0 ? 0 : bytes, packed + step * STEP_BYTES + 4 * column, count);
        }
    }
}

/* Packs contiguous rows of `row_bytes` bytes: float32, bfloat16 or int8. */
void pack_dense(const char *weight, int64_t row_bytes, int64_t out, int64_t gated, int64_t threads, char *packed) {
    struct packing packing = {
        .panel = pack_dense_panel,
        .weight = weight,
        .row_bytes = row_bytes,
        .out = out,
        .gated = gated,
        .packed = packed,
    };
    run_team(pack_share, &packing, threads);
}

/* ---- int4 ---- */

/* The lower four bits of each byte, side by side. */
static uint32_t low_nibbles(uint32_t bytes) {
    bytes &= 0x0f0f0f0f;
    bytes = (bytes | bytes >> 4) & 0x00ff00ff;
    return (bytes | bytes >> 8) & 0xffff;
}

/* Channel i of 8 is in bits 4 i of `channels`; the even ones go to the lower half, the odd ones to the upper. */
static uint32_t split_halves(uint32_t channels) {
    return low_nibbles(channels) | low_nibbles(channels >> 4) << 16;
}

/* Group `index` of `count` of a bundle that begins at `bundle`: its part of one column. */
static void pack_int4_column(
    const struct packing *packing, int64_t row, int64_t group, int64_t index, int64_t count, int64_t column,
    char *bundle) {
    const int64_t steps = packing->group / INT4_STEP, groups = packing->row_bytes * 2 / packing->group;
    const int64_t place = index * PANEL + column;
    memcpy(bundle + 2 * place, &packing->scales[row * groups + group], sizeof *packing->scales);
    if (packing->zeros != NULL) {
        bundle[2 * PANEL * count + place] = (char)(8 - packing->zeros[row * groups + group]);
    }
    const char *from = packing->weight + row * packing->row_bytes + group * packing->group / 2;
    char *to = bundle + int4_header_bytes(count, packing->zeros != NULL) + 4 * place;
    for (int64_t step = 0; step < steps; step++) {
        uint32_t channels;
        memcpy(&channels, from + 4 * step, sizeof channels);
        const uint32_t halves = split_halves(channels);
        memcpy(to + step * count * STEP_BYTES, &halves, sizeof halves);
    }
}

static void pack_int4_panel(const struct packing *packing, int64_t panel) {
    const int64_t groups = packing->row_bytes * 2 / packing->group, zeros = packing->zeros != NULL;
    char *bundle = packing->packed + panel * int4_panel_bytes(packing->group, groups, zeros);
    for (int64_t first = 0; first < groups; first += INT4_BUNDLE) {
        const int64_t count = groups - first < INT4_BUNDLE ? groups - first : INT4_BUNDLE;
        for (int64_t index = 0; index < count; index++) {
            for (int64_t column = 0; column < PANEL; column++) {
                const int64_t row = panel_row(panel, column, packing->out, packing->gated);
                if (row >= 0) {
                    pack_int4_column(packing, row, first + index, index, count, column, bundle);
                }
            }
        }
        bundle += int4_bundle_bytes(packing->group, count, zeros);
    }
}

/* Packs rows of in / 2 bytes, channel 2 j in the low bits of byte j. `packed` is zeros; padding remains so. */
void pack_int4(
    const char *weight, const uint16_t *scales, const uint8_t *zeros, int64_t in, int64_t group, int64_t out,
    int64_t gated, int64_t threads, char *packed) {
    struct packing packing = {
        .panel = pack_int4_panel,
        .weight = weight,
        .row_bytes = in / 2,
        .out = out,
        .gated = gated,
        .packed = packed,
        .scales = scales,
        .zeros = zeros,
        .group = group,
    };
    run_team(pack_share, &packing, threads);
}

/* Bytes of the packed weight. */
int64_t packed_int4_bytes(int64_t in, int64_t group, int64_t out, int64_t gated, int64_t zeros) {
    return panel_count(out, gated) * int4_panel_bytes(group, in / group, zeros);
}
