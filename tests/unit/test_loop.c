/* The loop, on io_uring and on epoll: every story is told twice. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "engine/loop.h"
#include "meta/base/util.h"

static struct loop *loop;

static int open_uring(void **state)
{
    unsetenv("P2PFS_NO_URING");
    return loop_open(&loop);
}

static int open_epoll(void **state)
{
    setenv("P2PFS_NO_URING", "1", 1);
    int r = loop_open(&loop);
    unsetenv("P2PFS_NO_URING");
    return r;
}

static int close_loop(void **state)
{
    loop_close(loop);
    loop = NULL;
    return 0;
}

// -- Tasks ----------------------------------------------------------------------------------------

struct numbered {
    struct loop_task task;
    unsigned poster, number;
};

static unsigned next_number[4];
static atomic_uint ran;

static void numbered_run(struct loop_task *task)
{
    struct numbered *n = util_container(task, struct numbered, task);
    assert_true(loop_here(loop));
    assert_int_equal(n->number, next_number[n->poster]);
    next_number[n->poster]++;
    atomic_fetch_add(&ran, 1);
    free(n);
}

static void *poster(void *arg)
{
    unsigned me = (unsigned)(uintptr_t)arg;
    for (unsigned i = 0; i < 20000; i++) {
        struct numbered *n = malloc(sizeof(*n));
        *n = (struct numbered){.task.run = numbered_run, .poster = me, .number = i};
        loop_post(loop, &n->task);
        if (i % 1000 == 0)
            usleep(100); // lets the loop fall asleep now and then
    }
    return NULL;
}

static void *runner(void *arg)
{
    loop_run(arg);
    return NULL;
}

static void tasks_of_four_threads_run_in_order(void **state)
{
    memset(next_number, 0, sizeof(next_number));
    ran = 0;
    pthread_t run, post[4];
    pthread_create(&run, NULL, runner, loop);
    for (uintptr_t i = 0; i < 4; i++)
        pthread_create(&post[i], NULL, poster, (void *)i);
    for (int i = 0; i < 4; i++)
        pthread_join(post[i], NULL);
    loop_stop(loop);
    pthread_join(run, NULL);
    // what was posted before loop_stop still ran
    assert_int_equal(ran, 80000);
}

struct own_task {
    struct loop_task task;
    int left;
};

static void own_task_run(struct loop_task *task)
{
    struct own_task *own = util_container(task, struct own_task, task);
    if (--own->left > 0)
        loop_post(loop, task);
    else
        loop_stop(loop);
}

static void a_task_posts_itself(void **state)
{
    struct own_task own = {.task.run = own_task_run, .left = 1000};
    loop_post(loop, &own.task);
    loop_run(loop);
    assert_int_equal(own.left, 0);
}

static void stop_before_run_returns_at_once_and_the_loop_runs_again(void **state)
{
    loop_stop(loop);
    loop_run(loop);
    a_task_posts_itself(state);
}

// -- Timers ---------------------------------------------------------------------------------------

struct ticking {
    struct loop_timer timer;
    uint64_t delay, due, rang_at;
    int rank;
};

static int ranks, expected_ranks;

static void ticking_due(struct loop_timer *timer)
{
    struct ticking *t = util_container(timer, struct ticking, timer);
    t->rang_at = util_now_ns();
    t->rank = ranks++;
    if (ranks == expected_ranks)
        loop_stop(loop);
}

static void timers_ring_in_order_and_not_early(void **state)
{
    enum { COUNT = 200 };
    static struct ticking t[COUNT];
    memset(t, 0, sizeof(t));
    ranks = 0;
    expected_ranks = COUNT - COUNT / 10;
    for (int i = 0; i < COUNT; i++) {
        t[i].timer.due = ticking_due;
        t[i].delay = (uint64_t)((i * 7919) % COUNT) * 1000000 / 2;
        uint64_t before = util_now_ns();
        assert_int_equal(loop_timer_set(loop, &t[i].timer, t[i].delay * 3), 0);
        assert_int_equal(loop_timer_set(loop, &t[i].timer, t[i].delay), 0); // moved
        t[i].due = t[i].timer.due_ns;
        assert_true(t[i].due >= before + t[i].delay);
    }
    for (int i = 0; i < COUNT; i += 10)
        loop_timer_clear(loop, &t[i].timer);
    loop_run(loop);
    assert_int_equal(ranks, expected_ranks);
    for (int i = 0; i < COUNT; i++) {
        if (i % 10 == 0) {
            assert_int_equal(t[i].rang_at, 0);
            continue;
        }
        assert_true(t[i].rang_at >= t[i].due);
        for (int k = 0; k < COUNT; k++)
            if (k % 10 != 0 && t[k].due < t[i].due)
                assert_true(t[k].rank < t[i].rank);
    }
}

// -- Watches --------------------------------------------------------------------------------------

struct seen {
    struct loop_watch watch;
    int count;
    uint32_t events;
    int stop_at;
};

static void seen_ready(struct loop_watch *watch, uint32_t events)
{
    struct seen *s = util_container(watch, struct seen, watch);
    s->events = events;
    if (++s->count == s->stop_at)
        loop_stop(loop);
}

static void a_watch_is_level_triggered(void **state)
{
    int p[2];
    assert_int_equal(pipe2(p, O_CLOEXEC), 0);
    struct seen s = {.watch = {.fd = p[0], .ready = seen_ready}, .stop_at = 10};
    assert_int_equal(loop_watch_set(loop, &s.watch, POLLIN), 0);
    assert_int_equal(write(p[1], "x", 1), 1);
    loop_run(loop);
    assert_int_equal(s.count, 10); // nobody reads: it is told again and again
    assert_int_equal(s.events, POLLIN);
    loop_watch_clear(loop, &s.watch);
    close(p[0]);
    close(p[1]);
}

static void no_events_but_a_hangup_is_told(void **state)
{
    int p[2];
    assert_int_equal(pipe2(p, O_CLOEXEC), 0);
    struct seen s = {.watch = {.fd = p[0], .ready = seen_ready}, .stop_at = 1};
    assert_int_equal(loop_watch_set(loop, &s.watch, 0), 0);
    close(p[1]);
    loop_run(loop);
    assert_true(s.events & POLLHUP);
    loop_watch_clear(loop, &s.watch);
    close(p[0]);
}

struct switching {
    struct seen seen;
    struct loop_timer timer;
    int step;
};

static void switching_due(struct loop_timer *timer)
{
    struct switching *s = util_container(timer, struct switching, timer);
    static const uint32_t sets[] = {POLLIN, POLLIN | POLLOUT, POLLIN, POLLOUT, POLLIN};
    if (s->step == 5) {
        loop_stop(loop);
        return;
    }
    s->seen.events = 0;
    if (s->step != 4 || s->seen.count > 2) { // writable all the time while that alone is asked for
        assert_int_equal(loop_watch_set(loop, &s->seen.watch, sets[s->step]), 0);
        s->step++;
    }
    loop_timer_set(loop, timer, 5000000);
}

static void switching_ready(struct loop_watch *watch, uint32_t events)
{
    struct switching *s = util_container(watch, struct switching, seen.watch);
    assert_true((events & ~watch->events) == 0); // nothing that is not wanted (any more)
    s->seen.count += events == POLLOUT;
    loop_watch_set(loop, watch, watch->events);
}

static void events_may_change_while_the_kernel_watches(void **state)
{
    int s[2];
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, s), 0);
    struct switching w = {.seen.watch = {.fd = s[0], .ready = switching_ready},
                          .timer.due = switching_due};
    assert_int_equal(loop_timer_set(loop, &w.timer, 0), 0);
    loop_run(loop);
    assert_true(w.seen.count > 2);
    loop_watch_clear(loop, &w.seen.watch);
    close(s[0]);
    close(s[1]);
}

/* Two ends that are ready in one turn free each other: the one that comes first clears the other one. */
struct pair_half {
    struct loop_watch watch;
    struct pair_half *other;
    int fd[2];
};

