/* A device that is not there: the calls of libibverbs and librdmacm that the RDMA transport makes, answered within this
 * process. A program that includes this has these instead of the libraries' own.
 *
 * What is posted is carried out at once, in order: a SEND goes into a buffer that the other side has posted, a READ
 * copies what an rkey allows, and a failed request ends its queue pair. `fake` makes calls and requests fail, and counts
 * what exists, so that a story can tell what was left behind. */
#ifndef P2PFS_TESTS_FAKE_RDMA_H
#define P2PFS_TESTS_FAKE_RDMA_H

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <rdma/rdma_cma.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <utlist.h>

#include "meta/base/util.h"

#undef ibv_reg_mr
#pragma GCC diagnostic ignored "-Wmissing-prototypes" // the libraries', not ours

#define FAKE_CREDITS 64 /* of everything that is queued */

enum fake_call {
    FAKE_NONE,
    FAKE_QUERY_DEVICE,
    FAKE_ALLOC_PD,
    FAKE_CREATE_CHANNEL,
    FAKE_REGISTER,       /* any memory */
    FAKE_REGISTER_WRITE, /* memory that a READ lands in */
    FAKE_REGISTER_READ,  /* memory that peers read */
    FAKE_CREATE_CQ,
    FAKE_CREATE_QP,
    FAKE_POST_SEND,
    FAKE_POST_READ,
    FAKE_POST_RECEIVE,
    FAKE_NOTIFY,
    FAKE_DEREGISTER,
    FAKE_CREATE_ID,
    FAKE_RESOLVE_ADDRESS,
    FAKE_RESOLVE_ROUTE,
    FAKE_CONNECT,
    FAKE_ACCEPT,
};

static struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    enum fake_call fails; /* with `error`, after `after` that succeed, once */
    unsigned after;
    int error;
    enum ibv_wc_status send_status, read_status; /* of the next such request, unless 0 */
    bool reads_stall;                            /* READs stay under way */
    bool deregister_waits; /* deregistering memory that READs land in, until it is false again */
    enum rdma_cm_event_type instead_of; /* an event that is replaced, ... */
    enum rdma_cm_event_type event;      /* ... by this one, ... */
    int event_status;                   /* ... with this */
    bool removed;                       /* the device */
    unsigned spoiled; /* this byte of what whoever connects or accepts says of itself, from 1 on */
    unsigned hosts, last_host; /* who connects comes from so many, in turn; 0: from one */
    int domains, regions, queues, pairs, ids, channels, events; /* that exist */
    uint32_t last_key;
    uint16_t last_port;
    struct fake_id *listeners, *all;
    struct fake_region *registered;
} fake = {.lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP, .changed = PTHREAD_COND_INITIALIZER};

/* Threads that register and deregister memory ask too. */
static bool fake_fails(enum fake_call call)
{
    pthread_mutex_lock(&fake.lock);
    bool now = fake.fails == call && fake.after-- == 0;
    if (now) {
        fake.after = 0;
        fake.fails = FAKE_NONE;
        errno = fake.error;
    }
    pthread_mutex_unlock(&fake.lock);
    return now;
}

static void fake_fail_at(enum fake_call call, unsigned after, int error)
{
    pthread_mutex_lock(&fake.lock);
    fake.error = error;
    fake.after = after;
    fake.fails = call;
    pthread_mutex_unlock(&fake.lock);
}

static void *fake_new(size_t size, int *count)
{
    pthread_mutex_lock(&fake.lock);
    (*count)++;
    pthread_mutex_unlock(&fake.lock);
    return calloc(1, size);
}

static void fake_delete(void *thing, int *count)
{
    free(thing);
    pthread_mutex_lock(&fake.lock); // who sees nothing left sees it freed
    (*count)--;
    pthread_mutex_unlock(&fake.lock);
}

// -- Devices and memory ---------------------------------------------------------------------------

static struct ibv_device fake_device = {.name = "fake0"};
static struct ibv_context *fake_context; /* the device as it is now */

struct fake_domain {
    struct ibv_pd pd;
    int users; /* regions and queue pairs */
};

struct fake_region {
    struct ibv_mr mr;
    int access;
    struct fake_region *prev, *next;
};

const char *ibv_get_device_name(struct ibv_device *device)
{
    return device->name;
}

