#include "fs/dir.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <time.h>

#include "fs/fresh.h"
#include "fs/read.h"
#include "fs/reply.h"

#define DIR_BLOCK 4096u /* unit of statfs */

int dir_name_check(struct house *house, const struct inode *parent, const char *name)
{
    if (parent->kind == INODE_CONTROL_DIR)
        return -EPERM;
    if (parent == inode_root(house->inodes) && strcmp(name, CONTROL_DIR) == 0)
        return -EPERM;
    return model_name_check(name);
}

/* ---- looking ---- */

static struct inode *lookup_control(struct house *house, const struct inode *parent,
                                    const char *name)
{
    if (parent == inode_root(house->inodes) && strcmp(name, CONTROL_DIR) == 0)
        return inode_control(house->inodes);
    if (parent->kind != INODE_CONTROL_DIR)
        return NULL;
    for (unsigned file = 0; file < CONTROL_FILES; file++)
        if (strcmp(name, control_names[file]) == 0)
            return inode_report(house->inodes, file);
    return NULL;
}

/* What to say of a name that is not there: when its directory has gone or was replaced, the
 * kernel shall look that one up again, or a tree that is renamed into its place would seem empty
 * for a moment. */
static int missing(struct house *house, const struct inode *parent)
{
    struct model_entry entry;
    if (parent == inode_root(house->inodes))
        return -ENOENT;
    int rc = catalog_entry(house->catalog, parent->key.id, &entry);
    if (rc == 0)
        model_entry_clear(&entry);
    return rc == -ENOENT ? -ESTALE : -ENOENT;
}

void dir_lookup(fuse_req_t req, fuse_ino_t nodeid, const char *name)
{
    struct house *house = reply_house(req);
    struct inode *parent = inode_by_nodeid(house->inodes, nodeid);
    struct inode *inode = lookup_control(house, parent, name);
    int rc = 0;
    if (inode != NULL) {
        inode_lookup(house->inodes, inode);
    } else if (parent->kind != INODE_DIR) {
        rc = -ENOENT;
    } else if (strlen(name) > MODEL_NAME_MAX) {
        rc = -ENAMETOOLONG;
    } else if ((inode = fresh_lookup(house, parent->key.id, name)) == NULL) {
        struct model_entry entry;
        rc = catalog_lookup(house->catalog, parent->key.id, name, &entry);
        if (rc == 0) {
            rc = inode_get(house->inodes, &entry, &inode);
            model_entry_clear(&entry);
        } else if (rc == -ENOENT) {
            rc = missing(house, parent);
        }
    }
    if (rc != 0)
        reply_status(req, rc);
    else
        reply_entry(req, inode);
}

void dir_forget(fuse_req_t req, fuse_ino_t nodeid, uint64_t lookups)
{
    inode_forget(reply_house(req)->inodes, reply_inode(req, nodeid), lookups);
    fuse_reply_none(req);
}

void dir_forget_multi(fuse_req_t req, size_t count, struct fuse_forget_data *forgets)
{
    struct house *house = reply_house(req);
    for (size_t i = 0; i < count; i++)
        inode_forget(house->inodes, inode_by_nodeid(house->inodes, forgets[i].ino),
                     forgets[i].nlookup);
    fuse_reply_none(req);
}

void dir_getattr(fuse_req_t req, fuse_ino_t nodeid, struct fuse_file_info *fi)
{
    (void)fi;
    reply_attr(req, reply_inode(req, nodeid));
}

