#include "engine/fill.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "engine/extents.h"
#include "engine/lent.h"
#include "engine/trace.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

#define FILL_POPULATE_STEP  (2u << 20)     /* a huge page */
#define FILL_POPULATE_AHEAD (1u << 20)     /* what may land before the lane hears of it */
#define FILL_MOVE_NS        100000000ull   /* what waits for so long may be had elsewhere */
#define FILL_STALL_NS       1500000000ull  /* no byte of a shard for so long: ask somebody else */
#define FILL_STARVED_NS     20000000000ull /* the same, though others of that source move */
#define FILL_LEFT_NS        5000000000ull /* and leave the source alone for so long, or a multiple */
#define FILL_AGAIN_NS       4000000000ull /* where there is nobody else, ask it once more */

struct fill {
    struct request request;
    struct source *source;
    struct digest_shard hash;
    uint8_t expected[MODEL_DIGEST_MAX];
    struct lent_place place; /* in the replica */
    uint64_t scattered;      /* bytes that went from a bounce buffer to where they belong */
    uint8_t *apart;          /* a hedge's own memory; NULL: it lands in the replica */
    struct fill *twin;       /* the other one of a hedged shard */
    uint64_t populated;      /* bytes from its begin that have their pages */
    uint64_t asked_ns;
    uint64_t granted_ns; /* 0: it waits */
    uint64_t progress_ns;
    uint64_t verify_ns; /* spent on hashing */
    struct fill *prev, *next;
};

static const struct request_ops fill_ops;

static uint64_t now_of(const struct fill *fill)
{
    return loop_now_ns(fill->source->pull->lane->loop);
}

/* ---- begin and end ---- */

/* One that was never asked, or is over. */
static void fill_drop(struct fill *fill)
{
    digest_shard_clear(&fill->hash);
    lent_place_clear(fill->source->pull->lane->engine, &fill->place);
    free(fill->apart);
    free(fill);
}

static void fill_free(struct fill *fill)
{
    struct source *source = fill->source;
    DL_DELETE(source->pull->fills, fill);
    source->inflight--;
    source->waiting -= fill->granted_ns == 0;
    source->pull->fetching -= fill->granted_ns != 0;
    if (fill->twin) {
        fill->twin->twin = NULL;
    }
    fill_drop(fill);
}

static void fill_cancel(struct fill *fill)
{
    supplier_cancel(&fill->request);
    fill_free(fill);
}

/* Puts a shard back, without anybody having failed. */
static void shard_put(struct replica *replica, uint32_t shard)
{
    pthread_mutex_lock(&replica->lock);
    atomic_store_explicit(&replica->states[shard], SPREAD_ABSENT, memory_order_release);
    spread_put(replica->spread, shard);
    pthread_mutex_unlock(&replica->lock);
}

static struct fill *fill_new(struct source *source, uint32_t shard, bool urgent, bool apart)
{
    struct replica *replica = source->pull->replica;
    struct fill *fill = calloc(1, sizeof *fill);
    if (!fill) {
        return NULL;
    }
    size_t length = replica_shard_size(replica, shard);
    fill->source = source;
    fill->apart = apart ? malloc(length) : NULL;
    int status = apart ? (fill->apart ? 0 : -ENOMEM)
                       : lent_place(replica, shard, supplier_scattered(source->attachment.supplier),
                                    &fill->place);
    uint8_t *destination = apart ? fill->apart : fill->place.at;
    fill->request.ops = &fill_ops;
    fill->request.shard = shard;
    fill->request.urgent = urgent;
    fill->request.progress =
        (uint8_t)((uint64_t)atomic_load(&replica->present) * WIRE_PROGRESS_ALL / replica->shards);
    fill->request.fetch.destination = destination;
    fill->request.fetch.pieces = fill->place.pieces;
    fill->request.fetch.piece_count = fill->place.piece_count;
    fill->request.fetch.length = length;
    fill->request.fetch.lent = apart || fill->place.bounce ? NULL : replica->extents;
    if (status == 0) {
        status = digest_shard_begin(&fill->hash, replica->digest, destination, length);
    }
    if (status < 0) {
        fill_drop(fill);
        return NULL;
    }
    if (fill->place.pieces) {
        fill->hash.gather = lent_gather;
        fill->hash.arg = &fill->place;
    }
    fill->asked_ns = fill->progress_ns = now_of(fill);
    return fill;
}

