/* Whom a node lets in: links that have not proven yet who they are. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>

#include "engine/serve.h"
#include "meta/base/log.h"

#define LINKS 5000

static struct engine engine;
static struct lane lane = {.engine = &engine};
static struct link links[LINKS];
static unsigned used, ended;

static void shut(struct link *link)
{
    ended++;
}

static const struct transport_ops ops = {.name = "none", .shut = shut};
static struct transport transport = {.ops = &ops};

static void strangers(const char *host, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        struct link *link = &links[used++];
        *link = (struct link){.transport = &transport};
        snprintf(link->peer, sizeof link->peer, "%s:%u", host, 1000 + used);
        serve_accepted(&lane, link);
    }
}

static int setup(void **state)
{
    used = ended = 0;
    log_setup(LOG_ERROR, false);
    return loop_open(&lane.loop);
}

static int teardown(void **state)
{
    serve_close_all(&lane);
    loop_close(lane.loop);
    assert_int_equal(ended, used);
    return 0;
}

/* One host's do not keep those of others out, whose names only begin like its own. */
static void strangers_from_one_host_are_bounded(void **state)
{
    strangers("10.0.0.1", 300);
    assert_int_equal(ended, 300 - 256);
    assert_int_equal(atomic_load(&engine.counters.links_refused), 300 - 256);
    strangers("10.0.0.12", 256);
    strangers("[fd00::10]", 256);
    strangers("[fd00::1]", 256);
    assert_int_equal(ended, 300 - 256);
}

static void strangers_from_everywhere_are_bounded(void **state)
{
    char host[32];
    for (unsigned i = 0; i < 50; i++) {
        snprintf(host, sizeof host, "10.0.1.%u", i);
        strangers(host, 90);
    }
    assert_int_equal(ended, 50 * 90 - 4096);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(strangers_from_one_host_are_bounded, setup, teardown),
        cmocka_unit_test_setup_teardown(strangers_from_everywhere_are_bounded, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
