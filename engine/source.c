#include "engine/source.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "engine/cache.h"
#include "engine/fill.h"
#include "engine/neighbours.h"
#include "engine/pull.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

#define SOURCE_DEMAND_MAX      64
#define SOURCE_WINDOW_END      (8u << 20) /* bytes in flight, however little is left */
#define SOURCE_AGAIN_FIRST_MS  100        /* a source that failed is left alone for so long, */
#define SOURCE_AGAIN_LAST_MS   30000      /* and, failing again and again, for so long */
#define SOURCE_URGENT_INFLIGHT 32
#define SOURCE_STARVING_NS     3000000000ull
#define SOURCE_ALIVE_NS        1500000000ull /* heard of so lately; a ping is answered each second */
#define SOURCE_BUSY_MAX_MS     10000         /* longer than any honest peer asks for */
#define SOURCE_BUSY_PART       4             /* and no longer than this part of read_timeout */

static const struct attachment_ops source_ops;

/* ---- what a source is good for ---- */

bool source_usable(const struct source *source, uint64_t now_ns)
{
    return source->attached && now_ns >= source->busy_until_ns &&
           !peer_quarantined(supplier_peer(source->attachment.supplier));
}

bool source_has(const struct source *source, uint32_t shard)
{
    return source->bitmap[shard / 8] >> (shard % 8) & 1;
}

bool source_is_registrar(const struct source *source)
{
    const struct model_version *version = &source->pull->replica->version;
    const struct model_node *node = supplier_node(source->attachment.supplier);
    return node->boot == version->origin_boot && strcmp(node->name, version->origin_node) == 0;
}

void source_praise(struct source *source)
{
    source->failures = 0;
    peer_praise(supplier_peer(source->attachment.supplier));
    atomic_store(&source->pull->replica->by_rdma, supplier_by_rdma(source->attachment.supplier));
}

void source_blame(struct source *source, int status)
{
    uint32_t ms = SOURCE_AGAIN_FIRST_MS;
    if (status != -ENOENT && status != -ENODATA) { /* it just had that one shard no more */
        ms = spread_backoff_ms(++source->failures, SOURCE_AGAIN_FIRST_MS, SOURCE_AGAIN_LAST_MS,
                               util_random_u64());
    }
    source->busy_until_ns = loop_now_ns(source->pull->lane->loop) + ms * 1000000ull;
    atomic_fetch_add(&supplier_peer(source->attachment.supplier)->failed, 1);
}

void source_busy(struct source *source, uint32_t shard, bool urgent, uint32_t retry_ms)
{
    uint32_t most = source->pull->replica->engine->config.read_timeout_ms / SOURCE_BUSY_PART;
    most = most < SOURCE_BUSY_MAX_MS ? most : SOURCE_BUSY_MAX_MS;
    retry_ms = retry_ms < most ? retry_ms : most;
    uint64_t until = loop_now_ns(source->pull->lane->loop) + retry_ms * 1000000ull;
    atomic_fetch_add(&supplier_peer(source->attachment.supplier)->busy, 1);
    atomic_fetch_add(&source->pull->lane->engine->counters.asks_busy, 1);
    if (!source->complete || urgent) {
        source->busy_until_ns = until;
        return;
    }
    source->bitmap[shard / 8] &= (uint8_t)~(1u << (shard % 8));
    if (!source->refill_ns || until < source->refill_ns) {
        source->refill_ns = until;
    }
}

static void bitmap_fill(struct source *source)
{
    uint32_t shards = source->pull->replica->shards;
    for (uint32_t k = 0; k < shards; k++) {
        source->bitmap[k / 8] |= (uint8_t)(1u << (k % 8));
    }
    source->refill_ns = 0;
}

/* ---- asking ---- */

static size_t demand_collect(const struct replica *replica, struct spread_range *ranges)
{
    size_t count = 0;
    const struct engine_waiter *waiter;
    DL_FOREACH(replica->waiters, waiter) {
        if (count == SOURCE_DEMAND_MAX) {
            break;
        }
        if (!waiter->patient) {
            ranges[count++] = (struct spread_range){waiter->first, waiter->last};
        }
    }
    return count;
}

