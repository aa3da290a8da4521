/* What engine.h promises to who reads and to who is read from, over memory and over TCP. */
#include "tests/contract/engine_kit.h"

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
        transport_mem_faults_set(&(struct transport_mem_faults){.delay_ms = 100});
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
    transport_mem_faults_set(NULL);
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
    B->read_timeout_ms = 10 * WAIT_S * 1000; /* nobody holds it: no need to wait */
    up(2);
    put_in_place(A, "f");
    (void)version_of(B, "f");
    node_down(A);
    struct replica *replica = open_name(B, "f");
    assert_int_equal(read_range(B, "f", 1, 0, 100), -EIO);
    assert_int_equal(info(B, "f").state, ENGINE_OFFLINE);
    assert_int_equal(info(B, "f").error, -EIO);
    assert_int_not_equal(info(B, "f").reason[0], '\0');
    engine_replica_close(B->engine, replica);
    node_up(A);
    int status = -EIO;
    for (uint64_t end = util_now_ms() + WAIT_S * 1000; status < 0 && util_now_ms() < end; nap(10)) {
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
    remove_name(A, "f");
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

static const struct CMUnitTest stories[] = {
    story(what_one_registers_the_other_reads), story(a_name_is_taken_once),
    story(two_readers_one_transfer),           story(on_demand_only_touched_shards_come),
    story(what_arrives_is_served_on),          story(a_holder_leaves_in_mid_pull),
    story(offline_until_a_holder_returns),     story(a_read_is_parked_when_its_engine_closes),
    story(an_open_version_outlives_its_name),  story(only_who_knows_the_secret_is_served),
};

int main(void)
{
    filter();
    int failed = run_over("mem", stories);
    return failed + run_over("tcp", stories);
}
