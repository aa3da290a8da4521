#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <utlist.h>

#include "engine/rdma_link.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

#define RETRY_FIRST_NS 1000000000ull
#define RETRY_LAST_NS  10000000000ull
#define MAKING_NS      3000000000ull
/* A rail whose READs have not come back for so long, while those of others have, is not waited for: its device would
 * repeat them for 4 s more. */
#define STALL_NS 2000000000ull

// -- Completions ----------------------------------------------------------------------------------

static void completion_failed(struct rdma_rail *rail, const struct ibv_wc *wc)
{
    struct rdma_link *link = rail->link;
    bool gone = wc->status == IBV_WC_RETRY_EXC_ERR || wc->status == IBV_WC_RNR_RETRY_EXC_ERR;
    bool ended = wc->status == IBV_WC_WR_FLUSH_ERR;
    if (wc->status == IBV_WC_REM_ACCESS_ERR)
        rdma_link_break(link, -EIO, "it took a shard back while it was being read");
    else if (rail->slot > 0)
        rdma_rail_pause(rail, gone    ? "no answer"
                              : ended ? "the connection ended"
                                      : ibv_wc_status_str(wc->status));
    else if (ended)
        rdma_link_break(link, -ECONNRESET, "the connection ended");
    else if (gone)
        rdma_link_break(link, -ETIMEDOUT, "the other side stopped answering");
    else
        rdma_link_break(link, -ENETDOWN, "RDMA failed: %s", ibv_wc_status_str(wc->status));
}

static void completion_take(struct rdma_rail *rail, const struct ibv_wc *wc)
{
    struct rdma_link *link = rail->link;
    unsigned slot = wc->wr_id % 256;
    switch ((enum rdma_work)(wc->wr_id / 256)) {
    case RDMA_WORK_RECEIVE:
        if (wc->status == IBV_WC_SUCCESS) {
            unsigned at = (link->arrived_begin + link->arrived_count++) % RDMA_FRAMES;
            link->arrived[at].slot = (uint8_t)slot;
            link->arrived[at].length = wc->byte_len;
        }
        break;
    case RDMA_WORK_SEND:
        link->idle_slots[link->idle_count++] = (uint8_t)slot;
        break;
    case RDMA_WORK_READ:
        rdma_shard_read_done(rail, wc->status == IBV_WC_SUCCESS);
        break;
    }
}

void rdma_rail_collect(struct rdma_rail *rail)
{
    struct ibv_wc list[16];
    int count;
    struct ibv_wc failed = {.status = IBV_WC_SUCCESS};
    while ((count = ibv_poll_cq(rail->completions, (int)util_count(list), list)) > 0) {
        rail->heard_ns = rail->link->heard_ns = util_now_ns();
        rdma_link_mark(rail->link);
        for (int i = 0; i < count; i++) {
            completion_take(rail, &list[i]);
            // the first failure tells why; the rest is flushed because of it
            if (list[i].status != IBV_WC_SUCCESS && failed.status == IBV_WC_SUCCESS)
                failed = list[i];
        }
    }
    if (failed.status != IBV_WC_SUCCESS && rail->link->state == RDMA_OPEN &&
        rail->state == RDMA_RAIL_OPEN) {
        log_debug("%s: RDMA completion: %s (vendor error 0x%x)", rail->link->base.peer,
                  ibv_wc_status_str(failed.status), failed.vendor_err);
        completion_failed(rail, &failed);
    }
}

static void completions_ready(struct loop_watch *watch, uint32_t ready)
{
    (void)ready;
    struct rdma_completions *completions = util_container(watch, struct rdma_completions, watch);
    struct ibv_cq *cq;
    void *context;
    while (ibv_get_cq_event(completions->channel, &cq, &context) == 0) {
        struct rdma_rail *rail = context;
        struct rdma_link *link = rail->link;
        ibv_ack_cq_events(cq, 1);
        // asked for the next event first, so that what comes while polling is not missed
        int error = ibv_req_notify_cq(cq, 0);
        if (link->state == RDMA_OPEN || link->state == RDMA_ACCEPTING)
            rdma_rail_collect(rail);
        if (error)
            rdma_link_break(link, -error, "completions cannot be waited for: %s", strerror(error));
    }
}

