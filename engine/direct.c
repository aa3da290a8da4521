#include "engine/direct.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utlist.h>

#include "engine/cache.h"
#include "engine/draft_inside.h"
#include "engine/inplace.h"
#include "engine/storage.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

#define DIRECT_LIMIT_MIN (2ull << 30) /* a smaller cache has no room to be late in */
/* What a draft is promised ahead: as much again as it has. A core copies some 10 GB/s, and what it has is looked at
 * every LANE_TICK_MS: half a gigabyte. */
#define DIRECT_AHEAD_MIN (2ull << 20)
#define DIRECT_AHEAD_MAX (1ull << 30)
#define DIRECT_SMALL \
    (4ull << 20) /* below, a copy (a millisecond) costs less than a second transaction */

static uint64_t taken(const struct replica *draft)
{
    struct stat st;
    return fstat(draft->fd, &st) == 0 ? (uint64_t)st.st_blocks * 512 : 0;
}

static uint64_t ahead(uint64_t has)
{
    return has < DIRECT_AHEAD_MIN   ? DIRECT_AHEAD_MIN
           : has > DIRECT_AHEAD_MAX ? DIRECT_AHEAD_MAX
                                    : has;
}

/* For what it has, and ahead. Lock held. */
static bool promise(struct replica *draft)
{
    uint64_t has = taken(draft);
    return cache_reserve(draft->engine->cache, draft, has + ahead(has));
}

int engine_draft_lend(struct engine *engine, struct replica *draft, int *fd)
{
    uint64_t limit;
    uint64_t used;
    cache_usage(engine->cache, &limit, &used);
    if (limit < DIRECT_LIMIT_MIN || used > limit / 2) {
        return -EAGAIN;
    }
    util_autoclose int file = storage_file_direct(engine->storage);
    if (file < 0) {
        return -EAGAIN;
    }
    pthread_mutex_lock(&draft->lock);
    struct draft *d = draft->draft;
    bool untouched =
        d && draft->phase == REPLICA_DRAFT && !draft->loose && !d->failed && d->extended == 0;
    bool lent =
        untouched && d->writing == 0 && promise(draft) && dup3(file, draft->fd, O_CLOEXEC) >= 0;
    if (lent) {
        draft->loose = draft->lent = true;
        d->replica = draft;
        d->fills = storage_direct_fills(engine->storage);
        *fd = draft->fd;
    }
    pthread_mutex_unlock(&draft->lock);
    if (lent) {
        pthread_mutex_lock(&engine->direct_lock);
        DL_APPEND(engine->direct, d);
        d->listed = true;
        pthread_mutex_unlock(&engine->direct_lock);
    }
    return lent ? 0 : -EAGAIN;
}

void direct_forget(struct draft *draft)
{
    if (!draft || !draft->replica) {
        return;
    }
    struct engine *engine = draft->replica->engine;
    pthread_mutex_lock(&engine->direct_lock);
    if (draft->listed) {
        /* NOLINTNEXTLINE(clang-analyzer-core.NullDereference): a list with a member has a head */
        DL_DELETE(engine->direct, draft);
        draft->listed = false;
    }
    pthread_mutex_unlock(&engine->direct_lock);
}

uint64_t direct_size(const struct replica *draft)
{
    struct stat st;
    return fstat(draft->fd, &st) == 0 ? (uint64_t)st.st_size : 0;
}

int64_t engine_draft_mtime(struct replica *draft)
{
    struct stat st;
    pthread_mutex_lock(&draft->lock);
    bool told = draft->loose && draft->draft && fstat(draft->fd, &st) == 0;
    pthread_mutex_unlock(&draft->lock);
    return told ? st.st_mtim.tv_sec * 1000000000LL + st.st_mtim.tv_nsec : 0;
}

/* ---- room ---- */

struct room_job {
    struct work_job job;
    struct replica *replica;
};

static void room_run(struct work_job *job)
{
    struct room_job *room = util_container(job, struct room_job, job);
    struct replica *r = room->replica;
    struct engine *engine = r->engine;
    (void)cache_make_room(engine->cache, ahead(taken(r))); /* less than that may be enough */
    bool failed = false;
    pthread_mutex_lock(&r->lock);
    if (r->phase == REPLICA_DRAFT && !r->draft->failed && !promise(r) &&
        !cache_reserve(engine->cache, r, taken(r))) {
        r->draft->failed = -ENOSPC;
        failed = true;
    }
    if (r->draft) {
        r->draft->making = false;
    }
    pthread_mutex_unlock(&r->lock);
    if (failed) {
        log_error(
            "writing a new file: %s; the cache is full of what cannot be evicted (raise cache_size=, or evict "
            "something)",
            strerror(ENOSPC));
    }
    free(room);
    replica_put(r);
    core_release(engine);
}

