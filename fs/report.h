/* Report: the files of .p2pfs as the kernel opens and reads them; control.h makes what they say.
 * A report is rendered when it is opened. The control file is a conversation for each open: what
 * is written is the request, and a read waits for the answer, which begins where the first read
 * does. */
#ifndef P2PFS_FS_REPORT_H
#define P2PFS_FS_REPORT_H

#include <fuse_lowlevel.h>

#include "fs/house.h"
#include "fs/inode.h"

void report_open(fuse_req_t req, struct inode *inode, struct fuse_file_info *fi);
void report_read(fuse_req_t req, size_t size, off_t offset, struct fuse_file_info *fi);
void report_write(fuse_req_t req, const char *bytes, size_t size, struct fuse_file_info *fi);
void report_release(struct house *house, struct fuse_file_info *fi);

#endif
