#include "engine/supplier.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "engine/better.h"
#include "engine/fast.h"
#include "engine/handshake.h"
#include "engine/spread.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

#define SUPPLIER_CONNECT_MS       3000
#define SUPPLIER_GREET_NS         3000000000ull
#define SUPPLIER_IDLE_NS          30000000000ull
#define SUPPLIER_PING_NS          1000000000ull
#define SUPPLIER_SILENT_NS        8000000000ull
#define SUPPLIER_BACKOFF_FIRST_MS 100
#define SUPPLIER_BACKOFF_LAST_MS  5000

enum supplier_state {
    SUPPLIER_IDLE,
    SUPPLIER_CONNECTING,
    SUPPLIER_GREETING,
    SUPPLIER_PROVING,
    SUPPLIER_READY
};

struct supplier {
    struct lane *lane;
    struct peer *peer;
    struct model_node node;
    enum supplier_state state;
    struct link *link;    /* NULL when IDLE */
    struct better better; /* while READY by TCP */
    uint8_t nonce[WIRE_NONCE];
    uint32_t next_handle;
    uint32_t next_request;
    struct attachment *attachments;
    struct request *requests;
    uint64_t deadline_ns; /* of greeting */
    uint64_t retry_ns;    /* IDLE: not before */
    uint64_t heard_ns;
    uint64_t pinged_ns;
    uint64_t idle_ns; /* nobody attached since; 0: somebody is */
    uint32_t failures;
    uint64_t link_bytes; /* of shards, over this link */
    bool blocked;        /* the send queue was full */
    bool greeting_owed;  /* HELLO or PROOF still has to go out */
    struct wire_message greeting;
    uint32_t *owed; /* requests whose DONE could not be sent yet (malloc'd) */
    size_t owed_count;
    size_t owed_room;
    struct supplier *prev, *next;
};

static void connect_now(struct supplier *s);

struct supplier *supplier_get(struct lane *lane, const struct model_node *node)
{
    struct supplier *s;
    DL_FOREACH(lane->suppliers, s) {
        /* Names carry incarnations: a restarted peer is another one. */
        if (s->node.boot == node->boot && strcmp(s->node.name, node->name) == 0) {
            return s;
        }
    }
    s = calloc(1, sizeof *s);
    if (!s) {
        return NULL;
    }
    s->lane = lane;
    s->node = *node;
    s->peer = peers_get(lane->engine->peers, node->name, node->address);
    if (!s->peer) {
        free(s);
        return NULL;
    }
    s->next_handle = 1;
    s->next_request = 1;
    DL_APPEND(lane->suppliers, s);
    return s;
}

const char *supplier_transport(const struct supplier *supplier)
{
    const struct transport *used =
        supplier->link ? supplier->link->transport : supplier->lane->transport;
    return used->ops->name;
}

struct peer *supplier_peer(struct supplier *supplier)
{
    return supplier->peer;
}

bool supplier_scattered(const struct supplier *supplier)
{
    return supplier->link && supplier->link->transport->ops->scattered;
}

const struct model_node *supplier_node(struct supplier *supplier)
{
    return &supplier->node;
}

bool supplier_by_rdma(const struct supplier *supplier)
{
    return supplier->link && supplier->link->transport == supplier->lane->fast;
}

uint64_t supplier_heard_ns(const struct supplier *supplier)
{
    return supplier->heard_ns;
}

static int message_send(struct supplier *s, const struct wire_message *message)
{
    uint8_t bytes[1024];
    ssize_t length = wire_encode(message, bytes, sizeof bytes);
    if (length < 0) {
        return (int)length;
    }
    int status = s->link->transport->ops->send(s->link, bytes, (size_t)length);
    if (status == -EAGAIN) {
        s->blocked = true;
    }
    return status;
}

/* ---- the link's life ---- */

static void retry_later(struct supplier *s, const char *reason)
{
    s->failures++;
    s->retry_ns = loop_now_ns(s->lane->loop) +
                  1000000ull * spread_backoff_ms(s->failures, SUPPLIER_BACKOFF_FIRST_MS,
                                                 SUPPLIER_BACKOFF_LAST_MS, util_random_u64());
    log_debug("peer %s at %s: %s", s->node.name, s->node.address, reason);
}