/* Bytes that the shards present, on their way and this one take; all of them when the whole file is wanted. */
static bool room_claim(struct replica *replica, uint32_t filling)
{
    uint64_t size = replica->version.size;
    uint64_t claim = size;
    if (!replica->whole) {
        claim =
            ((uint64_t)atomic_load(&replica->present) + filling + 1) * replica->version.shard_size;
        claim = claim < size ? claim : size;
    }
    return cache_reserve(replica->engine->cache, replica, claim);
}

/* FILLING ones. Lock held. */
static uint32_t filling_count(const struct replica *replica)
{
    return replica->shards - spread_absent(replica->spread) - atomic_load(&replica->present);
}

/* Lock held. */
static bool askable(const struct source *source)
{
    const struct replica *replica = source->pull->replica;
    return atomic_load(&replica->all_known) ||
           (!replica->version.sealed && source_is_registrar(source));
}

bool source_askable(const struct source *source)
{
    struct replica *replica = source->pull->replica;
    if (atomic_load(&replica->all_known)) {
        return true;
    }
    pthread_mutex_lock(&replica->lock);
    bool may = askable(source);
    pthread_mutex_unlock(&replica->lock);
    return may;
}

/* What the source itself has proposed, if that is still wanted. Lock held. */
static uint32_t advice_take(struct source *source)
{
    const struct replica *replica = source->pull->replica;
    while (source->advice_count) {
        uint32_t shard = source->advice[--source->advice_count];
        if (shard < replica->shards && replica->whole && source_has(source, shard) &&
            spread_state(replica->spread, shard) == SPREAD_ABSENT) {
            return shard;
        }
    }
    return SPREAD_NONE;
}

/* What may be asked in one turn, in this order. */
enum source_turn {
    TURN_URGENT,  /* what readers wait for */
    TURN_RARE,    /* of those that have everything: what nobody else has */
    TURN_PARTIAL, /* of those that are still pulling themselves */
    TURN_ANY,     /* of those that have everything: the rest */
    TURN_COUNT
};

static uint32_t shard_choose(struct source *source, enum source_turn turn, bool *urgent)
{
    struct replica *replica = source->pull->replica;
    struct spread_range demand[SOURCE_DEMAND_MAX];
    struct spread_want want = {.cursor = replica->cursor,
                               .whole = replica->whole && turn != TURN_URGENT};
    if (turn == TURN_URGENT) {
        want.demand = demand;
        want.demand_count = demand_collect(replica, demand);
    }
    /* What a complete one did not want to give in the background, it gives to a reader. */
    bool all = turn == TURN_URGENT && source->complete;
    uint64_t now = loop_now_ns(source->pull->lane->loop);
    struct spread_offer offer = {.bitmap = all ? NULL : source->bitmap,
                                 .rarity_most = turn == TURN_RARE ? 0 : SPREAD_RARITY_ANY,
                                 .far = source->far && !source->pull->starving,
                                 .rack = replica->near_sources ? neighbours_rack(replica) : NULL,
                                 .now_ms = now / 1000000,
                                 .step_ms = spread_rack_step_ms(source->pull->passed_ns),
                                 .steps = source->pull->reach.steps / SPREAD_REACH_PARTS};
    uint32_t shard = SPREAD_NONE;
    *urgent = false;
    if (turn == TURN_RARE) {
        shard = advice_take(source);
    }
    return shard != SPREAD_NONE
               ? shard
               : spread_next(replica->spread, &want, &offer, util_random_u64(), urgent);
}

/* Takes the next shard for this source and marks it FILLING. SPREAD_NONE: none, or not now. */
static uint32_t shard_take(struct source *source, enum source_turn turn, bool *urgent)
{
    struct replica *replica = source->pull->replica;
    uint32_t shard = SPREAD_NONE;
    bool room = true;

    pthread_mutex_lock(&replica->lock);
    if (replica->pulling && !replica->room_wanted && askable(source) &&
        (replica->whole || replica->waiters)) {
        shard = shard_choose(source, turn, urgent);
        if (shard != SPREAD_NONE) {
            room = room_claim(replica, replica->whole ? 0 : filling_count(replica));
            if (room) {
                atomic_store_explicit(&replica->states[shard], SPREAD_FILLING,
                                      memory_order_release);
                spread_take(replica->spread, shard);
            } else {
                shard = SPREAD_NONE;
            }
        }
    }
    pthread_mutex_unlock(&replica->lock);
    if (!room) {
        source->pull->room_request(replica);
    }
    return shard;
}

