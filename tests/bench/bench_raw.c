/* The fastest raw way for bytes over loopback TCP: sendfile(2) from a populated file of huge pages to recv(2) into
 * populated huge pages, one process at each end, one thread for each stream, congestion control reno.
 *
 *   bench_raw BYTES
 *
 * A line on stdin, "STREAMS" or "STREAMS verify", is one run and answered by one line on stdout: seconds, CPU seconds of
 * both ends. With "verify" the receiver digests what has come, as p2pfs does. Memory is made and touched once, so that
 * every run finds it as the first did. Ends at the end of stdin. */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine/digest.h"
#include "meta/base/util.h"
#include "tests/bench/bench_memory.h"

#define STREAMS_MAX  8
#define RECV_BYTES   (1u << 20)
#define BUFFER_BYTES (4 << 20)

struct stream {
    pthread_t thread;
    int fd;
    size_t begin, end;
};

static uint64_t bytes;
static int source;
static bool verify;
static uint8_t *source_map, *target_map;

static void die(const char *what)
{
    fprintf(stderr, "bench_raw: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* ---- memory ---- */

/* A word that tells its own place: a run that moved too little, or to a wrong place, shows. */
static uint64_t word_at(uint64_t at)
{
    return (at + 1) * 0x9e3779b97f4a7c15u;
}

static void source_fill(void)
{
    uint64_t *words = (uint64_t *)source_map;
    for (uint64_t i = 0; i < bytes / 8; i++)
        words[i] = word_at(i);
}

static void target_check(void)
{
    uint64_t *words = (uint64_t *)target_map;
    for (uint64_t i = 0; i < bytes / 8; i += 509) {
        if (words[i] != word_at(i)) {
            fprintf(stderr, "bench_raw: wrong bytes at %llu\n", (unsigned long long)i * 8);
            exit(1);
        }
        words[i] = 0;
    }
}

/* ---- the two ends ---- */

static void tune(int fd)
{
    int size = BUFFER_BYTES, one = 1;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(size));
    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size));
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
}

static void *stream_send(void *arg)
{
    struct stream *s = arg;
    for (off_t at = (off_t)s->begin; (size_t)at < s->end;)
        if (sendfile(s->fd, source, &at, s->end - (size_t)at) <= 0)
            die("sendfile");
    return NULL;
}

static void *stream_receive(void *arg)
{
    struct stream *s = arg;
    struct digest_shard digest;
    uint8_t out[MODEL_DIGEST_MAX];
    if (digest_shard_begin(&digest, digest_by_kind(MODEL_XXH3), target_map + s->begin,
                           s->end - s->begin) < 0)
        die("memory");
    for (size_t at = s->begin; at < s->end;) {
        size_t left = s->end - at;
        ssize_t n = recv(s->fd, target_map + at, left < RECV_BYTES ? left : RECV_BYTES, 0);
        if (n <= 0)
            die("recv");
        at += (size_t)n;
        if (verify)
            digest_shard_advance(&digest, at - s->begin);
    }
    if (verify)
        digest_shard_finish(&digest, out);
    digest_shard_clear(&digest);
    return NULL;
}

static void streams_run(struct stream *streams, unsigned count, void *(*run)(void *))
{
    for (unsigned i = 0; i < count; i++) {
        streams[i].begin = bytes / count * i;
        streams[i].end = i + 1 == count ? bytes : bytes / count * (i + 1);
        if (pthread_create(&streams[i].thread, NULL, run, &streams[i]) != 0)
            die("thread");
    }
    for (unsigned i = 0; i < count; i++)
        pthread_join(streams[i].thread, NULL);
}

static double cpu_of(int who)
{
    struct rusage usage;
    getrusage(who, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

static pid_t sender_start(int listener, unsigned count)
{
    pid_t pid = fork();
    if (pid != 0)
        return pid;
    struct stream streams[STREAMS_MAX];
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (unsigned i = 0; i < count; i++) {
        char go;
        streams[i].fd = accept(listener, NULL, NULL);
        if (streams[i].fd < 0 || recv(streams[i].fd, &go, 1, MSG_WAITALL) != 1)
            die("accept");
    }
    streams_run(streams, count, stream_send);
    _exit(0);
}

static void round_run(unsigned count)
{
    struct stream streams[STREAMS_MAX];
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof(own);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    tune(listener); // accepted sockets inherit
    if (bind(listener, (struct sockaddr *)&own, length) < 0 || listen(listener, 16) < 0 ||
        getsockname(listener, (struct sockaddr *)&own, &length) < 0)
        die("listen");
    pid_t pid = sender_start(listener, count);
    for (unsigned i = 0; i < count; i++) {
        streams[i].fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        tune(streams[i].fd);
        if (connect(streams[i].fd, (struct sockaddr *)&own, length) < 0)
            die("connect");
    }
    usleep(20000); // the sender has forked and waits for the word to go
    double cpu = cpu_of(RUSAGE_SELF) + cpu_of(RUSAGE_CHILDREN);
    uint64_t begun = util_now_ns();
    for (unsigned i = 0; i < count; i++)
        if (send(streams[i].fd, "g", 1, 0) != 1)
            die("send");
    streams_run(streams, count, stream_receive);
    double seconds = (double)(util_now_ns() - begun) / 1e9;
    for (unsigned i = 0; i < count; i++)
        close(streams[i].fd);
    close(listener);
    waitpid(pid, NULL, 0);
    cpu = cpu_of(RUSAGE_SELF) + cpu_of(RUSAGE_CHILDREN) - cpu;
    target_check();
    printf("%.6f %.3f\n", seconds, cpu);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    bytes = argc == 2 ? strtoull(argv[1], NULL, 10) / 8 * 8 : 0;
    if (bytes == 0) {
        fprintf(stderr, "usage: bench_raw BYTES\n");
        return 2;
    }
    int target;
    source_map = bench_memory_make(bytes, &source);
    target_map = bench_memory_make(bytes, &target);
    if (!source_map || !target_map)
        die("memory");
    source_fill();
    char line[32];
    while (fgets(line, sizeof(line), stdin)) {
        unsigned count = (unsigned)strtoul(line, NULL, 10);
        if (count < 1 || count > STREAMS_MAX)
            die("a number of streams");
        verify = strstr(line, "verify") != NULL;
        round_run(count);
    }
    return 0;
}
