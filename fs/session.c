#include "fs/session.h"

#include <errno.h>
#include <fuse_lowlevel.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "engine/work.h"
#include "fs/dir.h"
#include "fs/link.h"
#include "fs/list.h"
#include "fs/mountpoint.h"
#include "fs/read.h"
#include "fs/through.h"
#include "fs/write.h"
#include "fs/xattr.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

#define SESSION_WORKERS    16
#define SESSION_MAX_WRITE  (1u << 20)
#define SESSION_READ_AHEAD 1024 /* KiB; the kernel's INIT cannot go beyond 128 */
#define SESSION_BACKGROUND \
    1024 /* with the kernel's 12, readers of missing shards hold up all others' read-ahead */

static const struct fuse_lowlevel_ops session_ops; /* at the end */

/* libfuse's last complaint, kept for the sentence that tells why mounting failed. One session
 * per process. */
static char complaint[LOG_LINE];
static bool mounted;

static void take_log(enum fuse_log_level level, const char *format, va_list arguments)
    __attribute__((format(printf, 2, 0)));
static void take_log(enum fuse_log_level level, const char *format, va_list arguments)
{
    vsnprintf(complaint, sizeof(complaint), format, arguments);
    complaint[strcspn(complaint, "\n")] = '\0';
    /* What became of an attempt to lend a file to the kernel, through.c says. */
    if (level <= FUSE_LOG_ERR && mounted && strstr(complaint, "passthrough") == NULL)
        log_error("libfuse: %s", complaint);
    else
        log_debug("libfuse: %s", complaint);
}

int session_open(struct house *house, char **error)
{
    fuse_set_log_func(take_log);
    if (access("/dev/fuse", F_OK) != 0) {
        if (asprintf(
                error,
                "/dev/fuse is missing; modprobe fuse, or give the container --device /dev/fuse") <
            0)
            *error = NULL;
        return -ENODEV;
    }
    char program[] = "p2pfs", switch_o[] = "-o";
    char *words[] = {program, switch_o, house->options.fuse, NULL};
    struct fuse_args args = FUSE_ARGS_INIT(3, words);
    house->session = fuse_session_new(&args, &session_ops, sizeof(session_ops), house);
    fuse_opt_free_args(&args);
    int rc = house->session == NULL ? -EINVAL : 0;
    if (rc == 0 && fuse_session_mount(house->session, house->mountpoint) != 0) {
        session_close(house);
        rc = -EPERM;
    }
    if (rc != 0 &&
        asprintf(error, "%s: cannot mount: %s; mount as root, or install fusermount3",
                 house->mountpoint, complaint[0] == '\0' ? "the kernel refused" : complaint) < 0)
        *error = NULL;
    mounted = rc == 0;
    if (mounted)
        house->dev = mountpoint_device(house->mountpoint);
    return rc;
}

/* Blocked in every thread but while this one serves: by default they would end the process with
 * the mount in place. */
static void signals_heed(int how)
{
    sigset_t ends;
    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigaddset(&ends, SIGINT);
    sigaddset(&ends, SIGHUP);
    pthread_sigmask(how, &ends, NULL);
}

int session_serve(struct house *house)
{
    int rc = fuse_set_signal_handlers(house->session) != 0 ? -EINVAL : 0;
    struct fuse_loop_config *config = rc == 0 ? fuse_loop_cfg_create() : NULL;
    if (config == NULL)
        return rc == 0 ? -ENOMEM : rc;
    fuse_loop_cfg_set_clone_fd(config, 0);
    fuse_loop_cfg_set_max_threads(config, SESSION_WORKERS);
    fuse_loop_cfg_set_idle_threads(config, SESSION_WORKERS);
    signals_heed(SIG_UNBLOCK);
    rc = fuse_session_loop_mt(house->session, config);
    signals_heed(SIG_BLOCK);
    fuse_loop_cfg_destroy(config);
    fuse_remove_signal_handlers(house->session);
    /* Aborted when files alone kept it, as after umount -l: it was unmounted before. */
    if (rc == -ECONNABORTED && mountpoint_device(house->mountpoint) != house->dev)
        rc = 0;
    return rc < 0 ? rc : 0; /* positive: the signal that ended it */
}

void session_unmount(struct house *house)
{
    if (house->session == NULL || house->dev == 0 ||
        mountpoint_device(house->mountpoint) != house->dev)
        return;
    /* Force: requests that nobody reads any more would keep their callers, and our own notices,
     * for ever. libfuse would close the device too, which threads of the engine may still be
     * answering through. */
    if (umount2(house->mountpoint, MNT_FORCE | MNT_DETACH) != 0)
        fuse_session_unmount(house->session); /* by fusermount3, without privileges */
}

void session_close(struct house *house)
{
    if (house->session == NULL)
        return;
    fuse_session_unmount(house->session);
    fuse_session_destroy(house->session);
    house->session = NULL;
}

