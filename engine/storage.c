#include "engine/storage.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "meta/base/util.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define STORAGE_PAGE 4096ull
#define STORAGE_HUGE (2ull << 20)

enum storage_type { STORAGE_TMPFS, STORAGE_MEMFD, STORAGE_DIR };

/* Memory that is given back to the machine is slow to get again (it has to be cleared, and a virtual machine may have
 * handed it to its host), so the files of replicas that were evicted are kept for a moment. */
#define STORAGE_SPARES    4
#define STORAGE_SPARE_MIN (64ull << 20) /* below, clearing costs less than the bookkeeping */
#define STORAGE_SPARE_MAX (4ull << 30)  /* all spares together */

struct spare {
    int fd; /* -1: none */
    uint64_t size;
    uint64_t since_ms;
};

struct storage {
    enum storage_type type;
    int mount;  /* O_PATH-like descriptor of the tmpfs or the directory; -1 for memfd */
    int direct; /* the same of the tmpfs for writers that are not seen; -1: none */
    atomic_uint direct_fills; /* how often that was found full */
    char why[128];
    uint64_t spare_limit;
    pthread_mutex_t lock; /* guards the spares */
    struct spare spares[STORAGE_SPARES];
};

/* glibc before 2.36 lacks these wrappers, and its mount header fights with the kernel's. */
static int fs_open(const char *type)
{
    return (int)syscall(SYS_fsopen, type, FSOPEN_CLOEXEC);
}

static int fs_config(int fs, unsigned command, const char *key, const char *value)
{
    return (int)syscall(SYS_fsconfig, fs, command, key, value, 0);
}

static int tmpfs_mount(uint64_t limit, uint64_t slack, const char *huge)
{
    util_autoclose int fs = fs_open("tmpfs");
    if (fs < 0) {
        return -errno;
    }
    char size[32];
    unsigned long long bytes = limit + slack;
    snprintf(size, sizeof size, "%llu", bytes);
    if (fs_config(fs, FSCONFIG_SET_STRING, "huge", huge) < 0 ||
        fs_config(fs, FSCONFIG_SET_STRING, "size", size) < 0 ||
        fs_config(fs, FSCONFIG_SET_STRING, "nr_inodes", "0") < 0 ||
        fs_config(fs, FSCONFIG_SET_STRING, "mode", "0700") < 0) {
        return -errno;
    }
    /* Kernels before 6.4 have no noswap; pages may then be swapped, which is slow but right. */
    (void)fs_config(fs, FSCONFIG_SET_FLAG, "noswap", NULL);
    if (fs_config(fs, FSCONFIG_CMD_CREATE, NULL, NULL) < 0) {
        return -errno;
    }
    /* noatime: what the kernel reads for programs would look at the clock for each call. */
    int mount =
        (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC,
                     MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_NOATIME);
    return mount < 0 ? -errno : mount;
}

static int dir_open(const char *dir, char **error)
{
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) {
        int status = -errno;
        if (asprintf(error, "cache_dir=%s: %s; name an existing directory that p2pfs may write",
                     dir, strerror(-status)) < 0) {
            *error = NULL;
        }
        return status;
    }
    int probe = openat(fd, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (probe < 0) {
        int status = -errno;
        if (asprintf(
                error,
                "cache_dir=%s: cannot make unnamed files there: %s; use a directory on ext4, xfs or tmpfs",
                dir, strerror(-status)) < 0) {
            *error = NULL;
        }
        close(fd);
        return status;
    }
    close(probe);
    return fd;
}

