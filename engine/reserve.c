#include "engine/reserve.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "engine/cache.h"
#include "engine/storage.h"
#include "meta/base/memory.h"
#include "meta/base/util.h"
#include "meta/catalog.h"

#define RESERVE_RESIDENT STORAGE_SPARE_MIN /* replicas of so many bytes: a pull has been here */
#define RESERVE_WAIT_MS  60000             /* after memory was scarce */

struct reserve {
    struct engine *engine;
    struct work_job job;
    atomic_bool looking;        /* the job is under way; what follows is its own */
    struct catalog_totals seen; /* what follows is of then; {0}: look anew */
    size_t count;
    uint64_t sizes[STORAGE_RESERVE_FILES]; /* of the files to prepare */
    uint64_t wanted[STORAGE_RESERVE_FILES];
    size_t wanted_count;
    uint64_t wait_until_ms;
};

uint64_t reserve_budget(uint64_t cache_limit, uint64_t available)
{
    uint64_t budget = cache_limit / 4 < available / 8 ? cache_limit / 4 : available / 8;
    return budget < STORAGE_SPARE_MAX ? budget : STORAGE_SPARE_MAX;
}

size_t reserve_plan(const uint64_t *sizes, size_t count, uint64_t budget, uint64_t *out)
{
    size_t planned = 0;
    for (; planned < count; planned++) {
        /* What is cut is no file's size, so it need not end within a huge page. */
        uint64_t size = sizes[planned] <= budget ? sizes[planned] : budget & ~(STORAGE_HUGE - 1);
        if (size < STORAGE_SPARE_MIN) {
            break;
        }
        out[planned] = size;
        budget -= size;
    }
    return planned;
}

bool reserve_dear(uint64_t held, uint64_t available)
{
    return held > 0 && available / 3 < held;
}

static void forget(struct reserve *reserve)
{
    reserve->seen = (struct catalog_totals){0};
    reserve->wanted_count = reserve->count = 0;
}

/* Plans again when the largest files are others. Not at every change of the machine's memory, which would clear files of
 * ever other sizes; and no look at all names without need. */
static void plan(struct reserve *reserve, uint64_t cache_limit)
{
    struct engine *engine = reserve->engine;
    struct catalog_totals totals = {0};
    catalog_totals(engine->config.catalog, &totals);
    uint64_t held = storage_reserved(engine->storage);
    if (held > 0 && reserve_dear(held, memory_available())) {
        reserve->wait_until_ms = util_now_ms() + RESERVE_WAIT_MS;
    }
    if (util_now_ms() < reserve->wait_until_ms) {
        forget(reserve);
        return;
    }
    if (totals.files == reserve->seen.files && totals.bytes == reserve->seen.bytes) {
        return;
    }
    reserve->seen = totals;
    uint64_t wanted[STORAGE_RESERVE_FILES] = {0};
    size_t count =
        catalog_largest(engine->config.catalog, engine->config.node, wanted, STORAGE_RESERVE_FILES);
    if (count != reserve->wanted_count || memcmp(wanted, reserve->wanted, sizeof wanted) != 0) {
        memcpy(reserve->wanted, wanted, sizeof wanted);
        reserve->wanted_count = count;
        reserve->count = reserve_plan(
            wanted, count, reserve_budget(cache_limit, memory_available() + held), reserve->sizes);
    }
}

static void look(struct work_job *job)
{
    struct reserve *reserve = util_container(job, struct reserve, job);
    struct engine *engine = reserve->engine;
    uint64_t limit;
    uint64_t used;
    cache_usage(engine->cache, &limit, &used);
    if (atomic_load(&engine->counters.pulls_running) > 0) {
        storage_reserve_pause(engine->storage); /* the next file of this pull may still want it */
    } else if (used >= RESERVE_RESIDENT) {
        storage_reserve(engine->storage, NULL, 0);
        forget(reserve);
    } else {
        plan(reserve, limit);
        storage_reserve(engine->storage, reserve->sizes, reserve->count);
        if (atomic_load(&engine->counters.pulls_running) > 0) {
            storage_reserve_pause(engine->storage); /* it began just now */
        }
    }
    atomic_store(&reserve->looking, false);
    core_release(engine);
}

void reserve_tick(struct reserve *reserve)
{
    if (!reserve || atomic_exchange(&reserve->looking, true)) {
        return;
    }
    if (!core_hold_open(reserve->engine)) {
        return; /* it closes */
    }
    work_post(reserve->engine->work, &reserve->job);
}

int reserve_open(struct engine *engine, struct reserve **reserve)
{
    *reserve = NULL;
    if (!engine->config.catalog || engine->config.cache_dir ||
        reserve_budget(engine->config.cache_size, UINT64_MAX) < STORAGE_SPARE_MIN) {
        return 0; /* too small, or not in memory */
    }
    struct reserve *r = calloc(1, sizeof *r);
    if (!r) {
        return -ENOMEM;
    }
    r->engine = engine;
    r->job.run = look;
    *reserve = r;
    return 0;
}

void reserve_close(struct reserve *reserve)
{
    free(reserve);
}
