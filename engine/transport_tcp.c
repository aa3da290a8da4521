#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <utlist.h>

#include "engine/lookup.h"
#include "engine/tcp_link.h"
#include "engine/tcp_pace.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

/* One connection a link. Shard bytes leave by sendfile(2) from the region's file and are received straight into the
 * fetch's memory, which is the fastest way through the kernel's TCP that exists without special hardware.
 *
 * Pages that sendfile has handed over belong to the socket until the other side has acknowledged them: a region that
 * was taken back (unexpose) and is then overwritten in place may still be seen changed by the peer, whose digest
 * tells. Freeing the pages or truncating the file is safe. */

#define NEVER_NS        (3600ull * 1000000000)
#define LISTEN_AGAIN_NS 200000000ull
#define ACCEPT_BATCH    32

static void link_connect(struct tcp_link *link);

// -- Links ----------------------------------------------------------------------------------------

void tcp_link_mark(struct tcp_link *link)
{
    if (link->marked || link->dead)
        return;
    struct tcp_transport *t = tcp_transport_of(link->base.transport);
    link->marked = true;
    link->marked_next = t->marked;
    t->marked = link;
    loop_timer_set(t->base.loop, &t->turn, 0);
}

static void link_disconnect(struct tcp_link *link)
{
    struct loop *loop = link->base.transport->loop;
    loop_timer_clear(loop, &link->patience);
    tcp_pace_leave(link);
    loop_watch_clear(loop, &link->watch);
    if (link->watch.fd >= 0)
        close(link->watch.fd);
    link->watch.fd = -1;
}

void tcp_link_break(struct tcp_link *link, int error, const char *format, ...)
{
    if (link->state == TCP_BROKEN || link->dead)
        return;
    link->state = TCP_BROKEN;
    link->error = error;
    va_list args;
    va_start(args, format);
    vsnprintf(link->reason, sizeof(link->reason), format, args);
    va_end(args);
    link_disconnect(link);
    tcp_link_mark(link);
}

/* Every fetch is answered, then the link itself. Each event may shut the link. */
static void link_tell(struct tcp_link *link)
{
    const struct transport_events *events = link->base.transport->events;
    struct transport_fetch *fetch;
    while (!link->dead && (fetch = link->fetches)) {
        tcp_link_cancel(&link->base, fetch);
        events->fetch_done(&link->base, fetch, link->error);
    }
    if (link->dead || link->told)
        return;
    link->told = true;
    events->down(&link->base, link->error, link->reason);
}

static void link_ready(struct loop_watch *watch, uint32_t ready)
{
    struct tcp_link *link = util_container(watch, struct tcp_link, watch);
    if (link->state == TCP_CONNECTING) {
        int error = 0;
        socklen_t length = sizeof(error);
        if (getsockopt(watch->fd, SOL_SOCKET, SO_ERROR, &error, &length) < 0)
            error = errno;
        if (error != 0) {
            link->error = -error;
            link_connect(link); // the name's next address
            return;
        }
        loop_timer_clear(link->base.transport->loop, &link->patience);
        link->state = TCP_OPEN;
        link->base.transport->events->connected(&link->base);
        if (!link->dead)
            tcp_link_write(link);
        return;
    }
    if (ready & ~(uint32_t)(POLLOUT | POLLIN))
        tcp_pace_leave(link); // it ends: what is left comes now, or the loop would turn over it
    if (ready & ~(uint32_t)POLLOUT)
        tcp_link_read(link);
    if (!link->dead && link->state == TCP_OPEN && (ready & POLLOUT))
        tcp_link_write(link);
}

static void link_impatient(struct loop_timer *timer)
{
    struct tcp_link *link = util_container(timer, struct tcp_link, patience);
    tcp_link_break(link, -ETIMEDOUT, "%s within %u ms",
                   link->state == TCP_RESOLVING ? "its name could not be looked up" : "no answer",
                   link->timeout_ms);
}

static struct tcp_link *link_new(struct tcp_transport *t)
{
    struct tcp_link *link = calloc(1, sizeof(*link));
    if (!link)
        return NULL;
    link->base.transport = &t->base;
    link->number = ++t->last_number;
    link->watch.fd = -1;
    link->watch.ready = link_ready;
    link->patience.due = link_impatient;
    tcp_pace_open(link);
    if (tcp_link_greet(link) < 0) {
        tcp_link_forget(link);
        free(link);
        return NULL;
    }
    DL_APPEND(t->links, link);
    return link;
}

static void tcp_shut(struct link *base)
{
    struct tcp_link *link = tcp_link_of(base);
    struct tcp_transport *t = tcp_transport_of(base->transport);
    if (link->dead)
        return;
    tcp_link_push(link);
    link->dead = true;
    link_disconnect(link);
    while (link->fetches)
        tcp_link_cancel(base, link->fetches);
    DL_DELETE(t->links, link);
    // its buffers may be in use further up the stack: they go when the turn is over
    link->dead_next = t->dead;
    t->dead = link;
    loop_timer_set(t->base.loop, &t->turn, 0);
}

