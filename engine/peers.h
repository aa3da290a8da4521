/* Peers: what this node remembers of every other: counters, strikes, quarantine. Any thread. */
#ifndef P2PFS_ENGINE_PEERS_H
#define P2PFS_ENGINE_PEERS_H

#include <stdatomic.h>
#include <uthash.h>

#include "engine/engine.h"

/* Lives as long as the table. */
struct peer {
    char node[MODEL_NODE_MAX + 1];
    char address[MODEL_ADDRESS_MAX + 1]; /* the table's lock */
    UT_hash_handle hh;
    atomic_ullong received, sent, verified, corrupt, failed;
    atomic_uint links;
    atomic_uint strikes; /* corrupt shards in a row */
    _Atomic uint64_t quarantined_until_ns;
};

struct peers;

int peers_open(struct peers **peers);
void peers_close(struct peers *peers);
/* The peer of that name, made when new; address NULL: it has called, under a name that the metadata may not know. NULL:
 * out of memory, or one caller too many. */
struct peer *peers_get(struct peers *peers, const char *node, const char *address);
/* A shard from it was wrong: leave it alone for 30 s, then 60 s, ... at most 10 min. */
void peer_strike(struct peer *peer);
void peer_praise(struct peer *peer); /* a shard from it was right */
bool peer_quarantined(const struct peer *peer);
int peers_list(struct peers *peers, const char *transport, struct engine_peer **out, size_t *count);

#endif
