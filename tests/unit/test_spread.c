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
    uint8_t states[SHARDS];
    uint16_t rarity[SHARDS];
    struct spread_range demand[DEMAND];
    uint8_t bitmap[SHARDS / 8];
    const uint8_t *has; /* bitmap, or NULL */
    struct spread_view view;
};

static void scene_draw(struct scene *scene)
{
    memset(scene, 0, sizeof *scene);
    struct spread_view *view = &scene->view;
    view->shards = (uint32_t)(1 + draw() % SHARDS);
    view->states = scene->states;
    view->rarity = draw() % 4 ? scene->rarity : NULL;
    view->demand = scene->demand;
    view->demand_count = draw() % 3 ? 0 : draw() % (DEMAND + 1);
    view->cursor = draw() % 3 ? SPREAD_NONE : (uint32_t)(draw() % view->shards);
    view->whole = draw() % 4;
    unsigned empty = (unsigned)(draw() % 101); /* so that full and empty files are met too */
    for (uint32_t k = 0; k < view->shards; k++) {
        scene->states[k] =
            draw() % 100 < empty ? SPREAD_ABSENT : (uint8_t)(SPREAD_FILLING + draw() % 2);
        scene->rarity[k] = (uint16_t)(1 + draw() % 4);
    }
    for (size_t i = 0; i < view->demand_count; i++) {
        uint32_t first = (uint32_t)(draw() % view->shards);
        scene->demand[i] =
            (struct spread_range){first, first + (uint32_t)(draw() % (view->shards - first))};
    }
    unsigned holds = (unsigned)(draw() % 101);
    for (uint32_t k = 0; k < view->shards; k++) {
        if (draw() % 100 < holds) {
            scene->bitmap[k / 8] |= (uint8_t)(1u << (k % 8));
        }
    }
    scene->has = draw() % 3 ? scene->bitmap : NULL;
}

static bool takeable(const struct scene *scene, uint32_t k)
{
    return scene->states[k] == SPREAD_ABSENT && (!scene->has || (scene->has[k / 8] >> (k % 8) & 1));
}

