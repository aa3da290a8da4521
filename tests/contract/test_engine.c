/* Several engines in one process, each with a real catalog on one directory: what engine.h promises, over the
 * transport in memory, whose faults can be chosen, and over TCP. P2PFS_SEED repeats a run. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "engine/engine.h"
#include "engine/transport_mem.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

#define KIB    1024ull
#define MIB    (1024 * KIB)
#define SHARD  (64 * KIB)
#define NODES  4
#define WAIT_S 30

static const char *transport; /* of the run */
static char home[64];
static uint64_t seed;

// -- Nodes ----------------------------------------------------------------------------------------

struct node {
    char name[8];
    struct catalog *catalog;
    struct engine *engine;
    pthread_mutex_t gate; /* guards events_to */
    struct engine *events_to;
    struct handshake_secret secret;
    /* To be set before node_up. */
    uint64_t cache_size;
    uint32_t read_timeout_ms;
    bool demand;
};

static struct node nodes[NODES];
#define A (&nodes[0])
#define B (&nodes[1])
#define C (&nodes[2])
#define D (&nodes[3])

static void version_gone(void *arg, const struct model_id *version)
{
    struct node *node = arg;
    pthread_mutex_lock(&node->gate);
    if (node->events_to) {
        engine_version_gone(node->events_to, version);
    }
    pthread_mutex_unlock(&node->gate);
}

static void version_sealed(void *arg, const struct model_id *version)
{
    struct node *node = arg;
    pthread_mutex_lock(&node->gate);
    if (node->events_to) {
        engine_version_sealed(node->events_to, version);
    }
    pthread_mutex_unlock(&node->gate);
}

static void gate_set(struct node *node, struct engine *engine)
{
    pthread_mutex_lock(&node->gate);
    node->events_to = engine;
    pthread_mutex_unlock(&node->gate);
}

static void node_up(struct node *node)
{
    char url[128], listen[32];
    char *error = NULL;
    uint64_t boot = util_random_u64();
    snprintf(url, sizeof url, "local://%s/meta", home);
    snprintf(listen, sizeof listen, "%s:0",
             strcmp(transport, "tcp") == 0 ? "127.0.0.1" : node->name);
    struct catalog_config catalog = {
        .url = url,
        .self = {.boot = boot, .pid = getpid(), .host = "this-machine"},
        .lease_ms = 3000,
        .events = {.arg = node, .version_gone = version_gone, .version_sealed = version_sealed}};
    snprintf(catalog.self.name, sizeof catalog.self.name, "%s", node->name);
    assert_int_equal(catalog_open(&catalog, &node->catalog, &error), 0);
    struct engine_config engine = {.catalog = node->catalog,
                                   .node = node->name,
                                   .boot = boot,
                                   .listen = listen,
                                   .transport = transport,
                                   .cache_size = node->cache_size,
                                   .shard_size = SHARD,
                                   .digest = MODEL_XXH3,
                                   .fetch_whole = !node->demand,
                                   .read_timeout_ms = node->read_timeout_ms,
                                   .secret = &node->secret};
    assert_int_equal(engine_open(&engine, &node->engine, &error), 0);
    gate_set(node, node->engine);
    assert_int_equal(catalog_serve(node->catalog, engine_address(node->engine), &error), 0);
    engine_adopt(node->engine);
}

static void node_down(struct node *node)
{
    if (!node->engine) {
        return;
    }
    gate_set(node, NULL);
    engine_close(node->engine);
    catalog_close(node->catalog);
    node->engine = NULL;
    node->catalog = NULL;
}

static struct engine_stats stats(const struct node *node)
{
    struct engine_stats s;
    engine_stats(node->engine, &s);
    return s;
}

static void nap(unsigned ms)
{
    nanosleep(&(struct timespec){.tv_nsec = ms * 1000000l}, NULL);
}

/* Nobody waits, nothing is lent, nothing runs any more. */
static void expect_quiet(const struct node *node)
{
    uint64_t end = util_now_ms() + WAIT_S * 1000;
    struct engine_stats s = stats(node);
    while ((s.readers_waiting || s.grants_open || s.pulls_running) && util_now_ms() < end) {
        nap(5);
        s = stats(node);
    }
    assert_int_equal(s.readers_waiting, 0);
    assert_int_equal(s.grants_open, 0);
    assert_int_equal(s.pulls_running, 0);
}

static void remove_home(void)
{
    char command[96];
    snprintf(command, sizeof command, "rm -rf '%s'", home);
    assert_int_equal(system(command), 0);
}

