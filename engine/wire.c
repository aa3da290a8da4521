#include "engine/wire.h"

#include <errno.h>
#include <string.h>

#include "meta/base/buf.h"
#include "meta/base/util.h"

#define DIGEST_MIN 16 /* bytes of the shortest digest */
#define SHARDS_MAX (MODEL_SIZE_MAX / MODEL_SHARD_MIN)
/* An ATTACHED is type, handle, count, complete and the bitmap, which must fit into one message. */
#define ATTACHED_MAX ((TRANSPORT_MESSAGE_MAX - 16) * 8)

struct format {
    void (*put)(struct buf *b, const struct wire_message *m);
    void (*get)(struct buf *b, struct wire_message *m);
};
static const struct format formats[WIRE_PONG + 1];

ssize_t wire_encode(const struct wire_message *message, void *out, size_t size)
{
    if (message->type < WIRE_HELLO || message->type > WIRE_PONG)
        return -EMSGSIZE;
    if (size > TRANSPORT_MESSAGE_MAX)
        size = TRANSPORT_MESSAGE_MAX;
    struct buf b = buf_over(out, size);
    buf_put_u8(&b, (uint8_t)message->type);
    formats[message->type].put(&b, message);
    return b.bad ? -EMSGSIZE : (ssize_t)b.at;
}

int wire_decode(const void *bytes, size_t length, struct wire_message *out)
{
    memset(out, 0, sizeof(*out));
    struct buf b = buf_over((void *)bytes, length);
    uint8_t type = buf_get_u8(&b);
    if (b.bad || type < WIRE_HELLO || type > WIRE_PONG)
        return -EBADMSG;
    out->type = type;
    formats[type].get(&b, out);
    // another version may have other fields behind: what it is comes before what it says
    if ((type == WIRE_HELLO || type == WIRE_WELCOME) && out->protocol != 0 &&
        out->protocol != WIRE_PROTOCOL)
        return -EPROTONOSUPPORT;
    return buf_end(&b);
}

// -- Fields with bounds ---------------------------------------------------------------------------

static bool get_flag(struct buf *b)
{
    uint8_t v = buf_get_u8(b);
    if (v > 1)
        b->bad = true;
    return v == 1;
}

static void get_node(struct buf *b, char node[MODEL_NODE_MAX + 1])
{
    buf_get_string(b, node, MODEL_NODE_MAX + 1);
    if (!b->bad && model_node_check(node) < 0)
        b->bad = true;
}

static uint32_t get_at_most(struct buf *b, uint32_t most)
{
    uint32_t v = buf_get_u32(b);
    if (v > most)
        b->bad = true;
    return v;
}

static uint32_t get_nonzero(struct buf *b)
{
    uint32_t v = buf_get_u32(b);
    if (v == 0)
        b->bad = true;
    return v;
}

static bool digest_size_good(uint8_t size)
{
    return size >= DIGEST_MIN && size <= MODEL_DIGEST_MAX;
}

// -- Opening --------------------------------------------------------------------------------------

static void put_hello(struct buf *b, const struct wire_message *m)
{
    buf_put_u32(b, WIRE_MAGIC);
    buf_put_u16(b, m->protocol);
    buf_put_string(b, m->node);
    buf_put_u64(b, m->boot);
    buf_put_u64(b, m->wanted_boot);
    buf_put_bytes(b, m->nonce, WIRE_NONCE);
    buf_put_u8(b, m->has_secret);
}

static void get_hello(struct buf *b, struct wire_message *m)
{
    if (buf_get_u32(b) != WIRE_MAGIC) {
        b->bad = true;
        return;
    }
    m->protocol = buf_get_u16(b);
    if (m->protocol != WIRE_PROTOCOL) {
        b->bad = true;
        return;
    }
    get_node(b, m->node);
    m->boot = buf_get_u64(b);
    m->wanted_boot = buf_get_u64(b);
    buf_get_bytes(b, m->nonce, WIRE_NONCE);
    m->has_secret = get_flag(b);
}

static void put_welcome(struct buf *b, const struct wire_message *m)
{
    buf_put_u16(b, m->protocol);
    buf_put_string(b, m->node);
    buf_put_u64(b, m->boot);
    buf_put_bytes(b, m->nonce, WIRE_NONCE);
    buf_put_bytes(b, m->proof, WIRE_PROOF);
}

static void get_welcome(struct buf *b, struct wire_message *m)
{
    m->protocol = buf_get_u16(b);
    if (m->protocol != WIRE_PROTOCOL) {
        b->bad = true;
        return;
    }
    get_node(b, m->node);
    m->boot = buf_get_u64(b);
    buf_get_bytes(b, m->nonce, WIRE_NONCE);
    buf_get_bytes(b, m->proof, WIRE_PROOF);
}

static void put_proof(struct buf *b, const struct wire_message *m)
{
    buf_put_bytes(b, m->proof, WIRE_PROOF);
}

static void get_proof(struct buf *b, struct wire_message *m)
{
    buf_get_bytes(b, m->proof, WIRE_PROOF);
}

