#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "engine/crowd.h"
#include "engine/inplace.h"
#include "engine/serve_inside.h"
#include "meta/base/util.h"

#define GRANT_SESSION_MAX 128 /* more asks than any honest puller has open on one link */
#define GRANT_ADVICE      4   /* shards that a BUSY names */

static uint64_t now_ms(void)
{
    return util_now_ns() / 1000000;
}

static void promise_end(struct session *s, struct grant *grant, bool landed)
{
    if (grant->promised) {
        grant->promised = false;
        pthread_mutex_lock(&grant->replica->lock);
        slots_book_settle(grant->replica->book, grant->shard, s->mark, now_ms(), landed);
        pthread_mutex_unlock(&grant->replica->lock);
    }
}

/* The slot and the promise go; `done`: the peer has all of it. */
static void slot_end(struct session *s, struct grant *grant, bool done)
{
    struct engine *engine = s->lane->engine;
    bool landed = done && (grant->sent || s->link->transport->ops->one_sided);
    pthread_mutex_lock(&engine->slots_lock);
    slots_end(&engine->slots, &grant->ask, util_now_ns(), landed);
    pthread_mutex_unlock(&engine->slots_lock);
    promise_end(s, grant, landed);
}

void grant_overdue(struct session *s, struct grant *grant)
{
    struct engine *engine = s->lane->engine;
    pthread_mutex_lock(&engine->slots_lock);
    /* What waits behind it waits for as long as its peer stands still. */
    bool overdue = grant->ask.state == SLOTS_OVERDUE ||
                   (grant->ask.state == SLOTS_WAITING && s->slots.overdue > 0);
    pthread_mutex_unlock(&engine->slots_lock);
    if (overdue) {
        promise_end(s, grant, false);
    }
}

void grant_end(struct session *s, struct grant *grant, bool done)
{
    /* NOLINTNEXTLINE(clang-analyzer-unix.Malloc): the loop took the next one before */
    HASH_DEL(s->grants, grant);
    slot_end(s, grant, done);
    bucket_leave(&s->lane->engine->upload, &grant->ticket);
    if (grant->exposed) {
        s->link->transport->ops->unexpose(s->link, grant->request);
        pthread_mutex_lock(&grant->replica->lock);
        grant->replica->grants--;
        grant->replica->torn |= !done;
        pthread_mutex_unlock(&grant->replica->lock);
        inplace_idle(grant->replica);
        atomic_fetch_sub(&s->lane->engine->counters.grants_open, 1);
    }
    lent_place_clear(s->lane->engine, &grant->place);
    replica_put(grant->replica);
    free(grant);
}

void grant_gone_send(struct session *s, uint32_t handle, uint32_t request, enum wire_reason reason)
{
    struct wire_message gone = {
        .type = WIRE_GONE, .handle = handle, .request = request, .reason = reason};
    (void)serve_send(s, &gone);
}

static void busy_send(struct session *s, uint32_t request, uint32_t retry_ms,
                      const uint32_t *advice, uint32_t count)
{
    uint8_t shards[4 * WIRE_ADVICE_MAX];
    for (uint32_t i = 0; i < count; i++) {
        wire_have_put(shards, i, advice[i]);
    }
    struct wire_message busy = {.type = WIRE_BUSY,
                                .request = request,
                                .retry_ms = retry_ms,
                                .count = count,
                                .shards = shards};
    atomic_fetch_add(&s->lane->engine->counters.asks_refused, 1);
    atomic_fetch_add(&s->peer->refused, 1);
    (void)serve_send(s, &busy);
}

/* ---- a slot is free: grant ---- */

/* A peer that reads by itself cannot be slowed down while it does, so a limit holds up the grant. */
static bool must_wait(struct session *s, struct grant *grant)
{
    struct lane *lane = s->lane;
    uint64_t now = util_now_ns();
    uint64_t wait = 0;
    if (!s->link->transport->ops->one_sided) {
        return false;
    }
    grant->paced = bucket_take_whole(&lane->engine->upload, &grant->ticket,
                                     replica_shard_size(grant->replica, grant->shard),
                                     grant->ask.urgent, now, &wait) == 0;
    if (grant->paced && (lane->pace.due_ns == 0 || lane->pace.due_ns > now + wait)) {
        (void)loop_timer_set(lane->loop, &lane->pace, wait); /* else the tick looks */
    }
    return grant->paced;
}

