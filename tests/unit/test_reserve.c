/* Reserve: which files are prepared, and what storage makes of it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "engine/reserve.h"
#include "engine/storage.h"

#define MIB  (1ull << 20)
#define GIB  (1ull << 30)
#define SIZE (64 * MIB + 4097) /* of what is prepared: not whole huge pages, nor small ones */

static void it_takes_a_part_of_the_cache_and_of_memory(void **state)
{
    (void)state;
    assert_int_equal(reserve_budget(8 * GIB, 100 * GIB), 2 * GIB);
    assert_int_equal(reserve_budget(8 * GIB, 8 * GIB), GIB);
    assert_int_equal(reserve_budget(1000 * GIB, 1000 * GIB), STORAGE_SPARE_MAX);
    assert_int_equal(reserve_budget(1000 * GIB, 0), 0);
}

static void the_largest_files_come_first_and_small_ones_not(void **state)
{
    uint64_t out[4] = {0};
    (void)state;
    assert_int_equal(reserve_plan((uint64_t[]){GIB + 1, 100 * MIB, MIB, MIB}, 4, 2 * GIB, out), 2);
    assert_int_equal(out[0], GIB + 1);
    assert_int_equal(out[1], 100 * MIB);
    assert_int_equal(reserve_plan((uint64_t[]){5 * GIB, GIB}, 2, GIB + 5, out), 1);
    assert_int_equal(out[0], GIB); /* as much of it as there is room for */
    assert_int_equal(reserve_plan((uint64_t[]){5 * GIB}, 1, 63 * MIB, out), 0);
    assert_int_equal(reserve_plan(NULL, 0, GIB, out), 0);
}

static void what_is_dear_is_given_back(void **state)
{
    (void)state;
    assert_false(reserve_dear(0, 0));
    assert_false(reserve_dear(GIB, 7 * GIB)); /* as it is just after the budget was set */
    assert_true(reserve_dear(GIB, 2 * GIB));
}

/* ---- storage ---- */

static int open_memory(void **state)
{
    char *error = NULL;
    return storage_open(1024 * MIB, NULL, (struct storage **)state, &error);
}

static int close_memory(void **state)
{
    storage_close(*state);
    return 0;
}

