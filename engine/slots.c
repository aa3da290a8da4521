#include "engine/slots.h"

#include <errno.h>
#include <stdlib.h>
#include <utlist.h>

#define SLOTS_OVERDUE_NS       1000000000ull /* no grant is overdue before */
#define SLOTS_PATIENCE_MIN_MS  250
#define SLOTS_PATIENCE_MAX_MS  5000
#define SLOTS_PATIENCE_UNKNOWN 1000
#define SLOTS_PATIENCE         32 /* usual times of a shard that is alone on its way */
#define SLOTS_LONGER           4 /* times the patience, for promises and while there is something fresh */

struct slots slots_new(void)
{
    struct slots slots = {.window = spread_window_new(SPREAD_WIDTH_LEAST, SLOTS_CEILING)};
    slots.window.width = SLOTS_START;
    return slots;
}

bool slots_ask(struct slots *slots, struct slots_peer *peer, struct slots_ask *ask)
{
    uint32_t most = slots->waiting_count < SLOTS_WAITING_NODE ? SLOTS_WAITING_PEER : 1;
    if (peer->waiting >= most) {
        return false;
    }
    slots->window.floor = spread_width(ask->shards);
    if (!peer->share) {
        peer->share = &peer->alone;
    }
    ask->peer = peer;
    ask->state = SLOTS_WAITING;
    peer->progress = ask->progress;
    if (ask->urgent) {
        DL_APPEND(peer->urgent, ask);
    } else {
        DL_APPEND(peer->normal, ask);
    }
    if (peer->waiting++ == 0) {
        DL_APPEND(slots->queue, peer);
    }
    slots->waiting_count++;
    slots->urgent_count += ask->urgent;
    return true;
}

static void waiting_leave(struct slots *slots, struct slots_ask *ask)
{
    struct slots_peer *peer = ask->peer;
    if (ask->urgent) {
        DL_DELETE(peer->urgent, ask);
    } else {
        DL_DELETE(peer->normal, ask);
    }
    if (--peer->waiting == 0) {
        DL_DELETE(slots->queue, peer);
    }
    slots->waiting_count--;
    slots->urgent_count -= ask->urgent;
}

/* What counts against it: all of its own, and of its peer's other links what is new. */
static uint32_t weight(const struct slots_peer *peer)
{
    return peer->granted - peer->shared + peer->share->granted;
}

static bool goes_before(const struct slots_peer *a, const struct slots_peer *b)
{
    if (!b || weight(a) != weight(b)) {
        return !b || weight(a) < weight(b);
    }
    if (a->progress != b->progress) {
        return a->progress < b->progress;
    }
    return a->share != b->share ? a->share->turn < b->share->turn : a->turn < b->turn;
}

static void share_enter(struct slots *slots, struct slots_ask *ask)
{
    if (!slots->shared) {
        slots->shared = ask;
    }
    ask->shared = true;
    ask->peer->shared++;
    ask->peer->share->granted++;
}

static void share_leave(struct slots *slots, struct slots_ask *ask)
{
    if (slots->shared == ask) {
        slots->shared = ask->next;
    }
    ask->peer->shared -= ask->shared;
    ask->peer->share->granted -= ask->shared;
    ask->shared = false;
}

static bool background_may(const struct slots *slots, uint64_t now_ns)
{
    if (!slots->idle) {
        return true;
    }
    return slots->granted_count == 0 && (!slots->yield || slots->background_ns == 0 ||
                                         now_ns >= slots->background_ns + SLOTS_TRICKLE_NS);
}

struct slots_ask *slots_next(struct slots *slots, uint64_t now_ns)
{
    uint32_t room = slots->window.width;
    bool background = slots->granted_count < room && background_may(slots, now_ns);
    if (slots->granted_count >= room + SPREAD_URGENT_EXTRA ||
        (!background && slots->urgent_count == 0)) {
        return NULL; /* as most calls; the queue of a registrar is long */
    }
    while (slots->shared && now_ns > slots->shared->since_ns + SLOTS_SHARE_NS) {
        share_leave(slots, slots->shared);
    }
    uint32_t overdue = slots->overdue_count < SLOTS_OVERDUE_MAX ? SLOTS_OVERDUE_PEER : 1;
    struct slots_peer *urgent = NULL;
    struct slots_peer *normal = NULL;
    struct slots_peer *peer;
    DL_FOREACH(slots->queue, peer) {
        if (peer->overdue >= overdue) {
            continue; /* with nothing granted it would come before all others, again and again */
        }
        if (peer->urgent && goes_before(peer, urgent)) {
            urgent = peer;
        }
        if (peer->normal && goes_before(peer, normal)) {
            normal = peer;
        }
    }
    peer = urgent ? urgent : background ? normal : NULL;
    if (!peer) {
        return NULL;
    }
    struct slots_ask *ask = urgent ? peer->urgent : peer->normal;
    slots->background_ns = urgent ? slots->background_ns : now_ns;
    waiting_leave(slots, ask);
    ask->state = SLOTS_GRANTED;
    ask->since_ns = now_ns;
    DL_APPEND(slots->granted, ask);
    slots->granted_count++;
    share_enter(slots, ask);
    peer->granted++;
    peer->share->turn = peer->turn = ++slots->turns;
    return ask;
}

static void granted_leave(struct slots *slots, struct slots_ask *ask)
{
    share_leave(slots, ask);
    DL_DELETE(slots->granted, ask);
    slots->granted_count--;
    ask->peer->granted--;
}

