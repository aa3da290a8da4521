/* Lent: replicas whose bytes lie in memory of the calling program (extents.h): what the program registers there, and
 * what it pulls there. What the program's side calls stands in engine.h (engine_lent_*). */
#ifndef P2PFS_ENGINE_LENT_H
#define P2PFS_ENGINE_LENT_H

#include "engine/replica.h"
#include "engine/transport.h"

/* Where a shard of any replica is received, or from where it is sent. */
struct lent_place {
    uint8_t *at; /* in the mapping or the program's memory, or the bounce buffer; NULL: in pieces */
    struct iovec *pieces; /* it lies in several ranges, and the transport can do that (malloc'd) */
    size_t piece_count;
    uint8_t *bounce; /* it does, and the transport cannot: the bytes pass through here */
};
/* scattered: as the link's transport has it. -ENOMEM. */
int lent_place(struct replica *replica, uint32_t shard, bool scattered, struct lent_place *place);
void lent_place_clear(struct engine *engine, struct lent_place *place);
/* What a peer is granted, which is at `place` from then on. -ENOMEM, -EFAULT. Lane thread. */
int lent_region(struct replica *replica, uint32_t shard, bool scattered, struct lent_place *place,
                struct transport_region *region);
/* For digest.h's gather; arg: the place. */
const uint8_t *lent_gather(void *arg, size_t offset, size_t length, uint8_t *leaf);
/* The shard's bytes to their place, with its pages. Errors of storage_populate. */
int lent_shard_write(struct replica *replica, uint32_t shard, const uint8_t *bytes);
/* Gives [offset, offset + length) of the place its pages, as storage_populate. */
int lent_populate(const struct lent_place *place, uint64_t offset, uint64_t length);

#endif