/* A dead link that was marked is still in that list: it goes one turn later. */
static void links_reap(struct tcp_transport *t)
{
    struct tcp_link *link = t->dead;
    t->dead = NULL;
    while (link) {
        struct tcp_link *after = link->dead_next;
        if (link->marked) {
            link->dead_next = t->dead;
            t->dead = link;
        } else {
            tcp_link_forget(link);
            free(link);
        }
        link = after;
    }
}

/* The transport's turn: what calls asked for since the last one. */
static void tcp_turn(struct loop_timer *timer)
{
    struct tcp_transport *t = util_container(timer, struct tcp_transport, turn);
    loop_timer_set(t->base.loop, timer, NEVER_NS); // first, while its place is sure to be there
    struct tcp_link *marked = t->marked;
    t->marked = NULL;
    for (struct tcp_link *link = marked, *after; link; link = after) {
        after = link->marked_next;
        link->marked = false;
        if (link->dead)
            continue;
        if (link->state == TCP_OPEN)
            tcp_link_write(link);
        else if (link->state == TCP_BROKEN)
            link_tell(link);
    }
    links_reap(t);
}

// -- Connecting -----------------------------------------------------------------------------------

/* Tries the next address; when there is none left, the last one's error tells. */
static void link_connect(struct tcp_link *link)
{
    struct tcp_transport *t = tcp_transport_of(link->base.transport);
    loop_watch_clear(t->base.loop, &link->watch);
    if (link->watch.fd >= 0)
        close(link->watch.fd);
    link->watch.fd = -1;
    while (link->address_next < link->addresses.count) {
        const struct tcp_address *address = &link->addresses.list[link->address_next++];
        int fd = tcp_socket_connect(&t->tuning, address);
        if (fd < 0) {
            link->error = fd;
            continue;
        }
        link->state = TCP_CONNECTING;
        link->watch.fd = fd;
        if (loop_watch_set(t->base.loop, &link->watch, POLLOUT) < 0)
            tcp_link_break(link, -ENOMEM, "out of memory");
        return;
    }
    tcp_link_break(link, link->error, "%s", strerror(-link->error));
}

static void lookup_done(struct mailbox_item *item, void *arg)
{
    struct lookup *lookup = util_container(item, struct lookup, item);
    struct tcp_transport *t = arg;
    struct tcp_link *link = NULL;
    if (t)
        DL_SEARCH_SCALAR(t->links, link, number, lookup->number);
    if (link && link->state == TCP_RESOLVING) {
        link->addresses = lookup->addresses;
        if (lookup->result < 0)
            tcp_link_break(link, lookup->result, "its name cannot be resolved");
        else
            link_connect(link);
    }
    free(lookup);
}

static int tcp_connect(struct transport *base, const char *address, uint32_t timeout_ms, void *user,
                       struct link **out)
{
    struct tcp_transport *t = tcp_transport_of(base);
    struct tcp_addresses addresses = {.count = 0};
    int parsed = tcp_address_parse(address, false, false, &addresses);
    if (parsed < 0 && parsed != -EAGAIN)
        return parsed;
    struct tcp_link *link = link_new(t);
    if (!link)
        return -ENOMEM;
    link->base.user = user;
    link->base.outgoing = true;
    link->timeout_ms = timeout_ms;
    snprintf(link->base.peer, sizeof(link->base.peer), "%s", address);
    int r = loop_timer_set(base->loop, &link->patience, timeout_ms * 1000000ull);
    if (r == 0 && parsed == -EAGAIN)
        r = lookup_start(t->mailbox, link->number, address, lookup_done);
    if (r < 0) {
        tcp_shut(&link->base);
        return r;
    }
    if (parsed == 0) {
        link->addresses = addresses;
        link_connect(link);
    }
    *out = &link->base;
    return 0;
}

// -- Listening ------------------------------------------------------------------------------------

static void connection_take(struct tcp_transport *t, int fd)
{
    struct tcp_link *link = link_new(t);
    if (!link) {
        log_warn("a connection was refused: out of memory");
        close(fd);
        return;
    }
    struct tcp_address other = {.length = sizeof(other.storage)};
    if (getpeername(fd, (struct sockaddr *)&other.storage, &other.length) == 0)
        tcp_address_print(&other, link->base.peer);
    link->state = TCP_OPEN;
    link->watch.fd = fd;
    if (loop_watch_set(t->base.loop, &link->watch, POLLIN) < 0) {
        log_warn("%s: the connection was refused: out of memory", link->base.peer);
        tcp_shut(&link->base);
        return;
    }
    tcp_link_mark(link); // its greeting waits
    t->base.events->accepted(t->base.arg, &link->base);
}

struct handover {
    struct mailbox_item item;
    int fd;
};

static void handover_done(struct mailbox_item *item, void *arg)
{
    struct handover *handover = util_container(item, struct handover, item);
    if (arg)
        connection_take(arg, handover->fd);
    else
        close(handover->fd);
    free(handover);
}

