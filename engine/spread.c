#include "engine/spread.h"

#define SPREAD_WINDOW_MIN   2
#define SPREAD_WINDOW_MAX   16
#define SPREAD_WINDOW_BYTES (32ull << 20) /* for a source whose rate is not known yet */

static bool source_has(const uint8_t *bitmap, uint32_t shard)
{
    return !bitmap || (bitmap[shard / 8] >> (shard % 8) & 1);
}

static bool may_take(const struct spread_view *view, const uint8_t *bitmap, uint32_t shard)
{
    return view->states[shard] == SPREAD_ABSENT && source_has(bitmap, shard);
}

static uint32_t demand_next(const struct spread_view *view, const uint8_t *bitmap)
{
    for (size_t i = 0; i < view->demand_count; i++) {
        for (uint32_t k = view->demand[i].first; k <= view->demand[i].last && k < view->shards;
             k++) {
            if (may_take(view, bitmap, k)) {
                return k;
            }
        }
    }
    return SPREAD_NONE;
}

static uint32_t ahead_next(const struct spread_view *view, const uint8_t *bitmap)
{
    if (view->cursor == SPREAD_NONE) {
        return SPREAD_NONE;
    }
    for (uint32_t k = view->cursor; k < view->shards && k - view->cursor <= SPREAD_AHEAD; k++) {
        if (may_take(view, bitmap, k)) {
            return k;
        }
    }
    return SPREAD_NONE;
}

/* One pass from a random start: the first shard of the least rarity met wins, so ties go to a random place. */
static uint32_t rarest_next(const struct spread_view *view, const uint8_t *bitmap, uint64_t random)
{
    uint32_t best = SPREAD_NONE;
    uint16_t best_rarity = UINT16_MAX;
    uint32_t start = (uint32_t)(random % view->shards);
    for (uint32_t i = 0; i < view->shards; i++) {
        uint32_t k = start + i < view->shards ? start + i : start + i - view->shards;
        if (!may_take(view, bitmap, k)) {
            continue;
        }
        uint16_t rarity = view->rarity ? view->rarity[k] : 1;
        if (best == SPREAD_NONE || rarity < best_rarity) {
            best = k;
            best_rarity = rarity;
        }
        if (!view->rarity) {
            break;
        }
    }
    return best;
}

uint32_t spread_next(const struct spread_view *view, const uint8_t *bitmap, uint64_t random,
                     bool *urgent)
{
    *urgent = false;
    if (view->shards == 0) {
        return SPREAD_NONE;
    }
    uint32_t shard = demand_next(view, bitmap);
    if (shard != SPREAD_NONE) {
        *urgent = true;
        return shard;
    }
    if (!view->whole) {
        return SPREAD_NONE;
    }
    shard = ahead_next(view, bitmap);
    return shard != SPREAD_NONE ? shard : rarest_next(view, bitmap, random);
}

uint32_t spread_window(uint64_t rate, uint32_t shard_size)
{
    /* 20 ms of what it delivers: several round trips and the time in which a lane gets back to it. */
    uint64_t bytes = rate / 50;
    if (bytes < SPREAD_WINDOW_BYTES) {
        bytes = SPREAD_WINDOW_BYTES;
    }
    uint64_t shards = bytes / shard_size;
    if (shards < SPREAD_WINDOW_MIN) {
        return SPREAD_WINDOW_MIN;
    }
    return shards > SPREAD_WINDOW_MAX ? SPREAD_WINDOW_MAX : (uint32_t)shards;
}

uint32_t spread_backoff_ms(uint32_t failures, uint32_t first, uint32_t last, uint64_t random)
{
    uint64_t delay = first;
    for (uint32_t i = 1; i < failures && delay < last; i++) {
        delay *= 2;
    }
    if (delay > last) {
        delay = last;
    }
    return (uint32_t)(delay - (delay / 4 ? random % (delay / 4) : 0));
}
