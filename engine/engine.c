#include "engine/engine.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <utlist.h>

#include "engine/bounce.h"
#include "engine/cache.h"
#include "engine/draft.h"
#include "engine/fast.h"
#include "engine/inplace.h"
#include "engine/lane.h"
#include "engine/peers.h"
#include "engine/pull.h"
#include "engine/register.h"
#include "engine/reserve.h"
#include "engine/storage.h"
#include "engine/wire.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

#define ENGINE_LANES \
    2 /* two streams a peer is what fills memory bandwidth on a loopback, and a NIC on two cores */
#define ENGINE_WORKERS 4
/* When read-ahead has failed, the kernel asks for the page once more by itself: that is still the same read, and must not
 * wait for another read_timeout. */
#define ENGINE_ECHO_NS 100000000ull

void core_hold(struct engine *engine)
{
    atomic_fetch_add(&engine->background, 1);
}

bool core_hold_open(struct engine *engine)
{
    core_hold(
        engine); /* before looking: engine_close sets closing, and then waits for what is held */
    if (atomic_load(&engine->closing)) {
        core_release(engine);
        return false;
    }
    return true;
}

void core_release(struct engine *engine)
{
    atomic_fetch_sub(&engine->background, 1);
}

uint32_t core_shard_size(const struct engine *engine, uint64_t size)
{
    uint32_t shard_size =
        engine->config.shard_size ? engine->config.shard_size : model_shard_auto(size);
    while (model_shard_count(size, shard_size) > WIRE_SHARDS_MAX) {
        shard_size *= 2;
    }
    return shard_size;
}

/* ---- opening and closing ---- */

static void config_free(struct engine_config *config)
{
    free((char *)config->node);
    free((char *)config->listen);
    free((char *)config->transport);
    free((char *)config->rdma_devices);
    free((char *)config->rdma_matrix);
    free((char *)config->congestion);
    free((char *)config->cache_dir);
    free((char *)config->exclude_dir);
}

static int text_copy(const char **to, const char *from)
{
    *to = from ? strdup(from) : NULL;
    return from && !*to ? -ENOMEM : 0;
}

static int config_copy(struct engine_config *to, const struct engine_config *from)
{
    *to = *from;
    int status = 0;
    status |= text_copy(&to->node, from->node);
    status |= text_copy(&to->listen, from->listen);
    status |= text_copy(&to->transport, from->transport);
    status |= text_copy(&to->rdma_devices, from->rdma_devices);
    status |= text_copy(&to->rdma_matrix, from->rdma_matrix);
    status |= text_copy(&to->congestion, from->congestion);
    status |= text_copy(&to->cache_dir, from->cache_dir);
    status |= text_copy(&to->exclude_dir, from->exclude_dir);
    if (status) {
        config_free(to);
        return -ENOMEM;
    }
    return 0;
}

static int lanes_open(struct engine *engine, char **error)
{
    unsigned count = engine->config.lanes ? engine->config.lanes : ENGINE_LANES;
    count = count > CORE_LANES_MAX ? CORE_LANES_MAX : count;
    for (unsigned i = 0; i < count; i++) {
        int status = lane_open(engine, i, &engine->lanes[i]);
        if (status == -ENOPROTOOPT) {
            if (asprintf(
                    error,
                    "tcp_congestion=%s: the kernel does not have it, or not for this user; sysctl "
                    "net.ipv4.tcp_available_congestion_control lists them",
                    engine->config.congestion) < 0) {
                *error = NULL;
            }
            return status;
        }
        if (status < 0) {
            if (asprintf(error, "listen=%s: %s; %s", engine->config.listen, strerror(-status),
                         status == -EADDRINUSE      ? "choose another port, or port 0 for any"
                         : status == -EADDRNOTAVAIL ? "name an address of this machine"
                                                    : "expected HOST:PORT") < 0) {
                *error = NULL;
            }
            return status;
        }
        engine->lane_count++;
    }
    return fast_open(engine, error);
}

/* What lands there comes from the network's side of the machine; what reads it there may be anywhere. */
static void storage_near(struct engine *engine)
{
    struct transport_rail bound = {.standby = false};
    snprintf(bound.address, sizeof bound.address, "%s", engine->address);
    int node = engine->rail_count > 0 ? topology_node("/sys", engine->rails, engine->rail_count)
                                      : topology_node("/sys", &bound, 1);
    int status = node >= 0 ? storage_prefer(engine->storage, node) : 0;
    if (status < 0 && status != -EOPNOTSUPP) {
        log_info("replicas are not kept near the network, on NUMA node %d: %s", node,
                 strerror(-status));
    }
}