static int setup(void **state)
{
    const char *given = getenv("P2PFS_SEED");
    seed = given ? strtoull(given, NULL, 0) : (uint64_t)time(NULL);
    seed = seed ? seed : 1;
    log_setup(getenv("P2PFS_TEST_LOG") ? LOG_DEBUG : LOG_ERROR, false);
    snprintf(home, sizeof home, "/tmp/p2pfs-engine-XXXXXX");
    assert_non_null(mkdtemp(home));
    char meta[96];
    snprintf(meta, sizeof meta, "%s/meta", home);
    assert_int_equal(mkdir(meta, 0700), 0);
    for (unsigned i = 0; i < NODES; i++) {
        nodes[i] = (struct node){.name = {(char)('A' + i)},
                                 .gate = PTHREAD_MUTEX_INITIALIZER,
                                 .cache_size = 128 * MIB,
                                 .read_timeout_ms = 20000};
    }
    transport_mem_faults_set(NULL);
    return 0;
}

static int teardown(void **state)
{
    transport_mem_faults_set(NULL);
    for (unsigned i = 0; i < NODES; i++) {
        if (nodes[i].engine) {
            expect_quiet(&nodes[i]);
        }
    }
    for (unsigned i = 0; i < NODES; i++) {
        node_down(&nodes[i]);
    }
    remove_home();
    return 0;
}

static void up(unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        node_up(&nodes[i]);
    }
}

// -- Bytes ----------------------------------------------------------------------------------------

static uint64_t mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

/* The bytes of file `which` from `offset`, a multiple of 8. */
static void pattern(uint64_t which, uint64_t offset, void *out, size_t length)
{
    for (size_t at = 0; at < length; at += 8) {
        uint64_t word = mix(which * 0x9e3779b97f4a7c15ull + offset + at);
        memcpy((char *)out + at, &word, length - at < 8 ? length - at : 8);
    }
}

static bool right(uint64_t which, uint64_t offset, const uint8_t *bytes, size_t length)
{
    uint8_t expected[4096];
    while (length > 0) {
        uint64_t start = offset / 8 * 8;
        size_t skip = (size_t)(offset - start);
        size_t step = sizeof expected - skip < length ? sizeof expected - skip : length;
        pattern(which, start, expected, skip + step);
        if (memcmp(expected + skip, bytes, step) != 0) {
            return false;
        }
        offset += step;
        bytes += step;
        length -= step;
    }
    return true;
}

// -- Registering ----------------------------------------------------------------------------------

static const struct model_attr attr = {.mode = 0644};

static int put(struct node *node, const char *name, uint64_t which, uint64_t size)
{
    struct replica *draft;
    static uint8_t piece[256 * KIB];
    assert_int_equal(engine_draft_new(node->engine, &draft), 0);
    int status = 0;
    for (uint64_t at = 0; at < size && status == 0; at += sizeof piece) {
        size_t step = size - at < sizeof piece ? (size_t)(size - at) : sizeof piece;
        pattern(which, at, piece, step);
        status = engine_draft_write(node->engine, draft, at, piece, step, NULL, NULL);
    }
    assert_int_equal(status, 0); /* there is room: none of these tests fills a cache by writing */
    struct catalog_sync sync = {0};
    status = engine_draft_register(node->engine, draft, MODEL_ROOT, name, 0, &attr, 0,
                                   catalog_sync_done, &sync);
    if (status == 0) {
        status = catalog_sync_wait(&sync);
    }
    engine_replica_close(node->engine, draft);
    return status;
}

static void source_path(const char *name, char path[128])
{
    snprintf(path, 128, "%s/%s", home, name);
}

static void source_write(const char *name, uint64_t which, uint64_t size)
{
    char path[128];
    source_path(name, path);
    uint8_t *bytes = malloc(size);
    assert_non_null(bytes);
    pattern(which, 0, bytes, size);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, size, file), size);
    fclose(file);
    free(bytes);
}

static void put_in_place(struct node *node, const char *name)
{
    char path[128];
    source_path(name, path);
    struct catalog_sync sync = {0};
    assert_int_equal(
        engine_register_file(node->engine, path, MODEL_ROOT, name, 0, catalog_sync_done, &sync), 0);
    assert_int_equal(catalog_sync_wait(&sync), 0);
}

/* The version of a name, when this node has heard of it. */
static struct model_id version_of(struct node *node, const char *name)
{
    struct model_entry entry;
    uint64_t end = util_now_ms() + WAIT_S * 1000;
    int status;
    while ((status = catalog_lookup(node->catalog, MODEL_ROOT, name, &entry)) == -ENOENT &&
           util_now_ms() < end) {
        nap(2);
    }
    assert_int_equal(status, 0);
    struct model_id id = entry.version;
    model_entry_clear(&entry);
    return id;
}

