#include "engine/spread.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define RARITIES               (SPREAD_RARITY_ANY + 1)
#define SPREAD_FEW             64
#define SPREAD_QUICK_NS        15000000ull  /* a window opens below, */
#define SPREAD_SLOW_NS         120000000ull /* and closes above */
#define SPREAD_WIDTH_PART      28           /* of a version */
#define SPREAD_HUNGRY_NS       60000000ull
#define SPREAD_STARVED_NS      10000000000ull /* and whatever is usual */
#define SPREAD_RACK_STEP       4              /* usual times until a shard is passed on */
#define SPREAD_RACK_UNKNOWN_NS 250000000ull
#define SPREAD_TRIAL_MS        3000         /* what a neighbour gets to show what it can */
#define SPREAD_HEDGE_NS        300000000ull /* a shard is not late before */
#define SPREAD_TRICKLE_NS      10000000000ull

/* What a HAVE looks at together lies together. */
struct spread_entry {
    uint32_t place; /* where it stands in the order */
    uint16_t rarity;
    uint16_t near;
    uint8_t state;
};

/* order: the absent shards by rarity, those of rarity r at [first[r], first[r + 1]), then the others. */
struct spread {
    uint32_t shards;
    uint32_t first[RARITIES + 1];
    uint32_t *order;
    struct spread_entry *entries;
    uint64_t *seen_ms; /* when a far neighbour had it first; 0: none has said so */
    uint64_t *absent;  /* bitmap, little endian words */
};

/* ---- the order ---- */

int spread_open(uint32_t shards, struct spread **spread)
{
    struct spread *s = calloc(1, sizeof *s);
    size_t room = shards ? shards : 1;
    if (!s) {
        return -ENOMEM;
    }
    s->shards = shards;
    s->order = calloc(room, sizeof *s->order);
    s->entries = calloc(room, sizeof *s->entries);
    s->seen_ms = calloc(room, sizeof *s->seen_ms);
    s->absent = calloc(room / 64 + 1, sizeof *s->absent);
    if (!s->order || !s->entries || !s->seen_ms || !s->absent) {
        spread_close(s);
        return -ENOMEM;
    }
    for (uint32_t k = 0; k < shards; k++) {
        s->order[k] = s->entries[k].place = k;
        s->absent[k / 64] |= htole64(1ull << (k % 64));
    }
    for (uint32_t r = 1; r <= RARITIES; r++) {
        s->first[r] = shards;
    }
    *spread = s;
    return 0;
}

void spread_close(struct spread *s)
{
    if (!s) {
        return;
    }
    free(s->order);
    free(s->entries);
    free(s->seen_ms);
    free(s->absent);
    free(s);
}

static uint32_t group_of(const struct spread *s, uint32_t shard)
{
    return s->entries[shard].rarity < SPREAD_RARITY_ANY ? s->entries[shard].rarity
                                                        : SPREAD_RARITY_ANY;
}

static void place_swap(struct spread *s, uint32_t shard, uint32_t place)
{
    uint32_t other = s->order[place];
    uint32_t from = s->entries[shard].place;
    s->order[from] = other;
    s->entries[other].place = from;
    s->order[place] = shard;
    s->entries[shard].place = place;
}

/* From one group to the next, by moving the border between them; group RARITIES is that of the others. */
static void group_up(struct spread *s, uint32_t shard, uint32_t from, uint32_t to)
{
    for (uint32_t group = from; group < to; group++) {
        place_swap(s, shard, --s->first[group + 1]);
    }
}

static void group_down(struct spread *s, uint32_t shard, uint32_t from, uint32_t to)
{
    for (uint32_t group = from; group > to; group--) {
        place_swap(s, shard, s->first[group]++);
    }
}

enum spread_shard_state spread_state(const struct spread *s, uint32_t shard)
{
    return (enum spread_shard_state)s->entries[shard].state;
}

static void absent_leave(struct spread *s, uint32_t shard)
{
    if (s->entries[shard].state == SPREAD_ABSENT) {
        group_up(s, shard, group_of(s, shard), RARITIES);
        s->absent[shard / 64] &= ~htole64(1ull << (shard % 64));
    }
}

void spread_take(struct spread *s, uint32_t shard)
{
    absent_leave(s, shard);
    s->entries[shard].state = SPREAD_FILLING;
}

void spread_land(struct spread *s, uint32_t shard)
{
    absent_leave(s, shard);
    s->entries[shard].state = SPREAD_PRESENT;
}

