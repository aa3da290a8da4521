/* Two stores in one process (and some in others) on one directory of metadata: what p2pstore.h promises. */
#include "tests/contract/store_kit.h"

#include <dirent.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

// -- What it is for -------------------------------------------------------------------------------

/* Whether a version's root stands in the metadata: the library does not tell. */
static bool digested(void)
{
    char command[128];
    snprintf(command, sizeof command, "grep -aq '\"root\":' %s/metadata.db*", home);
    return system(command) == 0;
}

static void ranges_cross_shards_on_both_sides(void **state)
{
    static const uint64_t source[] = {1, 100000, 0, 3 * MIB + 17, 65536, 0};
    static const uint64_t destination[] = {70001, 2 * MIB, 5, 0};
    const uint64_t size = 8 * MIB + 4321;
    struct cut from = cut(size, source, 6);
    struct cut to = cut(size, destination, 4);
    struct cut third = cut(size, destination, 1);
    fill(from.bytes, from.room, 7);
    assert_int_equal(put(A, "models/one", &from), 0);
    assert_int_equal(get(B, "models/one", &to), 0);
    same(&from, &to, size);
    /* What was pulled is passed on, also from several ranges, when the one who registered it is gone. */
    struct p2pstore *C = opened("C");
    struct p2pstore_list *list = NULL;
    EVENTUALLY((p2pstore_list_free(list), p2pstore_list(C, "models/", PATIENCE, &list) == 0 &&
                                              p2pstore_list_count(list) == 1 &&
                                              p2pstore_list_entry(list, 0)->complete == 2));
    p2pstore_list_free(list);
    EVENTUALLY(digested()); /* until then newcomers trust nobody but the registrar */
    assert_int_equal(p2pstore_close(A), 0);
    cut_free(&from);
    assert_int_equal(get(C, "models/one", &third), 0);
    same(&to, &third, size);
    assert_int_equal(p2pstore_delete_replica(C, "models/one", PATIENCE), 0);
    assert_int_equal(p2pstore_delete_replica(C, "models/one", PATIENCE), -ENOENT);
    assert_int_equal(get(C, "models/one", &third), 0);
    assert_int_equal(p2pstore_close(C), 0);
    A = opened("A");
    assert_int_equal(p2pstore_unregister(A, "models/one", PATIENCE), 0); /* left by its last life */
    EVENTUALLY(p2pstore_get_replica(A, "models/one", third.ranges, 1, PATIENCE) == -ENOENT);
    cut_free(&to);
    cut_free(&third);
}

static void nothing_can_be_registered_too(void **state)
{
    struct cut none = cut(0, NULL, 1);
    struct cut two = cut(0, (uint64_t[]){0}, 2);
    assert_int_equal(put(A, "nothing", &none), 0);
    assert_int_equal(get(B, "nothing", &two), 0);
    assert_int_equal(p2pstore_unregister(A, "nothing", PATIENCE), 0);
    cut_free(&none);
    cut_free(&two);
}

static void a_list_says_who_has_what(void **state)
{
    static const uint64_t lengths[] = {1000, 2 * MIB, 0};
    struct cut from = cut(3 * MIB, lengths, 3);
    struct cut to = cut(3 * MIB, lengths, 1);
    struct cut small = cut(5, NULL, 1);
    struct p2pstore_list *list = NULL;
    fill(from.bytes, from.room, 1);
    assert_int_equal(put(A, "m/b", &from), 0);
    assert_int_equal(put(A, "m/a-2", &small), 0);
    assert_int_equal(put(A, "n", &small), 0);
    assert_int_equal(get(B, "m/b", &to), 0);
    EVENTUALLY((p2pstore_list_free(list), p2pstore_list(B, "m/", PATIENCE, &list) == 0 &&
                                              p2pstore_list_count(list) == 2 &&
                                              p2pstore_list_entry(list, 1)->holders == 2));
    const struct p2pstore_entry *entry = p2pstore_list_entry(list, 1);
    assert_string_equal(p2pstore_list_entry(list, 0)->name, "m/a-2");
    assert_string_equal(entry->name, "m/b");
    assert_string_equal(entry->origin, "A");
    assert_int_equal(entry->max_shard_size, SHARD);
    assert_int_equal(entry->total_size, 3 * MIB);
    assert_int_equal(entry->size_count, 3);
    assert_int_equal(entry->sizes[0], 1000);
    assert_int_equal(entry->sizes[1], 2 * MIB);
    assert_int_equal(entry->sizes[2], MIB - 1000);
    assert_int_equal(entry->state, P2PSTORE_REPLICA);
    assert_int_equal(p2pstore_list_entry(list, 0)->state, P2PSTORE_AVAILABLE);
    assert_int_equal(p2pstore_list_entry(list, 0)->size_count, 1);
    assert_null(p2pstore_list_entry(list, 2));
    p2pstore_list_free(list);
    assert_int_equal(p2pstore_list(A, "m/b", PATIENCE, &list),
                     0); /* a prefix of text, not of paths */
    assert_int_equal(p2pstore_list_entry(list, 0)->state, P2PSTORE_REGISTERED);
    p2pstore_list_free(list);
    assert_int_equal(p2pstore_list(A, NULL, PATIENCE, &list), 0);
    assert_int_equal(p2pstore_list_count(list), 3);
    p2pstore_list_free(list);
    cut_free(&to);
    cut_free(&from);
    cut_free(&small); /* close takes them back: their pages are not touched any more */
}

