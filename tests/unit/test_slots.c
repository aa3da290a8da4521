/* Upload slots: what slots.h promises, on a clock of the test's own. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <string.h>

#include "engine/slots.h"

#define MS 1000000ull

/* Of a node that has been giving for a while. */
static struct slots slots_busy(void)
{
    struct slots slots = slots_new();
    slots.window.width = SPREAD_WIDTH_LEAST;
    return slots;
}

static void beyond_the_slots_asks_wait_and_a_free_slot_goes_on(void **state)
{
    struct slots slots = slots_busy();
    struct slots_peer peer = {0};
    struct slots_ask asks[SPREAD_WIDTH_LEAST + 2] = {0};
    for (unsigned i = 0; i < SPREAD_WIDTH_LEAST + 2; i++) {
        assert_true(slots_ask(&slots, &peer, &asks[i]));
    }
    for (unsigned i = 0; i < SPREAD_WIDTH_LEAST; i++) {
        assert_ptr_equal(slots_next(&slots, 0), &asks[i]);
    }
    assert_null(slots_next(&slots, 0));
    slots_end(&slots, &asks[SPREAD_WIDTH_LEAST], 0, false); /* given up while it waits */
    assert_null(slots_next(&slots, 0));
    slots_end(&slots, &asks[1], 200 * MS, true);
    assert_ptr_equal(slots_next(&slots, 200 * MS), &asks[SPREAD_WIDTH_LEAST + 1]);
    assert_null(slots_next(&slots, 200 * MS));
    assert_int_equal(asks[1].state, SLOTS_IDLE);
    assert_int_equal(slots.waiting_count, 0);
}

static void who_was_idle_begins_with_few_slots(void **state)
{
    const unsigned most = 10; /* of a version of 280 shards: */
    assert_true(spread_width(280) < most && spread_width(280) > SLOTS_START);
    struct slots slots = slots_new();
    struct slots_peer peer = {0};
    struct slots_ask asks[40] = {0};
    for (unsigned again = 0; again < 2; again++) {
        for (unsigned i = 0; i < 40; i++) {
            asks[i].shards = 280;
            assert_true(slots_ask(&slots, &peer, &asks[i]));
        }
        for (unsigned i = 0; i < 40; i++) {
            while (slots_next(&slots, i * 50 * MS)) {
            }
            unsigned width = SLOTS_START + i;
            width = width < spread_width(280) ? width : spread_width(280);
            assert_int_equal(slots.granted_count, width < 40 - i ? width : 40 - i);
            slots_end(&slots, &asks[i], (i + 1) * 50 * MS, true);
        }
    }
}

/* One peer that asks for much does not keep another waiting. */
static void slots_go_round_the_peers(void **state)
{
    struct slots slots = slots_busy();
    struct slots_peer peers[3] = {0};
    struct slots_ask asks[3][40] = {0};
    for (unsigned p = 0; p < 3; p++) {
        for (unsigned i = 0; i < (p == 0 ? 40 : 10); i++) {
            assert_true(slots_ask(&slots, &peers[p], &asks[p][i]));
        }
    }
    struct slots_ask *running[SPREAD_WIDTH_LEAST];
    for (unsigned i = 0; i < SPREAD_WIDTH_LEAST; i++) {
        running[i] = slots_next(&slots, 0);
        assert_non_null(running[i]);
    }
    unsigned got[3] = {0};
    for (unsigned round = 0; round < 24; round++) {
        struct slots_ask *ended = running[round % SPREAD_WIDTH_LEAST];
        got[ended->peer - peers]++;
        slots_end(&slots, ended, 50 * MS, true);
        running[round % SPREAD_WIDTH_LEAST] = slots_next(&slots, 50 * MS);
        assert_non_null(running[round % SPREAD_WIDTH_LEAST]);
    }
    for (unsigned p = 0; p < 3; p++) {
        assert_in_range(got[p], 7, 9);
    }
}

