/* What the engine tells of itself: of a version, of peers, and of all. */
#include <stdio.h>
#include <string.h>

#include "engine/cache.h"
#include "engine/draft.h"
#include "engine/engine.h"
#include "engine/lane.h"
#include "engine/peers.h"
#include "engine/storage.h"

const char *engine_state_name(enum engine_state state)
{
    static const char *const names[] = {
        [ENGINE_REMOTE] = "remote",     [ENGINE_PARTIAL] = "partial",
        [ENGINE_FETCHING] = "fetching", [ENGINE_COMPLETE] = "complete",
        [ENGINE_INPLACE] = "inplace",   [ENGINE_CHANGED] = "changed",
        [ENGINE_OFFLINE] = "offline",   [ENGINE_WRITING] = "writing",
    };
    return names[state];
}

static enum engine_state state_of(const struct replica *r)
{
    if (r->draft) {
        return ENGINE_WRITING;
    }
    if (r->inplace) {
        return r->changed ? ENGINE_CHANGED : ENGINE_INPLACE;
    }
    if (replica_complete(r)) {
        return ENGINE_COMPLETE;
    }
    if (r->pulling && (r->whole || r->waiters)) {
        return ENGINE_FETCHING;
    }
    if (r->looked && r->offline && r->sources == 0) {
        return ENGINE_OFFLINE;
    }
    return atomic_load(&r->present) ? ENGINE_PARTIAL : ENGINE_REMOTE;
}

static void info_fill(struct replica *r, struct engine_info *out)
{
    pthread_mutex_lock(&r->lock);
    enum engine_state state = state_of(r);
    bool here = state == ENGINE_COMPLETE || r->inplace || r->draft;
    *out =
        (struct engine_info){.state = state,
                             .size = r->version.size,
                             .shard_size = r->version.shard_size,
                             .shards = r->shards,
                             .shards_present = atomic_load(&r->present),
                             .resident = atomic_load(&r->resident),
                             .sources = r->sources,
                             .pinned = r->pinned,
                             .sealed = r->version.sealed,
                             .open = r->opens,
                             .digest = r->version.digest,
                             .transport = here && !r->pull_started_ns ? "local"
                                          : !r->pull_started_ns       ? ""
                                          : atomic_load(&r->by_rdma)  ? "rdma"
                                                                      : r->engine->transport->name,
                             .error = r->error};
    memcpy(out->root, r->version.root, sizeof out->root);
    snprintf(out->reason, sizeof out->reason, "%s", r->error && r->reason ? r->reason : "");
    pthread_mutex_unlock(&r->lock);
}

int engine_info(struct engine *engine, const struct model_id *version, struct engine_info *out)
{
    struct replica *replica = cache_find(engine->cache, version);
    if (replica) {
        info_fill(replica, out);
        replica_put(replica);
        return 0;
    }
    struct model_version found;
    int status = catalog_version(engine->config.catalog, version, &found);
    if (status < 0) {
        return status;
    }
    *out = (struct engine_info){.state = ENGINE_REMOTE,
                                .size = found.size,
                                .shard_size = found.shard_size,
                                .shards = model_shard_count(found.size, found.shard_size),
                                .sealed = found.sealed,
                                .digest = found.digest,
                                .transport = ""};
    memcpy(out->root, found.root, sizeof out->root);
    model_version_clear(&found);
    return 0;
}

int engine_draft_info(struct engine *engine, struct replica *draft, struct engine_info *out)
{
    (void)engine;
    info_fill(draft, out);
    if (out->state == ENGINE_WRITING) {
        out->size = draft_size(draft);
        out->resident = out->size;
    }
    return 0;
}

int engine_peers(struct engine *engine, struct engine_peer **out, size_t *count)
{
    return peers_list(engine->peers, engine->transport->name, out, count);
}

void engine_stats(struct engine *engine, struct engine_stats *out)
{
    struct core_counters *c = &engine->counters;
    *out =
        (struct engine_stats){.max_upload = bucket_rate(&engine->upload),
                              .max_download = bucket_rate(&engine->download),
                              .pulls_running = (uint64_t)atomic_load(&c->pulls_running),
                              .readers_waiting = (uint64_t)atomic_load(&c->readers_waiting),
                              .grants_open = (uint64_t)atomic_load(&c->grants_open),
                              .bytes_received = atomic_load(&c->bytes_received),
                              .bytes_served = atomic_load(&c->bytes_served),
                              .bytes_written = atomic_load(&c->bytes_written),
                              .shards_fetched = atomic_load(&c->shards_fetched),
                              .shards_served = atomic_load(&c->shards_served),
                              .shards_corrupt = atomic_load(&c->shards_corrupt),
                              .shards_failed = atomic_load(&c->shards_failed),
                              .reads_hit = atomic_load(&c->reads_hit),
                              .reads_waited = atomic_load(&c->reads_waited),
                              .reads_failed = atomic_load(&c->reads_failed),
                              .pulls_completed = atomic_load(&c->pulls_completed),
                              .evictions = atomic_load(&c->evictions),
                              .asks_refused = atomic_load(&c->asks_refused),
                              .shards_hedged = atomic_load(&c->shards_hedged),
                              .links_refused = atomic_load(&c->links_refused),
                              .asks_busy = atomic_load(&c->asks_busy),
                              .quarantines = peers_quarantines(engine->peers),
                              .queued_ns = atomic_load(&c->queued_ns),
                              .wire_ns = atomic_load(&c->wire_ns),
                              .verify_ns = atomic_load(&c->verify_ns),
                              .bytes_rdma = atomic_load(&c->bytes_rdma),
                              .rdma_failures = atomic_load(&c->rdma_failures),
                              .rdma_why = engine->fast_why,
                              .storage = storage_kind(engine->storage),
                              .storage_why = storage_why(engine->storage),
                              .storage_node = storage_node(engine->storage),
                              .reserve = storage_reserved(engine->storage),
                              .loop = loop_is_uring(engine->lanes[0]->loop) ? "io_uring" : "epoll",
                              .lanes = engine->lane_count};
    cache_usage(engine->cache, &out->cache_limit, &out->cache_used);
    cache_count(engine->cache, &out->replicas, &out->replicas_complete);
}
