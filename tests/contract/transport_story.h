/* What the transport suites share: two ends of a link on one loop, what they saw, and shards to pull. */
#ifndef P2PFS_TESTS_TRANSPORT_STORY_H
#define P2PFS_TESTS_TRANSPORT_STORY_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <arpa/inet.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine/loop.h"
#include "engine/transport.h"
#include "engine/transport_mem.h"
#include "meta/base/util.h"

#pragma GCC diagnostic ignored "-Wunused-function" // no suite needs all of it

#define FETCHES 64
#define MS      1000000ull

struct kind {
    const char *transport;
    const char *address; /* to listen on */
    bool epoll;
};

/* One end of a link and what it saw. */
struct side {
    struct link *link;
    int connected, downs, writables, sent;
    int error;
    char reason[256];
    void (*on_message)(struct side *side, const void *bytes, size_t length);
    void (*on_landed)(struct side *side, struct transport_fetch *fetch);
    void (*on_done)(struct side *side, struct transport_fetch *fetch, int status);
    void (*on_connected)(struct side *side);
    void (*on_writable)(struct side *side);
    void (*on_sent)(struct side *side, uint32_t id);
    void (*on_down)(struct side *side);
    size_t messages, bytes;
    struct transport_fetch fetch[FETCHES];
    int done[FETCHES], status[FETCHES]; /* by id */
    int order[FETCHES], finished;
};

static const struct kind *kind;
static const struct transport_ops *ops;
static struct loop *loop;
static struct transport *transport;
static struct transport_config story_config; /* of the next story */
static char address[TRANSPORT_NAME_MAX + 1];
static struct side puller, holder;
static bool refuse_accepted;
static struct transport_region region; /* 64 MiB and a bit of pattern */
static uint8_t *source, *landing;
#define SOURCE_BYTES ((64u << 20) + 4096)

// -- Events ---------------------------------------------------------------------------------------

static struct side *side_of(struct link *link)
{
    assert_non_null(link->user);
    return link->user;
}

static void on_accepted(void *arg, struct link *link)
{
    assert_ptr_equal(arg, &holder);
    assert_false(link->outgoing);
    if (refuse_accepted) {
        ops->shut(link);
        return;
    }
    holder.link = link;
    holder.connected++;
    link->user = &holder;
}

static void on_connected(struct link *link)
{
    struct side *side = side_of(link);
    side->connected++;
    if (side->on_connected)
        side->on_connected(side);
}

static void on_message(struct link *link, const void *message, size_t length)
{
    struct side *side = side_of(link);
    side->messages++;
    side->bytes += length;
    if (side->on_message)
        side->on_message(side, message, length);
}

static void on_landed(struct link *link, struct transport_fetch *fetch)
{
    struct side *side = side_of(link);
    assert_true(fetch->landed <= fetch->length);
    if (side->on_landed)
        side->on_landed(side, fetch);
}

static void on_done(struct link *link, struct transport_fetch *fetch, int status)
{
    struct side *side = side_of(link);
    assert_int_equal(side->downs, 0); // fetches are answered before the link
    side->done[fetch->id]++;
    side->status[fetch->id] = status;
    side->order[side->finished++] = (int)fetch->id;
    if (status == 0)
        assert_int_equal(fetch->landed, fetch->length);
    if (side->on_done)
        side->on_done(side, fetch, status);
}

static void on_sent(struct link *link, uint32_t id)
{
    struct side *side = side_of(link);
    side->sent++;
    if (side->on_sent)
        side->on_sent(side, id);
}

static void on_writable(struct link *link)
{
    struct side *side = side_of(link);
    side->writables++;
    if (side->on_writable)
        side->on_writable(side);
}

static void on_down(struct link *link, int error, const char *reason)
{
    struct side *side = side_of(link);
    side->downs++;
    side->error = error;
    assert_true(error < 0);
    snprintf(side->reason, sizeof(side->reason), "%s", reason);
    if (side->on_down) {
        side->on_down(side);
        return;
    }
    ops->shut(link);
    side->link = NULL;
}

static const struct transport_events events = {
    .accepted = on_accepted,
    .connected = on_connected,
    .message = on_message,
    .fetch_landed = on_landed,
    .fetch_done = on_done,
    .exposed_sent = on_sent,
    .writable = on_writable,
    .down = on_down,
};

// -- Running --------------------------------------------------------------------------------------

static bool (*awaited)(void);
static bool came;
static uint64_t run_until_ns;

static void look(struct loop_timer *timer)
{
    came = awaited();
    if (came || util_now_ns() > run_until_ns)
        loop_stop(loop);
    else
        loop_timer_set(loop, timer, MS / 2);
}

static bool never(void)
{
    return false;
}

/* ms: what a quiet machine needs at most; a busy one, or a sanitizer, gets ten times as much. */
static bool run_until(bool (*condition)(void), unsigned ms)
{
    struct loop_timer timer = {.due = look};
    awaited = condition;
    run_until_ns = util_now_ns() + (condition == never ? 1 : 10) * ms * MS;
    loop_timer_set(loop, &timer, 0);
    loop_run(loop);
    loop_timer_clear(loop, &timer);
    return came;
}

static void run_for(unsigned ms)
{
    run_until(never, ms);
}

static bool both_connected(void)
{
    return puller.connected && holder.connected;
}

static bool puller_down(void)
{
    return puller.downs > 0;
}

static bool holder_down(void)
{
    return holder.downs > 0;
}

static void side_shut(struct side *side)
{
    if (side->link)
        ops->shut(side->link);
    side->link = NULL;
}

