/* What nodes that change names at once get; trees, which nobody sees in part; and the order of changes. */
#include "test_catalog_kit.h"

/* ---- two nodes at once ---- */

/* Both calls are queued at the same moment; their results. */
struct both {
    struct catalog_sync a;
    struct catalog_sync b;
};

static void both_wait(struct both *both, int *first, int *second)
{
    *first = catalog_sync_wait(&both->a);
    *second = catalog_sync_wait(&both->b);
}

static void of_two_that_register_a_name_one_wins(void **state)
{
    for (int round = 0; round < 40; round++) {
        char name[32];
        int first;
        int second;
        struct both both = {0};
        struct model_version one = kit_version(1);
        struct model_version two = kit_version(2);
        snprintf(name, sizeof(name), "f%d", round);
        assert_int_equal(catalog_publish(a->catalog, MODEL_ROOT, name, 0, &kit_attr, &one, 0,
                                         catalog_sync_done, &both.a),
                         0);
        assert_int_equal(catalog_publish(b->catalog, MODEL_ROOT, name, 0, &kit_attr, &two, 0,
                                         catalog_sync_done, &both.b),
                         0);
        both_wait(&both, &first, &second);
        assert_true((first == 0 && second == -EEXIST) || (first == -EEXIST && second == 0));
        struct model_id winner = first == 0 ? one.id : two.id;
        struct model_id seen = version_at(a, name);
        assert_true(model_id_equal(&seen, &winner)); /* the loser too knows by now who won */
        seen = version_at(b, name);
        assert_true(model_id_equal(&seen, &winner));
    }
    assert_int_equal(raw_count("t/v/"), 40);
    assert_int_equal(raw_count("h/"), 40);
}

static void two_moves_never_form_a_loop(void **state)
{
    for (int round = 0; round < 40; round++) {
        char left[32];
        char right[32];
        int first;
        int second;
        struct both both = {0};
        snprintf(left, sizeof(left), "l%d", round);
        snprintf(right, sizeof(right), "r%d", round);
        assert_int_equal(do_mkdir(a, MODEL_ROOT, left), 0);
        uint64_t left_id = kit_id;
        assert_int_equal(do_mkdir(a, MODEL_ROOT, right), 0);
        uint64_t right_id = kit_id;
        kit_until(1000, sees(b, right));
        catalog_rename(a->catalog, MODEL_ROOT, left, right_id, "in", 0, catalog_sync_done, &both.a);
        catalog_rename(b->catalog, MODEL_ROOT, right, left_id, "in", 0, catalog_sync_done, &both.b);
        both_wait(&both, &first, &second);
        assert_true((first == 0 && second == -EINVAL) || (first == -EINVAL && second == 0));
        char path[64];
        assert_int_equal(catalog_path(a->catalog, left_id, path, sizeof(path)), 0);
        assert_int_equal(catalog_path(a->catalog, right_id, path, sizeof(path)), 0);
    }
}

static void a_directory_is_removed_or_gets_a_name_but_not_both(void **state)
{
    int removed = 0;
    for (int round = 0; round < 60; round++) {
        int first;
        int second;
        struct both both = {0};
        assert_int_equal(do_mkdir(a, MODEL_ROOT, "d"), 0);
        uint64_t dir = kit_id;
        kit_until(1000, sees(b, "d"));
        if (round % 2) {
            catalog_rmdir(a->catalog, MODEL_ROOT, "d", catalog_sync_done, &both.a);
            catalog_mkdir(b->catalog, dir, "x", &kit_attr, catalog_sync_done, &both.b);
        } else {
            catalog_mkdir(b->catalog, dir, "x", &kit_attr, catalog_sync_done, &both.b);
            catalog_rmdir(a->catalog, MODEL_ROOT, "d", catalog_sync_done, &both.a);
        }
        both_wait(&both, &first, &second);
        if (first == 0) {
            removed++;
            assert_int_equal(second, -ENOENT);
            assert_int_equal(raw_count("t/"), 3); /* two nodes, the instance, nothing else */
            continue;
        }
        assert_int_equal(first, -ENOTEMPTY);
        assert_int_equal(second, 0);
        assert_int_equal(do_rmdir(b, dir, "x"), 0);
        assert_int_equal(do_rmdir(b, MODEL_ROOT, "d"), 0);
        kit_until(1000, !sees(a, "d"));
    }
    print_message("removed first in %d of 60 rounds\n", removed);
}

