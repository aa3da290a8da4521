/* Whom a puller knows, and whom it takes from: after engine/neighbours.c and the looks of engine/pull.c. */
#include <stdlib.h>

#include "tests/sim/sim.h"

#define LOOK_NS               2000000ull     /* what the catalog takes to answer */
#define LEASE_NS              10000000000ull /* for which a node that is gone is believed to live */
#define NEIGHBOURS_CONNECT_MS 4000

static bool node_live(const struct sim *sim, const struct sim_node *node)
{
    return (node->alive && !node->stopped) || sim->now_ns - node->stopped_ns < LEASE_NS;
}

static struct sim_neighbour *known_find(const struct sim_node *node, const struct sim_node *other)
{
    for (uint32_t i = 0; i < SIM_KNOWN_MAX; i++) {
        if (node->known[i].node == other) {
            return &node->known[i];
        }
    }
    return NULL;
}

/* ---- links ---- */

void meet_connect(struct sim *sim, struct sim_conn *source)
{
    /* SYN, SYN+ACK, HELLO, WELCOME; PROOF and ATTACH come together. */
    sim->counters.messages += 3;
    source->holder->host->idle_ns += 2 * sim->options.message;
    sim_at(sim, sim->now_ns + 4 * sim->options.latency, SIM_CONNECT, source, source->generation, 0);
}

static void source_add(struct sim *sim, struct sim_node *node, struct sim_neighbour *neighbour)
{
    struct sim_conn *source = sim_conn_new(sim);
    source->puller = node;
    source->holder = neighbour->node;
    source->known = (uint32_t)(neighbour - node->known);
    source->far = neighbour->far;
    source->open = true;
    neighbour->conn = source;
    neighbour->since_ns = sim->now_ns;
    neighbour->reviewed = neighbour->received;
    source->at = node->source_count;
    node->sources[source->at] = (struct sim_source){.usable_ns = UINT64_MAX, .far = source->far};
    node->conns[node->source_count++] = source;
    node->dry &= ~(1u << source->at);
    meet_connect(sim, source);
}

/* ---- who is known ---- */

/* A free place; or that of one that is not in use. */
static struct sim_neighbour *room_make(struct sim *sim, struct sim_node *node)
{
    struct sim_neighbour *free = known_find(node, NULL);
    if (free) {
        return free;
    }
    uint64_t skip = sim_random(sim) % (SIM_KNOWN_MAX / 2);
    for (uint32_t i = 0; i < SIM_KNOWN_MAX; i++) {
        if (!node->known[i].conn && skip-- == 0) {
            return &node->known[i];
        }
    }
    return NULL;
}

static void learn(struct sim *sim, struct sim_node *node, struct sim_node *other)
{
    if (other == node) {
        return;
    }
    struct sim_neighbour *neighbour = known_find(node, other);
    if (neighbour) {
        neighbour->gone = false;
        return;
    }
    neighbour = room_make(sim, node);
    if (neighbour) {
        unsigned nearness = spread_nearness(node->locality, other->locality);
        *neighbour =
            (struct sim_neighbour){.node = other, .near = nearness == 2, .far = nearness < 2};
    }
}

static bool candidate(const struct sim *sim, const struct sim_neighbour *neighbour)
{
    return neighbour->node && !neighbour->conn && !neighbour->gone &&
           sim->now_ns >= neighbour->quarantined_ns;
}

static void choose(struct sim *sim, struct sim_node *node, size_t most)
{
    for (;;) {
        struct sim_neighbour *candidates[SIM_KNOWN_MAX];
        bool near[SIM_KNOWN_MAX];
        size_t count = 0;
        size_t chosen_near = 0;
        for (uint32_t i = 0; i < SIM_KNOWN_MAX; i++) {
            struct sim_neighbour *neighbour = &node->known[i];
            chosen_near += neighbour->conn && neighbour->near;
            if (candidate(sim, neighbour)) {
                near[count] = neighbour->near;
                candidates[count++] = neighbour;
            }
        }
        size_t pick = spread_neighbour_choose(near, count, chosen_near, node->source_count, most,
                                              sim_random(sim));
        if (pick == count) {
            return;
        }
        source_add(sim, node, candidates[pick]);
    }
}

void meet_hear(struct sim *sim, struct sim_node *node, struct sim_node *other, bool chose_us)
{
    if (!node->pulling || !node_live(sim, other)) {
        return;
    }
    learn(sim, node, other);
    choose(sim, node, SPREAD_NEIGHBOURS_FIRST);
    struct sim_neighbour *found = chose_us ? known_find(node, other) : NULL;
    if (!found || !candidate(sim, found) || node->source_count >= SPREAD_NEIGHBOURS) {
        return;
    }
    uint32_t near = 0;
    for (uint32_t i = 0; i < node->source_count; i++) {
        near += !node->sources[i].far;
    }
    if (found->near || near + SPREAD_FAR < SPREAD_NEIGHBOURS_FIRST) {
        source_add(sim, node, found);
    }
}

