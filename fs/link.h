/* Link: symbolic links, which are tags when relative and register files in place when absolute;
 * and hard links. */
#ifndef P2PFS_FS_LINK_H
#define P2PFS_FS_LINK_H

#include <fuse_lowlevel.h>

void link_readlink(fuse_req_t req, fuse_ino_t nodeid);
void link_symlink(fuse_req_t req, const char *target, fuse_ino_t parent, const char *name);
/* Another name for a registered file or a link; -EPERM for a file that is still being written. */
void link_link(fuse_req_t req, fuse_ino_t nodeid, fuse_ino_t new_parent, const char *new_name);

#endif
