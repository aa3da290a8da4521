/* The contract of struct meta_ops, which every backend passes: one story per test, run for each of the table. */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "meta/base/log.h"
#include "meta/base/util.h"
#include "meta/meta.h"
#include "tests/contract/meta_backends.h"

#define WAIT_MS 60000 /* it must happen at all */

static char url[META_URL_MAX];
static struct meta_store *a;
static struct meta_store *b;

static struct meta_store *open_store(void)
{
    struct meta_store *store;
    const char *error;
    struct meta_config config = {.url = url};
    if (meta_open(&config, &store, &error) < 0)
        fail_msg("open %s: %s", url, error);
    return store;
}

static int setup(void **state)
{
    int rc = backend->setup(url);
    if (rc != 0)
        return rc;
    a = open_store();
    b = open_store();
    return 0;
}

static int teardown(void **state)
{
    meta_close(a);
    meta_close(b);
    backend->teardown(url);
    return 0;
}

/* ---- what was told ---- */

struct told {
    char text[4096]; /* "key=value key- " in order */
    uint64_t last;   /* revision of the last event */
    bool falling;    /* a revision was smaller than the one before */
    size_t count;
    int stop_after;
};

static int tell(void *arg, const struct meta_event *event)
{
    struct told *told = arg;
    size_t used = strlen(told->text);
    if (event->value)
        snprintf(told->text + used, sizeof(told->text) - used, "%s=%s ", event->key, event->value);
    else
        snprintf(told->text + used, sizeof(told->text) - used, "%s- ", event->key);
    told->falling = told->falling || event->revision < told->last;
    told->last = event->revision;
    told->count++;
    return told->stop_after && (int)told->count >= told->stop_after ? -ECANCELED : 0;
}

/* The next of keys "l/00000", "l/00001" and so on, whose value is the key. */
static int count_in_order(void *arg, const struct meta_event *event)
{
    int *next = arg;
    char key[16];
    snprintf(key, sizeof(key), "l/%05d", (*next)++);
    assert_string_equal(event->key, key);
    assert_string_equal(event->value, key);
    assert_true(event->revision > 0);
    return 0;
}

static void expect_list(struct meta_store *store, const char *prefix, const char *text)
{
    struct told told = {0};
    uint64_t revision;
    assert_int_equal(store->ops->list(store, prefix, tell, &told, &revision), 0);
    assert_string_equal(told.text, text);
    assert_true(told.last <= revision);
}

static uint64_t now_revision(struct meta_store *store)
{
    struct told told = {0};
    uint64_t revision;
    assert_int_equal(store->ops->list(store, "no-such-prefix", tell, &told, &revision), 0);
    assert_int_equal(told.count, 0);
    return revision;
}

/* Waits until `count` changes below the prefix were told. */
static void wait_for(struct meta_store *store, const char *prefix, uint64_t *revision,
                     struct told *told, size_t count)
{
    uint64_t end = util_now_ms() + WAIT_MS;
    while (told->count < count && util_now_ms() < end)
        assert_int_equal(store->ops->wait(store, prefix, revision, 300, -1, tell, told), 0);
    assert_int_equal(told->count, count);
}

/* ---- short forms ---- */

static int put_leased(struct meta_store *store, const char *key, const char *value, uint64_t lease,
                      uint64_t *revision)
{
    struct meta_write write = {META_PUT, key, value, lease};
    struct meta_txn txn = {.writes = &write, .write_count = 1};
    int rc = store->ops->txn(store, &txn);
    if (rc == 0 && revision)
        *revision = txn.revision;
    return rc;
}

static uint64_t put(struct meta_store *store, const char *key, const char *value)
{
    uint64_t revision = 0;
    assert_int_equal(put_leased(store, key, value, 0, &revision), 0);
    return revision;
}

static int write_if(struct meta_store *store, enum meta_condition condition, const char *key,
                    uint64_t revision, enum meta_action action, const char *written,
                    const char *value)
{
    struct meta_compare compare = {condition, key, revision};
    struct meta_write write = {action, written, value, 0};
    struct meta_txn txn = {
        .compares = &compare, .compare_count = 1, .writes = &write, .write_count = 1};
    return store->ops->txn(store, &txn);
}

