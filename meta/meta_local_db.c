#include "meta/meta_local_db.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "meta/base/log.h"
#include "meta/base/util.h"
#include "meta/meta.h"

#define LOCAL_APPLICATION 0x70327066 /* "p2pf" */
#define LOCAL_FORMAT      1
#define LOCAL_BUSY_MS     (META_DEADLINE_MS - 500)

static const char *const local_sql[LOCAL_STATEMENTS];

/* ---- errors ---- */

static const struct {
    int code;
    int error;
    const char *remedy;
} local_errors[] = {
    {SQLITE_BUSY, -ETIMEDOUT, "another process keeps it locked; is one of its mounts stopped?"},
    {SQLITE_LOCKED, -ETIMEDOUT, "another process keeps it locked; is one of its mounts stopped?"},
    {SQLITE_FULL, -ENOSPC, "free space on its file system"},
    {SQLITE_READONLY, -EROFS, "make the directory and the file writable"},
    {SQLITE_PERM, -EACCES, "make the directory and the file readable and writable"},
    {SQLITE_AUTH, -EACCES, "make the directory and the file readable and writable"},
    {SQLITE_CANTOPEN, -ECONNREFUSED, "is its directory still there and accessible?"},
    {SQLITE_CORRUPT, -EBADMSG, "it is damaged: move it away and the mounts write a new one"},
    {SQLITE_NOTADB, -EBADMSG, "it is not a metadata database: move it away"},
    {SQLITE_NOMEM, -ENOMEM, "out of memory"},
    {SQLITE_IOERR, -EIO, "its disk or file system fails"},
};

/* The errno of a failed SQLite call; leaves the sentence for the log or the user in db->cause. */
static int local_fail(struct local_db *db, int code)
{
    int error = -EBADMSG;
    const char *remedy = "unexpected";
    int primary = code & 0xff;
    int os = db->sqlite ? sqlite3_system_errno(db->sqlite) : 0;
    if (primary == SQLITE_IOERR && (os == ENOSPC || os == EDQUOT))
        primary = SQLITE_FULL;
    if (code == SQLITE_READONLY_DBMOVED)
        primary = SQLITE_CANTOPEN;
    for (size_t i = 0; i < util_count(local_errors); i++) {
        if (local_errors[i].code == primary) {
            error = local_errors[i].error;
            remedy = local_errors[i].remedy;
        }
    }
    snprintf(db->cause, sizeof(db->cause), "%s: %s%s%s; %s", db->path,
             db->sqlite ? sqlite3_errmsg(db->sqlite) : sqlite3_errstr(code), os ? ": " : "",
             os ? strerror(os) : "", remedy);
    return error;
}

int local_damaged(struct local_db *db)
{
    snprintf(db->cause, sizeof(db->cause),
             "%s: it is damaged: move it away and the mounts write a new one", db->path);
    return -EBADMSG;
}

/* ---- statements ---- */

sqlite3_stmt *local_use(struct local_db *db, enum local_statement which)
{
    sqlite3_stmt *statement = db->statements[which];
    sqlite3_reset(statement);
    return statement;
}

void local_bind_int(sqlite3_stmt *statement, int at, uint64_t value)
{
    sqlite3_bind_int64(statement, at, (sqlite3_int64)value);
}

void local_bind_text(sqlite3_stmt *statement, int at, const char *text)
{
    sqlite3_bind_text(statement, at, text, -1, SQLITE_STATIC);
}

void local_bind_prefix(sqlite3_stmt *statement, int at, const char *prefix)
{
    char above[1100];
    int length = snprintf(above, sizeof(above), "%s\x7f", prefix);
    local_bind_text(statement, at, prefix);
    sqlite3_bind_text(statement, at + 1, above, length, SQLITE_TRANSIENT);
}

int local_step(struct local_db *db, sqlite3_stmt *statement)
{
    int code = sqlite3_step(statement);
    if (code == SQLITE_ROW)
        return 1;
    int rc = code == SQLITE_DONE ? 0 : local_fail(db, code);
    sqlite3_reset(statement);
    return rc;
}

int local_do(struct local_db *db, enum local_statement which)
{
    int rc = local_step(db, local_use(db, which));
    if (rc > 0)
        sqlite3_reset(db->statements[which]);
    return rc < 0 ? rc : 0;
}

int local_end(struct local_db *db, int rc)
{
    if (rc == 0)
        rc = local_do(db, LOCAL_COMMIT);
    if (rc < 0 && !sqlite3_get_autocommit(db->sqlite)) {
        sqlite3_stmt *rollback = local_use(db, LOCAL_ROLLBACK);
        sqlite3_step(rollback); /* the cause of rc is what counts */
        sqlite3_reset(rollback);
    }
    return rc;
}

