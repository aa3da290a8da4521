#include "engine/bench.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <utlist.h>

#include "engine/storage.h"
#include "meta/base/buf.h"
#include "meta/base/util.h"

#define BENCH_CONNECT_MS 5000
#define BENCH_HEAD       18
#define BENCH_FINE       16 /* buckets between one power of two and the next */

enum kind { KIND_ASK = 1, KIND_GRANT, KIND_DONE };

/* ---- the bytes ---- */

struct buffer {
    struct storage *storage;
    int fd;
    uint8_t *map;
    uint64_t size;
};

/* Word `i` of every buffer that is sent from: no two blocks are alike, and none has a zero. */
static uint64_t word(uint64_t i)
{
    uint64_t x = (i + 1) * 0x9e3779b97f4a7c15ull;
    return (x ^ x >> 29) | 1;
}

static void bytes_fill(uint8_t *map, uint64_t offset, uint64_t length)
{
    for (uint64_t i = offset / 8; i < (offset + length) / 8; i++)
        memcpy(map + i * 8, &(uint64_t){word(i)}, 8);
}

static bool bytes_right(const uint8_t *map, uint64_t offset, uint64_t length)
{
    uint64_t wrong = 0;
    for (uint64_t i = offset / 8; i < (offset + length) / 8; i++) {
        uint64_t there;
        memcpy(&there, map + i * 8, 8);
        wrong |= there ^ word(i);
    }
    return wrong == 0;
}

static void buffer_close(struct buffer *buffer)
{
    if (buffer->map)
        storage_unmap(buffer->map, buffer->size);
    if (buffer->fd >= 0)
        close(buffer->fd);
    if (buffer->storage)
        storage_close(buffer->storage);
}

/* On pages as a mount would have them. */
static int buffer_open(struct buffer *buffer, uint64_t size)
{
    util_autofree char *error = NULL;
    *buffer = (struct buffer){.fd = -1, .size = size};
    int status = storage_open(storage_charge(size), NULL, &buffer->storage, &error);
    if (status == 0) {
        buffer->fd = storage_file(buffer->storage, "bench");
        status = buffer->fd < 0 ? buffer->fd : 0;
    }
    if (status == 0 && ftruncate(buffer->fd, (off_t)size) < 0)
        status = -errno;
    if (status == 0)
        status = storage_map(buffer->fd, size, &buffer->map);
    if (status == 0)
        status = storage_populate(buffer->map, size);
    if (status == 0)
        bytes_fill(buffer->map, 0, size);
    else
        buffer_close(buffer);
    return status;
}

/* ---- a thread and its links ---- */

/* A block on its way, at either side. */
struct block {
    struct transport_fetch fetch;
    uint64_t offset;
    uint64_t begun_ns; /* the initiator's; 0: it has landed */
    bool verify;
};

struct lane {
    const struct bench_config *config;
    struct buffer *buffer;
    pthread_t thread;
    bool started;
    struct loop *loop;
    struct transport *transport;
    struct peer *peers;
    /* Of the initiator. */
    unsigned index;
    uint64_t round; /* blocks asked for so far */
    unsigned under_way;
    uint64_t begun_ns, ended_ns;
    int status;
    struct bench_result result;
};

/* A link, and what is on its way over it by id. */
struct peer {
    struct lane *lane;
    struct link *link;
    struct peer *prev, *next;
    struct block blocks[BENCH_BATCH_MAX + 1];
};

static struct peer *peer_new(struct lane *lane)
{
    struct peer *peer = calloc(1, sizeof(*peer));
    if (peer) {
        peer->lane = lane;
        DL_APPEND(lane->peers, peer);
    }
    return peer;
}

static void peer_end(struct peer *peer)
{
    if (peer->link)
        peer->lane->transport->ops->shut(peer->link);
    DL_DELETE(peer->lane->peers, peer);
    free(peer);
}

/* The initiator's lane is over; a target only loses the link. */
static void fail(struct peer *peer, int status, const char *reason)
{
    struct lane *lane = peer->lane;
    bool outgoing = peer->link && peer->link->outgoing;
    peer_end(peer);
    if (outgoing) {
        lane->status = status;
        snprintf(lane->result.reason, sizeof(lane->result.reason), "%s", reason);
        loop_stop(lane->loop);
    }
}

