#include "engine/rdma_device.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <utlist.h>

#include "engine/extents.h"
#include "engine/transport.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

#define DEVICE_THREADS 2

static pthread_mutex_t devices_lock = PTHREAD_MUTEX_INITIALIZER;
static struct rdma_device *devices; /* only ever grows */

int rdma_unblock(int fd)
{
    int flags = fcntl(fd, F_GETFL);
    return flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 ? -errno : 0;
}

static int device_new(const char *name, struct rdma_device **out)
{
    // A program may fork: what is registered must stay its own. Kernels before 5.12 do not see to that; with later ones
    // the library would only split mappings, and their huge pages, at every registration.
    if (!devices && ibv_is_fork_initialized() != IBV_FORK_UNNEEDED)
        (void)ibv_fork_init();
    struct rdma_device *device = calloc(1, sizeof(*device));
    if (!device)
        return -ENOMEM;
    snprintf(device->name, sizeof(device->name), "%s", name);
    int r = work_open(DEVICE_THREADS, &device->work);
    if (r < 0) {
        free(device);
        return r;
    }
    LL_PREPEND(devices, device);
    *out = device;
    return 0;
}

/* An id at the address where another one is on its device, whose removal is told to it alone. */
static int anchor_make(struct rdma_cm_id *id, struct rdma_cm_id **out)
{
    struct sockaddr_in6 address;
    memcpy(&address, rdma_get_local_addr(id), sizeof(address));
    address.sin6_port = 0; // sin_port is in the same place
    struct rdma_event_channel *channel = rdma_create_event_channel();
    if (!channel)
        return -errno;
    int r = rdma_unblock(channel->fd);
    if (r < 0)
        goto destroy_channel;
    r = rdma_create_id(channel, out, NULL, RDMA_PS_TCP) < 0 ? -errno : 0;
    if (r < 0)
        goto destroy_channel;
    r = rdma_bind_addr(*out, (struct sockaddr *)&address) < 0 ? -errno : 0;
    if (r == 0 && (*out)->verbs == id->verbs)
        return 0;
    rdma_destroy_id(*out);
    r = r ? r : -ENODEV;

destroy_channel:
    rdma_destroy_event_channel(channel);
    return r;
}

static void anchor_end(struct rdma_cm_id *anchor)
{
    struct rdma_event_channel *channel = anchor->channel;
    rdma_destroy_id(anchor);
    rdma_destroy_event_channel(channel);
}

static int device_use(struct rdma_device *device, struct rdma_cm_id *id)
{
    int r = -ibv_query_device(id->verbs, &device->limits);
    if (r == 0)
        r = anchor_make(id, &device->anchor);
    if (r < 0)
        return r;
    device->verbs = id->verbs;
    device->gone = false;
    return 0;
}

int rdma_device_get(struct rdma_cm_id *id, struct rdma_device **out)
{
    const char *name = ibv_get_device_name(id->verbs->device);
    struct rdma_device *device;
    int r = 0;
    pthread_mutex_lock(&devices_lock);
    LL_SEARCH_SCALAR(devices, device, verbs, id->verbs);
    if (!device) {
        LL_FOREACH(devices, device) {
            if (!device->verbs && strcmp(device->name, name) == 0)
                break;
        }
        if (!device)
            r = device_new(name, &device);
        if (r == 0)
            r = device_use(device, id);
    }
    if (r == 0)
        device->users++;
    pthread_mutex_unlock(&devices_lock);
    *out = device;
    return r;
}

void rdma_device_put(struct rdma_device *device)
{
    pthread_mutex_lock(&devices_lock);
    if (--device->users == 0) {
        anchor_end(device->anchor);
        device->verbs = NULL;
    }
    pthread_mutex_unlock(&devices_lock);
}

bool rdma_device_gone(struct rdma_device *device)
{
    struct rdma_cm_event *event;
    pthread_mutex_lock(&devices_lock);
    while (!device->gone && rdma_get_cm_event(device->anchor->channel, &event) == 0) {
        device->gone = event->event == RDMA_CM_EVENT_DEVICE_REMOVAL;
        rdma_ack_cm_event(event);
    }
    bool gone = device->gone;
    pthread_mutex_unlock(&devices_lock);
    return gone;
}

