/* What only the embedded backend has: its directory, its file, and what becomes of them. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>
#include <sqlite3.h>

#include "meta/base/log.h"
#include "meta/base/util.h"
#include "meta/meta.h"

static char dir[64];
static char url[96];

static int setup(void **state)
{
    snprintf(dir, sizeof(dir), "/tmp/p2pfs-test-local-XXXXXX");
    if (!mkdtemp(dir))
        return -1;
    snprintf(url, sizeof(url), "local://%s", dir);
    return 0;
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

static int teardown(void **state)
{
    shell("rm -rf %s %s.*", dir, dir);
    return 0;
}

static struct meta_store *open_store(void)
{
    struct meta_store *store;
    const char *error;
    struct meta_config config = {.url = url};
    if (meta_open(&config, &store, &error) < 0)
        fail_msg("open %s: %s", url, error);
    return store;
}

/* Opening fails with `status`, and the sentence for the user says so. */
static void expect_refused(const char *which, int status, const char *says)
{
    struct meta_store *store;
    const char *error;
    struct meta_config config = {.url = which};
    int rc = meta_open(&config, &store, &error);
    if (rc != status || !error || !strstr(error, says))
        fail_msg("%s: %d, %s", which, rc, error ? error : "no reason");
    assert_null(store);
}

static int put_leased(struct meta_store *store, const char *key, uint64_t lease)
{
    struct meta_write write = {META_PUT, key, "1", lease};
    struct meta_txn txn = {.writes = &write, .write_count = 1};
    return store->ops->txn(store, &txn);
}

static int put(struct meta_store *store, const char *key)
{
    return put_leased(store, key, 0);
}

static int count_each(void *arg, const struct meta_event *event)
{
    ++*(int *)arg;
    return 0;
}

static int count(struct meta_store *store, uint64_t *revision)
{
    int keys = 0;
    uint64_t now;
    assert_int_equal(store->ops->list(store, "", count_each, &keys, revision ? revision : &now), 0);
    return keys;
}

static void change_database(const char *sql)
{
    char path[96];
    sqlite3 *db;
    snprintf(path, sizeof(path), "%s/metadata.db", dir);
    assert_int_equal(sqlite3_open(path, &db), SQLITE_OK);
    assert_int_equal(sqlite3_exec(db, sql, NULL, NULL, NULL), SQLITE_OK);
    sqlite3_close(db);
}

/* ---- opening ---- */

static void the_directory_is_made_when_its_parent_is_there(void **state)
{
    struct stat st;
    char deeper[128];
    snprintf(url, sizeof(url), "local://%s/new", dir);
    meta_close(open_store());
    snprintf(deeper, sizeof(deeper), "%s/new/metadata.db", dir);
    assert_int_equal(stat(deeper, &st), 0);
    snprintf(deeper, sizeof(deeper), "local://%s/none/deeper", dir);
    expect_refused(deeper, -ENOENT, "parent");
}

static void what_is_no_usable_directory_is_refused(void **state)
{
    char file[128];
    char path[128];
    shell("touch %s/file", dir);
    snprintf(file, sizeof(file), "local://%s/file", dir);
    expect_refused(file, -ENOTDIR, "not a directory");
    snprintf(path, sizeof(path), "local://%s/file/below", dir);
    expect_refused(path, -ENOTDIR, "below");
    expect_refused("local://", -EINVAL, "absolute");
    expect_refused("local://var/lib", -EINVAL, "local:///var/lib/p2pfs");
    expect_refused("local:/var/lib", -EINVAL, "scheme");
    expect_refused("", -EINVAL, "scheme");
    expect_refused("ftp://user:secret@host/", -EINVAL, "ftp://");
    struct meta_store *store;
    const char *error;
    struct meta_config config = {.url = "ftp://user:secret@host/"};
    assert_int_equal(meta_open(&config, &store, &error), -EINVAL);
    assert_null(strstr(error, "secret"));
    char *large = malloc(META_URL_MAX + 10);
    memset(large, 'x', META_URL_MAX + 9);
    memcpy(large, "local:///", 9);
    large[META_URL_MAX + 9] = '\0';
    expect_refused(large, -EINVAL, "longer");
    free(large);
}