/* However many links a peer has, it gets as much as another one. */
static void slots_go_round_the_peers_and_not_their_links(void **state)
{
    struct slots slots = slots_busy();
    struct slots_share shares[2] = {0};
    struct slots_peer links[] = {
        {.share = &shares[0]}, {.share = &shares[0]}, {.share = &shares[0]}, {.share = &shares[1]}};
    static struct slots_ask asks[4][64];
    for (unsigned i = 0; i < 64; i++) {
        for (unsigned p = 0; p < 4; p++) {
            assert_true(slots_ask(&slots, &links[p], &asks[p][i]));
        }
    }
    unsigned got[4] = {0};
    for (unsigned round = 0; round < 60; round++) {
        uint64_t now = round * 100 * MS;
        while (slots_next(&slots, now)) {
        }
        struct slots_ask *ended = slots.granted;
        got[ended->peer - links]++;
        slots_end(&slots, ended, now + 500 * MS, true);
    }
    assert_in_range(got[3], 28, 32);
    for (unsigned p = 0; p < 3; p++) { /* nor does one link of it wait for the others */
        assert_in_range(got[p], 8, 12);
    }
    while (slots.granted) {
        slots_end(&slots, slots.granted, 9000 * MS, true);
    }
    assert_int_equal(shares[0].granted, 0);
    assert_int_equal(shares[1].granted, 0);
    assert_null(slots.shared);
}

/* What a link holds that has died is held against the peer's next link for a moment only, or until it is known to have
 * ended. */
static void a_dead_link_does_not_keep_the_next_one_waiting(void **state)
{
    for (unsigned ends = 0; ends < 2; ends++) {
        struct slots slots = slots_busy();
        struct slots_share share = {0};
        struct slots_peer dead = {.share = &share};
        struct slots_peer next = {.share = &share};
        struct slots_peer other = {0};
        struct slots_ask held[2] = {0};
        struct slots_ask asks[3] = {0};
        slots.usual_ns = 10000 * MS; /* where every shard takes long, nothing is overdue */
        assert_true(slots_ask(&slots, &dead, &held[0]));
        assert_true(slots_ask(&slots, &dead, &held[1]));
        assert_ptr_equal(slots_next(&slots, 0), &held[0]);
        assert_ptr_equal(slots_next(&slots, 0), &held[1]);
        assert_true(slots_ask(&slots, &other, &asks[0]));
        assert_ptr_equal(slots_next(&slots, 0), &asks[0]);

        assert_true(slots_ask(&slots, &next, &asks[1]));
        assert_true(slots_ask(&slots, &other, &asks[2]));
        assert_null(slots_next(&slots, 0));
        uint64_t now = SLOTS_SHARE_NS + MS;
        if (ends) {
            now = MS;
            slots_end(&slots, &held[0], now, false);
            slots_end(&slots, &held[1], now, false);
        } else {
            slots.window.width++;
        }
        assert_ptr_equal(slots_next(&slots, now), &asks[1]);
    }
}

/* Among those that have equally little, so that nobody is left with the last shards. */
static void who_is_behind_goes_first(void **state)
{
    struct slots slots = slots_busy();
    struct slots_peer peers[3] = {0};
    struct slots_ask asks[3] = {{.progress = 60}, {.progress = 20}, {.progress = 40}};
    for (unsigned p = 0; p < 3; p++) {
        assert_true(slots_ask(&slots, &peers[p], &asks[p]));
    }
    assert_ptr_equal(slots_next(&slots, 0), &asks[1]);
    assert_ptr_equal(slots_next(&slots, 0), &asks[2]);
    assert_ptr_equal(slots_next(&slots, 0), &asks[0]);
}