static int rounds, pair_calls;
static void pair_new(void);

static void half_ready(struct loop_watch *watch, uint32_t events)
{
    struct pair_half *half = util_container(watch, struct pair_half, watch);
    struct pair_half *both[] = {half, half->other};
    pair_calls++;
    for (int i = 0; i < 2; i++) {
        loop_watch_clear(loop, &both[i]->watch);
        close(both[i]->fd[0]);
        close(both[i]->fd[1]);
        memset(both[i], 0xa5, sizeof(*both[i])); // a stale completion would show at once
        free(both[i]);
    }
    if (++rounds == 2000)
        loop_stop(loop);
    else
        pair_new();
}

static void pair_new(void)
{
    struct pair_half *a = calloc(1, sizeof(*a)), *b = calloc(1, sizeof(*b));
    a->other = b;
    b->other = a;
    struct pair_half *both[] = {a, b};
    for (int i = 0; i < 2; i++) {
        assert_int_equal(pipe2(both[i]->fd, O_CLOEXEC), 0);
        both[i]->watch.fd = both[i]->fd[0];
        both[i]->watch.ready = half_ready;
        assert_int_equal(loop_watch_set(loop, &both[i]->watch, POLLIN), 0);
        assert_int_equal(write(both[i]->fd[1], "x", 1), 1);
    }
}

