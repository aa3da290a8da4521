/* A replica's shards, digests and waiting readers, without any peer: the tests settle the shards themselves. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <utlist.h>

#include "engine/cache.h"
#include "engine/replica.h"
#include "engine/storage.h"
#include "meta/base/util.h"

#define SHARD  (64u << 10)
#define SHARDS 9u
#define SIZE   (8u * SHARD + 1234)

/* The engine's parts that a replica touches: no lanes, so that nobody fetches but the test. */
static struct engine engine;
static struct replica *replica;

/* One reader and what it was told. */
struct reader {
    struct engine_waiter waiter;
    atomic_int answers;
    atomic_int status;
};

static void ready(struct engine_waiter *waiter, int status)
{
    struct reader *reader = util_container(waiter, struct reader, waiter);
    atomic_store(&reader->status, status);
    atomic_fetch_add(&reader->answers, 1);
}

static void nap(void)
{
    nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
}

/* Answers come from a work thread. */
static void expect_answer(struct reader *reader, int status)
{
    for (int i = 0; i < 20000 && atomic_load(&reader->answers) == 0; i++) {
        nap();
    }
    assert_int_equal(atomic_load(&reader->answers), 1);
    assert_int_equal(atomic_load(&reader->status), status);
}

static void expect_parked(const struct reader *reader)
{
    assert_true(reader->waiter.parked);
    assert_int_equal(atomic_load(&reader->answers), 0);
}

static void check_all(void)
{
    pthread_mutex_lock(&replica->lock);
    replica_check(replica);
    pthread_mutex_unlock(&replica->lock);
}

static void replica_make(uint64_t size, bool sealed, const uint8_t *root)
{
    struct model_version version = {.id = model_id_new(),
                                    .size = size,
                                    .shard_size = SHARD,
                                    .digest = MODEL_XXH3,
                                    .sealed = sealed,
                                    .origin_node = "somebody"};
    if (root) {
        memcpy(version.root, root, sizeof version.root);
    }
    assert_int_equal(replica_new(&engine, &version, false, &replica), 0);
    /* As in the middle of a pull of which the cluster knows. */
    replica->pulling = true;
    replica->announced = REPLICA_ALL;
}

static int setup(void **state)
{
    char *error;
    memset(&engine, 0, sizeof engine);
    engine.config.cache_size = 16u << 20;
    engine.config.read_timeout_ms = 1000;
    assert_int_equal(storage_open(engine.config.cache_size, NULL, &engine.storage, &error), 0);
    assert_int_equal(cache_open(&engine, engine.config.cache_size, &engine.cache), 0);
    assert_int_equal(work_open(2, &engine.work), 0);
    replica_make(SIZE, false, NULL);
    return 0;
}

static int teardown(void **state)
{
    while (atomic_load(&engine.background) > 0) {
        nap();
    }
    check_all();
    assert_int_equal(atomic_load(&engine.counters.readers_waiting), 0);
    work_close(engine.work);
    replica_put(replica);
    cache_close(engine.cache);
    storage_close(engine.storage);
    return 0;
}

static int park(struct reader *reader, uint64_t offset, size_t length)
{
    *reader = (struct reader){.waiter.ready = ready};
    return engine_read(&engine, replica, offset, length, &reader->waiter);
}

static void fill(uint32_t shard)
{
    pthread_mutex_lock(&replica->lock);
    assert_int_equal(replica->states[shard], SPREAD_ABSENT);
    replica->states[shard] = SPREAD_FILLING;
    pthread_mutex_unlock(&replica->lock);
}

static void settle(uint32_t shard, int status)
{
    fill(shard);
    replica_shard_settle(replica, shard, status);
}

// -- Settle and waiters ---------------------------------------------------------------------------

static void a_settled_shard_answers_whom_it_completes(void **state)
{
    struct reader one, both, other;
    assert_int_equal(park(&one, SHARD + 5, 10), -EINPROGRESS);
    assert_int_equal(park(&both, SHARD, 2 * SHARD), -EINPROGRESS);
    assert_int_equal(park(&other, 5 * SHARD, 1), -EINPROGRESS);
    assert_int_equal(atomic_load(&engine.counters.readers_waiting), 3);

    settle(1, 0);
    expect_answer(&one, 0);
    expect_parked(&both);
    expect_parked(&other);
    settle(2, 0);
    expect_answer(&both, 0);
    expect_parked(&other);
    settle(5, 0);
    expect_answer(&other, 0);
    assert_int_equal(atomic_load(&replica->present), 3);
    assert_int_equal(atomic_load(&replica->resident), 3 * SHARD);
    assert_int_equal(atomic_load(&engine.counters.shards_fetched), 3);
}