static void a_reader_goes_before_background(void **state)
{
    struct slots slots = slots_busy();
    struct slots_peer peers[2] = {0};
    struct slots_ask asks[20] = {0};
    for (unsigned i = 0; i < 20; i++) {
        assert_true(slots_ask(&slots, &peers[0], &asks[i]));
    }
    while (slots_next(&slots, 0)) {
    }
    struct slots_ask urgent[SPREAD_URGENT_EXTRA + 1] = {0};
    for (unsigned i = 0; i < SPREAD_URGENT_EXTRA + 1; i++) {
        urgent[i].urgent = true;
        assert_true(slots_ask(&slots, &peers[1], &urgent[i]));
    }
    for (unsigned i = 0; i < SPREAD_URGENT_EXTRA; i++) { /* beyond the slots, at once */
        assert_ptr_equal(slots_next(&slots, 0), &urgent[i]);
    }
    assert_null(slots_next(&slots, 0));
    slots_end(&slots, &asks[0], 50 * MS, true); /* then as the next one */
    assert_ptr_equal(slots_next(&slots, 50 * MS), &urgent[SPREAD_URGENT_EXTRA]);
}

/* A stopped peer's asks do not take one slot after the other. */
static void who_stands_still_gets_no_more(void **state)
{
    struct slots slots = slots_busy();
    struct slots_peer peers[2] = {0};
    struct slots_ask asks[2][40] = {0};
    for (unsigned i = 0; i < 40; i++) {
        assert_true(slots_ask(&slots, &peers[0], &asks[0][i]));
        assert_true(slots_ask(&slots, &peers[1], &asks[1][i]));
    }
    unsigned got[2] = {0};
    for (uint64_t now = 0; now < 20000 * MS; now += 100 * MS) {
        struct slots_ask *ask;
        while ((ask = slots_next(&slots, now))) {
            got[ask->peer - peers]++;
            if (ask->peer == &peers[1]) {
                slots_end(&slots, ask, now + 50 * MS, true);
            }
        }
        slots_overdue(&slots, now);
    }
    assert_int_equal(got[1], 40);
    assert_in_range(got[0], SLOTS_OVERDUE_PEER, SLOTS_OVERDUE_PEER + SLOTS_CEILING);
    assert_int_equal(peers[0].overdue, got[0]);
    slots_end(&slots, &asks[0][0], 20000 * MS, true); /* it goes on */
    for (unsigned i = 1; i < got[0]; i++) {
        slots_end(&slots, &asks[0][i], 20000 * MS, true);
    }
    assert_int_equal(slots.overdue_count, 0);
    assert_ptr_equal(slots_next(&slots, 20000 * MS), &asks[0][got[0]]);
}

/* Large shards on a slow link: nobody stands still, and no more are granted than there are slots. */
static void where_all_are_slow_none_is_overdue(void **state)
{
    struct slots slots = slots_busy();
    struct slots_peer peer = {0};
    struct slots_ask asks[SPREAD_WIDTH_LEAST * 2] = {0};
    for (unsigned i = 0; i < SPREAD_WIDTH_LEAST * 2; i++) {
        assert_true(slots_ask(&slots, &peer, &asks[i]));
    }
    while (slots_next(&slots, 0)) {
    }
    slots_overdue(&slots, 3000 * MS);
    for (unsigned i = 0; i < SPREAD_WIDTH_LEAST; i++) {
        slots_end(&slots, &asks[i], 3000 * MS, true);
    }
    while (slots_next(&slots, 3000 * MS)) {
    }
    slots_overdue(&slots, 6000 * MS);
    assert_int_equal(slots.overdue_count, 0);
    assert_int_equal(slots.granted_count, SPREAD_WIDTH_LEAST);
}

static void who_never_says_done_holds_no_slot(void **state)
{
    struct slots slots = slots_busy();
    struct slots_peer peers[2] = {0};
    struct slots_ask asks[2][SPREAD_WIDTH_LEAST] = {0};
    for (unsigned p = 0; p < 2; p++) {
        for (unsigned i = 0; i < SPREAD_WIDTH_LEAST; i++) {
            assert_true(slots_ask(&slots, &peers[p], &asks[p][i]));
        }
        if (p == 0) {
            while (slots_next(&slots, 0)) {
            }
        }
    }
    slots_overdue(&slots, 500 * MS);
    assert_null(slots_next(&slots, 500 * MS));
    slots_overdue(&slots, 1500 * MS);
    for (unsigned i = 0; i < SPREAD_WIDTH_LEAST; i++) {
        assert_ptr_equal(slots_next(&slots, 1500 * MS), &asks[1][i]);
    }
    slots_end(&slots, &asks[0][0], 9000 * MS, true); /* late is still fine */
    for (unsigned p = 0; p < 2; p++) {
        for (unsigned i = 0; i < SPREAD_WIDTH_LEAST; i++) {
            slots_end(&slots, &asks[p][i], 9000 * MS, false);
        }
    }
    assert_int_equal(slots.granted_count + slots.overdue_count + slots.waiting_count, 0);
    assert_int_equal(peers[0].granted + peers[1].granted, 0);
}