/* The first takeable shard of what readers wait for, in order of arrival. */
static uint32_t demanded(const struct scene *scene)
{
    for (size_t i = 0; i < scene->view.demand_count; i++) {
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
    uint32_t cursor = scene->view.cursor;
    for (uint32_t k = cursor; cursor != SPREAD_NONE && k < scene->view.shards; k++) {
        if (k - cursor <= SPREAD_AHEAD && takeable(scene, k)) {
            return k;
        }
    }
    return SPREAD_NONE;
}

static void only_what_is_absent_here_and_present_there(void **state)
{
    unsigned none = 0;
    for (unsigned round = 0; round < ROUNDS; round++) {
        struct scene scene;
        scene_draw(&scene);
        bool urgent;
        uint32_t k = spread_next(&scene.view, scene.has, draw(), &urgent);
        if (k != SPREAD_NONE) {
            assert_true(k < scene.view.shards);
            assert_true(takeable(&scene, k));
            continue;
        }
        none++;
        assert_false(urgent);
        assert_int_equal(demanded(&scene), SPREAD_NONE);
        for (uint32_t j = 0; scene.view.whole && j < scene.view.shards; j++) {
            assert_false(takeable(&scene, j)); /* nothing that could go on is left lying */
        }
    }
    assert_in_range(none, 1, ROUNDS - 1); /* the drawing met both */
}

static void what_a_reader_waits_for_goes_first_in_order_of_arrival(void **state)
{
    unsigned met = 0;
    for (unsigned round = 0; round < ROUNDS; round++) {
        struct scene scene;
        scene_draw(&scene);
        bool urgent;
        uint32_t k = spread_next(&scene.view, scene.has, draw(), &urgent);
        uint32_t expected = demanded(&scene);
        assert_int_equal(urgent, expected != SPREAD_NONE);
        if (expected != SPREAD_NONE) {
            assert_int_equal(k, expected);
            met++;
        }
    }
    assert_true(met > 100);
}

static void on_demand_only_what_is_demanded_is_fetched(void **state)
{
    for (unsigned round = 0; round < ROUNDS; round++) {
        struct scene scene;
        scene_draw(&scene);
        scene.view.whole = false;
        bool urgent;
        uint32_t k = spread_next(&scene.view, scene.has, draw(), &urgent);
        assert_int_equal(k, demanded(&scene));
    }
}

static void read_ahead_goes_before_the_rarest(void **state)
{
    unsigned met = 0;
    for (unsigned round = 0; round < ROUNDS; round++) {
        struct scene scene;
        scene_draw(&scene);
        scene.view.demand_count = 0;
        scene.view.whole = true;
        uint32_t expected = ahead(&scene);
        bool urgent;
        uint32_t k = spread_next(&scene.view, scene.has, draw(), &urgent);
        assert_false(urgent);
        if (expected != SPREAD_NONE) {
            assert_int_equal(k, expected);
            met++;
        }
    }
    assert_true(met > 100);
}

static void else_the_rarest(void **state)
{
    for (unsigned round = 0; round < ROUNDS; round++) {
        struct scene scene;
        scene_draw(&scene);
        scene.view.demand_count = 0;
        scene.view.cursor = SPREAD_NONE;
        scene.view.whole = true;
        scene.view.rarity = scene.rarity;
        bool urgent;
        uint32_t k = spread_next(&scene.view, scene.has, draw(), &urgent);
        for (uint32_t j = 0; k != SPREAD_NONE && j < scene.view.shards; j++) {
            assert_true(!takeable(&scene, j) || scene.rarity[j] >= scene.rarity[k]);
        }
    }
}

/* Ties at random: of 32 shards that are equally rare each is the first choice about as often as any other, with known
 * rarities and without. */
static void ties_are_broken_at_random(void **state)
{
    for (unsigned rarities = 0; rarities < 2; rarities++) {
        struct scene scene = {0};
        unsigned chosen[32] = {0};
        scene.view = (struct spread_view){.shards = 32,
                                          .states = scene.states,
                                          .rarity = rarities ? scene.rarity : NULL,
                                          .cursor = SPREAD_NONE,
                                          .whole = true};
        for (unsigned round = 0; round < 32000; round++) {
            bool urgent;
            chosen[spread_next(&scene.view, NULL, draw(), &urgent)]++;
        }
        for (unsigned k = 0; k < 32; k++) {
            assert_in_range(chosen[k], 700, 1300);
        }
    }
}

/* No memory of its own: the same view and the same number give the same shard. */
static void the_same_view_gives_the_same_answer(void **state)
{
    for (unsigned round = 0; round < ROUNDS; round++) {
        struct scene scene;
        scene_draw(&scene);
        uint64_t random = draw();
        bool urgent[2];
        uint32_t k = spread_next(&scene.view, scene.has, random, &urgent[0]);
        assert_int_equal(spread_next(&scene.view, scene.has, random, &urgent[1]), k);
        assert_int_equal(urgent[0], urgent[1]);
    }
}

static void an_empty_file_needs_nothing(void **state)
{
    struct spread_view view = {.cursor = SPREAD_NONE, .whole = true};
    bool urgent = true;
    assert_int_equal(spread_next(&view, NULL, draw(), &urgent), SPREAD_NONE);
    assert_false(urgent);
}

/* Taking one shard after another takes each exactly once, whatever changes in between. */
static void taking_until_nothing_is_left_takes_all(void **state)
{
    for (unsigned round = 0; round < 200; round++) {
        struct scene scene;
        scene_draw(&scene);
        scene.view.whole = true;
        uint32_t left = 0;
        for (uint32_t k = 0; k < scene.view.shards; k++) {
            left += takeable(&scene, k);
        }
        bool urgent;
        uint32_t k;
        while ((k = spread_next(&scene.view, scene.has, draw(), &urgent)) != SPREAD_NONE) {
            assert_true(left > 0);
            scene.states[k] = SPREAD_FILLING;
            left--;
        }
        assert_int_equal(left, 0);
    }
}

static void windows_stay_between_two_and_sixteen(void **state)
{
    for (unsigned round = 0; round < ROUNDS; round++) {
        uint64_t rate = draw() >> (draw() % 64);
        uint32_t shard = (uint32_t)(64u << 10) << (draw() % 15);
        uint32_t window = spread_window(rate, shard);
        assert_in_range(window, 2, 16);
        assert_true(spread_window(rate / 2, shard) <= window); /* faster: not less */
        assert_true(spread_window(rate, shard / 2) >= window); /* smaller shards: not fewer */
    }
    assert_int_equal(spread_window(0, 1u << 20), 16); /* a source that nobody knows is used */
    assert_int_equal(spread_window(0, 1u << 30), 2);
    /* A fast source has what it delivers in 20 ms on its way: 10 GB/s, shards of 64 MiB. */
    assert_int_equal(spread_window(10000000000ull, 64u << 20), 2);
    assert_int_equal(spread_window(40000000000ull, 64u << 20), 11);
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(only_what_is_absent_here_and_present_there),
        cmocka_unit_test(what_a_reader_waits_for_goes_first_in_order_of_arrival),
        cmocka_unit_test(on_demand_only_what_is_demanded_is_fetched),
        cmocka_unit_test(read_ahead_goes_before_the_rarest),
        cmocka_unit_test(else_the_rarest),
        cmocka_unit_test(ties_are_broken_at_random),
        cmocka_unit_test(the_same_view_gives_the_same_answer),
        cmocka_unit_test(an_empty_file_needs_nothing),
        cmocka_unit_test(taking_until_nothing_is_left_takes_all),
        cmocka_unit_test(windows_stay_between_two_and_sixteen),
        cmocka_unit_test(back_off_doubles_up_to_its_limit),
    };
    return cmocka_run_group_tests(tests, setup, NULL);
}
