#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "engine/rdma_link.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

/* The accepting side: a listener for each adapter, all with one port; who connects is given to a lane, or joins a link. */

#define LISTEN_BACKLOG 128
/* Who asks to connect and then says no more costs a queue pair and 256 KiB until the kernel gives it up, a minute later. */
#define ACCEPTING_MAX     256
#define ACCEPTING_ADDRESS 64 /* of them from one address */
#define ACCEPTING_NS      10000000000ull

// -- Those who connect ----------------------------------------------------------------------------

/* Somebody who asked to connect, on his way to the lane that takes him. */
struct handover {
    struct mailbox_item item;
    struct rdma_cm_id *id;
    int credits;
};

/* Whether one more may begin, from where this one comes. */
static bool accepting_room(const struct rdma_transport *t, const char *peer)
{
    const struct rdma_link *link;
    unsigned all = 0, same = 0;
    DL_FOREACH(t->links, link) {
        if (link->state == RDMA_ACCEPTING) {
            all++;
            same += transport_same_host(link->base.peer, peer);
        }
    }
    return all < ACCEPTING_MAX && same < ACCEPTING_ADDRESS;
}

void rdma_listen_look(struct rdma_link *link, uint64_t now_ns)
{
    if (link->state == RDMA_ACCEPTING && now_ns - link->rails[0].since_ns > ACCEPTING_NS)
        rdma_link_shut(&link->base); // nobody has heard of it yet
}

