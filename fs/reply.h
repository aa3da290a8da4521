/* Reply: answers to the kernel that many handlers give in the same way. Each ends the request.
 * Any thread. */
#ifndef P2PFS_FS_REPLY_H
#define P2PFS_FS_REPLY_H

#include <fuse_lowlevel.h>

#include "fs/house.h"
#include "fs/inode.h"

/* Other nodes' changes are seen within 1 s; ours at once, because they come through the kernel. */
#define REPLY_TIMEOUT 0.5

struct house *reply_house(fuse_req_t req);
struct inode *reply_inode(fuse_req_t req, fuse_ino_t nodeid);

void reply_status(fuse_req_t req, int status); /* 0 or negative errno */
/* The inode with one lookup, which is given to the kernel (or given back when the caller is
 * gone). */
void reply_entry(fuse_req_t req, struct inode *inode);
/* Not 0: the caller is gone, and no release of fi->fh will come. */
int reply_created(fuse_req_t req, struct inode *inode, const struct fuse_file_info *fi);
void reply_attr(fuse_req_t req, struct inode *inode);
/* A catalog_done for changes that answer with an entry, or with the status alone; arg: the
 * request. */
void reply_done_entry(void *req, int status, const struct model_entry *entry);
void reply_done(void *req, int status, const struct model_entry *entry);

/* Attributes of whatever the inode is. */
void reply_stat(struct house *house, struct inode *inode, struct stat *out);
void reply_entry_fill(struct house *house, struct inode *inode, struct fuse_entry_param *out);
/* Attributes of something new that the caller makes in a directory: a setgid directory hands on
 * its group. */
struct model_attr reply_new_attr(fuse_req_t req, struct inode *parent, mode_t mode);

#endif
