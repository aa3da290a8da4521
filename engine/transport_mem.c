#include "engine/transport_mem.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <utlist.h>

#include "engine/mem_link.h"
#include "engine/transport.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

/* Two ends of a link know each other by number and mailbox only; all that passes between them is letters, so that ends
 * on different threads share nothing. A fetch asks for one piece after another; each piece is copied into a letter on
 * the holder's thread and out of it on the puller's. */
#define PIECE_BYTES (256u << 10)

enum kind { CONNECT, CONNECTED, MESSAGE, CREDIT, ASK, PIECE, FAILED, CLOSED };
enum fate { FATE_NONE, FATE_SHORT, FATE_FLIP, FATE_STALL };

struct mem_letter {
    struct mailbox_item item;
    struct mem_letter *next; /* among the delayed */
    uint64_t due_ns;
    enum kind kind;
    uint64_t to;
    uint64_t from;
    struct mailbox *from_box; /* CONNECT, CONNECTED: a reference */
    uint32_t id;
    size_t offset;
    size_t length; /* CREDIT, ASK: a number; else of bytes */
    uint8_t bytes[];
};

struct listener {
    struct listener *next;
    struct mailbox *mailbox; /* a reference */
    const struct mem_transport *owner;
    char address[TRANSPORT_NAME_MAX + 1];
};

static pthread_mutex_t listeners_lock = PTHREAD_MUTEX_INITIALIZER;
static struct listener *listeners; /* guarded by listeners_lock */
static atomic_uint last_port;

// -- Letters --------------------------------------------------------------------------------------

static void letter_run(struct mailbox_item *item, void *arg);

static struct mem_letter *letter_new(enum kind kind, size_t bytes)
{
    struct mem_letter *letter = calloc(1, sizeof(*letter) + bytes);
    if (!letter)
        return NULL;
    letter->item.run = letter_run;
    letter->kind = kind;
    letter->length = bytes;
    return letter;
}

static void letter_free(struct mem_letter *letter)
{
    mailbox_unref(letter->from_box);
    free(letter);
}

static void letter_post(struct mem_link *link, struct mem_letter *letter)
{
    uint64_t delay = mem_fault_delay_ms();
    if (delay > 0 && (letter->kind == MESSAGE || letter->kind == PIECE))
        letter->due_ns = util_now_ns() + delay * 1000000;
    letter->to = link->far_number;
    letter->from = link->number;
    mailbox_post(link->far, &letter->item);
}

/* A letter without bytes. Out of memory: the link is of no use. */
static void note_post(struct mem_link *link, enum kind kind, uint32_t id, size_t offset,
                      size_t length)
{
    struct mem_letter *letter = letter_new(kind, 0);
    if (!letter) {
        mem_link_break(link, -ENOMEM, "out of memory");
        return;
    }
    letter->id = id;
    letter->offset = offset;
    letter->length = length;
    letter_post(link, letter);
}

static void connect_opened(struct mem_transport *t, struct mem_letter *letter)
{
    struct mem_link *link = mem_link_new(t);
    struct mem_letter *answer = link ? letter_new(CONNECTED, 0) : NULL;
    if (!answer) {
        log_warn("a connection was refused: out of memory"); // its end waits until it is impatient
        if (link) {
            DL_DELETE(t->links, link);
            mem_link_free(link);
        }
        return;
    }
    link->state = MEM_OPEN;
    link->far = mailbox_ref(letter->from_box);
    link->far_number = letter->from;
    snprintf(link->base.peer, sizeof(link->base.peer), "mem-%llu:0",
             (unsigned long long)letter->from);
    answer->from_box = mailbox_ref(t->mailbox);
    letter_post(link, answer);
    t->base.events->accepted(t->base.arg, &link->base);
}

static size_t piece_length(const struct transport_fetch *fetch)
{
    size_t end =
        (enum fate)(uintptr_t)fetch->state == FATE_SHORT ? fetch->length / 2 : fetch->length;
    size_t left = end - fetch->landed;
    return left < PIECE_BYTES ? left : PIECE_BYTES;
}

