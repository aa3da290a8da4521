#include "engine/source.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "engine/cache.h"
#include "engine/storage.h"
#include "engine/supplier.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

#define SOURCE_MAX            16
#define SOURCE_DEMAND_MAX     64
#define SOURCE_WINDOW_END     (8u << 20) /* bytes in flight at a source, however little is left */
#define SOURCE_POPULATE_STEP  (2u << 20) /* a huge page */
#define SOURCE_POPULATE_AHEAD (1u << 20) /* what may land before the lane hears of it */
#define SOURCE_STALL_NS       1500000000ull /* no byte of a shard for so long: ask somebody else */
#define SOURCE_STALLED_NS     5000000000ull /* and leave the source alone for so long */
#define SOURCE_AGAIN_NS       4000000000ull /* where there is nobody else, ask it once more */

/* One peer as a source of one version, on one lane. */
struct source {
    struct attachment attachment;
    struct pull *pull;
    uint8_t *bitmap;
    bool attached;
    bool gone;       /* it said so; asked again when the next look still lists it */
    bool listed;     /* the last look listed it */
    uint8_t *staged; /* its list of digests so far, until it is whole and proven */
    uint32_t staged_count;
    uint32_t inflight;
    uint64_t busy_until_ns;
    uint64_t stalled_until_ns;
    struct source *prev, *next;
};

/* One shard on its way. */
struct fill {
    struct request request;
    struct source *source;
    struct digest_shard hash;
    uint8_t expected[MODEL_DIGEST_MAX];
    uint64_t populated; /* bytes from its begin that have their pages */
    uint64_t progress_ns;
    struct fill *prev, *next;
};

static const struct attachment_ops source_ops;
static const struct request_ops fill_ops;

/* ---- asking ---- */

