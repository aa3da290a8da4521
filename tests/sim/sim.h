/* Sim: a swarm of many nodes under a virtual clock.
 *
 * What decides is the product's own: engine/spread.c (order of shards, windows, neighbours, patience) and
 * engine/slots.c (who is granted, each shard once). What moves messages and bytes is modelled here, one lane to a node,
 * after engine/source.c, fill.c, neighbours.c (puller.c) and serve_*.c (holder.c).
 *
 * Everything comes from one seed: the same options give the same run. One thread. */
#ifndef P2PFS_TESTS_SIM_SIM_H
#define P2PFS_TESTS_SIM_SIM_H

#include "engine/slots.h"
#include "engine/spread.h"
#include "tests/sim/queue.h"

#define SIM_NS            1000000000ull
#define SIM_MS            1000000ull
#define SIM_KNOWN_MAX     128 /* engine/neighbours.h */
#define SIM_ADVICE_MAX    16  /* engine/wire.h */
#define SIM_FILES_AT_ONCE 64  /* fs/control_pull.c */
#define SIM_PEERS_MAX     16
#define SIM_RACKS_MAX     64
#define SIM_LOCALITY      24
#define SIM_TICK_NS       50000000ull  /* engine/lane.h */
#define SIM_REVIEW_NS     500000000ull /* engine/pull.c, and so on */
#define SIM_LOOK_FIRST_NS 250000000ull
#define SIM_LANE_CEILING  16
#define SIM_WAITS_MAX     (SPREAD_NEIGHBOURS * (SIM_LANE_CEILING + 1))

struct sim_options {
    uint32_t nodes; /* that pull, beside the registrar */
    uint32_t files; /* that each of them pulls at once */
    uint64_t size;  /* of each */
    uint64_t shard_size;
    double rate;       /* of a node's link, each way, bytes/s */
    uint64_t latency;  /* one way, ns */
    uint64_t message;  /* what a message costs the node that gets it, ns */
    uint32_t sessions; /* that a node takes */
    uint32_t racks;
    uint32_t others;    /* of each rack, that do not pull */
    double trunk;       /* links of a rack's nodes over that of its trunk */
    double churn;       /* part of the nodes that die during the run, */
    double stall;       /* stop answering, */
    double liars;       /* send wrong bytes */
    uint64_t spread_ns; /* over which the pulls begin */
    bool locality;      /* nodes say in which rack they are */
    uint64_t seed;
};

enum sim_event {
    /* a node's */
    SIM_BEGIN,  /* its pull */
    SIM_LOOKED, /* the catalog has answered */
    SIM_TICK,
    SIM_SENT, /* the first of its uploads has left */
    SIM_NEWS, /* who follows it hears of a shard */
    SIM_DIE,  /* its links break */
    SIM_STOP, /* silence */
    SIM_NODE_LAST = SIM_STOP,
    /* a link's */
    SIM_CONNECT,
    SIM_ATTACH,   /* at the holder, after the greeting */
    SIM_ATTACHED, /* at the puller */
    SIM_DETACH,   /* at the holder */
    SIM_DOWN,     /* at the puller: broken, or refused */
    SIM_CONN_LAST = SIM_DOWN,
    /* names' */
    SIM_PEERS, /* at the puller */
    /* a fill's */
    SIM_ASK,   /* at the holder */
    SIM_GRANT, /* at the puller, and so on */
    SIM_BUSY,
    SIM_GONE,
    SIM_LANDED,
    SIM_DONE, /* at the holder: done, or given up */
};

/* A link that carries one thing after the other, as far as what came together may pass together. */
struct sim_pipe {
    double ns_per_byte;
    uint64_t free_ns; /* when it has carried all that it was given */
    uint64_t bytes;
};

/* A node's way out: what is under way shares it equally. */
struct sim_uplink {
    double ns_per_byte;
    double
        served; /* bytes that each of the uploads has got, if it had been there from the beginning */
    uint64_t at_ns;
    struct sim_fill *uploads; /* the first to end first */
    uint32_t count;
    uint32_t generation; /* of the event that waits for the first of them */
    uint64_t bytes;
};

/* One shard asked of one holder: the puller's fill and the holder's grant. */
struct sim_fill {
    struct sim_conn *conn;
    uint32_t generation;
    uint32_t shard;
    bool puller_over;
    bool holder_over;
    bool landed; /* at the puller */
    bool promised;
    bool uploading;
    struct sim_fill *twin;
    uint64_t asked_ns;
    uint64_t granted_ns; /* at the puller; 0: it waits */
    uint64_t upload_ns;  /* when its upload began */
    double finish;       /* of its uplink's `served` */
    uint32_t retry_ms;   /* BUSY */
    uint32_t advice_count;
    uint32_t advice[4];
    struct slots_ask ask;
    struct sim_fill *prev, *next;             /* the puller's */
    struct sim_fill *grant_prev, *grant_next; /* the holder's, of this conn */
    struct sim_fill *upload_prev, *upload_next;
};

