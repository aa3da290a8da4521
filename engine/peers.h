/* Peers: what this node remembers of every other: counters, strikes, quarantine. Any thread. */
#ifndef P2PFS_ENGINE_PEERS_H
#define P2PFS_ENGINE_PEERS_H

#include <stdatomic.h>
#include <uthash.h>

#include "engine/engine.h"
#include "engine/slots.h"

/* Lives as long as the table. */
struct peer {
    char node[MODEL_NODE_MAX + 1];
    char address[MODEL_ADDRESS_MAX + 1]; /* the table's lock */
    UT_hash_handle hh;
    uint32_t number;                         /* from 1 on, in order of appearance */
    atomic_uint struck;                      /* times that it was quarantined */
    atomic_ullong busy;                      /* asks of ours that it answered with BUSY */
    atomic_ullong refused;                   /* asks of its that were answered so here */
    uint64_t sampled_received, sampled_sent; /* rates: the table's lock */
    uint64_t rate_down, rate_up;
    atomic_ullong received, sent, verified, corrupt, failed;
    atomic_uint sessions; /* its links to here, */
    atomic_uint follows;  /* and the versions that it follows over them */
    atomic_uint links;
    atomic_uint rdma_links;         /* of them */
    atomic_bool rdma_said;          /* that it failed */
    atomic_uint rdma_failures;      /* in a row */
    _Atomic uint64_t rdma_after_ns; /* not over RDMA before */
    atomic_uint strikes;            /* corrupt shards in a row */
    _Atomic uint64_t quarantined_until_ns;
    _Atomic uint64_t yield_ns; /* its links' (transport.h) */
    struct slots_share slots;  /* the engine's slots_lock */
};

struct peers;

int peers_open(struct peers **peers);
void peers_close(struct peers *peers);
/* The peer of that name, made when new; address NULL: it has called, under a name that the metadata may not know. NULL:
 * out of memory, or one caller too many. */
struct peer *peers_get(struct peers *peers, const char *node, const char *address);
/* The peer of that number, or NULL. */
struct peer *peers_numbered(struct peers *peers, uint32_t number);
/* Takes the rates of all, about once a second. */
void peers_sample(struct peers *peers, uint64_t now_ns);
uint64_t peers_quarantines(struct peers *peers);
/* A shard from it was wrong: leave it alone for 30 s, then 60 s, ... at most 10 min. */
void peer_strike(struct peer *peer);
void peer_praise(struct peer *peer); /* a shard from it was right */
bool peer_quarantined(const struct peer *peer);
/* RDMA with it failed, or a shard came by it. After a failure it is left for 10 s, then 20 s, ... at most 5 min, where
 * there is TCP instead. */
void peer_rdma_failed(struct peer *peer, const char *reason, bool tcp_instead);
void peer_rdma_works(struct peer *peer);
int peers_list(struct peers *peers, const char *transport, struct engine_peer **out, size_t *count);

#endif