/* ---- becoming ready ---- */

static void read_ahead_set(dev_t device)
{
    char path[96];
    snprintf(path, sizeof(path), "/sys/class/bdi/%u:%u/read_ahead_kb", major(device),
             minor(device));
    FILE *knob = fopen(path, "we");
    if (knob == NULL || fprintf(knob, "%d\n", SESSION_READ_AHEAD) < 0)
        log_debug("%s: cannot be set (%s): cold reads by mmap ask for smaller pieces", path,
                  strerror(errno));
    if (knob != NULL)
        fclose(knob);
}

struct ready {
    struct work_job job;
    struct house *house;
};

/* The first request through the mount itself: when it is answered, everybody's are. */
static void become_ready(struct work_job *job)
{
    struct ready *ready = util_container(job, struct ready, job);
    struct house *house = ready->house;
    struct stat st;
    if (stat(house->mountpoint, &st) == 0) {
        read_ahead_set(st.st_dev);
        log_info("%s: mounted; node %s", house->mountpoint, house->options.node);
        house->serving(house);
    } else {
        log_error("%s: does not answer after mounting: %s", house->mountpoint, strerror(errno));
        fuse_session_exit(house->session);
    }
    free(ready);
}

#if FUSE_USE_VERSION >= 317
static void want(struct fuse_conn_info *conn, uint64_t feature, bool wanted)
{
    if (wanted)
        fuse_set_feature_flag(conn, feature);
    else
        fuse_unset_feature_flag(conn, feature);
}
#else
static void want(struct fuse_conn_info *conn, unsigned feature, bool wanted)
{
    if (!wanted)
        conn->want &= ~feature;
    else if (conn->capable & feature)
        conn->want |= feature;
}
#endif

static void session_init(void *arg, struct fuse_conn_info *conn)
{
    struct house *house = arg;
    conn->max_write = SESSION_MAX_WRITE;
    const char *max_read = house->options.fuse ? strstr(house->options.fuse, "max_read=") : NULL;
    if (max_read) { /* libfuse ends the session when the two places do not say the same */
        conn->max_read = (unsigned)strtoul(max_read + strlen("max_read="), NULL, 10);
    }
    conn->max_background = SESSION_BACKGROUND;
    conn->congestion_threshold = SESSION_BACKGROUND * 3 / 4;
    conn->time_gran = 1;
    want(conn, FUSE_CAP_ATOMIC_O_TRUNC,
         true); /* open tells of O_TRUNC, where a draft may have to take over */
    want(conn, FUSE_CAP_ASYNC_READ, true);
    want(conn, FUSE_CAP_ASYNC_DIO, true);
    want(conn, FUSE_CAP_PARALLEL_DIROPS, true);
    want(conn, FUSE_CAP_READDIRPLUS, true);
    want(conn, FUSE_CAP_READDIRPLUS_AUTO, true);
    want(conn, FUSE_CAP_SPLICE_READ, false); /* written bytes are copied once, from memory */
    /* Bytes change through the kernel alone, so a new mtime is no reason to drop pages. */
    want(conn, FUSE_CAP_AUTO_INVAL_DATA, false);
    want(conn, FUSE_CAP_EXPLICIT_INVAL_DATA, true);
#ifdef FUSE_CAP_HANDLE_KILLPRIV_V2
    want(conn, FUSE_CAP_HANDLE_KILLPRIV_V2,
         true); /* or each write asks for security.capability first */
#endif
    through_begin(house->through, conn);
    struct ready *ready = calloc(1, sizeof(*ready));
    if (ready == NULL) {
        fuse_session_exit(house->session);
        return;
    }
    ready->job.run = become_ready;
    ready->house = house;
    work_post(house->chores, &ready->job);
}

static const struct fuse_lowlevel_ops session_ops = {
    .init = session_init,
    .lookup = dir_lookup,
    .forget = dir_forget,
    .forget_multi = dir_forget_multi,
    .getattr = dir_getattr,
    .setattr = dir_setattr,
    .statfs = dir_statfs,
    .mkdir = dir_mkdir,
    .unlink = dir_unlink,
    .rmdir = dir_rmdir,
    .rename = dir_rename,
    .opendir = list_opendir,
    .readdir = list_readdir,
    .readdirplus = list_readdirplus,
    .releasedir = list_releasedir,
    .readlink = link_readlink,
    .symlink = link_symlink,
    .link = link_link,
    .open = read_open,
    .read = read_read,
    .release = read_release,
    .create = write_create,
    .mknod = write_mknod,
    .write = write_write,
    .fallocate = write_fallocate,
    .flush = write_flush,
    .getxattr = xattr_get,
    .setxattr = xattr_set,
    .listxattr = xattr_list,
    .removexattr = xattr_remove,
};