static void fetch_end(struct mem_link *link, struct transport_fetch *fetch, int status)
{
    mem_link_cancel(&link->base, fetch);
    link->base.transport->events->fetch_done(&link->base, fetch, status);
}

/* Asks for what comes next, or answers when that was all. */
static void fetch_next(struct mem_link *link, struct transport_fetch *fetch)
{
    enum fate fate = (enum fate)(uintptr_t)fetch->state;
    size_t length = piece_length(fetch);
    if (length > 0)
        note_post(link, ASK, fetch->id, fetch->landed, length);
    else
        fetch_end(link, fetch, fate == FATE_SHORT ? -EIO : 0);
}

static void piece_opened(struct mem_link *link, const struct mem_letter *letter)
{
    struct transport_fetch *fetch;
    LL_SEARCH_SCALAR(link->fetches, fetch, id, letter->id);
    if (!fetch || letter->offset != fetch->landed || letter->length > fetch->length - fetch->landed)
        return;
    uint8_t *at = (uint8_t *)fetch->destination + fetch->landed;
    if (letter->length > 0)
        memcpy(at, letter->bytes, letter->length);
    if ((enum fate)(uintptr_t)fetch->state == FATE_FLIP && letter->offset == 0 &&
        letter->length > 0)
        at[letter->length / 2] ^= 0x10;
    fetch->landed += letter->length;
    link->base.received += letter->length;
    uint32_t id = fetch->id;
    if (letter->length > 0)
        link->base.transport->events->fetch_landed(&link->base, fetch);
    if (link->dead || link->state != MEM_OPEN)
        return;
    LL_SEARCH_SCALAR(link->fetches, fetch, id, id); // the event may have cancelled it
    if (fetch)
        fetch_next(link, fetch);
}

static int region_read(const struct transport_region *region, size_t offset, size_t length,
                       uint8_t *out)
{
    if (offset > region->length || length > region->length - offset)
        return -EINVAL;
    if (region->map) {
        if (length > 0)
            memcpy(out, (const uint8_t *)region->map + offset, length);
        return 0;
    }
    for (size_t have = 0; have < length;) {
        ssize_t n =
            pread(region->fd, out + have, length - have, region->offset + (off_t)(offset + have));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -ENODATA;
        have += (size_t)n;
    }
    return 0;
}

static void ask_opened(struct mem_link *link, const struct mem_letter *ask)
{
    struct mem_exposure *e;
    LL_SEARCH_SCALAR(link->exposures, e, id, ask->id);
    struct mem_letter *piece =
        e && ask->length <= PIECE_BYTES ? letter_new(PIECE, ask->length) : NULL;
    int r = piece ? region_read(&e->region, ask->offset, ask->length, piece->bytes) : -ENOENT;
    if (r < 0) {
        if (piece)
            log_error("%s: bytes of a shard cannot be read: %s", link->base.peer, strerror(-r));
        free(piece);
        note_post(link, FAILED, ask->id, 0, 0);
        return;
    }
    piece->id = ask->id;
    piece->offset = ask->offset;
    link->base.sent += ask->length;
    letter_post(link, piece);
    if (!e->sent && ask->offset + ask->length == e->region.length) {
        e->sent = true;
        link->base.transport->events->exposed_sent(&link->base, ask->id);
    }
}

static void letter_open(struct mem_transport *t, struct mem_letter *letter)
{
    if (letter->kind == CONNECT) {
        connect_opened(t, letter);
        return;
    }
    struct mem_link *link;
    DL_SEARCH_SCALAR(t->links, link, number, letter->to);
    if (!link || link->state == MEM_BROKEN)
        return;
    const struct transport_events *events = t->base.events;
    struct transport_fetch *fetch;
    switch (letter->kind) {
    case CONNECTED:
        link->far = mailbox_ref(letter->from_box);
        link->far_number = letter->from;
        link->state = MEM_OPEN;
        loop_timer_clear(t->base.loop, &link->patience);
        events->connected(&link->base);
        break;
    case MESSAGE:
        note_post(link, CREDIT, 0, 0, letter->length);
        events->message(&link->base, letter->bytes, letter->length);
        break;
    case CREDIT:
        link->queued -= letter->length;
        mem_link_writable(link);
        break;
    case ASK:
        ask_opened(link, letter);
        break;
    case PIECE:
        piece_opened(link, letter);
        break;
    case FAILED:
        LL_SEARCH_SCALAR(link->fetches, fetch, id, letter->id);
        if (fetch)
            fetch_end(link, fetch, -EIO);
        break;
    case CLOSED:
        mem_link_break(link, link->state == MEM_CONNECTING ? -ECONNREFUSED : -ECONNRESET,
                       "the other side closed the connection");
        break;
    case CONNECT:
        break;
    }
}

