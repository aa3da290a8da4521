/* Source: the peers that a running pull takes shards from, on one lane: what each has, what is on its way from it, what
 * comes next, and what becomes of a shard that has landed. Lane thread only. */
#ifndef P2PFS_ENGINE_SOURCE_H
#define P2PFS_ENGINE_SOURCE_H

#include "engine/lane.h"
#include "engine/replica.h"

struct source;
struct fill;

/* One version being filled, on one lane; made and freed by pull.c. */
struct pull {
    struct lane *lane;
    struct replica *replica; /* with a reference */
    struct source *sources;
    struct fill *fills;
    uint16_t *rarity;        /* among this lane's sources */
    uint64_t holders_serial; /* what sources were made from */
    uint64_t look_ns;        /* home lane: the next look */
    uint64_t look_wait_ns;
    void (*room_request)(
        struct replica *replica); /* a shard did not fit into the cache; no lock held */
    struct pull *prev, *next;
};

/* Asks every source for as much as it may deliver now. */
void source_pump_all(struct pull *pull);
/* Makes sources of the holders that the last look found; those that it no longer lists and that are not attached go. */
void source_update(struct pull *pull);
/* Takes shards that do not move away from their source where another one has them, and looks again at lists of digests
 * that could not be proven yet. */
void source_tick(struct pull *pull, uint64_t now_ns);
/* Cancels what is on its way and leaves every peer. */
void source_clear(struct pull *pull);

#endif
