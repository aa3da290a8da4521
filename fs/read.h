/* Read: opening files and reading them. A read whose bytes are not here yet is parked until they
 * are; no worker waits. */
#ifndef P2PFS_FS_READ_H
#define P2PFS_FS_READ_H

#include <fuse_lowlevel.h>

#include "fs/format.h"
#include "fs/house.h"
#include "fs/inode.h"
#include "fs/opened.h"

/* An open file, behind fuse_file_info.fh. Constant from open to release. */
struct handle {
    struct inode *inode; /* held */
    bool draft;    /* opened while it was one: the draft owns the replica, else the handle does */
    bool writes;   /* counts as a writer of its draft */
    bool mappable; /* opened for reading and writing: a shared mapping may write */
    enum { HANDLE_UNCOUNTED, HANDLE_BUFFERED, HANDLE_THROUGH } way; /* through.c's */
    bool held;                                                      /* its open waited; hold.c's */
    enum format format; /* of a registered file that was not all here when it was opened */
    pid_t opener;       /* process */
    struct replica *replica;
    struct opened opened;
};

/* A handle on a draft, or on a registered file's replica. Answers with 0 and *out, or negative
 * errno. */
int read_handle_new(struct house *house, struct inode *inode, const struct fuse_ctx *caller,
                    int flags, struct handle **out);
/* req: its release; NULL: it was never opened, or the mount ends. */
void read_handle_free(struct house *house, struct handle *handle, fuse_req_t req);

void read_open(fuse_req_t req, fuse_ino_t nodeid, struct fuse_file_info *fi);
/* Ends an open: by passthrough where that can be. */
void read_opened(fuse_req_t req, struct house *house, struct handle *handle,
                 struct fuse_file_info *fi);
void read_read(fuse_req_t req, fuse_ino_t nodeid, size_t size, off_t offset,
               struct fuse_file_info *fi);
void read_release(fuse_req_t req, fuse_ino_t nodeid, struct fuse_file_info *fi);

#endif
