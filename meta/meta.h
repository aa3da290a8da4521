/* Meta: a small transactional key-value store with leases and a change feed: what a metadata service must offer.
 *
 * Keys are printable ASCII without blanks, values printable text (JSON) without NUL; what they mean is codec.h's
 * business. Every successful transaction has one revision, larger than all before it; a key's revision is that of the
 * transaction that wrote it last.
 *
 * Threads: one store is used by one thread at a time (the catalog's), but for meta_wake. Every call returns within
 * the store's deadline (META_DEADLINE_MS), with one of: 0; -EAGAIN a condition of the transaction did not hold;
 * -ENOENT; -EOPNOTSUPP the store is read-only; -ESTALE the change feed has a gap: list again; -ETIMEDOUT or -ECONNREFUSED or another network error: the
 * service does not answer; -ENOSPC the service is full; -EACCES or -EROFS it refuses us; -EIO its storage fails; -EBADMSG
 * it answered nonsense; -ENOMEM. The backend logs the
 * cause once per outage, with the URL (never with a secret) and the remedy. A call that failed with a network error
 * may or may not have been carried out; the next call reconnects. */
#ifndef P2PFS_META_META_H
#define P2PFS_META_META_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define META_DEADLINE_MS 3000
#define META_URL_MAX     4096
#define META_TXN_MAX     128 /* etcd's --max-txn-ops, as it is by default */

struct meta_store;

enum meta_condition {
    META_ABSENT = 1, /* key does not exist */
    META_EXISTS,     /* key exists */
    META_REVISION,   /* key's revision equals `revision` */
    META_EMPTY,      /* no key begins with `key` */
};

struct meta_compare {
    enum meta_condition condition;
    const char *key;
    uint64_t revision;
};

enum meta_action { META_PUT = 1, META_DELETE, META_DELETE_PREFIX };

struct meta_write {
    enum meta_action action;
    const char *key;
    const char *value; /* META_PUT */
    uint64_t
        lease; /* META_PUT: 0, or a lease with which the key disappears; -ENOENT: it has ended */
};

/* All compares hold and all writes happen, or nothing happens (-EAGAIN). Borrowed until return. At most META_TXN_MAX
 * compares and as many writes; a key is written at most once. */
struct meta_txn {
    const struct meta_compare *compares;
    size_t compare_count;
    const struct meta_write *writes;
    size_t write_count;
    uint64_t revision; /* out: revision of this transaction */
};

/* A key as listed or changed. value NULL: the key was deleted. Borrowed during the callback. */
struct meta_event {
    const char *key;
    const char *value;
    uint64_t revision;
};
/* A negative answer ends the list or the wait, which then returns it. */
typedef int (*meta_event_fn)(void *arg, const struct meta_event *event);

struct meta_config {
    const char *url;              /* borrowed until meta_open returns */
    const char *credentials_file; /* or NULL */
};

struct meta_ops {
    const char *name;
    const char *const *schemes; /* "local", ...; NULL-terminated */
    bool single_machine;        /* every client is on this machine */

    int (*open)(const struct meta_config *config, struct meta_store **store);
    void (*close)(struct meta_store *store); /* NULL is harmless */

    /* Calls `each` for every key that begins with `prefix`, in key order; *revision: the state that was listed, and
     * where a change feed can start. */
    int (*list)(struct meta_store *store, const char *prefix, meta_event_fn each, void *arg,
                uint64_t *revision);
    int (*txn)(struct meta_store *store, struct meta_txn *txn);

    /* A lease ends when it has not been renewed for ttl_ms, whatever became of its owner, and its keys go with it
     * (as deletions in the change feed). renew, revoke: -ENOENT when it has already ended. */
    int (*lease_grant)(struct meta_store *store, uint32_t ttl_ms, uint64_t *lease);
    int (*lease_renew)(struct meta_store *store, uint64_t lease);
    int (*lease_revoke)(struct meta_store *store, uint64_t lease);

    /* Waits until a change newer than *revision under `prefix` is known, `timeout_ms` passed (0: don't wait) or
     * `wake_fd` (an eventfd, not read here; or -1) became readable. Calls `each` for every change in order, once for
     * each revision and key (changes of one key may be folded into the last), then sets *revision. 0 also when
     * nothing changed. -ESTALE: changes may have been missed; list again. */
    int (*wait)(struct meta_store *store, const char *prefix, uint64_t *revision,
                uint32_t timeout_ms, int wake_fd, meta_event_fn each, void *arg);
};

/* Every store begins with this, so that the calls below find its backend. */
struct meta_store {
    const struct meta_ops *ops;
    uint64_t
        epoch; /* grows when a call finds another service than before, or an older state of it */
    bool read_only; /* the service can't change safely: txn and lease_grant are -EOPNOTSUPP */
};

/* Opens the backend that serves config->url. -EINVAL: no backend for that scheme, or a malformed URL; *error is then
 * a sentence for the user that names the part and the remedy (static or in a thread-local buffer). */
int meta_open(const struct meta_config *config, struct meta_store **store, const char **error);
void meta_close(struct meta_store *store);
/* The backend for a URL without opening it, or NULL. */
const struct meta_ops *meta_backend(const char *url);
/* Backends call this to say why open failed; formatted into the thread-local buffer that meta_open hands out. */
void meta_open_error(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* A cluster-wide lock: holds until released or until its lease ends. *token grows with every holder (fencing).
 * -EAGAIN: somebody else holds it. unlock: -ENOENT when the lock had already ended. */
int meta_lock(struct meta_store *store, const char *name, uint64_t lease, uint64_t *token);
int meta_unlock(struct meta_store *store, const char *name, uint64_t token);

/* The backends, each in a file of its own. */
extern const struct meta_ops meta_local_ops;
extern const struct meta_ops meta_redis_ops;
extern const struct meta_ops meta_etcd_ops;
extern const struct meta_ops meta_http_ops;

#endif
