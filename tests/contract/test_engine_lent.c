/* What engine.h promises of memory that a program lends: over memory, where a shard that lies in several ranges passes
 * through a buffer, and over TCP, where it does not. */
#include "tests/contract/engine_kit.h"

#include "engine/replica.h"

#define SIZE (2 * MIB + 777)

struct lent {
    uint8_t bytes[SIZE + 4096];
    struct engine_range ranges[5];
    struct replica *replica;
    atomic_int released;
};

static struct lent from, to, third;

static void released(void *arg)
{
    atomic_fetch_add(&((struct lent *)arg)->released, 1);
}

/* SIZE bytes in five ranges with gaps between them, cut by the seed. */
static void cut(struct lent *lent)
{
    memset(lent, 0, sizeof *lent);
    uint64_t at = 0;
    for (unsigned i = 0; i < 5; i++) {
        uint64_t left = SIZE - at;
        uint64_t length = i == 4 ? left : mix(seed++) % (left / 2);
        lent->ranges[i] = (struct engine_range){lent->bytes + at + i * 100, length};
        at += length;
    }
}

static void lent_fill(struct lent *lent)
{
    static uint8_t all[SIZE];
    uint64_t at = 0;
    pattern(1, 0, all, sizeof all);
    for (unsigned i = 0; i < 5; at += lent->ranges[i++].length) {
        memcpy(lent->ranges[i].address, all + at, lent->ranges[i].length);
    }
}

static void lent_right(const struct lent *lent)
{
    uint64_t at = 0;
    for (unsigned i = 0; i < 5; at += lent->ranges[i++].length) {
        assert_true(right(1, at, lent->ranges[i].address, lent->ranges[i].length));
    }
}

static void offer_undigested(struct node *node, const char *name)
{
    struct catalog_sync sync = {0};
    cut(&from);
    lent_fill(&from);
    assert_int_equal(
        engine_lent_offer(node->engine, from.ranges, 5, SHARD, released, &from, &from.replica), 0);
    assert_int_equal(engine_lent_publish(node->engine, from.replica, MODEL_ROOT, name, &attr, 0,
                                         catalog_sync_done, &sync),
                     0);
    assert_int_equal(catalog_sync_wait(&sync), 0);
}

static void offer(struct node *node, const char *name)
{
    offer_undigested(node, name);
    engine_lent_published(node->engine, from.replica);
}

static int take(struct node *node, const char *name, struct lent *lent)
{
    struct reading waits = {.waiter.ready = ready, .status = 1};
    struct model_id version = version_of(node, name);
    cut(lent);
    assert_int_equal(
        engine_lent_pull(node->engine, &version, lent->ranges, 5, released, lent, &lent->replica),
        0);
    int status = engine_lent_wait(node->engine, lent->replica, &waits.waiter);
    while (status == -EINPROGRESS && atomic_load(&waits.answers) == 0) {
        nap(1);
    }
    return status == -EINPROGRESS ? atomic_load(&waits.status) : status;
}

static void give_back(struct node *node, struct lent *lent)
{
    engine_lent_release(node->engine, lent->replica);
    while (atomic_load(&lent->released) == 0) {
        nap(1);
    }
    memset(lent->bytes, 0, sizeof lent->bytes);
}

static void shards_cross_ranges_on_their_way(void **state)
{
    up(3);
    offer(A, "f");
    assert_int_equal(take(B, "f", &to), 0);
    lent_right(&to);
    while (!info(B, "f").sealed) { /* until then newcomers trust nobody but the registrar */
        nap(1);
    }
    give_back(A, &from);
    assert_int_equal(take(C, "f", &third), 0); /* from B alone */
    lent_right(&third);
    give_back(B, &to);
    give_back(C, &third);
    assert_int_equal(atomic_load(&to.released), 1);
}

static void a_complete_holder_vouches_for_what_its_registrar_left_undigested(void **state)
{
    up(3);
    offer_undigested(A, "f");
    assert_false(info(B, "f").sealed);
    assert_int_equal(take(B, "f", &to), 0);
    give_back(A, &from);
    node_down(
        A); /* of all that it registered, it has told the digests that B asked for, and no root */
    assert_int_equal(take(C, "f", &third), 0);
    lent_right(&third);
    assert_true(info(C, "f").sealed);
    give_back(B, &to);
    give_back(C, &third);
}