static struct fill *fill_ask(struct source *source, uint32_t shard, bool urgent, bool apart)
{
    struct fill *fill = fill_new(source, shard, urgent, apart);
    if (!fill) {
        return NULL;
    }
    if (supplier_ask(&source->attachment, &fill->request) < 0) {
        fill_drop(fill);
        return NULL;
    }
    DL_APPEND(source->pull->fills, fill);
    source->inflight++;
    source->waiting++;
    return fill;
}

int fill_start(struct source *source, uint32_t shard, bool urgent)
{
    return fill_ask(source, shard, urgent, false) ? 0 : -EAGAIN;
}

void fill_cancel_all(struct source *source)
{
    struct fill *fill;
    struct fill *next;
    DL_FOREACH_SAFE(source->pull->fills, fill, next) {
        if (fill->source != source) {
            continue;
        }
        uint32_t shard = fill->request.shard;
        bool twin = fill->twin;
        fill_cancel(fill);
        if (!twin) { /* else that one goes on */
            shard_put(source->pull->replica, shard);
        }
    }
}

/* ---- on the way ---- */

static struct fill *fill_of(struct request *request)
{
    return util_container(request, struct fill, request);
}

/* Gives the bytes that come next their pages, here and now: the zeros that the kernel puts there are still in this
 * core's cache when the network's bytes replace them, so a page costs little more than its copy. Done ahead, by another
 * thread, it costs twice that; left to the copy, it costs a fault for each page. */
static int fill_populate(struct fill *fill)
{
    const struct transport_fetch *fetch = &fill->request.fetch;
    int status = 0;
    while (!fill->apart && status == 0 && fill->populated < fetch->length &&
           fill->populated < fetch->landed + FILL_POPULATE_AHEAD) {
        uint64_t left = fetch->length - fill->populated;
        uint64_t step = left < FILL_POPULATE_STEP ? left : FILL_POPULATE_STEP;
        status = lent_populate(&fill->place, fill->populated, step);
        fill->populated += step;
    }
    return status;
}

static bool fill_granted(struct request *request, const uint8_t *digest, size_t digest_size)
{
    struct fill *fill = fill_of(request);
    struct replica *replica = fill->source->pull->replica;
    fill->granted_ns = fill->progress_ns = now_of(fill);
    fill->source->waiting--;
    fill->source->pull->fetching++;

    pthread_mutex_lock(&replica->lock);
    /* Before there is a root to prove them by, the registrar's word counts, and nobody else's. */
    if (digest_size == replica->digest->size && !replica->version.sealed &&
        source_is_registrar(fill->source)) {
        replica_digest_set(replica, request->shard, digest);
    }
    bool known = replica_digest_known(replica, request->shard);
    if (known) {
        memcpy(fill->expected, replica_digest(replica, request->shard), replica->digest->size);
    }
    pthread_mutex_unlock(&replica->lock);
    return known && fill_populate(fill) == 0;
}

/* What has landed in a bounce buffer goes to its place while it is warm. */
static void fill_scatter(struct fill *fill)
{
    struct replica *replica = fill->source->pull->replica;
    uint64_t landed = fill->request.fetch.landed;
    if (fill->place.bounce && landed > fill->scattered) {
        extents_write(replica->extents,
                      replica_shard_offset(replica, fill->request.shard) + fill->scattered,
                      landed - fill->scattered, fill->place.bounce + fill->scattered);
        fill->scattered = landed;
    }
}

static void fill_hash(struct fill *fill)
{
    uint64_t begun = util_now_ns();
    digest_shard_advance(&fill->hash, fill->request.fetch.landed);
    fill->verify_ns += util_now_ns() - begun;
}

static void fill_landed(struct request *request)
{
    struct fill *fill = fill_of(request);
    uint64_t now = now_of(fill);
    fill->progress_ns = now;
    fill->source->progress_ns = now;
    fill->source->pull->replica->progress_ns = now;
    fill_hash(fill);
    fill_scatter(fill);
    (void)fill_populate(fill); /* a failure shows when the bytes come */
}

static bool fill_verify(struct fill *fill)
{
    uint8_t digest[MODEL_DIGEST_MAX];
    fill_hash(fill);
    fill_scatter(fill);
    digest_shard_finish(&fill->hash, digest);
    return memcmp(digest, fill->expected, fill->source->pull->replica->digest->size) == 0;
}

