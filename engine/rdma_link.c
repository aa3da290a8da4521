#include "engine/rdma_link.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <utlist.h>

#include "meta/base/buf.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

#define SPIN_MAX_NS   20000ull
#define SPIN_FIRST_NS 1000ull
#define HEARTBEAT_NS  2000000000ull
#define MESSAGE_HEAD  4 /* in the queue, before each message */

enum frame_kind { FRAME_MESSAGE = 1, FRAME_CREDITS };

// -- Buffers and the queue pair -------------------------------------------------------------------

static uint8_t *slot_receive(const struct rdma_link *link, unsigned slot)
{
    return link->frames + (size_t)slot * RDMA_FRAME_BYTES;
}

static uint8_t *slot_send(const struct rdma_link *link, unsigned slot)
{
    return link->frames + (size_t)(RDMA_FRAMES + slot) * RDMA_FRAME_BYTES;
}

static int receive_post(struct rdma_link *link, unsigned slot)
{
    struct ibv_sge piece = {.addr = (uintptr_t)slot_receive(link, slot),
                            .length = RDMA_FRAME_BYTES,
                            .lkey = link->frames_memory.region->lkey};
    struct ibv_recv_wr request = {
        .wr_id = RDMA_WORK_RECEIVE * 256 + slot, .sg_list = &piece, .num_sge = 1};
    struct ibv_recv_wr *bad;
    return -ibv_post_recv(link->rails[0].id->qp, &request, &bad);
}

int rdma_link_pair(struct rdma_link *link)
{
    struct rdma_rail *rail = &link->rails[0];
    size_t bytes = 2ull * RDMA_FRAMES * RDMA_FRAME_BYTES;
    int r = rdma_rail_pair(rail, RDMA_FRAMES);
    if (r < 0)
        return r;
    link->frames = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (link->frames == MAP_FAILED) {
        link->frames = NULL;
        return -ENOMEM;
    }
    r = rdma_memory_register(rail->domain, link->frames, bytes, IBV_ACCESS_LOCAL_WRITE,
                             &link->frames_memory);
    if (r < 0)
        return r;
    for (unsigned i = 0; i < RDMA_FRAMES; i++) {
        link->idle_slots[i] = (uint8_t)i;
        r = receive_post(link, i);
        if (r < 0)
            return r;
    }
    link->idle_count = RDMA_FRAMES;
    return 0;
}

void rdma_link_unpair(struct rdma_link *link)
{
    rdma_rails_refuse(link);
    for (unsigned i = 0; i < RDMA_RAILS; i++)
        rdma_rail_unpair(&link->rails[i]);
}

void rdma_link_forget(struct rdma_link *link)
{
    (void)rdma_memory_deregister(&link->frames_memory);
    while (link->domains) {
        struct rdma_domain *domain = link->domains;
        LL_DELETE(link->domains, domain);
        rdma_domain_leave(domain);
    }
    if (link->frames)
        munmap(link->frames, 2ull * RDMA_FRAMES * RDMA_FRAME_BYTES);
    queue_free(&link->queue);
    free(link->assembly);
    link->frames = link->assembly = NULL;
}

// -- Completions ----------------------------------------------------------------------------------

void rdma_link_collect(struct rdma_link *link)
{
    for (unsigned i = 0; i < RDMA_RAILS; i++)
        if (link->rails[i].completions)
            rdma_rail_collect(&link->rails[i]);
}

// -- Sending --------------------------------------------------------------------------------------

static void frame_send(struct rdma_link *link, enum frame_kind kind, bool more, size_t length,
                       const uint8_t *bytes)
{
    uint8_t slot = link->idle_slots[--link->idle_count];
    uint8_t *frame = slot_send(link, slot);
    struct buf b = buf_over(frame, RDMA_FRAME_BYTES);
    buf_put_u8(&b, (uint8_t)kind);
    buf_put_u8(&b, more);
    buf_put_u16(&b, (uint16_t)link->owed);
    buf_put_u32(&b, (uint32_t)length);
    if (length > 0)
        memcpy(frame + RDMA_HEAD_BYTES, bytes, length);
    struct ibv_sge piece = {.addr = (uintptr_t)frame,
                            .length = (uint32_t)(RDMA_HEAD_BYTES + length),
                            .lkey = link->frames_memory.region->lkey};
    struct ibv_send_wr request = {.wr_id = RDMA_WORK_SEND * 256 + slot,
                                  .sg_list = &piece,
                                  .num_sge = 1,
                                  .opcode = IBV_WR_SEND};
    struct ibv_send_wr *bad;
    int error = ibv_post_send(link->rails[0].id->qp, &request, &bad);
    if (error) {
        link->idle_slots[link->idle_count++] = slot;
        rdma_link_break(link, -error, "a message cannot be sent: %s", strerror(error));
        return;
    }
    link->owed = 0;
    link->credits--;
}

void rdma_link_push(struct rdma_link *link)
{
    while (link->state == RDMA_OPEN && queue_length(&link->queue) > 0 && link->credits > 1 &&
           link->idle_count > 0) {
        uint8_t *head = link->queue.bytes + link->queue.begin;
        struct buf b = buf_over(head, MESSAGE_HEAD);
        size_t whole = buf_get_u32(&b);
        size_t left = whole - link->sent_of;
        size_t length = left;
        if (length > RDMA_FRAME_BYTES - RDMA_HEAD_BYTES)
            length = RDMA_FRAME_BYTES - RDMA_HEAD_BYTES;
        frame_send(link, FRAME_MESSAGE, length < left, length, head + MESSAGE_HEAD + link->sent_of);
        link->sent_of += length;
        if (length == left) {
            link->sent_of = 0;
            queue_drop(&link->queue, MESSAGE_HEAD + whole);
        }
    }
    if (link->state == RDMA_OPEN && link->owed >= RDMA_FRAMES / 2 && link->credits > 0 &&
        link->idle_count > 0)
        frame_send(link, FRAME_CREDITS, false, 0, NULL);
}