static struct engine_info info(struct node *node, const char *name)
{
    struct engine_info i;
    struct model_id version = version_of(node, name);
    assert_int_equal(engine_info(node->engine, &version, &i), 0);
    return i;
}

// -- Reading --------------------------------------------------------------------------------------

struct reading {
    struct engine_waiter waiter;
    struct node *node;
    struct replica *replica;
    uint64_t offset;
    size_t length;
    int begun; /* engine_read's answer */
    atomic_int answers, status;
};

static void ready(struct engine_waiter *waiter, int status)
{
    struct reading *r = util_container(waiter, struct reading, waiter);
    atomic_store(&r->status, status);
    atomic_fetch_add(&r->answers, 1);
}

static struct replica *open_name(struct node *node, const char *name)
{
    struct model_id version = version_of(node, name);
    struct replica *replica;
    assert_int_equal(engine_replica_open(node->engine, &version, &replica), 0);
    return replica;
}

static void read_begin(struct reading *r, struct node *node, struct replica *replica,
                       uint64_t offset, size_t length)
{
    *r = (struct reading){.waiter.ready = ready,
                          .node = node,
                          .replica = replica,
                          .offset = offset,
                          .length = length};
    r->begun = engine_read(node->engine, replica, offset, length, &r->waiter);
}

/* Waits for the answer. 0: the bytes were right; or the error. */
static int read_end(struct reading *r, uint64_t which)
{
    int status = r->begun;
    if (status == -EINPROGRESS) {
        uint64_t end = util_now_ms() + 2 * WAIT_S * 1000;
        while (atomic_load(&r->answers) == 0 && util_now_ms() < end) {
            nap(1);
        }
        assert_int_equal(atomic_load(&r->answers), 1);
        status = atomic_load(&r->status);
    }
    if (status < 0) {
        return status;
    }
    const void *bytes;
    uint8_t *scratch = malloc(r->length);
    assert_non_null(scratch);
    status = engine_bytes(r->node->engine, r->replica, r->offset, r->length, scratch, &bytes);
    if (status == 0) {
        assert_true(right(which, r->offset, bytes, r->length));
    }
    free(scratch);
    return status;
}

static int read_range(struct node *node, const char *name, uint64_t which, uint64_t offset,
                      size_t length)
{
    struct reading r;
    struct replica *replica = open_name(node, name);
    read_begin(&r, node, replica, offset, length);
    int status = read_end(&r, which);
    engine_replica_close(node->engine, replica);
    return status;
}

static int read_all(struct node *node, const char *name, uint64_t which, uint64_t size)
{
    struct replica *replica = open_name(node, name);
    assert_int_equal(replica_size(replica), size);
    int status = 0;
    for (uint64_t at = 0; at < size && status == 0; at += 128 * KIB) {
        struct reading r;
        read_begin(&r, node, replica, at, size - at < 128 * KIB ? size - at : 128 * KIB);
        status = read_end(&r, which);
    }
    engine_replica_close(node->engine, replica);
    return status;
}

static void expect_complete(struct node *node, const char *name)
{
    uint64_t end = util_now_ms() + WAIT_S * 1000;
    while (info(node, name).state != ENGINE_COMPLETE && util_now_ms() < end) {
        nap(2);
    }
    assert_int_equal(info(node, name).state, ENGINE_COMPLETE);
}

static uint64_t received_from(struct node *node, const char *peer)
{
    struct engine_peer *peers;
    size_t count;
    uint64_t bytes = 0;
    assert_int_equal(engine_peers(node->engine, &peers, &count), 0);
    for (size_t i = 0; i < count; i++) {
        if (strcmp(peers[i].node, peer) == 0) {
            bytes = peers[i].received;
        }
    }
    free(peers);
    return bytes;
}

/* When the catalog of `node` has been told that `name` has so many complete holders beside this node. */
struct census {
    atomic_int done;
    size_t complete;
};

static void counted(void *arg, int status, const struct model_holder *holders, size_t count)
{
    struct census *census = arg;
    for (size_t i = 0; status == 0 && i < count; i++) {
        census->complete += holders[i].complete;
    }
    atomic_store(&census->done, 1);
}

static void expect_holders(struct node *node, const char *name, size_t complete)
{
    struct model_id version = version_of(node, name);
    uint64_t end = util_now_ms() + WAIT_S * 1000;
    size_t seen = SIZE_MAX;
    while (seen != complete && util_now_ms() < end) {
        struct census census = {0};
        assert_int_equal(catalog_holders(node->catalog, &version, counted, &census), 0);
        while (!atomic_load(&census.done)) {
            nap(1);
        }
        seen = census.complete;
    }
    assert_int_equal(seen, complete);
}

