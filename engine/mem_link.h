/* Mem_link: one end of a link of the in-process transport, its states and the faults. Private to that transport; on the
 * loop's thread only, but for the faults.
 *
 * States: CONNECTING -> OPEN -> BROKEN -> dead (shut). A broken end tells `down` once, from the loop's next turn; the
 * memory of a dead one goes at the end of the transport's turn, when no function of it is on the stack any more. */
#ifndef P2PFS_ENGINE_MEM_LINK_H
#define P2PFS_ENGINE_MEM_LINK_H

#include "engine/mailbox.h"
#include "engine/transport.h"

#define MEM_QUEUE_BYTES (4u << 20)
#define MEM_NEVER_NS    (3600ull * 1000000000)

enum mem_state { MEM_CONNECTING, MEM_OPEN, MEM_BROKEN };
enum mem_fault { MEM_LOSE, MEM_CUT, MEM_FLIP, MEM_REFUSE, MEM_FULL, MEM_STALL, MEM_FAULTS };

struct mem_letter;

struct mem_exposure {
    uint32_t id;
    bool sent;
    struct transport_region region;
    struct mem_exposure *next;
};

struct mem_transport {
    struct transport base;
    struct mailbox *mailbox;
    struct loop_timer turn; /* always set, so that moving it cannot fail */
    struct loop_timer wait; /* always set: for the first of the delayed */
    struct mem_letter *delayed, **delayed_last;
    struct mem_link *links, *marked, *dead;
    struct transport *(*share_next)(void *arg);
    void *share_arg;
};

struct mem_link {
    struct link base;
    struct mem_link *prev, *next, *marked_next, *dead_next;
    enum mem_state state;
    bool marked, dead, told, full;
    uint64_t number, far_number;
    struct mailbox *far; /* a reference; NULL until connected */
    struct loop_timer patience;
    size_t queued; /* bytes of messages that the other side has not taken yet */
    struct mem_exposure *exposures;
    struct transport_fetch *fetches;
    int error;
    const char *reason;
};

static inline struct mem_link *mem_link_of(struct link *link)
{
    return (struct mem_link *)link;
}

static inline struct mem_transport *mem_transport_of(struct transport *transport)
{
    return (struct mem_transport *)transport;
}

struct mem_link *mem_link_new(struct mem_transport *t); /* NULL: out of memory */
void mem_link_free(struct mem_link *link);
void mem_link_mark(struct mem_link *link); /* gets a turn of its own, soon */
/* The link is of no use any more: `down` will tell why. Harmless when it is already known. */
void mem_link_break(struct mem_link *link, int error, const char *reason);
void mem_link_cancel(struct link *base, struct transport_fetch *fetch);
void mem_link_writable(
    struct mem_link *link); /* tells it, when somebody waits for it and there is room */
void mem_links_turn(struct loop_timer *timer);
void mem_links_reap(struct mem_transport *t);

bool mem_fault_now(enum mem_fault fault); /* is this one the n-th? Any thread */
uint32_t mem_fault_delay_ms(void);

#endif
