/* Rdma_link: messages in frames by SEND, shards by READ. Private to the RDMA transport; on the loop's thread only.
 *
 * A link is one reliable connection, or several, its rails, each from another adapter of the puller. The first carries
 * the messages, and READs like the others; the link lives as long as it does. The slices of every shard go to whichever
 * rail has room, so a slow adapter takes fewer. A rail that fails, or stands still while others move, is paused: its
 * slices go to others, and it is tried again, first after 1 s, at last every 10 s. A rail joins its link by a number that
 * the holder drew for the link and told on its first connection.
 *
 * A frame is at most 4 KiB and goes into a buffer that the other side has posted: a head of 8 bytes {kind u8, more u8,
 * credits u16, length u32} and `length` bytes. A message longer than one frame is cut; `more` is 1 on all but its last.
 * Every frame tells how many buffers its sender has posted again since the last (credits), and nobody sends without a
 * credit, so no frame ever meets a receiver that is not ready. The last credit is kept for a frame that only returns
 * credits, so the two sides cannot wait for each other.
 *
 * Each completion queue has room for everything that its link can have posted: it cannot overflow.
 *
 * A holder registers exactly what it exposes, for remote reading alone and in a protection domain of the link, so that its
 * keys are of no use on another, and deregisters it in unexpose: the device then refuses a READ that comes too late,
 * which breaks the connection. A puller's memory is registered for local writing by
 * a thread of the device while other shards are on their way.
 *
 * States of a link, all under the loop's thread:
 *   RESOLVING -> CONNECTING -> OPEN -> BROKEN -> dead (shut);   ACCEPTING -> OPEN
 *   Each may break: the queue pair is gone from then on, so nothing is read or written any more; what had arrived is
 *   still told, then `down`, once. */
#ifndef P2PFS_ENGINE_RDMA_LINK_H
#define P2PFS_ENGINE_RDMA_LINK_H

#include <rdma/rdma_cma.h>
#include <uthash.h>

#include "engine/bucket.h"
#include "engine/lookup.h"
#include "engine/queue.h"
#include "engine/rdma_device.h"
#include "engine/transport.h"
#include "engine/turn.h"

#define RDMA_FRAME_BYTES 4096
#define RDMA_HEAD_BYTES  8
#define RDMA_FRAMES      32 /* buffers each way */
#define RDMA_READS       16 /* READs under way, at most */
#define RDMA_READS_FIRST 2
#define RDMA_SLICE_BYTES (256u << 10)
#define RDMA_QUEUE_BYTES (4u << 20) /* messages that wait to be sent */
#define RDMA_RAILS       8
/* The kernel looks again when this has passed, which it needs when the neighbour's answer came while it was looking. */
#define RDMA_RESOLVE_MS 500
/* A descriptor: 'R', urgent u8, id u32, length u64, address u64, and for each rail an rkey u32, 0: not by this one. */
#define RDMA_DESCRIPTOR_BYTES (22 + 4 * RDMA_RAILS)
#define RDMA_PREFACE_BYTES    21 /* "p2pfrdm2", frame size u16, frames u16, link u64, rail u8 */
_Static_assert(RDMA_DESCRIPTOR_BYTES <= TRANSPORT_DESCRIPTOR_MAX, "a descriptor has room for all");

enum rdma_work { RDMA_WORK_RECEIVE, RDMA_WORK_SEND, RDMA_WORK_READ }; /* wr_id: it * 256 + buffer */
enum rdma_state { RDMA_RESOLVING, RDMA_CONNECTING, RDMA_ACCEPTING, RDMA_OPEN, RDMA_BROKEN };

struct rdma_exposure {
    uint32_t id;
    struct rdma_memory memory[RDMA_RAILS];
    void *map; /* made for it, NULL: the caller's */
    size_t map_length;
    struct rdma_exposure *next;
};

/* A fetch under way. */
struct rdma_pull {
    struct transport_fetch *fetch;
    uint64_t serial;
    uint64_t address;
    uint32_t rkeys[RDMA_RAILS];
    bool urgent;
    bool over; /* cancelled or failed: no more READs */
    int error;
    struct rdma_memory memory[RDMA_RAILS]; /* nothing: not registered there yet */
    struct extents
        *lents[RDMA_RAILS]; /* entered, to be left when the region is deregistered; NULL: none */
    bool registering[RDMA_RAILS];
    size_t asked; /* bytes that READs were posted for, at least once */
    size_t
        landed; /* bytes without a gap whose READs are complete; fetch->landed follows when it is told */
    unsigned under_way; /* READs */
    struct rdma_pull *prev, *next;
};

/* A piece of a pull that a READ was posted for. */
struct rdma_slice {
    struct rdma_pull *pull;
    size_t offset;
    uint32_t length;
    uint64_t posted_ns;
};