enum ibv_fork_status ibv_is_fork_initialized(void)
{
    return IBV_FORK_UNNEEDED;
}

int ibv_fork_init(void)
{
    abort(); // no need
}

int ibv_query_device(struct ibv_context *context, struct ibv_device_attr *limits)
{
    *limits = (struct ibv_device_attr){
        .max_qp_rd_atom = 4, .max_qp_init_rd_atom = 4, .max_qp_wr = 1024, .max_cqe = 1024};
    return fake_fails(FAKE_QUERY_DEVICE) ? fake.error : 0;
}

struct ibv_pd *ibv_alloc_pd(struct ibv_context *context)
{
    struct fake_domain *domain = NULL;
    pthread_mutex_lock(&fake.lock);
    if (!fake_fails(FAKE_ALLOC_PD))
        domain = fake_new(sizeof(*domain), &fake.domains);
    pthread_mutex_unlock(&fake.lock);
    return domain ? &domain->pd : NULL;
}

/* Whether a domain is in use decides when it can go: as much as a device would say, but louder. */
int ibv_dealloc_pd(struct ibv_pd *pd)
{
    struct fake_domain *domain = util_container(pd, struct fake_domain, pd);
    pthread_mutex_lock(&fake.lock);
    if (domain->users > 0)
        abort();
    fake_delete(domain, &fake.domains);
    pthread_mutex_unlock(&fake.lock);
    return 0;
}

static void fake_domain_use(struct ibv_pd *pd, int more)
{
    pthread_mutex_lock(&fake.lock);
    util_container(pd, struct fake_domain, pd)->users += more;
    pthread_mutex_unlock(&fake.lock);
}

struct ibv_mr *ibv_reg_mr_iova2(struct ibv_pd *pd, void *address, size_t length, uint64_t iova,
                                unsigned int access)
{
    struct fake_region *region = NULL;
    pthread_mutex_lock(&fake.lock);
    bool frames = access == IBV_ACCESS_LOCAL_WRITE;
    enum fake_call kind =
        access & IBV_ACCESS_REMOTE_READ ? FAKE_REGISTER_READ : FAKE_REGISTER_WRITE;
    if (!fake_fails(FAKE_REGISTER) && (frames || !fake_fails(kind))) {
        region = fake_new(sizeof(*region), &fake.regions);
        region->access = (int)access;
        region->mr =
            (struct ibv_mr){.pd = pd, .addr = address, .length = length, .lkey = ++fake.last_key};
        region->mr.rkey = region->mr.lkey;
        DL_APPEND(fake.registered, region);
        fake_domain_use(pd, 1);
    }
    pthread_mutex_unlock(&fake.lock);
    return region ? &region->mr : NULL;
}

struct ibv_mr *ibv_reg_mr(struct ibv_pd *pd, void *address, size_t length, int access)
{
    return ibv_reg_mr_iova2(pd, address, length, 0, (unsigned)access);
}

int ibv_dereg_mr(struct ibv_mr *mr)
{
    struct fake_region *region = util_container(mr, struct fake_region, mr);
    pthread_mutex_lock(&fake.lock);
    while (fake.deregister_waits && region->access & IBV_ACCESS_RELAXED_ORDERING)
        pthread_cond_wait(&fake.changed, &fake.lock);
    int error = fake_fails(FAKE_DEREGISTER) ? fake.error : 0;
    if (!error) {
        DL_DELETE(fake.registered, region);
        fake_domain_use(mr->pd, -1);
        fake_delete(region, &fake.regions);
    }
    pthread_mutex_unlock(&fake.lock);
    return error;
}

/* Whether a key opens [address, address + length) for `access` to a queue pair. */
static bool fake_allowed(const struct ibv_qp *qp, uint32_t key, uint64_t address, uint64_t length,
                         int access)
{
    struct fake_region *region;
    bool allowed = false;
    pthread_mutex_lock(&fake.lock);
    DL_FOREACH(fake.registered, region) {
        uint64_t begin = (uintptr_t)region->mr.addr;
        allowed |= region->mr.lkey == key && region->mr.pd == qp->pd && region->access & access &&
                   address >= begin && address + length <= begin + region->mr.length;
    }
    pthread_mutex_unlock(&fake.lock);
    return allowed;
}

// -- Completions ----------------------------------------------------------------------------------