static void delete(struct meta_store *store, enum meta_action action, const char *key)
{
    struct meta_write write = {action, key, NULL, 0};
    struct meta_txn txn = {.writes = &write, .write_count = 1};
    assert_int_equal(store->ops->txn(store, &txn), 0);
}

static uint64_t grant(struct meta_store *store, uint32_t ttl_ms)
{
    uint64_t lease = 0;
    assert_int_equal(store->ops->lease_grant(store, ttl_ms, &lease), 0);
    assert_int_not_equal(lease, 0);
    return lease;
}

/* ---- keys and transactions ---- */

static void keys_list_in_order_below_their_prefix(void **state)
{
    put(a, "t/b", "2");
    put(a, "t/a", "1");
    put(a, "t/a/x", "deep");
    put(a, "u/a", "other");
    put(a, "t", "bare");
    put(b, "t/~", "{\"v\":1,\"q\":\"\\\"'%_\"}");
    expect_list(b, "t/", "t/a=1 t/a/x=deep t/b=2 t/~={\"v\":1,\"q\":\"\\\"'%_\"} ");
    expect_list(b, "t/a", "t/a=1 t/a/x=deep ");
    expect_list(a, "t/a/", "t/a/x=deep ");
    expect_list(a, "nothing", "");
    put(b, "t/a", "again");
    delete (a, META_DELETE, "t/b");
    delete (a, META_DELETE, "t/was-never-there");
    expect_list(a, "t/", "t/a=again t/a/x=deep t/~={\"v\":1,\"q\":\"\\\"'%_\"} ");
}

static void conditions_hold_or_nothing_happens(void **state)
{
    uint64_t revision = put(a, "k/here", "1");
    assert_int_equal(write_if(b, META_ABSENT, "k/here", 0, META_PUT, "k/x", "no"), -EAGAIN);
    assert_int_equal(write_if(b, META_EXISTS, "k/gone", 0, META_PUT, "k/x", "no"), -EAGAIN);
    assert_int_equal(write_if(b, META_REVISION, "k/here", revision - 1, META_PUT, "k/x", "no"),
                     -EAGAIN);
    assert_int_equal(write_if(b, META_REVISION, "k/gone", revision, META_PUT, "k/x", "no"),
                     -EAGAIN);
    assert_int_equal(write_if(b, META_EMPTY, "k/", 0, META_PUT, "k/x", "no"), -EAGAIN);
    expect_list(b, "k/", "k/here=1 ");

    assert_int_equal(write_if(b, META_ABSENT, "k/gone", 0, META_PUT, "k/w", "1"), 0);
    assert_int_equal(write_if(b, META_EXISTS, "k/here", 0, META_PUT, "k/x", "2"), 0);
    assert_int_equal(write_if(b, META_REVISION, "k/here", revision, META_PUT, "k/y", "3"), 0);
    assert_int_equal(write_if(b, META_EMPTY, "k/here/", 0, META_PUT, "k/z", "4"), 0);
    expect_list(a, "k/", "k/here=1 k/w=1 k/x=2 k/y=3 k/z=4 ");
}

static void one_failed_compare_undoes_all_writes(void **state)
{
    put(a, "k/1", "old");
    struct meta_compare compares[] = {{META_EXISTS, "k/1", 0}, {META_ABSENT, "k/1", 0}};
    struct meta_write writes[] = {{META_PUT, "k/1", "new", 0}, {META_PUT, "k/2", "new", 0}};
    struct meta_txn txn = {compares, 2, writes, 2, 0};
    assert_int_equal(a->ops->txn(a, &txn), -EAGAIN);
    expect_list(b, "k/", "k/1=old ");
}

