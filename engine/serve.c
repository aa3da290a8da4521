#include "engine/serve.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "engine/cache.h"
#include "engine/handshake.h"
#include "engine/inplace.h"
#include "engine/peers.h"
#include "engine/wire.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

#define SERVE_GREET_NS       5000000000ull
#define SERVE_SESSIONS_MAX   4096
#define SERVE_GRANTS_SESSION 64 /* more asks than any honest puller has open on one link */
#define SERVE_GRANTS_NODE    1024
#define SERVE_BUSY_MS        20
#define SERVE_ATTACHED_MAX   65536 /* versions on one session */
#define SERVE_GRANT_NS \
    120000000000ull /* a puller that does not say DONE for so long is gone in all but name */

enum session_state { SESSION_NEW, SESSION_GREETED, SESSION_READY };

/* A version that the peer follows. */
struct follow {
    uint32_t handle;
    struct replica *replica; /* with a reference, counted in users */
    uint8_t *told;           /* bitmap of what the peer knows that we have */
    unsigned told_changes;
    bool told_digests;
    UT_hash_handle hh;
};

struct grant {
    uint32_t request;
    uint64_t
        serial; /* a puller may use a request's number again, also while an older one is prepared */
    struct replica *replica; /* with a reference, counted in grants once exposed */
    uint64_t since_ns;
    uint64_t length;
    bool exposed; /* false: an in-place shard is being looked at by a work thread */
    UT_hash_handle hh;
};

struct session {
    struct lane *lane;
    struct link *link;
    uint64_t serial; /* finds it again after a detour over a work thread */
    enum session_state state;
    bool welcome_owed; /* the queue was full */
    uint64_t since_ns;
    struct peer *peer;
    char node[MODEL_NODE_MAX + 1];
    uint64_t boot;
    uint8_t nonce_puller[WIRE_NONCE];
    uint8_t nonce_holder[WIRE_NONCE];
    struct follow *follows; /* uthash by handle */
    struct grant *grants;   /* uthash by request */
    struct session *prev, *next;
};

static int message_send(struct session *s, const struct wire_message *message)
{
    static __thread uint8_t bytes[TRANSPORT_MESSAGE_MAX];
    ssize_t length = wire_encode(message, bytes, sizeof bytes);
    return length < 0 ? (int)length : s->lane->transport->ops->send(s->link, bytes, (size_t)length);
}

/* ---- grants and follows ---- */

/* One who may ask for the replica's bytes less; a file in place is closed behind the last one. */
static void user_end(struct lane *lane, struct replica *replica)
{
    pthread_mutex_lock(&replica->lock);
    replica->users--;
    pthread_mutex_unlock(&replica->lock);
    inplace_idle(replica);
    cache_retire(lane->engine->cache, replica);
}

/* done: the peer has said that it does not read any more. */
static void grant_end(struct session *s, struct grant *grant, bool done)
{
    /* NOLINTNEXTLINE(clang-analyzer-unix.Malloc): the loop took the next one before */
    HASH_DEL(s->grants, grant);
    if (grant->exposed) {
        s->lane->transport->ops->unexpose(s->link, grant->request);
        pthread_mutex_lock(&grant->replica->lock);
        grant->replica->grants--;
        grant->replica->torn |= !done;
        pthread_mutex_unlock(&grant->replica->lock);
        inplace_idle(grant->replica);
        atomic_fetch_sub(&s->lane->engine->counters.grants_open, 1);
    }
    replica_put(grant->replica);
    free(grant);
}

static void follow_end(struct session *s, struct follow *follow)
{
    struct replica *replica = follow->replica;
    /* NOLINTNEXTLINE(clang-analyzer-unix.Malloc): the loop took the next one before */
    HASH_DEL(s->follows, follow);
    free(follow->told);
    free(follow);
    user_end(s->lane, replica);
    replica_put(replica);
}

static void session_end(struct session *s)
{
    struct grant *grant;
    struct grant *next_grant;
    HASH_ITER(hh, s->grants, grant, next_grant) {
        grant_end(s, grant, false);
    }
    struct follow *follow;
    struct follow *next_follow;
    HASH_ITER(hh, s->follows, follow, next_follow) {
        follow_end(s, follow);
    }
    s->lane->transport->ops->shut(s->link);
    DL_DELETE(s->lane->sessions, s);
    free(s);
}

static void session_refuse(struct session *s, const char *reason)
{
    log_info("peer at %s%s%s: %s; link ended", s->link->peer, s->node[0] ? ", node " : "", s->node,
             reason);
    if (s->state != SESSION_READY) {
        atomic_fetch_add(&s->lane->engine->counters.links_refused, 1);
    }
    session_end(s);
}