/* A verified shard, or a hedge's copy of it. */
static int fill_take(struct fill *fill)
{
    struct pull *pull = fill->source->pull;
    struct replica *replica = pull->replica;
    uint64_t took = now_of(fill) - fill->granted_ns;
    spread_window_took(&pull->window, took);
    pull->usual_ns = spread_usual(pull->usual_ns, took);
    if (!fill->source->far) {
        pull->passed_ns = spread_usual(pull->passed_ns, now_of(fill) - fill->asked_ns);
        spread_reach_near(&pull->reach);
    }
    source_praise(fill->source);
    trace_landed(
        replica, fill->request.shard,
        &(struct trace_landing){.peer = supplier_peer(fill->source->attachment.supplier),
                                .transport = supplier_transport(fill->source->attachment.supplier),
                                .queued_ns = fill->granted_ns - fill->asked_ns,
                                .wire_ns = took,
                                .verify_ns = fill->verify_ns,
                                .urgent = fill->request.urgent,
                                .hedged = fill->twin || fill->apart});
    if (fill->twin) {
        fill_cancel(fill->twin); /* from here on nobody else writes there */
    }
    if (!fill->apart) {
        return 0;
    }
    return lent_shard_write(replica, fill->request.shard, fill->apart);
}

static void fill_ended(struct request *request, int status, uint32_t retry_ms)
{
    struct fill *fill = fill_of(request);
    struct source *source = fill->source;
    struct pull *pull = source->pull;
    struct replica *replica = pull->replica;
    uint32_t shard = request->shard;

    if (status == 0 && !fill_verify(fill)) {
        status = -EBADMSG;
        atomic_fetch_add(&pull->lane->engine->counters.shards_corrupt, 1);
        peer_strike(supplier_peer(source->attachment.supplier));
    } else if (status == 0) {
        status = fill_take(fill);
    } else if (status == -EBUSY) {
        source_busy(source, shard, request->urgent, retry_ms);
    } else {
        source_blame(source, status);
    }
    if (status < 0) {
        trace_missed(replica, shard);
    }
    bool twin = fill->twin;
    fill_free(fill);
    if (!twin && status == -EBUSY) {
        shard_put(replica, shard);
    } else if (!twin) {
        replica_shard_settle(replica, shard, status);
    }
    source_pump_all(pull);
}

/* ---- elsewhere ---- */

bool fill_move(struct source *source, uint64_t now_ns)
{
    struct fill *fill;
    if (!source_askable(source)) {
        return false;
    }
    DL_FOREACH(source->pull->fills, fill) {
        uint32_t shard = fill->request.shard;
        if (fill->granted_ns || fill->twin || fill->source == source ||
            now_ns - fill->asked_ns < FILL_MOVE_NS || !source_has(source, shard)) {
            continue;
        }
        bool urgent = fill->request.urgent;
        fill_cancel(fill);
        if (!fill_ask(source, shard, urgent, false)) {
            shard_put(source->pull->replica, shard);
        }
        return true;
    }
    return false;
}

static bool demanded(const struct replica *replica, uint32_t shard)
{
    const struct engine_waiter *waiter;
    DL_FOREACH(replica->waiters, waiter) {
        if (!waiter->patient && shard >= waiter->first && shard <= waiter->last) {
            return true;
        }
    }
    return false;
}

void fill_promote(struct pull *pull)
{
    struct replica *replica = pull->replica;
    struct fill *fill;
    struct fill *next;
    DL_FOREACH_SAFE(pull->fills, fill, next) {
        if (fill->granted_ns || fill->twin || fill->request.urgent) {
            continue;
        }
        uint32_t shard = fill->request.shard;
        pthread_mutex_lock(&replica->lock);
        bool wanted = demanded(replica, shard);
        pthread_mutex_unlock(&replica->lock);
        if (wanted) {
            fill_cancel(fill);
            shard_put(replica, shard);
        }
    }
}

/* Another source that has the shard; the idlest. willing: and did not refuse it just now. */
static struct source *source_other(const struct fill *fill, bool willing, uint64_t now_ns)
{
    struct source *best = NULL;
    struct source *source;
    DL_FOREACH(fill->source->pull->sources, source) {
        if (source != fill->source && source_usable(source, now_ns) &&
            (source_has(source, fill->request.shard) || (source->complete && !willing)) &&
            source_askable(source) && (!best || source->inflight < best->inflight)) {
            best = source;
        }
    }
    return best;
}