static bool tcp_allowed(const struct supplier *s)
{
    return s->lane->engine->config.rdma != ENGINE_RDMA_ONLY;
}

static void connect_now(struct supplier *s)
{
    bool rdma = s->lane->fast && fast_may(s->lane->engine, s->peer, &s->node);
    if (!rdma && !tcp_allowed(s)) {
        retry_later(s, "it offers no RDMA, and require_rdma is set");
        return;
    }
    struct transport *transport = rdma ? s->lane->fast : s->lane->transport;
    int status = transport->ops->connect(transport, rdma ? s->node.rdma : s->node.address,
                                         SUPPLIER_CONNECT_MS, s, &s->link);
    s->link_bytes = 0;
    if (status < 0) {
        s->link = NULL;
        if (rdma) {
            peer_rdma_failed(s->peer, strerror(-status), tcp_allowed(s));
        }
        retry_later(s, strerror(-status));
        return;
    }
    s->state = SUPPLIER_CONNECTING;
}

static void link_end(struct supplier *s, int error)
{
    better_end(&s->better);
    if (!s->link) {
        return;
    }
    if (s->state == SUPPLIER_READY) {
        atomic_fetch_sub(&s->peer->links, 1);
        atomic_fetch_sub(&s->peer->rdma_links, supplier_by_rdma(s));
    }
    /* After shut nothing writes into a request's memory any more. */
    s->link->transport->ops->shut(s->link);
    s->link = NULL;
    s->state = SUPPLIER_IDLE;
    s->greeting_owed = false;
    s->blocked = false;
    s->owed_count = 0;
    while (s->requests) {
        struct request *request = s->requests;
        DL_DELETE(s->requests, request);
        request->ops->ended(request, error, 0);
    }
    struct attachment *attachment;
    struct attachment *next;
    DL_FOREACH_SAFE(s->attachments, attachment, next) {
        attachment->handle = 0;
        attachment->ops->lost(attachment);
    }
}

static void link_fail(struct supplier *s, int error, const char *reason)
{
    uint64_t now = loop_now_ns(s->lane->loop);
    /* A link that nobody needs any more may end as it likes. */
    if (s->attachments && supplier_by_rdma(s) && fast_at_fault(error, s->link_bytes > 0)) {
        peer_rdma_failed(s->peer, reason, tcp_allowed(s));
        atomic_fetch_add(&s->lane->engine->counters.rdma_failures, 1);
        if (tcp_allowed(s)) {
            s->retry_ns = now; /* the other way, at once */
            link_end(s, error);
            return;
        }
    }
    s->failures++;
    uint32_t wait = spread_backoff_ms(s->failures, SUPPLIER_BACKOFF_FIRST_MS,
                                      SUPPLIER_BACKOFF_LAST_MS, util_random_u64());
    s->retry_ns = now + wait * 1000000ull;
    log_say(s->attachments ? LOG_INFO : LOG_DEBUG, "peer %s at %s: %s; trying again in %u ms",
            s->node.name, s->node.address, reason, wait);
    link_end(s, error);
}

void supplier_drop(struct supplier *supplier, const char *reason)
{
    link_fail(supplier, -ECONNABORTED, reason);
}

/* HELLO and PROOF: kept until the queue takes them. */
static void greeting_send(struct supplier *s, const struct wire_message *message)
{
    int status = message_send(s, message);
    s->greeting_owed = status == -EAGAIN;
    s->greeting = *message;
    if (status < 0 && status != -EAGAIN) {
        link_fail(s, status, "could not be greeted");
    }
}

