#include "engine/neighbours.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "meta/base/util.h"

#define NEIGHBOURS_ALL_LANES_MAX 2 /* so many neighbours, and no more, get a link on each lane */
#define NEIGHBOURS_CONNECT_MS    4000
#define NEIGHBOURS_RACK_MS       2000 /* how often the nodes of this locality are looked up */

struct neighbours {
    struct neighbour *list;
    size_t count;
    size_t reviewed;                   /* the count at the last review */
    char locality[MODEL_NODE_MAX + 1]; /* this node's */
    struct spread_rack rack;
    uint64_t rack_ms; /* when it was drawn of the catalog; 0: not yet */
};

/* All nodes of this locality, whether they pull or not. */
static void rack_draw_all(struct replica *replica, uint64_t now_ms)
{
    struct neighbours *n = replica->neighbours;
    const struct engine_config *config = &replica->engine->config;
    util_autofree struct model_node *nodes = NULL;
    size_t count;
    if (!n->locality[0] || (n->rack_ms && now_ms - n->rack_ms < NEIGHBOURS_RACK_MS) ||
        catalog_nodes(config->catalog, &nodes, &count) < 0) {
        return;
    }
    util_autofree uint64_t *others = calloc(count + 1, sizeof *others);
    size_t near = 0;
    for (size_t i = 0; others && i < count; i++) {
        if (strcmp(nodes[i].locality, n->locality) == 0 &&
            strcmp(nodes[i].name, config->node) != 0) {
            others[near++] = spread_rack_place(nodes[i].name, nodes[i].boot);
        }
    }
    if (others) {
        memcpy(&n->rack.salt, replica->version.id.bytes, sizeof n->rack.salt);
        spread_rack_set(&n->rack, spread_rack_place(config->node, config->boot), others, near);
        n->rack_ms = now_ms;
    }
}

/* Those of this locality that pull. */
static void rack_draw_pullers(struct replica *replica)
{
    struct neighbours *n = replica->neighbours;
    const struct engine_config *config = &replica->engine->config;
    uint64_t others[SPREAD_RACK_FEW];
    size_t near = 0;
    const struct neighbour *neighbour;
    DL_FOREACH(n->list, neighbour) {
        if (!neighbour->gone && !neighbour->complete &&
            strcmp(neighbour->node.locality, n->locality) == 0) {
            others[near++] = spread_rack_place(neighbour->node.name, neighbour->node.boot);
        }
    }
    spread_rack_set(&n->rack, spread_rack_place(config->node, config->boot), others, near);
    n->rack_ms = 1; /* as soon as that changes, the catalog is asked */
}

int neighbours_open(struct replica *replica)
{
    if (replica->neighbours) {
        return 0;
    }
    struct neighbours *n = calloc(1, sizeof *n);
    if (!n) {
        return -ENOMEM;
    }
    const struct engine_config *config = &replica->engine->config;
    struct model_node self;
    if (catalog_node(config->catalog, config->node, &self) == 0) {
        snprintf(n->locality, sizeof n->locality, "%s", self.locality);
    }
    replica->neighbours = n;
    rack_draw_all(replica, util_now_ms());
    return 0;
}

void neighbours_close(struct replica *replica)
{
    struct neighbours *n = replica->neighbours;
    if (!n) {
        return;
    }
    struct neighbour *neighbour;
    struct neighbour *next;
    DL_FOREACH_SAFE(n->list, neighbour, next) {
        free(neighbour);
    }
    free(n);
    replica->neighbours = NULL;
}

struct neighbour *neighbours_list(const struct replica *replica)
{
    return replica->neighbours ? replica->neighbours->list : NULL;
}

const struct spread_rack *neighbours_rack(const struct replica *replica)
{
    const struct neighbours *n = replica->neighbours;
    return n && n->rack_ms ? &n->rack : NULL;
}