void serve_accepted(struct lane *lane, struct link *link)
{
    size_t count;
    struct session *other;
    DL_COUNT(lane->sessions, other, count);
    struct session *s = count < SERVE_SESSIONS_MAX ? calloc(1, sizeof *s) : NULL;
    if (!s) {
        lane->transport->ops->shut(link);
        return;
    }
    s->lane = lane;
    s->link = link;
    s->serial = ++lane->session_serial;
    s->since_ns = loop_now_ns(lane->loop);
    link->user = s;
    DL_APPEND(lane->sessions, s);
}

void serve_down(struct link *link, int error, const char *reason)
{
    struct session *s = link->user;
    if (s->state == SESSION_READY || error == -ECONNRESET) {
        log_debug("peer at %s: %s", link->peer, reason);
        session_end(s);
    } else {
        session_refuse(s, reason);
    }
}

/* ---- greeting ---- */

static void welcome_send(struct session *s)
{
    struct engine *engine = s->lane->engine;
    const struct handshake_secret *secret = engine->config.secret;
    struct wire_message welcome = {
        .type = WIRE_WELCOME, .protocol = WIRE_PROTOCOL, .boot = engine->config.boot};
    snprintf(welcome.node, sizeof welcome.node, "%s", engine->config.node);
    memcpy(welcome.nonce, s->nonce_holder, sizeof s->nonce_holder);
    if (secret->length) {
        struct handshake_side them = {s->node, s->boot, s->nonce_puller};
        struct handshake_side us = {engine->config.node, engine->config.boot, s->nonce_holder};
        handshake_prove_holder(secret, &them, &us, welcome.proof);
    }
    int status = message_send(s, &welcome);
    s->welcome_owed = status == -EAGAIN;
    if (status < 0 && status != -EAGAIN) {
        session_refuse(s, "could not be answered");
    }
}

void serve_writable(struct link *link)
{
    struct session *s = link->user;
    if (s->welcome_owed) {
        welcome_send(s);
    } else {
        serve_news(s->lane);
    }
}

static void greet(struct session *s, const struct wire_message *hello)
{
    struct engine *engine = s->lane->engine;
    const struct handshake_secret *secret = engine->config.secret;
    if (s->state != SESSION_NEW) {
        session_refuse(s, "said HELLO twice");
        return;
    }
    snprintf(s->node, sizeof s->node, "%s", hello->node);
    s->boot = hello->boot;
    memcpy(s->nonce_puller, hello->nonce, sizeof s->nonce_puller);
    if (hello->wanted_boot && hello->wanted_boot != engine->config.boot) {
        session_refuse(s, "looks for another incarnation of this node");
        return;
    }
    if (secret->length && !hello->has_secret) {
        session_refuse(
            s,
            "has no cluster secret, and this node asks for one (give every node the same secret_file=)");
        return;
    }
    util_random(s->nonce_holder, sizeof s->nonce_holder);
    s->state = SESSION_GREETED;
    welcome_send(s);
}

static void proven(struct session *s, const struct wire_message *message)
{
    struct engine *engine = s->lane->engine;
    const struct handshake_secret *secret = engine->config.secret;
    if (s->state != SESSION_GREETED) {
        session_refuse(s, "sent its proof out of turn");
        return;
    }
    if (secret->length) {
        struct handshake_side them = {s->node, s->boot, s->nonce_puller};
        struct handshake_side us = {engine->config.node, engine->config.boot, s->nonce_holder};
        uint8_t expected[WIRE_PROOF];
        handshake_prove_puller(secret, &them, &us, expected);
        if (!handshake_equal(expected, message->proof)) {
            session_refuse(
                s, "does not know the cluster secret (give every node the same secret_file=)");
            return;
        }
    }
    s->peer = peers_get(engine->peers, s->node, NULL);
    if (!s->peer) {
        session_refuse(s,
                       "is one more than this node can remember (give every node a secret_file=)");
        return;
    }
    s->state = SESSION_READY;
}

/* ---- attach ---- */

static void gone_send(struct session *s, uint32_t handle, uint32_t request, enum wire_reason reason)
{
    struct wire_message gone = {
        .type = WIRE_GONE, .handle = handle, .request = request, .reason = reason};
    (void)message_send(s, &gone);
}