struct fake_queue {
    struct ibv_cq cq;
    struct ibv_wc list[FAKE_CREDITS * 4];
    unsigned count;
    bool armed, rung;
    struct fake_queue *prev, *next; /* of those that have rung */
};

struct fake_bell {
    struct ibv_comp_channel channel;
    struct fake_queue *rung;
};

static void fake_ring(struct fake_queue *queue)
{
    struct fake_bell *bell = util_container(queue->cq.channel, struct fake_bell, channel);
    if (queue->armed && !queue->rung) {
        queue->armed = false;
        queue->rung = true;
        DL_APPEND(bell->rung, queue);
        eventfd_write(bell->channel.fd, 1);
    }
}

static void fake_complete(struct ibv_cq *cq, struct ibv_wc wc)
{
    struct fake_queue *queue = util_container(cq, struct fake_queue, cq);
    if (queue->count == util_count(queue->list))
        abort(); // it overflows
    queue->list[queue->count++] = wc;
    fake_ring(queue);
}

static int fake_poll(struct ibv_cq *cq, int room, struct ibv_wc *list)
{
    struct fake_queue *queue = util_container(cq, struct fake_queue, cq);
    unsigned count = queue->count < (unsigned)room ? queue->count : (unsigned)room;
    memcpy(list, queue->list, count * sizeof(*list));
    queue->count -= count;
    memmove(queue->list, queue->list + count, queue->count * sizeof(*list));
    return (int)count;
}

static int fake_notify(struct ibv_cq *cq, int solicited)
{
    if (fake_fails(FAKE_NOTIFY))
        return fake.error;
    struct fake_queue *queue = util_container(cq, struct fake_queue, cq);
    queue->armed = true;
    return 0;
}

struct ibv_comp_channel *ibv_create_comp_channel(struct ibv_context *context)
{
    if (fake_fails(FAKE_CREATE_CHANNEL))
        return NULL;
    struct fake_bell *bell = fake_new(sizeof(*bell), &fake.channels);
    bell->channel.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK | EFD_SEMAPHORE);
    return &bell->channel;
}

int ibv_destroy_comp_channel(struct ibv_comp_channel *channel)
{
    close(channel->fd);
    fake_delete(util_container(channel, struct fake_bell, channel), &fake.channels);
    return 0;
}

int ibv_get_cq_event(struct ibv_comp_channel *channel, struct ibv_cq **cq, void **context)
{
    struct fake_bell *bell = util_container(channel, struct fake_bell, channel);
    struct fake_queue *queue = bell->rung;
    eventfd_t count;
    if (!queue)
        return -1;
    eventfd_read(channel->fd, &count);
    DL_DELETE(bell->rung, queue);
    queue->rung = false;
    *cq = &queue->cq;
    *context = queue->cq.cq_context;
    return 0;
}

void ibv_ack_cq_events(struct ibv_cq *cq, unsigned count)
{
}

struct ibv_cq *ibv_create_cq(struct ibv_context *context, int entries, void *user,
                             struct ibv_comp_channel *channel, int vector)
{
    if (fake_fails(FAKE_CREATE_CQ))
        return NULL;
    struct fake_queue *queue = fake_new(sizeof(*queue), &fake.queues);
    queue->cq.context = context;
    queue->cq.cq_context = user;
    queue->cq.channel = channel;
    return &queue->cq;
}

int ibv_destroy_cq(struct ibv_cq *cq)
{
    struct fake_queue *queue = util_container(cq, struct fake_queue, cq);
    struct fake_bell *bell = util_container(cq->channel, struct fake_bell, channel);
    eventfd_t count;
    if (queue->rung) {
        eventfd_read(bell->channel.fd, &count);
        DL_DELETE(bell->rung, queue);
    }
    fake_delete(queue, &fake.queues);
    return 0;
}

// -- Queue pairs ----------------------------------------------------------------------------------

struct fake_pair {
    struct ibv_qp qp;
    struct fake_pair *peer;
    bool broken;
    struct {
        uint64_t id;
        struct ibv_sge piece;
    } receives[FAKE_CREDITS];
    unsigned receive_count;
    uint64_t stalled[FAKE_CREDITS];
    unsigned stalled_count;
};

static struct fake_pair *fake_pair_of(struct ibv_qp *qp)
{
    return util_container(qp, struct fake_pair, qp);
}