static void what_is_here_is_read_without_waiting(void **state)
{
    struct reader reader;
    settle(8, 0);
    assert_int_equal(park(&reader, 8 * SHARD, 1234), 0);
    assert_int_equal(park(&reader, SIZE - 1, 1), 0);
    assert_int_equal(atomic_load(&replica->resident), 1234); /* the last shard is shorter */
    assert_int_equal(atomic_load(&engine.counters.reads_hit), 2);
    assert_int_equal(atomic_load(&engine.counters.readers_waiting), 0);
}

static void ranges_outside_the_file_are_refused(void **state)
{
    struct reader reader;
    assert_int_equal(park(&reader, SIZE, 1), -EINVAL);
    assert_int_equal(park(&reader, SIZE - 1, 2), -EINVAL);
    assert_int_equal(park(&reader, 0, 0), -EINVAL);
    assert_int_equal(park(&reader, 1, SIZE_MAX), -EINVAL);
    assert_int_equal(park(&reader, UINT64_MAX, 1), -EINVAL);
    assert_false(reader.waiter.parked);
}

static void a_failed_fill_leaves_the_reader_waiting(void **state)
{
    struct reader reader;
    assert_int_equal(park(&reader, 0, 100), -EINPROGRESS);
    settle(0, -ECONNRESET);
    assert_int_equal(replica->states[0], SPREAD_ABSENT);
    expect_parked(&reader);
    settle(0, -EBADMSG);
    expect_parked(&reader);
    assert_int_equal(atomic_load(&engine.counters.shards_failed), 2);
    settle(0, 0);
    expect_answer(&reader, 0);
}

static void failing_answers_every_reader_and_says_why(void **state)
{
    struct reader readers[8];
    for (unsigned i = 0; i < 8; i++) {
        assert_int_equal(park(&readers[i], (uint64_t)i * SHARD, SHARD), -EINPROGRESS);
    }
    replica_fail(replica, -EIO, "every source is gone");
    for (unsigned i = 0; i < 8; i++) {
        expect_answer(&readers[i], -EIO);
    }
    assert_int_equal(atomic_load(&engine.counters.reads_failed), 8);
    assert_int_equal(replica->error, -EIO);
    assert_string_equal(replica->reason, "every source is gone");

    /* The kernel's second try of the same read is answered at once; later readers start afresh. */
    struct reader later;
    replica->failed_ns = util_now_ns(); /* however long the answers took */
    assert_int_equal(park(&later, 0, 1), -EIO);
    usleep(150000);
    assert_int_equal(park(&later, 0, 1), -EINPROGRESS);
    settle(0, 0);
    expect_answer(&later, 0);
    assert_int_equal(replica->error, 0);
}

static void a_reader_that_gives_up_is_not_answered(void **state)
{
    struct reader gone, stays;
    assert_int_equal(park(&gone, 0, 1), -EINPROGRESS);
    assert_int_equal(park(&stays, 0, 1), -EINPROGRESS);
    assert_true(engine_read_cancel(&engine, &gone.waiter));
    assert_false(engine_read_cancel(&engine, &gone.waiter));
    settle(0, 0);
    expect_answer(&stays, 0);
    assert_int_equal(atomic_load(&gone.answers), 0);
    assert_false(engine_read_cancel(&engine, &stays.waiter));
}

static void readers_of_one_shard_wait_in_order_of_arrival(void **state)
{
    struct reader readers[3];
    for (unsigned i = 0; i < 3; i++) {
        assert_int_equal(park(&readers[i], (uint64_t)(2 - i) * SHARD, 1), -EINPROGRESS);
    }
    const struct engine_waiter *waiter;
    unsigned i = 0;
    DL_FOREACH(replica->waiters, waiter) {
        assert_ptr_equal(waiter, &readers[i++].waiter);
    }
    assert_int_equal(replica->cursor, 0); /* where the last of them reads */
    replica_fail(replica, -EIO, "the test is over");
    for (i = 0; i < 3; i++) {
        expect_answer(&readers[i], -EIO);
    }
}

