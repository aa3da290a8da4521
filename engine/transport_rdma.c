#include <errno.h>
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

#define HEART_NS 1000000000ull
#define BAD_NS   10000000000ull
/* The device repeats a packet RETRIES times, 4.096 us << ACK_TIMEOUT (0.54 s) apart: a peer that is gone is noticed
 * within 5 s, well before its lease ends. By 7 soft-RoCE would mean for ever, and every device where the other side has
 * no buffer. */
#define ACK_TIMEOUT 17
#define RETRIES     6

static const uint8_t preface[8] = {'p', '2', 'p', 'f', 'r', 'd', 'm', '2'};

static void link_connect(struct rdma_link *link);
static void link_look(struct rdma_link *link, uint64_t now_ns);

// -- Links ----------------------------------------------------------------------------------------

void rdma_link_mark(struct rdma_link *link)
{
    turn_mark(&rdma_transport_of(link->base.transport)->turn, &link->item);
}

/* The address that the link is at is tried last for a while. */
static void address_lost(struct rdma_link *link)
{
    struct rdma_transport *t = rdma_transport_of(link->base.transport);
    unsigned at = t->bad_next++ % util_count(t->bad);
    t->bad[at].address = link->addresses.list[link->order[link->address_next - 1]];
    t->bad[at].until_ns = util_now_ns() + BAD_NS;
}

static bool other_rails(const struct rdma_link *link)
{
    for (unsigned i = 1; i < RDMA_RAILS; i++)
        if (link->rails[i].state == RDMA_RAIL_OPEN)
            return true;
    return false;
}

void rdma_link_break(struct rdma_link *link, int error, const char *format, ...)
{
    if (link->state == RDMA_BROKEN)
        return;
    bool path = error == -ETIMEDOUT || error == -ENETDOWN || error == -ENODEV;
    if (link->base.outgoing && path && other_rails(link)) {
        address_lost(link);
        atomic_fetch_add(&link->rails[0].device->failures, 1);
        error = -ECONNABORTED; // RDMA as such works: the next link begins on another adapter
    }
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

struct rdma_link *rdma_link_new(struct rdma_transport *t)
{
    struct rdma_link *link = calloc(1, sizeof(*link));
    if (!link)
        return NULL;
    link->base.transport = &t->base;
    link->number = ++t->last_number;
    link->patience.due = link_impatient;
    link->pace.due = rdma_link_pace_due;
    for (unsigned i = 0; i < RDMA_RAILS; i++) {
        link->rails[i].link = link;
        link->rails[i].slot = i;
    }
    DL_APPEND(t->links, link);
    return link;
}

void rdma_link_shut(struct link *base)
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
    struct rdma_link *link, *next;
    DL_FOREACH_SAFE(t->links, link, next) {
        rdma_link_heartbeat(link, now);
        rdma_rails_look(link, now);
        link_look(link, now);
        rdma_listen_look(link, now);
    }
    rdma_completions_look(t);
    rdma_listen_again(t);
}

// -- Connecting -----------------------------------------------------------------------------------

void rdma_preface_put(uint8_t out[RDMA_PREFACE_BYTES], uint64_t token, unsigned slot)
{
    struct buf b = buf_over(out, RDMA_PREFACE_BYTES);
    buf_put_bytes(&b, preface, sizeof(preface));
    buf_put_u16(&b, RDMA_FRAME_BYTES);
    buf_put_u16(&b, RDMA_FRAMES);
    buf_put_u64(&b, token);
    buf_put_u8(&b, (uint8_t)slot);
}

/* It may be padded with zeros. */
static struct rdma_preface preface_get(const struct rdma_conn_param *param)
{
    uint8_t bytes[sizeof(preface)];
    struct buf b =
        buf_over((void *)param->private_data, param->private_data ? param->private_data_len : 0);
    buf_get_bytes(&b, bytes, sizeof(bytes));
    uint16_t frame = buf_get_u16(&b);
    uint16_t frames = buf_get_u16(&b);
    struct rdma_preface got = {.token = buf_get_u64(&b)};
    got.slot = buf_get_u8(&b);
    bool known = !b.bad && memcmp(bytes, preface, sizeof(preface)) == 0 &&
                 frame == RDMA_FRAME_BYTES && frames == RDMA_FRAMES;
    got.credits = known ? frames : -EPROTO;
    return got;
}