/* A link from a puller to a holder: source and session. */
struct sim_conn {
    struct sim_node *puller, *holder;
    uint32_t generation;
    uint32_t at;    /* its place among the puller's sources, */
    uint32_t known; /* and in what it knows */
    bool open;      /* not given up by the puller */
    bool attached;  /* at the puller */
    bool complete;
    bool far;
    bool following; /* at the holder */
    bool left;      /* DETACH has come there */
    bool directed;
    uint32_t fill_count; /* that neither side has forgotten */
    uint32_t advice[SIM_ADVICE_MAX];
    uint32_t advice_count;
    uint64_t refill_ns; /* complete, but was busy: then it has all again; 0: it has */
    uint64_t busy_until_ns;
    uint64_t again_ns; /* broken: when to connect again */
    uint64_t referred_ms;
    uint32_t failures;
    uint32_t refusals;
    uint32_t place; /* among the holder's followers */
    struct slots_peer slots;
    struct sim_fill *grants;
    uint8_t bitmap[]; /* what it has, as the puller knows */
};

/* PEERS. */
struct sim_names {
    struct sim_conn *conn;
    uint32_t generation;
    uint32_t count;
    struct sim_node *nodes[SIM_PEERS_MAX];
};

/* Another node, as a puller knows it. */
struct sim_neighbour {
    struct sim_node *node; /* NULL: a free place */
    struct sim_conn *conn; /* chosen */
    bool near, far;
    bool gone;
    bool attached;
    bool complete;
    uint32_t strikes;
    uint64_t quarantined_ns;
    uint64_t since_ns;
    uint64_t received, reviewed;
};

/* What a puller looks at, of each of its sources, whenever it hears of a shard. */
struct sim_source {
    uint64_t usable_ns; /* from then on; UINT64_MAX: not attached */
    uint16_t inflight;
    uint16_t waiting;
    bool complete;
    bool far;
};

/* A fill that waits, in the order of asking. */
struct sim_wait {
    struct sim_fill *fill;
    uint64_t asked_ns;
    uint32_t shard;
};

/* What all files of a machine share. */
struct sim_host {
    struct sim_uplink up;
    struct sim_pipe down;
    struct slots slots;
    uint64_t idle_ns;     /* when it has handled all messages so far */
    uint32_t files_begun; /* the pulls of that many */
    uint64_t begun_ns, progress_ns;
    uint64_t starved_ns; /* the longest time without a shard */
};

/* A machine, as far as one file goes. */
struct sim_node {
    /* Whoever hears of a shard needs what comes first here, and there are many of them. */
    bool alive;
    bool stopped;
    bool pulling;
    bool announced;
    bool liar;
    uint32_t source_count;
    uint64_t *have; /* bitmap of its shards */
    uint32_t present;
    uint32_t fetching;
    struct spread *spread;
    struct sim_fill *fills;
    struct sim_wait *waits; /* of these, for the holder to grant them; SIM_WAITS_MAX places */
    uint64_t late_ns;       /* when the first of them was asked */
    uint32_t wait_count;
    uint32_t dry; /* a bit for each source, near and not complete, that has nothing absent */
    uint64_t usual_ns;
    uint64_t passed_ns;
    uint64_t full_ns;   /* when its window was full, last */
    uint64_t refill_ns; /* of its sources, the first, or sooner */
    struct spread_window window;
    struct spread_reach reach;
    struct sim_source sources[SPREAD_NEIGHBOURS];
    struct sim_conn *conns[SPREAD_NEIGHBOURS]; /* the same ones */

    uint32_t id; /* of the machine */
    uint32_t file;
    uint32_t rack;
    struct sim_host *host;
    char locality[SIM_LOCALITY];
    uint64_t stopped_ns; /* or dead */
    /* it pulls */
    struct spread_rack circle;
    size_t known_count; /* at the last review */
    struct sim_neighbour *known;
    uint32_t attached_count;
    uint32_t hedges;
    uint32_t twice; /* shards that came though they were here */
    uint64_t review_ns, look_ns, look_wait_ns;
    uint64_t progress_ns;
    uint64_t done_ns;
    /* it holds */
    struct slots_book *book;
    struct sim_conn **followers;
    uint32_t follower_count, follower_room;
};

struct sim_counters {
    uint64_t messages; /* of all kinds; HAVE of each shard to each follower is one */
    uint64_t events;
    uint64_t busy, gone, moved, hedged, stalled, corrupt, cancelled, refused, looks;
};

