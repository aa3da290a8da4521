/* Transport: how control messages and shard bytes travel between two peers. One file per kind; a static table.
 *
 * A transport instance belongs to one loop; every call and every event below is on that loop's thread, and no event
 * runs inside the call that causes it (they come from the loop's next turn), but for `link_shut`, after which no event
 * of that link comes at all. The bytes of a shard are pulled by the side that wants them: the holder EXPOSES a range
 * under an id and sends the descriptor it got inside a message of the upper floor (GRANT); the puller passes that
 * descriptor to FETCH. A holder grants reading only; nothing a peer sends can write here but the bytes of a fetch
 * that this side asked for, inside the range that it gave.
 *
 * Errors: 0 or negative errno. Submit contract: 0 = the event comes exactly once, later; -EAGAIN = the queue is full,
 * nothing is kept, try again after `writable`; any other = never started, no event. */
#ifndef P2PFS_ENGINE_TRANSPORT_H
#define P2PFS_ENGINE_TRANSPORT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "engine/loop.h"

#define TRANSPORT_MESSAGE_MAX    (64u << 10) /* bytes of one control message */
#define TRANSPORT_DESCRIPTOR_MAX 64
#define TRANSPORT_NAME_MAX       271

struct transport;
struct link;
struct extents;

/* What may be read: bytes of an open file (sendfile) that are also mapped at `map` (or map is NULL: not mapped); or, with
 * fd -1, memory that is no file's: at `map`, or, where the transport is `scattered`, in `pieces`, which last until
 * unexpose. */
struct transport_region {
    int fd;
    off_t offset;
    const void *map; /* address of `offset`, or NULL */
    size_t length;
    const struct iovec *pieces;
    size_t piece_count;
};
/* Fills `out` with what of the pieces [at, at + length) covers, at most `room` of them; returns how many. */
size_t transport_pieces(const struct iovec *pieces, size_t count, size_t at, size_t length,
                        struct iovec *out, size_t room);

struct transport_descriptor {
    uint8_t bytes[TRANSPORT_DESCRIPTOR_MAX];
    uint8_t length;
};

/* One shard on its way here. Filled by the caller: destination (or, where the transport is `scattered`, NULL and pieces
 * that last as long as it), length, id (unique on the link, the one the holder exposed). Owned by the caller until `fetch_done`, or until transport `cancel` returns. */
struct transport_fetch {
    void *destination;
    const struct iovec *pieces;
    size_t piece_count;
    size_t length;
    uint32_t id;
    bool urgent; /* goes before others where a limit makes them wait */
    /* The destination is a program's memory, which the transport has entered (extents.h) for as long as a device knows
     * of it, also when that ends after fetch_done or cancel; NULL: it is the caller's own. */
    struct extents *lent;
    size_t landed;     /* bytes that have arrived as a prefix without gaps */
    struct link *link; /* the rest is the transport's */
    struct transport_fetch *next;
    void *state;
};

struct transport_events {
    /* Somebody connected to our address; the upper floor sets link_user or shuts it. */
    void (*accepted)(void *arg, struct link *link);
    void (*connected)(struct link *link);
    /* One message; borrowed during the call. */
    void (*message)(struct link *link, const void *message, size_t length);
    /* More of a fetch landed (fetch->landed has grown; called often, at least every 1 MiB). */
    void (*fetch_landed)(struct link *link, struct transport_fetch *fetch);
    /* The fetch is over: 0 all landed, or why not. The transport no longer touches it or its memory. */
    void (*fetch_done)(struct link *link, struct transport_fetch *fetch, int status);
    /* An exposed range has been handed to the network completely (TCP), so its upload slot may be counted free. The
     * memory must stay until unexpose. Never called by one-sided transports. */
    void (*exposed_sent)(struct link *link, uint32_t id);
    /* Room in the send queue again after -EAGAIN. */
    void (*writable)(struct link *link);
    /* The link broke or the other side closed it. Every fetch on it gets fetch_done first. The upper floor must call
     * link_shut, which frees the link. `reason` is a phrase for the log. */
    void (*down)(struct link *link, int error, const char *reason);
};

struct bucket;

/* An adapter of this machine, by an address of its: "host:port" (the port does not count). */
struct transport_rail {
    char address[TRANSPORT_NAME_MAX + 1];
    bool standby; /* carries shards only while none of the others can */
};

/* What an adapter has done in this process. */
struct transport_adapter {
    char device[64];
    uint64_t received; /* bytes of shards that it has read */
    uint64_t
        rails; /* connections that carry shards, of either direction; 0: none, or it is paused */
    uint64_t failures; /* of connections that carried shards */
};