static int send_head(struct peer *peer, enum kind kind, uint32_t id,
                     const struct transport_descriptor *descriptor, int status)
{
    uint8_t bytes[BENCH_HEAD + TRANSPORT_DESCRIPTOR_MAX];
    const struct block *block = &peer->blocks[id];
    struct buf b = buf_over(bytes, sizeof(bytes));
    buf_put_u8(&b, (uint8_t)kind);
    buf_put_u8(&b, block->verify);
    buf_put_u32(&b, id);
    buf_put_u64(&b, block->offset);
    buf_put_u32(&b, (uint32_t)block->fetch.length);
    if (kind == KIND_GRANT)
        buf_put_bytes(&b, descriptor->bytes, descriptor->length);
    else if (kind == KIND_DONE)
        buf_put_u32(&b, (uint32_t)-status);
    return peer->lane->transport->ops->send(peer->link, bytes, b.at);
}

/* The side that has the block lets the other one read it. */
static int grant(struct peer *peer, uint32_t id)
{
    struct lane *lane = peer->lane;
    const struct block *block = &peer->blocks[id];
    struct transport_descriptor descriptor;
    struct transport_region region = {.fd = lane->buffer->fd,
                                      .offset = (off_t)block->offset,
                                      .map = lane->buffer->map + block->offset,
                                      .length = block->fetch.length};
    int status = lane->transport->ops->expose(peer->link, id, &region, false, &descriptor);
    return status < 0 ? status : send_head(peer, KIND_GRANT, id, &descriptor, 0);
}

static int fetch(struct peer *peer, uint32_t id, const struct transport_descriptor *descriptor)
{
    struct block *block = &peer->blocks[id];
    uint8_t *to = peer->lane->buffer->map + block->offset;
    block->fetch =
        (struct transport_fetch){.destination = to, .length = block->fetch.length, .id = id};
    if (block->verify)
        memset(to, 0, block->fetch.length);
    return peer->lane->transport->ops->fetch(peer->link, descriptor, &block->fetch);
}

/* ---- the initiator ---- */

static unsigned bucket_of(uint64_t ns)
{
    if (ns < BENCH_FINE)
        return (unsigned)ns;
    unsigned power = 63 - (unsigned)__builtin_clzll(ns);
    return (power - 3) * BENCH_FINE + (unsigned)(ns >> (power - 4)) % BENCH_FINE;
}

static int batch_begin(struct peer *peer)
{
    struct lane *lane = peer->lane;
    const struct bench_config *c = lane->config;
    uint64_t places = c->buffer_size / c->block_size;
    lane->under_way = c->batch_size;
    for (uint32_t id = 1; id <= c->batch_size; id++) {
        struct block *block = &peer->blocks[id];
        uint64_t place = (lane->round++ * c->threads + lane->index) % places;
        *block = (struct block){.offset = place * c->block_size,
                                .fetch.length = c->block_size,
                                .begun_ns = util_now_ns(),
                                .verify = c->verify};
        int status = c->write ? grant(peer, id) : send_head(peer, KIND_ASK, id, NULL, 0);
        if (status < 0)
            return status;
    }
    return 0;
}

/* One of ours has landed, here or there. */
static int block_end(struct peer *peer, struct block *block)
{
    struct lane *lane = peer->lane;
    uint64_t now = util_now_ns();
    lane->result.latencies[bucket_of(now - block->begun_ns)]++;
    block->begun_ns = 0;
    lane->result.blocks++;
    if (--lane->under_way > 0)
        return 0;
    lane->result.batches++;
    lane->ended_ns = now;
    if ((double)(now - lane->begun_ns) / 1e9 < lane->config->seconds)
        return batch_begin(peer);
    loop_stop(lane->loop);
    return 0;
}

static void connected(struct link *link)
{
    struct peer *peer = link->user;
    peer->lane->begun_ns = util_now_ns();
    int status = batch_begin(peer);
    if (status < 0)
        fail(peer, status, strerror(-status));
}

/* ---- both ---- */

static void accepted(void *arg, struct link *link)
{
    struct peer *peer = peer_new(arg);
    if (!peer) {
        ((struct lane *)arg)->transport->ops->shut(link);
        return;
    }
    peer->link = link;
    link->user = peer;
}

static int done_take(struct peer *peer, uint32_t id, struct buf *b)
{
    int status = -(int)buf_get_u32(b);
    peer->lane->transport->ops->unexpose(peer->link, id);
    if (buf_end(b) < 0)
        return -EPROTO;
    if (!peer->link->outgoing || !peer->lane->config->write)
        return 0; /* theirs */
    return status < 0 ? status : block_end(peer, &peer->blocks[id]);
}

