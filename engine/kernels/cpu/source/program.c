/* Runs a program: all operations in one parallel region, a barrier between them. Knows no operation. */
#include <stdbool.h>
#include <stddef.h>

#include "clock.h"
#include "team.h"

struct operation {
    void (*run)(const void *args, const struct step *step, struct team *team);
    const void *args;
};

struct program {
    const struct operation *operations;
    int64_t count;
    const struct step *step;
    _Atomic int64_t *taken;         /* [count] */
    double *seconds;                /* [count], or NULL */
};

static void run_operations(void *data, struct team *team) {
    const struct program *program = data;
    const bool timed = program->seconds != NULL && team->index == 0;
    double begin = timed ? now() : 0.0;
    for (int64_t i = 0; i < program->count; i++) {
        const struct operation *operation = &program->operations[i];
        team->taken = &program->taken[i];
        operation->run(operation->args, program->step, team);
        team_wait();
        if (timed) {
            const double end = now();
            program->seconds[i] += end - begin;
            begin = end;
        }
    }
}

/* Runs `count` operations on `threads` threads. `taken` has room for `count` counters. Unless NULL, `seconds[i]` is
 * increased by the time from the begin of operation i to the moment that all threads have ended it. */
void run_program(
    const struct operation *operations, int64_t count, const struct step *step, int64_t threads,
    _Atomic int64_t *taken, double *seconds) {
    for (int64_t i = 0; i < count; i++) {
        atomic_store_explicit(&taken[i], 0, memory_order_relaxed);
    }
    struct program program = {operations, count, step, taken, seconds};
    run_team(run_operations, &program, threads);
}
