/* Spread: which shard to ask next, of whom, and how much at once.
 *
 * Decides only: no clock, no I/O, no lock; whoever calls brings time and randomness along, so a simulator runs the very
 * same code. Order: shards that a reader waits for, first come first served; then read-ahead behind the reader's
 * position; then rarest first, ties at random (rarest first: B. Cohen, "Incentives Build Robustness in BitTorrent",
 * 2003). The absent shards are kept sorted by rarity, so that a HAVE costs O(1) and a choice a few steps.
 *
 * Rarity counts the neighbours that have a shard but not the whole version: complete ones have it anyway. So rarity 0
 * is what only a complete holder can give, and that is what it is asked for first. */
#ifndef P2PFS_ENGINE_SPREAD_H
#define P2PFS_ENGINE_SPREAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SPREAD_NONE       UINT32_MAX
#define SPREAD_AHEAD      8  /* shards of read-ahead that go before rarest first */
#define SPREAD_RARITY_ANY 31 /* neighbours of a shard beyond so many make no difference */

enum spread_shard_state { SPREAD_ABSENT, SPREAD_FILLING, SPREAD_PRESENT };

/* Bitmaps of shards: bit k % 8 of byte k / 8, with so many bytes, the spare bits zero. */
#define SPREAD_BITMAP_BYTES(shards) (((size_t)(shards) + 63) / 64 * 8)

/* What one version still needs. */
struct spread;

int spread_open(uint32_t shards, struct spread **spread); /* all ABSENT; 0, -ENOMEM */
void spread_close(struct spread *spread);                 /* NULL is harmless */
enum spread_shard_state spread_state(const struct spread *spread, uint32_t shard);
void spread_take(struct spread *spread, uint32_t shard); /* ABSENT -> FILLING */
void spread_put(struct spread *spread, uint32_t shard);  /* FILLING -> ABSENT */
void spread_land(struct spread *spread, uint32_t shard); /* ABSENT, FILLING -> PRESENT */
uint32_t spread_absent(const struct spread *spread);     /* how many shards are ABSENT */
/* A neighbour that is not complete has the shard (more), or has left (less). near: of the same locality. */
void spread_more(struct spread *spread, uint32_t shard, bool near, uint64_t now_ms);
void spread_less(struct spread *spread, uint32_t shard, bool near);

/* Between localities about one copy is to pass, however many nodes of one pull. They stand on a ring, as shards do
 * (consistent hashing: D. Karger et al., 1997). A shard that no near neighbour has is fetched from far by the node that
 * comes behind it there; a step later by the next one too; then by four, eight, and so on. So one that has died, or does
 * not pull, costs a step. */
#define SPREAD_RACK_LEVELS 20
struct spread_rack {
    uint64_t salt;                    /* the version's: each has other nodes go */
    uint64_t place;                   /* this node's on the ring */
    uint64_t arc[SPREAD_RACK_LEVELS]; /* so far back do its shards lie after so many steps */
};
/* A node's place: of its name and incarnation. */
uint64_t spread_rack_place(const char *node, uint64_t boot);
/* others: the places of the other nodes of this locality, in any order; sorted afterwards by distance. */
void spread_rack_set(struct spread_rack *rack, uint64_t place, uint64_t *others, size_t count);
/* Whether whoever pulls is known, so that the ring is that of the pullers: they are few, and as many as at the
 * last review. Of many each node knows other ones; then the ring is that of all nodes of the locality. */
#define SPREAD_RACK_FEW 48
bool spread_rack_known(size_t known, size_t before);
/* How long a step is: the time in which a shard usually comes over and is passed on. passed_ns: what one usually takes
 * from being asked of a near neighbour to being here, its turn included; 0: not known yet. */
uint64_t spread_rack_step_ms(uint64_t passed_ns);

/* How many steps a puller may take at most: one more for each in which it had room for more, fewer again as near ones
 * bring what it lacks. So it is one where all of a locality pull, and all of them for the only one that does. */
struct spread_reach {
    uint32_t steps; /* in parts of SPREAD_REACH_PARTS */
    uint64_t since_ms;
};
#define SPREAD_REACH_PARTS 32
/* full_ms: when it had no room last. */
void spread_reach_tick(struct spread_reach *reach, uint64_t now_ms, uint64_t full_ms,
                       uint64_t step_ms);
void spread_reach_near(struct spread_reach *reach); /* a near one brought a shard */