static void a_last_name_is_removed_or_linked_but_its_version_is_never_lost(void **state)
{
    for (int round = 0; round < 40; round++) {
        int first;
        int second;
        struct both both = {0};
        do_file(a, MODEL_ROOT, "f", 1);
        uint64_t file = kit_id;
        kit_until(1000, sees(b, "f"));
        catalog_unlink(a->catalog, MODEL_ROOT, "f", catalog_sync_done, &both.a);
        catalog_link(b->catalog, file, MODEL_ROOT, "g", catalog_sync_done, &both.b);
        both_wait(&both, &first, &second);
        assert_int_equal(first, 0);
        if (second == 0) {
            assert_int_equal(raw_count("t/v/"), 1);
            assert_int_equal(do_unlink(b, MODEL_ROOT, "g"), 0);
        } else {
            assert_int_equal(second, -ENOENT);
        }
        assert_int_equal(raw_count("t/v/"), 0);
        kit_until(1000, !sees(a, "g") && !sees(b, "f"));
    }
}

static void two_that_remove_the_last_two_names_leave_nothing(void **state)
{
    for (int round = 0; round < 40; round++) {
        int first;
        int second;
        struct both both = {0};
        do_file(a, MODEL_ROOT, "f", 1);
        assert_int_equal(do_link(a, kit_id, MODEL_ROOT, "g"), 0);
        kit_until(1000, sees(b, "g"));
        catalog_unlink(a->catalog, MODEL_ROOT, "f", catalog_sync_done, &both.a);
        catalog_unlink(b->catalog, MODEL_ROOT, "g", catalog_sync_done, &both.b);
        both_wait(&both, &first, &second);
        assert_int_equal(first, 0);
        assert_int_equal(second, 0);
        assert_int_equal(raw_count("t/v/"), 0);
        assert_int_equal(raw_count("h/"), 0);
        kit_until(1000, !sees(a, "g") && !sees(b, "f"));
    }
}

enum { CHILDREN = 3, NAMES = 60 };

static int role_writer(const char *argument)
{
    struct kit_node *node = kit_up(argument);
    kit_ready();
    for (int i = 0; i < NAMES; i++) {
        char name[64];
        struct model_version version = kit_version(1);
        snprintf(name, sizeof(name), "%s-%d", argument, i);
        if (do_publish(node, MODEL_ROOT, name, &version, CATALOG_COMPLETE) != 0)
            return 1;
    }
    kit_close(node);
    return 0;
}

static void many_writers_in_one_directory_all_succeed(void **state)
{
    pid_t children[CHILDREN];
    for (int i = 0; i < CHILDREN; i++) {
        char name[32];
        snprintf(name, sizeof(name), "writer%d", i);
        children[i] = kit_spawn("writer", name);
    }
    for (int i = 0; i < CHILDREN; i++)
        assert_int_equal(kit_reap(children[i]), 0);
    kit_until(1000, ({
                  struct catalog_totals totals;
                  catalog_totals(b->catalog, &totals);
                  totals.files == CHILDREN *NAMES;
              }));
    assert_int_equal(raw_count("t/e/"), CHILDREN * NAMES);
}

/* ---- trees ---- */

static void a_tree_is_seen_by_nobody_before_it_is_attached(void **state)
{
    uint64_t dir;
    assert_int_equal(do_tree_begin(a, &dir), 0);
    assert_int_equal(do_mkdir(a, dir, "sub"), 0);
    uint64_t sub = kit_id;
    do_file(a, sub, "f", 1);
    assert_int_equal(do_symlink(a, dir, "s", "sub"), 0);
    assert_string_equal(names_in(a, MODEL_ROOT), "");
    do_file(a, MODEL_ROOT, "taken", 1);
    assert_int_equal(do_tree_attach(a, dir, MODEL_ROOT, "taken"), -EEXIST);
    assert_int_equal(do_tree_attach(a, dir, sub, "inside-itself"), -EINVAL);
    assert_int_equal(do_tree_attach(a, dir, MODEL_ROOT, "tree"), 0);
    assert_int_equal(kit_id, dir);
    kit_until(1000, sees(b, "tree/sub/f") && sees(b, "tree/s"));
    assert_int_equal(do_tree_attach(a, dir, MODEL_ROOT, "again"), -EINVAL);
    assert_int_equal(do_tree_attach(a, 12345, MODEL_ROOT, "again"), -ENOENT);
    assert_int_equal(do_tree_drop(a, dir), -EINVAL);
    assert_int_equal(do_tree_drop(a, 12345), -ENOENT);
}