static void a_directory_of_others_is_refused(void **state)
{
    if (geteuid() != 0) {
        print_message("skipped: becoming another user needs root\n");
        skip();
    }
    shell("chmod 0700 %s", dir);
    pid_t child = fork();
    if (child == 0) {
        struct meta_store *store;
        const char *error;
        struct meta_config config = {.url = url};
        if (setuid(65534) < 0)
            _exit(1);
        int rc = meta_open(&config, &store, &error);
        _exit(rc == -EACCES && strstr(error, "readable and writable") ? 0 : 2);
    }
    int status;
    waitpid(child, &status, 0);
    assert_int_equal(status, 0);
}

static void a_foreign_database_is_refused_and_left_alone(void **state)
{
    change_database("CREATE TABLE theirs(x); INSERT INTO theirs VALUES(7)");
    shell("cp %s/metadata.db %s.before", dir, dir);
    expect_refused(url, -EBADMSG, "another program");
    shell("cmp %s/metadata.db %s.before", dir, dir);
}

static void a_damaged_file_is_refused(void **state)
{
    shell("head -c 8192 /dev/urandom > %s/metadata.db", dir);
    expect_refused(url, -EBADMSG, "move it away");
    shell("rm %s/metadata.db; mkdir %s/metadata.db", dir, dir);
    expect_refused(url, -ECONNREFUSED, "metadata.db");
    shell("rmdir %s/metadata.db; : > %s/metadata.db", dir, dir);
    meta_close(open_store()); /* an empty one is what a crash while creating it leaves */
}

static void another_format_is_refused(void **state)
{
    meta_close(open_store());
    change_database("PRAGMA user_version = 2");
    expect_refused(url, -EPROTONOSUPPORT, "format 2");
}

static void damage_inside_is_said_by_the_call_that_meets_it(void **state)
{
    struct meta_store *store = open_store();
    uint64_t revision;
    int keys = 0;
    for (int i = 0; i < 2000; i++) {
        char key[32];
        snprintf(key, sizeof(key), "k/%d", i);
        assert_int_equal(put(store, key), 0);
    }
    meta_close(store);
    change_database("PRAGMA wal_checkpoint(TRUNCATE)");
    shell("dd if=/dev/urandom of=%s/metadata.db bs=4096 seek=8 count=20 conv=notrunc 2>/dev/null",
          dir);
    store = open_store();
    assert_int_equal(store->ops->list(store, "", count_each, &keys, &revision), -EBADMSG);
    meta_close(store);
}

static void many_that_open_at_once_make_one_database(void **state)
{
    enum { CHILDREN = 8 };
    pid_t children[CHILDREN];
    int gate[2];
    assert_int_equal(pipe(gate), 0);
    for (int i = 0; i < CHILDREN; i++) {
        children[i] = fork();
        if (children[i] != 0)
            continue;
        char byte;
        char key[32];
        close(gate[1]);
        if (read(gate[0], &byte, 1) != 0)
            _exit(1);
        struct meta_store *store = open_store();
        snprintf(key, sizeof(key), "k/%d", i);
        _exit(put(store, key) == 0 ? 0 : 2);
    }
    close(gate[1]); /* now */
    for (int i = 0; i < CHILDREN; i++) {
        int status;
        waitpid(children[i], &status, 0);
        assert_int_equal(status, 0);
    }
    close(gate[0]);
    struct meta_store *store = open_store();
    assert_int_equal(count(store, NULL), CHILDREN);
    meta_close(store);
}

/* ---- while it is open ---- */

static void a_removed_database_is_made_anew_and_said_to_be_another(void **state)
{
    struct meta_store *a = open_store();
    struct meta_store *b = open_store();
    uint64_t revision_a;
    uint64_t revision_b;
    int told = 0;
    assert_int_equal(put(a, "k/old"), 0);
    assert_int_equal(count(a, &revision_a), 1);
    assert_int_equal(count(b, &revision_b), 1);
    uint64_t epoch = a->epoch;
    uint64_t before = revision_a;
    shell("rm %s/metadata.db", dir); /* its write-ahead log is left behind */
    assert_int_equal(a->ops->wait(a, "k/", &revision_a, 0, -1, count_each, &told), -ESTALE);
    assert_true(a->epoch > epoch);
    assert_int_equal(put(a, "k/new"), 0);
    assert_int_equal(b->ops->wait(b, "k/", &revision_b, 0, -1, count_each, &told), -ESTALE);
    assert_int_equal(told, 0);
    assert_int_equal(count(a, &revision_a), 1);
    assert_int_equal(count(b, &revision_b), 1);
    assert_true(revision_b > before); /* nobody takes it for the old one */
    assert_int_equal(put(b, "k/newer"), 0);
    assert_int_equal(a->ops->wait(a, "k/", &revision_a, 2000, -1, count_each, &told), 0);
    assert_int_equal(told, 1);
    meta_close(a);
    meta_close(b);
    struct meta_store *c = open_store();
    assert_int_equal(count(c, NULL), 2); /* the old ones' closing damaged nothing */
    meta_close(c);
}

