/* Threads from the OpenMP runtime, a barrier of our own. See team.h. */
#include "team.h"

#include <errno.h>
#include <sched.h>

#include "barrier.h"

#define MAX_CORES 1024              /* as many as cpu_set_t names */

/* What `#pragma omp parallel` compiles to. Called by name, the runtime that torch brings is all that is needed, and clang,
 * whose pragmas ask for a runtime of its own, works as well: libgomp and LLVM's libomp both have these. */
extern void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags);
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);

struct region {
    void (*work)(void *data, struct team *team);
    void *data;
    struct barrier *barrier;
    const int64_t *cores;           /* or NULL */
};

/* Where the teams of this thread are bound to. */
static _Thread_local int64_t bound_cores[MAX_CORES];
static _Thread_local int64_t bound_count;
/* The team that this thread is in now; team_wait has no other way to know it. */
static _Thread_local struct barrier *current_barrier;
static _Thread_local uint32_t current_size;

void team_wait(void) {
    if (current_size > 1) {
        barrier_wait(current_barrier, current_size, false, 0.0);
    }
}

/* ---- cores ---- */

#ifdef __linux__

static bool keep_to(int64_t core) {
    cpu_set_t cores;
    CPU_ZERO(&cores);
    CPU_SET((size_t)core, &cores);
    return sched_setaffinity(0, sizeof cores, &cores) == 0;
}

/* A worker is bound once in its life; the runtime may end workers and start others at any time. */
static void bind_worker(int64_t core) {
    static _Thread_local int64_t bound_to = -1;
    if (bound_to != core && keep_to(core)) {
        bound_to = core;
    }
}

int64_t bind_teams(const int64_t *cores, int64_t count) {
    if (count < 0 || count > MAX_CORES) {
        return EINVAL;
    }
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) {
        return errno;
    }
    for (int64_t i = 0; i < count; i++) {
        if (cores[i] < 0 || cores[i] >= MAX_CORES || !CPU_ISSET((size_t)cores[i], &allowed)) {
            return EINVAL;
        }
    }
    for (int64_t i = 0; i < count; i++) {
        bound_cores[i] = cores[i];
    }
    bound_count = count;
    return 0;
}

#else

int64_t bind_teams(const int64_t *cores, int64_t count) {
    (void)cores;
    return count == 0 ? 0 : ENOSYS;
}

#endif

/* ---- the parallel region ---- */

static void member(void *data) {
    struct region *region = data;
    struct team team = {.index = omp_get_thread_num(), .size = omp_get_num_threads(), .taken = NULL};
    current_barrier = region->barrier;
    current_size = (uint32_t)team.size;
#ifdef __linux__
    if (region->cores != NULL && team.index > 0) {
        bind_worker(region->cores[team.index]);
    }
#endif
    region->work(region->data, &team);
}

static void run_members(struct region *region, int64_t threads) {
    if (threads > 1) {
        GOMP_parallel(member, region, (unsigned)threads, 0);
        return;
    }
    struct team alone = {.index = 0, .size = 1, .taken = NULL};
    current_size = 1;
    region->work(region->data, &alone);
}

void run_team(void (*work)(void *data, struct team *team), void *data, int64_t threads) {
    struct barrier barrier = {0};
    const bool bind = threads <= bound_count;
    struct region region = {.work = work, .data = data, .barrier = &barrier, .cores = bind ? bound_cores : NULL};
#ifdef __linux__
    cpu_set_t allowed;
    const bool bound = bind && sched_getaffinity(0, sizeof allowed, &allowed) == 0 && keep_to(bound_cores[0]);
#endif
    run_members(&region, threads);
#ifdef __linux__
    if (bound) {
        sched_setaffinity(0, sizeof allowed, &allowed);
    }
#endif
}
