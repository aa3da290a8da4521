#include "fs/notice.h"

#include <fuse_lowlevel.h>
#include <stdlib.h>
#include <string.h>

#include "engine/work.h"
#include "meta/base/util.h"

enum notice_kind { NOTICE_PAGES, NOTICE_GONE, NOTICE_STALE };

struct notice {
    struct work_job job;
    enum notice_kind kind;
    struct house *house;
    struct inode *inode; /* held */
    char *name;          /* in the inode, a directory; NULL for NOTICE_PAGES */
};

/* The kernel asks again at the next lookup; unlike an invalidated name, a directory that
 * somebody works in stays. */
static void expire(struct fuse_session *session, fuse_ino_t parent, const char *name)
{
#if FUSE_USE_VERSION >= 317
    fuse_lowlevel_notify_expire_entry(session, parent, name, strlen(name));
#else
    fuse_lowlevel_notify_expire_entry(session, parent, name, strlen(name), FUSE_LL_EXPIRE_ONLY);
#endif
}

static void run(struct work_job *job)
{
    struct notice *notice = util_container(job, struct notice, job);
    struct house *house = notice->house;
    fuse_ino_t nodeid = inode_nodeid(house->inodes, notice->inode);
    if (notice->kind == NOTICE_PAGES)
        fuse_lowlevel_notify_inval_inode(house->session, nodeid, 0, 0);
    else if (notice->kind == NOTICE_GONE)
        fuse_lowlevel_notify_inval_entry(house->session, nodeid, notice->name,
                                         strlen(notice->name));
    else
        expire(house->session, nodeid, notice->name);
    inode_release(house->inodes, notice->inode);
    free(notice->name);
    free(notice);
}

/* Takes the hold on inode. */
static void post(struct house *house, enum notice_kind kind, struct inode *inode, const char *name)
{
    struct notice *notice = calloc(1, sizeof(*notice));
    char *copy = name == NULL ? NULL : strdup(name);
    if (house->notices == NULL || notice == NULL || (name != NULL && copy == NULL)) {
        free(notice);
        free(copy);
        inode_release(house->inodes, inode);
        return;
    }
    *notice =
        (struct notice){.job.run = run, .kind = kind, .house = house, .inode = inode, .name = copy};
    work_post(house->notices, &notice->job);
}

void notice_inode(struct house *house, struct inode *inode)
{
    inode_hold(house->inodes, inode);
    post(house, NOTICE_PAGES, inode, NULL);
}

static void post_entry(struct house *house, enum notice_kind kind, uint64_t parent,
                       const char *name)
{
    struct inode *inode = inode_find(house->inodes, &(struct inode_key){.id = parent});
    if (inode != NULL)
        post(house, kind, inode, name);
}

void notice_gone(struct house *house, uint64_t parent, const char *name)
{
    post_entry(house, NOTICE_GONE, parent, name);
}

void notice_stale(struct house *house, uint64_t parent, const char *name)
{
    post_entry(house, NOTICE_STALE, parent, name);
}

void notice_nothing(void *arg, int status, const struct model_entry *entry)
{
    (void)arg;
    (void)status;
    (void)entry;
}