static void a_directory_that_moves_away_is_an_outage_and_comes_back(void **state)
{
    struct meta_store *store = open_store();
    uint64_t revision;
    int told = 0;
    assert_int_equal(put(store, "k/1"), 0);
    assert_int_equal(count(store, &revision), 1);
    uint64_t epoch = store->epoch;
    shell("mv %s %s.away", dir, dir);
    log_setup(LOG_ERROR, false);
    assert_int_equal(put(store, "k/2"), -ECONNREFUSED);
    assert_int_equal(store->ops->wait(store, "k/", &revision, 100, -1, count_each, &told),
                     -ECONNREFUSED);
    shell("mv %s.away %s", dir, dir);
    assert_int_equal(put(store, "k/2"), 0);
    assert_int_equal(store->ops->wait(store, "k/", &revision, 100, -1, count_each, &told), 0);
    assert_int_equal(told, 1); /* the feed went on where it was */
    assert_int_equal(store->epoch, epoch);
    meta_close(store);
}

static void without_its_bell_changes_are_still_found(void **state)
{
    struct meta_store *a = open_store();
    struct meta_store *b = open_store();
    uint64_t revision;
    int told = 0;
    count(b, &revision);
    for (int i = 0; i < 3; i++) {
        char key[16];
        shell("rm %s/changed", dir);
        snprintf(key, sizeof(key), "k/%d", i);
        assert_int_equal(put(a, key), 0);
        assert_int_equal(b->ops->wait(b, "k/", &revision, 30000, -1, count_each, &told), 0);
        assert_int_equal(told, i + 1);
    }
    meta_close(a);
    meta_close(b);
}

static void leases_of_a_machine_that_restarted_are_over(void **state)
{
    struct meta_store *store = open_store();
    uint64_t lease;
    assert_int_equal(store->ops->lease_grant(store, 3600000, &lease), 0);
    assert_int_equal(put_leased(store, "t/n/a", lease), 0);
    assert_int_equal(count(store, NULL), 1);
    change_database("UPDATE lease SET boot = 'another boot'");
    assert_int_equal(store->ops->lease_renew(store, lease), -ENOENT);
    assert_int_equal(count(store, NULL), 0);
    meta_close(store);
}

static void a_transaction_that_waits_for_another_gives_up_in_time(void **state)
{
    char path[96];
    sqlite3 *db;
    struct meta_store *store = open_store();
    snprintf(path, sizeof(path), "%s/metadata.db", dir);
    assert_int_equal(put(store, "k/1"), 0);
    assert_int_equal(sqlite3_open(path, &db), SQLITE_OK);
    assert_int_equal(sqlite3_exec(db, "BEGIN IMMEDIATE", NULL, NULL, NULL), SQLITE_OK);
    uint64_t start = util_now_ms();
    assert_int_equal(put(store, "k/2"), -ETIMEDOUT);
    assert_true(util_now_ms() - start >= 1000);
    assert_int_equal(count(store, NULL), 1); /* reading goes on meanwhile */
    sqlite3_exec(db, "ROLLBACK", NULL, NULL, NULL);
    sqlite3_close(db);
    assert_int_equal(put(store, "k/2"), 0);
    meta_close(store);
}

#define STORY(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        STORY(the_directory_is_made_when_its_parent_is_there),
        STORY(what_is_no_usable_directory_is_refused),
        STORY(a_directory_of_others_is_refused),
        STORY(a_foreign_database_is_refused_and_left_alone),
        STORY(a_damaged_file_is_refused),
        STORY(another_format_is_refused),
        STORY(damage_inside_is_said_by_the_call_that_meets_it),
        STORY(many_that_open_at_once_make_one_database),
        STORY(a_removed_database_is_made_anew_and_said_to_be_another),
        STORY(a_directory_that_moves_away_is_an_outage_and_comes_back),
        STORY(without_its_bell_changes_are_still_found),
        STORY(leases_of_a_machine_that_restarted_are_over),
        STORY(a_transaction_that_waits_for_another_gives_up_in_time),
    };
    log_setup(LOG_ERROR, false);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
