#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <utlist.h>

#include "engine/extents.h"
#include "engine/rdma_link.h"
#include "meta/base/buf.h"
#include "meta/base/util.h"

/* The shards of a link: those that this side offers, and those that it reads.
 *
 * READs under way are as few as keep the device busy, for a cancelled fetch has to wait for its own: more when they come
 * back soon, fewer when they take long. */
#define READ_SOON_NS   1000000ull
#define READ_LONG_NS   4000000ull
#define CANCEL_WAIT_NS 300000000ull

// -- Shards that this side offers -----------------------------------------------------------------

static struct rdma_exposure *exposure_find(struct rdma_link *link, uint32_t id)
{
    struct rdma_exposure *e;
    LL_SEARCH_SCALAR(link->exposures, e, id, id);
    return e;
}

static void exposure_end(struct rdma_exposure *e)
{
    for (unsigned i = 0; i < RDMA_RAILS; i++)
        (void)rdma_memory_deregister(&e->memory[i]);
    if (e->map)
        munmap(e->map, e->map_length);
    free(e);
}

/* The region's bytes in memory: where the caller has them, or mapped for this. */
static int exposure_map(struct rdma_exposure *e, const struct transport_region *region, void **at)
{
    if (region->map) {
        *at = (void *)region->map;
        return 0;
    }
    if (region->fd < 0)
        return -EOPNOTSUPP; // memory in pieces
    size_t slack = (size_t)region->offset % (size_t)sysconf(_SC_PAGESIZE);
    e->map_length = region->length + slack;
    e->map =
        mmap(NULL, e->map_length, PROT_READ, MAP_SHARED, region->fd, region->offset - (off_t)slack);
    if (e->map == MAP_FAILED) {
        e->map = NULL;
        return -errno;
    }
    *at = (uint8_t *)e->map + slack;
    return 0;
}

/* With every rail's device; the first must, the others may. */
static int exposure_register(struct rdma_link *link, struct rdma_exposure *e, void *at,
                             size_t length)
{
    int first = 0;
    for (unsigned i = 0; i < RDMA_RAILS; i++) {
        if (link->rails[i].state != RDMA_RAIL_OPEN)
            continue;
        int r = rdma_memory_register(link->rails[i].domain, at, length, IBV_ACCESS_REMOTE_READ,
                                     &e->memory[i]);
        first = i == 0 ? r : first;
    }
    return first;
}

int rdma_link_expose(struct link *base, uint32_t id, const struct transport_region *region,
                     bool urgent, struct transport_descriptor *descriptor)
{
    struct rdma_link *link = rdma_link_of(base);
    if (link->state != RDMA_OPEN)
        return -ENOTCONN;
    if (exposure_find(link, id))
        return -EEXIST;
    struct rdma_exposure *e = calloc(1, sizeof(*e));
    if (!e)
        return -ENOMEM;
    e->id = id;
    void *at = NULL;
    int r = region->length > 0 ? exposure_map(e, region, &at) : 0;
    if (r == 0 && region->length > 0)
        r = exposure_register(link, e, at, region->length);
    if (r < 0) {
        exposure_end(e);
        return r;
    }
    LL_PREPEND(link->exposures, e);
    struct buf b = buf_over(descriptor->bytes, sizeof(descriptor->bytes));
    buf_put_u8(&b, 'R');
    buf_put_u8(&b, urgent);
    buf_put_u32(&b, id);
    buf_put_u64(&b, region->length);
    buf_put_u64(&b, (uintptr_t)at);
    for (unsigned i = 0; i < RDMA_RAILS; i++)
        buf_put_u32(&b, e->memory[i].region ? e->memory[i].region->rkey : 0);
    descriptor->length = (uint8_t)b.at;
    return 0;
}

void rdma_link_unexpose(struct link *base, uint32_t id)
{
    struct rdma_link *link = rdma_link_of(base);
    struct rdma_exposure *e = exposure_find(link, id);
    if (!e)
        return;
    LL_DELETE(link->exposures, e);
    for (unsigned i = 0; i < RDMA_RAILS; i++) {
        int r = rdma_memory_deregister(&e->memory[i]);
        if (r < 0) // the fence that always holds: only the link's queue pairs could read it
            rdma_link_break(link, r, "memory cannot be taken back: %s", strerror(-r));
    }
    exposure_end(e);
}

// -- Shards that this side reads ------------------------------------------------------------------

/* The pull is over; its memory is not touched any more. */
static struct transport_fetch *pull_end(struct rdma_link *link, struct rdma_pull *pull)
{
    struct transport_fetch *fetch = pull->fetch;
    DL_DELETE(link->pulls, pull);
    for (unsigned i = link->lost_count; i-- > 0;)
        if (link->lost[i].pull == pull)
            link->lost[i] = link->lost[--link->lost_count];
    for (unsigned i = 0; i < RDMA_RAILS; i++)
        rdma_memory_retire(pull->memory[i], pull->lents[i]);
    free(pull);
    fetch->link = NULL;
    fetch->state = NULL;
    return fetch;
}