/* Threads read, some give up, while another settles and fails: each reader is answered or taken back, never both. */
#define RACE_READERS 4
#define RACE_ROUNDS  400

static atomic_bool race_over;

static void *race_read(void *arg)
{
    unsigned seed = (unsigned)(uintptr_t)arg;
    for (unsigned round = 0; round < RACE_ROUNDS; round++) {
        struct reader reader;
        uint64_t offset = (uint64_t)((unsigned)rand_r(&seed) % (SIZE - SHARD));
        int status = park(&reader, offset, 1 + (size_t)((unsigned)rand_r(&seed) % SHARD));
        if (status == 0 || status == -EIO) { /* here, or failed a moment ago */
            continue;
        }
        assert_int_equal(status, -EINPROGRESS);
        bool back = rand_r(&seed) % 2 && engine_read_cancel(&engine, &reader.waiter);
        while (!back && atomic_load(&reader.answers) == 0) {
            nap();
        }
        assert_int_equal(atomic_load(&reader.answers), !back);
    }
    return NULL;
}

static void *race_settle(void *arg)
{
    unsigned seed = 7;
    while (!atomic_load(&race_over)) {
        uint32_t shard = (uint32_t)rand_r(&seed) % SHARDS;
        int what = rand_r(&seed) % 8;
        if (what == 0) {
            replica_fail(replica, -EIO, "a race");
            nap();
        } else if (!replica_shard_present(replica, shard)) {
            settle(shard, what < 7 ? -ECONNRESET : 0);
            nap();
        }
        if (replica_complete(replica)) { /* once more from the start: only a test may do this */
            pthread_mutex_lock(&replica->lock);
            for (uint32_t k = 0; k < SHARDS; k++) {
                atomic_store(&replica->states[k], SPREAD_ABSENT);
            }
            atomic_store(&replica->present, 0);
            atomic_store(&replica->resident, 0);
            pthread_mutex_unlock(&replica->lock);
        }
    }
    return NULL;
}

static void each_reader_is_answered_once_or_taken_back(void **state)
{
    pthread_t readers[RACE_READERS], settler;
    atomic_store(&race_over, false);
    assert_int_equal(pthread_create(&settler, NULL, race_settle, NULL), 0);
    for (uintptr_t i = 0; i < RACE_READERS; i++) {
        assert_int_equal(pthread_create(&readers[i], NULL, race_read, (void *)(i + 1)), 0);
    }
    for (unsigned i = 0; i < RACE_READERS; i++) {
        pthread_join(readers[i], NULL);
    }
    atomic_store(&race_over, true);
    pthread_join(settler, NULL);
}

// -- Digests --------------------------------------------------------------------------------------

static uint8_t digests[SHARDS][MODEL_DIGEST_MAX];

static void root_make(uint8_t root[MODEL_DIGEST_MAX])
{
    uint8_t list[SHARDS * MODEL_DIGEST_MAX];
    size_t size = replica->digest->size;
    for (uint32_t k = 0; k < SHARDS; k++) {
        memset(digests[k], (int)k + 1, sizeof digests[k]);
        memcpy(list + k * size, digests[k], size);
    }
    memset(root, 0, MODEL_DIGEST_MAX);
    digest_root(replica->digest, SIZE, SHARD, list, SHARDS, root);
}

static void digests_set(void)
{
    pthread_mutex_lock(&replica->lock);
    for (uint32_t k = 0; k < SHARDS; k++) {
        assert_false(atomic_load(&replica->all_known));
        assert_false(replica_digest_known(replica, k));
        replica_digest_set(replica, k, digests[k]);
        assert_true(replica_digest_known(replica, k));
        assert_memory_equal(replica_digest(replica, k), digests[k], replica->digest->size);
    }
    replica_check(replica);
    pthread_mutex_unlock(&replica->lock);
}

static void digests_that_make_up_the_root_are_known(void **state)
{
    uint8_t root[MODEL_DIGEST_MAX];
    root_make(root);
    replica_put(replica);
    replica_make(SIZE, true, root);
    digests_set();
    assert_true(atomic_load(&replica->all_known));
}