int local_state(struct local_db *db, uint64_t *revision, uint64_t *trimmed)
{
    sqlite3_stmt *statement = local_use(db, LOCAL_STATE);
    int rc = local_step(db, statement);
    if (rc <= 0)
        return rc < 0 ? rc : local_damaged(db);
    *revision = (uint64_t)sqlite3_column_int64(statement, 0);
    *trimmed = (uint64_t)sqlite3_column_int64(statement, 1);
    sqlite3_reset(statement);
    return 0;
}

/* ---- the database ---- */

static int local_busy(void *arg, int attempt)
{
    const struct local_db *db = arg;
    if (util_now_ms() >= db->deadline_ms)
        return 0;
    struct timespec pause = {.tv_nsec = attempt < 5 ? 200000L << attempt : 5000000};
    nanosleep(&pause, NULL);
    return 1;
}

static void local_db_close(struct local_db *db)
{
    for (size_t i = 0; i < LOCAL_STATEMENTS; i++) {
        sqlite3_finalize(db->statements[i]);
        db->statements[i] = NULL;
    }
    sqlite3_close(db->sqlite);
    db->sqlite = NULL;
}

void local_db_free(struct local_db *db)
{
    local_db_close(db);
    free(db->dir);
    free(db->path);
}

static int local_pragma(struct local_db *db, const char *sql, int *number)
{
    sqlite3_stmt *statement;
    int code = sqlite3_prepare_v2(db->sqlite, sql, -1, &statement, NULL);
    if (code == SQLITE_OK) {
        code = sqlite3_step(statement);
        *number = code == SQLITE_ROW ? sqlite3_column_int(statement, 0) : 0;
        sqlite3_finalize(statement);
    }
    return code == SQLITE_ROW || code == SQLITE_DONE ? 0 : local_fail(db, code);
}

static int local_exec(struct local_db *db, const char *sql)
{
    int code = sqlite3_exec(db->sqlite, sql, NULL, NULL, NULL);
    return code == SQLITE_OK ? 0 : local_fail(db, code);
}

/* Refuses what is not ours before anything is written to it; *empty: there is nothing in it yet. */
static int local_db_check(struct local_db *db, bool *empty)
{
    int application = 0;
    int format = 0;
    int tables = 0;
    int rc = local_pragma(db, "PRAGMA application_id", &application);
    if (rc == 0)
        rc = local_pragma(db, "PRAGMA user_version", &format);
    if (rc == 0)
        rc = local_pragma(db, "SELECT count(*) FROM sqlite_master", &tables);
    if (rc < 0)
        return rc;
    *empty = tables == 0 && application == 0;
    if (!*empty && application != LOCAL_APPLICATION) {
        snprintf(db->cause, sizeof(db->cause),
                 "%s is a database of another program; use another directory, or move it away",
                 db->path);
        return -EBADMSG;
    }
    if (!*empty && format != LOCAL_FORMAT) {
        snprintf(db->cause, sizeof(db->cause),
                 "%s has format %d, this p2pfs knows format %d; run the p2pfs that wrote it",
                 db->path, format, LOCAL_FORMAT);
        return -EPROTONOSUPPORT;
    }
    return 0;
}

static int local_db_create(struct local_db *db)
{
    struct timespec now;
    char sql[1600];
    clock_gettime(CLOCK_REALTIME, &now);
    unsigned long long start =
        (unsigned long long)now.tv_sec * 1000 + (unsigned long long)now.tv_nsec / 1000000;
    snprintf(sql, sizeof(sql),
             "BEGIN IMMEDIATE;"
             "PRAGMA application_id = %d; PRAGMA user_version = %d;"
             "CREATE TABLE state(id INTEGER PRIMARY KEY CHECK (id = 0),"
             " revision INTEGER NOT NULL, trimmed INTEGER NOT NULL);"
             "INSERT INTO state VALUES(0, %llu, %llu);"
             "CREATE TABLE kv(key TEXT PRIMARY KEY, value TEXT NOT NULL,"
             " revision INTEGER NOT NULL, lease INTEGER NOT NULL) WITHOUT ROWID;"
             "CREATE INDEX kv_lease ON kv(lease) WHERE lease <> 0;"
             "CREATE TABLE log(revision INTEGER NOT NULL, key TEXT NOT NULL,"
             " gone INTEGER NOT NULL, PRIMARY KEY(revision, key)) WITHOUT ROWID;"
             "CREATE TABLE lease(id INTEGER PRIMARY KEY, ttl INTEGER NOT NULL,"
             " deadline INTEGER NOT NULL, boot TEXT NOT NULL);"
             "COMMIT",
             LOCAL_APPLICATION, LOCAL_FORMAT, start, start);
    return local_exec(db, sql);
}

