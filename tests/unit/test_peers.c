/* What a node remembers of its peers. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>

#include "engine/peers.h"
#include "meta/base/log.h"

static struct peers *peers;

static int setup(void **state)
{
    return peers_open(&peers);
}

static int teardown(void **state)
{
    peers_close(peers);
    return 0;
}

static struct peer *calls(const char *what, unsigned number)
{
    char name[32];
    snprintf(name, sizeof name, "%s-%u", what, number);
    return peers_get(peers, name, NULL);
}

static size_t remembered(void)
{
    struct engine_peer *list;
    size_t count;
    assert_int_equal(peers_list(peers, "tcp", &list, &count), 0);
    free(list);
    return count;
}

static void a_name_is_one_peer(void **state)
{
    struct peer *peer = peers_get(peers, "n", "127.0.0.1:1");
    assert_ptr_equal(peers_get(peers, "n", NULL), peer);
    assert_string_equal(peer->address, "127.0.0.1:1");
    assert_ptr_equal(peers_get(peers, "n", "127.0.0.1:2"), peer);
    assert_string_equal(peer->address, "127.0.0.1:2");
    assert_int_equal(remembered(), 1);
}

/* Anybody may call where there is no secret. */
static void ever_new_callers_use_bounded_memory(void **state)
{
    unsigned number = 0;
    while (number < 1000000 && calls("stranger", number)) {
        number++;
    }
    assert_in_range(number, 10000, 100000);
    for (unsigned i = 0; i < 1000; i++) {
        assert_null(calls("late", i));
    }
    assert_int_equal(remembered(), number);
    assert_non_null(calls("stranger", 17));
    assert_non_null(peers_get(peers, "node", "127.0.0.1:1")); /* the metadata knows it */
    assert_non_null(peers_get(peers, "node", NULL));
    assert_int_equal(remembered(), number + 1);
}

static void a_peer_that_sent_wrong_bytes_is_left_alone(void **state)
{
    struct peer *peer = peers_get(peers, "n", NULL);
    assert_false(peer_quarantined(peer));
    peer_strike(peer);
    assert_true(peer_quarantined(peer));
    assert_int_equal(peer->corrupt, 1);
    assert_int_equal(peer->strikes, 1);
    peer_praise(peer);
    assert_int_equal(peer->strikes, 0);
    assert_true(peer_quarantined(peer)); /* one right shard does not end it */
}

static void peers_have_numbers(void **state)
{
    for (unsigned i = 0; i < 200; i++) {
        struct peer *peer = calls("n", i);
        assert_int_equal(peer->number, i + 1);
        assert_ptr_equal(peers_numbered(peers, peer->number), peer);
    }
    assert_null(peers_numbered(peers, 0));
    assert_null(peers_numbered(peers, 201));
}

static void rates_follow_what_moves(void **state)
{
    const uint64_t second = 1000000000ull;
    struct peer *peer = peers_get(peers, "n", NULL);
    uint64_t now = 100 * second;
    for (unsigned i = 0; i < 20; i++) {
        atomic_fetch_add(&peer->received, 1000000);
        atomic_fetch_add(&peer->sent, 250000);
        peers_sample(peers, now += second);
        peers_sample(peers, now); /* no time has passed: nothing happens */
    }
    struct engine_peer *list;
    size_t count;
    assert_int_equal(peers_list(peers, "tcp", &list, &count), 0);
    assert_in_range(list[0].rate_down, 990000, 1010000);
    assert_in_range(list[0].rate_up, 247000, 253000);
    free(list);
    for (unsigned i = 0; i < 40; i++) {
        peers_sample(peers, now += second);
    }
    assert_int_equal(peers_list(peers, "tcp", &list, &count), 0);
    assert_int_equal(list[0].rate_down, 0);
    free(list);
}

#define STORY(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        STORY(a_name_is_one_peer),
        STORY(ever_new_callers_use_bounded_memory),
        STORY(peers_have_numbers),
        STORY(rates_follow_what_moves),
        STORY(a_peer_that_sent_wrong_bytes_is_left_alone),
    };
    log_setup(LOG_ERROR, false);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