void meet_named(struct sim *sim, struct sim_names *names)
{
    struct sim_conn *conn = names->conn;
    struct sim_node *node = conn->puller;
    bool hears =
        names->generation == conn->generation && conn->open && node->alive && !node->stopped;
    for (uint32_t i = 0; hears && i < names->count; i++) {
        meet_hear(sim, node, names->nodes[i], false);
    }
    free(names);
}

/* ---- the catalog ---- */

void meet_look(struct sim *sim, struct sim_node *node)
{
    sim->counters.looks++;
    sim_at(sim, sim->now_ns + LOOK_NS, SIM_LOOKED, node, 0, 0);
}

/* All nodes of the rack, as engine/neighbours.c has them of the catalog, whether they pull or not. */
static void circle_draw_all(struct sim *sim, struct sim_node *node)
{
    const struct sim_options *o = &sim->options;
    if (o->racks < 2 || !o->locality) {
        return;
    }
    uint64_t *others = calloc(sim->hosts + o->others, sizeof *others);
    if (!others) {
        abort();
    }
    size_t count = 0;
    for (uint32_t i = node->rack; i < sim->hosts; i += o->racks) {
        if (i != node->id && node_live(sim, &sim->nodes[i])) {
            others[count++] = spread_rack_place("", i);
        }
    }
    for (uint32_t i = 0; i < o->others; i++) {
        others[count++] = spread_rack_place("other", i);
    }
    spread_rack_set(&node->circle, spread_rack_place("", node->id), others, count);
    free(others);
}

/* Those of the rack that pull, or as long as they are not all known, all. */
static void circle_draw(struct sim *sim, struct sim_node *node)
{
    uint64_t others[SIM_KNOWN_MAX];
    size_t near = 0;
    size_t count = 0;
    for (uint32_t i = 0; i < SIM_KNOWN_MAX; i++) {
        const struct sim_neighbour *known = &node->known[i];
        count += known->node != NULL;
        if (known->node && known->near && !known->gone && !known->complete) {
            others[near++] = spread_rack_place("", known->node->id);
        }
    }
    if (spread_rack_known(count, node->known_count)) {
        spread_rack_set(&node->circle, spread_rack_place("", node->id), others, near);
    } else {
        circle_draw_all(sim, node);
    }
    node->known_count = count;
}

void meet_looked(struct sim *sim, struct sim_node *node)
{
    if (!node->pulling) {
        return;
    }
    if (!node->circle.place) {
        circle_draw_all(sim, node);
    }
    struct sim_node **holders = sim->holders + (size_t)node->file * sim->hosts;
    uint32_t count = sim->holder_count[node->file];
    uint32_t first = (uint32_t)(sim_random(sim) % count);
    for (uint32_t i = 0; i < count && i < SIM_KNOWN_MAX; i++) {
        learn(sim, node, holders[(first + i) % count]);
    }
    choose(sim, node, SPREAD_NEIGHBOURS_FIRST);
}

/* ---- review ---- */

static void worst_drop(struct sim *sim, struct sim_node *node)
{
    struct sim_neighbour *chosen[SPREAD_NEIGHBOURS];
    struct spread_neighbour stats[SPREAD_NEIGHBOURS];
    size_t count = 0;
    bool others = false;
    for (uint32_t i = 0; i < SIM_KNOWN_MAX; i++) {
        struct sim_neighbour *neighbour = &node->known[i];
        if (neighbour->conn && count < SPREAD_NEIGHBOURS) {
            uint64_t age_ms = (sim->now_ns - neighbour->since_ns) / SIM_MS;
            stats[count] = (struct spread_neighbour){
                .gone = !neighbour->attached && age_ms > NEIGHBOURS_CONNECT_MS,
                .complete = neighbour->complete,
                .received = neighbour->received - neighbour->reviewed,
                .age_ms = age_ms};
            chosen[count++] = neighbour;
        } else {
            others |= candidate(sim, neighbour);
        }
        neighbour->reviewed = neighbour->received;
    }
    size_t drop =
        count >= SPREAD_NEIGHBOURS_LATER && others ? spread_neighbour_drop(stats, count) : count;
    if (drop < count) {
        puller_source_drop(sim, chosen[drop]->conn);
    }
}

void meet_review(struct sim *sim, struct sim_node *node)
{
    for (uint32_t i = 0; i < SIM_KNOWN_MAX; i++) {
        struct sim_neighbour *neighbour = &node->known[i];
        if (!neighbour->node || neighbour->attached || node_live(sim, neighbour->node)) {
            continue;
        }
        if (neighbour->conn) {
            puller_source_drop(sim, neighbour->conn);
        }
        neighbour->node = NULL;
    }
    worst_drop(sim, node);
    circle_draw(sim, node);
    choose(sim, node, SPREAD_NEIGHBOURS_LATER);
}