/* What the other side says of a block; nothing that it says leads out of the buffer. */
static int message_take(struct peer *peer, const void *bytes, size_t size)
{
    struct buf b = buf_over((void *)bytes, size);
    uint8_t kind = buf_get_u8(&b);
    uint8_t verify = buf_get_u8(&b);
    uint32_t id = buf_get_u32(&b);
    uint64_t offset = buf_get_u64(&b);
    uint32_t length = buf_get_u32(&b);
    bool ours = peer->link->outgoing;
    uint64_t room = peer->lane->buffer->size;
    if (b.bad || id == 0 || id > BENCH_BATCH_MAX || length == 0 || offset > room ||
        length > room - offset || offset % 8 || length % 8)
        return -EPROTO;
    struct block *block = &peer->blocks[id];
    if (ours && (offset != block->offset || length != block->fetch.length || !block->begun_ns))
        return -EPROTO;
    if (kind == KIND_DONE)
        return done_take(peer, id, &b);
    if (block->fetch.link)
        return -EPROTO; /* it is on its way */
    if (!ours)
        *block = (struct block){.offset = offset, .fetch.length = length, .verify = verify};
    if (kind == KIND_ASK && !ours)
        return buf_end(&b) < 0 ? -EPROTO : grant(peer, id);
    struct transport_descriptor descriptor = {.length = (uint8_t)(size - b.at)};
    if (kind != KIND_GRANT || size - b.at > sizeof(descriptor.bytes))
        return -EPROTO;
    buf_get_bytes(&b, descriptor.bytes, descriptor.length);
    return fetch(peer, id, &descriptor);
}

static void message(struct link *link, const void *bytes, size_t size)
{
    struct peer *peer = link->user;
    int status = message_take(peer, bytes, size);
    if (status < 0)
        fail(peer, status, status == -EBADMSG ? "wrong bytes arrived" : strerror(-status));
}

static void fetch_landed(struct link *link, struct transport_fetch *fetched)
{
    (void)link;
    (void)fetched;
}

static void fetch_done(struct link *link, struct transport_fetch *fetched, int status)
{
    struct peer *peer = link->user;
    struct lane *lane = peer->lane;
    struct block *block = util_container(fetched, struct block, fetch);
    if (status == 0 && block->verify &&
        !bytes_right(lane->buffer->map, block->offset, fetched->length))
        status = -EBADMSG;
    int sent = send_head(peer, KIND_DONE, fetched->id, NULL, status);
    status = status < 0 ? status : sent;
    if (status == 0 && link->outgoing)
        status = block_end(peer, block);
    if (status < 0 && link->outgoing)
        fail(peer, status, status == -EBADMSG ? "wrong bytes arrived" : strerror(-status));
}

static void exposed_sent(struct link *link, uint32_t id)
{
    (void)link;
    (void)id;
}

static void writable(struct link *link)
{
    (void)link;
}

static void down(struct link *link, int error, const char *reason)
{
    fail(link->user, error, reason);
}

static const struct transport_events events = {
    .accepted = accepted,
    .connected = connected,
    .message = message,
    .fetch_landed = fetch_landed,
    .fetch_done = fetch_done,
    .exposed_sent = exposed_sent,
    .writable = writable,
    .down = down,
};

static int lane_open(struct lane *lane)
{
    int status = loop_open(&lane->loop);
    if (status == 0) {
        const struct bench_config *c = lane->config;
        status =
            c->transport->open(lane->loop, &c->transport_config, &events, lane, &lane->transport);
    }
    return status;
}

static void *lane_run(void *arg)
{
    struct lane *lane = arg;
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL); /* they are for who waits for us */
    loop_run(lane->loop);
    while (lane->peers)
        peer_end(lane->peers);
    return NULL;
}

static int lane_start(struct lane *lane)
{
    int status = -pthread_create(&lane->thread, NULL, lane_run, lane);
    lane->started = status == 0;
    return status;
}

static void lane_close(struct lane *lane)
{
    if (lane->started)
        pthread_join(lane->thread, NULL);
    while (lane->peers) /* it never ran */
        peer_end(lane->peers);
    if (lane->transport)
        lane->transport->ops->close(lane->transport);
    if (lane->loop)
        loop_close(lane->loop);
}

/* ---- the target ---- */

struct bench_target {
    struct bench_config config;
    struct buffer buffer;
    char address[TRANSPORT_NAME_MAX + 1];
    unsigned turn; /* of the first lane's thread */
    struct lane lanes[];
};

static struct transport *next_transport(void *arg)
{
    struct bench_target *target = arg;
    return target->lanes[target->turn++ % target->config.threads].transport;
}