int storage_open(uint64_t limit, const char *dir, struct storage **storage, char **error)
{
    *error = NULL;
    struct storage *s = calloc(1, sizeof *s);
    if (!s) {
        return -ENOMEM;
    }
    pthread_mutex_init(&s->lock, NULL);
    s->direct = -1;
    for (unsigned i = 0; i < STORAGE_SPARES; i++) {
        s->spares[i].fd = -1;
    }
    s->spare_limit = limit / 4 < STORAGE_SPARE_MAX ? limit / 4 : STORAGE_SPARE_MAX;
    if (dir) {
        s->type = STORAGE_DIR;
        s->mount = dir_open(dir, error);
        if (s->mount < 0) {
            int status = s->mount;
            free(s);
            return status;
        }
        snprintf(s->why, sizeof s->why, "cache_dir= is set");
        *storage = s;
        return 0;
    }
    if (limit == 0) {
        s->type = STORAGE_MEMFD;
        s->mount = -1;
        snprintf(s->why, sizeof s->why, "nothing is kept here");
        *storage = s;
        return 0;
    }
    s->type = STORAGE_TMPFS;
    /* One huge page of slack per open file is not counted by the cache, so leave some. */
    s->mount = tmpfs_mount(limit, limit / 64 + 64 * STORAGE_HUGE, "within_size");
    /* What is evicted for such a writer goes while it writes on; and nobody knows how large a file will get. */
    s->direct = s->mount >= 0 ? tmpfs_mount(limit, limit / 4, "always") : -1;
    if (s->mount < 0) {
        snprintf(s->why, sizeof s->why,
                 "a tmpfs of its own could not be made (%s); needs CAP_SYS_ADMIN and Linux 5.2",
                 strerror(-s->mount));
        s->type = STORAGE_MEMFD;
        s->mount = -1;
    }
    *storage = s;
    return 0;
}

void storage_close(struct storage *storage)
{
    if (!storage) {
        return;
    }
    storage_trim(storage, 0);
    if (storage->mount >= 0) {
        close(storage->mount);
    }
    if (storage->direct >= 0) {
        close(storage->direct);
    }
    pthread_mutex_destroy(&storage->lock);
    free(storage);
}

const char *storage_kind(const struct storage *storage)
{
    static const char *const names[] = {
        [STORAGE_TMPFS] = "huge tmpfs", [STORAGE_MEMFD] = "memfd", [STORAGE_DIR] = "cache_dir"};
    return names[storage->type];
}

const char *storage_why(const struct storage *storage)
{
    return storage->why;
}

int storage_file(struct storage *storage, const char *name)
{
    int fd = storage->type == STORAGE_MEMFD
                 ? memfd_create(name, MFD_CLOEXEC)
                 : openat(storage->mount, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    return fd < 0 ? -errno : fd;
}

int storage_file_direct(struct storage *storage)
{
    if (storage->direct < 0) {
        return -EOPNOTSUPP;
    }
    int fd = openat(storage->direct, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    return fd < 0 ? -errno : fd;
}

void storage_direct_fit(int fd, uint64_t size)
{
    uint64_t end = storage_charge(size);
    uint64_t rest = (STORAGE_HUGE - end % STORAGE_HUGE) % STORAGE_HUGE;
    if (rest) {
        (void)fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)end, (off_t)rest);
    }
}

unsigned storage_direct_fills(struct storage *storage)
{
    struct statfs now;
    if (storage->direct >= 0 && fstatfs(storage->direct, &now) == 0 &&
        (uint64_t)now.f_bavail * (uint64_t)now.f_bsize < STORAGE_HUGE) {
        return atomic_fetch_add(&storage->direct_fills, 1) + 1;
    }
    return atomic_load(&storage->direct_fills);
}

/* The largest spare, out of the table; -1: none. */
static int spare_take(struct storage *storage)
{
    pthread_mutex_lock(&storage->lock);
    struct spare *best = &storage->spares[0];
    for (unsigned i = 1; i < STORAGE_SPARES; i++) {
        struct spare *spare = &storage->spares[i];
        if (spare->fd >= 0 && (best->fd < 0 || spare->size > best->size)) {
            best = spare;
        }
    }
    int fd = util_fd_take(&best->fd);
    pthread_mutex_unlock(&storage->lock);
    return fd;
}

