#include "fs/inode.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "meta/base/util.h"

#define INODE_ROOT_NODEID 1u /* fixed by FUSE */

/* A nodeid is the inode's address, but for the root's. The root and .p2pfs are part of the table
 * and never freed. */
struct inodes {
    struct catalog *catalog;
    pthread_mutex_t lock;
    struct inode *table;
    struct inode root;
    struct inode control;
    struct inode reports[CONTROL_FILES];
    struct model_attr control_attr;
};

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

int inodes_open(struct catalog *catalog, const struct model_attr *root, struct inodes **out)
{
    struct inodes *inodes = calloc(1, sizeof(*inodes));
    if (inodes == NULL)
        return -ENOMEM;
    inodes->catalog = catalog;
    pthread_mutex_init(&inodes->lock, NULL);
    inodes->root = (struct inode){.key.id = MODEL_ROOT, .kind = INODE_DIR, .attr = *root};
    inodes->control_attr = *root;
    inodes->control_attr.mtime_ns = now_ns();
    inodes->control = (struct inode){.key.id = MODEL_ROOT + 1, .kind = INODE_CONTROL_DIR};
    for (unsigned file = 0; file < CONTROL_FILES; file++)
        inodes->reports[file] =
            (struct inode){.key.id = MODEL_ROOT + 2 + file, .kind = INODE_REPORT, .report = file};
    *out = inodes;
    return 0;
}

static void free_one(struct inode *inode)
{
    if (inode->draft != NULL)
        inode->draft_free(inode->draft);
    free(inode->target);
    free(inode);
}

void inodes_close(struct inodes *inodes)
{
    if (inodes == NULL)
        return;
    struct inode *inode, *next;
    /* NOLINTBEGIN(clang-analyzer-unix.Malloc): the loop took the next one before */
    HASH_ITER(hh, inodes->table, inode, next) {
        HASH_DEL(inodes->table, inode);
        free_one(inode);
    }
    /* NOLINTEND(clang-analyzer-unix.Malloc) */
    pthread_mutex_destroy(&inodes->lock);
    free(inodes);
}

struct inode *inode_root(struct inodes *inodes)
{
    return &inodes->root;
}

struct inode *inode_control(struct inodes *inodes)
{
    return &inodes->control;
}

struct inode *inode_report(struct inodes *inodes, enum control_file file)
{
    return &inodes->reports[file];
}

struct inode *inode_by_nodeid(struct inodes *inodes, uint64_t nodeid)
{
    return nodeid == INODE_ROOT_NODEID ? &inodes->root : (struct inode *)(uintptr_t)nodeid;
}

uint64_t inode_nodeid(struct inodes *inodes, const struct inode *inode)
{
    return inode == &inodes->root ? INODE_ROOT_NODEID : (uint64_t)(uintptr_t)inode;
}

static bool permanent(const struct inodes *inodes, const struct inode *inode)
{
    return inode == &inodes->root || inode->kind == INODE_CONTROL_DIR ||
           inode->kind == INODE_REPORT;
}

static struct inode *table_find(struct inodes *inodes, const struct inode_key *key)
{
    struct inode *inode;
    HASH_FIND(hh, inodes->table, key, sizeof(*key), inode);
    return inode;
}

int inode_get(struct inodes *inodes, const struct model_entry *entry, struct inode **out)
{
    struct inode_key key = {.id = entry->id};
    if (entry->kind == MODEL_FILE)
        key.version = entry->version;

    pthread_mutex_lock(&inodes->lock);
    struct inode *inode = entry->id == MODEL_ROOT ? &inodes->root : table_find(inodes, &key);
    if (inode != NULL && atomic_load(&inode->io.twin_wanted)) {
        key.twin = 1;
        inode = table_find(inodes, &key);
    }
    if (inode == NULL) {
        inode = calloc(1, sizeof(*inode));
        if (inode == NULL) {
            pthread_mutex_unlock(&inodes->lock);
            return -ENOMEM;
        }
        inode->key = key;
        inode->kind = (enum inode_kind)entry->kind;
        HASH_ADD(hh, inodes->table, key, sizeof(key), inode);
    }
    if (inode != &inodes->root) {
        inode->attr = entry->attr;
        inode->size = entry->kind == MODEL_SYMLINK ? strlen(entry->target) : entry->size;
        inode->gone = false;
    }
    inode->lookups++;
    pthread_mutex_unlock(&inodes->lock);
    *out = inode;
    return 0;
}

int inode_new_draft(struct inodes *inodes, const struct inode_key *key, struct fresh *draft,
                    void (*draft_free)(struct fresh *draft), struct inode **out)
{
    struct inode *inode = calloc(1, sizeof(*inode));
    if (inode == NULL)
        return -ENOMEM;
    *inode = (struct inode){
        .key = *key, .kind = INODE_FILE, .draft = draft, .draft_free = draft_free, .lookups = 1};
    pthread_mutex_lock(&inodes->lock);
    if (table_find(inodes, key) != NULL) {
        pthread_mutex_unlock(&inodes->lock);
        free(inode);
        return -EEXIST;
    }
    HASH_ADD(hh, inodes->table, key, sizeof(*key), inode);
    pthread_mutex_unlock(&inodes->lock);
    *out = inode;
    return 0;
}

int inode_new_ghost(struct inodes *inodes, const char *target, struct inode **out)
{
    struct inode *inode = calloc(1, sizeof(*inode));
    if (inode == NULL)
        return -ENOMEM;
    *inode = (struct inode){.key.id = util_random_u64(),
                            .kind = INODE_GHOST,
                            .target = strdup(target),
                            .attr = {.mode = 0777, .mtime_ns = now_ns()},
                            .size = strlen(target),
                            .lookups = 1};
    if (inode->target == NULL) {
        free(inode);
        return -ENOMEM;
    }
    pthread_mutex_lock(&inodes->lock);
    HASH_ADD(hh, inodes->table, key, sizeof(inode->key), inode);
    pthread_mutex_unlock(&inodes->lock);
    *out = inode;
    return 0;
}

