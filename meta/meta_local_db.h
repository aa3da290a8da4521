/* Local db: the database of the embedded backend: opening it, its schema, statements and errors.
 *
 * Used by one thread at a time. Calls return 0 or a negative errno of meta.h and leave the sentence for the log or the
 * user in `cause`. */
#ifndef P2PFS_META_META_LOCAL_DB_H
#define P2PFS_META_META_LOCAL_DB_H

#include <sqlite3.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

enum local_statement {
    LOCAL_BEGIN_READ,
    LOCAL_BEGIN_WRITE,
    LOCAL_COMMIT,
    LOCAL_ROLLBACK,
    LOCAL_STATE,
    LOCAL_ADVANCE,
    LOCAL_LIST,
    LOCAL_REVISION_OF,
    LOCAL_ANY_BELOW,
    LOCAL_PUT,
    LOCAL_DELETE,
    LOCAL_DELETE_BELOW,
    LOCAL_LOG,
    LOCAL_LOG_BELOW,
    LOCAL_LOG_LEASE,
    LOCAL_CHANGES,
    LOCAL_TRIM_AT,
    LOCAL_TRIM,
    LOCAL_TRIMMED,
    LOCAL_GRANT,
    LOCAL_RENEW,
    LOCAL_LEASE_ALIVE,
    LOCAL_LEASE_DEAD,
    LOCAL_LEASE_FORGET,
    LOCAL_LEASE_KEYS,
    LOCAL_STATEMENTS
};
struct local_db {
    char *dir;
    char *path; /* dir/metadata.db */
    sqlite3 *sqlite;
    sqlite3_stmt *statements[LOCAL_STATEMENTS];
    dev_t dev; /* of the file that is open */
    ino_t ino;
    uint64_t deadline_ms; /* of the call that is under way, CLOCK_MONOTONIC */
    uint64_t epoch;       /* grows with every other file that takes this one's place */
    bool fresh;           /* another database than the one that was listed */
    char cause[512];      /* why the last call failed, with the remedy */
};

/* Opens or creates dir/metadata.db. Copies `dir`. local_db_free it also after a failure. */
int local_db_open(struct local_db *db, const char *dir);
void local_db_free(struct local_db *db);
/* Begins a call: sets its deadline, and follows a file that was replaced or came back (then `fresh` is set). */
int local_db_enter(struct local_db *db);

/* A statement from its start. Texts that are bound must stay until it has been stepped. */
sqlite3_stmt *local_use(struct local_db *db, enum local_statement which);
void local_bind_int(sqlite3_stmt *statement, int at, uint64_t value);
void local_bind_text(sqlite3_stmt *statement, int at, const char *text);
/* Binds the prefix and what is just above all its keys (which are printable ASCII) to ?at and ?at+1. */
void local_bind_prefix(sqlite3_stmt *statement, int at, const char *prefix);
/* 1: a row is there (reset the statement after reading it); 0: done. */
int local_step(struct local_db *db, sqlite3_stmt *statement);
/* A statement without arguments, to its end. */
int local_do(struct local_db *db, enum local_statement which);
/* Ends the transaction: commits when rc is 0, otherwise nothing of it stays. Returns rc, or why the commit failed. */
int local_end(struct local_db *db, int rc);
/* The revision of the database, and the last one that the change log has lost. */
int local_state(struct local_db *db, uint64_t *revision, uint64_t *trimmed);
/* The database contradicts itself: sets the cause, returns -EBADMSG. */
int local_damaged(struct local_db *db);

#endif
