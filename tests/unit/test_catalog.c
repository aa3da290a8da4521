/* Names: what each change does, what it refuses, and what two nodes that change at once get. */
#include "test_catalog_kit.h"

static struct kit_node *a;
static struct kit_node *b;

static int setup(void **state)
{
    if (kit_setup(state) < 0)
        return -1;
    a = kit_up("a");
    b = kit_up("b");
    return 0;
}

static int teardown(void **state)
{
    kit_close(a);
    kit_close(b);
    return kit_teardown(state);
}

/* ---- seeing ---- */

static void a_change_is_seen_here_at_once_and_elsewhere_within_a_second(void **state)
{
    assert_int_equal(do_mkdir(a, MODEL_ROOT, "models"), 0);
    uint64_t dir = kit_id;
    struct model_id version = do_file(a, dir, "m.bin", 5000000);
    assert_int_equal(do_symlink(a, dir, "latest", "m.bin"), 0);
    assert_true(sees(a, "models/m.bin") && sees(a, "/models/latest/"));
    kit_until(1000, sees(b, "models/latest"));

    struct model_entry entry;
    assert_int_equal(catalog_resolve(b->catalog, "models/m.bin", &entry), 0);
    assert_int_equal(entry.kind, MODEL_FILE);
    assert_int_equal(entry.size, 5000000);
    assert_int_equal(entry.parent, dir);
    assert_true(model_id_equal(&entry.version, &version));
    assert_memory_equal(&entry.attr, &kit_attr, sizeof(kit_attr));
    model_entry_clear(&entry);
    assert_int_equal(catalog_lookup(b->catalog, dir, "latest", &entry), 0);
    assert_string_equal(entry.target, "m.bin");
    model_entry_clear(&entry);

    struct model_version got;
    assert_int_equal(catalog_version(b->catalog, &version, &got), 0);
    assert_int_equal(got.size, 5000000);
    assert_string_equal(got.origin_node, "a");
    assert_true(got.sealed && got.root[2] == 3);
    model_version_clear(&got);
    assert_int_equal(catalog_version_names(b->catalog, &version), 1);

    kit_forget(a);
    kit_forget(b);
    assert_int_equal(do_rename(a, dir, "m.bin", MODEL_ROOT, "n.bin", 0), 0);
    kit_until(1000, sees(b, "n.bin"));
    assert_false(sees(b, "models/m.bin"));
    assert_int_equal(do_unlink(a, MODEL_ROOT, "n.bin"), 0);
    kit_until(1000, !sees(b, "n.bin"));
    kit_until(1000, kit_told(b, "gone"));
    assert_true(kit_told(b, "name:m.bin") && kit_told(b, "name:n.bin"));
    assert_true(kit_told(a, "gone")); /* its bytes may go here too */
    assert_false(kit_told(a, "name:"));
    assert_int_equal(catalog_version(b->catalog, &version, &got), -ENOENT);
}

static void a_new_node_sees_what_is_there(void **state)
{
    struct model_entry root;
    assert_int_equal(do_mkdir(a, MODEL_ROOT, "d"), 0);
    do_file(a, kit_id, "f", 1);
    struct kit_node *late = kit_open("late");
    assert_true(sees(late, "d/f"));
    assert_false(kit_told(late, "name:")); /* what stood already is no change */
    assert_int_equal(catalog_entry(late->catalog, MODEL_ROOT, &root), 0);
    assert_string_equal(root.name, "");
    assert_int_equal(root.kind, MODEL_DIR);
    model_entry_clear(&root);
    assert_string_equal(catalog_backend(late->catalog), "local");
    assert_true(catalog_single_machine(late->catalog));
    assert_true(catalog_online(late->catalog, NULL));
    kit_close(late);
}