struct inode *inode_find(struct inodes *inodes, const struct inode_key *key)
{
    pthread_mutex_lock(&inodes->lock);
    struct inode *inode = key->id == MODEL_ROOT ? &inodes->root : table_find(inodes, key);
    if (inode != NULL)
        inode->holds++;
    pthread_mutex_unlock(&inodes->lock);
    return inode;
}

void inode_lookup(struct inodes *inodes, struct inode *inode)
{
    pthread_mutex_lock(&inodes->lock);
    inode->lookups++;
    pthread_mutex_unlock(&inodes->lock);
}

void inode_hold(struct inodes *inodes, struct inode *inode)
{
    pthread_mutex_lock(&inodes->lock);
    inode->holds++;
    pthread_mutex_unlock(&inodes->lock);
}

static void drop(struct inodes *inodes, struct inode *inode, uint64_t lookups, uint64_t holds)
{
    pthread_mutex_lock(&inodes->lock);
    inode->lookups -= lookups < inode->lookups ? lookups : inode->lookups;
    inode->holds -= holds;
    bool last = inode->lookups == 0 && inode->holds == 0 && !permanent(inodes, inode);
    if (last)
        HASH_DEL(inodes->table, inode);
    pthread_mutex_unlock(&inodes->lock);
    if (last)
        free_one(inode);
}

void inode_forget(struct inodes *inodes, struct inode *inode, uint64_t lookups)
{
    drop(inodes, inode, lookups, 0);
}

void inode_release(struct inodes *inodes, struct inode *inode)
{
    drop(inodes, inode, 0, 1);
}

void inode_stat_fill(enum inode_kind kind, uint64_t id, const struct model_attr *attr,
                     uint64_t size, unsigned links, struct stat *out)
{
    static const mode_t types[] = {
        [INODE_DIR] = S_IFDIR,   [INODE_FILE] = S_IFREG,   [INODE_SYMLINK] = S_IFLNK,
        [INODE_GHOST] = S_IFLNK, [INODE_REPORT] = S_IFREG, [INODE_CONTROL_DIR] = S_IFDIR,
    };
    struct timespec mtime = {.tv_sec = attr->mtime_ns / 1000000000,
                             .tv_nsec = attr->mtime_ns % 1000000000};
    if (mtime.tv_nsec < 0) { /* before 1970 */
        mtime.tv_sec--;
        mtime.tv_nsec += 1000000000;
    }
    *out = (struct stat){.st_ino = id,
                         .st_mode = types[kind] | (attr->mode & 07777),
                         .st_nlink = links,
                         .st_uid = attr->uid,
                         .st_gid = attr->gid,
                         .st_size = (off_t)size,
                         .st_blksize = INODE_BLOCK,
                         .st_blocks = (blkcnt_t)((size + 511) / 512),
                         .st_atim = mtime,
                         .st_mtim = mtime,
                         .st_ctim = mtime};
}

static void stat_report(struct inodes *inodes, const struct inode *inode, struct stat *out)
{
    struct model_attr attr = inodes->control_attr;
    if (inode->kind == INODE_CONTROL_DIR)
        attr.mode = 0555;
    else
        attr.mode = inode->report == CONTROL_REQUEST ? 0666 : 0444;
    inode_stat_fill(inode->kind, inode->key.id, &attr, 0, inode->kind == INODE_CONTROL_DIR ? 2 : 1,
                    out);
}

void inode_stat(struct inodes *inodes, struct inode *inode, struct stat *out)
{
    if (inode->kind == INODE_CONTROL_DIR || inode->kind == INODE_REPORT) {
        stat_report(inodes, inode, out);
        return;
    }
    bool known = inode != &inodes->root && inode->kind != INODE_GHOST;
    struct model_entry entry = {0};
    bool found = known && catalog_entry(inodes->catalog, inode->key.id, &entry) == 0;
    if (found && inode->kind == INODE_FILE &&
        !model_id_equal(&entry.version, &inode->key.version)) {
        model_entry_clear(&entry);
        found = false;
    }

    pthread_mutex_lock(&inodes->lock);
    if (found) {
        inode->attr = entry.attr;
        inode->size = entry.kind == MODEL_SYMLINK ? strlen(entry.target) : entry.size;
    }
    inode->gone = known && !found;
    struct model_attr attr = inode->attr;
    uint64_t size = inode->size;
    unsigned links = inode->gone ? 0 : inode->kind == INODE_DIR ? 2 : 1;
    pthread_mutex_unlock(&inodes->lock);

    if (found)
        model_entry_clear(&entry);
    inode_stat_fill(inode->kind, inode->key.id, &attr, size, links, out);
}

void inode_attr_merge(struct model_attr *to, unsigned mask, const struct model_attr *from)
{
    if (mask & CATALOG_SET_MODE)
        to->mode = from->mode;
    if (mask & CATALOG_SET_UID)
        to->uid = from->uid;
    if (mask & CATALOG_SET_GID)
        to->gid = from->gid;
    if (mask & CATALOG_SET_MTIME)
        to->mtime_ns = from->mtime_ns;
}

void inode_root_setattr(struct inodes *inodes, unsigned mask, const struct model_attr *attr)
{
    pthread_mutex_lock(&inodes->lock);
    inode_attr_merge(&inodes->root.attr, mask, attr);
    pthread_mutex_unlock(&inodes->lock);
}