static void slots_grow_while_shards_are_quick(void **state)
{
    struct slots slots = slots_busy();
    struct slots_peer peer = {0};
    struct slots_ask asks[2] = {0};
    assert_true(slots_ask(&slots, &peer, &asks[0]));
    for (unsigned i = 0; i < 200; i++) {
        assert_true(slots_ask(&slots, &peer, &asks[(i + 1) % 2]));
        assert_ptr_equal(slots_next(&slots, i * MS), &asks[i % 2]);
        slots_end(&slots, &asks[i % 2], i * MS + 1, true);
    }
    assert_int_equal(slots.window.width, SLOTS_CEILING);
}

static void a_full_queue_says_so(void **state)
{
    struct slots slots = slots_busy();
    struct slots_peer peer = {0};
    struct slots_ask asks[SLOTS_WAITING_PEER + 1] = {0};
    for (unsigned i = 0; i < SLOTS_WAITING_PEER; i++) {
        assert_true(slots_ask(&slots, &peer, &asks[i]));
    }
    assert_false(slots_ask(&slots, &peer, &asks[SLOTS_WAITING_PEER]));
    assert_int_equal(asks[SLOTS_WAITING_PEER].state, SLOTS_IDLE);
}

/* However many others have filled the queue: who has nothing in it gets a place. */
static void many_greedy_peers_keep_no_other_out(void **state)
{
    enum { GREEDY = 160 };
    static struct slots_peer greedy[GREEDY], modest;
    static struct slots_ask asks[GREEDY][SLOTS_WAITING_PEER], ask[2];
    struct slots slots = slots_busy();
    unsigned queued = 0;
    for (unsigned i = 0; i < GREEDY * SLOTS_WAITING_PEER; i++) {
        unsigned p = i / SLOTS_WAITING_PEER;
        queued += slots_ask(&slots, &greedy[p], &asks[p][i % SLOTS_WAITING_PEER]);
    }
    assert_in_range(queued, SLOTS_WAITING_NODE, SLOTS_WAITING_NODE + GREEDY);
    assert_true(slots_ask(&slots, &modest, &ask[0]));
    assert_false(slots_ask(&slots, &modest, &ask[1]));
    bool got = false; /* in the first round */
    for (unsigned i = 0; i <= GREEDY && !got; i++) {
        struct slots_ask *next = slots_next(&slots, 0);
        got = next == &ask[0];
        slots_end(&slots, next, 50 * MS, true);
    }
    assert_true(got);
}

/* Nor do many that stand still. */
static void many_stopped_peers_keep_no_other_out(void **state)
{
    enum { STOPPED = 300 };
    static struct slots_peer stopped[STOPPED], other;
    static struct slots_ask asks[STOPPED][2 * SLOTS_OVERDUE_PEER], ask[3];
    struct slots slots = slots_busy();
    uint64_t now = 0;
    for (unsigned i = 0; i < STOPPED * 2 * SLOTS_OVERDUE_PEER; i++) {
        assert_true(slots_ask(&slots, &stopped[i % STOPPED], &asks[i % STOPPED][i / STOPPED]));
    }
    for (unsigned round = 0; round < 1000; round++, now += 1100 * MS) {
        while (slots_next(&slots, now)) {
        }
        slots_overdue(&slots, now + 1050 * MS);
    }
    assert_in_range(slots.overdue_count, SLOTS_OVERDUE_MAX, SLOTS_OVERDUE_MAX + SLOTS_CEILING);
    assert_null(slots_next(&slots, now)); /* they get no more */
    for (unsigned i = 0; i < 3; i++, now += 50 * MS) {
        assert_true(slots_ask(&slots, &other, &ask[i]));
        assert_ptr_equal(slots_next(&slots, now), &ask[i]);
        slots_end(&slots, &ask[i], now + 40 * MS, true);
    }
}