void spread_put(struct spread *s, uint32_t shard)
{
    if (s->entries[shard].state == SPREAD_FILLING) {
        s->entries[shard].state = SPREAD_ABSENT;
        s->absent[shard / 64] |= htole64(1ull << (shard % 64));
        group_down(s, shard, RARITIES, group_of(s, shard));
    }
}

uint32_t spread_absent(const struct spread *s)
{
    return s->first[RARITIES];
}

void spread_more(struct spread *s, uint32_t shard, bool near, uint64_t now_ms)
{
    uint32_t from = group_of(s, shard);
    s->entries[shard].rarity++;
    if (!near && !s->seen_ms[shard]) {
        s->seen_ms[shard] = now_ms;
    }
    s->entries[shard].near = (uint16_t)(s->entries[shard].near + near);
    if (s->entries[shard].state == SPREAD_ABSENT) {
        group_up(s, shard, from, group_of(s, shard));
    }
}

void spread_less(struct spread *s, uint32_t shard, bool near)
{
    uint32_t from = group_of(s, shard);
    s->entries[shard].rarity--;
    s->entries[shard].near = (uint16_t)(s->entries[shard].near - near);
    if (s->entries[shard].state == SPREAD_ABSENT) {
        group_down(s, shard, from, group_of(s, shard));
    }
}

/* ---- the choice ---- */

static bool source_has(const uint8_t *bitmap, uint32_t shard)
{
    return !bitmap || (bitmap[shard / 8] >> (shard % 8) & 1);
}

static bool may_take(const struct spread *s, const uint8_t *bitmap, uint32_t shard)
{
    return s->entries[shard].state == SPREAD_ABSENT && source_has(bitmap, shard);
}

static bool may_spare(const struct spread *s, const struct spread_offer *offer, uint32_t shard)
{
    return source_has(offer->bitmap, shard) && !(offer->far && s->entries[shard].near);
}

static uint64_t mix(uint64_t x) /* the finalizer of splitmix64, by Sebastiano Vigna */
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

/* Whether this node is one of those that go far for it now. */
static bool rack_may(const struct spread *s, const struct spread_offer *offer, uint32_t shard)
{
    const struct spread_rack *rack = offer->rack;
    if (!rack) {
        return true;
    }
    uint64_t seen = s->seen_ms[shard]; /* by another lane a moment later than this one's now */
    uint64_t waited = offer->now_ms > seen ? offer->now_ms - seen : 0;
    waited /= offer->step_ms;
    waited = waited < offer->steps ? waited : offer->steps;
    uint64_t back = rack->place - mix(rack->salt + (shard + 1) * 0x9e3779b97f4a7c15ull);
    return back <= rack->arc[waited < SPREAD_RACK_LEVELS ? waited : SPREAD_RACK_LEVELS - 1];
}

static uint32_t demand_next(const struct spread *s, const struct spread_want *want,
                            const uint8_t *bitmap)
{
    for (size_t i = 0; i < want->demand_count; i++) {
        for (uint32_t k = want->demand[i].first; k <= want->demand[i].last && k < s->shards; k++) {
            if (may_take(s, bitmap, k)) {
                return k;
            }
        }
    }
    return SPREAD_NONE;
}

static uint32_t ahead_next(const struct spread *s, uint32_t cursor,
                           const struct spread_offer *offer)
{
    if (cursor == SPREAD_NONE) {
        return SPREAD_NONE;
    }
    for (uint32_t k = cursor; k < s->shards && k - cursor <= SPREAD_AHEAD; k++) {
        if (s->entries[k].state == SPREAD_ABSENT && group_of(s, k) <= offer->rarity_most &&
            may_spare(s, offer, k)) {
            return k;
        }
    }
    return SPREAD_NONE;
}

static uint64_t wanted_word(const struct spread *s, const uint8_t *bitmap, uint32_t word)
{
    uint64_t has = UINT64_MAX;
    if (bitmap) {
        memcpy(&has, bitmap + (size_t)word * 8, sizeof has);
    }
    return le64toh(s->absent[word] & has);
}

