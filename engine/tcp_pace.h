/* Tcp_pace: when shard bytes of a link wait: for the node's limits, and for what a reader of the same peer waits for on
 * another link. Private to the TCP transport; on the loop's thread only. */
#ifndef P2PFS_ENGINE_TCP_PACE_H
#define P2PFS_ENGINE_TCP_PACE_H

#include "engine/tcp_link.h"

void tcp_pace_open(struct tcp_link *link);  /* takes the transport's limits */
void tcp_pace_leave(struct tcp_link *link); /* leaves their lines, for good */

/* How many shard bytes may move now, SIZE_MAX: as many as there are. 0: the timer tells when. */
size_t tcp_pace_credit(struct tcp_link *link, struct tcp_pace *pace, bool urgent);
void tcp_pace_spend(struct tcp_pace *pace, size_t bytes);
/* Nothing moves this way: others need not wait for it. */
void tcp_pace_stop(struct tcp_link *link, struct tcp_pace *pace);

/* What is urgent and takes long has the other links of this peer yield, until it should have sent two slices more; not
 * for long, since it may be taken back meanwhile. */
void tcp_pace_yield_ask(struct tcp_link *link, const struct tcp_exposure *e, uint64_t now_ns);
/* How much of what is not urgent may leave in the next slice. 0: the timer tells when. */
size_t tcp_pace_yield_most(struct tcp_link *link, uint64_t now_ns);

#endif