static int completions_get(struct rdma_transport *t, struct rdma_cm_id *id,
                           struct rdma_completions **out)
{
    LL_FOREACH(t->completions, *out) {
        if ((*out)->device->verbs == id->verbs)
            return 0;
    }
    struct rdma_completions *completions = calloc(1, sizeof(*completions));
    if (!completions)
        return -ENOMEM;
    int r = rdma_device_get(id, &completions->device);
    if (r < 0)
        goto free_completions;
    completions->channel = ibv_create_comp_channel(id->verbs);
    if (!completions->channel) {
        r = errno ? -errno : -ENOMEM;
        goto put_device;
    }
    completions->watch.fd = completions->channel->fd;
    completions->watch.ready = completions_ready;
    r = rdma_unblock(completions->channel->fd);
    if (r == 0)
        r = loop_watch_set(t->base.loop, &completions->watch, POLLIN);
    if (r < 0)
        goto destroy_channel;
    LL_PREPEND(t->completions, completions);
    *out = completions;
    return 0;

destroy_channel:
    ibv_destroy_comp_channel(completions->channel);
put_device:
    rdma_device_put(completions->device);
free_completions:
    free(completions);
    return r;
}

static void completions_end(struct rdma_transport *t, struct rdma_completions *completions)
{
    LL_DELETE(t->completions, completions);
    loop_watch_clear(t->base.loop, &completions->watch);
    ibv_destroy_comp_channel(completions->channel);
    rdma_device_put(completions->device);
    free(completions);
}

static bool completions_used(const struct rdma_transport *t, const struct rdma_completions *c)
{
    struct rdma_link *link;
    DL_FOREACH(t->links, link) {
        for (unsigned i = 0; i < RDMA_RAILS; i++)
            if (link->rails[i].completions && link->rails[i].completions->channel == c->channel)
                return true;
    }
    return false;
}

void rdma_completions_look(struct rdma_transport *t)
{
    struct rdma_completions *completions, *next;
    LL_FOREACH_SAFE(t->completions, completions, next) {
        if (rdma_device_gone(completions->device) && !completions_used(t, completions))
            completions_end(t, completions);
    }
}

void rdma_completions_close(struct rdma_transport *t)
{
    while (t->completions)
        completions_end(t, t->completions);
}

// -- The queue pair -------------------------------------------------------------------------------

static unsigned at_most(unsigned wanted, int limit)
{
    return limit > 0 && (unsigned)limit < wanted ? (unsigned)limit : wanted;
}

/* The link's protection domain for a device. It stays while the link does: what was exposed to the peer can be read by a
 * rail that is made anew. */
static int domain_get(struct rdma_link *link, struct rdma_device *device, struct rdma_domain **out)
{
    LL_SEARCH_SCALAR(link->domains, *out, device, device);
    if (*out)
        return 0;
    int r = rdma_domain_open(device, out);
    if (r == 0)
        LL_PREPEND(link->domains, *out);
    return r;
}

int rdma_rail_pair(struct rdma_rail *rail, unsigned messages)
{
    struct rdma_completions *completions;
    int r = completions_get(rdma_transport_of(rail->link->base.transport), rail->id, &completions);
    if (r < 0)
        return r;
    struct rdma_device *device = rail->device = completions->device;
    r = domain_get(rail->link, device, &rail->domain);
    if (r < 0)
        return r;
    const struct ibv_device_attr *limits = &device->limits;
    rail->reads_limit = at_most(RDMA_READS, limits->max_qp_init_rd_atom);
    rail->reads_window = at_most(RDMA_READS_FIRST, (int)rail->reads_limit);
    struct ibv_qp_init_attr wanted = {
        .qp_type = IBV_QPT_RC,
        .cap = {.max_send_wr = messages + rail->reads_limit,
                .max_recv_wr = messages > 0 ? messages : 1,
                .max_send_sge = 1,
                .max_recv_sge = 1},
        .sq_sig_all = 1,
    };
    int entries = (int)(wanted.cap.max_send_wr + wanted.cap.max_recv_wr);
    if (limits->max_qp_wr < (int)wanted.cap.max_send_wr || limits->max_cqe < entries)
        return -ENOSPC;
    rail->completions = ibv_create_cq(device->verbs, entries, rail, completions->channel, 0);
    if (!rail->completions)
        return errno ? -errno : -ENOMEM;
    wanted.send_cq = wanted.recv_cq = rail->completions;
    if (rdma_create_qp(rail->id, rail->domain->pd, &wanted) < 0)
        return -errno;
    return -ibv_req_notify_cq(rail->completions, 0);
}