/* The source has few of the absent shards that may be had of it: looks at each of them. */
static uint32_t rarest_of_few(const struct spread *s, const struct spread_offer *offer,
                              uint64_t random)
{
    uint32_t best = SPREAD_NONE;
    uint32_t best_group = offer->rarity_most + 1;
    uint32_t alike = 0;
    for (uint32_t word = 0; word < (s->shards + 63) / 64; word++) {
        for (uint64_t bits = wanted_word(s, offer->bitmap, word); bits; bits &= bits - 1) {
            uint32_t k = word * 64 + (uint32_t)__builtin_ctzll(bits);
            uint32_t group = group_of(s, k);
            if (group > best_group ||
                (offer->far && (s->entries[k].near || !rack_may(s, offer, k)))) {
                continue;
            }
            alike = group < best_group ? 1 : alike + 1;
            /* Each of those alike with the same chance; the next step of the random sequence is Knuth's. */
            random = random * 6364136223846793005ull + 1442695040888963407ull;
            if (group < best_group || (random >> 33) % alike == 0) {
                best = k;
            }
            best_group = group;
        }
    }
    return best_group > offer->rarity_most ? SPREAD_NONE : best;
}

/* The source has many of them: from a random place in each group, it has the next one soon. */
static uint32_t rarest_of_many(const struct spread *s, const struct spread_offer *offer,
                               uint64_t random)
{
    for (uint32_t group = 0; group <= offer->rarity_most; group++) {
        uint32_t first = s->first[group];
        uint32_t count = s->first[group + 1] - first;
        uint32_t start = count ? (uint32_t)(random % count) : 0;
        for (uint32_t i = 0; i < count; i++) {
            uint32_t k = s->order[first + (start + i < count ? start + i : start + i - count)];
            if (may_spare(s, offer, k)) {
                return k;
            }
        }
    }
    return SPREAD_NONE;
}

static uint32_t rarest_next(const struct spread *s, const struct spread_offer *offer,
                            uint64_t random)
{
    uint32_t wanted = 0; /* or so many that more make no difference */
    for (uint32_t word = 0; wanted < SPREAD_FEW && word < (s->shards + 63) / 64; word++) {
        wanted += (uint32_t)__builtin_popcountll(wanted_word(s, offer->bitmap, word));
    }
    if (wanted == 0) {
        return SPREAD_NONE;
    }
    bool few = wanted < SPREAD_FEW && wanted * 4 < spread_absent(s);
    return few || (offer->far && offer->rack) ? rarest_of_few(s, offer, random)
                                              : rarest_of_many(s, offer, random);
}

uint32_t spread_next(const struct spread *s, const struct spread_want *want,
                     const struct spread_offer *offer, uint64_t random, bool *urgent)
{
    *urgent = false;
    if (spread_absent(s) == 0) {
        return SPREAD_NONE;
    }
    uint32_t shard = demand_next(s, want, offer->bitmap);
    if (shard != SPREAD_NONE) {
        *urgent = true;
        return shard;
    }
    if (!want->whole) {
        return SPREAD_NONE;
    }
    shard = ahead_next(s, want->cursor, offer);
    return shard != SPREAD_NONE ? shard : rarest_next(s, offer, random);
}

uint64_t spread_rack_place(const char *node, uint64_t boot)
{
    uint64_t place = mix(boot);
    for (; *node; node++) {
        place = mix(place ^ (uint8_t)*node);
    }
    return place;
}

