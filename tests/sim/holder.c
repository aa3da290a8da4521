/* The side of a node that has shards: after engine/serve_follow.c and serve_grant.c. */
#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "tests/sim/sim.h"

#define GRANT_ADVICE    4
#define FOLLOW_REFER_MS 1000
#define SERVE_BUSY_MS   20
#define NEWS_AHEAD      8

static uint64_t ms_of(const struct sim *sim)
{
    return sim->now_ns / SIM_MS;
}

static uint32_t mark_of(const struct sim_conn *conn)
{
    return conn->puller->id + 1;
}

static bool serves(const struct sim_conn *conn)
{
    return conn->following && conn->holder->alive && !conn->holder->stopped;
}

/* ---- grants ---- */

static void dispatch(struct sim *sim, struct sim_node *node)
{
    struct slots_ask *ask;
    while ((ask = slots_next(&node->host->slots, sim->now_ns))) {
        struct sim_fill *fill = (struct sim_fill *)((char *)ask - offsetof(struct sim_fill, ask));
        sim_send(sim, fill->conn->puller, SIM_GRANT, fill, fill->generation);
        if (!fill->conn->puller->stopped) { /* else it does not read */
            links_upload(sim, fill);
        }
    }
}

static void grant_end(struct sim *sim, struct sim_fill *fill, bool landed)
{
    struct sim_conn *conn = fill->conn;
    struct sim_node *node = conn->holder;
    links_stop(sim, fill);
    slots_end(&node->host->slots, &fill->ask, sim->now_ns, landed);
    if (fill->promised) {
        slots_book_settle(node->book, fill->shard, mark_of(conn), ms_of(sim), landed);
    }
    DL_DELETE2(conn->grants, fill, grant_prev, grant_next);
    fill->holder_over = true;
    sim_fill_over(sim, fill);
}

/* Names others who pull, unless it has just been told. */
static void refer(struct sim *sim, struct sim_conn *conn)
{
    struct sim_node *node = conn->holder;
    uint64_t now = ms_of(sim);
    if ((conn->referred_ms && now - conn->referred_ms < FOLLOW_REFER_MS) ||
        node->follower_count < 2) {
        return;
    }
    conn->referred_ms = now ? now : 1;
    struct sim_names *names = calloc(1, sizeof *names);
    if (!names) {
        abort();
    }
    names->conn = conn;
    names->generation = conn->generation;
    uint64_t random = sim_random(sim);
    for (uint32_t i = 0; i < node->follower_count && names->count < SIM_PEERS_MAX; i++) {
        struct sim_node *other = node->followers[(random + i) % node->follower_count]->puller;
        if (other != conn->puller) {
            names->nodes[names->count++] = other;
        }
    }
    sim_send(sim, conn->puller, SIM_PEERS, names, 0);
}

static void busy(struct sim *sim, struct sim_fill *fill, uint32_t retry_ms)
{
    sim->counters.busy++;
    fill->retry_ms = retry_ms;
    fill->holder_over = true;
    sim_send(sim, fill->conn->puller, SIM_BUSY, fill, fill->generation);
    refer(sim, fill->conn);
}

/* Each shard once before one is repeated. */
static uint32_t promise(struct sim *sim, struct sim_fill *fill)
{
    struct sim_node *node = fill->conn->holder;
    uint32_t wait = 0;
    if (!fill->conn->directed) {
        return 0;
    }
    if (!node->book && slots_book_open(sim->shards, &node->book) < 0) {
        abort();
    }
    if (!fill->ask.urgent && node->follower_count > 1) {
        wait = slots_book_wait(node->book, fill->shard, mark_of(fill->conn), ms_of(sim),
                               slots_patience_ms(&node->host->slots));
    }
    if (wait) {
        fill->advice_count = slots_book_advise(node->book, fill->advice, GRANT_ADVICE);
    } else {
        slots_book_promise(node->book, fill->shard, mark_of(fill->conn), ms_of(sim));
        fill->promised = true;
    }
    return wait;
}

void holder_ask(struct sim *sim, struct sim_fill *fill)
{
    struct sim_conn *conn = fill->conn;
    struct sim_node *node = conn->holder;
    if (!serves(conn)) {
        fill->holder_over = true;
        sim_fill_over(sim, fill);
        return;
    }
    if (!sim_has(node, fill->shard)) {
        fill->holder_over = true;
        sim_send(sim, conn->puller, SIM_GONE, fill, fill->generation);
        return;
    }
    uint32_t wait = promise(sim, fill);
    if (wait) {
        busy(sim, fill, wait);
        return;
    }
    fill->ask.progress = (uint8_t)((uint64_t)conn->puller->present * 64 / sim->shards);
    fill->ask.shards = sim->shards;
    if (!slots_ask(&node->host->slots, &conn->slots, &fill->ask)) {
        if (fill->promised) {
            slots_book_settle(node->book, fill->shard, mark_of(conn), ms_of(sim), false);
        }
        busy(sim, fill, SERVE_BUSY_MS);
        return;
    }
    DL_APPEND2(conn->grants, fill, grant_prev, grant_next);
    dispatch(sim, node);
}