struct spread_range {
    uint32_t first;
    uint32_t last; /* inclusive */
};
struct spread_want {
    const struct spread_range *demand; /* what readers wait for, in order of arrival */
    size_t demand_count;
    uint32_t cursor; /* the shard that a reader wanted last, SPREAD_NONE: none */
    bool whole;      /* fetch everything, not only demand */
};
struct spread_offer {
    const uint8_t *bitmap; /* what the source has; NULL: all */
    uint32_t rarity_most;  /* leave commoner shards to others; SPREAD_RARITY_ANY: no bound */
    bool far;              /* leave what a near neighbour has to that one */
    const struct spread_rack
        *rack;       /* far: and what another node of this locality goes for; NULL: nothing */
    uint64_t now_ms; /* rack: and spread_rack_step_ms, */
    uint64_t step_ms;
    uint32_t steps; /* and whole ones that may be taken */
};
/* The next shard to ask of a source, or SPREAD_NONE; it stays ABSENT. *urgent: a reader waits for it, and neither
 * rarity_most nor far nor rack count. Read-ahead heeds no rack. */
uint32_t spread_next(const struct spread *spread, const struct spread_want *want,
                     const struct spread_offer *offer, uint64_t random, bool *urgent);

/* Whether a complete holder is asked for what others have too, when a puller's window has not been full for `ns` though
 * it asked wherever it could. At once, the registrar would send again what is just being passed on. */
bool spread_hungry(uint64_t ns, uint64_t usual_ns);

/* How many shards of a version are on their way at least, out of a holder and to a puller. Few arrive soon and are passed
 * on, which counts most where a version has few; but whoever has few has none to go on with while the link at their
 * other end is full, so where each is a small part of the whole there are more. */
#define SPREAD_WIDTH_LEAST 3
#define SPREAD_WIDTH_MOST  9
uint16_t spread_width(uint32_t shards);

/* How much may be on its way at once: a window in shards that opens while shards come quickly (the path has room), or
 * while it is below its floor, and closes down to its floor while they take long (they queue somewhere). */
struct spread_window {
    uint16_t width;
    uint16_t floor;
    uint16_t ceiling;
};
struct spread_window spread_window_new(uint16_t floor, uint16_t ceiling);
void spread_window_took(struct spread_window *window, uint64_t ns); /* from grant to landed */
#define SPREAD_URGENT_EXTRA 2 /* urgent shards may go so far beyond a window */

/* ---- neighbours ---- */

/* A node chooses a few and takes whoever chose it, so that the newest are followed as well as the oldest; a while later
 * it chooses more, if it has still few. */
#define SPREAD_NEIGHBOURS_FIRST 8
#define SPREAD_NEIGHBOURS_LATER 16
#define SPREAD_NEIGHBOURS       24
#define SPREAD_FAR              2 /* of the chosen, of other localities, when there are near ones enough */

/* How near: 2 the same locality ("zone/rack"), 1 the same zone, 0 another or not known. Equal texts without a '/' are
 * the same locality; an empty one is near everybody, so that nodes that say nothing are all alike. */
unsigned spread_nearness(const char *ours, const char *theirs);

/* Which candidate to choose as the next neighbour, or `count` when there are `most`. near: how many of the present
 * neighbours are near; neighbours: all of them. */
size_t spread_neighbour_choose(const bool *candidate_near, size_t count, size_t near,
                               size_t neighbours, size_t most, uint64_t random);

struct spread_neighbour {
    bool gone;         /* no link, or it said that it has nothing */
    bool complete;     /* has everything */
    uint64_t received; /* bytes of shards in the last period */
    uint64_t age_ms;   /* since it became a neighbour */
};
/* Whom to give up for a new one when the set is full, or `count`: who is gone; else who gave the least in the last
 * period, if it had its chance and gave under a quarter of the average. A complete one is kept. */
size_t spread_neighbour_drop(const struct spread_neighbour *neighbours, size_t count);

/* ---- patience ---- */

/* What one usually takes, now that another has taken so long, which counts an eighth. 0: not known yet. */
uint64_t spread_usual(uint64_t usual_ns, uint64_t took_ns);
/* Milliseconds to leave a source alone after its n-th failure in a row (n >= 1): doubles from `first`, at most `last`,
 * less up to a quarter by `random` so that pullers do not come back together. */
uint32_t spread_backoff_ms(uint32_t failures, uint32_t first, uint32_t last, uint64_t random);

/* How many shards of a version may be asked twice, and whether one that has been on its way for `ns` is late enough to
 * be, where one usually takes `usual_ns`. */
uint32_t spread_hedge_budget(uint32_t shards);
bool spread_hedge_due(uint64_t ns, uint64_t usual_ns);
/* Whether one that comes, but takes so much longer, is better begun anew at an idle source. */
bool spread_trickles(uint64_t ns, uint64_t usual_ns);

#endif