/* Other bytes, and digests that go with them, of what a node has of a version. */
static void falsify(struct node *node, const char *name)
{
    struct replica *replica = open_name(node, name);
    pthread_mutex_lock(&replica->lock);
    for (uint32_t k = 0; k < replica->shards; k++) {
        if (replica_shard_present(replica, k)) {
            uint8_t *bytes = replica->map + replica_shard_offset(replica, k);
            memset(bytes, 0x66, replica_shard_size(replica, k));
            assert_true(replica_digest_known(replica, k));
            assert_int_equal(digest_of_shard(replica->digest, bytes, replica_shard_size(replica, k),
                                             replica->digests + (size_t)k * replica->digest->size),
                             0);
        }
    }
    pthread_mutex_unlock(&replica->lock);
    engine_replica_close(node->engine, replica);
}

/* B lies about shards of a version that has no root yet, and its registrar is slow to send them: nobody else's word is
 * taken for its digests, so B is asked for nothing. */
static void a_holder_is_not_believed_before_there_is_a_root(void **state)
{
    enum { SHARDS = 4 };
    B->demand = C->demand = true;
    up(3);
    offer_undigested(A, "f");
    assert_int_equal(read_range(B, "f", 1, 0, SHARDS * SHARD), 0);
    falsify(B, "f");
    uint32_t both = 2 * stats(C).lanes; /* so few have a link to each lane */
    struct replica *replica = open_name(C, "f");
    struct transport_mem_faults faults = {.stall_fetch_each = 2};
    transport_mem_faults_set(&faults);
    for (uint64_t k = 0; k < 2; k++) {
        struct reading reading;
        read_begin(&reading, C, replica, k * SHARD, SHARD);
        uint64_t end = util_now_ms() + WAIT_S * 1000;
        while (k == 0 && info(C, "f").sources < both && util_now_ms() < end) {
            nap(1);
        }
        assert_int_equal(read_end(&reading, 1), 0);
    }
    transport_mem_faults_set(NULL);
    assert_int_equal(info(C, "f").sources, both);
    assert_int_equal(received_from(C, "B"), 0);
    assert_false(info(C, "f").sealed);
    engine_replica_close(C->engine, replica);
    expect_quiet(B);
    give_back(A, &from);
}

static void a_file_is_read_of_lent_memory_and_lent_memory_filled_from_a_file(void **state)
{
    up(2);
    offer(A, "f");
    assert_int_equal(read_all(B, "f", 1, SIZE), 0);
    give_back(A, &from);
    assert_int_equal(put(B, "g", 1, SIZE), 0);
    assert_int_equal(take(A, "g", &to), 0);
    lent_right(&to);
    give_back(A, &to);
}

static void what_breaks_on_its_way_is_fetched_again(void **state)
{
    struct transport_mem_faults faults = {.short_fetch_each = 5};
    up(2);
    transport_mem_faults_set(&faults);
    offer(A, "f");
    assert_int_equal(take(B, "f", &to), 0);
    lent_right(&to);
    transport_mem_faults_set(NULL);
    give_back(A, &from);
    give_back(B, &to);
}

static void memory_comes_back_in_the_middle_of_a_pull(void **state)
{
    struct transport_mem_faults faults = {.delay_ms = 2};
    up(2);
    transport_mem_faults_set(&faults);
    for (unsigned i = 0; i < 10; i++) {
        struct reading waits = {.waiter.ready = ready};
        char name[8];
        snprintf(name, sizeof name, "f%u", i);
        offer(A, name);
        struct model_id version = version_of(B, name);
        cut(&to);
        assert_int_equal(
            engine_lent_pull(B->engine, &version, to.ranges, 5, released, &to, &to.replica), 0);
        assert_int_equal(engine_lent_wait(B->engine, to.replica, &waits.waiter), -EINPROGRESS);
        nap(i * 2);
        if (!engine_read_cancel(B->engine, &waits.waiter)) {
            while (atomic_load(&waits.answers) == 0) {
                nap(1);
            }
        }
        give_back(i % 2 ? A : B, i % 2 ? &from : &to);
        give_back(i % 2 ? B : A, i % 2 ? &to : &from);
        nap(5);
        for (size_t k = 0; k < sizeof to.bytes; k++) {
            assert_int_equal(to.bytes[k], 0);
        }
    }
}

static const struct CMUnitTest stories[] = {
    story(shards_cross_ranges_on_their_way),
    story(a_complete_holder_vouches_for_what_its_registrar_left_undigested),
    story(a_holder_is_not_believed_before_there_is_a_root),
    story(a_file_is_read_of_lent_memory_and_lent_memory_filled_from_a_file),
    story(what_breaks_on_its_way_is_fetched_again),
    story(memory_comes_back_in_the_middle_of_a_pull),
};

int main(void)
{
    filter();
    int failed = run_over("mem", stories);
    return failed + run_over("tcp", stories);
}