/* What is left of its requests is flushed. */
static void fake_break(struct fake_pair *pair)
{
    pair->broken = true;
    for (unsigned i = 0; i < pair->stalled_count; i++)
        fake_complete(pair->qp.send_cq,
                      (struct ibv_wc){.wr_id = pair->stalled[i], .status = IBV_WC_WR_FLUSH_ERR});
    for (unsigned i = 0; i < pair->receive_count; i++)
        fake_complete(pair->qp.recv_cq, (struct ibv_wc){.wr_id = pair->receives[i].id,
                                                        .status = IBV_WC_WR_FLUSH_ERR});
    pair->stalled_count = pair->receive_count = 0;
}

static enum ibv_wc_status fake_read(const struct fake_pair *pair, const struct ibv_send_wr *wr)
{
    if (!pair->peer || pair->peer->broken)
        return IBV_WC_RETRY_EXC_ERR;
    if (!fake_allowed(&pair->peer->qp, wr->wr.rdma.rkey, wr->wr.rdma.remote_addr,
                      wr->sg_list->length, IBV_ACCESS_REMOTE_READ))
        return IBV_WC_REM_ACCESS_ERR;
    if (!fake_allowed(&pair->qp, wr->sg_list->lkey, wr->sg_list->addr, wr->sg_list->length,
                      IBV_ACCESS_LOCAL_WRITE))
        return IBV_WC_LOC_PROT_ERR;
    memcpy((void *)wr->sg_list->addr, (void *)wr->wr.rdma.remote_addr, wr->sg_list->length);
    return IBV_WC_SUCCESS;
}

static enum ibv_wc_status fake_write(const struct fake_pair *pair, const struct ibv_send_wr *wr)
{
    if (!pair->peer || !fake_allowed(&pair->peer->qp, wr->wr.rdma.rkey, wr->wr.rdma.remote_addr,
                                     wr->sg_list->length, IBV_ACCESS_REMOTE_WRITE))
        return IBV_WC_REM_ACCESS_ERR;
    memcpy((void *)wr->wr.rdma.remote_addr, (void *)wr->sg_list->addr, wr->sg_list->length);
    return IBV_WC_SUCCESS;
}

static enum ibv_wc_status fake_send(const struct fake_pair *pair, const struct ibv_send_wr *wr)
{
    struct fake_pair *peer = pair->peer;
    if (!peer || peer->broken)
        return IBV_WC_RETRY_EXC_ERR;
    if (peer->receive_count == 0)
        return IBV_WC_RNR_RETRY_EXC_ERR;
    uint64_t id = peer->receives[0].id;
    memcpy((void *)peer->receives[0].piece.addr, (void *)wr->sg_list->addr, wr->sg_list->length);
    memmove(peer->receives, peer->receives + 1, --peer->receive_count * sizeof(peer->receives[0]));
    fake_complete(peer->qp.recv_cq, (struct ibv_wc){.wr_id = id, .byte_len = wr->sg_list->length});
    return IBV_WC_SUCCESS;
}

static int fake_post_send(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
    struct fake_pair *pair = fake_pair_of(qp);
    bool read = wr->opcode == IBV_WR_RDMA_READ;
    enum ibv_wc_status *wanted = read ? &fake.read_status : &fake.send_status;
    if (fake_fails(read ? FAKE_POST_READ : FAKE_POST_SEND))
        return fake.error;
    if (read && fake.reads_stall && !pair->broken) {
        pair->stalled[pair->stalled_count++] = wr->wr_id;
        return 0;
    }
    enum ibv_wc_status status = pair->broken                      ? IBV_WC_WR_FLUSH_ERR
                                : *wanted                         ? *wanted
                                : read                            ? fake_read(pair, wr)
                                : wr->opcode == IBV_WR_RDMA_WRITE ? fake_write(pair, wr)
                                                                  : fake_send(pair, wr);
    *wanted = IBV_WC_SUCCESS;
    fake_complete(qp->send_cq, (struct ibv_wc){.wr_id = wr->wr_id, .status = status});
    if (status != IBV_WC_SUCCESS && !pair->broken)
        fake_break(pair);
    return 0;
}

