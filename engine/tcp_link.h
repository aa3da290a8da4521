/* Tcp_link: one connection and the frames on it. Private to the TCP transport; on the loop's thread only.
 *
 * Either side first sends 8 bytes that name the protocol, then frames: a head of 20 bytes {kind u16, zero u16, id u32,
 * length u32, offset u64} and `length` bytes of payload.
 *   MESSAGE  a message of the upper floor, at most 64 KiB
 *   DATA     bytes of the exposed region `id` from `offset` on, at most 1 MiB, in order without gaps
 *   END      no more of `id` follows; offset 0: all was sent; 1: it was taken back or could not be read
 *
 * States of a link, all under the loop's thread:
 *   RESOLVING -> CONNECTING -> OPEN -> BROKEN -> dead (shut)
 *   Any of the first three may break; BROKEN tells `down` once, from the loop's next turn; shut is possible in each,
 *   also inside every event. The memory of a dead link goes at the end of the transport's turn, when no function of
 *   this link is on the stack any more. */
#ifndef P2PFS_ENGINE_TCP_LINK_H
#define P2PFS_ENGINE_TCP_LINK_H

#include "engine/bucket.h"
#include "engine/mailbox.h"
#include "engine/queue.h"
#include "engine/tcp_socket.h"
#include "engine/transport.h"

#define TCP_PREFACE_BYTES    8
#define TCP_HEAD_BYTES       20
#define TCP_SLICE_BYTES      (1u << 20) /* payload of one DATA frame */
#define TCP_SHARE_BYTES      (8u << 20) /* of one exposure, before another's turn */
#define TCP_TURN_BYTES       (4u << 20) /* in one turn, each way: another link is waiting */
#define TCP_QUEUE_BYTES      (4u << 20) /* messages that wait to be sent */
#define TCP_PIECES           64         /* of scattered memory, in one call to the kernel */
#define TCP_TAIL_BYTES       4096 /* read along behind a slice: the next head, small messages */
#define TCP_STAGE_BYTES      (TCP_HEAD_BYTES + TRANSPORT_MESSAGE_MAX + TCP_TAIL_BYTES)
#define TCP_DESCRIPTOR_BYTES 13 /* 'T', id u32, length u64 */

enum tcp_state { TCP_RESOLVING, TCP_CONNECTING, TCP_OPEN, TCP_BROKEN };
enum tcp_frame { TCP_MESSAGE = 1, TCP_DATA, TCP_END };

struct tcp_exposure {
    uint32_t id;
    struct transport_region region; /* fd, map and pieces are borrowed until unexpose */
    size_t sent;
    size_t turn;       /* bytes of its turn that have left */
    uint64_t since_ns; /* its first slice */
    struct tcp_exposure *prev, *next;
};

/* One direction of a link under a limit: shard bytes move as far as there is credit; without, the link stands in the
 * bucket's line until the timer is due. */
struct tcp_pace {
    struct bucket *bucket; /* NULL: no limit */
    struct bucket_ticket ticket;
    size_t credit;
    struct loop_timer timer;
    bool waits; /* the timer is set */
};

struct tcp_transport {
    struct transport base;
    struct tcp_tuning tuning;
    struct bucket *upload, *download; /* or NULL */
    struct mailbox *mailbox;          /* names found, connections handed over */
    struct loop_timer turn;           /* always set, so that moving it cannot fail */
    struct tcp_link *links;
    struct tcp_link *marked; /* have something to do in the next turn */
    struct tcp_link *dead;
    uint64_t last_number;

    struct loop_watch listener; /* fd -1: none */
    struct loop_timer listen_again;
    struct transport *(*share_next)(void *arg);
    void *share_arg;
};

struct tcp_link {
    struct link base;
    struct tcp_link *prev, *next;
    struct tcp_link *marked_next;
    struct tcp_link *dead_next;
    uint64_t number; /* of the link in its transport: for answers that may come too late */
    enum tcp_state state;
    bool marked;
    bool dead;
    bool told; /* `down` has been called */
    struct loop_watch watch;
    bool blocked;    /* the socket takes no more: POLLOUT tells when it does */
    uint32_t unsent; /* tcp_socket_fit */
    struct tcp_pace out, in;

    struct tcp_addresses addresses; /* outgoing: to try, from address_next on */
    unsigned address_next;
    struct loop_timer patience; /* until connected */
    uint32_t timeout_ms;

    int error;
    char reason[160];

    /* Sending: whole frames wait in `queue`; between two of them goes a slice of an exposed region. */
    struct queue queue;
    bool full;                                    /* somebody got -EAGAIN */
    struct tcp_exposure *urgent, *normal, *quiet; /* quiet: sent or failed, until unexpose */
    uint64_t yielded_ns;                          /* when it sent a little while it yields */
    struct {
        struct tcp_exposure *exposure; /* NULL while left > 0: it was taken back, zeros follow */
        uint8_t head[TCP_HEAD_BYTES];
        size_t head_sent; /* bytes of the head */
        size_t left;      /* payload; 0: no slice is under way */
    } slice;

    /* Receiving: bytes come into `stage`, those of a slice straight into the fetch's memory. */
    uint8_t *stage;
    size_t stage_begin, stage_end;
    bool greeted; /* the preface was right */
    struct transport_fetch *fetches;
    struct transport_fetch *body; /* the fetch whose slice is coming, NULL: drop it */
    size_t body_left;
};

static inline struct tcp_link *tcp_link_of(struct link *link)
{
    return (struct tcp_link *)link;
}

static inline struct tcp_transport *tcp_transport_of(struct transport *transport)
{
    return (struct tcp_transport *)transport;
}

/* transport_tcp.c: the link gets a turn of its own, soon. */
void tcp_link_mark(struct tcp_link *link);
/* The link is of no use any more: `down` will tell why. Harmless when it is already known. */
void tcp_link_break(struct tcp_link *link, int error, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

int tcp_link_greet(struct tcp_link *link); /* opens the conversation. 0, -ENOMEM */
void tcp_link_read(struct tcp_link *link);
void tcp_link_write(struct tcp_link *link);
void tcp_link_push(struct tcp_link *link);   /* what of the queue goes without waiting */
void tcp_link_forget(struct tcp_link *link); /* frees buffers and exposures */
/* What the loop is to wait for: neither direction turns over a socket while a limit makes it wait. */
void tcp_link_watch(struct tcp_link *link);

int tcp_link_send(struct link *link, const void *message, size_t length);
int tcp_link_expose(struct link *link, uint32_t id, const struct transport_region *region,
                    bool urgent, struct transport_descriptor *descriptor);
void tcp_link_unexpose(struct link *link, uint32_t id);
int tcp_link_fetch(struct link *link, const struct transport_descriptor *descriptor,
                   struct transport_fetch *fetch);
void tcp_link_cancel(struct link *link, struct transport_fetch *fetch);

#endif
