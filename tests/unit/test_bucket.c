/* The limit of a rate: what bucket.h promises, by a clock of the test's own. P2PFS_SEED repeats a run. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "engine/bucket.h"
#include "meta/base/util.h"

#define SECOND 1000000000ull
#define MIB    (1u << 20)
#define TAKERS 24

static uint64_t seed;

static uint64_t draw(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

static int setup(void **state)
{
    const char *given = getenv("P2PFS_SEED");
    seed = given ? strtoull(given, NULL, 0) : (uint64_t)time(NULL);
    seed = seed ? seed : 1;
    print_message("P2PFS_SEED=%llu\n", (unsigned long long)seed);
    return 0;
}

/* Takers that always have something to move, and come when they were told to, or a little late. */
struct taker {
    struct bucket_ticket ticket;
    uint64_t next_ns;
    uint64_t bytes;
    bool urgent;
    bool idle;
};

struct scene {
    struct bucket bucket;
    struct taker takers[TAKERS];
    size_t count;
    uint64_t now;
    uint64_t late_ns; /* at most */
    uint64_t calls;
};

static void scene_begin(struct scene *s, uint64_t rate, size_t count)
{
    *s = (struct scene){.count = count, .now = 1000 * SECOND};
    bucket_open(&s->bucket, rate);
    for (size_t i = 0; i < count; i++) {
        s->takers[i].next_ns = s->now;
    }
}

static uint64_t moved(const struct scene *s, bool urgent)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < s->count; i++) {
        sum += s->takers[i].urgent == urgent ? s->takers[i].bytes : 0;
    }
    return sum;
}

static void scene_run(struct scene *s, uint64_t span)
{
    uint64_t end = s->now + span;
    for (;;) {
        struct taker *first = NULL;
        for (size_t i = 0; i < s->count; i++) {
            if (!s->takers[i].idle && (!first || s->takers[i].next_ns < first->next_ns)) {
                first = &s->takers[i];
            }
        }
        if (!first || first->next_ns > end) {
            break;
        }
        s->now = first->next_ns > s->now ? first->next_ns : s->now;
        uint64_t wait = 0;
        size_t got = bucket_take(&s->bucket, &first->ticket, 8 * MIB, first->urgent, s->now, &wait);
        s->calls++;
        assert_true(got <= bucket_piece(&s->bucket));
        first->bytes += got;
        if (!got) {
            assert_in_range(wait, 1, BUCKET_WAIT_NS);
        }
        first->next_ns = s->now + (got ? 1000 : wait + (s->late_ns ? draw() % s->late_ns : 0));
    }
    s->now = end;
}

static void within(uint64_t value, double wanted, double part)
{
    if ((double)value < wanted * (1 - part) || (double)value > wanted * (1 + part)) {
        fail_msg("%llu is not within %g%% of %.0f", (unsigned long long)value, part * 100, wanted);
    }
}

static void test_no_limit_is_no_limit(void **state)
{
    struct bucket bucket;
    struct bucket_ticket ticket = {0};
    uint64_t wait = 0;
    bucket_open(&bucket, 0);
    for (uint64_t i = 0; i < 100; i++) {
        assert_int_equal(bucket_take(&bucket, &ticket, 64 * MIB, false, SECOND, &wait), 64 * MIB);
    }
    assert_true(bucket_piece(&bucket) == SIZE_MAX);
    bucket_close(&bucket);
}

static void test_the_rate_holds_for_any_number_of_takers(void **state)
{
    static const uint64_t rates[] = {BUCKET_RATE_MIN, 1000000, 10 * MIB, 1000000007, 12500000000};
    for (size_t r = 0; r < util_count(rates); r++) {
        for (size_t count = 1; count <= TAKERS; count += 7) {
            struct scene s;
            scene_begin(&s, rates[r], count);
            s.late_ns = draw() % 10000000;
            scene_run(&s, 5 * SECOND);
            within(moved(&s, false), 5.0 * (double)rates[r], 0.05);
            bucket_close(&s.bucket);
        }
    }
}

