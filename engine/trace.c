#include "engine/trace.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "engine/cache.h"
#include "engine/peers.h"
#include "meta/base/util.h"

#define TRACE_TRANSPORTS 4
#define TRACE_VERIFY_NS  10000ull /* the unit of the time that hashing took */

enum trace_flag {
    TRACE_LANDED = 1,
    TRACE_URGENT = 2,
    TRACE_HEDGED = 4,
    TRACE_TRANSPORT = 4, /* its number begins at this bit */
};

struct trace_shard {
    uint32_t peer; /* its number */
    uint32_t queued_us;
    uint32_t wire_us;
    uint16_t verify_10us;
    uint8_t missed;
    uint8_t flags;
};
_Static_assert(sizeof(struct trace_shard) == 16, "the memory that a shard costs is a promise");

struct trace {
    uint64_t first_ns; /* when the first shard was asked for, and the last one landed */
    uint64_t last_ns;
    const char *transports[TRACE_TRANSPORTS];
    struct trace_shard shards[];
};

void trace_free(struct trace *trace)
{
    free(trace);
}

static uint64_t least(uint64_t value, uint64_t most)
{
    return value < most ? value : most;
}

/* The record of a shard, NULL: no memory for one. Lock held. */
static struct trace_shard *shard_of(struct replica *replica, uint32_t shard)
{
    if (!replica->trace) {
        replica->trace =
            calloc(1, sizeof *replica->trace + replica->shards * sizeof *replica->trace->shards);
    }
    return replica->trace && shard < replica->shards ? &replica->trace->shards[shard] : NULL;
}

static unsigned transport_number(struct trace *trace, const char *name)
{
    unsigned i = 0;
    while (i < TRACE_TRANSPORTS - 1 && trace->transports[i] &&
           strcmp(trace->transports[i], name) != 0) {
        i++;
    }
    trace->transports[i] = name;
    return i;
}

void trace_landed(struct replica *replica, uint32_t shard, const struct trace_landing *landing)
{
    struct core_counters *counters = &replica->engine->counters;
    atomic_fetch_add(&counters->queued_ns, landing->queued_ns);
    atomic_fetch_add(&counters->wire_ns, landing->wire_ns);
    atomic_fetch_add(&counters->verify_ns, landing->verify_ns);

    uint64_t now = util_now_ns();
    pthread_mutex_lock(&replica->lock);
    struct trace_shard *record = shard_of(replica, shard);
    if (record) {
        struct trace *trace = replica->trace;
        unsigned transport = transport_number(trace, landing->transport);
        uint64_t took = landing->queued_ns + landing->wire_ns;
        if (trace->first_ns == 0) {
            trace->first_ns = now - least(took, now);
        }
        trace->last_ns = now;
        record->peer = landing->peer->number;
        record->queued_us = (uint32_t)least(landing->queued_ns / 1000, UINT32_MAX);
        record->wire_us = (uint32_t)least(landing->wire_ns / 1000, UINT32_MAX);
        record->verify_10us = (uint16_t)least(landing->verify_ns / TRACE_VERIFY_NS, UINT16_MAX);
        record->flags =
            (uint8_t)(TRACE_LANDED | (landing->urgent ? TRACE_URGENT : 0) |
                      (landing->hedged ? TRACE_HEDGED : 0) | transport << TRACE_TRANSPORT);
    }
    pthread_mutex_unlock(&replica->lock);
}

void trace_missed(struct replica *replica, uint32_t shard)
{
    pthread_mutex_lock(&replica->lock);
    struct trace_shard *record = shard_of(replica, shard);
    if (record && record->missed < UINT8_MAX) {
        record->missed++;
    }
    pthread_mutex_unlock(&replica->lock);
}

/* ---- for engine.h ---- */

static void shard_tell(struct engine *engine, const struct trace *trace, uint32_t shard,
                       struct engine_why_shard *out)
{
    const struct trace_shard *record = &trace->shards[shard];
    const struct peer *peer = peers_numbered(engine->peers, record->peer);
    bool landed = record->flags & TRACE_LANDED;
    *out = (struct engine_why_shard){
        .node = landed && peer ? peer->node : NULL,
        .transport = landed ? trace->transports[record->flags >> TRACE_TRANSPORT] : NULL,
        .queued_ns = record->queued_us * 1000ull,
        .wire_ns = record->wire_us * 1000ull,
        .verify_ns = record->verify_10us * TRACE_VERIFY_NS,
        .missed = record->missed,
        .urgent = record->flags & TRACE_URGENT,
        .hedged = record->flags & TRACE_HEDGED,
    };
}

int engine_why(struct engine *engine, const struct model_id *version, struct engine_why *out)
{
    *out = (struct engine_why){0};
    struct replica *replica = cache_find(engine->cache, version);
    if (!replica) {
        return -ENOENT;
    }
    int status = 0;
    pthread_mutex_lock(&replica->lock);
    out->count = replica->shards;
    out->shard_size = replica->version.shard_size;
    out->size = replica->version.size;
    const struct trace *trace = replica->trace;
    if (trace) {
        out->took_ns = trace->last_ns - trace->first_ns;
        out->shards = calloc(out->count ? out->count : 1, sizeof *out->shards);
        status = out->shards ? 0 : -ENOMEM;
    }
    for (uint32_t k = 0; out->shards && k < out->count; k++) {
        shard_tell(engine, trace, k, &out->shards[k]);
        out->shards[k].present = replica_shard_present(replica, k);
    }
    pthread_mutex_unlock(&replica->lock);
    replica_put(replica);
    return status;
}

int engine_pulls(struct engine *engine, struct engine_pull_info **out, size_t *count)
{
    struct replica **all = NULL;
    size_t found = 0;
    *count = 0;
    int status = cache_snapshot(engine->cache, &all, &found);
    if (status < 0) {
        return status;
    }
    *out = calloc(found ? found : 1, sizeof **out);
    uint64_t now = util_now_ns();
    for (size_t i = 0; i < found; i++) {
        struct replica *r = all[i];
        pthread_mutex_lock(&r->lock);
        if (*out && r->pulling && !replica_complete(r)) {
            struct engine_pull_info *to = &(*out)[(*count)++];
            *to = (struct engine_pull_info){.version = r->version.id,
                                            .size = r->version.size,
                                            .resident = atomic_load(&r->resident),
                                            .shards = r->shards,
                                            .shards_present = atomic_load(&r->present),
                                            .sources = r->sources,
                                            .whole = r->whole,
                                            .running_ns = now - r->pull_started_ns};
            const struct engine_waiter *waiter;
            DL_FOREACH(r->waiters, waiter) {
                to->waiting++;
            }
        }
        pthread_mutex_unlock(&r->lock);
        replica_put(r);
    }
    free(all);
    return *out ? 0 : -ENOMEM;
}
