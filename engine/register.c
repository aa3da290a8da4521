#include "engine/register.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/cache.h"
#include "engine/inplace.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

#define REGISTER_AHEAD \
    16 /* registrations of one tree under way at once: a slow service must reach all in time */
#define REGISTER_DEPTH 64 /* directories below each other */

/* ---- one file ---- */

struct file_job {
    struct work_job job;
    struct engine *engine;
    struct replica *replica;
    uint64_t parent;
    unsigned flags;
    catalog_done done;
    void *arg;
    char *path;
    char name[MODEL_NAME_MAX + 1];
};

static void file_end(struct file_job *file, int status, const struct model_entry *entry)
{
    struct engine *engine = file->engine;
    file->done(file->arg, status, entry);
    replica_put(file->replica);
    free(file->path);
    free(file);
    core_release(engine);
}

static void file_published(void *arg, int status, const struct model_entry *entry)
{
    struct file_job *file = arg;
    if (status < 0) {
        cache_remove(file->engine->cache, file->replica);
    } else {
        inplace_hash_start(file->replica);
    }
    file_end(file, status, entry);
}

static bool inside(const char *path, const char *dir)
{
    size_t length = dir ? strlen(dir) : 0;
    return length > 1 && strncmp(path, dir, length) == 0 &&
           (path[length] == '/' || path[length] == '\0');
}

/* An in-place replica of the version, in the table. */
static int replica_make(struct engine *engine, const struct model_version *version,
                        struct replica **out)
{
    struct replica *replica = NULL;
    int status = replica_new(engine, version, true, &replica);
    if (status < 0) {
        return status;
    }
    replica->announced = REPLICA_ALL; /* publishing announces it */
    struct replica *there = cache_insert(engine->cache, replica);
    if (there != replica) {
        replica_put(replica);
        replica_put(there);
        return -EEXIST;
    }
    *out = replica;
    return 0;
}

static int file_start(struct file_job *file)
{
    struct engine *engine = file->engine;
    struct model_version version;
    struct model_attr attr;
    if (inside(file->path, engine->config.exclude_dir)) {
        return -ELOOP;
    }
    int status = inplace_version(engine, file->path, &version, &attr);
    if (status < 0) {
        return status;
    }
    status = replica_make(engine, &version, &file->replica);
    if (status == 0) {
        status = catalog_publish(engine->config.catalog, file->parent, file->name, 0, &attr,
                                 &version, file->flags | CATALOG_COMPLETE, file_published, file);
        if (status < 0) {
            cache_remove(engine->cache, file->replica);
        }
    }
    model_version_clear(&version);
    return status;
}

static void file_run(struct work_job *job)
{
    struct file_job *file = util_container(job, struct file_job, job);
    int status = file_start(file);
    if (status < 0) {
        file_end(file, status, NULL);
    }
}

static struct file_job *file_new(struct engine *engine, const char *path, uint64_t parent,
                                 const char *name, unsigned flags, catalog_done done, void *arg)
{
    struct file_job *file = calloc(1, sizeof *file);
    if (!file || !(file->path = strdup(path))) {
        free(file);
        return NULL;
    }
    file->engine = engine;
    file->parent = parent;
    file->flags = flags;
    file->done = done;
    file->arg = arg;
    snprintf(file->name, sizeof file->name, "%s", name);
    return file;
}

int register_file(struct engine *engine, const char *path, uint64_t parent, const char *name,
                  unsigned flags, catalog_done done, void *arg)
{
    int status = model_name_check(name);
    if (status < 0) {
        return status;
    }
    if (path[0] != '/') {
        return -EINVAL;
    }
    struct file_job *file = file_new(engine, path, parent, name, flags, done, arg);
    if (!file) {
        return -ENOMEM;
    }
    file->job.run = file_run;
    core_hold(engine);
    work_post_urgent(engine->work, &file->job);
    return 0;
}

/* ---- a tree ---- */

struct tree_job {
    struct work_job job;
    struct engine *engine;
    uint64_t parent;
    catalog_done done;
    void *arg;
    char *path;
    char name[MODEL_NAME_MAX + 1];
    pthread_mutex_t lock;
    pthread_cond_t fewer;
    unsigned pending; /* registrations under way */
    int failed;       /* the first error */
    char culprit[512];
};

static void tree_file_done(void *arg, int status, const struct model_entry *entry)
{
    struct tree_job *tree = arg;
    (void)entry;
    pthread_mutex_lock(&tree->lock);
    tree->pending--;
    if (status < 0 && !tree->failed) {
        tree->failed = status;
    }
    pthread_cond_signal(&tree->fewer);
    pthread_mutex_unlock(&tree->lock);
}