static void lists_are_in_byte_order_and_paths_lead_back(void **state)
{
    char path[64];
    assert_int_equal(do_mkdir(a, MODEL_ROOT, "d"), 0);
    uint64_t dir = kit_id;
    assert_int_equal(do_mkdir(a, dir, "sub"), 0);
    uint64_t sub = kit_id;
    do_file(a, sub, "\xff\xfe", 1);
    do_file(a, sub, "b", 2);
    do_file(a, sub, "B", 4);
    do_file(a, sub, "a b", 8);
    assert_string_equal(names_in(a, sub), "B a b b \xff\xfe ");
    assert_string_equal(names_in(a, MODEL_ROOT), "d ");
    assert_string_equal(names_in(a, 12345), "ENOENT");
    assert_int_equal(catalog_path(a->catalog, id_at(a, "d/sub/\xff\xfe"), path, sizeof(path)), 0);
    assert_string_equal(path, "d/sub/\xff\xfe");
    assert_int_equal(catalog_path(a->catalog, id_at(a, "d/sub/b"), path, 7), -ENAMETOOLONG);
    assert_int_equal(catalog_path(a->catalog, id_at(a, "d/sub/b"), path, 8), 0);
    assert_string_equal(path, "d/sub/b");
    assert_int_equal(catalog_path(a->catalog, MODEL_ROOT, path, 1), 0);
    assert_string_equal(path, "");
    assert_int_equal(catalog_path(a->catalog, 777, path, sizeof(path)), -ENOENT);

    struct model_entry entry;
    assert_int_equal(catalog_resolve(a->catalog, "", &entry), 0);
    model_entry_clear(&entry);
    assert_int_equal(catalog_resolve(a->catalog, "d/sub/b/x", &entry), -ENOTDIR);
    assert_int_equal(catalog_resolve(a->catalog, "d/none/x", &entry), -ENOENT);

    struct catalog_totals totals;
    catalog_totals(a->catalog, &totals);
    assert_int_equal(totals.files, 4);
    assert_int_equal(totals.dirs, 2);
    assert_int_equal(totals.symlinks, 0);
    assert_int_equal(totals.bytes, 15);
    kit_until(1000, sees(b, "d/sub/a b"));
    catalog_totals(b->catalog, &totals);
    assert_int_equal(totals.bytes, 15);
}

static void collect_path(void *arg, const struct model_version *version)
{
    strcat(arg, version->origin_path);
    strcat(arg, " ");
}

static void a_node_finds_what_it_registered_in_place(void **state)
{
    char paths[256] = "";
    char path[] = "/data/m.bin";
    struct model_version version = kit_version(9);
    version.origin_path = path;
    assert_int_equal(do_publish(a, MODEL_ROOT, "linked", &version, CATALOG_COMPLETE), 0);
    do_file(a, MODEL_ROOT, "copied", 9);
    kit_until(1000, sees(b, "copied"));
    assert_int_equal(catalog_registered(b->catalog, "a", collect_path, paths), 0);
    assert_string_equal(paths, "/data/m.bin ");
    assert_int_equal(catalog_registered(b->catalog, "b", collect_path, paths), 0);
    assert_string_equal(paths, "/data/m.bin ");
}

/* ---- refusing ---- */

static void bad_names_are_refused(void **state)
{
    char name[300];
    struct model_version version = kit_version(1);
    memset(name, 'x', sizeof(name));
    name[256] = '\0';
    assert_int_equal(do_mkdir(a, MODEL_ROOT, name), -ENAMETOOLONG);
    assert_int_equal(do_publish(a, MODEL_ROOT, name, &version, 0), -ENAMETOOLONG);
    name[255] = '\0';
    assert_int_equal(do_mkdir(a, MODEL_ROOT, name), 0);
    static const char *const bad[] = {"", ".", "..", "a/b"};
    for (size_t i = 0; i < util_count(bad); i++) {
        assert_int_equal(do_mkdir(a, MODEL_ROOT, bad[i]), -EINVAL);
        assert_int_equal(do_symlink(a, MODEL_ROOT, bad[i], "t"), -EINVAL);
        assert_int_equal(do_publish(a, MODEL_ROOT, bad[i], &version, 0), -EINVAL);
        assert_int_equal(do_rename(a, MODEL_ROOT, name, MODEL_ROOT, bad[i], 0), -EINVAL);
        assert_int_equal(do_unlink(a, MODEL_ROOT, bad[i]), -EINVAL);
        assert_int_equal(do_rmdir(a, MODEL_ROOT, bad[i]), -EINVAL);
    }
    assert_int_equal(raw_count("t/e/"), 1);
}

