/* What every transport promises, told over each of them: transport.h read aloud. */
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

static bool run_until(bool (*condition)(void), unsigned ms)
{
    struct loop_timer timer = {.due = look};
    awaited = condition;
    run_until_ns = util_now_ns() + ms * MS;
    loop_timer_set(loop, &timer, 0);
    loop_run(loop);
    loop_timer_clear(loop, &timer);
    return came;
}

static bool never(void)
{
    return false;
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

static void link_up(void)
{
    assert_int_equal(ops->connect(transport, address, 2000, &puller, &puller.link), 0);
    assert_true(run_until(both_connected, 2000));
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
    assert_int_equal(ops->open(loop, NULL, &events, &holder, &transport), 0);
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

// -- Stories of all transports --------------------------------------------------------------------

static void a_connection_is_made_and_ends(void **state)
{
    link_up();
    assert_true(puller.link->peer[0] && holder.link->peer[0]);
    side_shut(&puller);
    assert_true(run_until(holder_down, 2000));
    assert_int_equal(holder.downs, 1);
    assert_int_equal(puller.downs, 0); // who shuts hears nothing
}

static void nobody_listens(void **state)
{
    const char *nowhere = strcmp(kind->transport, "tcp") == 0 ? "127.0.0.1:1" : "nowhere:1";
    assert_int_equal(ops->connect(transport, nowhere, 1000, &puller, &puller.link), 0);
    assert_int_equal(puller.downs, 0); // not inside the call
    assert_true(run_until(puller_down, 1500));
    assert_int_equal(puller.error, -ECONNREFUSED);
    assert_int_equal(puller.connected, 0);
}

static void an_address_in_use_is_refused(void **state)
{
    struct transport *second;
    char bound[TRANSPORT_NAME_MAX + 1];
    assert_int_equal(ops->open(loop, NULL, &events, &holder, &second), 0);
    assert_int_equal(ops->listen(second, address, bound), -EADDRINUSE);
    ops->close(second);
}

static void the_holder_shuts_at_once(void **state)
{
    refuse_accepted = true;
    assert_int_equal(ops->connect(transport, address, 1000, &puller, &puller.link), 0);
    assert_true(run_until(puller_down, 2000));
}

static size_t size_of_message(size_t i)
{
    static const size_t sizes[] = {0, 1, 19, 20, 21, 4095, 4096, 16385, 65535, 65536};
    return i < util_count(sizes) ? sizes[i] : (i * 2654435761u) % 3000;
}

static void check_message(struct side *side, const void *bytes, size_t length)
{
    size_t i = side->messages - 1;
    assert_int_equal(length, size_of_message(i));
    assert_memory_equal(bytes, source + i, length);
}

static size_t awaited_messages;

static bool all_messages(void)
{
    return holder.messages == awaited_messages && puller.messages == awaited_messages;
}

struct flood {
    struct side *side;
    size_t next;
};
static struct flood floods[2];

static void flood_on(struct side *side)
{
    struct flood *f = &floods[side == &holder];
    while (f->next < awaited_messages) {
        int r = ops->send(side->link, source + f->next, size_of_message(f->next));
        if (r == -EAGAIN)
            return;
        assert_int_equal(r, 0);
        f->next++;
    }
}

static void ten_thousand_messages_both_ways_whole_and_in_order(void **state)
{
    link_up();
    memset(floods, 0, sizeof(floods));
    awaited_messages = 10000;
    puller.on_message = holder.on_message = check_message;
    puller.on_writable = holder.on_writable = flood_on;
    flood_on(&puller);
    flood_on(&holder);
    assert_int_equal(holder.messages, 0); // not inside the call
    assert_true(run_until(all_messages, 30000));
    assert_int_equal(puller.downs + holder.downs, 0);
}

static void a_message_too_long_is_refused(void **state)
{
    link_up();
    assert_int_equal(ops->send(puller.link, source, TRANSPORT_MESSAGE_MAX + 1), -EMSGSIZE);
    assert_int_equal(ops->send(puller.link, source, TRANSPORT_MESSAGE_MAX), 0);
}

static size_t kept;

static bool all_kept_arrived(void)
{
    return holder.messages == kept && puller.writables > 0;
}

static void a_full_queue_says_so_and_then_is_writable(void **state)
{
    link_up();
    kept = 0;
    int r;
    while ((r = ops->send(puller.link, source, 60000)) == 0) {
        kept++;
        assert_true(kept * 60000 <= (8u << 20)); // bounded
    }
    assert_int_equal(r, -EAGAIN);
    assert_int_equal(puller.writables, 0);
    assert_true(run_until(all_kept_arrived, 10000));
    assert_int_equal(puller.writables, 1);
    assert_int_equal(holder.bytes, kept * 60000); // what was refused never comes
}

static void shards_of_all_sizes_land(void **state)
{
    static const size_t sizes[] = {1,        2,        4095,           4097,
                                   65536,    1u << 20, (1u << 20) + 1, (3u << 20) - 7,
                                   8u << 20, 13000001, 64u << 20};
    link_up();
    puller.on_message = take_grant;
    memset(landing, 0, SOURCE_BYTES);
    for (uint32_t i = 0; i < util_count(sizes); i++) {
        size_t offset = i * 321;
        awaited_fetches = (int)i + 1;
        offer(i, offset, sizes[i], false);
        assert_true(run_until(fetches_finished, 20000));
        assert_int_equal(puller.status[i], 0);
        assert_true(landed_right(offset, sizes[i]));
        assert_int_equal(holder.sent, i + 1);
        ops->unexpose(holder.link, i);
    }
    assert_int_equal(landing[(64u << 20) + 321 * util_count(sizes)], 0); // not a byte too far
    assert_true(puller.link->received >= (64u << 20) && holder.link->sent == puller.link->received);
}

static void many_shards_at_once_and_the_urgent_one_is_not_last(void **state)
{
    enum { COUNT = 16, URGENT = 16 };
    link_up();
    puller.on_message = take_grant;
    memset(landing, 0, SOURCE_BYTES);
    for (uint32_t i = 0; i < COUNT; i++)
        offer(i, (size_t)i * 3500001, 3500001, false);
    offer(URGENT, (size_t)COUNT * 3500001, 1500001, true);
    awaited_fetches = COUNT + 1;
    assert_true(run_until(fetches_finished, 20000));
    for (int i = 0; i <= COUNT; i++) {
        assert_int_equal(puller.done[i], 1);
        assert_int_equal(puller.status[i], 0);
    }
    assert_int_equal(puller.order[0], URGENT);
    assert_true(landed_right(0, (size_t)COUNT * 3500001 + 1500001));
}

static void messages_go_between_the_bytes_of_a_shard(void **state)
{
    link_up();
    puller.on_message = take_grant;
    offer(1, 0, 64u << 20, false);
    while (puller.messages < 1)
        run_for(1);
    puller.on_message = NULL;
    assert_int_equal(puller.finished, 0);
    assert_int_equal(ops->send(holder.link, "hello", 5), 0);
    awaited_fetches = 1;
    while (puller.messages < 2 && puller.finished == 0)
        run_for(1);
    assert_int_equal(puller.finished, 0);
    assert_true(run_until(fetches_finished, 20000));
}

static size_t cancel_at;

static void cancel_on_landed(struct side *side, struct transport_fetch *fetch)
{
    if (fetch->id != 1 || fetch->landed < cancel_at)
        return;
    ops->cancel(side->link, fetch);
    memset(landing, 0x77, 32u << 20);
    side->on_landed = NULL;
}

static void a_cancelled_fetch_touches_nothing_more(void **state)
{
    link_up();
    puller.on_message = take_grant;
    puller.on_landed = cancel_on_landed;
    cancel_at = 3u << 20;
    offer(1, 0, 32u << 20, false);
    offer(2, 32u << 20, 5000000, false);
    awaited_fetches = 1;
    assert_true(run_until(fetches_finished, 20000));
    run_for(200);
    ops->unexpose(holder.link, 1);
    run_for(50);
    assert_int_equal(puller.done[1], 0); // no fetch_done after cancel
    assert_int_equal(puller.done[2], 1);
    assert_int_equal(puller.status[2], 0);
    assert_true(landed_right(32u << 20, 5000000));
    for (size_t i = 0; i < (32u << 20); i += 512)
        assert_int_equal(landing[i], 0x77);
    // the link is as good as before
    offer(3, 100, 999, false);
    awaited_fetches = 2;
    assert_true(run_until(fetches_finished, 5000));
    assert_true(landed_right(100, 999));
}

static void unexpose_on_landed(struct side *side, struct transport_fetch *fetch)
{
    if (fetch->id != 1 || fetch->landed < (2u << 20))
        return;
    side->on_landed = NULL;
    ops->unexpose(holder.link, 1);
}

static void a_region_taken_back_fails_the_fetch_and_not_the_link(void **state)
{
    link_up();
    puller.on_message = take_grant;
    puller.on_landed = unexpose_on_landed;
    offer(1, 0, 60u << 20, false);
    awaited_fetches = 1;
    assert_true(run_until(fetches_finished, 20000));
    assert_int_equal(puller.status[1], -EIO);
    assert_int_equal(puller.done[1], 1);
    puller.on_landed = NULL;
    offer(2, 77, 3000000, false);
    awaited_fetches = 2;
    assert_true(run_until(fetches_finished, 20000));
    assert_int_equal(puller.status[2], 0);
    assert_true(landed_right(77, 3000000));
    assert_int_equal(puller.downs + holder.downs, 0);
}

static void holder_shuts_on_landed(struct side *side, struct transport_fetch *fetch)
{
    side->on_landed = NULL;
    side_shut(&holder);
}

static void a_link_that_goes_answers_every_fetch_once(void **state)
{
    link_up();
    puller.on_message = take_grant;
    puller.on_landed = holder_shuts_on_landed;
    for (uint32_t i = 0; i < 8; i++)
        offer(i, (size_t)i * (8u << 20), 8u << 20, false);
    // GRANTs go before bytes, so all eight fetches are under way when the first byte lands
    assert_true(run_until(puller_down, 5000));
    assert_int_equal(puller.downs, 1);
    assert_int_equal(puller.finished, 8);
    for (int i = 0; i < 8; i++) {
        assert_int_equal(puller.done[i], 1);
        assert_true(puller.status[i] < 0);
    }
    run_for(20);
    assert_int_equal(puller.finished, 8);
}

static void wrong_descriptors_are_refused(void **state)
{
    link_up();
    struct transport_descriptor d = {.length = 5, .bytes = "TMabc"};
    struct transport_fetch f = {.destination = landing, .length = 10, .id = 1};
    assert_true(ops->fetch(puller.link, &d, &f) < 0);
    struct transport_region part = {.fd = region.fd, .map = source, .length = 100};
    assert_int_equal(ops->expose(holder.link, 1, &part, false, &d), 0);
    assert_int_equal(ops->expose(holder.link, 1, &part, false, &d), -EEXIST);
    f.length = 101; // more than what is granted
    assert_true(ops->fetch(puller.link, &d, &f) < 0);
    ops->unexpose(holder.link, 1);
    ops->unexpose(holder.link, 1); // harmless
    ops->cancel(puller.link, &f);  // so is this: it never began
}

// Shut from inside each event.

static bool nobody(void)
{
    return !puller.link && !holder.link;
}

static void shut_connected(struct side *side)
{
    side_shut(side);
}

static void shut_message(struct side *side, const void *bytes, size_t length)
{
    char copy[64];
    side_shut(side);
    memcpy(copy, bytes, length < 64 ? length : 64); // still borrowed
    assert_memory_equal(copy, source, length < 64 ? length : 64);
}

static void shut_fetch(struct side *side, struct transport_fetch *fetch)
{
    side_shut(side);
}

static void shut_done(struct side *side, struct transport_fetch *fetch, int status)
{
    side_shut(side);
}

static void shut_sent(struct side *side, uint32_t id)
{
    side_shut(side);
}

static void shut_inside_every_event(void **state)
{
    for (int event = 0; event < 7; event++) {
        memset(&puller, 0, sizeof(puller));
        memset(&holder, 0, sizeof(holder));
        if (event == 0)
            puller.on_connected = shut_connected;
        assert_int_equal(ops->connect(transport, address, 2000, &puller, &puller.link), 0);
        if (event == 0) {
            assert_true(run_until(nobody, 2000));
            continue;
        }
        assert_true(run_until(both_connected, 2000));
        puller.on_message = take_grant;
        switch (event) {
        case 1:
            puller.on_message = shut_message;
            for (int i = 0; i < 5; i++)
                assert_int_equal(ops->send(holder.link, source, 3000), 0);
            break;
        case 2:
            puller.on_landed = shut_fetch;
            offer(1, 0, 5u << 20, false);
            offer(2, 0, 5u << 20, false);
            break;
        case 3:
            puller.on_done = shut_done;
            offer(1, 0, 100, false);
            offer(2, 0, 5u << 20, false);
            break;
        case 4:
            holder.on_sent = shut_sent;
            offer(1, 0, 100, false);
            offer(2, 0, 5u << 20, false);
            break;
        case 5:
            puller.on_writable = shut_connected;
            while (ops->send(puller.link, source, 60000) == 0)
                ;
            break;
        case 6: // a fetch that the link's end answers
            puller.on_done = shut_done;
            puller.on_landed = holder_shuts_on_landed;
            for (uint32_t i = 0; i < 4; i++)
                offer(i, 0, 5u << 20, false);
            break;
        }
        assert_true(run_until(nobody, 5000));
        assert_true(puller.downs + holder.downs <= 1);
    }
}

// -- Lanes: connections shared between threads -----------------------------------------------------

struct lane {
    struct loop *loop;
    struct transport *transport;
    pthread_t thread;
    atomic_int accepted;
    atomic_int echoed;
};
static struct lane lanes[2];
static atomic_uint turn;

static void lane_accepted(void *arg, struct link *link)
{
    struct lane *lane = arg;
    assert_true(loop_here(lane->loop));
    assert_ptr_equal(link->transport, lane->transport);
    atomic_fetch_add(&lane->accepted, 1);
    link->user = lane;
}

static void lane_message(struct link *link, const void *message, size_t length)
{
    struct lane *lane = link->user;
    atomic_fetch_add(&lane->echoed, 1);
    assert_int_equal(ops->send(link, message, length), 0);
}

static void lane_down(struct link *link, int error, const char *reason)
{
    ops->shut(link);
}

static const struct transport_events lane_events = {
    .accepted = lane_accepted,
    .message = lane_message,
    .down = lane_down,
};

static struct transport *lane_next(void *arg)
{
    return lanes[atomic_fetch_add(&turn, 1) % 2].transport;
}

static void *lane_run(void *arg)
{
    loop_run(((struct lane *)arg)->loop);
    return NULL;
}

static struct side callers[4];

static bool callers_connected(void)
{
    return callers[0].connected && callers[1].connected && callers[2].connected &&
           callers[3].connected;
}

static bool callers_answered(void)
{
    return callers[0].messages == 50 && callers[1].messages == 50 && callers[2].messages == 50 &&
           callers[3].messages == 50;
}

static void connections_are_shared_between_lanes(void **state)
{
    char bound[TRANSPORT_NAME_MAX + 1];
    memset(callers, 0, sizeof(callers));
    for (int i = 0; i < 2; i++) {
        lanes[i].accepted = lanes[i].echoed = 0;
        assert_int_equal(loop_open(&lanes[i].loop), 0);
        assert_int_equal(
            ops->open(lanes[i].loop, NULL, &lane_events, &lanes[i], &lanes[i].transport), 0);
    }
    assert_int_equal(ops->listen(lanes[0].transport, kind->address, bound), 0);
    ops->share(lanes[0].transport, lane_next, NULL);
    for (int i = 0; i < 2; i++)
        pthread_create(&lanes[i].thread, NULL, lane_run, &lanes[i]);
    for (int i = 0; i < 4; i++)
        assert_int_equal(ops->connect(transport, bound, 2000, &callers[i], &callers[i].link), 0);
    assert_true(run_until(callers_connected, 2000));
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 50; k++)
            assert_int_equal(ops->send(callers[i].link, source + k, 100), 0);
    assert_true(run_until(callers_answered, 5000));
    for (int i = 0; i < 4; i++)
        side_shut(&callers[i]);
    run_for(20);
    for (int i = 0; i < 2; i++) {
        loop_stop(lanes[i].loop);
        pthread_join(lanes[i].thread, NULL);
    }
    for (int i = 0; i < 2; i++) {
        assert_int_equal(lanes[i].accepted, 2);
        assert_int_equal(lanes[i].echoed, 100);
        ops->close(lanes[i].transport);
        loop_close(lanes[i].loop);
    }
}

// -- TCP: peers that misbehave ---------------------------------------------------------------------

static int raw_connect(void)
{
    struct sockaddr_in to = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)atoi(strrchr(address, ':') + 1)),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&to, sizeof(to)), 0);
    return fd;
}

