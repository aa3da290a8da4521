/* What engine.h promises of the bytes that a node has: what is evicted and what is not, files that stay where they lie,
 * and trees of them. Over memory and over TCP. */
#include "tests/contract/engine_kit.h"

#include "engine/replica.h"

// -- The cache ------------------------------------------------------------------------------------

static void the_last_copy_is_not_evicted(void **state)
{
    up(2);
    assert_int_equal(put(A, "f", 1, MIB), 0);
    assert_int_equal(evict(B, "f", false), -ENOENT);
    assert_int_equal(evict(A, "f", false), -EBUSY);
    assert_int_equal(read_all(B, "f", 1, MIB), 0); /* and is still served */
    expect_holders(A, "f", 1);
    struct replica *replica = open_name(A, "f");
    assert_int_equal(evict(A, "f", false), -EBUSY); /* open */
    engine_replica_close(A->engine, replica);
    struct model_id version = version_of(A, "f");
    assert_int_equal(engine_pin(A->engine, &version, true), 0);
    assert_int_equal(evict(A, "f", true), -EPERM);
    assert_int_equal(engine_pin(A->engine, &version, false), 0);

    assert_int_equal(evict(A, "f", false), 0);
    assert_int_equal(stats(A).cache_used, 0);
    assert_int_equal(evict(B, "f", false), -EBUSY); /* now this is the last one */
    assert_int_equal(read_all(A, "f", 1, MIB), 0);
    assert_int_equal(evict(A, "f", true), 0);
    assert_int_equal(evict(B, "f", true), 0);
    assert_int_equal(read_range(B, "f", 1, 0, 1), -EIO);
}

static void users_add(struct replica *replica, int count)
{
    pthread_mutex_lock(&replica->lock);
    replica->users += count;
    pthread_mutex_unlock(&replica->lock);
}

/* Its bytes are in use, so that the eviction waits; then it is opened, so that the eviction is refused. */
static void a_name_removed_while_its_eviction_is_refused_leaves_no_bytes(void **state)
{
    up(2);
    assert_int_equal(put(A, "f", 1, MIB), 0);
    assert_int_equal(read_all(B, "f", 1, MIB), 0);
    expect_holders(A, "f", 1);
    struct model_id version = version_of(A, "f");
    struct replica *replica = open_name(A, "f");
    users_add(replica, 1);
    engine_replica_close(A->engine, replica);
    struct answer answer = {0};
    assert_int_equal(engine_evict(A->engine, &version, false, answered, &answer), 0);
    expect_holders(B, "f", 0); /* withdrawn */
    remove_name(B, "f");
    while (atomic_load(&A->versions_gone) == 0) {
        nap(1);
    }
    assert_int_equal(engine_replica_open(A->engine, &version, &replica), 0);
    assert_int_equal(answer_wait(&answer), -EBUSY);
    struct reading r;
    read_begin(&r, A, replica, 0, MIB);
    assert_int_equal(read_end(&r, 1), 0); /* an open version outlives its name */
    users_add(replica, -1);
    engine_replica_close(A->engine, replica);
    uint64_t end = util_now_ms() + WAIT_S * 1000;
    while (stats(A).cache_used && util_now_ms() < end) {
        nap(5);
    }
    assert_int_equal(stats(A).cache_used, 0);
}

static void a_pull_makes_room_by_evicting_what_was_used_longest_ago(void **state)
{
    static const char *const names[] = {"f0", "f1", "f2", "f3", "f4", "f5"};
    B->cache_size = 4 * MIB;
    up(2);
    for (unsigned i = 0; i < 6; i++) {
        assert_int_equal(put(A, names[i], i, MIB), 0);
    }
    assert_int_equal(put(B, "own", 9, MIB), 0);
    for (unsigned i = 0; i < 3; i++) {
        assert_int_equal(read_all(B, names[i], i, MIB), 0);
        expect_complete(B, names[i]);
    }
    expect_quiet(B);
    assert_int_equal(read_all(B, names[0], 0, MIB), 0); /* f1 is now the one used longest ago */
    assert_int_equal(read_all(B, names[3], 3, MIB), 0);
    expect_quiet(B);
    assert_int_equal(info(B, "f1").shards_present, 0);
    assert_int_equal(info(B, "f0").state, ENGINE_COMPLETE);
    assert_int_equal(read_all(B, names[4], 4, MIB), 0);
    assert_int_equal(info(B, "f2").shards_present, 0);
    assert_int_equal(info(B, "own").state, ENGINE_COMPLETE); /* the last copy */
    assert_true(stats(B).evictions >= 2);
    assert_true(stats(B).cache_used <= 4 * MIB);
    expect_quiet(B);
}

static void what_cannot_fit_is_refused(void **state)
{
    B->cache_size = 4 * MIB;
    up(2);
    assert_int_equal(put(A, "big", 1, 8 * MIB), 0);
    assert_int_equal(put(A, "f", 2, 2 * MIB), 0);
    assert_int_equal(read_range(B, "big", 1, 0, 1), -ENOSPC);
    assert_int_equal(put(B, "own", 3, 3 * MIB), 0);
    assert_int_equal(read_range(B, "f", 2, 0, 1), -ENOSPC); /* nothing here may go */
    assert_int_equal(read_all(B, "own", 3, 3 * MIB), 0);
    expect_quiet(B);
    assert_int_equal(evict(B, "own", true), 0);
    assert_int_equal(read_all(B, "f", 2, 2 * MIB), 0);
}

