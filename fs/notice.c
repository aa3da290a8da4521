#include "fs/notice.h"

#include <fuse_lowlevel.h>
#include <stdlib.h>
#include <string.h>

#include "engine/work.h"
#include "meta/base/util.h"

struct notice {
    struct work_job job;
    struct house *house;
    struct inode *inode; /* held */
    char *name;          /* NULL: pages of the inode; else this name in it */
};

static void run(struct work_job *job)
{
    struct notice *notice = util_container(job, struct notice, job);
    struct house *house = notice->house;
    fuse_ino_t nodeid = inode_nodeid(house->inodes, notice->inode);
    if (notice->name == NULL)
        fuse_lowlevel_notify_inval_inode(house->session, nodeid, 0, 0);
    else
        fuse_lowlevel_notify_inval_entry(house->session, nodeid, notice->name,
                                         strlen(notice->name));
    inode_release(house->inodes, notice->inode);
    free(notice->name);
    free(notice);
}

/* Takes the hold on inode. */
static void post(struct house *house, struct inode *inode, const char *name)
{
    struct notice *notice = calloc(1, sizeof(*notice));
    char *copy = name == NULL ? NULL : strdup(name);
    if (house->notices == NULL || notice == NULL || (name != NULL && copy == NULL)) {
        free(notice);
        free(copy);
        inode_release(house->inodes, inode);
        return;
    }
    *notice = (struct notice){.job.run = run, .house = house, .inode = inode, .name = copy};
    work_post(house->notices, &notice->job);
}

void notice_inode(struct house *house, struct inode *inode)
{
    inode_hold(house->inodes, inode);
    post(house, inode, NULL);
}

void notice_entry(struct house *house, uint64_t parent, const char *name)
{
    struct inode *inode = inode_find(house->inodes, &(struct inode_key){.id = parent});
    if (inode != NULL)
        post(house, inode, name);
}

void notice_nothing(void *arg, int status, const struct model_entry *entry)
{
    (void)arg;
    (void)status;
    (void)entry;
}
