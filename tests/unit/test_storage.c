/* Storage: unnamed files, their mappings, and the spare ones that are used again. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/storage.h"

#define MIB (1ull << 20)

static ino_t inode_of(int fd)
{
    struct stat st;
    assert_int_equal(fstat(fd, &st), 0);
    return st.st_ino;
}

static uint64_t size_of(int fd)
{
    struct stat st;
    assert_int_equal(fstat(fd, &st), 0);
    return (uint64_t)st.st_size;
}

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

static void what_is_written_is_mapped(void **state)
{
    int fd = storage_file(*state, "a");
    uint8_t *map = NULL;
    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, 5 * MIB + 1), 0);
    assert_int_equal(storage_map(fd, 5 * MIB + 1, &map), 0);
    assert_int_equal((uintptr_t)map % (2 * MIB), 0);
    assert_int_equal(storage_populate(map + 3 * MIB, 2 * MIB + 1), 0);
    assert_int_equal(pwrite(fd, "x", 1, 5 * MIB), 1);
    assert_int_equal(map[5 * MIB], 'x');
    assert_int_equal(map[0], 0);
    storage_unmap(map, 5 * MIB + 1);
    close(fd);
}

static void a_spare_file_is_used_again_at_its_new_size(void **state)
{
    int fd = storage_file_dirty(*state, "a", 80 * MIB);
    ino_t first = inode_of(fd);
    storage_give_back(*state, fd, 80 * MIB);
    fd = storage_file_dirty(*state, "b", 100 * MIB);
    assert_int_equal(inode_of(fd), first);
    assert_int_equal(size_of(fd), 100 * MIB);
    storage_give_back(*state, fd, 100 * MIB);
    fd = storage_file_dirty(*state, "c", 64 * MIB);
    assert_int_equal(inode_of(fd), first);
    assert_int_equal(size_of(fd), 64 * MIB);
    close(fd);
}

static void a_new_file_for_a_writer_is_never_a_spare(void **state)
{
    int fd = storage_file_dirty(*state, "a", 64 * MIB);
    assert_int_equal(pwrite(fd, "secret", 6, 0), 6);
    storage_give_back(*state, fd, 64 * MIB);
    char bytes[6] = {0};
    fd = storage_file(*state, "b");
    assert_int_equal(ftruncate(fd, 64 * MIB), 0);
    assert_int_equal(pread(fd, bytes, 6, 0), 6);
    assert_memory_equal(bytes, "\0\0\0\0\0\0", 6);
    close(fd);
}

static void spares_end_when_there_are_too_many_or_room_is_needed(void **state)
{
    int fds[6];
    ino_t kept[6];
    for (int i = 0; i < 6; i++) {
        fds[i] = storage_file_dirty(*state, "a", 64 * MIB);
        kept[i] = inode_of(fds[i]);
    }
    for (int i = 0; i < 6; i++) {
        storage_give_back(*state, fds[i],
                          64 * MIB); /* a quarter of the limit is 256 MiB: four fit */
    }
    storage_trim(*state, 64 * MIB);
    int fd = storage_file_dirty(*state, "b", 64 * MIB);
    assert_int_equal(inode_of(fd), kept[0]);
    int fresh = storage_file_dirty(*state, "c", 64 * MIB);
    assert_int_not_equal(inode_of(fresh), kept[0]);
    close(fd);
    close(fresh);
}

static void a_directory_takes_files_too(void **state)
{
    (void)state;
    char dir[] = "/tmp/p2pfs-storage-XXXXXX";
    assert_non_null(mkdtemp(dir));
    struct storage *storage = NULL;
    char *error = NULL;
    int status = storage_open(64 * MIB, dir, &storage, &error);
    if (status == -EOPNOTSUPP) {
        print_message("SKIP /tmp has no unnamed files\n");
        free(error);
        rmdir(dir);
        skip();
    }
    assert_int_equal(status, 0);
    assert_string_equal(storage_kind(storage), "cache_dir");
    int fd = storage_file(storage, "a");
    assert_true(fd >= 0);
    close(fd);
    storage_close(storage);
    rmdir(dir);
    assert_int_equal(storage_open(64 * MIB, dir, &storage, &error), -ENOENT);
    assert_non_null(strstr(error, dir));
    free(error);
}