// -- In place -------------------------------------------------------------------------------------

static void a_file_in_place_is_read_where_it_lies(void **state)
{
    uint64_t size = 3 * MIB + 7;
    source_write("f", 1, size);
    up(2);
    put_in_place(A, "f");
    assert_int_equal(read_all(B, "f", 1, size), 0);
    assert_int_equal(read_all(A, "f", 1, size), 0);
    assert_int_equal(stats(A).cache_used, 0);
    assert_int_equal(info(A, "f").state, ENGINE_INPLACE);
    expect_complete(B, "f");
}

/* One byte in the middle, with the old times put back, is the worst: only digests tell. */
static void source_damage(const char *name, bool stealthily)
{
    char path[128];
    struct stat before;
    source_path(name, path);
    assert_int_equal(stat(path, &before), 0);
    int fd = open(path, O_RDWR);
    uint8_t byte;
    assert_int_equal(pread(fd, &byte, 1, MIB), 1);
    byte ^= 0x10;
    assert_int_equal(pwrite(fd, &byte, 1, MIB), 1);
    if (stealthily) {
        struct timespec times[2] = {before.st_atim, before.st_mtim};
        assert_int_equal(futimens(fd, times), 0);
    }
    close(fd);
}

static void sealed_wait(struct node *node, const char *name)
{
    uint64_t end = util_now_ms() + WAIT_S * 1000;
    while (!info(node, name).sealed && util_now_ms() < end) {
        nap(2);
    }
    assert_true(info(node, name).sealed);
}

static void no_peer_gets_wrong_bytes_of_a_changed_file(void **state)
{
    B->read_timeout_ms = C->read_timeout_ms = 2000;
    source_write("f", 1, 2 * MIB);
    source_write("g", 2, 2 * MIB);
    up(3);
    put_in_place(A, "f");
    put_in_place(A, "g");
    sealed_wait(C, "f");
    sealed_wait(C, "g");

    nap(20); /* file systems tell times in ticks of a few milliseconds */
    source_damage("f", false);
    assert_int_equal(read_all(B, "f", 1, 2 * MIB), -EIO);
    assert_int_equal(read_range(A, "f", 1, 0, 100), -EIO);
    assert_int_equal(info(A, "f").state, ENGINE_CHANGED);

    source_damage("g", true);
    assert_int_equal(read_all(B, "g", 2, 2 * MIB), -EIO);
    assert_true(stats(B).shards_corrupt > 0);

    char path[128];
    source_write("h", 3, MIB);
    put_in_place(A, "h");
    (void)version_of(C, "h");
    source_path("h", path);
    assert_int_equal(unlink(path), 0);
    int status = read_all(C, "h", 3, MIB);
    assert_true(status == -EIO || status == 0); /* the registrar may have had it open still */
}

/* Links to one file make it large enough that nobody registers it between two calls. */
static void tree_write(const char *name, unsigned files)
{
    char path[128], file[64], first[128], next[160];
    source_path(name, path);
    assert_int_equal(mkdir(path, 0700), 0);
    snprintf(file, sizeof file, "%s/0", name);
    source_write(file, 1, 100);
    source_path(file, first);
    for (unsigned i = 1; i < files; i++) {
        snprintf(next, sizeof next, "%s/%u", path, i);
        assert_int_equal(link(first, next), 0);
    }
}

static void an_engine_that_closes_registers_no_part_of_a_tree(void **state)
{
    struct model_entry entry;
    char path[128];
    tree_write("tree", 10000);
    source_path("tree", path);
    up(1);
    node_up(B);
    for (unsigned ms = 0; ms < 50; ms = 2 * ms + 1) {
        struct catalog_sync sync = {0};
        assert_int_equal(
            engine_register_tree(A->engine, path, MODEL_ROOT, "tree", 0, catalog_sync_done, &sync),
            0);
        nap(ms);
        node_down(A);
        int status = catalog_sync_wait(&sync);
        if (status == 0 && ms > 0) {
            break; /* a busy machine: all of it was registered before this round's close */
        }
        assert_int_equal(status, -ESHUTDOWN);
        node_up(A);
        assert_int_equal(catalog_lookup(A->catalog, MODEL_ROOT, "tree", &entry), -ENOENT);
        assert_int_equal(catalog_lookup(B->catalog, MODEL_ROOT, "tree", &entry), -ENOENT);
    }
}

static const struct CMUnitTest stories[] = {
    story(the_last_copy_is_not_evicted),
    story(a_name_removed_while_its_eviction_is_refused_leaves_no_bytes),
    story(a_pull_makes_room_by_evicting_what_was_used_longest_ago),
    story(what_cannot_fit_is_refused),
    story(a_file_in_place_is_read_where_it_lies),
    story(no_peer_gets_wrong_bytes_of_a_changed_file),
    story(an_engine_that_closes_registers_no_part_of_a_tree),
};

int main(void)
{
    filter();
    int failed = run_over("mem", stories);
    return failed + run_over("tcp", stories);
}