struct neighbour *neighbours_find(const struct replica *replica, const char *node, uint64_t boot)
{
    struct neighbour *neighbour;
    DL_FOREACH(neighbours_list(replica), neighbour) {
        if (neighbour->node.boot == boot && strcmp(neighbour->node.name, node) == 0) {
            return neighbour;
        }
    }
    return NULL;
}

static void neighbour_forget(struct neighbours *n, struct neighbour *neighbour)
{
    /* NOLINTNEXTLINE(clang-analyzer-core.NullDereference): it is in the list, so the list is not empty */
    DL_DELETE(n->list, neighbour);
    n->count--;
    free(neighbour);
}

/* One of those that are not in use makes room for a newcomer. */
static bool room_make(struct neighbours *n)
{
    if (n->count < NEIGHBOURS_KNOWN_MAX) {
        return true;
    }
    size_t skip = util_random_u64() % (NEIGHBOURS_KNOWN_MAX / 2);
    struct neighbour *neighbour;
    DL_FOREACH(n->list, neighbour) {
        if (!neighbour->chosen && !neighbour->attached && skip-- == 0) {
            neighbour_forget(n, neighbour);
            return true;
        }
    }
    return false;
}

void neighbours_learn(struct replica *replica, const struct model_node *node)
{
    struct neighbours *n = replica->neighbours;
    struct engine *engine = replica->engine;
    if (!n || strcmp(node->name, engine->config.node) == 0) {
        return;
    }
    struct neighbour *neighbour = neighbours_find(replica, node->name, node->boot);
    if (neighbour) {
        neighbour->gone = false;
        return;
    }
    struct peer *peer = peers_get(engine->peers, node->name, node->address);
    if (!peer || !room_make(n) || !(neighbour = calloc(1, sizeof *neighbour))) {
        return; /* named again, it gets another chance */
    }
    unsigned nearness = spread_nearness(n->locality, node->locality);
    *neighbour = (struct neighbour){.node = *node,
                                    .peer = peer,
                                    .near = nearness == 2,
                                    .far = nearness < 2,
                                    .since_ms = util_now_ms()};
    DL_APPEND(n->list, neighbour);
    n->count++;
}

static void neighbour_take(struct replica *replica, struct neighbour *neighbour, size_t chosen,
                           uint64_t now_ms)
{
    neighbour->chosen = true;
    neighbour->since_ms = now_ms;
    neighbour->received = atomic_load(&neighbour->peer->received);
    neighbour->lane = chosen < NEIGHBOURS_ALL_LANES_MAX
                          ? NEIGHBOURS_ALL_LANES
                          : (uint32_t)(neighbour->node.boot % replica->engine->lane_count);
}

bool neighbours_choose(struct replica *replica, size_t most, uint64_t now_ms)
{
    struct neighbours *n = replica->neighbours;
    bool changed = false;
    for (;;) {
        struct neighbour *candidates[NEIGHBOURS_KNOWN_MAX];
        bool near[NEIGHBOURS_KNOWN_MAX];
        size_t count = 0;
        size_t chosen = 0;
        size_t chosen_near = 0;
        struct neighbour *neighbour;
        DL_FOREACH(n->list, neighbour) {
            if (neighbour->chosen) {
                chosen++;
                chosen_near += neighbour->near;
            } else if (!neighbour->gone && !peer_quarantined(neighbour->peer)) {
                near[count] = neighbour->near;
                candidates[count++] = neighbour;
            }
        }
        size_t pick =
            spread_neighbour_choose(near, count, chosen_near, chosen, most, util_random_u64());
        if (pick == count) {
            return changed;
        }
        neighbour_take(replica, candidates[pick], chosen, now_ms);
        changed = true;
    }
}

/* Its record in the catalog is this incarnation's. */
static bool node_live(const struct engine *engine, const char *name, uint64_t boot,
                      struct model_node *node)
{
    return catalog_node(engine->config.catalog, name, node) == 0 && node->boot == boot;
}