static int fake_post_receive(struct ibv_qp *qp, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
    struct fake_pair *pair = fake_pair_of(qp);
    if (fake_fails(FAKE_POST_RECEIVE))
        return fake.error;
    pair->receives[pair->receive_count].id = wr->wr_id;
    pair->receives[pair->receive_count++].piece = *wr->sg_list;
    return 0;
}

const char *ibv_wc_status_str(enum ibv_wc_status status)
{
    return "a status";
}

// -- Connections ----------------------------------------------------------------------------------

struct fake_event {
    struct rdma_cm_event event;
    uint8_t private_data[64];
    struct fake_event *prev, *next;
};

struct fake_channel {
    struct rdma_event_channel channel;
    struct fake_event *waiting;
};

struct fake_id {
    struct rdma_cm_id id;
    struct fake_id *peer;
    bool connected;
    bool listens;
    struct fake_id *prev, *next;         /* of listeners */
    struct fake_id *all_prev, *all_next; /* of all */
};

static struct fake_id *fake_id_of(struct rdma_cm_id *id)
{
    return util_container(id, struct fake_id, id);
}

static void fake_tell(struct rdma_cm_id *id, struct rdma_cm_id *listener,
                      enum rdma_cm_event_type type, const struct rdma_conn_param *param)
{
    struct rdma_event_channel *to = listener ? listener->channel : id->channel;
    struct fake_channel *channel = util_container(to, struct fake_channel, channel);
    struct fake_event *e = fake_new(sizeof(*e), &fake.events);
    e->event = (struct rdma_cm_event){.id = id, .listen_id = listener, .event = type};
    if (fake.event && fake.instead_of == type) {
        e->event.event = fake.event;
        e->event.status = fake.event_status;
    }
    if (param) {
        e->event.param.conn = *param;
        memcpy(e->private_data, param->private_data, param->private_data_len);
        e->event.param.conn.private_data = e->private_data;
        e->event.param.conn.initiator_depth = param->responder_resources;
        if (fake.spoiled > 0)
            e->private_data[fake.spoiled - 1]++;
    }
    pthread_mutex_lock(&fake.lock);
    DL_APPEND(channel->waiting, e);
    pthread_mutex_unlock(&fake.lock);
    eventfd_write(to->fd, 1);
}

static void fake_forget(struct rdma_cm_id *id)
{
    struct fake_channel *channel = util_container(id->channel, struct fake_channel, channel);
    struct fake_event *e, *next;
    eventfd_t count;
    DL_FOREACH_SAFE(channel->waiting, e, next) {
        if (e->event.id == id) {
            DL_DELETE(channel->waiting, e);
            eventfd_read(channel->channel.fd, &count);
            fake_delete(e, &fake.events);
        }
    }
}

struct rdma_event_channel *rdma_create_event_channel(void)
{
    struct fake_channel *channel = fake_new(sizeof(*channel), &fake.channels);
    channel->channel.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK | EFD_SEMAPHORE);
    return &channel->channel;
}

void rdma_destroy_event_channel(struct rdma_event_channel *channel)
{
    close(channel->fd);
    fake_delete(util_container(channel, struct fake_channel, channel), &fake.channels);
}

int rdma_get_cm_event(struct rdma_event_channel *from, struct rdma_cm_event **event)
{
    struct fake_channel *channel = util_container(from, struct fake_channel, channel);
    eventfd_t count;
    pthread_mutex_lock(&fake.lock);
    struct fake_event *e = channel->waiting;
    if (e) {
        eventfd_read(from->fd, &count);
        DL_DELETE(channel->waiting, e);
        *event = &e->event;
    }
    pthread_mutex_unlock(&fake.lock);
    errno = EAGAIN;
    return e ? 0 : -1;
}

int rdma_ack_cm_event(struct rdma_cm_event *event)
{
    fake_delete(util_container(event, struct fake_event, event), &fake.events);
    return 0;
}

int rdma_create_id(struct rdma_event_channel *channel, struct rdma_cm_id **id, void *context,
                   enum rdma_port_space space)
{
    if (fake_fails(FAKE_CREATE_ID))
        return -1;
    struct fake_id *made = fake_new(sizeof(*made), &fake.ids);
    made->id.channel = channel;
    made->id.context = context;
    pthread_mutex_lock(&fake.lock);
    DL_APPEND2(fake.all, made, all_prev, all_next);
    pthread_mutex_unlock(&fake.lock);
    *id = &made->id;
    return 0;
}

