/* The embedded backend: one SQLite database in a directory of this machine, shared by all its processes.
 *
 * Every transaction takes the next revision from one counter and leaves (revision, key) in a change log, which is
 * trimmed; a reader of the feed that is behind the trim lists again. A new database begins with the time of day as its
 * revision, so that it can't be mistaken for its predecessor. After a commit the writer touches the file `changed`,
 * which all others watch. Leases end by CLOCK_BOOTTIME and by the machine's boot id; whoever comes along next
 * removes their keys. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "meta/base/log.h"
#include "meta/base/util.h"
#include "meta/meta.h"
#include "meta/meta_local_db.h"

#define LOCAL_SCHEME     "local://"
#define LOCAL_LOG_KEEP   32768 /* changes that a reader may be behind */
#define LOCAL_TRIM_EVERY 256
#define LOCAL_POLL_MS    400 /* while nothing wakes us: leases of the dead, and a lost inotify event */

struct local {
    struct meta_store store;
    struct local_db db;
    int bell; /* dir/changed */
    int inotify;
    char boot[40];
    bool down; /* an outage has been logged */
};

static struct local *local_of(struct meta_store *store)
{
    return util_container(store, struct local, store);
}

static int64_t local_boottime_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* ---- answering, ringing ---- */

/* Every call ends here: the cause is said once per outage, and its end too. */
static int local_answer(struct local *s, int rc)
{
    bool answered = rc >= 0 || rc == -EAGAIN || rc == -ENOENT || rc == -ESTALE;
    if (!answered && !s->down)
        log_error("metadata " LOCAL_SCHEME "%s: %s", s->db.dir, s->db.cause);
    else if (answered && s->down)
        log_info("metadata " LOCAL_SCHEME "%s answers again", s->db.dir);
    s->down = !answered;
    s->store.epoch = s->db.epoch;
    return rc;
}

/* Opens dir/changed, or opens it again when somebody removed it. Without the bell, changes are found by polling. */
static void local_bell_check(struct local *s)
{
    util_autofree char *path = NULL;
    struct stat st;
    if (s->bell >= 0 && fstat(s->bell, &st) == 0 && st.st_nlink > 0)
        return;
    if (asprintf(&path, "%s/changed", s->db.dir) < 0) {
        path = NULL;
        return;
    }
    if (s->bell >= 0)
        close(s->bell);
    s->bell = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (s->inotify < 0)
        s->inotify = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
    if (s->inotify >= 0 && s->bell >= 0)
        inotify_add_watch(s->inotify, path, IN_ATTRIB | IN_MODIFY);
}

/* Tells the others. A failure costs them their poll interval. */
static void local_ring(struct local *s)
{
    local_bell_check(s);
    if (s->bell >= 0)
        futimens(s->bell, NULL);
}

/* ---- transactions ---- */

static int local_advance(struct local *s, uint64_t *revision)
{
    sqlite3_stmt *statement = local_use(&s->db, LOCAL_ADVANCE);
    int rc = local_step(&s->db, statement);
    if (rc <= 0)
        return rc < 0 ? rc : local_damaged(&s->db);
    *revision = (uint64_t)sqlite3_column_int64(statement, 0);
    return local_step(&s->db, statement); /* to its end: an UPDATE is done only then */
}

static int local_compare(struct local *s, const struct meta_compare *compare)
{
    bool below = compare->condition == META_EMPTY;
    sqlite3_stmt *statement = local_use(&s->db, below ? LOCAL_ANY_BELOW : LOCAL_REVISION_OF);
    if (below)
        local_bind_prefix(statement, 1, compare->key);
    else
        local_bind_text(statement, 1, compare->key);
    int found = local_step(&s->db, statement);
    if (found < 0)
        return found;
    uint64_t revision = found ? (uint64_t)sqlite3_column_int64(statement, 0) : 0;
    sqlite3_reset(statement);
    switch (compare->condition) {
    case META_ABSENT:
    case META_EMPTY:
        return found ? -EAGAIN : 0;
    case META_EXISTS:
        return found ? 0 : -EAGAIN;
    case META_REVISION:
        return found && revision == compare->revision ? 0 : -EAGAIN;
    }
    return -EINVAL;
}

