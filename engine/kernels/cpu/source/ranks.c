/* Sums over ranks through shared memory. See ranks.h. */
#include "ranks.h"

#include <string.h>

#include "barrier.h"
#include "vector.h"

/* Elements that one thread takes at least: less is done before another core has fetched its part. */
#define BLOCK 2048

_Static_assert(sizeof(struct barrier) <= RANKS_HEAD, "the head holds the barrier");

/* The half of this turn. Each meeting ends a round of the barrier, and none can end before this rank has come. */
static char *half_of(void *segment, int64_t capacity, int64_t size) {
    const uint32_t turn = atomic_load_explicit(&((struct barrier *)segment)->round, memory_order_acquire) & 1;
    return (char *)segment + RANKS_HEAD + turn * size * capacity;
}

/* Returns once all threads of all ranks have come here; false if the segment is broken. */
static bool meet(void *segment, int64_t size, double timeout, const struct team *team) {
    struct barrier *barrier = segment;
    team_wait();
    if (team->index == 0) {
        barrier_wait(barrier, (uint32_t)size, true, timeout);
    }
    team_wait();
    return !atomic_load_explicit(&barrier->broken, memory_order_relaxed);
}

INLINE void sum_as(const struct sum_ranks *args, int64_t dtype, const char *half, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += VF) {
        vf sum = vf_get(half, dtype, i, end - i);
        for (int64_t rank = 1; rank < args->size; rank++) {
            sum += vf_get(half + rank * args->capacity, dtype, i, end - i);
        }
        vf_put(args->y, dtype, i, end - i, sum);
    }
}

void sum_ranks(const struct sum_ranks *args, const struct step *step, struct team *team) {
    const int64_t elements = step->tokens * args->width, item = args->dtype == F32 ? 4 : 2;
    int64_t begin, end;
    team_share(team, (elements + BLOCK - 1) / BLOCK, &begin, &end);
    begin *= BLOCK;
    end = end * BLOCK < elements ? end * BLOCK : elements;
    char *half = half_of(args->segment, args->capacity, args->size);
    if (begin < end) {
        memcpy(
            half + args->rank * args->capacity + begin * item, (const char *)args->x + begin * item,
            (size_t)((end - begin) * item));
    }
    if (!meet(args->segment, args->size, args->timeout, team)) {
        return;
    }
    if (args->dtype == F32) {
        sum_as(args, F32, half, begin, end);
    } else {
        sum_as(args, BF16, half, begin, end);
    }
}

void gather_ranks(const struct gather_ranks *args, const struct step *step, struct team *team) {
    const size_t row_bytes = (size_t)args->row_bytes;
    char *half = half_of(args->segment, args->capacity, args->size);
    int64_t begin, end;
    team_share(team, step->tokens, &begin, &end);
    if (args->y == NULL) {
        const size_t first = (size_t)begin * row_bytes, bytes = (size_t)(end - begin) * row_bytes;
        memcpy(half + args->rank * args->capacity + first, (const char *)args->x + first, bytes);
    }
    if (!meet(args->segment, args->size, args->timeout, team) || args->y == NULL) {
        return;
    }
    for (int64_t token = begin; token < end; token++) {
        for (int64_t rank = 0; rank < args->size; rank++) {
            const char *rows = rank == args->rank ? args->x : half + rank * args->capacity;
            char *to = (char *)args->y + (size_t)(token * args->size + rank) * row_bytes;
            memcpy(to, rows + (size_t)token * row_bytes, row_bytes);
        }
    }
}

int64_t ranks_broken(const void *segment) {
    return atomic_load_explicit(&((const struct barrier *)segment)->broken, memory_order_acquire);
}
