/* One shard asked of one source: after engine/fill.c and the beginning of engine/source.c. */
#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "tests/sim/sim.h"

#define SOURCE_AGAIN_FIRST_MS 100
#define SOURCE_AGAIN_LAST_MS  30000
#define FILL_MOVE_NS          100000000ull
#define FILL_STALL_NS         1500000000ull
#define FILL_LEFT_NS          5000000000ull
#define FILL_AGAIN_NS         4000000000ull
#define QUARANTINE_FIRST_MS   30000 /* engine/peers.c */
#define QUARANTINE_LAST_MS    600000

/* ---- sources ---- */

static struct sim_neighbour *neighbour_of(const struct sim_conn *source)
{
    return &source->puller->known[source->known];
}

struct sim_source *source_of(const struct sim_conn *source)
{
    return &source->puller->sources[source->at];
}

bool source_usable(const struct sim *sim, const struct sim_conn *source)
{
    return sim->now_ns >= source_of(source)->usable_ns;
}

void source_usable_set(struct sim_conn *source)
{
    uint64_t quarantined = neighbour_of(source)->quarantined_ns;
    uint64_t busy = source->busy_until_ns;
    source_of(source)->usable_ns = !source->attached    ? UINT64_MAX
                                   : busy > quarantined ? busy
                                                        : quarantined;
}

bool source_has(const struct sim_conn *source, uint32_t shard)
{
    return source->bitmap[shard / 8] >> (shard % 8) & 1;
}

static void source_leave(struct sim_conn *source, uint64_t until_ns)
{
    source->busy_until_ns = until_ns;
    source_usable_set(source);
}

static void source_blame(struct sim *sim, struct sim_conn *source)
{
    uint32_t ms = spread_backoff_ms(++source->failures, SOURCE_AGAIN_FIRST_MS, SOURCE_AGAIN_LAST_MS,
                                    sim_random(sim));
    source_leave(source, sim->now_ns + ms * SIM_MS);
}

static void source_strike(struct sim *sim, struct sim_conn *source)
{
    struct sim_neighbour *neighbour = neighbour_of(source);
    uint32_t ms = spread_backoff_ms(++neighbour->strikes, QUARANTINE_FIRST_MS, QUARANTINE_LAST_MS,
                                    sim_random(sim));
    neighbour->quarantined_ns = sim->now_ns + ms * SIM_MS;
    source_usable_set(source);
}

/* ---- begin and end ---- */

static void shard_put(struct sim_node *node, uint32_t shard)
{
    spread_put(node->spread, shard);
    node->dry = 0;
}

static void wait_enter(struct sim_fill *fill)
{
    struct sim_node *node = fill->conn->puller;
    if (node->wait_count == SIM_WAITS_MAX) {
        abort();
    }
    node->waits[node->wait_count++] =
        (struct sim_wait){.fill = fill, .asked_ns = fill->asked_ns, .shard = fill->shard};
    node->late_ns = node->waits[0].asked_ns;
    source_of(fill->conn)->waiting++;
}

static void wait_leave(struct sim_fill *fill)
{
    struct sim_node *node = fill->conn->puller;
    uint32_t i = 0;
    while (node->waits[i].fill != fill) {
        i++;
    }
    node->wait_count--;
    memmove(&node->waits[i], &node->waits[i + 1], (node->wait_count - i) * sizeof *node->waits);
    node->late_ns = node->waits[0].asked_ns;
    source_of(fill->conn)->waiting--;
}

static void fill_ask_as(struct sim *sim, struct sim_conn *source, uint32_t shard,
                        struct sim_fill *twin)
{
    struct sim_fill *fill = sim_fill_new(sim, source);
    fill->shard = shard;
    fill->asked_ns = sim->now_ns;
    fill->twin = twin;
    if (twin) {
        twin->twin = fill;
    }
    DL_APPEND(source->puller->fills, fill);
    wait_enter(fill);
    source_of(source)->inflight++;
    sim_send(sim, source->holder, SIM_ASK, fill, fill->generation);
}

void fill_ask(struct sim *sim, struct sim_conn *source, uint32_t shard)
{
    fill_ask_as(sim, source, shard, NULL);
}