static void a_path_is_at_most_4095_bytes(void **state)
{
    char name[256];
    char path[MODEL_PATH_MAX + 1];
    uint64_t dir = MODEL_ROOT;
    memset(name, 'd', 255);
    name[255] = '\0';
    for (int i = 0; i < 15; i++) {
        assert_int_equal(do_mkdir(a, dir, name), 0);
        dir = kit_id;
    }
    name[254] = '\0';
    assert_int_equal(do_mkdir(a, dir, name), 0); /* 15 * 256 + 254 = 4094 */
    uint64_t deep = kit_id;
    assert_int_equal(catalog_path(a->catalog, deep, path, sizeof(path)), 0);
    assert_int_equal(strlen(path), 4094);
    assert_int_equal(do_mkdir(a, deep, "x"), -ENAMETOOLONG);
    name[254] = 'd';
    do_file(a, dir, name, 1);
    assert_int_equal(do_rename(a, dir, name, deep, "y", 0), -ENAMETOOLONG);
}

static void changes_are_refused_as_system_calls_are(void **state)
{
    struct model_version version = kit_version(1);
    assert_int_equal(do_mkdir(a, MODEL_ROOT, "d"), 0);
    uint64_t dir = kit_id;
    do_file(a, MODEL_ROOT, "f", 1);
    uint64_t file = kit_id;
    assert_int_equal(do_symlink(a, MODEL_ROOT, "s", "t"), 0);

    assert_int_equal(do_mkdir(a, 12345, "x"), -ENOENT);
    assert_int_equal(do_mkdir(a, file, "x"), -ENOTDIR);
    assert_int_equal(do_publish(a, file, "x", &version, 0), -ENOTDIR);
    assert_int_equal(do_mkdir(a, MODEL_ROOT, "d"), -EEXIST);
    assert_int_equal(do_mkdir(a, MODEL_ROOT, "f"), -EEXIST);
    assert_int_equal(do_symlink(a, MODEL_ROOT, "s", "u"), -EEXIST);
    assert_int_equal(do_symlink(a, MODEL_ROOT, "x", ""), -ENOENT);
    assert_int_equal(do_publish(a, MODEL_ROOT, "f", &version, 0), -EEXIST);
    assert_int_equal(do_publish(a, MODEL_ROOT, "d", &version, CATALOG_OVERWRITE), -EISDIR);
    assert_int_equal(do_unlink(a, MODEL_ROOT, "d"), -EISDIR);
    assert_int_equal(do_unlink(a, MODEL_ROOT, "none"), -ENOENT);
    assert_int_equal(do_rmdir(a, MODEL_ROOT, "f"), -ENOTDIR);
    assert_int_equal(do_rmdir(a, MODEL_ROOT, "none"), -ENOENT);
    assert_int_equal(do_mkdir(a, dir, "sub"), 0);
    assert_int_equal(do_rmdir(a, MODEL_ROOT, "d"), -ENOTEMPTY);
    assert_int_equal(do_rmdir(a, dir, "sub"), 0);
    assert_int_equal(do_rmdir(a, MODEL_ROOT, "d"), 0);
    assert_int_equal(do_mkdir(a, dir, "x"), -ENOENT);
    assert_int_equal(do_link(a, MODEL_ROOT, MODEL_ROOT, "x"), -EPERM);
    assert_int_equal(do_link(a, 12345, MODEL_ROOT, "x"), -ENOENT);
    assert_int_equal(do_link(a, file, MODEL_ROOT, "s"), -EEXIST);
    assert_int_equal(do_setattr(a, 12345, CATALOG_SET_MODE, &kit_attr), -ENOENT);
    assert_int_equal(do_remove_tree(a, MODEL_ROOT, "none"), -ENOENT);
    assert_string_equal(names_in(a, MODEL_ROOT), "f s ");
}