/* Everything that a connection needs, on the device that the id has found. */
int rdma_link_equip(struct rdma_link *link)
{
    int r = rdma_link_pair(link);
    if (r < 0)
        rdma_link_break(link, r, "a queue pair cannot be made: %s", strerror(-r));
    return r;
}

struct rdma_conn_param rdma_conn_param_of(const struct rdma_rail *rail,
                                          const uint8_t bytes[RDMA_PREFACE_BYTES])
{
    const struct ibv_device_attr *limits = &rail->device->limits;
    int answers = limits->max_qp_rd_atom < RDMA_READS ? limits->max_qp_rd_atom : RDMA_READS;
    return (struct rdma_conn_param){.private_data = bytes,
                                    .private_data_len = RDMA_PREFACE_BYTES,
                                    .responder_resources = (uint8_t)answers,
                                    .initiator_depth = (uint8_t)rail->reads_limit,
                                    .retry_count = RETRIES,
                                    .rnr_retry_count = RETRIES};
}

static void route_found(struct rdma_link *link)
{
    uint8_t bytes[RDMA_PREFACE_BYTES];
    if (rdma_link_equip(link) < 0)
        return;
    link->state = RDMA_CONNECTING;
    rdma_preface_put(bytes, 0, 0);
    struct rdma_conn_param param = rdma_conn_param_of(&link->rails[0], bytes);
    if (rdma_connect(link->rails[0].id, &param) < 0)
        rdma_link_break(link, -errno, "%s", strerror(errno));
}

static void link_opened(struct rdma_link *link, const struct rdma_preface *got,
                        const struct rdma_conn_param *param)
{
    struct rdma_transport *t = rdma_transport_of(link->base.transport);
    struct rdma_rail *rail = &link->rails[0];
    loop_timer_clear(t->base.loop, &link->patience);
    if (got->credits < 0) {
        rdma_link_break(link, got->credits, "it does not speak p2pfs, or another version");
        return;
    }
    if (link->base.outgoing && param->initiator_depth < rail->reads_limit)
        rail->reads_limit = param->initiator_depth > 0 ? param->initiator_depth : 1;
    if (rail->reads_window > rail->reads_limit)
        rail->reads_window = rail->reads_limit;
    link->credits = (unsigned)got->credits;
    link->heard_ns = rail->heard_ns = util_now_ns();
    link->state = RDMA_OPEN;
    rail->state = RDMA_RAIL_OPEN;
    atomic_fetch_add(&rail->device->rails, 1);
    rdma_link_mark(link); // what came meanwhile
    if (link->base.outgoing) {
        link->token = got->token;
        rdma_rails_open(link);
        t->base.events->connected(&link->base);
    } else {
        t->base.events->accepted(t->base.arg, &link->base);
    }
}

/* This address does not do: the name's next one, or what `error` says. The first request to connect that fails is made
 * again at once: kernels end one that is under way when the neighbour's hardware address turns out to be another. */
static void link_failed(struct rdma_link *link, int error)
{
    bool requested = link->state == RDMA_CONNECTING;
    link->error = error < 0 ? error : -EHOSTUNREACH;
    link->again |= requested ? !link->failed : link->state == RDMA_RESOLVING && error == -ETIMEDOUT;
    link->failed |= requested;
    if (link->base.outgoing && link->state != RDMA_OPEN) {
        if (link->addresses.count > 1)
            address_lost(link);
        link_connect(link);
        return;
    }
    rdma_link_break(link, link->error, "%s", strerror(-link->error));
}

/* Each address gets its part of the patience, if it is not the only one. */
static void link_look(struct rdma_link *link, uint64_t now_ns)
{
    bool waits = link->state == RDMA_RESOLVING || link->state == RDMA_CONNECTING;
    unsigned count = link->addresses.count;
    if (waits && link->address_next < count && link->rails[0].id &&
        now_ns - link->rails[0].since_ns > link->timeout_ms * 1000000ull / count)
        link_failed(link, -EHOSTUNREACH);
}

