#include "engine/inplace.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/cache.h"
#include "engine/extents.h"
#include "engine/lane.h"
#include "engine/serve.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

static int64_t mtime_ns(const struct stat *st)
{
    return (int64_t)st->st_mtim.tv_sec * 1000000000 + st->st_mtim.tv_nsec;
}

static bool same_file(const struct model_version *version, const struct stat *st)
{
    return S_ISREG(st->st_mode) && (uint64_t)st->st_size == version->size &&
           st->st_ino == version->origin_ino && mtime_ns(st) == version->origin_mtime_ns;
}

/* Nobody waits for the answer; the catalog repeats what it could not say. */
static void withdrawn(void *arg, int status, const struct model_entry *entry)
{
    (void)arg;
    (void)status;
    (void)entry;
}

/* What it is, for the log. */
static const char *origin(const struct replica *replica)
{
    return replica->extents               ? "memory of this program"
           : replica->version.origin_path ? replica->version.origin_path
                                          : "a file that was written here";
}

/* The cluster must not be sent here again; readers get EIO from now on. Said once. */
static void changed(struct replica *replica, const char *what)
{
    char reason[128];
    snprintf(reason, sizeof reason, "registered in place, and the local file %s", what);
    pthread_mutex_lock(&replica->lock);
    bool news = !replica->changed;
    replica->changed = true;
    replica->error = -EIO;
    replica_reason_set(replica, reason);
    pthread_mutex_unlock(&replica->lock);
    if (!news) {
        return;
    }
    log_error(
        "%s: registered in place, and now it %s; its reads fail with EIO. %s the name and register it "
        "again",
        origin(replica), what,
        replica->extents ? "Unregister" : "Restore it and mount again, or rm");
    struct engine *engine = replica->engine;
    lane_post_all(engine, serve_revoke, replica);
    (void)catalog_withdraw(engine->config.catalog, &replica->version.id, false, withdrawn, NULL);
}

/* By path: the name must still lead to the same file. */
static int check_path(struct replica *replica)
{
    struct stat st;
    if (replica->extents || !replica->inplace) {
        return 0;
    }
    if (stat(replica->version.origin_path, &st) < 0) {
        changed(replica,
                errno == ENOENT || errno == ENOTDIR ? "has vanished" : "cannot be reached");
        return -ESTALE;
    }
    if (!same_file(&replica->version, &st)) {
        changed(replica, "has changed");
        return -ESTALE;
    }
    return 0;
}

int inplace_open(struct replica *replica)
{
    if (!replica->inplace) {
        return 0; /* nobody else has its file */
    }
    pthread_mutex_lock(&replica->lock);
    bool open_now = replica->fd >= 0;
    bool stale = replica->changed;
    pthread_mutex_unlock(&replica->lock);
    if (stale) {
        return -ESTALE;
    }
    int status = check_path(replica);
    if (status < 0 || open_now || replica->extents) {
        return status;
    }
    util_autoclose int fd =
        open(replica->version.origin_path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (fd < 0) {
        status = -errno;
        log_error("%s: registered in place: %s", replica->version.origin_path, strerror(-status));
        return status;
    }
    struct stat st;
    if (fstat(fd, &st) < 0 || !same_file(&replica->version, &st)) {
        changed(replica, "has changed");
        return -ESTALE;
    }
    pthread_mutex_lock(&replica->lock);
    if (replica->fd < 0) {
        replica->fd = util_fd_take(&fd);
    }
    pthread_mutex_unlock(&replica->lock);
    return 0;
}

void inplace_idle(struct replica *replica)
{
    int fd = -1;
    if (!replica->inplace) {
        return;
    }
    pthread_mutex_lock(&replica->lock);
    if (replica->opens == 0 && replica->users == 0 && replica->grants == 0 && !replica->hashing) {
        fd = replica->fd;
        replica->fd = -1;
    }
    pthread_mutex_unlock(&replica->lock);
    if (fd >= 0) {
        close(fd);
    }
}

/* All of it or -EIO; the file may be shorter than it was. */
static int read_whole(int fd, uint8_t *out, size_t length, uint64_t offset)
{
    while (length) {
        ssize_t n = pread(fd, out, length, (off_t)offset);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return n < 0 ? -errno : -EIO;
        }
        out += n;
        offset += (uint64_t)n;
        length -= (size_t)n;
    }
    return 0;
}

