/* Populated huge pages for the references, made without the product's own storage: what that loses must show. */
#ifndef P2PFS_TESTS_BENCH_MEMORY_H
#define P2PFS_TESTS_BENCH_MEMORY_H

#include <fcntl.h>
#include <linux/mount.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#define BENCH_HUGE (2ull << 20)

/* An unnamed file on a tmpfs of its own with huge=always; a memfd where that is not allowed. -1: errno. */
static inline int bench_memory_file(void)
{
    int fs = (int)syscall(SYS_fsopen, "tmpfs", FSOPEN_CLOEXEC), fd = -1;
    if (fs >= 0) {
        syscall(SYS_fsconfig, fs, FSCONFIG_SET_STRING, "huge", "always", 0);
        syscall(SYS_fsconfig, fs, FSCONFIG_SET_STRING, "size", "100%", 0);
        syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0);
        int mount = (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, 0);
        if (mount >= 0) {
            fd = openat(mount, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
            close(mount);
        }
        close(fs);
    }
    if (fd < 0) {
        fprintf(stderr, "no tmpfs of huge pages here: 4 KiB pages\n");
        fd = memfd_create("bench", MFD_CLOEXEC);
    }
    return fd;
}

/* Of `bytes` bytes, mapped at a multiple of the huge page's size, every page there. NULL: errno. */
static inline uint8_t *bench_memory_make(uint64_t bytes, int *fd)
{
    *fd = bench_memory_file();
    if (*fd < 0 || ftruncate(*fd, (off_t)bytes) < 0)
        return NULL;
    uint8_t *hold = mmap(NULL, bytes + BENCH_HUGE, PROT_NONE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (hold == MAP_FAILED)
        return NULL;
    uint8_t *at = (uint8_t *)(((uintptr_t)hold + BENCH_HUGE - 1) & ~(uintptr_t)(BENCH_HUGE - 1));
    if (mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, *fd, 0) == MAP_FAILED ||
        madvise(at, bytes, MADV_POPULATE_WRITE) < 0)
        return NULL;
    return at;
}

#endif