static void digests_send(struct session *s, struct follow *follow)
{
    struct replica *replica = follow->replica;
    if (follow->told_digests || !atomic_load(&replica->all_known)) {
        return;
    }
    /* Once all are known they never change, so they can be read without the lock. */
    for (uint32_t first = 0; first < replica->shards; first += WIRE_DIGESTS_MAX) {
        uint32_t left = replica->shards - first;
        struct wire_message digests = {.type = WIRE_DIGESTS,
                                       .handle = follow->handle,
                                       .first = first,
                                       .count = left < WIRE_DIGESTS_MAX ? left : WIRE_DIGESTS_MAX,
                                       .digest_size = (uint8_t)replica->digest->size,
                                       .digests = replica_digest(replica, first)};
        if (message_send(s, &digests) < 0) {
            return; /* the queue is full: all again at the next news; a digest told twice is harmless */
        }
    }
    follow->told_digests = true;
}

static void attach(struct session *s, const struct wire_message *message)
{
    struct engine *engine = s->lane->engine;
    struct follow *follow;
    HASH_FIND(hh, s->follows, &message->handle, sizeof message->handle, follow);
    if (follow || HASH_COUNT(s->follows) >= SERVE_ATTACHED_MAX) {
        session_refuse(s, "attached too much, or one handle twice");
        return;
    }
    struct replica *replica = cache_find(engine->cache, &message->version);
    if (!replica) {
        gone_send(s, message->handle, 0, WIRE_GONE_EVICTED);
        return;
    }
    uint32_t bytes = (replica->shards + 7) / 8;
    follow = calloc(1, sizeof *follow);
    uint8_t *told = calloc(bytes + 1, 1);
    pthread_mutex_lock(&replica->lock);
    bool held = replica_servable(replica);
    if (held && follow && told) {
        replica->users++;
    }
    unsigned changes = atomic_load(&replica->changes);
    bool complete = replica_complete(replica);
    pthread_mutex_unlock(&replica->lock);
    if (!held || !follow || !told) {
        gone_send(s, message->handle, 0, replica->changed ? WIRE_GONE_CHANGED : WIRE_GONE_EVICTED);
        free(follow);
        free(told);
        replica_put(replica);
        return;
    }
    for (uint32_t k = 0; k < replica->shards; k++) {
        told[k / 8] |= (uint8_t)(replica_shard_present(replica, k) << (k % 8));
    }
    *follow = (struct follow){
        .handle = message->handle, .replica = replica, .told = told, .told_changes = changes};
    HASH_ADD(hh, s->follows, handle, sizeof follow->handle, follow);

    struct wire_message attached = {.type = WIRE_ATTACHED,
                                    .handle = message->handle,
                                    .count = replica->shards,
                                    .complete = complete,
                                    .bitmap = told};
    digests_send(s, follow); /* first, so that the puller can ask anybody at once */
    if (!follow->told_digests && atomic_load(&replica->all_known)) {
        follow->told_changes = changes - 1; /* the queue was full: still news */
    }
    if (message_send(s, &attached) < 0) {
        session_refuse(s, "does not read what it is sent");
    }
}

/* ---- ask ---- */

static void grant_expose(struct session *s, struct grant *grant, uint32_t shard, bool urgent)
{
    struct replica *replica = grant->replica;
    uint64_t offset = replica_shard_offset(replica, shard);
    struct transport_region region = {.fd = replica->fd,
                                      .offset = (off_t)offset,
                                      .map = replica->map ? replica->map + offset : NULL,
                                      .length = replica_shard_size(replica, shard)};
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
        gone_send(s, 0, grant->request, replica->changed ? WIRE_GONE_CHANGED : WIRE_GONE_EVICTED);
        grant_end(s, grant, false);
        return;
    }
    grant->exposed = true;
    grant->length = region.length;
    atomic_fetch_add(&s->lane->engine->counters.grants_open, 1);
    int status = s->lane->transport->ops->expose(s->link, grant->request, &region, urgent,
                                                 &message.descriptor);
    if (status == 0) {
        status = message_send(s, &message);
    }
    if (status < 0) {
        uint32_t request = grant->request;
        grant_end(s, grant, false);
        struct wire_message busy = {
            .type = WIRE_BUSY, .request = request, .retry_ms = SERVE_BUSY_MS};
        (void)message_send(s, &busy);
    }
}

/* A shard that lies in a local file: a work thread makes sure that the file is what it was, that the digest is known
 * and that the bytes are on their way from the disk; then the lane grants. It counts as a user, for the peer may detach
 * meanwhile, and the file must stay open. */
struct prepare_job {
    struct work_job job;
    struct lane *lane;
    uint64_t session; /* serial */
    uint64_t grant;   /* serial */
    uint32_t request;
    uint32_t shard;
    bool urgent;
    struct replica *replica;
    int status;
};

static struct session *session_find(struct lane *lane, uint64_t serial)
{
    struct session *s;
    DL_FOREACH(lane->sessions, s) {
        if (s->serial == serial) {
            return s;
        }
    }
    return NULL;
}