static bool both_connected_or_not(void)
{
    return puller_down() || both_connected();
}

static void link_up(void)
{
    assert_int_equal(ops->connect(transport, address, 20000, &puller, &puller.link), 0);
    assert_true(run_until(both_connected_or_not, 2000));
    assert_int_equal(puller.downs, 0);
    assert_true(puller.link->outgoing);
}

static int story_setup(void **state)
{
    kind = *state;
    ops = transport_by_name(kind->transport);
    memset(&puller, 0, sizeof(puller));
    memset(&holder, 0, sizeof(holder));
    refuse_accepted = false;
    transport_mem_faults_set(NULL);
    if (kind->epoll)
        setenv("P2PFS_NO_URING", "1", 1);
    assert_int_equal(loop_open(&loop), 0);
    unsetenv("P2PFS_NO_URING");
    assert_int_equal(ops->open(loop, &story_config, &events, &holder, &transport), 0);
    assert_int_equal(ops->listen(transport, kind->address, address), 0);
    assert_true(address[strlen(address) - 1] != '0' || strlen(address) > strlen(kind->address));
    return 0;
}

static int story_end(void **state)
{
    side_shut(&puller);
    side_shut(&holder);
    ops->close(transport);
    loop_close(loop);
    return 0;
}

static int suite_setup(void **state)
{
    region.fd = memfd_create("source", MFD_CLOEXEC);
    assert_true(region.fd >= 0);
    assert_int_equal(ftruncate(region.fd, SOURCE_BYTES), 0);
    source = mmap(NULL, SOURCE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, region.fd, 0);
    landing = mmap(NULL, SOURCE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(source != MAP_FAILED && landing != MAP_FAILED);
    uint64_t x = 88172645463325252ull;
    for (size_t i = 0; i < SOURCE_BYTES / 8; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        memcpy(source + 8 * i, &x, 8);
    }
    return 0;
}

// -- Shards ---------------------------------------------------------------------------------------

/* The holder's GRANT: 'G', id, offset in the source, length, then the descriptor. */
struct grant {
    char kind;
    uint32_t id;
    uint64_t offset, length;
    struct transport_descriptor descriptor;
};

static void offer(uint32_t id, size_t offset, size_t length, bool urgent)
{
    struct grant g = {.kind = 'G', .id = id, .offset = offset, .length = length};
    struct transport_region part = {
        .fd = region.fd,
        .offset = (off_t)offset,
        .map = id % 2 ? source + offset : NULL,
        .length = length,
    };
    assert_int_equal(ops->expose(holder.link, id, &part, urgent, &g.descriptor), 0);
    assert_int_equal(ops->send(holder.link, &g, sizeof(g)), 0);
}

/* The puller lands every shard where it lies in the source. */
static void take_grant(struct side *side, const void *bytes, size_t length)
{
    struct grant g;
    assert_int_equal(length, sizeof(g));
    memcpy(&g, bytes, sizeof(g));
    assert_int_equal(g.kind, 'G');
    assert_true(g.id < FETCHES);
    struct transport_fetch *f = &side->fetch[g.id];
    *f =
        (struct transport_fetch){.destination = landing + g.offset, .length = g.length, .id = g.id};
    assert_int_equal(ops->fetch(side->link, &g.descriptor, f), 0);
}

static int awaited_fetches;

static bool fetches_finished(void)
{
    return puller.finished >= awaited_fetches;
}

static bool landed_right(size_t offset, size_t length)
{
    return memcmp(landing + offset, source + offset, length) == 0;
}

// -- Telling ---------------------------------------------------------------------------------------

#define STORIES_MAX 64

static struct kind kinds[] = {
    {.transport = "tcp", .address = "127.0.0.1:0"},
    {.transport = "tcp", .address = "127.0.0.1:0", .epoll = true},
    {.transport = "mem", .address = "node:0"},
    {.transport =
         "rdma"}, // its address: P2PFS_RDMA_ADDRESS; without it, on most machines, there is none
};

/* One whose name begins with tcp_, mem_ or rdma_ is told of that transport only. */
struct story {
    const char *name;
    CMUnitTestFunction tell;
};
#define STORY(function) {#function, function}

static CMFixtureFunction story_begin = story_setup;
static CMFixtureFunction story_over = story_end;

static int stories_run(const struct story *stories, size_t count_of_stories, int argc, char **argv)
{
    static struct CMUnitTest tests[util_count(kinds) * STORIES_MAX];
    static char names[util_count(kinds) * STORIES_MAX][128];
    assert_true(count_of_stories <= STORIES_MAX);
    size_t count = 0;
    kinds[util_count(kinds) - 1].address = getenv("P2PFS_RDMA_ADDRESS");
    for (size_t k = 0; k < util_count(kinds); k++)
        for (size_t i = 0; i < count_of_stories; i++) {
            const char *story = stories[i].name, *only = kinds[k].transport;
            bool of_one = strncmp(story, "tcp_", 4) == 0 || strncmp(story, "mem_", 4) == 0 ||
                          strncmp(story, "rdma_", 5) == 0;
            if (!kinds[k].address || (of_one && strncmp(story, only, 3) != 0))
                continue;
            snprintf(names[count], sizeof(names[count]), "%s%s: %s", only,
                     kinds[k].epoll ? " (epoll)" : "", story);
            tests[count] = (struct CMUnitTest){names[count], stories[i].tell, story_begin,
                                               story_over, &kinds[k]};
            count++;
        }
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    return _cmocka_run_group_tests("transport", tests, count, suite_setup, NULL);
}

#endif