static void request_take(struct rdma_transport *t, struct rdma_cm_id *id, int credits)
{
    char peer[TRANSPORT_NAME_MAX + 1];
    struct tcp_address other = {.length = sizeof(struct sockaddr_in6)};
    memcpy(&other.storage, rdma_get_peer_addr(id), sizeof(struct sockaddr_in6));
    tcp_address_print(&other, peer);
    struct rdma_link *link = accepting_room(t, peer) ? rdma_link_new(t) : NULL;
    if (!link) {
        log_debug("%s: its RDMA connection was refused: out of memory, or too many begin at once",
                  peer);
        rdma_reject(id, NULL, 0);
        rdma_destroy_id(id);
        return;
    }
    memcpy(link->base.peer, peer, sizeof(link->base.peer));
    id->context = &link->rails[0];
    link->rails[0].id = id;
    link->rails[0].since_ns = util_now_ns();
    link->state = RDMA_ACCEPTING;
    link->credits = (unsigned)credits;
    rdma_rails_offer(link);
    uint8_t bytes[RDMA_PREFACE_BYTES];
    rdma_preface_put(bytes, link->token, 0);
    int r = rdma_link_equip(link);
    if (r == 0) {
        struct rdma_conn_param param = rdma_conn_param_of(&link->rails[0], bytes);
        r = rdma_accept(id, &param) < 0 ? -errno : 0;
        if (r < 0)
            rdma_reject(id, NULL, 0);
    }
    if (r == 0)
        return;
    log_info("%s: its RDMA connection cannot be accepted: %s", link->base.peer, strerror(-r));
    rdma_link_shut(&link->base); // nobody has heard of it yet
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

void rdma_listen_request(struct rdma_transport *t, struct rdma_cm_id *id,
                         const struct rdma_preface *got)
{
    id->context = NULL; // no link yet
    if (got->credits < 0) {
        rdma_reject(id, NULL, 0);
        rdma_destroy_id(id);
        return;
    }
    if (got->slot > 0) {
        rdma_rail_join(id, got->token, got->slot);
        return;
    }
    struct transport *next = t->share_next ? t->share_next(t->share_arg) : &t->base;
    int credits = got->credits;
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

// -- Addresses ------------------------------------------------------------------------------------

static int listener_open(struct rdma_transport *t, struct rdma_listener *listener)
{
    struct rdma_cm_id *id;
    if (rdma_create_id(t->events, &id, NULL, RDMA_PS_TCP) < 0)
        return -errno;
    if (rdma_bind_addr(id, (struct sockaddr *)&listener->address.storage) < 0 ||
        rdma_listen(id, LISTEN_BACKLOG) < 0) {
        int r = -errno;
        rdma_destroy_id(id);
        return r == -ENODEV ? -EADDRNOTAVAIL : r;
    }
    // it may have got a port just now, and keeps it
    memcpy(&listener->address.storage, rdma_get_local_addr(id), sizeof(struct sockaddr_in6));
    listener->id = id;
    return 0;
}

/* Connections of the rest of the adapters come to their own addresses, on the same port. `bound` then names all. */
static void listen_beside(struct rdma_transport *t, char bound[TRANSPORT_NAME_MAX + 1])
{
    const struct tcp_address *first = &t->listeners[0].address;
    size_t used = strlen(bound);
    for (unsigned i = 0; i < t->source_count && t->listener_count < RDMA_RAILS; i++) {
        struct tcp_address own = t->sources[i];
        char text[TRANSPORT_NAME_MAX + 1];
        tcp_address_port_set(&own, tcp_address_port(first));
        if (memcmp(&own.storage, &first->storage, own.length) == 0)
            continue;
        struct rdma_listener *listener = &t->listeners[t->listener_count++];
        *listener = (struct rdma_listener){.address = own};
        int r = listener_open(t, listener);
        tcp_address_print(&own, text);
        if (r < 0)
            log_warn("%s: not listened on for RDMA: %s; tried again each second", text,
                     strerror(-r));
        if (used + 1 + strlen(text) > TRANSPORT_NAME_MAX) {
            log_warn("%s: peers are not told of it: there is no room for more addresses", text);
            continue;
        }
        used += (size_t)snprintf(bound + used, TRANSPORT_NAME_MAX + 1 - used, ",%s", text);
    }
}

static bool address_any(const struct tcp_address *address)
{
    const struct sockaddr_in *four = (const struct sockaddr_in *)&address->storage;
    const struct sockaddr_in6 *six = (const struct sockaddr_in6 *)&address->storage;
    return address->storage.ss_family == AF_INET6 ? IN6_IS_ADDR_UNSPECIFIED(&six->sin6_addr)
                                                  : four->sin_addr.s_addr == INADDR_ANY;
}

int rdma_listen_open(struct transport *base, const char *address,
                     char bound[TRANSPORT_NAME_MAX + 1])
{
    struct rdma_transport *t = rdma_transport_of(base);
    if (t->listener_count > 0)
        return -EALREADY;
    struct tcp_addresses addresses;
    if (tcp_address_parse(address, true, true, &addresses) < 0)
        return -EINVAL;
    t->listeners[0].address = addresses.list[0];
    if (address_any(&addresses.list[0]) && t->source_count > 0) { // everywhere is where they are
        t->listeners[0].address = t->sources[0];
        tcp_address_port_set(&t->listeners[0].address, tcp_address_port(&addresses.list[0]));
    }
    int r = listener_open(t, &t->listeners[0]);
    if (r < 0)
        return r;
    t->listener_count = 1;
    tcp_address_print(&t->listeners[0].address, bound);
    listen_beside(t, bound);
    return 0;
}

void rdma_listen_share(struct transport *base, struct transport *(*next)(void *arg), void *arg)
{
    struct rdma_transport *t = rdma_transport_of(base);
    t->share_next = next;
    t->share_arg = arg;
}

void rdma_listen_again(struct rdma_transport *t)
{
    for (unsigned i = 0; i < t->listener_count; i++)
        if (!t->listeners[i].id)
            (void)listener_open(t, &t->listeners[i]);
}

void rdma_listen_lost(struct rdma_transport *t, struct rdma_cm_id *id)
{
    for (unsigned i = 0; i < t->listener_count; i++)
        if (t->listeners[i].id == id) {
            rdma_destroy_id(id);
            t->listeners[i].id = NULL;
        }
}

void rdma_listen_end(struct rdma_transport *t)
{
    for (unsigned i = 0; i < t->listener_count; i++)
        if (t->listeners[i].id)
            rdma_destroy_id(t->listeners[i].id);
    t->listener_count = 0;
}
