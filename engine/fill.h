/* Fill: one shard on its way from one source: asked, granted, landing, verified; moved to another source while it only
 * waits, asked a second time when it is late. Lane thread only.
 *
 *   ASKED -> GRANTED -> landed and settled;  any -> ended with an error, cancelled, or moved
 *
 * A hedge, the second fill of a shard, lands in memory of its own, so two peers never write to the same place: the
 * first to be verified counts, and the other is cancelled before its bytes matter. */
#ifndef P2PFS_ENGINE_FILL_H
#define P2PFS_ENGINE_FILL_H

#include "engine/source.h"

/* The shard is FILLING, by the caller's hand. 0; else never started, and the shard is the caller's to put back. */
int fill_start(struct source *source, uint32_t shard, bool urgent);
/* Nothing is left to ask of an idle source: it takes over a shard that only waits elsewhere. False: there is none. */
bool fill_move(struct source *source, uint64_t now_ns);
/* Shards that a reader waits for now, but that wait as background, are put back, to be asked again as urgent. */
void fill_promote(struct pull *pull);
/* Takes shards that do not move away from their source where another one has them; asks late ones twice. */
void fill_tick(struct pull *pull, uint64_t now_ns);
/* Cancels all that comes from the source; the shards are put back. */
void fill_cancel_all(struct source *source);

#endif
