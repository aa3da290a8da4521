#include "fs/read.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>

#include "fs/closer.h"
#include "fs/format.h"
#include "fs/fresh.h"
#include "fs/hold.h"
#include "fs/parking.h"
#include "fs/reply.h"
#include "fs/report.h"
#include "fs/through.h"
#include "fs/write.h"
#include "meta/base/util.h"

/* ---- opening ---- */

static void handle_drop(struct house *house, struct opened *opened)
{
    read_handle_free(house, util_container(opened, struct handle, opened), NULL);
}

int read_handle_new(struct house *house, struct inode *inode, const struct fuse_ctx *caller,
                    int flags, struct handle **out)
{
    struct handle *handle = calloc(1, sizeof(*handle));
    if (handle == NULL)
        return -ENOMEM;
    int mode = flags & O_ACCMODE;
    int rc;
    *handle = (struct handle){.opened.drop = handle_drop,
                              .inode = inode,
                              .draft = fresh_is(house, inode),
                              .writes = mode != O_RDONLY || (flags & O_CREAT) != 0,
                              .mappable = mode == O_RDWR};
    rc = handle->draft ? fresh_open(house, inode, handle->writes, &handle->replica)
                       : engine_replica_open(house->engine, &inode->key.version, &handle->replica);
    if (rc != 0) {
        free(handle);
        /* The version has lost its name since the lookup: the kernel shall look again. */
        return rc == -ENOENT ? -ESTALE : rc;
    }
    if (handle->writes)
        handle->opener = closer_process(caller->pid);
    if (!handle->draft && !replica_here(handle->replica, 0, UINT64_MAX))
        handle->format = format_of(house, inode);
    inode_hold(house->inodes, inode);
    opened_add(house, &handle->opened);
    *out = handle;
    return 0;
}

void read_handle_free(struct house *house, struct handle *handle, fuse_req_t req)
{
    opened_remove(house, &handle->opened);
    through_leave(house, handle, req);
    if (handle->draft)
        fresh_close(house, handle->inode, handle->writes);
    else
        engine_replica_close(house->engine, handle->replica);
    inode_release(house->inodes, handle->inode);
    free(handle);
}

/* EPERM, unless the open truncates and may replace: then a draft takes over the name, and the
 * kernel, told that what it has is stale, looks the name up again and finds the draft under a
 * nodeid of its own. */
static int open_to_write(struct house *house, struct inode *inode, int flags)
{
    if (!house->options.allow_overwrite || (flags & O_TRUNC) == 0 ||
        (flags & O_ACCMODE) == O_RDONLY)
        return -EPERM;
    struct model_entry entry;
    if (catalog_entry(house->catalog, inode->key.id, &entry) != 0)
        return -ESTALE;
    struct inode *draft = NULL;
    int rc = fresh_create(house, entry.parent, entry.name, &entry.attr, &draft);
    if (rc == 0)
        inode_forget(house->inodes, draft, 1); /* its name keeps it */
    model_entry_clear(&entry);
    return rc == 0 || rc == -EEXIST ? -ESTALE : rc;
}

void read_open(fuse_req_t req, fuse_ino_t nodeid, struct fuse_file_info *fi)
{
    struct house *house = reply_house(req);
    struct inode *inode = inode_by_nodeid(house->inodes, nodeid);
    struct handle *handle = NULL;
    if (inode->kind == INODE_REPORT) {
        report_open(req, inode, fi);
        return;
    }
    bool writes = (fi->flags & O_ACCMODE) != O_RDONLY || (fi->flags & O_TRUNC) != 0;
    int rc;
    if (inode->kind != INODE_FILE)
        rc = -ESTALE;
    else if (writes && !fresh_is(house, inode))
        rc = open_to_write(house, inode, fi->flags);
    else
        rc = read_handle_new(house, inode, fuse_req_ctx(req), fi->flags & ~O_CREAT, &handle);
    fi->fh = (uintptr_t)handle;
    fi->keep_cache =
        1; /* a version's bytes never change, and a draft's change through the kernel only */
    fi->noflush = handle != NULL && !handle->writes;
    if (rc != 0)
        reply_status(req, rc);
    else if (!hold_open(req, house, handle, fi))
        read_opened(req, house, handle, fi);
}