static const char *device_of(const struct rdma_link *link)
{
    return link->rails[0].device ? link->rails[0].device->name : "that it was to use";
}

int rdma_rail_resolve(struct rdma_rail *rail, const struct tcp_address *address)
{
    struct rdma_transport *t = rdma_transport_of(rail->link->base.transport);
    uint8_t ack_timeout = ACK_TIMEOUT;
    if (rdma_create_id(t->events, &rail->id, rail, RDMA_PS_TCP) < 0)
        return -errno;
    // kernels before 5.4 do not have it: the peer is then noticed a little later
    (void)rdma_set_option(rail->id, RDMA_OPTION_ID, RDMA_OPTION_ID_ACK_TIMEOUT, &ack_timeout,
                          sizeof(ack_timeout));
    struct sockaddr *source = NULL;
    if (rail->source < t->source_count &&
        t->sources[rail->source].storage.ss_family == address->storage.ss_family)
        source = (struct sockaddr *)&t->sources[rail->source].storage;
    if (rdma_resolve_addr(rail->id, source, (struct sockaddr *)&address->storage, RDMA_RESOLVE_MS) <
        0)
        return -errno;
    return 0;
}

static bool address_bad(const struct rdma_transport *t, const struct tcp_address *address)
{
    for (unsigned i = 0; i < util_count(t->bad); i++)
        if (t->bad[i].until_ns > util_now_ns() &&
            memcmp(&t->bad[i].address.storage, &address->storage, address->length) == 0)
            return true;
    return false;
}

/* In which order the other side's addresses are tried: those last that were lost lately. A node with fewer adapters
 * than the other side begins anywhere, so that many of them do not all meet at the first. */
static void addresses_set(struct rdma_link *link, const struct tcp_addresses *addresses)
{
    struct rdma_transport *t = rdma_transport_of(link->base.transport);
    unsigned count = addresses->count, used = 0;
    bool spread = t->source_count > 0 && t->source_count < count;
    unsigned begin = spread ? (unsigned)(util_random_u64() % count) : 0;
    link->addresses = *addresses;
    for (int bad = 0; bad <= 1; bad++)
        for (unsigned i = 0; i < count; i++) {
            unsigned at = (begin + i) % count;
            if (address_bad(t, &addresses->list[at]) == bad && used < count)
                link->order[used++] = (uint8_t)at;
        }
    link->addresses.count = used; // an address may turn good while this looks
}

/* Tries the next address; when there is none left, the last one's error tells. */
static void link_connect(struct rdma_link *link)
{
    struct rdma_transport *t = rdma_transport_of(link->base.transport);
    struct rdma_rail *rail = &link->rails[0];
    link->state = RDMA_RESOLVING;
    if (link->address_next == link->addresses.count && link->again) {
        link->again = false; // until patience ends
        link->address_next = 0;
    }
    while (link->address_next < link->addresses.count) {
        rdma_link_unpair(link);
        rdma_link_forget(link);
        unsigned at = link->order[link->address_next++];
        const struct tcp_address *address = &link->addresses.list[at];
        rail->source = t->source_count > 0 ? at % t->source_count : 0;
        rail->standby = t->standby[rail->source];
        rail->since_ns = util_now_ns();
        int r = rdma_rail_resolve(rail, address);
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
        addresses_set(link, &lookup->addresses);
        if (lookup->result < 0)
            rdma_link_break(link, lookup->result, "its name cannot be resolved");
        else
            link_connect(link);
    }
    free(lookup);
}

/* "host:port", or several between commas, which are numbers then. */
static int addresses_parse(const char *text, struct tcp_addresses *out)
{
    struct tcp_addresses one;
    if (!strchr(text, ','))
        return tcp_address_parse(text, false, false, out);
    for (const char *at = text; out->count < TCP_ADDRESSES_MAX;) {
        char part[TRANSPORT_NAME_MAX + 1];
        size_t length = strcspn(at, ",");
        snprintf(part, sizeof(part), "%.*s", (int)length, at);
        if (tcp_address_parse(part, false, false, &one) < 0)
            return -EINVAL;
        out->list[out->count++] = one.list[0];
        if (at[length] == '\0')
            break;
        at += length + 1;
    }
    return 0;
}

