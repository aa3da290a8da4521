#include "engine/lent.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <utlist.h>

#include "engine/bounce.h"
#include "engine/cache.h"
#include "engine/extents.h"
#include "engine/inplace.h"
#include "engine/lane.h"
#include "engine/pull.h"
#include "engine/serve.h"
#include "engine/storage.h"
#include "meta/base/util.h"

#define LENT_PIECES 16

/* ---- making one ---- */

/* In the table, with a handle for the caller. -EEXIST: this node has the version already. */
static int lent_insert(struct engine *engine, struct replica *replica, struct extents *extents)
{
    replica->extents = extents;
    replica->opens = 1;
    struct replica *there = cache_insert(engine->cache, replica);
    if (there != replica) {
        replica_put(there);
        return -EEXIST;
    }
    return 0;
}

static int lent_make(struct engine *engine, const struct model_version *version, bool inplace,
                     const struct engine_range *ranges, size_t count, void (*released)(void *arg),
                     void *arg, struct replica **out)
{
    struct replica *replica = NULL;
    struct extents *extents = NULL;
    int status = extents_new(ranges, count, released, arg, &extents);
    if (status < 0) {
        return status;
    }
    status = replica_new(engine, version, inplace, &replica);
    if (status < 0) {
        extents_free(extents);
        return status;
    }
    status = lent_insert(engine, replica, extents);
    if (status < 0) {
        replica_put(replica);
        return status;
    }
    *out = replica;
    return 0;
}

static int version_fill(const struct engine *engine, const struct engine_range *ranges,
                        size_t count, struct model_version *version)
{
    if (count > 1) {
        version->pieces = calloc(count, sizeof *version->pieces);
        version->piece_count = (uint32_t)count;
    }
    version->origin_node = strdup(engine->config.node);
    if (!version->origin_node || (count > 1 && !version->pieces)) {
        return -ENOMEM;
    }
    for (size_t i = 0; i < count; i++) {
        version->size += ranges[i].length;
        if (version->pieces) {
            version->pieces[i] = ranges[i].length;
        }
    }
    return 0;
}

int engine_lent_offer(struct engine *engine, const struct engine_range *ranges, size_t count,
                      uint32_t shard_size, void (*released)(void *arg), void *arg,
                      struct replica **out)
{
    struct model_version version = {.id = model_id_new(),
                                    .shard_size = shard_size,
                                    .digest = engine->config.digest,
                                    .origin_boot = engine->config.boot};
    int status = version_fill(engine, ranges, count, &version);
    if (status == 0) {
        status = lent_make(engine, &version, true, ranges, count, released, arg, out);
    }
    if (status == 0) {
        (*out)->announced = REPLICA_ALL; /* publishing announces it */
    }
    model_version_clear(&version);
    return status;
}

int engine_lent_publish(struct engine *engine, struct replica *replica, uint64_t parent,
                        const char *name, const struct model_attr *attr, unsigned flags,
                        catalog_done done, void *arg)
{
    return catalog_publish(engine->config.catalog, parent, name, 0, attr, &replica->version,
                           flags | CATALOG_COMPLETE, done, arg);
}

void engine_lent_published(struct engine *engine, struct replica *replica)
{
    (void)engine;
    inplace_hash_start(replica);
}

int engine_lent_pull(struct engine *engine, const struct model_id *id,
                     const struct engine_range *ranges, size_t count, void (*released)(void *arg),
                     void *arg, struct replica **out)
{
    struct model_version version;
    uint64_t size = 0;
    for (size_t i = 0; i < count; i++) {
        size += ranges[i].length;
    }
    int status = catalog_version(engine->config.catalog, id, &version);
    if (status < 0) {
        return status;
    }
    status = size == version.size
                 ? lent_make(engine, &version, false, ranges, count, released, arg, out)
                 : -EMSGSIZE;
    model_version_clear(&version);
    return status;
}

int engine_lent_wait(struct engine *engine, struct replica *replica, struct engine_waiter *waiter)
{
    pthread_mutex_lock(&replica->lock);
    if (replica_complete(replica)) {
        pthread_mutex_unlock(&replica->lock);
        replica_announce(replica);
        return 0;
    }
    *waiter = (struct engine_waiter){.ready = waiter->ready,
                                     .last = replica->shards - 1,
                                     .replica = replica,
                                     .patient = true,
                                     .parked = true};
    replica->progress_ns = util_now_ns();
    DL_APPEND(replica->waiters, waiter);
    atomic_fetch_add(&engine->counters.readers_waiting, 1);
    pthread_mutex_unlock(&replica->lock);
    int status = pull_want(replica, true);
    return status < 0 && engine_read_cancel(engine, waiter) ? status : -EINPROGRESS;
}

uint64_t engine_lent_resident(const struct replica *replica)
{
    return replica->inplace ? replica->version.size : atomic_load(&replica->resident);
}