static void revisions_grow_and_stay_with_their_keys(void **state)
{
    uint64_t first = put(a, "k/1", "x");
    uint64_t second = put(b, "k/2", "x");
    uint64_t third = put(a, "k/1", "y");
    assert_true(first < second && second < third);
    assert_true(now_revision(b) >= third);
    assert_int_equal(write_if(b, META_REVISION, "k/1", first, META_DELETE, "k/1", NULL), -EAGAIN);
    assert_int_equal(write_if(b, META_REVISION, "k/2", second, META_DELETE, "k/2", NULL), 0);
    assert_int_equal(write_if(b, META_REVISION, "k/1", third, META_DELETE, "k/1", NULL), 0);
    uint64_t again = put(a, "k/1", "z");
    assert_true(again > third);
    expect_list(a, "k/", "k/1=z ");
}

static void a_prefix_is_deleted_and_its_neighbours_stay(void **state)
{
    put(a, "h/a", "1");
    put(a, "h/a/x", "1");
    put(a, "h/a/y", "1");
    put(a, "h/a0", "1");
    put(a, "h/b", "1");
    delete (b, META_DELETE_PREFIX, "h/a/");
    expect_list(a, "h/", "h/a=1 h/a0=1 h/b=1 ");
}

static void a_transaction_takes_64_compares_and_64_writes(void **state)
{
    char keys[64][16];
    struct meta_compare compares[64];
    struct meta_write writes[64];
    for (int i = 0; i < 64; i++) {
        snprintf(keys[i], sizeof(keys[i]), "m/%02d", i);
        compares[i] = (struct meta_compare){META_ABSENT, keys[i], 0};
        writes[i] = (struct meta_write){META_PUT, keys[i], "1", 0};
    }
    struct meta_txn txn = {compares, 64, writes, 64, 0};
    uint64_t revision = now_revision(b);
    assert_int_equal(a->ops->txn(a, &txn), 0);
    struct told told = {0};
    wait_for(b, "m/", &revision, &told, 64);
    assert_int_equal(a->ops->txn(a, &txn), -EAGAIN);
    assert_true(told.last <= revision);
    assert_false(told.falling);
}

static void a_large_value_comes_back_whole(void **state)
{
    size_t size = 64 << 10;
    char *value = malloc(size + 1);
    for (size_t i = 0; i < size; i++)
        value[i] = (char)('a' + i % 23);
    value[size] = '\0';
    put(a, "k/large", value);
    assert_int_equal(write_if(b, META_EXISTS, "k/large", 0, META_PUT, "k/small", "x"), 0);
    struct told told = {0};
    uint64_t revision;
    assert_int_equal(b->ops->list(b, "k/large", tell, &told, &revision), 0);
    assert_int_equal(told.count, 1);
    assert_memory_equal(told.text + strlen("k/large="), value, 4000);
    free(value);
}

/* Backends list in pages: none is lost between two of them, nor told twice. */
static void a_long_listing_is_whole_and_in_order(void **state)
{
    enum { TXNS = 20, EACH = 64 };
    char keys[EACH][16];
    struct meta_write writes[EACH];
    for (int i = 0; i < TXNS; i++) {
        for (int k = 0; k < EACH; k++) {
            snprintf(keys[k], sizeof(keys[k]), "l/%05d", i * EACH + k);
            writes[k] = (struct meta_write){META_PUT, keys[k], keys[k], 0};
        }
        struct meta_txn txn = {.writes = writes, .write_count = EACH};
        assert_int_equal(a->ops->txn(a, &txn), 0);
    }
    put(a, "l0", "beside it");
    int next = 0;
    uint64_t revision;
    assert_int_equal(b->ops->list(b, "l/", count_in_order, &next, &revision), 0);
    assert_int_equal(next, TXNS * EACH);
}

