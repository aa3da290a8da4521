/* Direct: drafts whose bytes the kernel writes by itself (FUSE passthrough), unseen by this process.
 *
 * Such a draft is `loose` until its last writer has let go, which is after the close(2) that registers it. Until then
 * its bytes are neither digested nor served, so that whatever a descriptor that nobody knew of still writes is part of
 * the version for everybody. It is registered without a digest, which follows in the background (inplace.h); small
 * files are copied at the close instead, and digested at once.
 *
 * Nobody can be made to wait for room, so each is promised more than it has, as it grows (direct_tick), by evicting
 * where that is needed; a writer that runs out of it fails like any other. */
#ifndef P2PFS_ENGINE_DIRECT_H
#define P2PFS_ENGINE_DIRECT_H

#include "engine/replica.h"

struct draft;

void direct_tick(struct engine *engine); /* lane 0, every LANE_TICK_MS */
/* The size as it is now. Lock held. */
uint64_t direct_size(const struct replica *draft);
/* Registering begins: its size and room as they are now. Work threads. -ENOSPC: a write may have failed. */
int direct_take(struct replica *draft);
/* Published, or its last writer gone: digests it when both are true. No lock held. */
void direct_settle(struct replica *replica);
/* The draft ends. No lock held. */
void direct_forget(struct draft *draft);

#endif
