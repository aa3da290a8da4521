/* How fast a transport pulls, beside the fastest raw way in the same run: sendfile(2) to recv(2), populated huge pages
 * at both ends, two processes. Prints one line per method, GB/s, medians.
 *
 *   bench_transport [-m MiB] [-l links] [-f fetches in flight per link] [-s shard MiB] [-r rounds] */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine/digest.h"
#include "engine/loop.h"
#include "engine/transport.h"
#include "meta/base/util.h"

#define LINKS_MAX   16
#define FETCHES_MAX 64
#define ROUNDS_MAX  99

static size_t bytes = 2048ull << 20, shard = 8u << 20;
static unsigned links = 2, in_flight = 4, rounds = 5;
static const struct digest_ops *digest; /* NULL: none */
static int source = -1;
static uint8_t *source_map, *target_map;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static int huge_file(void)
{
    int fs = fsopen("tmpfs", FSOPEN_CLOEXEC), fd = -1;
    if (fs >= 0) {
        fsconfig(fs, FSCONFIG_SET_STRING, "huge", "always", 0);
        fsconfig(fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0);
        int mnt = fsmount(fs, FSMOUNT_CLOEXEC, 0);
        if (mnt >= 0) {
            fd = openat(mnt, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
            close(mnt);
        }
        close(fs);
    }
    if (fd < 0) {
        fprintf(stderr, "no huge tmpfs here: 4 KiB pages\n");
        fd = memfd_create("bench", MFD_CLOEXEC);
    }
    return fd;
}

static uint8_t *file_map(int fd)
{
    if (fd < 0 || ftruncate(fd, (off_t)bytes) < 0)
        die("file");
    uint8_t *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED)
        die("mmap");
    memset(map, 1, bytes);
    return map;
}

// -- Raw ------------------------------------------------------------------------------------------

struct stream {
    pthread_t thread;
    int fd;
    size_t begin, end;
};

static void *raw_send(void *arg)
{
    struct stream *s = arg;
    for (off_t at = (off_t)s->begin; (size_t)at < s->end;)
        if (sendfile(s->fd, source, &at, s->end - (size_t)at) <= 0)
            die("sendfile");
    return NULL;
}

static void *raw_receive(void *arg)
{
    struct stream *s = arg;
    for (size_t at = s->begin; at < s->end;) {
        size_t left = s->end - at;
        ssize_t n = recv(s->fd, target_map + at, left < (1 << 20) ? left : 1 << 20, 0);
        if (n <= 0)
            die("recv");
        at += (size_t)n;
    }
    return NULL;
}

static void raw_tune(int fd)
{
    int size = 4 << 20;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(size));
    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size));
    setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
}

static void raw_streams(struct stream *streams, void *(*run)(void *))
{
    for (unsigned i = 0; i < links; i++) {
        streams[i].begin = bytes / links * i;
        streams[i].end = i + 1 == links ? bytes : bytes / links * (i + 1);
        pthread_create(&streams[i].thread, NULL, run, &streams[i]);
    }
    for (unsigned i = 0; i < links; i++)
        pthread_join(streams[i].thread, NULL);
}

static double raw_round(void)
{
    struct stream streams[LINKS_MAX] = {{.fd = -1}};
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in own = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof(own);
    if (listener < 0)
        die("socket");
    raw_tune(listener);
    if (bind(listener, (struct sockaddr *)&own, length) < 0 || listen(listener, 16) < 0 ||
        getsockname(listener, (struct sockaddr *)&own, &length) < 0)
        die("listen");
    pid_t pid = fork();
    if (pid == 0) {
        for (unsigned i = 0; i < links; i++)
            streams[i].fd = accept(listener, NULL, NULL);
        raw_streams(streams, raw_send);
        _exit(0);
    }
    for (unsigned i = 0; i < links; i++) {
        streams[i].fd = socket(AF_INET, SOCK_STREAM, 0);
        if (streams[i].fd < 0)
            die("socket");
        raw_tune(streams[i].fd);
        if (connect(streams[i].fd, (struct sockaddr *)&own, length) < 0)
            die("connect");
    }
    uint64_t begun = util_now_ns();
    raw_streams(streams, raw_receive);
    double seconds = (double)(util_now_ns() - begun) / 1e9;
    for (unsigned i = 0; i < links; i++)
        close(streams[i].fd);
    close(listener);
    waitpid(pid, NULL, 0);
    return (double)bytes / 1e9 / seconds;
}

// -- By the transport -----------------------------------------------------------------------------

struct grant {
    uint32_t id;
    struct transport_descriptor descriptor;
};

