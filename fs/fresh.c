#include "fs/fresh.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>

#include "fs/closer.h"
#include "fs/notice.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

#define FRESH_ORPHAN_MS \
    2000 /* a replacement that nobody has opened by then was meant for a process that is gone */

enum fresh_state { FRESH_WRITING, FRESH_REGISTERING, FRESH_REGISTERED, FRESH_FAILED };

/* Somebody whose close(2) waits for the registration. */
struct fresh_closer {
    engine_done done;
    void *arg;
    struct fresh_closer *next;
};

/* Guarded by drafts->lock but for what is constant. */
struct fresh {
    struct house *house; /* constant */
    struct inode *inode; /* constant */
    enum fresh_state state;
    uint64_t parent;
    char *name; /* NULL: unlinked */
    char *key;  /* parent and name, in the table while there is a name */
    size_t key_length;
    int64_t seen_mtime_ns; /* of what the kernel wrote by itself */
    bool reattributed;     /* attributes were set while it was being registered */
    struct model_attr attr;
    struct replica *replica; /* NULL: dropped */
    unsigned handles, writers;
    pid_t mapper; /* the process whose mapping has outlived its descriptors; 0: none */
    int error;    /* FAILED: what its closers are told */
    uint64_t made_ms;
    struct fresh_closer *closers;
    UT_hash_handle hh;
};

struct fresh_files {
    struct house *house;
    pthread_mutex_t lock;
    pthread_cond_t settled;
    struct fresh *named;
    unsigned registering;
};

