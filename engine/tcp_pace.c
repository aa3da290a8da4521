#include "engine/tcp_pace.h"

#include <errno.h>

#include "meta/base/util.h"

#define YIELD_BYTES (64u << 10) /* each YIELD_NS while it yields: not stalled */
#define YIELD_NS    250000000ull
#define SLOW_NS     200000000ull  /* a region that takes longer has others yield, */
#define CLAIM_NS    1000000000ull /* for so long at most with each slice */

// -- Limits ---------------------------------------------------------------------------------------

void tcp_pace_stop(struct tcp_link *link, struct tcp_pace *pace)
{
    loop_timer_clear(link->base.transport->loop, &pace->timer);
    pace->waits = false;
    if (pace->bucket)
        bucket_leave(pace->bucket, &pace->ticket);
}

size_t tcp_pace_credit(struct tcp_link *link, struct tcp_pace *pace, bool urgent)
{
    if (!pace->bucket || bucket_rate(pace->bucket) == 0) {
        tcp_pace_stop(link, pace);
        return SIZE_MAX;
    }
    if (pace->credit > 0)
        return pace->credit;
    uint64_t wait_ns = 0;
    pace->credit =
        bucket_take(pace->bucket, &pace->ticket, TCP_SLICE_BYTES, urgent, util_now_ns(), &wait_ns);
    pace->waits = pace->credit == 0;
    if (!pace->waits)
        loop_timer_clear(link->base.transport->loop, &pace->timer);
    else if (loop_timer_set(link->base.transport->loop, &pace->timer, wait_ns) < 0)
        tcp_link_break(link, -ENOMEM, "out of memory");
    return pace->credit;
}

void tcp_pace_spend(struct tcp_pace *pace, size_t bytes)
{
    pace->credit -= bytes < pace->credit ? bytes : pace->credit;
}

static void out_due(struct loop_timer *timer)
{
    struct tcp_link *link = util_container(timer, struct tcp_link, out.timer);
    link->out.waits = false;
    if (link->state == TCP_OPEN)
        tcp_link_write(link);
}

static void in_due(struct loop_timer *timer)
{
    struct tcp_link *link = util_container(timer, struct tcp_link, in.timer);
    link->in.waits = false;
    if (link->state == TCP_OPEN)
        tcp_link_read(link);
    if (!link->dead && link->state == TCP_OPEN)
        tcp_link_watch(link);
}

void tcp_pace_open(struct tcp_link *link)
{
    struct tcp_transport *t = tcp_transport_of(link->base.transport);
    link->out = (struct tcp_pace){.bucket = t->upload, .timer.due = out_due};
    link->in = (struct tcp_pace){.bucket = t->download, .timer.due = in_due};
}

void tcp_pace_leave(struct tcp_link *link)
{
    struct tcp_pace *both[] = {&link->out, &link->in};
    for (int i = 0; i < 2; i++) {
        tcp_pace_stop(link, both[i]);
        both[i]->bucket = NULL;
    }
}

// -- Yielding -------------------------------------------------------------------------------------

void tcp_pace_yield_ask(struct tcp_link *link, const struct tcp_exposure *e, uint64_t now_ns)
{
    if (!link->base.yield_ns || e->sent < TCP_SLICE_BYTES)
        return;
    uint64_t slice_ns = (now_ns - e->since_ns) / (e->sent / TCP_SLICE_BYTES);
    uint64_t claim_ns = 2 * slice_ns < CLAIM_NS ? 2 * slice_ns : CLAIM_NS;
    if (slice_ns * (e->region.length / TCP_SLICE_BYTES) > SLOW_NS)
        atomic_store(link->base.yield_ns, now_ns + claim_ns);
}

size_t tcp_pace_yield_most(struct tcp_link *link, uint64_t now_ns)
{
    uint64_t until = link->base.yield_ns ? atomic_load(link->base.yield_ns) : 0;
    uint64_t turn = link->yielded_ns + YIELD_NS;
    if (now_ns >= until)
        return TCP_SLICE_BYTES;
    if (now_ns >= turn) {
        link->yielded_ns = now_ns;
        return YIELD_BYTES;
    }
    tcp_pace_stop(link, &link->out);
    if (loop_timer_set(link->base.transport->loop, &link->out.timer,
                       (until < turn ? until : turn) - now_ns) < 0)
        tcp_link_break(link, -ENOMEM, "out of memory");
    return 0;
}
