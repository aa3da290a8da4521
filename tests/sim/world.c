#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/sim/sim.h"

/* ---- chance, time, messages ---- */

#define RANDOM_STEP 0x9e3779b97f4a7c15u

void sim_random_skip(struct sim *sim, uint32_t steps)
{
    sim->random += steps * RANDOM_STEP;
}

uint64_t sim_random(struct sim *sim) /* splitmix64 (S. Vigna) */
{
    uint64_t z = sim->random += RANDOM_STEP;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static uint64_t random_below(struct sim *sim, double most)
{
    return (uint64_t)((double)(sim_random(sim) >> 11) / 9007199254740992.0 * most);
}

uint64_t sim_shard_size(const struct sim *sim, uint32_t shard)
{
    uint64_t size = sim->options.shard_size;
    return shard + 1 < sim->shards ? size : sim->options.size - size * (sim->shards - 1);
}

void sim_next_file(struct sim *sim, const struct sim_node *node)
{
    if (node->host->files_begun < sim->options.files) {
        uint32_t file = node->host->files_begun++;
        sim_at(sim, sim->now_ns, SIM_BEGIN, &sim->nodes[file * sim->hosts + node->id], 0, 0);
    }
}

void sim_announce(struct sim *sim, struct sim_node *node)
{
    node->announced = true;
    sim->holders[(size_t)node->file * sim->hosts + sim->holder_count[node->file]++] = node;
}

bool sim_has(const struct sim_node *node, uint32_t shard)
{
    return node->have[shard / 64] >> (shard % 64) & 1;
}

void sim_at(struct sim *sim, uint64_t at_ns, enum sim_event kind, void *object, uint32_t generation,
            uint32_t shard)
{
    struct event event = {.at_ns = at_ns,
                          .object = object,
                          .generation = generation,
                          .kind = (uint16_t)kind,
                          .shard = shard};
    queue_put(&sim->queue, &event);
}

void sim_send(struct sim *sim, struct sim_node *to, enum sim_event kind, void *object,
              uint32_t generation)
{
    uint64_t at = sim->now_ns + sim->options.latency;
    uint64_t *idle_ns = &to->host->idle_ns;
    at = (at > *idle_ns ? at : *idle_ns) + sim->options.message;
    *idle_ns = at;
    sim->counters.messages++;
    sim_at(sim, at, kind, object, generation, 0);
}

/* ---- links and fills: kept for reuse, so that an event can always look at the generation of what it is about ---- */

struct pool {
    struct sim_conn **conns;
    size_t conn_count, conn_room;
    struct sim_fill **fills;
    size_t fill_count, fill_room;
    struct slab {
        struct slab *next;
    } *slabs;
};

static void *slab_new(struct pool *pool, size_t size)
{
    struct slab *slab = calloc(1, sizeof *slab + 16 + size);
    if (!slab) {
        abort();
    }
    slab->next = pool->slabs;
    pool->slabs = slab;
    return (char *)slab + 16;
}

static void *room_make(void *items, size_t count, size_t *room)
{
    if (count < *room) {
        return items;
    }
    *room = *room ? *room * 2 : 1024;
    items = reallocarray(items, *room, sizeof(void *));
    if (!items) {
        abort();
    }
    return items;
}

struct sim_conn *sim_conn_new(struct sim *sim)
{
    struct pool *pool = sim->pools;
    size_t bytes = SPREAD_BITMAP_BYTES(sim->shards);
    if (pool->conn_count == 0) {
        return slab_new(pool, sizeof(struct sim_conn) + bytes);
    }
    struct sim_conn *conn = pool->conns[--pool->conn_count];
    uint32_t generation = conn->generation;
    *conn = (struct sim_conn){.generation = generation};
    memset(conn->bitmap, 0, bytes);
    return conn;
}

void sim_conn_free(struct sim *sim, struct sim_conn *conn)
{
    if (conn->open || !conn->left || conn->fill_count) {
        return;
    }
    struct pool *pool = sim->pools;
    conn->generation++;
    pool->conns = room_make(pool->conns, pool->conn_count, &pool->conn_room);
    pool->conns[pool->conn_count++] = conn;
}

struct sim_fill *sim_fill_new(struct sim *sim, struct sim_conn *conn)
{
    struct pool *pool = sim->pools;
    struct sim_fill *fill = pool->fill_count ? pool->fills[--pool->fill_count]
                                             : slab_new(pool, sizeof(struct sim_fill));
    uint32_t generation = fill->generation;
    *fill = (struct sim_fill){.generation = generation, .conn = conn};
    conn->fill_count++;
    return fill;
}

void sim_fill_over(struct sim *sim, struct sim_fill *fill)
{
    if (!fill->puller_over || !fill->holder_over) {
        return;
    }
    struct pool *pool = sim->pools;
    struct sim_conn *conn = fill->conn;
    fill->generation++;
    pool->fills = room_make(pool->fills, pool->fill_count, &pool->fill_room);
    pool->fills[pool->fill_count++] = fill;
    conn->fill_count--;
    sim_conn_free(sim, conn);
}

/* ---- what befalls nodes ---- */

static void uploads_freeze(struct sim *sim, struct sim_node *node)
{
    while (node->host->up.uploads) {
        links_stop(sim, node->host->up.uploads);
    }
    for (struct sim_fill *fill = node->fills; fill; fill = fill->next) {
        links_stop(sim, fill);
    }
}

static void node_left(struct sim *sim, struct sim_node *node)
{
    if (node->spread) {
        sim->left--;
    }
    struct sim_node **holders = sim->holders + (size_t)node->file * sim->hosts;
    uint32_t *count = &sim->holder_count[node->file];
    for (uint32_t i = 0; i < *count; i++) { /* its lease ends; sooner than it would */
        if (holders[i] == node) {
            holders[i] = holders[--*count];
        }
    }
}

static void node_stop(struct sim *sim, struct sim_node *node)
{
    uploads_freeze(sim, node);
    node->stopped = true;
    node->stopped_ns = sim->now_ns;
    node_left(sim, node);
}

static void node_die(struct sim *sim, struct sim_node *node)
{
    uploads_freeze(sim, node);
    node->alive = false;
    node->stopped_ns = sim->now_ns;
    node_left(sim, node);
    while (node->follower_count) {
        struct sim_conn *conn = node->followers[0];
        holder_leave(sim, conn);
        sim_send(sim, conn->puller, SIM_DOWN, conn, conn->generation);
    }
    if (node->spread) {
        puller_end(sim, node);
    }
}

/* ---- the world ---- */

static void node_init(struct sim *sim, uint32_t file, uint32_t id)
{
    const struct sim_options *o = &sim->options;
    struct sim_node *node = &sim->nodes[file * sim->hosts + id];
    node->id = id;
    node->file = file;
    node->host = &sim->host[id];
    node->rack = id % o->racks;
    if (o->locality) {
        snprintf(node->locality, sizeof node->locality, "zone/rack%u", node->rack);
    }
    node->alive = true;
    node->have = calloc(sim->shards / 64 + 1, sizeof *node->have);
    if (!node->have) {
        abort();
    }
    if (id == 0) {
        for (uint32_t k = 0; k < sim->shards; k++) {
            node->have[k / 64] |= 1ull << (k % 64);
        }
        node->present = sim->shards;
        sim_announce(sim, node);
        sim_at(sim, SIM_TICK_NS, SIM_TICK, node, 0, 0);
        return;
    }
    node->known = calloc(SIM_KNOWN_MAX, sizeof *node->known);
    node->waits = calloc(SIM_WAITS_MAX, sizeof *node->waits);
    node->refill_ns = UINT64_MAX;
    if (!node->known || !node->waits || spread_open(sim->shards, &node->spread) < 0) {
        abort();
    }
    node->window = spread_window_new(spread_width(sim->shards), SIM_LANE_CEILING);
    struct sim_host *host = node->host;
    if (file == 0) {
        host->begun_ns = host->progress_ns = random_below(sim, (double)o->spread_ns);
    }
    if (file < SIM_FILES_AT_ONCE) {
        host->files_begun++;
        sim_at(sim, host->begun_ns, SIM_BEGIN, node, 0, 0);
    }
}

/* So many nodes of a kind, none of two kinds. */
static void fates_deal(struct sim *sim)
{
    const struct sim_options *o = &sim->options;
    double ideal = (double)o->size / o->rate * (double)SIM_NS;
    double parts[3] = {o->churn, o->stall, o->liars};
    uint32_t first = 1; /* the nodes are all alike, but racks take turns */
    for (int kind = 0; kind < 3; kind++) {
        uint32_t count = (uint32_t)(parts[kind] * o->nodes + 0.5);
        for (uint32_t i = 0; i < count && first + i < sim->hosts; i++) {
            struct sim_node *node = &sim->nodes[first + i];
            if (kind == 2) {
                node->liar = true;
            } else {
                sim_at(sim, random_below(sim, ideal), kind == 0 ? SIM_DIE : SIM_STOP, node, 0, 0);
            }
        }
        first += count;
    }
}

struct sim *sim_open(const struct sim_options *options)
{
    struct sim *sim = calloc(1, sizeof *sim);
    if (!sim) {
        abort();
    }
    sim->options = *options;
    sim->random = options->seed;
    sim->shards = (uint32_t)((options->size + options->shard_size - 1) / options->shard_size);
    sim->hosts = options->nodes + 1;
    sim->count = sim->hosts * options->files;
    sim->left = options->nodes * options->files;
    sim->pools = calloc(1, sizeof(struct pool));
    sim->host = calloc(sim->hosts, sizeof *sim->host);
    sim->nodes = calloc(sim->count, sizeof *sim->nodes);
    sim->holder_count = calloc(options->files, sizeof *sim->holder_count);
    sim->holders = calloc(sim->count, sizeof(struct sim_node *));
    if (!sim->pools || !sim->host || !sim->nodes || !sim->holders || !sim->holder_count) {
        abort();
    }
    double trunk_rate = options->rate * ((double)sim->hosts / options->racks) / options->trunk;
    for (uint32_t i = 0; i < options->racks; i++) {
        sim->trunk_out[i].ns_per_byte = sim->trunk_in[i].ns_per_byte = (double)SIM_NS / trunk_rate;
    }
    for (uint32_t i = 0; i < sim->hosts; i++) {
        sim->host[i].up.ns_per_byte = sim->host[i].down.ns_per_byte =
            (double)SIM_NS / options->rate;
        sim->host[i].slots = slots_new();
    }
    for (uint32_t i = 0; i < sim->count; i++) {
        node_init(sim, i / sim->hosts, i % sim->hosts);
    }
    fates_deal(sim);
    return sim;
}

void sim_close(struct sim *sim)
{
    struct pool *pool = sim->pools;
    for (uint32_t i = 0; i < sim->count; i++) {
        spread_close(sim->nodes[i].spread);
        slots_book_close(sim->nodes[i].book);
        free(sim->nodes[i].have);
        free(sim->nodes[i].known);
        free(sim->nodes[i].waits);
        free(sim->nodes[i].followers);
    }
    while (pool->slabs) {
        struct slab *slab = pool->slabs;
        pool->slabs = slab->next;
        free(slab);
    }
    free(pool->conns);
    free(pool->fills);
    free(pool);
    queue_clear(&sim->queue);
    free(sim->host);
    free(sim->nodes);
    free(sim->holder_count);
    free(sim->holders);
    free(sim);
}

/* ---- events ---- */

static void node_begin(struct sim *sim, struct sim_node *node)
{
    node->pulling = true;
    node->progress_ns = sim->now_ns;
    node->review_ns = sim->now_ns + SIM_REVIEW_NS;
    node->look_wait_ns = SIM_LOOK_FIRST_NS;
    node->look_ns = sim->now_ns + SIM_LOOK_FIRST_NS;
    meet_look(sim, node);
    sim_at(sim, sim->now_ns + SIM_TICK_NS, SIM_TICK, node, 0, 0);
}

static void node_event(struct sim *sim, const struct event *event)
{
    struct sim_node *node = event->object;
    if (!node->alive || node->stopped) {
        return;
    }
    switch ((enum sim_event)event->kind) {
    case SIM_BEGIN:
        node_begin(sim, node);
        break;
    case SIM_LOOKED:
        meet_looked(sim, node);
        break;
    case SIM_TICK:
        holder_tick(sim, node);
        if (node->pulling) {
            puller_tick(sim, node);
        }
        if (sim->left) {
            sim_at(sim, sim->now_ns + SIM_TICK_NS, SIM_TICK, node, 0, 0);
        }
        break;
    case SIM_SENT:
        if (event->generation == node->host->up.generation) {
            links_sent(sim, node);
        }
        break;
    case SIM_NEWS:
        holder_news(sim, node, event->shard);
        break;
    case SIM_DIE:
        node_die(sim, node);
        break;
    case SIM_STOP:
        node_stop(sim, node);
        break;
    default:
        abort();
    }
}

static void conn_event(struct sim *sim, const struct event *event)
{
    struct sim_conn *conn = event->object;
    if (event->generation != conn->generation) {
        return;
    }
    switch ((enum sim_event)event->kind) {
    case SIM_CONNECT:
        sim_send(sim, conn->holder, SIM_ATTACH, conn, conn->generation);
        break;
    case SIM_ATTACH:
        holder_attach(sim, conn);
        break;
    case SIM_DETACH:
        holder_detach(sim, conn);
        break;
    case SIM_ATTACHED:
        puller_attached(sim, conn);
        break;
    default: /* SIM_DOWN */
        puller_down(sim, conn);
        break;
    }
}

static void fill_event(struct sim *sim, const struct event *event)
{
    struct sim_fill *fill = event->object;
    if (event->generation != fill->generation) {
        return;
    }
    switch ((enum sim_event)event->kind) {
    case SIM_ASK:
        holder_ask(sim, fill);
        break;
    case SIM_DONE:
        holder_done(sim, fill);
        break;
    case SIM_GRANT:
        fill_granted(sim, fill);
        break;
    case SIM_BUSY:
        fill_busy(sim, fill);
        break;
    case SIM_GONE:
        fill_gone(sim, fill);
        break;
    default: /* SIM_LANDED */
        fill_landed(sim, fill);
        break;
    }
}

void sim_run(struct sim *sim, uint64_t limit_ns)
{
    struct event event;
    while (sim->left && queue_take(&sim->queue, &event) && event.at_ns <= limit_ns) {
        sim->now_ns = event.at_ns;
        sim->counters.events++;
        if (event.kind <= SIM_NODE_LAST) {
            node_event(sim, &event);
        } else if (event.kind <= SIM_CONN_LAST) {
            conn_event(sim, &event);
        } else if (event.kind == SIM_PEERS) {
            meet_named(sim, event.object);
        } else {
            fill_event(sim, &event);
        }
    }
}
