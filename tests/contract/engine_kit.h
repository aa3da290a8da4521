/* What the tests of the engine share: several engines in one process, each with a real catalog on one directory, over
 * the transport in memory, whose faults can be chosen, or over TCP; files of known bytes; reads that check them.
 * P2PFS_SEED repeats a run, P2PFS_TEST_FILTER=NAME runs one story, P2PFS_TEST_LOG=1 shows the log. */
#ifndef P2PFS_TESTS_ENGINE_KIT_H
#define P2PFS_TESTS_ENGINE_KIT_H

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

/* No story needs all of it. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"

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
    atomic_uint versions_gone; /* told to the engine */
    struct handshake_secret secret;
    /* To be set before node_up. */
    uint64_t cache_size;
    uint32_t read_timeout_ms;
    bool demand;
    const char *locality; /* NULL: none */
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
        atomic_fetch_add(&node->versions_gone, 1);
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
        .lease_ms = 10000,
        .events = {.arg = node, .version_gone = version_gone, .version_sealed = version_sealed}};
    snprintf(catalog.self.name, sizeof catalog.self.name, "%s", node->name);
    snprintf(catalog.self.locality, sizeof catalog.self.locality, "%s",
             node->locality ? node->locality : "");
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

// -- Evicting -------------------------------------------------------------------------------------

struct answer {
    atomic_int done, status;
};

static void answered(void *arg, int status)
{
    struct answer *answer = arg;
    atomic_store(&answer->status, status);
    atomic_store(&answer->done, 1);
}

static int answer_wait(struct answer *answer)
{
    while (!atomic_load(&answer->done)) {
        nap(1);
    }
    return atomic_load(&answer->status);
}

static int evict(struct node *node, const char *name, bool force)
{
    struct answer answer = {0};
    struct model_id version = version_of(node, name);
    int status = engine_evict(node->engine, &version, force, answered, &answer);
    return status < 0 ? status : answer_wait(&answer);
}

static void remove_name(struct node *node, const char *name)
{
    struct catalog_sync sync = {0};
    assert_int_equal(catalog_unlink(node->catalog, MODEL_ROOT, name, catalog_sync_done, &sync), 0);
    assert_int_equal(catalog_sync_wait(&sync), 0);
}

// -- Running --------------------------------------------------------------------------------------

#define story(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

/* Runs the stories over one transport; returns how many failed. */
#define run_over(name, stories) \
    (transport = (name), cmocka_run_group_tests_name("over " name, stories, NULL, NULL))

static void filter(void)
{
    const char *given = getenv("P2PFS_TEST_FILTER");
    if (given) {
        cmocka_set_test_filter(given);
    }
}

#pragma GCC diagnostic pop

#endif