static void prepared(struct lane *lane, void *arg)
{
    struct prepare_job *prepare = arg;
    struct session *s = session_find(lane, prepare->session);
    struct grant *grant = NULL;
    if (s) {
        HASH_FIND(hh, s->grants, &prepare->request, sizeof prepare->request, grant);
    }
    if (grant && grant->serial != prepare->grant) {
        grant = NULL; /* another one under the same number */
    }
    if (grant && prepare->status == 0) {
        grant_expose(s, grant, prepare->shard, prepare->urgent);
    } else if (grant) {
        gone_send(s, 0, grant->request,
                  prepare->status == -ESTALE ? WIRE_GONE_CHANGED : WIRE_GONE_ERROR);
        grant_end(s, grant, false);
    }
    user_end(lane, prepare->replica);
    replica_put(prepare->replica);
    core_release(lane->engine);
    free(prepare);
}

static void prepare_run(struct work_job *job)
{
    struct prepare_job *prepare = util_container(job, struct prepare_job, job);
    prepare->status = inplace_prepare(prepare->replica, prepare->shard);
    lane_post(prepare->lane, prepared, prepare);
}

static void prepare_start(struct session *s, struct grant *grant, uint32_t shard, bool urgent)
{
    struct engine *engine = s->lane->engine;
    bool may = core_hold_open(engine);
    struct prepare_job *prepare = may ? malloc(sizeof *prepare) : NULL;
    if (!prepare) {
        gone_send(s, 0, grant->request, WIRE_GONE_ERROR);
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
                                    .shard = shard,
                                    .urgent = urgent,
                                    .replica = grant->replica};
    replica_get(grant->replica);
    pthread_mutex_lock(&grant->replica->lock);
    grant->replica->users++;
    pthread_mutex_unlock(&grant->replica->lock);
    work_post_urgent(engine->work, &prepare->job);
}

static void ask(struct session *s, const struct wire_message *message)
{
    struct engine *engine = s->lane->engine;
    struct follow *follow;
    struct grant *grant;
    HASH_FIND(hh, s->follows, &message->handle, sizeof message->handle, follow);
    HASH_FIND(hh, s->grants, &message->request, sizeof message->request, grant);
    if (grant) {
        session_refuse(s, "asked twice under one number");
        return;
    }
    if (!follow) {
        gone_send(s, message->handle, message->request, WIRE_GONE_EVICTED);
        return;
    }
    struct replica *replica = follow->replica;
    if (atomic_load(&engine->closing)) {
        gone_send(s, message->handle, message->request, WIRE_GONE_EVICTED);
        return;
    }
    if (message->shard >= replica->shards || !replica_shard_present(replica, message->shard)) {
        gone_send(s, message->handle, message->request, WIRE_GONE_SHARD);
        return;
    }
    grant = NULL;
    if (HASH_COUNT(s->grants) < SERVE_GRANTS_SESSION &&
        atomic_load(&engine->counters.grants_open) < SERVE_GRANTS_NODE) {
        grant = calloc(1, sizeof *grant);
    }
    if (!grant) {
        struct wire_message busy = {
            .type = WIRE_BUSY, .request = message->request, .retry_ms = SERVE_BUSY_MS};
        (void)message_send(s, &busy);
        return;
    }
    grant->request = message->request;
    grant->serial = ++s->lane->session_serial;
    grant->replica = replica;
    grant->since_ns = loop_now_ns(s->lane->loop);
    replica_get(replica);
    HASH_ADD(hh, s->grants, request, sizeof grant->request, grant);
    if (replica->inplace) {
        prepare_start(s, grant, message->shard, message->urgent);
    } else {
        grant_expose(s, grant, message->shard, message->urgent);
    }
}

static void finished(struct session *s, uint32_t request)
{
    struct grant *grant;
    HASH_FIND(hh, s->grants, &request, sizeof request, grant);
    if (!grant) {
        return;
    }
    if (grant->exposed) {
        atomic_fetch_add(&s->lane->engine->counters.shards_served, 1);
    }
    grant_end(s, grant, true);
}

void serve_exposed_sent(struct link *link, uint32_t id)
{
    struct session *s = link->user;
    struct grant *grant;
    HASH_FIND(hh, s->grants, &id, sizeof id, grant);
    if (grant) {
        atomic_fetch_add(&s->lane->engine->counters.bytes_served, grant->length);
        atomic_fetch_add(&s->peer->sent, grant->length);
    }
}

