/* What the tests of libp2pstore share: two stores in one process, on one directory of metadata; memory of known bytes, cut
 * into ranges. */
#ifndef P2PFS_TESTS_STORE_KIT_H
#define P2PFS_TESTS_STORE_KIT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "engine/p2pstore.h"

#define KIB      1024ull
#define MIB      (1024 * KIB)
#define SHARD    (64 * KIB)
#define PATIENCE 30000 /* ms: it must happen at all */

static char home[64];
static char url[96];
static struct p2pstore *A, *B;

static inline void nap(unsigned ms)
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

static inline struct p2pstore *opened(const char *node)
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

static inline int setup(void **state)
{
    snprintf(home, sizeof home, "/dev/shm/p2pfs-store-XXXXXX");
    assert_non_null(mkdtemp(home));
    snprintf(url, sizeof url, "local://%s", home);
    A = opened("A");
    B = opened("B");
    return 0;
}

static inline int teardown(void **state)
{
    char command[96];
    assert_int_equal(p2pstore_close(A), 0);
    assert_int_equal(p2pstore_close(B), 0);
    snprintf(command, sizeof command, "rm -rf '%s'", home);
    return system(command);
}

// -- Memory ---------------------------------------------------------------------------------------

static inline uint8_t *memory(uint64_t size)
{
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(at != MAP_FAILED);
    return at;
}

static inline void fill(uint8_t *bytes, uint64_t size, uint64_t seed)
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

static inline struct cut cut(uint64_t size, const uint64_t *lengths, size_t count)
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

static inline void cut_free(struct cut *c)
{
    munmap(c->bytes, c->room);
}

/* The same bytes, whatever the cuts. */
static inline void same(const struct cut *a, const struct cut *b, uint64_t size)
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

static inline int get(struct p2pstore *store, const char *name, const struct cut *c)
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

static inline int put(struct p2pstore *store, const char *name, const struct cut *c)
{
    return p2pstore_register(store, name, c->ranges, c->count, SHARD, NULL, PATIENCE);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

#endif