void holder_done(struct sim *sim, struct sim_fill *fill)
{
    struct sim_conn *conn = fill->conn;
    if (fill->holder_over || !conn->following) {
        fill->holder_over = true;
        sim_fill_over(sim, fill);
        return;
    }
    struct sim_node *node = conn->holder;
    grant_end(sim, fill, fill->landed);
    if (node->alive && !node->stopped) {
        dispatch(sim, node);
    }
}

/* ---- who follows ---- */

void holder_attach(struct sim *sim, struct sim_conn *conn)
{
    struct sim_node *node = conn->holder;
    if (node->stopped || !conn->open) {
        return; /* nobody answers; or nobody asks any more */
    }
    if (!node->alive || node->follower_count >= sim->options.sessions) {
        sim->counters.refused += node->alive;
        sim_send(sim, conn->puller, SIM_DOWN, conn, conn->generation);
        return;
    }
    if (node->follower_count == node->follower_room) {
        node->follower_room = node->follower_room ? node->follower_room * 2 : 16;
        node->followers =
            reallocarray(node->followers, node->follower_room, sizeof(struct sim_conn *));
        if (!node->followers) {
            abort();
        }
    }
    conn->place = node->follower_count;
    node->followers[node->follower_count++] = conn;
    conn->following = true;
    conn->directed = conn->complete = node->present == sim->shards;
    if (!conn->complete) {
        memcpy(conn->bitmap, node->have, SPREAD_BITMAP_BYTES(sim->shards));
    }
    sim_send(sim, conn->puller, SIM_ATTACHED, conn, conn->generation);
    refer(sim, conn);
    if (node->pulling) { /* who pulls from us while we pull may have what we lack */
        meet_hear(sim, node, conn->puller, true);
    }
}

void holder_leave(struct sim *sim, struct sim_conn *conn)
{
    struct sim_node *node = conn->holder;
    if (!conn->following) {
        return;
    }
    node->followers[conn->place] = node->followers[--node->follower_count];
    node->followers[conn->place]->place = conn->place;
    conn->following = false;
    conn->fill_count++; /* it stays until here */
    while (conn->grants) {
        grant_end(sim, conn->grants, false);
    }
    conn->fill_count--;
}

void holder_detach(struct sim *sim, struct sim_conn *conn)
{
    struct sim_node *node = conn->holder;
    holder_leave(sim, conn);
    conn->left = true;
    sim_conn_free(sim, conn);
    if (node->alive && !node->stopped) {
        dispatch(sim, node);
    }
}

void holder_news(struct sim *sim, struct sim_node *node, uint32_t shard)
{
    struct sim_conn **followers = node->followers;
    uint32_t count = node->follower_count;
    sim->counters.messages += count;
    /* Most of the time of a large swarm would go into waiting for memory here. */
    for (uint32_t i = 0; i < count + NEWS_AHEAD; i++) {
        if (i < count) {
            __builtin_prefetch(followers[i]);
        }
        if (i >= NEWS_AHEAD / 2 && i - NEWS_AHEAD / 2 < count) {
            puller_heard_soon(followers[i - NEWS_AHEAD / 2], shard);
        }
        if (i >= NEWS_AHEAD) {
            puller_heard(sim, followers[i - NEWS_AHEAD], shard);
        }
    }
}

/* What was promised to who stands still is free for others. */
static void promises_end(struct sim *sim, struct sim_conn *conn)
{
    struct sim_fill *fill;
    DL_FOREACH2(conn->grants, fill, grant_next)
    {
        if (fill->promised && (fill->ask.state == SLOTS_OVERDUE ||
                               (fill->ask.state == SLOTS_WAITING && conn->slots.overdue > 0))) {
            fill->promised = false;
            slots_book_settle(conn->holder->book, fill->shard, mark_of(conn), ms_of(sim), false);
        }
    }
}

void holder_tick(struct sim *sim, struct sim_node *node)
{
    slots_overdue(&node->host->slots, sim->now_ns);
    for (uint32_t i = 0; node->host->slots.overdue_count && i < node->follower_count; i++) {
        promises_end(sim, node->followers[i]);
    }
    dispatch(sim, node);
}
