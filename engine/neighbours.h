/* Neighbours: the nodes that a running pull may take from, and the few of them that it does.
 *
 * Learnt from the catalog's list of holders, from peers (PEERS) and from who follows this node's own copy; a node that
 * a peer names is believed only with the incarnation and the address that the catalog has. `spread` chooses. Guarded by
 * the replica's lock. */
#ifndef P2PFS_ENGINE_NEIGHBOURS_H
#define P2PFS_ENGINE_NEIGHBOURS_H

#include "engine/peers.h"
#include "engine/replica.h"

#define NEIGHBOURS_KNOWN_MAX 128
#define NEIGHBOURS_ALL_LANES UINT32_MAX

struct neighbour {
    struct model_node node;
    struct peer *peer;
    bool near;
    bool far; /* in another locality, while both sides say where they are */
    bool chosen;
    bool gone;         /* it said that it has nothing; until it is named again */
    bool complete;     /* it said that it has everything */
    unsigned attached; /* sources of all lanes */
    uint32_t lane;     /* whose links it is on */
    uint64_t since_ms; /* chosen or known */
    uint64_t received; /* what the peer had given at the last review */
    struct neighbour *prev, *next;
};

struct neighbours;

/* Lock held for all of these. */
int neighbours_open(struct replica *replica); /* 0, -ENOMEM; harmless when it is there */
void neighbours_close(struct replica *replica);
struct neighbour *neighbours_list(const struct replica *replica); /* utlist; NULL: none */
struct neighbour *neighbours_find(const struct replica *replica, const char *node, uint64_t boot);
/* A live node has the version, or pulls it. */
void neighbours_learn(struct replica *replica, const struct model_node *node);
/* Fills free places, up to `most`. True: something was chosen; the lanes have to be told. */
bool neighbours_choose(struct replica *replica, size_t most, uint64_t now_ms);
/* From time to time: forgets who is not in the catalog any more, and gives up the worst for somebody new. True: as
 * above. */
bool neighbours_review(struct replica *replica, uint64_t now_ms);

/* Who of this node's locality goes far for which shard; NULL: everybody, for this node does not say where it is. */
const struct spread_rack *neighbours_rack(const struct replica *replica);

/* No lock held: a peer says that the node has the version or pulls it. chose_us: it pulls from here, and becomes a
 * neighbour beyond those that we chose. True: the lanes have to be told. */
bool neighbours_hear(struct replica *replica, const char *node, uint64_t boot, bool chose_us);

#endif