int storage_file_dirty(struct storage *storage, const char *name, uint64_t size)
{
    util_autoclose int fd = size >= STORAGE_SPARE_MIN ? spare_take(storage) : -1;
    if (fd < 0) {
        fd = storage_file(storage, name);
    }
    if (fd < 0) {
        return fd;
    }
    return ftruncate(fd, (off_t)size) < 0 ? -errno : util_fd_take(&fd);
}

void storage_give_back(struct storage *storage, int fd, uint64_t size)
{
    util_autoclose int mine = fd;
    if (storage->type == STORAGE_DIR || size < STORAGE_SPARE_MIN) {
        return;
    }
    pthread_mutex_lock(&storage->lock);
    struct spare *vacant = NULL;
    uint64_t total = size;
    for (unsigned i = 0; i < STORAGE_SPARES; i++) {
        struct spare *spare = &storage->spares[i];
        if (spare->fd < 0) {
            vacant = vacant ? vacant : spare;
        } else {
            total += spare->size;
        }
    }
    if (vacant && total <= storage->spare_limit) {
        *vacant =
            (struct spare){.fd = util_fd_take(&mine), .size = size, .since_ms = util_now_ms()};
    }
    pthread_mutex_unlock(&storage->lock);
}

void storage_trim(struct storage *storage, uint64_t keep)
{
    int close_now[STORAGE_SPARES];
    unsigned count = 0;
    uint64_t now = util_now_ms();
    uint64_t total = 0;
    pthread_mutex_lock(&storage->lock);
    for (unsigned i = 0; i < STORAGE_SPARES; i++) {
        struct spare *spare = &storage->spares[i];
        if (spare->fd < 0) {
            continue;
        }
        if (total + spare->size > keep || now - spare->since_ms >= STORAGE_SPARE_MS) {
            close_now[count++] = util_fd_take(&spare->fd);
        } else {
            total += spare->size;
        }
    }
    pthread_mutex_unlock(&storage->lock);
    while (count) {
        close(close_now[--count]); /* gives gigabytes back to the kernel: not under the lock */
    }
}

uint64_t storage_charge(uint64_t size)
{
    return (size + STORAGE_PAGE - 1) / STORAGE_PAGE * STORAGE_PAGE;
}

/* A mapping that may hold huge pages begins at a multiple of their size, so a little more is asked for and the ends
 * are given back. */
int storage_map(int fd, uint64_t size, uint8_t **map)
{
    uint64_t length = storage_charge(size);
    uint64_t spare = length >= STORAGE_HUGE ? STORAGE_HUGE : 0;
    uint8_t *hold =
        mmap(NULL, length + spare, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (hold == MAP_FAILED) {
        return -errno;
    }
    uint8_t *at = hold;
    if (spare) {
        at = (uint8_t *)(((uintptr_t)hold + STORAGE_HUGE - 1) & ~(uintptr_t)(STORAGE_HUGE - 1));
    }
    if (mmap(at, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
        int status = -errno;
        munmap(hold, length + spare);
        return status;
    }
    if (at > hold) {
        munmap(hold, (size_t)(at - hold));
    }
    if (at + length < hold + length + spare) {
        munmap(at + length, (size_t)(hold + spare - at));
    }
    *map = at;
    return 0;
}

void storage_unmap(uint8_t *map, uint64_t size)
{
    if (map) {
        munmap(map, storage_charge(size));
    }
}

int storage_populate(uint8_t *at, uint64_t length)
{
    uint64_t into = (uintptr_t)at % STORAGE_PAGE;
    if (madvise(at - into, storage_charge(into + length), MADV_POPULATE_WRITE) == 0 ||
        errno == EINVAL) {
        return 0; /* EINVAL: the kernel is older than 5.14; pages come when they are touched */
    }
    /* A tmpfs that is full answers EFAULT here, where a write would get SIGBUS. */
    return errno == EFAULT ? -ENOSPC : -errno;
}