// -- Requests -------------------------------------------------------------------------------------

static void *callback_arg;
static atomic_int callbacks;

static void on_end(struct p2pstore_request *request, void *arg)
{
    assert_int_not_equal(p2pstore_request_status(request), -EINPROGRESS);
    assert_int_equal(p2pstore_close(arg), -EDEADLK);
    callback_arg = arg;
    p2pstore_request_free(request);
    atomic_fetch_add(&callbacks, 1);
}

static void requests_end_by_callback_or_descriptor(void **state)
{
    struct cut c = cut(MIB, NULL, 1);
    struct p2pstore_request *one, *two, *ended;
    struct pollfd poll_fd = {.fd = p2pstore_fd(A), .events = POLLIN};
    assert_int_equal(
        p2pstore_register_start(A, "one", c.ranges, 1, SHARD, "cpu:0", on_end, A, &one), 0);
    assert_int_equal(p2pstore_register_start(A, "two", c.ranges, 1, SHARD, "*", NULL, NULL, &two),
                     0);
    assert_int_equal(poll(&poll_fd, 1, PATIENCE), 1);
    ended = p2pstore_completed(A);
    assert_ptr_equal(ended, two);
    assert_null(p2pstore_completed(A));
    assert_int_equal(poll(&poll_fd, 1, 0), 0);
    assert_int_equal(p2pstore_request_status(two), 0);
    assert_string_equal(p2pstore_request_error(two), "");
    assert_string_equal(p2pstore_request_name(two), "two");
    assert_int_equal(p2pstore_request_call(two), P2PSTORE_REGISTER);
    assert_int_equal(p2pstore_request_cancel(two), -EALREADY);
    p2pstore_request_free(two);
    EVENTUALLY(atomic_load(&callbacks) == 1);
    assert_ptr_equal(callback_arg, A);
    /* Freed unseen, and freed while it runs: neither shows. */
    assert_int_equal(p2pstore_unregister_start(A, "one", NULL, NULL, &one), 0);
    assert_int_equal(p2pstore_request_wait(one, PATIENCE), 0);
    p2pstore_request_free(one);
    assert_int_equal(p2pstore_unregister_start(A, "two", NULL, NULL, &two), 0);
    p2pstore_request_free(two);
    EVENTUALLY(p2pstore_unregister(A, "two", PATIENCE) == -ENOENT);
    assert_null(p2pstore_completed(A));
    cut_free(&c);
}

/* A pull in flight of B: its source registers much. */
static struct p2pstore_request *pull_begin(const struct cut *to)
{
    struct p2pstore_request *request = NULL;
    uint64_t done = 0, total = 0;
    int status = -ENOENT;
    for (int turn = 0; turn < 3000 && status == -ENOENT; turn++) {
        status = p2pstore_get_replica_start(B, "big", to->ranges, to->count, NULL, NULL, &request);
        if (status == -ENOENT)
            nap(10);
    }
    assert_int_equal(status, 0);
    while (done == 0 && p2pstore_request_status(request) == -EINPROGRESS)
        p2pstore_request_progress(request, &done, &total);
    assert_true(total == 0 || total == 192 * MIB);
    return request;
}

