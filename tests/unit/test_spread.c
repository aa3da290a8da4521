/* Which shard next: what spread.h promises, over views drawn at random (P2PFS_SEED repeats a run). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/spread.h"

#define SHARDS 96
#define ROUNDS 20000
#define DEMAND 5

static uint64_t seed;

static uint64_t draw(void) /* xorshift64: the same everywhere for the same seed */
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

/* A view with its arrays, so that the view can point at them. */
struct scene {
    uint32_t shards;
    uint16_t rarity[SHARDS];
    struct spread_range demand[DEMAND];
    uint8_t bitmap[SPREAD_BITMAP_BYTES(SHARDS)];
    struct spread *spread;
    struct spread_want want;
    struct spread_offer offer;
};

/* A scene that was drawn before is drawn anew; scene_clear behind the last one. */
static void scene_clear(struct scene *scene)
{
    spread_close(scene->spread);
    memset(scene, 0, sizeof *scene);
}

static void scene_draw(struct scene *scene)
{
    scene_clear(scene);
    uint32_t shards = (uint32_t)(1 + draw() % SHARDS);
    scene->shards = shards;
    assert_int_equal(spread_open(shards, &scene->spread), 0);
    scene->want = (struct spread_want){
        .demand = scene->demand,
        .demand_count = draw() % 3 ? 0 : draw() % (DEMAND + 1),
        .cursor = draw() % 3 ? SPREAD_NONE : (uint32_t)(draw() % shards),
        .whole = draw() % 4,
    };
    unsigned empty = (unsigned)(draw() % 101); /* so that full and empty files are met too */
    unsigned common = (unsigned)(1 + draw() % 40);
    for (uint32_t k = 0; k < shards; k++) {
        bool absent = draw() % 100 < empty;
        if (!absent && draw() % 2) {
            spread_land(scene->spread, k);
        } else if (!absent || draw() % 2) {
            spread_take(scene->spread, k);
        }
        scene->rarity[k] = (uint16_t)(draw() % common);
        for (unsigned i = 0; i < scene->rarity[k] + 3u; i++) {
            spread_more(scene->spread, k, false, 0);
        }
        if (absent) {
            spread_put(scene->spread, k); /* half of them have never been away */
        }
        for (unsigned i = 0; i < 3; i++) {
            spread_less(scene->spread, k, false);
        }
    }
    for (size_t i = 0; i < scene->want.demand_count; i++) {
        uint32_t first = (uint32_t)(draw() % shards);
        scene->demand[i] =
            (struct spread_range){first, first + (uint32_t)(draw() % (shards - first))};
    }
    unsigned holds = (unsigned)(draw() % 101);
    for (uint32_t k = 0; k < shards; k++) {
        if (draw() % 100 < holds) {
            scene->bitmap[k / 8] |= (uint8_t)(1u << (k % 8));
        }
    }
    scene->offer = (struct spread_offer){.bitmap = draw() % 3 ? scene->bitmap : NULL,
                                         .rarity_most = SPREAD_RARITY_ANY};
}

static bool takeable(const struct scene *scene, uint32_t k)
{
    const uint8_t *has = scene->offer.bitmap;
    return spread_state(scene->spread, k) == SPREAD_ABSENT && (!has || (has[k / 8] >> (k % 8) & 1));
}

static uint32_t next(const struct scene *scene, bool *urgent)
{
    return spread_next(scene->spread, &scene->want, &scene->offer, draw(), urgent);
}

/* The first takeable shard of what readers wait for, in order of arrival. */
static uint32_t demanded(const struct scene *scene)
{
    for (size_t i = 0; i < scene->want.demand_count; i++) {
        for (uint32_t k = scene->demand[i].first; k <= scene->demand[i].last; k++) {
            if (takeable(scene, k)) {
                return k;
            }
        }
    }
    return SPREAD_NONE;
}

static uint32_t ahead(const struct scene *scene)
{
    uint32_t cursor = scene->want.cursor;
    for (uint32_t k = cursor; cursor != SPREAD_NONE && k < scene->shards; k++) {
        if (k - cursor <= SPREAD_AHEAD && takeable(scene, k)) {
            return k;
        }
    }
    return SPREAD_NONE;
}

