/* Two stores in one process (and some in others) on one directory of metadata: what p2pstore.h promises. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "engine/p2pstore.h"

#define KIB      1024ull
#define MIB      (1024 * KIB)
#define SHARD    (64 * KIB)
#define PATIENCE 30000 /* ms: it must happen at all */

static char home[64];
static char url[96];
static struct p2pstore *A, *B;

static void nap(unsigned ms)
{
    nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000l}, NULL);
}

/* Retries what depends on another store having heard of a change, which takes up to a second. */
#define EVENTUALLY(condition)                                   \
    do {                                                        \
        for (int turn = 0; !(condition) && turn < 3000; turn++) \
            nap(10);                                            \
        assert_true(condition);                                 \
    } while (0)

static struct p2pstore *opened(const char *node)
{
    static const char *const options[] = {"listen=127.0.0.1:0", "read_timeout=8", "log_level=error",
                                          NULL};
    struct p2pstore *store = NULL;
    int status = p2pstore_open(url, node, options, &store);
    if (status < 0)
        print_error("%s\n", p2pstore_error());
    assert_int_equal(status, 0);
    return store;
}

static int setup(void **state)
{
    snprintf(home, sizeof home, "/dev/shm/p2pfs-store-XXXXXX");
    assert_non_null(mkdtemp(home));
    snprintf(url, sizeof url, "local://%s", home);
    A = opened("A");
    B = opened("B");
    return 0;
}

static int teardown(void **state)
{
    char command[96];
    assert_int_equal(p2pstore_close(A), 0);
    assert_int_equal(p2pstore_close(B), 0);
    snprintf(command, sizeof command, "rm -rf '%s'", home);
    return system(command);
}

// -- Memory ---------------------------------------------------------------------------------------

static uint8_t *memory(uint64_t size)
{
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(at != MAP_FAILED);
    return at;
}

static void fill(uint8_t *bytes, uint64_t size, uint64_t seed)
{
    for (uint64_t i = 0; i + 8 <= size; i += 8) {
        uint64_t word = (i + seed) * 0x9e3779b97f4a7c15ull;
        word ^= word >> 29;
        memcpy(bytes + i, &word, 8);
    }
}

/* `size` bytes cut into ranges of uneven lengths, with gaps between them and an empty one. */
struct cut {
    uint8_t *bytes;
    uint64_t room;
    struct p2pstore_range ranges[16];
    size_t count;
};

static struct cut cut(uint64_t size, const uint64_t *lengths, size_t count)
{
    struct cut c = {.room = size + 16 * 64 * KIB};
    c.bytes = memory(c.room);
    uint64_t at = 24; /* no page's begin */
    uint64_t left = size;
    for (size_t i = 0; i < count; i++) {
        uint64_t length = i + 1 < count ? lengths[i] : left;
        c.ranges[c.count++] = (struct p2pstore_range){c.bytes + at, length};
        at += length + 40;
        left -= length;
    }
    return c;
}

static void cut_free(struct cut *c)
{
    munmap(c->bytes, c->room);
}

/* The same bytes, whatever the cuts. */
static void same(const struct cut *a, const struct cut *b, uint64_t size)
{
    size_t i = 0, k = 0;
    uint64_t at = 0, bt = 0; /* inside ranges i and k */
    for (uint64_t done = 0; done < size;) {
        uint64_t step = a->ranges[i].length - at;
        if (b->ranges[k].length - bt < step)
            step = b->ranges[k].length - bt;
        assert_memory_equal((uint8_t *)a->ranges[i].address + at,
                            (uint8_t *)b->ranges[k].address + bt, step);
        done += step;
        at += step;
        bt += step;
        if (at == a->ranges[i].length) {
            i++;
            at = 0;
        }
        if (bt == b->ranges[k].length) {
            k++;
            bt = 0;
        }
    }
}

static int get(struct p2pstore *store, const char *name, const struct cut *c)
{
    int status;
    for (int turn = 0; turn < 300; turn++) {
        status = p2pstore_get_replica(store, name, c->ranges, c->count, PATIENCE);
        if (status != -ENOENT)
            break;
        nap(10); /* not heard of yet */
    }
    return status;
}

static int put(struct p2pstore *store, const char *name, const struct cut *c)
{
    return p2pstore_register(store, name, c->ranges, c->count, SHARD, NULL, PATIENCE);
}

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

// -- Wrong use ------------------------------------------------------------------------------------