static void grant_expose(struct session *s, struct grant *grant)
{
    if (must_wait(s, grant)) {
        return;
    }
    struct replica *replica = grant->replica;
    uint32_t shard = grant->shard;
    struct transport_region region = {.length = replica_shard_size(replica, shard)};
    struct wire_message message = {
        .type = WIRE_GRANT, .request = grant->request, .length = region.length};
    uint8_t digest[MODEL_DIGEST_MAX];

    pthread_mutex_lock(&replica->lock);
    /* An eviction that began meanwhile has been told that nobody reads: nothing new may start. */
    bool may = replica_servable(replica);
    if (may && replica_digest_known(replica, shard)) {
        memcpy(digest, replica_digest(replica, shard), replica->digest->size);
        message.digests = digest;
        message.digest_size = (uint8_t)replica->digest->size;
    }
    if (may) {
        replica->grants++;
    }
    pthread_mutex_unlock(&replica->lock);
    if (!may) {
        grant_gone_send(s, 0, grant->request,
                        replica->changed ? WIRE_GONE_CHANGED : WIRE_GONE_EVICTED);
        grant_end(s, grant, false);
        return;
    }
    grant->exposed = true;
    grant->length = region.length;
    grant->since_ns = loop_now_ns(s->lane->loop);
    atomic_fetch_add(&s->lane->engine->counters.grants_open, 1);
    int status =
        lent_region(replica, shard, s->link->transport->ops->scattered, &grant->place, &region);
    if (status == 0) {
        status = s->link->transport->ops->expose(s->link, grant->request, &region,
                                                 grant->ask.urgent, &message.descriptor);
        /* Memory that cannot be registered now cannot be later: its peer takes another way. */
        s->broken |= status < 0 && s->link->transport->ops->one_sided;
    }
    if (status == 0) {
        status = serve_send(s, &message);
    }
    if (status < 0) {
        uint32_t request = grant->request;
        grant_end(s, grant, false);
        busy_send(s, request, SERVE_BUSY_MS, NULL, 0);
    }
}

void grant_pace(struct session *s, struct grant *grant)
{
    if (grant->paced) {
        grant_expose(s, grant);
    }
}

/* A shard that lies in a local file, or was not digested yet: a work thread makes sure that the file is what it was, that the digest is known
 * and that the bytes are on their way from the disk; then the lane grants. It counts as a user, for the peer may detach
 * meanwhile, and the file must stay open. */
struct prepare_job {
    struct work_job job;
    struct lane *lane;
    uint64_t session; /* serial */
    uint64_t grant;   /* serial */
    uint32_t request;
    uint32_t shard;
    struct replica *replica;
    int status;
};

static void prepared(struct lane *lane, void *arg)
{
    struct prepare_job *prepare = arg;
    struct session *s = serve_find(lane, prepare->session);
    struct grant *grant = NULL;
    if (s) {
        HASH_FIND(hh, s->grants, &prepare->request, sizeof prepare->request, grant);
    }
    if (grant && grant->serial != prepare->grant) {
        grant = NULL; /* another one under the same number */
    }
    if (grant && prepare->status == 0) {
        grant_expose(s, grant);
    } else if (grant) {
        grant_gone_send(s, 0, grant->request,
                        prepare->status == -ESTALE ? WIRE_GONE_CHANGED : WIRE_GONE_ERROR);
        grant_end(s, grant, false);
    }
    follow_user_end(lane, prepare->replica);
    replica_put(prepare->replica);
    core_release(lane->engine);
    free(prepare);
    grant_dispatch(lane);
}

static void prepare_run(struct work_job *job)
{
    struct prepare_job *prepare = util_container(job, struct prepare_job, job);
    prepare->status = inplace_prepare(prepare->replica, prepare->shard);
    lane_post(prepare->lane, prepared, prepare);
}