// -- Reading and serving --------------------------------------------------------------------------

static void what_one_registers_the_other_reads(void **state)
{
    static const uint64_t sizes[] = {0, 1, 4095, SHARD - 1, SHARD, SHARD + 1, 3 * MIB + 17};
    up(2);
    for (unsigned i = 0; i < util_count(sizes); i++) {
        char there[8], back[8];
        snprintf(there, sizeof there, "to%u", i);
        snprintf(back, sizeof back, "fro%u", i);
        assert_int_equal(put(A, there, i, sizes[i]), 0);
        assert_int_equal(put(B, back, 100 + i, sizes[i]), 0);
        assert_int_equal(read_all(B, there, i, sizes[i]), 0);
        assert_int_equal(read_all(A, back, 100 + i, sizes[i]), 0);
        assert_int_equal(read_all(A, there, i, sizes[i]), 0); /* its own, without any peer */
    }
    assert_int_equal(stats(A).bytes_received, stats(B).bytes_received);
}

static void a_name_is_taken_once(void **state)
{
    up(2);
    assert_int_equal(put(A, "f", 1, 100), 0);
    (void)version_of(B, "f");
    int status = put(B, "f", 2, 100);
    assert_true(status == -EEXIST || status == -EPERM);
    assert_int_equal(read_all(B, "f", 1, 100), 0);
}

static void two_readers_one_transfer(void **state)
{
    enum { READERS = 24 };
    uint64_t size = 4 * MIB + 5;
    up(2);
    assert_int_equal(put(A, "f", 1, size), 0);
    struct replica *one = open_name(B, "f");
    struct replica *two = open_name(B, "f");
    assert_ptr_equal(one, two);
    struct reading readings[READERS];
    for (unsigned i = 0; i < READERS; i++) {
        read_begin(&readings[i], B, i % 2 ? one : two, i / 3 * SHARD, (size_t)(size - 8 * SHARD));
    }
    for (unsigned i = 0; i < READERS; i++) {
        assert_int_equal(read_end(&readings[i], 1), 0);
    }
    engine_replica_close(B->engine, one);
    engine_replica_close(B->engine, two);
    expect_complete(B, "f");
    assert_int_equal(stats(B).bytes_received, size);
    assert_int_equal(stats(B).shards_fetched, info(B, "f").shards);
    expect_quiet(A);
    assert_int_equal(stats(A).bytes_served, size);
}

static void on_demand_only_touched_shards_come(void **state)
{
    uint64_t size = 2 * MIB + 100;
    B->demand = true;
    up(2);
    assert_int_equal(put(A, "f", 1, size), 0);
    assert_int_equal(read_range(B, "f", 1, size - 1, 1), 0);
    assert_int_equal(read_range(B, "f", 1, 3 * SHARD - 1, 2), 0);
    expect_quiet(B); /* its pull has ended */
    struct engine_info i = info(B, "f");
    assert_int_equal(i.shards_present, 3);
    assert_int_equal(i.resident, 2 * SHARD + 100);
    assert_int_equal(i.state, ENGINE_PARTIAL);
    assert_int_equal(stats(B).bytes_received, i.resident);

    struct model_id version = version_of(B, "f"); /* until somebody wants all of it */
    assert_int_equal(engine_pull(B->engine, &version), 0);
    expect_complete(B, "f");
    assert_int_equal(stats(B).bytes_received, size);
}

static void what_arrives_is_served_on(void **state)
{
    uint64_t size = 16 * MIB;
    up(3);
    assert_int_equal(put(A, "f", 1, size), 0);
    if (strcmp(transport, "mem") == 0) {
        transport_mem_faults_set(&(struct transport_mem_faults){.delay_ms = 25});
    } else {
        size = 0; /* over a fast loopback B may be complete before C knows it */
    }
    struct model_id version = version_of(B, "f");
    (void)version_of(C, "f");
    assert_int_equal(engine_pull(B->engine, &version), 0);
    while (stats(B).shards_fetched == 0) {
        nap(1);
    }
    assert_int_equal(engine_pull(C->engine, &version), 0);
    while (size && received_from(C, "B") == 0) {
        nap(1);
    }
    if (size) {
        assert_int_not_equal(info(B, "f").state, ENGINE_COMPLETE);
    }
    assert_int_equal(read_all(C, "f", 1, 16 * MIB), 0);
    assert_int_equal(read_all(B, "f", 1, 16 * MIB), 0);
    expect_complete(C, "f");
    print_message("A served %.2f copies to B and C\n", (double)stats(A).bytes_served / (16 * MIB));
}

