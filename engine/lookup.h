/* Lookup: finds a host's addresses on a thread of its own: getaddrinfo(3) may take as long as it likes, and a lane may
 * not. */
#ifndef P2PFS_ENGINE_LOOKUP_H
#define P2PFS_ENGINE_LOOKUP_H

#include "engine/mailbox.h"
#include "engine/tcp_socket.h"

/* What comes to the mailbox; whoever runs the item frees it. */
struct lookup {
    struct mailbox_item item;
    uint64_t number; /* of the link that waits */
    int result;      /* as tcp_address_parse */
    struct tcp_addresses addresses;
    struct mailbox *mailbox;
    char address[TRANSPORT_NAME_MAX + 1];
};

/* 0: `done` runs from the mailbox, with its owner. -ENOMEM, -EAGAIN (no thread): it does not. */
int lookup_start(struct mailbox *mailbox, uint64_t number, const char *address,
                 void (*done)(struct mailbox_item *item, void *arg));

#endif
