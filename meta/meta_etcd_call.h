/* Etcd, inside: calls of etcd's JSON gateway: endpoints and failover, login, errors. Only meta/meta_etcd*.c includes this.
 *
 * One thread at a time, as meta.h says. Calls return 0 or a negative errno of meta.h and leave the sentence for the
 * log or the user in `cause`. */
#ifndef P2PFS_META_META_ETCD_CALL_H
#define P2PFS_META_META_ETCD_CALL_H

#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stdint.h>

#include "meta/credentials.h"
#include "meta/http.h"
#include "meta/meta.h"

#define ETCD_ENDPOINTS  16
#define ETCD_PREFIX_MAX 64

struct etcd {
    struct meta_store store;
    char *endpoints[ETCD_ENDPOINTS]; /* "http://host:port" */
    size_t endpoint_count;
    size_t endpoint; /* the one that is asked */
    struct credentials credentials;
    char *token; /* NULL: not logged in */
    struct http *http;

    struct http_stream *watch; /* NULL: none */
    char *watched;             /* the prefix that it watches */
    uint64_t position;         /* all up to here has been told from it */
    uint64_t watch_ms;         /* when it must have been confirmed */
    char *waited;              /* the prefix whose feed is read; NULL: none yet */
    uint64_t deadline_ms;
    uint64_t newest; /* revision that the service has shown us */

    bool created; /* the service has confirmed the watch */
    bool gap;     /* the data is not what was listed */
    bool no_rpc;  /* gRPC did not answer here */
    bool down;    /* an outage has been logged */
    bool encrypted;
    char epoch[33];                   /* of what was listed; "": nothing yet */
    char cluster[24];                 /* likewise */
    char prefix[ETCD_PREFIX_MAX + 2]; /* with its '/' */
    char cause[512];                  /* why the last call failed, with the remedy */
};

static inline struct etcd *etcd_of(struct meta_store *store)
{
    return (struct etcd *)store; /* its first member */
}

/* Sets `cause` and returns rc. */
int etcd_fail(struct etcd *s, int rc, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
int etcd_senseless(struct etcd *s); /* an answer that etcd never gives */
/* Begins a call: sets its deadline. */
void etcd_enter(struct etcd *s);
/* Every call ends here: the cause is said once per outage, and its end too. Returns rc. */
int etcd_answer(struct etcd *s, int rc);

/* Asks `path` ("/v3/kv/range") and gives the answer, whose header has been looked at; the caller deletes it. Takes
 * `request`. safe: it may be carried out twice, so another endpoint is asked when the first one fails. -ENOENT: no such
 * lease; -ESTALE: that revision is gone, or is not there yet. */
int etcd_call(struct etcd *s, const char *path, cJSON *request, bool safe, cJSON **answer);
/* The same with a stream of answers. */
int etcd_stream(struct etcd *s, const char *path, cJSON *request, struct http_stream **stream);
/* What an answer with "error" or a cancelled watch means. May drop the token: then -EACCES may be tried once more. */
int etcd_refused(struct etcd *s, const char *text, int code);
/* The same for a whole answer: {"error": "...", "message": "...", "code": N} up to etcd 3.4, without "error" from 3.5 on;
 * in a stream {"error": {...}}. */
int etcd_error_read(struct etcd *s, const cJSON *answer);
void etcd_next_endpoint(struct etcd *s);
/* Notes the cluster of an answer: another one than was listed sets `gap`. */
void etcd_cluster_note(struct etcd *s, const char *id);
void etcd_header_note(struct etcd *s, const cJSON *answer);
/* The revision that an answer was made at. */
uint64_t etcd_revision_of(const cJSON *answer);

/* Some keys in order, as an answer brought them: strings in its own memory. */
struct etcd_kv {
    char *key;
    char *value; /* NULL: empty */
    size_t key_size;
    size_t value_size;
    uint64_t revision;
};
struct etcd_range {
    struct etcd_kv *kvs;
    size_t count;
    bool more;
    uint64_t revision; /* of the answer */
    char cluster[24];
    cJSON *json; /* what the strings lie in, or */
    char *bytes;
};
/* Asks etcd's gRPC service for the keys behind `after` and before `end` at a revision. Free *out also after a failure, which
 * says nothing: ask the gateway then. */
int etcd_rpc_range(struct etcd *s, struct http *http, const char *after, const char *end,
                   uint64_t limit, uint64_t revision, struct etcd_range *out);

/* ---- meta_etcd ---- */

/* The epoch that stands there; with `make`, ours is written when there is none. "": none. */
int etcd_epoch_get(struct etcd *s, bool make, char epoch[33]);

/* ---- meta_etcd_list ---- */

int etcd_list(struct meta_store *store, const char *prefix, meta_event_fn each, void *arg,
              uint64_t *revision);

/* JSON in etcd's spelling: bytes as base64, numbers as strings, what is 0 left out. */
void etcd_put_bytes(cJSON *object, const char *name, const char *bytes);
void etcd_put_number(cJSON *object, const char *name, uint64_t number);
/* Our prefix and `key` as "key". */
void etcd_put_key(const struct etcd *s, cJSON *object, const char *key);
/* All keys that begin with our prefix and `prefix`. */
void etcd_put_range(const struct etcd *s, cJSON *object, const char *prefix);
/* The key that follows next on a whole key. */
void etcd_put_after(cJSON *object, const char *key);
uint64_t etcd_get_number(const cJSON *object, const char *name);
/* The decoded bytes as a string in place of the encoded one; NULL: absent or malformed. */
char *etcd_get_bytes(const cJSON *object, const char *name);

#endif
