/* Through: complete files that the kernel reads by itself, from the replica's own pages or from
 * the file that was registered in place (FUSE passthrough, Linux 6.9), and new files that it writes
 * by itself. This process sees their open and their release, and no read or write.
 *
 *   nodeid   IDLE -> BUFFERED -> IDLE       opened while its bytes arrive, or being written
 *            IDLE -> THROUGH -> IDLE        opened when all is here, or made with O_WRONLY
 *
 * The kernel wants all that is open on one nodeid to be of one kind. Who opens a file that is
 * complete by now, but still open BUFFERED, is sent back once with ESTALE; the kernel looks the
 * name up again and gets the nodeid's twin, which is free to be THROUGH. Whoever has no name to
 * look up (/proc/self/fd) comes back to the same nodeid and reads buffered.
 *
 * Only what is opened for writing alone is written through: the kernel maps such a file for nobody
 * to write, so when its descriptors are gone, so are its writers. What is opened for reading and
 * writing is written by way of this process.
 *
 * A mapping outlives its descriptor's release in this mode, so pages that were once lent to the
 * kernel are never filled again (engine_lend). Any thread; one lock inside. */
#ifndef P2PFS_FS_THROUGH_H
#define P2PFS_FS_THROUGH_H

#include <fuse_lowlevel.h>

#include "fs/house.h"

struct through;
struct handle;
struct inode;

int through_open(struct through **through);  /* -ENOMEM */
void through_close(struct through *through); /* NULL is harmless */

/* From the session's init: asks the kernel for passthrough, or notes why not.
 * P2PFS_NO_PASSTHROUGH=1 in the environment turns it off. */
void through_begin(struct through *through, struct fuse_conn_info *conn);

/* A handle on a draft: as through_try. The first that opens a new file for writing alone has the
 * kernel write it; who opens it to map it, too, is told -EBUSY then. */
int through_draft(fuse_req_t req, struct house *house, struct handle *handle,
                  struct fuse_file_info *fi);
/* The kernel opens this handle, which counts from now on, and not before: of many that come at
 * once, all must go one way. If its file is complete and nothing stands against it, fills in fi for
 * passthrough; others count as buffered. 0: open it as fi says; -ESTALE: the kernel shall look the
 * name up again; -EIO: open THROUGH elsewhere, but the local file has changed. */
int through_try(fuse_req_t req, struct house *house, struct handle *handle,
                struct fuse_file_info *fi);
/* The handle goes, counted or not. req: its release, or its open that fails; NULL when the mount
 * ends, and the kernel drops it all. */
void through_leave(struct house *house, struct handle *handle, fuse_req_t req);

struct through_status {
    bool enabled;
    char why[160];    /* not enabled: the reason */
    uint64_t opens;   /* THROUGH, since the mount */
    uint64_t creates; /* new files that the kernel writes */
};
void through_status(struct through *through, struct through_status *out);

#endif