static size_t demand_collect(const struct replica *replica, struct spread_range *ranges)
{
    size_t count = 0;
    const struct engine_waiter *waiter;
    DL_FOREACH(replica->waiters, waiter) {
        if (count == SOURCE_DEMAND_MAX) {
            break;
        }
        ranges[count++] = (struct spread_range){waiter->first, waiter->last};
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

static uint32_t filling_count(const struct replica *replica)
{
    uint32_t n = 0;
    for (uint32_t k = 0; k < replica->shards; k++) {
        n += atomic_load_explicit(&replica->states[k], memory_order_relaxed) == SPREAD_FILLING;
    }
    return n;
}

static bool source_is_registrar(const struct source *source)
{
    const struct model_version *version = &source->pull->replica->version;
    const struct model_node *node = supplier_node(source->attachment.supplier);
    return node->boot == version->origin_boot && strcmp(node->name, version->origin_node) == 0;
}

/* Nothing is asked before its digest can be trusted: all of them against the root, or, while the registrar has not
 * digested everything yet, its own word in the grant. Lock held. */
static bool askable(const struct source *source)
{
    const struct replica *replica = source->pull->replica;
    return atomic_load(&replica->all_known) ||
           (!replica->version.sealed && source_is_registrar(source));
}

/* Takes the next shard for this source and marks it FILLING. SPREAD_NONE: none, or not now. */
static uint32_t shard_take(struct source *source, uint32_t window, bool *urgent)
{
    struct replica *replica = source->pull->replica;
    struct spread_range demand[SOURCE_DEMAND_MAX];
    uint32_t shard = SPREAD_NONE;
    bool room = true;

    pthread_mutex_lock(&replica->lock);
    if (replica->pulling && !replica->room_wanted && askable(source)) {
        struct spread_view view = {.shards = replica->shards,
                                   .states = (const uint8_t *)replica->states,
                                   .rarity =
                                       source->pull->sources->next ? source->pull->rarity : NULL,
                                   .demand = demand,
                                   .demand_count = demand_collect(replica, demand),
                                   .cursor = replica->cursor,
                                   .whole = replica->whole};
        shard = spread_next(&view, source->bitmap, util_random_u64(), urgent);
        if (shard != SPREAD_NONE && !*urgent && source->inflight >= window) {
            shard = SPREAD_NONE;
        }
        if (shard != SPREAD_NONE) {
            room = room_claim(replica, replica->whole ? 0 : filling_count(replica));
            if (room) {
                atomic_store_explicit(&replica->states[shard], SPREAD_FILLING,
                                      memory_order_release);
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

static void fill_free(struct fill *fill)
{
    DL_DELETE(fill->source->pull->fills, fill);
    fill->source->inflight--;
    digest_shard_clear(&fill->hash);
    free(fill);
}

static int fill_start(struct source *source, uint32_t shard, bool urgent)
{
    struct pull *pull = source->pull;
    struct replica *replica = pull->replica;
    struct fill *fill = calloc(1, sizeof *fill);
    if (!fill) {
        return -ENOMEM;
    }
    size_t length = replica_shard_size(replica, shard);
    uint8_t *destination = replica->map + replica_shard_offset(replica, shard);
    fill->source = source;
    fill->progress_ns = loop_now_ns(pull->lane->loop);
    fill->request.ops = &fill_ops;
    fill->request.shard = shard;
    fill->request.urgent = urgent;
    fill->request.fetch.destination = destination;
    fill->request.fetch.length = length;
    int status = digest_shard_begin(&fill->hash, replica->digest, destination, length);
    if (status == 0) {
        status = supplier_ask(&source->attachment, &fill->request);
    }
    if (status < 0) {
        digest_shard_clear(&fill->hash);
        free(fill);
        return status;
    }
    DL_APPEND(pull->fills, fill);
    source->inflight++;
    return 0;
}

/* Puts a shard back that was taken but never asked for; nobody has failed. */
static void shard_untake(struct replica *replica, uint32_t shard)
{
    pthread_mutex_lock(&replica->lock);
    atomic_store_explicit(&replica->states[shard], SPREAD_ABSENT, memory_order_release);
    pthread_mutex_unlock(&replica->lock);
}

/* Towards the end: what this lane hoards, another one could fetch meanwhile. */
static uint32_t window_near_end(const struct source *source, uint32_t window)
{
    const struct replica *replica = source->pull->replica;
    uint32_t left = replica->shards - atomic_load(&replica->present);
    uint32_t share = left / (2 * source->pull->lane->engine->lane_count);
    uint32_t least = SOURCE_WINDOW_END / replica->version.shard_size;
    if (least < 2) {
        least = 2;
    }
    if (share < least) {
        share = least;
    }
    return window < share ? window : share;
}

static void source_pump(struct source *source, uint64_t now)
{
    struct supplier *supplier = source->attachment.supplier;
    struct replica *replica = source->pull->replica;
    if (!source->attached || source->gone || now < source->busy_until_ns ||
        now < source->stalled_until_ns || peer_quarantined(supplier_peer(supplier))) {
        return;
    }
    uint32_t window = spread_window(supplier_rate(supplier), replica->version.shard_size);
    window = window_near_end(source, window);
    while (source->inflight < window + SPREAD_URGENT_EXTRA) {
        bool urgent;
        uint32_t shard = shard_take(source, window, &urgent);
        if (shard == SPREAD_NONE) {
            return;
        }
        if (fill_start(source, shard, urgent) < 0) {
            shard_untake(replica, shard);
            return;
        }
    }
}

void source_pump_all(struct pull *pull)
{
    uint64_t now = loop_now_ns(pull->lane->loop);
    struct source *source;
    DL_FOREACH(pull->sources, source) {
        source_pump(source, now);
    }
}

/* ---- one fill ---- */

static struct fill *fill_of(struct request *request)
{
    return util_container(request, struct fill, request);
}

/* Gives the bytes that come next their pages, here and now: the zeros that the kernel puts there are still in this
 * core's cache when the network's bytes replace them, so a page costs little more than its copy. Done ahead, by another
 * thread, it costs twice that; left to the copy, it costs a fault for each page. */
static int fill_populate(struct fill *fill)
{
    struct replica *replica = fill->source->pull->replica;
    const struct transport_fetch *fetch = &fill->request.fetch;
    int status = 0;
    while (status == 0 && fill->populated < fetch->length &&
           fill->populated < fetch->landed + SOURCE_POPULATE_AHEAD) {
        uint64_t left = fetch->length - fill->populated;
        uint64_t step = left < SOURCE_POPULATE_STEP ? left : SOURCE_POPULATE_STEP;
        status = storage_populate(
            replica->map, replica_shard_offset(replica, fill->request.shard) + fill->populated,
            step);
        fill->populated += step;
    }
    return status;
}

static bool fill_granted(struct request *request, const uint8_t *digest, size_t digest_size)
{
    struct fill *fill = fill_of(request);
    struct replica *replica = fill->source->pull->replica;
    fill->progress_ns = loop_now_ns(fill->source->pull->lane->loop);

    pthread_mutex_lock(&replica->lock);
    /* Only the registrar is asked before the digests are proven (askable), so this is its word. */
    if (digest_size == replica->digest->size && !replica->version.sealed) {
        replica_digest_set(replica, request->shard, digest);
    }
    bool known = replica_digest_known(replica, request->shard);
    if (known) {
        memcpy(fill->expected, replica_digest(replica, request->shard), replica->digest->size);
    }
    pthread_mutex_unlock(&replica->lock);
    return known && fill_populate(fill) == 0;
}

static void fill_landed(struct request *request)
{
    struct fill *fill = fill_of(request);
    uint64_t now = loop_now_ns(fill->source->pull->lane->loop);
    fill->progress_ns = now;
    fill->source->pull->replica->progress_ns = now;
    digest_shard_advance(&fill->hash, request->fetch.landed);
    (void)fill_populate(fill); /* a failure shows when the bytes come */
}

/* A source that failed in this way is left alone for a while. */
static void source_blame(struct source *source, int status, uint32_t retry_ms)
{
    uint64_t now = loop_now_ns(source->pull->lane->loop);
    struct peer *peer = supplier_peer(source->attachment.supplier);
    switch (status) {
    case -EBUSY:
        source->busy_until_ns = now + (uint64_t)retry_ms * 1000000;
        return;
    case -ENOENT: /* one shard that it had no more; its next bitmap will tell */
    case -ENODATA:
        source->busy_until_ns = now + 100000000;
        break;
    case -ESTALE:
        source->gone = true;
        break;
    default:
        source->busy_until_ns = now + 100000000;
        break;
    }
    atomic_fetch_add(&peer->failed, 1);
}

static void fill_ended(struct request *request, int status, uint32_t retry_ms)
{
    struct fill *fill = fill_of(request);
    struct source *source = fill->source;
    struct pull *pull = source->pull;
    struct replica *replica = pull->replica;
    struct supplier *supplier = source->attachment.supplier;
    uint32_t shard = request->shard;
    bool wrong = false;

    if (status == 0) {
        uint8_t digest[MODEL_DIGEST_MAX];
        digest_shard_advance(&fill->hash, request->fetch.length);
        digest_shard_finish(&fill->hash, digest);
        wrong = memcmp(digest, fill->expected, replica->digest->size) != 0;
        status = wrong ? -EBADMSG : 0;
    }
    if (status == 0) {
        peer_praise(supplier_peer(supplier));
    } else if (wrong) {
        atomic_fetch_add(&pull->lane->engine->counters.shards_corrupt, 1);
        peer_strike(supplier_peer(supplier));
    } else {
        source_blame(source, status, retry_ms);
    }
    fill_free(fill);
    replica_shard_settle(replica, shard, status);
    source_pump_all(pull);
}

/* ---- sources ---- */

static struct source *source_of(struct attachment *attachment)
{
    return util_container(attachment, struct source, attachment);
}

static void rarity_add(struct pull *pull, const uint8_t *bitmap, int sign)
{
    for (uint32_t k = 0; k < pull->replica->shards; k++) {
        if (bitmap[k / 8] >> (k % 8) & 1) {
            pull->rarity[k] = (uint16_t)(pull->rarity[k] + sign);
        }
    }
}

static void source_bitmap_clear(struct source *source)
{
    if (source->attached) {
        rarity_add(source->pull, source->bitmap, -1);
        memset(source->bitmap, 0, source->pull->replica->shards / 8 + 1);
        source->attached = false;
        pthread_mutex_lock(&source->pull->replica->lock);
        source->pull->replica->sources--;
        pthread_mutex_unlock(&source->pull->replica->lock);
    }
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
        for (uint32_t k = 0; k < count; k++) {
            source->bitmap[k / 8] |= (uint8_t)(1u << (k % 8));
        }
    } else {
        memcpy(source->bitmap, bitmap, (count + 7) / 8);
    }
    source->attached = true;
    source->gone = false;
    rarity_add(source->pull, source->bitmap, 1);
    pthread_mutex_lock(&replica->lock);
    replica->sources++;
    pthread_mutex_unlock(&replica->lock);
    source_pump_all(source->pull);
}

static void source_have(struct attachment *attachment, uint32_t shard)
{
    struct source *source = source_of(attachment);
    if (!source->attached || shard >= source->pull->replica->shards ||
        (source->bitmap[shard / 8] >> (shard % 8) & 1)) {
        return;
    }
    source->bitmap[shard / 8] |= (uint8_t)(1u << (shard % 8));
    source->pull->rarity[shard]++;
    source_pump(source, loop_now_ns(source->pull->lane->loop));
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
    source_bitmap_clear(source);
    source->gone = true;
    if (reason == WIRE_GONE_CHANGED) {
        log_warn("peer %s: the file that it registered in place has changed there",
                 supplier_node(attachment->supplier)->name);
    }
}

static void source_lost(struct attachment *attachment)
{
    struct source *source = source_of(attachment);
    source_bitmap_clear(source);
    source_pump_all(source->pull);
}

static void source_writable(struct attachment *attachment)
{
    source_pump(source_of(attachment), loop_now_ns(source_of(attachment)->pull->lane->loop));
}

static void source_remove(struct source *source)
{
    struct pull *pull = source->pull;
    struct fill *fill;
    struct fill *next;
    DL_FOREACH_SAFE(pull->fills, fill, next) {
        if (fill->source == source) {
            uint32_t shard = fill->request.shard;
            supplier_cancel(&fill->request);
            fill_free(fill);
            shard_untake(pull->replica, shard);
        }
    }
    source_bitmap_clear(source);
    supplier_detach(&source->attachment);
    DL_DELETE(pull->sources, source);
    free(source->staged);
    free(source->bitmap);
    free(source);
}

static void source_add(struct pull *pull, const struct model_node *node)
{
    struct supplier *supplier = supplier_get(pull->lane, node);
    struct source *source = calloc(1, sizeof *source);
    if (!supplier || !source || !(source->bitmap = calloc(pull->replica->shards / 8 + 1, 1))) {
        free(source);
        return; /* the next look tries again */
    }
    source->pull = pull;
    source->listed = true;
    source->attachment.ops = &source_ops;
    source->attachment.version = pull->replica->version.id;
    DL_APPEND(pull->sources, source);
    supplier_attach(supplier, &source->attachment);
}

static struct source *source_find(struct pull *pull, const struct model_node *node)
{
    struct source *source;
    DL_FOREACH(pull->sources, source) {
        const struct model_node *known = supplier_node(source->attachment.supplier);
        if (known->boot == node->boot && strcmp(known->name, node->name) == 0) {
            return source;
        }
    }
    return NULL;
}

/* Makes sources of the holders that the last look found; those that it no longer lists and that are not attached go. */
void source_update(struct pull *pull)
{
    struct replica *replica = pull->replica;
    pthread_mutex_lock(&replica->lock);
    uint64_t serial = replica->holders_serial;
    size_t count = replica->holder_count;
    struct model_holder *holders = NULL;
    if (serial != pull->holders_serial && count) {
        holders = calloc(count, sizeof *holders);
        if (holders) {
            memcpy(holders, replica->holders, count * sizeof *holders);
        }
    }
    pthread_mutex_unlock(&replica->lock);
    if (serial == pull->holders_serial || (count && !holders)) {
        return;
    }
    pull->holders_serial = serial;

    struct source *source;
    struct source *next;
    size_t have = 0;
    DL_FOREACH(pull->sources, source) {
        source->listed = false;
        have++;
    }
    size_t start = count ? util_random_u64() % count : 0;
    for (size_t i = 0; i < count; i++) {
        const struct model_node *node = &holders[(start + i) % count].node;
        source = source_find(pull, node);
        if (source) {
            source->listed = true;
            if (source->gone) { /* announced again: attach anew */
                source_remove(source);
                source_add(pull, node);
            }
        } else if (have < SOURCE_MAX) {
            source_add(pull, node);
            have++;
        }
    }
    free(holders);
    DL_FOREACH_SAFE(pull->sources, source, next) {
        if (!source->listed && !source->attached) {
            source_remove(source);
        }
    }
    source_pump_all(pull);
}

void source_tick(struct pull *pull, uint64_t now_ns)
{
    struct source *waiting;
    DL_FOREACH(pull->sources, waiting) {
        if (waiting->staged && waiting->staged_count == pull->replica->shards &&
            !atomic_load(&pull->replica->all_known)) {
            (void)digests_install(waiting); /* the root may have come meanwhile */
        }
    }
    struct fill *fill;
    struct fill *next;
    DL_FOREACH_SAFE(pull->fills, fill, next) {
        struct source *source = fill->source;
        if (now_ns - fill->progress_ns < SOURCE_STALL_NS) {
            continue;
        }
        bool other = false;
        struct source *candidate;
        DL_FOREACH(pull->sources, candidate) {
            other |= candidate != source && candidate->attached &&
                     now_ns >= candidate->stalled_until_ns &&
                     (candidate->bitmap[fill->request.shard / 8] >> (fill->request.shard % 8) & 1);
        }
        if (!other && now_ns - fill->progress_ns < SOURCE_AGAIN_NS) {
            continue; /* nobody better */
        }
        uint32_t shard = fill->request.shard;
        log_info("peer %s: no byte of a shard for %llu ms; asking %s",
                 supplier_node(source->attachment.supplier)->name,
                 (unsigned long long)((now_ns - fill->progress_ns) / 1000000),
                 other ? "another" : "again");
        atomic_fetch_add(&supplier_peer(source->attachment.supplier)->failed, 1);
        if (other) {
            source->stalled_until_ns = now_ns + SOURCE_STALLED_NS;
        }
        supplier_cancel(&fill->request);
        fill_free(fill);
        replica_shard_settle(pull->replica, shard, -ETIMEDOUT);
    }
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
    .gone = source_gone,
    .lost = source_lost,
    .writable = source_writable,
};

static const struct request_ops fill_ops = {
    .granted = fill_granted,
    .landed = fill_landed,
    .ended = fill_ended,
};