void rdma_rail_unpair(struct rdma_rail *rail)
{
    if (!rail->id)
        return;
    if (rail->state == RDMA_RAIL_OPEN)
        atomic_fetch_sub(&rail->device->rails, 1);
    rail->state = RDMA_RAIL_NONE;
    if (rail->completions)
        rdma_rail_collect(rail); // what arrived before the end
    rdma_disconnect(rail->id);   // harmless when it was never connected
    if (rail->id->qp)
        rdma_destroy_qp(rail->id);
    rdma_destroy_id(rail->id); // no event of it comes any more
    rail->id = NULL;
    if (rail->completions)
        ibv_destroy_cq(rail->completions);
    rail->completions = NULL;
    while (rail->reads_count > 0)
        rdma_shard_read_done(rail, false);
}

// -- Rails but the first, where they begin ------------------------------------------------------------

static const char *rail_name(const struct rdma_rail *rail)
{
    return rail->device ? rail->device->name : "an RDMA adapter";
}

void rdma_rail_pause(struct rdma_rail *rail, const char *reason)
{
    struct rdma_link *link = rail->link;
    if (!rail->id)
        return;
    bool was_open = rail->state == RDMA_RAIL_OPEN;
    rdma_rail_unpair(rail);
    if (!link->base.outgoing || link->state != RDMA_OPEN)
        return;
    if (was_open)
        atomic_fetch_add(&rail->device->failures, 1);
    log_say(rail->told ? LOG_DEBUG : LOG_WARN,
            "%s: %s does not reach it (%s): other adapters carry its shards until it does",
            link->base.peer, rail_name(rail), reason);
    rail->told = true;
    uint64_t wait = RETRY_FIRST_NS << (rail->failures < 4 ? rail->failures : 4);
    rail->failures++;
    rail->retry_ns = util_now_ns() + (wait < RETRY_LAST_NS ? wait : RETRY_LAST_NS);
    rdma_link_mark(link); // what it had gets read by others
}

/* The address of the other side that goes with this rail's own: the one in the same place of the list, so that equal
 * machines meet adapter by adapter; at least one of the same kind. */
static const struct tcp_address *rail_address(const struct rdma_rail *rail)
{
    const struct rdma_link *link = rail->link;
    const struct rdma_transport *t = rdma_transport_of(link->base.transport);
    for (unsigned i = 0; i < link->addresses.count; i++) {
        const struct tcp_address *address =
            &link->addresses.list[(rail->source + i) % link->addresses.count];
        if (address->storage.ss_family == t->sources[rail->source].storage.ss_family)
            return address;
    }
    return NULL;
}

static void rail_begin(struct rdma_rail *rail, uint64_t now_ns)
{
    const struct tcp_address *address = rail_address(rail);
    rail->retry_ns = 0;
    if (!address)
        return;
    rail->state = RDMA_RAIL_MAKING;
    rail->since_ns = now_ns;
    int r = rdma_rail_resolve(rail, address);
    if (r < 0 && rail->id) {
        rdma_rail_pause(rail, strerror(-r));
    } else if (r < 0) {
        rail->state = RDMA_RAIL_NONE;
        rail->retry_ns = now_ns + RETRY_LAST_NS;
    }
}

