/* Core: what the engine's own files share: the engine's parts in the order in which they are built. */
#ifndef P2PFS_ENGINE_CORE_H
#define P2PFS_ENGINE_CORE_H

#include <pthread.h>
#include <stdatomic.h>

#include "engine/bucket.h"
#include "engine/digest.h"
#include "engine/engine.h"
#include "engine/slots.h"
#include "engine/topology.h"
#include "engine/transport.h"
#include "engine/work.h"

struct storage;
struct cache;
struct lane;
struct peers;
struct bounce;
struct reserve;
struct draft;

#define CORE_LANES_MAX 16

struct core_counters {
    atomic_ullong bytes_received, bytes_served, bytes_written;
    atomic_ullong shards_fetched, shards_served, shards_corrupt, shards_failed;
    atomic_ullong reads_hit, reads_waited, reads_failed, pulls_completed, evictions, links_refused;
    atomic_ullong bytes_rdma, rdma_failures;
    atomic_ullong asks_refused;                  /* answered with BUSY */
    atomic_ullong shards_hedged;                 /* asked twice */
    atomic_ullong asks_busy;                     /* ours that peers answered with BUSY */
    atomic_ullong queued_ns, wire_ns, verify_ns; /* of all shards that landed */
    atomic_llong grants_open, pulls_running, readers_waiting;
};

struct engine {
    struct engine_config config; /* strings owned */
    const struct digest_ops *digest;
    const struct transport_ops *transport;
    const struct transport_ops *fast; /* RDMA beside it; NULL: none, and fast_why tells why */
    char fast_why[TOPOLOGY_WHY_MAX];
    struct transport_rail rails[TOPOLOGY_RAILS_MAX];
    unsigned rail_count;
    char fast_address[TRANSPORT_NAME_MAX + 1];
    struct storage *storage;
    struct cache *cache;
    struct work *work;
    struct peers *peers;
    struct bounce *bounce;
    struct reserve *reserve;
    struct bucket upload, download; /* limits of all lanes together */
    struct lane *lanes[CORE_LANES_MAX];
    unsigned lane_count;
    char address[TRANSPORT_NAME_MAX + 1];
    struct core_counters counters;
    pthread_mutex_t slots_lock;
    struct slots slots; /* slots_lock: uploads of all lanes */
    pthread_mutex_t direct_lock;
    struct draft *direct; /* direct_lock, before a replica's: drafts that the kernel writes */
    atomic_bool closing;
    atomic_uint
        background; /* jobs and catalog calls of ours under way; engine_close waits for them */
};

/* The shard size that a new version of so many bytes gets: shard_size=, or auto; larger where there would be more
 * shards than a peer can be told of. */
uint32_t core_shard_size(const struct engine *engine, uint64_t size);

/* Brackets whatever will call back later and uses the engine then. */
void core_hold(struct engine *engine);
/* The same for what need not begin any more when the engine closes: false, and nothing is held. */
bool core_hold_open(struct engine *engine);
void core_release(struct engine *engine);

#endif
