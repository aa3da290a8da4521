/* Rdma_device: a network adapter that does RDMA, as this process uses it: its limits, and threads that register memory,
 * for registering pins pages and a lane may not wait for that.
 *
 * Rdma_domain: a protection domain of a device: the keys of its memory open it to its own queue pairs alone. Each link
 * has its own, so the key that one peer was granted is of no use to another. It lasts as long as somebody holds it or
 * memory is registered in it.
 *
 * A device may be removed, and return, as a new one of the same name. What is known of a name lives as long as the
 * process; its context belongs to librdmacm, which closes that of a removed device when no id is left on it: so a device
 * in use keeps an id of its own there. Any thread. */
#ifndef P2PFS_ENGINE_RDMA_DEVICE_H
#define P2PFS_ENGINE_RDMA_DEVICE_H

#include <rdma/rdma_cma.h>
#include <stdatomic.h>

#include "engine/mailbox.h"
#include "engine/work.h"

struct extents;

struct rdma_device {
    char name[IBV_SYSFS_NAME_MAX];
    struct ibv_context *verbs; /* NULL: nobody uses it; this and the next four are theirs who do */
    struct rdma_cm_id *anchor;
    struct ibv_device_attr limits;
    bool gone;
    unsigned users;
    struct work *work;
    atomic_ullong received; /* bytes of shards that came by it */
    atomic_uint rails;      /* open connections that carry shards */
    atomic_uint failures;   /* of them */
    struct rdma_device *next;
};

/* The one that librdmacm has put the id on. 0, with a user more, or negative errno. */
int rdma_device_get(struct rdma_cm_id *id, struct rdma_device **device);
void rdma_device_put(struct rdma_device *device);
bool rdma_device_gone(struct rdma_device *device); /* removed; by a user */

/* All that were got, by name. */
struct transport_adapter;
size_t rdma_devices(struct transport_adapter *out, size_t room);

int rdma_unblock(int fd); /* 0, or negative errno */

struct rdma_domain {
    struct rdma_device *device; /* a user of it */
    struct ibv_pd *pd;
    atomic_uint users;
    struct rdma_domain *next; /* the first user's */
};

/* With one user, who leaves it in the end. 0, or negative errno. */
int rdma_domain_open(struct rdma_device *device, struct rdma_domain **domain);
void rdma_domain_leave(struct rdma_domain *domain); /* its queue pairs are gone before the last */

struct rdma_memory {
    struct ibv_mr *region; /* NULL: nothing */
    struct rdma_domain *domain;
};

/* Registers memory at once. 0; -ENOMEM with one line in the log that names the remedy, when it is the limit of locked
 * memory; another negative errno. */
int rdma_memory_register(struct rdma_domain *domain, void *address, size_t length, int access,
                         struct rdma_memory *memory);
/* At once: 0 and it is nothing then, or negative errno and it stays. */
int rdma_memory_deregister(struct rdma_memory *memory);
/* Deregisters on a thread of the device, later, and then leaves `lent`, which may be NULL. */
void rdma_memory_retire(struct rdma_memory memory, struct extents *lent);

/* Registers for local writing on a thread of the device; `item` is then posted to the mailbox. Owned by the caller
 * until then, but for the memory, which whoever runs the item takes. */
struct rdma_registration {
    struct mailbox_item item;   /* run: set by the caller */
    struct mailbox *mailbox;    /* a reference, dropped when it has been posted */
    struct rdma_domain *domain; /* a user until then */
    void *address;
    size_t length;
    struct rdma_memory memory; /* nothing: `error` tells */
    int error;
    struct work_job job; /* the device's */
};
void rdma_memory_register_later(struct rdma_registration *registration);

#endif
