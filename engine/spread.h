/* Spread: which shard to ask next, of whom, and how many at once.
 *
 * Pure functions over what the caller knows: no clock, no I/O, no lock, no memory of their own. Order: shards that a
 * reader waits for, first come first served; then read-ahead behind the reader's position; then rarest first, ties at
 * random (rarest first: B. Cohen, "Incentives Build Robustness in BitTorrent", 2003). */
#ifndef P2PFS_ENGINE_SPREAD_H
#define P2PFS_ENGINE_SPREAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SPREAD_NONE  UINT32_MAX
#define SPREAD_AHEAD 8 /* shards of read-ahead that go before rarest first */

enum spread_shard_state { SPREAD_ABSENT, SPREAD_FILLING, SPREAD_PRESENT };

struct spread_range {
    uint32_t first;
    uint32_t last; /* inclusive */
};

struct spread_view {
    uint32_t shards;
    const uint8_t *states;             /* shards x enum spread_shard_state */
    const uint16_t *rarity;            /* known sources for each shard; NULL: all alike */
    const struct spread_range *demand; /* what readers wait for, in order of arrival */
    size_t demand_count;
    uint32_t cursor; /* the shard that a reader wanted last, SPREAD_NONE: none */
    bool whole;      /* fetch everything, not only demand */
};

/* The next shard to ask of a source that has the shards in `bitmap` (bit k % 8 of byte k / 8; NULL: all), or
 * SPREAD_NONE. *urgent: a reader waits for it. `random` decides ties. */
uint32_t spread_next(const struct spread_view *view, const uint8_t *bitmap, uint64_t random,
                     bool *urgent);

/* How many shards may be in flight at one source: enough bytes to cover `rate` (bytes/s, 0: not known yet) for the
 * time that a grant takes, at least 2 and at most 16. Urgent ones may go SPREAD_URGENT_EXTRA beyond it. */
#define SPREAD_URGENT_EXTRA 2
uint32_t spread_window(uint64_t rate, uint32_t shard_size);

/* Milliseconds to leave a source alone after its n-th failure in a row (n >= 1): doubles from `first`, at most `last`,
 * less up to a quarter by `random` so that pullers do not come back together. */
uint32_t spread_backoff_ms(uint32_t failures, uint32_t first, uint32_t last, uint64_t random);

#endif