static void wait_for(struct storage *storage, uint64_t bytes)
{
    for (int i = 0; i < 60000 && storage_reserved(storage) != bytes; i++) {
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    assert_int_equal(storage_reserved(storage), bytes);
}

static uint64_t taken_by(int fd, ino_t *inode)
{
    struct stat st;
    assert_int_equal(fstat(fd, &st), 0);
    *inode = st.st_ino;
    return (uint64_t)st.st_blocks * 512;
}

static void a_pull_finds_its_pages_cleared(void **state)
{
    ino_t first;
    ino_t second;
    const uint64_t sizes[] = {2 * SIZE, SIZE};
    storage_reserve(*state, sizes, 2);
    wait_for(*state, 3 * SIZE);
    int fd = storage_file_dirty(*state, "a", SIZE); /* the smaller of the two, which is enough */
    assert_true(taken_by(fd, &first) >= SIZE);
    assert_int_equal(storage_reserved(*state), 2 * SIZE);
    int other = storage_file_dirty(*state, "b", 2 * SIZE);
    assert_true(taken_by(other, &second) >= 2 * SIZE);
    assert_int_not_equal(first, second);
    assert_int_equal(storage_reserved(*state), 0);
    uint8_t *map = NULL;
    assert_int_equal(storage_map(other, 2 * SIZE, &map), 0);
    assert_int_equal(map[0] | map[SIZE] | map[2 * SIZE - 1], 0);
    storage_unmap(map, 2 * SIZE);
    close(fd);
    close(other);
}

static void what_is_for_a_far_larger_file_waits_for_it(void **state)
{
    ino_t inode;
    storage_reserve(*state, (uint64_t[]){3 * SIZE}, 1);
    wait_for(*state, 3 * SIZE);
    int fd = storage_file_dirty(*state, "a", SIZE);
    assert_int_equal(taken_by(fd, &inode), 0);
    assert_int_equal(storage_reserved(*state), 3 * SIZE);
    close(fd);
}

static void other_sizes_end_what_was_there(void **state)
{
    storage_reserve(*state, (uint64_t[]){SIZE, 2 * SIZE}, 2);
    wait_for(*state, 3 * SIZE);
    storage_reserve(*state, (uint64_t[]){SIZE}, 1);
    assert_int_equal(storage_reserved(*state), SIZE);
    storage_trim(*state, UINT64_MAX); /* does not grow old */
    assert_int_equal(storage_reserved(*state), SIZE);
    storage_trim(*state, SIZE - 1); /* replicas need the room */
    assert_int_equal(storage_reserved(*state), 0);
    storage_reserve(*state, (uint64_t[]){GIB}, 1); /* more than spares may take */
    assert_int_equal(storage_reserved(*state), 0);
    storage_reserve(*state, (uint64_t[]){SIZE}, 1);
    storage_reserve(*state, NULL, 0);
    assert_int_equal(storage_reserved(*state), 0);
}

struct user {
    struct storage *storage;
    uint8_t mark;
    unsigned found; /* files that were not as this user left them */
};

/* Takes a file in the middle of its clearing, writes to it, and looks whether somebody else does. */
static void *use(void *arg)
{
    struct user *user = arg;
    uint8_t bytes[4096];
    memset(bytes, user->mark, sizeof bytes);
    for (int round = 0; round < 30; round++) {
        storage_reserve(user->storage, (uint64_t[]){SIZE, SIZE}, 2);
        nanosleep(&(struct timespec){.tv_nsec = 300000 * (round % 8)}, NULL);
        int fd = storage_file_dirty(user->storage, "a", SIZE);
        storage_reserve(user->storage, (uint64_t[]){SIZE, SIZE}, 2);
        for (uint64_t at = 0; at < SIZE - sizeof bytes; at += MIB) {
            if (pwrite(fd, bytes, sizeof bytes, (off_t)at) != sizeof bytes) {
                user->found++;
            }
        }
        nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
        for (uint64_t at = 0; at < SIZE - sizeof bytes; at += MIB) {
            uint8_t read[sizeof bytes];
            if (pread(fd, read, sizeof read, (off_t)at) != sizeof read ||
                memcmp(read, bytes, sizeof read) != 0) {
                user->found++;
            }
        }
        close(fd);
    }
    return NULL;
}

static void nothing_is_cleared_under_its_user(void **state)
{
    struct user users[2] = {{*state, 1, 0}, {*state, 2, 0}};
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) {
        assert_int_equal(pthread_create(&threads[i], NULL, use, &users[i]), 0);
    }
    for (int i = 0; i < 2; i++) {
        assert_int_equal(pthread_join(threads[i], NULL), 0);
        assert_int_equal(users[i].found, 0);
    }
}

static void storage_ends_while_it_is_cleared(void **state)
{
    (void)state;
    for (int i = 0; i < 5; i++) {
        void *storage = NULL;
        assert_int_equal(open_memory(&storage), 0);
        storage_reserve(storage, (uint64_t[]){2 * SIZE}, 1);
        storage_close(storage);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(it_takes_a_part_of_the_cache_and_of_memory),
        cmocka_unit_test(the_largest_files_come_first_and_small_ones_not),
        cmocka_unit_test(what_is_dear_is_given_back),
        cmocka_unit_test_setup_teardown(a_pull_finds_its_pages_cleared, open_memory, close_memory),
        cmocka_unit_test_setup_teardown(what_is_for_a_far_larger_file_waits_for_it, open_memory,
                                        close_memory),
        cmocka_unit_test_setup_teardown(other_sizes_end_what_was_there, open_memory, close_memory),
        cmocka_unit_test_setup_teardown(nothing_is_cleared_under_its_user, open_memory,
                                        close_memory),
        cmocka_unit_test(storage_ends_while_it_is_cleared),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