static void two_writers_of_one_key_lose_no_increment(void **state)
{
    enum { WRITERS = 4, ROUNDS = 50 };
    put(a, "k/count", "0");
    pid_t children[WRITERS];
    for (int i = 0; i < WRITERS; i++) {
        children[i] = fork();
        if (children[i] != 0)
            continue;
        struct meta_store *store = open_store();
        for (int done = 0; done < ROUNDS;) {
            struct told told = {0};
            uint64_t revision;
            char value[32];
            if (store->ops->list(store, "k/count", tell, &told, &revision) != 0)
                _exit(1);
            snprintf(value, sizeof(value), "%d", atoi(told.text + strlen("k/count=")) + 1);
            int rc =
                write_if(store, META_REVISION, "k/count", told.last, META_PUT, "k/count", value);
            if (rc != 0 && rc != -EAGAIN)
                _exit(2);
            done += rc == 0;
        }
        meta_close(store);
        _exit(0);
    }
    for (int i = 0; i < WRITERS; i++) {
        int status;
        waitpid(children[i], &status, 0);
        assert_int_equal(status, 0);
    }
    expect_list(a, "k/count", "k/count=200 ");
}

/* ---- the change feed ---- */

static void the_feed_tells_changes_in_order(void **state)
{
    put(a, "t/before", "1");
    uint64_t revision = now_revision(b);
    put(a, "t/2", "x");
    put(a, "t/1", "y");
    delete (a, META_DELETE, "t/before");
    put(a, "u/elsewhere", "z");
    struct told told = {0};
    wait_for(b, "t/", &revision, &told, 3);
    assert_string_equal(told.text, "t/2=x t/1=y t/before- ");
    assert_false(told.falling);

    memset(&told, 0, sizeof(told));
    assert_int_equal(b->ops->wait(b, "t/", &revision, 0, -1, tell, &told), 0);
    assert_int_equal(told.count, 0); /* nothing is told twice */

    put(a, "t/3", "1");
    put(a, "t/3", "2");
    delete (a, META_DELETE, "t/3");
    put(a, "t/3", "3");
    uint64_t end = util_now_ms() + WAIT_MS;
    while (!strstr(told.text, "t/3=3 ") && util_now_ms() < end)
        assert_int_equal(b->ops->wait(b, "t/", &revision, 300, -1, tell, &told), 0);
    const char *last = strstr(told.text, "t/3=3 ");
    assert_non_null(last);
    assert_int_equal(strlen(last), strlen("t/3=3 ")); /* folded or not, it comes last */
}

static void a_deleted_prefix_is_told_key_by_key(void **state)
{
    put(a, "t/x/1", "1");
    put(a, "t/x/2", "1");
    uint64_t revision = now_revision(b);
    delete (a, META_DELETE_PREFIX, "t/x/");
    struct told told = {0};
    wait_for(b, "t/", &revision, &told, 2);
    assert_non_null(strstr(told.text, "t/x/1- "));
    assert_non_null(strstr(told.text, "t/x/2- "));
}

static void own_changes_are_told_too(void **state)
{
    uint64_t revision = now_revision(a);
    uint64_t written = put(a, "t/own", "1");
    struct told told = {0};
    wait_for(a, "t/", &revision, &told, 1);
    assert_int_equal(told.last, written);
    assert_true(revision >= written);
}

struct later {
    struct meta_store *store;
    int wake_fd;
};

static void *change_later(void *arg)
{
    struct later *later = arg;
    usleep(100000);
    if (later->wake_fd >= 0) {
        uint64_t one = 1;
        assert_int_equal(write(later->wake_fd, &one, sizeof(one)), sizeof(one));
    } else {
        struct meta_write write = {META_PUT, "t/late", "1", 0};
        struct meta_txn txn = {.writes = &write, .write_count = 1};
        later->store->ops->txn(later->store, &txn);
    }
    return NULL;
}

