/* The side of a node that pulls: after engine/source.c and pull.c, with one lane. */
#include <string.h>
#include <utlist.h>

#include "tests/sim/sim.h"

#define SOURCE_WINDOW_END  (8u << 20)
#define SUPPLIER_SILENT_NS 8000000000ull
#define SUPPLIER_AGAIN_MS  100
#define SUPPLIER_LAST_MS   5000
#define PULL_QUIET_NS      500000000ull
#define PULL_LOOK_LAST_NS  5000000000ull

/* ---- asking ---- */

enum source_turn { TURN_RARE, TURN_PARTIAL, TURN_ANY, TURN_COUNT };

static uint32_t advice_take(struct sim_conn *source)
{
    while (source->advice_count) {
        uint32_t shard = source->advice[--source->advice_count];
        if (source_has(source, shard) &&
            spread_state(source->puller->spread, shard) == SPREAD_ABSENT) {
            return shard;
        }
    }
    return SPREAD_NONE;
}

static bool near_attached(const struct sim_node *node)
{
    bool near = false;
    for (uint32_t i = 0; i < node->source_count; i++) {
        near |= node->conns[i]->attached && !node->sources[i].far;
    }
    return near;
}

static uint32_t shard_take(struct sim *sim, struct sim_conn *source, enum source_turn turn)
{
    struct sim_node *node = source->puller;
    bool far = source_of(source)->far;
    const struct spread_want want = {.cursor = SPREAD_NONE, .whole = true};
    const struct spread_offer offer = {.bitmap = source->bitmap,
                                       .rarity_most = turn == TURN_RARE ? 0 : SPREAD_RARITY_ANY,
                                       .far = far,
                                       .rack = far && near_attached(node) ? &node->circle : NULL,
                                       .now_ms = sim->now_ns / SIM_MS,
                                       .steps = node->reach.steps / SPREAD_REACH_PARTS,
                                       .step_ms = spread_rack_step_ms(node->passed_ns)};
    bool urgent;
    uint32_t shard = turn == TURN_RARE ? advice_take(source) : SPREAD_NONE;
    if (shard == SPREAD_NONE) {
        shard = spread_next(node->spread, &want, &offer, sim_random(sim), &urgent);
    }
    if (shard != SPREAD_NONE) {
        spread_take(node->spread, shard);
    }
    return shard;
}

static uint32_t window_width(const struct sim *sim, const struct sim_node *node)
{
    uint32_t share = (sim->shards - node->present) / 2;
    uint32_t least = (uint32_t)(SOURCE_WINDOW_END / sim->options.shard_size);
    least = least < 2 ? 2 : least;
    share = share < least ? least : share;
    return node->window.width < share ? node->window.width : share;
}

/* Whether those of a turn are asked for more, beside who has only one to ask. */
static bool turn_wanted(const struct sim *sim, const struct sim_node *node, enum source_turn turn,
                        uint32_t width)
{
    bool wanted = node->fetching < width;
    if (turn == TURN_RARE) {
        wanted = true;
    } else if (turn == TURN_ANY) {
        wanted &= spread_hungry(sim->now_ns - node->full_ns, node->usual_ns);
    }
    return wanted;
}

static bool source_room(const struct sim_source *source, uint32_t width, uint32_t usable)
{
    uint32_t waiting = width / usable;
    return usable == 1 ? source->inflight < width : source->waiting < (waiting ? waiting : 1);
}

/* Of those whose bit is set. */
static uint32_t source_idlest(const struct sim_node *node, uint32_t among)
{
    uint32_t best = (uint32_t)__builtin_ctz(among);
    for (among &= among - 1; among; among &= among - 1) {
        uint32_t i = (uint32_t)__builtin_ctz(among);
        best = node->sources[i].inflight < node->sources[best].inflight ? i : best;
    }
    return best;
}

/* among: a bit for each source that may be asked; usable: how many may be in all turns. Chance goes on for those that
 * are known to be dry as for all others, so that a run does not show what is remembered of them. */