struct lane {
    struct loop *loop;
    struct transport *transport;
    pthread_t thread;
    struct link *link;
    unsigned open;
    struct fetching {
        struct transport_fetch fetch;
        struct digest_shard digest;
    } fetching[FETCHES_MAX];
};

static struct lane lanes[LINKS_MAX];
static atomic_uint next_shard, next_lane, finished_lanes;
static uint32_t shards;

static size_t shard_length(uint32_t k)
{
    return k + 1 == shards ? bytes - (size_t)k * shard : shard;
}

static void holder_message(struct link *link, const void *message, size_t length)
{
    uint32_t words[2]; // id, 0: ASK, 1: DONE
    if (length != sizeof(words))
        abort();
    memcpy(words, message, sizeof(words));
    if (words[1]) {
        transport_tcp.unexpose(link, words[0]);
        return;
    }
    uint32_t k = words[0] - 1;
    struct grant g = {.id = words[0]};
    struct transport_region region = {.fd = source,
                                      .offset = (off_t)((size_t)k * shard),
                                      .map = source_map + (size_t)k * shard,
                                      .length = shard_length(k)};
    if (transport_tcp.expose(link, g.id, &region, false, &g.descriptor) < 0 ||
        transport_tcp.send(link, &g, sizeof(g)) < 0)
        abort();
}

static void lane_say(struct lane *lane, uint32_t id, uint32_t done)
{
    uint32_t words[2] = {id, done};
    if (transport_tcp.send(lane->link, words, sizeof(words)) < 0)
        abort();
}

static void lane_ask(struct lane *lane)
{
    uint32_t k = atomic_fetch_add(&next_shard, 1);
    if (k < shards) {
        lane->open++;
        lane_say(lane, k + 1, 0);
    } else if (lane->open == 0) {
        atomic_fetch_add(&finished_lanes, 1);
        loop_stop(lane->loop);
    }
}

static void puller_connected(struct link *link)
{
    struct lane *lane = link->user;
    for (unsigned i = 0; i < in_flight; i++)
        lane_ask(lane);
}

static void puller_message(struct link *link, const void *message, size_t length)
{
    struct lane *lane = link->user;
    struct grant g;
    if (length != sizeof(g))
        abort();
    memcpy(&g, message, sizeof(g));
    struct fetching *f = lane->fetching;
    while (f->fetch.id)
        f++;
    uint32_t k = g.id - 1;
    f->fetch = (struct transport_fetch){
        .destination = target_map + (size_t)k * shard, .length = shard_length(k), .id = g.id};
    if (digest && digest_shard_begin(&f->digest, digest, f->fetch.destination, f->fetch.length) < 0)
        abort();
    if (transport_tcp.fetch(link, &g.descriptor, &f->fetch) < 0)
        abort();
}

static void puller_landed(struct link *link, struct transport_fetch *fetch)
{
    (void)link;
    if (digest)
        digest_shard_advance(&util_container(fetch, struct fetching, fetch)->digest, fetch->landed);
}

static void puller_done(struct link *link, struct transport_fetch *fetch, int status)
{
    struct lane *lane = link->user;
    struct fetching *f = util_container(fetch, struct fetching, fetch);
    uint8_t out[MODEL_DIGEST_MAX];
    if (status < 0)
        abort();
    if (digest) {
        digest_shard_finish(&f->digest, out);
        digest_shard_clear(&f->digest);
    }
    lane_say(lane, fetch->id, 1);
    fetch->id = 0;
    lane->open--;
    lane_ask(lane);
}

static void any_accepted(void *arg, struct link *link)
{
    (void)arg;
    (void)link;
}

static void any_sent(struct link *link, uint32_t id)
{
    (void)link;
    (void)id;
}

static void any_down(struct link *link, int error, const char *reason)
{
    (void)error;
    if (link->outgoing) {
        fprintf(stderr, "link down: %s\n", reason);
        exit(1);
    }
    transport_tcp.shut(link);
}

static const struct transport_events holder_events = {
    .accepted = any_accepted,
    .message = holder_message,
    .exposed_sent = any_sent,
    .down = any_down,
};
static const struct transport_events puller_events = {
    .connected = puller_connected,
    .message = puller_message,
    .fetch_landed = puller_landed,
    .fetch_done = puller_done,
    .down = any_down,
};

static void *lane_run(void *arg)
{
    loop_run(((struct lane *)arg)->loop);
    return NULL;
}

static struct transport *lane_next(void *arg)
{
    (void)arg;
    return lanes[atomic_fetch_add(&next_lane, 1) % links].transport;
}