static void only_what_is_absent_here_and_present_there(void **state)
{
    struct scene scene = {0};
    unsigned none = 0;
    for (unsigned round = 0; round < ROUNDS; round++) {
        scene_draw(&scene);
        bool urgent;
        uint32_t k = next(&scene, &urgent);
        if (k != SPREAD_NONE) {
            assert_true(k < scene.shards);
            assert_true(takeable(&scene, k));
            continue;
        }
        none++;
        assert_false(urgent);
        assert_int_equal(demanded(&scene), SPREAD_NONE);
        for (uint32_t j = 0; scene.want.whole && j < scene.shards; j++) {
            assert_false(takeable(&scene, j)); /* nothing that could go on is left lying */
        }
    }
    assert_in_range(none, 1, ROUNDS - 1); /* the drawing met both */
    scene_clear(&scene);
}

static void what_a_reader_waits_for_goes_first_in_order_of_arrival(void **state)
{
    struct scene scene = {0};
    unsigned met = 0;
    for (unsigned round = 0; round < ROUNDS; round++) {
        scene_draw(&scene);
        bool urgent;
        uint32_t k = next(&scene, &urgent);
        uint32_t expected = demanded(&scene);
        assert_int_equal(urgent, expected != SPREAD_NONE);
        if (expected != SPREAD_NONE) {
            assert_int_equal(k, expected);
            met++;
        }
    }
    assert_true(met > 100);
    scene_clear(&scene);
}

static void on_demand_only_what_is_demanded_is_fetched(void **state)
{
    struct scene scene = {0};
    for (unsigned round = 0; round < ROUNDS; round++) {
        scene_draw(&scene);
        scene.want.whole = false;
        bool urgent;
        uint32_t k = next(&scene, &urgent);
        assert_int_equal(k, demanded(&scene));
    }
    scene_clear(&scene);
}

static void read_ahead_goes_before_the_rarest(void **state)
{
    struct scene scene = {0};
    unsigned met = 0;
    for (unsigned round = 0; round < ROUNDS; round++) {
        scene_draw(&scene);
        scene.want.demand_count = 0;
        scene.want.whole = true;
        uint32_t expected = ahead(&scene);
        bool urgent;
        uint32_t k = next(&scene, &urgent);
        assert_false(urgent);
        if (expected != SPREAD_NONE) {
            assert_int_equal(k, expected);
            met++;
        }
    }
    assert_true(met > 100);
    scene_clear(&scene);
}

static void else_the_rarest(void **state)
{
    struct scene scene = {0};
    for (unsigned round = 0; round < ROUNDS; round++) {
        scene_draw(&scene);
        scene.want.demand_count = 0;
        scene.want.cursor = SPREAD_NONE;
        scene.want.whole = true;
        bool urgent;
        uint32_t k = next(&scene, &urgent);
        for (uint32_t j = 0; k != SPREAD_NONE && j < scene.shards; j++) {
            assert_true(!takeable(&scene, j) || scene.rarity[j] >= scene.rarity[k] ||
                        scene.rarity[j] >= SPREAD_RARITY_ANY);
        }
    }
    scene_clear(&scene);
}

/* Ties at random: of 32 shards that are equally rare each is the first choice about as often as any other, for a source
 * that has them all, and for one that has few of very many. */
static void ties_are_broken_at_random(void **state)
{
    for (unsigned few = 0; few < 2; few++) {
        uint32_t shards = few ? 640 : 32;
        uint8_t bitmap[SPREAD_BITMAP_BYTES(640)] = {0xff, 0xff, 0xff, 0xff};
        unsigned chosen[32] = {0};
        struct spread *spread;
        assert_int_equal(spread_open(shards, &spread), 0);
        struct spread_want want = {.cursor = SPREAD_NONE, .whole = true};
        struct spread_offer offer = {.bitmap = few ? bitmap : NULL,
                                     .rarity_most = SPREAD_RARITY_ANY};
        for (unsigned round = 0; round < 32000; round++) {
            bool urgent;
            uint32_t k = spread_next(spread, &want, &offer, draw(), &urgent);
            assert_in_range(k, 0, 31);
            chosen[k]++;
        }
        for (unsigned k = 0; k < 32; k++) {
            assert_in_range(chosen[k], 700, 1300);
        }
        spread_close(spread);
    }
}