void supplier_connected(struct link *link)
{
    struct supplier *s = link->user;
    if (link == s->better.link) {
        s->better.made_ns = loop_now_ns(s->lane->loop);
        return;
    }
    struct engine *engine = s->lane->engine;
    struct wire_message hello = {.type = WIRE_HELLO,
                                 .protocol = WIRE_PROTOCOL,
                                 .boot = engine->config.boot,
                                 .wanted_boot = s->node.boot,
                                 .has_secret = engine->config.secret->length > 0};
    snprintf(hello.node, sizeof hello.node, "%s", engine->config.node);
    util_random(s->nonce, sizeof s->nonce);
    memcpy(hello.nonce, s->nonce, sizeof s->nonce);
    s->state = SUPPLIER_GREETING;
    s->deadline_ns = loop_now_ns(s->lane->loop) + SUPPLIER_GREET_NS;
    greeting_send(s, &hello);
}

static void better_look(struct supplier *s, uint64_t now)
{
    if (!s->better.link && s->attachments && s->link->transport != s->lane->fast) {
        better_try(&s->better, s->lane, s->peer, &s->node, SUPPLIER_CONNECT_MS, s);
    }
    if (!better_due(&s->better, s->requests != NULL, now)) {
        return;
    }
    struct link *better = better_take(&s->better);
    s->retry_ns = UINT64_MAX; /* nobody who hears of the old link's end begins another */
    link_end(s, -ECONNABORTED);
    s->retry_ns = 0;
    s->link = better;
    s->link_bytes = 0;
    supplier_connected(better);
}

void supplier_down(struct link *link, int error, const char *reason)
{
    struct supplier *s = link->user;
    if (link == s->better.link) {
        better_fail(&s->better, s->peer, reason);
        return;
    }
    link_fail(s, error < 0 ? error : -ECONNRESET, reason);
}

static void attach_send(struct supplier *s, struct attachment *attachment)
{
    attachment->handle = s->next_handle++;
    struct wire_message attach = {
        .type = WIRE_ATTACH, .handle = attachment->handle, .version = attachment->version};
    if (message_send(s, &attach) < 0) {
        attachment->handle = 0; /* the next tick tries again */
    }
}

/* The link is of use once the PROOF has gone out; what follows it is read behind it. */
static void proving(struct supplier *s)
{
    if (s->state != SUPPLIER_PROVING || s->greeting_owed) {
        return;
    }
    s->state = SUPPLIER_READY;
    s->failures = 0;
    s->heard_ns = loop_now_ns(s->lane->loop);
    atomic_fetch_add(&s->peer->links, 1);
    atomic_fetch_add(&s->peer->rdma_links, supplier_by_rdma(s));
    struct attachment *attachment;
    DL_FOREACH(s->attachments, attachment) {
        attach_send(s, attachment);
    }
}

static void welcomed(struct supplier *s, const struct wire_message *message)
{
    struct engine *engine = s->lane->engine;
    if (s->state != SUPPLIER_GREETING) {
        link_fail(s, -EPROTO, "sent a second WELCOME");
        return;
    }
    if (strcmp(message->node, s->node.name) != 0 || message->boot != s->node.boot) {
        link_fail(s, -ESTALE, "is another node, or another incarnation, than the metadata says");
        return;
    }
    struct wire_message proof = {.type = WIRE_PROOF_MESSAGE};
    const struct handshake_secret *secret = engine->config.secret;
    if (secret->length) {
        struct handshake_side us = {engine->config.node, engine->config.boot, s->nonce};
        struct handshake_side them = {message->node, message->boot, message->nonce};
        uint8_t expected[WIRE_PROOF];
        handshake_prove_holder(secret, &us, &them, expected);
        if (!handshake_equal(expected, message->proof)) {
            atomic_fetch_add(&engine->counters.links_refused, 1);
            link_fail(s, -EACCES,
                      "does not know the cluster secret (give every node the same secret_file=)");
            return;
        }
        handshake_prove_puller(secret, &us, &them, proof.proof);
    }
    s->state = SUPPLIER_PROVING;
    greeting_send(s, &proof);
    proving(s);
}

/* ---- attachments and requests ---- */

void supplier_attach(struct supplier *supplier, struct attachment *attachment)
{
    attachment->supplier = supplier;
    attachment->handle = 0;
    DL_APPEND(supplier->attachments, attachment);
    supplier->idle_ns = 0;
    if (supplier->state == SUPPLIER_READY) {
        attach_send(supplier, attachment);
    } else if (supplier->state == SUPPLIER_IDLE &&
               loop_now_ns(supplier->lane->loop) >= supplier->retry_ns) {
        connect_now(supplier);
    }
}

