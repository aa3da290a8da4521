#include "engine/replica.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <utlist.h>

#include "engine/cache.h"
#include "engine/crowd.h"
#include "engine/digest.h"
#include "engine/direct.h"
#include "engine/draft.h"
#include "engine/extents.h"
#include "engine/lane.h"
#include "engine/neighbours.h"
#include "engine/storage.h"
#include "engine/trace.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

#define REPLICA_JUDGE_NS 25000000ull /* so long a pull must have run for its rate to say anything */

int replica_new(struct engine *engine, const struct model_version *version, bool inplace,
                struct replica **replica)
{
    struct replica *r = calloc(1, sizeof *r);
    if (!r) {
        return -ENOMEM;
    }
    int status = model_version_copy(&r->version, version);
    if (status < 0) {
        free(r);
        return status;
    }
    r->engine = engine;
    r->digest = digest_by_kind(version->digest);
    r->phase = REPLICA_LIVE;
    r->fd = -1;
    r->cursor = SPREAD_NONE;
    r->shards = version->shard_size ? model_shard_count(version->size, version->shard_size) : 0;
    r->inplace = inplace;
    if (inplace) {
        atomic_init(&r->present, r->shards);
    } else if (r->shards && !(r->states = calloc(r->shards, sizeof *r->states))) {
        model_version_clear(&r->version);
        free(r);
        return -ENOMEM;
    }
    atomic_init(&r->references, 1);
    pthread_mutex_init(&r->lock, NULL);
    *replica = r;
    return 0;
}

void replica_get(struct replica *replica)
{
    atomic_fetch_add_explicit(&replica->references, 1, memory_order_relaxed);
}

void replica_put(struct replica *replica)
{
    if (!replica || atomic_fetch_sub_explicit(&replica->references, 1, memory_order_acq_rel) != 1) {
        return;
    }
    direct_forget(replica->draft);
    draft_free(replica->draft);
    storage_unmap(replica->map, replica->version.size);
    cache_unreserve(replica->engine->cache, replica);
    if (replica->fd >= 0 && !replica->inplace && !replica->torn && !replica->lent) {
        storage_give_back(replica->engine->storage, replica->fd, replica->version.size);
    } else if (replica->fd >= 0) {
        (void)storage_direct_fills(replica->engine->storage);
        close(replica->fd);
    }
    extents_free(replica->extents);
    spread_close(replica->spread);
    neighbours_close(replica);
    crowd_free(replica->crowd);
    slots_book_close(replica->book);
    free(replica->reason);
    trace_free(replica->trace);
    free(replica->digests);
    free(replica->known);
    free((void *)replica->states);
    model_version_clear(&replica->version);
    pthread_mutex_destroy(&replica->lock);
    free(replica);
}

int replica_storage_open(struct replica *replica)
{
    if (replica->fd >= 0 || replica->shards == 0 || replica->inplace || replica->extents) {
        return 0;
    }
    char name[MODEL_ID_TEXT];
    model_id_print(&replica->version.id, name);
    util_autoclose int fd =
        storage_file_dirty(replica->engine->storage, name, replica->version.size);
    if (fd < 0) {
        return fd;
    }
    uint8_t *map = NULL;
    int status = storage_map(fd, replica->version.size, &map);
    if (status < 0) {
        return status;
    }
    replica->map = map;
    replica->fd = util_fd_take(&fd);
    return 0;
}

uint64_t replica_size(const struct replica *replica)
{
    return replica->version.size;
}

bool replica_here(struct replica *replica, uint64_t offset, uint64_t length)
{
    pthread_mutex_lock(&replica->lock);
    bool draft = replica->draft != NULL;
    pthread_mutex_unlock(&replica->lock);
    uint64_t size = replica->version.size;
    if (draft || replica->inplace || length == 0 || offset >= size || replica_complete(replica)) {
        return true;
    }
    uint64_t end = length < size - offset ? offset + length : size;
    return replica_range_present(replica, (uint32_t)(offset / replica->version.shard_size),
                                 (uint32_t)((end - 1) / replica->version.shard_size));
}

const struct model_id *replica_version(const struct replica *replica)
{
    return &replica->version.id;
}

uint64_t replica_shard_offset(const struct replica *replica, uint32_t shard)
{
    return (uint64_t)shard * replica->version.shard_size;
}

uint64_t replica_shard_size(const struct replica *replica, uint32_t shard)
{
    return model_shard_length(replica->version.size, replica->version.shard_size, shard);
}

