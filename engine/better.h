/* Better: RDMA tried beside a link that goes by TCP. A peer that RDMA failed with, or that began to offer it, is not left to
 * TCP for as long as pulls keep that link busy.
 *
 *   none -> tried -> made -> taken: the supplier's link from then on;   tried, made -> none when it fails
 *
 * Lane thread only; zeroed is none. The owner passes on the events of its link. */
#ifndef P2PFS_ENGINE_BETTER_H
#define P2PFS_ENGINE_BETTER_H

#include "engine/peers.h"

struct lane;
struct link;

struct better {
    struct link *link; /* NULL: none */
    uint64_t made_ns;  /* 0: not made yet */
};

/* There is none: begins one with that user (transport.h), if RDMA may be used with the peer. */
void better_try(struct better *better, struct lane *lane, struct peer *peer,
                const struct model_node *node, uint32_t connect_ms, void *user);
/* It is made; what is under way on the old link, if anything, has ended or had its time. */
bool better_due(const struct better *better, bool under_way, uint64_t now_ns);
/* The caller's from now on. */
struct link *better_take(struct better *better);
void better_end(struct better *better);
/* It is down, or spoke before it was greeted: ends it, and RDMA is left alone for a while. */
void better_fail(struct better *better, struct peer *peer, const char *reason);

#endif