void dir_statfs(fuse_req_t req, fuse_ino_t nodeid)
{
    struct house *house = reply_house(req);
    struct catalog_totals totals;
    struct engine_stats stats;
    (void)nodeid;
    catalog_totals(house->catalog, &totals);
    engine_stats(house->engine, &stats);
    /* total: registered in the cluster; used: resident here. Drafts are resident before they are
     * registered. */
    uint64_t used = (stats.cache_used + DIR_BLOCK - 1) / DIR_BLOCK;
    uint64_t total = (totals.bytes + DIR_BLOCK - 1) / DIR_BLOCK;
    if (total < used)
        total = used;
    struct statvfs answer = {.f_bsize = DIR_BLOCK,
                             .f_frsize = DIR_BLOCK,
                             .f_blocks = total,
                             .f_bfree = total - used,
                             .f_bavail = total - used,
                             .f_files = totals.files + totals.dirs + totals.symlinks,
                             .f_namemax = MODEL_NAME_MAX};
    fuse_reply_statfs(req, &answer);
}

/* ---- attributes ---- */

struct setattr {
    fuse_req_t req;
    struct inode *inode;
};

static void setattr_done(void *arg, int status, const struct model_entry *entry)
{
    struct setattr *change = arg;
    (void)entry;
    if (status != 0)
        reply_status(change->req, status);
    else
        reply_attr(change->req, change->inode);
    free(change);
}

static unsigned setattr_mask(struct house *house, struct inode *inode, const struct stat *from,
                             int what, struct model_attr *attr)
{
    unsigned mask = 0;
    *attr = (struct model_attr){
        .mode = from->st_mode & 07777, .uid = from->st_uid, .gid = from->st_gid};
    if (what & FUSE_SET_ATTR_MODE)
        mask |= CATALOG_SET_MODE;
    if (what & FUSE_SET_ATTR_UID)
        mask |= CATALOG_SET_UID;
    if (what & FUSE_SET_ATTR_GID)
        mask |= CATALOG_SET_GID;
    if ((mask & (CATALOG_SET_UID | CATALOG_SET_GID)) && !(mask & CATALOG_SET_MODE) &&
        inode->kind == INODE_FILE) {
        /* The kernel leaves it to us to take setuid and setgid from a file that changes its
         * owner. */
        struct stat now;
        reply_stat(house, inode, &now);
        attr->mode =
            now.st_mode & 07777 & ~(uint32_t)(S_ISUID | (now.st_mode & S_IXGRP ? S_ISGID : 0));
        mask |= attr->mode != (now.st_mode & 07777) ? CATALOG_SET_MODE : 0;
    }
    if (what & (FUSE_SET_ATTR_MTIME | FUSE_SET_ATTR_MTIME_NOW)) {
        struct timespec time = from->st_mtim;
        if (what & FUSE_SET_ATTR_MTIME_NOW)
            clock_gettime(CLOCK_REALTIME, &time);
        attr->mtime_ns = time.tv_sec * 1000000000LL + time.tv_nsec;
        mask |= CATALOG_SET_MTIME;
    }
    return mask; /* the time of the last access is not kept */
}

void dir_setattr(fuse_req_t req, fuse_ino_t nodeid, struct stat *from, int what,
                 struct fuse_file_info *fi)
{
    struct house *house = reply_house(req);
    struct inode *inode = inode_by_nodeid(house->inodes, nodeid);
    struct handle *handle =
        fi == NULL || inode->kind != INODE_FILE ? NULL : (struct handle *)(uintptr_t)fi->fh;
    bool draft = fresh_is(house, inode);
    int rc = 0;
    if (inode->kind == INODE_CONTROL_DIR ||
        (inode->kind == INODE_REPORT && (what & ~FUSE_SET_ATTR_SIZE) != 0))
        rc = -EPERM;
    else if ((what & FUSE_SET_ATTR_SIZE) && inode->kind == INODE_FILE)
        rc = draft ? fresh_truncate(house, inode, (uint64_t)from->st_size)
             : handle != NULL && handle->writes ? -EROFS
                                                : -EPERM;
    struct model_attr attr;
    unsigned mask = rc == 0 ? setattr_mask(house, inode, from, what, &attr) : 0;
    if (rc != 0) {
        reply_status(req, rc);
        return;
    }
    if (mask == 0 || draft || inode == inode_root(house->inodes)) {
        if (draft)
            fresh_setattr(house, inode, mask, &attr);
        else if (mask != 0)
            inode_root_setattr(house->inodes, mask, &attr);
        reply_attr(req, inode);
        return;
    }
    struct setattr *change = malloc(sizeof(*change));
    rc = -ENOMEM;
    if (change != NULL) {
        *change = (struct setattr){.req = req, .inode = inode};
        rc = catalog_setattr(house->catalog, inode->key.id, mask, &attr, setattr_done, change);
    }
    if (rc != 0) {
        free(change);
        reply_status(req, rc);
    }
}

