/* Routing by tables: choice of experts, counting sort, rows in and out. See experts.h. */
#include "experts.h"

#include <math.h>
#include <string.h>

#include "vector.h"

/* Columns of a token's sum that one thread takes at once: a step of one token has work for several. */
#define BLOCK 512

/* ---- a token's experts and their weights ---- */

/* The `count` largest logits, largest first, and whose they are. */
static void choose(const struct route *args, const float *logits, int64_t *experts, float *largest) {
    const int64_t count = args->per_token;
    int64_t chosen = 0;
    for (int64_t expert = 0; expert < args->experts; expert++) {
        const float logit = isnan(logits[expert]) ? -INFINITY : logits[expert];
        if (chosen == count && !(logit > largest[count - 1])) {
            continue;
        }
        int64_t at = chosen < count ? chosen++ : count - 1;
        for (; at > 0 && logit > largest[at - 1]; at--) {
            largest[at] = largest[at - 1];
            experts[at] = experts[at - 1];
        }
        largest[at] = logit;
        experts[at] = expert;
    }
}

/* e^(value - largest) of up to VF values; the other lanes are 0. */
INLINE vf exponentials(const float *values, int64_t count, float largest) {
    if (count >= VF) {
        return vf_exp(vf_load(values) - largest);
    }
    float lanes[VF];
    for (int64_t i = 0; i < VF; i++) {
        lanes[i] = i < count ? values[i] : -INFINITY;
    }
    return vf_exp(vf_load(lanes) - largest);
}

/* Makes weights of the chosen logits, which are in `weights`. */
static void weigh(const struct route *args, const float *logits, float *weights) {
    const int64_t count = args->per_token;
    const float largest = weights[0];
    vf sum = {0};
    for (int64_t i = 0; i < args->experts; i += VF) {
        sum += exponentials(logits + i, args->experts - i, largest);
    }
    const float total = vf_sum(sum);
    for (int64_t i = 0; i < count; i += VF) {
        vf_put(weights, F32, i, count - i, exponentials(weights + i, count - i, largest) / total);
    }
    if (args->renormalised) {
        float chosen = 0;
        for (int64_t i = 0; i < count; i++) {
            chosen += weights[i];
        }
        for (int64_t i = 0; i < count; i++) {
            weights[i] /= chosen;
        }
    }
}

/* ---- the table ---- */

/* Where this thread's rows of each expert begin: behind those of the threads before it, whose tokens come first. */
static void place(const struct route *args, const struct team *team, int64_t *next) {
    int64_t row = 0;
    for (int64_t expert = 0; expert < args->held; expert++) {
        if (team->index == 0) {
            args->offsets[expert] = row;
        }
        for (int64_t thread = 0; thread < team->size; thread++) {
            if (thread == team->index) {
                next[expert] = row;
            }
            row += args->tallies[thread * args->held + expert];
        }
    }
    if (team->index == 0) {
        args->offsets[args->held] = row;
    }
}

void route(const struct route *args, const struct step *step, struct team *team) {
    const int64_t count = args->per_token, held = args->held;
    int64_t *tally = args->tallies + team->index * held;
    int64_t *next = args->tallies + (team->size + team->index) * held;
    int64_t begin, end;
    team_share(team, step->tokens, &begin, &end);
    memset(tally, 0, (size_t)held * sizeof *tally);
    for (int64_t token = begin; token < end; token++) {
        /* Until they have rows, the pairs' experts are in their place. */
        int64_t *experts = args->rows + token * count;
        const float *logits = args->logits + token * args->experts;
        choose(args, logits, experts, args->weights + token * count);
        weigh(args, logits, args->weights + token * count);
        for (int64_t i = 0; i < count; i++) {
            const int64_t expert = experts[i] - args->first;
            if (expert >= 0 && expert < held) {
                tally[expert]++;
            }
        }
    }
    team_wait();
    place(args, team, next);
    for (int64_t pair = begin * count; pair < end * count; pair++) {
        const int64_t expert = args->rows[pair] - args->first;
        args->rows[pair] = -1;
        if (expert >= 0 && expert < held) {
            const int64_t row = next[expert]++;
            args->rows[pair] = row;
            args->sources[row] = pair / count;
        }
    }
}

/* ---- rows in and out ---- */

void gather_rows(const struct gather_rows *args, const struct step *step, struct team *team) {
    (void)step;
    int64_t begin, end;
    team_share(team, args->offsets[args->held], &begin, &end);
    for (int64_t row = begin; row < end; row++) {
        memcpy(
            (char *)args->y + row * args->row_bytes, (const char *)args->x + args->sources[row] * args->x_stride,
            (size_t)args->row_bytes);
    }
}

INLINE void sum_block(const struct sum_experts *args, int64_t dtype, int64_t token, int64_t begin, int64_t end) {
    const float *weights = args->weights + token * args->per_token;
    const int64_t *rows = args->rows + token * args->per_token;
    for (int64_t i = begin; i < end; i += VF) {
        vf sum = {0};
        for (int64_t j = 0; j < args->per_token; j++) {
            if (rows[j] >= 0) {
                const vf result = vf_get(args->results, F32, rows[j] * args->width + i, end - i);
                sum = vf_fused(vf_set(weights[j]), result, sum);
            }
        }
        vf_put(args->y, dtype, token * args->width + i, end - i, sum);
    }
}

void sum_experts(const struct sum_experts *args, const struct step *step, struct team *team) {
    const int64_t blocks = (args->width + BLOCK - 1) / BLOCK;
    int64_t begin, end;
    team_share(team, step->tokens * blocks, &begin, &end);
    for (int64_t item = begin; item < end; item++) {
        const int64_t token = item / blocks, first = item % blocks * BLOCK;
        const int64_t last = args->width - first < BLOCK ? args->width : first + BLOCK;
        if (args->dtype == F32) {
            sum_block(args, F32, token, first, last);
        } else {
            sum_block(args, BF16, token, first, last);
        }
    }
}
