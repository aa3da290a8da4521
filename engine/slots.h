/* Slots: who may have this node's bytes now, and who has to wait or go elsewhere.
 *
 * Decides only, like spread.h: the caller locks, and brings the time along.
 *
 * Slots: one for each shard that is granted and not done, over all links of the node. Their number follows the time
 * that shards take: spread_width() on a link that is full, many where shards come and go in milliseconds. A node that
 * was idle begins with very few: the first shards of a version are what everybody waits for. Asks beyond them wait in a
 * short queue per link; a free slot goes to the peer that has the fewest, then to the one that is furthest behind with
 * the version, so that all end together, then to the one that waited longest; readers' asks go before background. A
 * grant that takes far longer than usual no longer counts, and who has several of them gets no more, so slow and stopped
 * peers cannot hold what others need. What a link was granted counts against its peer's other links for SLOTS_SHARE_NS
 * only: one of them may be there because that one is dead.
 *
 *   ask   IDLE -> WAITING -> GRANTED [-> OVERDUE] -> IDLE      any -> IDLE when it is given up
 *
 * The book of a version keeps which of its shards were handed out, and to whom. While a complete holder has several
 * followers, it hands out each shard once before it repeats one: who asks for a shard that another one has just got is
 * told to be patient, and which shards nobody has got yet. */
#ifndef P2PFS_ENGINE_SLOTS_H
#define P2PFS_ENGINE_SLOTS_H

#include "engine/spread.h"

#define SLOTS_START        2 /* after having been idle; one more with each that is done */
#define SLOTS_CEILING      64
#define SLOTS_TRICKLE_NS   1000000000ull
#define SLOTS_SHARE_NS     2000000000ull
#define SLOTS_WAITING_PEER 64   /* asks of one link in the queue, */
#define SLOTS_WAITING_NODE 8192 /* and of all; who has none there may always have one */
#define SLOTS_OVERDUE_PEER 4    /* grants of one link that no longer count; it gets no more then */
#define SLOTS_OVERDUE_MAX  1024 /* of all peers; who has one gets no more then, and others do */

enum slots_state { SLOTS_IDLE, SLOTS_WAITING, SLOTS_GRANTED, SLOTS_OVERDUE };

struct slots_peer;

struct slots_ask {    /* the caller's memory; all zero is IDLE */
    bool urgent;      /* set by the caller: a reader waits for it */
    uint8_t progress; /* set by the caller: how much of the version its peer has, in coarse steps */
    uint32_t shards;  /* set by the caller: of the version */
    enum slots_state state;
    bool shared; /* counts in its peer's share */
    struct slots_peer *peer;
    uint64_t since_ns; /* granted */
    struct slots_ask *prev, *next;
};

/* A peer, over all its links; the caller's memory, all zero at first. */
struct slots_share {
    uint32_t granted; /* in the last SLOTS_SHARE_NS */
    uint64_t turn;    /* of its last grant */
};

/* A link of a peer; the caller's memory, all zero at first. */
struct slots_peer {
    struct slots_share *share; /* set by the caller; NULL: the peer has this link only */
    struct slots_share alone;
    struct slots_ask *urgent, *normal;
    uint32_t waiting;
    uint32_t granted;
    uint32_t shared; /* of these, in the peer's share */
    uint32_t overdue;
    uint8_t progress; /* of its last ask */
    uint64_t turn;    /* of its last grant */
    struct slots_peer *prev, *next;
};

struct slots {
    bool idle; /* set by the caller: background gets one slot, and only what demand leaves */
    bool
        yield; /* set by the caller: this node has work of its own; an idle one then gives background one grant in
                 * SLOTS_TRICKLE_NS, so that who has no other source is not stranded */
    uint64_t background_ns; /* the last grant in the background; 0: none yet */
    struct spread_window window;
    struct slots_peer *queue;  /* links that wait for something */
    struct slots_ask *granted; /* oldest first */
    struct slots_ask
        *shared; /* of these, the first that counts in its peer's share, as all behind it */
    uint32_t granted_count;
    uint32_t overdue_count;
    uint32_t waiting_count;
    uint32_t urgent_count; /* of these */
    uint64_t turns;
    uint64_t usual_ns; /* from grant to done, smoothed; 0: not known yet */
};

struct slots slots_new(void);
/* Puts an IDLE ask into the queue. False: the queue is full; the answer is BUSY. */
bool slots_ask(struct slots *slots, struct slots_peer *peer, struct slots_ask *ask);
/* The ask that is granted now, or NULL. Call until NULL after every ask, end and overdue. */
struct slots_ask *slots_next(struct slots *slots, uint64_t now_ns);
/* The ask is over or given up, in whatever state. done: its peer has landed all of it. */
void slots_end(struct slots *slots, struct slots_ask *ask, uint64_t now_ns, bool done);
/* Lets go of grants that take too long; from time to time. */
void slots_overdue(struct slots *slots, uint64_t now_ns);
/* How long a shard that was handed out is not repeated: the time in which the swarm usually passes it on. */
uint32_t slots_patience_ms(const struct slots *slots);

/* ---- the book of a version ---- */

struct slots_book;

int slots_book_open(uint32_t shards, struct slots_book **book); /* 0, -ENOMEM */
void slots_book_close(struct slots_book *book);                 /* NULL is harmless */
/* Milliseconds for which `to` (any number that tells peers apart, not 0) should not get the shard, since another one
 * has it or gets it; 0: it may. The patience counts a few times for a promise, whatever becomes of it, and for all while
 * there are shards that nobody has got: a repeat delays one of those for everybody. */
uint32_t slots_book_wait(const struct slots_book *book, uint32_t shard, uint32_t to,
                         uint64_t now_ms, uint32_t patience_ms);
/* `to` gets it. */
void slots_book_promise(struct slots_book *book, uint32_t shard, uint32_t to, uint64_t now_ms);
/* The promise is over: landed there, or not, and then it is as if it had never been made. */
void slots_book_settle(struct slots_book *book, uint32_t shard, uint32_t to, uint64_t now_ms,
                       bool landed);
uint32_t slots_book_fresh(const struct slots_book *book); /* shards that nobody has got or gets */
/* Up to `most` shards that nobody has got, each call others; how many. */
uint32_t slots_book_advise(struct slots_book *book, uint32_t *shards, uint32_t most);

#endif
