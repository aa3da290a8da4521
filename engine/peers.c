#include "engine/peers.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "engine/spread.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

#define PEERS_QUARANTINE_FIRST_MS 30000
#define PEERS_QUARANTINE_LAST_MS  600000
#define PEERS_RDMA_FIRST_MS       10000
#define PEERS_RDMA_LAST_MS        300000
/* They are remembered until the mount ends, and without a secret anybody may call, under ever new names. */
#define PEERS_STRANGERS_MAX 65536

struct peers {
    pthread_mutex_t lock;
    struct peer *table;     /* uthash by node */
    struct peer **numbered; /* by number - 1; malloc'd */
    size_t room;
    uint64_t sampled_ns;
};

int peers_open(struct peers **peers)
{
    struct peers *p = calloc(1, sizeof *p);
    if (!p) {
        return -ENOMEM;
    }
    pthread_mutex_init(&p->lock, NULL);
    *peers = p;
    return 0;
}

void peers_close(struct peers *peers)
{
    if (!peers) {
        return;
    }
    struct peer *peer;
    struct peer *next;
    HASH_ITER(hh, peers->table, peer, next) {
        /* NOLINTNEXTLINE(clang-analyzer-unix.Malloc): the loop took the next one before */
        HASH_DEL(peers->table, peer);
        free(peer);
    }
    pthread_mutex_destroy(&peers->lock);
    free(peers->numbered);
    free(peers);
}

/* A new one in the table. NULL: out of memory. Lock held. */
static struct peer *peer_add(struct peers *peers, const char *node)
{
    size_t count = HASH_COUNT(peers->table);
    if (count == peers->room) {
        size_t room = peers->room ? peers->room * 2 : 64;
        struct peer **grown = reallocarray(peers->numbered, room, sizeof(struct peer *));
        if (!grown) {
            return NULL;
        }
        peers->numbered = grown;
        peers->room = room;
    }
    struct peer *peer = calloc(1, sizeof *peer);
    if (!peer) {
        return NULL;
    }
    snprintf(peer->node, sizeof peer->node, "%s", node);
    peers->numbered[count] = peer;
    peer->number = (uint32_t)count + 1;
    HASH_ADD_STR(peers->table, node, peer);
    return peer;
}

struct peer *peers_get(struct peers *peers, const char *node, const char *address)
{
    struct peer *peer;
    pthread_mutex_lock(&peers->lock);
    HASH_FIND_STR(peers->table, node, peer);
    if (!peer) {
        bool room = address || HASH_COUNT(peers->table) < PEERS_STRANGERS_MAX;
        peer = room ? peer_add(peers, node) : NULL;
    }
    if (peer && address) {
        snprintf(peer->address, sizeof peer->address, "%s", address);
    }
    pthread_mutex_unlock(&peers->lock);
    return peer;
}

struct peer *peers_numbered(struct peers *peers, uint32_t number)
{
    pthread_mutex_lock(&peers->lock);
    bool known = number > 0 && number <= HASH_COUNT(peers->table);
    struct peer *peer = known ? peers->numbered[number - 1] : NULL;
    pthread_mutex_unlock(&peers->lock);
    return peer;
}

/* Half of it is the newest second. */
static void rate_take(uint64_t *rate, uint64_t *before, uint64_t now, uint64_t span_ns)
{
    *rate = *rate / 2 + (now - *before) * 500000 / (span_ns / 1000 + 1);
    *before = now;
}

void peers_sample(struct peers *peers, uint64_t now_ns)
{
    pthread_mutex_lock(&peers->lock);
    uint64_t span = now_ns - peers->sampled_ns;
    for (struct peer *peer = peers->table; peer && span > 0; peer = peer->hh.next) {
        rate_take(&peer->rate_down, &peer->sampled_received, atomic_load(&peer->received), span);
        rate_take(&peer->rate_up, &peer->sampled_sent, atomic_load(&peer->sent), span);
    }
    peers->sampled_ns = now_ns;
    pthread_mutex_unlock(&peers->lock);
}

