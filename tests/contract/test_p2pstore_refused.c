/* What p2pstore.h refuses, by name and without leaving anything behind. */
#include "tests/contract/store_kit.h"

#include <stdbool.h>
#include <sys/wait.h>
#include <unistd.h>

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

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(wrong_arguments_are_refused), TEST(ranges_must_be_memory),
        TEST(names_and_sizes_must_fit),    TEST(options_are_refused_by_name),
        TEST(a_forked_process_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
