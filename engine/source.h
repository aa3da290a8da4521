/* Source: the peers that a running pull takes shards from, on one lane: what each has, and what is asked of it next.
 * Lane thread only; which shards are to come lies in the replica (spread), under its lock. */
#ifndef P2PFS_ENGINE_SOURCE_H
#define P2PFS_ENGINE_SOURCE_H

#include "engine/lane.h"
#include "engine/replica.h"
#include "engine/supplier.h"

struct fill;
struct source;

/* One version being filled, on one lane; made and freed by pull.c. */
struct pull {
    struct lane *lane;
    struct replica *replica; /* with a reference */
    struct source *sources;
    struct fill *fills;
    struct spread_window window; /* of what is granted */
    uint32_t fetching;           /* fills that are granted */
    uint64_t full_ns;            /* when the window was full last */
    uint64_t usual_ns;           /* from grant to landed, smoothed; 0: not known yet */
    uint64_t passed_ns;          /* of its own locality: from asked to landed, likewise */
    struct spread_reach reach;   /* beyond what it goes for in other localities */
    uint32_t hedges;             /* shards asked twice so far */
    bool starving;               /* nothing has come for long, on any lane */
    uint64_t starved_ns;         /* when everybody was given another chance for that */
    uint64_t review_ns;          /* home lane: the next look at the neighbours */
    uint64_t look_ns;            /* home lane: the next look for holders */
    uint64_t look_wait_ns;
    void (*room_request)(
        struct replica *replica); /* a shard did not fit into the cache; no lock held */
    struct pull *prev, *next;
};

/* One neighbour on this lane. */
struct source {
    struct attachment attachment;
    struct pull *pull;
    uint8_t *bitmap; /* what it may be asked for */
    bool attached;
    bool
        complete; /* it has everything; gaps in the bitmap are what it did not want to give just now */
    bool far;     /* in another locality */
    bool counts; /* in the rarity; a neighbour with a link on each lane counts once */
    bool known;  /* attached, and its neighbour knows of it */
    bool dry;    /* nothing to ask of it, in this turn */
    uint32_t advice[WIRE_ADVICE_MAX]; /* shards that it would rather give */
    uint32_t advice_count;
    uint64_t refill_ns; /* when the gaps end; 0: there are none */
    uint8_t *staged;    /* its list of digests so far, until it is whole and proven */
    uint32_t staged_count;
    uint32_t inflight;    /* fills */
    uint32_t waiting;     /* of which not granted yet */
    uint32_t failures;    /* in a row */
    uint64_t progress_ns; /* any shard's byte came */
    uint64_t busy_until_ns;
    struct source *prev, *next;
};

bool source_usable(const struct source *source, uint64_t now_ns);
bool source_has(const struct source *source, uint32_t shard);
bool source_is_registrar(const struct source *source);
/* Nothing is asked before its digest can be trusted: all of them against the root, or, while the registrar has not
 * digested everything yet, its own word in the grant. No lock held. */
bool source_askable(const struct source *source);
/* It delivered; or it failed in this way, and is left alone for a while. */
void source_praise(struct source *source);
void source_blame(struct source *source, int status);
/* It answered BUSY: not this shard, for so long; but where a reader waits, or it lacks some, it is left alone. */
void source_busy(struct source *source, uint32_t shard, bool urgent, uint32_t retry_ms);

/* Asks every source for as much as it may deliver now. */
void source_pump_all(struct pull *pull);
/* Makes sources of the chosen neighbours; those that are not chosen any more go. */
void source_update(struct pull *pull);
/* Looks again at lists of digests that could not be proven yet, and at sources that did not want to give. */
void source_tick(struct pull *pull, uint64_t now_ns);
/* Cancels what is on its way and leaves every peer. */
void source_clear(struct pull *pull);

#endif
