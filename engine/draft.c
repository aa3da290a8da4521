#include "engine/draft.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine/cache.h"
#include "engine/direct.h"
#include "engine/draft_inside.h"
#include "engine/storage.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

#define DRAFT_BATCH 16 /* leaves that one hashing job takes */

int draft_leaves_room(struct replica *r, uint64_t size)
{
    struct draft *d = r->draft;
    size_t need = (size + d->leaf_size - 1) / d->leaf_size;
    if (need <= d->leaf_count) {
        return 0;
    }
    size_t room = d->leaf_count ? d->leaf_count : 64;
    while (room < need) {
        room *= 2;
    }
    struct leaf *leaves = reallocarray(d->leaves, room, sizeof *leaves);
    if (!leaves) {
        return -ENOMEM;
    }
    d->leaves = leaves;
    uint8_t *digests = reallocarray(d->digests, room, r->digest->size);
    if (!digests) {
        return -ENOMEM;
    }
    d->digests = digests;
    memset(leaves + d->leaf_count, 0, (room - d->leaf_count) * sizeof *leaves);
    d->leaf_count = room;
    return 0;
}

int draft_new(struct engine *engine, struct replica **draft)
{
    struct model_version version = {
        .id = model_id_new(), .digest = engine->config.digest, .origin_node = engine->config.node};
    version.origin_boot = engine->config.boot;
    struct replica *r = NULL;
    int status = replica_new(engine, &version, false, &r);
    if (status < 0) {
        return status;
    }
    r->phase = REPLICA_DRAFT;
    r->opens = 1;
    r->draft = calloc(1, sizeof *r->draft);
    if (!r->draft) {
        status = -ENOMEM;
        goto put_replica;
    }
    /* With a shard size of one's own a leaf never crosses a shard's end; shards of auto size are whole leaves. */
    r->draft->leaf_size = DIGEST_LEAF;
    char name[MODEL_ID_TEXT];
    model_id_print(&version.id, name);
    r->fd = storage_file(engine->storage, name);
    if (r->fd < 0) {
        status = r->fd;
        goto put_replica;
    }
    *draft = r;
    return 0;

put_replica:
    replica_put(r);
    return status;
}

void draft_free(struct draft *draft)
{
    if (draft) {
        free(draft->leaves);
        free(draft->digests);
        free(draft);
    }
}

uint64_t draft_size(struct replica *draft)
{
    pthread_mutex_lock(&draft->lock);
    uint64_t size = !draft->draft  ? draft->version.size
                    : draft->loose ? direct_size(draft)
                                   : draft->draft->size;
    pthread_mutex_unlock(&draft->lock);
    return size;
}

void draft_fail(struct replica *draft, int error)
{
    pthread_mutex_lock(&draft->lock);
    if (draft->draft && !draft->draft->failed) {
        draft->draft->failed = error;
    }
    pthread_mutex_unlock(&draft->lock);
}

/* ---- hashing behind the writer ---- */

struct leaf_job {
    struct work_job job;
    struct replica *replica;
    size_t first;
    size_t count;
};

static int leaf_hash(struct replica *r, size_t leaf, uint64_t size, uint8_t *digest,
                     uint8_t *buffer)
{
    uint64_t offset = (uint64_t)leaf * r->draft->leaf_size;
    size_t length = size - offset < r->draft->leaf_size ? size - offset : r->draft->leaf_size;
    size_t got = 0;
    while (got < length) {
        ssize_t n = pread(r->fd, buffer + got, length - got, (off_t)(offset + got));
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return n < 0 ? -errno : -EIO;
        }
        got += (size_t)n;
    }
    r->digest->hash(buffer, length, digest);
    return 0;
}

static void leaf_try(struct replica *r, size_t leaf, uint8_t *buffer)
{
    uint8_t digest[MODEL_DIGEST_MAX];
    pthread_mutex_lock(&r->lock);
    struct draft *d = r->draft;
    uint64_t end = (uint64_t)(leaf + 1) * d->leaf_size;
    bool whole = r->phase == REPLICA_DRAFT && d->size >= end && !d->leaves[leaf].hashed;
    uint32_t stamp = whole ? d->leaves[leaf].stamp : 0;
    pthread_mutex_unlock(&r->lock);
    if (!whole || leaf_hash(r, leaf, end, digest, buffer) < 0) {
        return; /* registering hashes what is left, and reports errors */
    }
    pthread_mutex_lock(&r->lock);
    if (d->leaves[leaf].stamp == stamp && d->size >= end) {
        memcpy(d->digests + leaf * r->digest->size, digest, r->digest->size);
        d->leaves[leaf].hashed = true;
    }
    pthread_mutex_unlock(&r->lock);
}

