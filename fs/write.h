/* Write: making files and writing them. What is written is a draft until its last writer closes
 * it (fresh.h). A file that is registered already answers EPERM to every open for writing and
 * truncation, and EROFS to a write through a descriptor that has outlived the registration. */
#ifndef P2PFS_FS_WRITE_H
#define P2PFS_FS_WRITE_H

#include <fuse_lowlevel.h>

void write_create(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode,
                  struct fuse_file_info *fi);
/* An empty file, registered at once: nobody will close it. */
void write_mknod(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, dev_t device);
void write_write(fuse_req_t req, fuse_ino_t nodeid, const char *bytes, size_t size, off_t offset,
                 struct fuse_file_info *fi);
void write_fallocate(fuse_req_t req, fuse_ino_t nodeid, int mode, off_t offset, off_t length,
                     struct fuse_file_info *fi);
void write_flush(fuse_req_t req, fuse_ino_t nodeid, struct fuse_file_info *fi);

#endif
