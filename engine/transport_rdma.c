#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <utlist.h>

#include "engine/rdma_link.h"
#include "meta/base/buf.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

/* One reliable-connected queue pair a link, made by librdmacm over InfiniBand, RoCE or iWARP. Events of connections
 * come through one descriptor for each transport, completions through one for each device that it has links on. */

#define LISTEN_BACKLOG 128
/* The kernel looks again when this has passed, which it needs when the neighbour's answer came while it was looking. */
#define RESOLVE_MS 500
#define HEART_NS   1000000000ull
/* The device repeats a packet RETRIES times, 4.096 us << ACK_TIMEOUT (0.54 s) apart: a peer that is gone is noticed
 * within 5 s, well before its lease ends. */
#define ACK_TIMEOUT 17
#define RETRIES     7

static const uint8_t preface[8] = {'p', '2', 'p', 'f', 'r', 'd', 'm', '1'};

static void link_connect(struct rdma_link *link);

// -- Links ----------------------------------------------------------------------------------------

void rdma_link_mark(struct rdma_link *link)
{
    turn_mark(&rdma_transport_of(link->base.transport)->turn, &link->item);
}

void rdma_link_break(struct rdma_link *link, int error, const char *format, ...)
{
    if (link->state == RDMA_BROKEN)
        return;
    link->state = RDMA_BROKEN;
    link->error = error;
    va_list args;
    va_start(args, format);
    vsnprintf(link->reason, sizeof(link->reason), format, args);
    va_end(args);
    loop_timer_clear(link->base.transport->loop, &link->patience);
    rdma_link_pace_stop(link);
    rdma_link_unpair(link);
    rdma_link_mark(link);
}

/* What had arrived, then every fetch is answered, then the link itself. Each event may shut the link. */
static void link_tell(struct rdma_link *link)
{
    const struct transport_events *events = link->base.transport->events;
    while (!link->item.dead && link->pulls) {
        struct transport_fetch *fetch = link->pulls->fetch;
        rdma_link_cancel(&link->base, fetch);
        events->fetch_done(&link->base, fetch, link->error);
    }
    if (link->item.dead || link->told)
        return;
    link->told = true;
    events->down(&link->base, link->error, link->reason);
}

static void link_run(struct turn_item *item)
{
    struct rdma_link *link = util_container(item, struct rdma_link, item);
    if (link->state == RDMA_OPEN || link->state == RDMA_BROKEN)
        rdma_link_turn(link);
    if (!item->dead && link->state == RDMA_BROKEN)
        link_tell(link);
}

static void link_end(struct turn_item *item)
{
    struct rdma_link *link = util_container(item, struct rdma_link, item);
    rdma_link_forget(link);
    free(link);
}

static void link_impatient(struct loop_timer *timer)
{
    struct rdma_link *link = util_container(timer, struct rdma_link, patience);
    rdma_link_break(link, -ETIMEDOUT, "%s within %u ms",
                    link->state == RDMA_RESOLVING ? "its address could not be resolved"
                                                  : "no answer",
                    link->timeout_ms);
}

static struct rdma_link *link_new(struct rdma_transport *t)
{
    struct rdma_link *link = calloc(1, sizeof(*link));
    if (!link)
        return NULL;
    link->base.transport = &t->base;
    link->number = ++t->last_number;
    link->patience.due = link_impatient;
    link->pace.due = rdma_link_pace_due;
    DL_APPEND(t->links, link);
    return link;
}

static void rdma_shut(struct link *base)
{
    struct rdma_link *link = rdma_link_of(base);
    struct rdma_transport *t = rdma_transport_of(base->transport);
    if (link->item.dead)
        return;
    if (link->state == RDMA_OPEN)
        rdma_link_push(link);
    link->state = RDMA_BROKEN;
    loop_timer_clear(base->transport->loop, &link->patience);
    rdma_link_pace_stop(link);
    rdma_link_unpair(link);
    while (link->pulls)
        rdma_link_cancel(base, link->pulls->fetch);
    while (link->exposures)
        rdma_link_unexpose(base, link->exposures->id);
    DL_DELETE(t->links, link);
    turn_bury(&t->turn, &link->item);
}