static void writing_end(struct replica *r)
{
    pthread_mutex_lock(&r->lock);
    r->draft->writing--;
    pthread_mutex_unlock(&r->lock);
}

static void leaf_run(struct work_job *job)
{
    struct leaf_job *leaves = util_container(job, struct leaf_job, job);
    struct replica *r = leaves->replica;
    struct engine *engine = r->engine;
    uint8_t *buffer = malloc(r->draft->leaf_size);
    for (size_t i = 0; buffer && i < leaves->count; i++) {
        leaf_try(r, leaves->first + i, buffer);
    }
    free(buffer);
    writing_end(r);
    free(leaves);
    replica_put(r);
    core_release(engine);
}

/* Hands finished leaves to the work threads, a batch at a time. Lock held. */
static void leaves_post(struct replica *r)
{
    struct draft *d = r->draft;
    size_t finished = d->size / d->leaf_size;
    if (finished < d->queued + DRAFT_BATCH) {
        return;
    }
    struct leaf_job *leaves = malloc(sizeof *leaves);
    if (!leaves) {
        return;
    }
    *leaves = (struct leaf_job){
        .job.run = leaf_run, .replica = r, .first = d->queued, .count = finished - d->queued};
    d->queued = finished;
    d->writing++;
    replica_get(r);
    core_hold(r->engine);
    work_post(r->engine->work, &leaves->job);
}

static void leaves_touch(struct draft *d, uint64_t offset, uint64_t length)
{
    size_t last = (offset + length - 1) / d->leaf_size;
    for (size_t leaf = offset / d->leaf_size; leaf <= last && leaf < d->leaf_count; leaf++) {
        d->leaves[leaf].stamp++;
        d->leaves[leaf].hashed = false;
    }
}

/* ---- writing ---- */

/* Ready to take bytes up to `end`. Lock held. 0; -ENOSPC: room has to be made first; else final. */
static int write_begin(struct replica *r, uint64_t offset, uint64_t length)
{
    struct draft *d = r->draft;
    if (r->phase != REPLICA_DRAFT) {
        return -EROFS;
    }
    if (d->failed) {
        return d->failed;
    }
    uint64_t end = offset + length;
    if (end > MODEL_SIZE_MAX || end < offset) {
        return -EFBIG;
    }
    int status = draft_leaves_room(r, end);
    if (status < 0) {
        return status;
    }
    if (!cache_reserve(r->engine->cache, r, end)) {
        return -ENOSPC;
    }
    if (end > d->extended && !r->loose) {
        /* In steps of huge pages: the tmpfs gives one only where the whole of it lies inside the file. */
        uint64_t step = 8ull << 20;
        uint64_t extended = end < (1u << 20) ? end : (end + step - 1) / step * step;
        if (ftruncate(r->fd, (off_t)extended) < 0) {
            return -errno;
        }
        d->extended = extended;
    }
    leaves_touch(d, offset, length);
    d->writing++;
    return 0;
}

static int write_bytes(struct replica *r, uint64_t offset, const uint8_t *data, size_t length)
{
    uint64_t at = offset;
    size_t left = length;
    int status = 0;
    while (left && status == 0) {
        ssize_t n = pwrite(r->fd, data, left, (off_t)at);
        if (n < 0) {
            status = errno == EINTR ? 0 : -errno;
            continue;
        }
        data += n;
        at += (uint64_t)n;
        left -= (size_t)n;
    }
    pthread_mutex_lock(&r->lock);
    struct draft *d = r->draft;
    leaves_touch(d, offset, length);
    if (status == 0 && offset + length > d->size) {
        d->size = offset + length;
    }
    if (status < 0 && !d->failed) {
        d->failed = status;
    }
    d->writing--;
    if (status == 0) {
        leaves_post(r);
        atomic_fetch_add(&r->engine->counters.bytes_written, length);
    }
    pthread_mutex_unlock(&r->lock);
    return status;
}