void supplier_detach(struct attachment *attachment)
{
    struct supplier *s = attachment->supplier;
    DL_DELETE(s->attachments, attachment);
    if (s->state == SUPPLIER_READY && attachment->handle) {
        struct wire_message detach = {.type = WIRE_DETACH, .handle = attachment->handle};
        (void)message_send(
            s, &detach); /* a lost DETACH costs the holder a little memory until the link closes */
    }
    attachment->supplier = NULL;
    if (!s->attachments) {
        s->idle_ns = loop_now_ns(s->lane->loop);
    }
}

int supplier_ask(struct attachment *attachment, struct request *request)
{
    struct supplier *s = attachment->supplier;
    if (s->state != SUPPLIER_READY || !attachment->handle) {
        return -ENOTCONN;
    }
    if (s->better.made_ns) {
        return -EAGAIN; /* of the link that comes */
    }
    if (s->next_request == 0) {
        s->next_request = 1;
    }
    request->attachment = attachment;
    request->fetching = false;
    request->fetch.id = s->next_request;
    request->fetch.urgent = request->urgent;
    request->fetch.landed = 0;
    struct wire_message ask = {.type = WIRE_ASK,
                               .handle = attachment->handle,
                               .request = request->fetch.id,
                               .shard = request->shard,
                               .urgent = request->urgent,
                               .progress = request->progress};
    int status = message_send(s, &ask);
    if (status < 0) {
        return status;
    }
    s->next_request++;
    DL_APPEND(s->requests, request);
    return 0;
}

/* The holder keeps a shard lent, and its slot, until it hears DONE: one that cannot be sent now is owed. */
static void done_send(struct supplier *s, uint32_t id)
{
    struct wire_message done = {.type = WIRE_DONE, .request = id};
    if (message_send(s, &done) == 0) {
        return;
    }
    if (s->owed_count == s->owed_room) {
        size_t room = s->owed_room ? s->owed_room * 2 : 16;
        uint32_t *grown = reallocarray(s->owed, room, sizeof *grown);
        if (!grown) {
            log_debug("peer %s: no memory to remember a DONE; it ends the grant by its deadline",
                      s->node.name);
            return;
        }
        s->owed = grown;
        s->owed_room = room;
    }
    s->owed[s->owed_count++] = id;
}

static void owed_send(struct supplier *s)
{
    while (s->owed_count && !s->blocked) {
        struct wire_message done = {.type = WIRE_DONE, .request = s->owed[s->owed_count - 1]};
        if (message_send(s, &done) < 0) {
            return;
        }
        s->owed_count--;
    }
}

static void request_end(struct supplier *s, struct request *request, int status, uint32_t retry_ms)
{
    uint32_t id = request->fetch.id;
    bool granted = request->fetching;
    DL_DELETE(s->requests, request);
    if (granted) {
        done_send(s, id);
    }
    request->ops->ended(request, status, retry_ms);
}

void supplier_cancel(struct request *request)
{
    struct supplier *s = request->attachment->supplier;
    if (request->fetching) {
        s->link->transport->ops->cancel(s->link, &request->fetch);
    }
    DL_DELETE(s->requests, request);
    done_send(s, request->fetch.id);
}

static struct request *request_find(struct supplier *s, uint32_t id)
{
    struct request *request;
    DL_FOREACH(s->requests, request) {
        if (request->fetch.id == id) {
            return request;
        }
    }
    return NULL;
}

static struct attachment *attachment_find(struct supplier *s, uint32_t handle)
{
    struct attachment *attachment;
    DL_FOREACH(s->attachments, attachment) {
        if (attachment->handle == handle && handle) {
            return attachment;
        }
    }
    return NULL;
}

