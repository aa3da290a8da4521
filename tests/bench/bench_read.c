/* Reads files in one of the ways that programs do, and says how long each took.
 *
 *   bench_read HOW PIECE FILE...     prints for each FILE: bytes seconds
 *
 * Several files are read one after another, and then again from the last to the first, and the seconds are the mean of
 * both: a reading takes a tenth of a second, in which neither the order nor a slow moment may decide.
 *
 * PIECE: bytes of one read. HOW: read (from begin to end), direct (the same with O_DIRECT), splice (to /dev/null by a
 * pipe), sendfile (to /dev/null), mmap (a byte of each page), shared and private (all of a mapping, summed up). */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
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
    close(nowhere);
    close(ends[0]);
    close(ends[1]);
    return sum;
}

static uint64_t send_all(int fd, size_t piece)
{
    int nowhere = open("/dev/null", O_WRONLY | O_CLOEXEC);
    uint64_t sum = 0;
    ssize_t n;
    while ((n = sendfile(nowhere, fd, NULL, piece)) > 0)
        sum += (uint64_t)n;
    if (n < 0)
        die("sendfile");
    close(nowhere);
    return sum;
}

/* One copy of it, so that the same instructions sum all mappings up. */
static uint64_t __attribute__((noinline)) sum_up(const uint64_t *at, uint64_t count, uint64_t step)
{
    uint64_t sum = 0;
    for (uint64_t i = 0; i < count; i += step)
        sum += at[i];
    return sum;
}

static uint64_t map_all(int fd, uint64_t size, int flags, uint64_t step)
{
    void *map = mmap(NULL, size, PROT_READ, flags, fd, 0);
    if (map == MAP_FAILED)
        die("mmap");
    uint64_t sum = sum_up(map, size / sizeof(sum), step / sizeof(sum));
    munmap(map, size);
    return sum == 0 ? 0 : size; /* the sum is wanted */
}

static uint64_t run(const char *how, int fd, size_t piece, uint64_t size)
{
    if (strcmp(how, "splice") == 0)
        return splice_all(fd, piece);
    if (strcmp(how, "sendfile") == 0)
        return send_all(fd, piece);
    if (strcmp(how, "mmap") == 0)
        return map_all(fd, size, MAP_SHARED, 4096);
    if (strcmp(how, "shared") == 0)
        return map_all(fd, size, MAP_SHARED, sizeof(uint64_t));
    if (strcmp(how, "private") == 0)
        return map_all(fd, size, MAP_PRIVATE, sizeof(uint64_t));
    return read_all(fd, piece);
}

/* Adds to *bytes and *seconds. */
static void time_one(const char *how, size_t piece, const char *path, uint64_t *bytes,
                     double *seconds)
{
    uint64_t begun = util_now_ns();
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC | (strcmp(how, "direct") == 0 ? O_DIRECT : 0));
    if (fd < 0 || fstat(fd, &st) < 0)
        die(path);
    *bytes += run(how, fd, piece, (uint64_t)st.st_size);
    *seconds += (double)(util_now_ns() - begun) / 1e9;
    close(fd);
}

int main(int argc, char **argv)
{
    size_t piece = argc >= 4 ? strtoul(argv[2], NULL, 10) : 0;
    int files = argc - 3, turns = files > 1 ? 2 : 1;
    uint64_t *bytes = calloc((size_t)argc, sizeof(*bytes));
    double *seconds = calloc((size_t)argc, sizeof(*seconds));
    if (piece == 0 || !bytes || !seconds) {
        fprintf(stderr, "usage: bench_read read|direct|splice|sendfile|mmap|shared|private PIECE "
                        "FILE...\n");
        return 2;
    }
    for (int turn = 0; turn < turns; turn++)
        for (int i = 0; i < files; i++) {
            int at = turn == 0 ? i : files - 1 - i;
            time_one(argv[1], piece, argv[3 + at], &bytes[at], &seconds[at]);
        }
    for (int i = 0; i < files; i++)
        printf("%llu %.6f\n", (unsigned long long)bytes[i] / (unsigned)turns, seconds[i] / turns);
    free(bytes);
    free(seconds);
    return 0;
}