static void a_waiter_wakes_for_a_change_and_for_its_owner(void **state)
{
    enum { LONG_MS = 600000 }; /* longer than the test may take */
    uint64_t revision = now_revision(b);
    struct told told = {0};
    struct later later = {a, -1};
    pthread_t thread;
    pthread_create(&thread, NULL, change_later, &later);
    while (told.count == 0)
        assert_int_equal(b->ops->wait(b, "t/", &revision, LONG_MS, -1, tell, &told), 0);
    pthread_join(thread, NULL);
    assert_string_equal(told.text, "t/late=1 ");

    later.wake_fd = eventfd(0, EFD_CLOEXEC);
    memset(&told, 0, sizeof(told));
    pthread_create(&thread, NULL, change_later, &later);
    assert_int_equal(b->ops->wait(b, "t/", &revision, LONG_MS, later.wake_fd, tell, &told), 0);
    pthread_join(thread, NULL);
    assert_int_equal(told.count, 0);
    struct pollfd poll_fd = {later.wake_fd, POLLIN, 0};
    assert_int_equal(poll(&poll_fd, 1, 0), 1); /* it was not read */
    close(later.wake_fd);

    uint64_t start = util_now_ms();
    assert_int_equal(b->ops->wait(b, "t/", &revision, 250, -1, tell, &told), 0);
    assert_true(util_now_ms() - start >= 240);
    assert_int_equal(b->ops->wait(b, "t/", &revision, 0, -1, tell, &told), 0);
}

static void a_callback_ends_the_list_and_the_wait(void **state)
{
    uint64_t start = now_revision(b);
    put(a, "t/1", "1");
    put(a, "t/2", "2");
    struct told told = {.stop_after = 1};
    uint64_t revision = 0;
    assert_int_equal(b->ops->list(b, "t/", tell, &told, &revision), -ECANCELED);
    assert_int_equal(told.count, 1);
    memset(&told, 0, sizeof(told));
    told.stop_after = 1;
    revision = start;
    uint64_t end = util_now_ms() + WAIT_MS;
    int rc = 0;
    while (rc == 0 && util_now_ms() < end)
        rc = b->ops->wait(b, "t/", &revision, 300, -1, tell, &told);
    assert_int_equal(rc, -ECANCELED);
    expect_list(b, "t/", "t/1=1 t/2=2 ");
}

static void a_reader_that_fell_behind_lists_again(void **state)
{
    put(a, "t/first", "1");
    uint64_t revision = now_revision(b);
    char keys[64][24];
    struct meta_write writes[64];
    for (int round = 0; round < 600; round++) {
        for (int i = 0; i < 64; i++) {
            snprintf(keys[i], sizeof(keys[i]), "t/%d", (round % 3) * 64 + i);
            writes[i] = (struct meta_write){META_PUT, keys[i], "1", 0};
        }
        struct meta_txn txn = {.writes = writes, .write_count = 64};
        assert_int_equal(a->ops->txn(a, &txn), 0);
    }
    delete (a, META_DELETE, "t/first");
    /* Either the feed still has all of it, or it says that it has not. */
    struct told told = {0};
    int rc = 0;
    uint64_t end = util_now_ms() + WAIT_MS;
    while (rc == 0 && told.last < now_revision(a) && util_now_ms() < end)
        rc = b->ops->wait(b, "t/", &revision, 300, -1, tell, &told);
    if (rc == 0)
        assert_true(told.count >= 193);
    else
        assert_int_equal(rc, -ESTALE);
    revision = now_revision(b);
    memset(&told, 0, sizeof(told));
    put(a, "t/new", "1");
    wait_for(b, "t/", &revision, &told, 1);
}

static void a_revision_that_never_was_is_stale(void **state)
{
    struct told told = {0};
    uint64_t revision = now_revision(a) + 1000000;
    assert_int_equal(b->ops->wait(b, "t/", &revision, 0, -1, tell, &told), -ESTALE);
}

static void changes_that_the_service_has_forgotten_are_stale(void **state)
{
    struct told told = {0};
    if (!backend->forget) {
        print_message("SKIP %s is not told to forget changes\n", backend->name);
        skip();
    }
    uint64_t revision = now_revision(a);
    put(a, "t/1", "1");
    put(a, "t/1", "2");
    assert_int_equal(backend->forget(now_revision(a)), 0);
    assert_int_equal(b->ops->wait(b, "t/", &revision, 5000, -1, tell, &told), -ESTALE);
    assert_int_equal(told.count, 0);
    expect_list(b, "t/", "t/1=2 ");
}