static void wrong_arguments_are_refused(void **state)
{
    struct cut c = cut(MIB, (uint64_t[]){1000, 0}, 2);
    struct p2pstore_range bad[] = {{c.bytes, 4096}, {c.bytes + 4095, 10}};
    struct p2pstore_list *list;
    static const char *const names[] = {"", "/a", "a/", "a//b", ".", "a/../b", NULL};
    for (int i = 0; names[i]; i++)
        assert_int_equal(put(A, names[i], &c), -EINVAL);
    assert_int_equal(p2pstore_register(A, NULL, c.ranges, 1, SHARD, NULL, PATIENCE), -EINVAL);
    assert_int_equal(p2pstore_register(NULL, "x", c.ranges, 1, SHARD, NULL, PATIENCE), -EINVAL);
    assert_int_equal(p2pstore_register(A, "x", c.ranges, 0, SHARD, NULL, PATIENCE), -EINVAL);
    assert_int_equal(p2pstore_register(A, "x", NULL, 1, SHARD, NULL, PATIENCE), -EINVAL);
    assert_int_equal(p2pstore_register(A, "x", c.ranges, 1, 0, NULL, PATIENCE), -EINVAL);
    assert_non_null(strstr(p2pstore_error(), "shard size"));
    assert_int_equal(p2pstore_register(A, "x", c.ranges, 1, 65535, NULL, PATIENCE), -EINVAL);
    assert_int_equal(p2pstore_register(A, "x", bad, 2, SHARD, NULL, PATIENCE), -EINVAL);
    assert_non_null(strstr(p2pstore_error(), "overlaps"));
    assert_int_equal(p2pstore_register(A, "x", c.ranges, 1, SHARD, "cuda:0", PATIENCE),
                     -EOPNOTSUPP);
    bad[0] = (struct p2pstore_range){c.bytes, UINT64_MAX};
    assert_int_equal(p2pstore_register(A, "x", bad, 1, SHARD, NULL, PATIENCE), -EFBIG);
    assert_int_equal(p2pstore_list(A, "", PATIENCE, NULL), -EINVAL);
    assert_int_equal(p2pstore_register_start(A, "x", c.ranges, 1, SHARD, NULL, NULL, NULL, NULL),
                     -EINVAL);
    assert_int_equal(p2pstore_list(A, "", PATIENCE, &list), 0);
    assert_int_equal(p2pstore_list_count(list), 0); /* none of these left anything */
    p2pstore_list_free(list);
    p2pstore_list_free(NULL);
    p2pstore_request_free(NULL);
    assert_int_equal(p2pstore_close(NULL), 0);
    cut_free(&c);
}

static void ranges_must_be_memory(void **state)
{
    struct cut c = cut(MIB, NULL, 1);
    uint8_t *pages = memory(3 * 4096);
    struct p2pstore_range hole = {pages, 3 * 4096};
    assert_int_equal(put(A, "x", &c), 0);
    assert_int_equal(mprotect(pages + 4096, 4096, PROT_READ), 0);
    assert_int_equal(p2pstore_register(A, "y", &hole, 1, SHARD, NULL, PATIENCE), 0);
    EVENTUALLY(p2pstore_get_replica(B, "y", &hole, 1, PATIENCE) == -EFAULT);
    assert_non_null(strstr(p2pstore_error(), "writable"));
    assert_int_equal(p2pstore_unregister(A, "y", PATIENCE), 0);
    munmap(pages + 4096, 4096);
    assert_int_equal(p2pstore_register(A, "y", &hole, 1, SHARD, NULL, PATIENCE), -EFAULT);
    hole.address = (void *)8;
    assert_int_equal(p2pstore_register(A, "y", &hole, 1, SHARD, NULL, PATIENCE), -EFAULT);
    munmap(pages, 3 * 4096);
    cut_free(&c);
}

