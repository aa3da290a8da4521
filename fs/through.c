#include "fs/through.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fs/inode.h"
#include "fs/notice.h"
#include "fs/read.h"
#include "meta/base/log.h"
#include "p2pfs_config.h"

struct through {
    pthread_mutex_t lock; /* guards all below, and every inode's struct inode_io */
    bool enabled;
    char why[sizeof(((struct through_status *)0)->why)];
    uint64_t opens, creates;
};

int through_open(struct through **out)
{
    struct through *through = calloc(1, sizeof(*through));
    if (through == NULL)
        return -ENOMEM;
    pthread_mutex_init(&through->lock, NULL);
    snprintf(through->why, sizeof(through->why), "not mounted yet");
    *out = through;
    return 0;
}

void through_close(struct through *through)
{
    if (through == NULL)
        return;
    pthread_mutex_destroy(&through->lock);
    free(through);
}

static void disable(struct through *through, const char *why)
{
    through->enabled = false;
    snprintf(through->why, sizeof(through->why), "%s", why);
}

#if P2PFS_HAVE_PASSTHROUGH

static bool kernel_asked(struct fuse_conn_info *conn)
{
    if (!fuse_set_feature_flag(conn, FUSE_CAP_PASSTHROUGH))
        return false;
    conn->max_backing_stack_depth = 1; /* files registered in place may lie on an overlayfs */
    return true;
}

/* Lends the kernel the file. Its id, or 0; errors that concern more than this file end it all. */
static int backing_open(struct through *through, fuse_req_t req, int fd)
{
    errno = 0;
    int id = fuse_passthrough_open(req, fd);
    if (id > 0)
        return id;
    int error = errno;
    /* not EOPNOTSUPP: Linux 6.9 says it of one file whose file system cannot write */
    if (error == EPERM || error == ENOTTY || error == EINVAL) {
        char why[sizeof(through->why)];
        snprintf(why, sizeof(why), "%s",
                 error == EPERM ? "needs CAP_SYS_ADMIN in the first user namespace: mount as root"
                                : "the kernel offers it and refuses it");
        disable(through, why);
        log_warn("files are read buffered, not by FUSE passthrough: %s (%s)", through->why,
                 strerror(error));
    } else {
        log_debug("one file is read buffered, not by FUSE passthrough: %s", strerror(error));
    }
    return 0;
}

static void backing_close(fuse_req_t req, int id)
{
    fuse_passthrough_close(req, id);
}

static void fill_in(struct fuse_file_info *fi, int id)
{
    fi->backing_id = id;
    fi->keep_cache = 0; /* the kernel takes the two together for an error */
}

#else

static bool kernel_asked(struct fuse_conn_info *conn)
{
    (void)conn;
    return false;
}

static int backing_open(struct through *through, fuse_req_t req, int fd)
{
    (void)through, (void)req, (void)fd;
    return 0;
}

static void backing_close(fuse_req_t req, int id)
{
    (void)req, (void)id;
}

static void fill_in(struct fuse_file_info *fi, int id)
{
    (void)fi, (void)id;
}

#endif

void through_begin(struct through *through, struct fuse_conn_info *conn)
{
    const char *off = getenv("P2PFS_NO_PASSTHROUGH");
    pthread_mutex_lock(&through->lock);
    if (off != NULL && *off != '\0' && strcmp(off, "0") != 0)
        disable(through, "P2PFS_NO_PASSTHROUGH is set");
    else if (!P2PFS_HAVE_PASSTHROUGH)
        disable(through, "built with a libfuse older than 3.17");
    else if (!kernel_asked(conn))
        disable(through, "needs Linux 6.9 with CONFIG_FUSE_PASSTHROUGH");
    else
        through->enabled = true;
    if (!through->enabled)
        log_info("files are read buffered, not by FUSE passthrough: %s", through->why);
    pthread_mutex_unlock(&through->lock);
}

/* Called with the lock. */
static void count_buffered(struct handle *handle)
{
    handle->inode->io.buffered++;
    handle->way = HANDLE_BUFFERED;
}

