#include "engine/cache.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/lane.h"
#include "engine/serve.h"
#include "engine/storage.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

#define CACHE_FENCE_MS 10000
#define CACHE_FREED_MS 1000

/* Lock order: table, then a replica's, then usage. */
struct cache {
    struct engine *engine;
    pthread_mutex_t table_lock;
    struct replica *table; /* uthash by version.id */
    pthread_mutex_t usage_lock;
    uint64_t limit;
    uint64_t used;
    pthread_mutex_t room_lock; /* one makes room at a time */
};

int cache_open(struct engine *engine, uint64_t limit, struct cache **cache)
{
    struct cache *c = calloc(1, sizeof *c);
    if (!c) {
        return -ENOMEM;
    }
    c->engine = engine;
    c->limit = limit;
    pthread_mutex_init(&c->table_lock, NULL);
    pthread_mutex_init(&c->usage_lock, NULL);
    pthread_mutex_init(&c->room_lock, NULL);
    *cache = c;
    return 0;
}

void cache_close(struct cache *cache)
{
    if (!cache) {
        return;
    }
    struct replica *replica;
    struct replica *next;
    HASH_ITER(hh, cache->table, replica, next) {
        HASH_DEL(cache->table, replica);
        replica_put(replica);
    }
    pthread_mutex_destroy(&cache->table_lock);
    pthread_mutex_destroy(&cache->usage_lock);
    pthread_mutex_destroy(&cache->room_lock);
    free(cache);
}

struct replica *cache_find(struct cache *cache, const struct model_id *version)
{
    struct replica *replica;
    pthread_mutex_lock(&cache->table_lock);
    HASH_FIND(hh, cache->table, version, sizeof *version, replica);
    if (replica) {
        replica_get(replica);
    }
    pthread_mutex_unlock(&cache->table_lock);
    return replica;
}

struct replica *cache_insert(struct cache *cache, struct replica *replica)
{
    struct replica *there;
    pthread_mutex_lock(&cache->table_lock);
    HASH_FIND(hh, cache->table, &replica->version.id, sizeof replica->version.id, there);
    if (there) {
        replica_get(there);
    } else {
        HASH_ADD(hh, cache->table, version.id, sizeof replica->version.id, replica);
        replica_get(replica);
    }
    pthread_mutex_unlock(&cache->table_lock);
    return there ? there : replica;
}

static bool table_remove(struct cache *cache, struct replica *replica)
{
    struct replica *there;
    HASH_FIND(hh, cache->table, &replica->version.id, sizeof replica->version.id, there);
    if (there != replica) {
        return false;
    }
    HASH_DEL(cache->table, replica);
    return true;
}

void cache_remove(struct cache *cache, struct replica *replica)
{
    pthread_mutex_lock(&cache->table_lock);
    bool removed = table_remove(cache, replica);
    pthread_mutex_unlock(&cache->table_lock);
    if (removed) {
        replica_put(replica);
    }
}

int cache_snapshot(struct cache *cache, struct replica ***out, size_t *count)
{
    pthread_mutex_lock(&cache->table_lock);
    size_t n = HASH_COUNT(cache->table);
    struct replica **all = calloc(n ? n : 1, sizeof(struct replica *));
    if (!all) {
        pthread_mutex_unlock(&cache->table_lock);
        return -ENOMEM;
    }
    n = 0;
    for (struct replica *r = cache->table; r; r = r->hh.next) {
        replica_get(r);
        all[n++] = r;
    }
    pthread_mutex_unlock(&cache->table_lock);
    *out = all;
    *count = n;
    return 0;
}

/* ---- usage ---- */

bool cache_reserve(struct cache *cache, struct replica *replica, uint64_t bytes)
{
    uint64_t charge = storage_charge(bytes);
    if (replica->extents || charge <= replica->reserved) { /* the program's memory is no cache */
        return true;
    }
    uint64_t more = charge - replica->reserved;
    pthread_mutex_lock(&cache->usage_lock);
    bool fits = more <= cache->limit && cache->used <= cache->limit - more;
    if (fits) {
        cache->used += more;
        replica->reserved = charge;
    }
    uint64_t left = cache->limit - cache->used;
    pthread_mutex_unlock(&cache->usage_lock);
    if (fits) {
        storage_trim(cache->engine->storage, left); /* spare files live in what is left */
    }
    return fits;
}