static void heart_beats(struct loop_timer *timer)
{
    struct rdma_transport *t = util_container(timer, struct rdma_transport, heart);
    loop_timer_set(t->base.loop, timer, HEART_NS);
    uint64_t now = util_now_ns();
    struct rdma_link *link;
    DL_FOREACH(t->links, link)
        rdma_link_heartbeat(link, now);
}

// -- Completions ----------------------------------------------------------------------------------

static void completions_ready(struct loop_watch *watch, uint32_t ready)
{
    (void)ready;
    struct rdma_completions *completions = util_container(watch, struct rdma_completions, watch);
    struct ibv_cq *cq;
    void *context;
    while (ibv_get_cq_event(completions->channel, &cq, &context) == 0) {
        struct rdma_link *link = context;
        ibv_ack_cq_events(cq, 1);
        // asked for the next event first, so that what comes while polling is not missed
        int error = ibv_req_notify_cq(cq, 0);
        if (link->state == RDMA_OPEN || link->state == RDMA_ACCEPTING)
            rdma_link_collect(link);
        if (error)
            rdma_link_break(link, -error, "completions cannot be waited for: %s", strerror(error));
    }
}

static int descriptor_unblock(int fd)
{
    int flags = fcntl(fd, F_GETFL);
    return flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 ? -errno : 0;
}

static int completions_get(struct rdma_transport *t, struct ibv_context *verbs,
                           struct rdma_completions **out)
{
    struct rdma_device *device;
    int r = rdma_device_get(verbs, &device);
    if (r < 0)
        return r;
    LL_SEARCH_SCALAR(t->completions, *out, device, device);
    if (*out)
        return 0;
    struct rdma_completions *completions = calloc(1, sizeof(*completions));
    if (!completions)
        return -ENOMEM;
    completions->device = device;
    completions->channel = ibv_create_comp_channel(verbs);
    if (!completions->channel) {
        r = errno ? -errno : -ENOMEM;
        goto free_completions;
    }
    completions->watch.fd = completions->channel->fd;
    completions->watch.ready = completions_ready;
    r = descriptor_unblock(completions->channel->fd);
    if (r == 0)
        r = loop_watch_set(t->base.loop, &completions->watch, POLLIN);
    if (r < 0)
        goto destroy_channel;
    LL_PREPEND(t->completions, completions);
    *out = completions;
    return 0;

destroy_channel:
    ibv_destroy_comp_channel(completions->channel);
free_completions:
    free(completions);
    return r;
}

// -- Connecting -----------------------------------------------------------------------------------

/* What either side says of itself while the connection is made. */
static void preface_put(uint8_t out[RDMA_PREFACE_BYTES])
{
    struct buf b = buf_over(out, RDMA_PREFACE_BYTES);
    buf_put_bytes(&b, preface, sizeof(preface));
    buf_put_u16(&b, RDMA_FRAME_BYTES);
    buf_put_u16(&b, RDMA_FRAMES);
}

/* The credits that the other side gives, or -EPROTO. It may be padded with zeros. */
static int preface_get(const struct rdma_conn_param *param)
{
    uint8_t bytes[sizeof(preface)];
    struct buf b =
        buf_over((void *)param->private_data, param->private_data ? param->private_data_len : 0);
    buf_get_bytes(&b, bytes, sizeof(bytes));
    uint16_t frame = buf_get_u16(&b);
    uint16_t frames = buf_get_u16(&b);
    if (b.bad || memcmp(bytes, preface, sizeof(preface)) != 0 || frame != RDMA_FRAME_BYTES ||
        frames != RDMA_FRAMES)
        return -EPROTO;
    return frames;
}