void read_opened(fuse_req_t req, struct house *house, struct handle *handle,
                 struct fuse_file_info *fi)
{
    int rc = through_try(req, house, handle, fi);
    if (rc == 0 && (fi->flags & O_TRUNC) != 0)
        rc = fresh_truncate(house, handle->inode, 0);
    if (rc != 0) {
        read_handle_free(house, handle, req);
        reply_status(req, rc);
    } else if (fuse_reply_open(req, fi) != 0) {
        read_handle_free(house, handle, NULL);
    }
}

void read_release(fuse_req_t req, fuse_ino_t nodeid, struct fuse_file_info *fi)
{
    struct house *house = reply_house(req);
    struct inode *inode = inode_by_nodeid(house->inodes, nodeid);
    if (inode->kind == INODE_REPORT)
        report_release(house, fi);
    else
        read_handle_free(house, (struct handle *)(uintptr_t)fi->fh, req);
    reply_status(req, 0);
}

/* ---- reading ---- */

/* One buffer for each thread that has answered a read, freed with the thread. The key is the
 * process's, because the engine's threads outlive the parking. */
static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;

static void scratch_make_key(void)
{
    if (pthread_key_create(&scratch_key, free) != 0)
        abort(); /* a process has 1024 of them */
}

/* Room for one read on this thread, for bytes that cannot be lent. */
static void *scratch(size_t length)
{
    struct {
        size_t size;
        char bytes[];
    } *buffer;
    pthread_once(&scratch_once, scratch_make_key);
    buffer = pthread_getspecific(scratch_key);
    if (buffer == NULL || buffer->size < length) {
        free(buffer);
        size_t size = length < INODE_BLOCK ? INODE_BLOCK : length;
        buffer = malloc(sizeof(*buffer) + size);
        pthread_setspecific(scratch_key, buffer);
        if (buffer == NULL)
            return NULL;
        buffer->size = size;
    }
    return buffer->bytes;
}

/* The bytes are here. */
static void answer(struct house *house, fuse_req_t req, struct replica *replica, uint64_t offset,
                   size_t length)
{
    void *room = scratch(length);
    const void *bytes = NULL;
    int rc =
        room == NULL ? -ENOMEM : engine_bytes(house->engine, replica, offset, length, room, &bytes);
    if (rc != 0)
        reply_status(req, rc);
    else
        fuse_reply_buf(req, bytes, length);
}

static void read_answer(const struct parked *parked, int status)
{
    if (status != 0)
        reply_status(parked->req, status);
    else
        answer(parked->house, parked->req, parked->handle->replica, parked->offset, parked->length);
}

void read_read(fuse_req_t req, fuse_ino_t nodeid, size_t size, off_t offset,
               struct fuse_file_info *fi)
{
    struct house *house = reply_house(req);
    if (inode_by_nodeid(house->inodes, nodeid)->kind == INODE_REPORT) {
        report_read(req, size, offset, fi);
        return;
    }
    struct handle *handle = (struct handle *)(uintptr_t)fi->fh;
    uint64_t whole =
        handle->draft ? fresh_size(house, handle->replica) : replica_size(handle->replica);
    if ((uint64_t)offset >= whole) {
        fuse_reply_buf(req, NULL, 0);
        return;
    }
    size_t length = size < whole - (uint64_t)offset ? size : whole - (uint64_t)offset;
    if (handle->draft)
        answer(house, req, handle->replica, offset, length);
    else
        parking_wait(&(struct parked){.house = house,
                                      .handle = handle,
                                      .req = req,
                                      .offset = offset,
                                      .length = length,
                                      .waiter.peek = format_peek(house, handle, offset),
                                      .answer = read_answer});
}