static void prepare_start(struct session *s, struct grant *grant)
{
    struct engine *engine = s->lane->engine;
    bool may = core_hold_open(engine);
    struct prepare_job *prepare = may ? malloc(sizeof *prepare) : NULL;
    if (!prepare) {
        grant_gone_send(s, 0, grant->request, WIRE_GONE_ERROR);
        grant_end(s, grant, false);
        if (may) {
            core_release(engine);
        }
        return;
    }
    *prepare = (struct prepare_job){.job.run = prepare_run,
                                    .lane = s->lane,
                                    .session = s->serial,
                                    .grant = grant->serial,
                                    .request = grant->request,
                                    .shard = grant->shard,
                                    .replica = grant->replica};
    replica_get(grant->replica);
    pthread_mutex_lock(&grant->replica->lock);
    grant->replica->users++;
    pthread_mutex_unlock(&grant->replica->lock);
    work_post_urgent(engine->work, &prepare->job);
}

static bool unprepared(const struct grant *grant)
{
    struct replica *replica = grant->replica;
    pthread_mutex_lock(&replica->lock);
    bool is = replica->inplace || !replica_digest_known(replica, grant->shard);
    pthread_mutex_unlock(&replica->lock);
    return is;
}

/* Whose turn it is, as its own lane will find it. */
struct turn {
    struct lane *lane;
    uint64_t session; /* serial */
    uint64_t grant;   /* serial */
    uint32_t request;
};

static void turn_take(struct lane *lane, const struct turn *turn)
{
    struct session *s = serve_find(lane, turn->session);
    struct grant *grant = NULL;
    if (s) {
        HASH_FIND(hh, s->grants, &turn->request, sizeof turn->request, grant);
    }
    if (!grant || grant->serial != turn->grant) {
        return; /* given up meanwhile, and its slot with it */
    }
    if (unprepared(grant)) {
        prepare_start(s, grant);
    } else {
        grant_expose(s, grant);
    }
}

static void turn_posted(struct lane *lane, void *arg)
{
    turn_take(lane, arg);
    free(arg);
    grant_dispatch(lane);
}

static bool turn_next(struct engine *engine, struct turn *turn)
{
    pthread_mutex_lock(&engine->slots_lock);
    engine->slots.yield = atomic_load(&engine->counters.pulls_running) > 0 ||
                          atomic_load(&engine->counters.readers_waiting) > 0;
    struct slots_ask *ask = slots_next(&engine->slots, util_now_ns());
    if (ask) {
        const struct grant *grant = util_container(ask, struct grant, ask);
        *turn = (struct turn){.lane = grant->session->lane,
                              .session = grant->session->serial,
                              .grant = grant->serial,
                              .request = grant->request};
    }
    pthread_mutex_unlock(&engine->slots_lock);
    return ask != NULL;
}

void grant_dispatch(struct lane *lane)
{
    struct turn turn;
    while (turn_next(lane->engine, &turn)) {
        struct turn *copy = turn.lane == lane ? NULL : malloc(sizeof *copy);
        if (copy) {
            *copy = turn;
            lane_post(turn.lane, turn_posted, copy);
        } else if (turn.lane == lane) {
            turn_take(lane, &turn);
        } /* else no memory: the grant becomes overdue, and its peer asks somebody else */
    }
}

/* ---- ask ---- */

/* Each shard once before one is repeated, for what a reader does not wait for. 0: promised to this peer, if the version
 * has a book; else the milliseconds to be patient, and what to ask for instead. */
static uint32_t shard_promise(struct session *s, const struct follow *follow, struct grant *grant,
                              uint32_t *advice, uint32_t *count)
{
    struct engine *engine = s->lane->engine;
    struct replica *replica = follow->replica;
    *count = 0;
    if (!follow->directed) {
        return 0;
    }
    pthread_mutex_lock(&engine->slots_lock);
    uint32_t patience = slots_patience_ms(&engine->slots);
    pthread_mutex_unlock(&engine->slots_lock);

    uint32_t wait = 0;
    pthread_mutex_lock(&replica->lock);
    if (!replica->book && slots_book_open(replica->shards, &replica->book) < 0) {
        pthread_mutex_unlock(&replica->lock);
        return 0;
    }
    if (!grant->ask.urgent && crowd_size(replica->crowd) > 1) {
        wait = slots_book_wait(replica->book, grant->shard, s->mark, now_ms(), patience);
    }
    if (wait) {
        *count = slots_book_advise(replica->book, advice, GRANT_ADVICE);
    } else {
        slots_book_promise(replica->book, grant->shard, s->mark, now_ms());
        grant->promised = true;
    }
    pthread_mutex_unlock(&replica->lock);
    return wait;
}