struct write_job {
    struct work_job job;
    struct replica *replica;
    uint64_t offset;
    size_t length;
    engine_done done;
    void *arg;
    uint8_t data[];
};

/* Evicts until the draft's first `end` bytes fit. Work threads. */
static int room_make(struct replica *r, uint64_t end)
{
    pthread_mutex_lock(&r->lock);
    bool fits = cache_reserve(r->engine->cache, r, end);
    uint64_t need = storage_charge(end) > r->reserved ? storage_charge(end) - r->reserved : 0;
    pthread_mutex_unlock(&r->lock);
    if (fits) {
        return 0;
    }
    int status = cache_make_room(r->engine->cache, need);
    pthread_mutex_lock(&r->lock);
    if (status == 0 && !cache_reserve(r->engine->cache, r, end)) {
        status = -ENOSPC; /* somebody was quicker */
    }
    pthread_mutex_unlock(&r->lock);
    if (status < 0) {
        log_error(
            "writing a new file: %s; the cache is full of what cannot be evicted (raise cache_size=, or evict "
            "something)",
            strerror(-status));
    }
    return status;
}

static void write_run(struct work_job *job)
{
    struct write_job *write = util_container(job, struct write_job, job);
    struct replica *r = write->replica;
    struct engine *engine = r->engine;
    int status = room_make(r, write->offset + write->length);
    if (status == 0) {
        pthread_mutex_lock(&r->lock);
        status = write_begin(r, write->offset, write->length);
        pthread_mutex_unlock(&r->lock);
    }
    if (status == 0) {
        status = write_bytes(r, write->offset, write->data, write->length);
    } else {
        draft_fail(r, status);
    }
    write->done(write->arg, status);
    free(write);
    replica_put(r);
    core_release(engine);
}

int draft_write(struct replica *draft, uint64_t offset, const void *data, size_t length,
                engine_done done, void *arg)
{
    if (length == 0) {
        return 0;
    }
    pthread_mutex_lock(&draft->lock);
    int status = write_begin(draft, offset, length);
    pthread_mutex_unlock(&draft->lock);
    if (status == 0) {
        return write_bytes(draft, offset, data, length);
    }
    if (status != -ENOSPC) {
        if (status != -EROFS) {
            draft_fail(draft, status);
        }
        return status;
    }
    struct write_job *write = malloc(sizeof *write + length);
    if (!write) {
        draft_fail(draft, -ENOMEM);
        return -ENOMEM;
    }
    *write = (struct write_job){.job.run = write_run,
                                .replica = draft,
                                .offset = offset,
                                .length = length,
                                .done = done,
                                .arg = arg};
    memcpy(write->data, data, length);
    replica_get(draft);
    core_hold(draft->engine);
    work_post(draft->engine->work, &write->job);
    return -EINPROGRESS;
}

/* What it grows by is a hole, which takes no room before it is written, or registered. Both can evict; this cannot. */
int draft_truncate(struct replica *draft, uint64_t size)
{
    uint64_t limit;
    uint64_t used;
    cache_usage(draft->engine->cache, &limit, &used);
    pthread_mutex_lock(&draft->lock);
    struct draft *d = draft->draft;
    int status = 0;
    if (draft->phase == REPLICA_DRAFT && draft->loose) {
        d->size = d->extended = direct_size(draft);
    }
    if (draft->phase != REPLICA_DRAFT) {
        status = -EROFS;
    } else if (size > MODEL_SIZE_MAX) {
        status = -EFBIG;
    } else if (size > d->size && storage_charge(size) > limit) {
        status = -ENOSPC;
    } else {
        status = draft_leaves_room(draft, size);
    }
    /* Cut at the exact size first, so that what lay behind reads as zeros when the file grows again. */
    if (status == 0 && draft->loose && size < d->size) {
        (void)storage_direct_fills(draft->engine->storage);
    }
    if (status == 0 && size < d->extended && ftruncate(draft->fd, (off_t)size) < 0) {
        status = -errno;
    }
    if (status == 0 && size > d->extended && ftruncate(draft->fd, (off_t)size) < 0) {
        status = -errno;
    }
    if (status == 0) {
        uint64_t low = size < d->size ? size : d->size;
        uint64_t high = size < d->size ? d->size : size;
        if (high > low) {
            leaves_touch(d, low, high - low);
        }
        if (low / d->leaf_size < d->queued) {
            d->queued = low / d->leaf_size;
        }
        d->size = size;
        d->extended = size;
    }
    pthread_mutex_unlock(&draft->lock);
    return status;
}

