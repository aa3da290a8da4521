/* Reads a file from its begin to its end with read(2), or touches each page of a mapping, and says how long it took.
 *
 *   bench_read read|mmap PIECE FILE        prints: bytes seconds
 *
 * PIECE: bytes of one read. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "meta/base/util.h"

static int die(const char *what)
{
    fprintf(stderr, "bench_read: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t read_all(int fd, size_t piece)
{
    char *buffer = aligned_alloc(2 << 20, (piece + (2 << 20) - 1) & ~(size_t)((2 << 20) - 1));
    uint64_t sum = 0;
    ssize_t n;
    if (!buffer)
        die("memory");
    while ((n = read(fd, buffer, piece)) > 0)
        sum += (uint64_t)n;
    if (n < 0)
        die("read");
    free(buffer);
    return sum;
}

static uint64_t touch_all(int fd, uint64_t size)
{
    volatile const char *map = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED)
        die("mmap");
    for (uint64_t at = 0; at < size; at += 4096)
        (void)map[at];
    return size;
}

int main(int argc, char **argv)
{
    size_t piece = argc == 4 ? strtoul(argv[2], NULL, 10) : 0;
    if (piece == 0 || (strcmp(argv[1], "read") != 0 && strcmp(argv[1], "mmap") != 0)) {
        fprintf(stderr, "usage: bench_read read|mmap PIECE FILE\n");
        return 2;
    }
    uint64_t begun = util_now_ns();
    struct stat st;
    int fd = open(argv[3], O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0)
        die(argv[3]);
    uint64_t got = argv[1][0] == 'r' ? read_all(fd, piece) : touch_all(fd, (uint64_t)st.st_size);
    printf("%llu %.6f\n", (unsigned long long)got, (double)(util_now_ns() - begun) / 1e9);
    return 0;
}