static void expect_untouched(struct cut *c)
{
    memset(c->bytes, 0x5a, c->room);
    nap(150);
    assert_int_equal(c->bytes[0], 0x5a);
    assert_memory_equal(c->bytes, c->bytes + 1, c->room - 1);
}

static void a_cancelled_pull_writes_no_more(void **state)
{
    static const uint64_t lengths[] = {12345677, 100 * MIB, 0};
    const uint64_t size = 192 * MIB;
    struct cut from = cut(size, NULL, 1);
    struct cut to = cut(size, lengths, 3);
    fill(from.bytes, from.room, 3);
    assert_int_equal(put(A, "big", &from), 0);
    struct p2pstore_request *request = pull_begin(&to);
    int status = p2pstore_request_cancel(request);
    if (status == 0) { /* else it was quicker */
        assert_int_equal(p2pstore_request_status(request), -ECANCELED);
        expect_untouched(&to);
        assert_int_equal(p2pstore_delete_replica(B, "big", PATIENCE), -ENOENT);
        assert_int_equal(get(B, "big", &to), 0);
    }
    same(&from, &to, size);
    assert_int_equal(p2pstore_delete_replica(B, "big", PATIENCE), 0);
    expect_untouched(&to);
    p2pstore_request_free(request);
    /* A deadline is a cancel. */
    status = p2pstore_get_replica(B, "big", to.ranges, to.count, 1);
    assert_true(status == -ETIMEDOUT || status == 0);
    if (status < 0)
        expect_untouched(&to);
    cut_free(&from);
    cut_free(&to);
}

static void memory_may_go_when_unregister_returns(void **state)
{
    struct cut from = cut(192 * MIB, (uint64_t[]){MIB + 1, 0}, 2);
    struct cut to = cut(192 * MIB, NULL, 1);
    fill(from.bytes, from.room, 4);
    assert_int_equal(put(A, "big", &from), 0);
    struct p2pstore_request *request = pull_begin(&to);
    assert_int_equal(p2pstore_unregister(A, "big", PATIENCE), 0);
    cut_free(&from);
    int status = p2pstore_request_wait(request, PATIENCE);
    assert_true(status == 0 || status == -EIO);
    if (status < 0) {
        assert_true(strlen(p2pstore_request_error(request)) > 5);
        expect_untouched(&to);
    }
    p2pstore_request_free(request);
    cut_free(&to);
}

static void *close_b(void *arg)
{
    assert_int_equal(p2pstore_close(B), 0);
    return NULL;
}

static void close_ends_what_runs(void **state)
{
    struct cut from = cut(192 * MIB, NULL, 1);
    struct cut to = cut(192 * MIB, NULL, 1);
    pthread_t closer;
    assert_int_equal(put(A, "big", &from), 0);
    struct p2pstore_request *request = pull_begin(&to);
    assert_int_equal(pthread_create(&closer, NULL, close_b, NULL), 0);
    int status = p2pstore_request_wait(request, PATIENCE);
    assert_true(status == 0 || status == -ESHUTDOWN);
    pthread_join(closer, NULL);
    expect_untouched(&to);
    assert_int_equal(p2pstore_request_cancel(request), -EALREADY);
    p2pstore_request_free(request); /* the store is long gone */
    B = opened("B");
    cut_free(&from);
    cut_free(&to);
}

// -- Several threads ------------------------------------------------------------------------------

struct racer {
    pthread_t thread;
    struct cut cut;
    unsigned won, lost;
};

static void *race(void *arg)
{
    struct racer *racer = arg;
    for (int i = 0; i < 200; i++) {
        int status = put(A, "race", &racer->cut);
        racer->won += status == 0;
        racer->lost += status == -EEXIST || status == -EBUSY;
        if (status == 0 && p2pstore_unregister(A, "race", PATIENCE) != 0)
            racer->won = 1000;
    }
    return NULL;
}

static void threads_may_want_one_name(void **state)
{
    struct racer racers[4] = {0};
    for (int i = 0; i < 4; i++) {
        racers[i].cut = cut(MIB, NULL, 1);
        assert_int_equal(pthread_create(&racers[i].thread, NULL, race, &racers[i]), 0);
    }
    unsigned won = 0;
    for (int i = 0; i < 4; i++) {
        pthread_join(racers[i].thread, NULL);
        won += racers[i].won;
        assert_int_equal(racers[i].won + racers[i].lost, 200);
        cut_free(&racers[i].cut);
    }
    assert_in_range(won, 1, 800);
}