static const char good_preface[] = "p2pftcp1";

static void tcp_garbage_ends_the_link_with_a_phrase(void **state)
{
    static const struct {
        const char *bytes;
        size_t length;
        const char *phrase;
    } garbage[] = {
        {"GET / HTTP/1.1\r\n\r\n", 18, "HTTP"},
        {"\x16\x03\x01\x02\x00\x01\x00", 7, "TLS"},
        {"SSH-2.0-OpenSSH_9", 17, "does not speak p2pfs"},
        {"p2pftcp9", 8, "another version"},
        {"p2pftcp1\0\x9\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 28, "unknown kind"},
        {"p2pftcp1\0\x1\0\0\0\0\0\0\xff\xff\xff\xff\0\0\0\0\0\0\0\0", 28, "message of"},
        {"p2pftcp1\0\x2\0\0\0\0\0\7\x7f\xff\xff\xff\0\0\0\0\0\0\0\0", 28, "slice of"},
        {"p2pftcp1\0\x3\0\0\0\0\0\7\0\0\0\x9\0\0\0\0\0\0\0\0", 28, "malformed"},
        {"p2pftcp1", 8, "closed"},
        {"", 0, "before it said anything"},
    };
    for (size_t i = 0; i < util_count(garbage); i++) {
        memset(&holder, 0, sizeof(holder));
        int fd = raw_connect();
        if (garbage[i].length > 0)
            assert_int_equal(send(fd, garbage[i].bytes, garbage[i].length, 0), garbage[i].length);
        shutdown(fd, SHUT_WR);
        assert_true(run_until(holder_down, 2000));
        assert_non_null(strstr(holder.reason, garbage[i].phrase));
        close(fd);
    }
}

static bool holder_accepted(void)
{
    return holder.connected > 0;
}

static void tcp_bytes_outside_of_a_fetch_end_the_link(void **state)
{
    int fd = raw_connect();
    assert_true(run_until(holder_accepted, 2000));
    // the raw peer plays the holder: a DATA frame for id 5 that begins where nothing was asked
    struct transport_descriptor d = {.length = 13,
                                     .bytes = {'T', 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 100}};
    struct transport_fetch f = {.destination = landing, .length = 100, .id = 5};
    memset(landing, 0x55, 200);
    assert_int_equal(ops->fetch(holder.link, &d, &f), 0);
    uint8_t frame[8 + 20 + 50] = "p2pftcp1\0\2\0\0\0\0\0\5\0\0\0\62\0\0\0\0\0\0\0\74";
    assert_int_equal(send(fd, frame, sizeof(frame), 0), sizeof(frame));
    assert_true(run_until(holder_down, 2000));
    assert_int_equal(holder.done[5], 1);
    assert_int_equal(holder.status[5], -EPROTO);
    for (int i = 0; i < 200; i++)
        assert_int_equal(landing[i], 0x55);
    close(fd);
}

static void tcp_half_a_frame_then_silence_holds_nothing_up(void **state)
{
    int fd = raw_connect();
    assert_int_equal(send(fd, good_preface, 8, 0), 8);
    assert_int_equal(send(fd, "\0\1\0\0\0\0\0\0\0\0\1", 11, 0), 11);
    assert_true(run_until(holder_accepted, 2000));
    run_for(50);
    assert_int_equal(holder.downs + (int)holder.messages, 0);
    struct side silent = holder;
    link_up(); // others are served
    assert_int_equal(ops->send(puller.link, "x", 1), 0);
    run_for(50);
    assert_int_equal(holder.messages, 1);
    ops->shut(silent.link);
    close(fd);
}

/* A holder in a process of its own that offers 64 MiB and then does nothing but serve. */
static pid_t fork_holder(void)
{
    int p[2];
    assert_int_equal(pipe(p), 0);
    pid_t pid = fork();
    if (pid == 0) {
        struct loop *own;
        alarm(60);
        if (loop_open(&own) < 0)
            _exit(1);
        loop = own;
        if (ops->open(own, NULL, &events, &holder, &transport) < 0 ||
            ops->listen(transport, kind->address, address) < 0)
            _exit(1);
        if (write(p[1], address, sizeof(address)) != sizeof(address))
            _exit(1);
        run_until(holder_accepted, 10000);
        offer(1, 0, 64u << 20, false);
        run_for(60000);
        _exit(0);
    }
    assert_int_equal(read(p[0], address, sizeof(address)), sizeof(address));
    close(p[0]);
    close(p[1]);
    return pid;
}

static pid_t holder_pid;
static int holder_signal;

static void signal_on_landed(struct side *side, struct transport_fetch *fetch)
{
    side->on_landed = NULL;
    kill(holder_pid, holder_signal);
}

static bool puller_connected(void)
{
    return puller.connected;
}

static bool landing_begun(void)
{
    return puller.on_landed == NULL;
}

static void pull_from_process(int signal)
{
    holder_pid = fork_holder();
    holder_signal = signal;
    puller.on_message = take_grant;
    puller.on_landed = signal_on_landed;
    assert_int_equal(ops->connect(transport, address, 2000, &puller, &puller.link), 0);
    assert_true(run_until(puller_connected, 2000));
    assert_true(run_until(landing_begun, 5000));
}

static void tcp_a_killed_holder_fails_the_fetch_at_once(void **state)
{
    pull_from_process(SIGKILL);
    uint64_t begun = util_now_ns();
    assert_true(run_until(puller_down, 5000));
    assert_true(util_now_ns() - begun < 2000 * MS);
    assert_int_equal(puller.done[1], 1);
    assert_true(puller.status[1] < 0);
    waitpid(holder_pid, NULL, 0);
}

static void tcp_a_stopped_holder_holds_nothing_up(void **state)
{
    pull_from_process(SIGSTOP);
    run_for(300);
    size_t landed = puller.fetch[1].landed;
    assert_true(landed < puller.fetch[1].length);
    run_for(100);
    assert_int_equal(puller.fetch[1].landed, landed);
    ops->cancel(puller.link, &puller.fetch[1]);
    memset(landing, 0x33, SOURCE_BYTES);
    kill(holder_pid, SIGCONT);
    run_for(300);
    for (size_t i = 0; i < SOURCE_BYTES; i += 1024)
        assert_int_equal(landing[i], 0x33);
    assert_int_equal(puller.done[1] + puller.downs, 0);
    kill(holder_pid, SIGKILL);
    waitpid(holder_pid, NULL, 0);
}

static void tcp_a_file_that_shrinks_fails_the_fetch_and_not_the_link(void **state)
{
    link_up();
    int fd = memfd_create("shrinks", MFD_CLOEXEC);
    assert_int_equal(ftruncate(fd, 3500000), 0);
    struct grant g = {.kind = 'G', .id = 1, .length = 9u << 20};
    struct transport_region part = {.fd = fd, .length = 9u << 20};
    assert_int_equal(ops->expose(holder.link, 1, &part, false, &g.descriptor), 0);
    assert_int_equal(ops->send(holder.link, &g, sizeof(g)), 0);
    puller.on_message = take_grant;
    awaited_fetches = 1;
    assert_true(run_until(fetches_finished, 5000));
    assert_int_equal(puller.status[1], -EIO);
    assert_int_equal(holder.sent, 0);
    offer(2, 5, 100000, false);
    awaited_fetches = 2;
    assert_true(run_until(fetches_finished, 5000));
    assert_int_equal(puller.status[2], 0);
    close(fd);
}

static void tcp_names_are_resolved_beside_the_loop(void **state)
{
    char name[64];
    snprintf(name, sizeof(name), "localhost:%s", strrchr(address, ':') + 1);
    assert_int_equal(ops->connect(transport, name, 5000, &puller, &puller.link), 0);
    assert_true(run_until(both_connected, 5000));
    side_shut(&puller);
    puller.downs = 0;
    assert_int_equal(ops->connect(transport, "no.such.host.invalid:1", 5000, &puller, &puller.link),
                     0);
    assert_true(run_until(puller_down, 6000));
    // one that is shut while its name is looked up
    struct link *link;
    assert_int_equal(ops->connect(transport, "no.such.host.invalid:1", 5000, &puller, &link), 0);
    ops->shut(link);
    run_for(100);
}

static void tcp_malformed_addresses_are_refused(void **state)
{
    static const char *const bad[] = {"",           "127.0.0.1",   ":1",
                                      "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:65536",
                                      "::1:80",     "[::1:80",     "[]:80"};
    for (size_t i = 0; i < util_count(bad); i++) {
        char bound[TRANSPORT_NAME_MAX + 1];
        struct transport *second;
        assert_int_equal(ops->open(loop, NULL, &events, &holder, &second), 0);
        assert_int_equal(ops->listen(second, bad[i], bound), -EINVAL);
        assert_int_equal(ops->connect(transport, bad[i], 100, &puller, &puller.link), -EINVAL);
        ops->close(second);
    }
}

static void tcp_an_unknown_congestion_control_is_refused(void **state)
{
    struct transport *second;
    struct transport_config config = {.congestion = "nonsense"};
    assert_int_equal(ops->open(loop, &config, &events, &holder, &second), -EINVAL);
    config.congestion = "reno";
    assert_int_equal(ops->open(loop, &config, &events, &holder, &second), 0);
    ops->close(second);
}

static void tcp_over_ipv6(void **state)
{
    struct transport *second;
    char bound[TRANSPORT_NAME_MAX + 1];
    assert_int_equal(ops->open(loop, NULL, &events, &holder, &second), 0);
    int r = ops->listen(second, "[::1]:0", bound);
    if (r == -EADDRNOTAVAIL || r == -EAFNOSUPPORT) {
        ops->close(second);
        print_message("no IPv6 on this machine\n");
        skip();
    }
    assert_int_equal(r, 0);
    assert_int_equal(strncmp(bound, "[::1]:", 6), 0);
    assert_int_equal(ops->connect(transport, bound, 2000, &puller, &puller.link), 0);
    assert_true(run_until(both_connected, 2000));
    side_shut(&holder);
    side_shut(&puller);
    ops->close(second);
}

// -- Mem: faults on demand --------------------------------------------------------------------------

static bool one_message(void)
{
    return holder.messages == 1;
}

static void mem_delay(void **state)
{
    link_up();
    transport_mem_faults_set(&(struct transport_mem_faults){.delay_ms = 80});
    uint64_t begun = util_now_ns();
    assert_int_equal(ops->send(puller.link, "x", 1), 0);
    assert_true(run_until(one_message, 2000));
    assert_true(util_now_ns() - begun >= 80 * MS);
    puller.on_message = take_grant;
    offer(1, 0, 500000, false);
    awaited_fetches = 1;
    assert_true(run_until(fetches_finished, 5000));
    assert_true(landed_right(0, 500000));
}

static void mem_loss(void **state)
{
    link_up();
    transport_mem_faults_set(&(struct transport_mem_faults){.lose_message_each = 3});
    for (int i = 0; i < 3; i++)
        assert_int_equal(ops->send(puller.link, "x", 1), 0);
    assert_true(run_until(puller_down, 2000));
    assert_true(run_until(holder_down, 2000));
    assert_int_equal(holder.messages, 2);
}

static void mem_short_flipped_and_stalled(void **state)
{
    link_up();
    puller.on_message = take_grant;
    transport_mem_faults_set(&(struct transport_mem_faults){.short_fetch_each = 2});
    offer(1, 0, 1000000, false);
    offer(2, 0, 1000000, false);
    awaited_fetches = 2;
    assert_true(run_until(fetches_finished, 5000));
    assert_int_equal(puller.status[1], 0);
    assert_int_equal(puller.status[2], -EIO);
    assert_int_equal(puller.fetch[2].landed, 500000);

    transport_mem_faults_set(&(struct transport_mem_faults){.flip_fetch_each = 1});
    memset(landing, 0, 2000000);
    offer(3, 0, 1000000, false);
    awaited_fetches = 3;
    assert_true(run_until(fetches_finished, 5000));
    assert_int_equal(puller.status[3], 0);
    int bits = 0;
    for (size_t i = 0; i < 1000000; i++)
        bits += __builtin_popcount(landing[i] ^ source[i]);
    assert_int_equal(bits, 1);

    transport_mem_faults_set(&(struct transport_mem_faults){.stall_fetch_each = 1});
    offer(4, 0, 1000000, false);
    run_for(100);
    assert_int_equal(puller.done[4], 0);
    assert_int_equal(puller.fetch[4].landed, 0);
    ops->cancel(puller.link, &puller.fetch[4]);
}

static void mem_submit_fails(void **state)
{
    link_up();
    transport_mem_faults_set(&(struct transport_mem_faults){.refuse_submit_each = 1});
    struct transport_region part = {.fd = region.fd, .map = source, .length = 100};
    struct transport_descriptor d;
    assert_int_equal(ops->send(puller.link, "x", 1), -ENOMEM);
    assert_int_equal(ops->expose(holder.link, 1, &part, false, &d), -ENOMEM);
    transport_mem_faults_set(&(struct transport_mem_faults){.full_queue_each = 1});
    assert_int_equal(ops->send(puller.link, "x", 1), -EAGAIN);
    assert_int_equal(puller.writables, 0);
    run_for(20);
    assert_int_equal(puller.writables, 1);
    assert_int_equal(holder.messages, 0);
}

// -- The table ------------------------------------------------------------------------------------

static struct kind kinds[] = {
    {.transport = "tcp", .address = "127.0.0.1:0"},
    {.transport = "tcp", .address = "127.0.0.1:0", .epoll = true},
    {.transport = "mem", .address = "node:0"},
};

static const struct story {
    const char *name;
    CMUnitTestFunction tell;
} stories[] = {
#define STORY(function) {#function, function}
    STORY(a_connection_is_made_and_ends),
    STORY(nobody_listens),
    STORY(an_address_in_use_is_refused),
    STORY(the_holder_shuts_at_once),
    STORY(ten_thousand_messages_both_ways_whole_and_in_order),
    STORY(a_message_too_long_is_refused),
    STORY(a_full_queue_says_so_and_then_is_writable),
    STORY(shards_of_all_sizes_land),
    STORY(many_shards_at_once_and_the_urgent_one_is_not_last),
    STORY(messages_go_between_the_bytes_of_a_shard),
    STORY(a_cancelled_fetch_touches_nothing_more),
    STORY(a_region_taken_back_fails_the_fetch_and_not_the_link),
    STORY(a_link_that_goes_answers_every_fetch_once),
    STORY(wrong_descriptors_are_refused),
    STORY(shut_inside_every_event),
    STORY(connections_are_shared_between_lanes),
    STORY(tcp_garbage_ends_the_link_with_a_phrase),
    STORY(tcp_bytes_outside_of_a_fetch_end_the_link),
    STORY(tcp_half_a_frame_then_silence_holds_nothing_up),
    STORY(tcp_a_killed_holder_fails_the_fetch_at_once),
    STORY(tcp_a_stopped_holder_holds_nothing_up),
    STORY(tcp_a_file_that_shrinks_fails_the_fetch_and_not_the_link),
    STORY(tcp_names_are_resolved_beside_the_loop),
    STORY(tcp_malformed_addresses_are_refused),
    STORY(tcp_an_unknown_congestion_control_is_refused),
    STORY(tcp_over_ipv6),
    STORY(mem_delay),
    STORY(mem_loss),
    STORY(mem_short_flipped_and_stalled),
    STORY(mem_submit_fails),
};

int main(int argc, char **argv)
{
    static struct CMUnitTest tests[util_count(kinds) * util_count(stories)];
    static char names[util_count(kinds) * util_count(stories)][128];
    size_t count = 0;
    for (size_t k = 0; k < util_count(kinds); k++)
        for (size_t i = 0; i < util_count(stories); i++) {
            const char *story = stories[i].name, *only = kinds[k].transport;
            bool of_one = strncmp(story, "tcp_", 4) == 0 || strncmp(story, "mem_", 4) == 0;
            if (of_one && strncmp(story, only, 3) != 0)
                continue;
            snprintf(names[count], sizeof(names[count]), "%s%s: %s", only,
                     kinds[k].epoll ? " (epoll)" : "", story);
            tests[count] = (struct CMUnitTest){names[count], stories[i].tell, story_setup,
                                               story_end, &kinds[k]};
            count++;
        }
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    return _cmocka_run_group_tests("transport", tests, count, suite_setup, NULL);
}
