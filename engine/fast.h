/* Fast: RDMA beside the ordinary transport, and when it is taken.
 *
 * Every lane has both. A peer that announces an RDMA address is connected to by RDMA; when that does not work, by the
 * ordinary transport, and RDMA is left alone for a while. */
#ifndef P2PFS_ENGINE_FAST_H
#define P2PFS_ENGINE_FAST_H

#include "engine/peers.h"

struct engine;

/* Before lanes start: on all lanes, or on none; engine->fast_why tells why not. 0; an error when config.rdma asks for
 * more than there is, with one sentence for the user (malloc'd). */
int fast_open(struct engine *engine, char **error);
/* Any thread: a link to the node should be tried by RDMA now. */
bool fast_may(const struct engine *engine, const struct peer *peer, const struct model_node *node);
/* The end of an RDMA link tells that RDMA with its peer does not work: not when the peer ended it after shards had come
 * that way, or took one back, or said something wrong. */
bool fast_at_fault(int error, bool shards_came);

#endif
