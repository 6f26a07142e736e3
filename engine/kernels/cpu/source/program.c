/* Runs a program: all operations in one parallel region, a barrier between them. Knows no operation. */
#include <stdbool.h>
#include <stddef.h>

#include "clock.h"
#include "team.h"
#include "vector.h"

/* Steps of a program, in the order of their array. */
enum axis { TOKENS = 0, ROWS = 1 };

struct operation {
    void (*run)(const void *args, const struct step *step, struct team *team);
    const void *args;
    int64_t axis;                   /* which of the steps it runs on */
};

struct program {
    const struct operation *operations;
    int64_t count;
    const struct step *const *steps;
    _Atomic int64_t *taken;         /* [count] */
    double *seconds;                /* [count], or NULL */
};

static void run_operations(void *data, struct team *team) {
    const struct program *program = data;
    const bool timed = program->seconds != NULL && team->index == 0;
    double begin = timed ? now() : 0.0;
    for (int64_t i = 0; i < program->count; i++) {
        const struct operation *operation = &program->operations[i];
        const struct step *step = program->steps[operation->axis];
        if (step->tokens == 0) {
            continue;
        }
        team->taken = &program->taken[i];
        operation->run(operation->args, step, team);
        team_wait();
        if (timed) {
            const double end = now();
            program->seconds[i] += end - begin;
            begin = end;
        }
    }
}

/* Runs `count` operations on `threads` threads: those of all tokens on `step`, those of wanted ones on `rows`; where a
 * step has no token, its operations have nothing to do. `taken` has room for `count` counters. Unless NULL, `seconds[i]` is
 * increased by the time from the begin of operation i to the moment that all threads have ended it. */
void run_program(
    const struct operation *operations, int64_t count, const struct step *step, const struct step *rows,
    int64_t threads, _Atomic int64_t *taken, double *seconds) {
    for (int64_t i = 0; i < count; i++) {
        atomic_store_explicit(&taken[i], 0, memory_order_relaxed);
    }
    const struct step *const steps[] = {[TOKENS] = step, [ROWS] = rows};
    struct program program = {operations, count, steps, taken, seconds};
    run_team(run_operations, &program, threads);
}

/* The instruction set that all files are compiled for. */
const char *instruction_set(void) {
    return VECTOR_NAME;
}