static int distances_compare(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a;
    uint64_t y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

void spread_rack_set(struct spread_rack *rack, uint64_t place, uint64_t *others, size_t count)
{
    rack->place = place;
    for (size_t i = 0; i < count; i++) {
        others[i] = place - others[i];
    }
    qsort(others, count, sizeof *others, distances_compare);
    for (unsigned level = 0; level < SPREAD_RACK_LEVELS; level++) {
        size_t rank = (size_t)1 << level;
        rack->arc[level] = rank <= count ? others[rank - 1] - 1 : UINT64_MAX;
    }
}

bool spread_rack_known(size_t known, size_t before)
{
    return known == before && known <= SPREAD_RACK_FEW;
}

uint64_t spread_rack_step_ms(uint64_t passed_ns)
{
    return (passed_ns ? passed_ns * SPREAD_RACK_STEP : SPREAD_RACK_UNKNOWN_NS) / 1000000 + 1;
}

void spread_reach_tick(struct spread_reach *reach, uint64_t now_ms, uint64_t full_ms,
                       uint64_t step_ms)
{
    if (full_ms > reach->since_ms) {
        reach->since_ms = full_ms;
    }
    if (now_ms >= reach->since_ms + step_ms) {
        reach->since_ms = now_ms;
        if (reach->steps < SPREAD_RACK_LEVELS * SPREAD_REACH_PARTS) {
            reach->steps += SPREAD_REACH_PARTS;
        }
    }
}

void spread_reach_near(struct spread_reach *reach)
{
    reach->steps -= reach->steps > 0;
}

bool spread_hungry(uint64_t ns, uint64_t usual_ns)
{
    return ns > SPREAD_HUNGRY_NS && (ns > usual_ns * 2 || ns > SPREAD_STARVED_NS);
}

/* ---- how much at once ---- */

uint16_t spread_width(uint32_t shards)
{
    uint32_t width = shards / SPREAD_WIDTH_PART;
    if (width < SPREAD_WIDTH_LEAST) {
        return SPREAD_WIDTH_LEAST;
    }
    return width < SPREAD_WIDTH_MOST ? (uint16_t)width : SPREAD_WIDTH_MOST;
}

struct spread_window spread_window_new(uint16_t floor, uint16_t ceiling)
{
    return (struct spread_window){.width = floor, .floor = floor, .ceiling = ceiling};
}

void spread_window_took(struct spread_window *window, uint64_t ns)
{
    bool opens = ns < SPREAD_QUICK_NS || window->width < window->floor;
    if (opens && window->width < window->ceiling) {
        window->width++;
    } else if (ns > SPREAD_SLOW_NS && window->width > window->floor) {
        window->width--;
    }
}

/* ---- neighbours ---- */

unsigned spread_nearness(const char *ours, const char *theirs)
{
    if (!ours[0] || !theirs[0] || strcmp(ours, theirs) == 0) {
        return 2;
    }
    size_t zone = strcspn(ours, "/");
    return zone == strcspn(theirs, "/") && memcmp(ours, theirs, zone) == 0;
}

size_t spread_neighbour_choose(const bool *candidate_near, size_t count, size_t near,
                               size_t neighbours, size_t most, uint64_t random)
{
    if (neighbours >= most || count == 0) {
        return count;
    }
    size_t nears = 0;
    for (size_t i = 0; i < count; i++) {
        nears += candidate_near[i];
    }
    /* Near ones first, but for the places that keep the localities connected. */
    bool far_wanted =
        neighbours - near < SPREAD_FAR && nears < count &&
        (nears == 0 || random % SPREAD_NEIGHBOURS_FIRST < SPREAD_FAR || near + SPREAD_FAR >= most);
    size_t eligible = far_wanted || nears == 0 ? count - nears : nears;
    size_t pick = (random >> 8) % eligible;
    for (size_t i = 0; i < count; i++) {
        if (candidate_near[i] == !(far_wanted || nears == 0) && pick-- == 0) {
            return i;
        }
    }
    return count;
}

size_t spread_neighbour_drop(const struct spread_neighbour *neighbours, size_t count)
{
    uint64_t sum = 0;
    size_t tried = 0;
    size_t worst = count;
    for (size_t i = 0; i < count; i++) {
        const struct spread_neighbour *n = &neighbours[i];
        if (n->gone) {
            return i;
        }
        if (n->age_ms < SPREAD_TRIAL_MS || n->complete) {
            continue;
        }
        sum += n->received;
        tried++;
        if (worst == count || n->received < neighbours[worst].received) {
            worst = i;
        }
    }
    bool poor = worst < count && tried > 1 && neighbours[worst].received < sum / tried / 4;
    return poor ? worst : count;
}

/* ---- patience ---- */

uint32_t spread_backoff_ms(uint32_t failures, uint32_t first, uint32_t last, uint64_t random)
{
    uint64_t delay = first;
    for (uint32_t i = 1; i < failures && delay < last; i++) {
        delay *= 2;
    }
    if (delay > last) {
        delay = last;
    }
    return (uint32_t)(delay - (delay / 4 ? random % (delay / 4) : 0));
}

uint64_t spread_usual(uint64_t usual_ns, uint64_t took_ns)
{
    return usual_ns ? (usual_ns * 7 + took_ns) / 8 : took_ns;
}

uint32_t spread_hedge_budget(uint32_t shards)
{
    return 2 + shards / 50;
}

bool spread_hedge_due(uint64_t ns, uint64_t usual_ns)
{
    return ns > SPREAD_HEDGE_NS && ns > usual_ns * 3;
}

bool spread_trickles(uint64_t ns, uint64_t usual_ns)
{
    return usual_ns > 0 && ns > SPREAD_TRICKLE_NS && ns > usual_ns * 16;
}