enum rdma_rail_state { RDMA_RAIL_NONE, RDMA_RAIL_MAKING, RDMA_RAIL_OPEN };

struct rdma_rail {
    struct rdma_link *link;
    unsigned slot;              /* its place in link->rails */
    enum rdma_rail_state state; /* of the first one: OPEN when the link is */
    bool standby;               /* READs only when no other one is open */
    bool told;                  /* that it was paused */
    unsigned source;            /* outgoing: which of the transport's */
    struct rdma_device *device;
    struct rdma_domain *domain; /* the link's for this device */
    struct rdma_cm_id *id;      /* NULL: none */
    struct ibv_cq *completions;
    uint64_t heard_ns; /* something completed */
    uint64_t since_ns; /* MAKING: began */
    uint64_t retry_ns; /* NONE: not before; 0: never */
    unsigned failures; /* in a row */

    struct rdma_slice reads[RDMA_READS]; /* ring: they complete in order */
    unsigned reads_begin, reads_count, reads_window, reads_limit;
};

/* Completions of the links that a transport has on one device. */
struct rdma_completions {
    struct rdma_device *device;
    struct ibv_comp_channel *channel;
    struct loop_watch watch;
    struct rdma_completions *next;
};

struct rdma_transport {
    struct transport base;
    struct turn turn;
    struct mailbox *mailbox; /* names found, connections handed over, memory registered */
    struct rdma_event_channel *events;
    struct loop_watch events_watch;
    struct rdma_completions *completions;
    struct rdma_link *links;
    uint64_t last_number; /* of links and pulls */
    struct loop_timer heart;
    struct bucket *download;
    struct tcp_address sources[RDMA_RAILS]; /* where our connections come from */
    bool standby[RDMA_RAILS];
    unsigned source_count; /* 0: anywhere */
    struct {
        struct tcp_address address;
        uint64_t until_ns;
    } bad[RDMA_RAILS]; /* addresses that were lost lately: tried last */
    unsigned bad_next;

    struct rdma_listener {
        struct tcp_address address;
        struct rdma_cm_id *id; /* NULL: its device is gone; tried again */
    } listeners[RDMA_RAILS];
    unsigned listener_count;
    struct transport *(*share_next)(void *arg);
    void *share_arg;
};

struct rdma_link {
    struct link base;
    struct turn_item item;
    struct rdma_link *prev, *next;
    uint64_t number;
    enum rdma_state state;
    bool told; /* `down` has been called */
    int error;
    char reason[160];

    struct tcp_addresses addresses;   /* outgoing: the other side's */
    uint8_t order[TCP_ADDRESSES_MAX]; /* in which they are tried, from address_next on */
    unsigned address_next;
    bool again;                 /* one may do at the next try */
    bool failed;                /* a request to connect has, which is repeated once */
    struct loop_timer patience; /* until connected */
    uint32_t timeout_ms;

    struct rdma_rail rails[RDMA_RAILS]; /* by slot */
    uint64_t token;                     /* what rails join by */
    UT_hash_handle hh;                  /* of those that may be joined */
    uint64_t heard_ns;                  /* something completed */
    uint64_t spin_ns;                   /* how long polling on paid off lately */
    unsigned reads_count;               /* of all rails */

    struct rdma_domain *domains; /* one for each device that a rail of it was made with */

    uint8_t *frames; /* RDMA_FRAMES to receive into, then RDMA_FRAMES to send from */
    struct rdma_memory frames_memory;

    struct queue queue; /* messages: length u32, bytes */
    size_t sent_of;     /* of the queue's first message, bytes that have left */
    bool full;          /* somebody got -EAGAIN */
    unsigned credits;   /* frames that the other side can take */
    unsigned owed;      /* buffers posted again that it does not know of */
    uint8_t idle_slots[RDMA_FRAMES];
    unsigned idle_count;

    struct {
        uint8_t slot;
        uint32_t length;
    } arrived[RDMA_FRAMES]; /* ring */
    unsigned arrived_begin, arrived_count;
    uint8_t *assembly; /* of a message in several frames */
    size_t assembled;

    struct rdma_pull *pulls;
    struct rdma_slice lost[2 * RDMA_RAILS * RDMA_READS]; /* to be read again */
    unsigned lost_count;
    struct bucket_ticket ticket; /* of the limit of downloads */
    struct loop_timer pace;

    struct rdma_exposure *exposures;
};

static inline struct rdma_link *rdma_link_of(struct link *link)
{
    return (struct rdma_link *)link;
}

static inline struct rdma_transport *rdma_transport_of(struct transport *transport)
{
    return (struct rdma_transport *)transport;
}

/* What either side says of itself while a connection is made. */
struct rdma_preface {
    int credits;    /* -EPROTO: none that we know */
    uint64_t token; /* of the link that rails may join, or that this one joins */
    unsigned slot;  /* 0: a link of its own */
};