struct pull_registration {
    struct rdma_registration registration;
    uint64_t link;
    uint64_t pull;
    struct extents *lent;
    unsigned slot;
};

static void pull_registered(struct mailbox_item *item, void *arg)
{
    struct rdma_registration *r = util_container(item, struct rdma_registration, item);
    struct pull_registration *mine = util_container(r, struct pull_registration, registration);
    struct rdma_transport *t = arg;
    struct rdma_link *link = NULL;
    struct rdma_pull *pull = NULL;
    if (t)
        DL_SEARCH_SCALAR(t->links, link, number, mine->link);
    if (link)
        DL_SEARCH_SCALAR(link->pulls, pull, serial, mine->pull);
    if (pull) {
        pull->registering[mine->slot] = false;
        if (r->error == 0) {
            pull->memory[mine->slot] = r->memory;
            pull->lents[mine->slot] = mine->lent;
        } else {
            rdma_memory_retire(r->memory, mine->lent);
        }
        if (r->error < 0 && link->rails[mine->slot].state == RDMA_RAIL_OPEN) {
            pull->error = r->error;
            pull->over = true;
        }
        rdma_link_mark(link);
    } else {
        rdma_memory_retire(r->memory, mine->lent);
    }
    free(mine);
}

/* With one rail's device, if that may read it and does not have it yet. */
static int pull_register(struct rdma_pull *pull, const struct rdma_rail *rail)
{
    struct rdma_link *link = rail->link;
    struct rdma_transport *t = rdma_transport_of(link->base.transport);
    if (rail->state != RDMA_RAIL_OPEN || pull->rkeys[rail->slot] == 0 ||
        pull->memory[rail->slot].region || pull->registering[rail->slot] || pull->over)
        return 0;
    struct pull_registration *mine = calloc(1, sizeof(*mine));
    if (!mine)
        return -ENOMEM;
    mine->lent = pull->fetch->lent;
    if (mine->lent && !extents_enter(mine->lent)) {
        free(mine);
        return -ECANCELED; // the program takes it back
    }
    mine->link = link->number;
    mine->pull = pull->serial;
    mine->slot = rail->slot;
    mine->registration = (struct rdma_registration){.item.run = pull_registered,
                                                    .mailbox = mailbox_ref(t->mailbox),
                                                    .domain = rail->domain,
                                                    .address = pull->fetch->destination,
                                                    .length = pull->fetch->length};
    pull->registering[rail->slot] = true;
    rdma_memory_register_later(&mine->registration);
    return 0;
}

void rdma_shard_register(struct rdma_rail *rail)
{
    struct rdma_pull *pull;
    DL_FOREACH(rail->link->pulls, pull) {
        if (pull->fetch->length > 0)
            (void)pull_register(pull, rail); // without memory for it, other rails go on
    }
}

int rdma_link_fetch(struct link *base, const struct transport_descriptor *descriptor,
                    struct transport_fetch *fetch)
{
    struct rdma_link *link = rdma_link_of(base);
    struct buf b = buf_over((void *)descriptor->bytes, descriptor->length);
    uint8_t kind = buf_get_u8(&b);
    uint8_t urgent = buf_get_u8(&b);
    uint32_t id = buf_get_u32(&b);
    uint64_t length = buf_get_u64(&b);
    uint64_t address = buf_get_u64(&b);
    uint32_t rkeys[RDMA_RAILS];
    for (unsigned i = 0; i < RDMA_RAILS; i++)
        rkeys[i] = buf_get_u32(&b);
    if (buf_end(&b) < 0 || kind != 'R' || urgent > 1 || id != fetch->id ||
        length != fetch->length || (length > 0 && rkeys[0] == 0))
        return -EINVAL;
    if (link->state != RDMA_OPEN)
        return -ENOTCONN;
    if (!fetch->destination && length > 0)
        return -EOPNOTSUPP; // memory in pieces
    struct rdma_pull *pull;
    DL_FOREACH(link->pulls, pull) {
        if (pull->fetch->id == id)
            return -EEXIST;
    }
    pull = calloc(1, sizeof(*pull));
    if (!pull)
        return -ENOMEM;
    pull->fetch = fetch;
    pull->serial = ++rdma_transport_of(base->transport)->last_number;
    pull->address = address;
    memcpy(pull->rkeys, rkeys, sizeof(rkeys));
    pull->urgent = urgent;
    int r = length > 0 ? pull_register(pull, &link->rails[0]) : 0;
    if (r < 0) {
        free(pull);
        return r;
    }
    DL_APPEND(link->pulls, pull);
    for (unsigned i = 1; i < RDMA_RAILS && length > 0; i++)
        (void)pull_register(pull, &link->rails[i]); // without memory for it, other rails go on
    fetch->landed = 0;
    fetch->link = base;
    fetch->state = pull;
    rdma_link_mark(link);
    return 0;
}