static void the_same_number_gives_the_same_answer(void **state)
{
    struct scene scene = {0};
    for (unsigned round = 0; round < ROUNDS; round++) {
        scene_draw(&scene);
        uint64_t random = draw();
        bool urgent[2];
        uint32_t k = spread_next(scene.spread, &scene.want, &scene.offer, random, &urgent[0]);
        assert_int_equal(spread_next(scene.spread, &scene.want, &scene.offer, random, &urgent[1]),
                         k);
        assert_int_equal(urgent[0], urgent[1]);
    }
    scene_clear(&scene);
}

static void an_empty_file_needs_nothing(void **state)
{
    struct spread *spread;
    assert_int_equal(spread_open(0, &spread), 0);
    struct spread_want want = {.cursor = SPREAD_NONE, .whole = true};
    struct spread_offer offer = {.rarity_most = SPREAD_RARITY_ANY};
    bool urgent = true;
    assert_int_equal(spread_next(spread, &want, &offer, draw(), &urgent), SPREAD_NONE);
    assert_false(urgent);
    spread_close(spread);
}

/* Taking one shard after another takes each exactly once, whatever changes in between. */
static void taking_until_nothing_is_left_takes_all(void **state)
{
    struct scene scene = {0};
    for (unsigned round = 0; round < 200; round++) {
        scene_draw(&scene);
        scene.want.whole = true;
        uint32_t left = 0;
        for (uint32_t k = 0; k < scene.shards; k++) {
            left += takeable(&scene, k);
        }
        bool urgent;
        uint32_t k;
        while ((k = next(&scene, &urgent)) != SPREAD_NONE) {
            assert_true(left > 0);
            spread_take(scene.spread, k);
            spread_more(scene.spread, (uint32_t)(draw() % (k + 1)), false, 0);
            left--;
        }
        assert_int_equal(left, 0);
    }
    scene_clear(&scene);
}

/* What others have is left to them while the caller says so, but never to a reader's harm. */
static void commoner_and_nearer_shards_are_left_to_others(void **state)
{
    struct scene scene = {0};
    unsigned met = 0;
    for (unsigned round = 0; round < ROUNDS; round++) {
        scene_draw(&scene);
        scene.offer.rarity_most = 0;
        bool urgent;
        uint32_t k = next(&scene, &urgent);
        if (k != SPREAD_NONE && !urgent) {
            assert_int_equal(scene.rarity[k], 0);
            met++;
        }
        scene.offer.rarity_most = SPREAD_RARITY_ANY;
        scene.offer.far = true;
        uint32_t near = (uint32_t)(draw() % scene.shards);
        spread_more(scene.spread, near, true, 0);
        k = next(&scene, &urgent);
        assert_true(k != near || urgent);
    }
    assert_true(met > 100);
    scene_clear(&scene);
}

/* How many nodes of a rack of `count` go far for the shards, each of which they all lack and know a far one to have
 * since `seen_ms`. */
static unsigned rack_goes(uint32_t shards, size_t count, uint32_t steps, uint64_t seen_ms)
{
    unsigned taken = 0;
    for (size_t node = 0; node < count; node++) {
        struct spread *spread;
        uint64_t others[64];
        size_t n = 0;
        for (size_t i = 0; i < count; i++) {
            if (i != node) {
                others[n++] = spread_rack_place("node", i);
            }
        }
        struct spread_rack rack = {.salt = 7};
        spread_rack_set(&rack, spread_rack_place("node", node), others, n);
        assert_int_equal(spread_open(shards, &spread), 0);
        for (uint32_t k = 0; k < shards; k++) {
            spread_more(spread, k, false, seen_ms);
        }
        struct spread_want want = {.cursor = SPREAD_NONE, .whole = true};
        struct spread_offer offer = {.rarity_most = SPREAD_RARITY_ANY,
                                     .far = true,
                                     .rack = &rack,
                                     .now_ms = 1000,
                                     .step_ms = 10,
                                     .steps = steps};
        bool urgent;
        uint32_t k;
        while ((k = spread_next(spread, &want, &offer, draw(), &urgent)) != SPREAD_NONE) {
            spread_take(spread, k);
            taken++;
        }
        spread_close(spread);
    }
    return taken;
}

