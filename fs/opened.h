/* Opened: what the kernel has open on this mount: files, directories, files of .p2pfs. It releases nothing any more when
 * the mount has ended, so that what is left then is dropped here. Any thread. */
#ifndef P2PFS_FS_OPENED_H
#define P2PFS_FS_OPENED_H

#include "fs/house.h"

/* To be embedded in what fuse_file_info.fh points to. */
struct opened {
    void (*drop)(struct house *house, struct opened *opened); /* constant; calls opened_remove */
    struct opened *prev, *next;                               /* the house's lock */
};

void opened_add(struct house *house, struct opened *opened);
void opened_remove(struct house *house, struct opened *opened);
/* Drops what is left. The session is not served any more. */
void opened_close(struct house *house);

#endif