struct transport_config {
    const char *
        congestion; /* TCP: congestion control to set on every socket, or NULL: the system's; on loopback "reno" */
    uint32_t buffer_bytes; /* TCP: SO_SNDBUF and SO_RCVBUF, 0: the transport's default */
    bool
        lower_effort; /* TCP: what accepted links send yields to other traffic (DSCP LE, RFC 8622) */
    /* Limits of the bytes of shards, shared with other instances and borrowed; NULL: none. Messages do not count. */
    struct bucket *upload;
    struct bucket *download;
    /* RDMA: the adapters to use, borrowed during open; the first carries the messages. None: whichever the way to a
     * peer leads through, and one for each link. */
    const struct transport_rail *rails;
    unsigned rail_count;
};

struct transport_ops {
    const char *name; /* "tcp", "rdma", "mem" */
    bool one_sided;
    bool scattered; /* regions and fetches may consist of pieces */

    int (*open)(struct loop *loop, const struct transport_config *config,
                const struct transport_events *events, void *arg, struct transport **transport);
    /* Any thread. How many it filled in. NULL: the transport does not tell adapters apart. */
    size_t (*adapters)(struct transport_adapter *out, size_t room);
    /* All links are shut first by the caller. NULL is harmless. */
    void (*close)(struct transport *transport);
    /* Starts to accept on "host:port" (port 0: any). `bound`: the address with the real port. -EADDRINUSE,
     * -EADDRNOTAVAIL, -EINVAL (malformed, or the host does not resolve), -EACCES. */
    int (*listen)(struct transport *transport, const char *address,
                  char bound[TRANSPORT_NAME_MAX + 1]);
    /* Gives an accepted connection to the loop of another instance of the same kind (round robin over lanes): from
     * then on accepted events come there. `next` gives the instance; called on the accepting thread. Close the
     * accepting instance before those it gives to. */
    void (*share)(struct transport *transport, struct transport *(*next)(void *arg), void *arg);
    /* `connected` or `down` follows, within timeout_ms. A host's name is looked up on a thread of its own. -EINVAL:
     * malformed. */
    int (*connect)(struct transport *transport, const char *address, uint32_t timeout_ms,
                   void *user, struct link **link);

    int (*send)(struct link *link, const void *message, size_t length); /* copied; order is kept */
    /* Grants reading of the region under id until unexpose; borrows its fd and map until then. Not one-sided: the bytes
     * follow from the next turn on, after every message that was queued before; so the message with the descriptor is
     * sent right after this call, or, when that gives -EAGAIN, inside `writable` at the latest. -EEXIST: id is taken. */
    int (*expose)(struct link *link, uint32_t id, const struct transport_region *region,
                  bool urgent, struct transport_descriptor *descriptor);
    /* After return the other side cannot read the region any more; a fetch of it that is not finished fails there with
     * -EIO. TCP: pages that were already handed to the kernel are sent as they are then, so memory that is overwritten
     * in place after an unfinished upload may arrive changed, which the digest tells; freeing it is safe. One-sided: a
     * read that is under way, or comes later, ends the link; so ask the other side first, where there is time. */
    void (*unexpose)(struct link *link, uint32_t id);
    /* Not one-sided: inside the `message` event that brought the descriptor, for the bytes are right behind it.
     * -EINVAL: not a descriptor of this kind, or of another length than the fetch's. -EEXIST: id is in use. */
    int (*fetch)(struct link *link, const struct transport_descriptor *descriptor,
                 struct transport_fetch *fetch);
    /* After return nothing writes the fetch's memory any more; no fetch_done comes. What still arrives is dropped.
     * One-sided: waits for reads under way, usually far below 1 ms; the link ends when they take longer than 0.3 s.
     * Harmless for one that is over, or was never begun (link NULL). */
    void (*cancel)(struct link *link, struct transport_fetch *fetch);
    /* Ends and frees the link (queued messages are still sent where that needs no waiting): no event comes any more,
     * fetches on it are forgotten as by cancel, exposed ranges as by unexpose. */
    void (*shut)(struct link *link);
};

/* Every link and transport begins with these. */
struct transport {
    const struct transport_ops *ops;
    struct loop *loop;
    const struct transport_events *events;
    void *arg;
};
struct link {
    struct transport *transport;
    void *user;                        /* the upper floor's */
    bool outgoing;                     /* we connected */
    char peer[TRANSPORT_NAME_MAX + 1]; /* the other end's address, for the log */
    uint64_t received;                 /* bytes of shards */
    uint64_t sent;
    /* The upper floor's, shared by the links of one peer, or NULL. TCP: until then (monotonic ns) what is not urgent
     * yields on all of them to an urgent region that takes long, for one path leads there, and it is slow. */
    _Atomic uint64_t *yield_ns;
};

extern const struct transport_ops transport_tcp;
extern const struct transport_ops transport_mem;
extern const struct transport_ops transport_rdma; /* only where the build has libibverbs */
/* Whether two addresses are of one host, whatever the port. */
bool transport_same_host(const char *one, const char *other);
/* By name; NULL: this build has no such transport. */
const struct transport_ops *transport_by_name(const char *name);

#endif
