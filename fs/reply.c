#include "fs/reply.h"

#include <errno.h>
#include <time.h>

#include "fs/fresh.h"

struct house *reply_house(fuse_req_t req)
{
    return fuse_req_userdata(req);
}

struct inode *reply_inode(fuse_req_t req, fuse_ino_t nodeid)
{
    return inode_by_nodeid(reply_house(req)->inodes, nodeid);
}

void reply_status(fuse_req_t req, int status)
{
    fuse_reply_err(req, -status);
}

void reply_stat(struct house *house, struct inode *inode, struct stat *out)
{
    if (fresh_is(house, inode))
        fresh_stat(house, inode, out);
    else
        inode_stat(house->inodes, inode, out);
}

void reply_entry_fill(struct house *house, struct inode *inode, struct fuse_entry_param *out)
{
    double timeout = inode->kind == INODE_GHOST ? 0 : REPLY_TIMEOUT;
    *out = (struct fuse_entry_param){.ino = inode_nodeid(house->inodes, inode),
                                     .attr_timeout = timeout,
                                     .entry_timeout = timeout};
    reply_stat(house, inode, &out->attr);
}

void reply_entry(fuse_req_t req, struct inode *inode)
{
    struct house *house = reply_house(req);
    struct fuse_entry_param entry;
    reply_entry_fill(house, inode, &entry);
    if (fuse_reply_entry(req, &entry) != 0)
        inode_forget(house->inodes, inode, 1);
}

int reply_created(fuse_req_t req, struct inode *inode, const struct fuse_file_info *fi)
{
    struct house *house = reply_house(req);
    struct fuse_entry_param entry;
    reply_entry_fill(house, inode, &entry);
    int rc = fuse_reply_create(req, &entry, fi);
    if (rc != 0)
        inode_forget(house->inodes, inode, 1);
    return rc;
}

void reply_attr(fuse_req_t req, struct inode *inode)
{
    struct stat st;
    reply_stat(reply_house(req), inode, &st);
    fuse_reply_attr(req, &st, REPLY_TIMEOUT);
}

void reply_done_entry(void *arg, int status, const struct model_entry *entry)
{
    fuse_req_t req = arg;
    struct inode *inode = NULL;
    if (status == 0)
        status = entry == NULL ? -EIO : inode_get(reply_house(req)->inodes, entry, &inode);
    if (status != 0)
        reply_status(req, status);
    else
        reply_entry(req, inode);
}

void reply_done(void *arg, int status, const struct model_entry *entry)
{
    (void)entry;
    reply_status(arg, status);
}

struct model_attr reply_new_attr(fuse_req_t req, struct inode *parent, mode_t mode)
{
    const struct fuse_ctx *caller = fuse_req_ctx(req);
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    struct model_attr attr = {.mode = mode & 07777,
                              .uid = caller->uid,
                              .gid = caller->gid,
                              .mtime_ns = now.tv_sec * 1000000000LL + now.tv_nsec};
    struct stat st;
    inode_stat(reply_house(req)->inodes, parent, &st);
    if (st.st_mode & S_ISGID) {
        attr.gid = st.st_gid;
        if (S_ISDIR(mode))
            attr.mode |= S_ISGID;
    }
    return attr;
}