static void delayed_run(struct loop_timer *timer)
{
    struct mem_transport *t = util_container(timer, struct mem_transport, wait);
    loop_timer_set(t->base.loop, timer, MEM_NEVER_NS);
    struct mem_letter *letter;
    uint64_t now = util_now_ns();
    while ((letter = t->delayed) && letter->due_ns <= now) {
        t->delayed = letter->next;
        if (!t->delayed)
            t->delayed_last = &t->delayed;
        letter_open(t, letter);
        letter_free(letter);
    }
    if (letter)
        loop_timer_set(t->base.loop, timer, letter->due_ns - now);
}

/* A letter nobody will open. Who tries to connect learns it. */
static void letter_return(struct mem_letter *letter)
{
    struct mem_letter *answer = letter->kind == CONNECT ? letter_new(CLOSED, 0) : NULL;
    if (answer) {
        answer->to = letter->from;
        mailbox_post(letter->from_box, &answer->item);
    }
    letter_free(letter);
}

static void letter_run(struct mailbox_item *item, void *arg)
{
    struct mem_letter *letter = util_container(item, struct mem_letter, item);
    struct mem_transport *t = arg;
    if (!t) {
        letter_return(letter);
        return;
    }
    // one that is to be shared goes on to the next instance, once
    if (letter->kind == CONNECT && letter->offset == 0 && t->share_next) {
        letter->offset = 1;
        struct transport *next = t->share_next(t->share_arg);
        if (next != &t->base) {
            mailbox_post(mem_transport_of(next)->mailbox, item);
            return;
        }
    }
    if (t->delayed || letter->due_ns > util_now_ns()) {
        letter->next = NULL;
        *t->delayed_last = letter;
        t->delayed_last = &letter->next;
        if (t->delayed == letter) {
            uint64_t now = util_now_ns();
            loop_timer_set(t->base.loop, &t->wait, letter->due_ns > now ? letter->due_ns - now : 0);
        }
        return;
    }
    letter_open(t, letter);
    letter_free(letter);
}

// -- Operations -----------------------------------------------------------------------------------

static int mem_connect(struct transport *base, const char *address, uint32_t timeout_ms, void *user,
                       struct link **out)
{
    struct mem_transport *t = mem_transport_of(base);
    if (strlen(address) > TRANSPORT_NAME_MAX)
        return -EINVAL;
    struct mem_link *link = mem_link_new(t);
    struct mem_letter *letter = link ? letter_new(CONNECT, 0) : NULL;
    int r = letter ? loop_timer_set(base->loop, &link->patience, timeout_ms * 1000000ull) : -ENOMEM;
    if (r < 0) {
        free(letter);
        if (link) {
            DL_DELETE(t->links, link);
            mem_link_free(link);
        }
        return r;
    }
    link->base.user = user;
    link->base.outgoing = true;
    snprintf(link->base.peer, sizeof(link->base.peer), "%s", address);
    letter->from = link->number;
    letter->from_box = mailbox_ref(t->mailbox);

    pthread_mutex_lock(&listeners_lock);
    struct listener *l;
    LL_FOREACH(listeners, l) {
        if (strcmp(l->address, address) == 0)
            break;
    }
    struct mailbox *box = l ? mailbox_ref(l->mailbox) : NULL;
    pthread_mutex_unlock(&listeners_lock);
    if (box) {
        mailbox_post(box, &letter->item);
        mailbox_unref(box);
    } else {
        letter_free(letter);
        mem_link_break(link, -ECONNREFUSED, "nobody listens there");
    }
    *out = &link->base;
    return 0;
}