static int local_lease_check(struct local *s, uint64_t lease)
{
    sqlite3_stmt *statement = local_use(&s->db, LOCAL_LEASE_ALIVE);
    local_bind_int(statement, 1, lease);
    local_bind_text(statement, 2, s->boot);
    local_bind_int(statement, 3, (uint64_t)local_boottime_ms());
    int rc = local_step(&s->db, statement);
    sqlite3_reset(statement);
    return rc < 0 ? rc : rc > 0 ? 0 : -ENOENT;
}

static int local_log_key(struct local *s, uint64_t revision, const char *key, bool gone)
{
    sqlite3_stmt *statement = local_use(&s->db, LOCAL_LOG);
    local_bind_int(statement, 1, revision);
    local_bind_text(statement, 2, key);
    local_bind_int(statement, 3, gone);
    return local_step(&s->db, statement);
}

static int local_put(struct local *s, const struct meta_write *write, uint64_t revision)
{
    sqlite3_stmt *statement = local_use(&s->db, LOCAL_PUT);
    local_bind_text(statement, 1, write->key);
    local_bind_text(statement, 2, write->value);
    local_bind_int(statement, 3, revision);
    local_bind_int(statement, 4, write->lease);
    int rc = local_step(&s->db, statement);
    return rc < 0 ? rc : local_log_key(s, revision, write->key, false);
}

static int local_delete(struct local *s, const char *key, uint64_t revision)
{
    sqlite3_stmt *statement = local_use(&s->db, LOCAL_DELETE);
    local_bind_text(statement, 1, key);
    int rc = local_step(&s->db, statement);
    if (rc < 0 || sqlite3_changes(s->db.sqlite) == 0)
        return rc;
    return local_log_key(s, revision, key, true);
}

static int local_delete_below(struct local *s, const char *prefix, uint64_t revision)
{
    sqlite3_stmt *statement = local_use(&s->db, LOCAL_LOG_BELOW);
    local_bind_prefix(statement, 1, prefix);
    local_bind_int(statement, 3, revision);
    int rc = local_step(&s->db, statement);
    if (rc < 0)
        return rc;
    statement = local_use(&s->db, LOCAL_DELETE_BELOW);
    local_bind_prefix(statement, 1, prefix);
    return local_step(&s->db, statement);
}

static int local_write(struct local *s, const struct meta_write *write, uint64_t revision)
{
    switch (write->action) {
    case META_PUT:
        return local_put(s, write, revision);
    case META_DELETE:
        return local_delete(s, write->key, revision);
    case META_DELETE_PREFIX:
        return local_delete_below(s, write->key, revision);
    }
    return -EINVAL;
}

/* Forgets the oldest changes. A revision goes as a whole, so that a reader sees all of it or lists again. */
static int local_trim(struct local *s)
{
    sqlite3_stmt *statement = local_use(&s->db, LOCAL_TRIM_AT);
    local_bind_int(statement, 1, LOCAL_LOG_KEEP);
    int rc = local_step(&s->db, statement);
    if (rc <= 0)
        return rc;
    uint64_t last = (uint64_t)sqlite3_column_int64(statement, 0);
    sqlite3_reset(statement);
    statement = local_use(&s->db, LOCAL_TRIM);
    local_bind_int(statement, 1, last);
    rc = local_step(&s->db, statement);
    if (rc < 0)
        return rc;
    statement = local_use(&s->db, LOCAL_TRIMMED);
    local_bind_int(statement, 1, last);
    return local_step(&s->db, statement);
}

static int local_txn_run(struct local *s, struct meta_txn *txn)
{
    int rc = local_do(&s->db, LOCAL_BEGIN_WRITE);
    if (rc < 0)
        return rc;
    uint64_t checked = 0; /* the lease that was looked up last */
    for (size_t i = 0; rc == 0 && i < txn->compare_count; i++)
        rc = local_compare(s, &txn->compares[i]);
    if (rc == 0)
        rc = local_advance(s, &txn->revision);
    for (size_t i = 0; rc == 0 && i < txn->write_count; i++) {
        uint64_t lease = txn->writes[i].action == META_PUT ? txn->writes[i].lease : 0;
        if (lease != checked && lease != 0) {
            rc = local_lease_check(s, lease);
            checked = lease;
        }
        if (rc == 0)
            rc = local_write(s, &txn->writes[i], txn->revision);
    }
    if (rc == 0 && txn->revision % LOCAL_TRIM_EVERY == 0)
        rc = local_trim(s);
    return local_end(&s->db, rc);
}

