/* Web_doc: all keys of a cluster as a document that a plain HTTP key-value service keeps, and a copy of it.
 *
 * The document is JSON: {"v": 1, "epoch": "...", "revision": N, "writes": ["...", ...], "base": "ID", "base_revision": M,
 * "leases": {"ID": TTL_MS, ...}, "keys": {"KEY": [REVISION, "RECORD", "LEASE"], ...}}. epoch: random, made with the
 * document. writes: a random number for each of the last writes, newest last, so that whoever got no answer finds out
 * whether his was carried out. base: another value of the service, never changed, with all keys as they were at
 * base_revision, "" for none; `keys` is what changed behind it, [REVISION] for one that is gone. So a change writes
 * little, however many names there are. A base is {"v": 1, "epoch": "...", "revision": M, "keys": {...}}.
 *
 * A copy remembers which keys went since it was made first, as keys without a value. One thread at a time. Only
 * meta/meta_http*.c includes this. */
#ifndef P2PFS_META_META_HTTP_DOC_H
#define P2PFS_META_META_HTTP_DOC_H

#ifndef HASH_NONFATAL_OOM
#define HASH_NONFATAL_OOM 1
#endif
#include <uthash.h>

#include "meta/meta.h"

#define WEB_DOC_FORMAT 1
#define WEB_DOC_MAX    (8u << 20) /* bytes of all keys with their records */
#define WEB_DOC_EPOCH  33
#define WEB_DOC_WRITES 16

/* One block of memory: the key, its value, and what the document has of both. */
struct web_key {
    UT_hash_handle hh;
    uint64_t revision;
    uint64_t lease;
    char *value;   /* NULL: the key is gone */
    char *json;    /* "KEY":[REVISION,"RECORD","LEASE"] */
    size_t length; /* of json */
    char key[];
};

struct web_lease {
    UT_hash_handle hh;
    uint64_t id;
    uint32_t ttl_ms;
};

struct web_doc {
    const struct web_doc *below; /* a draft: what is not in `keys` is as there; borrowed */
    struct web_key *keys;
    struct web_lease *leases; /* in the order of their ids */
    uint64_t revision;
    uint64_t since; /* changes behind this revision are all known */
    uint64_t base;  /* 0: none */
    uint64_t base_revision;
    uint64_t writes[WEB_DOC_WRITES];
    size_t write_count;
    char epoch[WEB_DOC_EPOCH]; /* "": there is no document */
};

/* Reads a document into *doc, which is empty. -EBADMSG: it is none; -EPROTONOSUPPORT: of another format; -ENOMEM. Clear it
 * also after a failure. */
int web_doc_read(struct web_doc *doc, const char *text);
/* Puts the keys of the document's base below what has been read. Errors likewise. */
int web_doc_read_base(struct web_doc *doc, const char *text);
/* The document, or its base; the caller frees it. NULL: out of memory. */
char *web_doc_print(const struct web_doc *doc);
char *web_doc_print_base(const struct web_doc *doc);
void web_doc_clear(struct web_doc *doc);
/* Bytes of all keys with their records. */
size_t web_doc_bytes(const struct web_doc *doc);

/* Whether *newer, as web_doc_read left it, says all that changed since *doc. */
bool web_doc_continues(const struct web_doc *doc, const struct web_doc *newer);
/* *doc becomes what *newer is, which is emptied: a draft above it, a document that continues it, or one with its base. true:
 * it is another document than before, or an older state of it. */
bool web_doc_follow(struct web_doc *doc, struct web_doc *newer);

/* A draft above *doc. -ENOMEM; clear it also then. */
int web_doc_draft(const struct web_doc *doc, struct web_doc *draft);
/* Carries the transaction out in a draft, and sets its revision. -EAGAIN; -ENOENT: a lease has ended; -ENOMEM. After a
 * failure the draft is of no use any more. */
int web_doc_txn(struct web_doc *draft, struct meta_txn *txn);
int web_doc_lease_add(struct web_doc *draft, uint64_t id, uint32_t ttl_ms); /* -ENOMEM */
struct web_lease *web_doc_lease(const struct web_doc *doc, uint64_t id);    /* or NULL */
/* Its keys go with it. -ENOENT: it has ended; -ENOMEM. */
int web_doc_lease_end(struct web_doc *draft, uint64_t id);
/* Notes a write; a document that was none gets its epoch. */
void web_doc_sign(struct web_doc *draft, uint64_t write);
bool web_doc_signed(const struct web_doc *doc, uint64_t write);

/* Calls `each` for the keys below the prefix, in order. */
int web_doc_list(struct web_doc *doc, const char *prefix, meta_event_fn each, void *arg);
/* The same for those that changed behind `revision`, in the order of their revisions. *told: how many. */
int web_doc_changes(const struct web_doc *doc, const char *prefix, uint64_t revision,
                    meta_event_fn each, void *arg, size_t *told);

#endif
