/* Several nodes that pull one version at once, over the transport in memory: who gets what from whom. */
#include "tests/contract/engine_kit.h"

#define SIZE (4 * MIB)

/* A has it; the others begin together, on links that are slow enough for all of them to take part. */
static void pull_together(const char *name)
{
    transport_mem_faults_set(NULL);
    assert_int_equal(put(A, name, 1, SIZE), 0);
    for (unsigned i = 1; i < 4; i++) {
        (void)version_of(&nodes[i], name);
    }
    transport_mem_faults_set(&(struct transport_mem_faults){.delay_ms = 300});
    struct model_id version = version_of(B, name);
    for (unsigned i = 1; i < 4; i++) {
        assert_int_equal(engine_pull(nodes[i].engine, &version), 0);
    }
    transport_mem_faults_set(&(struct transport_mem_faults){.delay_ms = 10});
    for (unsigned i = 1; i < 4; i++) {
        assert_int_equal(read_all(&nodes[i], name, 1, SIZE), 0);
        expect_complete(&nodes[i], name);
    }
}

/* None of them was a holder when the others asked the metadata: A has named them to each other. */
static void pullers_find_each_other_through_their_holder(void **state)
{
    up(4);
    pull_together("f");
    for (unsigned i = 1; i < 4; i++) {
        uint64_t others = 0;
        for (unsigned j = 1; j < 4; j++) {
            others += j == i ? 0 : received_from(&nodes[i], nodes[j].name);
        }
        assert_true(others > SIZE / 4);
    }
}

/* It answers BUSY, with advice, to who asks for what another one has just got. */
static void the_first_holder_sends_each_shard_once(void **state)
{
    up(4);
    pull_together("f");
    double copies = (double)stats(A).bytes_served / SIZE;
    print_message("A served %.2f copies to B, C and D, and was BUSY %u times\n", copies,
                  (unsigned)stats(A).asks_refused);
    assert_true(copies >= 1 && copies < 2);
}

/* C and D share the way to the others: what one of them fetches, the other takes from it. */
static void little_more_than_one_copy_comes_into_a_rack(void **state)
{
    for (unsigned i = 0; i < 4; i++) {
        nodes[i].locality = i < 2 ? "hall/1" : "hall/2";
    }
    up(4);
    const char *names[] = {"f", "g", "h", "i", "j", "k"};
    for (unsigned i = 0; i < util_count(names); i++) {
        pull_together(names[i]);
    }
    uint64_t came = received_from(C, "A") + received_from(C, "B") + received_from(D, "A") +
                    received_from(D, "B");
    double copies = (double)came / SIZE / util_count(names);
    print_message("%.2f copies came to C and D from A and B\n", copies);
    assert_true(copies >= 1 && copies < 1.6); /* 2, if each fetched for itself */
}

/* A reader waits for one shard, and the holder that was asked first never sends it. */
static void a_late_shard_is_asked_of_another_holder_too(void **state)
{
    C->demand = true;
    up(3);
    assert_int_equal(put(A, "f", 1, MIB), 0);
    assert_int_equal(read_all(B, "f", 1, MIB), 0);
    expect_holders(C, "f", 2);
    transport_mem_faults_set(&(struct transport_mem_faults){.stall_fetch_each = 2});
    for (uint64_t k = 0; k < 4; k++) {
        assert_int_equal(read_range(C, "f", 1, k * SHARD, SHARD), 0);
    }
    transport_mem_faults_set(NULL);
    print_message("%u of %u shards were asked twice\n", (unsigned)stats(C).shards_hedged,
                  (unsigned)stats(C).shards_fetched);
    assert_true(stats(C).shards_hedged > 0);
    assert_int_equal(stats(C).shards_fetched, 4); /* each counted once */
}

/* D leaves in the middle, and comes back as another incarnation: the rest goes on without it, and with it. */
static void one_leaves_and_comes_back(void **state)
{
    up(4);
    assert_int_equal(put(A, "f", 1, SIZE), 0);
    transport_mem_faults_set(&(struct transport_mem_faults){.delay_ms = 10});
    for (unsigned i = 1; i < 4; i++) {
        struct model_id version = version_of(&nodes[i], "f");
        assert_int_equal(engine_pull(nodes[i].engine, &version), 0);
    }
    while (stats(D).shards_fetched < 8) {
        nap(1);
    }
    node_down(D);
    assert_int_equal(read_all(B, "f", 1, SIZE), 0);
    node_up(D);
    assert_int_equal(read_all(C, "f", 1, SIZE), 0);
    assert_int_equal(read_all(D, "f", 1, SIZE), 0);
}

static const struct CMUnitTest stories[] = {
    story(pullers_find_each_other_through_their_holder),
    story(the_first_holder_sends_each_shard_once),
    story(little_more_than_one_copy_comes_into_a_rack),
    story(a_late_shard_is_asked_of_another_holder_too),
    story(one_leaves_and_comes_back),
};

int main(void)
{
    filter();
    return run_over("mem", stories);
}
