/* Names: what each change does, and what it refuses. */
#include "test_catalog_kit.h"

/* ---- seeing ---- */

static void a_change_is_seen_here_at_once_and_elsewhere_before_long(void **state)
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

static void the_largest_are_told_but_for_what_lies_in_place(void **state)
{
    char path[] = "/data/m.bin";
    struct model_version version = kit_version(900);
    uint64_t sizes[3] = {0};
    version.origin_path = path;
    assert_int_equal(catalog_largest(b->catalog, "b", sizes, 3), 0);
    assert_int_equal(do_publish(a, MODEL_ROOT, "linked", &version, CATALOG_COMPLETE), 0);
    do_file(a, MODEL_ROOT, "x", 5);
    do_file(a, MODEL_ROOT, "y", 70);
    do_file(a, MODEL_ROOT, "z", 6);
    kit_until(1000, sees(b, "z"));
    assert_int_equal(catalog_largest(b->catalog, "b", sizes, 3), 3);
    assert_int_equal(sizes[0], 900);
    assert_int_equal(sizes[1], 70);
    assert_int_equal(sizes[2], 6);
    assert_int_equal(catalog_largest(b->catalog, "a", sizes, 2), 2);
    assert_int_equal(sizes[0], 70);
    assert_int_equal(sizes[1], 6);
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

    struct model_id asked[2] = {{.bytes = {9}}, version};
    char *paths[2];
    assert_int_equal(catalog_version_paths(b->catalog, asked, 2, paths), 0);
    assert_null(paths[0]);
    assert_true(strcmp(paths[1], "f") == 0 || strcmp(paths[1], "g") == 0);
    free(paths[1]);
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        KIT_STORY(a_change_is_seen_here_at_once_and_elsewhere_before_long),
        KIT_STORY(a_new_node_sees_what_is_there),
        KIT_STORY(lists_are_in_byte_order_and_paths_lead_back),
        KIT_STORY(a_node_finds_what_it_registered_in_place),
        KIT_STORY(the_largest_are_told_but_for_what_lies_in_place),
        KIT_STORY(bad_names_are_refused),
        KIT_STORY(a_path_is_at_most_4095_bytes),
        KIT_STORY(changes_are_refused_as_system_calls_are),
        KIT_STORY(impossible_versions_are_refused),
        KIT_STORY(a_file_is_replaced_only_when_asked),
        KIT_STORY(publishing_again_what_stands_is_no_error),
        KIT_STORY(a_tag_flips_atomically),
        KIT_STORY(renames_follow_the_rules_of_rename),
        KIT_STORY(names_are_exchanged_atomically),
        KIT_STORY(a_directory_of_10000_names_is_renamed_in_one_transaction),
        KIT_STORY(a_version_lives_as_long_as_a_name_leads_to_it),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