bool replica_shard_present(const struct replica *replica, uint32_t shard)
{
    return replica->inplace ||
           atomic_load_explicit(&replica->states[shard], memory_order_acquire) == SPREAD_PRESENT;
}

bool replica_servable(const struct replica *replica)
{
    bool fixed = replica->phase == REPLICA_LIVE || replica->phase == REPLICA_DOOMED ||
                 (replica->phase == REPLICA_SEALING && replica->version.sealed);
    return fixed && !replica->changed && !replica->loose;
}

bool replica_complete(const struct replica *replica)
{
    return atomic_load_explicit(&replica->present, memory_order_acquire) == replica->shards;
}

bool replica_range_present(const struct replica *replica, uint32_t first, uint32_t last)
{
    for (uint32_t k = first; k <= last; k++) {
        if (!replica_shard_present(replica, k)) {
            return false;
        }
    }
    return true;
}

/* ---- settle ---- */

struct answer_job {
    struct work_job job;
    struct engine *engine;
    struct engine_waiter *list;
    int status;
};

static void answer_run(struct work_job *job)
{
    struct answer_job *answer = util_container(job, struct answer_job, job);
    while (answer->list) {
        struct engine_waiter *waiter = answer->list;
        answer->list = waiter->next;
        waiter->ready(waiter, answer->status);
    }
    core_release(answer->engine);
    free(answer);
}

void replica_answer(struct engine *engine, struct engine_waiter *list, int status)
{
    if (!list) {
        return;
    }
    struct answer_job *answer = malloc(sizeof *answer);
    if (!answer) { /* slower for this lane, but every reader gets its answer */
        while (list) {
            struct engine_waiter *waiter = list;
            list = waiter->next;
            waiter->ready(waiter, status);
        }
        return;
    }
    *answer = (struct answer_job){
        .job.run = answer_run, .engine = engine, .list = list, .status = status};
    core_hold(engine);
    work_post_urgent(engine->work, &answer->job);
}

static bool any(const struct replica *replica, const struct engine_waiter *waiter)
{
    (void)replica;
    (void)waiter;
    return true;
}

static bool served(const struct replica *replica, const struct engine_waiter *waiter)
{
    return replica_range_present(replica, waiter->first, waiter->last);
}

static bool late(const struct replica *replica, const struct engine_waiter *waiter)
{
    uint64_t now = util_now_ns();
    uint64_t took = now - waiter->since_ns;
    uint64_t resident = atomic_load(&replica->resident);
    if (waiter->by_ns == 0 || took < REPLICA_JUDGE_NS) {
        return false;
    }
    return now >= waiter->by_ns ||
           (double)(replica->version.size - resident) * (double)took >
               (double)(resident - waiter->since) * (double)(waiter->by_ns - now);
}

/* Takes the waiters that may go off the list, as a chain by next. Lock held. */
static struct engine_waiter *waiters_detach(struct replica *replica,
                                            bool (*goes)(const struct replica *replica,
                                                         const struct engine_waiter *waiter))
{
    struct engine_waiter *chain = NULL;
    struct engine_waiter **tail = &chain;
    struct engine_waiter *waiter;
    struct engine_waiter *next;
    DL_FOREACH_SAFE(replica->waiters, waiter, next) {
        if (goes(replica, waiter)) {
            /* NOLINTNEXTLINE(clang-analyzer-core.NullDereference): a list with a member has a head */
            DL_DELETE(replica->waiters, waiter);
            waiter->parked = false;
            waiter->next = NULL;
            *tail = waiter;
            tail = &waiter->next;
            atomic_fetch_sub(&replica->engine->counters.readers_waiting, 1);
        }
    }
    return chain;
}

