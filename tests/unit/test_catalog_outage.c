/* The metadata service goes away, comes back, comes back empty or older, holds nonsense, or is full. */
#include "test_catalog_kit.h"

#include <sched.h>
#include <sqlite3.h>
#include <sys/mount.h>
#include <sys/stat.h>

static bool online(struct kit_node *n)
{
    return catalog_online(n->catalog, NULL);
}

/* The directory with the database, out of reach and back. */
static void take_away(void)
{
    char away[80];
    snprintf(away, sizeof(away), "%s.away", kit_dir);
    assert_int_equal(rename(kit_dir, away), 0);
}

static void bring_back(void)
{
    char away[80];
    snprintf(away, sizeof(away), "%s.away", kit_dir);
    assert_int_equal(rename(away, kit_dir), 0);
}

static void shell(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void shell(const char *format, ...)
{
    char command[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(command, sizeof(command), format, arguments);
    va_end(arguments);
    assert_int_equal(system(command), 0);
}

/* ---- away and back ---- */

static void while_the_service_is_away_names_are_read_and_changes_fail(void **state)
{
    struct model_id id = do_file(a, MODEL_ROOT, "f", 1);
    struct model_version version = kit_version(1);
    uint64_t since = 0;
    kit_until(1000, sees(b, "f"));
    assert_int_equal(do_announce(b, &id, CATALOG_COMPLETE), 0);
    take_away();
    int rc = do_publish(a, MODEL_ROOT, "g", &version, CATALOG_COMPLETE);
    assert_true(rc < 0 && rc != -EAGAIN);
    kit_until(3000, !online(a));
    assert_false(catalog_online(a->catalog, &since));
    assert_true(since != 0 && since <= util_now_ms());
    assert_true(sees(a, "f") && sees(b, "f"));
    assert_string_equal(names_in(b, MODEL_ROOT), "f ");
    assert_true(do_mkdir(a, MODEL_ROOT, "d") < 0);
    assert_string_not_equal(do_holders(a, &id), "b+ ");
    usleep((KIT_LEASE_MS + 500) * 1000); /* the leases end meanwhile */
    assert_false(kit_told(a, "down:") || kit_told(b, "down:"));

    bring_back();
    kit_until(4000, online(a) && online(b));
    kit_until(4000, strcmp(do_holders(a, &id), "b+ ") == 0);
    kit_until(4000, strcmp(do_holders(b, &id), "a+ ") == 0);
    assert_int_equal(do_publish(a, MODEL_ROOT, "g", &version, CATALOG_COMPLETE), 0);
    kit_until(1000, sees(b, "g"));
    assert_int_equal(kit_gone(a) + b->gone, 0);
    assert_false(sees(a, "d"));
}

static void what_changed_meanwhile_is_told_as_changes(void **state)
{
    do_file(a, MODEL_ROOT, "goes", 1);
    do_file(a, MODEL_ROOT, "stays", 1);
    kit_until(1000, sees(b, "goes") && sees(b, "stays"));
    kit_forget(b);
    take_away();
    kit_until(3000, !online(a) && !online(b));
    /* somebody changes the database where it is now */
    char saved[sizeof(kit_url)];
    memcpy(saved, kit_url, sizeof(saved));
    snprintf(kit_url, sizeof(kit_url), "local://%s.away", kit_dir);
    struct kit_node *c = kit_up("c");
    assert_int_equal(do_unlink(c, MODEL_ROOT, "goes"), 0);
    assert_int_equal(do_mkdir(c, MODEL_ROOT, "comes"), 0);
    kit_close(c);
    memcpy(kit_url, saved, sizeof(saved));
    bring_back();
    kit_until(4000, online(b) && sees(b, "comes") && !sees(b, "goes"));
    assert_true(kit_told(b, "name:comes") && kit_told(b, "name:goes"));
    assert_false(kit_told(b, "name:stays"));
    kit_until(1000, kit_gone(b) == 1);
    kit_until(4000, !sees(a, "goes"));
}

static void a_holder_that_leaves_during_an_outage_is_withdrawn_after_it(void **state)
{
    struct model_id id = do_file(a, MODEL_ROOT, "f", 1);
    kit_until(1000, sees(b, "f"));
    for (int known = 0; known < 2; known++) { /* before the outage is known, and after */
        assert_int_equal(do_announce(b, &id, CATALOG_COMPLETE), 0);
        take_away();
        if (known)
            kit_until(3000, !online(a) && !online(b));
        assert_true(do_withdraw(b, &id, false) < 0);
        assert_true(do_withdraw(a, &id, true) < 0);
        bring_back();
        kit_until(4000, online(a) && online(b));
        kit_until(4000, strcmp(do_holders(a, &id), "") == 0);
        /* what could not be asked for stands */
        kit_until(4000, strcmp(do_holders(b, &id), "a+ ") == 0);
    }
}

static void an_announcement_that_failed_is_repeated(void **state)
{
    struct model_id id = do_file(a, MODEL_ROOT, "f", 1);
    kit_until(1000, sees(b, "f"));
    for (int known = 0; known < 2; known++) {
        take_away();
        if (known)
            kit_until(3000, !online(b));
        assert_true(do_announce(b, &id, 0) < 0);
        bring_back();
        kit_until(4000, online(a) && strcmp(do_holders(a, &id), "b ") == 0);
        kit_until(4000, online(b));
        assert_int_equal(do_withdraw(b, &id, false), 0);
    }
}

/* ---- empty, or older ---- */

static void a_service_that_came_back_empty_is_filled_from_memory(void **state)
{
    struct catalog_totals before;
    struct catalog_totals after;
    assert_int_equal(do_mkdir(a, MODEL_ROOT, "d"), 0);
    uint64_t dir = kit_id;
    struct model_id id = do_file(a, dir, "f", 77);
    uint64_t file = kit_id;
    assert_int_equal(do_symlink(a, dir, "latest", "f"), 0);
    for (int i = 0; i < 100; i++) {
        char name[32];
        snprintf(name, sizeof(name), "n%d", i);
        do_file(a, dir, name, 1);
    }
    kit_until(1000, sees(b, "d/n99"));
    assert_int_equal(do_announce(b, &id, CATALOG_COMPLETE), 0);
    assert_int_equal(do_setattr(a, MODEL_ROOT, CATALOG_SET_MODE, &kit_attr), 0);
    catalog_totals(a->catalog, &before);
    kit_forget(a);
    kit_forget(b);

    shell("rm -rf %s/*", kit_dir);
    kit_until(5000, raw_count("t/n/") == 2 && raw_count("t/e/") == 104);
    kit_until(5000, raw_count("h/") == 102);
    kit_until(5000, online(a) && online(b));
    kit_until(5000, raw_count("t/v/") == 101 && raw_count("t/d/") == 1);
    struct kit_node *late = kit_open("late");
    assert_int_equal(id_at(late, "d/f"), file);
    assert_true(sees(late, "d/latest") && sees(late, "d/n99"));
    catalog_totals(late->catalog, &after);
    assert_memory_equal(&before, &after, sizeof(before));
    kit_close(late);
    /* each is online again before it hears that the other one is */
    kit_until(5000, strcmp(do_holders(a, &id), "b+ ") == 0);
    kit_until(5000, strcmp(do_holders(b, &id), "a+ ") == 0);
    assert_int_equal(kit_gone(a) + b->gone, 0); /* no bytes were dropped meanwhile */
    assert_false(kit_told(a, "name:") || kit_told(b, "name:"));
    assert_int_equal(do_rename(b, dir, "f", MODEL_ROOT, "g", 0), 0);
    kit_until(1000, sees(a, "g"));
}

static void the_second_node_restores_what_only_it_knows(void **state)
{
    do_file(a, MODEL_ROOT, "both", 1);
    kit_until(1000, sees(b, "both"));
    take_away();
    kit_until(3000, !online(a) && !online(b));
    /* an empty service appears; a third node that knows nothing is the first there */
    assert_int_equal(mkdir(kit_dir, 0755), 0);
    struct kit_node *c = kit_up("c");
    do_file(c, MODEL_ROOT, "new", 1);
    kit_until(5000, online(a) && online(b));
    kit_until(2000, sees(c, "both") && sees(a, "new") && sees(b, "new"));
    assert_int_equal(raw_count("t/v/"), 2);
    assert_int_equal(kit_gone(a) + kit_gone(b) + c->gone, 0);
    kit_close(c);
    shell("rm -rf %s.away", kit_dir);
}

/* SQLite's own copy, as the operator's backup makes it. */
static void back_up(void)
{
    char path[96];
    sqlite3 *from;
    sqlite3 *to;
    snprintf(path, sizeof(path), "%s/metadata.db", kit_dir);
    assert_int_equal(sqlite3_open(path, &from), SQLITE_OK);
    snprintf(path, sizeof(path), "%s/backup.db", kit_dir);
    assert_int_equal(sqlite3_open(path, &to), SQLITE_OK);
    sqlite3_backup *backup = sqlite3_backup_init(to, "main", from, "main");
    assert_non_null(backup);
    assert_int_equal(sqlite3_backup_step(backup, -1), SQLITE_DONE);
    sqlite3_backup_finish(backup);
    sqlite3_close(from);
    sqlite3_close(to);
}

static void what_an_older_copy_of_the_service_lacks_is_restored(void **state)
{
    do_file(a, MODEL_ROOT, "old", 1);
    kit_until(1000, sees(b, "old"));
    back_up();
    struct model_id id = do_file(a, MODEL_ROOT, "new", 1);
    kit_until(1000, sees(b, "new"));
    shell("cd %s && rm -f metadata.db* backup.db-* && mv backup.db metadata.db", kit_dir);
    kit_until(5000, ({
                  bool there = false;
                  if (online(a) && online(b) && raw_count("t/e/") == 2)
                      there = strcmp(do_holders(b, &id), "a+ ") == 0;
                  there;
              }));
    assert_true(sees(a, "new") && sees(b, "new") && sees(a, "old"));
    assert_int_equal(kit_gone(a) + b->gone, 0);
    do_file(b, MODEL_ROOT, "newer", 1);
    kit_until(1000, sees(a, "newer"));
}

/* ---- stuck, full ---- */

static sqlite3 *lock_database(void)
{
    char path[96];
    sqlite3 *db;
    snprintf(path, sizeof(path), "%s/metadata.db", kit_dir);
    assert_int_equal(sqlite3_open(path, &db), SQLITE_OK);
    sqlite3_busy_timeout(db, 2000);
    assert_int_equal(sqlite3_exec(db, "BEGIN IMMEDIATE", NULL, NULL, NULL), SQLITE_OK);
    return db;
}

static void a_service_that_hangs_fails_changes_in_time(void **state)
{
    do_file(a, MODEL_ROOT, "f", 1);
    sqlite3 *db = lock_database();
    struct catalog_sync first = {0};
    struct catalog_sync second = {0};
    catalog_mkdir(a->catalog, MODEL_ROOT, "d", &kit_attr, catalog_sync_done, &first);
    catalog_mkdir(a->catalog, MODEL_ROOT, "e", &kit_attr, catalog_sync_done, &second);
    assert_int_equal(catalog_sync_wait(&first), -ETIMEDOUT);
    assert_int_equal(catalog_sync_wait(&second), -ETIMEDOUT);
    assert_true(sees(a, "f")); /* what is known needs no service */
    assert_string_equal(names_in(a, MODEL_ROOT), "f ");
    sqlite3_exec(db, "ROLLBACK", NULL, NULL, NULL);
    sqlite3_close(db);
    kit_until(6000, online(a));
    assert_int_equal(do_mkdir(a, MODEL_ROOT, "d"), 0);
    assert_false(sees(a, "e"));
}

static void a_registration_that_was_reported_as_failed_is_undone(void **state)
{
    char key[CODEC_KEY_MAX];
    char sql[4096];
    struct model_version version = kit_version(5);
    struct model_entry entry = {.id = 1u << 30,
                                .parent = MODEL_ROOT,
                                .name = (char[]){"f"},
                                .kind = MODEL_FILE,
                                .version = version.id,
                                .size = 5};
    sqlite3 *db = lock_database();
    assert_int_equal(do_publish(a, MODEL_ROOT, "f", &version, CATALOG_COMPLETE), -ETIMEDOUT);
    /* but the service had received it, and carries it out now */
    char id[MODEL_ID_TEXT];
    char version_json[256];
    model_id_print(&version.id, id);
    snprintf(version_json, sizeof(version_json),
             "{\"v\":1,\"id\":\"%s\",\"size\":5,\"shard_size\":1048576,\"digest\":\"xxh3\","
             "\"node\":\"a\",\"boot\":\"0000000000000001\"}",
             id);
    char *entry_json = codec_entry_encode(&entry);
    assert_int_equal(sqlite3_exec(db, "UPDATE state SET revision = revision + 1", 0, 0, 0), 0);
    codec_key_entry(MODEL_ROOT, "f", key);
    snprintf(sql, sizeof(sql),
             "INSERT INTO kv SELECT '%s', '%s', revision, 0 FROM state;"
             "INSERT INTO log SELECT revision, '%s', 0 FROM state",
             key, entry_json, key);
    assert_int_equal(sqlite3_exec(db, sql, NULL, NULL, NULL), SQLITE_OK);
    codec_key_version(&version.id, key);
    snprintf(sql, sizeof(sql),
             "INSERT INTO kv SELECT '%s', '%s', revision, 0 FROM state;"
             "INSERT INTO log SELECT revision, '%s', 0 FROM state; COMMIT",
             key, version_json, key);
    assert_int_equal(sqlite3_exec(db, sql, NULL, NULL, NULL), SQLITE_OK);
    sqlite3_close(db);
    free(entry_json);
    kit_until(6000, online(a) && raw_count("t/e/") == 0 && raw_count("t/v/") == 0);
    assert_false(sees(a, "f"));
    /* tried again, it succeeds and stays */
    struct model_version again = kit_version(5);
    assert_int_equal(do_publish(a, MODEL_ROOT, "f", &again, CATALOG_COMPLETE), 0);
    usleep(500000);
    assert_true(sees(a, "f"));
}

/* Runs in a mount namespace of its own, with a small file system under the database. */
static int role_fills_a_disk(const char *argument)
{
    (void)argument;
    kit_ready();
    if (unshare(CLONE_NEWNS) < 0 || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
        return 77;
    snprintf(kit_dir, sizeof(kit_dir), "/tmp/p2pfs-test-full-%d", (int)getpid());
    snprintf(kit_url, sizeof(kit_url), "local://%s", kit_dir);
    if (mkdir(kit_dir, 0755) < 0 || mount("none", kit_dir, "tmpfs", 0, "size=2m") < 0)
        return 77;
    log_setup(LOG_ERROR, false);
    struct kit_node *node = kit_up("full");
    int rc = 0;
    int names = 0;
    for (; rc == 0 && names < 20000; names++) {
        char name[200];
        struct model_version version = kit_version(1);
        snprintf(name, sizeof(name), "%0*d", 180, names);
        rc = do_publish(node, MODEL_ROOT, name, &version, CATALOG_COMPLETE);
    }
    int status = rc == -ENOSPC ? 0 : 10;
    struct catalog_totals totals;
    catalog_totals(node->catalog, &totals);
    if (totals.files != (uint64_t)names - 1) /* the one that failed left nothing */
        status = 11;
    if (status == 0 && mount("none", kit_dir, "tmpfs", MS_REMOUNT, "size=16m") < 0)
        status = 12;
    struct model_version version = kit_version(1);
    rc = -1;
    for (int i = 0; status == 0 && rc < 0 && i < 300; i++) {
        rc = do_publish(node, MODEL_ROOT, "fits", &version, CATALOG_COMPLETE);
        usleep(100000);
    }
    if (status == 0 && (rc < 0 || !sees(node, "fits") || raw_count("t/e/") != totals.files + 1))
        status = 13;
    kit_close(node);
    umount2(kit_dir, MNT_DETACH);
    rmdir(kit_dir);
    return status;
}

static void a_full_disk_is_said_and_outlived(void **state)
{
    int status = kit_reap(kit_spawn("fills", ""));
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77) {
        print_message("skipped: mounting a small file system needs root\n");
        skip();
    }
    assert_int_equal(status, 0);
}

/* ---- nonsense ---- */

static void records_that_cannot_be_decoded_are_left_alone(void **state)
{
    static const char *const bad[] = {"nonsense", "{\"v\":99}", "{}", "{\"v\":1,\"kind\":\"dir\"}"};
    char key[CODEC_KEY_MAX];
    char malformed_key[] = "t/e/0000000000000001/%41";
    assert_int_equal(do_mkdir(a, MODEL_ROOT, "d"), 0);
    uint64_t dir = kit_id;
    struct model_id id = do_file(a, MODEL_ROOT, "f", 1);
    struct meta_store *store = raw_open();
    raw_put(store, malformed_key, "{\"v\":1}");
    raw_put(store, "t/n/x", "[]");
    raw_put(store, "t/new-kind/of/record", "from the future");
    for (size_t i = 0; i < util_count(bad); i++) {
        char name[8];
        snprintf(name, sizeof(name), "bad%zu", i);
        codec_key_entry(MODEL_ROOT, name, key);
        raw_put(store, key, bad[i]);
    }
    codec_key_entry(dir, "hidden", key);
    raw_put(store, key, "nonsense");
    assert_int_equal(do_mkdir(b, MODEL_ROOT, "after"), 0);
    kit_until(1000, sees(a, "after"));
    size_t before = raw_count("t/");
    assert_string_equal(names_in(a, MODEL_ROOT), "after d f ");
    struct kit_node *late = kit_up("late");
    assert_string_equal(names_in(late, MODEL_ROOT), "after d f ");

    struct model_version version = kit_version(1);
    assert_int_equal(do_mkdir(a, MODEL_ROOT, "bad0"), -EIO);
    assert_int_equal(do_publish(a, MODEL_ROOT, "bad1", &version, CATALOG_OVERWRITE), -EIO);
    assert_int_equal(do_unlink(a, MODEL_ROOT, "bad2"), -EIO);
    assert_int_equal(do_rename(a, MODEL_ROOT, "f", MODEL_ROOT, "bad3", CATALOG_OVERWRITE), -EIO);
    assert_int_equal(do_rmdir(a, MODEL_ROOT, "d"), -ENOTEMPTY);
    assert_int_equal(raw_count("t/"), before + 1); /* the late node */

    /* a version's record is damaged under a name that stands: its bytes are not dropped for that */
    codec_key_version(&id, key);
    raw_put(store, key, "nonsense");
    struct model_version got;
    kit_until(1000, catalog_version(a->catalog, &id, &got) == -ENOENT || ({
                        model_version_clear(&got);
                        false;
                    }));
    assert_true(sees(a, "f"));
    assert_int_equal(kit_gone(a), 0);

    /* repaired by the operator */
    struct model_entry entry = {.id = 1u << 25, .kind = MODEL_SYMLINK, .target = (char[]){"t"}};
    char *json = codec_entry_encode(&entry);
    codec_key_entry(MODEL_ROOT, "bad0", key);
    raw_put(store, key, json);
    free(json);
    kit_until(1000, sees(a, "bad0") && sees(late, "bad0"));
    assert_int_equal(do_unlink(a, MODEL_ROOT, "bad0"), 0);
    kit_close(late);
    meta_close(store);
}

static void records_that_contradict_themselves_are_not_shown(void **state)
{
    char key[CODEC_KEY_MAX];
    struct meta_store *store = raw_open();
    struct model_entry dir = {.id = 1u << 26, .kind = MODEL_DIR};
    struct model_entry root = {.id = MODEL_ROOT, .kind = MODEL_DIR};
    char *json = codec_entry_encode(&root);
    codec_key_entry(MODEL_ROOT, "root-again", key);
    raw_put(store, key, json);
    free(json);
    json = codec_entry_encode(&dir);
    codec_key_entry(dir.id, "in-itself", key);
    raw_put(store, key, json);
    /* one directory under two names, and two that contain each other */
    codec_key_entry(MODEL_ROOT, "one", key);
    raw_put(store, key, json);
    codec_key_entry(MODEL_ROOT, "two", key);
    raw_put(store, key, json);
    free(json);
    for (uint64_t id = 1u << 27; id <= 1u << 27; id++) {
        struct model_entry left = {.id = id, .kind = MODEL_DIR};
        struct model_entry right = {.id = id + 1, .kind = MODEL_DIR};
        json = codec_entry_encode(&left);
        codec_key_entry(right.id, "left", key);
        raw_put(store, key, json);
        free(json);
        json = codec_entry_encode(&right);
        codec_key_entry(left.id, "right", key);
        raw_put(store, key, json);
        free(json);
        codec_key_dir(left.id, key);
        raw_put(store, key, CODEC_PLAIN);
        codec_key_dir(right.id, key);
        raw_put(store, key, CODEC_PLAIN);
    }
    meta_close(store);
    assert_int_equal(do_mkdir(b, MODEL_ROOT, "after"), 0);
    kit_until(1000, sees(a, "after"));
    assert_string_equal(names_in(a, MODEL_ROOT), "after one two ");
    char path[64];
    assert_int_equal(catalog_path(a->catalog, 1u << 27, path, sizeof(path)), -ENAMETOOLONG);
    static char whole[1 << 20];
    assert_int_equal(catalog_path(a->catalog, 1u << 27, whole, sizeof(whole)), -ENOENT);
    assert_int_equal(do_rename(a, MODEL_ROOT, "after", 1u << 27, "x", 0), -ENAMETOOLONG);
    assert_int_equal(do_mkdir(a, MODEL_ROOT, "still"), 0);
}

/* ---- a gap in the feed ---- */

static void a_node_that_missed_changes_lists_again(void **state)
{
    char keys[64][CODEC_KEY_MAX];
    char *values[64];
    struct meta_write writes[64];
    struct meta_store *store = raw_open();
    do_file(a, MODEL_ROOT, "goes", 1);
    pid_t child = kit_spawn("watches", "watcher");
    kill(child, SIGSTOP);
    assert_int_equal(do_unlink(a, MODEL_ROOT, "goes"), 0);
    for (int round = 0; round < 560; round++) {
        for (int i = 0; i < 64; i++) {
            char name[32];
            struct model_entry entry = {.id = (1u << 28) + (unsigned)(round % 4 * 64 + i),
                                        .kind = MODEL_SYMLINK,
                                        .target = (char[]){"t"}};
            snprintf(name, sizeof(name), "n%d", round % 4 * 64 + i);
            codec_key_entry(MODEL_ROOT, name, keys[i]);
            values[i] = codec_entry_encode(&entry);
            writes[i] = (struct meta_write){META_PUT, keys[i], values[i], 0};
        }
        struct meta_txn txn = {.writes = writes, .write_count = 64};
        assert_int_equal(store->ops->txn(store, &txn), 0);
        for (int i = 0; i < 64; i++)
            free(values[i]);
    }
    meta_close(store);
    kill(child, SIGCONT);
    assert_int_equal(kit_reap(child), 0);
}

/* Ends well as soon as it sees what was made, and no longer what went. */
static int role_watches(const char *argument)
{
    struct kit_node *node = kit_open(argument);
    if (!sees(node, "goes"))
        return 1;
    kit_ready();
    for (int i = 0; i < 6000; i++) {
        if (sees(node, "n255") && !sees(node, "goes")) {
            kit_close(node);
            return 0;
        }
        usleep(10000);
    }
    return 2;
}

/* ---- closing ---- */

struct tally {
    int done;
    int refused;
};

static void tally_done(void *arg, int status, const struct model_entry *entry)
{
    struct tally *tally = arg;
    tally->done++;
    tally->refused += status == -ESHUTDOWN;
}

static void closing_answers_every_queued_change_once(void **state)
{
    int refused = 0; /* on a busy machine all may be done before the close begins */
    for (int round = 0; round < 5 || (refused == 0 && round < 50); round++) {
        struct tally tally = {0};
        struct kit_node *c = kit_up("c");
        for (int i = 0; i < 500; i++) {
            char name[32];
            snprintf(name, sizeof(name), "r%d-%d", round, i);
            assert_int_equal(
                catalog_mkdir(c->catalog, MODEL_ROOT, name, &kit_attr, tally_done, &tally), 0);
        }
        kit_close(c);
        assert_int_equal(tally.done, 500);
        refused += tally.refused;
    }
    assert_true(refused > 0);
}

static void closing_ends_while_the_service_is_away(void **state)
{
    struct kit_node *c = kit_up("c");
    take_away();
    kit_until(3000, !online(c));
    kit_close(c);
    bring_back();
    kit_until(5000, online(a) && online(b));
}

static void close_inside(void *arg, int status, const struct model_entry *entry)
{
    struct kit_node *node = arg;
    catalog_close(node->catalog);
    __atomic_store_n(&node->gone, 1, __ATOMIC_RELEASE);
}

static void closing_from_a_handler_does_not_deadlock(void **state)
{
    struct kit_node *c = kit_up("c");
    kit_until(1000, kit_told(a, "up:c"));
    assert_int_equal(catalog_mkdir(c->catalog, MODEL_ROOT, "d", &kit_attr, close_inside, c), 0);
    kit_until(3000, kit_told(a, "down:c")); /* it ended, and withdrew */
    kit_until(1000, __atomic_load_n(&c->gone, __ATOMIC_ACQUIRE) == 1);
    usleep(200000);
    free(c);
}

/* ---- opening ---- */

static void a_url_that_cannot_be_opened_is_explained(void **state)
{
    char file[96];
    snprintf(file, sizeof(file), "local://%s/file", kit_dir);
    shell("touch %s/file", kit_dir);
    const struct {
        const char *url;
        int error;
        const char *says;
    } cases[] = {
        {"local://relative", -EINVAL, "absolute"}, {"local:///no/such/parent", -ENOENT, "parent"},
        {"nosuch://x", -EINVAL, "nosuch://"},      {"/var/lib/p2pfs", -EINVAL, "scheme"},
        {file, -ENOTDIR, "not a directory"},
    };
    for (size_t i = 0; i < util_count(cases); i++) {
        struct catalog *catalog;
        char *error = NULL;
        struct catalog_config config = {.url = cases[i].url, .self = {.name = "x"}};
        assert_int_equal(catalog_open(&config, &catalog, &error), cases[i].error);
        assert_non_null(error);
        if (!strstr(error, cases[i].says))
            fail_msg("%s: %s", cases[i].url, error);
        free(error);
    }
}

static const struct kit_role roles[] = {
    {"fills", role_fills_a_disk},
    {"watches", role_watches},
    {NULL, NULL},
};

int main(int argc, char **argv)
{
    kit_play(argc, argv, roles);
    const struct CMUnitTest tests[] = {
        KIT_STORY(while_the_service_is_away_names_are_read_and_changes_fail),
        KIT_STORY(what_changed_meanwhile_is_told_as_changes),
        KIT_STORY(a_holder_that_leaves_during_an_outage_is_withdrawn_after_it),
        KIT_STORY(an_announcement_that_failed_is_repeated),
        KIT_STORY(a_service_that_came_back_empty_is_filled_from_memory),
        KIT_STORY(the_second_node_restores_what_only_it_knows),
        KIT_STORY(what_an_older_copy_of_the_service_lacks_is_restored),
        KIT_STORY(a_service_that_hangs_fails_changes_in_time),
        KIT_STORY(a_registration_that_was_reported_as_failed_is_undone),
        KIT_STORY(a_full_disk_is_said_and_outlived),
        KIT_STORY(records_that_cannot_be_decoded_are_left_alone),
        KIT_STORY(records_that_contradict_themselves_are_not_shown),
        KIT_STORY(a_node_that_missed_changes_lists_again),
        KIT_STORY(closing_answers_every_queued_change_once),
        KIT_STORY(closing_ends_while_the_service_is_away),
        KIT_STORY(closing_from_a_handler_does_not_deadlock),
        KIT_STORY(a_url_that_cannot_be_opened_is_explained),
    };
    if (getenv("ONLY"))
        cmocka_set_test_filter(getenv("ONLY"));
    return cmocka_run_group_tests(tests, NULL, NULL);
}