static void a_dropped_tree_leaves_nothing(void **state)
{
    uint64_t dir;
    size_t before = raw_count("");
    assert_int_equal(do_tree_begin(a, &dir), 0);
    assert_int_equal(do_mkdir(a, dir, "sub"), 0);
    do_file(a, kit_id, "f", 1);
    do_file(a, dir, "g", 1);
    assert_int_equal(do_tree_drop(a, dir), 0);
    kit_until(2000, raw_count("") == before);
}

static void a_removed_tree_disappears_at_once_and_is_cleared(void **state)
{
    size_t before = raw_count("");
    struct catalog_totals totals;
    assert_int_equal(do_mkdir(a, MODEL_ROOT, "d"), 0);
    uint64_t dir = kit_id;
    uint64_t shared = 0;
    for (int i = 0; i < 30; i++) {
        char name[32];
        snprintf(name, sizeof(name), "s%d", i);
        assert_int_equal(do_mkdir(a, dir, name), 0);
        uint64_t sub = kit_id;
        assert_int_equal(do_mkdir(a, sub, "deeper"), 0);
        uint64_t deeper = kit_id;
        for (int j = 0; j < 5; j++) {
            snprintf(name, sizeof(name), "f%d", j);
            do_file(a, deeper, name, 1);
            shared = kit_id;
            assert_int_equal(do_link(a, shared, sub, name), 0); /* two names of one version */
        }
        assert_int_equal(do_symlink(a, sub, "link", ".."), 0);
    }
    assert_int_equal(do_link(a, shared, MODEL_ROOT, "kept"), 0);
    kit_until(1000, sees(b, "kept"));
    assert_int_equal(do_remove_tree(b, MODEL_ROOT, "d"), 0);
    assert_false(sees(b, "d"));
    kit_until(1000, !sees(a, "d"));
    kit_until(10000, raw_count("t/e/") == 1);
    kit_until(1000, raw_count("t/d/") == 0);
    assert_int_equal(raw_count("t/v/"), 1);
    kit_until(1000, ({
                  catalog_totals(a->catalog, &totals);
                  totals.files == 1 && totals.dirs == 0 && totals.symlinks == 0;
              }));
    assert_int_equal(do_remove_tree(b, MODEL_ROOT, "kept"), 0); /* one name is a small tree */
    assert_int_equal(raw_count("") - before, 0);
}

static void what_a_killed_remover_left_is_cleared_by_another(void **state)
{
    size_t before = raw_count("t/");
    assert_int_equal(do_mkdir(a, MODEL_ROOT, "d"), 0);
    uint64_t dir = kit_id;
    assert_int_equal(do_mkdir(a, dir, "sub"), 0);
    do_file(a, kit_id, "f", 1);
    do_file(a, dir, "g", 1);
    /* its name goes, and nobody is left who remembers what was below */
    char key[CODEC_KEY_MAX];
    codec_key_entry(MODEL_ROOT, "d", key);
    struct meta_store *store = raw_open();
    struct meta_write write = {META_DELETE, key, NULL, 0};
    struct meta_txn txn = {.writes = &write, .write_count = 1};
    assert_int_equal(store->ops->txn(store, &txn), 0);
    meta_close(store);
    struct kit_node *sweeper = kit_open_ttl("sweeper", 2); /* patience is at most its ttl */
    kit_until(12000, raw_count("t/") == before);
    kit_close(sweeper);
}

static void what_a_live_node_stages_is_left_alone(void **state)
{
    uint64_t dir;
    assert_int_equal(do_tree_begin(a, &dir), 0);
    do_file(a, dir, "f", 1);
    struct kit_node *sweeper = kit_up_ttl("sweeper", 2);
    usleep(5000000);
    assert_int_equal(do_tree_attach(a, dir, MODEL_ROOT, "tree"), 0);
    assert_true(sees(a, "tree/f"));
    kit_close(sweeper);
}

/* ---- attributes, seals, order ---- */