void cache_unreserve(struct cache *cache, struct replica *replica)
{
    if (!replica->reserved) {
        return;
    }
    pthread_mutex_lock(&cache->usage_lock);
    cache->used -= replica->reserved;
    pthread_mutex_unlock(&cache->usage_lock);
    replica->reserved = 0;
}

void cache_usage(struct cache *cache, uint64_t *limit, uint64_t *used)
{
    pthread_mutex_lock(&cache->usage_lock);
    *limit = cache->limit;
    *used = cache->used;
    pthread_mutex_unlock(&cache->usage_lock);
}

void cache_count(struct cache *cache, uint64_t *replicas, uint64_t *complete)
{
    *replicas = 0;
    *complete = 0;
    pthread_mutex_lock(&cache->table_lock);
    for (struct replica *r = cache->table; r; r = r->hh.next) {
        *replicas += atomic_load(&r->present) > 0 || r->shards == 0;
        *complete += replica_complete(r);
    }
    pthread_mutex_unlock(&cache->table_lock);
}

static bool room_for(struct cache *cache, uint64_t bytes)
{
    uint64_t limit;
    uint64_t used;
    cache_usage(cache, &limit, &used);
    return bytes <= limit && used <= limit - bytes;
}

/* ---- eviction ---- */

/* Nobody here reads, fills or digests it; lock held. A pull that has all its shards only has to notice. */
static bool idle(const struct replica *replica)
{
    return replica->phase == REPLICA_LIVE && replica->opens == 0 && !replica->waiters &&
           !replica->loose && !replica->hashing && (!replica->pulling || replica_complete(replica));
}

static int evict_begin(struct replica *replica)
{
    int status = 0;
    pthread_mutex_lock(&replica->lock);
    if (replica->inplace) {
        status = -EINVAL;
    } else if (replica->pinned) {
        status = -EPERM;
    } else if (!idle(replica)) {
        status = -EBUSY;
    } else {
        replica->phase = REPLICA_EVICTING;
    }
    pthread_mutex_unlock(&replica->lock);
    return status;
}

/* Back to LIVE; the cluster is told again what it may have been told was gone. */
static void evict_refuse(struct replica *replica, bool withdrawn)
{
    pthread_mutex_lock(&replica->lock);
    replica->phase = REPLICA_LIVE;
    if (withdrawn) {
        replica->announced = REPLICA_SILENT;
    }
    pthread_mutex_unlock(&replica->lock);
    struct engine *engine = replica->engine;
    struct model_version version;
    int status = catalog_version(engine->config.catalog, &replica->version.id, &version);
    if (status == 0) {
        model_version_clear(&version);
    }
    if (status == -ENOENT) { /* unregistered while it was EVICTING, which could not be noted then */
        engine_version_gone(engine, &replica->version.id);
    } else {
        replica_announce(replica);
    }
}

static int evict_withdraw(struct engine *engine, struct replica *replica, bool force)
{
    struct catalog_sync sync = {0};
    pthread_mutex_lock(&replica->lock);
    bool silent = replica->announced == REPLICA_SILENT;
    pthread_mutex_unlock(&replica->lock);
    if (silent) {
        return 0;
    }
    int status = catalog_withdraw(engine->config.catalog, &replica->version.id, !force,
                                  catalog_sync_done, &sync);
    if (status == 0) {
        status = catalog_sync_wait(&sync);
    }
    return status == -ENOENT ? 0 : status;
}

/* Its memory goes with the last reference: lanes drop theirs within a tick. Whoever makes room would otherwise look too
 * early, and evict another one as well. */