static void a_holder_leaves_in_mid_pull(void **state)
{
    uint64_t size = 8 * MIB;
    up(3);
    assert_int_equal(put(A, "f", 1, size), 0);
    assert_int_equal(read_all(B, "f", 1, size), 0);
    expect_holders(C, "f", 2);
    transport_mem_faults_set(&(struct transport_mem_faults){.delay_ms = 10});
    struct replica *replica = open_name(C, "f");
    struct reading r;
    read_begin(&r, C, replica, 0, size);
    while (stats(C).shards_fetched == 0) {
        nap(1);
    }
    node_down(A);
    assert_int_equal(read_end(&r, 1), 0);
    engine_replica_close(C->engine, replica);
}

static void offline_until_a_holder_returns(void **state)
{
    uint64_t size = MIB;
    source_write("f", 1, size);
    up(2);
    put_in_place(A, "f");
    (void)version_of(B, "f");
    node_down(A);
    uint64_t start = util_now_ms();
    struct replica *replica = open_name(B, "f");
    assert_int_equal(read_range(B, "f", 1, 0, 100), -EIO);
    assert_true(util_now_ms() - start < B->read_timeout_ms); /* nobody holds it: no need to wait */
    assert_int_equal(info(B, "f").state, ENGINE_OFFLINE);
    assert_int_equal(info(B, "f").error, -EIO);
    assert_int_not_equal(info(B, "f").reason[0], '\0');
    engine_replica_close(B->engine, replica);
    node_up(A);
    int status = -EIO;
    for (unsigned i = 0; i < 100 && status < 0; i++) {
        status = read_all(B, "f", 1, size);
    }
    assert_int_equal(status, 0);
}

static void a_read_is_parked_when_its_engine_closes(void **state)
{
    up(2);
    assert_int_equal(put(A, "f", 1, MIB), 0);
    transport_mem_faults_set(&(struct transport_mem_faults){.stall_fetch_each = 1});
    struct replica *replica = open_name(B, "f");
    struct reading readings[3];
    for (unsigned i = 0; i < 3; i++) {
        read_begin(&readings[i], B, replica, i * SHARD, SHARD);
    }
    if (strcmp(transport, "mem") == 0) {
        nap(50);
        assert_int_equal(stats(B).readers_waiting, 3);
    }
    engine_replica_close(B->engine, replica);
    node_down(B);
    for (unsigned i = 0; i < 3; i++) {
        int answers = atomic_load(&readings[i].answers);
        assert_int_equal(answers, readings[i].begun == -EINPROGRESS);
        if (answers && strcmp(transport, "mem") == 0) {
            assert_int_equal(atomic_load(&readings[i].status), -ESHUTDOWN);
        }
    }
}

static void an_open_version_outlives_its_name(void **state)
{
    up(2);
    assert_int_equal(put(A, "f", 1, MIB), 0);
    assert_int_equal(read_all(B, "f", 1, MIB), 0);
    struct replica *replica = open_name(B, "f");
    struct model_id version = version_of(B, "f");
    struct catalog_sync sync = {0};
    assert_int_equal(catalog_unlink(A->catalog, MODEL_ROOT, "f", catalog_sync_done, &sync), 0);
    assert_int_equal(catalog_sync_wait(&sync), 0);
    struct model_version gone;
    while (catalog_version(B->catalog, &version, &gone) == 0) {
        model_version_clear(&gone);
        nap(2);
    }
    struct reading r;
    read_begin(&r, B, replica, 0, MIB);
    assert_int_equal(read_end(&r, 1), 0);
    engine_replica_close(B->engine, replica);
    uint64_t end = util_now_ms() + WAIT_S * 1000; /* and its bytes go with its last reader */
    while ((stats(B).cache_used || stats(A).cache_used) && util_now_ms() < end) {
        nap(5);
    }
    assert_int_equal(stats(A).cache_used, 0);
    assert_int_equal(stats(B).cache_used, 0);
}

// -- Secrets --------------------------------------------------------------------------------------

static void secret_set(struct node *node, const char *text)
{
    node->secret.length = strlen(text);
    memcpy(node->secret.bytes, text, node->secret.length);
}

static void only_who_knows_the_secret_is_served(void **state)
{
    secret_set(A, "correct horse battery staple");
    secret_set(B, "correct horse battery staple");
    secret_set(C, "correct horse battery stable");
    C->read_timeout_ms = D->read_timeout_ms = 1000;
    up(4); /* D has none */
    assert_int_equal(put(A, "f", 1, MIB), 0);
    assert_int_equal(read_all(B, "f", 1, MIB), 0);
    assert_int_equal(read_range(C, "f", 1, 0, 1), -EIO);
    assert_int_equal(read_range(D, "f", 1, 0, 1), -EIO);
    assert_int_equal(stats(C).bytes_received + stats(D).bytes_received, 0);
    assert_true(stats(A).links_refused + stats(B).links_refused + stats(C).links_refused > 0);

    /* Nor is anybody believed who does not know it. */
    assert_int_equal(put(D, "g", 2, MIB), 0);
    A->read_timeout_ms = 1000;
    node_down(A);
    node_up(A);
    assert_int_equal(read_range(A, "g", 2, 0, 1), -EIO);
    assert_int_equal(stats(A).bytes_received, 0);
}

