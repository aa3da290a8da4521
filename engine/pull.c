#include "engine/pull.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "engine/cache.h"
#include "engine/neighbours.h"
#include "engine/source.h"
#include "engine/storage.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

#define PULL_LINGER_NS 2000000000ull /* a pull on demand keeps its sources for so long */
#define PULL_LOOK_FIRST_NS \
    250000000ull /* looks for holders: first repeat, then doubling up to the last */
#define PULL_LOOK_LAST_NS 5000000000ull
#define PULL_QUIET_NS     500000000ull /* nothing came for so long: look again */
#define PULL_REVIEW_NS    500000000ull /* how often the neighbours are compared */
#define PULL_LANE_CEILING 16           /* shards on their way on one lane, at most */

static bool pull_home(const struct pull *pull)
{
    return pull->replica->version.id.bytes[0] % pull->lane->engine->lane_count == pull->lane->index;
}

/* ---- looking for holders ---- */

static void look_run(struct lane *lane, void *replica);

static void looked(void *arg, int status, const struct model_holder *holders, size_t count)
{
    struct replica *replica = arg;
    struct engine *engine = replica->engine;
    pthread_mutex_lock(&replica->lock);
    replica->looking = false;
    if (status == 0) {
        for (size_t i = 0; i < count; i++) {
            neighbours_learn(replica, &holders[i].node);
        }
        if (replica->neighbours) {
            (void)neighbours_choose(replica, SPREAD_NEIGHBOURS_FIRST, util_now_ms());
        }
        replica->holder_count = count;
        replica->looked = true;
        replica->offline = count == 0;
    }
    pthread_mutex_unlock(&replica->lock);
    if (status == 0 && !atomic_load(&engine->closing)) {
        pull_neighbours_changed(replica);
    }
    replica_put(replica);
    core_release(engine);
}

static void look(struct replica *replica)
{
    struct engine *engine = replica->engine;
    pthread_mutex_lock(&replica->lock);
    bool start = !replica->looking && core_hold_open(engine);
    replica->looking |= start;
    pthread_mutex_unlock(&replica->lock);
    if (!start) {
        return;
    }
    replica_get(replica);
    int status = catalog_holders(engine->config.catalog, &replica->version.id, looked, replica);
    if (status < 0) {
        looked(replica, status, NULL, 0);
    }
}

static struct pull *pull_find(struct lane *lane, const struct replica *replica)
{
    struct pull *pull;
    DL_FOREACH(lane->pulls, pull) {
        if (pull->replica == replica) {
            return pull;
        }
    }
    return NULL;
}

/* The lanes share what is on its way at least; but one that has less than the least stands still now and then. */
static uint16_t lane_floor(const struct replica *replica)
{
    unsigned lanes = replica->engine->lane_count;
    unsigned share = (spread_width(replica->shards) + lanes - 1) / lanes;
    return (uint16_t)(share > SPREAD_WIDTH_LEAST ? share : SPREAD_WIDTH_LEAST);
}

static void look_run(struct lane *lane, void *arg)
{
    struct replica *replica = arg;
    struct pull *pull = pull_find(lane, replica);
    if (pull) {
        source_update(pull);
    }
    replica_put(replica);
}

void pull_neighbours_changed(struct replica *replica)
{
    lane_post_all(replica->engine, look_run, replica);
}

/* ---- room ---- */

struct room_job {
    struct work_job job;
    struct replica *replica;
};

static void pull_run(struct lane *lane, void *replica);

static void room_run(struct work_job *job)
{
    struct room_job *room = util_container(job, struct room_job, job);
    struct replica *replica = room->replica;
    struct engine *engine = replica->engine;
    free(room);

    pthread_mutex_lock(&replica->lock);
    uint64_t need = storage_charge(replica->version.size);
    need -= need < replica->reserved ? need : replica->reserved;
    if (!replica->whole) {
        uint64_t some = (uint64_t)replica->version.shard_size * 4;
        need = need < some ? need : some;
    }
    pthread_mutex_unlock(&replica->lock);
    int status = cache_make_room(engine->cache, need);
    pthread_mutex_lock(&replica->lock);
    if (status == 0 && replica->whole &&
        !cache_reserve(engine->cache, replica, replica->version.size)) {
        status = -ENOSPC; /* somebody was quicker */
    }
    replica->room_wanted = false;
    pthread_mutex_unlock(&replica->lock);
    if (status < 0) {
        replica_fail(
            replica, status,
            "the cache is full of what cannot be evicted (open, pinned or the last copy); raise cache_size=, or "
            "evict something");
    }
    lane_post_all(engine, pull_run, replica);
    replica_put(replica);
    core_release(engine);
}