/* The puller has done with it. */
static void fill_free(struct sim *sim, struct sim_fill *fill)
{
    struct sim_conn *source = fill->conn;
    struct sim_node *node = source->puller;
    DL_DELETE(node->fills, fill);
    source_of(source)->inflight--;
    if (fill->granted_ns) {
        node->fetching--;
    } else {
        wait_leave(fill);
    }
    if (fill->twin) {
        fill->twin->twin = NULL;
        fill->twin = NULL;
    }
    fill->puller_over = true;
    if (!fill->holder_over) {
        sim_send(sim, source->holder, SIM_DONE, fill, fill->generation);
    }
    sim_fill_over(sim, fill);
}

void fill_cancel(struct sim *sim, struct sim_fill *fill)
{
    sim->counters.cancelled += fill->granted_ns != 0;
    fill_free(sim, fill);
}

void fill_cancel_all(struct sim *sim, struct sim_conn *source)
{
    struct sim_node *node = source->puller;
    struct sim_fill *fill;
    struct sim_fill *next;
    DL_FOREACH_SAFE(node->fills, fill, next) {
        if (fill->conn != source) {
            continue;
        }
        if (!fill->twin) {
            shard_put(node, fill->shard);
        }
        fill_cancel(sim, fill);
    }
}

/* ---- what the holder says ---- */

static bool void_of(const struct sim_fill *fill)
{
    const struct sim_node *node = fill->conn->puller;
    return fill->puller_over || !node->alive || node->stopped;
}

void fill_granted(struct sim *sim, struct sim_fill *fill)
{
    if (void_of(fill) || fill->granted_ns) {
        return;
    }
    fill->granted_ns = sim->now_ns;
    wait_leave(fill);
    fill->conn->puller->fetching++;
}

void fill_busy(struct sim *sim, struct sim_fill *fill)
{
    struct sim_conn *source = fill->conn;
    struct sim_node *node = source->puller;
    if (void_of(fill)) {
        return;
    }
    uint64_t until = sim->now_ns + fill->retry_ms * SIM_MS;
    if (!source->complete) {
        source_leave(source, until);
    } else {
        source->bitmap[fill->shard / 8] &= (uint8_t)~(1u << (fill->shard % 8));
        if (!source->refill_ns || until < source->refill_ns) {
            source->refill_ns = until;
        }
        node->refill_ns = until < node->refill_ns ? until : node->refill_ns;
        source->advice_count = fill->advice_count;
        for (uint32_t i = 0; i < fill->advice_count; i++) {
            source->advice[i] = fill->advice[i];
        }
    }
    if (!fill->twin) {
        shard_put(node, fill->shard);
    }
    fill_free(sim, fill);
    puller_pump(sim, node);
}

void fill_gone(struct sim *sim, struct sim_fill *fill)
{
    struct sim_conn *source = fill->conn;
    struct sim_node *node = source->puller;
    if (void_of(fill)) {
        return;
    }
    sim->counters.gone++;
    source_leave(source, sim->now_ns + SOURCE_AGAIN_FIRST_MS * SIM_MS);
    if (!fill->twin) {
        shard_put(node, fill->shard);
    }
    fill_free(sim, fill);
    puller_pump(sim, node);
}

static void shard_settle(struct sim *sim, struct sim_node *node, uint32_t shard)
{
    struct sim_host *host = node->host;
    uint64_t still = sim->now_ns - host->progress_ns;
    host->starved_ns = still > host->starved_ns ? still : host->starved_ns;
    node->progress_ns = host->progress_ns = sim->now_ns;
    node->twice += sim_has(node, shard);
    spread_land(node->spread, shard);
    node->have[shard / 64] |= 1ull << (shard % 64);
    node->present++;
    if (!node->announced) {
        sim_announce(sim, node);
    }
    sim_at(sim, sim->now_ns + sim->options.latency, SIM_NEWS, node, 0, shard);
}

void fill_landed(struct sim *sim, struct sim_fill *fill)
{
    struct sim_conn *source = fill->conn;
    struct sim_node *node = source->puller;
    uint32_t shard = fill->shard;
    if (void_of(fill)) {
        return;
    }
    fill_granted(sim, fill); /* the bytes were quicker than the message */
    fill->landed = true;
    if (source->holder->liar) {
        sim->counters.corrupt++;
        source_strike(sim, source);
        if (!fill->twin) {
            shard_put(node, shard);
        }
    } else {
        uint64_t took = sim->now_ns - fill->granted_ns;
        spread_window_took(&node->window, took);
        node->usual_ns = spread_usual(node->usual_ns, took);
        source->failures = 0;
        neighbour_of(source)->strikes = 0;
        neighbour_of(source)->received += sim_shard_size(sim, shard);
        if (fill->twin) {
            fill_cancel(sim, fill->twin);
        }
        if (!source->far) {
            node->passed_ns = spread_usual(node->passed_ns, sim->now_ns - fill->asked_ns);
            spread_reach_near(&node->reach);
        }
        shard_settle(sim, node, shard);
    }
    fill_free(sim, fill);
    if (node->present == sim->shards) {
        node->done_ns = sim->now_ns;
        sim->left--;
        puller_end(sim, node);
        sim_next_file(sim, node);
    } else {
        puller_pump(sim, node);
    }
}