/* The same of the replica, wherever it lies. -ESTALE: the program has its memory back, or it is no memory any more. */
static int bytes_read(struct replica *replica, uint8_t *out, size_t length, uint64_t offset)
{
    if (!replica->extents) {
        return read_whole(replica->fd, out, length, offset);
    }
    if (!extents_enter(replica->extents)) {
        return -ESTALE;
    }
    int status = extents_read(replica->extents, offset, length, out);
    extents_leave(replica->extents);
    if (status == -EFAULT) {
        changed(replica, "cannot be read");
        status = -ESTALE;
    }
    return status;
}

int inplace_read(struct replica *replica, uint64_t offset, size_t length, void *out)
{
    int status = inplace_open(replica);
    if (status == 0) {
        status = bytes_read(replica, out, length, offset);
        /* What was read counts only if the file was still itself afterwards. */
        int still = check_path(replica);
        status = still < 0 ? still : status;
    }
    return status;
}

/* ---- digests ---- */

/* Reads a shard and digests it leaf by leaf; `leaves` has room for their digests, `buffer` for one leaf. */
static int shard_read(struct replica *replica, uint32_t shard, uint8_t *buffer, uint8_t *leaves,
                      uint8_t *digest)
{
    uint64_t offset = replica_shard_offset(replica, shard);
    uint64_t length = replica_shard_size(replica, shard);
    size_t count = 0;
    for (uint64_t at = 0; at < length; at += DIGEST_LEAF) {
        size_t piece = length - at < DIGEST_LEAF ? length - at : DIGEST_LEAF;
        int status = replica->map ? 0 : bytes_read(replica, buffer, piece, offset + at);
        if (status < 0) {
            return status;
        }
        const uint8_t *leaf = replica->map ? replica->map + offset + at : buffer;
        replica->digest->hash(leaf, piece, leaves + count++ * replica->digest->size);
    }
    digest_shard_from_leaves(replica->digest, leaves, count, digest);
    return check_path(replica);
}

static int shard_hash(struct replica *replica, uint32_t shard)
{
    size_t leaves = (replica_shard_size(replica, shard) + DIGEST_LEAF - 1) / DIGEST_LEAF;
    size_t digest_size = replica->digest->size;
    uint8_t digest[MODEL_DIGEST_MAX];
    uint8_t *buffer = malloc(DIGEST_LEAF + leaves * digest_size);
    if (!buffer) {
        return -ENOMEM;
    }
    int status = shard_read(replica, shard, buffer, buffer + DIGEST_LEAF, digest);
    free(buffer);
    if (status < 0) {
        return status;
    }
    pthread_mutex_lock(&replica->lock);
    bool twice = replica_digest_known(replica, shard);
    bool differs = twice && memcmp(replica_digest(replica, shard), digest, digest_size) != 0;
    replica_digest_set(replica, shard, digest);
    bool known = replica_digest_known(replica, shard);
    pthread_mutex_unlock(&replica->lock);
    if (differs) {
        changed(replica, "has other bytes under the same time stamp");
        return -ESTALE;
    }
    return known ? 0 : -ENOMEM;
}

int inplace_prepare(struct replica *replica, uint32_t shard)
{
    int status = inplace_open(replica);
    if (status < 0) {
        return status;
    }
    pthread_mutex_lock(&replica->lock);
    bool known = replica_digest_known(replica, shard);
    pthread_mutex_unlock(&replica->lock);
    if (!known) {
        return shard_hash(replica, shard);
    }
    if (replica->extents) {
        return 0;
    }
    (void)readahead(replica->fd, (off64_t)replica_shard_offset(replica, shard),
                    replica_shard_size(replica, shard));
    return 0;
}

struct hash_job {
    struct work_job job;
    struct replica *replica;
    uint32_t shard;
};

static void hash_end(struct hash_job *hash)
{
    struct replica *replica = hash->replica;
    struct engine *engine = replica->engine;
    pthread_mutex_lock(&replica->lock);
    replica->hashing = false;
    pthread_mutex_unlock(&replica->lock);
    inplace_idle(replica);
    free(hash);
    replica_put(replica);
    core_release(engine);
}