static int tree_wait(struct tree_job *tree, unsigned at_most)
{
    pthread_mutex_lock(&tree->lock);
    while (tree->pending > at_most) {
        pthread_cond_wait(&tree->fewer, &tree->lock);
    }
    int status = tree->failed;
    pthread_mutex_unlock(&tree->lock);
    return status;
}

static int tree_blame(struct tree_job *tree, const char *path, int status)
{
    if (!tree->culprit[0]) {
        snprintf(tree->culprit, sizeof tree->culprit, "%.500s", path);
    }
    return status;
}

static int tree_file(struct tree_job *tree, const char *path, uint64_t dir, const char *name)
{
    int status = tree_wait(tree, REGISTER_AHEAD);
    if (status < 0) {
        return status;
    }
    struct file_job *file = file_new(tree->engine, path, dir, name, 0, tree_file_done, tree);
    if (!file) {
        return -ENOMEM;
    }
    core_hold(tree->engine);
    pthread_mutex_lock(&tree->lock);
    tree->pending++;
    pthread_mutex_unlock(&tree->lock);
    status = file_start(file);
    if (status < 0) {
        file_end(file, status, NULL);
    }
    return status;
}

static int64_t stat_mtime(const struct stat *st)
{
    return (int64_t)st->st_mtim.tv_sec * 1000000000 + st->st_mtim.tv_nsec;
}

static struct model_attr stat_attr(const struct stat *st)
{
    return (struct model_attr){.mode = st->st_mode & 07777,
                               .uid = st->st_uid,
                               .gid = st->st_gid,
                               .mtime_ns = stat_mtime(st)};
}

static int tree_symlink(struct tree_job *tree, const char *path, uint64_t dir, const char *name,
                        const struct stat *st)
{
    char target[PATH_MAX];
    ssize_t length = readlink(path, target, sizeof target - 1);
    if (length < 0) {
        return -errno;
    }
    target[length] = '\0';
    if (target[0] ==
        '/') { /* would mean another file on every node; what it leads to is what counts */
        struct stat to;
        if (stat(path, &to) < 0 || !S_ISREG(to.st_mode)) {
            log_warn("%s: skipped: an absolute link that leads to no regular file", path);
            return 0;
        }
        return tree_file(tree, path, dir, name);
    }
    struct catalog_sync sync = {0};
    struct model_attr attr = stat_attr(st);
    int status = catalog_symlink(tree->engine->config.catalog, dir, name, target, &attr,
                                 catalog_sync_done, &sync);
    return status < 0 ? status : catalog_sync_wait(&sync);
}

static int tree_walk(struct tree_job *tree, const char *path, uint64_t dir, unsigned depth);

static int tree_dir(struct tree_job *tree, const char *path, uint64_t dir, const char *name,
                    const struct stat *st, unsigned depth)
{
    struct catalog_sync sync = {0};
    struct model_attr attr = stat_attr(st);
    int status =
        catalog_mkdir(tree->engine->config.catalog, dir, name, &attr, catalog_sync_done, &sync);
    if (status == 0) {
        status = catalog_sync_wait(&sync);
    }
    return status < 0 ? status : tree_walk(tree, path, sync.id, depth + 1);
}

static int tree_entry(struct tree_job *tree, const char *path, uint64_t dir, const char *name,
                      unsigned depth)
{
    struct stat st;
    if (lstat(path, &st) < 0) {
        return -errno;
    }
    int status = model_name_check(name);
    if (status < 0) {
        return status;
    }
    if (S_ISREG(st.st_mode)) {
        return tree_file(tree, path, dir, name);
    }
    if (S_ISDIR(st.st_mode)) {
        return tree_dir(tree, path, dir, name, &st, depth);
    }
    if (S_ISLNK(st.st_mode)) {
        return tree_symlink(tree, path, dir, name, &st);
    }
    log_warn("%s: skipped: not a regular file, directory or symbolic link", path);
    return 0;
}

static int tree_walk(struct tree_job *tree, const char *path, uint64_t dir, unsigned depth)
{
    if (depth > REGISTER_DEPTH) {
        return tree_blame(tree, path, -ELOOP);
    }
    if (inside(path, tree->engine->config.exclude_dir)) {
        return tree_blame(tree, path, -ELOOP);
    }
    DIR *stream = opendir(path);
    if (!stream) {
        return tree_blame(tree, path, -errno);
    }
    int status = 0;
    struct dirent *entry;
    while (status == 0 && (entry = readdir(stream))) {
        if (atomic_load(
                &tree->engine->closing)) { /* a large tree would keep the mount from ending */
            status = -ESHUTDOWN;
            break;
        }
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) {
            continue;
        }
        char child[PATH_MAX];
        if (snprintf(child, sizeof child, "%s/%s", path, entry->d_name) >= (int)sizeof child) {
            status = tree_blame(tree, path, -ENAMETOOLONG);
            break;
        }
        status = tree_entry(tree, child, dir, entry->d_name, depth);
        if (status < 0) {
            tree_blame(tree, child, status);
        }
    }
    closedir(stream);
    return status;
}

