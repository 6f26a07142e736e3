/* Where threads, or processes, meet: the last to arrive starts a new round; the others spin for a while, then sleep. */
#ifndef MANTA_BARRIER_H
#define MANTA_BARRIER_H

#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "clock.h"

#define CACHE_LINE 64
/* Longer than threads differ within one operation, and short against the time slice of a neighbour that holds up a thread
 * of the team: then the core is worth more to the neighbour. */
#define SPIN_SECONDS 100e-6
#define SPINS_PER_LOOK 64

struct barrier {
    _Alignas(CACHE_LINE) _Atomic uint32_t arrived;
    _Alignas(CACHE_LINE) _Atomic uint32_t round;    /* changes when all have arrived */
    _Atomic uint32_t sleepers;
    _Atomic uint32_t broken;                        /* somebody has waited in vain: nobody waits here again */
};

static inline void barrier_relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Whether the round ended within the time of spinning. */
static inline bool barrier_spin(struct barrier *barrier, uint32_t round) {
    double deadline = 0.0;
    for (;;) {
        for (int i = 0; i < SPINS_PER_LOOK; i++) {
            if (atomic_load_explicit(&barrier->round, memory_order_acquire) != round) {
                return true;
            }
            barrier_relax();
        }
        const double time = now();
        if (deadline == 0.0) {
            deadline = time + SPIN_SECONDS;
        } else if (time > deadline) {
            return false;
        }
    }
}

#ifdef __linux__
static inline void barrier_wake(struct barrier *barrier, bool processes) {
    syscall(SYS_futex, &barrier->round, processes ? FUTEX_WAKE : FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}
#endif

/* Sleeps until a new round, or for `seconds`; 0 is for ever. Returns whether there is a new round. */
static inline bool barrier_sleep(struct barrier *barrier, uint32_t round, bool processes, double seconds) {
    const double deadline = now() + seconds;
    /* Either the last to arrive sees this thread among the sleepers, or this thread sees the new round: both accesses on
     * both sides are sequentially consistent. */
    atomic_fetch_add(&barrier->sleepers, 1);
    while (atomic_load(&barrier->round) == round && !atomic_load(&barrier->broken)) {
        const double left = deadline - now();
        if (seconds > 0.0 && left <= 0.0) {
            atomic_store(&barrier->broken, 1);
#ifdef __linux__
            barrier_wake(barrier, processes);
#endif
            break;
        }
#ifdef __linux__
        const struct timespec rest = {(time_t)left, (long)((left - (double)(time_t)left) * 1e9)};
        syscall(
            SYS_futex, &barrier->round, processes ? FUTEX_WAIT : FUTEX_WAIT_PRIVATE, round, seconds > 0.0 ? &rest : NULL,
            NULL, 0);
#else
        (void)processes;
        sched_yield();
#endif
    }
    atomic_fetch_sub(&barrier->sleepers, 1);
    return atomic_load(&barrier->round) != round;
}

/* Waits until `size` have come here, for `seconds` at most; 0 is for ever. `processes`: these are of several, and the
 * barrier is in memory that they share. Returns false once anybody has waited in vain. */
static inline bool barrier_wait(struct barrier *barrier, uint32_t size, bool processes, double seconds) {
    if (seconds > 0.0 && atomic_load(&barrier->broken)) {
        return false;
    }
    const uint32_t round = atomic_load_explicit(&barrier->round, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&barrier->arrived, 1, memory_order_acq_rel) + 1 < size) {
        return barrier_spin(barrier, round) || barrier_sleep(barrier, round, processes, seconds);
    }
    atomic_store_explicit(&barrier->arrived, 0, memory_order_relaxed);
    atomic_store(&barrier->round, round + 1);
#ifdef __linux__
    if (atomic_load(&barrier->sleepers) != 0) {
        barrier_wake(barrier, processes);
    }
#endif
    return true;
}

#endif