/* transport_rdma.c: the link is of no use any more: its queue pair ends now, `down` tells why, later. */
void rdma_link_break(struct rdma_link *link, int error, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
void rdma_link_mark(struct rdma_link *link); /* gets a turn of its own, soon */

/* Buffers, completion queue and queue pair for the first rail. 0, or negative errno; undone by rdma_link_unpair. */
int rdma_link_pair(struct rdma_link *link);
/* Ends all queue pairs, when the link is no longer OPEN: after return no device touches any of its memory. */
void rdma_link_unpair(struct rdma_link *link);
void rdma_link_forget(struct rdma_link *link); /* frees what is left; unpaired before */

/* Takes completions off the queue without telling anybody. */
void rdma_link_collect(struct rdma_link *link);
/* Tells what was collected; posts READs, frames and buffers. Also on a broken link: what had arrived. */
void rdma_link_turn(struct rdma_link *link);
void rdma_link_push(struct rdma_link *link);                       /* frames that may go now */
void rdma_link_heartbeat(struct rdma_link *link, uint64_t now_ns); /* every second */

/* rdma_rail.c */
/* Completion queue and queue pair for rail->id, with room for so many messages each way. 0, or negative errno. */
int rdma_rail_pair(struct rdma_rail *rail, unsigned messages);
/* Ends the queue pair; its READs are lost. */
void rdma_rail_unpair(struct rdma_rail *rail);
/* A rail but the first is of no use any more: its slices go to others, and it is tried again. */
void rdma_rail_pause(struct rdma_rail *rail, const char *reason);
void rdma_rail_collect(struct rdma_rail *rail);
/* An event of its connection; of any rail but the first. */
void rdma_rail_event(struct rdma_rail *rail, const struct rdma_cm_event *event);
/* Somebody joins the link with that token by a rail; takes the id. On the accepting thread. */
void rdma_rail_join(struct rdma_cm_id *id, uint64_t token, unsigned slot);
void rdma_rails_offer(struct rdma_link *link);  /* accepted: draws the token that rails join by */
void rdma_rails_refuse(struct rdma_link *link); /* from now on nobody joins */
void rdma_rails_open(struct rdma_link *link);   /* outgoing and open: the others begin */
void rdma_rails_look(struct rdma_link *link, uint64_t now_ns); /* every second */
void rdma_completions_look(
    struct rdma_transport *transport); /* every second: devices that are gone */
void rdma_completions_close(struct rdma_transport *transport);

/* rdma_listen.c */
int rdma_listen_open(struct transport *transport, const char *address,
                     char bound[TRANSPORT_NAME_MAX + 1]);
void rdma_listen_share(struct transport *transport, struct transport *(*next)(void *arg),
                       void *arg);
void rdma_listen_request(struct rdma_transport *transport, struct rdma_cm_id *id,
                         const struct rdma_preface *got); /* takes the id */
void rdma_listen_lost(struct rdma_transport *transport,
                      struct rdma_cm_id *id);             /* its device is gone */
void rdma_listen_again(struct rdma_transport *transport); /* every second: those that were lost */
void rdma_listen_look(struct rdma_link *link, uint64_t now_ns); /* every second; may shut it */
void rdma_listen_end(struct rdma_transport *transport);

/* transport_rdma.c */
struct rdma_link *rdma_link_new(struct rdma_transport *transport);
void rdma_link_shut(struct link *link);
int rdma_link_equip(struct rdma_link *link);
void rdma_preface_put(uint8_t out[RDMA_PREFACE_BYTES], uint64_t token, unsigned slot);
struct rdma_conn_param rdma_conn_param_of(const struct rdma_rail *rail,
                                          const uint8_t preface[RDMA_PREFACE_BYTES]);
int rdma_rail_resolve(struct rdma_rail *rail, const struct tcp_address *address);

/* rdma_shard.c */
void rdma_shard_post(struct rdma_link *link);                   /* READs that may go now */
void rdma_shard_read_done(struct rdma_rail *rail, bool landed); /* its oldest READ is over */
void rdma_shard_register(struct rdma_rail *rail);               /* one that has just opened */
bool rdma_shard_tell(struct rdma_link *link); /* tells one piece of news; false: there was none */
void rdma_link_pace_due(struct loop_timer *timer);
void rdma_link_pace_stop(struct rdma_link *link); /* it waits for no limit any more */

int rdma_link_send(struct link *link, const void *message, size_t length);
int rdma_link_expose(struct link *link, uint32_t id, const struct transport_region *region,
                     bool urgent, struct transport_descriptor *descriptor);
void rdma_link_unexpose(struct link *link, uint32_t id);
int rdma_link_fetch(struct link *link, const struct transport_descriptor *descriptor,
                    struct transport_fetch *fetch);
void rdma_link_cancel(struct link *link, struct transport_fetch *fetch);

#endif
