/* The changes of catalog.h, as they are queued: each copies its arguments and returns. */
#include "meta/catalog.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "meta/base/util.h"
#include "meta/catalog_inside.h"

void queue_wake(struct catalog *c)
{
    uint64_t one = 1;
    if (write(c->wake_fd, &one, sizeof(one)) < 0)
        return; /* it is full, so the thread wakes anyway */
}

static struct change *queue_make(enum change_kind kind, catalog_done done, void *arg)
{
    struct change *change = calloc(1, sizeof(*change));
    if (change) {
        change->kind = kind;
        change->done = done;
        change->arg = arg;
        change->queued_ms = util_now_ms();
    }
    return change;
}

/* Takes the change. `copied`: its strings could be. */
static int queue_put(struct catalog *c, struct change *change, bool copied)
{
    if (!copied) {
        change_free(change);
        return -ENOMEM;
    }
    pthread_mutex_lock(&c->mutex);
    bool stopping = c->stopping;
    if (!stopping) {
        *c->queue_end = change;
        c->queue_end = &change->next;
    }
    pthread_mutex_unlock(&c->mutex);
    if (stopping) {
        change_free(change);
        return -ESHUTDOWN;
    }
    queue_wake(c);
    return 0;
}

void queue_fail(struct catalog *c, int status)
{
    while (c->queue) {
        struct change *change = c->queue;
        c->queue = change->next;
        change_finish(c, change, status);
    }
}

static struct model_attr queue_attr(const struct model_attr *attr)
{
    struct model_attr copy = *attr;
    copy.mode &= 07777;
    return copy;
}

int catalog_mkdir(struct catalog *c, uint64_t parent, const char *name,
                  const struct model_attr *attr, catalog_done done, void *arg)
{
    struct change *change = queue_make(CHANGE_MKDIR, done, arg);
    if (!change)
        return -ENOMEM;
    change->parent = parent;
    change->name = strdup(name);
    change->attr = queue_attr(attr);
    return queue_put(c, change, change->name != NULL);
}

int catalog_symlink(struct catalog *c, uint64_t parent, const char *name, const char *target,
                    const struct model_attr *attr, catalog_done done, void *arg)
{
    if (!*target)
        return -ENOENT;
    if (strlen(target) > MODEL_PATH_MAX)
        return -ENAMETOOLONG;
    struct change *change = queue_make(CHANGE_SYMLINK, done, arg);
    if (!change)
        return -ENOMEM;
    change->parent = parent;
    change->name = strdup(name);
    change->target = strdup(target);
    change->attr = queue_attr(attr);
    return queue_put(c, change, change->name && change->target);
}

/* A record that nobody could decode must not be written. */
static int queue_check_version(const struct model_version *version)
{
    if (model_id_zero(&version->id) || codec_digest_length(version->digest) == 0 ||
        version->shard_size < MODEL_SHARD_MIN || version->shard_size > MODEL_SHARD_MAX ||
        version->shard_size % MODEL_SHARD_STEP != 0)
        return -EINVAL;
    if (version->size > MODEL_SIZE_MAX || version->size / version->shard_size >= MODEL_SHARDS_MAX)
        return -EFBIG;
    if (version->origin_node && model_node_check(version->origin_node) < 0)
        return -EINVAL;
    if (version->origin_path &&
        (!*version->origin_path || strlen(version->origin_path) > MODEL_PATH_MAX))
        return -ENAMETOOLONG;
    if (version->piece_count > MODEL_PIECES_MAX)
        return -E2BIG;
    return 0;
}

int catalog_publish(struct catalog *c, uint64_t parent, const char *name, uint64_t id,
                    const struct model_attr *attr, const struct model_version *version,
                    unsigned flags, catalog_done done, void *arg)
{
    int rc = queue_check_version(version);
    if (rc < 0)
        return rc;
    struct change *change = queue_make(CHANGE_PUBLISH, done, arg);
    if (!change)
        return -ENOMEM;
    change->parent = parent;
    change->name = strdup(name);
    change->id = id;
    change->attr = queue_attr(attr);
    change->flags = flags;
    bool copied = model_version_copy(&change->version, version) == 0 && change->name;
    if (copied && !change->version.origin_node) {
        change->version.origin_node = strdup(c->self.name);
        change->version.origin_boot = c->self.boot;
        copied = change->version.origin_node != NULL;
    }
    return queue_put(c, change, copied);
}

int catalog_link(struct catalog *c, uint64_t id, uint64_t parent, const char *name,
                 catalog_done done, void *arg)
{
    struct change *change = queue_make(CHANGE_LINK, done, arg);
    if (!change)
        return -ENOMEM;
    change->id = id;
    change->parent = parent;
    change->name = strdup(name);
    return queue_put(c, change, change->name != NULL);
}

int catalog_rename(struct catalog *c, uint64_t parent, const char *name, uint64_t new_parent,
                   const char *new_name, unsigned flags, catalog_done done, void *arg)
{
    if ((flags & CATALOG_NOREPLACE) && (flags & CATALOG_EXCHANGE))
        return -EINVAL;
    struct change *change = queue_make(CHANGE_RENAME, done, arg);
    if (!change)
        return -ENOMEM;
    change->parent = parent;
    change->name = strdup(name);
    change->new_parent = new_parent;
    change->new_name = strdup(new_name);
    change->flags = flags;
    return queue_put(c, change, change->name && change->new_name);
}