// -- What a holder has ----------------------------------------------------------------------------

static void put_attach(struct buf *b, const struct wire_message *m)
{
    buf_put_u32(b, m->handle);
    buf_put_bytes(b, m->version.bytes, sizeof(m->version.bytes));
}

static void get_attach(struct buf *b, struct wire_message *m)
{
    m->handle = buf_get_u32(b);
    buf_get_bytes(b, m->version.bytes, sizeof(m->version.bytes));
}

/* A complete holder needs no bitmap. */
static void put_attached(struct buf *b, const struct wire_message *m)
{
    buf_put_u32(b, m->handle);
    buf_put_u32(b, m->count);
    buf_put_u8(b, m->complete);
    if (m->complete)
        return;
    if (m->count > ATTACHED_MAX)
        b->bad = true;
    else
        buf_put_bytes(b, m->bitmap, (m->count + 7) / 8);
}

static void get_attached(struct buf *b, struct wire_message *m)
{
    m->handle = buf_get_u32(b);
    m->count = get_at_most(b, SHARDS_MAX);
    m->complete = get_flag(b);
    if (m->complete || b->bad)
        return;
    m->bitmap = buf_get_view(b, ((size_t)m->count + 7) / 8);
    // bits beyond the last shard would be shards that do not exist
    if (m->bitmap && m->count % 8 != 0 && m->bitmap[m->count / 8] >> (m->count % 8) != 0)
        b->bad = true;
}

static void put_digests(struct buf *b, const struct wire_message *m)
{
    if (m->count > WIRE_DIGESTS_MAX || !digest_size_good(m->digest_size)) {
        b->bad = true;
        return;
    }
    buf_put_u32(b, m->handle);
    buf_put_u32(b, m->first);
    buf_put_u32(b, m->count);
    buf_put_u8(b, m->digest_size);
    buf_put_bytes(b, m->digests, (size_t)m->count * m->digest_size);
}

static void get_digests(struct buf *b, struct wire_message *m)
{
    m->handle = buf_get_u32(b);
    m->first = get_at_most(b, SHARDS_MAX);
    m->count = get_at_most(b, WIRE_DIGESTS_MAX);
    m->digest_size = buf_get_u8(b);
    if (!digest_size_good(m->digest_size) || m->first + m->count > SHARDS_MAX)
        b->bad = true;
    if (!b->bad)
        m->digests = buf_get_view(b, (size_t)m->count * m->digest_size);
}

static void put_have(struct buf *b, const struct wire_message *m)
{
    if (m->count > WIRE_HAVE_MAX) {
        b->bad = true;
        return;
    }
    buf_put_u32(b, m->handle);
    buf_put_u32(b, m->count);
    buf_put_bytes(b, m->shards, (size_t)m->count * 4);
}

static void get_have(struct buf *b, struct wire_message *m)
{
    m->handle = buf_get_u32(b);
    m->count = get_at_most(b, WIRE_HAVE_MAX);
    if (!b->bad)
        m->shards = buf_get_view(b, (size_t)m->count * 4);
}