/* ---- leases ---- */

/* One lease that has ended, or 0. */
static int local_lease_dead(struct local *s, uint64_t *lease)
{
    sqlite3_stmt *statement = local_use(&s->db, LOCAL_LEASE_DEAD);
    local_bind_int(statement, 1, (uint64_t)local_boottime_ms());
    local_bind_text(statement, 2, s->boot);
    int rc = local_step(&s->db, statement);
    *lease = rc > 0 ? (uint64_t)sqlite3_column_int64(statement, 0) : 0;
    sqlite3_reset(statement);
    return rc < 0 ? rc : 0;
}

/* Ends a lease inside a transaction: its keys go, as deletions of one revision. */
static int local_lease_end(struct local *s, uint64_t lease)
{
    static const enum local_statement steps[] = {LOCAL_LOG_LEASE, LOCAL_LEASE_KEYS,
                                                 LOCAL_LEASE_FORGET};
    uint64_t revision = 0;
    int rc = local_advance(s, &revision);
    for (size_t i = 0; rc == 0 && i < util_count(steps); i++) {
        sqlite3_stmt *statement = local_use(&s->db, steps[i]);
        local_bind_int(statement, 1, lease);
        if (steps[i] == LOCAL_LOG_LEASE)
            local_bind_int(statement, 2, revision);
        rc = local_step(&s->db, statement);
    }
    return rc;
}

/* Removes the keys of all leases that have ended. Looks before it locks: mostly there are none. */
static int local_reap(struct local *s)
{
    uint64_t lease;
    int rc = local_lease_dead(s, &lease);
    if (rc < 0 || lease == 0)
        return rc;
    rc = local_do(&s->db, LOCAL_BEGIN_WRITE);
    if (rc < 0)
        return rc;
    rc = local_lease_dead(s, &lease); /* another process may have been faster */
    while (rc == 0 && lease != 0) {
        rc = local_lease_end(s, lease);
        if (rc == 0)
            rc = local_lease_dead(s, &lease);
    }
    rc = local_end(&s->db, rc);
    if (rc == 0)
        local_ring(s);
    return rc;
}

static int local_lease_grant(struct meta_store *store, uint32_t ttl_ms, uint64_t *lease)
{
    struct local *s = local_of(store);
    int rc = local_db_enter(&s->db);
    if (rc == 0) {
        *lease = util_random_u64() >> 1 | 1; /* SQLite's integers have a sign */
        sqlite3_stmt *statement = local_use(&s->db, LOCAL_GRANT);
        local_bind_int(statement, 1, *lease);
        local_bind_int(statement, 2, ttl_ms);
        local_bind_int(statement, 3, (uint64_t)local_boottime_ms() + ttl_ms);
        local_bind_text(statement, 4, s->boot);
        rc = local_step(&s->db, statement);
    }
    return local_answer(s, rc);
}

static int local_lease_renew(struct meta_store *store, uint64_t lease)
{
    struct local *s = local_of(store);
    int rc = local_db_enter(&s->db);
    if (rc == 0) {
        sqlite3_stmt *statement = local_use(&s->db, LOCAL_RENEW);
        local_bind_int(statement, 1, lease);
        local_bind_text(statement, 2, s->boot);
        local_bind_int(statement, 3, (uint64_t)local_boottime_ms());
        rc = local_step(&s->db, statement);
        if (rc == 0 && sqlite3_changes(s->db.sqlite) == 0)
            rc = -ENOENT;
    }
    return local_answer(s, rc);
}

static int local_lease_revoke(struct meta_store *store, uint64_t lease)
{
    struct local *s = local_of(store);
    int rc = local_db_enter(&s->db);
    if (rc == 0)
        rc = local_do(&s->db, LOCAL_BEGIN_WRITE);
    if (rc == 0) {
        rc = local_lease_check(s, lease);
        if (rc == 0)
            rc = local_lease_end(s, lease);
        rc = local_end(&s->db, rc);
    }
    if (rc == 0)
        local_ring(s);
    return local_answer(s, rc);
}

/* ---- reading ---- */

