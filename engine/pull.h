/* Pull: fills a replica's shards from whoever has them.
 *
 * Each lane works on every running pull with its own sources, links to some of its neighbours; `spread` says which
 * shard comes next, and the replica's states keep two lanes from taking the same one. The replica's home lane also
 * looks for holders, reviews the neighbours, and ends the pull.
 *
 * The metadata is asked for holders once when a pull begins, and again only while nothing comes: whom else there is,
 * peers tell each other. */
#ifndef P2PFS_ENGINE_PULL_H
#define P2PFS_ENGINE_PULL_H

#include "engine/lane.h"
#include "engine/replica.h"

/* Any thread, no lock held: gets the pull going if it is not. whole: the whole file is wanted from now on. 0; errors of
 * opening the storage. Not having room in the cache shows later, as -ENOSPC to the waiters. */
int pull_want(struct replica *replica, bool whole);

/* Nothing more is wanted: lanes let go of it at their next tick. Any thread, no lock held. */
void pull_stop(struct replica *replica);

/* The lanes look at the chosen neighbours again. Any thread, no lock held. */
void pull_neighbours_changed(struct replica *replica);

/* Lane thread. */
void pull_drop(struct lane *lane, const struct replica *replica); /* lets go of it now */
void pull_tick(struct lane *lane, uint64_t now_ns);
void pull_close_all(struct lane *lane);

#endif