/* Puts a shard back that was taken but never asked for; nobody has failed. */
static void shard_untake(struct replica *replica, uint32_t shard)
{
    pthread_mutex_lock(&replica->lock);
    atomic_store_explicit(&replica->states[shard], SPREAD_ABSENT, memory_order_release);
    spread_put(replica->spread, shard);
    pthread_mutex_unlock(&replica->lock);
}

/* Towards the end: what this lane hoards, another one could fetch meanwhile. */
static uint32_t window_width(const struct pull *pull)
{
    const struct replica *replica = pull->replica;
    uint32_t left = replica->shards - atomic_load(&replica->present);
    uint32_t share = left / (2 * pull->lane->engine->lane_count);
    uint32_t least = SOURCE_WINDOW_END / replica->version.shard_size;
    if (least < 2) {
        least = 2;
    }
    if (share < least) {
        share = least;
    }
    return pull->window.width < share ? pull->window.width : share;
}

/* Whether one more may be asked of it. What waits at a source for its turn costs nothing but the choice, so each of
 * several may have one waiting; what is granted takes bandwidth, and is bounded by the window. */
static bool source_room(const struct source *source, enum source_turn turn, uint32_t usable)
{
    const struct pull *pull = source->pull;
    if (turn == TURN_URGENT) {
        return source->inflight < SOURCE_URGENT_INFLIGHT;
    }
    uint32_t width = window_width(pull);
    if (usable <= 1) {
        return source->inflight < width;
    }
    uint32_t waiting = width / usable;
    bool wanted = pull->fetching < width;
    if (turn == TURN_RARE || pull->starving) {
        wanted = true; /* whatever else comes: what only few have must be spread */
    } else if (turn == TURN_ANY) {
        wanted &= spread_hungry(loop_now_ns(pull->lane->loop) - pull->full_ns, pull->usual_ns);
    }
    return wanted && source->waiting < (waiting ? waiting : 1);
}

/* The idlest one that has something to ask of, or NULL. */
static struct source *source_idlest(struct pull *pull, enum source_turn turn, uint32_t usable,
                                    uint64_t now)
{
    struct source *best = NULL;
    struct source *source;
    DL_FOREACH(pull->sources, source) {
        bool fits = turn == TURN_URGENT || source->complete == (turn != TURN_PARTIAL);
        if (fits && !source->dry && source_usable(source, now) &&
            source_room(source, turn, usable) && (!best || source->inflight < best->inflight)) {
            best = source;
        }
    }
    return best;
}

static uint64_t starving_ns(const struct pull *pull)
{
    uint64_t half = (uint64_t)pull->replica->engine->config.read_timeout_ms * 500000;
    return half < SOURCE_STARVING_NS ? half : SOURCE_STARVING_NS;
}

/* Nothing has come for so long that it is urgent, whoever waits: holders do not refuse it then, so that no pull fails
 * while a live one has what it lacks, whatever has been promised to others. */
static bool starving(const struct pull *pull, uint64_t now_ns)
{
    return now_ns > atomic_load(&pull->replica->progress_ns) + starving_ns(pull);
}

static void sources_turn(struct pull *pull, enum source_turn turn, uint32_t usable, uint64_t now)
{
    struct source *source;
    DL_FOREACH(pull->sources, source) {
        source->dry = false;
    }
    while ((source = source_idlest(pull, turn, usable, now))) {
        bool urgent = false;
        uint32_t shard = shard_take(source, turn, &urgent);
        source->dry = shard == SPREAD_NONE;
        urgent |= pull->starving;
        if (!source->dry && fill_start(source, shard, urgent) < 0) {
            shard_untake(pull->replica, shard);
            source->dry = true;
        }
    }
}