/* Lock held. */
static void room_watch(struct replica *r)
{
    struct draft *d = r->draft;
    if (r->phase != REPLICA_DRAFT || r->opens == 0 || d->failed || d->making || promise(r) ||
        !core_hold_open(r->engine)) {
        return;
    }
    struct room_job *room = malloc(sizeof *room);
    if (!room) {
        core_release(r->engine);
        return;
    }
    *room = (struct room_job){.job.run = room_run, .replica = r};
    d->making = true;
    replica_get(r);
    work_post_urgent(r->engine->work, &room->job);
}

void direct_tick(struct engine *engine)
{
    struct draft *d;
    pthread_mutex_lock(&engine->direct_lock);
    DL_FOREACH(engine->direct, d) {
        pthread_mutex_lock(&d->replica->lock);
        room_watch(d->replica);
        pthread_mutex_unlock(&d->replica->lock);
    }
    pthread_mutex_unlock(&engine->direct_lock);
}

/* ---- registering ---- */

/* Into a file that no writer has. */
static int copy(struct replica *r, uint64_t size)
{
    util_autoclose int file = storage_file(r->engine->storage, "");
    util_autofree uint8_t *bytes = malloc(size ? size : 1);
    if (file < 0 || !bytes) {
        return file < 0 ? file : -ENOMEM;
    }
    for (uint64_t at = 0; at < size;) {
        ssize_t n = pread(r->fd, bytes + at, size - at, (off_t)at);
        if (n <= 0) {
            return n < 0 ? -errno : -EIO;
        }
        at += (uint64_t)n;
    }
    for (uint64_t at = 0; at < size;) {
        ssize_t n = pwrite(file, bytes + at, size - at, (off_t)at);
        if (n < 0) {
            return -errno;
        }
        at += (uint64_t)n;
    }
    return dup3(file, r->fd, O_CLOEXEC) < 0 ? -errno : 0;
}

int direct_take(struct replica *r)
{
    struct engine *engine = r->engine;
    struct draft *d = r->draft;
    direct_forget(d);
    pthread_mutex_lock(&r->lock);
    d->size = direct_size(r);
    int status = d->size > MODEL_SIZE_MAX ? -EFBIG : draft_leaves_room(r, d->size);
    if (status == 0) {
        if (d->leaf_count > 0) { /* an empty file has none */
            memset(d->leaves, 0, d->leaf_count * sizeof *d->leaves);
        }
        cache_unreserve(engine->cache, r); /* what it was promised beyond */
        (void)cache_reserve(engine->cache, r, d->size);
    }
    pthread_mutex_unlock(&r->lock);
    if (status == 0 && storage_direct_fills(engine->storage) != d->fills) {
        status = -ENOSPC;
    }
    if (status == 0 && d->size < DIRECT_SMALL && (status = copy(r, d->size)) == 0) {
        pthread_mutex_lock(&r->lock);
        r->loose = r->lent = false;
        pthread_mutex_unlock(&r->lock);
    }
    if (status == 0) {
        atomic_fetch_add(&engine->counters.bytes_written, d->size);
    }
    return status;
}

void direct_settle(struct replica *r)
{
    pthread_mutex_lock(&r->lock);
    bool settled = r->phase == REPLICA_LIVE && r->lent && !r->loose && !r->version.sealed &&
                   !r->inplace && !r->pull_started_ns;
    uint64_t size = r->version.size;
    pthread_mutex_unlock(&r->lock);
    if (!settled) {
        return;
    }
    storage_direct_fit(r->fd, size);
    if (direct_size(r) != size && ftruncate(r->fd, (off_t)size) == 0) {
        log_warn(
            "a file was written to after it was registered: what was added is cut off: let one process close "
            "it last");
    }
    inplace_hash_start(r);
}

void engine_draft_written(struct engine *engine, struct replica *draft)
{
    (void)engine;
    pthread_mutex_lock(&draft->lock);
    bool news = draft->loose;
    draft->loose = false;
    if (news && draft->phase == REPLICA_DRAFT) {
        draft->draft->size = draft->draft->extended = direct_size(draft);
    }
    pthread_mutex_unlock(&draft->lock);
    if (news) {
        direct_settle(draft);
    }
}