static void impossible_versions_are_refused(void **state)
{
    struct model_version version = kit_version(1);
    version.shard_size = 4096;
    assert_int_equal(do_publish(a, MODEL_ROOT, "f", &version, 0), -EINVAL);
    version.shard_size = MODEL_AUTO_MIN + 1;
    assert_int_equal(do_publish(a, MODEL_ROOT, "f", &version, 0), -EINVAL);
    version = kit_version(1);
    version.digest = 0;
    assert_int_equal(do_publish(a, MODEL_ROOT, "f", &version, 0), -EINVAL);
    version = kit_version(MODEL_SIZE_MAX + 1);
    assert_int_equal(do_publish(a, MODEL_ROOT, "f", &version, 0), -EFBIG);
    version = kit_version(MODEL_SIZE_MAX);
    version.shard_size = MODEL_SHARD_MIN;
    assert_int_equal(do_publish(a, MODEL_ROOT, "f", &version, 0), -EFBIG);
    version = kit_version(1);
    memset(&version.id, 0, sizeof(version.id));
    assert_int_equal(do_publish(a, MODEL_ROOT, "f", &version, 0), -EINVAL);
    assert_int_equal(raw_count("t/v/"), 0);
}

/* ---- replacing and renaming ---- */

static bool leads_to(struct kit_node *node, const char *path, const struct model_id *version)
{
    struct model_entry entry = {0};
    bool same = catalog_resolve(node->catalog, path, &entry) == 0 &&
                model_id_equal(&entry.version, version);
    model_entry_clear(&entry);
    return same;
}

static void a_file_is_replaced_only_when_asked(void **state)
{
    struct model_id first = do_file(a, MODEL_ROOT, "f", 1);
    kit_until(1000, leads_to(b, "f", &first)); /* a node is told only of what it has seen */
    struct model_version second = kit_version(2);
    struct model_version gone;
    assert_int_equal(do_publish(a, MODEL_ROOT, "f", &second, 0), -EEXIST);
    assert_int_equal(do_publish(a, MODEL_ROOT, "f", &second, CATALOG_OVERWRITE), 0);
    struct model_id now = version_at(a, "f");
    assert_true(model_id_equal(&now, &second.id));
    kit_until(1000, leads_to(b, "f", &second.id));
    assert_int_equal(catalog_version(a->catalog, &first, &gone), -ENOENT);
    assert_int_equal(raw_count("t/v/"), 1);
    assert_int_equal(raw_count("h/"), 1);

    struct model_id third = do_file(a, MODEL_ROOT, "g", 3);
    assert_int_equal(do_rename(a, MODEL_ROOT, "g", MODEL_ROOT, "f", 0), -EPERM);
    assert_int_equal(
        do_rename(a, MODEL_ROOT, "g", MODEL_ROOT, "f", CATALOG_OVERWRITE | CATALOG_NOREPLACE),
        -EEXIST);
    assert_int_equal(do_rename(a, MODEL_ROOT, "g", MODEL_ROOT, "f", CATALOG_OVERWRITE), 0);
    now = version_at(a, "f");
    assert_true(model_id_equal(&now, &third));
    assert_string_equal(names_in(a, MODEL_ROOT), "f ");
    assert_int_equal(raw_count("t/v/"), 1);
    kit_until(1000, kit_gone(b) == 2);
}

