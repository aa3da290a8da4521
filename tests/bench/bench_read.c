/* Reads a file in one of the ways that programs do, and says how long it took.
 *
 *   bench_read HOW PIECE FILE        prints: bytes seconds
 *
 * PIECE: bytes of one read. HOW: read (from begin to end), direct (the same with O_DIRECT), random (pread(2) at places
 * without order, a sixteenth of the file), splice (to /dev/null by a pipe), mmap (a byte of each page), shared and
 * private (all of a mapping, summed up). */
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

static uint64_t read_random(int fd, size_t piece, uint64_t size)
{
    char *buffer = aligned_alloc(4096, piece + (4096 - piece % 4096) % 4096);
    uint64_t sum = 0, places = size / piece, at = 1;
    if (!buffer || places == 0)
        die("memory");
    for (uint64_t k = 0; k < places / 16 + 1; k++) {
        at = at * 6364136223846793005u + 1442695040888963407u;
        ssize_t n = pread(fd, buffer, piece, (off_t)((at >> 20) % places * piece));
        if (n < 0)
            die("pread");
        sum += (uint64_t)n;
    }
    free(buffer);
    return sum;
}

static uint64_t splice_all(int fd, size_t piece)
{
    int ends[2], nowhere = open("/dev/null", O_WRONLY | O_CLOEXEC);
    uint64_t sum = 0;
    ssize_t n;
    if (nowhere < 0 || pipe2(ends, O_CLOEXEC) < 0)
        die("pipe");
    (void)fcntl(ends[1], F_SETPIPE_SZ, (int)piece);
    while ((n = splice(fd, NULL, ends[1], NULL, piece, SPLICE_F_MOVE)) > 0) {
        sum += (uint64_t)n;
        for (ssize_t out = 0; n > 0; n -= out)
            if ((out = splice(ends[0], NULL, nowhere, NULL, (size_t)n, SPLICE_F_MOVE)) <= 0)
                die("splice");
    }
    if (n < 0)
        die("splice");
    return sum;
}

static uint64_t map_all(int fd, uint64_t size, int flags, uint64_t step)
{
    const char *map = mmap(NULL, size, PROT_READ, flags, fd, 0);
    uint64_t sum = 0;
    if (map == MAP_FAILED)
        die("mmap");
    for (uint64_t at = 0; at + sizeof(sum) <= size; at += step)
        sum += *(const volatile uint64_t *)(map + at);
    return sum == 0 ? 0 : size; /* the sum is wanted */
}

static uint64_t run(const char *how, int fd, size_t piece, uint64_t size)
{
    if (strcmp(how, "random") == 0)
        return read_random(fd, piece, size);
    if (strcmp(how, "splice") == 0)
        return splice_all(fd, piece);
    if (strcmp(how, "mmap") == 0)
        return map_all(fd, size, MAP_SHARED, 4096);
    if (strcmp(how, "shared") == 0)
        return map_all(fd, size, MAP_SHARED, sizeof(uint64_t));
    if (strcmp(how, "private") == 0)
        return map_all(fd, size, MAP_PRIVATE, sizeof(uint64_t));
    return read_all(fd, piece);
}

int main(int argc, char **argv)
{
    size_t piece = argc == 4 ? strtoul(argv[2], NULL, 10) : 0;
    if (piece == 0) {
        fprintf(stderr,
                "usage: bench_read read|direct|random|splice|mmap|shared|private PIECE FILE\n");
        return 2;
    }
    uint64_t begun = util_now_ns();
    struct stat st;
    int fd = open(argv[3], O_RDONLY | O_CLOEXEC | (strcmp(argv[1], "direct") == 0 ? O_DIRECT : 0));
    if (fd < 0 || fstat(fd, &st) < 0)
        die(argv[3]);
    uint64_t got = run(argv[1], fd, piece, (uint64_t)st.st_size);
    printf("%llu %.6f\n", (unsigned long long)got, (double)(util_now_ns() - begun) / 1e9);
    return 0;
}