/* ---- elsewhere ---- */

static void fill_move_to(struct sim *sim, struct sim_conn *source)
{
    const struct sim_node *node = source->puller;
    for (uint32_t i = 0; i < node->wait_count; i++) {
        const struct sim_wait *wait = &node->waits[i];
        if (sim->now_ns - wait->asked_ns < FILL_MOVE_NS) {
            break;
        }
        if (source_has(source, wait->shard) && !wait->fill->twin) {
            uint32_t shard = wait->shard;
            sim->counters.moved++;
            fill_cancel(sim, wait->fill);
            fill_ask(sim, source, shard);
            return;
        }
    }
}

void fill_move(struct sim *sim, struct sim_node *node, uint32_t among)
{
    for (; among; among &= among - 1) {
        uint32_t i = (uint32_t)__builtin_ctz(among);
        if (!node->wait_count || sim->now_ns - node->late_ns < FILL_MOVE_NS) {
            return;
        }
        if (node->sources[i].inflight == 0 && !node->sources[i].far) {
            fill_move_to(sim, node->conns[i]);
        }
    }
}

/* The idlest other source that has the shard. */
static struct sim_conn *source_other(const struct sim *sim, const struct sim_fill *fill)
{
    struct sim_node *node = fill->conn->puller;
    struct sim_conn *best = NULL;
    for (uint32_t i = 0; i < node->source_count; i++) {
        struct sim_conn *source = node->conns[i];
        if (source != fill->conn && source_usable(sim, source) && source_has(source, fill->shard) &&
            (!best || source_of(source)->inflight < source_of(best)->inflight)) {
            best = source;
        }
    }
    return best;
}

/* A shard comes as a whole here, so the last sign of it is that it was granted; a node that lives goes on sending. */
static bool fill_stalled(struct sim *sim, struct sim_fill *fill)
{
    const struct sim_node *holder = fill->conn->holder;
    bool silent = holder->stopped && sim->now_ns - holder->stopped_ns > FILL_STALL_NS;
    uint64_t since = fill->granted_ns ? fill->granted_ns : fill->asked_ns;
    if (holder->stopped && holder->stopped_ns > since) {
        since = holder->stopped_ns;
    }
    uint64_t still = sim->now_ns - since;
    if (!holder->stopped || !silent || still < FILL_STALL_NS) {
        return false;
    }
    bool other = fill->twin || source_other(sim, fill);
    if (!other && still < FILL_AGAIN_NS) {
        return false;
    }
    struct sim_conn *source = fill->conn;
    sim->counters.stalled++;
    source_blame(sim, source);
    if (other) {
        source_leave(source, sim->now_ns + FILL_LEFT_NS * source->failures);
    }
    if (!fill->twin) {
        shard_put(source->puller, fill->shard);
    }
    fill_cancel(sim, fill);
    return true;
}

static void fill_hedge(struct sim *sim, struct sim_fill *fill)
{
    struct sim_node *node = fill->conn->puller;
    if (fill->twin || node->hedges >= spread_hedge_budget(sim->shards) ||
        !spread_hedge_due(sim->now_ns - fill->asked_ns, node->usual_ns) ||
        spread_absent(node->spread) > 0) {
        return;
    }
    struct sim_conn *other = source_other(sim, fill);
    if (other && source_of(other)->inflight == 0) {
        node->hedges++;
        sim->counters.hedged++;
        fill_ask_as(sim, other, fill->shard, fill);
    }
}

void fill_tick(struct sim *sim, struct sim_node *node)
{
    struct sim_fill *fill;
    struct sim_fill *next;
    DL_FOREACH_SAFE(node->fills, fill, next) {
        if (!fill_stalled(sim, fill)) {
            fill_hedge(sim, fill);
        }
    }
}