/* Everything that a connection needs, on the device that the id has found. */
static int link_equip(struct rdma_link *link)
{
    struct rdma_completions *completions;
    int r = completions_get(rdma_transport_of(link->base.transport), link->id->verbs, &completions);
    if (r == 0)
        r = rdma_link_pair(link, completions);
    if (r < 0)
        rdma_link_break(link, r, "a queue pair cannot be made: %s", strerror(-r));
    return r;
}

static struct rdma_conn_param conn_param(const struct rdma_link *link,
                                         const uint8_t bytes[RDMA_PREFACE_BYTES])
{
    const struct ibv_device_attr *limits = &link->device->limits;
    int answers = limits->max_qp_rd_atom < RDMA_READS ? limits->max_qp_rd_atom : RDMA_READS;
    return (struct rdma_conn_param){.private_data = bytes,
                                    .private_data_len = RDMA_PREFACE_BYTES,
                                    .responder_resources = (uint8_t)answers,
                                    .initiator_depth = (uint8_t)link->reads_limit,
                                    .retry_count = RETRIES,
                                    .rnr_retry_count = RETRIES};
}

static void route_found(struct rdma_link *link)
{
    uint8_t bytes[RDMA_PREFACE_BYTES];
    if (link_equip(link) < 0)
        return;
    link->state = RDMA_CONNECTING;
    preface_put(bytes);
    struct rdma_conn_param param = conn_param(link, bytes);
    if (rdma_connect(link->id, &param) < 0)
        rdma_link_break(link, -errno, "%s", strerror(errno));
}

static void link_opened(struct rdma_link *link, int credits, const struct rdma_conn_param *param)
{
    struct rdma_transport *t = rdma_transport_of(link->base.transport);
    loop_timer_clear(t->base.loop, &link->patience);
    if (credits < 0) {
        rdma_link_break(link, credits, "it does not speak p2pfs, or another version");
        return;
    }
    if (link->base.outgoing && param->initiator_depth < link->reads_limit)
        link->reads_limit = param->initiator_depth > 0 ? param->initiator_depth : 1;
    if (link->reads_window > link->reads_limit)
        link->reads_window = link->reads_limit;
    link->credits = (unsigned)credits;
    link->heard_ns = util_now_ns();
    link->state = RDMA_OPEN;
    rdma_link_mark(link); // what came meanwhile
    if (link->base.outgoing)
        t->base.events->connected(&link->base);
    else
        t->base.events->accepted(t->base.arg, &link->base);
}

/* This address does not do: the name's next one, or what `error` says. */
static void link_failed(struct rdma_link *link, int error)
{
    link->error = error < 0 ? error : -EHOSTUNREACH;
    if (link->state == RDMA_RESOLVING && error == -ETIMEDOUT)
        link->address_next--; // again, until patience ends
    if (link->base.outgoing && link->state != RDMA_OPEN)
        link_connect(link);
    else
        rdma_link_break(link, link->error, "%s", strerror(-link->error));
}

static const char *device_of(const struct rdma_link *link)
{
    return link->id && link->id->verbs ? ibv_get_device_name(link->id->verbs->device) : "RDMA";
}

static int address_resolve(struct rdma_link *link, const struct tcp_address *address)
{
    struct rdma_transport *t = rdma_transport_of(link->base.transport);
    uint8_t ack_timeout = ACK_TIMEOUT;
    if (rdma_create_id(t->events, &link->id, link, RDMA_PS_TCP) < 0)
        return -errno;
    // kernels before 5.4 do not have it: the peer is then noticed a little later
    (void)rdma_set_option(link->id, RDMA_OPTION_ID, RDMA_OPTION_ID_ACK_TIMEOUT, &ack_timeout,
                          sizeof(ack_timeout));
    struct sockaddr *source = NULL;
    if (t->source.length > 0 && t->source.storage.ss_family == address->storage.ss_family)
        source = (struct sockaddr *)&t->source.storage;
    if (rdma_resolve_addr(link->id, source, (struct sockaddr *)&address->storage, RESOLVE_MS) < 0)
        return -errno;
    return 0;
}