static void each_shard_is_handed_out_once_before_one_is_repeated(void **state)
{
    struct slots_book *book;
    assert_int_equal(slots_book_open(100, &book), 0);
    assert_int_equal(slots_book_wait(book, 7, 1, 0, 300), 0);
    slots_book_promise(book, 7, 1, 0);
    assert_int_equal(slots_book_wait(book, 7, 2, 0, 300), 300); /* on its way to 1 */
    assert_int_equal(slots_book_wait(book, 7, 1, 0, 300), 0);   /* who asks for it again gets it */
    slots_book_settle(book, 7, 1, 1000, true);
    assert_int_equal(slots_book_wait(book, 7, 2, 1100, 300), 300);
    assert_int_equal(slots_book_wait(book, 7, 2, 2100, 300), 100);
    assert_int_equal(slots_book_wait(book, 7, 2, 2200, 300), 0); /* 1 does not pass it on */

    slots_book_promise(book, 8, 1, 0);
    assert_int_equal(slots_book_fresh(book), 98);
    slots_book_settle(book, 8, 1, 1000, false); /* it never got there */
    assert_int_equal(slots_book_wait(book, 8, 2, 1000, 300), 0);
    assert_int_equal(slots_book_fresh(book), 99);

    slots_book_promise(book, 7, 2, 0); /* a repeat that comes to nothing: 1 still has it */
    slots_book_settle(book, 7, 2, 2000, false);
    assert_int_equal(slots_book_fresh(book), 99);
    slots_book_close(book);
}

static void when_all_have_been_handed_out_a_repeat_waits_less(void **state)
{
    struct slots_book *book;
    assert_int_equal(slots_book_open(2, &book), 0);
    for (uint32_t k = 0; k < 2; k++) {
        slots_book_promise(book, k, 1, 0);
        slots_book_settle(book, k, 1, 1000, true);
    }
    assert_int_equal(slots_book_wait(book, 0, 2, 1100, 300), 200);
    assert_int_equal(slots_book_wait(book, 0, 2, 1300, 300), 0);
    slots_book_close(book);
}

/* However long its peer keeps it without an end: others get the shard then, and what becomes of it is no matter. */
static void a_promise_does_not_hold_for_ever(void **state)
{
    struct slots_book *book;
    assert_int_equal(slots_book_open(10, &book), 0);
    slots_book_promise(book, 3, 1, 1000);
    assert_int_equal(slots_book_wait(book, 3, 2, 1900, 300), 300);
    assert_int_equal(slots_book_wait(book, 3, 2, 2100, 300), 100);
    assert_int_equal(slots_book_wait(book, 3, 2, 2200, 300), 0);
    slots_book_promise(book, 3, 2, 2200);
    slots_book_settle(book, 3, 1, 2300, false);
    assert_int_equal(slots_book_wait(book, 3, 4, 2300, 300), 300); /* 2 has it now */
    slots_book_settle(book, 3, 2, 2400, true);
    assert_int_equal(slots_book_wait(book, 3, 4, 3500, 300), 100);
    slots_book_close(book);
}