static void sources_turn(struct sim *sim, struct sim_node *node, enum source_turn turn,
                         uint32_t among, uint32_t width, uint32_t usable)
{
    for (uint32_t mask = among; mask; mask &= mask - 1) {
        uint32_t i = (uint32_t)__builtin_ctz(mask);
        among &= ~((uint32_t)!source_room(&node->sources[i], width, usable) << i);
    }
    uint32_t dry = turn == TURN_PARTIAL ? node->dry : 0;
    while (among & ~dry) {
        uint32_t i = source_idlest(node, among);
        uint32_t shard = SPREAD_NONE;
        if (dry >> i & 1) {
            sim_random_skip(sim, 1);
        } else {
            shard = shard_take(sim, node->conns[i], turn);
        }
        if (shard != SPREAD_NONE) {
            fill_ask(sim, node->conns[i], shard);
            among &= ~((uint32_t)!source_room(&node->sources[i], width, usable) << i);
        } else {
            among &= ~(1u << i);
            node->dry |= (uint32_t)(turn == TURN_PARTIAL && !node->sources[i].far) << i;
        }
    }
    sim_random_skip(sim, (uint32_t)__builtin_popcount(among));
}

static void bitmap_fill(const struct sim *sim, struct sim_conn *source)
{
    for (uint32_t k = 0; k < sim->shards; k++) {
        source->bitmap[k / 8] |= (uint8_t)(1u << (k % 8));
    }
    source->refill_ns = 0;
}

static void sources_refill(struct sim *sim, struct sim_node *node, uint32_t complete)
{
    node->refill_ns = UINT64_MAX;
    for (; complete; complete &= complete - 1) {
        struct sim_conn *source = node->conns[__builtin_ctz(complete)];
        if (source->refill_ns && sim->now_ns >= source->refill_ns) {
            bitmap_fill(sim, source);
        }
        if (source->refill_ns && source->refill_ns < node->refill_ns) {
            node->refill_ns = source->refill_ns;
        }
    }
}

void puller_pump(struct sim *sim, struct sim_node *node)
{
    uint32_t among = 0;
    uint32_t complete = 0;
    if (!node->pulling) {
        return;
    }
    for (uint32_t i = 0; i < node->source_count; i++) {
        const struct sim_source *source = &node->sources[i];
        among |= (uint32_t)(sim->now_ns >= source->usable_ns) << i;
        complete |= (uint32_t)source->complete << i;
    }
    if (sim->now_ns >= node->refill_ns) {
        sources_refill(sim, node, complete);
    }
    if (!among) {
        return;
    }
    uint32_t usable = (uint32_t)__builtin_popcount(among);
    uint32_t width = window_width(sim, node);
    if (node->fetching >= width) {
        node->full_ns = sim->now_ns;
    }
    spread_reach_tick(&node->reach, sim->now_ns / SIM_MS, node->full_ns / SIM_MS,
                      spread_rack_step_ms(node->passed_ns));
    for (enum source_turn turn = TURN_RARE; turn < TURN_COUNT; turn++) {
        uint32_t of_turn = among & (turn == TURN_PARTIAL ? ~complete : complete);
        if (of_turn && (usable == 1 || turn_wanted(sim, node, turn, width)) &&
            spread_absent(node->spread)) {
            sources_turn(sim, node, turn, of_turn, width, usable);
        }
    }
    fill_move(sim, node, among);
}

/* ---- what a source says ---- */

/* How many have what is here already makes no difference any more. */
static void rarity_add(struct sim *sim, const struct sim_conn *source, bool more)
{
    for (uint32_t k = 0; !source->complete && k < sim->shards; k++) {
        if (!source_has(source, k) || sim_has(source->puller, k)) {
            continue;
        }
        if (more) {
            spread_more(source->puller->spread, k, !source->far, sim->now_ns / SIM_MS);
        } else {
            spread_less(source->puller->spread, k, !source->far);
        }
    }
}

static void bitmap_clear(struct sim *sim, struct sim_conn *source)
{
    if (!source->attached) {
        return;
    }
    rarity_add(sim, source, false);
    memset(source->bitmap, 0, SPREAD_BITMAP_BYTES(sim->shards));
    source->attached = source->complete = false;
    source->advice_count = 0;
    source->refill_ns = 0;
    source->puller->attached_count--;
    source->puller->known[source->known].attached = false;
    source_of(source)->complete = false;
    source_usable_set(source);
}

