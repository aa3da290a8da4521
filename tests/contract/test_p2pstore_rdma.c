/* What p2pstore.h promises of the program's memory when bytes travel by RDMA: on the device that has the address
 * P2PFS_RDMA_ADDRESS (HOST:0), with P2PFS_TEST_LOG=1 for the log. Two stores, and a peer without manners that reads what was taken back. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "engine/loop.h"
#include "engine/p2pstore.h"
#include "engine/wire.h"
#include "meta/base/util.h"
#include "meta/catalog.h"

#define MIB      (1ull << 20)
#define SHARD    (2 * MIB)
#define SIZE     (3 * SHARD + 12345)
#define MODEL    (32 * MIB)
#define PATIENCE 60000     /* ms: it must happen at all */
#define LINKS    (3 * MIB) /* locked by what connections themselves need, at most */

static char home[64], url[96], host[64], name_a[80], name_b[80];
static struct p2pstore *A, *B;
static uint8_t *from, *to;

// -- Stores ---------------------------------------------------------------------------------------

static void nap(unsigned ms)
{
    nanosleep(&(struct timespec){.tv_nsec = ms * 1000000l}, NULL);
}

static struct p2pstore *opened(const char *node)
{
    char listen[96];
    snprintf(listen, sizeof listen, "listen=%s", node);
    const char *const options[] = {listen, "require_rdma", "read_timeout=5",
                                   getenv("P2PFS_TEST_LOG") ? "log_level=debug" : "log_level=warn",
                                   NULL};
    struct p2pstore *store = NULL;
    int status = p2pstore_open(url, node, options, &store);
    if (status < 0)
        print_error("%s\n", p2pstore_error());
    assert_int_equal(status, 0);
    return store;
}

static uint8_t *memory(void)
{
    uint8_t *bytes =
        mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    assert_true(bytes != MAP_FAILED);
    return bytes;
}

static void pattern(uint8_t *bytes, uint64_t seed)
{
    for (size_t i = 0; i < SIZE; i++)
        bytes[i] = (uint8_t)((i * 2654435761u + seed) >> 13);
}

static int setup(void **state)
{
    snprintf(home, sizeof home, "/dev/shm/p2pfs-store-XXXXXX");
    assert_non_null(mkdtemp(home));
    snprintf(url, sizeof url, "local://%s", home);
    A = opened(name_a);
    B = opened(name_b);
    from = memory();
    to = memory();
    return 0;
}

static int teardown(void **state)
{
    char command[96];
    assert_int_equal(p2pstore_close(A), 0);
    assert_int_equal(p2pstore_close(B), 0);
    munmap(from, SIZE);
    munmap(to, SIZE);
    snprintf(command, sizeof command, "rm -rf '%s'", home);
    return system(command);
}

/* Ranges whose borders do not fall on those of shards, out of order in memory. */
static void cut(uint8_t *bytes, struct p2pstore_range ranges[3])
{
    ranges[0] = (struct p2pstore_range){bytes + MIB + 5, 2 * MIB};
    ranges[1] = (struct p2pstore_range){bytes, MIB + 5};
    ranges[2] = (struct p2pstore_range){bytes + 3 * MIB + 5, SIZE - 3 * MIB - 5};
}

static void offer(void)
{
    struct p2pstore_range ranges[3];
    pattern(from, 1);
    cut(from, ranges);
    assert_int_equal(p2pstore_register(A, "m", ranges, 3, SHARD, NULL, PATIENCE), 0);
}

static void seen_by_b(const char *name)
{
    for (int turn = 0; turn < 3000; turn++) {
        struct p2pstore_list *list;
        assert_int_equal(p2pstore_list(B, name, PATIENCE, &list), 0);
        size_t count = p2pstore_list_count(list);
        p2pstore_list_free(list);
        if (count > 0)
            return;
        nap(10);
    }
    fail_msg("B does not hear of the name");
}

/* Bytes of this process's memory that devices hold. */
static uint64_t pinned(void)
{
    char line[128];
    unsigned long long kib = 0;
    FILE *file = fopen("/proc/self/status", "re");
    assert_non_null(file);
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "VmPin: %llu kB", &kib) == 1)
            break;
    fclose(file);
    return kib * 1024;
}

