#include "engine/serve.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "engine/handshake.h"
#include "engine/serve_inside.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

#define SERVE_GREET_NS      5000000000ull
#define SERVE_SESSIONS_MAX  4096
#define SERVE_SESSIONS_PEER 64  /* one for each lane of it, and some that are about to break */
#define SERVE_STRANGERS     256 /* not greeted yet, from one address: many nodes may be behind it */
#define SERVE_FENCE_NS      1000000000ull /* to let go of what is taken back */
#define SERVE_GRANT_NS \
    120000000000ull /* a puller that does not say DONE for so long is gone in all but name */

int serve_send(struct session *s, const struct wire_message *message)
{
    static __thread uint8_t bytes[TRANSPORT_MESSAGE_MAX];
    ssize_t length = wire_encode(message, bytes, sizeof bytes);
    return length < 0 ? (int)length : s->link->transport->ops->send(s->link, bytes, (size_t)length);
}

struct session *serve_find(struct lane *lane, uint64_t serial)
{
    struct session *s;
    DL_FOREACH(lane->sessions, s) {
        if (s->serial == serial) {
            return s;
        }
    }
    return NULL;
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
    if (s->peer) {
        atomic_fetch_sub(&s->peer->sessions, 1);
    }
    s->link->transport->ops->shut(s->link);
    DL_DELETE(s->lane->sessions, s);
    free(s);
}

void serve_refuse(struct session *s, const char *reason)
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
    size_t count = 0;
    size_t strangers = 0;
    struct session *other;
    DL_FOREACH(lane->sessions, other) {
        count++;
        strangers +=
            other->state != SESSION_READY && transport_same_host(other->link->peer, link->peer);
    }
    struct session *s = count < SERVE_SESSIONS_MAX ? calloc(1, sizeof *s) : NULL;
    if (!s) {
        link->transport->ops->shut(link);
        return;
    }
    s->lane = lane;
    s->link = link;
    s->serial = ++lane->session_serial;
    s->since_ns = loop_now_ns(lane->loop);
    link->user = s;
    DL_APPEND(lane->sessions, s);
    if (strangers >= SERVE_STRANGERS) {
        serve_refuse(s, "has too many links that were not greeted yet");
    }
}