// -- Others fail ----------------------------------------------------------------------------------

/* Registers much, says so, and waits for its end. */
static int registrar(const char *at)
{
    snprintf(url, sizeof url, "%s", at);
    struct cut from = cut(192 * MIB, NULL, 1);
    struct p2pstore *store = opened("registrar");
    if (put(store, "big", &from) == 0 && write(STDOUT_FILENO, "+", 1) == 1)
        pause();
    return 1;
}

static void a_registrar_that_dies_ends_the_pull(void **state)
{
    struct cut to = cut(192 * MIB, (uint64_t[]){MIB + 1, 0}, 2);
    int ready[2];
    char mark;
    assert_int_equal(pipe(ready), 0);
    fflush(stdout);
    pid_t child = fork(); /* a program of its own, with a store of its own */
    if (child == 0) {
        dup2(ready[1], STDOUT_FILENO);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        execl("/proc/self/exe", "registrar", url, NULL);
        _exit(127);
    }
    close(ready[1]);
    assert_int_equal(read(ready[0], &mark, 1), 1);
    struct p2pstore_request *request = pull_begin(&to);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    int status = p2pstore_request_wait(request, PATIENCE);
    assert_true(status == 0 || status == -EIO);
    if (status < 0)
        expect_untouched(&to);
    p2pstore_request_free(request);
    close(ready[0]);
    p2pstore_close(B);
    B = opened("B");
    cut_free(&to);
}

// -- For long -------------------------------------------------------------------------------------

static unsigned descriptors(void)
{
    unsigned count = 0;
    DIR *dir = opendir("/proc/self/fd");
    while (readdir(dir))
        count++;
    closedir(dir);
    return count;
}

static long resident_kib(void)
{
    long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    assert_int_equal(fscanf(file, "%*d %ld", &pages), 1);
    fclose(file);
    return pages * 4;
}

/* `rounds` registrations and their ends, 100 under way at a time. */
static void churn(struct cut *c, unsigned rounds)
{
    struct p2pstore_request *requests[100];
    char name[32];
    for (unsigned i = 0; i < rounds; i += 100) {
        for (unsigned k = 0; k < 100; k++) {
            snprintf(name, sizeof name, "churn/%u", i + k);
            assert_int_equal(p2pstore_register_start(A, name, c->ranges, c->count, SHARD, NULL,
                                                     NULL, NULL, &requests[k]),
                             0);
        }
        for (unsigned k = 0; k < 100; k++) {
            assert_int_equal(p2pstore_request_wait(requests[k], PATIENCE), 0);
            p2pstore_request_free(requests[k]);
            snprintf(name, sizeof name, "churn/%u", i + k);
            assert_int_equal(p2pstore_unregister_start(A, name, NULL, NULL, &requests[k]), 0);
        }
        for (unsigned k = 0; k < 100; k++) {
            assert_int_equal(p2pstore_request_wait(requests[k], PATIENCE), 0);
            p2pstore_request_free(requests[k]);
        }
    }
}

static void ten_thousand_registrations_leave_nothing(void **state)
{
    struct cut c = cut(200 * KIB, (uint64_t[]){777, 0}, 2);
    churn(&c, 1000);
    unsigned fds = descriptors();
    long kib = resident_kib();
    churn(&c, 9000);
    assert_in_range(descriptors(), 1, fds + 100); /* for 9000 */
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && !defined(__clang__)
    assert_in_range(resident_kib(), 1, kib + 9000); /* under a KiB each */
#endif
    (void)kib;
    cut_free(&c);
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[0], "registrar") == 0)
        return registrar(argv[1]);
    const struct CMUnitTest tests[] = {
        TEST(ranges_cross_shards_on_both_sides),
        TEST(nothing_can_be_registered_too),
        TEST(a_list_says_who_has_what),
        TEST(requests_end_by_callback_or_descriptor),
        TEST(a_cancelled_pull_writes_no_more),
        TEST(memory_may_go_when_unregister_returns),
        TEST(close_ends_what_runs),
        TEST(threads_may_want_one_name),
        TEST(a_registrar_that_dies_ends_the_pull),
        TEST(ten_thousand_registrations_leave_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