static int local_list_rows(struct local *s, const char *prefix, meta_event_fn each, void *arg)
{
    sqlite3_stmt *statement = local_use(&s->db, LOCAL_LIST);
    local_bind_prefix(statement, 1, prefix);
    int rc;
    while ((rc = local_step(&s->db, statement)) > 0) {
        struct meta_event event = {
            .key = (const char *)sqlite3_column_text(statement, 0),
            .value = (const char *)sqlite3_column_text(statement, 1),
            .revision = (uint64_t)sqlite3_column_int64(statement, 2),
        };
        rc = event.key && event.value ? each(arg, &event) : -ENOMEM;
        if (rc < 0)
            break;
    }
    sqlite3_reset(statement);
    return rc;
}

static int local_list(struct meta_store *store, const char *prefix, meta_event_fn each, void *arg,
                      uint64_t *revision)
{
    struct local *s = local_of(store);
    uint64_t trimmed;
    int rc = local_db_enter(&s->db);
    if (rc < 0)
        return local_answer(s, rc);
    local_reap(s); /* a disk that is full of the dead can still be read */
    rc = local_do(&s->db, LOCAL_BEGIN_READ);
    if (rc < 0)
        return local_answer(s, rc);
    rc = local_state(&s->db, revision, &trimmed);
    int asked = 0; /* what `each` said is the caller's business, no outage */
    if (rc == 0) {
        s->db.cause[0] = '\0';
        rc = local_list_rows(s, prefix, each, arg);
        if (rc < 0 && !s->db.cause[0]) {
            asked = rc;
            rc = 0;
        }
    }
    rc = local_answer(s, local_end(&s->db, rc));
    if (rc == 0)
        s->db.fresh = false;
    return rc < 0 ? rc : asked;
}

static int local_txn(struct meta_store *store, struct meta_txn *txn)
{
    struct local *s = local_of(store);
    int rc = local_db_enter(&s->db);
    if (rc == 0) {
        local_reap(s);
        rc = local_txn_run(s, txn);
    }
    if (rc == 0)
        local_ring(s);
    return local_answer(s, rc);
}

/* A change counts when no later one of its key exists: then the key is as this change left it. */
static bool local_change_read(sqlite3_stmt *statement, struct meta_event *event)
{
    bool gone = sqlite3_column_int(statement, 2) != 0;
    bool exists = sqlite3_column_type(statement, 4) != SQLITE_NULL;
    event->revision = (uint64_t)sqlite3_column_int64(statement, 0);
    event->key = (const char *)sqlite3_column_text(statement, 1);
    event->value = exists ? (const char *)sqlite3_column_text(statement, 3) : NULL;
    if (gone)
        return !exists;
    return exists && (uint64_t)sqlite3_column_int64(statement, 4) == event->revision;
}

/* The changes behind *revision, from one snapshot. The count of those told, or a negative errno. */
static int local_changes(struct local *s, const char *prefix, uint64_t *revision,
                         meta_event_fn each, void *arg, int *asked)
{
    uint64_t now = 0;
    uint64_t trimmed = 0;
    int told = 0;
    *asked = 0;
    int rc = local_do(&s->db, LOCAL_BEGIN_READ);
    if (rc < 0)
        return rc;
    rc = local_state(&s->db, &now, &trimmed);
    if (rc == 0 && (*revision < trimmed || *revision > now))
        rc = -ESTALE;
    if (rc == 0 && now > *revision) {
        sqlite3_stmt *statement = local_use(&s->db, LOCAL_CHANGES);
        local_bind_int(statement, 1, *revision);
        local_bind_prefix(statement, 2, prefix);
        while ((rc = local_step(&s->db, statement)) > 0) {
            struct meta_event event;
            if (!local_change_read(statement, &event))
                continue;
            told++;
            *asked = each(arg, &event);
            if (*asked < 0) {
                rc = 0;
                break;
            }
        }
        sqlite3_reset(statement);
    }
    rc = local_end(&s->db, rc);
    if (rc == 0 && *asked == 0)
        *revision = now;
    return rc < 0 ? rc : told;
}