/* ---- changing ---- */

void dir_mkdir(fuse_req_t req, fuse_ino_t nodeid, const char *name, mode_t mode)
{
    struct house *house = reply_house(req);
    struct inode *parent = inode_by_nodeid(house->inodes, nodeid);
    int rc = dir_name_check(house, parent, name);
    if (rc == 0 && fresh_exists(house, parent->key.id, name))
        rc = -EEXIST;
    if (rc == 0) {
        struct model_attr attr = reply_new_attr(req, parent, mode | S_IFDIR);
        rc = catalog_mkdir(house->catalog, parent->key.id, name, &attr, reply_done_entry, req);
    }
    if (rc != 0)
        reply_status(req, rc);
}

/* Whether the catalog has the name; *entry is then the caller's. */
static bool known(struct house *house, uint64_t parent, const char *name, struct model_entry *entry)
{
    return catalog_lookup(house->catalog, parent, name, entry) == 0;
}

void dir_unlink(fuse_req_t req, fuse_ino_t nodeid, const char *name)
{
    struct house *house = reply_house(req);
    struct inode *parent = inode_by_nodeid(house->inodes, nodeid);
    int rc = dir_name_check(house, parent, name);
    bool removed = false;
    if (rc == 0) {
        rc = fresh_unlink(house, parent->key.id, name);
        removed = rc == 0;
        rc = rc == -ENOENT ? 0 : rc;
    }
    if (rc == 0) { /* also what a draft was to replace */
        struct model_entry entry;
        if (removed && !known(house, parent->key.id, name, &entry)) {
            reply_status(req, 0);
            return;
        }
        if (removed)
            model_entry_clear(&entry);
        rc = catalog_unlink(house->catalog, parent->key.id, name, reply_done, req);
    }
    if (rc != 0)
        reply_status(req, rc);
}

void dir_rmdir(fuse_req_t req, fuse_ino_t nodeid, const char *name)
{
    struct house *house = reply_house(req);
    struct inode *parent = inode_by_nodeid(house->inodes, nodeid);
    struct model_entry entry;
    int rc = dir_name_check(house, parent, name);
    if (rc == 0 && known(house, parent->key.id, name, &entry)) {
        if (entry.kind == MODEL_DIR && fresh_any(house, entry.id))
            rc = -ENOTEMPTY;
        model_entry_clear(&entry);
    }
    if (rc == 0)
        rc = catalog_rmdir(house->catalog, parent->key.id, name, reply_done, req);
    if (rc != 0)
        reply_status(req, rc);
}

/* ---- rename ---- */

/* A rename that removes something first: a draft takes the place of a symbolic link, or a
 * registered name that of a draft. */
struct move {
    fuse_req_t req;
    struct house *house;
    uint64_t parent, new_parent;
    char *name, *new_name;
};

static void move_draft(void *arg, int status, const struct model_entry *entry)
{
    struct move *move = arg;
    (void)entry;
    if (status == 0 || status == -ENOENT)
        status =
            fresh_rename(move->house, move->parent, move->name, move->new_parent, move->new_name);
    reply_status(move->req, status);
    free(move->name);
    free(move->new_name);
    free(move);
}