/* ---- leases ---- */

static void leased_keys_go_when_the_lease_ends(void **state)
{
    uint64_t start = util_now_ms();
    uint64_t lease = grant(a, 2000);
    assert_int_equal(put_leased(a, "t/n/a", "up", lease, NULL), 0);
    put(a, "t/stays", "1");
    uint64_t revision = now_revision(b);
    struct told told = {0};
    wait_for(b, "t/", &revision, &told, 1);
    assert_string_equal(told.text, "t/n/a- ");
    assert_true(util_now_ms() - start >= 1000);
    expect_list(a, "t/", "t/stays=1 ");
    assert_int_equal(a->ops->lease_renew(a, lease), -ENOENT);
    assert_int_equal(a->ops->lease_revoke(a, lease), -ENOENT);
    assert_int_equal(put_leased(a, "t/n/a", "up", lease, NULL), -ENOENT);
    expect_list(a, "t/", "t/stays=1 ");
}

static void a_renewed_lease_lives_on(void **state)
{
    uint64_t lease = grant(a, 3000);
    assert_int_equal(put_leased(a, "t/n/a", "up", lease, NULL), 0);
    for (int i = 0; i < 8; i++) {
        usleep(500000);
        assert_int_equal(a->ops->lease_renew(a, lease), 0);
    }
    expect_list(b, "t/", "t/n/a=up ");
    uint64_t revision = now_revision(b);
    assert_int_equal(a->ops->lease_revoke(a, lease), 0);
    struct told told = {0};
    wait_for(b, "t/", &revision, &told, 1);
    assert_string_equal(told.text, "t/n/a- ");
    expect_list(b, "t/", "");
}

static void a_key_belongs_to_the_lease_that_wrote_it_last(void **state)
{
    uint64_t first = grant(a, 60000);
    uint64_t second = grant(b, 60000);
    assert_int_equal(put_leased(a, "t/1", "first", first, NULL), 0);
    assert_int_equal(put_leased(a, "t/2", "first", first, NULL), 0);
    assert_int_equal(put_leased(b, "t/1", "second", second, NULL), 0);
    put(b, "t/2", "for ever");
    assert_int_equal(a->ops->lease_revoke(a, first), 0);
    expect_list(a, "t/", "t/1=second t/2=for ever ");
    assert_int_equal(b->ops->lease_revoke(b, second), 0);
    expect_list(a, "t/", "t/2=for ever ");
}

static void the_keys_of_a_killed_process_go_within_its_lease(void **state)
{
    int ready[2];
    char byte;
    assert_int_equal(pipe(ready), 0);
    pid_t child = fork();
    if (child == 0) {
        struct meta_store *store = open_store();
        uint64_t lease;
        if (store->ops->lease_grant(store, 1500, &lease) == 0 &&
            put_leased(store, "t/n/child", "up", lease, NULL) == 0 && write(ready[1], "x", 1) == 1)
            pause();
        _exit(1);
    }
    assert_int_equal(read(ready[0], &byte, 1), 1);
    uint64_t revision = now_revision(b);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    struct told told = {0};
    wait_for(b, "t/", &revision, &told, 1);
    assert_string_equal(told.text, "t/n/child- ");
    close(ready[0]);
    close(ready[1]);
}

/* ---- locks ---- */

static void a_lock_has_one_holder_and_a_growing_token(void **state)
{
    uint64_t lease_a = grant(a, 60000);
    uint64_t lease_b = grant(b, 3000);
    uint64_t first;
    uint64_t second;
    uint64_t third;
    assert_int_equal(meta_lock(a, "sweep", lease_a, &first), 0);
    assert_int_equal(meta_lock(b, "sweep", lease_b, &second), -EAGAIN);
    assert_int_equal(meta_lock(b, "other", lease_b, &second), 0);
    assert_int_equal(meta_unlock(a, "sweep", first), 0);
    assert_int_equal(meta_lock(b, "sweep", lease_b, &second), 0);
    assert_true(second > first);
    assert_int_equal(meta_unlock(a, "sweep", first), -ENOENT); /* late: another's by now */
    assert_int_equal(meta_lock(a, "sweep", lease_a, &third), -EAGAIN);
    usleep((3600 + backend->lease_grain_ms) * 1000); /* b's lease ends */
    assert_int_equal(meta_lock(a, "sweep", lease_a, &third), 0);
    assert_true(third > second);
    assert_int_equal(meta_unlock(b, "sweep", second), -ENOENT);
    assert_int_equal(meta_unlock(a, "sweep", third), 0);
}

