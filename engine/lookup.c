#include "engine/lookup.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

static void *lookup_thread(void *arg)
{
    struct lookup *lookup = arg;
    struct mailbox *mailbox = lookup->mailbox;
    lookup->result = tcp_address_parse(lookup->address, true, false, &lookup->addresses);
    mailbox_post(mailbox, &lookup->item);
    mailbox_unref(mailbox);
    return NULL;
}

int lookup_start(struct mailbox *mailbox, uint64_t number, const char *address,
                 void (*done)(struct mailbox_item *item, void *arg))
{
    struct lookup *lookup = calloc(1, sizeof(*lookup));
    if (!lookup)
        return -ENOMEM;
    lookup->item.run = done;
    lookup->number = number;
    lookup->mailbox = mailbox_ref(mailbox);
    snprintf(lookup->address, sizeof(lookup->address), "%s", address);
    pthread_t thread;
    int r = -pthread_create(&thread, NULL, lookup_thread, lookup);
    if (r < 0) {
        mailbox_unref(mailbox);
        free(lookup);
        return r;
    }
    pthread_detach(thread);
    return 0;
}