uint64_t fresh_size(struct house *house, struct replica *draft)
{
    struct engine_info info;
    return engine_draft_info(house->engine, draft, &info) == 0 ? info.size : 0;
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

int fresh_files_open(struct house *house, struct fresh_files **out)
{
    struct fresh_files *drafts = calloc(1, sizeof(*drafts));
    if (drafts == NULL)
        return -ENOMEM;
    drafts->house = house;
    pthread_mutex_init(&drafts->lock, NULL);
    pthread_cond_init(&drafts->settled, NULL);
    *out = drafts;
    return 0;
}

static char *key_new(uint64_t parent, const char *name, size_t *length)
{
    *length = sizeof(parent) + strlen(name);
    char *key = malloc(*length + 1);
    if (key != NULL) {
        memcpy(key, &parent, sizeof(parent));
        memcpy(key + sizeof(parent), name, strlen(name) + 1);
    }
    return key;
}

static struct fresh *find(struct fresh_files *drafts, uint64_t parent, const char *name)
{
    char key[sizeof(parent) + MODEL_NAME_MAX + 1];
    size_t length = strlen(name);
    struct fresh *draft = NULL;
    if (length > MODEL_NAME_MAX)
        return NULL;
    memcpy(key, &parent, sizeof(parent));
    memcpy(key + sizeof(parent), name, length);
    HASH_FIND(hh, drafts->named, key, sizeof(parent) + length, draft);
    return draft;
}

/* Takes the name away; true: the caller has to release the inode that the name held (not under
 * the lock). */
static bool name_take(struct fresh_files *drafts, struct fresh *draft)
{
    if (draft->name == NULL)
        return false;
    HASH_DEL(drafts->named, draft);
    free(draft->key);
    free(draft->name);
    draft->key = draft->name = NULL;
    return true;
}

/* The bytes are kept while there is a handle or a registration. The result is for
 * engine_replica_close, unlocked. */
static struct replica *bytes_take(struct fresh *draft)
{
    bool needed = draft->handles > 0 || draft->state == FRESH_REGISTERING ||
                  (draft->state == FRESH_WRITING && draft->name != NULL);
    struct replica *replica = needed ? NULL : draft->replica;
    if (!needed)
        draft->replica = NULL;
    return replica;
}

static void bytes_close(struct house *house, struct replica *replica)
{
    if (replica != NULL)
        engine_replica_close(house->engine, replica);
}

/* Runs under the inode's last release: no name, no handle. */
static void fresh_free(struct fresh *draft)
{
    bytes_close(draft->house, draft->replica);
    free(draft->key);
    free(draft->name);
    free(draft);
}

/* Lets go of what a draft held after it lost its name or its last handle. */
static void settle_refs(struct house *house, struct inode *inode, bool named,
                        struct replica *replica)
{
    bytes_close(house, replica);
    if (named)
        inode_release(house->inodes, inode);
}

void fresh_files_shut(struct fresh_files *drafts)
{
    if (drafts == NULL)
        return;
    struct house *house = drafts->house;
    pthread_mutex_lock(&drafts->lock);
    while (drafts->registering > 0)
        pthread_cond_wait(&drafts->settled, &drafts->lock);
    while (drafts->named != NULL) {
        struct fresh *draft = drafts->named;
        struct inode *inode = draft->inode;
        log_warn("%s: not registered: the mount ended while it was being written: copy it again",
                 draft->name);
        draft->state = FRESH_FAILED;
        draft->error = -ESHUTDOWN;
        bool named = name_take(drafts, draft);
        struct replica *replica = bytes_take(draft);
        pthread_mutex_unlock(&drafts->lock);
        settle_refs(house, inode, named, replica);
        pthread_mutex_lock(&drafts->lock);
    }
    pthread_mutex_unlock(&drafts->lock);
}

void fresh_files_close(struct fresh_files *drafts)
{
    if (drafts == NULL)
        return;
    pthread_cond_destroy(&drafts->settled);
    pthread_mutex_destroy(&drafts->lock);
    free(drafts);
}

int fresh_create(struct house *house, uint64_t parent, const char *name,
                 const struct model_attr *attr, struct inode **out)
{
    struct fresh_files *drafts = house->fresh;
    int rc = model_name_check(name);
    if (rc != 0)
        return rc;
    struct fresh *draft = calloc(1, sizeof(*draft));
    if (draft == NULL)
        return -ENOMEM;
    *draft =
        (struct fresh){.house = house, .parent = parent, .attr = *attr, .made_ms = util_now_ms()};
    draft->attr.mtime_ns = now_ns();
    draft->name = strdup(name);
    draft->key = key_new(parent, name, &draft->key_length);
    rc = draft->name == NULL || draft->key == NULL
             ? -ENOMEM
             : engine_draft_new(house->engine, &draft->replica);
    if (rc != 0)
        goto free_draft;

    struct inode_key key = {.id = util_random_u64() | 1ull << 32,
                            .version = *replica_version(draft->replica)};
    rc = inode_new_draft(house->inodes, &key, draft, fresh_free, &draft->inode);
    if (rc != 0)
        goto free_draft;
    pthread_mutex_lock(&drafts->lock);
    if (find(drafts, parent, name) != NULL) {
        pthread_mutex_unlock(&drafts->lock);
        inode_forget(house->inodes, draft->inode, 1); /* frees the draft */
        return -EEXIST;
    }
    inode_hold(house->inodes, draft->inode); /* by the name */
    HASH_ADD_KEYPTR(hh, drafts->named, draft->key, draft->key_length, draft);
    pthread_mutex_unlock(&drafts->lock);
    *out = draft->inode;
    return 0;

free_draft:
    fresh_free(draft);
    return rc;
}

struct inode *fresh_lookup(struct house *house, uint64_t parent, const char *name)
{
    struct fresh_files *drafts = house->fresh;
    pthread_mutex_lock(&drafts->lock);
    struct fresh *draft = find(drafts, parent, name);
    struct inode *inode = draft == NULL ? NULL : draft->inode;
    if (draft != NULL && draft->state == FRESH_WRITING && draft->handles == 0 &&
        util_now_ms() - draft->made_ms > FRESH_ORPHAN_MS) {
        bool named = name_take(drafts, draft);
        struct replica *replica = bytes_take(draft);
        pthread_mutex_unlock(&drafts->lock);
        settle_refs(house, inode, named, replica);
        return NULL;
    }
    if (inode != NULL)
        inode_lookup(house->inodes, inode);
    pthread_mutex_unlock(&drafts->lock);
    return inode;
}

bool fresh_exists(struct house *house, uint64_t parent, const char *name)
{
    pthread_mutex_lock(&house->fresh->lock);
    bool found = find(house->fresh, parent, name) != NULL;
    pthread_mutex_unlock(&house->fresh->lock);
    return found;
}

bool fresh_any(struct house *house, uint64_t parent)
{
    bool found = false;
    pthread_mutex_lock(&house->fresh->lock);
    for (struct fresh *draft = house->fresh->named; draft != NULL && !found; draft = draft->hh.next)
        found = draft->parent == parent;
    pthread_mutex_unlock(&house->fresh->lock);
    return found;
}

int fresh_names(struct house *house, uint64_t parent, char ***out, size_t *out_count)
{
    char **names = NULL;
    size_t count = 0, room = 0;
    int rc = 0;
    pthread_mutex_lock(&house->fresh->lock);
    for (struct fresh *draft = house->fresh->named; draft != NULL && rc == 0;
         draft = draft->hh.next) {
        if (draft->parent != parent)
            continue;
        if (count == room) {
            room = room == 0 ? 8 : room * 2;
            char **more = reallocarray(names, room, sizeof(*names));
            rc = more == NULL ? -ENOMEM : 0;
            names = more == NULL ? names : more;
        }
        if (rc == 0 && (names[count] = strdup(draft->name)) != NULL)
            count++;
        else
            rc = -ENOMEM;
    }
    pthread_mutex_unlock(&house->fresh->lock);
    if (rc != 0) {
        while (count > 0)
            free(names[--count]);
        free(names);
        return rc;
    }
    *out = names;
    *out_count = count;
    return 0;
}

bool fresh_is(struct house *house, const struct inode *inode)
{
    if (inode->draft == NULL)
        return false;
    pthread_mutex_lock(&house->fresh->lock);
    bool is = inode->draft->state != FRESH_REGISTERED;
    pthread_mutex_unlock(&house->fresh->lock);
    return is;
}

/* A write that the kernel did by itself changes the time, until somebody sets it. Called with the
 * lock. */
static void mtime_look(struct fresh *draft)
{
    int64_t mtime_ns = draft->replica == NULL ? 0 : engine_draft_mtime(draft->replica);
    if (mtime_ns != 0 && mtime_ns != draft->seen_mtime_ns)
        draft->attr.mtime_ns = draft->seen_mtime_ns = mtime_ns;
}

void fresh_stat(struct house *house, struct inode *inode, struct stat *out)
{
    struct fresh *draft = inode->draft;
    pthread_mutex_lock(&house->fresh->lock);
    uint64_t size = draft->replica == NULL ? 0 : fresh_size(house, draft->replica);
    mtime_look(draft);
    inode_stat_fill(INODE_FILE, inode->key.id, &draft->attr, size, draft->name != NULL, out);
    out->st_blksize = INODE_BLOCK_DRAFT;
    pthread_mutex_unlock(&house->fresh->lock);
}

void fresh_setattr(struct house *house, struct inode *inode, unsigned mask,
                   const struct model_attr *attr)
{
    struct fresh *draft = inode->draft;
    pthread_mutex_lock(&house->fresh->lock);
    mtime_look(draft);
    inode_attr_merge(&draft->attr, mask, attr);
    draft->reattributed = draft->state == FRESH_REGISTERING;
    pthread_mutex_unlock(&house->fresh->lock);
}

void fresh_touch(struct house *house, struct inode *inode, bool strip)
{
    struct fresh *draft = inode->draft;
    pthread_mutex_lock(&house->fresh->lock);
    draft->attr.mtime_ns = now_ns();
    if (strip)
        draft->attr.mode &= ~(uint32_t)(S_ISUID | (draft->attr.mode & S_IXGRP ? S_ISGID : 0));
    pthread_mutex_unlock(&house->fresh->lock);
}

int fresh_truncate(struct house *house, struct inode *inode, uint64_t size)
{
    struct fresh *draft = inode->draft;
    pthread_mutex_lock(&house->fresh->lock);
    int rc = draft->state != FRESH_WRITING || draft->replica == NULL
                 ? -EROFS
                 : engine_draft_truncate(house->engine, draft->replica, size);
    if (rc == 0)
        draft->attr.mtime_ns = now_ns();
    pthread_mutex_unlock(&house->fresh->lock);
    return rc;
}

int fresh_info(struct house *house, struct inode *inode, struct engine_info *out)
{
    struct fresh *draft = inode->draft;
    pthread_mutex_lock(&house->fresh->lock);
    int rc =
        draft->replica == NULL ? -ENOENT : engine_draft_info(house->engine, draft->replica, out);
    pthread_mutex_unlock(&house->fresh->lock);
    return rc;
}

/* ---- handles ---- */

int fresh_open(struct house *house, struct inode *inode, bool writes, struct replica **replica)
{
    struct fresh *draft = inode->draft;
    int rc = 0;
    pthread_mutex_lock(&house->fresh->lock);
    if (draft->state == FRESH_REGISTERED || draft->state == FRESH_FAILED || draft->replica == NULL)
        rc = -ESTALE;
    else if (writes && draft->state == FRESH_REGISTERING)
        rc = -EPERM;
    if (rc == 0) {
        draft->handles++;
        draft->writers += writes;
        *replica = draft->replica;
    }
    pthread_mutex_unlock(&house->fresh->lock);
    return rc;
}

/* ---- registering ---- */

static void say_name(struct fresh *draft, uint64_t parent, const char *name, char *out, size_t size)
{
    char directory[MODEL_PATH_MAX + 1];
    if (catalog_path(draft->house->catalog, parent, directory, sizeof(directory)) != 0)
        directory[0] = '\0';
    snprintf(out, size, "%s%s%s", directory, directory[0] == '\0' ? "" : "/",
             name == NULL ? "(unlinked)" : name);
}

static const char *remedy(int error)
{
    switch (-error) {
    case EEXIST:
    case EPERM:
        return "the name was taken meanwhile; choose another, or mount with -o allow_overwrite";
    case ENOSPC:
        return "the cache is full; raise cache_size, or p2pfs evict what is not needed";
    case ENOENT:
    case ENOTDIR:
        return "its directory was removed meanwhile; make it again and copy again";
    case ETIMEDOUT:
    case ECONNREFUSED:
    case ECONNRESET:
    case EHOSTUNREACH:
    case ENETUNREACH:
        return "the metadata service does not answer; copy again when it does";
    default:
        return "copy it again";
    }
}

/* The end of a draft, as a registered file or as nothing: it has no name here any more, and no
 * bytes when its handles are closed. Its closers are told. */
static void fresh_settle(struct fresh *draft, enum fresh_state state, int error)
{
    struct house *house = draft->house;
    struct fresh_files *drafts = house->fresh;
    struct inode *inode = draft->inode;

    pthread_mutex_lock(&drafts->lock);
    draft->state = state;
    draft->error = error;
    uint64_t parent = draft->parent;
    util_autofree char *name = draft->name == NULL ? NULL : strdup(draft->name);
    bool reattributed = draft->reattributed;
    struct model_attr attr = draft->attr;
    struct fresh_closer *closers = draft->closers;
    draft->closers = NULL;
    bool named = name_take(drafts, draft);
    struct replica *replica = bytes_take(draft);
    pthread_mutex_unlock(&drafts->lock);

    if (state == FRESH_REGISTERED) {
        notice_inode(house, inode); /* the kernel's copy of the pages; ours are the ones to keep */
        if (reattributed)
            catalog_setattr(house->catalog, inode->key.id,
                            CATALOG_SET_MODE | CATALOG_SET_UID | CATALOG_SET_GID |
                                CATALOG_SET_MTIME,
                            &attr, notice_nothing, NULL);
    } else if (name != NULL) {
        notice_gone(house, parent, name);
    }
    while (closers != NULL) {
        struct fresh_closer *closer = closers;
        closers = closer->next;
        closer->done(closer->arg, error);
        free(closer);
    }
    settle_refs(house, inode, named, replica);
}

static void registered(void *arg, int status, const struct model_entry *entry)
{
    struct fresh *draft = arg;
    struct inode *inode = draft->inode;
    struct house *house = draft->house;
    (void)entry;
    if (status != 0) {
        char name[MODEL_PATH_MAX + MODEL_NAME_MAX + 2];
        say_name(draft, draft->parent, draft->name, name, sizeof(name));
        log_error("%s: not registered: %s: %s", name, strerror(-status), remedy(status));
    }
    fresh_settle(draft, status == 0 ? FRESH_REGISTERED : FRESH_FAILED, status);
    inode_release(house->inodes, inode); /* by the registration */
    pthread_mutex_lock(&house->fresh->lock);
    house->fresh->registering--;
    pthread_cond_broadcast(&house->fresh->settled);
    pthread_mutex_unlock(&house->fresh->lock);
}

/* Called with the lock, which it gives back. While REGISTERING nobody changes parent and name. */
static void fresh_register(struct fresh *draft)
{
    struct house *house = draft->house;
    mtime_look(draft);
    struct model_attr attr = draft->attr;
    unsigned flags = house->options.allow_overwrite ? CATALOG_OVERWRITE : 0;
    draft->state = FRESH_REGISTERING;
    draft->reattributed = false;
    house->fresh->registering++;
    inode_hold(house->inodes, draft->inode);
    pthread_mutex_unlock(&house->fresh->lock);
    int rc = engine_draft_register(house->engine, draft->replica, draft->parent, draft->name,
                                   draft->inode->key.id, &attr, flags, registered, draft);
    if (rc != 0)
        registered(draft, rc, NULL);
}

/* Its writer was killed. Called with the lock, which it gives back. */
static void fresh_kill(struct fresh *draft, pid_t process, int status)
{
    char name[MODEL_PATH_MAX + MODEL_NAME_MAX + 2], why[48];
    say_name(draft, draft->parent, draft->name, name, sizeof(name));
    if (WIFSIGNALED(status))
        snprintf(why, sizeof(why), "was killed by signal %d", WTERMSIG(status));
    else
        snprintf(why, sizeof(why), "failed with exit status %d", WEXITSTATUS(status));
    log_warn("%s: not registered: its writer (process %d) %s: copy it again", name, process, why);
    engine_draft_fail(draft->replica, -EIO);
    pthread_mutex_unlock(&draft->house->fresh->lock);
    fresh_settle(draft, FRESH_FAILED, -EIO);
}

static bool closer_add(struct fresh *draft, engine_done done, void *arg)
{
    struct fresh_closer *closer = malloc(sizeof(*closer));
    if (closer == NULL)
        return false;
    *closer = (struct fresh_closer){.done = done, .arg = arg, .next = draft->closers};
    draft->closers = closer;
    return true;
}

void fresh_flush(struct house *house, struct inode *inode, pid_t thread, pid_t opener,
                 bool mappable, engine_done done, void *arg)
{
    struct fresh_files *drafts = house->fresh;
    struct fresh *draft = inode->draft;

    pthread_mutex_lock(&drafts->lock);
    bool open = draft->state == FRESH_WRITING && draft->name != NULL && draft->writers == 1;
    pthread_mutex_unlock(&drafts->lock);
    int status = 0;
    enum closer_verdict verdict =
        open ? closer_examine(thread, opener, inode->key.id, mappable, &status) : CLOSER_SHARED;

    pthread_mutex_lock(&drafts->lock);
    int rc = 0;
    if (draft->state == FRESH_FAILED) {
        rc = draft->error;
    } else if (draft->state == FRESH_REGISTERING) {
        if (closer_add(draft, done, arg)) {
            pthread_mutex_unlock(&drafts->lock);
            return;
        }
    } else if (draft->state == FRESH_WRITING && draft->name != NULL && draft->writers == 1) {
        draft->mapper = verdict == CLOSER_MAPPED ? closer_process(thread) : 0;
        if (verdict == CLOSER_KILLED) {
            fresh_kill(draft, thread, status);
            done(arg, 0);
            return;
        }
        if (verdict == CLOSER_LAST) {
            if (!closer_add(draft, done, arg)) {
                pthread_mutex_unlock(&drafts->lock);
                done(arg, -ENOMEM);
                return;
            }
            fresh_register(draft);
            return;
        }
    }
    pthread_mutex_unlock(&drafts->lock);
    done(arg, rc);
}

void fresh_close(struct house *house, struct inode *inode, bool writes)
{
    struct fresh_files *drafts = house->fresh;
    struct fresh *draft = inode->draft;
    pthread_mutex_lock(&drafts->lock);
    draft->handles--;
    draft->writers -= writes;
    if (writes && draft->writers == 0 && draft->replica != NULL)
        engine_draft_written(house->engine, draft->replica);
    if (writes && draft->writers == 0 && draft->state == FRESH_WRITING && draft->name != NULL) {
        /* The last descriptor was shared when it was closed, or a mapping has outlived it. */
        int status = 0;
        if (draft->mapper != 0 && closer_killed(draft->mapper, &status))
            fresh_kill(draft, draft->mapper, status);
        else
            fresh_register(draft);
        return;
    }
    struct replica *replica = bytes_take(draft);
    pthread_mutex_unlock(&drafts->lock);
    bytes_close(house, replica);
}

/* ---- names ---- */

int fresh_unlink(struct house *house, uint64_t parent, const char *name)
{
    struct fresh_files *drafts = house->fresh;
    pthread_mutex_lock(&drafts->lock);
    struct fresh *draft = find(drafts, parent, name);
    if (draft == NULL || draft->state == FRESH_REGISTERING) {
        pthread_mutex_unlock(&drafts->lock);
        return draft == NULL ? -ENOENT : -EBUSY;
    }
    struct inode *inode = draft->inode;
    bool named = name_take(drafts, draft);
    struct replica *replica = bytes_take(draft);
    pthread_mutex_unlock(&drafts->lock);
    settle_refs(house, inode, named, replica);
    return 0;
}

int fresh_rename(struct house *house, uint64_t parent, const char *name, uint64_t new_parent,
                 const char *new_name)
{
    struct fresh_files *drafts = house->fresh;
    int rc = model_name_check(new_name);
    if (rc != 0)
        return rc;
    size_t key_length = 0;
    char *key = key_new(new_parent, new_name, &key_length);
    char *copy = strdup(new_name);
    struct inode *inode = NULL;
    struct replica *replica = NULL;
    bool named = false;

    pthread_mutex_lock(&drafts->lock);
    struct fresh *draft = find(drafts, parent, name);
    struct fresh *target = find(drafts, new_parent, new_name);
    if (key == NULL || copy == NULL)
        rc = -ENOMEM;
    else if (draft == NULL)
        rc = -ENOENT;
    else if (draft->state == FRESH_REGISTERING ||
             (target != NULL && target->state == FRESH_REGISTERING))
        rc = -EBUSY;
    if (rc != 0 || target == draft) {
        pthread_mutex_unlock(&drafts->lock);
        free(key);
        free(copy);
        return rc;
    }
    if (target != NULL) {
        inode = target->inode;
        named = name_take(drafts, target);
        replica = bytes_take(target);
    }
    /* NOLINTNEXTLINE(clang-analyzer-core.NullDereference): a table with a member has a head */
    HASH_DEL(drafts->named, draft);
    free(draft->key);
    free(draft->name);
    draft->key = key;
    draft->key_length = key_length;
    draft->name = copy;
    draft->parent = new_parent;
    HASH_ADD_KEYPTR(hh, drafts->named, draft->key, draft->key_length, draft);
    pthread_mutex_unlock(&drafts->lock);
    if (inode != NULL)
        settle_refs(house, inode, named, replica);
    return 0;
}