void rdma_rails_open(struct rdma_link *link)
{
    struct rdma_transport *t = rdma_transport_of(link->base.transport);
    if (link->token == 0)
        return;
    unsigned slot = 1;
    for (unsigned s = 0; s < t->source_count && slot < RDMA_RAILS; s++) {
        if (s == link->rails[0].source)
            continue;
        struct rdma_rail *rail = &link->rails[slot++];
        rail->source = s;
        rail->standby = t->standby[s];
        rail_begin(rail, util_now_ns());
    }
}

/* Its READs wait while those of other rails come back, or those have nothing left to do. */
static bool rail_stalls(const struct rdma_rail *rail, uint64_t now_ns)
{
    const struct rdma_link *link = rail->link;
    bool others = false;
    for (unsigned i = 0; i < RDMA_RAILS; i++)
        others |= i != rail->slot && link->rails[i].state == RDMA_RAIL_OPEN;
    if (rail->state != RDMA_RAIL_OPEN || rail->reads_count == 0 || !others)
        return false;
    uint64_t since = rail->reads[rail->reads_begin].posted_ns;
    since = since > rail->heard_ns ? since : rail->heard_ns;
    return now_ns > since + STALL_NS &&
           (link->heard_ns > since + STALL_NS / 2 || link->reads_count == rail->reads_count);
}

void rdma_rails_look(struct rdma_link *link, uint64_t now_ns)
{
    if (!link->base.outgoing || link->state != RDMA_OPEN)
        return;
    rdma_link_collect(link); // what this thread had no time to look at is not late
    for (unsigned i = 1; i < RDMA_RAILS; i++) {
        struct rdma_rail *rail = &link->rails[i];
        if (rail_stalls(rail, now_ns))
            rdma_rail_pause(rail, "it stands still");
        else if (rail->state == RDMA_RAIL_MAKING && now_ns > rail->since_ns + MAKING_NS)
            rdma_rail_pause(rail, "no answer");
        else if (rail->state == RDMA_RAIL_NONE && rail->retry_ns && now_ns >= rail->retry_ns)
            rail_begin(rail, now_ns);
    }
    if (rail_stalls(&link->rails[0], now_ns))
        rdma_link_break(link, -ETIMEDOUT, "%s stands still while other adapters move",
                        rail_name(&link->rails[0]));
}

static void rail_opened(struct rdma_rail *rail, const struct rdma_cm_event *event)
{
    unsigned depth = event->param.conn.initiator_depth;
    if (rail->link->base.outgoing && depth < rail->reads_limit)
        rail->reads_limit = depth > 0 ? depth : 1;
    if (rail->reads_window > rail->reads_limit)
        rail->reads_window = rail->reads_limit;
    rail->state = RDMA_RAIL_OPEN;
    rail->heard_ns = util_now_ns();
    rail->failures = 0;
    atomic_fetch_add(&rail->device->rails, 1);
    if (rail->told)
        log_info("%s: %s reaches it again", rail->link->base.peer, rail_name(rail));
    rail->told = false;
    rdma_shard_register(rail);
}

static int rail_join(struct rdma_rail *rail)
{
    uint8_t preface[RDMA_PREFACE_BYTES];
    int r = rdma_rail_pair(rail, 0);
    if (r < 0)
        return r;
    rdma_preface_put(preface, rail->link->token, rail->slot);
    struct rdma_conn_param param = rdma_conn_param_of(rail, preface);
    return rdma_connect(rail->id, &param) < 0 ? -errno : 0;
}