static void ranges_are_read_and_written_in_place(void **state)
{
    struct p2pstore_range ranges[3];
    offer();
    seen_by_b("m");
    cut(to, ranges);
    assert_int_equal(p2pstore_get_replica(B, "m", ranges, 3, PATIENCE), 0);
    assert_memory_equal(from, to, SIZE);
    assert_int_equal(p2pstore_unregister(A, "m", PATIENCE), 0);
    assert_int_equal(p2pstore_delete_replica(B, "m", PATIENCE), 0);
    assert_true(pinned() <= LINKS);
}

/* Another process that offers MODEL bytes. */
static pid_t trainer(void)
{
    char program[512], metadata[128], server[96], size[32];
    ssize_t length = readlink("/proc/self/exe", program, sizeof program - 64);
    assert_true(length > 0);
    program[length] = '\0';
    char *dir = strstr(program, "/tests/");
    assert_non_null(dir);
    snprintf(dir, 64, "/bin/p2p-store-example");
    snprintf(metadata, sizeof metadata, "--metadata_server=%s", url);
    snprintf(server, sizeof server, "--local_server_name=%s:7203", host);
    snprintf(size, sizeof size, "--file_size_mb=%llu", MODEL / MIB);
    char cmd[] = "--cmd=trainer", protocol[] = "--protocol=rdma", name[] = "--name=model";
    char *const argv[] = {program, cmd, metadata, server, size, protocol, name, NULL};
    pid_t pid;
    assert_int_equal(posix_spawn(&pid, program, NULL, NULL, argv, environ), 0);
    return pid;
}

