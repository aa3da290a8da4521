#include "engine/tcp_link.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/uio.h>
#include <utlist.h>

#include "engine/tcp_pace.h"
#include "meta/base/buf.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

static const uint8_t preface[TCP_PREFACE_BYTES] = {'p', '2', 'p', 'f', 't', 'c', 'p', '1'};
static const uint8_t zeros[64 << 10];

enum progress { IDLE, BLOCKED, PAUSED, MORE };

// -- The queue ------------------------------------------------------------------------------------

static void head_put(uint8_t *head, enum tcp_frame kind, uint32_t id, uint32_t length,
                     uint64_t offset)
{
    struct buf b = buf_over(head, TCP_HEAD_BYTES);
    buf_put_u16(&b, kind);
    buf_put_u16(&b, 0);
    buf_put_u32(&b, id);
    buf_put_u32(&b, length);
    buf_put_u64(&b, offset);
}

static void end_put(struct tcp_link *link, uint32_t id, bool failed)
{
    uint8_t *head = queue_reserve(&link->queue, TCP_HEAD_BYTES);
    if (!head)
        tcp_link_break(link, -ENOMEM, "out of memory");
    else
        head_put(head, TCP_END, id, 0, failed);
}

int tcp_link_greet(struct tcp_link *link)
{
    link->stage = malloc(TCP_STAGE_BYTES);
    uint8_t *at = link->stage ? queue_reserve(&link->queue, TCP_PREFACE_BYTES) : NULL;
    if (!at)
        return -ENOMEM;
    memcpy(at, preface, TCP_PREFACE_BYTES);
    return 0;
}

int tcp_link_send(struct link *base, const void *message, size_t length)
{
    struct tcp_link *link = tcp_link_of(base);
    if (length > TRANSPORT_MESSAGE_MAX)
        return -EMSGSIZE;
    if (link->state != TCP_OPEN)
        return -ENOTCONN;
    if (queue_length(&link->queue) + TCP_HEAD_BYTES + length > TCP_QUEUE_BYTES) {
        link->full = true;
        return -EAGAIN;
    }
    uint8_t *at = queue_reserve(&link->queue, TCP_HEAD_BYTES + length);
    if (!at)
        return -ENOMEM;
    head_put(at, TCP_MESSAGE, 0, (uint32_t)length, 0);
    if (length > 0)
        memcpy(at + TCP_HEAD_BYTES, message, length);
    tcp_link_mark(link);
    return 0;
}

static void link_failed(struct tcp_link *link, int error)
{
    tcp_link_break(link, -error, "%s",
                   error == ETIMEDOUT ? "the other side stopped answering" : strerror(error));
}

static enum progress write_failed(struct tcp_link *link, int error)
{
    if (error == EAGAIN)
        return BLOCKED;
    if (error == EPIPE)
        return IDLE; // what the other side said before it closed is still to be read; reading tells the end
    link_failed(link, error);
    return BLOCKED;
}

static enum progress queue_write(struct tcp_link *link, int flags)
{
    while (queue_length(&link->queue) > 0) {
        ssize_t n = send(link->watch.fd, link->queue.bytes + link->queue.begin,
                         queue_length(&link->queue), MSG_NOSIGNAL | MSG_DONTWAIT | flags);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return write_failed(link, errno);
        queue_drop(&link->queue, (size_t)n);
    }
    return IDLE;
}

void tcp_link_watch(struct tcp_link *link)
{
    uint32_t events = (link->in.waits ? POLLRDHUP : POLLIN) | (link->blocked ? POLLOUT : 0);
    if (loop_watch_set(link->base.transport->loop, &link->watch, events) < 0)
        tcp_link_break(link, -ENOMEM, "out of memory");
}

void tcp_link_push(struct tcp_link *link)
{
    if (link->state == TCP_OPEN && link->slice.left == 0)
        queue_write(link, 0);
}

// -- Exposed regions ------------------------------------------------------------------------------