struct sim {
    struct sim_options options;
    struct queue queue;
    uint64_t now_ns;
    uint64_t random;
    uint32_t shards;
    uint32_t hosts;
    struct sim_host *host;  /* the first is the registrar */
    struct sim_node *nodes; /* all of the first file, and so on */
    uint32_t count;
    uint32_t left; /* nodes that live and pull */
    struct sim_pipe trunk_out[SIM_RACKS_MAX], trunk_in[SIM_RACKS_MAX];
    struct sim_node **holders; /* as the catalog lists them: `hosts` places for each file */
    uint32_t *holder_count;
    struct sim_counters counters;
    void *pools;
};

/* world.c: what all need */
uint64_t sim_random(struct sim *sim);
void sim_random_skip(struct sim *sim, uint32_t steps); /* as if it had been called */
uint64_t sim_shard_size(const struct sim *sim, uint32_t shard);
void sim_next_file(struct sim *sim, const struct sim_node *node); /* of the same machine */
void sim_announce(struct sim *sim, struct sim_node *node);        /* the catalog lists it */
bool sim_has(const struct sim_node *node, uint32_t shard);
void sim_at(struct sim *sim, uint64_t at_ns, enum sim_event kind, void *object, uint32_t generation,
            uint32_t shard);
/* A message that reaches `to` after the latency, and when it has handled those before. */
void sim_send(struct sim *sim, struct sim_node *to, enum sim_event kind, void *object,
              uint32_t generation);
struct sim_conn *sim_conn_new(struct sim *sim);
void sim_conn_free(struct sim *sim,
                   struct sim_conn *conn); /* when both sides and all fills are over */
struct sim_fill *sim_fill_new(struct sim *sim, struct sim_conn *conn);
void sim_fill_over(struct sim *sim, struct sim_fill *fill); /* freed when both sides are over */
struct sim *sim_open(const struct sim_options *options);
void sim_close(struct sim *sim);
/* Runs to the end, or to limit_ns. */
void sim_run(struct sim *sim, uint64_t limit_ns);

/* links.c */
void links_upload(struct sim *sim, struct sim_fill *fill);
void links_stop(struct sim *sim, struct sim_fill *fill);
void links_sent(struct sim *sim, struct sim_node *node);

/* holder.c */
void holder_attach(struct sim *sim, struct sim_conn *conn);
void holder_leave(struct sim *sim, struct sim_conn *conn);
void holder_detach(struct sim *sim, struct sim_conn *conn);
void holder_ask(struct sim *sim, struct sim_fill *fill);
void holder_done(struct sim *sim, struct sim_fill *fill);
void holder_news(struct sim *sim, struct sim_node *node, uint32_t shard);
void holder_tick(struct sim *sim, struct sim_node *node);

/* puller.c */
void puller_pump(struct sim *sim, struct sim_node *node);
void puller_attached(struct sim *sim, struct sim_conn *source);
void puller_heard_soon(const struct sim_conn *source, uint32_t shard);
void puller_heard(struct sim *sim, struct sim_conn *source, uint32_t shard); /* HAVE */
void puller_down(struct sim *sim, struct sim_conn *source);
void puller_source_drop(struct sim *sim, struct sim_conn *source);
void puller_tick(struct sim *sim, struct sim_node *node);
void puller_end(struct sim *sim, struct sim_node *node);

/* fill.c */
struct sim_source *source_of(const struct sim_conn *source);
bool source_usable(const struct sim *sim, const struct sim_conn *source);
void source_usable_set(struct sim_conn *source); /* it is attached, or not; or to be left alone */
bool source_has(const struct sim_conn *source, uint32_t shard);
void fill_ask(struct sim *sim, struct sim_conn *source, uint32_t shard);
void fill_cancel(struct sim *sim, struct sim_fill *fill);
void fill_cancel_all(struct sim *sim, struct sim_conn *source);
void fill_granted(struct sim *sim, struct sim_fill *fill);
void fill_busy(struct sim *sim, struct sim_fill *fill);
void fill_gone(struct sim *sim, struct sim_fill *fill);
void fill_landed(struct sim *sim, struct sim_fill *fill);
/* What waits too long elsewhere, to idle sources among these: a bit each. */
void fill_move(struct sim *sim, struct sim_node *node, uint32_t among);
void fill_tick(struct sim *sim, struct sim_node *node);

/* meet.c */
void meet_connect(struct sim *sim, struct sim_conn *source);
void meet_hear(struct sim *sim, struct sim_node *node, struct sim_node *other, bool chose_us);
void meet_named(struct sim *sim, struct sim_names *names); /* takes them */
void meet_look(struct sim *sim, struct sim_node *node);
void meet_looked(struct sim *sim, struct sim_node *node);
void meet_review(struct sim *sim, struct sim_node *node);

#endif
