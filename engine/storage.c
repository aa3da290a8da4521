#include "engine/storage.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "meta/base/util.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define STORAGE_PAGE 4096ull

enum storage_type { STORAGE_TMPFS, STORAGE_MEMFD, STORAGE_DIR };

/* Memory that is given back to the machine is slow to get again (it has to be cleared, and a virtual machine may have
 * handed it to its host), so the files of replicas that were evicted are kept for a moment. */
#define STORAGE_SPARES (4 + STORAGE_RESERVE_FILES)

struct spare {
    int fd; /* -1: none */
    uint64_t size;
    uint64_t cleared; /* bytes from its begin that have their pages; in the reserve it grows */
    uint64_t since_ms;
    bool reserve; /* nobody has used it yet */
};

struct storage {
    enum storage_type type;
    int mount;  /* O_PATH-like descriptor of the tmpfs or the directory; -1 for memfd */
    int direct; /* the same of the tmpfs for writers that are not seen; -1: none */
    int node;   /* NUMA; -1: the kernel chooses */
    atomic_uint direct_fills; /* how often that was found full */
    char why[128];
    uint64_t spare_limit;
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t rested;
    struct spare spares[STORAGE_SPARES];
    atomic_bool pause; /* the clearer ends after its step; any thread may set it without the lock */
    bool clearing;     /* there is a clearer */
    bool step;         /* it writes to a spare now, which must stay in the table until `rested` */
    pthread_t clearer;
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

static int tmpfs_prefer(int mount, int node)
{
    char policy[32];
    util_autoclose int fs = (int)syscall(SYS_fspick, mount, "", FSPICK_EMPTY_PATH | FSPICK_CLOEXEC);
    snprintf(policy, sizeof policy, "prefer:%d", node);
    return fs < 0 || fs_config(fs, FSCONFIG_SET_STRING, "mpol", policy) < 0 ||
                   fs_config(fs, FSCONFIG_CMD_RECONFIGURE, NULL, NULL) < 0
               ? -errno
               : 0;
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
    pthread_cond_init(&s->rested, NULL);
    s->direct = s->node = -1;
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
    pthread_mutex_lock(&storage->lock);
    while (storage->clearing) {
        pthread_cond_wait(&storage->rested, &storage->lock);
    }
    pthread_mutex_unlock(&storage->lock);
    if (storage->mount >= 0) {
        close(storage->mount);
    }
    if (storage->direct >= 0) {
        close(storage->direct);
    }
    pthread_cond_destroy(&storage->rested);
    pthread_mutex_destroy(&storage->lock);
    free(storage);
}

int storage_prefer(struct storage *storage, int node)
{
    int status = storage->type == STORAGE_TMPFS ? tmpfs_prefer(storage->mount, node) : -EOPNOTSUPP;
    if (status == 0 && storage->direct >= 0) {
        status = tmpfs_prefer(storage->direct, node);
    }
    storage->node = status == 0 ? node : -1;
    return status;
}

int storage_node(const struct storage *storage)
{
    return storage->node;
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

static int file_new(struct storage *storage, const char *name)
{
    int fd = storage->type == STORAGE_MEMFD
                 ? memfd_create(name, MFD_CLOEXEC)
                 : openat(storage->mount, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    return fd < 0 ? -errno : fd;
}

int storage_file(struct storage *storage, const char *name)
{
    storage_reserve_pause(storage);
    return file_new(storage, name);
}

int storage_file_direct(struct storage *storage)
{
    storage_reserve_pause(storage);
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

/* ---- spares ---- */

/* Lock held, and held again on return. The clearer may have been put off by busier threads in the middle of its step: it
 * finishes that with the weight of any other. */
static void clearer_rest(struct storage *storage)
{
    atomic_store(&storage->pause, true);
    if (storage->clearing) {
        (void)pthread_setschedparam(storage->clearer, SCHED_OTHER, &(struct sched_param){0});
    }
    while (storage->step) {
        pthread_cond_wait(&storage->rested, &storage->lock);
    }
}

/* Whether a is better than b (or NULL) for a file of so many bytes: has more of its pages; of those with all, the smaller.
 * What is prepared for a far larger file stays for that one. */
static bool spare_better(const struct spare *a, const struct spare *b, uint64_t size)
{
    if (a->fd < 0 || (a->reserve && a->size / 2 > size)) {
        return false;
    }
    uint64_t has = a->cleared < size ? a->cleared : size;
    uint64_t other = b ? (b->cleared < size ? b->cleared : size) : 0;
    return has > other || (b && has == other && a->size < b->size);
}

/* The best spare, out of the table; -1: none. */
static int spare_take(struct storage *storage, uint64_t size)
{
    pthread_mutex_lock(&storage->lock);
    clearer_rest(storage);
    struct spare *best = NULL;
    for (unsigned i = 0; i < STORAGE_SPARES; i++) {
        if (spare_better(&storage->spares[i], best, size)) {
            best = &storage->spares[i];
        }
    }
    int fd = best ? util_fd_take(&best->fd) : -1;
    pthread_mutex_unlock(&storage->lock);
    return fd;
}

int storage_file_dirty(struct storage *storage, const char *name, uint64_t size)
{
    util_autoclose int fd = size >= STORAGE_SPARE_MIN ? spare_take(storage, size) : -1;
    if (fd < 0) {
        fd = storage_file(storage, name);
    }
    if (fd < 0) {
        return fd;
    }
    return ftruncate(fd, (off_t)size) < 0 ? -errno : util_fd_take(&fd);
}

/* Where one more can be kept; *total: what all take. Lock held. */
static struct spare *spare_vacant(struct storage *storage, uint64_t *total)
{
    struct spare *vacant = NULL;
    *total = 0;
    for (unsigned i = 0; i < STORAGE_SPARES; i++) {
        struct spare *spare = &storage->spares[i];
        if (spare->fd < 0) {
            vacant = vacant ? vacant : spare;
        } else {
            *total += spare->size;
        }
    }
    return vacant;
}

void storage_give_back(struct storage *storage, int fd, uint64_t size)
{
    util_autoclose int mine = fd;
    if (storage->type == STORAGE_DIR || size < STORAGE_SPARE_MIN) {
        return;
    }
    uint64_t total;
    pthread_mutex_lock(&storage->lock);
    struct spare *vacant = spare_vacant(storage, &total);
    if (vacant && total + size <= storage->spare_limit) {
        *vacant = (struct spare){
            .fd = util_fd_take(&mine), .size = size, .cleared = size, .since_ms = util_now_ms()};
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
    if (keep < UINT64_MAX) {
        clearer_rest(storage);
    }
    for (unsigned i = 0; i < STORAGE_SPARES; i++) {
        struct spare *spare = &storage->spares[i];
        if (spare->fd < 0) {
            continue;
        }
        bool old = !spare->reserve && now - spare->since_ms >= STORAGE_SPARE_MS;
        if (old || total + spare->size > keep) {
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

/* ---- reserve ---- */

/* The next that lacks pages; NULL: none. Lock held. */
static struct spare *reserve_next(struct storage *storage)
{
    for (unsigned i = 0; i < STORAGE_SPARES; i++) {
        struct spare *spare = &storage->spares[i];
        if (spare->fd >= 0 && spare->reserve && spare->cleared < spare->size) {
            return spare;
        }
    }
    return NULL;
}

/* Pages by a write and not by a fault: that needs neither a mapping, which would count as this process's memory, nor the
 * lock of all mappings, which a thread that is put off in the middle would keep from the others. 0: nothing was done. */
static uint64_t reserve_step(int fd, uint64_t at, uint64_t length)
{
    static uint8_t zeros[64u << 10]; /* nobody writes there */
    struct iovec pieces[STORAGE_HUGE / sizeof zeros];
    int count = 0;
    for (uint64_t left = length; left; count++) {
        uint64_t piece = left < sizeof zeros ? left : sizeof zeros;
        pieces[count] = (struct iovec){.iov_base = zeros, .iov_len = piece};
        left -= piece;
    }
    ssize_t written = pwritev(fd, pieces, count, (off_t)at);
    return written < 0 ? 0 : (uint64_t)written;
}

static void *clearer_main(void *arg)
{
    struct storage *storage = arg;
    const struct sched_param none = {0};
    struct spare *spare;
    pthread_setname_np(pthread_self(), "p2pfs-reserve");
    pthread_mutex_lock(&storage->lock);
    while (!atomic_load(&storage->pause) && (spare = reserve_next(storage))) {
        int fd = spare->fd;
        uint64_t at = spare->cleared;
        uint64_t left = spare->size - at;
        uint64_t done = 0;
        storage->step = true;
        pthread_mutex_unlock(&storage->lock);
        /* Only for the step: who holds the lock must not be put off. */
        (void)pthread_setschedparam(pthread_self(), SCHED_IDLE, &none);
        if (!atomic_load(&storage->pause)) {
            done = reserve_step(fd, at, left < STORAGE_HUGE ? left : STORAGE_HUGE);
        }
        (void)pthread_setschedparam(pthread_self(), SCHED_OTHER, &none);
        pthread_mutex_lock(&storage->lock);
        storage->step = false;
        spare->cleared += done;
        pthread_cond_broadcast(&storage->rested);
        if (done == 0) {
            atomic_store(&storage->pause, true); /* no memory: whoever wants it asks again */
        }
    }
    storage->clearing = false;
    pthread_cond_broadcast(&storage->rested);
    pthread_mutex_unlock(&storage->lock);
    return NULL;
}

/* Lock held. */
static void clearer_start(struct storage *storage)
{
    pthread_attr_t detached;
    atomic_store(&storage->pause, false);
    if (storage->clearing || !reserve_next(storage) || pthread_attr_init(&detached) != 0) {
        return;
    }
    /* A signal that ends the mount must not wait for a thread that is put off. */
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    storage->clearing = pthread_create(&storage->clearer, &detached, clearer_main, storage) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&detached);
}

/* Lock held. */
static void reserve_add(struct storage *storage, uint64_t size)
{
    uint64_t total;
    struct spare *vacant = spare_vacant(storage, &total);
    if (!vacant || total + size > storage->spare_limit) {
        return;
    }
    util_autoclose int fd = file_new(storage, "reserve");
    if (fd >= 0 && ftruncate(fd, (off_t)size) == 0) {
        *vacant = (struct spare){.fd = util_fd_take(&fd), .size = size, .reserve = true};
    }
}

void storage_reserve(struct storage *storage, const uint64_t *sizes, size_t count)
{
    int close_now[STORAGE_SPARES];
    unsigned closing = 0;
    bool there[STORAGE_RESERVE_FILES] = {0};
    pthread_mutex_lock(&storage->lock);
    clearer_rest(storage);
    for (unsigned i = 0; i < STORAGE_SPARES; i++) {
        struct spare *spare = &storage->spares[i];
        if (spare->fd < 0 || !spare->reserve) {
            continue;
        }
        size_t k = 0;
        while (k < count && (there[k] || sizes[k] != spare->size)) {
            k++;
        }
        if (k < count) {
            there[k] = true;
        } else {
            close_now[closing++] = util_fd_take(&spare->fd);
        }
    }
    for (size_t k = 0; k < count; k++) {
        if (!there[k]) {
            reserve_add(storage, sizes[k]);
        }
    }
    clearer_start(storage);
    pthread_mutex_unlock(&storage->lock);
    while (closing) {
        close(close_now[--closing]);
    }
}

void storage_reserve_pause(struct storage *storage)
{
    atomic_store(&storage->pause, true);
}

uint64_t storage_reserved(struct storage *storage)
{
    uint64_t cleared = 0;
    pthread_mutex_lock(&storage->lock);
    for (unsigned i = 0; i < STORAGE_SPARES; i++) {
        const struct spare *spare = &storage->spares[i];
        cleared += spare->fd >= 0 && spare->reserve ? spare->cleared : 0;
    }
    pthread_mutex_unlock(&storage->lock);
    return cleared;
}

uint64_t storage_huge(void)
{
    FILE *table = fopen("/proc/self/smaps_rollup", "re");
    unsigned long long kib = 0;
    char line[256];
    while (table && fgets(line, sizeof line, table) &&
           sscanf(line, "ShmemPmdMapped: %llu kB", &kib) != 1) {
    }
    if (table) {
        fclose(table);
    }
    return kib * 1024;
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
