/* How threads come together for a piece of work: the parallel region, the barrier, and the cores that they keep to.
 * Knows no operation and no program. */
#ifndef MANTA_TEAM_H
#define MANTA_TEAM_H

#include "step.h"

/* Calls work(data, team) once on each of `threads` threads, this one among them, and returns when all have ended it.
 * team->taken is NULL. The threads are those of the OpenMP runtime, which torch's operators use too. */
void run_team(void (*work)(void *data, struct team *team), void *data, int64_t threads);

/* From now on thread i of the teams of the calling thread runs on `cores[i]` alone; the calling thread does so only while
 * a team of its own runs, so that threads which it starts later inherit nothing. With `count` 0 they stay where they are
 * left. Teams of more than `count` threads are not bound. Returns 0, or an errno if a core cannot be used. */
int64_t bind_teams(const int64_t *cores, int64_t count);

#endif