static void tree_end(struct tree_job *tree, int status, const struct model_entry *entry)
{
    struct engine *engine = tree->engine;
    if (status < 0) {
        log_error("registering the tree %s: %s%s%s; nothing was registered", tree->path,
                  tree->culprit, tree->culprit[0] ? ": " : "", strerror(-status));
    }
    tree->done(tree->arg, status, entry);
    pthread_cond_destroy(&tree->fewer);
    pthread_mutex_destroy(&tree->lock);
    free(tree->path);
    free(tree);
    core_release(engine);
}

static void tree_attached(void *arg, int status, const struct model_entry *entry)
{
    tree_end(arg, status, entry);
}

static void tree_run(struct work_job *job)
{
    struct tree_job *tree = util_container(job, struct tree_job, job);
    struct catalog *catalog = tree->engine->config.catalog;
    struct catalog_sync sync = {0};
    struct stat st;
    uint64_t dir = 0;
    int status = stat(tree->path, &st) < 0 ? -errno : S_ISDIR(st.st_mode) ? 0 : -ENOTDIR;
    if (status < 0) {
        tree_end(tree, status, NULL);
        return;
    }
    status = catalog_tree_begin(catalog, &dir, catalog_sync_done, &sync);
    if (status == 0) {
        status = catalog_sync_wait(&sync);
    }
    if (status < 0) {
        tree_end(tree, status, NULL);
        return;
    }
    status = tree_walk(tree, tree->path, dir, 0);
    int files = tree_wait(tree, 0);
    status = status < 0 ? status : files;
    if (status == 0) {
        struct model_attr attr = stat_attr(&st);
        sync = (struct catalog_sync){0};
        status = catalog_tree_attach(catalog, dir, tree->parent, tree->name, &attr,
                                     catalog_sync_done, &sync);
        if (status == 0) {
            status = catalog_sync_wait(&sync);
        }
    }
    if (status < 0) {
        struct catalog_sync drop = {0};
        if (catalog_tree_drop(catalog, dir, catalog_sync_done, &drop) == 0) {
            (void)catalog_sync_wait(&drop); /* the sweep finishes what this could not */
        }
        tree_end(tree, status, NULL);
        return;
    }
    struct model_entry entry;
    if (catalog_lookup(catalog, tree->parent, tree->name, &entry) == 0) {
        tree_attached(tree, 0, &entry);
        model_entry_clear(&entry);
    } else {
        tree_attached(tree, 0, NULL); /* removed again meanwhile */
    }
}

int register_tree(struct engine *engine, const char *path, uint64_t parent, const char *name,
                  unsigned flags, catalog_done done, void *arg)
{
    (void)flags; /* a tree never replaces anything */
    int status = model_name_check(name);
    if (status < 0) {
        return status;
    }
    struct tree_job *tree = calloc(1, sizeof *tree);
    if (!tree || !(tree->path = strdup(path))) {
        free(tree);
        return -ENOMEM;
    }
    tree->job.run = tree_run;
    tree->engine = engine;
    tree->parent = parent;
    tree->done = done;
    tree->arg = arg;
    pthread_mutex_init(&tree->lock, NULL);
    pthread_cond_init(&tree->fewer, NULL);
    snprintf(tree->name, sizeof tree->name, "%s", name);
    core_hold(engine);
    work_post(engine->work, &tree->job);
    return 0;
}

/* ---- after a restart ---- */

struct adopt {
    struct engine *engine;
    size_t files;
};

static void adopt_one(void *arg, const struct model_version *version)
{
    struct adopt *adopt = arg;
    struct replica *replica = NULL;
    if (!version->origin_path || replica_make(adopt->engine, version, &replica) < 0) {
        return;
    }
    pthread_mutex_lock(&replica->lock);
    replica->announced = REPLICA_SILENT;
    pthread_mutex_unlock(&replica->lock);
    if (inplace_open(replica) == 0) {
        adopt->files++;
        replica_announce(replica);
        inplace_hash_start(replica);
        inplace_idle(replica);
    }
    replica_put(replica);
}

void register_adopt(struct engine *engine)
{
    struct adopt adopt = {.engine = engine};
    (void)catalog_registered(engine->config.catalog, engine->config.node, adopt_one, &adopt);
    if (adopt.files) {
        log_info("offering again %zu file(s) that this node had registered in place", adopt.files);
    }
}