/* Into the queue. False: it is full. */
static bool slot_ask(struct session *s, struct grant *grant)
{
    struct engine *engine = s->lane->engine;
    pthread_mutex_lock(&engine->slots_lock);
    bool queued = slots_ask(&engine->slots, &s->slots, &grant->ask);
    pthread_mutex_unlock(&engine->slots_lock);
    return queued;
}

static void ask_admit(struct session *s, struct follow *follow, const struct wire_message *message)
{
    struct grant *grant =
        HASH_COUNT(s->grants) < GRANT_SESSION_MAX ? calloc(1, sizeof *grant) : NULL;
    if (!grant) {
        busy_send(s, message->request, SERVE_BUSY_MS, NULL, 0);
        return;
    }
    *grant = (struct grant){.request = message->request,
                            .shard = message->shard,
                            .serial = ++s->lane->session_serial,
                            .replica = follow->replica,
                            .ask = {.urgent = message->urgent,
                                    .progress = message->progress,
                                    .shards = follow->replica->shards},
                            .session = s};
    uint32_t advice[GRANT_ADVICE];
    uint32_t count;
    uint32_t wait = shard_promise(s, follow, grant, advice, &count);
    if (wait) {
        busy_send(s, message->request, wait, advice, count);
        follow_refer(s, follow);
        free(grant);
        return;
    }
    replica_get(grant->replica);
    HASH_ADD(hh, s->grants, request, sizeof grant->request, grant);
    if (!slot_ask(s, grant)) {
        grant_end(s, grant, false);
        busy_send(s, message->request, SERVE_BUSY_MS, NULL, 0);
        follow_refer(s, follow);
    }
}

void grant_ask(struct session *s, const struct wire_message *message)
{
    struct follow *follow;
    struct grant *grant;
    HASH_FIND(hh, s->follows, &message->handle, sizeof message->handle, follow);
    HASH_FIND(hh, s->grants, &message->request, sizeof message->request, grant);
    if (grant) {
        serve_refuse(s, "asked twice under one number");
        return;
    }
    if (!follow || atomic_load(&s->lane->engine->closing)) {
        grant_gone_send(s, message->handle, message->request, WIRE_GONE_EVICTED);
        return;
    }
    struct replica *replica = follow->replica;
    if (message->shard >= replica->shards || !replica_shard_present(replica, message->shard)) {
        grant_gone_send(s, message->handle, message->request, WIRE_GONE_SHARD);
        return;
    }
    ask_admit(s, follow, message);
}

static void served(struct session *s, const struct grant *grant)
{
    atomic_fetch_add(&s->lane->engine->counters.bytes_served, grant->length);
    atomic_fetch_add(&s->peer->sent, grant->length);
}

void grant_revoke(struct session *s, struct grant *grant)
{
    bool reads = grant->exposed && s->link->transport->ops->one_sided;
    if (!grant->gone_ns) {
        grant_gone_send(s, 0, grant->request, WIRE_GONE_EVICTED);
    }
    if (!reads) {
        grant_end(s, grant, false);
    } else if (!grant->gone_ns) {
        grant->gone_ns = loop_now_ns(s->lane->loop);
    }
}

void grant_done(struct session *s, uint32_t request)
{
    struct grant *grant;
    HASH_FIND(hh, s->grants, &request, sizeof request, grant);
    if (!grant) {
        return;
    }
    if (grant->exposed) {
        atomic_fetch_add(&s->lane->engine->counters.shards_served, 1);
    }
    if (grant->exposed && s->link->transport->ops->one_sided && !grant->gone_ns) {
        served(s, grant);
    }
    grant_end(s, grant, true);
}

void serve_exposed_sent(struct link *link, uint32_t id)
{
    struct session *s = link->user;
    struct grant *grant;
    HASH_FIND(hh, s->grants, &id, sizeof id, grant);
    if (grant) {
        grant->sent = true;
        served(s, grant);
    }
}