static int rdma_transport_connect(struct transport *base, const char *address, uint32_t timeout_ms,
                                  void *user, struct link **out)
{
    struct rdma_transport *t = rdma_transport_of(base);
    struct tcp_addresses addresses = {.count = 0};
    int parsed = addresses_parse(address, &addresses);
    if (parsed < 0 && parsed != -EAGAIN)
        return parsed;
    struct rdma_link *link = rdma_link_new(t);
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
        rdma_link_shut(&link->base);
        return r;
    }
    if (parsed == 0) {
        addresses_set(link, &addresses);
        link_connect(link);
    }
    *out = &link->base;
    return 0;
}

// -- Events of connections ------------------------------------------------------------------------

static void event_of_link(struct rdma_link *link, const struct rdma_cm_event *event,
                          struct rdma_preface *got)
{
    switch (event->event) {
    case RDMA_CM_EVENT_ADDR_RESOLVED:
        if (rdma_resolve_route(link->rails[0].id, RDMA_RESOLVE_MS) < 0)
            link_failed(link, -errno);
        break;
    case RDMA_CM_EVENT_ROUTE_RESOLVED:
        route_found(link);
        break;
    case RDMA_CM_EVENT_ESTABLISHED:
        if (link->state != RDMA_CONNECTING && link->state != RDMA_ACCEPTING)
            break; // it was told before
        if (!link->base.outgoing)
            got->credits = (int)link->credits;
        link_opened(link, got, &event->param.conn);
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
        rdma_link_collect(link); // a request that failed before tells why
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
        struct rdma_preface got = {0};
        if (carries)
            got = preface_get(&copy.param.conn);
        rdma_ack_cm_event(event); // an id cannot end before
        struct rdma_rail *rail = copy.id->context;
        struct rdma_link *link = rail ? rail->link : NULL;
        if (copy.event == RDMA_CM_EVENT_CONNECT_REQUEST) {
            rdma_listen_request(t, copy.id, &got);
        } else if (!link) {
            if (copy.event == RDMA_CM_EVENT_DEVICE_REMOVAL)
                rdma_listen_lost(t, copy.id);
        } else if (rail->slot > 0) {
            rdma_rail_event(rail, &copy);
        } else if (link->state != RDMA_BROKEN) {
            bool silent = link->state == RDMA_ACCEPTING;
            event_of_link(link, &copy, &got);
            if (silent && link->state == RDMA_BROKEN)
                rdma_link_shut(&link->base); // it never was: nobody has heard of it
        }
    }
}

// -- Opening and closing --------------------------------------------------------------------------

static int sources_parse(struct rdma_transport *t, const struct transport_config *config)
{
    struct tcp_addresses addresses;
    for (unsigned i = 0; config && i < config->rail_count && i < RDMA_RAILS; i++) {
        int r = tcp_address_parse(config->rails[i].address, true, true, &addresses);
        if (r < 0)
            return r;
        t->sources[i] = addresses.list[0];
        tcp_address_port_set(&t->sources[i], 0);
        t->standby[i] = config->rails[i].standby;
        t->source_count = i + 1;
    }
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
    int r = sources_parse(t, config);
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
    r = rdma_unblock(t->events->fd);
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
    rdma_listen_end(t);
    while (t->links) // those that nobody has heard of yet
        rdma_link_shut(&t->links->base);
    mailbox_close(t->mailbox);
    turn_close(&t->turn);
    rdma_completions_close(t);
    loop_timer_clear(base->loop, &t->heart);
    loop_watch_clear(base->loop, &t->events_watch);
    rdma_destroy_event_channel(t->events);
    free(t);
}

const struct transport_ops transport_rdma = {
    .name = "rdma",
    .one_sided = true,
    .open = rdma_open,
    .adapters = rdma_devices,
    .close = rdma_close,
    .listen = rdma_listen_open,
    .share = rdma_listen_share,
    .connect = rdma_transport_connect,
    .send = rdma_link_send,
    .expose = rdma_link_expose,
    .unexpose = rdma_link_unexpose,
    .fetch = rdma_link_fetch,
    .cancel = rdma_link_cancel,
    .shut = rdma_link_shut,
};