void source_pump_all(struct pull *pull)
{
    uint64_t now = loop_now_ns(pull->lane->loop);
    uint32_t usable = 0;
    struct source *source;
    DL_FOREACH(pull->sources, source) {
        usable += source_usable(source, now);
        if (source->refill_ns && now >= source->refill_ns) {
            bitmap_fill(source);
        }
    }
    if (!usable) {
        return;
    }
    pull->starving = starving(pull, now);
    pthread_mutex_lock(&pull->replica->lock);
    bool demanded = pull->replica->waiters;
    bool whole = pull->replica->whole;
    bool absent = spread_absent(pull->replica->spread) > 0;
    pthread_mutex_unlock(&pull->replica->lock);
    if (demanded) {
        fill_promote(pull);
        sources_turn(pull, TURN_URGENT, usable, now);
    }
    if (pull->fetching >= window_width(pull)) {
        pull->full_ns = now;
    }
    spread_reach_tick(&pull->reach, now / 1000000, pull->full_ns / 1000000,
                      spread_rack_step_ms(pull->passed_ns));
    for (enum source_turn turn = TURN_RARE; whole && absent && turn < TURN_COUNT; turn++) {
        sources_turn(pull, turn, usable, now);
    }
    DL_FOREACH(pull->sources, source) {
        /* One that is far is idle since it is left so. */
        if (source->inflight == 0 && !source->far && source_usable(source, now)) {
            (void)fill_move(source, now);
        }
    }
}

/* ---- what a source says ---- */

static struct source *source_of(struct attachment *attachment)
{
    return util_container(attachment, struct source, attachment);
}

/* What it has counts in the rarity, or does no longer. Lock held. */
static void rarity_add(struct source *source, bool more)
{
    struct replica *replica = source->pull->replica;
    uint64_t now_ms = loop_now_ns(source->pull->lane->loop) / 1000000;
    for (uint32_t k = 0; source->counts && !source->complete && k < replica->shards; k++) {
        if (!source_has(source, k)) {
            continue;
        }
        if (more) {
            spread_more(replica->spread, k, !source->far, now_ms);
        } else {
            spread_less(replica->spread, k, !source->far);
        }
    }
}

static struct neighbour *neighbour_of(const struct source *source)
{
    const struct model_node *node = supplier_node(source->attachment.supplier);
    return neighbours_find(source->pull->replica, node->name, node->boot);
}

static void source_bitmap_clear(struct source *source)
{
    if (!source->attached) {
        return;
    }
    struct replica *replica = source->pull->replica;
    pthread_mutex_lock(&replica->lock);
    rarity_add(source, false);
    replica->sources--;
    replica->near_sources -= !source->far;
    struct neighbour *neighbour = neighbour_of(source);
    if (neighbour && source->known) {
        neighbour->attached--;
    }
    source->known = false;
    pthread_mutex_unlock(&replica->lock);
    memset(source->bitmap, 0, SPREAD_BITMAP_BYTES(replica->shards));
    source->attached = false;
    source->complete = false;
    source->advice_count = 0;
    source->refill_ns = 0;
}

static void source_attached(struct attachment *attachment, uint32_t count, bool complete,
                            const uint8_t *bitmap)
{
    struct source *source = source_of(attachment);
    struct replica *replica = source->pull->replica;
    if (count != replica->shards) {
        supplier_drop(attachment->supplier, "holds another number of shards than the version has");
        return;
    }
    source_bitmap_clear(source);
    if (complete) { /* whose bitmap goes without saying */
        bitmap_fill(source);
    } else {
        memcpy(source->bitmap, bitmap, (count + 7) / 8);
    }
    source->attached = true;
    source->complete = complete;
    pthread_mutex_lock(&replica->lock);
    rarity_add(source, true);
    replica->sources++;
    replica->near_sources += !source->far;
    struct neighbour *neighbour = neighbour_of(source);
    source->known = neighbour != NULL; /* it may have been forgotten, and be learnt again */
    if (neighbour) {
        neighbour->attached++;
        neighbour->complete = complete;
    }
    pthread_mutex_unlock(&replica->lock);
    source_pump_all(source->pull);
}

static void source_have(struct attachment *attachment, uint32_t shard)
{
    struct source *source = source_of(attachment);
    struct replica *replica = source->pull->replica;
    if (!source->attached || source->complete || shard >= replica->shards ||
        source_has(source, shard)) {
        return;
    }
    source->bitmap[shard / 8] |= (uint8_t)(1u << (shard % 8));
    if (source->counts) {
        pthread_mutex_lock(&replica->lock);
        spread_more(replica->spread, shard, !source->far,
                    loop_now_ns(source->pull->lane->loop) / 1000000);
        pthread_mutex_unlock(&replica->lock);
    }
    if (source->waiting == 0) {
        source_pump_all(source->pull);
    }
}