int draft_read(struct replica *draft, uint64_t offset, size_t length, void *out)
{
    size_t got = 0;
    while (got < length) {
        ssize_t n = pread(draft->fd, (uint8_t *)out + got, length - got, (off_t)(offset + got));
        if (n < 0 && errno != EINTR) {
            return -errno;
        }
        if (n == 0) { /* cut by a writer meanwhile */
            memset((uint8_t *)out + got, 0, length - got);
            return 0;
        }
        got += n > 0 ? (size_t)n : 0;
    }
    return 0;
}

/* ---- registering ---- */

struct register_job {
    struct work_job job;
    struct replica *replica;
    uint64_t parent;
    uint64_t id;
    struct model_attr attr;
    unsigned flags;
    catalog_done done;
    void *arg;
    char name[MODEL_NAME_MAX + 1];
};

static void register_end(struct register_job *reg, int status, const struct model_entry *entry)
{
    struct replica *r = reg->replica;
    struct engine *engine = r->engine;
    if (status < 0) {
        cache_remove(engine->cache, r);
        pthread_mutex_lock(&r->lock);
        r->phase = REPLICA_DRAFT;
        pthread_mutex_unlock(&r->lock);
        draft_fail(r, status);
    }
    reg->done(reg->arg, status, entry);
    free(reg);
    replica_put(r);
    core_release(engine);
}

/* Published: an ordinary replica from now on. */
static void published(void *arg, int status, const struct model_entry *entry)
{
    struct register_job *reg = arg;
    struct replica *r = reg->replica;
    if (status == 0) {
        pthread_mutex_lock(&r->lock);
        r->phase = REPLICA_LIVE;
        r->announced = REPLICA_ALL;
        r->used_ns = util_now_ns();
        draft_free(r->draft);
        r->draft = NULL;
        replica_check(r);
        pthread_mutex_unlock(&r->lock);
        direct_settle(r);
    }
    register_end(reg, status, entry);
}

/* The digest of a shard from its leaves, when both are cut alike; from its bytes otherwise. */
static int shard_digest(struct replica *r, uint32_t shard, uint8_t *buffer, uint8_t *out)
{
    struct draft *d = r->draft;
    uint64_t offset = replica_shard_offset(r, shard);
    uint64_t length = replica_shard_size(r, shard);
    if (r->version.shard_size % d->leaf_size != 0) {
        return digest_of_shard(r->digest, r->map + offset, length, out);
    }
    size_t first = offset / d->leaf_size;
    size_t count = (length + d->leaf_size - 1) / d->leaf_size;
    for (size_t i = first; i < first + count; i++) {
        bool whole = (uint64_t)(i + 1) * d->leaf_size <= d->size;
        if (d->leaves[i].hashed && whole) {
            continue;
        }
        int status = leaf_hash(r, i, d->size, d->digests + i * r->digest->size, buffer);
        if (status < 0) {
            return status;
        }
        d->leaves[i].hashed = true;
    }
    digest_shard_from_leaves(r->digest, d->digests + first * r->digest->size, count, out);
    return 0;
}

/* Digests of all shards and the root. No writer is left, so leaves need no lock. */
static int seal_digests(struct replica *r, uint8_t *buffer)
{
    for (uint32_t k = 0; k < r->shards; k++) {
        uint8_t digest[MODEL_DIGEST_MAX];
        int status = shard_digest(r, k, buffer, digest);
        if (status < 0) {
            return status;
        }
        pthread_mutex_lock(&r->lock);
        replica_digest_set(r, k, digest);
        r->states[k] = SPREAD_PRESENT;
        pthread_mutex_unlock(&r->lock);
    }
    uint8_t root[MODEL_DIGEST_MAX] = {0};
    digest_root(r->digest, r->version.size, r->version.shard_size, r->digests, r->shards, root);
    pthread_mutex_lock(&r->lock);
    memcpy(r->version.root, root, sizeof root);
    pthread_mutex_unlock(&r->lock);
    return 0;
}

