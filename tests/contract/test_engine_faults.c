/* Reads under the faults of the transport in memory. P2PFS_SEED repeats a run. */
#include "tests/contract/engine_kit.h"

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

static const struct CMUnitTest stories[] = {
    story(each_fault_is_borne_by_whom_it_may_be),
    story(under_random_faults_each_reader_gets_an_answer),
};

int main(void)
{
    filter();
    return run_over("mem", stories);
}