void replica_shard_settle(struct replica *replica, uint32_t shard, int status)
{
    struct engine *engine = replica->engine;
    struct engine_waiter *ready = NULL;
    bool tell = false;

    pthread_mutex_lock(&replica->lock);
    if (status == 0) {
        uint64_t length = replica_shard_size(replica, shard);
        atomic_store_explicit(&replica->states[shard], SPREAD_PRESENT, memory_order_release);
        if (replica->spread) {
            spread_land(replica->spread, shard);
        }
        atomic_fetch_add(&replica->resident, length);
        atomic_fetch_add_explicit(&replica->present, 1, memory_order_acq_rel);
        atomic_fetch_add(&replica->changes, 1);
        replica->progress_ns = util_now_ns();
        replica->error = 0;
        ready = waiters_detach(replica, served);
        tell = replica->users > 0;
        atomic_fetch_add(&engine->counters.shards_fetched, 1);
    } else {
        atomic_store_explicit(&replica->states[shard], SPREAD_ABSENT, memory_order_release);
        if (replica->spread) {
            spread_put(replica->spread, shard);
        }
        atomic_fetch_add(&engine->counters.shards_failed, 1);
    }
    replica_check(replica);
    pthread_mutex_unlock(&replica->lock);

    replica_answer(engine, ready, 0);
    if (tell) {
        lane_kick_all(engine);
    }
    if (status == 0) {
        replica_announce(replica);
    }
}

void replica_reason_set(struct replica *replica, const char *reason)
{
    free(replica->reason);
    replica->reason = reason ? strdup(reason) : NULL;
}

void replica_fail(struct replica *replica, int error, const char *reason)
{
    pthread_mutex_lock(&replica->lock);
    bool wanted = replica->waiters || replica->whole;
    replica->whole = false;
    struct engine_waiter *failed = waiters_detach(replica, any);
    replica->error = error;
    for (const struct engine_waiter *w = failed; w; w = w->next) {
        replica->failed_ns = w->patient ? replica->failed_ns : util_now_ns();
    }
    replica_reason_set(replica, reason);
    pthread_mutex_unlock(&replica->lock);

    for (struct engine_waiter *w = failed; w; w = w->next) {
        atomic_fetch_add(&replica->engine->counters.reads_failed, 1);
    }
    if (wanted) {
        char id[MODEL_ID_TEXT];
        model_id_print(&replica->version.id, id);
        log_error("version %s: %s: %s", id, strerror(-error), reason);
    }
    replica_answer(replica->engine, failed, error);
}

void replica_late(struct replica *replica)
{
    pthread_mutex_lock(&replica->lock);
    struct engine_waiter *gone = waiters_detach(replica, late);
    pthread_mutex_unlock(&replica->lock);
    replica_answer(replica->engine, gone, -ETIMEDOUT);
}

/* ---- digests ---- */

int replica_digests_room(struct replica *replica)
{
    if (replica->digests) {
        return 0;
    }
    uint8_t *digests = calloc(replica->shards ? replica->shards : 1, replica->digest->size);
    uint8_t *known = calloc((replica->shards + 7) / 8 + 1, 1);
    if (!digests || !known) {
        free(digests);
        free(known);
        return -ENOMEM;
    }
    replica->digests = digests;
    replica->known = known;
    return 0;
}

void replica_digest_set(struct replica *replica, uint32_t shard, const uint8_t *digest)
{
    if (replica_digests_room(replica) < 0 || replica_digest_known(replica, shard)) {
        return;
    }
    memcpy(replica->digests + (size_t)shard * replica->digest->size, digest, replica->digest->size);
    replica->known[shard / 8] |= (uint8_t)(1u << (shard % 8));
    replica->known_count++;
    if (replica->known_count == replica->shards) {
        atomic_store(&replica->all_known, replica_root_agrees(replica));
        atomic_fetch_add(&replica->changes, 1);
    }
}

bool replica_digest_known(const struct replica *replica, uint32_t shard)
{
    return replica->known && (replica->known[shard / 8] >> (shard % 8) & 1);
}

const uint8_t *replica_digest(const struct replica *replica, uint32_t shard)
{
    return replica->digests + (size_t)shard * replica->digest->size;
}

bool replica_root_agrees(const struct replica *replica)
{
    if (!replica->version.sealed) {
        return true;
    }
    uint8_t root[MODEL_DIGEST_MAX];
    digest_root(replica->digest, replica->version.size, replica->version.shard_size,
                replica->digests, replica->shards, root);
    return memcmp(root, replica->version.root, replica->digest->size) == 0;
}

void replica_refresh(struct replica *replica)
{
    struct model_version fresh;
    if (replica->inplace ||
        catalog_version(replica->engine->config.catalog, &replica->version.id, &fresh) < 0) {
        return; /* in place: the root is this node's own work */
    }
    pthread_mutex_lock(&replica->lock);
    if (fresh.sealed && !replica->version.sealed) {
        memcpy(replica->version.root, fresh.root, sizeof fresh.root);
        replica->version.sealed = true;
    }
    pthread_mutex_unlock(&replica->lock);
    model_version_clear(&fresh);
}

