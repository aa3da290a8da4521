/* Trace: how each shard of a replica came here: from whom, over what, and where the time went. 16 bytes a shard, kept
 * with the replica from the first shard that is pulled. Any thread; no lock of the replica held. */
#ifndef P2PFS_ENGINE_TRACE_H
#define P2PFS_ENGINE_TRACE_H

#include "engine/replica.h"

struct trace;
struct peer;

struct trace_landing {
    const struct peer *peer;
    const char *transport; /* a static name */
    uint64_t queued_ns;    /* from the ask to the grant */
    uint64_t wire_ns;      /* from the grant to the last byte */
    uint64_t verify_ns;    /* of hashing, most of it while the rest was still on the wire */
    bool urgent;           /* a reader waited for it */
    bool hedged;           /* asked of two peers */
};

/* The shard landed and was verified. Also adds to the engine's counters of time. */
void trace_landed(struct replica *replica, uint32_t shard, const struct trace_landing *landing);
/* It was asked for in vain: BUSY, refused, broken, stalled or wrong. */
void trace_missed(struct replica *replica, uint32_t shard);
void trace_free(struct trace *trace); /* NULL is harmless */

#endif