static void source_advised(struct attachment *attachment, const struct wire_message *message)
{
    struct source *source = source_of(attachment);
    source->advice_count = message->count;
    for (uint32_t i = 0; i < message->count; i++) {
        source->advice[i] = wire_have_shard(message, i);
    }
}

static void source_referred(struct attachment *attachment, const char *node, uint64_t boot)
{
    struct replica *replica = source_of(attachment)->pull->replica;
    if (neighbours_hear(replica, node, boot, false)) {
        pull_neighbours_changed(replica);
    }
}

/* Gathers a holder's list of digests: its parts come in order. True: it is whole. */
static bool digests_stage(struct source *source, uint32_t first, uint32_t count,
                          const uint8_t *digests)
{
    const struct replica *replica = source->pull->replica;
    size_t size = replica->digest->size;
    if (!source->staged) {
        source->staged = malloc((size_t)replica->shards * size + 1);
    }
    if (!source->staged || (first != 0 && first != source->staged_count)) {
        return false; /* told anew from the start when the holder's queue had been full */
    }
    memcpy(source->staged + (size_t)first * size, digests, (size_t)count * size);
    source->staged_count = first + count;
    return source->staged_count == replica->shards;
}

/* A whole list counts when it makes up the version's root, or, while there is no root yet, when it is the registrar's
 * word. 0; -EBADMSG: it does not make up the root; -EAGAIN: there is no telling yet. */
static int digests_install(struct source *source)
{
    struct replica *replica = source->pull->replica;
    uint8_t root[MODEL_DIGEST_MAX];
    digest_root(replica->digest, replica->version.size, replica->version.shard_size, source->staged,
                replica->shards, root);
    int status = 0;
    replica_refresh(replica);
    pthread_mutex_lock(&replica->lock);
    if (atomic_load(&replica->all_known)) {
        status = 0;
    } else if (!replica->version.sealed && !source_is_registrar(source)) {
        status = -EAGAIN;
    } else if (replica->version.sealed &&
               memcmp(root, replica->version.root, replica->digest->size) != 0) {
        status = -EBADMSG;
    } else {
        for (uint32_t k = 0; k < replica->shards; k++) {
            replica_digest_set(replica, k, source->staged + (size_t)k * replica->digest->size);
        }
    }
    pthread_mutex_unlock(&replica->lock);
    return status;
}

static void source_digests(struct attachment *attachment, uint32_t first, uint32_t count,
                           size_t size, const uint8_t *digests)
{
    struct source *source = source_of(attachment);
    struct replica *replica = source->pull->replica;
    if (size != replica->digest->size || first > replica->shards ||
        count > replica->shards - first) {
        supplier_drop(attachment->supplier,
                      "sent digests of another kind or number than the version has");
        return;
    }
    if (atomic_load(&replica->all_known) || !digests_stage(source, first, count, digests)) {
        return;
    }
    if (digests_install(source) == -EBADMSG) {
        source->staged_count = 0;
        peer_strike(supplier_peer(attachment->supplier));
        supplier_drop(attachment->supplier, "sent digests that do not make up the version's root");
        return;
    }
    source_pump_all(source->pull);
}

static void source_gone(struct attachment *attachment, enum wire_reason reason)
{
    struct source *source = source_of(attachment);
    struct replica *replica = source->pull->replica;
    source_bitmap_clear(source);
    pthread_mutex_lock(&replica->lock);
    struct neighbour *neighbour = neighbour_of(source);
    if (neighbour) { /* until it is named again */
        neighbour->gone = true;
        neighbour->chosen = false;
    }
    pthread_mutex_unlock(&replica->lock);
    if (reason == WIRE_GONE_CHANGED) {
        log_warn("peer %s: the file that it registered in place has changed there",
                 supplier_node(attachment->supplier)->name);
    }
    pull_neighbours_changed(replica);
}

static void source_lost(struct attachment *attachment)
{
    struct source *source = source_of(attachment);
    source_bitmap_clear(source);
    source_pump_all(source->pull);
}

static void source_writable(struct attachment *attachment)
{
    source_pump_all(source_of(attachment)->pull);
}

/* ---- who is a source ---- */