void rdma_link_cancel(struct link *base, struct transport_fetch *fetch)
{
    struct rdma_link *link = rdma_link_of(base);
    if (fetch->link != base)
        return; // it is over, or never began
    struct rdma_pull *pull = fetch->state;
    pull->over = true;
    // READs cannot be called back: the few that are under way come home, or the queue pair ends
    uint64_t patience = util_now_ns() + CANCEL_WAIT_NS;
    while (pull->under_way > 0 && link->state == RDMA_OPEN && util_now_ns() < patience)
        rdma_link_collect(link);
    for (unsigned i = RDMA_RAILS; pull->under_way > 0 && i-- > 1;)
        rdma_rail_pause(&link->rails[i], "a READ that is not wanted any more does not end");
    if (pull->under_way > 0)
        rdma_link_break(link, -ETIMEDOUT, "a READ that is not wanted any more does not end");
    pull_end(link, pull);
}

/* The bytes of a pull before the first that is still to come. */
static size_t pull_prefix(const struct rdma_link *link, const struct rdma_pull *pull)
{
    size_t end = pull->asked;
    for (unsigned i = 0; i < RDMA_RAILS; i++) {
        const struct rdma_rail *rail = &link->rails[i];
        for (unsigned n = 0; n < rail->reads_count; n++) {
            const struct rdma_slice *slice = &rail->reads[(rail->reads_begin + n) % RDMA_READS];
            if (slice->pull == pull && slice->offset < end)
                end = slice->offset;
        }
    }
    for (unsigned i = 0; i < link->lost_count; i++)
        if (link->lost[i].pull == pull && link->lost[i].offset < end)
            end = link->lost[i].offset;
    return end;
}

void rdma_shard_read_done(struct rdma_rail *rail, bool landed)
{
    struct rdma_link *link = rail->link;
    struct rdma_slice slice = rail->reads[rail->reads_begin];
    rail->reads_begin = (rail->reads_begin + 1) % RDMA_READS;
    rail->reads_count--;
    link->reads_count--;
    slice.pull->under_way--;
    if (!landed) {
        link->lost[link->lost_count++] = slice; // rail_post keeps room for it
        return;
    }
    slice.pull->landed = pull_prefix(link, slice.pull);
    atomic_fetch_add_explicit(&rail->device->received, slice.length, memory_order_relaxed);
    uint64_t took = rail->heard_ns - slice.posted_ns;
    if (took < READ_SOON_NS && rail->reads_window < rail->reads_limit)
        rail->reads_window++;
    else if (took > READ_LONG_NS && rail->reads_window > RDMA_READS_FIRST)
        rail->reads_window--;
}

/* May the rail read of it? Its registration may be with a device that was replaced meanwhile. */
static bool pull_suits(const struct rdma_pull *pull, const struct rdma_rail *rail)
{
    const struct rdma_memory *memory = &pull->memory[rail->slot];
    return memory->region && memory->domain == rail->domain && !pull->over;
}

static struct rdma_slice *lost_next(struct rdma_link *link, const struct rdma_rail *rail)
{
    for (unsigned i = 0; i < link->lost_count; i++)
        if (pull_suits(link->lost[i].pull, rail))
            return &link->lost[i];
    return NULL;
}

static struct rdma_pull *pull_next(struct rdma_link *link, const struct rdma_rail *rail)
{
    struct rdma_pull *pull, *first = NULL;
    DL_FOREACH(link->pulls, pull) {
        if (!pull_suits(pull, rail) || pull->asked == pull->fetch->length)
            continue;
        if (pull->urgent || pull->fetch->urgent)
            return pull;
        first = first ? first : pull;
    }
    return first;
}

void rdma_link_pace_stop(struct rdma_link *link)
{
    struct rdma_transport *t = rdma_transport_of(link->base.transport);
    loop_timer_clear(t->base.loop, &link->pace);
    if (t->download)
        bucket_leave(t->download, &link->ticket);
}

void rdma_link_pace_due(struct loop_timer *timer)
{
    rdma_link_mark(util_container(timer, struct rdma_link, pace));
}