static void attributes_change_one_by_one(void **state)
{
    struct model_attr attr = {0100777, 5, 6, 7};
    struct model_entry entry;
    do_file(a, MODEL_ROOT, "f", 3);
    uint64_t file = kit_id;
    assert_int_equal(do_setattr(a, file, CATALOG_SET_MODE, &attr), 0);
    assert_int_equal(kit_id, file);
    assert_int_equal(do_setattr(a, file, CATALOG_SET_MTIME, &attr), 0);
    kit_until(1000, catalog_entry(b->catalog, file, &entry) == 0 && ({
                        bool there = entry.attr.mtime_ns == 7;
                        model_entry_clear(&entry);
                        there;
                    }));
    assert_int_equal(catalog_entry(b->catalog, file, &entry), 0);
    assert_int_equal(entry.attr.mode, 0777);
    assert_int_equal(entry.attr.uid, kit_attr.uid);
    assert_int_equal(entry.attr.gid, kit_attr.gid);
    assert_int_equal(entry.size, 3);
    model_entry_clear(&entry);

    assert_int_equal(do_setattr(b, MODEL_ROOT, CATALOG_SET_UID | CATALOG_SET_GID, &attr), 0);
    kit_until(1000, catalog_entry(a->catalog, MODEL_ROOT, &entry) == 0 && ({
                        bool there = entry.attr.uid == 5 && entry.attr.gid == 6;
                        model_entry_clear(&entry);
                        there;
                    }));
    assert_int_equal(do_setattr(a, MODEL_ROOT, CATALOG_SET_MODE, &attr), 0);
    struct kit_node *late = kit_open("late");
    assert_int_equal(catalog_entry(late->catalog, MODEL_ROOT, &entry), 0);
    assert_int_equal(entry.attr.uid, 5);
    assert_int_equal(entry.attr.mode, 0777);
    model_entry_clear(&entry);
    kit_close(late);
}

static void a_version_is_sealed_once(void **state)
{
    uint8_t root[MODEL_DIGEST_MAX] = {7, 8, 9};
    struct model_version version = kit_version(3);
    struct model_version got;
    version.sealed = false;
    assert_int_equal(do_publish(a, MODEL_ROOT, "f", &version, CATALOG_COMPLETE), 0);
    kit_until(1000, sees(b, "f"));
    assert_int_equal(catalog_version(b->catalog, &version.id, &got), 0);
    assert_false(got.sealed);
    model_version_clear(&got);
    assert_int_equal(do_seal(a, &version.id, root), 0);
    kit_until(1000, kit_told(a, "sealed") && kit_told(b, "sealed"));
    assert_int_equal(catalog_version(b->catalog, &version.id, &got), 0);
    assert_true(got.sealed && got.root[2] == 9);
    model_version_clear(&got);
    assert_int_equal(do_seal(a, &version.id, root), 0);
    root[0] = 1;
    assert_int_equal(do_seal(a, &version.id, root), -EEXIST);
    struct model_id none = model_id_new();
    assert_int_equal(do_seal(a, &none, root), -ENOENT);
}

struct order {
    int next;
    bool broken;
};
struct turn {
    struct order *order;
    int number;
};

static void in_order(void *arg, int status, const struct model_entry *entry)
{
    struct turn *turn = arg;
    if (turn->number != turn->order->next || status != 0)
        turn->order->broken = true;
    __atomic_store_n(&turn->order->next, turn->number + 1, __ATOMIC_RELEASE);
}

static void queued_changes_are_carried_out_in_order(void **state)
{
    enum { COUNT = 200 };
    struct order order = {0};
    struct turn turns[COUNT];
    for (int i = 0; i < COUNT; i++) {
        turns[i] = (struct turn){&order, i};
        int rc = i % 2 ? catalog_rmdir(a->catalog, MODEL_ROOT, "d", in_order, &turns[i])
                       : catalog_mkdir(a->catalog, MODEL_ROOT, "d", &kit_attr, in_order, &turns[i]);
        assert_int_equal(rc, 0);
    }
    kit_until(10000, __atomic_load_n(&order.next, __ATOMIC_ACQUIRE) == COUNT);
    assert_false(order.broken);
    assert_string_equal(names_in(a, MODEL_ROOT), "");
}

static const struct kit_role roles[] = {{"writer", role_writer}, {NULL, NULL}};

int main(int argc, char **argv)
{
    kit_play(argc, argv, roles);
    const struct CMUnitTest tests[] = {
        KIT_STORY(of_two_that_register_a_name_one_wins),
        KIT_STORY(two_moves_never_form_a_loop),
        KIT_STORY(a_directory_is_removed_or_gets_a_name_but_not_both),
        KIT_STORY(a_last_name_is_removed_or_linked_but_its_version_is_never_lost),
        KIT_STORY(two_that_remove_the_last_two_names_leave_nothing),
        KIT_STORY(many_writers_in_one_directory_all_succeed),
        KIT_STORY(a_tree_is_seen_by_nobody_before_it_is_attached),
        KIT_STORY(a_dropped_tree_leaves_nothing),
        KIT_STORY(a_removed_tree_disappears_at_once_and_is_cleared),
        KIT_STORY(what_a_killed_remover_left_is_cleared_by_another),
        KIT_STORY(what_a_live_node_stages_is_left_alone),
        KIT_STORY(attributes_change_one_by_one),
        KIT_STORY(a_version_is_sealed_once),
        KIT_STORY(queued_changes_are_carried_out_in_order),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