/* Size, shards, mapping and states, as a complete replica has them. */
static int seal_shape(struct replica *r, uint64_t size)
{
    uint32_t shard_size = core_shard_size(r->engine, size);
    uint32_t shards = model_shard_count(size, shard_size);
    uint8_t *map = NULL;
    _Atomic uint8_t *states = calloc(shards + 1, sizeof *states);
    if (!states) {
        return -ENOMEM;
    }
    int status = ftruncate(r->fd, (off_t)size) < 0 ? -errno : 0;
    if (status == 0 && shards) {
        status = storage_map(r->fd, size, &map);
    }
    if (status < 0) {
        free((void *)states);
        return status;
    }
    pthread_mutex_lock(&r->lock);
    r->version.size = size;
    r->version.shard_size = shard_size;
    r->shards = shards;
    r->map = map;
    r->states = states;
    status = replica_digests_room(r);
    pthread_mutex_unlock(&r->lock);
    return status;
}

/* What the kernel wrote is digested when its last writer has let go. */
static void seal_later(struct replica *r)
{
    pthread_mutex_lock(&r->lock);
    memset((void *)r->states, SPREAD_PRESENT, r->shards);
    atomic_store(&r->present, r->shards);
    atomic_store(&r->resident, r->version.size);
    pthread_mutex_unlock(&r->lock);
}

/* Everything that a complete replica has. */
static int seal(struct replica *r)
{
    int status = seal_shape(r, r->draft->size);
    if (status < 0) {
        return status;
    }
    if (r->lent) {
        seal_later(r);
        return 0;
    }
    uint8_t *buffer = malloc(r->draft->leaf_size);
    if (!buffer) {
        return -ENOMEM;
    }
    status = seal_digests(r, buffer);
    free(buffer);
    if (status < 0) {
        return status;
    }
    pthread_mutex_lock(&r->lock);
    atomic_store(&r->present, r->shards);
    atomic_store(&r->resident, r->version.size);
    r->version.sealed = true;
    atomic_store(&r->all_known, true);
    pthread_mutex_unlock(&r->lock);
    return 0;
}

static void register_run(struct work_job *job)
{
    struct register_job *reg = util_container(job, struct register_job, job);
    struct replica *r = reg->replica;
    pthread_mutex_lock(&r->lock);
    bool busy = r->draft->writing > 0;
    pthread_mutex_unlock(&r->lock);
    if (busy) { /* hashing jobs are ahead of us in the queue, so this turns only briefly */
        usleep(200);
        work_post(r->engine->work, &reg->job);
        return;
    }
    /* Holes have no room yet, and whoever maps the file fills them. */
    int status = r->lent ? direct_take(r) : 0;
    if (status == 0) {
        status = room_make(r, r->draft->size);
    }
    if (status == 0) {
        status = seal(r);
    }
    if (status == 0) {
        /* In the table before anybody can learn of it and ask. */
        struct replica *there = cache_insert(r->engine->cache, r);
        if (there != r) {
            replica_put(there);
            status = -EEXIST;
        }
    }
    if (status == 0) {
        status =
            catalog_publish(r->engine->config.catalog, reg->parent, reg->name, reg->id, &reg->attr,
                            &r->version, reg->flags | CATALOG_COMPLETE, published, reg);
    }
    if (status < 0) {
        register_end(reg, status, NULL);
    }
}

int draft_register(struct replica *draft, uint64_t parent, const char *name, uint64_t id,
                   const struct model_attr *attr, unsigned flags, catalog_done done, void *arg)
{
    int status = model_name_check(name);
    if (status < 0) {
        return status;
    }
    struct register_job *reg = malloc(sizeof *reg);
    if (!reg) {
        return -ENOMEM;
    }
    *reg = (struct register_job){.job.run = register_run,
                                 .replica = draft,
                                 .parent = parent,
                                 .id = id,
                                 .attr = *attr,
                                 .flags = flags,
                                 .done = done,
                                 .arg = arg};
    snprintf(reg->name, sizeof reg->name, "%s", name);
    pthread_mutex_lock(&draft->lock);
    if (draft->phase != REPLICA_DRAFT) {
        status = -EROFS;
    } else if (draft->draft->failed) {
        status = draft->draft->failed;
    } else {
        draft->phase = REPLICA_SEALING; /* no write begins from here on */
    }
    pthread_mutex_unlock(&draft->lock);
    if (status < 0) {
        free(reg);
        return status;
    }
    replica_get(draft);
    core_hold(draft->engine);
    work_post_urgent(draft->engine->work, &reg->job);
    return 0;
}
