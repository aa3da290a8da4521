/* Reserve: which pages are cleared ahead of the pulls that will want them, and when they are given back.
 *
 * A page that the kernel has to clear (and a hypervisor to find) while a pull runs takes the cores that the pull
 * needs, so files for the largest versions that others have registered are prepared while nothing else is to do:
 * storage_reserve clears them, this decides. There is a reserve only as long as there is something to pull, nothing of
 * RESERVE_RESIDENT or more is resident, no pull runs, and memory is plentiful; it lives in what replicas leave of the
 * cache, and what pulls leave of it goes within two seconds of their end, so that a pulled file takes its size and no
 * more. */
#ifndef P2PFS_ENGINE_RESERVE_H
#define P2PFS_ENGINE_RESERVE_H

#include "engine/core.h"

struct reserve;

int reserve_open(struct engine *engine, struct reserve **reserve);
void reserve_close(
    struct reserve *reserve); /* after the work threads have ended; NULL is harmless */
/* Lane 0, every LANE_TRIM_NS: looks, on a work thread. */
void reserve_tick(struct reserve *reserve);

/* The rules, without state. What the reserve may take: a quarter of the cache, an eighth of the memory that is
 * available without it, and what storage keeps. */
uint64_t reserve_budget(uint64_t cache_limit, uint64_t available);
/* Sizes of what was asked for, largest first, cut to the budget, into `out` (of the same length); how many. */
size_t reserve_plan(const uint64_t *sizes, size_t count, uint64_t budget, uint64_t *out);
/* Memory has become scarce: it should be given back. */
bool reserve_dear(uint64_t held, uint64_t available);

#endif