static void granted(struct supplier *s, const struct wire_message *message)
{
    struct request *request = request_find(s, message->request);
    if (!request || request->fetching) {
        done_send(s, message->request); /* cancelled meanwhile */
        return;
    }
    if (message->length != request->fetch.length) {
        link_fail(s, -EPROTO, "grants a shard of another length than the version has");
        return;
    }
    request->fetching = true; /* from here on the holder has to hear DONE */
    if (!request->ops->granted(request, message->digests, message->digest_size)) {
        request_end(s, request, -ENODATA, 0);
        return;
    }
    int status = s->link->transport->ops->fetch(s->link, &message->descriptor, &request->fetch);
    if (status < 0) {
        request_end(s, request, status, 0);
    }
}

static struct request *request_of(struct supplier *s, const struct attachment *attachment)
{
    struct request *request;
    DL_FOREACH(s->requests, request) {
        if (request->attachment == attachment) {
            return request;
        }
    }
    return NULL;
}

static void gone(struct supplier *s, const struct wire_message *message)
{
    if (message->request) {
        struct request *request = request_find(s, message->request);
        if (request) {
            if (request->fetching) {
                s->link->transport->ops->cancel(s->link, &request->fetch);
            }
            request_end(s, request, message->reason == WIRE_GONE_CHANGED ? -ESTALE : -ENOENT, 0);
        }
        return;
    }
    struct attachment *attachment = attachment_find(s, message->handle);
    if (!attachment) {
        return;
    }
    attachment->ops->gone(attachment, message->reason); /* first, so that nothing new is asked */
    struct request *request;
    while ((request = request_of(s, attachment))) { /* ending one may cancel others */
        if (request->fetching) {
            s->link->transport->ops->cancel(s->link, &request->fetch);
        }
        request_end(s, request, -ENOENT, 0);
    }
}

static void attachment_message(struct supplier *s, const struct wire_message *message)
{
    struct attachment *attachment = attachment_find(s, message->handle);
    if (!attachment) {
        return; /* detached meanwhile */
    }
    switch (message->type) {
    case WIRE_ATTACHED:
        attachment->ops->attached(attachment, message->count, message->complete, message->bitmap);
        break;
    case WIRE_DIGESTS:
        attachment->ops->digests(attachment, message->first, message->count, message->digest_size,
                                 message->digests);
        break;
    case WIRE_PEERS:
        for (size_t i = 0, at = 0; i < message->count; i++) {
            char node[MODEL_NODE_MAX + 1];
            uint64_t boot;
            at = wire_peer_get(message, at, node, &boot);
            attachment->ops->referred(attachment, node, boot);
        }
        break;
    default:
        for (uint32_t i = 0; i < message->count && attachment->supplier; i++) {
            attachment->ops->have(attachment, wire_have_shard(message, i));
        }
        break;
    }
}

static void busy(struct supplier *s, const struct wire_message *message)
{
    struct request *request = request_find(s, message->request);
    if (!request || request->fetching) {
        return; /* cancelled meanwhile */
    }
    if (message->count) {
        request->attachment->ops->advised(request->attachment, message);
    }
    request_end(s, request, -EBUSY, message->retry_ms);
}

void supplier_message(struct link *link, const void *bytes, size_t length)
{
    struct supplier *s = link->user;
    if (link == s->better.link) {
        supplier_down(link, -EPROTO, "it spoke before it was greeted");
        return;
    }
    struct wire_message message;
    int status = wire_decode(bytes, length, &message);
    if (status < 0) {
        link_fail(s, status,
                  status == -EPROTONOSUPPORT ? "speaks another version of the protocol"
                                             : "sent a malformed message");
        return;
    }
    s->heard_ns = loop_now_ns(s->lane->loop);
    if (message.type == WIRE_WELCOME) {
        welcomed(s, &message);
        return;
    }
    if (s->state != SUPPLIER_READY) {
        link_fail(s, -EPROTO, "spoke before it was greeted");
        return;
    }
    switch (message.type) {
    case WIRE_ATTACHED:
    case WIRE_DIGESTS:
    case WIRE_HAVE:
    case WIRE_PEERS:
        attachment_message(s, &message);
        break;
    case WIRE_GRANT:
        granted(s, &message);
        break;
    case WIRE_BUSY:
        busy(s, &message);
        break;
    case WIRE_GONE:
        gone(s, &message);
        break;
    case WIRE_PING: {
        struct wire_message pong = {.type = WIRE_PONG, .token = message.token};
        (void)message_send(s, &pong);
        break;
    }
    case WIRE_PONG:
        break;
    default:
        link_fail(s, -EPROTO, "sent a message that only a puller sends");
        break;
    }
}