/* Everybody is pointed to other shards, and to all of those that nobody has. */
static void advice_names_what_nobody_has(void **state)
{
    struct slots_book *book;
    bool named[100] = {false};
    assert_int_equal(slots_book_open(100, &book), 0);
    for (uint32_t k = 0; k < 100; k += 2) {
        slots_book_promise(book, k, 1, 0);
    }
    for (unsigned round = 0; round < 10; round++) {
        uint32_t shards[5];
        assert_int_equal(slots_book_advise(book, shards, 5), 5);
        for (unsigned i = 0; i < 5; i++) {
            assert_int_equal(shards[i] % 2, 1);
            assert_false(named[shards[i]]);
            named[shards[i]] = true;
        }
    }
    for (uint32_t k = 1; k < 100; k += 2) {
        slots_book_promise(book, k, 1, 0);
    }
    uint32_t shard;
    assert_int_equal(slots_book_advise(book, &shard, 1), 0);
    slots_book_close(book);
}

/* A reader is served at once; background one at a time, and slowly while the node has work of its own. */
static void an_idle_seeder_goes_behind_everything(void **state)
{
    struct slots slots = slots_busy();
    struct slots_peer peer = {0};
    struct slots_ask normal[4] = {0};
    struct slots_ask urgent[2] = {{.urgent = true}, {.urgent = true}};
    slots.idle = true;
    for (unsigned i = 0; i < 4; i++) {
        assert_true(slots_ask(&slots, &peer, &normal[i]));
    }
    assert_ptr_equal(slots_next(&slots, 10 * MS), &normal[0]);
    assert_null(slots_next(&slots, 10 * MS));
    assert_true(slots_ask(&slots, &peer, &urgent[0]));
    assert_ptr_equal(slots_next(&slots, 10 * MS), &urgent[0]);
    slots_end(&slots, &normal[0], 20 * MS, true);
    assert_null(slots_next(&slots, 20 * MS)); /* the reader's shard is under way */
    slots_end(&slots, &urgent[0], 30 * MS, true);
    assert_ptr_equal(slots_next(&slots, 30 * MS), &normal[1]);
    slots_end(&slots, &normal[1], 40 * MS, true);

    slots.yield = true;
    assert_null(slots_next(&slots, 40 * MS));
    assert_true(slots_ask(&slots, &peer, &urgent[1]));
    assert_ptr_equal(slots_next(&slots, 40 * MS), &urgent[1]);
    slots_end(&slots, &urgent[1], 50 * MS, true);
    assert_null(slots_next(&slots, 900 * MS));
    assert_ptr_equal(slots_next(&slots, 30 * MS + SLOTS_TRICKLE_NS), &normal[2]);
    slots_end(&slots, &normal[2], 40 * MS + SLOTS_TRICKLE_NS, true);
    assert_null(slots_next(&slots, 40 * MS + SLOTS_TRICKLE_NS));
    slots.yield = false;
    assert_ptr_equal(slots_next(&slots, 40 * MS + SLOTS_TRICKLE_NS), &normal[3]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(beyond_the_slots_asks_wait_and_a_free_slot_goes_on),
        cmocka_unit_test(who_was_idle_begins_with_few_slots),
        cmocka_unit_test(slots_go_round_the_peers),
        cmocka_unit_test(slots_go_round_the_peers_and_not_their_links),
        cmocka_unit_test(a_dead_link_does_not_keep_the_next_one_waiting),
        cmocka_unit_test(an_idle_seeder_goes_behind_everything),
        cmocka_unit_test(who_is_behind_goes_first),
        cmocka_unit_test(a_reader_goes_before_background),
        cmocka_unit_test(who_stands_still_gets_no_more),
        cmocka_unit_test(where_all_are_slow_none_is_overdue),
        cmocka_unit_test(who_never_says_done_holds_no_slot),
        cmocka_unit_test(slots_grow_while_shards_are_quick),
        cmocka_unit_test(a_full_queue_says_so),
        cmocka_unit_test(many_greedy_peers_keep_no_other_out),
        cmocka_unit_test(many_stopped_peers_keep_no_other_out),
        cmocka_unit_test(each_shard_is_handed_out_once_before_one_is_repeated),
        cmocka_unit_test(when_all_have_been_handed_out_a_repeat_waits_less),
        cmocka_unit_test(a_promise_does_not_hold_for_ever),
        cmocka_unit_test(advice_names_what_nobody_has),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