/* Sleeps until the bell rings, the caller is woken (true) or `ms` have passed. */
static bool local_sleep(struct local *s, uint64_t ms, int wake_fd)
{
    char events[512];
    struct pollfd fds[2] = {
        {.fd = wake_fd, .events = POLLIN}, /* poll ignores -1 */
        {.fd = s->inotify, .events = POLLIN},
    };
    int ready = poll(fds, 2, (int)(ms < LOCAL_POLL_MS ? ms : LOCAL_POLL_MS));
    if (ready > 0 && (fds[0].revents & POLLIN))
        return true;
    if (ready > 0 && fds[1].revents) {
        while (read(s->inotify, events, sizeof(events)) > 0)
            continue;
    }
    local_bell_check(s);
    return false;
}

static int local_wait(struct meta_store *store, const char *prefix, uint64_t *revision,
                      uint32_t timeout_ms, int wake_fd, meta_event_fn each, void *arg)
{
    struct local *s = local_of(store);
    uint64_t end = util_now_ms() + timeout_ms;
    for (;;) {
        int asked = 0;
        int rc = local_db_enter(&s->db);
        if (rc == 0 && s->db.fresh)
            rc = -ESTALE;
        if (rc == 0) {
            local_reap(s);
            rc = local_changes(s, prefix, revision, each, arg, &asked);
        }
        local_answer(s, rc);
        if (asked < 0)
            return asked;
        uint64_t now = util_now_ms();
        if (rc != 0 || now >= end)
            return rc < 0 ? rc : 0;
        if (local_sleep(s, end - now, wake_fd))
            return 0;
    }
}

/* ---- opening ---- */

static void local_boot_read(char boot[40])
{
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    ssize_t length = fd >= 0 ? read(fd, boot, 39) : 0;
    if (fd >= 0)
        close(fd);
    if (length > 0 && boot[length - 1] == '\n')
        length--;
    boot[length > 0 ? length : 0] = '\0';
}

/* The directory must be there, or its parent. */
static int local_dir_prepare(const char *dir)
{
    struct stat st;
    if (mkdir(dir, 0777) < 0 && errno != EEXIST) {
        int rc = -errno;
        if (rc == -ENOENT)
            meta_open_error("%s: its parent directory does not exist; create that first", dir);
        else
            meta_open_error("%s cannot be created: %s", dir, strerror(-rc));
        return rc;
    }
    if (stat(dir, &st) < 0) {
        int rc = -errno;
        meta_open_error("%s: %s", dir, strerror(-rc));
        return rc;
    }
    if (!S_ISDIR(st.st_mode)) {
        meta_open_error("%s is not a directory; give local: one of its own", dir);
        return -ENOTDIR;
    }
    if (access(dir, R_OK | W_OK | X_OK) < 0) {
        int rc = -errno;
        meta_open_error("%s: %s; the metadata directory must be readable and writable", dir,
                        strerror(-rc));
        return rc;
    }
    return 0;
}

static void local_close(struct meta_store *store)
{
    if (!store)
        return;
    struct local *s = local_of(store);
    local_db_free(&s->db);
    if (s->bell >= 0)
        close(s->bell);
    if (s->inotify >= 0)
        close(s->inotify);
    free(s);
}

static int local_open(const struct meta_config *config, struct meta_store **store)
{
    const char *dir = config->url + strlen(LOCAL_SCHEME);
    if (dir[0] != '/') {
        meta_open_error("%s: local: needs an absolute path, like local:///var/lib/p2pfs",
                        config->url);
        return -EINVAL;
    }
    int rc = local_dir_prepare(dir);
    if (rc < 0)
        return rc;
    struct local *s = calloc(1, sizeof(*s));
    if (!s)
        return -ENOMEM;
    s->store.ops = &meta_local_ops;
    s->bell = -1;
    s->inotify = -1;
    local_boot_read(s->boot);
    rc = local_db_open(&s->db, dir);
    if (rc < 0 && s->db.cause[0])
        meta_open_error("%s", s->db.cause);
    if (rc < 0) {
        local_close(&s->store);
        return rc;
    }
    local_bell_check(s);
    *store = &s->store;
    return 0;
}

static const char *const local_schemes[] = {"local", NULL};

const struct meta_ops meta_local_ops = {
    .name = "local",
    .schemes = local_schemes,
    .single_machine = true,
    .open = local_open,
    .close = local_close,
    .list = local_list,
    .txn = local_txn,
    .lease_grant = local_lease_grant,
    .lease_renew = local_lease_renew,
    .lease_revoke = local_lease_revoke,
    .wait = local_wait,
};