size_t rdma_devices(struct transport_adapter *out, size_t room)
{
    size_t count = 0;
    pthread_mutex_lock(&devices_lock);
    for (struct rdma_device *d = devices; d && count < room; d = d->next) {
        size_t at = 0;
        while (at < count && strcmp(out[at].device, d->name) != 0)
            at++;
        struct transport_adapter *adapter = &out[at];
        if (at == count) {
            *adapter = (struct transport_adapter){.received = 0};
            snprintf(adapter->device, sizeof(adapter->device), "%s", d->name);
            count++;
        }
        adapter->received += atomic_load(&d->received);
        adapter->rails += atomic_load(&d->rails);
        adapter->failures += atomic_load(&d->failures);
    }
    pthread_mutex_unlock(&devices_lock);
    return count;
}

int rdma_domain_open(struct rdma_device *device, struct rdma_domain **out)
{
    struct rdma_domain *domain = malloc(sizeof(*domain));
    if (!domain)
        return -ENOMEM;
    *domain = (struct rdma_domain){.device = device, .pd = ibv_alloc_pd(device->verbs), .users = 1};
    if (!domain->pd) {
        int r = errno ? -errno : -ENOMEM;
        free(domain);
        return r;
    }
    pthread_mutex_lock(&devices_lock);
    device->users++;
    pthread_mutex_unlock(&devices_lock);
    *out = domain;
    return 0;
}

void rdma_domain_leave(struct rdma_domain *domain)
{
    if (atomic_fetch_sub(&domain->users, 1) > 1)
        return;
    ibv_dealloc_pd(domain->pd);
    rdma_device_put(domain->device);
    free(domain);
}

static void registering_failed(struct rdma_device *device, size_t length, int error)
{
    static atomic_bool said;
    struct rlimit limit;
    if (atomic_exchange(&said, true))
        return;
    bool limited = (error == ENOMEM || error == EPERM || error == EAGAIN) &&
                   getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY;
    if (limited)
        log_error(
            "%s: %zu bytes cannot be registered for RDMA: this process may lock %llu KiB of memory; raise it "
            "(ulimit -l unlimited, LimitMEMLOCK=infinity for systemd, --ulimit memlock=-1 for containers)",
            device->name, length, (unsigned long long)limit.rlim_cur / 1024);
    else
        log_error("%s: %zu bytes cannot be registered for RDMA: %s", device->name, length,
                  strerror(error));
}

int rdma_memory_register(struct rdma_domain *domain, void *address, size_t length, int access,
                         struct rdma_memory *memory)
{
    struct ibv_mr *region = ibv_reg_mr(domain->pd, address, length, access);
    if (!region) {
        int error = errno ? errno : ENOMEM;
        registering_failed(domain->device, length, error);
        return -error;
    }
    atomic_fetch_add(&domain->users, 1);
    *memory = (struct rdma_memory){.region = region, .domain = domain};
    return 0;
}

int rdma_memory_deregister(struct rdma_memory *memory)
{
    if (!memory->region)
        return 0;
    int error = ibv_dereg_mr(memory->region);
    if (error)
        return -error;
    rdma_domain_leave(memory->domain);
    *memory = (struct rdma_memory){.region = NULL};
    return 0;
}

struct retirement {
    struct work_job job;
    struct rdma_memory memory;
    struct extents *lent;
};

static void retire(struct rdma_memory memory, struct extents *lent)
{
    (void)rdma_memory_deregister(&memory);
    if (lent)
        extents_leave(lent);
}

static void retire_run(struct work_job *job)
{
    struct retirement *retirement = util_container(job, struct retirement, job);
    retire(retirement->memory, retirement->lent);
    free(retirement);
}

void rdma_memory_retire(struct rdma_memory memory, struct extents *lent)
{
    struct retirement *retirement = memory.region ? malloc(sizeof(*retirement)) : NULL;
    if (!retirement) {
        retire(memory, lent);
        return;
    }
    *retirement = (struct retirement){.job.run = retire_run, .memory = memory, .lent = lent};
    work_post(memory.domain->device->work, &retirement->job);
}

static void register_run(struct work_job *job)
{
    struct rdma_registration *r = util_container(job, struct rdma_registration, job);
    struct mailbox *mailbox = r->mailbox;
    // what lands may be written in any order: it is looked at when the READ is over
    r->error =
        rdma_memory_register(r->domain, r->address, r->length,
                             IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_RELAXED_ORDERING, &r->memory);
    rdma_domain_leave(r->domain);
    mailbox_post(mailbox, &r->item);
    mailbox_unref(mailbox);
}

void rdma_memory_register_later(struct rdma_registration *registration)
{
    atomic_fetch_add(&registration->domain->users, 1);
    registration->job.run = register_run;
    work_post_urgent(registration->domain->device->work, &registration->job);
}