/* How many of `wanted` bytes may be read now; 0: the timer tells when to ask again. */
static size_t pace_take(struct rdma_link *link, const struct rdma_pull *pull, size_t wanted)
{
    struct rdma_transport *t = rdma_transport_of(link->base.transport);
    uint64_t wait_ns = 0;
    if (!t->download || bucket_rate(t->download) == 0)
        return wanted;
    size_t given = bucket_take(t->download, &link->ticket, wanted, pull->fetch->urgent,
                               util_now_ns(), &wait_ns);
    if (given == 0 && loop_timer_set(t->base.loop, &link->pace, wait_ns) < 0)
        rdma_link_break(link, -ENOMEM, "out of memory");
    return given;
}

static int read_post(struct rdma_rail *rail, const struct rdma_slice *slice)
{
    struct rdma_pull *pull = slice->pull;
    struct ibv_sge piece = {.addr = (uintptr_t)pull->fetch->destination + slice->offset,
                            .length = slice->length,
                            .lkey = pull->memory[rail->slot].region->lkey};
    struct ibv_send_wr request = {
        .wr_id = RDMA_WORK_READ * 256,
        .sg_list = &piece,
        .num_sge = 1,
        .opcode = IBV_WR_RDMA_READ,
        .wr.rdma = {.remote_addr = pull->address + slice->offset, .rkey = pull->rkeys[rail->slot]}};
    struct ibv_send_wr *bad;
    int error = ibv_post_send(rail->id->qp, &request, &bad);
    if (error)
        return -error;
    rail->reads[(rail->reads_begin + rail->reads_count++) % RDMA_READS] = *slice;
    rail->link->reads_count++;
    pull->under_way++;
    return 0;
}

enum posted { POSTED_NOTHING, POSTED_READ, POSTED_NOT_YET };

/* The next READ for a rail: first what another one has lost. */
static enum posted rail_post(struct rdma_link *link, struct rdma_rail *rail)
{
    struct rdma_slice *lost = lost_next(link, rail);
    struct rdma_pull *pull = lost ? lost->pull : pull_next(link, rail);
    // every READ may be lost, and one of a part of a lost piece makes two of it
    if (!pull || link->lost_count + link->reads_count >= util_count(link->lost))
        return POSTED_NOTHING;
    size_t length = lost ? lost->length : pull->fetch->length - pull->asked;
    length = pace_take(link, pull, length < RDMA_SLICE_BYTES ? length : RDMA_SLICE_BYTES);
    if (length == 0)
        return POSTED_NOT_YET;
    struct rdma_slice slice = {.pull = pull,
                               .offset = lost ? lost->offset : pull->asked,
                               .length = (uint32_t)length,
                               .posted_ns = util_now_ns()};
    int r = read_post(rail, &slice);
    if (r < 0 && rail->slot > 0) {
        rdma_rail_pause(rail, strerror(-r));
        return POSTED_NOTHING;
    }
    if (r < 0) {
        rdma_link_break(link, r, "a READ cannot be posted: %s", strerror(-r));
        return POSTED_NOTHING;
    }
    if (!lost) {
        pull->asked += length;
    } else {
        lost->offset += length;
        lost->length -= (uint32_t)length;
        if (lost->length == 0)
            *lost = link->lost[--link->lost_count];
    }
    return POSTED_READ;
}

void rdma_shard_post(struct rdma_link *link)
{
    bool preferred = false, more = true;
    for (unsigned i = 0; i < RDMA_RAILS; i++)
        preferred |= link->rails[i].state == RDMA_RAIL_OPEN && !link->rails[i].standby;
    while (more) {
        more = false;
        for (unsigned i = 0; i < RDMA_RAILS && link->state == RDMA_OPEN; i++) {
            struct rdma_rail *rail = &link->rails[i];
            if (rail->state != RDMA_RAIL_OPEN || (rail->standby && preferred) ||
                rail->reads_count >= rail->reads_window)
                continue;
            enum posted posted = rail_post(link, rail);
            if (posted == POSTED_NOT_YET)
                return;
            more |= posted == POSTED_READ;
        }
    }
    rdma_link_pace_stop(link); // nothing waits: others need not wait for it
}

bool rdma_shard_tell(struct rdma_link *link)
{
    const struct transport_events *events = link->base.transport->events;
    struct rdma_pull *pull;
    DL_FOREACH(link->pulls, pull) {
        struct transport_fetch *fetch = pull->fetch;
        if (pull->landed > fetch->landed) {
            link->base.received += pull->landed - fetch->landed;
            fetch->landed = pull->landed;
            events->fetch_landed(&link->base, fetch);
            return true;
        }
        if (pull->landed == fetch->length || (pull->over && pull->under_way == 0)) {
            int status = pull->landed == fetch->length ? 0 : pull->error;
            events->fetch_done(&link->base, pull_end(link, pull), status);
            return true;
        }
    }
    return false;
}
