/* Cache: this node's replicas by version, and the memory that they take.
 *
 * Bytes are reserved before they are fetched or written and given back when a replica's file is closed, so the limit
 * holds at every moment. Any thread; cache_make_room only on a work thread. */
#ifndef P2PFS_ENGINE_CACHE_H
#define P2PFS_ENGINE_CACHE_H

#include "engine/replica.h"

struct cache;

int cache_open(struct engine *engine, uint64_t limit, struct cache **cache);
void cache_close(struct cache *cache); /* drops every replica */

/* The replica of a version with a reference for the caller, or NULL. */
struct replica *cache_find(struct cache *cache, const struct model_id *version);
/* Puts a replica in (the table takes a reference of its own). If another one is there already, that one is returned
 * instead, with a reference for the caller, and `replica` is left alone. Returns `replica` otherwise. */
struct replica *cache_insert(struct cache *cache, struct replica *replica);
/* Takes it out if it is in, with the table's reference. */
void cache_remove(struct cache *cache, struct replica *replica);
/* References to all replicas (malloc'd; the caller puts each and frees the array). */
int cache_snapshot(struct cache *cache, struct replica ***out, size_t *count);

/* Grows what the replica has reserved to at least `bytes`: true, or false when the limit is in the way. Lock held. */
bool cache_reserve(struct cache *cache, struct replica *replica, uint64_t bytes);
void cache_unreserve(struct cache *cache,
                     struct replica *replica); /* all of it; lock held or sole owner */
/* Evicts least recently used complete replicas that are not open, not pinned and held elsewhere too, until `bytes`
 * more fit. Blocking (seconds at most). 0 or -ENOSPC. */
int cache_make_room(struct cache *cache, uint64_t bytes);
void cache_usage(struct cache *cache, uint64_t *limit, uint64_t *used);

/* How many replicas have bytes here, and how many all of them. */
void cache_count(struct cache *cache, uint64_t *replicas, uint64_t *complete);

/* Evicts one: withdraw, refuse, wait for the peers that read it, free. `force`: though it may be the last copy. The
 * caller holds one reference and no more. Blocking. 0, -EBUSY, -EPERM (pinned), -EINVAL (registered in place: there is no copy to drop). */
int cache_evict(struct cache *cache, struct replica *replica, bool force);
/* Drops what nobody needs any more: call when a handle, pull, session or name has gone. No lock held. */
void cache_retire(struct cache *cache, struct replica *replica);

#endif