/* One goes for each shard; a step later two, then four, as long as it is far alone that has it and there is room. */
static void one_of_a_rack_goes_far_for_each_shard_then_more(void **state)
{
    assert_int_equal(rack_goes(500, 1, 0, 1000), 500);
    assert_int_equal(rack_goes(500, 40, 0, 1), 500);
    assert_int_equal(rack_goes(500, 40, 1, 1), 2 * 500);
    assert_int_equal(rack_goes(500, 40, 5, 980), 4 * 500); /* just come there */
    assert_int_equal(rack_goes(500, 40, 6, 1), 40 * 500);
    assert_int_equal(rack_goes(500, 3, 1, 1), 2 * 500);
    assert_int_equal(rack_goes(500, 40, 6, 1001), 500); /* another clock's now */
    assert_true(spread_rack_known(0, 0));
    assert_true(spread_rack_known(SPREAD_RACK_FEW, SPREAD_RACK_FEW));
    assert_false(spread_rack_known(9, 8));
    assert_false(spread_rack_known(SPREAD_RACK_FEW + 1, SPREAD_RACK_FEW + 1));
}

/* A step for each in which there was room; near shards take it back. */
static void who_has_room_reaches_further_until_near_ones_bring_enough(void **state)
{
    struct spread_reach reach = {.since_ms = 1000};
    spread_reach_tick(&reach, 1009, 0, 10);
    assert_int_equal(reach.steps, 0);
    spread_reach_tick(&reach, 1010, 0, 10);
    assert_int_equal(reach.steps, SPREAD_REACH_PARTS);
    spread_reach_tick(&reach, 1022, 1015, 10); /* it was full meanwhile */
    assert_int_equal(reach.steps, SPREAD_REACH_PARTS);
    for (uint64_t now = 1025; now < 9000; now += 10) {
        spread_reach_tick(&reach, now, 1015, 10);
    }
    assert_int_equal(reach.steps, SPREAD_RACK_LEVELS * SPREAD_REACH_PARTS);
    for (unsigned i = 0; i < SPREAD_RACK_LEVELS * SPREAD_REACH_PARTS + 9; i++) {
        spread_reach_near(&reach);
    }
    assert_int_equal(reach.steps, 0);
}

static void windows_open_when_it_is_quick_and_close_when_it_is_slow(void **state)
{
    assert_int_equal(spread_width(1), SPREAD_WIDTH_LEAST);
    assert_true(spread_width(128) < spread_width(256));
    assert_int_equal(spread_width(UINT32_MAX), SPREAD_WIDTH_MOST);
    struct spread_window window = spread_window_new(4, 64);
    assert_int_equal(window.width, 4);
    for (unsigned i = 0; i < 100; i++) {
        spread_window_took(&window, 1000000);
    }
    assert_int_equal(window.width, 64);
    spread_window_took(&window, 50000000); /* neither */
    assert_int_equal(window.width, 64);
    for (unsigned i = 0; i < 100; i++) {
        spread_window_took(&window, 1000000000);
    }
    assert_int_equal(window.width, 4);
    window.floor = 6;
    for (int i = 0; i < 4; i++) {
        spread_window_took(&window, 1000000000);
    }
    assert_int_equal(window.width, 6);
}

static void near_neighbours_are_preferred_and_a_few_far_ones_kept(void **state)
{
    assert_int_equal(spread_nearness("a/1", "a/1"), 2);
    assert_int_equal(spread_nearness("a/1", "a/2"), 1);
    assert_int_equal(spread_nearness("a/1", "ab/1"), 0);
    assert_int_equal(spread_nearness("", "b/1"), 2);

    for (unsigned round = 0; round < 1000; round++) {
        bool near[200];
        bool used[200] = {false};
        size_t nears = 0;
        size_t count = 0;
        for (size_t i = 0; i < 200; i++) {
            near[i] = i % 2;
        }
        while (count < SPREAD_NEIGHBOURS_FIRST) {
            bool left[200];
            size_t index[200];
            size_t n = 0;
            for (size_t i = 0; i < 200; i++) {
                if (!used[i]) {
                    left[n] = near[i];
                    index[n++] = i;
                }
            }
            size_t pick =
                spread_neighbour_choose(left, n, nears, count, SPREAD_NEIGHBOURS_FIRST, draw());
            assert_true(pick < n);
            used[index[pick]] = true;
            nears += near[index[pick]];
            count++;
        }
        assert_in_range(nears, SPREAD_NEIGHBOURS_FIRST - SPREAD_FAR, SPREAD_NEIGHBOURS_FIRST);
    }
    bool far[3] = {false, false, false};
    assert_in_range(spread_neighbour_choose(far, 3, 6, 7, 8, draw()), 0, 2); /* nobody else */
    assert_int_equal(spread_neighbour_choose(far, 3, 6, 8, 8, draw()), 3);
    assert_int_equal(spread_neighbour_choose(far, 0, 0, 0, 8, draw()), 0);
}