// -- The cache ------------------------------------------------------------------------------------

struct answer {
    atomic_int done, status;
};

static void answered(void *arg, int status)
{
    struct answer *answer = arg;
    atomic_store(&answer->status, status);
    atomic_store(&answer->done, 1);
}

static int evict(struct node *node, const char *name, bool force)
{
    struct answer answer = {0};
    struct model_id version = version_of(node, name);
    int status = engine_evict(node->engine, &version, force, answered, &answer);
    if (status < 0) {
        return status;
    }
    while (!atomic_load(&answer.done)) {
        nap(1);
    }
    return atomic_load(&answer.status);
}

static void the_last_copy_is_not_evicted(void **state)
{
    up(2);
    assert_int_equal(put(A, "f", 1, MIB), 0);
    assert_int_equal(evict(B, "f", false), -ENOENT);
    assert_int_equal(evict(A, "f", false), -EBUSY);
    assert_int_equal(read_all(B, "f", 1, MIB), 0); /* and is still served */
    expect_holders(A, "f", 1);
    struct replica *replica = open_name(A, "f");
    assert_int_equal(evict(A, "f", false), -EBUSY); /* open */
    engine_replica_close(A->engine, replica);
    struct model_id version = version_of(A, "f");
    assert_int_equal(engine_pin(A->engine, &version, true), 0);
    assert_int_equal(evict(A, "f", true), -EPERM);
    assert_int_equal(engine_pin(A->engine, &version, false), 0);

    assert_int_equal(evict(A, "f", false), 0);
    assert_int_equal(stats(A).cache_used, 0);
    assert_int_equal(evict(B, "f", false), -EBUSY); /* now this is the last one */
    assert_int_equal(read_all(A, "f", 1, MIB), 0);
    assert_int_equal(evict(A, "f", true), 0);
    assert_int_equal(evict(B, "f", true), 0);
    assert_int_equal(read_range(B, "f", 1, 0, 1), -EIO);
}

static void a_pull_makes_room_by_evicting_what_was_used_longest_ago(void **state)
{
    static const char *const names[] = {"f0", "f1", "f2", "f3", "f4", "f5"};
    B->cache_size = 4 * MIB;
    up(2);
    for (unsigned i = 0; i < 6; i++) {
        assert_int_equal(put(A, names[i], i, MIB), 0);
    }
    assert_int_equal(put(B, "own", 9, MIB), 0);
    for (unsigned i = 0; i < 3; i++) {
        assert_int_equal(read_all(B, names[i], i, MIB), 0);
        expect_complete(B, names[i]);
    }
    expect_quiet(B);
    assert_int_equal(read_all(B, names[0], 0, MIB), 0); /* f1 is now the one used longest ago */
    assert_int_equal(read_all(B, names[3], 3, MIB), 0);
    expect_quiet(B);
    assert_int_equal(info(B, "f1").shards_present, 0);
    assert_int_equal(info(B, "f0").state, ENGINE_COMPLETE);
    assert_int_equal(read_all(B, names[4], 4, MIB), 0);
    assert_int_equal(info(B, "f2").shards_present, 0);
    assert_int_equal(info(B, "own").state, ENGINE_COMPLETE); /* the last copy */
    assert_true(stats(B).evictions >= 2);
    assert_true(stats(B).cache_used <= 4 * MIB);
    expect_quiet(B);
}

static void what_cannot_fit_is_refused(void **state)
{
    B->cache_size = 4 * MIB;
    up(2);
    assert_int_equal(put(A, "big", 1, 8 * MIB), 0);
    assert_int_equal(put(A, "f", 2, 2 * MIB), 0);
    assert_int_equal(read_range(B, "big", 1, 0, 1), -ENOSPC);
    assert_int_equal(put(B, "own", 3, 3 * MIB), 0);
    assert_int_equal(read_range(B, "f", 2, 0, 1), -ENOSPC); /* nothing here may go */
    assert_int_equal(read_all(B, "own", 3, 3 * MIB), 0);
    expect_quiet(B);
    assert_int_equal(evict(B, "own", true), 0);
    assert_int_equal(read_all(B, "f", 2, 2 * MIB), 0);
}