static void sealed(void *arg, int status, const struct model_entry *entry)
{
    struct hash_job *hash = arg;
    (void)entry;
    if (status < 0 && status != -ENOENT && status != -ESHUTDOWN) {
        log_warn(
            "%s: its digest could not be stored in the metadata: %s; peers are told it by this node",
            origin(hash->replica), strerror(-status));
    }
    hash_end(hash);
}

static void hash_seal(struct hash_job *hash)
{
    struct replica *replica = hash->replica;
    uint8_t root[MODEL_DIGEST_MAX] = {0};
    pthread_mutex_lock(&replica->lock);
    bool was_sealed = replica->version.sealed;
    bool agrees = replica_root_agrees(replica);
    digest_root(replica->digest, replica->version.size, replica->version.shard_size,
                replica->digests, replica->shards, root);
    if (!was_sealed) {
        memcpy(replica->version.root, root, sizeof root);
        replica->version.sealed = true;
    }
    atomic_store(&replica->all_known, agrees);
    pthread_mutex_unlock(&replica->lock);
    if (!agrees) {
        changed(replica, "does not have the bytes that were registered");
        hash_end(hash);
        return;
    }
    lane_kick_all(replica->engine);
    if (was_sealed) {
        hash_end(hash);
        return;
    }
    int status =
        catalog_seal(replica->engine->config.catalog, &replica->version.id, root, sealed, hash);
    if (status < 0) {
        sealed(hash, status, NULL);
    }
}

/* One shard a turn, so that urgent jobs come in between. */
static void hash_run(struct work_job *job)
{
    struct hash_job *hash = util_container(job, struct hash_job, job);
    struct replica *replica = hash->replica;
    pthread_mutex_lock(&replica->lock);
    bool stop = replica->changed || replica->phase != REPLICA_LIVE ||
                atomic_load(&replica->engine->closing);
    while (hash->shard < replica->shards && replica_digest_known(replica, hash->shard)) {
        hash->shard++;
    }
    pthread_mutex_unlock(&replica->lock);
    if (stop) {
        hash_end(hash);
    } else if (hash->shard == replica->shards) {
        hash_seal(hash);
    } else if (inplace_open(replica) < 0 || shard_hash(replica, hash->shard) < 0) {
        hash_end(hash); /* whoever learnt the cause has said it */
    } else {
        work_post(replica->engine->work, &hash->job);
    }
}

void inplace_hash_start(struct replica *replica)
{
    struct hash_job *hash = malloc(sizeof *hash);
    pthread_mutex_lock(&replica->lock);
    bool start = hash && !replica->hashing && replica_digests_room(replica) == 0;
    replica->hashing |= start;
    pthread_mutex_unlock(&replica->lock);
    if (!start) {
        free(hash); /* shards are then digested when they are asked for */
        return;
    }
    *hash = (struct hash_job){.job.run = hash_run, .replica = replica};
    replica_get(replica);
    core_hold(replica->engine);
    work_post(replica->engine->work, &hash->job);
}

/* ---- versions ---- */

int inplace_version(struct engine *engine, const char *path, struct model_version *version,
                    struct model_attr *attr)
{
    struct stat st;
    util_autoclose int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (fd < 0) {
        return -errno;
    }
    if (fstat(fd, &st) < 0) {
        return -errno;
    }
    if (!S_ISREG(st.st_mode)) {
        return -EINVAL;
    }
    if ((uint64_t)st.st_size > MODEL_SIZE_MAX) {
        return -EFBIG;
    }
    *version = (struct model_version){.id = model_id_new(),
                                      .size = (uint64_t)st.st_size,
                                      .digest = engine->config.digest,
                                      .origin_boot = engine->config.boot,
                                      .origin_ino = st.st_ino,
                                      .origin_mtime_ns = mtime_ns(&st)};
    version->shard_size = core_shard_size(engine, version->size);
    version->origin_node = strdup(engine->config.node);
    version->origin_path = strdup(path);
    if (!version->origin_node || !version->origin_path) {
        model_version_clear(version);
        return -ENOMEM;
    }
    *attr = (struct model_attr){
        .mode = st.st_mode & 07777, .uid = st.st_uid, .gid = st.st_gid, .mtime_ns = mtime_ns(&st)};
    return 0;
}