static void test_takers_share_alike(void **state)
{
    struct scene s;
    scene_begin(&s, 10 * MIB, TAKERS);
    s.late_ns = 2000000;
    scene_run(&s, 20 * SECOND);
    for (size_t i = 0; i < s.count; i++) {
        within(s.takers[i].bytes, 20.0 * 10 * MIB / TAKERS, 0.1);
    }
    bucket_close(&s.bucket);
}

static void test_urgent_ones_go_first_and_nobody_starves(void **state)
{
    struct scene s;
    scene_begin(&s, 16 * MIB, 12);
    scene_run(&s, 2 * SECOND);
    uint64_t before = moved(&s, false);
    s.takers[0].urgent = s.takers[1].urgent = true;
    s.takers[0].bytes = s.takers[1].bytes = 0;
    before = moved(&s, false);
    scene_run(&s, 10 * SECOND);
    uint64_t background = moved(&s, false) - before;
    within(moved(&s, true), 10.0 * 16 * MIB * 7 / 8, 0.05);
    within(background, 10.0 * 16 * MIB / 8, 0.1);
    within(moved(&s, true) + background, 10.0 * 16 * MIB, 0.05);
    bucket_close(&s.bucket);
}

static void test_urgent_ones_alone_have_all_of_it(void **state)
{
    struct scene s;
    scene_begin(&s, 16 * MIB, 3);
    for (size_t i = 0; i < s.count; i++) {
        s.takers[i].urgent = true;
    }
    scene_run(&s, 4 * SECOND);
    within(moved(&s, true), 4.0 * 16 * MIB, 0.05);
    bucket_close(&s.bucket);
}

static void test_an_urgent_one_does_not_wait_behind_the_others(void **state)
{
    struct scene s;
    uint64_t wait = 0;
    struct bucket_ticket urgent = {0};
    scene_begin(&s, BUCKET_RATE_MIN, TAKERS); /* a round of all takes more than a second */
    scene_run(&s, 10 * SECOND);
    assert_true(bucket_take(&s.bucket, &urgent, MIB, true, s.now, &wait) > 0);
    /* one that stood in line as background may turn urgent */
    struct bucket_ticket turned = {0};
    assert_int_equal(bucket_take(&s.bucket, &turned, MIB, false, s.now, &wait), 0);
    uint64_t background_due = turned.due_ns;
    (void)bucket_take(&s.bucket, &turned, MIB, true, s.now, &wait);
    assert_true(turned.bytes == 0 || turned.due_ns < background_due);
    bucket_close(&s.bucket);
}

static void test_who_leaves_the_line_gives_back(void **state)
{
    struct bucket bucket;
    struct bucket_ticket ahead = {0};
    struct bucket_ticket behind = {0};
    uint64_t wait = 0;
    uint64_t now = 100 * SECOND;
    bucket_open(&bucket, MIB);
    while (bucket_take(&bucket, &ahead, MIB, false, now, &wait) > 0) {
    }
    uint64_t place = ahead.due_ns;
    bucket_leave(&bucket, &ahead);
    bucket_leave(&bucket, &ahead);
    assert_int_equal(bucket_take(&bucket, &behind, MIB, false, now, &wait), 0);
    assert_true(behind.due_ns == place);
    bucket_close(&bucket);
}

