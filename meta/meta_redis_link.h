/* Redis, inside: what the files of the Redis backend share. Only meta/meta_redis*.c includes this.
 *
 * One thread at a time, as meta.h says. Calls return 0 or a negative errno of meta.h and leave the sentence for the
 * log or the user in `cause`. */
#ifndef P2PFS_META_META_REDIS_LINK_H
#define P2PFS_META_META_REDIS_LINK_H

#include <hiredis/hiredis.h>
#include <stdbool.h>
#include <stdint.h>

#include "meta/credentials.h"
#include "meta/meta.h"
#include "meta/meta_redis_script.h"

#define REDIS_ARGS     (16 + 7 * META_TXN_MAX) /* words of the longest command */
#define REDIS_NAME_MAX 64                      /* bytes of the prefix, the user, a group of keys */

#define REDIS_ADDRESSES_MAX 8

struct redis_tls;

struct redis_address {
    char *host;
    int port;
};

struct redis {
    struct meta_store store;
    bool encrypted;
    struct redis_address addresses[REDIS_ADDRESSES_MAX];
    size_t address_count;
    size_t address;   /* the one in use, or tried last */
    const char *host; /* its, borrowed */
    int port;
    int number; /* of the database */
    char prefix[REDIS_NAME_MAX + 1];
    char keys[REDIS_SCRIPT_KEYS][REDIS_NAME_MAX + 16];
    char sha[41]; /* of the script */
    struct credentials credentials;
    struct redis_tls *tls; /* NULL: plain */

    redisContext *ask;
    redisContext *bell;
    char parked[REDIS_NAME_MAX + 1]; /* the group whose stream `bell` reads; "": it reads nothing */

    char candidate[33]; /* epoch that a store gets if we are its first user */
    char epoch[65];     /* of what was listed; "": nothing yet */
    char run[65];       /* the server process that `ask` was connected to last */
    bool replica;       /* and it said that it is one */
    char *waited;       /* the prefix whose feed is read; NULL: none yet */
    uint64_t newest;    /* revision that the server has shown us */
    bool gap;           /* something of it may have been missed since it was listed */
    uint64_t deadline_ms;
    bool down;       /* an outage has been logged */
    char cause[512]; /* why the last call failed, with the remedy */
};

/* Reads the certificates that `credentials` names. -EINVAL: see `cause`. */
int redis_tls_open(struct redis *s);
void redis_tls_close(struct redis *s);

void redis_address_use(struct redis *s, size_t address);

/* Sets `cause` and returns rc. */
int redis_fail(struct redis *s, int rc, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
int redis_senseless(struct redis *s); /* an answer that the script never gives */

/* Begins a call: sets its deadline, and connects unless the connection still stands. */
int redis_enter(struct redis *s);
/* Every call ends here: the cause is said once per outage, and its end too. Returns rc. */
int redis_answer(struct redis *s, int rc);
int redis_connect(struct redis *s, redisContext **context);
void redis_hang_up(redisContext **context);
/* Sends a command; its answer is still to come. */
int redis_send(struct redis *s, redisContext *context, int argc, const char *const *argv);
/* The connection has failed: why, as an errno. */
int redis_broken(struct redis *s, const redisContext *context);
/* The server answered with an error: which, as an errno. */
int redis_refused(struct redis *s, const char *text);

/* Runs one operation of the script. *reply (may be NULL: not wanted): what follows "ok"; the caller frees it. */
int redis_run(struct redis *s, int argc, const char *const *argv, redisReply **reply);
bool redis_is_array(const redisReply *reply, size_t least);
bool redis_is_text(const redisReply *reply);
/* Reads "ok epoch revision ..." of at least `least` elements. Another epoch than before, or a revision that went back,
 * sets `gap` and counts in store.epoch. */
int redis_head(struct redis *s, const redisReply *reply, size_t least, uint64_t *revision);

/* Tells what changed behind *revision under the prefix, whose group is given. The count of changes told, or a negative
 * errno; *asked: what `each` said. *rest_ms: when the next lease could end, -1: there is none. */
int redis_changes(struct redis *s, const char *prefix, const char *group, uint64_t *revision,
                  meta_event_fn each, void *arg, int *asked, int64_t *rest_ms);
/* The part of a prefix before its '/': changes of one group of keys stand in one stream. -EINVAL: no '/'. */
int redis_group(const char *prefix, char group[REDIS_NAME_MAX + 1]);

int redis_list(struct meta_store *store, const char *prefix, meta_event_fn each, void *arg,
               uint64_t *revision);

static inline struct redis *redis_of(struct meta_store *store)
{
    return (struct redis *)store; /* its first member */
}

#endif
