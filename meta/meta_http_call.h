/* Web, inside: requests to a plain HTTP key-value service, what its answers mean, and what it can do. Only
 * meta/meta_http*.c includes this.
 *
 * One thread at a time, as meta.h says. Calls return 0 or a negative errno of meta.h and leave the sentence for the
 * log or the user in `cause`. */
#ifndef P2PFS_META_META_HTTP_CALL_H
#define P2PFS_META_META_HTTP_CALL_H

#include "meta/credentials.h"
#include "meta/http.h"
#include "meta/meta.h"
#include "meta/meta_http_doc.h"

#define WEB_PREFIX_MAX 64
#define WEB_STRAYS_MAX 4

struct web_watch;

struct web {
    struct meta_store store;
    struct http *http;
    struct credentials credentials;
    char *authorization; /* NULL: nobody logs in */
    char *base;   /* what a key is appended to: "http://host/path?key=" or "http://host/path/" */
    char *waited; /* the prefix whose feed is read; NULL: none yet */
    uint64_t deadline_ms;

    /* the document as it was fetched last */
    struct web_doc doc;
    char *text;               /* NULL: there is none, or not fetched yet */
    char etag[HTTP_ETAG_MAX]; /* "": not known, or the service gives none that can be used */
    bool fetched;             /* a first time */
    bool gap;                 /* it is not what was listed */

    /* bases that were made; whether the document leads there is not known */
    uint64_t strays[WEB_STRAYS_MAX];
    size_t stray_count;

    struct web_watch *watches; /* other nodes' leases */
    uint64_t lease;            /* ours that was granted or renewed last; 0: none */
    uint64_t beat;             /* of the last renewal */

    uint64_t struggle_ms; /* how long other writers were in the way of the last change */
    bool opened;
    bool doubt;     /* it may be another service than the one that was probed */
    bool down;      /* an outage has been logged */
    bool senseless; /* likewise, of a service that answers what it should not */
    bool full;      /* that the document is has been logged */
    char prefix[WEB_PREFIX_MAX + 1];
    char cause[768]; /* why the last call failed, with the remedy */
};

static inline struct web *web_of(struct meta_store *store)
{
    return (struct web *)store; /* its first member */
}

/* Sets `cause` and returns rc. */
int web_fail(struct web *s, int rc, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* Begins a call: sets its deadline. */
void web_enter(struct web *s);
/* Every call ends here: the cause is said once per outage, and its end too. Returns rc. */
int web_answer(struct web *s, int rc);

/* One request for the key "PREFIX.NAME". 0 for the statuses 2xx, 304, 404 and 412, which *reply tells apart (the caller
 * frees reply->body); all others, and no answer, are errors. PUT with a value; if_match, if_none_match: or NULL. */
int web_call(struct web *s, const char *method, const char *name, const char *value,
             const char *if_match, const char *if_none_match, struct http_reply *reply);
/* Whether that answer carried the request out. */
bool web_done(const struct http_reply *reply);
/* The tag if writes can depend on it, otherwise "". */
const char *web_strong(const char *etag);
/* Finds out by a key of its own whether the service honours preconditions. 0, or -EOPNOTSUPP: it does not; nothing is
 * left behind. */
int web_probe(struct web *s);

/* ---- meta_http ---- */

/* Has the newest document. -EBADMSG: what is there is none. */
int web_fetch(struct web *s);
/* Changes the document by compare-and-swap: `change` gets a copy of it, again and again until no other writer came
 * between. Its negative answers end the update once they are about the newest document. */
typedef int (*web_change)(struct web_doc *doc, void *arg);
int web_update(struct web *s, web_change change, void *arg);

/* ---- meta_http_lease ---- */

int web_lease_grant(struct meta_store *store, uint32_t ttl_ms, uint64_t *lease);
int web_lease_renew(struct meta_store *store, uint64_t lease);
int web_lease_revoke(struct meta_store *store, uint64_t lease);
/* Looks after other nodes' leases when it is time, and ends those that nobody renewed. */
int web_lease_look(struct web *s);
/* After an outage: nobody could renew. */
void web_lease_restart(struct web *s);
void web_lease_clear(struct web *s);

#endif