static void digests_that_do_not_make_up_the_root_count_for_nothing(void **state)
{
    uint8_t root[MODEL_DIGEST_MAX];
    root_make(root);
    replica_put(replica);
    replica_make(SIZE, true, root);
    digests[3][0] ^= 1;
    digests_set();
    assert_false(atomic_load(&replica->all_known));
}

static void without_a_root_the_whole_list_is_known(void **state)
{
    uint8_t root[MODEL_DIGEST_MAX];
    root_make(root);
    digests_set();
    assert_true(atomic_load(&replica->all_known));
}

static void a_known_digest_does_not_change(void **state)
{
    uint8_t first[MODEL_DIGEST_MAX] = {1}, second[MODEL_DIGEST_MAX] = {2};
    pthread_mutex_lock(&replica->lock);
    replica_digest_set(replica, 4, first);
    replica_digest_set(replica, 4, second);
    assert_int_equal(replica->known_count, 1);
    assert_memory_equal(replica_digest(replica, 4), first, replica->digest->size);
    pthread_mutex_unlock(&replica->lock);
}

// -- Bounds ---------------------------------------------------------------------------------------

static void shards_cover_the_file_without_gaps(void **state)
{
    static const uint64_t sizes[] = {0, 1, SHARD - 1, SHARD, SHARD + 1, 3 * SHARD, SIZE};
    for (size_t i = 0; i < util_count(sizes); i++) {
        replica_put(replica);
        replica_make(sizes[i], false, NULL);
        uint64_t at = 0;
        for (uint32_t k = 0; k < replica->shards; k++) {
            assert_int_equal(replica_shard_offset(replica, k), at);
            assert_in_range(replica_shard_size(replica, k), 1, SHARD);
            at += replica_shard_size(replica, k);
        }
        assert_int_equal(at, sizes[i]);
        assert_int_equal(replica_complete(replica), sizes[i] == 0);
    }
}

// -- The checker ----------------------------------------------------------------------------------

#ifdef P2PFS_CHECKS
enum damage { PRESENT_COUNT, RESIDENT, STATE, DIGESTS, WAITER, DEAD };

static void damage_do(enum damage damage, struct reader *reader)
{
    switch (damage) {
    case PRESENT_COUNT:
        atomic_fetch_add(&replica->present, 1);
        break;
    case RESIDENT:
        atomic_fetch_sub(&replica->resident, 1);
        break;
    case STATE:
        replica->states[2] = SPREAD_PRESENT + 1;
        break;
    case DIGESTS:
        replica->known_count = 1;
        break;
    case WAITER:
        reader->waiter.parked = false;
        break;
    case DEAD:
        replica->phase = REPLICA_DEAD;
        break;
    }
}

/* In a child: whether the checker ends it. */
static void expect_caught(enum damage damage, struct reader *reader)
{
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
        signal(SIGABRT, SIG_DFL); /* cmocka's own handler would call it a failed test */
        (void)!freopen("/dev/null", "w", stderr);
        damage_do(damage, reader);
        replica_check(replica);
        _exit(0);
    }
    int status = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFSIGNALED(status));
    assert_int_equal(WTERMSIG(status), SIGABRT);
}

static void the_checker_finds_what_is_broken(void **state)
{
    struct reader reader;
    settle(1, 0);
    assert_int_equal(park(&reader, 0, 1), -EINPROGRESS);
    check_all();
    for (enum damage damage = PRESENT_COUNT; damage <= DEAD; damage++) {
        expect_caught(damage, &reader);
    }
    assert_true(engine_read_cancel(&engine, &reader.waiter));
}
#endif

#define story(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        story(a_settled_shard_answers_whom_it_completes),
        story(what_is_here_is_read_without_waiting),
        story(ranges_outside_the_file_are_refused),
        story(a_failed_fill_leaves_the_reader_waiting),
        story(failing_answers_every_reader_and_says_why),
        story(a_reader_that_gives_up_is_not_answered),
        story(readers_of_one_shard_wait_in_order_of_arrival),
        story(each_reader_is_answered_once_or_taken_back),
        story(digests_that_make_up_the_root_are_known),
        story(digests_that_do_not_make_up_the_root_count_for_nothing),
        story(without_a_root_the_whole_list_is_known),
        story(a_known_digest_does_not_change),
        story(shards_cover_the_file_without_gaps),
#ifdef P2PFS_CHECKS
        story(the_checker_finds_what_is_broken),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