void serve_down(struct link *link, int error, const char *reason)
{
    struct session *s = link->user;
    struct lane *lane = s->lane;
    if (s->state == SESSION_READY || error == -ECONNRESET) {
        log_debug("peer at %s: %s", link->peer, reason);
        session_end(s);
    } else {
        serve_refuse(s, reason);
    }
    grant_dispatch(lane);
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
    int status = serve_send(s, &welcome);
    s->welcome_owed = status == -EAGAIN;
    if (status < 0 && status != -EAGAIN) {
        serve_refuse(s, "could not be answered");
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
        serve_refuse(s, "said HELLO twice");
        return;
    }
    snprintf(s->node, sizeof s->node, "%s", hello->node);
    s->boot = hello->boot;
    s->mark = (uint32_t)(hello->boot ^ hello->boot >> 32) | 1;
    memcpy(s->nonce_puller, hello->nonce, sizeof s->nonce_puller);
    if (hello->wanted_boot && hello->wanted_boot != engine->config.boot) {
        serve_refuse(s, "looks for another incarnation of this node");
        return;
    }
    if (secret->length && !hello->has_secret) {
        serve_refuse(
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
        serve_refuse(s, "sent its proof out of turn");
        return;
    }
    if (secret->length) {
        struct handshake_side them = {s->node, s->boot, s->nonce_puller};
        struct handshake_side us = {engine->config.node, engine->config.boot, s->nonce_holder};
        uint8_t expected[WIRE_PROOF];
        handshake_prove_puller(secret, &them, &us, expected);
        if (!handshake_equal(expected, message->proof)) {
            serve_refuse(
                s, "does not know the cluster secret (give every node the same secret_file=)");
            return;
        }
    }
    s->peer = peers_get(engine->peers, s->node, NULL);
    if (!s->peer) {
        serve_refuse(s, "is one more than this node can remember (give every node a secret_file=)");
        return;
    }
    s->link->yield_ns = &s->peer->yield_ns;
    s->slots.share = &s->peer->slots;
    if (atomic_fetch_add(&s->peer->sessions, 1) >= SERVE_SESSIONS_PEER) {
        serve_refuse(s, "has too many links to this node already");
        return;
    }
    s->state = SESSION_READY;
}

void serve_message(struct link *link, const void *bytes, size_t length)
{
    struct session *s = link->user;
    struct wire_message message;
    int status = wire_decode(bytes, length, &message);
    if (status < 0) {
        serve_refuse(s, status == -EPROTONOSUPPORT ? "speaks another version of the protocol"
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
        serve_refuse(s, "asked before it proved who it is");
        return;
    }
    struct lane *lane = s->lane;
    switch (message.type) {
    case WIRE_ATTACH:
        follow_attach(s, &message);
        break;
    case WIRE_ASK:
        grant_ask(s, &message);
        break;
    case WIRE_DONE:
        grant_done(s, message.request);
        break;
    case WIRE_DETACH:
        follow_detach(s, message.handle);
        break;
    case WIRE_PING: {
        struct wire_message pong = {.type = WIRE_PONG, .token = message.token};
        (void)serve_send(s, &pong);
        break;
    }
    case WIRE_PONG:
        break;
    default:
        serve_refuse(s, "sent a message that only a holder sends");
        break;
    }
    grant_dispatch(lane);
}

/* ---- news ---- */

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

static void pace_all(struct lane *lane)
{
    struct session *s;
    DL_FOREACH(lane->sessions, s) {
        struct grant *grant;
        struct grant *next;
        HASH_ITER(hh, s->grants, grant, next) {
            grant_pace(s, grant);
        }
    }
}

void serve_pace(struct loop_timer *timer)
{
    struct lane *lane = util_container(timer, struct lane, pace);
    pace_all(lane);
    grant_dispatch(lane);
}

void serve_tick(struct lane *lane, uint64_t now_ns)
{
    pace_all(lane);
    pthread_mutex_lock(&lane->engine->slots_lock);
    slots_overdue(&lane->engine->slots, now_ns);
    pthread_mutex_unlock(&lane->engine->slots_lock);
    struct session *s;
    struct session *next;
    DL_FOREACH_SAFE(lane->sessions, s, next) {
        if (s->state != SESSION_READY && now_ns - s->since_ns > SERVE_GREET_NS) {
            serve_refuse(s, "did not finish the greeting");
            continue;
        }
        if (s->broken) {
            serve_refuse(s, "shards cannot be offered to it this way");
            continue;
        }
        struct grant *grant;
        struct grant *next_grant;
        HASH_ITER(hh, s->grants, grant, next_grant) {
            grant_overdue(s, grant);
            if (grant->gone_ns && now_ns - grant->gone_ns > SERVE_FENCE_NS) {
                grant_end(s, grant, false); /* what it still reads ends the link */
            } else if (grant->exposed && now_ns - grant->since_ns > SERVE_GRANT_NS) {
                serve_refuse(s, "took a grant and never said that it was done");
                break;
            }
        }
    }
    grant_dispatch(lane);
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
                grant_revoke(s, grant);
            }
        }
        struct follow *follow;
        struct follow *next_follow;
        HASH_ITER(hh, s->follows, follow, next_follow) {
            if (follow->replica == replica) {
                grant_gone_send(s, follow->handle, 0,
                                replica->changed ? WIRE_GONE_CHANGED : WIRE_GONE_EVICTED);
                follow_end(s, follow);
            }
        }
    }
    replica_put(replica);
    grant_dispatch(lane);
}

void serve_drop(struct lane *lane, struct replica *replica)
{
    struct session *s;
    DL_FOREACH(lane->sessions, s) {
        struct grant *grant;
        struct grant *next;
        HASH_ITER(hh, s->grants, grant, next) {
            if (grant->replica == replica) {
                grant_gone_send(s, 0, grant->request, WIRE_GONE_EVICTED);
                grant_end(s, grant, false);
            }
        }
    }
    replica_get(replica);
    serve_revoke(lane, replica);
}

void serve_close_all(struct lane *lane)
{
    struct session *s;
    struct session *next;
    DL_FOREACH_SAFE(lane->sessions, s, next) {
        session_end(s);
    }
}
