/* The time, for measuring how long something took. */
#ifndef MANTA_CLOCK_H
#define MANTA_CLOCK_H

#include <time.h>

/* Seconds since some moment; never goes back. */
static inline double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

#endif