static bool worst_drop(struct neighbours *n, uint64_t now_ms)
{
    struct neighbour *chosen[SPREAD_NEIGHBOURS];
    struct spread_neighbour stats[SPREAD_NEIGHBOURS];
    size_t count = 0;
    bool others = false;
    struct neighbour *neighbour;
    DL_FOREACH(n->list, neighbour) {
        uint64_t received = atomic_load(&neighbour->peer->received);
        if (neighbour->chosen && count < SPREAD_NEIGHBOURS) {
            uint64_t age = now_ms - neighbour->since_ms;
            stats[count] = (struct spread_neighbour){.gone = !neighbour->attached &&
                                                             age > NEIGHBOURS_CONNECT_MS,
                                                     .complete = neighbour->complete,
                                                     .received = received - neighbour->received,
                                                     .age_ms = age};
            chosen[count++] = neighbour;
        } else {
            others |= !neighbour->gone && !peer_quarantined(neighbour->peer);
        }
        neighbour->received = received;
    }
    size_t drop =
        count >= SPREAD_NEIGHBOURS_LATER && others ? spread_neighbour_drop(stats, count) : count;
    if (drop == count) {
        return false;
    }
    neighbour = chosen[drop];
    neighbour->chosen = false;
    /* Behind the others, in case that it is what fails. */
    DL_DELETE(n->list, neighbour);
    DL_APPEND(n->list, neighbour);
    return true;
}

bool neighbours_review(struct replica *replica, uint64_t now_ms)
{
    struct neighbours *n = replica->neighbours;
    bool changed = false;
    struct neighbour *neighbour;
    struct neighbour *next;
    DL_FOREACH_SAFE(n->list, neighbour, next) {
        struct model_node node;
        if (neighbour->attached ||
            node_live(replica->engine, neighbour->node.name, neighbour->node.boot, &node)) {
            continue;
        }
        changed |= neighbour->chosen;
        neighbour_forget(n, neighbour);
    }
    changed |= worst_drop(n, now_ms);
    if (n->rack_ms && spread_rack_known(n->count, n->reviewed)) {
        rack_draw_pullers(replica);
    } else {
        rack_draw_all(replica, now_ms);
    }
    n->reviewed = n->count;
    return neighbours_choose(replica, SPREAD_NEIGHBOURS_LATER, now_ms) || changed;
}

/* It chose us: as long as there is a place, it is a neighbour. Lock held. */
static bool mutual_take(struct replica *replica, const struct model_node *node)
{
    struct neighbour *found = neighbours_find(replica, node->name, node->boot);
    size_t chosen = 0;
    size_t near = 0;
    const struct neighbour *neighbour;
    DL_FOREACH(neighbours_list(replica), neighbour) {
        chosen += neighbour->chosen;
        near += neighbour->chosen && neighbour->near;
    }
    if (!found || found->chosen || chosen >= SPREAD_NEIGHBOURS || peer_quarantined(found->peer)) {
        return false;
    }
    if (!found->near && near + SPREAD_FAR >= SPREAD_NEIGHBOURS_FIRST) {
        return false; /* there are near ones enough */
    }
    neighbour_take(replica, found, chosen, util_now_ms());
    return true;
}

bool neighbours_hear(struct replica *replica, const char *node, uint64_t boot, bool chose_us)
{
    struct model_node live;
    if (!node_live(replica->engine, node, boot, &live)) {
        return false;
    }
    pthread_mutex_lock(&replica->lock);
    bool changed = false;
    if (replica->neighbours && replica->pulling) {
        neighbours_learn(replica, &live);
        changed = neighbours_choose(replica, SPREAD_NEIGHBOURS_FIRST, util_now_ms());
        changed |= chose_us && mutual_take(replica, &live);
    }
    pthread_mutex_unlock(&replica->lock);
    return changed;
}