void rdma_link_heartbeat(struct rdma_link *link, uint64_t now_ns)
{
    // an unanswered frame fails by itself when the device has repeated it in vain
    if (link->state == RDMA_OPEN && now_ns - link->rails[0].heard_ns > HEARTBEAT_NS &&
        link->credits > 1 && link->idle_count == RDMA_FRAMES)
        frame_send(link, FRAME_CREDITS, false, 0, NULL);
}

int rdma_link_send(struct link *base, const void *message, size_t length)
{
    struct rdma_link *link = rdma_link_of(base);
    if (length > TRANSPORT_MESSAGE_MAX)
        return -EMSGSIZE;
    if (link->state != RDMA_OPEN)
        return -ENOTCONN;
    if (queue_length(&link->queue) + MESSAGE_HEAD + length > RDMA_QUEUE_BYTES) {
        link->full = true;
        return -EAGAIN;
    }
    uint8_t *at = queue_reserve(&link->queue, MESSAGE_HEAD + length);
    if (!at)
        return -ENOMEM;
    struct buf b = buf_over(at, MESSAGE_HEAD);
    buf_put_u32(&b, (uint32_t)length);
    if (length > 0)
        memcpy(at + MESSAGE_HEAD, message, length);
    rdma_link_mark(link);
    return 0;
}

// -- Receiving ------------------------------------------------------------------------------------

static void message_part(struct rdma_link *link, const uint8_t *bytes, size_t length, bool more)
{
    const struct transport_events *events = link->base.transport->events;
    if (!more && link->assembled == 0) {
        events->message(&link->base, bytes, length);
        return;
    }
    if (!link->assembly)
        link->assembly = malloc(TRANSPORT_MESSAGE_MAX);
    if (!link->assembly) {
        rdma_link_break(link, -ENOMEM, "out of memory");
        return;
    }
    if (length == 0 || length > TRANSPORT_MESSAGE_MAX - link->assembled) {
        rdma_link_break(link, -EPROTO, "it sent a message that is too long");
        return;
    }
    memcpy(link->assembly + link->assembled, bytes, length);
    link->assembled += length;
    if (more)
        return;
    length = link->assembled;
    link->assembled = 0;
    events->message(&link->base, link->assembly, length);
}

static void frame_take(struct rdma_link *link, const uint8_t *frame, uint32_t bytes)
{
    struct buf b = buf_over((void *)frame, bytes);
    uint8_t kind = buf_get_u8(&b);
    uint8_t more = buf_get_u8(&b);
    uint16_t credits = buf_get_u16(&b);
    uint32_t length = buf_get_u32(&b);
    const uint8_t *payload = buf_get_view(&b, length);
    if (buf_end(&b) < 0 || more > 1 || (kind != FRAME_MESSAGE && kind != FRAME_CREDITS) ||
        credits > RDMA_FRAMES || link->credits + credits > RDMA_FRAMES) {
        rdma_link_break(link, -EPROTO, "it sent a malformed frame");
        return;
    }
    link->credits += credits;
    if (kind == FRAME_MESSAGE)
        message_part(link, payload, length, more);
}

/* One frame that has arrived is told; its buffer is posted again. False: there was none. */
static bool arrived_tell(struct rdma_link *link)
{
    if (link->arrived_count == 0)
        return false;
    unsigned slot = link->arrived[link->arrived_begin].slot;
    uint32_t length = link->arrived[link->arrived_begin].length;
    link->arrived_begin = (link->arrived_begin + 1) % RDMA_FRAMES;
    link->arrived_count--;
    frame_take(link, slot_receive(link, slot), length);
    if (link->item.dead || link->state != RDMA_OPEN)
        return true;
    int r = receive_post(link, slot);
    if (r < 0)
        rdma_link_break(link, r, "a buffer cannot be posted: %s", strerror(-r));
    else
        link->owed++;
    return true;
}

// -- The turn -------------------------------------------------------------------------------------

/* A completion that comes within microseconds costs less to wait for than to be woken for. */
static void spin(struct rdma_link *link)
{
    if (link->state != RDMA_OPEN || link->reads_count == 0 || link->spin_ns == 0)
        return;
    uint64_t heard = link->heard_ns, until = util_now_ns() + link->spin_ns;
    do {
        rdma_link_collect(link);
    } while (link->heard_ns == heard && link->state == RDMA_OPEN && util_now_ns() < until);
    if (link->heard_ns == heard)
        link->spin_ns /= 2;
    else if (link->spin_ns < SPIN_MAX_NS)
        link->spin_ns *= 2;
}

void rdma_link_turn(struct rdma_link *link)
{
    while (!link->item.dead && arrived_tell(link))
        ;
    while (!link->item.dead && rdma_shard_tell(link))
        ;
    if (link->item.dead || link->state != RDMA_OPEN)
        return;
    if (link->full && queue_length(&link->queue) <= RDMA_QUEUE_BYTES / 2) {
        link->full = false;
        link->base.transport->events->writable(&link->base);
        if (link->item.dead)
            return;
    }
    rdma_shard_post(link);
    rdma_link_push(link);
    if (link->reads_count > 0 && link->spin_ns == 0 &&
        link->rails[0].reads_window > RDMA_READS_FIRST)
        link->spin_ns = SPIN_FIRST_NS; // READs have become quick: polling on may pay
    spin(link);
}