static struct tcp_exposure *exposure_find(struct tcp_link *link, uint32_t id,
                                          struct tcp_exposure ***list)
{
    struct tcp_exposure **lists[] = {&link->urgent, &link->normal, &link->quiet};
    for (int i = 0; i < 3; i++) {
        struct tcp_exposure *e;
        DL_SEARCH_SCALAR(*lists[i], e, id, id);
        if (e) {
            *list = lists[i];
            return e;
        }
    }
    return NULL;
}

int tcp_link_expose(struct link *base, uint32_t id, const struct transport_region *region,
                    bool urgent, struct transport_descriptor *descriptor)
{
    struct tcp_link *link = tcp_link_of(base);
    struct tcp_exposure **list;
    if (link->state != TCP_OPEN)
        return -ENOTCONN;
    if (exposure_find(link, id, &list))
        return -EEXIST;
    struct tcp_exposure *e = calloc(1, sizeof(*e));
    if (!e)
        return -ENOMEM;
    e->id = id;
    e->region = *region;

    struct buf b = buf_over(descriptor->bytes, sizeof(descriptor->bytes));
    buf_put_u8(&b, 'T');
    buf_put_u32(&b, id);
    buf_put_u64(&b, e->region.length);
    descriptor->length = (uint8_t)b.at;

    if (urgent)
        DL_APPEND(link->urgent, e);
    else
        DL_APPEND(link->normal, e);
    tcp_link_mark(link); // the message with the descriptor is sent in between, and leaves first
    return 0;
}

static bool exposure_under_way(const struct tcp_link *link, const struct tcp_exposure *e)
{
    return link->slice.left > 0 && link->slice.exposure == e;
}

void tcp_link_unexpose(struct link *base, uint32_t id)
{
    struct tcp_link *link = tcp_link_of(base);
    struct tcp_exposure **list;
    struct tcp_exposure *e = exposure_find(link, id, &list);
    if (!e)
        return;
    if (list != &link->quiet && link->state == TCP_OPEN) {
        // a slice whose head has left is filled with zeros, and the END behind it says that they are none
        if (exposure_under_way(link, e))
            link->slice.exposure = NULL;
        end_put(link, id, true);
        tcp_link_mark(link);
    }
    DL_DELETE(*list, e);
    free(e);
}

static void exposure_quiet(struct tcp_link *link, struct tcp_exposure *e, bool failed)
{
    struct tcp_exposure **list;
    if (exposure_find(link, e->id, &list) != e)
        return;
    DL_DELETE(*list, e);
    DL_APPEND(link->quiet, e);
    end_put(link, e->id, failed);
}

/* Begins the next slice: urgent ones first, else in turns. A limit is asked before, never within a slice, for messages
 * would wait behind it. */
static enum progress slice_next(struct tcp_link *link)
{
    struct tcp_exposure *e = link->urgent ? link->urgent : link->normal;
    if (!e) {
        tcp_pace_stop(link, &link->out);
        return IDLE;
    }
    uint64_t now = util_now_ns();
    if (e->sent == 0)
        e->since_ns = now;
    size_t yielded = TCP_SLICE_BYTES;
    if (link->urgent)
        tcp_pace_yield_ask(link, e, now);
    else if ((yielded = tcp_pace_yield_most(link, now)) == 0)
        return PAUSED;
    size_t most = tcp_pace_credit(link, &link->out, link->urgent != NULL);
    if (most == 0)
        return PAUSED;
    size_t length = e->region.length - e->sent;
    if (length > yielded)
        length = yielded;
    if (length > most)
        length = most;
    link->slice.exposure = e;
    link->slice.head_sent = 0;
    link->slice.left = length;
    head_put(link->slice.head, TCP_DATA, e->id, (uint32_t)length, e->sent);
    return MORE;
}

/* After a slice: all of it has been handed over, or its turn is over and another one's begins. A turn is many slices
 * long: whole shards soon are worth more than parts of many, and they land in memory that is still in the cache. */