static void lanes_open(const struct transport_events *events)
{
    memset(lanes, 0, sizeof(lanes));
    for (unsigned i = 0; i < links; i++)
        if (loop_open(&lanes[i].loop) < 0 ||
            transport_tcp.open(lanes[i].loop, NULL, events, &lanes[i], &lanes[i].transport) < 0)
            die("open");
}

static void holder_process(int report)
{
    char bound[TRANSPORT_NAME_MAX + 1] = "";
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    lanes_open(&holder_events);
    if (transport_tcp.listen(lanes[0].transport, "127.0.0.1:0", bound) < 0)
        die("listen");
    transport_tcp.share(lanes[0].transport, lane_next, NULL);
    for (unsigned i = 0; i < links; i++)
        pthread_create(&lanes[i].thread, NULL, lane_run, &lanes[i]);
    if (write(report, bound, sizeof(bound)) != sizeof(bound))
        die("pipe");
    pause();
    _exit(0);
}

static double transport_round(void)
{
    char address[TRANSPORT_NAME_MAX + 1];
    int report[2];
    next_shard = next_lane = finished_lanes = 0;
    if (pipe(report) < 0)
        die("pipe");
    pid_t pid = fork();
    if (pid == 0)
        holder_process(report[1]);
    if (read(report[0], address, sizeof(address)) != sizeof(address))
        die("pipe");
    lanes_open(&puller_events);
    for (unsigned i = 0; i < links; i++)
        if (transport_tcp.connect(lanes[i].transport, address, 5000, &lanes[i], &lanes[i].link) < 0)
            die("connect");
    uint64_t begun = util_now_ns();
    for (unsigned i = 0; i < links; i++)
        pthread_create(&lanes[i].thread, NULL, lane_run, &lanes[i]);
    for (unsigned i = 0; i < links; i++)
        pthread_join(lanes[i].thread, NULL);
    double seconds = (double)(util_now_ns() - begun) / 1e9;
    for (unsigned i = 0; i < links; i++) {
        transport_tcp.shut(lanes[i].link);
        transport_tcp.close(lanes[i].transport);
        loop_close(lanes[i].loop);
    }
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    close(report[0]);
    close(report[1]);
    return (double)bytes / 1e9 / seconds;
}

// -- Main -----------------------------------------------------------------------------------------

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values)
{
    qsort(values, rounds, sizeof(*values), ascending);
    return values[rounds / 2];
}

static unsigned long number(const char *text, unsigned long most)
{
    unsigned long v = strtoul(text, NULL, 10);
    if (v < 1 || v > most) {
        fprintf(stderr, "a number from 1 to %lu, not %s\n", most, text);
        exit(2);
    }
    return v;
}

int main(int argc, char **argv)
{
    for (int c; (c = getopt(argc, argv, "m:l:f:s:r:")) != -1;)
        switch (c) {
        case 'm':
            bytes = number(optarg, 1 << 20) << 20;
            break;
        case 'l':
            links = (unsigned)number(optarg, LINKS_MAX);
            break;
        case 'f':
            in_flight = (unsigned)number(optarg, FETCHES_MAX);
            break;
        case 's':
            shard = number(optarg, 1024) << 20;
            break;
        case 'r':
            rounds = (unsigned)number(optarg, ROUNDS_MAX);
            break;
        default:
            return 2;
        }
    shards = (uint32_t)((bytes + shard - 1) / shard);
    source = huge_file();
    source_map = file_map(source);
    for (size_t i = 0; i < bytes / 8; i++)
        memcpy(source_map + 8 * i, &(uint64_t){i * 0x9e3779b97f4a7c15ull}, 8);
    target_map = file_map(huge_file());

    static double raw[ROUNDS_MAX], plain[ROUNDS_MAX], hashed[ROUNDS_MAX];
    for (unsigned i = 0; i < rounds; i++) {
        raw[i] = raw_round();
        digest = NULL;
        plain[i] = transport_round();
        digest = digest_by_kind(MODEL_XXH3);
        hashed[i] = transport_round();
        fprintf(stderr, "round %u: raw %.2f, transport %.2f, with xxh3 %.2f GB/s\n", i + 1, raw[i],
                plain[i], hashed[i]);
    }
    if (memcmp(source_map, target_map, bytes) != 0) {
        fprintf(stderr, "the bytes differ\n");
        return 1;
    }
    double r = median(raw), p = median(plain), h = median(hashed);
    printf("raw sendfile/recv  %6.2f GB/s\n", r);
    printf("transport          %6.2f GB/s  %.2f of raw\n", p, p / r);
    printf("transport + xxh3   %6.2f GB/s  %.2f of raw\n", h, h / r);
    return 0;
}