/* ---- outages ---- */

/* Whatever was open to the service before, a call that goes through is the end of the outage. */
static void an_outage_that_is_over_does_not_come_back(void **state)
{
    struct meta_write write = {META_PUT, "t/1", "1", 0};
    struct meta_txn txn = {.writes = &write, .write_count = 1};
    struct told told = {0};
    uint64_t revision = now_revision(a);
    if (!backend->restart) {
        print_message("SKIP %s has no service that could be away\n", backend->name);
        skip();
    }
    assert_int_equal(a->ops->wait(a, "t/", &revision, 50, -1, tell, &told), 0);
    assert_int_equal(backend->restart(), 0);
    uint64_t end = util_now_ms() + WAIT_MS;
    int rc;
    while ((rc = a->ops->list(a, "t/", tell, &told, &revision)) < 0 && util_now_ms() < end)
        usleep(20000);
    assert_int_equal(rc, 0);
    assert_int_equal(a->ops->wait(a, "t/", &revision, 50, -1, tell, &told), 0);
    assert_int_equal(a->ops->txn(a, &txn), 0);
    wait_for(a, "t/", &revision, &told, 1);
    assert_string_equal(told.text, "t/1=1 ");
}

#define STORY(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(int argc, char **argv)
{
    const struct CMUnitTest stories[] = {
        STORY(keys_list_in_order_below_their_prefix),
        STORY(conditions_hold_or_nothing_happens),
        STORY(one_failed_compare_undoes_all_writes),
        STORY(revisions_grow_and_stay_with_their_keys),
        STORY(a_prefix_is_deleted_and_its_neighbours_stay),
        STORY(a_transaction_takes_64_compares_and_64_writes),
        STORY(a_large_value_comes_back_whole),
        STORY(a_long_listing_is_whole_and_in_order),
        STORY(two_writers_of_one_key_lose_no_increment),
        STORY(the_feed_tells_changes_in_order),
        STORY(a_deleted_prefix_is_told_key_by_key),
        STORY(own_changes_are_told_too),
        STORY(a_waiter_wakes_for_a_change_and_for_its_owner),
        STORY(a_callback_ends_the_list_and_the_wait),
        STORY(a_reader_that_fell_behind_lists_again),
        STORY(a_revision_that_never_was_is_stale),
        STORY(changes_that_the_service_has_forgotten_are_stale),
        STORY(leased_keys_go_when_the_lease_ends),
        STORY(a_renewed_lease_lives_on),
        STORY(a_key_belongs_to_the_lease_that_wrote_it_last),
        STORY(the_keys_of_a_killed_process_go_within_its_lease),
        STORY(a_lock_has_one_holder_and_a_growing_token),
        STORY(an_outage_that_is_over_does_not_come_back),
    };
    int failed = 0;
    log_setup(LOG_ERROR, false);
    for (size_t i = 0; i < util_count(backends); i++) {
        backend = &backends[i];
        char group[64];
        if (argc > 1 && strcmp(argv[1], backend->name) != 0)
            continue;
        const char *why = backend->start ? backend->start() : NULL;
        snprintf(group, sizeof(group), "meta contract: %s", backend->name);
        if (why)
            printf("SKIP: %s: %s (scripts/bootstrap --test, where Debian has it)\n", group, why);
        else
            failed += cmocka_run_group_tests_name(group, stories, NULL, NULL);
        if (backend->end)
            backend->end();
    }
    return failed != 0;
}