static void lanes_stop(struct engine *engine)
{
    for (unsigned i = 0; i < engine->lane_count; i++) {
        lane_stop(engine->lanes[i]);
    }
}

static void lanes_close(struct engine *engine)
{
    for (unsigned i = 0; i < engine->lane_count; i++) {
        lane_close(engine->lanes[i]);
    }
}

int engine_open(const struct engine_config *config, struct engine **engine, char **error)
{
    *error = NULL;
    struct engine *e = calloc(1, sizeof *e);
    if (!e) {
        return -ENOMEM;
    }
    int status = config_copy(&e->config, config);
    if (status < 0) {
        goto free_engine;
    }
    pthread_mutex_init(&e->slots_lock, NULL);
    pthread_mutex_init(&e->direct_lock, NULL);
    e->slots = slots_new();
    e->slots.idle = config->seed_idle;
    e->digest = digest_by_kind(config->digest);
    e->transport = transport_by_name(config->transport);
    if (!e->digest || !e->transport) {
        status = -EINVAL;
        goto free_config;
    }
    status = storage_open(config->cache_size, config->cache_dir, &e->storage, error);
    if (status < 0) {
        goto free_config;
    }
    status = cache_open(e, config->cache_size, &e->cache);
    if (status < 0) {
        goto close_storage;
    }
    status = peers_open(&e->peers);
    if (status < 0) {
        goto close_cache;
    }
    status = bounce_open(&e->bounce);
    if (status < 0) {
        goto close_peers;
    }
    status = work_open(ENGINE_WORKERS, &e->work);
    if (status < 0) {
        goto close_bounce;
    }
    status = reserve_open(e, &e->reserve);
    if (status < 0) {
        goto close_work;
    }
    bucket_open(&e->upload, config->max_upload);
    bucket_open(&e->download, config->max_download);
    status = lanes_open(e, error);
    if (status == 0) {
        storage_near(e);
    }
    for (unsigned i = 0; status == 0 && i < e->lane_count; i++) {
        status = lane_start(e->lanes[i]);
    }
    if (status < 0) {
        goto close_lanes;
    }
    if (!config->secret->length) {
        log_info(
            "no secret_file=: nodes without one serve each other; whoever reaches %s can read what is here",
            e->address);
    }
    *engine = e;
    return 0;

close_lanes:
    lanes_close(e);
    bucket_close(&e->download);
    bucket_close(&e->upload);
    reserve_close(e->reserve);
close_work:
    work_close(e->work);
close_bounce:
    bounce_close(e->bounce);
close_peers:
    peers_close(e->peers);
close_cache:
    cache_close(e->cache);
close_storage:
    storage_close(e->storage);
free_config:
    config_free(&e->config);
free_engine:
    free(e);
    return status;
}

const char *engine_address(const struct engine *engine)
{
    return engine->address;
}

const char *engine_rdma_address(const struct engine *engine)
{
    return engine->fast ? engine->fast_address : "";
}

size_t engine_adapters(const struct engine *engine, struct transport_adapter *out, size_t room)
{
    return engine->fast ? engine->fast->adapters(out, room) : 0;
}

void engine_adopt(struct engine *engine)
{
    register_adopt(engine);
}