static uint64_t overdue_ns(const struct slots *slots)
{
    return slots->usual_ns * 4 > SLOTS_OVERDUE_NS ? slots->usual_ns * 4 : SLOTS_OVERDUE_NS;
}

static void done_in(struct slots *slots, uint64_t took)
{
    spread_window_took(&slots->window, took);
    slots->usual_ns = spread_usual(slots->usual_ns, took);
}

void slots_end(struct slots *slots, struct slots_ask *ask, uint64_t now_ns, bool done)
{
    uint64_t took = now_ns > ask->since_ns ? now_ns - ask->since_ns : 1;
    switch (ask->state) {
    case SLOTS_WAITING:
        waiting_leave(slots, ask);
        break;
    case SLOTS_GRANTED:
        granted_leave(slots, ask);
        if (done) {
            done_in(slots, took);
        }
        break;
    case SLOTS_OVERDUE:
        slots->overdue_count--;
        ask->peer->overdue--;
        if (done) { /* where every shard takes so long, that is usual; one peer that stood still is not */
            uint64_t most = overdue_ns(slots) * 4;
            done_in(slots, took < most ? took : most);
        }
        break;
    default:
        break;
    }
    ask->state = SLOTS_IDLE;
    if (slots->granted_count == 0 && slots->waiting_count == 0) {
        slots->window.width = SLOTS_START;
    }
}

void slots_overdue(struct slots *slots, uint64_t now_ns)
{
    uint64_t most = overdue_ns(slots);
    while (slots->granted && now_ns > slots->granted->since_ns + most) {
        struct slots_ask *ask = slots->granted;
        granted_leave(slots, ask);
        ask->state = SLOTS_OVERDUE;
        ask->peer->overdue++;
        slots->overdue_count++;
    }
}

uint32_t slots_patience_ms(const struct slots *slots)
{
    uint16_t width = slots->window.width;
    uint64_t alone_ns = slots->usual_ns / (width > SPREAD_WIDTH_LEAST ? width : SPREAD_WIDTH_LEAST);
    uint64_t ms = alone_ns ? alone_ns * SLOTS_PATIENCE / 1000000 : SLOTS_PATIENCE_UNKNOWN;
    if (ms < SLOTS_PATIENCE_MIN_MS) {
        return SLOTS_PATIENCE_MIN_MS;
    }
    return ms < SLOTS_PATIENCE_MAX_MS ? (uint32_t)ms : SLOTS_PATIENCE_MAX_MS;
}

/* ---- the book of a version ---- */

struct slots_entry {
    uint64_t since_ms; /* landed there, or promised */
    uint32_t to;       /* 0: nobody has got it */
    uint32_t before;   /* who had landed it before `to` was promised it too; 0: nobody */
    bool promised;     /* not landed yet */
};

struct slots_book {
    uint32_t shards;
    uint32_t fresh;
    uint32_t cursor; /* advice goes on here */
    struct slots_entry entries[];
};

int slots_book_open(uint32_t shards, struct slots_book **book)
{
    struct slots_book *b = calloc(1, sizeof *b + (size_t)shards * sizeof b->entries[0]);
    if (!b) {
        return -ENOMEM;
    }
    b->shards = shards;
    b->fresh = shards;
    *book = b;
    return 0;
}

void slots_book_close(struct slots_book *book)
{
    free(book);
}

uint32_t slots_book_wait(const struct slots_book *book, uint32_t shard, uint32_t to,
                         uint64_t now_ms, uint32_t patience_ms)
{
    const struct slots_entry *entry = &book->entries[shard];
    if (entry->to == 0 || entry->to == to) {
        return 0;
    }
    bool longer = entry->promised || book->fresh > 0;
    uint64_t end = entry->since_ms + (uint64_t)patience_ms * (longer ? SLOTS_LONGER : 1);
    uint64_t wait = now_ms < end ? end - now_ms : 0;
    return wait < patience_ms ? (uint32_t)wait : patience_ms;
}

void slots_book_promise(struct slots_book *book, uint32_t shard, uint32_t to, uint64_t now_ms)
{
    struct slots_entry *entry = &book->entries[shard];
    book->fresh -= entry->to == 0;
    if (!entry->promised) {
        entry->before = entry->to;
    }
    entry->promised = true;
    entry->since_ms = now_ms;
    entry->to = to;
}

void slots_book_settle(struct slots_book *book, uint32_t shard, uint32_t to, uint64_t now_ms,
                       bool landed)
{
    struct slots_entry *entry = &book->entries[shard];
    if (entry->to != to) {
        return; /* promised to another one since */
    }
    entry->promised = false;
    if (landed) {
        entry->since_ms = now_ms;
    } else {
        entry->to = entry->before;
        entry->since_ms = 0; /* long enough ago, or it would not have been promised again */
        book->fresh += entry->to == 0;
    }
}

uint32_t slots_book_fresh(const struct slots_book *book)
{
    return book->fresh;
}

uint32_t slots_book_advise(struct slots_book *book, uint32_t *shards, uint32_t most)
{
    uint32_t count = 0;
    if (most > book->fresh) {
        most = book->fresh;
    }
    for (uint32_t i = 0; i < book->shards && count < most; i++) {
        uint32_t k = book->cursor;
        book->cursor = k + 1 < book->shards ? k + 1 : 0;
        if (book->entries[k].to == 0) {
            shards[count++] = k;
        }
    }
    return count;
}
