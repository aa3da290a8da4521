/* Lane: a thread with its loop, its transport, the links on it and the pulls that it works on.
 *
 * Every lane has a link of its own to each supplier, so that several streams per peer run on several cores. What a lane
 * owns is touched by its thread only; other threads post. */
#ifndef P2PFS_ENGINE_LANE_H
#define P2PFS_ENGINE_LANE_H

#include <pthread.h>

#include "engine/core.h"
#include "engine/loop.h"
#include "engine/replica.h"

struct pull;
struct supplier;
struct session;

struct lane {
    struct engine *engine;
    unsigned index;
    pthread_t thread;
    struct loop *loop;
    struct transport *transport;
    struct transport *fast; /* RDMA, or NULL */
    struct loop_timer tick;
    struct loop_timer pace;     /* serve's: uploads that wait for their limit */
    struct pull *pulls;         /* utlist */
    struct supplier *suppliers; /* utlist: outgoing links, one for each peer that pulls need */
    struct session *sessions;   /* utlist: accepted links */
    uint64_t session_serial;
    uint64_t trimmed_ns;
    struct loop_task kick; /* tells sessions what has landed */
    atomic_bool kicked;
};

#define LANE_TICK_MS 50
#define LANE_TRIM_NS \
    1000000000ull /* how often lane 0 gives spare memory back, and takes the rates of peers */

extern const struct transport_events
    lane_events; /* of every transport on a lane; its arg is the lane */
int lane_open(struct engine *engine, unsigned index, struct lane **lane);
int lane_start(struct lane *lane); /* starts the thread */
/* Ends the thread; its pulls and links end on it. Until lane_close, posting is still possible and does nothing. */
void lane_stop(struct lane *lane);
void lane_close(struct lane *lane); /* NULL is harmless */

/* Runs fn(lane, arg) on the lane's thread, soon. Never fails: aborts when not even that memory is left. */
void lane_post(struct lane *lane, void (*fn)(struct lane *lane, void *arg), void *arg);
/* The same on all lanes; `arg` is a replica, with a reference for each call that the call puts. */
void lane_post_all(struct engine *engine, void (*fn)(struct lane *lane, void *replica),
                   struct replica *replica);
/* Sessions on all lanes should look for news. Cheap, any thread. */
void lane_kick_all(struct engine *engine);

#endif