uint64_t peers_quarantines(struct peers *peers)
{
    uint64_t sum = 0;
    pthread_mutex_lock(&peers->lock);
    for (struct peer *peer = peers->table; peer; peer = peer->hh.next) {
        sum += atomic_load(&peer->struck);
    }
    pthread_mutex_unlock(&peers->lock);
    return sum;
}

void peer_strike(struct peer *peer)
{
    atomic_fetch_add(&peer->struck, 1);
    atomic_fetch_add(&peer->corrupt, 1);
    uint32_t strikes = atomic_fetch_add(&peer->strikes, 1) + 1;
    uint32_t ms = spread_backoff_ms(strikes, PEERS_QUARANTINE_FIRST_MS, PEERS_QUARANTINE_LAST_MS,
                                    util_random_u64());
    atomic_store(&peer->quarantined_until_ns, util_now_ns() + ms * 1000000ull);
    log_warn(
        "peer %s sent a shard whose digest differs; left alone for %u s. Check its memory, disk and network",
        peer->node, ms / 1000);
}

void peer_praise(struct peer *peer)
{
    atomic_fetch_add(&peer->verified, 1);
    atomic_store(&peer->strikes, 0);
}

void peer_rdma_failed(struct peer *peer, const char *reason, bool tcp_instead)
{
    if (util_now_ns() < atomic_load(&peer->rdma_after_ns)) {
        return; /* another lane has noticed the same */
    }
    uint32_t failures = atomic_fetch_add(&peer->rdma_failures, 1) + 1;
    uint32_t ms =
        spread_backoff_ms(failures, PEERS_RDMA_FIRST_MS, PEERS_RDMA_LAST_MS, util_random_u64());
    atomic_store(&peer->rdma_after_ns, util_now_ns() + ms * 1000000ull);
    enum log_level level = atomic_exchange(&peer->rdma_said, true) ? LOG_DEBUG : LOG_WARN;
    if (tcp_instead)
        log_say(level, "peer %s: RDMA failed: %s; TCP is used, RDMA is tried again in %u s",
                peer->node, reason, ms / 1000);
    else
        log_say(level, "peer %s: RDMA failed: %s; nothing comes from it meanwhile (require_rdma)",
                peer->node, reason);
}

void peer_rdma_works(struct peer *peer)
{
    if (atomic_load(&peer->rdma_failures) && atomic_exchange(&peer->rdma_failures, 0)) {
        log_info("peer %s: RDMA works again", peer->node);
    }
}

bool peer_quarantined(const struct peer *peer)
{
    return atomic_load(&peer->quarantined_until_ns) > util_now_ns();
}

int peers_list(struct peers *peers, const char *transport, struct engine_peer **out, size_t *count)
{
    pthread_mutex_lock(&peers->lock);
    size_t n = HASH_COUNT(peers->table);
    struct engine_peer *list = calloc(n ? n : 1, sizeof *list);
    if (!list) {
        pthread_mutex_unlock(&peers->lock);
        return -ENOMEM;
    }
    n = 0;
    uint64_t now = util_now_ns();
    for (struct peer *peer = peers->table; peer; peer = peer->hh.next) {
        struct engine_peer *to = &list[n++];
        snprintf(to->node, sizeof to->node, "%s", peer->node);
        snprintf(to->address, sizeof to->address, "%s", peer->address);
        to->transport = atomic_load(&peer->rdma_links) > 0 ? "rdma" : transport;
        to->links = atomic_load(&peer->links);
        to->connected = to->links > 0;
        to->quarantined = peer_quarantined(peer);
        to->received = atomic_load(&peer->received);
        to->sent = atomic_load(&peer->sent);
        to->verified = atomic_load(&peer->verified);
        to->corrupt = atomic_load(&peer->corrupt);
        to->failed = atomic_load(&peer->failed);
        to->busy = atomic_load(&peer->busy);
        to->refused = atomic_load(&peer->refused);
        to->rate_down = peer->rate_down;
        to->rate_up = peer->rate_up;
        uint64_t until = atomic_load(&peer->quarantined_until_ns);
        to->quarantine_s = until > now ? (uint32_t)((until - now) / 1000000000 + 1) : 0;
    }
    pthread_mutex_unlock(&peers->lock);
    *out = list;
    *count = n;
    return 0;
}
