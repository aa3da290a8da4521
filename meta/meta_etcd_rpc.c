/* Range of etcd's gRPC service: a listing in protocol buffers costs a fraction of one through the JSON gateway, for etcd
 * (which makes the same message, and JSON of it) and for us. The field numbers are those of etcd's rpc.proto and kv.proto.
 *
 * Whatever goes wrong here is not explained: the gateway is asked the same, and says why. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "meta/base/buf.h"
#include "meta/base/util.h"
#include "meta/meta_etcd_call.h"

#define RPC_FRAME 5 /* bytes before a message: whether it is compressed, and its length */

enum rpc_wire { RPC_VARINT = 0, RPC_FIXED64 = 1, RPC_BYTES = 2, RPC_FIXED32 = 5 };

/* ---- protocol buffers ---- */

static void rpc_put_varint(struct buf *b, uint64_t v)
{
    for (; v >= 0x80; v >>= 7)
        buf_put_u8(b, (uint8_t)(v | 0x80));
    buf_put_u8(b, (uint8_t)v);
}

static void rpc_put_number(struct buf *b, unsigned field, uint64_t v)
{
    rpc_put_varint(b, field << 3 | RPC_VARINT);
    rpc_put_varint(b, v);
}

static void rpc_put_bytes(struct buf *b, unsigned field, const char *bytes, size_t length)
{
    rpc_put_varint(b, field << 3 | RPC_BYTES);
    rpc_put_varint(b, length);
    buf_put_bytes(b, bytes, length);
}

static uint64_t rpc_get_varint(struct buf *b)
{
    uint64_t v = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
        uint8_t byte = buf_get_u8(b);
        v |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80)
            return v;
    }
    b->bad = true;
    return 0;
}

/* A field of a message: its number, and what it holds, a number or bytes. */
struct rpc_field {
    uint64_t field;
    uint64_t number;
    struct buf bytes;
};

static bool rpc_get_field(struct buf *b, struct rpc_field *out)
{
    *out = (struct rpc_field){0};
    if (b->bad || b->at == b->size)
        return false;
    uint64_t tag = rpc_get_varint(b);
    size_t length = 0;
    out->field = tag >> 3;
    switch (tag & 7) {
    case RPC_VARINT:
        out->number = rpc_get_varint(b);
        return !b->bad;
    case RPC_FIXED64:
        length = 8;
        break;
    case RPC_FIXED32:
        length = 4;
        break;
    case RPC_BYTES:
        length = rpc_get_varint(b);
        break;
    default:
        b->bad = true;
    }
    out->bytes = buf_over(b->data + b->at, length);
    return buf_get_view(b, length) != NULL;
}

/* ---- the answer ---- */

static void rpc_read_header(struct buf *message, struct etcd_range *out)
{
    struct rpc_field one;
    while (rpc_get_field(message, &one)) {
        if (one.field == 1)
            snprintf(out->cluster, sizeof(out->cluster), "%llu", (unsigned long long)one.number);
        else if (one.field == 3)
            out->revision = one.number;
    }
}

/* The texts stay where they are; they get their ends when all has been read. */
static void rpc_read_kv(struct buf *message, struct etcd_kv *kv)
{
    struct rpc_field one;
    while (rpc_get_field(message, &one)) {
        if (one.field == 1) {
            kv->key = (char *)one.bytes.data;
            kv->key_size = one.bytes.size;
        } else if (one.field == 5) {
            kv->value = (char *)one.bytes.data;
            kv->value_size = one.bytes.size;
        } else if (one.field == 3) {
            kv->revision = one.number;
        }
    }
}

static int rpc_read(struct buf message, struct etcd_range *out)
{
    struct rpc_field one;
    struct buf counting = message;
    size_t count = 0;
    while (rpc_get_field(&counting, &one))
        count += one.field == 2;
    out->kvs = calloc(count + 1, sizeof(*out->kvs));
    bool good = out->kvs && !counting.bad;
    while (good && rpc_get_field(&message, &one)) {
        struct etcd_kv *kv = &out->kvs[out->count];
        if (one.field == 1) {
            rpc_read_header(&one.bytes, out);
        } else if (one.field == 2) {
            rpc_read_kv(&one.bytes, kv);
            out->count++;
        } else if (one.field == 3) {
            out->more = one.number != 0;
        }
        good = good && !one.bytes.bad;
    }
    for (struct etcd_kv *kv = out->kvs; good && kv < out->kvs + out->count; kv++) {
        if (kv->key)
            kv->key[kv->key_size] = '\0'; /* over what has been read */
        if (kv->value)
            kv->value[kv->value_size] = '\0';
    }
    return good ? 0 : -EPROTO;
}

/* ---- the call ---- */

int etcd_rpc_range(struct etcd *s, struct http *http, const char *after, const char *end,
                   uint64_t limit, uint64_t revision, struct etcd_range *out)
{
    struct http_reply reply;
    long status;
    size_t size = strlen(after) + 1; /* with its NUL it is the key that follows next */
    size_t room = RPC_FRAME + size + strlen(end) + 64;
    util_autofree uint8_t *bytes = malloc(room);
    util_autofree char *url = NULL;
    if (!bytes || asprintf(&url, "%s/etcdserverpb.KV/Range", s->endpoints[s->endpoint]) < 0) {
        url = NULL;
        return -ENOMEM;
    }
    struct buf message = buf_over(bytes + RPC_FRAME, room - RPC_FRAME);
    rpc_put_bytes(&message, 1, after, size);
    rpc_put_bytes(&message, 2, end, strlen(end));
    rpc_put_number(&message, 3, limit);
    rpc_put_number(&message, 4, revision);
    struct buf frame = buf_over(bytes, RPC_FRAME);
    buf_put_u8(&frame, 0);
    buf_put_u32(&frame, (uint32_t)message.at);
    uint64_t now = util_now_ms();
    int rc = http_rpc(http, url, s->token, bytes, RPC_FRAME + message.at,
                      now < s->deadline_ms ? (long)(s->deadline_ms - now) : 1, &reply, &status);
    if (rc < 0)
        return rc;
    out->bytes = reply.body;
    frame = buf_over(reply.body, reply.length);
    bool plain = buf_get_u8(&frame) == 0;
    uint32_t length = buf_get_u32(&frame);
    if (status != 0 || !plain || frame.bad || length != frame.size - frame.at)
        return -EPROTO;
    return rpc_read(buf_over(frame.data + frame.at, length), out);
}