// -- In place -------------------------------------------------------------------------------------

static void a_file_in_place_is_read_where_it_lies(void **state)
{
    uint64_t size = 3 * MIB + 7;
    source_write("f", 1, size);
    up(2);
    put_in_place(A, "f");
    assert_int_equal(read_all(B, "f", 1, size), 0);
    assert_int_equal(read_all(A, "f", 1, size), 0);
    assert_int_equal(stats(A).cache_used, 0);
    assert_int_equal(info(A, "f").state, ENGINE_INPLACE);
    expect_complete(B, "f");
}

/* One byte in the middle, with the old times put back, is the worst: only digests tell. */
static void source_damage(const char *name, bool stealthily)
{
    char path[128];
    struct stat before;
    source_path(name, path);
    assert_int_equal(stat(path, &before), 0);
    int fd = open(path, O_RDWR);
    uint8_t byte;
    assert_int_equal(pread(fd, &byte, 1, MIB), 1);
    byte ^= 0x10;
    assert_int_equal(pwrite(fd, &byte, 1, MIB), 1);
    if (stealthily) {
        struct timespec times[2] = {before.st_atim, before.st_mtim};
        assert_int_equal(futimens(fd, times), 0);
    }
    close(fd);
}

static void sealed_wait(struct node *node, const char *name)
{
    uint64_t end = util_now_ms() + WAIT_S * 1000;
    while (!info(node, name).sealed && util_now_ms() < end) {
        nap(2);
    }
    assert_true(info(node, name).sealed);
}

static void no_peer_gets_wrong_bytes_of_a_changed_file(void **state)
{
    B->read_timeout_ms = C->read_timeout_ms = 2000;
    source_write("f", 1, 2 * MIB);
    source_write("g", 2, 2 * MIB);
    up(3);
    put_in_place(A, "f");
    put_in_place(A, "g");
    sealed_wait(C, "f");
    sealed_wait(C, "g");

    nap(20); /* file systems tell times in ticks of a few milliseconds */
    source_damage("f", false);
    assert_int_equal(read_all(B, "f", 1, 2 * MIB), -EIO);
    assert_int_equal(read_range(A, "f", 1, 0, 100), -EIO);
    assert_int_equal(info(A, "f").state, ENGINE_CHANGED);

    source_damage("g", true);
    assert_int_equal(read_all(B, "g", 2, 2 * MIB), -EIO);
    assert_true(stats(B).shards_corrupt > 0);

    char path[128];
    source_write("h", 3, MIB);
    put_in_place(A, "h");
    (void)version_of(C, "h");
    source_path("h", path);
    assert_int_equal(unlink(path), 0);
    int status = read_all(C, "h", 3, MIB);
    assert_true(status == -EIO || status == 0); /* the registrar may have had it open still */
}

// -- Faults ---------------------------------------------------------------------------------------

static const struct fault {
    const char *name;
    struct transport_mem_faults faults;
    bool bears_it; /* a read succeeds while two holders live */
} faults[] = {
    {"delay", {.delay_ms = 5}, true},
    {"lost messages", {.lose_message_each = 97}, true},
    {"short fetches", {.short_fetch_each = 3}, true},
    {"flipped bits", {.flip_fetch_each = 13}, false}, /* both holders end up in quarantine */
    {"refused submits", {.refuse_submit_each = 7}, true},
    {"full queues", {.full_queue_each = 4}, true}, /* 3 would be every PROOF */
    {"stalled fetches", {.stall_fetch_each = 40}, true},
    {"mixed",
     {.delay_ms = 1,
      .lose_message_each = 211,
      .short_fetch_each = 29,
      .refuse_submit_each = 31,
      .full_queue_each = 5,
      .stall_fetch_each = 149},
     true},
};

static void each_fault_is_borne_by_whom_it_may_be(void **state)
{
    uint64_t size = 4 * MIB;
    up(3);
    for (unsigned i = 0; i < util_count(faults); i++) {
        char name[16];
        snprintf(name, sizeof name, "f%u", i);
        C->read_timeout_ms = faults[i].bears_it ? 20000 : 1500;
        node_down(C); /* forgets its quarantines and back-offs */
        assert_int_equal(put(A, name, i, size), 0);
        assert_int_equal(read_all(B, name, i, size), 0);
        node_up(C);
        expect_holders(C, name, 2);
        uint64_t start = util_now_ms();
        transport_mem_faults_set(&faults[i].faults);
        int status = read_all(C, name, i, size);
        transport_mem_faults_set(NULL);
        print_message("%s: %s after %u ms, %u of %u shards failed\n", faults[i].name,
                      status ? strerror(-status) : "read", (unsigned)(util_now_ms() - start),
                      (unsigned)stats(C).shards_failed, (unsigned)stats(C).shards_fetched);
        if (faults[i].bears_it) {
            assert_int_equal(status, 0);
        } else {
            assert_true(status == 0 || status == -EIO);
        }
        expect_quiet(A);
        expect_quiet(B);
        expect_quiet(C);
    }
}

