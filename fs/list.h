/* List: opendir and readdir. A directory is listed as it was when it was opened or rewound, so
 * that offsets stay true under concurrent change; what has gone since is left out. */
#ifndef P2PFS_FS_LIST_H
#define P2PFS_FS_LIST_H

#include <fuse_lowlevel.h>

void list_opendir(fuse_req_t req, fuse_ino_t nodeid, struct fuse_file_info *fi);
void list_readdir(fuse_req_t req, fuse_ino_t nodeid, size_t size, off_t offset,
                  struct fuse_file_info *fi);
void list_readdirplus(fuse_req_t req, fuse_ino_t nodeid, size_t size, off_t offset,
                      struct fuse_file_info *fi);
void list_releasedir(fuse_req_t req, fuse_ino_t nodeid, struct fuse_file_info *fi);

#endif