/* ---- announcements ---- */

static void sealed(void *arg, int status, const struct model_entry *entry)
{
    struct replica *replica = arg;
    struct engine *engine = replica->engine;
    (void)entry;
    if (status == -EEXIST) {
        log_warn(
            "a version that %s registered has another digest than its bytes had when they were "
            "pulled; what this node has of it is rejected by peers: evict it",
            replica->version.origin_node);
    }
    pthread_mutex_lock(&replica->lock);
    replica->rooting = status == -EEXIST; /* else it may be tried again: the service was away */
    pthread_mutex_unlock(&replica->lock);
    replica_put(replica);
    core_release(engine);
}

void replica_seal(struct replica *replica)
{
    struct engine *engine = replica->engine;
    uint8_t root[MODEL_DIGEST_MAX] = {0};
    pthread_mutex_lock(&replica->lock);
    bool due = replica->phase == REPLICA_LIVE && !replica->inplace && !replica->version.sealed &&
               !replica->rooting && replica_complete(replica) && atomic_load(&replica->all_known) &&
               core_hold_open(engine);
    if (due) {
        replica->rooting = true;
        digest_root(replica->digest, replica->version.size, replica->version.shard_size,
                    replica->digests, replica->shards, root);
    }
    pthread_mutex_unlock(&replica->lock);
    if (!due) {
        return;
    }
    replica_get(replica);
    int status = catalog_seal(engine->config.catalog, &replica->version.id, root, sealed, replica);
    if (status < 0) {
        sealed(replica, status, NULL);
    }
}

static void announced(void *arg, int status, const struct model_entry *entry)
{
    struct replica *replica = arg;
    (void)entry;
    if (status < 0 && status != -ENOENT && status != -ESHUTDOWN) {
        /* The catalog repeats it when the service answers again. */
        log_debug("announcing a replica: %s", strerror(-status));
    }
    struct engine *engine = replica->engine;
    replica_put(replica);
    core_release(engine);
}

void replica_announce(struct replica *replica)
{
    struct engine *engine = replica->engine;
    pthread_mutex_lock(&replica->lock);
    enum replica_announced now = replica_complete(replica)            ? REPLICA_ALL
                                 : atomic_load(&replica->present) > 0 ? REPLICA_SOME
                                                                      : REPLICA_SILENT;
    bool news = replica->phase == REPLICA_LIVE && !replica->changed && now > replica->announced;
    if (news) {
        replica->announced = now;
    }
    pthread_mutex_unlock(&replica->lock);
    if (now == REPLICA_ALL) {
        replica_seal(replica);
    }
    if (!news || !core_hold_open(engine)) {
        return;
    }
    replica_get(replica);
    int status = catalog_announce(engine->config.catalog, &replica->version.id,
                                  now == REPLICA_ALL ? CATALOG_COMPLETE : 0, announced, replica);
    if (status < 0) {
        announced(replica, status, NULL);
    }
}

#ifdef P2PFS_CHECKS
static void check(bool holds, const char *invariant)
{
    if (!holds) {
        log_error("replica invariant broken: %s", invariant);
        abort();
    }
}

void replica_check(const struct replica *replica)
{
    uint32_t present = 0;
    uint64_t resident = 0;
    for (uint32_t k = 0; replica->states && k < replica->shards; k++) {
        uint8_t state = replica->states[k];
        check(state <= SPREAD_PRESENT, "a shard is ABSENT, FILLING or PRESENT");
        if (state == SPREAD_PRESENT) {
            present++;
            resident += replica_shard_size(replica, k);
        }
    }
    check(!replica->states || present == replica->present, "present counts the PRESENT shards");
    check(!replica->states || resident == replica->resident, "resident counts their bytes");
    check(replica->known_count <= replica->shards, "no more digests than shards");
    check(replica->known_count == 0 || replica->digests, "known digests are somewhere");
    check(!(replica->inplace && replica->waiters), "nobody waits for what lies in place");
    check(replica->phase != REPLICA_DEAD || (!replica->opens && !replica->waiters),
          "the dead are not read");
    check(!replica->map || replica->fd >= 0, "a mapping has its file");
    const struct engine_waiter *waiter;
    DL_FOREACH(replica->waiters, waiter) {
        check(waiter->parked, "a listed waiter is parked");
        check(!replica_range_present(replica, waiter->first, waiter->last),
              "nobody waits for what is here");
    }
}
#endif