static void slice_over(struct tcp_link *link)
{
    struct tcp_exposure *e = link->slice.exposure;
    link->slice.exposure = NULL;
    if (!e)
        return;
    if (e->sent < e->region.length) {
        struct tcp_exposure **list = link->urgent == e ? &link->urgent : &link->normal;
        if (e->turn >= TCP_SHARE_BYTES) {
            e->turn = 0;
            DL_DELETE(*list, e);
            DL_APPEND(*list, e);
        }
        return;
    }
    uint32_t id = e->id;
    tcp_socket_fit(link->watch.fd, e->sent, util_now_ns() - e->since_ns, &link->unsent);
    exposure_quiet(link, e, false);
    if (link->state == TCP_OPEN)
        link->base.transport->events->exposed_sent(&link->base, id);
}

/* The file gives less than it should: its slice goes on with zeros, and END tells that they are none. */
static void slice_failed(struct tcp_link *link, int error)
{
    struct tcp_exposure *e = link->slice.exposure;
    log_error(
        "%s: bytes %zu to %zu of a shard cannot be read: %s; the peer is told to take it elsewhere",
        link->base.peer, e->sent, e->region.length,
        error ? strerror(error) : "the file has become shorter");
    link->slice.exposure = NULL;
    exposure_quiet(link, e, true);
}

