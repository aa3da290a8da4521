#include "engine/mem_link.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <utlist.h>

#include "engine/transport_mem.h"
#include "meta/base/util.h"

static atomic_uint_fast64_t last_number;

// -- Links ----------------------------------------------------------------------------------------

void mem_link_mark(struct mem_link *link)
{
    if (link->marked || link->dead)
        return;
    struct mem_transport *t = mem_transport_of(link->base.transport);
    link->marked = true;
    link->marked_next = t->marked;
    t->marked = link;
    loop_timer_set(t->base.loop, &t->turn, 0);
}

void mem_link_break(struct mem_link *link, int error, const char *reason)
{
    if (link->state == MEM_BROKEN || link->dead)
        return;
    link->state = MEM_BROKEN;
    link->error = error;
    link->reason = reason;
    loop_timer_clear(link->base.transport->loop, &link->patience);
    mem_link_mark(link);
}

void mem_link_cancel(struct link *base, struct transport_fetch *fetch)
{
    if (fetch->link != base)
        return; // it is over, or never began
    LL_DELETE(mem_link_of(base)->fetches, fetch);
    fetch->link = NULL;
}

static void link_tell(struct mem_link *link)
{
    const struct transport_events *events = link->base.transport->events;
    struct transport_fetch *fetch;
    while (!link->dead && (fetch = link->fetches)) {
        mem_link_cancel(&link->base, fetch);
        events->fetch_done(&link->base, fetch, link->error);
    }
    if (link->dead || link->told)
        return;
    link->told = true;
    events->down(&link->base, link->error, link->reason);
}

static void link_impatient(struct loop_timer *timer)
{
    mem_link_break(util_container(timer, struct mem_link, patience), -ETIMEDOUT,
                   "no answer in time");
}

struct mem_link *mem_link_new(struct mem_transport *t)
{
    struct mem_link *link = calloc(1, sizeof(*link));
    if (!link)
        return NULL;
    link->base.transport = &t->base;
    link->number = atomic_fetch_add(&last_number, 1) + 1;
    link->patience.due = link_impatient;
    DL_APPEND(t->links, link);
    return link;
}

void mem_link_free(struct mem_link *link)
{
    while (link->exposures) {
        struct mem_exposure *e = link->exposures;
        LL_DELETE(link->exposures, e);
        free(e);
    }
    mailbox_unref(link->far);
    free(link);
}

/* A dead link that was marked is still in that list: it goes one turn later. */
void mem_links_reap(struct mem_transport *t)
{
    struct mem_link *link = t->dead;
    t->dead = NULL;
    while (link) {
        struct mem_link *after = link->dead_next;
        if (link->marked) {
            link->dead_next = t->dead;
            t->dead = link;
        } else {
            mem_link_free(link);
        }
        link = after;
    }
}

void mem_link_writable(struct mem_link *link)
{
    if (link->state != MEM_OPEN || !link->full || link->queued > MEM_QUEUE_BYTES / 2)
        return;
    link->full = false;
    link->base.transport->events->writable(&link->base);
}

void mem_links_turn(struct loop_timer *timer)
{
    struct mem_transport *t = util_container(timer, struct mem_transport, turn);
    loop_timer_set(t->base.loop, timer, MEM_NEVER_NS); // first, while its place is sure to be there
    struct mem_link *marked = t->marked;
    t->marked = NULL;
    for (struct mem_link *link = marked, *after; link; link = after) {
        after = link->marked_next;
        link->marked = false;
        if (link->dead)
            continue;
        if (link->state == MEM_BROKEN)
            link_tell(link);
        else
            mem_link_writable(link);
    }
    mem_links_reap(t);
}

// -- Faults ---------------------------------------------------------------------------------------

static atomic_uint delay_ms;
static struct {
    atomic_uint each; /* 0: never */
    atomic_uint count;
} faults[MEM_FAULTS];

void transport_mem_faults_set(const struct transport_mem_faults *f)
{
    static const struct transport_mem_faults none;
    if (!f)
        f = &none;
    const uint32_t each[MEM_FAULTS] = {
        [MEM_LOSE] = f->lose_message_each, [MEM_CUT] = f->short_fetch_each,
        [MEM_FLIP] = f->flip_fetch_each,   [MEM_REFUSE] = f->refuse_submit_each,
        [MEM_FULL] = f->full_queue_each,   [MEM_STALL] = f->stall_fetch_each,
    };
    atomic_store(&delay_ms, f->delay_ms);
    for (int i = 0; i < MEM_FAULTS; i++) {
        atomic_store(&faults[i].each, each[i]);
        atomic_store(&faults[i].count, 0);
    }
}

bool mem_fault_now(enum mem_fault fault)
{
    unsigned each = atomic_load(&faults[fault].each);
    return each > 0 && (atomic_fetch_add(&faults[fault].count, 1) + 1) % each == 0;
}

uint32_t mem_fault_delay_ms(void)
{
    return atomic_load(&delay_ms);
}