static void a_cleared_watch_is_never_called_even_when_ready_in_the_same_turn(void **state)
{
    rounds = pair_calls = 0;
    pair_new();
    loop_run(loop);
    assert_int_equal(pair_calls, 2000);
}

static void many_watches_all_answer(void **state)
{
    enum { COUNT = 400 };
    static struct seen s[COUNT];
    static int p[COUNT][2];
    memset(s, 0, sizeof(s));
    for (int i = 0; i < COUNT; i++) {
        assert_int_equal(pipe2(p[i], O_CLOEXEC), 0);
        s[i] = (struct seen){.watch = {.fd = p[i][0], .ready = seen_ready}};
        assert_int_equal(loop_watch_set(loop, &s[i].watch, POLLIN), 0);
        assert_int_equal(write(p[i][1], "x", 1), 1);
    }
    s[COUNT / 2].stop_at = 20;
    loop_run(loop);
    for (int i = 0; i < COUNT; i++) {
        assert_true(s[i].count >= 10); // none starves
        loop_watch_clear(loop, &s[i].watch);
        close(p[i][0]);
        close(p[i][1]);
    }
}

static void the_variable_forces_epoll(void **state)
{
    assert_false(loop_is_uring(loop));
}

static void io_uring_is_used_where_the_kernel_allows_it(void **state)
{
    char params[256] = {0}; // struct io_uring_params, all defaults
    int fd = (int)syscall(SYS_io_uring_setup, 4, params);
    if (fd < 0)
        skip();
    close(fd);
    assert_true(loop_is_uring(loop));
}

#define BOTH(story)                                              \
    {#story " (io_uring)", story, open_uring, close_loop, NULL}, \
    {                                                            \
        #story " (epoll)", story, open_epoll, close_loop, NULL   \
    }

int main(void)
{
    const struct CMUnitTest tests[] = {
        BOTH(tasks_of_four_threads_run_in_order),
        BOTH(a_task_posts_itself),
        BOTH(stop_before_run_returns_at_once_and_the_loop_runs_again),
        BOTH(timers_ring_in_order_and_not_early),
        BOTH(a_watch_is_level_triggered),
        BOTH(no_events_but_a_hangup_is_told),
        BOTH(events_may_change_while_the_kernel_watches),
        BOTH(a_cleared_watch_is_never_called_even_when_ready_in_the_same_turn),
        BOTH(many_watches_all_answer),
        cmocka_unit_test_setup_teardown(the_variable_forces_epoll, open_epoll, close_loop),
        cmocka_unit_test_setup_teardown(io_uring_is_used_where_the_kernel_allows_it, open_uring,
                                        close_loop),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