static void detach(struct session *s, uint32_t handle)
{
    struct follow *follow;
    HASH_FIND(hh, s->follows, &handle, sizeof handle, follow);
    if (follow) {
        follow_end(s, follow);
    }
}

void serve_message(struct link *link, const void *bytes, size_t length)
{
    struct session *s = link->user;
    struct wire_message message;
    int status = wire_decode(bytes, length, &message);
    if (status < 0) {
        session_refuse(s, status == -EPROTONOSUPPORT ? "speaks another version of the protocol"
                                                     : "sent a malformed message");
        return;
    }
    if (message.type == WIRE_HELLO) {
        greet(s, &message);
        return;
    }
    if (message.type == WIRE_PROOF_MESSAGE) {
        proven(s, &message);
        return;
    }
    if (s->state != SESSION_READY) {
        session_refuse(s, "asked before it proved who it is");
        return;
    }
    switch (message.type) {
    case WIRE_ATTACH:
        attach(s, &message);
        break;
    case WIRE_ASK:
        ask(s, &message);
        break;
    case WIRE_DONE:
        finished(s, message.request);
        break;
    case WIRE_DETACH:
        detach(s, message.handle);
        break;
    case WIRE_PING: {
        struct wire_message pong = {.type = WIRE_PONG, .token = message.token};
        (void)message_send(s, &pong);
        break;
    }
    case WIRE_PONG:
        break;
    default:
        session_refuse(s, "sent a message that only a holder sends");
        break;
    }
}

/* ---- news ---- */

static void follow_news(struct session *s, struct follow *follow)
{
    struct replica *replica = follow->replica;
    unsigned changes = atomic_load(&replica->changes);
    if (changes == follow->told_changes) {
        return;
    }
    uint8_t shards[4 * WIRE_HAVE_MAX];
    uint32_t count = 0;
    for (uint32_t k = 0; k < replica->shards && count < WIRE_HAVE_MAX; k++) {
        if (!(follow->told[k / 8] >> (k % 8) & 1) && replica_shard_present(replica, k)) {
            wire_have_put(shards, count++, k);
        }
    }
    digests_send(s, follow);
    if (count) {
        struct wire_message have = {
            .type = WIRE_HAVE, .handle = follow->handle, .count = count, .shards = shards};
        if (message_send(s, &have) < 0) {
            return; /* the next news tells all of it */
        }
        for (uint32_t i = 0; i < count; i++) {
            uint32_t k = wire_have_shard(&have, i);
            follow->told[k / 8] |= (uint8_t)(1u << (k % 8));
        }
    }
    if (count < WIRE_HAVE_MAX && (follow->told_digests || !atomic_load(&replica->all_known))) {
        follow->told_changes = changes;
    }
}

void serve_news(struct lane *lane)
{
    struct session *s;
    DL_FOREACH(lane->sessions, s) {
        struct follow *follow;
        struct follow *next;
        HASH_ITER(hh, s->follows, follow, next) {
            follow_news(s, follow);
        }
    }
}

void serve_tick(struct lane *lane, uint64_t now_ns)
{
    struct session *s;
    struct session *next;
    DL_FOREACH_SAFE(lane->sessions, s, next) {
        if (s->state != SESSION_READY && now_ns - s->since_ns > SERVE_GREET_NS) {
            session_refuse(s, "did not finish the greeting");
            continue;
        }
        struct grant *grant;
        struct grant *next_grant;
        HASH_ITER(hh, s->grants, grant, next_grant) {
            if (grant->exposed && now_ns - grant->since_ns > SERVE_GRANT_NS) {
                session_refuse(s, "took a grant and never said that it was done");
                break;
            }
        }
    }
    serve_news(lane);
}

void serve_revoke(struct lane *lane, void *arg)
{
    struct replica *replica = arg;
    struct session *s;
    DL_FOREACH(lane->sessions, s) {
        struct grant *grant;
        struct grant *next_grant;
        HASH_ITER(hh, s->grants, grant, next_grant) {
            if (grant->replica == replica) {
                gone_send(s, 0, grant->request, WIRE_GONE_EVICTED);
                grant_end(s, grant, false);
            }
        }
        struct follow *follow;
        struct follow *next_follow;
        HASH_ITER(hh, s->follows, follow, next_follow) {
            if (follow->replica == replica) {
                gone_send(s, follow->handle, 0,
                          replica->changed ? WIRE_GONE_CHANGED : WIRE_GONE_EVICTED);
                follow_end(s, follow);
            }
        }
    }
    replica_put(replica);
}

void serve_close_all(struct lane *lane)
{
    struct session *s;
    struct session *next;
    DL_FOREACH_SAFE(lane->sessions, s, next) {
        session_end(s);
    }
}
