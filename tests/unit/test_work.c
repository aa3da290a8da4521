/* The pool of threads. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "engine/work.h"
#include "meta/base/util.h"

struct counted {
    struct work_job job;
    int number;
};

static int order[64], ordered;
static sem_t gate;
static atomic_int ran;

static void note(struct work_job *job)
{
    struct counted *c = util_container(job, struct counted, job);
    order[ordered++] = c->number; // one thread
}

static void wait_at_gate(struct work_job *job)
{
    sem_wait(&gate);
}

static void jobs_run_in_order_and_urgent_ones_first(void **state)
{
    struct work *work;
    struct work_job first = {.run = wait_at_gate};
    struct counted c[20];
    ordered = 0;
    sem_init(&gate, 0, 0);
    assert_int_equal(work_open(1, &work), 0);
    work_post(work, &first); // all others are posted while it blocks the only thread
    for (int i = 0; i < 20; i++) {
        c[i] = (struct counted){.job.run = note, .number = i};
        if (i % 4 == 3)
            work_post_urgent(work, &c[i].job);
        else
            work_post(work, &c[i].job);
    }
    sem_post(&gate);
    work_close(work);
    static const int expected[20] = {3, 7, 11, 15, 19, 0,  1,  2,  4,  5,
                                     6, 8, 9,  10, 12, 13, 14, 16, 17, 18};
    assert_int_equal(ordered, 20);
    assert_memory_equal(order, expected, sizeof(expected));
}

struct breeding {
    struct work_job job;
    struct work *work;
    int generations;
};

static void breed(struct work_job *job)
{
    struct breeding *b = util_container(job, struct breeding, job);
    atomic_fetch_add(&ran, 1);
    for (int i = 0; i < 2 && b->generations > 0; i++) {
        struct breeding *child = malloc(sizeof(*child));
        *child =
            (struct breeding){.job.run = breed, .work = b->work, .generations = b->generations - 1};
        work_post(b->work, &child->job);
    }
    free(b);
}

static void closing_runs_what_jobs_still_post(void **state)
{
    for (unsigned threads = 0; threads < 5; threads++) {
        struct work *work;
        ran = 0;
        assert_int_equal(work_open(threads, &work), 0); // 0: one
        struct breeding *b = malloc(sizeof(*b));
        *b = (struct breeding){.job.run = breed, .work = work, .generations = 10};
        work_post(work, &b->job);
        work_close(work);
        assert_int_equal(ran, (1 << 11) - 1);
    }
}

static pthread_barrier_t together;

static void meet(struct work_job *job)
{
    pthread_barrier_wait(&together);
}

static void four_threads_work_at_once(void **state)
{
    struct work *work;
    struct work_job jobs[4];
    pthread_barrier_init(&together, NULL, 4);
    assert_int_equal(work_open(4, &work), 0);
    for (int i = 0; i < 4; i++) {
        jobs[i] = (struct work_job){.run = meet}; // none ends before all have begun
        work_post(work, &jobs[i]);
    }
    work_close(work);
    pthread_barrier_destroy(&together);
}

static void an_idle_pool_closes(void **state)
{
    struct work *work;
    assert_int_equal(work_open(3, &work), 0);
    work_close(work);
    work_close(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(jobs_run_in_order_and_urgent_ones_first),
        cmocka_unit_test(closing_runs_what_jobs_still_post),
        cmocka_unit_test(four_threads_work_at_once),
        cmocka_unit_test(an_idle_pool_closes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