static void names_and_sizes_must_fit(void **state)
{
    struct cut from = cut(MIB, NULL, 1);
    struct cut to = cut(MIB, (uint64_t[]){300, 0}, 2);
    assert_int_equal(p2pstore_get_replica(B, "d/x", to.ranges, 2, PATIENCE), -ENOENT);
    assert_int_equal(p2pstore_unregister(A, "d/x", PATIENCE), -ENOENT);
    assert_int_equal(put(A, "d/x", &from), 0);
    assert_int_equal(put(A, "d/x", &from), -EEXIST);
    assert_int_equal(p2pstore_get_replica(A, "d/x", to.ranges, 2, PATIENCE), -EEXIST);
    EVENTUALLY(put(B, "d/x", &to) == -EEXIST);
    assert_int_equal(put(B, "d/x/y", &to), -ENOTDIR);
    assert_int_equal(put(B, "d", &to), -EISDIR);
    assert_int_equal(p2pstore_get_replica(B, "d/x", to.ranges, 1, PATIENCE), -EMSGSIZE);
    assert_int_equal(p2pstore_get_replica(B, "d", to.ranges, 2, PATIENCE), -EISDIR);
    assert_int_equal(p2pstore_unregister(B, "d/x", PATIENCE), -EPERM);
    assert_int_equal(p2pstore_delete_replica(A, "d/x", PATIENCE), -ENOENT);
    assert_int_equal(get(B, "d/x", &to), 0);
    assert_int_equal(get(B, "d/x", &to), -EEXIST);
    assert_int_equal(p2pstore_unregister(B, "d/x", PATIENCE), -EPERM);
    /* Memory that is in use here is not written, and what is written is not lent again. */
    assert_int_equal(put(A, "e", &from), 0);
    assert_int_equal(put(B, "f", &to), 0);
    EVENTUALLY(p2pstore_get_replica(B, "e", to.ranges, 2, PATIENCE) == -EBUSY);
    assert_int_equal(p2pstore_unregister(A, "d/x", PATIENCE), 0);
    assert_int_equal(put(A, "d/x", &from), 0); /* another version: what B has is of the old one */
    assert_int_equal(p2pstore_delete_replica(B, "d/x", PATIENCE), 0);
    p2pstore_close(B);
    B = opened("B");
    cut_free(&to);
    p2pstore_close(A);
    A = opened("A");
    cut_free(&from);
}

static void options_are_refused_by_name(void **state)
{
    static const struct {
        const char *option;
        int status;
        const char *says;
    } wrong[] = {{"colour=red", -EINVAL, "colour"},
                 {"listen=here", -EINVAL, "listen"},
                 {"listen=", -EINVAL, "listen"},
                 {"advertise=:", -EINVAL, "advertise"},
                 {"transport=rdma", -EOPNOTSUPP, "rdma"},
                 {"transport=pigeon", -EINVAL, "pigeon"},
                 {"digest=md5", -EINVAL, "digest"},
                 {"read_timeout=0", -EINVAL, "read_timeout"},
                 {"log_level=loud", -EINVAL, "loud"},
                 {"nic_priority_matrix=mlx5_0", -EINVAL, "the matrix itself"},
                 {"nic_priority_matrix={\"cpu:0\": 3}", -EINVAL, "line 1"},
                 {"secret_file=/none", -ENOENT, "/none"}};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        const char *options[] = {"listen=127.0.0.1:0", wrong[i].option, NULL};
        struct p2pstore *store = A;
        assert_int_equal(p2pstore_open(url, "C", options, &store), wrong[i].status);
        assert_non_null(strstr(p2pstore_error(), wrong[i].says));
        assert_null(store);
    }
    struct p2pstore *store;
    assert_int_equal(p2pstore_open(NULL, "C", NULL, &store), -EINVAL);
    assert_int_equal(p2pstore_open(url, "a b", NULL, &store), -EINVAL);
    assert_int_equal(p2pstore_open(url, "A", (const char *[]){"listen=127.0.0.1:0", NULL}, &store),
                     -EEXIST);
    assert_non_null(strstr(p2pstore_error(), "name A is in use"));
    assert_true(p2pstore_open("pigeon://x", "C", NULL, &store) < 0);
    assert_true(p2pstore_open("127.0.0.1:1", "C", NULL, &store) < 0);
    assert_non_null(strstr(p2pstore_error(), "127.0.0.1:1")); /* as an etcd's address */
    const char *fine[] = {"device=erdma_0", "nic_priority_matrix={\"cpu:0\": [[\"mlx5_0\"], []]}",
                          "log_level=error", NULL};
    assert_int_equal(p2pstore_open(url, NULL, fine, &store), 0);
    assert_int_equal(p2pstore_close(store), 0);
}

static void a_forked_process_is_refused(void **state)
{
    struct cut c = cut(MIB, NULL, 1);
    assert_int_equal(put(A, "x", &c), 0);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        struct p2pstore_list *list;
        bool right = p2pstore_list(A, "", PATIENCE, &list) == -EPERM &&
                     p2pstore_unregister(A, "x", PATIENCE) == -EPERM &&
                     p2pstore_completed(A) == NULL && p2pstore_close(A) == -EPERM &&
                     strstr(p2pstore_error(), "forked");
        _exit(right ? 0 : 1);
    }
    int status = -1;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    assert_int_equal(p2pstore_unregister(A, "x", PATIENCE), 0);
    cut_free(&c);
}

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

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

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
        TEST(wrong_arguments_are_refused),
        TEST(ranges_must_be_memory),
        TEST(names_and_sizes_must_fit),
        TEST(options_are_refused_by_name),
        TEST(a_forked_process_is_refused),
        TEST(threads_may_want_one_name),
        TEST(a_registrar_that_dies_ends_the_pull),
        TEST(ten_thousand_registrations_leave_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
