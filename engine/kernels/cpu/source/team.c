/* Threads from the OpenMP runtime, a barrier of our own. See team.h. */
#define _GNU_SOURCE
#include "team.h"

#include <errno.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "clock.h"

#define CACHE_LINE 64
#define MAX_CORES 1024              /* as many as cpu_set_t names */
/* Longer than threads differ within one operation, and short against the time slice of a neighbour that holds up a thread
 * of the team: then the core is worth more to the neighbour. */
#define SPIN_SECONDS 100e-6
#define SPINS_PER_LOOK 64

/* What `#pragma omp parallel` compiles to. Called by name, the runtime that torch brings is all that is needed, and clang,
 * whose pragmas ask for a runtime of its own, works as well: libgomp and LLVM's libomp both have these. */
extern void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags);
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);

struct barrier {
    _Alignas(CACHE_LINE) _Atomic uint32_t arrived;
    _Alignas(CACHE_LINE) _Atomic uint32_t round;    /* changes when all have arrived */
    _Atomic uint32_t sleepers;
};

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

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* ---- the barrier: the last to arrive starts a new round; the others spin for a while, then sleep ---- */

static bool spin(struct barrier *barrier, uint32_t round) {
    double deadline = 0.0;
    for (;;) {
        for (int i = 0; i < SPINS_PER_LOOK; i++) {
            if (atomic_load_explicit(&barrier->round, memory_order_acquire) != round) {
                return true;
            }
            relax();
        }
        const double time = now();
        if (deadline == 0.0) {
            deadline = time + SPIN_SECONDS;
        } else if (time > deadline) {
            return false;
        }
    }
}

static void sleep_until_round_after(struct barrier *barrier, uint32_t round) {
    /* Either the last to arrive sees this thread among the sleepers, or this thread sees the new round: both accesses on
     * both sides are sequentially consistent. */
    atomic_fetch_add(&barrier->sleepers, 1);
    while (atomic_load(&barrier->round) == round) {
#ifdef __linux__
        syscall(SYS_futex, &barrier->round, FUTEX_WAIT_PRIVATE, round, NULL, NULL, 0);
#else
        sched_yield();
#endif
    }
    atomic_fetch_sub(&barrier->sleepers, 1);
}

void team_wait(void) {
    struct barrier *barrier = current_barrier;
    if (current_size <= 1) {
        return;
    }
    const uint32_t round = atomic_load_explicit(&barrier->round, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&barrier->arrived, 1, memory_order_acq_rel) + 1 < current_size) {
        if (!spin(barrier, round)) {
            sleep_until_round_after(barrier, round);
        }
        return;
    }
    atomic_store_explicit(&barrier->arrived, 0, memory_order_relaxed);
    atomic_store(&barrier->round, round + 1);
#ifdef __linux__
    if (atomic_load(&barrier->sleepers) != 0) {
        syscall(SYS_futex, &barrier->round, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
    }
#endif
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

void run_team(void (*work)(void *data, struct team *team), void *data, int64_t threads) {
    if (threads <= 1) {
        struct team alone = {.index = 0, .size = 1, .taken = NULL};
        current_size = 1;
        work(data, &alone);
        return;
    }
    struct barrier barrier = {0};
    struct region region = {
        .work = work, .data = data, .barrier = &barrier, .cores = threads <= bound_count ? bound_cores : NULL};
#ifdef __linux__
    cpu_set_t allowed;
    const bool bound = region.cores != NULL && sched_getaffinity(0, sizeof allowed, &allowed) == 0 && keep_to(bound_cores[0]);
#endif
    GOMP_parallel(member, &region, (unsigned)threads, 0);
#ifdef __linux__
    if (bound) {
        sched_setaffinity(0, sizeof allowed, &allowed);
    }
#endif
}