int rdma_destroy_id(struct rdma_cm_id *id)
{
    struct fake_id *mine = fake_id_of(id);
    pthread_mutex_lock(&fake.lock);
    fake_forget(id);
    DL_DELETE2(fake.all, mine, all_prev, all_next);
    if (mine->listens)
        DL_DELETE(fake.listeners, mine);
    if (mine->peer)
        mine->peer->peer = NULL;
    pthread_mutex_unlock(&fake.lock);
    fake_delete(mine, &fake.ids);
    return 0;
}

int rdma_set_option(struct rdma_cm_id *id, int level, int name, void *value, size_t length)
{
    return 0;
}

int rdma_bind_addr(struct rdma_cm_id *id, struct sockaddr *address)
{
    if (fake.removed) {
        errno = ENODEV;
        return -1;
    }
    memcpy(&id->route.addr.src_storage, address, sizeof(struct sockaddr_in));
    id->verbs = fake_context;
    if (id->route.addr.src_sin.sin_port == 0)
        id->route.addr.src_sin.sin_port = htons(++fake.last_port + 20000);
    return 0;
}

int rdma_listen(struct rdma_cm_id *id, int backlog)
{
    struct fake_id *mine = fake_id_of(id);
    mine->listens = true;
    DL_APPEND(fake.listeners, mine);
    return 0;
}

int rdma_resolve_addr(struct rdma_cm_id *id, struct sockaddr *source, struct sockaddr *destination,
                      int timeout_ms)
{
    if (fake.removed || fake_fails(FAKE_RESOLVE_ADDRESS)) {
        errno = fake.removed ? ENODEV : errno;
        return -1;
    }
    memcpy(&id->route.addr.dst_storage, destination, sizeof(struct sockaddr_in));
    id->verbs = fake_context;
    fake_tell(id, NULL, RDMA_CM_EVENT_ADDR_RESOLVED, NULL);
    return 0;
}

int rdma_resolve_route(struct rdma_cm_id *id, int timeout_ms)
{
    if (fake_fails(FAKE_RESOLVE_ROUTE))
        return -1;
    fake_tell(id, NULL, RDMA_CM_EVENT_ROUTE_RESOLVED, NULL);
    return 0;
}

int rdma_create_qp(struct rdma_cm_id *id, struct ibv_pd *pd, struct ibv_qp_init_attr *attributes)
{
    if (fake_fails(FAKE_CREATE_QP))
        return -1;
    struct fake_pair *pair = fake_new(sizeof(*pair), &fake.pairs);
    pair->qp.context = id->verbs;
    pair->qp.pd = pd;
    fake_domain_use(pd, 1);
    pair->qp.send_cq = attributes->send_cq;
    pair->qp.recv_cq = attributes->recv_cq;
    id->qp = &pair->qp;
    return 0;
}

void rdma_destroy_qp(struct rdma_cm_id *id)
{
    struct fake_pair *pair = fake_pair_of(id->qp);
    if (pair->peer)
        pair->peer->peer = NULL;
    fake_domain_use(pair->qp.pd, -1);
    fake_delete(pair, &fake.pairs);
    id->qp = NULL;
}

int rdma_connect(struct rdma_cm_id *id, struct rdma_conn_param *param)
{
    struct fake_id *listener;
    if (fake_fails(FAKE_CONNECT))
        return -1;
    DL_SEARCH_SCALAR(fake.listeners, listener, id.route.addr.src_sin.sin_port,
                     id->route.addr.dst_sin.sin_port);
    if (!listener) {
        fake_tell(id, NULL, RDMA_CM_EVENT_REJECTED, NULL);
        return 0;
    }
    struct rdma_cm_id *other = NULL;
    if (rdma_create_id(listener->id.channel, &other, NULL, RDMA_PS_TCP) < 0)
        return -1;
    other->verbs = fake_context;
    other->route.addr.dst_sin = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(1)};
    if (fake.hosts > 0)
        other->route.addr.dst_sin.sin_addr.s_addr = htonl(++fake.last_host % fake.hosts);
    fake_id_of(id)->peer = fake_id_of(other);
    fake_id_of(other)->peer = fake_id_of(id);
    fake_tell(other, &listener->id, RDMA_CM_EVENT_CONNECT_REQUEST, param);
    return 0;
}