/* Called with the lock. */
static void count_through(struct handle *handle, struct fuse_file_info *fi)
{
    handle->inode->io.through++;
    handle->way = HANDLE_THROUGH;
    fill_in(fi, handle->inode->io.backing);
}

int through_draft(fuse_req_t req, struct house *house, struct handle *handle,
                  struct fuse_file_info *fi)
{
    struct through *through = house->through;
    struct inode_io *io = &handle->inode->io;
    int rc = 0, fd = -1;
    pthread_mutex_lock(&through->lock);
    if (io->through == 0 && io->buffered == 0 && through->enabled && handle->writes &&
        !handle->mappable && engine_draft_lend(house->engine, handle->replica, &fd) == 0) {
        io->backing = backing_open(through, req, fd);
        through->creates += io->backing != 0;
    }
    if (io->backing == 0)
        count_buffered(handle);
    else if (handle->mappable)
        rc = -EBUSY; /* its mapping could change the bytes for ever after, unseen */
    else
        count_through(handle, fi);
    pthread_mutex_unlock(&through->lock);
    return rc;
}

/* Called with the lock. fd: the file to read, or negative errno. */
static int try_locked(fuse_req_t req, struct through *through, struct handle *handle, int fd,
                      struct fuse_file_info *fi)
{
    struct inode_io *io = &handle->inode->io;
    if (io->through > 0 && fd < 0)
        return -EIO;
    /* A twin sends nobody on: the kernel looks a name up again once, then its caller gets ESTALE. */
    if (io->buffered > 0 && fd >= 0 && through->enabled && handle->inode->key.twin == 0 &&
        (!atomic_exchange(&io->twin_wanted, true) || handle->held))
        return -ESTALE; /* who was held has not been sent on yet */
    if (io->through == 0 && io->buffered == 0 && fd >= 0 && through->enabled)
        io->backing = backing_open(through, req, fd);
    if (io->backing == 0) {
        count_buffered(handle);
        return 0;
    }
    through->opens++;
    count_through(handle, fi);
    return 0;
}

int through_try(fuse_req_t req, struct house *house, struct handle *handle,
                struct fuse_file_info *fi)
{
    if (handle->draft)
        return through_draft(req, house, handle, fi);
    struct through *through = house->through;
    pthread_mutex_lock(&through->lock);
    bool wanted = through->enabled || handle->inode->io.through > 0;
    pthread_mutex_unlock(&through->lock);
    int fd = -1;
    int rc = wanted ? engine_lend(house->engine, handle->replica, &fd) : -EAGAIN;
    pthread_mutex_lock(&through->lock);
    rc = try_locked(req, through, handle, rc < 0 ? rc : fd, fi);
    pthread_mutex_unlock(&through->lock);
    return rc;
}

void through_leave(struct house *house, struct handle *handle, fuse_req_t req)
{
    struct through *through = house->through;
    struct inode_io *io = &handle->inode->io;
    bool duplicates = false;
    pthread_mutex_lock(&through->lock);
    if (handle->way == HANDLE_THROUGH && --io->through == 0) {
        if (req != NULL)
            backing_close(req, io->backing);
        io->backing = 0;
    } else if (handle->way == HANDLE_BUFFERED && --io->buffered == 0) {
        atomic_store(&io->twin_wanted, false);
        /* From here on it is read through: the page cache's copy serves nobody. */
        duplicates = through->enabled && req != NULL && !handle->draft;
    }
    pthread_mutex_unlock(&through->lock);
    struct engine_info info;
    if (duplicates && engine_info(house->engine, &handle->inode->key.version, &info) == 0 &&
        (info.state == ENGINE_COMPLETE || info.state == ENGINE_INPLACE))
        notice_inode(house, handle->inode);
}

void through_status(struct through *through, struct through_status *out)
{
    pthread_mutex_lock(&through->lock);
    *out = (struct through_status){
        .enabled = through->enabled, .opens = through->opens, .creates = through->creates};
    if (!through->enabled)
        memcpy(out->why, through->why, sizeof(out->why));
    pthread_mutex_unlock(&through->lock);
}