/* 0: the request is or will be answered. */
static int rename_draft(fuse_req_t req, struct house *house, uint64_t parent, const char *name,
                        uint64_t new_parent, const char *new_name, unsigned flags)
{
    struct model_entry target;
    bool exists = known(house, new_parent, new_name, &target);
    bool directory = exists && target.kind == MODEL_DIR;
    bool file = exists && target.kind == MODEL_FILE;
    bool symlink = exists && target.kind == MODEL_SYMLINK;
    if (exists)
        model_entry_clear(&target);
    if (flags & RENAME_EXCHANGE)
        return -EINVAL; /* half of it could be seen by this node only */
    if ((flags & RENAME_NOREPLACE) && (exists || fresh_exists(house, new_parent, new_name)))
        return -EEXIST;
    if (directory)
        return -EISDIR;
    if (file && !house->options.allow_overwrite)
        return -EPERM;
    if (!symlink) {
        int rc = fresh_rename(house, parent, name, new_parent, new_name);
        if (rc == 0)
            reply_status(req, 0);
        return rc;
    }
    struct move *move = calloc(1, sizeof(*move));
    if (move == NULL)
        return -ENOMEM;
    *move = (struct move){.req = req,
                          .house = house,
                          .parent = parent,
                          .new_parent = new_parent,
                          .name = strdup(name),
                          .new_name = strdup(new_name)};
    int rc = move->name == NULL || move->new_name == NULL
                 ? -ENOMEM
                 : catalog_unlink(house->catalog, new_parent, new_name, move_draft, move);
    if (rc != 0) {
        free(move->name);
        free(move->new_name);
        free(move);
    }
    return rc;
}

/* A draft of the new name goes, as a file would; one in a directory that would be replaced keeps
 * it there. */
static int rename_make_way(struct house *house, uint64_t new_parent, const char *new_name,
                           unsigned flags)
{
    if (fresh_exists(house, new_parent, new_name)) {
        if (flags & RENAME_EXCHANGE)
            return -EINVAL;
        if (flags & RENAME_NOREPLACE)
            return -EEXIST;
        return fresh_unlink(house, new_parent, new_name);
    }
    struct model_entry target;
    int rc = 0;
    if ((flags & (RENAME_EXCHANGE | RENAME_NOREPLACE)) == 0 &&
        known(house, new_parent, new_name, &target)) {
        if (target.kind == MODEL_DIR && fresh_any(house, target.id))
            rc = -ENOTEMPTY;
        model_entry_clear(&target);
    }
    return rc;
}

void dir_rename(fuse_req_t req, fuse_ino_t nodeid, const char *name, fuse_ino_t new_nodeid,
                const char *new_name, unsigned flags)
{
    struct house *house = reply_house(req);
    struct inode *parent = inode_by_nodeid(house->inodes, nodeid);
    struct inode *new_parent = inode_by_nodeid(house->inodes, new_nodeid);
    uint64_t from = parent->key.id, to = new_parent->key.id;
    int rc = (flags & ~(unsigned)(RENAME_NOREPLACE | RENAME_EXCHANGE)) != 0 ? -EINVAL : 0;
    if (rc == 0)
        rc = dir_name_check(house, parent, name);
    if (rc == 0)
        rc = dir_name_check(house, new_parent, new_name);
    if (rc == 0 && fresh_exists(house, from, name)) {
        rc = rename_draft(req, house, from, name, to, new_name, flags);
        if (rc != 0)
            reply_status(req, rc);
        return;
    }
    if (rc == 0)
        rc = rename_make_way(house, to, new_name, flags);
    if (rc == 0) {
        unsigned wish = house->options.allow_overwrite ? CATALOG_OVERWRITE : 0;
        wish |= flags & RENAME_NOREPLACE ? CATALOG_NOREPLACE : 0;
        wish |= flags & RENAME_EXCHANGE ? CATALOG_EXCHANGE : 0;
        rc = catalog_rename(house->catalog, from, name, to, new_name, wish, reply_done, req);
    }
    if (rc != 0)
        reply_status(req, rc);
}