int rdma_accept(struct rdma_cm_id *id, struct rdma_conn_param *param)
{
    struct fake_id *mine = fake_id_of(id);
    if (fake_fails(FAKE_ACCEPT))
        return -1;
    if (!mine->peer) {
        fake_tell(id, NULL, RDMA_CM_EVENT_CONNECT_ERROR, NULL);
        return 0;
    }
    mine->connected = mine->peer->connected = true;
    fake_pair_of(id->qp)->peer = fake_pair_of(mine->peer->id.qp);
    fake_pair_of(mine->peer->id.qp)->peer = fake_pair_of(id->qp);
    fake_tell(&mine->peer->id, NULL, RDMA_CM_EVENT_ESTABLISHED, param);
    fake_tell(id, NULL, RDMA_CM_EVENT_ESTABLISHED, NULL);
    return 0;
}

int rdma_reject(struct rdma_cm_id *id, const void *private_data, uint8_t length)
{
    struct fake_id *mine = fake_id_of(id);
    if (mine->peer)
        fake_tell(&mine->peer->id, NULL, RDMA_CM_EVENT_REJECTED, NULL);
    return 0;
}

int rdma_disconnect(struct rdma_cm_id *id)
{
    struct fake_id *mine = fake_id_of(id);
    if (mine->connected && mine->peer && mine->peer->connected)
        fake_tell(&mine->peer->id, NULL, RDMA_CM_EVENT_DISCONNECTED, NULL);
    else if (mine->peer && !mine->connected) // of one that never was, the other side hears no more
        fake_tell(&mine->peer->id, NULL, RDMA_CM_EVENT_UNREACHABLE, NULL);
    mine->connected = false;
    return 0;
}

int rdma_migrate_id(struct rdma_cm_id *id, struct rdma_event_channel *channel)
{
    id->channel = channel;
    return 0;
}

/* The transport looks for librdmacm's device file first. */
int access(const char *path, int mode)
{
    return strcmp(path, "/dev/infiniband/rdma_cm") == 0
               ? 0
               : (int)syscall(SYS_faccessat, AT_FDCWD, path, mode, 0);
}

// -- For stories ----------------------------------------------------------------------------------

/* A device without a fault, new under its old name. */
static void fake_reset(void)
{
    static struct ibv_context contexts[64];
    static unsigned used;
    if (used == util_count(contexts))
        abort();
    fake_context = &contexts[used++];
    fake.removed = false;
    *fake_context = (struct ibv_context){.device = &fake_device,
                                         .ops = {.poll_cq = fake_poll,
                                                 .req_notify_cq = fake_notify,
                                                 .post_send = fake_post_send,
                                                 .post_recv = fake_post_receive}};
    fake_fail_at(FAKE_NONE, 0, EIO);
    fake.send_status = fake.read_status = IBV_WC_SUCCESS;
    fake.reads_stall = fake.deregister_waits = false;
    fake.hosts = fake.spoiled = 0;
    fake.event = RDMA_CM_EVENT_ADDR_RESOLVED; // 0: none
}

/* The device is removed: everybody who is on it hears of it. */
static void fake_remove(void)
{
    struct fake_id *each;
    pthread_mutex_lock(&fake.lock);
    fake.removed = true;
    DL_FOREACH2(fake.all, each, all_next)
    {
        if (each->id.verbs == fake_context)
            fake_tell(&each->id, NULL, RDMA_CM_EVENT_DEVICE_REMOVAL, NULL);
    }
    pthread_mutex_unlock(&fake.lock);
}

/* Whether anybody is on a device yet. */
static bool fake_held(const struct ibv_context *context)
{
    struct fake_id *each;
    pthread_mutex_lock(&fake.lock);
    DL_FOREACH2(fake.all, each, all_next)
    {
        if (each->id.verbs == context)
            break;
    }
    pthread_mutex_unlock(&fake.lock);
    return each;
}

/* Everything that was made has been given back. */
static bool fake_empty(void)
{
    pthread_mutex_lock(&fake.lock);
    bool empty = !fake.domains && !fake.regions && !fake.queues && !fake.pairs && !fake.ids &&
                 !fake.channels && !fake.events;
    pthread_mutex_unlock(&fake.lock);
    return empty;
}

#endif