int bench_target_open(const struct bench_config *config, struct bench_target **out)
{
    struct bench_target *target =
        calloc(1, sizeof(*target) + config->threads * sizeof(target->lanes[0]));
    if (!target)
        return -ENOMEM;
    target->config = *config;
    int status = buffer_open(&target->buffer, config->buffer_size);
    for (unsigned i = 0; status == 0 && i < config->threads; i++) {
        target->lanes[i].config = &target->config;
        target->lanes[i].buffer = &target->buffer;
        status = lane_open(&target->lanes[i]);
    }
    struct transport *first = target->lanes[0].transport;
    if (status == 0)
        status = first->ops->listen(first, config->address, target->address);
    if (status == 0)
        first->ops->share(first, next_transport, target);
    for (unsigned i = 0; status == 0 && i < config->threads; i++)
        status = lane_start(&target->lanes[i]);
    if (status == 0)
        *out = target;
    else
        bench_target_close(target);
    return status;
}

const char *bench_target_address(const struct bench_target *target)
{
    return target->address;
}

void bench_target_close(struct bench_target *target)
{
    if (!target)
        return;
    for (unsigned i = 0; i < target->config.threads; i++)
        if (target->lanes[i].started)
            loop_stop(target->lanes[i].loop);
    for (unsigned i = 0; i < target->config.threads; i++)
        lane_close(&target->lanes[i]);
    buffer_close(&target->buffer);
    free(target);
}

/* ---- a run ---- */

static int lane_connect(struct lane *lane)
{
    struct peer *peer = peer_new(lane);
    if (!peer)
        return -ENOMEM;
    return lane->transport->ops->connect(lane->transport, lane->config->address, BENCH_CONNECT_MS,
                                         peer, &peer->link);
}

static void result_add(struct bench_result *sum, const struct bench_result *one)
{
    sum->batches += one->batches;
    sum->blocks += one->blocks;
    for (size_t i = 0; i < BENCH_BUCKETS; i++)
        sum->latencies[i] += one->latencies[i];
}

static int lanes_run(const struct bench_config *config, struct lane *lanes,
                     struct bench_result *result)
{
    int status = 0;
    uint64_t begun_ns = UINT64_MAX, ended_ns = 0;
    for (unsigned i = 0; status == 0 && i < config->threads; i++) {
        status = lane_open(&lanes[i]);
        if (status == 0)
            status = lane_connect(&lanes[i]);
        if (status == 0)
            status = lane_start(&lanes[i]);
    }
    for (unsigned i = 0; i < config->threads; i++) {
        if (status < 0 && lanes[i].started)
            loop_stop(lanes[i].loop);
        lane_close(&lanes[i]);
        if (status == 0 && lanes[i].status < 0) {
            status = lanes[i].status;
            snprintf(result->reason, sizeof(result->reason), "%s", lanes[i].result.reason);
        }
        result_add(result, &lanes[i].result);
        begun_ns = lanes[i].begun_ns < begun_ns ? lanes[i].begun_ns : begun_ns;
        ended_ns = lanes[i].ended_ns > ended_ns ? lanes[i].ended_ns : ended_ns;
    }
    result->seconds = ended_ns > begun_ns ? (double)(ended_ns - begun_ns) / 1e9 : 0;
    return status;
}

int bench_run(const struct bench_config *config, struct bench_result *result)
{
    memset(result, 0, sizeof(*result));
    if (config->block_size % 8 || !config->block_size ||
        config->buffer_size / config->block_size / config->threads < config->batch_size)
        return -EINVAL;
    struct buffer buffer;
    struct lane *lanes = calloc(config->threads, sizeof(*lanes));
    if (!lanes)
        return -ENOMEM;
    int status = buffer_open(&buffer, config->buffer_size);
    if (status == 0) {
        for (unsigned i = 0; i < config->threads; i++) {
            lanes[i].config = config;
            lanes[i].buffer = &buffer;
            lanes[i].index = i;
        }
        status = lanes_run(config, lanes, result);
        buffer_close(&buffer);
    }
    free(lanes);
    if (status < 0 && !result->reason[0])
        snprintf(result->reason, sizeof(result->reason), "%s", strerror(-status));
    return status;
}

uint64_t bench_latency(const struct bench_result *result, double share)
{
    uint64_t before = 0;
    uint64_t wanted = (uint64_t)((double)result->blocks * share + 0.5);
    for (unsigned i = 0; i < BENCH_BUCKETS; i++) {
        before += result->latencies[i];
        if (before >= wanted && before > 0)
            return i < BENCH_FINE ? i
                                  : (uint64_t)(BENCH_FINE + i % BENCH_FINE) << (i / BENCH_FINE - 1);
    }
    return 0;
}
