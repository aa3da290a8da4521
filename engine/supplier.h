/* Supplier: this lane's outgoing link to one peer: connecting, greeting, and the questions that pulls ask over it.
 *
 *   IDLE -> CONNECTING -> GREETING -> PROVING -> READY;  any -> IDLE when the link breaks (back-off, then again while anybody is
 *   attached; closed after a while when nobody is)
 *
 * Lane thread only. Hooks are called from the lane's events and ticks, never inside the calls below, and may attach,
 * detach, ask and cancel. */
#ifndef P2PFS_ENGINE_SUPPLIER_H
#define P2PFS_ENGINE_SUPPLIER_H

#include "engine/lane.h"
#include "engine/peers.h"
#include "engine/wire.h"

struct supplier;
struct attachment;
struct request;

/* What a pull wants to hear of one version at one supplier. */
struct attachment_ops {
    /* The supplier has the version; bitmap as in wire.h (NULL when it is complete). */
    void (*attached)(struct attachment *attachment, uint32_t count, bool complete,
                     const uint8_t *bitmap);
    void (*have)(struct attachment *attachment, uint32_t shard);
    void (*digests)(struct attachment *attachment, uint32_t first, uint32_t count, size_t size,
                    const uint8_t *digests);
    /* BUSY named shards that it would rather give (wire_have_shard); the request ends right behind. */
    void (*advised)(struct attachment *attachment, const struct wire_message *message);
    /* It named another node that pulls or holds the version. */
    void (*referred)(struct attachment *attachment, const char *node, uint64_t boot);
    /* Its requests end right behind. */
    void (*gone)(struct attachment *attachment,
                 enum wire_reason reason); /* not any more; may attach again later */
    void (*lost)(
        struct attachment
            *attachment); /* link down, its requests have ended; `attached` follows if it returns */
    void (*writable)(struct attachment *attachment); /* asking is possible again after -EAGAIN */
};
/* Owned by the pull, in place from attach to detach. */
struct attachment {
    const struct attachment_ops *ops;
    struct model_id version;
    struct supplier *supplier; /* the rest is the supplier's */
    uint32_t handle;
    struct attachment *prev, *next;
};

struct request_ops {
    /* Granted: `digest` is what the supplier says (size 0: nothing). False: give it up. */
    bool (*granted)(struct request *request, const uint8_t *digest, size_t digest_size);
    void (*landed)(struct request *request); /* request->fetch.landed has grown */
    /* Over, exactly once, unless cancelled: 0 all landed; -EBUSY come back in retry_ms; -ENOENT not there; -ESTALE the
     * file changed there; else the link's or transfer's error. The request is the asker's again. */
    void (*ended)(struct request *request, int status, uint32_t retry_ms);
};
/* Owned by the asker until ended or cancelled. */
struct request {
    const struct request_ops *ops;
    uint32_t shard;
    bool urgent;
    uint8_t progress;              /* how much of the version is here, 0 to WIRE_PROGRESS_ALL */
    struct transport_fetch fetch;  /* destination and length set by the asker */
    struct attachment *attachment; /* the rest is the supplier's */
    bool fetching;
    struct request *prev, *next;
};

/* The supplier for a live node; made when new. NULL: out of memory. */
struct supplier *supplier_get(struct lane *lane, const struct model_node *node);
/* The name of the transport that its link uses, or used last. */
const char *supplier_transport(const struct supplier *supplier);
struct peer *supplier_peer(struct supplier *supplier);
const struct model_node *supplier_node(struct supplier *supplier);
bool supplier_by_rdma(const struct supplier *supplier);
/* Whether its link, if it has one, takes fetches in pieces (transport.h). */
bool supplier_scattered(const struct supplier *supplier);
uint64_t supplier_heard_ns(const struct supplier *supplier); /* when it last said anything */

void supplier_attach(struct supplier *supplier, struct attachment *attachment);
/* Its requests must have ended or been cancelled. */
void supplier_detach(struct attachment *attachment);
int supplier_ask(struct attachment *attachment,
                 struct request *request); /* 0; -EAGAIN; -ENOTCONN */
void supplier_cancel(struct request *request);
/* The peer lied or cannot be used: end the link now, and back off. */
void supplier_drop(struct supplier *supplier, const char *reason);

void supplier_tick(struct lane *lane, uint64_t now_ns);
void supplier_close_all(struct lane *lane);

/* Transport events of outgoing links. */
void supplier_connected(struct link *link);
void supplier_message(struct link *link, const void *message, size_t length);
void supplier_fetch_landed(struct link *link, struct transport_fetch *fetch);
void supplier_fetch_done(struct link *link, struct transport_fetch *fetch, int status);
void supplier_writable(struct link *link);
void supplier_down(struct link *link, int error, const char *reason);

#endif