static void publishing_again_what_stands_is_no_error(void **state)
{
    struct model_version version = kit_version(2);
    assert_int_equal(do_publish(a, MODEL_ROOT, "f", &version, 0), 0);
    uint64_t id = kit_id;
    assert_int_equal(do_publish(a, MODEL_ROOT, "f", &version, CATALOG_COMPLETE), 0);
    assert_int_equal(kit_id, id);
    assert_string_equal(do_holders(b, &version.id), "a+ ");
}

static void a_tag_flips_atomically(void **state)
{
    assert_int_equal(do_symlink(a, MODEL_ROOT, "latest", "step-0"), 0);
    kit_until(1000, sees(b, "latest"));
    for (int step = 1; step <= 50; step++) {
        char target[32];
        snprintf(target, sizeof(target), "step-%d", step);
        assert_int_equal(do_symlink(a, MODEL_ROOT, "latest.new", target), 0);
        assert_int_equal(do_rename(a, MODEL_ROOT, "latest.new", MODEL_ROOT, "latest", 0), 0);
        assert_true(sees(b, "latest")); /* the old or the new, never none */
    }
    struct model_entry entry;
    assert_int_equal(catalog_resolve(a->catalog, "latest", &entry), 0);
    assert_string_equal(entry.target, "step-50");
    model_entry_clear(&entry);
}

static void renames_follow_the_rules_of_rename(void **state)
{
    assert_int_equal(do_mkdir(a, MODEL_ROOT, "d"), 0);
    uint64_t d = kit_id;
    assert_int_equal(do_mkdir(a, d, "sub"), 0);
    uint64_t sub = kit_id;
    assert_int_equal(do_mkdir(a, MODEL_ROOT, "empty"), 0);
    uint64_t empty = kit_id;
    do_file(a, MODEL_ROOT, "f", 1);
    assert_int_equal(do_symlink(a, MODEL_ROOT, "s", "t"), 0);
    uint64_t link = kit_id;

    assert_int_equal(do_rename(a, MODEL_ROOT, "none", MODEL_ROOT, "x", 0), -ENOENT);
    assert_int_equal(do_rename(a, MODEL_ROOT, "d", sub, "x", 0), -EINVAL);
    assert_int_equal(do_rename(a, MODEL_ROOT, "d", d, "x", 0), -EINVAL);
    assert_int_equal(do_rename(a, MODEL_ROOT, "f", MODEL_ROOT, "d", 0), -EISDIR);
    assert_int_equal(do_rename(a, MODEL_ROOT, "d", MODEL_ROOT, "f", 0), -ENOTDIR);
    assert_int_equal(do_rename(a, MODEL_ROOT, "empty", MODEL_ROOT, "d", 0), -ENOTEMPTY);
    assert_int_equal(do_rename(a, MODEL_ROOT, "f", 12345, "x", 0), -ENOENT);
    assert_int_equal(do_rename(a, MODEL_ROOT, "f", MODEL_ROOT, "f", 0), 0);
    assert_int_equal(do_rename(a, MODEL_ROOT, "f", MODEL_ROOT, "f", CATALOG_NOREPLACE), -EEXIST);
    assert_int_equal(
        do_rename(a, MODEL_ROOT, "f", MODEL_ROOT, "f", CATALOG_NOREPLACE | CATALOG_EXCHANGE),
        -EINVAL);
    assert_int_equal(do_rename(a, MODEL_ROOT, "f", MODEL_ROOT, "s", 0), 0);
    assert_string_equal(names_in(a, MODEL_ROOT), "d empty s ");
    assert_int_not_equal(id_at(a, "s"), link);
    assert_int_equal(do_rename(a, MODEL_ROOT, "d", MODEL_ROOT, "empty", 0), 0);
    assert_int_equal(id_at(a, "empty"), d);
    assert_int_equal(id_at(a, "empty/sub"), sub);
    assert_int_equal(do_mkdir(a, empty, "x"), -ENOENT); /* the replaced one is gone */
    assert_int_equal(raw_count("t/d/"), 2);
}