/* A database without its write-ahead log and index is a new one; left-overs of the old would damage it. */
static int local_db_clear_leftovers(struct local_db *db)
{
    struct stat st;
    if (stat(db->path, &st) == 0 || errno != ENOENT)
        return 0;
    static const char *const suffixes[] = {"-wal", "-shm", "-journal"};
    for (size_t i = 0; i < util_count(suffixes); i++) {
        util_autofree char *path = NULL;
        if (asprintf(&path, "%s%s", db->path, suffixes[i]) < 0) {
            path = NULL;
            return -ENOMEM;
        }
        if (unlink(path) < 0 && errno != ENOENT) {
            int rc = -errno;
            snprintf(db->cause, sizeof(db->cause), "%s cannot be removed: %s", path, strerror(-rc));
            return rc;
        }
    }
    return 0;
}

static int local_db_setup(struct local_db *db)
{
    bool empty;
    int wal = 1;
    int persist = 1;
    sqlite3_busy_handler(db->sqlite, local_busy, db);
    /* Closing must not remove the log by its name: by then the name may belong to a new database. */
    sqlite3_file_control(db->sqlite, "main", SQLITE_FCNTL_PERSIST_WAL, &persist);
    int rc = local_db_check(db, &empty);
    if (rc == 0)
        rc = local_pragma(db, "SELECT journal_mode <> 'wal' FROM pragma_journal_mode", &wal);
    if (rc == 0 && wal != 0)
        rc = local_exec(db, "PRAGMA journal_mode = wal");
    if (rc == 0 && empty)
        rc = local_db_create(db);
    if (rc == 0)
        rc = local_exec(db, "PRAGMA synchronous = normal; PRAGMA temp_store = memory;"
                            "PRAGMA cache_size = -2048; PRAGMA wal_autocheckpoint = 2000;"
                            "PRAGMA journal_size_limit = 16777216");
    for (size_t i = 0; rc == 0 && i < LOCAL_STATEMENTS; i++) {
        int code = sqlite3_prepare_v3(db->sqlite, local_sql[i], -1, SQLITE_PREPARE_PERSISTENT,
                                      &db->statements[i], NULL);
        if (code != SQLITE_OK)
            rc = local_fail(db, code);
    }
    return rc;
}