char *engine_lent_reason(struct replica *replica)
{
    pthread_mutex_lock(&replica->lock);
    char *reason = replica->reason ? strdup(replica->reason) : NULL;
    pthread_mutex_unlock(&replica->lock);
    return reason;
}

/* ---- giving it back ---- */

static void lent_drop(struct lane *lane, void *arg)
{
    struct replica *replica = arg;
    pull_drop(lane, replica);
    serve_drop(lane, replica);
    extents_leave(replica->extents);
    replica_put(replica);
}

void engine_lent_release(struct engine *engine, struct replica *replica)
{
    /* Nothing new from here on: a shard is taken for a pull only while it is `pulling`, and granted only while the
     * replica is servable. What the lanes have begun, they end in lent_drop. */
    pthread_mutex_lock(&replica->lock);
    replica->phase = REPLICA_DEAD;
    replica->opens = 0;
    pthread_mutex_unlock(&replica->lock);
    pull_stop(replica);
    cache_remove(engine->cache, replica);
    extents_end(replica->extents, engine->lane_count);
    lane_post_all(engine, lent_drop, replica);
    extents_leave(replica->extents);
    replica_put(replica);
}

/* ---- bytes ---- */

/* In pieces, where the transport can do that. */
static int place_pieces(struct replica *replica, uint64_t offset, uint64_t length, bool scattered,
                        struct lent_place *place)
{
    if (scattered) {
        place->pieces = extents_pieces(replica->extents, offset, length, &place->piece_count);
        return place->pieces ? 0 : -ENOMEM;
    }
    place->at = place->bounce = bounce_take(replica->engine->bounce, length);
    return place->at ? 0 : -ENOMEM;
}

int lent_place(struct replica *replica, uint32_t shard, bool scattered, struct lent_place *place)
{
    uint64_t offset = replica_shard_offset(replica, shard);
    uint64_t length = replica_shard_size(replica, shard);
    *place = (struct lent_place){0};
    if (!replica->extents) {
        place->at = replica->map ? replica->map + offset : NULL;
        return 0;
    }
    place->at = extents_at(replica->extents, offset, length);
    return place->at ? 0 : place_pieces(replica, offset, length, scattered, place);
}

void lent_place_clear(struct engine *engine, struct lent_place *place)
{
    bounce_give(engine->bounce, place->bounce);
    free(place->pieces);
    *place = (struct lent_place){0};
}

int lent_region(struct replica *replica, uint32_t shard, bool scattered, struct lent_place *place,
                struct transport_region *region)
{
    uint64_t offset = replica_shard_offset(replica, shard);
    uint64_t length = replica_shard_size(replica, shard);
    int status = lent_place(replica, shard, scattered, place);
    if (status < 0) {
        return status;
    }
    *region = (struct transport_region){.fd = replica->extents ? -1 : replica->fd,
                                        .offset = (off_t)offset,
                                        .map = place->at,
                                        .length = length,
                                        .pieces = place->pieces,
                                        .piece_count = place->piece_count};
    return place->bounce ? extents_read(replica->extents, offset, length, place->bounce) : 0;
}

const uint8_t *lent_gather(void *arg, size_t offset, size_t length, uint8_t *leaf)
{
    const struct lent_place *place = arg;
    struct iovec some[LENT_PIECES];
    for (size_t done = 0; done < length;) {
        size_t count = transport_pieces(place->pieces, place->piece_count, offset + done,
                                        length - done, some, LENT_PIECES);
        if (some[0].iov_len == length) {
            return some[0].iov_base;
        }
        for (size_t i = 0; i < count; done += some[i++].iov_len) {
            memcpy(leaf + done, some[i].iov_base, some[i].iov_len);
        }
    }
    return leaf;
}

int lent_populate(const struct lent_place *place, uint64_t offset, uint64_t length)
{
    struct iovec some[LENT_PIECES];
    int status = 0;
    if (place->at) {
        return storage_populate(place->at + offset, length);
    }
    for (uint64_t done = 0; done < length;) {
        size_t count = transport_pieces(place->pieces, place->piece_count, offset + done,
                                        length - done, some, LENT_PIECES);
        for (size_t i = 0; i < count; done += some[i++].iov_len) {
            int failed = storage_populate(some[i].iov_base, some[i].iov_len);
            status = failed < 0 ? failed : status;
        }
    }
    return status;
}

int lent_shard_write(struct replica *replica, uint32_t shard, const uint8_t *bytes)
{
    uint64_t offset = replica_shard_offset(replica, shard);
    uint64_t length = replica_shard_size(replica, shard);
    if (replica->extents) {
        extents_write(replica->extents, offset, length, bytes);
        return 0;
    }
    int status = storage_populate(replica->map + offset, length);
    if (status == 0) {
        memcpy(replica->map + offset, bytes, length);
    }
    return status;
}