/* Of files that are written unseen, on a tmpfs that can be full. */
static void what_is_full_is_told_of(void **state)
{
    struct storage *small = NULL;
    char *error = NULL;
    struct stat st;
    (void)state;
    assert_int_equal(storage_open(64 * MIB, NULL, &small, &error), 0);
    int fd = storage_file_direct(small);
    if (fd == -EOPNOTSUPP) {
        storage_close(small);
        skip(); /* no tmpfs of its own here */
    }
    assert_true(fd >= 0);
    assert_int_equal(pwrite(fd, "x", 1, 5 * MIB), 1);
    storage_direct_fit(fd, 5 * MIB + 1);
    assert_int_equal(fstat(fd, &st), 0);
    assert_int_equal(st.st_size, 5 * MIB + 1);
    assert_true((uint64_t)st.st_blocks * 512 < 2 * MIB);

    unsigned before = storage_direct_fills(small);
    assert_int_equal(storage_direct_fills(small), before);
    uint8_t piece[4096] = {1};
    off_t at = 0;
    while (pwrite(fd, piece, sizeof piece, at) == (ssize_t)sizeof piece && at < 1024 * (off_t)MIB) {
        at += (off_t)sizeof piece;
    }
    assert_int_equal(errno, ENOSPC);
    assert_in_range(at, 64 * MIB, 100 * MIB);
    unsigned full = storage_direct_fills(small);
    assert_true(full > before);
    close(fd);
    assert_int_equal(storage_direct_fills(small), full);
    storage_close(small);
}

/* As /proc/self/numa_maps has it; "": nothing is known of that address. */
static void policy_at(const uint8_t *at, char policy[32])
{
    char line[512];
    unsigned long begin;
    FILE *table = fopen("/proc/self/numa_maps", "re");
    *policy = '\0';
    while (table && fgets(line, sizeof line, table)) {
        char found[32];
        if (sscanf(line, "%lx %31s", &begin, found) == 2 && begin == (unsigned long)(uintptr_t)at) {
            snprintf(policy, 32, "%s", found);
        }
    }
    if (table) {
        fclose(table);
    }
}

static void files_lie_on_the_node_that_is_preferred(void **state)
{
    int status = storage_prefer(*state, 0);
    if (status == -EOPNOTSUPP || status == -EINVAL) {
        skip(); /* no tmpfs, or a kernel without NUMA */
    }
    assert_int_equal(status, 0);
    assert_int_equal(storage_node(*state), 0);
    char policy[32];
    uint8_t *map = NULL;
    int fd = storage_file_dirty(*state, "a", MIB);
    assert_int_equal(storage_map(fd, MIB, &map), 0);
    assert_int_equal(storage_populate(map, MIB), 0);
    policy_at(map, policy);
    assert_true(!*policy || strcmp(policy, "prefer:0") == 0);
    storage_unmap(map, MIB);
    close(fd);
    assert_true(storage_prefer(*state, 1000) < 0);
    assert_int_equal(storage_node(*state), -1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(what_is_written_is_mapped, open_memory, close_memory),
        cmocka_unit_test_setup_teardown(a_spare_file_is_used_again_at_its_new_size, open_memory,
                                        close_memory),
        cmocka_unit_test_setup_teardown(a_new_file_for_a_writer_is_never_a_spare, open_memory,
                                        close_memory),
        cmocka_unit_test_setup_teardown(spares_end_when_there_are_too_many_or_room_is_needed,
                                        open_memory, close_memory),
        cmocka_unit_test_setup_teardown(files_lie_on_the_node_that_is_preferred, open_memory,
                                        close_memory),
        cmocka_unit_test(what_is_full_is_told_of),
        cmocka_unit_test(a_directory_takes_files_too),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