void supplier_fetch_landed(struct link *link, struct transport_fetch *fetch)
{
    struct supplier *s = link->user;
    struct request *request = util_container(fetch, struct request, fetch);
    s->heard_ns = loop_now_ns(s->lane->loop);
    request->ops->landed(request);
}

void supplier_fetch_done(struct link *link, struct transport_fetch *fetch, int status)
{
    struct supplier *s = link->user;
    struct request *request = util_container(fetch, struct request, fetch);
    if (status == 0) {
        atomic_fetch_add(&s->peer->received, fetch->length);
        atomic_fetch_add(&s->lane->engine->counters.bytes_received, fetch->length);
        s->link_bytes += fetch->length;
    }
    if (status == 0 && supplier_by_rdma(s)) {
        atomic_fetch_add(&s->lane->engine->counters.bytes_rdma, fetch->length);
        peer_rdma_works(s->peer);
    }
    request_end(s, request, status, 0);
}

void supplier_writable(struct link *link)
{
    struct supplier *s = link->user;
    s->blocked = false;
    if (s->greeting_owed) {
        struct wire_message greeting = s->greeting;
        greeting_send(s, &greeting);
        proving(s);
        return;
    }
    owed_send(s);
    struct attachment *attachment;
    struct attachment *next;
    DL_FOREACH_SAFE(s->attachments, attachment, next) {
        attachment->ops->writable(attachment);
    }
}

/* ---- time ---- */

static void ready_tick(struct supplier *s, uint64_t now)
{
    owed_send(s);
    struct attachment *attachment;
    DL_FOREACH(s->attachments, attachment) {
        if (!attachment->handle && !s->blocked) {
            attach_send(s, attachment);
        }
    }
    if (s->requests && now - s->heard_ns > SUPPLIER_SILENT_NS) {
        link_fail(s, -ETIMEDOUT, "has been silent for 8 s");
        return;
    }
    better_look(s, now);
    if (s->state != SUPPLIER_READY) {
        return;
    }
    if (s->attachments && now - s->heard_ns > SUPPLIER_PING_NS &&
        now - s->pinged_ns > SUPPLIER_PING_NS) {
        struct wire_message ping = {.type = WIRE_PING, .token = now};
        s->pinged_ns = now;
        (void)message_send(s, &ping);
    }
}

static void supplier_free(struct supplier *s)
{
    link_end(s, -ESHUTDOWN);
    DL_DELETE(s->lane->suppliers, s);
    free(s->owed);
    free(s);
}

void supplier_tick(struct lane *lane, uint64_t now_ns)
{
    struct supplier *s;
    struct supplier *next;
    DL_FOREACH_SAFE(lane->suppliers, s, next) {
        if (!s->attachments && s->idle_ns && now_ns - s->idle_ns > SUPPLIER_IDLE_NS) {
            supplier_free(s);
            continue;
        }
        switch (s->state) {
        case SUPPLIER_IDLE:
            if (s->attachments && now_ns >= s->retry_ns && !peer_quarantined(s->peer)) {
                connect_now(s);
            }
            break;
        case SUPPLIER_GREETING:
        case SUPPLIER_PROVING:
            if (now_ns > s->deadline_ns) {
                link_fail(s, -ETIMEDOUT, "does not answer the greeting");
            }
            break;
        case SUPPLIER_READY:
            ready_tick(s, now_ns);
            break;
        default:
            break;
        }
    }
}

void supplier_close_all(struct lane *lane)
{
    struct supplier *s;
    struct supplier *next;
    DL_FOREACH_SAFE(lane->suppliers, s, next) {
        supplier_free(s);
    }
}