static void connection_place(struct tcp_transport *t, int fd)
{
    struct transport *next = t->share_next ? t->share_next(t->share_arg) : &t->base;
    tcp_socket_accepted(&t->tuning, fd);
    if (next == &t->base) {
        connection_take(t, fd);
        return;
    }
    struct handover *handover = malloc(sizeof(*handover));
    if (!handover) {
        log_warn("a connection was refused: out of memory");
        close(fd);
        return;
    }
    *handover = (struct handover){.item.run = handover_done, .fd = fd};
    mailbox_post(tcp_transport_of(next)->mailbox, &handover->item);
}

static void listener_ready(struct loop_watch *watch, uint32_t ready)
{
    (void)ready;
    struct tcp_transport *t = util_container(watch, struct tcp_transport, listener);
    for (int i = 0; i < ACCEPT_BATCH && watch->fd >= 0; i++) {
        int fd = accept4(watch->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd >= 0) {
            connection_place(t, fd);
        } else if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
            // the connection stays ready: pause, or the loop would turn over it at full speed
            log_warn("connections wait: %s (raise the limit of open files: ulimit -n)",
                     strerror(errno));
            loop_watch_clear(t->base.loop, watch);
            loop_timer_set(t->base.loop, &t->listen_again, LISTEN_AGAIN_NS);
            return;
        } else if (errno != EINTR && errno != ECONNABORTED) {
            return;
        }
    }
}

static void listener_again(struct loop_timer *timer)
{
    struct tcp_transport *t = util_container(timer, struct tcp_transport, listen_again);
    if (loop_watch_set(t->base.loop, &t->listener, POLLIN) < 0)
        loop_timer_set(t->base.loop, timer, LISTEN_AGAIN_NS);
}

static int tcp_listen(struct transport *base, const char *address,
                      char bound[TRANSPORT_NAME_MAX + 1])
{
    struct tcp_transport *t = tcp_transport_of(base);
    if (t->listener.fd >= 0)
        return -EALREADY;
    struct tcp_addresses addresses;
    int r = tcp_address_parse(address, true, true,
                              &addresses); // at start-up, where a name may take its time
    if (r < 0)
        return -EINVAL;
    int fd = tcp_socket_listen(&t->tuning, &addresses.list[0]);
    if (fd < 0)
        return fd;
    struct tcp_address own = {.length = sizeof(own.storage)};
    if (getsockname(fd, (struct sockaddr *)&own.storage, &own.length) == 0)
        tcp_address_print(&own, bound);
    t->listener.fd = fd;
    r = loop_watch_set(base->loop, &t->listener, POLLIN);
    if (r < 0) {
        close(fd);
        t->listener.fd = -1;
    }
    return r;
}

static void tcp_share(struct transport *base, struct transport *(*next)(void *arg), void *arg)
{
    struct tcp_transport *t = tcp_transport_of(base);
    t->share_next = next;
    t->share_arg = arg;
}

// -- Opening and closing --------------------------------------------------------------------------

static int tcp_open(struct loop *loop, const struct transport_config *config,
                    const struct transport_events *events, void *arg, struct transport **out)
{
    struct tcp_transport *t = calloc(1, sizeof(*t));
    if (!t)
        return -ENOMEM;
    t->base = (struct transport){.ops = &transport_tcp, .loop = loop, .events = events, .arg = arg};
    t->turn.due = tcp_turn;
    t->listen_again.due = listener_again;
    t->listener.fd = -1;
    t->listener.ready = listener_ready;
    t->upload = config ? config->upload : NULL;
    t->download = config ? config->download : NULL;
    int r = tcp_tuning_from(config, &t->tuning);
    if (r < 0)
        goto free_transport;
    r = mailbox_open(loop, t, &t->mailbox);
    if (r < 0)
        goto free_transport;
    r = loop_timer_set(loop, &t->turn, NEVER_NS);
    if (r < 0)
        goto close_mailbox;
    *out = &t->base;
    return 0;

close_mailbox:
    mailbox_close(t->mailbox);
free_transport:
    free(t);
    return r;
}

static void tcp_close(struct transport *base)
{
    if (!base)
        return;
    struct tcp_transport *t = tcp_transport_of(base);
    while (t->links)
        tcp_shut(&t->links->base);
    for (; t->marked; t->marked = t->marked->marked_next)
        t->marked->marked = false;
    links_reap(t);
    loop_watch_clear(base->loop, &t->listener);
    loop_timer_clear(base->loop, &t->listen_again);
    if (t->listener.fd >= 0)
        close(t->listener.fd);
    mailbox_close(t->mailbox);
    loop_timer_clear(base->loop, &t->turn);
    free(t);
}

const struct transport_ops transport_tcp = {
    .name = "tcp",
    .one_sided = false,
    .scattered = true,
    .open = tcp_open,
    .close = tcp_close,
    .listen = tcp_listen,
    .share = tcp_share,
    .connect = tcp_connect,
    .send = tcp_link_send,
    .expose = tcp_link_expose,
    .unexpose = tcp_link_unexpose,
    .fetch = tcp_link_fetch,
    .cancel = tcp_link_cancel,
    .shut = tcp_shut,
};