static void room_request(struct replica *replica)
{
    pthread_mutex_lock(&replica->lock);
    bool start = !replica->room_wanted && core_hold_open(replica->engine);
    replica->room_wanted |= start;
    pthread_mutex_unlock(&replica->lock);
    if (!start) {
        return;
    }
    struct room_job *room = malloc(sizeof *room);
    if (!room) {
        pthread_mutex_lock(&replica->lock);
        replica->room_wanted = false; /* the next pump asks again */
        pthread_mutex_unlock(&replica->lock);
        core_release(replica->engine);
        return;
    }
    *room = (struct room_job){.job.run = room_run, .replica = replica};
    replica_get(replica);
    work_post(replica->engine->work, &room->job);
}

/* ---- the pull's life ---- */

/* What all lanes share: the order of shards, and the neighbours; from pull_want on, as long as a lane or the pull itself
 * needs it. Lock held. */
static int plan_open(struct replica *replica)
{
    if (replica->spread) {
        return 0;
    }
    int status = neighbours_open(replica);
    if (status < 0) {
        return status;
    }
    status = spread_open(replica->shards, &replica->spread);
    if (status < 0) {
        neighbours_close(replica);
        return status;
    }
    for (uint32_t k = 0; k < replica->shards; k++) {
        if (replica->states[k] == SPREAD_PRESENT) {
            spread_land(replica->spread, k);
        }
    }
    return 0;
}

static void plan_leave(struct replica *replica)
{
    pthread_mutex_lock(&replica->lock);
    if (--replica->pulls == 0 && !replica->pulling) {
        spread_close(replica->spread);
        replica->spread = NULL;
        neighbours_close(replica);
    }
    pthread_mutex_unlock(&replica->lock);
}

static void pull_free(struct pull *pull)
{
    struct replica *replica = pull->replica;
    source_clear(pull);
    DL_DELETE(pull->lane->pulls, pull);
    free(pull);
    plan_leave(replica);
    cache_retire(replica->engine->cache, replica);
    replica_put(replica);
}

void pull_drop(struct lane *lane, const struct replica *replica)
{
    struct pull *pull = pull_find(lane, replica);
    if (pull) {
        pull_free(pull);
    }
}

/* Posted to every lane when a replica wants bytes: begins, or goes on. */
static void pull_run(struct lane *lane, void *arg)
{
    struct replica *replica = arg;
    struct pull *pull = pull_find(lane, replica);
    if (!pull) {
        pthread_mutex_lock(&replica->lock);
        bool planned = replica->spread;
        pull = planned ? calloc(1, sizeof *pull) : NULL;
        replica->pulls += pull != NULL;
        pthread_mutex_unlock(&replica->lock);
        if (!pull) {
            if (planned) {
                replica_fail(replica, -ENOMEM, "no memory for the pull");
            } /* else it has ended already */
            replica_put(replica);
            return;
        }
        pull->lane = lane;
        pull->replica = replica;
        pull->window = spread_window_new(lane_floor(replica), PULL_LANE_CEILING);
        pull->room_request = room_request;
        pull->look_wait_ns = PULL_LOOK_FIRST_NS;
        pull->look_ns = loop_now_ns(lane->loop) + PULL_LOOK_FIRST_NS;
        pull->full_ns = loop_now_ns(lane->loop);
        pull->review_ns = loop_now_ns(lane->loop) + PULL_REVIEW_NS;
        replica_get(replica);
        DL_APPEND(lane->pulls, pull);
    }
    source_update(pull);
    source_pump_all(pull);
    replica_put(replica);
}