void engine_close(struct engine *engine)
{
    if (!engine) {
        return;
    }
    atomic_store(&engine->closing, true);
    struct replica **all = NULL;
    size_t count = 0;
    if (cache_snapshot(engine->cache, &all, &count) == 0) {
        for (size_t i = 0; i < count; i++) {
            pull_stop(all[i]);
            replica_fail(all[i], -ESHUTDOWN, "this node unmounts");
            replica_put(all[i]);
        }
        free(all);
    }
    /* Jobs and the catalog's answers still use the lanes; all of them have deadlines of their own, and nothing new
     * begins while closing. */
    while (atomic_load(&engine->background) > 0) {
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    lanes_stop(engine);
    work_close(engine->work);
    reserve_close(engine->reserve);
    cache_close(engine->cache);
    lanes_close(engine);
    bucket_close(&engine->download);
    bucket_close(&engine->upload);
    bounce_close(engine->bounce);
    peers_close(engine->peers);
    storage_close(engine->storage);
    config_free(&engine->config);
    free(engine);
}

/* ---- from the catalog ---- */

void engine_version_gone(struct engine *engine, const struct model_id *version)
{
    struct replica *replica = cache_find(engine->cache, version);
    if (!replica) {
        return;
    }
    pthread_mutex_lock(&replica->lock);
    if (replica->phase == REPLICA_LIVE) {
        replica->phase = REPLICA_DOOMED;
    }
    replica->pinned = false;
    pthread_mutex_unlock(&replica->lock);
    cache_retire(engine->cache, replica);
    replica_put(replica);
}

void engine_version_sealed(struct engine *engine, const struct model_id *version)
{
    struct replica *replica = cache_find(engine->cache, version);
    if (!replica) {
        return;
    }
    replica_refresh(replica);
    replica_put(replica);
}

/* ---- reading ---- */

int engine_replica_open(struct engine *engine, const struct model_id *version,
                        struct replica **replica)
{
    for (;;) {
        struct replica *r = cache_find(engine->cache, version);
        if (!r) {
            struct model_version found;
            int status = catalog_version(engine->config.catalog, version, &found);
            if (status < 0) {
                return status;
            }
            struct replica *made = NULL;
            status = replica_new(engine, &found, false, &made);
            model_version_clear(&found);
            if (status < 0) {
                return status;
            }
            r = cache_insert(engine->cache, made);
            if (r != made) {
                replica_put(made);
            }
        }
        pthread_mutex_lock(&r->lock);
        bool alive = r->phase != REPLICA_DEAD;
        if (alive) {
            r->opens++;
            r->used_ns = util_now_ns();
        }
        pthread_mutex_unlock(&r->lock);
        if (alive) {
            *replica = r;
            return 0;
        }
        replica_put(r); /* it died between finding and opening; it has left the table by now */
    }
}

void engine_replica_close(struct engine *engine, struct replica *replica)
{
    if (!replica) {
        return;
    }
    pthread_mutex_lock(&replica->lock);
    replica->opens--;
    replica->used_ns = util_now_ns();
    pthread_mutex_unlock(&replica->lock);
    if (replica->inplace) {
        inplace_idle(replica);
    }
    cache_retire(engine->cache, replica);
    replica_put(replica);
}

static bool is_draft(struct replica *replica)
{
    pthread_mutex_lock(&replica->lock);
    bool draft = replica->draft != NULL;
    pthread_mutex_unlock(&replica->lock);
    return draft;
}

int engine_read(struct engine *engine, struct replica *replica, uint64_t offset, size_t length,
                struct engine_waiter *waiter)
{
    if (replica->inplace || is_draft(replica)) {
        return 0;
    }
    if (length == 0 || offset >= replica->version.size || length > replica->version.size - offset) {
        return -EINVAL;
    }
    uint32_t first = (uint32_t)(offset / replica->version.shard_size);
    uint32_t last = (uint32_t)((offset + length - 1) / replica->version.shard_size);
    if (replica_range_present(replica, first, last)) {
        atomic_fetch_add_explicit(&engine->counters.reads_hit, 1, memory_order_relaxed);
        return 0;
    }
    if (atomic_load(&engine->closing)) {
        return -ESHUTDOWN;
    }
    pthread_mutex_lock(&replica->lock);
    if (replica_range_present(replica, first, last)) {
        pthread_mutex_unlock(&replica->lock);
        return 0;
    }
    if (replica->error && util_now_ns() - replica->failed_ns < ENGINE_ECHO_NS) {
        int error = replica->error;
        pthread_mutex_unlock(&replica->lock);
        atomic_fetch_add(&engine->counters.reads_failed, 1);
        return error;
    }
    waiter->first = first;
    waiter->last = last;
    waiter->replica = replica;
    waiter->parked = true;
    if (!replica->waiters) {
        replica->progress_ns = util_now_ns();
    }
    DL_APPEND(replica->waiters, waiter);
    if (!waiter->patient) {
        replica->cursor = last;
    }
    waiter->since_ns = util_now_ns();
    waiter->since = atomic_load(&replica->resident);
    atomic_fetch_add(&engine->counters.readers_waiting, 1);
    atomic_fetch_add(&engine->counters.reads_waited, 1);
    pthread_mutex_unlock(&replica->lock);

    int status =
        pull_want(replica, waiter->patient || (engine->config.fetch_whole && !waiter->peek));
    if (status < 0 && engine_read_cancel(engine, waiter)) {
        return status;
    }
    return -EINPROGRESS;
}

bool engine_read_cancel(struct engine *engine, struct engine_waiter *waiter)
{
    struct replica *replica = waiter->replica;
    pthread_mutex_lock(&replica->lock);
    bool ours = waiter->parked;
    if (ours) {
        /* NOLINTNEXTLINE(clang-analyzer-core.NullDereference): a list with a member has a head */
        DL_DELETE(replica->waiters, waiter);
        waiter->parked = false;
        atomic_fetch_sub(&engine->counters.readers_waiting, 1);
    }
    pthread_mutex_unlock(&replica->lock);
    return ours;
}

int engine_bytes(struct engine *engine, struct replica *replica, uint64_t offset, size_t length,
                 void *scratch, const void **bytes)
{
    (void)engine;
    *bytes = scratch;
    if (replica->inplace) {
        int status = inplace_read(replica, offset, length, scratch);
        return status == -ESTALE ? -EIO : status;
    }
    if (is_draft(replica)) {
        return draft_read(replica, offset, length, scratch);
    }
    *bytes = replica->map + offset;
    return 0;
}

int engine_lend(struct engine *engine, struct replica *replica, int *fd)
{
    (void)engine;
    int status = replica->inplace ? inplace_open(replica) : 0;
    if (status < 0) {
        return status == -ESTALE ? -EIO : status;
    }
    pthread_mutex_lock(&replica->lock);
    bool whole = replica->inplace || (!replica->draft && replica_complete(replica));
    *fd = whole ? replica->fd : -1;
    replica->lent |= *fd >= 0;
    pthread_mutex_unlock(&replica->lock);
    return *fd < 0 ? -EAGAIN : 0;
}

/* ---- writing and registering: see draft.h and register.h ---- */

int engine_draft_new(struct engine *engine, struct replica **draft)
{
    return draft_new(engine, draft);
}

int engine_draft_write(struct engine *engine, struct replica *draft, uint64_t offset,
                       const void *data, size_t length, engine_done done, void *arg)
{
    (void)engine;
    return draft_write(draft, offset, data, length, done, arg);
}

int engine_draft_truncate(struct engine *engine, struct replica *draft, uint64_t size)
{
    (void)engine;
    return draft_truncate(draft, size);
}

void engine_draft_fail(struct replica *draft, int error)
{
    draft_fail(draft, error);
}

int engine_draft_register(struct engine *engine, struct replica *draft, uint64_t parent,
                          const char *name, uint64_t id, const struct model_attr *attr,
                          unsigned flags, catalog_done done, void *arg)
{
    (void)engine;
    return draft_register(draft, parent, name, id, attr, flags, done, arg);
}

int engine_register_file(struct engine *engine, const char *path, uint64_t parent, const char *name,
                         unsigned flags, catalog_done done, void *arg)
{
    return register_file(engine, path, parent, name, flags, done, arg);
}

int engine_register_tree(struct engine *engine, const char *path, uint64_t parent, const char *name,
                         unsigned flags, catalog_done done, void *arg)
{
    return register_tree(engine, path, parent, name, flags, done, arg);
}

/* ---- control ---- */

void engine_limits_set(struct engine *engine, uint64_t max_upload, uint64_t max_download)
{
    bucket_rate_set(&engine->upload, max_upload);
    bucket_rate_set(&engine->download, max_download);
}

int engine_pull(struct engine *engine, const struct model_id *version)
{
    struct replica *replica = NULL;
    int status = engine_replica_open(engine, version, &replica);
    if (status < 0) {
        return status;
    }
    status = pull_want(replica, true);
    engine_replica_close(engine, replica);
    return status;
}

struct evict_job {
    struct work_job job;
    struct replica *replica;
    bool force;
    engine_done done;
    void *arg;
};

static void evict_run(struct work_job *job)
{
    struct evict_job *evict = util_container(job, struct evict_job, job);
    struct engine *engine = evict->replica->engine;
    int status = cache_evict(engine->cache, evict->replica, evict->force);
    replica_put(evict->replica);
    evict->done(evict->arg, status);
    free(evict);
    core_release(engine);
}

int engine_evict(struct engine *engine, const struct model_id *version, bool force,
                 engine_done done, void *arg)
{
    struct replica *replica = cache_find(engine->cache, version);
    if (!replica) {
        return -ENOENT;
    }
    struct evict_job *evict = malloc(sizeof *evict);
    if (!evict) {
        replica_put(replica);
        return -ENOMEM;
    }
    *evict = (struct evict_job){
        .job.run = evict_run, .replica = replica, .force = force, .done = done, .arg = arg};
    core_hold(engine);
    work_post(engine->work, &evict->job);
    return 0;
}

int engine_pin(struct engine *engine, const struct model_id *version, bool pinned)
{
    struct replica *replica = NULL;
    int status = engine_replica_open(engine, version, &replica);
    if (status < 0) {
        return status;
    }
    pthread_mutex_lock(&replica->lock);
    replica->pinned = pinned;
    pthread_mutex_unlock(&replica->lock);
    engine_replica_close(engine, replica);
    return 0;
}