/* At whatever moment it ends, no device knows the memory any more when the call returns. */
static void no_device_has_the_memory_of_a_cancelled_pull(void **state)
{
    uint8_t *bytes = mmap(NULL, MODEL, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    assert_true(bytes != MAP_FAILED);
    struct p2pstore_range all = {bytes, MODEL};
    unsigned caught = 0;
    pid_t pid = trainer();
    seen_by_b("model");
    for (unsigned i = 0; i < 10; i++) {
        struct p2pstore_request *request;
        assert_int_equal(p2pstore_get_replica_start(B, "model", &all, 1, NULL, NULL, &request), 0);
        for (unsigned turn = 0; turn < 10000 && pinned() < LINKS; turn++)
            nap(1);
        nap(i * 5);
        caught += p2pstore_request_cancel(request) == 0;
        uint64_t left = pinned();
        p2pstore_request_free(request);
        int status = p2pstore_delete_replica(B, "model", PATIENCE); // it was too late to cancel
        assert_true(status == 0 || status == -ENOENT);
        assert_true(status == 0 || left < LINKS);
        memset(bytes, 0x5a, MODEL);
        nap(20);
        for (size_t at = 0; at < MODEL; at++)
            if (bytes[at] != 0x5a)
                fail_msg("byte %zu was written after the call had returned", at);
    }
    assert_true(caught > 0);
    munmap(bytes, MODEL);
    kill(pid, SIGTERM);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
}

// -- A peer without manners -----------------------------------------------------------------------

/* Attaches to a version, asks for a shard, and keeps the descriptor of the grant. */
static struct {
    struct loop *loop;
    struct transport *transport;
    struct link *link;
    struct model_id version;
    uint32_t request;
    struct wire_message grant;
    struct transport_fetch fetch;
    bool granted, gone, fetched;
    int status;
} spy;

static void spy_send(struct wire_message message)
{
    uint8_t bytes[4096];
    ssize_t length = wire_encode(&message, bytes, sizeof bytes);
    assert_true(length > 0);
    assert_int_equal(spy.transport->ops->send(spy.link, bytes, (size_t)length), 0);
}

static void spy_ask(void)
{
    spy.granted = spy.fetched = false;
    spy_send((struct wire_message){
        .type = WIRE_ASK, .handle = 1, .request = ++spy.request, .urgent = true, .shard = 1});
}

static void spy_connected(struct link *link)
{
    struct wire_message hello = {
        .type = WIRE_HELLO, .protocol = WIRE_PROTOCOL, .node = "spy", .boot = 1};
    spy_send(hello);
}

static void spy_message(struct link *link, const void *bytes, size_t length)
{
    struct wire_message message;
    assert_int_equal(wire_decode(bytes, length, &message), 0);
    switch (message.type) {
    case WIRE_WELCOME:
        spy_send((struct wire_message){.type = WIRE_PROOF_MESSAGE});
        spy_send((struct wire_message){.type = WIRE_ATTACH, .handle = 1, .version = spy.version});
        break;
    case WIRE_ATTACHED:
        spy_ask();
        break;
    case WIRE_GRANT:
        spy.grant = message;
        spy.granted = true;
        loop_stop(spy.loop);
        break;
    case WIRE_BUSY:
        spy_ask();
        break;
    case WIRE_GONE:
        spy.gone = true;
        break;
    default:
        break;
    }
}

static void spy_landed(struct link *link, struct transport_fetch *fetch)
{
}

static void spy_fetched(struct link *link, struct transport_fetch *fetch, int status)
{
    spy.fetched = true;
    spy.status = status;
    loop_stop(spy.loop);
}

static void spy_down(struct link *link, int error, const char *reason)
{
    spy.transport->ops->shut(link);
    spy.link = NULL;
    loop_stop(spy.loop);
}

static void spy_late(struct loop_timer *timer)
{
    fail_msg("nothing comes");
}

static void spy_run(void)
{
    struct loop_timer timer = {.due = spy_late};
    loop_timer_set(spy.loop, &timer, PATIENCE * 1000000ull);
    loop_run(spy.loop);
    loop_timer_clear(spy.loop, &timer);
}

static void spy_read(uint8_t *into)
{
    memset(into, 0x11, SHARD);
    spy.fetch = (struct transport_fetch){
        .destination = into, .length = spy.grant.length, .id = spy.grant.request};
    assert_int_equal(spy.grant.length, SHARD);
    assert_int_equal(spy.transport->ops->fetch(spy.link, &spy.grant.descriptor, &spy.fetch), 0);
    while (!spy.fetched)
        spy_run();
}

static void version_find(void)
{
    struct catalog *catalog;
    char *why = NULL;
    struct catalog_config config = {
        .url = url, .self = {.name = "spy", .boot = 1}, .lease_ms = 3000};
    assert_int_equal(catalog_open(&config, &catalog, &why), 0);
    struct model_entry entry;
    assert_int_equal(catalog_resolve(catalog, "m", &entry), 0);
    spy.version = entry.version;
    model_entry_clear(&entry);
    catalog_close(catalog);
}

static void a_read_of_what_was_unregistered_fails(void **state)
{
    static const struct transport_events events = {.connected = spy_connected,
                                                   .message = spy_message,
                                                   .fetch_landed = spy_landed,
                                                   .fetch_done = spy_fetched,
                                                   .down = spy_down};
    uint8_t *wrong = malloc(SHARD);
    offer();
    memset(&spy, 0, sizeof spy);
    version_find();
    assert_int_equal(loop_open(&spy.loop), 0);
    struct transport_config config = {0};
    assert_int_equal(
        transport_by_name("rdma")->open(spy.loop, &config, &events, NULL, &spy.transport), 0);
    assert_int_equal(spy.transport->ops->connect(spy.transport, name_a, PATIENCE, NULL, &spy.link),
                     0);
    spy_run();
    assert_true(spy.granted);
    spy_read(to); // so the way is good
    assert_int_equal(spy.status, 0);
    assert_memory_equal(to, from + SHARD, SHARD);
    spy_send((struct wire_message){.type = WIRE_DONE, .request = spy.grant.request});

    spy_ask();
    spy_run();
    assert_true(spy.granted);
    assert_int_equal(p2pstore_unregister(A, "m", PATIENCE), 0);
    memset(from, 0xee, SIZE);
    spy_read(to);
    assert_int_equal(spy.status, -EIO);
    memset(wrong, 0xee, SHARD);
    for (size_t at = 0; at < SHARD; at += 256) // not a byte of what is there now
        assert_memory_not_equal(to + at, wrong, 256);
    free(wrong);
    while (spy.link)
        spy_run();
    spy.transport->ops->close(spy.transport);
    loop_close(spy.loop);
}

int main(void)
{
    const char *address = getenv("P2PFS_RDMA_ADDRESS");
    if (!transport_by_name("rdma") || !address) {
        puts("SKIP: no RDMA (P2PFS_RDMA_ADDRESS)");
        return 77;
    }
    snprintf(host, sizeof host, "%.*s", (int)(strrchr(address, ':') - address), address);
    snprintf(name_a, sizeof name_a, "%s:7201", host);
    snprintf(name_b, sizeof name_b, "%s:7202", host);
#define TEST(function) cmocka_unit_test_setup_teardown(function, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(ranges_are_read_and_written_in_place),
        TEST(no_device_has_the_memory_of_a_cancelled_pull),
        TEST(a_read_of_what_was_unregistered_fails),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