void rdma_rail_event(struct rdma_rail *rail, const struct rdma_cm_event *event)
{
    int r = 0;
    switch (event->event) {
    case RDMA_CM_EVENT_ADDR_RESOLVED:
        r = rdma_resolve_route(rail->id, RDMA_RESOLVE_MS) < 0 ? -errno : 0;
        break;
    case RDMA_CM_EVENT_ROUTE_RESOLVED:
        r = rail_join(rail);
        break;
    case RDMA_CM_EVENT_ESTABLISHED:
        if (rail->state == RDMA_RAIL_MAKING)
            rail_opened(rail, event);
        break;
    case RDMA_CM_EVENT_REJECTED:
        r = -ECONNREFUSED;
        break;
    case RDMA_CM_EVENT_ADDR_ERROR:
    case RDMA_CM_EVENT_ROUTE_ERROR:
    case RDMA_CM_EVENT_UNREACHABLE:
    case RDMA_CM_EVENT_CONNECT_ERROR:
        r = event->status < 0 ? event->status : -EHOSTUNREACH;
        break;
    case RDMA_CM_EVENT_DISCONNECTED:
        r = -ECONNRESET;
        break;
    case RDMA_CM_EVENT_DEVICE_REMOVAL:
        r = -ENODEV;
        break;
    default:
        break;
    }
    if (r < 0)
        rdma_rail_pause(rail, strerror(-r));
}

// -- Rails but the first, where they are accepted -------------------------------------------------

static pthread_mutex_t joinable_lock = PTHREAD_MUTEX_INITIALIZER;
static struct rdma_link *joinable; /* by token; of all lanes */

void rdma_rails_offer(struct rdma_link *link)
{
    do {
        link->token = util_random_u64();
    } while (link->token == 0);
    pthread_mutex_lock(&joinable_lock);
    HASH_ADD(hh, joinable, token, sizeof(link->token), link);
    pthread_mutex_unlock(&joinable_lock);
}

void rdma_rails_refuse(struct rdma_link *link)
{
    if (link->base.outgoing || link->token == 0)
        return;
    pthread_mutex_lock(&joinable_lock);
    HASH_DEL(joinable, link);
    pthread_mutex_unlock(&joinable_lock);
    link->token = 0;
}

struct join {
    struct mailbox_item item;
    struct rdma_cm_id *id;
    uint64_t link; /* number */
    unsigned slot;
};

static void join_take(struct rdma_link *link, struct rdma_cm_id *id, unsigned slot)
{
    struct rdma_rail *rail = &link->rails[slot];
    uint8_t preface[RDMA_PREFACE_BYTES];
    rdma_rail_unpair(rail); // the other side knows better whether it still works
    id->context = rail;
    rail->id = id;
    rail->state = RDMA_RAIL_MAKING;
    int r = rdma_rail_pair(rail, 0);
    if (r == 0) {
        rdma_preface_put(preface, 0, slot);
        struct rdma_conn_param param = rdma_conn_param_of(rail, preface);
        r = rdma_accept(id, &param) < 0 ? -errno : 0;
    }
    if (r < 0) {
        log_debug("%s: a rail cannot be accepted: %s", link->base.peer, strerror(-r));
        rdma_rail_unpair(rail);
    }
}

static void join_done(struct mailbox_item *item, void *arg)
{
    struct join *join = util_container(item, struct join, item);
    struct rdma_transport *t = arg;
    struct rdma_link *link = NULL;
    if (t)
        DL_SEARCH_SCALAR(t->links, link, number, join->link);
    if (link && (link->state == RDMA_OPEN || link->state == RDMA_ACCEPTING))
        join_take(link, join->id, join->slot);
    else
        rdma_destroy_id(join->id);
    free(join);
}

void rdma_rail_join(struct rdma_cm_id *id, uint64_t token, unsigned slot)
{
    struct join *join = malloc(sizeof(*join));
    struct rdma_link *link = NULL;
    pthread_mutex_lock(&joinable_lock); // what is in the table stays, and so does its transport
    HASH_FIND(hh, joinable, &token, sizeof(token), link);
    bool taken = link && join && slot > 0 && slot < RDMA_RAILS;
    if (taken) {
        struct rdma_transport *to = rdma_transport_of(link->base.transport);
        taken = id->channel == to->events || rdma_migrate_id(id, to->events) == 0;
        if (taken) {
            *join =
                (struct join){.item.run = join_done, .id = id, .link = link->number, .slot = slot};
            mailbox_post(to->mailbox, &join->item);
        }
    }
    pthread_mutex_unlock(&joinable_lock);
    if (!taken) {
        rdma_reject(id, NULL, 0);
        rdma_destroy_id(id);
        free(join);
    }
}