/* Memory is copied: its owner may have it back as soon as this returns. */
static ssize_t region_send(int fd, const struct transport_region *region, size_t at, size_t length)
{
    off_t offset = region->offset + (off_t)at;
    if (region->fd >= 0)
        return sendfile(fd, region->fd, &offset, length);
    if (region->map)
        return send(fd, (const uint8_t *)region->map + at, length, MSG_NOSIGNAL | MSG_DONTWAIT);
    struct iovec pieces[TCP_PIECES];
    struct msghdr header = {.msg_iov = pieces};
    header.msg_iovlen =
        transport_pieces(region->pieces, region->piece_count, at, length, pieces, TCP_PIECES);
    return sendmsg(fd, &header, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static enum progress slice_write(struct tcp_link *link, size_t *budget)
{
    int fd = link->watch.fd;
    while (link->slice.head_sent < TCP_HEAD_BYTES) {
        ssize_t n =
            send(fd, link->slice.head + link->slice.head_sent,
                 TCP_HEAD_BYTES - link->slice.head_sent, MSG_NOSIGNAL | MSG_DONTWAIT | MSG_MORE);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return write_failed(link, errno);
        link->slice.head_sent += (size_t)n;
    }
    while (link->slice.left > 0) {
        if (*budget == 0)
            return BLOCKED;
        struct tcp_exposure *e = link->slice.exposure;
        size_t wanted = link->slice.left < *budget ? link->slice.left : *budget;
        ssize_t n;
        if (e) {
            n = region_send(fd, &e->region, e->sent, wanted);
            // EPIPE and the like are the socket's; what reading the file gives is not among them
            if (n == 0 || (n < 0 && (errno == EIO || errno == EINVAL || errno == EBADF ||
                                     errno == EOVERFLOW || errno == ENOMEM || errno == EFAULT))) {
                slice_failed(link, n == 0 ? 0 : errno);
                continue;
            }
        } else {
            n = send(fd, zeros, wanted < sizeof(zeros) ? wanted : sizeof(zeros),
                     MSG_NOSIGNAL | MSG_DONTWAIT);
        }
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return write_failed(link, errno);
        link->slice.left -= (size_t)n;
        *budget -= (size_t)n;
        tcp_pace_spend(&link->out, (size_t)n);
        if (e) {
            e->sent += (size_t)n;
            e->turn += (size_t)n;
            link->base.sent += (uint64_t)n;
        }
    }
    slice_over(link);
    return MORE;
}

/* Between two frames: messages, then the news that there is room for more, then the next slice. */
static enum progress frame_next(struct tcp_link *link)
{
    enum progress p = queue_write(link, 0);
    if (link->state == TCP_OPEN && link->full &&
        queue_length(&link->queue) <= TCP_QUEUE_BYTES / 2) {
        link->full = false;
        link->base.transport->events->writable(&link->base);
        return link->dead || link->state != TCP_OPEN ? BLOCKED : p == BLOCKED ? BLOCKED : MORE;
    }
    if (p == BLOCKED)
        return BLOCKED;
    p = slice_next(link);
    if (p == MORE && link->slice.left == 0)
        slice_over(link); // an empty region is its END alone
    return p;
}

void tcp_link_write(struct tcp_link *link)
{
    size_t budget = TCP_TURN_BYTES;
    enum progress p = MORE;
    while (p == MORE && !link->dead && link->state == TCP_OPEN)
        p = link->slice.left > 0 ? slice_write(link, &budget) : frame_next(link);
    if (link->dead || link->state != TCP_OPEN)
        return;
    link->blocked = p == BLOCKED;
    tcp_link_watch(link);
}

// -- Receiving ------------------------------------------------------------------------------------

int tcp_link_fetch(struct link *base, const struct transport_descriptor *descriptor,
                   struct transport_fetch *fetch)
{
    struct tcp_link *link = tcp_link_of(base);
    struct buf b = buf_over((void *)descriptor->bytes, descriptor->length);
    uint8_t kind = buf_get_u8(&b);
    uint32_t id = buf_get_u32(&b);
    uint64_t length = buf_get_u64(&b);
    if (buf_end(&b) < 0 || kind != 'T' || id != fetch->id || length != fetch->length)
        return -EINVAL;
    if (link->state != TCP_OPEN)
        return -ENOTCONN;
    struct transport_fetch *other;
    LL_SEARCH_SCALAR(link->fetches, other, id, id);
    if (other)
        return -EEXIST;
    fetch->landed = 0;
    fetch->link = base;
    fetch->state = NULL;
    LL_PREPEND(link->fetches, fetch);
    return 0;
}

void tcp_link_cancel(struct link *base, struct transport_fetch *fetch)
{
    struct tcp_link *link = tcp_link_of(base);
    if (fetch->link != base)
        return; // it is over, or never began
    if (link->body == fetch)
        link->body = NULL;
    LL_DELETE(link->fetches, fetch);
    fetch->link = NULL;
}

static void body_landed(struct tcp_link *link, size_t length)
{
    link->body_left -= length;
    link->base.received += length;
    struct transport_fetch *fetch = link->body;
    if (!fetch)
        return;
    fetch->landed += length;
    if (link->body_left == 0)
        link->body = NULL;
    link->base.transport->events->fetch_landed(&link->base, fetch);
}

static void frame_data(struct tcp_link *link, uint32_t id, uint32_t length, uint64_t offset)
{
    struct transport_fetch *fetch;
    LL_SEARCH_SCALAR(link->fetches, fetch, id, id);
    if (length == 0 || length > TCP_SLICE_BYTES)
        tcp_link_break(link, -EPROTO, "it sent a slice of %u bytes", length);
    else if (fetch && (offset != fetch->landed || length > fetch->length - fetch->landed))
        tcp_link_break(link, -EPROTO, "it sent bytes outside of what was asked for");
    if (link->state != TCP_OPEN)
        return;
    link->body = fetch; // NULL: cancelled, what still arrives is dropped
    link->body_left = length;
}

static void frame_end(struct tcp_link *link, uint32_t id, uint32_t length, uint64_t failed)
{
    struct transport_fetch *fetch;
    LL_SEARCH_SCALAR(link->fetches, fetch, id, id);
    if (length != 0 || failed > 1) {
        tcp_link_break(link, -EPROTO, "it sent a malformed frame");
        return;
    }
    if (!fetch)
        return;
    if (!failed && fetch->landed != fetch->length) {
        tcp_link_break(link, -EPROTO, "it ended a shard before its last byte");
        return;
    }
    tcp_link_cancel(&link->base, fetch);
    link->base.transport->events->fetch_done(&link->base, fetch, failed ? -EIO : 0);
}

static void stage_greeting(struct tcp_link *link)
{
    const uint8_t *bytes = link->stage + link->stage_begin;
    size_t have = link->stage_end - link->stage_begin;
    if (have > TCP_PREFACE_BYTES)
        have = TCP_PREFACE_BYTES;
    if (memcmp(bytes, preface, have) == 0) {
        link->greeted = have == TCP_PREFACE_BYTES;
        if (link->greeted)
            link->stage_begin += TCP_PREFACE_BYTES;
        return;
    }
    static const char *const http[] = {"GET ", "HEAD", "POST", "PUT ", "PRI ", "OPTI", "HTTP"};
    const char *who = "it does not speak p2pfs";
    for (size_t i = 0; have >= 4 && i < sizeof(http) / sizeof(http[0]); i++)
        if (memcmp(bytes, http[i], 4) == 0)
            who = "it speaks HTTP, not p2pfs: is the port right?";
    if (have >= 2 && bytes[0] == 0x16 && bytes[1] == 0x03)
        who = "it speaks TLS, not p2pfs: is the port right?";
    if (have == TCP_PREFACE_BYTES && memcmp(bytes, preface, TCP_PREFACE_BYTES - 1) == 0)
        who = "it speaks another version of the protocol: upgrade the older node";
    tcp_link_break(link, -EPROTO, "%s", who);
}

/* Where the next bytes of a fetch go: at most `length` of them, in at most `room` pieces. */
static size_t body_place(const struct transport_fetch *fetch, size_t length, struct iovec *out,
                         size_t room)
{
    if (!fetch->destination)
        return transport_pieces(fetch->pieces, fetch->piece_count, fetch->landed, length, out,
                                room);
    *out = (struct iovec){(uint8_t *)fetch->destination + fetch->landed, length};
    return 1;
}

/* How many it was. */
static size_t body_copy(const struct transport_fetch *fetch, const uint8_t *bytes, size_t length)
{
    struct iovec pieces[TCP_PIECES];
    size_t count = body_place(fetch, length, pieces, TCP_PIECES);
    size_t copied = 0;
    for (size_t i = 0; i < count; i++) {
        memcpy(pieces[i].iov_base, bytes + copied, pieces[i].iov_len);
        copied += pieces[i].iov_len;
    }
    return copied;
}

/* One step through what is staged. False: more bytes are needed. */
static bool stage_step(struct tcp_link *link)
{
    size_t have = link->stage_end - link->stage_begin;
    if (have == 0)
        return false;
    if (!link->greeted) {
        stage_greeting(link);
        return link->greeted;
    }
    uint8_t *at = link->stage + link->stage_begin;
    if (link->body_left > 0) {
        size_t n = have < link->body_left ? have : link->body_left;
        if (link->body)
            n = body_copy(link->body, at, n);
        link->stage_begin += n;
        body_landed(link, n);
        return true;
    }
    if (have < TCP_HEAD_BYTES)
        return false;
    struct buf b = buf_over(at, TCP_HEAD_BYTES);
    uint16_t kind = buf_get_u16(&b);
    uint16_t zero = buf_get_u16(&b);
    uint32_t id = buf_get_u32(&b);
    uint32_t length = buf_get_u32(&b);
    uint64_t offset = buf_get_u64(&b);
    if (zero != 0 || kind < TCP_MESSAGE || kind > TCP_END) {
        tcp_link_break(link, -EPROTO, "it sent a frame of unknown kind %u", kind);
    } else if (kind == TCP_MESSAGE) {
        if (id != 0 || offset != 0 || length > TRANSPORT_MESSAGE_MAX) {
            tcp_link_break(link, -EPROTO, "it sent a message of %u bytes", length);
            return false;
        }
        if (have < TCP_HEAD_BYTES + length)
            return false;
        link->stage_begin += TCP_HEAD_BYTES + length;
        link->base.transport->events->message(&link->base, at + TCP_HEAD_BYTES, length);
    } else {
        link->stage_begin += TCP_HEAD_BYTES;
        if (kind == TCP_DATA)
            frame_data(link, id, length, offset);
        else
            frame_end(link, id, length, offset);
    }
    return true;
}

static void stage_parse(struct tcp_link *link)
{
    while (!link->dead && link->state == TCP_OPEN && stage_step(link))
        ;
    if (link->dead)
        return;
    if (link->stage_begin > 0) { // what is left is part of one frame
        memmove(link->stage, link->stage + link->stage_begin, link->stage_end - link->stage_begin);
        link->stage_end -= link->stage_begin;
        link->stage_begin = 0;
    }
}

/* Receives once, at most `most` bytes (> 0). Into the fetch's memory and, behind the slice, into the stage; `wanted`
 * gets what would have fitted. */
static ssize_t receive(struct tcp_link *link, size_t most, size_t *wanted)
{
    int fd = link->watch.fd;
    size_t body = link->body_left < most ? link->body_left : most;
    *wanted = body;
    if (body > 0 && !link->body)
        return recv(fd, NULL, body, MSG_DONTWAIT | MSG_TRUNC); // TCP: drops without a copy
    struct iovec pieces[TCP_PIECES + 1];
    struct msghdr header = {.msg_iov = pieces};
    if (body > 0) {
        header.msg_iovlen = body_place(link->body, body, pieces, TCP_PIECES);
        *wanted = 0;
        for (size_t i = 0; i < header.msg_iovlen; i++)
            *wanted += pieces[i].iov_len;
        if (*wanted < body)
            return recvmsg(fd, &header, MSG_DONTWAIT);
    }
    size_t room = TCP_STAGE_BYTES - link->stage_end;
    if ((link->body_left > 0 || link->fetches) && room > TCP_TAIL_BYTES)
        room = TCP_TAIL_BYTES; // more would be payload of the next slice, which had to be copied
    if (room > most - body)
        room = most - body;
    pieces[header.msg_iovlen++] = (struct iovec){
        .iov_base = link->stage + link->stage_end,
        .iov_len = room,
    };
    *wanted += room;
    return recvmsg(fd, &header, MSG_DONTWAIT);
}

static void received(struct tcp_link *link, size_t length)
{
    if (link->body_left > 0) {
        size_t n = length < link->body_left ? length : link->body_left;
        link->stage_end += length - n;
        body_landed(link, n);
    } else {
        link->stage_end += length;
    }
    if (!link->dead)
        stage_parse(link);
}

/* Where only messages come, nothing is limited. */
static size_t read_credit(struct tcp_link *link)
{
    if (!link->fetches && link->body_left == 0) {
        tcp_pace_stop(link, &link->in);
        return SIZE_MAX;
    }
    bool urgent = false;
    for (struct transport_fetch *fetch = link->fetches; fetch && !urgent; fetch = fetch->next)
        urgent = fetch->urgent;
    return tcp_pace_credit(link, &link->in, urgent);
}

void tcp_link_read(struct tcp_link *link)
{
    size_t budget = TCP_TURN_BYTES;
    while (budget > 0 && !link->dead && link->state == TCP_OPEN) {
        size_t wanted;
        size_t most = read_credit(link);
        if (most == 0) {
            if (link->state == TCP_OPEN)
                tcp_link_watch(link);
            return;
        }
        ssize_t n = receive(link, most, &wanted);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return;
        if (n < 0) {
            link_failed(link, errno);
            return;
        }
        if (n == 0) {
            tcp_link_break(link, -ECONNRESET, "the other side closed the connection%s",
                           link->greeted ? "" : " before it said anything");
            return;
        }
        tcp_pace_spend(&link->in, (size_t)n);
        received(link, (size_t)n);
        budget -= (size_t)n < budget ? (size_t)n : budget;
        if ((size_t)n < wanted)
            return; // the socket is empty; if it is not any more, the loop says so
    }
}

void tcp_link_forget(struct tcp_link *link)
{
    struct tcp_exposure **lists[] = {&link->urgent, &link->normal, &link->quiet};
    for (int i = 0; i < 3; i++) {
        for (struct tcp_exposure *e = *lists[i], *after; e; e = after) {
            after = e->next;
            free(e);
        }
        *lists[i] = NULL;
    }
    queue_free(&link->queue);
    free(link->stage);
    link->stage = NULL;
}
