/* Dir: names and attributes: what the kernel asks about a directory's entries, answered from the
 * catalog's copy and this node's drafts, and the changes to them, answered when the catalog has
 * carried them out. */
#ifndef P2PFS_FS_DIR_H
#define P2PFS_FS_DIR_H

#include <fuse_lowlevel.h>

#include "fs/house.h"
#include "fs/inode.h"

/* Whether something may be made or removed under this name: -EPERM in .p2pfs and for .p2pfs
 * itself, else as model_name_check. */
int dir_name_check(struct house *house, const struct inode *parent, const char *name);

void dir_lookup(fuse_req_t req, fuse_ino_t parent, const char *name);
void dir_forget(fuse_req_t req, fuse_ino_t nodeid, uint64_t lookups);
void dir_forget_multi(fuse_req_t req, size_t count, struct fuse_forget_data *forgets);
void dir_getattr(fuse_req_t req, fuse_ino_t nodeid, struct fuse_file_info *fi);
void dir_setattr(fuse_req_t req, fuse_ino_t nodeid, struct stat *attr, int what,
                 struct fuse_file_info *fi);
void dir_statfs(fuse_req_t req, fuse_ino_t nodeid);

void dir_mkdir(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode);
void dir_unlink(fuse_req_t req, fuse_ino_t parent, const char *name);
void dir_rmdir(fuse_req_t req, fuse_ino_t parent, const char *name);
void dir_rename(fuse_req_t req, fuse_ino_t parent, const char *name, fuse_ino_t new_parent,
                const char *new_name, unsigned flags);

#endif