static void freed_wait(const struct replica *replica)
{
    uint64_t deadline = util_now_ms() + CACHE_FREED_MS;
    while (atomic_load(&replica->references) > 1 && util_now_ms() < deadline) {
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
}

int cache_evict(struct cache *cache, struct replica *replica, bool force)
{
    struct engine *engine = cache->engine;
    int status = evict_begin(replica);
    if (status < 0) {
        return status;
    }
    /* Withdraw before anything else: a peer may still hold our announcement, and then gets GONE. */
    status = evict_withdraw(engine, replica, force);
    if (status < 0) {
        evict_refuse(replica, false);
        return status;
    }
    lane_post_all(engine, serve_revoke, replica);

    uint64_t deadline = util_now_ms() + CACHE_FENCE_MS;
    for (;;) {
        pthread_mutex_lock(&cache->table_lock);
        pthread_mutex_lock(&replica->lock);
        bool wanted = replica->opens > 0;
        bool fenced = replica->users == 0 && replica->grants == 0;
        bool removed = false;
        if (!wanted && fenced) {
            replica->phase = REPLICA_DEAD;
            removed = table_remove(cache, replica);
        }
        pthread_mutex_unlock(&replica->lock);
        pthread_mutex_unlock(&cache->table_lock);
        if (removed) {
            replica_put(replica);
        }
        if (!wanted && fenced) {
            atomic_fetch_add(&engine->counters.evictions, 1);
            freed_wait(replica);
            return 0;
        }
        if (wanted || util_now_ms() > deadline) {
            evict_refuse(replica, true);
            return -EBUSY;
        }
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
}

/* The idle replica that was used longest ago, but not one that was tried in this round (used after `since`, a mark). */
static struct replica *victim_find(struct cache *cache, const struct model_id *tried,
                                   size_t tried_count)
{
    struct replica *victim = NULL;
    uint64_t oldest = UINT64_MAX;
    pthread_mutex_lock(&cache->table_lock);
    for (struct replica *r = cache->table; r; r = r->hh.next) {
        bool again = false;
        for (size_t i = 0; i < tried_count && !again; i++) {
            again = model_id_equal(&tried[i], &r->version.id);
        }
        if (again) {
            continue;
        }
        pthread_mutex_lock(&r->lock);
        if (idle(r) && !r->pinned && !r->inplace && r->reserved && r->used_ns < oldest) {
            oldest = r->used_ns;
            victim = r;
        }
        pthread_mutex_unlock(&r->lock);
    }
    if (victim) {
        replica_get(victim);
    }
    pthread_mutex_unlock(&cache->table_lock);
    return victim;
}

int cache_make_room(struct cache *cache, uint64_t bytes)
{
    if (bytes > cache->limit) {
        return -ENOSPC;
    }
    size_t room = 0;
    size_t count = 0;
    struct model_id *tried = NULL;
    pthread_mutex_lock(&cache->room_lock);
    int status = 0;
    while (!room_for(cache, bytes)) {
        struct replica *victim = victim_find(cache, tried, count);
        if (!victim) {
            status = -ENOSPC;
            break;
        }
        if (count == room) {
            room = room ? room * 2 : 64;
            struct model_id *grown = reallocarray(tried, room, sizeof *tried);
            if (!grown) {
                replica_put(victim);
                status = -ENOSPC;
                break;
            }
            tried = grown;
        }
        tried[count++] = victim->version.id;
        (void)cache_evict(cache, victim, false);
        replica_put(victim);
    }
    pthread_mutex_unlock(&cache->room_lock);
    free(tried);
    return status;
}

void cache_retire(struct cache *cache, struct replica *replica)
{
    pthread_mutex_lock(&cache->table_lock);
    pthread_mutex_lock(&replica->lock);
    bool unused =
        replica->opens == 0 && replica->users == 0 && !replica->pulling && !replica->waiters;
    bool empty = replica->phase == REPLICA_LIVE && !replica->inplace && !replica->pinned &&
                 replica->shards > 0 && atomic_load(&replica->present) == 0;
    bool removed = false;
    if (unused && (replica->phase == REPLICA_DOOMED || empty)) {
        replica->phase = REPLICA_DEAD;
        removed = table_remove(cache, replica);
    }
    pthread_mutex_unlock(&replica->lock);
    pthread_mutex_unlock(&cache->table_lock);
    if (removed) {
        replica_put(replica);
    }
}
