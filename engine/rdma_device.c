#include "engine/rdma_device.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "engine/extents.h"
#include "engine/transport.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

#define DEVICE_THREADS 2

static pthread_mutex_t devices_lock = PTHREAD_MUTEX_INITIALIZER;
static struct rdma_device *devices; /* only ever grows */

static int device_open(struct ibv_context *verbs, struct rdma_device **out)
{
    // a program may fork: what is registered must stay its own, which kernels before 5.12 do not see to
    if (!devices)
        (void)ibv_fork_init();
    struct rdma_device *device = calloc(1, sizeof(*device));
    if (!device)
        return -ENOMEM;
    device->verbs = verbs;
    int r = -ibv_query_device(verbs, &device->limits);
    if (r < 0)
        goto free_device;
    r = work_open(DEVICE_THREADS, &device->work);
    if (r < 0)
        goto free_device;
    *out = device;
    return 0;

free_device:
    free(device);
    return r;
}

int rdma_device_get(struct ibv_context *verbs, struct rdma_device **device)
{
    int r = 0;
    pthread_mutex_lock(&devices_lock);
    struct rdma_device *found = devices;
    while (found && found->verbs != verbs)
        found = found->next;
    if (!found) {
        r = device_open(verbs, &found);
        if (r == 0) {
            found->next = devices;
            devices = found;
        }
    }
    pthread_mutex_unlock(&devices_lock);
    *device = found;
    return r;
}

size_t rdma_devices(struct transport_adapter *out, size_t room)
{
    size_t count = 0;
    pthread_mutex_lock(&devices_lock);
    for (struct rdma_device *d = devices; d && count < room; d = d->next) {
        struct transport_adapter *adapter = &out[count++];
        *adapter = (struct transport_adapter){.received = atomic_load(&d->received),
                                              .rails = atomic_load(&d->rails),
                                              .failures = atomic_load(&d->failures)};
        snprintf(adapter->device, sizeof(adapter->device), "%s",
                 ibv_get_device_name(d->verbs->device));
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
    *out = domain;
    return 0;
}

void rdma_domain_leave(struct rdma_domain *domain)
{
    if (atomic_fetch_sub(&domain->users, 1) > 1)
        return;
    ibv_dealloc_pd(domain->pd);
    free(domain);
}

static void registering_failed(struct rdma_device *device, size_t length, int error)
{
    static atomic_bool said;
    struct rlimit limit;
    if (atomic_exchange(&said, true))
        return;
    const char *name = ibv_get_device_name(device->verbs->device);
    bool limited = (error == ENOMEM || error == EPERM || error == EAGAIN) &&
                   getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY;
    if (limited)
        log_error(
            "%s: %zu bytes cannot be registered for RDMA: this process may lock %llu KiB of memory; raise it "
            "(ulimit -l unlimited, LimitMEMLOCK=infinity for systemd, --ulimit memlock=-1 for containers)",
            name, length, (unsigned long long)limit.rlim_cur / 1024);
    else
        log_error("%s: %zu bytes cannot be registered for RDMA: %s", name, length, strerror(error));
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