static int local_dir_lock(struct local_db *db, int *fd)
{
    *fd = open(db->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (*fd < 0) {
        int rc = -errno;
        snprintf(db->cause, sizeof(db->cause), "%s: %s", db->dir, strerror(-rc));
        return rc == -ENOENT || rc == -ENOTDIR ? -ECONNREFUSED : rc;
    }
    while (flock(*fd, LOCK_EX | LOCK_NB) < 0) {
        if (util_now_ms() >= db->deadline_ms) {
            snprintf(db->cause, sizeof(db->cause), "%s: another process keeps it locked", db->dir);
            close(*fd);
            return -ETIMEDOUT;
        }
        local_busy(db, 5);
    }
    return 0;
}

/* One process at a time. */
static int local_db_reopen(struct local_db *db)
{
    int lock;
    struct stat st = {0};
    int rc = local_dir_lock(db, &lock);
    if (rc < 0)
        return rc;
    rc = local_db_clear_leftovers(db);
    if (rc < 0)
        goto unlock_dir;
    int code = sqlite3_open_v2(db->path, &db->sqlite,
                               SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_NOMUTEX |
                                   SQLITE_OPEN_EXRESCODE,
                               NULL);
    rc = code == SQLITE_OK ? local_db_setup(db) : local_fail(db, code);
    if (rc == 0 && stat(db->path, &st) < 0) {
        rc = -ECONNREFUSED;
        snprintf(db->cause, sizeof(db->cause), "%s: %s", db->path, strerror(errno));
    }
    if (rc < 0) {
        local_db_close(db);
        goto unlock_dir;
    }
    db->dev = st.st_dev;
    db->ino = st.st_ino;

unlock_dir:
    close(lock);
    return rc;
}

int local_db_open(struct local_db *db, const char *dir)
{
    db->deadline_ms = util_now_ms() + LOCAL_BUSY_MS;
    db->dir = strdup(dir);
    if (!db->dir || asprintf(&db->path, "%s/metadata.db", dir) < 0) {
        db->path = NULL;
        return -ENOMEM;
    }
    return local_db_reopen(db);
}

int local_db_enter(struct local_db *db)
{
    struct stat st;
    db->deadline_ms = util_now_ms() + LOCAL_BUSY_MS;
    bool there = stat(db->path, &st) == 0;
    if (db->sqlite && there && st.st_dev == db->dev && st.st_ino == db->ino)
        return 0;
    if (!there && stat(db->dir, &st) < 0) {
        /* the whole directory: moved, or its file system not mounted; ours may well come back */
        snprintf(db->cause, sizeof(db->cause), "%s: %s; is its file system mounted?", db->dir,
                 strerror(errno));
        return -ECONNREFUSED;
    }
    if (db->sqlite) {
        log_warn("metadata %s: %s; opening it again", db->path,
                 there ? "another file has this name now" : "the file is gone");
        local_db_close(db);
        db->epoch++;
    }
    db->fresh = true;
    return local_db_reopen(db);
}

static const char *const local_sql[LOCAL_STATEMENTS] = {
    [LOCAL_BEGIN_READ] = "BEGIN",
    [LOCAL_BEGIN_WRITE] = "BEGIN IMMEDIATE",
    [LOCAL_COMMIT] = "COMMIT",
    [LOCAL_ROLLBACK] = "ROLLBACK",
    [LOCAL_STATE] = "SELECT revision, trimmed FROM state",
    [LOCAL_ADVANCE] = "UPDATE state SET revision = revision + 1 RETURNING revision",
    [LOCAL_LIST] = "SELECT key, value, revision FROM kv WHERE key >= ?1 AND key < ?2 ORDER BY key",
    [LOCAL_REVISION_OF] = "SELECT revision FROM kv WHERE key = ?1",
    [LOCAL_ANY_BELOW] = "SELECT 1 FROM kv WHERE key >= ?1 AND key < ?2 LIMIT 1",
    /* NOLINTNEXTLINE(bugprone-suspicious-missing-comma): one statement on three lines */
    [LOCAL_PUT] = "INSERT INTO kv(key, value, revision, lease) VALUES(?1, ?2, ?3, ?4)"
                  " ON CONFLICT(key) DO UPDATE SET"
                  " value = excluded.value, revision = excluded.revision, lease = excluded.lease",
    [LOCAL_DELETE] = "DELETE FROM kv WHERE key = ?1",
    [LOCAL_DELETE_BELOW] = "DELETE FROM kv WHERE key >= ?1 AND key < ?2",
    [LOCAL_LOG] = "INSERT OR REPLACE INTO log(revision, key, gone) VALUES(?1, ?2, ?3)",
    [LOCAL_LOG_BELOW] = "INSERT OR REPLACE INTO log(revision, key, gone)"
                        " SELECT ?3, key, 1 FROM kv WHERE key >= ?1 AND key < ?2",
    [LOCAL_LOG_LEASE] = "INSERT OR REPLACE INTO log(revision, key, gone)"
                        " SELECT ?2, key, 1 FROM kv WHERE lease = ?1 AND lease <> 0",
    [LOCAL_CHANGES] = "SELECT log.revision, log.key, log.gone, kv.value, kv.revision"
                      " FROM log LEFT JOIN kv ON kv.key = log.key"
                      " WHERE log.revision > ?1 AND log.key >= ?2 AND log.key < ?3"
                      " ORDER BY log.revision, log.key",
    [LOCAL_TRIM_AT] = "SELECT revision FROM log ORDER BY revision DESC LIMIT 1 OFFSET ?1",
    [LOCAL_TRIM] = "DELETE FROM log WHERE revision <= ?1",
    [LOCAL_TRIMMED] = "UPDATE state SET trimmed = ?1",
    [LOCAL_GRANT] = "INSERT INTO lease(id, ttl, deadline, boot) VALUES(?1, ?2, ?3, ?4)",
    [LOCAL_RENEW] = "UPDATE lease SET deadline = ?3 + ttl"
                    " WHERE id = ?1 AND boot = ?2 AND deadline > ?3",
    [LOCAL_LEASE_ALIVE] = "SELECT 1 FROM lease WHERE id = ?1 AND boot = ?2 AND deadline > ?3",
    [LOCAL_LEASE_DEAD] = "SELECT id FROM lease WHERE deadline <= ?1 OR boot <> ?2 LIMIT 1",
    [LOCAL_LEASE_FORGET] = "DELETE FROM lease WHERE id = ?1",
    [LOCAL_LEASE_KEYS] = "DELETE FROM kv WHERE lease = ?1 AND lease <> 0",
};