int pull_want(struct replica *replica, bool whole)
{
    struct engine *engine = replica->engine;
    pthread_mutex_lock(&replica->lock);
    if (replica_complete(replica) || replica->inplace || atomic_load(&engine->closing)) {
        pthread_mutex_unlock(&replica->lock);
        return atomic_load(&engine->closing) ? -ESHUTDOWN : 0;
    }
    int status = replica_storage_open(replica);
    if (status == 0 && !replica->pulling) {
        status = plan_open(replica);
    }
    if (status < 0) {
        pthread_mutex_unlock(&replica->lock);
        return status;
    }
    bool grows = whole && !replica->whole;
    bool starts = !replica->pulling;
    replica->whole |= whole;
    if (starts) {
        replica->pulling = true;
        replica->pull_started_ns = util_now_ns();
        replica->progress_ns = replica->pull_started_ns;
        replica->looked = false;
        replica->error = 0;
        replica_reason_set(replica, NULL);
        atomic_fetch_add(&engine->counters.pulls_running, 1);
    }
    bool room = !grows || cache_reserve(engine->cache, replica, replica->version.size);
    pthread_mutex_unlock(&replica->lock);

    if (starts) {
        look(replica);
    }
    if (!room) {
        room_request(replica);
    }
    /* Also when it runs already: the lanes then see what this reader waits for. */
    lane_post_all(engine, pull_run, replica);
    return 0;
}

void pull_stop(struct replica *replica)
{
    pthread_mutex_lock(&replica->lock);
    bool ran = replica->pulling;
    replica->pulling = false;
    replica->whole = false;
    pthread_mutex_unlock(&replica->lock);
    if (ran) {
        atomic_fetch_sub(&replica->engine->counters.pulls_running, 1);
    }
}

/* Home lane: decides whether the pull goes on, and looks for holders again. */
static void home_tick(struct pull *pull, uint64_t now)
{
    struct replica *replica = pull->replica;
    struct engine *engine = replica->engine;
    uint64_t timeout_ns = (uint64_t)engine->config.read_timeout_ms * 1000000;
    char reason[160] = "";

    pthread_mutex_lock(&replica->lock);
    bool ran = replica->pulling;
    bool complete = ran && replica_complete(replica);
    bool wanted = ran && (replica->waiters || replica->whole);
    bool changed = false;
    if (ran && now >= pull->review_ns) {
        pull->review_ns = now + PULL_REVIEW_NS;
        changed = neighbours_review(replica, now / 1000000);
    }
    uint64_t quiet = now > replica->progress_ns ? now - replica->progress_ns : 0;
    if (!ran || complete) {
        replica->pulling = false;
    } else if ((replica->phase == REPLICA_DOOMED && replica->opens == 0) ||
               (!wanted && quiet > PULL_LINGER_NS)) {
        replica->whole = false;
        replica->pulling = false;
    } else if (wanted && replica->looked && replica->offline && replica->sources == 0 &&
               !replica->looking) {
        snprintf(reason, sizeof reason,
                 "offline: no live node holds it; it works again when a holder returns");
    } else if (wanted && quiet > timeout_ns) {
        snprintf(reason, sizeof reason,
                 "%zu holder(s) known, none delivered anything for %u s (read_timeout=)",
                 replica->holder_count, engine->config.read_timeout_ms / 1000);
    }
    if (reason[0]) { /* the next reader starts afresh, with a look of its own */
        replica->pulling = false;
    }
    bool ended = ran && !replica->pulling;
    bool lonely = replica->sources == 0 || quiet > PULL_QUIET_NS;
    pthread_mutex_unlock(&replica->lock);
    if (changed && !ended) {
        pull_neighbours_changed(replica);
    }
    replica_late(replica);

    if (complete) {
        atomic_fetch_add(&engine->counters.pulls_completed, 1);
    }
    if (ended) {
        atomic_fetch_sub(&engine->counters.pulls_running, 1);
    }
    if (reason[0]) {
        replica_fail(replica, -EIO, reason);
    }
    if (!ended && wanted && lonely && now >= pull->look_ns) {
        pull->look_ns = now + pull->look_wait_ns;
        pull->look_wait_ns =
            pull->look_wait_ns * 2 < PULL_LOOK_LAST_NS ? pull->look_wait_ns * 2 : PULL_LOOK_LAST_NS;
        look(replica);
    }
}

void pull_tick(struct lane *lane, uint64_t now_ns)
{
    struct pull *pull;
    struct pull *next;
    DL_FOREACH_SAFE(lane->pulls, pull, next) {
        source_tick(pull, now_ns);
        if (pull_home(pull)) {
            home_tick(pull, now_ns);
        }
        pthread_mutex_lock(&pull->replica->lock);
        bool runs = pull->replica->pulling;
        pthread_mutex_unlock(&pull->replica->lock);
        if (runs) {
            source_pump_all(pull);
        } else {
            pull_free(pull);
        }
    }
}

void pull_close_all(struct lane *lane)
{
    struct pull *pull;
    struct pull *next;
    DL_FOREACH_SAFE(lane->pulls, pull, next) {
        pull_free(pull);
    }
}