static int mem_listen(struct transport *base, const char *address,
                      char bound[TRANSPORT_NAME_MAX + 1])
{
    struct mem_transport *t = mem_transport_of(base);
    size_t length = strlen(address);
    if (length == 0 || length > TRANSPORT_NAME_MAX - 12)
        return -EINVAL;
    struct listener *l = calloc(1, sizeof(*l));
    if (!l)
        return -ENOMEM;
    if (length > 2 && strcmp(address + length - 2, ":0") == 0)
        snprintf(l->address, sizeof(l->address), "%.*s%u", (int)length - 1, address,
                 atomic_fetch_add(&last_port, 1) + 1);
    else
        snprintf(l->address, sizeof(l->address), "%s", address);
    l->owner = t;
    int r = 0;
    struct listener *other;
    pthread_mutex_lock(&listeners_lock);
    LL_FOREACH(listeners, other) {
        if (strcmp(l->address, other->address) == 0)
            r = -EADDRINUSE;
    }
    if (r == 0) {
        l->mailbox = mailbox_ref(t->mailbox);
        LL_PREPEND(listeners, l);
    }
    pthread_mutex_unlock(&listeners_lock);
    if (r < 0) {
        free(l);
        return r;
    }
    snprintf(bound, TRANSPORT_NAME_MAX + 1, "%s", l->address);
    return 0;
}

static void mem_share(struct transport *base, struct transport *(*next)(void *arg), void *arg)
{
    mem_transport_of(base)->share_next = next;
    mem_transport_of(base)->share_arg = arg;
}

static int mem_send(struct link *base, const void *message, size_t length)
{
    struct mem_link *link = mem_link_of(base);
    if (length > TRANSPORT_MESSAGE_MAX)
        return -EMSGSIZE;
    if (link->state != MEM_OPEN)
        return -ENOTCONN;
    if (mem_fault_now(MEM_REFUSE))
        return -ENOMEM;
    if (mem_fault_now(MEM_FULL)) {
        link->full = true;
        mem_link_mark(link);
        return -EAGAIN;
    }
    if (link->queued + length > MEM_QUEUE_BYTES) {
        link->full = true;
        return -EAGAIN;
    }
    if (mem_fault_now(MEM_LOSE)) {
        note_post(link, CLOSED, 0, 0, 0);
        mem_link_break(link, -ECONNRESET, "a message was lost");
        return 0;
    }
    struct mem_letter *letter = letter_new(MESSAGE, length);
    if (!letter)
        return -ENOMEM;
    if (length > 0)
        memcpy(letter->bytes, message, length);
    link->queued += length;
    letter_post(link, letter);
    return 0;
}

static int mem_expose(struct link *base, uint32_t id, const struct transport_region *region,
                      bool urgent, struct transport_descriptor *descriptor)
{
    (void)urgent; // pieces are asked for, so the puller decides
    struct mem_link *link = mem_link_of(base);
    if (link->state != MEM_OPEN)
        return -ENOTCONN;
    if (mem_fault_now(MEM_REFUSE))
        return -ENOMEM;
    struct mem_exposure *e;
    LL_SEARCH_SCALAR(link->exposures, e, id, id);
    if (e)
        return -EEXIST;
    e = calloc(1, sizeof(*e));
    if (!e)
        return -ENOMEM;
    e->id = id;
    e->region = *region;
    LL_PREPEND(link->exposures, e);
    uint64_t length = region->length;
    descriptor->bytes[0] = 'M';
    memcpy(descriptor->bytes + 1, &length, sizeof(length)); // it never leaves this process
    descriptor->length = 1 + sizeof(length);
    return 0;
}

static void mem_unexpose(struct link *base, uint32_t id)
{
    struct mem_link *link = mem_link_of(base);
    struct mem_exposure *e;
    LL_SEARCH_SCALAR(link->exposures, e, id, id);
    if (!e)
        return;
    LL_DELETE(link->exposures, e);
    free(e);
}