/* Readers of random ranges, some of whom give up, under random faults: each ends right or with EIO, in time. */
#define STORM_READERS 32

static uint64_t draw(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

static void storm_round(unsigned round)
{
    uint64_t size = 2 * MIB + draw() % MIB;
    char name[16];
    snprintf(name, sizeof name, "s%u", round);
    assert_int_equal(put(A, name, round, size), 0);
    struct replica *replica = open_name(B, name);
    struct transport_mem_faults mixed = {
        .delay_ms = (uint32_t)(draw() % 4),
        .lose_message_each = draw() % 2 ? (uint32_t)(50 + draw() % 200) : 0,
        .short_fetch_each = draw() % 2 ? (uint32_t)(2 + draw() % 20) : 0,
        .flip_fetch_each = draw() % 4 ? 0 : (uint32_t)(10 + draw() % 30),
        .refuse_submit_each = draw() % 2 ? (uint32_t)(5 + draw() % 50) : 0,
        .full_queue_each = draw() % 2 ? (uint32_t)(2 + draw() % 10) : 0,
        .stall_fetch_each = draw() % 3 ? 0 : (uint32_t)(20 + draw() % 50)};
    transport_mem_faults_set(&mixed);
    struct reading readings[STORM_READERS];
    bool taken_back[STORM_READERS];
    uint64_t start = util_now_ms();
    for (unsigned i = 0; i < STORM_READERS; i++) {
        uint64_t offset = draw() % size;
        uint64_t most = size - offset < 5 * SHARD ? size - offset : 5 * SHARD;
        read_begin(&readings[i], B, replica, offset, 1 + (size_t)(draw() % most));
        taken_back[i] = readings[i].begun == -EINPROGRESS && draw() % 8 == 0 &&
                        engine_read_cancel(B->engine, &readings[i].waiter);
    }
    unsigned failed = 0;
    for (unsigned i = 0; i < STORM_READERS; i++) {
        if (taken_back[i]) {
            assert_int_equal(atomic_load(&readings[i].answers), 0);
            continue;
        }
        int status = read_end(&readings[i], round);
        assert_true(status == 0 || status == -EIO);
        failed += status != 0;
    }
    print_message("storm %u: %u of %u readers failed, %u ms\n", round, failed, STORM_READERS,
                  (unsigned)(util_now_ms() - start));
    transport_mem_faults_set(NULL);
    engine_replica_close(B->engine, replica);
    expect_quiet(B);
    expect_quiet(A);
}

static void under_random_faults_each_reader_gets_an_answer(void **state)
{
    print_message("P2PFS_SEED=%llu\n", (unsigned long long)seed);
    B->read_timeout_ms = 1500;
    up(1);
    for (unsigned round = 0; round < 6; round++) {
        node_up(B);
        storm_round(round);
        node_down(B);
    }
}

#define story(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

static const struct CMUnitTest stories[] = {
    story(what_one_registers_the_other_reads),
    story(a_name_is_taken_once),
    story(two_readers_one_transfer),
    story(on_demand_only_touched_shards_come),
    story(what_arrives_is_served_on),
    story(a_holder_leaves_in_mid_pull),
    story(offline_until_a_holder_returns),
    story(a_read_is_parked_when_its_engine_closes),
    story(an_open_version_outlives_its_name),
    story(only_who_knows_the_secret_is_served),
    story(the_last_copy_is_not_evicted),
    story(a_pull_makes_room_by_evicting_what_was_used_longest_ago),
    story(what_cannot_fit_is_refused),
    story(a_file_in_place_is_read_where_it_lies),
    story(no_peer_gets_wrong_bytes_of_a_changed_file),
};

static const struct CMUnitTest fault_stories[] = {
    story(each_fault_is_borne_by_whom_it_may_be),
    story(under_random_faults_each_reader_gets_an_answer),
};

int main(void)
{
    if (getenv("P2PFS_TEST_FILTER")) {
        cmocka_set_test_filter(getenv("P2PFS_TEST_FILTER"));
    }
    int failed = 0;
    transport = "mem";
    failed += cmocka_run_group_tests_name("over memory", stories, NULL, NULL);
    failed += cmocka_run_group_tests_name("faults", fault_stories, NULL, NULL);
    transport = "tcp";
    failed += cmocka_run_group_tests_name("over TCP", stories, NULL, NULL);
    return failed;
}