static void the_gone_and_the_idle_make_room_for_others(void **state)
{
    struct spread_neighbour neighbours[4] = {
        {.received = 100, .age_ms = 9000},
        {.received = 5, .age_ms = 9000},
        {.received = 120, .age_ms = 9000},
        {.received = 0, .age_ms = 9000, .complete = true},
    };
    assert_int_equal(spread_neighbour_drop(neighbours, 4), 1);
    neighbours[1].age_ms = 100; /* has not had its chance */
    assert_int_equal(spread_neighbour_drop(neighbours, 4), 4);
    neighbours[3].gone = true;
    assert_int_equal(spread_neighbour_drop(neighbours, 4), 3);
    assert_int_equal(spread_neighbour_drop(NULL, 0), 0);
}

static void back_off_doubles_up_to_its_limit(void **state)
{
    uint32_t expected = 100;
    for (uint32_t failures = 1; failures < 200; failures++) {
        assert_int_equal(spread_backoff_ms(failures, 100, 5000, 0), expected);
        uint32_t least = expected;
        uint32_t most = 0;
        for (unsigned i = 0; i < 200; i++) {
            uint32_t ms = spread_backoff_ms(failures, 100, 5000, draw());
            least = ms < least ? ms : least;
            most = ms > most ? ms : most;
        }
        assert_true(most <= expected && least >= expected - expected / 4);
        assert_true(most - least > expected / 8); /* pullers do not come back together */
        expected = expected * 2 > 5000 ? 5000 : expected * 2;
    }
    assert_int_equal(spread_backoff_ms(UINT32_MAX, 1, UINT32_MAX, 0), UINT32_MAX);
    assert_int_equal(spread_backoff_ms(1, 0, 0, draw()), 0);
    assert_int_equal(spread_backoff_ms(3, 100, 50, 0), 50);
}

static void patience_ends_whatever_is_usual(void **state)
{
    const uint64_t second = 1000000000;
    assert_false(spread_hungry(second / 100, 0));
    assert_true(spread_hungry(second / 10, 0));
    assert_false(spread_hungry(second, second));
    assert_true(spread_hungry(3 * second, second));
    assert_false(spread_hungry(9 * second, 50 * second));
    assert_true(spread_hungry(11 * second, 50 * second));
    assert_false(spread_trickles(3600 * second, 0)); /* nothing to compare with */
    assert_false(spread_trickles(9 * second, second / 100));
    assert_true(spread_trickles(11 * second, second / 100));
    assert_false(spread_trickles(11 * second, second));
    assert_true(spread_trickles(17 * second, second));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(only_what_is_absent_here_and_present_there),
        cmocka_unit_test(what_a_reader_waits_for_goes_first_in_order_of_arrival),
        cmocka_unit_test(on_demand_only_what_is_demanded_is_fetched),
        cmocka_unit_test(read_ahead_goes_before_the_rarest),
        cmocka_unit_test(else_the_rarest),
        cmocka_unit_test(ties_are_broken_at_random),
        cmocka_unit_test(the_same_number_gives_the_same_answer),
        cmocka_unit_test(an_empty_file_needs_nothing),
        cmocka_unit_test(taking_until_nothing_is_left_takes_all),
        cmocka_unit_test(commoner_and_nearer_shards_are_left_to_others),
        cmocka_unit_test(one_of_a_rack_goes_far_for_each_shard_then_more),
        cmocka_unit_test(who_has_room_reaches_further_until_near_ones_bring_enough),
        cmocka_unit_test(windows_open_when_it_is_quick_and_close_when_it_is_slow),
        cmocka_unit_test(near_neighbours_are_preferred_and_a_few_far_ones_kept),
        cmocka_unit_test(the_gone_and_the_idle_make_room_for_others),
        cmocka_unit_test(back_off_doubles_up_to_its_limit),
        cmocka_unit_test(patience_ends_whatever_is_usual),
    };
    return cmocka_run_group_tests(tests, setup, NULL);
}