/* No byte for too long: away from there. True: the fill is gone. */
static bool fill_stalled(struct fill *fill, uint64_t now_ns)
{
    uint64_t still = now_ns - fill->progress_ns;
    struct supplier *supplier = fill->source->attachment.supplier;
    bool silent = now_ns - supplier_heard_ns(supplier) > FILL_STALL_NS;
    /* On a slow link a shard may have to wait for those before it. */
    bool moves = now_ns - fill->source->progress_ns < FILL_STALL_NS;
    if (still < FILL_STALL_NS || (moves && still < FILL_STARVED_NS) ||
        (!fill->granted_ns && !silent && still < FILL_AGAIN_NS)) {
        return false; /* who waits for his turn and hears from there is not stalled */
    }
    bool other = fill->twin || source_other(fill, false, now_ns);
    if (!other && (still < FILL_AGAIN_NS || (!fill->granted_ns && !silent))) {
        return false; /* nobody better */
    }
    struct source *source = fill->source;
    struct replica *replica = source->pull->replica;
    uint32_t shard = fill->request.shard;
    bool blamed = fill->granted_ns || silent;
    if (blamed) {
        log_info("peer %s: no byte of a shard for %llu ms; asking %s",
                 supplier_node(supplier)->name, (unsigned long long)(still / 1000000),
                 other ? "another" : "again");
        source_blame(source, -ETIMEDOUT);
        if (other) {
            source->busy_until_ns = now_ns + FILL_LEFT_NS * source->failures;
        }
    }
    if (blamed) {
        trace_missed(replica, shard);
    }
    bool twin = fill->twin;
    fill_cancel(fill);
    if (!twin && blamed) {
        replica_shard_settle(replica, shard, -ETIMEDOUT);
    } else if (!twin) {
        shard_put(replica, shard);
    }
    return true;
}

/* It comes, but so slowly that a peer which sends a byte now and then would keep the pull from ever ending. True: the
 * fill is gone. */
static bool fill_trickles(struct fill *fill, uint64_t now_ns)
{
    struct source *source = fill->source;
    struct pull *pull = source->pull;
    if (!fill->granted_ns || !spread_trickles(now_ns - fill->granted_ns, pull->usual_ns)) {
        return false;
    }
    const struct source *other = source_other(fill, true, now_ns);
    if (!fill->twin && (!other || other->inflight)) {
        return false; /* it has more urgent things to do */
    }
    uint32_t shard = fill->request.shard;
    bool twin = fill->twin;
    log_info("peer %s: a shard has taken %llu s; asking another",
             supplier_node(source->attachment.supplier)->name,
             (unsigned long long)((now_ns - fill->granted_ns) / 1000000000));
    pull->usual_ns *= 2; /* should everybody have become slow, this ends */
    source_blame(source, -ETIMEDOUT);
    source->busy_until_ns = now_ns + FILL_LEFT_NS * source->failures;
    trace_missed(pull->replica, shard);
    fill_cancel(fill);
    if (!twin) {
        replica_shard_settle(pull->replica, shard, -ETIMEDOUT);
    }
    return true;
}

/* The last shards, and those that readers wait for, are asked twice when they are late. */
static void fill_hedge(struct fill *fill, uint64_t now_ns)
{
    struct pull *pull = fill->source->pull;
    struct replica *replica = pull->replica;
    if (fill->twin || pull->hedges >= spread_hedge_budget(replica->shards) ||
        !spread_hedge_due(now_ns - fill->asked_ns, pull->usual_ns)) {
        return;
    }
    struct source *other = source_other(fill, true, now_ns);
    if (!other || other->inflight) {
        return; /* it has more urgent things to do */
    }
    pthread_mutex_lock(&replica->lock);
    bool last = fill->request.urgent || (replica->whole && spread_absent(replica->spread) == 0);
    pthread_mutex_unlock(&replica->lock);
    struct fill *twin =
        last ? fill_ask(other, fill->request.shard, fill->request.urgent, true) : NULL;
    if (twin) {
        twin->twin = fill;
        fill->twin = twin;
        pull->hedges++;
        atomic_fetch_add(&pull->lane->engine->counters.shards_hedged, 1);
    }
}

void fill_tick(struct pull *pull, uint64_t now_ns)
{
    struct fill *fill;
    struct fill *next;
    DL_FOREACH_SAFE(pull->fills, fill, next) {
        if (!fill_stalled(fill, now_ns) && !fill_trickles(fill, now_ns)) {
            fill_hedge(fill, now_ns);
        }
    }
}

static const struct request_ops fill_ops = {
    .granted = fill_granted,
    .landed = fill_landed,
    .ended = fill_ended,
};
