/* Xattr: what p2pfs knows about a file, as extended attributes user.p2pfs.*; only
 * user.p2pfs.pinned can be set. No other attribute is kept: setting one is EOPNOTSUPP, which cp,
 * mv and rsync take for "this file system has none". */
#ifndef P2PFS_FS_XATTR_H
#define P2PFS_FS_XATTR_H

#include <fuse_lowlevel.h>

void xattr_set(fuse_req_t req, fuse_ino_t nodeid, const char *name, const char *value, size_t size,
               int flags);
void xattr_get(fuse_req_t req, fuse_ino_t nodeid, const char *name, size_t size);
void xattr_list(fuse_req_t req, fuse_ino_t nodeid, size_t size);
void xattr_remove(fuse_req_t req, fuse_ino_t nodeid, const char *name);

#endif
