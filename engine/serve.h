/* Serve: the accepted links of a lane: who may have what of this node's bytes, and how much at once.
 *
 *   session: GREETED (HELLO answered) -> READY (PROOF right);  anything else ends the link
 *
 * A granted shard stays where it is until the puller says DONE, or the link ends, or the grant is revoked: eviction
 * revokes, and only then reuses memory. Lane thread only. */
#ifndef P2PFS_ENGINE_SERVE_H
#define P2PFS_ENGINE_SERVE_H

#include "engine/lane.h"
#include "engine/replica.h"

void serve_accepted(struct lane *lane, struct link *link);
void serve_message(struct link *link, const void *message, size_t length);
void serve_writable(struct link *link);
void serve_exposed_sent(struct link *link, uint32_t id);
void serve_down(struct link *link, int error, const char *reason);

/* Grants that waited for the limit of uploads. */
void serve_pace(struct loop_timer *timer);
void serve_tick(struct lane *lane, uint64_t now_ns);
/* Tells attached peers what has landed here since the last time (HAVE, DIGESTS). */
void serve_news(struct lane *lane);
/* Posted to all lanes with a reference: every session forgets the replica; peers hear GONE. */
void serve_revoke(struct lane *lane, void *replica);
/* The same on one lane, without a reference, and at once: when it returns nobody reads its bytes through this lane. */
void serve_drop(struct lane *lane, struct replica *replica);
void serve_close_all(struct lane *lane);

#endif