uint32_t wire_have_shard(const struct wire_message *message, uint32_t index)
{
    const uint8_t *p = message->shards + (size_t)index * 4;
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

void wire_have_put(uint8_t *shards, uint32_t index, uint32_t shard)
{
    struct buf b = buf_over(shards + (size_t)index * 4, 4);
    buf_put_u32(&b, shard);
}

// -- Asking for shards ----------------------------------------------------------------------------

static void put_ask(struct buf *b, const struct wire_message *m)
{
    buf_put_u32(b, m->handle);
    buf_put_u32(b, m->request);
    buf_put_u32(b, m->shard);
    buf_put_u8(b, m->urgent);
    buf_put_u8(b, m->progress);
}

static void get_ask(struct buf *b, struct wire_message *m)
{
    m->handle = buf_get_u32(b);
    m->request = get_nonzero(b);
    m->shard = get_at_most(b, SHARDS_MAX - 1);
    m->urgent = get_flag(b);
    m->progress = buf_get_u8(b);
    if (m->progress > WIRE_PROGRESS_ALL)
        b->bad = true;
}

static void put_grant(struct buf *b, const struct wire_message *m)
{
    if ((m->digest_size != 0 && !digest_size_good(m->digest_size)) ||
        m->descriptor.length > TRANSPORT_DESCRIPTOR_MAX) {
        b->bad = true;
        return;
    }
    buf_put_u32(b, m->request);
    buf_put_u64(b, m->length);
    buf_put_u8(b, m->digest_size);
    if (m->digest_size != 0)
        buf_put_bytes(b, m->digests, m->digest_size);
    buf_put_u8(b, m->descriptor.length);
    buf_put_bytes(b, m->descriptor.bytes, m->descriptor.length);
}

static void get_grant(struct buf *b, struct wire_message *m)
{
    m->request = get_nonzero(b);
    m->length = buf_get_u64(b);
    m->digest_size = buf_get_u8(b);
    if (m->length == 0 || m->length > MODEL_SHARD_MAX ||
        (m->digest_size != 0 && !digest_size_good(m->digest_size))) {
        b->bad = true;
        return;
    }
    if (m->digest_size != 0)
        m->digests = buf_get_view(b, m->digest_size);
    uint8_t length = buf_get_u8(b);
    if (length > TRANSPORT_DESCRIPTOR_MAX) {
        b->bad = true;
        return;
    }
    m->descriptor.length = length;
    buf_get_bytes(b, m->descriptor.bytes, length);
}

static void put_busy(struct buf *b, const struct wire_message *m)
{
    if (m->count > WIRE_ADVICE_MAX) {
        b->bad = true;
        return;
    }
    buf_put_u32(b, m->request);
    buf_put_u32(b, m->retry_ms);
    buf_put_u8(b, (uint8_t)m->count);
    buf_put_bytes(b, m->shards, (size_t)m->count * 4);
}

static void get_busy(struct buf *b, struct wire_message *m)
{
    m->request = get_nonzero(b);
    m->retry_ms = buf_get_u32(b);
    m->count = buf_get_u8(b);
    if (m->count > WIRE_ADVICE_MAX)
        b->bad = true;
    if (!b->bad)
        m->shards = buf_get_view(b, (size_t)m->count * 4);
}

static void put_peers(struct buf *b, const struct wire_message *m)
{
    if (m->count > WIRE_PEERS_MAX) {
        b->bad = true;
        return;
    }
    buf_put_u32(b, m->handle);
    buf_put_u8(b, (uint8_t)m->count);
    buf_put_bytes(b, m->peers, m->peers_length);
}

static void get_peers(struct buf *b, struct wire_message *m)
{
    char node[MODEL_NODE_MAX + 1];
    m->handle = buf_get_u32(b);
    m->count = buf_get_u8(b);
    if (m->count > WIRE_PEERS_MAX)
        b->bad = true;
    size_t begin = b->at;
    for (uint32_t i = 0; i < m->count && !b->bad; i++) {
        get_node(b, node);
        (void)buf_get_u64(b);
    }
    if (!b->bad) {
        m->peers = b->data + begin;
        m->peers_length = b->at - begin;
    }
}

size_t wire_peer_put(uint8_t *peers, size_t at, const char *node, uint64_t boot)
{
    struct buf b = buf_over(peers + at, WIRE_PEER_BYTES);
    buf_put_string(&b, node);
    buf_put_u64(&b, boot);
    return at + b.at;
}

size_t wire_peer_get(const struct wire_message *message, size_t at, char node[MODEL_NODE_MAX + 1],
                     uint64_t *boot)
{
    struct buf b = buf_over((void *)(message->peers + at), message->peers_length - at);
    buf_get_string(&b, node, MODEL_NODE_MAX + 1);
    *boot = buf_get_u64(&b);
    return at + b.at;
}

static void put_gone(struct buf *b, const struct wire_message *m)
{
    buf_put_u32(b, m->handle);
    buf_put_u32(b, m->request);
    buf_put_u8(b, (uint8_t)m->reason);
}

static void get_gone(struct buf *b, struct wire_message *m)
{
    m->handle = buf_get_u32(b);
    m->request = buf_get_u32(b);
    uint8_t reason = buf_get_u8(b);
    if (reason < WIRE_GONE_EVICTED || reason > WIRE_GONE_ERROR)
        b->bad = true;
    else
        m->reason = reason;
}

static void put_done(struct buf *b, const struct wire_message *m)
{
    buf_put_u32(b, m->request);
}

static void get_done(struct buf *b, struct wire_message *m)
{
    m->request = get_nonzero(b);
}

static void put_detach(struct buf *b, const struct wire_message *m)
{
    buf_put_u32(b, m->handle);
}

static void get_detach(struct buf *b, struct wire_message *m)
{
    m->handle = buf_get_u32(b);
}

static void put_token(struct buf *b, const struct wire_message *m)
{
    buf_put_u64(b, m->token);
}

static void get_token(struct buf *b, struct wire_message *m)
{
    m->token = buf_get_u64(b);
}

static const struct format formats[WIRE_PONG + 1] = {
    [WIRE_HELLO] = {put_hello, get_hello},
    [WIRE_WELCOME] = {put_welcome, get_welcome},
    [WIRE_PROOF_MESSAGE] = {put_proof, get_proof},
    [WIRE_ATTACH] = {put_attach, get_attach},
    [WIRE_ATTACHED] = {put_attached, get_attached},
    [WIRE_DIGESTS] = {put_digests, get_digests},
    [WIRE_HAVE] = {put_have, get_have},
    [WIRE_ASK] = {put_ask, get_ask},
    [WIRE_GRANT] = {put_grant, get_grant},
    [WIRE_BUSY] = {put_busy, get_busy},
    [WIRE_GONE] = {put_gone, get_gone},
    [WIRE_PEERS] = {put_peers, get_peers},
    [WIRE_DONE] = {put_done, get_done},
    [WIRE_DETACH] = {put_detach, get_detach},
    [WIRE_PING] = {put_token, get_token},
    [WIRE_PONG] = {put_token, get_token},
};