static void names_are_exchanged_atomically(void **state)
{
    assert_int_equal(do_mkdir(a, MODEL_ROOT, "new"), 0);
    uint64_t new_id = kit_id;
    assert_int_equal(do_mkdir(a, MODEL_ROOT, "old"), 0);
    uint64_t old_id = kit_id;
    assert_int_equal(do_mkdir(a, old_id, "in"), 0);
    uint64_t in = kit_id;
    do_file(a, new_id, "f", 1);
    assert_int_equal(do_rename(a, MODEL_ROOT, "new", MODEL_ROOT, "old", CATALOG_EXCHANGE), 0);
    assert_int_equal(id_at(a, "old"), new_id);
    assert_int_equal(id_at(a, "new"), old_id);
    assert_true(sees(a, "old/f"));
    kit_until(1000, sees(b, "old/f"));
    assert_int_equal(id_at(b, "new/in"), in);
    assert_int_equal(do_rename(a, MODEL_ROOT, "new", old_id, "in", CATALOG_EXCHANGE), -EINVAL);
    assert_int_equal(do_rename(a, old_id, "in", MODEL_ROOT, "new", CATALOG_EXCHANGE), -EINVAL);
    assert_int_equal(do_rename(a, MODEL_ROOT, "new", MODEL_ROOT, "none", CATALOG_EXCHANGE),
                     -ENOENT);
    do_file(a, MODEL_ROOT, "g", 1);
    assert_int_equal(do_rename(a, MODEL_ROOT, "g", MODEL_ROOT, "new", CATALOG_EXCHANGE), -EPERM);
    assert_int_equal(
        do_rename(a, MODEL_ROOT, "g", old_id, "in", CATALOG_EXCHANGE | CATALOG_OVERWRITE), 0);
    assert_int_equal(id_at(a, "g"), in);
    char path[32];
    assert_int_equal(catalog_path(a->catalog, in, path, sizeof(path)), 0);
    assert_string_equal(path, "g");
}

static void count_done(void *arg, int status, const struct model_entry *entry)
{
    if (status == 0)
        __atomic_add_fetch((int *)arg, 1, __ATOMIC_RELEASE);
}

static void a_directory_of_10000_names_is_renamed_in_one_transaction(void **state)
{
    enum { MANY = 10000 };
    int done = 0;
    assert_int_equal(do_mkdir(a, MODEL_ROOT, "step.tmp"), 0);
    uint64_t dir = kit_id;
    for (int i = 0; i < MANY; i++) {
        char name[32];
        struct model_version version = kit_version(1);
        snprintf(name, sizeof(name), "shard-%05d", i);
        assert_int_equal(catalog_publish(a->catalog, dir, name, 0, &kit_attr, &version,
                                         CATALOG_COMPLETE, count_done, &done),
                         0);
        if (i % 500 == 499) /* each has a deadline from when it is queued */
            kit_until(10000, __atomic_load_n(&done, __ATOMIC_ACQUIRE) == i + 1);
    }
    kit_until(10000, __atomic_load_n(&done, __ATOMIC_ACQUIRE) == MANY);
    kit_until(5000, sees(b, "step.tmp/shard-09999"));
    uint64_t before;
    uint64_t after;
    raw_count_at("x", &before);
    assert_int_equal(do_rename(a, MODEL_ROOT, "step.tmp", MODEL_ROOT, "step", 0), 0);
    raw_count_at("x", &after);
    assert_int_equal(after - before, 1);
    /* all or nothing: never a moment with neither name, and never a part of the tree */
    kit_until(1000, ({
                  bool now = sees(b, "step/shard-00000");
                  if (!now)
                      assert_true(sees(b, "step.tmp") || sees(b, "step"));
                  now;
              }));
    assert_true(sees(b, "step/shard-09999"));
    assert_false(sees(b, "step.tmp"));
}

