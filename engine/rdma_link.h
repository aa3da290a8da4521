/* Rdma_link: one reliable connection: messages in frames by SEND, shards by READ. Private to the RDMA transport; on the
 * loop's thread only.
 *
 * A frame is at most 4 KiB and goes into a buffer that the other side has posted: a head of 8 bytes {kind u8, more u8,
 * credits u16, length u32} and `length` bytes. A message longer than one frame is cut; `more` is 1 on all but its last.
 * Every frame tells how many buffers its sender has posted again since the last (credits), and nobody sends without a
 * credit, so no frame ever meets a receiver that is not ready. The last credit is kept for a frame that only returns
 * credits, so the two sides cannot wait for each other.
 *
 * Each completion queue has room for everything that its link can have posted: it cannot overflow.
 *
 * A holder registers exactly what it exposes, for remote reading alone, and deregisters it in unexpose: the device then
 * refuses a READ that comes too late, which breaks the connection. A puller's memory is registered for local writing by
 * a thread of the device while other shards are on their way.
 *
 * States of a link, all under the loop's thread:
 *   RESOLVING -> CONNECTING -> OPEN -> BROKEN -> dead (shut);   ACCEPTING -> OPEN
 *   Each may break: the queue pair is gone from then on, so nothing is read or written any more; what had arrived is
 *   still told, then `down`, once. */
#ifndef P2PFS_ENGINE_RDMA_LINK_H
#define P2PFS_ENGINE_RDMA_LINK_H

#include <rdma/rdma_cma.h>

#include "engine/bucket.h"
#include "engine/lookup.h"
#include "engine/queue.h"
#include "engine/rdma_device.h"
#include "engine/transport.h"
#include "engine/turn.h"

#define RDMA_FRAME_BYTES      4096
#define RDMA_HEAD_BYTES       8
#define RDMA_FRAMES           32 /* buffers each way */
#define RDMA_READS            16 /* READs under way, at most */
#define RDMA_READS_FIRST      2
#define RDMA_SLICE_BYTES      (256u << 10)
#define RDMA_QUEUE_BYTES      (4u << 20) /* messages that wait to be sent */
#define RDMA_DESCRIPTOR_BYTES 26 /* 'R', urgent u8, id u32, length u64, address u64, rkey u32 */
#define RDMA_PREFACE_BYTES    12 /* "p2pfrdm1", frame size u16, frames u16 */

enum rdma_work { RDMA_WORK_RECEIVE, RDMA_WORK_SEND, RDMA_WORK_READ }; /* wr_id: it * 256 + buffer */
enum rdma_state { RDMA_RESOLVING, RDMA_CONNECTING, RDMA_ACCEPTING, RDMA_OPEN, RDMA_BROKEN };

struct rdma_exposure {
    uint32_t id;
    struct ibv_mr *region;
    void *map; /* made for it, NULL: the caller's */
    size_t map_length;
    struct rdma_exposure *next;
};

/* A fetch under way. */
struct rdma_pull {
    struct transport_fetch *fetch;
    uint64_t serial;
    uint64_t address;
    uint32_t rkey;
    bool urgent;
    bool over; /* cancelled or failed: no more READs */
    int error;
    struct ibv_mr *region; /* NULL: is being registered */
    struct extents *lent;  /* entered, to be left when the region is deregistered; NULL: none */
    size_t asked;          /* bytes that READs were posted for */
    size_t landed;      /* bytes whose READs are complete; fetch->landed follows when it is told */
    unsigned under_way; /* READs */
    struct rdma_pull *prev, *next;
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
    struct tcp_address source; /* where our connections come from; length 0: anywhere */

    struct rdma_cm_id *listener;
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

    struct tcp_addresses addresses; /* outgoing: to try, from address_next on */
    unsigned address_next;
    struct loop_timer patience; /* until connected */
    uint32_t timeout_ms;

    struct rdma_device *device;
    struct rdma_cm_id *id; /* NULL: none yet */
    struct ibv_cq *queue_pair_events;
    uint64_t heard_ns; /* something completed */
    uint64_t spin_ns;  /* how long polling on paid off lately */

    uint8_t *frames; /* RDMA_FRAMES to receive into, then RDMA_FRAMES to send from */
    struct ibv_mr *frames_region;

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
    struct {
        struct rdma_pull *pull;
        uint32_t length;
        uint64_t posted_ns;
    } reads[RDMA_READS]; /* ring: they complete in order */
    unsigned reads_begin, reads_count, reads_window, reads_limit;
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

/* transport_rdma.c: the link is of no use any more: its queue pair ends now, `down` tells why, later. */
void rdma_link_break(struct rdma_link *link, int error, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
void rdma_link_mark(struct rdma_link *link); /* gets a turn of its own, soon */

/* Buffers, completion queue and queue pair for link->id. 0, or negative errno; undone by rdma_link_unpair. */
int rdma_link_pair(struct rdma_link *link, struct rdma_completions *completions);
/* Ends the queue pair, when the link is no longer OPEN: after return the device touches none of its memory. */
void rdma_link_unpair(struct rdma_link *link);
void rdma_link_forget(struct rdma_link *link); /* frees what is left; unpaired before */

/* Takes completions off the queue without telling anybody. */
void rdma_link_collect(struct rdma_link *link);
/* Tells what was collected; posts READs, frames and buffers. Also on a broken link: what had arrived. */
void rdma_link_turn(struct rdma_link *link);
void rdma_link_push(struct rdma_link *link);                       /* frames that may go now */
void rdma_link_heartbeat(struct rdma_link *link, uint64_t now_ns); /* every second */

/* rdma_shard.c */
void rdma_shard_post(struct rdma_link *link);                   /* READs that may go now */
void rdma_shard_read_done(struct rdma_link *link, bool landed); /* the oldest READ is over */
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