void puller_attached(struct sim *sim, struct sim_conn *source)
{
    struct sim_node *node = source->puller;
    if (!source->open || !node->alive || node->stopped) {
        return;
    }
    source->refusals = 0;
    source->attached = true;
    node->attached_count++;
    node->known[source->known].attached = true;
    node->known[source->known].complete = source->complete;
    source_of(source)->complete = source->complete;
    source_usable_set(source);
    node->dry &= ~(1u << source->at);
    if (source->complete) {
        bitmap_fill(sim, source);
    } else {
        rarity_add(sim, source, true);
    }
    puller_pump(sim, node);
}

void puller_heard_soon(const struct sim_conn *source, uint32_t shard)
{
    const char *node = (const char *)source->puller;
    __builtin_prefetch(&source->bitmap[shard / 8], 1);
    for (size_t at = 0; at < offsetof(struct sim_node, conns); at += 64) {
        __builtin_prefetch(node + at, 1);
    }
}

void puller_heard(struct sim *sim, struct sim_conn *source, uint32_t shard)
{
    struct sim_node *node = source->puller;
    if (!source->open || source->complete || source_has(source, shard) || !node->alive ||
        node->stopped) {
        return;
    }
    source->bitmap[shard / 8] |= (uint8_t)(1u << (shard % 8));
    if (!source->attached) {
        return; /* ATTACHED is on its way, and counts all of it */
    }
    if (spread_state(node->spread, shard) != SPREAD_PRESENT) {
        spread_more(node->spread, shard, !source->far, sim->now_ns / SIM_MS);
        node->dry &= ~(1u << source->at);
    }
    if (node->sources[source->at].waiting == 0) {
        puller_pump(sim, node);
    }
}

void puller_down(struct sim *sim, struct sim_conn *source)
{
    if (!source->open) {
        return;
    }
    struct sim_node *node = source->puller;
    fill_cancel_all(sim, source);
    bitmap_clear(sim, source);
    source->again_ns = sim->now_ns + spread_backoff_ms(++source->refusals, SUPPLIER_AGAIN_MS,
                                                       SUPPLIER_LAST_MS, sim_random(sim)) *
                                         SIM_MS;
    puller_pump(sim, node);
}

void puller_source_drop(struct sim *sim, struct sim_conn *source)
{
    struct sim_node *node = source->puller;
    fill_cancel_all(sim, source);
    bitmap_clear(sim, source);
    uint32_t last = --node->source_count;
    uint32_t dry = node->dry >> last & 1;
    node->dry = (node->dry & ~(1u << source->at)) | dry << source->at;
    node->dry &= (1u << last) - 1;
    node->sources[source->at] = node->sources[last];
    node->conns[source->at] = node->conns[last];
    node->conns[source->at]->at = source->at;
    node->known[source->known].conn = NULL;
    source->open = false;
    sim_send(sim, source->holder, SIM_DETACH, source, source->generation);
}

void puller_end(struct sim *sim, struct sim_node *node)
{
    while (node->source_count) {
        puller_source_drop(sim, node->conns[0]);
    }
    node->pulling = false;
    spread_close(node->spread);
    node->spread = NULL;
}

/* ---- from time to time ---- */

static void source_tick(struct sim *sim, struct sim_conn *source)
{
    const struct sim_node *holder = source->holder;
    if (source->attached && holder->stopped && source_of(source)->inflight &&
        sim->now_ns - holder->stopped_ns > SUPPLIER_SILENT_NS) {
        puller_down(sim, source);
    }
    if (!source->attached && source->again_ns && sim->now_ns >= source->again_ns) {
        source->again_ns = 0;
        meet_connect(sim, source);
    }
}

void puller_tick(struct sim *sim, struct sim_node *node)
{
    fill_tick(sim, node);
    for (uint32_t i = 0; i < node->source_count; i++) {
        source_tick(sim, node->conns[i]);
    }
    if (sim->now_ns >= node->review_ns) {
        node->review_ns = sim->now_ns + SIM_REVIEW_NS;
        meet_review(sim, node);
    }
    bool lonely = node->attached_count == 0 || sim->now_ns - node->progress_ns > PULL_QUIET_NS;
    if (lonely && sim->now_ns >= node->look_ns) {
        node->look_ns = sim->now_ns + node->look_wait_ns;
        node->look_wait_ns =
            node->look_wait_ns * 2 < PULL_LOOK_LAST_NS ? node->look_wait_ns * 2 : PULL_LOOK_LAST_NS;
        meet_look(sim, node);
    }
    puller_pump(sim, node);
}