static void test_a_new_rate_counts_at_once(void **state)
{
    struct scene s;
    scene_begin(&s, MIB, 8);
    scene_run(&s, 3 * SECOND);
    bucket_rate_set(&s.bucket, 64 * MIB);
    uint64_t before = moved(&s, false);
    scene_run(&s, 4 * SECOND);
    within(moved(&s, false) - before, 4.0 * 64 * MIB, 0.07);
    bucket_rate_set(&s.bucket, MIB);
    before = moved(&s, false);
    scene_run(&s, 4 * SECOND);
    within(moved(&s, false) - before, 4.0 * MIB, 0.07);
    bucket_rate_set(&s.bucket, 0);
    uint64_t wait = 0;
    assert_int_equal(bucket_take(&s.bucket, &s.takers[0].ticket, 9 * MIB, false, s.now, &wait),
                     9 * MIB);
    bucket_close(&s.bucket);
}

static void test_a_pause_is_not_saved_up(void **state)
{
    struct scene s;
    scene_begin(&s, 8 * MIB, 4);
    scene_run(&s, SECOND);
    for (size_t i = 0; i < s.count; i++) {
        bucket_leave(&s.bucket, &s.takers[i].ticket);
    }
    s.now += 60 * SECOND;
    for (size_t i = 0; i < s.count; i++) {
        s.takers[i].next_ns = s.now;
    }
    uint64_t before = moved(&s, false);
    scene_run(&s, SECOND);
    within(moved(&s, false) - before, 8.0 * MIB, 0.06);
    bucket_close(&s.bucket);
}

static void test_nobody_asks_in_vain_often(void **state)
{
    struct scene s;
    scene_begin(&s, 10 * MIB, 16);
    scene_run(&s, 10 * SECOND);
    uint64_t pieces = moved(&s, false) / bucket_piece(&s.bucket);
    assert_true(s.calls < 3 * pieces + 100);
    bucket_close(&s.bucket);
}

/* What cannot be cut waits for all that was taken before, and then takes as long as its pieces would. */
static void a_whole_takes_its_time(void **state)
{
    (void)state;
    struct bucket bucket;
    struct bucket_ticket ticket = {0}, next = {0};
    uint64_t now = 1000 * SECOND, wait = 0;
    bucket_open(&bucket, MIB);
    assert_int_equal(bucket_take_whole(&bucket, &ticket, 64 * MIB, false, now, &wait), 64 * MIB);
    assert_int_equal(bucket_take_whole(&bucket, &next, 8 * MIB, false, now, &wait), 0);
    assert_int_equal(bucket_take_whole(&bucket, &next, 8 * MIB, false, now + 63 * SECOND, &wait),
                     0);
    assert_int_equal(bucket_take_whole(&bucket, &next, 8 * MIB, false, now + 64 * SECOND, &wait),
                     8 * MIB);
    // a place that is given up costs nobody behind it anything
    assert_int_equal(bucket_take_whole(&bucket, &ticket, 64 * MIB, false, now + 64 * SECOND, &wait),
                     0);
    bucket_leave(&bucket, &ticket);
    assert_int_equal(bucket_take_whole(&bucket, &next, MIB, false, now + 72 * SECOND, &wait), MIB);
    // and without a limit nothing waits
    bucket_rate_set(&bucket, 0);
    assert_int_equal(bucket_take_whole(&bucket, &ticket, 64 * MIB, false, now, &wait), 64 * MIB);
    bucket_close(&bucket);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_whole_takes_its_time),
        cmocka_unit_test(test_no_limit_is_no_limit),
        cmocka_unit_test(test_the_rate_holds_for_any_number_of_takers),
        cmocka_unit_test(test_takers_share_alike),
        cmocka_unit_test(test_urgent_ones_go_first_and_nobody_starves),
        cmocka_unit_test(test_urgent_ones_alone_have_all_of_it),
        cmocka_unit_test(test_an_urgent_one_does_not_wait_behind_the_others),
        cmocka_unit_test(test_who_leaves_the_line_gives_back),
        cmocka_unit_test(test_a_new_rate_counts_at_once),
        cmocka_unit_test(test_a_pause_is_not_saved_up),
        cmocka_unit_test(test_nobody_asks_in_vain_often),
    };
    return cmocka_run_group_tests(tests, setup, NULL);
}