static int mem_fetch(struct link *base, const struct transport_descriptor *descriptor,
                     struct transport_fetch *fetch)
{
    struct mem_link *link = mem_link_of(base);
    uint64_t length;
    if (descriptor->length != 1 + sizeof(length) || descriptor->bytes[0] != 'M')
        return -EINVAL;
    memcpy(&length, descriptor->bytes + 1, sizeof(length));
    if (length != fetch->length)
        return -EINVAL;
    if (link->state != MEM_OPEN)
        return -ENOTCONN;
    if (mem_fault_now(MEM_REFUSE))
        return -ENOMEM;
    struct transport_fetch *other;
    LL_SEARCH_SCALAR(link->fetches, other, id, fetch->id);
    if (other)
        return -EEXIST;
    enum fate fate = mem_fault_now(MEM_CUT)     ? FATE_SHORT
                     : mem_fault_now(MEM_FLIP)  ? FATE_FLIP
                     : mem_fault_now(MEM_STALL) ? FATE_STALL
                                                : FATE_NONE;
    fetch->landed = 0;
    fetch->link = base;
    fetch->state = (void *)(uintptr_t)fate;
    LL_PREPEND(link->fetches, fetch);
    if (fate != FATE_STALL)
        note_post(link, ASK, fetch->id, 0, piece_length(fetch));
    return 0;
}

static void mem_shut(struct link *base)
{
    struct mem_link *link = mem_link_of(base);
    struct mem_transport *t = mem_transport_of(base->transport);
    if (link->dead)
        return;
    if (link->far)
        note_post(link, CLOSED, 0, 0, 0);
    link->dead = true;
    loop_timer_clear(base->transport->loop, &link->patience);
    while (link->fetches)
        mem_link_cancel(base, link->fetches);
    DL_DELETE(t->links, link);
    // it may be in use further up the stack: it goes when the turn is over
    link->dead_next = t->dead;
    t->dead = link;
    loop_timer_set(t->base.loop, &t->turn, 0);
}

static int mem_open(struct loop *loop, const struct transport_config *config,
                    const struct transport_events *events, void *arg, struct transport **out)
{
    (void)config;
    struct mem_transport *t = calloc(1, sizeof(*t));
    if (!t)
        return -ENOMEM;
    t->base = (struct transport){.ops = &transport_mem, .loop = loop, .events = events, .arg = arg};
    t->turn.due = mem_links_turn;
    t->wait.due = delayed_run;
    t->delayed_last = &t->delayed;
    int r = mailbox_open(loop, t, &t->mailbox);
    if (r < 0)
        goto free_transport;
    r = loop_timer_set(loop, &t->turn, MEM_NEVER_NS);
    if (r < 0)
        goto close_mailbox;
    r = loop_timer_set(loop, &t->wait, MEM_NEVER_NS);
    if (r < 0)
        goto clear_turn;
    *out = &t->base;
    return 0;

clear_turn:
    loop_timer_clear(loop, &t->turn);
close_mailbox:
    mailbox_close(t->mailbox);
free_transport:
    free(t);
    return r;
}

static void mem_close(struct transport *base)
{
    if (!base)
        return;
    struct mem_transport *t = mem_transport_of(base);
    pthread_mutex_lock(&listeners_lock);
    struct listener *l, *after;
    LL_FOREACH_SAFE(listeners, l, after) {
        if (l->owner == t) {
            LL_DELETE(listeners, l);
            mailbox_unref(l->mailbox);
            free(l);
        }
    }
    pthread_mutex_unlock(&listeners_lock);
    while (t->links)
        mem_shut(&t->links->base);
    for (; t->marked; t->marked = t->marked->marked_next)
        t->marked->marked = false;
    mem_links_reap(t);
    while (t->delayed) {
        struct mem_letter *letter = t->delayed;
        t->delayed = letter->next;
        letter_return(letter);
    }
    mailbox_close(t->mailbox);
    loop_timer_clear(base->loop, &t->turn);
    loop_timer_clear(base->loop, &t->wait);
    free(t);
}

const struct transport_ops transport_mem = {
    .name = "mem",
    .one_sided = false,
    .open = mem_open,
    .close = mem_close,
    .listen = mem_listen,
    .share = mem_share,
    .connect = mem_connect,
    .send = mem_send,
    .expose = mem_expose,
    .unexpose = mem_unexpose,
    .fetch = mem_fetch,
    .cancel = mem_link_cancel,
    .shut = mem_shut,
};
