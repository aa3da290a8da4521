#include "engine/mailbox.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "meta/base/util.h"

struct mailbox {
    struct loop *loop;
    void *arg;
    struct loop_watch bell;
    atomic_uint references;
    pthread_mutex_t lock; /* guards all below */
    struct mailbox_item *first;
    struct mailbox_item **last;
    bool closed;
};

static struct mailbox_item *mailbox_take(struct mailbox *box)
{
    pthread_mutex_lock(&box->lock);
    struct mailbox_item *items = box->first;
    box->first = NULL;
    box->last = &box->first;
    pthread_mutex_unlock(&box->lock);
    return items;
}

static void items_run(struct mailbox_item *items, void *arg)
{
    while (items) {
        struct mailbox_item *item = items;
        items = item->next;
        item->run(item, arg);
    }
}

static void mailbox_rang(struct loop_watch *watch, uint32_t events)
{
    (void)events;
    struct mailbox *box = util_container(watch, struct mailbox, bell);
    uint64_t count;
    while (read(watch->fd, &count, sizeof(count)) < 0 && errno == EINTR)
        ;
    items_run(mailbox_take(box), box->arg);
}

int mailbox_open(struct loop *loop, void *arg, struct mailbox **out)
{
    struct mailbox *box = calloc(1, sizeof(*box));
    if (!box)
        return -ENOMEM;
    box->loop = loop;
    box->arg = arg;
    box->references = 1;
    box->last = &box->first;
    box->bell.ready = mailbox_rang;
    box->bell.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int r = 0;
    if (box->bell.fd < 0) {
        r = -errno;
        goto free_box;
    }
    r = loop_watch_set(loop, &box->bell, POLLIN);
    if (r < 0)
        goto close_bell;
    pthread_mutex_init(&box->lock, NULL);
    *out = box;
    return 0;

close_bell:
    close(box->bell.fd);
free_box:
    free(box);
    return r;
}

void mailbox_close(struct mailbox *box)
{
    if (!box)
        return;
    loop_watch_clear(box->loop, &box->bell);
    pthread_mutex_lock(&box->lock);
    box->closed = true;
    pthread_mutex_unlock(&box->lock);
    items_run(mailbox_take(box), NULL);
    mailbox_unref(box);
}

struct mailbox *mailbox_ref(struct mailbox *box)
{
    atomic_fetch_add(&box->references, 1);
    return box;
}

void mailbox_unref(struct mailbox *box)
{
    if (!box || atomic_fetch_sub(&box->references, 1) != 1)
        return;
    close(box->bell.fd);
    pthread_mutex_destroy(&box->lock);
    free(box);
}

void mailbox_post(struct mailbox *box, struct mailbox_item *item)
{
    item->next = NULL;
    pthread_mutex_lock(&box->lock);
    bool closed = box->closed;
    bool first = !box->first;
    if (!closed) {
        *box->last = item;
        box->last = &item->next;
    }
    pthread_mutex_unlock(&box->lock);
    if (closed) {
        item->run(item, NULL);
    } else if (first) {
        uint64_t one = 1;
        while (write(box->bell.fd, &one, sizeof(one)) < 0 && errno == EINTR)
            ;
    }
}