/* The changes that only name an entry. */
static int queue_named(struct catalog *c, enum change_kind kind, uint64_t parent, const char *name,
                       catalog_done done, void *arg)
{
    struct change *change = queue_make(kind, done, arg);
    if (!change)
        return -ENOMEM;
    change->parent = parent;
    change->name = strdup(name);
    return queue_put(c, change, change->name != NULL);
}

int catalog_unlink(struct catalog *c, uint64_t parent, const char *name, catalog_done done,
                   void *arg)
{
    return queue_named(c, CHANGE_UNLINK, parent, name, done, arg);
}

int catalog_rmdir(struct catalog *c, uint64_t parent, const char *name, catalog_done done,
                  void *arg)
{
    return queue_named(c, CHANGE_RMDIR, parent, name, done, arg);
}

int catalog_remove_tree(struct catalog *c, uint64_t parent, const char *name, catalog_done done,
                        void *arg)
{
    return queue_named(c, CHANGE_REMOVE_TREE, parent, name, done, arg);
}

int catalog_setattr(struct catalog *c, uint64_t id, unsigned mask, const struct model_attr *attr,
                    catalog_done done, void *arg)
{
    struct change *change = queue_make(CHANGE_SETATTR, done, arg);
    if (!change)
        return -ENOMEM;
    change->id = id;
    change->flags = mask;
    change->attr = queue_attr(attr);
    return queue_put(c, change, true);
}

int catalog_tree_begin(struct catalog *c, uint64_t *dir, catalog_done done, void *arg)
{
    struct change *change = queue_make(CHANGE_TREE_BEGIN, done, arg);
    if (!change)
        return -ENOMEM;
    do {
        change->id = util_random_u64() >> 1;
    } while (change->id < 1u << 20);
    *dir = change->id;
    return queue_put(c, change, true);
}

int catalog_tree_attach(struct catalog *c, uint64_t dir, uint64_t parent, const char *name,
                        const struct model_attr *attr, catalog_done done, void *arg)
{
    struct change *change = queue_make(CHANGE_TREE_ATTACH, done, arg);
    if (!change)
        return -ENOMEM;
    change->id = dir;
    change->parent = parent;
    change->name = strdup(name);
    change->attr = queue_attr(attr);
    return queue_put(c, change, change->name != NULL);
}

int catalog_tree_drop(struct catalog *c, uint64_t dir, catalog_done done, void *arg)
{
    struct change *change = queue_make(CHANGE_TREE_DROP, done, arg);
    if (!change)
        return -ENOMEM;
    change->id = dir;
    return queue_put(c, change, true);
}

/* The changes that only name a version. */
static struct change *queue_version(enum change_kind kind, const struct model_id *version,
                                    catalog_done done, void *arg)
{
    struct change *change = queue_make(kind, done, arg);
    if (change)
        change->version.id = *version;
    return change;
}

int catalog_seal(struct catalog *c, const struct model_id *version, const uint8_t *root,
                 catalog_done done, void *arg)
{
    struct change *change = queue_version(CHANGE_SEAL, version, done, arg);
    if (!change)
        return -ENOMEM;
    memcpy(change->root, root, sizeof(change->root));
    return queue_put(c, change, true);
}

int catalog_announce(struct catalog *c, const struct model_id *version, unsigned flags,
                     catalog_done done, void *arg)
{
    struct change *change = queue_version(CHANGE_ANNOUNCE, version, done, arg);
    if (!change)
        return -ENOMEM;
    change->flags = flags;
    return queue_put(c, change, true);
}

int catalog_withdraw(struct catalog *c, const struct model_id *version, bool keep_other,
                     catalog_done done, void *arg)
{
    struct change *change = queue_version(CHANGE_WITHDRAW, version, done, arg);
    if (!change)
        return -ENOMEM;
    change->keep_other = keep_other;
    return queue_put(c, change, true);
}

int catalog_holders(struct catalog *c, const struct model_id *version, catalog_holders_done done,
                    void *arg)
{
    struct change *change = queue_version(CHANGE_HOLDERS, version, NULL, arg);
    if (!change)
        return -ENOMEM;
    change->holders_done = done;
    return queue_put(c, change, true);
}

int catalog_census(struct catalog *c, catalog_census_each each, catalog_done done, void *arg)
{
    struct change *change = queue_make(CHANGE_CENSUS, done, arg);
    if (!change)
        return -ENOMEM;
    change->census_each = each;
    return queue_put(c, change, true);
}

int queue_serve(struct catalog *c, const char *address, catalog_done done, void *arg)
{
    struct change *change = queue_make(CHANGE_SERVE, done, arg);
    if (!change)
        return -ENOMEM;
    change->target = strdup(address);
    return queue_put(c, change, change->target != NULL);
}

/* ---- waiting for one change ---- */

static pthread_mutex_t sync_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t sync_done = PTHREAD_COND_INITIALIZER;

void catalog_sync_done(void *arg, int status, const struct model_entry *entry)
{
    struct catalog_sync *sync = arg;
    pthread_mutex_lock(&sync_mutex);
    sync->status = status;
    sync->id = entry ? entry->id : 0;
    sync->state = 1;
    pthread_cond_broadcast(&sync_done);
    pthread_mutex_unlock(&sync_mutex);
}

int catalog_sync_wait(struct catalog_sync *sync)
{
    pthread_mutex_lock(&sync_mutex);
    while (sync->state == 0)
        pthread_cond_wait(&sync_done, &sync_mutex);
    int status = sync->status;
    pthread_mutex_unlock(&sync_mutex);
    return status;
}