/* Tries the next address; when there is none left, the last one's error tells. */
static void link_connect(struct rdma_link *link)
{
    link->state = RDMA_RESOLVING;
    while (link->address_next < link->addresses.count) {
        rdma_link_unpair(link);
        rdma_link_forget(link);
        int r = address_resolve(link, &link->addresses.list[link->address_next++]);
        if (r == 0)
            return;
        link->error = r;
    }
    rdma_link_break(link, link->error, "%s", strerror(-link->error));
}

static void lookup_done(struct mailbox_item *item, void *arg)
{
    struct lookup *lookup = util_container(item, struct lookup, item);
    struct rdma_transport *t = arg;
    struct rdma_link *link = NULL;
    if (t)
        DL_SEARCH_SCALAR(t->links, link, number, lookup->number);
    if (link && link->state == RDMA_RESOLVING) {
        link->addresses = lookup->addresses;
        if (lookup->result < 0)
            rdma_link_break(link, lookup->result, "its name cannot be resolved");
        else
            link_connect(link);
    }
    free(lookup);
}

static int rdma_transport_connect(struct transport *base, const char *address, uint32_t timeout_ms,
                                  void *user, struct link **out)
{
    struct rdma_transport *t = rdma_transport_of(base);
    struct tcp_addresses addresses = {.count = 0};
    int parsed = tcp_address_parse(address, false, false, &addresses);
    if (parsed < 0 && parsed != -EAGAIN)
        return parsed;
    struct rdma_link *link = link_new(t);
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
        rdma_shut(&link->base);
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

/* Somebody who asked to connect, on his way to the lane that takes him. */
struct handover {
    struct mailbox_item item;
    struct rdma_cm_id *id;
    int credits;
};

static void request_take(struct rdma_transport *t, struct rdma_cm_id *id, int credits)
{
    struct rdma_link *link = link_new(t);
    if (!link) {
        log_warn("a connection was refused: out of memory");
        rdma_reject(id, NULL, 0);
        rdma_destroy_id(id);
        return;
    }
    struct tcp_address other = {.length = sizeof(struct sockaddr_in6)};
    memcpy(&other.storage, rdma_get_peer_addr(id), sizeof(struct sockaddr_in6));
    tcp_address_print(&other, link->base.peer);
    id->context = link;
    link->id = id;
    link->state = RDMA_ACCEPTING;
    link->credits = (unsigned)credits;
    uint8_t bytes[RDMA_PREFACE_BYTES];
    preface_put(bytes);
    int r = link_equip(link);
    if (r == 0) {
        struct rdma_conn_param param = conn_param(link, bytes);
        r = rdma_accept(id, &param) < 0 ? -errno : 0;
    }
    if (r == 0)
        return;
    log_warn("%s: its RDMA connection cannot be accepted: %s", link->base.peer, strerror(-r));
    rdma_shut(&link->base); // nobody has heard of it yet
}

static void handover_done(struct mailbox_item *item, void *arg)
{
    struct handover *handover = util_container(item, struct handover, item);
    if (arg)
        request_take(arg, handover->id, handover->credits);
    else
        rdma_destroy_id(handover->id);
    free(handover);
}

static void request_place(struct rdma_transport *t, struct rdma_cm_id *id, int credits)
{
    struct transport *next = t->share_next ? t->share_next(t->share_arg) : &t->base;
    id->context = NULL; // no link yet
    if (credits < 0) {
        rdma_reject(id, NULL, 0);
        rdma_destroy_id(id);
        return;
    }
    if (next == &t->base) {
        request_take(t, id, credits);
        return;
    }
    struct rdma_transport *to = rdma_transport_of(next);
    struct handover *handover = malloc(sizeof(*handover));
    if (!handover || rdma_migrate_id(id, to->events) < 0) {
        log_warn("a connection was refused: %s", strerror(errno));
        free(handover);
        rdma_destroy_id(id);
        return;
    }
    *handover = (struct handover){.item.run = handover_done, .id = id, .credits = credits};
    mailbox_post(to->mailbox, &handover->item);
}

static int rdma_transport_listen(struct transport *base, const char *address,
                                 char bound[TRANSPORT_NAME_MAX + 1])
{
    struct rdma_transport *t = rdma_transport_of(base);
    if (t->listener)
        return -EALREADY;
    struct tcp_addresses addresses;
    if (tcp_address_parse(address, true, true, &addresses) < 0)
        return -EINVAL;
    struct rdma_cm_id *id;
    if (rdma_create_id(t->events, &id, NULL, RDMA_PS_TCP) < 0)
        return -errno;
    if (rdma_bind_addr(id, (struct sockaddr *)&addresses.list[0].storage) < 0 ||
        rdma_listen(id, LISTEN_BACKLOG) < 0) {
        int r = -errno;
        rdma_destroy_id(id);
        return r == -ENODEV ? -EADDRNOTAVAIL : r;
    }
    struct tcp_address own = {.length = addresses.list[0].length};
    memcpy(&own.storage, rdma_get_local_addr(id), sizeof(struct sockaddr_in6));
    tcp_address_print(&own, bound);
    t->listener = id;
    return 0;
}

static void rdma_transport_share(struct transport *base, struct transport *(*next)(void *arg),
                                 void *arg)
{
    struct rdma_transport *t = rdma_transport_of(base);
    t->share_next = next;
    t->share_arg = arg;
}

// -- Events of connections ------------------------------------------------------------------------

static void event_of_link(struct rdma_link *link, const struct rdma_cm_event *event, int credits)
{
    switch (event->event) {
    case RDMA_CM_EVENT_ADDR_RESOLVED:
        if (rdma_resolve_route(link->id, RESOLVE_MS) < 0)
            link_failed(link, -errno);
        break;
    case RDMA_CM_EVENT_ROUTE_RESOLVED:
        route_found(link);
        break;
    case RDMA_CM_EVENT_ESTABLISHED:
        link_opened(link, link->base.outgoing ? credits : (int)link->credits, &event->param.conn);
        break;
    case RDMA_CM_EVENT_REJECTED:
        link_failed(link, -ECONNREFUSED);
        break;
    case RDMA_CM_EVENT_ADDR_ERROR:
    case RDMA_CM_EVENT_ROUTE_ERROR:
    case RDMA_CM_EVENT_UNREACHABLE:
    case RDMA_CM_EVENT_CONNECT_ERROR:
        link_failed(link, event->status);
        break;
    case RDMA_CM_EVENT_DISCONNECTED:
        rdma_link_break(link, -ECONNRESET, "the other side closed the connection");
        break;
    case RDMA_CM_EVENT_DEVICE_REMOVAL:
        rdma_link_break(link, -ENODEV, "the RDMA device %s is gone", device_of(link));
        break;
    default:
        break;
    }
}

static void events_ready(struct loop_watch *watch, uint32_t ready)
{
    (void)ready;
    struct rdma_transport *t = util_container(watch, struct rdma_transport, events_watch);
    struct rdma_cm_event *event;
    while (rdma_get_cm_event(t->events, &event) == 0) {
        struct rdma_cm_event copy = *event;
        bool carries =
            copy.event == RDMA_CM_EVENT_CONNECT_REQUEST || copy.event == RDMA_CM_EVENT_ESTABLISHED;
        int credits = carries ? preface_get(&copy.param.conn) : 0;
        rdma_ack_cm_event(event); // an id cannot end before
        struct rdma_link *link = copy.id->context;
        if (copy.event == RDMA_CM_EVENT_CONNECT_REQUEST) {
            request_place(t, copy.id, credits);
        } else if (link && link->state != RDMA_BROKEN) {
            bool silent = link->state == RDMA_ACCEPTING;
            event_of_link(link, &copy, credits);
            if (silent && link->state == RDMA_BROKEN)
                rdma_shut(&link->base); // it never was: nobody has heard of it
        }
    }
}

// -- Opening and closing --------------------------------------------------------------------------

static int source_parse(struct rdma_transport *t, const struct transport_config *config)
{
    struct tcp_addresses addresses;
    if (!config || !config->source)
        return 0;
    int r = tcp_address_parse(config->source, true, true, &addresses);
    if (r < 0)
        return r;
    t->source = addresses.list[0];
    if (t->source.storage.ss_family == AF_INET6)
        ((struct sockaddr_in6 *)&t->source.storage)->sin6_port = 0;
    else
        ((struct sockaddr_in *)&t->source.storage)->sin_port = 0;
    return 0;
}

static int rdma_open(struct loop *loop, const struct transport_config *config,
                     const struct transport_events *events, void *arg, struct transport **out)
{
    struct rdma_transport *t = calloc(1, sizeof(*t));
    if (!t)
        return -ENOMEM;
    t->base =
        (struct transport){.ops = &transport_rdma, .loop = loop, .events = events, .arg = arg};
    t->heart.due = heart_beats;
    t->download = config ? config->download : NULL;
    int r = source_parse(t, config);
    if (r < 0)
        goto free_transport;
    // librdmacm itself would complain on stderr where there is none
    if (access("/dev/infiniband/rdma_cm", F_OK) < 0) {
        r = -ENODEV;
        goto free_transport;
    }
    t->events = rdma_create_event_channel();
    if (!t->events) {
        r = -errno;
        goto free_transport;
    }
    t->events_watch.fd = t->events->fd;
    t->events_watch.ready = events_ready;
    r = descriptor_unblock(t->events->fd);
    if (r < 0)
        goto destroy_events;
    r = mailbox_open(loop, t, &t->mailbox);
    if (r < 0)
        goto destroy_events;
    r = turn_open(&t->turn, loop, link_run, link_end);
    if (r < 0)
        goto close_mailbox;
    r = loop_watch_set(loop, &t->events_watch, POLLIN);
    if (r < 0)
        goto close_turn;
    r = loop_timer_set(loop, &t->heart, HEART_NS);
    if (r < 0)
        goto clear_watch;
    *out = &t->base;
    return 0;

clear_watch:
    loop_watch_clear(loop, &t->events_watch);
close_turn:
    turn_close(&t->turn);
close_mailbox:
    mailbox_close(t->mailbox);
destroy_events:
    rdma_destroy_event_channel(t->events);
free_transport:
    free(t);
    return r;
}

static void rdma_close(struct transport *base)
{
    if (!base)
        return;
    struct rdma_transport *t = rdma_transport_of(base);
    if (t->listener)
        rdma_destroy_id(t->listener);
    while (t->links) // those that nobody has heard of yet
        rdma_shut(&t->links->base);
    mailbox_close(t->mailbox);
    turn_close(&t->turn);
    while (t->completions) {
        struct rdma_completions *completions = t->completions;
        LL_DELETE(t->completions, completions);
        loop_watch_clear(base->loop, &completions->watch);
        ibv_destroy_comp_channel(completions->channel);
        free(completions);
    }
    loop_timer_clear(base->loop, &t->heart);
    loop_watch_clear(base->loop, &t->events_watch);
    rdma_destroy_event_channel(t->events);
    free(t);
}

const struct transport_ops transport_rdma = {
    .name = "rdma",
    .one_sided = true,
    .open = rdma_open,
    .close = rdma_close,
    .listen = rdma_transport_listen,
    .share = rdma_transport_share,
    .connect = rdma_transport_connect,
    .send = rdma_link_send,
    .expose = rdma_link_expose,
    .unexpose = rdma_link_unexpose,
    .fetch = rdma_link_fetch,
    .cancel = rdma_link_cancel,
    .shut = rdma_shut,
};
