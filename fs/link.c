#include "fs/link.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "engine/work.h"
#include "fs/dir.h"
#include "fs/fresh.h"
#include "fs/reply.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

void link_readlink(fuse_req_t req, fuse_ino_t nodeid)
{
    struct house *house = reply_house(req);
    struct inode *inode = inode_by_nodeid(house->inodes, nodeid);
    if (inode->kind == INODE_GHOST) {
        fuse_reply_readlink(req, inode->target);
        return;
    }
    struct model_entry entry;
    int rc = inode->kind == INODE_SYMLINK ? catalog_entry(house->catalog, inode->key.id, &entry)
                                          : -EINVAL;
    if (rc != 0) { /* flipped or gone since the kernel looked: it shall look again */
        reply_status(req, rc == -ENOENT ? -ESTALE : rc);
        return;
    }
    fuse_reply_readlink(req, entry.target);
    model_entry_clear(&entry);
}

void link_link(fuse_req_t req, fuse_ino_t nodeid, fuse_ino_t new_nodeid, const char *new_name)
{
    struct house *house = reply_house(req);
    struct inode *inode = inode_by_nodeid(house->inodes, nodeid);
    struct inode *parent = inode_by_nodeid(house->inodes, new_nodeid);
    int rc = dir_name_check(house, parent, new_name);
    if (rc == 0 &&
        ((inode->kind != INODE_FILE && inode->kind != INODE_SYMLINK) || fresh_is(house, inode)))
        rc = -EPERM;
    if (rc == 0 && fresh_exists(house, parent->key.id, new_name))
        rc = -EEXIST;
    if (rc == 0)
        rc = catalog_link(house->catalog, inode->key.id, parent->key.id, new_name, reply_done_entry,
                          req);
    if (rc != 0)
        reply_status(req, rc);
}

/* ---- an absolute target: what lies there is registered ---- */

struct registering {
    struct work_job job;
    struct house *house;
    fuse_req_t req;
    uint64_t parent;
    char *name;
    char *target;
};

static void registering_free(struct registering *registering)
{
    free(registering->name);
    free(registering->target);
    free(registering);
}

/* The kernel takes nothing but a symbolic link for an answer; it is looked up again before
 * anybody sees it. */
static void registering_done(void *arg, int status, const struct model_entry *entry)
{
    struct registering *registering = arg;
    struct inode *ghost = NULL;
    (void)entry;
    if (status == 0)
        status = inode_new_ghost(registering->house->inodes, registering->target, &ghost);
    if (status == 0)
        reply_entry(registering->req, ghost);
    else
        reply_status(registering->req, status);
    registering_free(registering);
}

/* Whether the caller may read the file, asked with his own rights (this thread's, for a moment). */
static int readable_by(fuse_req_t req, const char *path)
{
    gid_t groups[NGROUPS_MAX > 1024 ? 1024 : NGROUPS_MAX], ours[1024];
    int ours_count = getgroups((int)util_count(ours), ours);
    int count = fuse_req_getgroups(req, (int)util_count(groups), groups);
    if (ours_count < 0)
        return -errno;
    if (count < 0 || count > (int)util_count(groups))
        count = 0; /* fewer rights, never more */
    const struct fuse_ctx *caller = fuse_req_ctx(req);
    /* Past libc, whose setgroups would change every thread. */
    if (syscall(SYS_setgroups, (size_t)count, groups) != 0)
        return -errno;
    setfsgid(caller->gid);
    setfsuid(caller->uid);
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    int rc = fd < 0 ? -errno : 0;
    setfsuid(geteuid());
    setfsgid(getegid());
    if (syscall(SYS_setgroups, (size_t)ours_count, ours) != 0)
        log_error("cannot take the supplementary groups back: %s", strerror(errno));
    if (fd >= 0)
        close(fd);
    return rc;
}

static int may_register(const struct registering *registering, bool tree)
{
    uid_t uid = fuse_req_ctx(registering->req)->uid;
    if (uid == 0 || uid == geteuid())
        return 0;
    if (geteuid() == 0 && !tree)
        return readable_by(registering->req, registering->target);
    log_warn("%s: user %u may not register it in place: let root do it, or copy it",
             registering->target, uid);
    return -EPERM;
}

static void register_target(struct work_job *job)
{
    struct registering *registering = util_container(job, struct registering, job);
    struct house *house = registering->house;
    const char *target = registering->target;
    struct stat st;
    int rc = stat(target, &st) != 0 ? -errno : 0;
    if (rc == 0 && st.st_dev == house->dev)
        rc = -ELOOP;
    if (rc == 0 && !S_ISREG(st.st_mode) && !S_ISDIR(st.st_mode)) {
        log_warn("%s: neither a regular file nor a directory, and so cannot be registered", target);
        rc = -EINVAL;
    }
    if (rc == 0)
        rc = may_register(registering, S_ISDIR(st.st_mode));
    if (rc == 0 && S_ISDIR(st.st_mode))
        rc = engine_register_tree(house->engine, target, registering->parent, registering->name, 0,
                                  registering_done, registering);
    else if (rc == 0)
        rc = engine_register_file(house->engine, target, registering->parent, registering->name, 0,
                                  registering_done, registering);
    if (rc == -ELOOP) {
        log_warn(
            "%s: lies inside the mount: use a relative target, which means the same on every node",
            target);
        rc = -EINVAL;
    }
    if (rc != 0)
        registering_done(registering, rc, NULL);
}

/* Text only: looking at the file would go through this very mount. */
static bool inside(const struct house *house, const char *path)
{
    size_t length = strlen(house->mountpoint);
    return strncmp(path, house->mountpoint, length) == 0 &&
           (path[length] == '/' || path[length] == '\0');
}

static int symlink_absolute(fuse_req_t req, const char *target, const struct inode *parent,
                            const char *name)
{
    struct house *house = reply_house(req);
    if (inside(house, target)) {
        log_warn(
            "%s: lies inside the mount: use a relative target, which means the same on every node",
            target);
        return -EINVAL;
    }
    struct registering *registering = calloc(1, sizeof(*registering));
    if (registering == NULL)
        return -ENOMEM;
    *registering = (struct registering){.job.run = register_target,
                                        .house = house,
                                        .req = req,
                                        .parent = parent->key.id,
                                        .name = strdup(name),
                                        .target = strdup(target)};
    if (registering->name == NULL || registering->target == NULL) {
        registering_free(registering);
        return -ENOMEM;
    }
    work_post(house->chores, &registering->job);
    return 0;
}

void link_symlink(fuse_req_t req, const char *target, fuse_ino_t nodeid, const char *name)
{
    struct house *house = reply_house(req);
    struct inode *parent = inode_by_nodeid(house->inodes, nodeid);
    int rc = dir_name_check(house, parent, name);
    if (rc == 0 && fresh_exists(house, parent->key.id, name))
        rc = -EEXIST;
    if (rc == 0 && target[0] == '/') {
        rc = symlink_absolute(req, target, parent, name);
    } else if (rc == 0) {
        struct model_attr attr = reply_new_attr(req, parent, 0777);
        rc = catalog_symlink(house->catalog, parent->key.id, name, target, &attr, reply_done_entry,
                             req);
    }
    if (rc != 0)
        reply_status(req, rc);
}