/* ---- links ---- */

static void a_version_lives_as_long_as_a_name_leads_to_it(void **state)
{
    struct model_id version = do_file(a, MODEL_ROOT, "f", 100);
    uint64_t file = kit_id;
    struct catalog_totals totals;
    assert_int_equal(do_link(a, file, MODEL_ROOT, "g"), 0);
    assert_int_not_equal(kit_id, file);
    kit_until(1000, sees(b, "g"));
    struct model_id linked = version_at(b, "g");
    assert_true(model_id_equal(&linked, &version));
    assert_int_equal(catalog_version_names(b->catalog, &version), 2);
    catalog_totals(b->catalog, &totals);
    assert_int_equal(totals.bytes, 100); /* once */
    assert_int_equal(do_unlink(b, MODEL_ROOT, "f"), 0);
    assert_int_equal(raw_count("t/v/"), 1);
    assert_int_equal(kit_gone(b), 0);
    assert_int_equal(do_unlink(b, MODEL_ROOT, "g"), 0);
    assert_int_equal(raw_count("t/v/"), 0);
    assert_int_equal(raw_count("h/"), 0);
    kit_until(1000, kit_gone(a) == 1);
    catalog_totals(b->catalog, &totals);
    assert_int_equal(totals.bytes + totals.files, 0);

    assert_int_equal(do_symlink(a, MODEL_ROOT, "s", "t"), 0);
    assert_int_equal(do_link(a, kit_id, MODEL_ROOT, "s2"), 0);
    assert_int_equal(do_unlink(a, MODEL_ROOT, "s"), 0);
    assert_true(sees(a, "s2"));
}

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
    kit_until(1000, kit_told(b, "sealed"));
    assert_true(kit_told(a, "sealed"));
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

#define STORY(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

static const struct kit_role roles[] = {{"writer", role_writer}, {NULL, NULL}};

int main(int argc, char **argv)
{
    kit_play(argc, argv, roles);
    const struct CMUnitTest tests[] = {
        STORY(a_change_is_seen_here_at_once_and_elsewhere_within_a_second),
        STORY(a_new_node_sees_what_is_there),
        STORY(lists_are_in_byte_order_and_paths_lead_back),
        STORY(a_node_finds_what_it_registered_in_place),
        STORY(bad_names_are_refused),
        STORY(a_path_is_at_most_4095_bytes),
        STORY(changes_are_refused_as_system_calls_are),
        STORY(impossible_versions_are_refused),
        STORY(a_file_is_replaced_only_when_asked),
        STORY(publishing_again_what_stands_is_no_error),
        STORY(a_tag_flips_atomically),
        STORY(renames_follow_the_rules_of_rename),
        STORY(names_are_exchanged_atomically),
        STORY(a_directory_of_10000_names_is_renamed_in_one_transaction),
        STORY(a_version_lives_as_long_as_a_name_leads_to_it),
        STORY(of_two_that_register_a_name_one_wins),
        STORY(two_moves_never_form_a_loop),
        STORY(a_directory_is_removed_or_gets_a_name_but_not_both),
        STORY(a_last_name_is_removed_or_linked_but_its_version_is_never_lost),
        STORY(two_that_remove_the_last_two_names_leave_nothing),
        STORY(many_writers_in_one_directory_all_succeed),
        STORY(a_tree_is_seen_by_nobody_before_it_is_attached),
        STORY(a_dropped_tree_leaves_nothing),
        STORY(a_removed_tree_disappears_at_once_and_is_cleared),
        STORY(what_a_killed_remover_left_is_cleared_by_another),
        STORY(what_a_live_node_stages_is_left_alone),
        STORY(attributes_change_one_by_one),
        STORY(a_version_is_sealed_once),
        STORY(queued_changes_are_carried_out_in_order),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