static void source_remove(struct source *source)
{
    struct pull *pull = source->pull;
    fill_cancel_all(source);
    source_bitmap_clear(source);
    supplier_detach(&source->attachment);
    DL_DELETE(pull->sources, source);
    free(source->staged);
    free(source->bitmap);
    free(source);
}

static void source_add(struct pull *pull, const struct neighbour *neighbour)
{
    struct supplier *supplier = supplier_get(pull->lane, &neighbour->node);
    struct source *source = calloc(1, sizeof *source);
    if (!supplier || !source ||
        !(source->bitmap = calloc(1, SPREAD_BITMAP_BYTES(pull->replica->shards) + 1))) {
        free(source);
        return; /* the next look tries again */
    }
    source->pull = pull;
    source->far = neighbour->far;
    source->counts = neighbour->lane != NEIGHBOURS_ALL_LANES || pull->lane->index == 0;
    source->attachment.ops = &source_ops;
    source->attachment.version = pull->replica->version.id;
    DL_APPEND(pull->sources, source);
    supplier_attach(supplier, &source->attachment);
}

static bool source_is(const struct source *source, const struct neighbour *neighbour)
{
    const struct model_node *node = supplier_node(source->attachment.supplier);
    return node->boot == neighbour->node.boot && strcmp(node->name, neighbour->node.name) == 0;
}

/* Copies of the neighbours that this lane takes from; NULL: out of memory. */
static struct neighbour *chosen_copy(const struct pull *pull, size_t *count)
{
    struct replica *replica = pull->replica;
    struct neighbour *chosen = calloc(SPREAD_NEIGHBOURS, sizeof *chosen);
    size_t n = 0;
    pthread_mutex_lock(&replica->lock);
    const struct neighbour *neighbour;
    DL_FOREACH(neighbours_list(replica), neighbour) {
        if (chosen && n < SPREAD_NEIGHBOURS && neighbour->chosen &&
            (neighbour->lane == NEIGHBOURS_ALL_LANES || neighbour->lane == pull->lane->index)) {
            chosen[n++] = *neighbour;
        }
    }
    pthread_mutex_unlock(&replica->lock);
    *count = n;
    return chosen;
}

void source_update(struct pull *pull)
{
    size_t count;
    util_autofree struct neighbour *chosen = chosen_copy(pull, &count);
    if (!chosen) {
        return;
    }
    struct source *source;
    struct source *next;
    DL_FOREACH_SAFE(pull->sources, source, next) {
        bool stays = false;
        for (size_t i = 0; i < count; i++) {
            stays |= source_is(source, &chosen[i]);
        }
        if (!stays) {
            source_remove(source);
        }
    }
    for (size_t i = 0; i < count; i++) {
        bool known = false;
        DL_FOREACH(pull->sources, source) {
            known |= source_is(source, &chosen[i]);
        }
        if (!known) {
            source_add(pull, &chosen[i]);
        }
    }
    source_pump_all(pull);
}

/* What was refused before, and who failed before, is tried again a few times before the pull fails. */
static void starve(struct pull *pull, uint64_t now_ns)
{
    if (!starving(pull, now_ns) || now_ns < pull->starved_ns + starving_ns(pull) / 4) {
        return;
    }
    pull->starved_ns = now_ns;
    struct source *source;
    DL_FOREACH(pull->sources, source) {
        if (now_ns - supplier_heard_ns(source->attachment.supplier) < SOURCE_ALIVE_NS) {
            source->busy_until_ns = 0;
        }
        if (source->attached && source->complete) {
            bitmap_fill(source);
        }
    }
}

void source_tick(struct pull *pull, uint64_t now_ns)
{
    starve(pull, now_ns);
    struct source *source;
    DL_FOREACH(pull->sources, source) {
        if (source->staged && source->staged_count == pull->replica->shards &&
            !atomic_load(&pull->replica->all_known)) {
            (void)digests_install(source); /* the root may have come meanwhile */
        }
    }
    fill_tick(pull, now_ns);
}

void source_clear(struct pull *pull)
{
    struct source *source;
    struct source *next;
    DL_FOREACH_SAFE(pull->sources, source, next) {
        source_remove(source);
    }
}

static const struct attachment_ops source_ops = {
    .attached = source_attached,
    .have = source_have,
    .digests = source_digests,
    .advised = source_advised,
    .referred = source_referred,
    .gone = source_gone,
    .lost = source_lost,
    .writable = source_writable,
};
