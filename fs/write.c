#include "fs/write.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>

#include "fs/dir.h"
#include "fs/fresh.h"
#include "fs/read.h"
#include "fs/reply.h"
#include "fs/report.h"
#include "fs/through.h"
#include "meta/base/log.h"

/* ---- making ---- */

/* Whether the catalog knows the name. 0, -EEXIST, or why that cannot be said. */
static int name_is_free(struct house *house, const struct inode *parent, const char *name)
{
    struct model_entry entry;
    int rc = catalog_lookup(house->catalog, parent->key.id, name, &entry);
    if (rc == 0)
        model_entry_clear(&entry);
    return rc == 0 ? -EEXIST : rc == -ENOENT ? 0 : rc;
}

void write_create(fuse_req_t req, fuse_ino_t nodeid, const char *name, mode_t mode,
                  struct fuse_file_info *fi)
{
    struct house *house = reply_house(req);
    struct inode *parent = inode_by_nodeid(house->inodes, nodeid);
    struct inode *inode = NULL;
    struct handle *handle = NULL;
    struct model_attr attr = reply_new_attr(req, parent, mode);
    int rc = dir_name_check(house, parent, name);
    if (rc == 0)
        rc = name_is_free(house, parent, name);
    if (rc == 0)
        rc = fresh_create(house, parent->key.id, name, &attr, &inode);
    if (rc == -EEXIST && (fi->flags & O_EXCL) == 0)
        rc = -ESTALE; /* it came after the kernel's lookup: look again, and open what is there */
    if (rc != 0) {
        reply_status(req, rc);
        return;
    }
    rc = read_handle_new(house, inode, fuse_req_ctx(req), fi->flags | O_CREAT, &handle);
    if (rc != 0) {
        fresh_unlink(house, parent->key.id, name);
        inode_forget(house->inodes, inode, 1);
        reply_status(req, rc);
        return;
    }
    fi->fh = (uintptr_t)handle;
    fi->keep_cache = 1;
    (void)through_draft(req, house, handle, fi);
    if (reply_created(req, inode, fi) != 0) {
        fresh_unlink(house, parent->key.id, name); /* whoever wanted it is gone */
        read_handle_free(house, handle, NULL);
    }
}

/* An empty file on its way into the catalog. */
struct empty_file {
    fuse_req_t req;
    struct house *house;
    struct replica *replica;
};

static void empty_registered(void *arg, int status, const struct model_entry *entry)
{
    struct empty_file *file = arg;
    engine_replica_close(file->house->engine, file->replica);
    reply_done_entry(file->req, status, entry);
    free(file);
}

void write_mknod(fuse_req_t req, fuse_ino_t nodeid, const char *name, mode_t mode, dev_t device)
{
    struct house *house = reply_house(req);
    struct inode *parent = inode_by_nodeid(house->inodes, nodeid);
    (void)device;
    int rc = S_ISREG(mode) ? dir_name_check(house, parent, name) : -EPERM;
    if (rc == 0 && fresh_exists(house, parent->key.id, name))
        rc = -EEXIST;
    struct empty_file *file = rc == 0 ? malloc(sizeof(*file)) : NULL;
    if (rc == 0 && file == NULL)
        rc = -ENOMEM;
    if (rc != 0)
        goto refuse;
    *file = (struct empty_file){.req = req, .house = house};
    rc = engine_draft_new(house->engine, &file->replica);
    if (rc != 0)
        goto free_file;
    struct model_attr attr = reply_new_attr(req, parent, mode);
    rc = engine_draft_register(house->engine, file->replica, parent->key.id, name, 0, &attr, 0,
                               empty_registered, file);
    if (rc == 0)
        return;
    engine_replica_close(house->engine, file->replica);
free_file:
    free(file);
refuse:
    reply_status(req, rc);
}

/* ---- writing ---- */

/* A write that waits for room in the cache. */
struct slow_write {
    fuse_req_t req;
    size_t size;
};

static void write_answer(fuse_req_t req, int status, size_t size)
{
    if (status == 0)
        fuse_reply_write(req, size);
    else
        reply_status(req, status);
}

static void write_done(void *arg, int status)
{
    struct slow_write *slow = arg;
    write_answer(slow->req, status, slow->size);
    free(slow);
}

static void say_late(struct house *house, const struct inode *inode)
{
    char path[MODEL_PATH_MAX + 1];
    if (catalog_path(house->catalog, inode->key.id, path, sizeof(path)) != 0)
        strcpy(path, "(unlinked)");
    log_warn(
        "%s: a write came after it was registered and is refused: let one process close it last",
        path);
}

void write_write(fuse_req_t req, fuse_ino_t nodeid, const char *bytes, size_t size, off_t offset,
                 struct fuse_file_info *fi)
{
    struct house *house = reply_house(req);
    struct inode *inode = inode_by_nodeid(house->inodes, nodeid);
    if (inode->kind == INODE_REPORT) {
        report_write(req, bytes, size, fi);
        return;
    }
    struct handle *handle = (struct handle *)(uintptr_t)fi->fh;
    struct slow_write *slow = malloc(sizeof(*slow));
    if (slow == NULL) {
        reply_status(req, -ENOMEM);
        return;
    }
    *slow = (struct slow_write){.req = req, .size = size};
    if (handle->draft)
        fresh_touch(house, inode, fuse_req_ctx(req)->uid != 0);
    int rc = handle->draft ? engine_draft_write(house->engine, handle->replica, (uint64_t)offset,
                                                bytes, size, write_done, slow)
                           : -EROFS;
    if (rc == -EROFS)
        say_late(house, inode);
    if (rc == -EINPROGRESS)
        return;
    free(slow);
    write_answer(req, rc, size);
}

void write_fallocate(fuse_req_t req, fuse_ino_t nodeid, int mode, off_t offset, off_t length,
                     struct fuse_file_info *fi)
{
    struct house *house = reply_house(req);
    struct inode *inode = inode_by_nodeid(house->inodes, nodeid);
    struct handle *handle = (struct handle *)(uintptr_t)fi->fh;
    int rc = 0;
    if (inode->kind != INODE_FILE || !handle->draft)
        rc = -EROFS;
    else if (mode != 0 && mode != FALLOC_FL_KEEP_SIZE)
        rc = -EOPNOTSUPP;
    else if (mode == 0 && (uint64_t)offset + (uint64_t)length > fresh_size(house, handle->replica))
        rc = fresh_truncate(house, inode, (uint64_t)offset + (uint64_t)length);
    reply_status(req, rc);
}

static void flush_done(void *arg, int status)
{
    reply_status(arg, status);
}

void write_flush(fuse_req_t req, fuse_ino_t nodeid, struct fuse_file_info *fi)
{
    struct house *house = reply_house(req);
    struct inode *inode = inode_by_nodeid(house->inodes, nodeid);
    struct handle *handle = (struct handle *)(uintptr_t)fi->fh;
    if (inode->kind != INODE_FILE || !handle->writes)
        reply_status(req, 0);
    else
        fresh_flush(house, inode, fuse_req_ctx(req)->pid, handle->opener, handle->mappable,
                    flush_done, req);
}
