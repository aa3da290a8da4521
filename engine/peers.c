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
/* They are remembered until the mount ends, and without a secret anybody may call, under ever new names. */
#define PEERS_STRANGERS_MAX 65536

struct peers {
    pthread_mutex_t lock;
    struct peer *table; /* uthash by node */
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
    free(peers);
}

struct peer *peers_get(struct peers *peers, const char *node, const char *address)
{
    struct peer *peer;
    pthread_mutex_lock(&peers->lock);
    HASH_FIND_STR(peers->table, node, peer);
    if (!peer) {
        bool room = address || HASH_COUNT(peers->table) < PEERS_STRANGERS_MAX;
        peer = room ? calloc(1, sizeof *peer) : NULL;
        if (peer) {
            snprintf(peer->node, sizeof peer->node, "%s", node);
            HASH_ADD_STR(peers->table, node, peer);
        }
    }
    if (peer && address) {
        snprintf(peer->address, sizeof peer->address, "%s", address);
    }
    pthread_mutex_unlock(&peers->lock);
    return peer;
}

void peer_strike(struct peer *peer)
{
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
    for (struct peer *peer = peers->table; peer; peer = peer->hh.next) {
        struct engine_peer *to = &list[n++];
        snprintf(to->node, sizeof to->node, "%s", peer->node);
        snprintf(to->address, sizeof to->address, "%s", peer->address);
        to->transport = transport;
        to->links = atomic_load(&peer->links);
        to->connected = to->links > 0;
        to->quarantined = peer_quarantined(peer);
        to->received = atomic_load(&peer->received);
        to->sent = atomic_load(&peer->sent);
        to->verified = atomic_load(&peer->verified);
        to->corrupt = atomic_load(&peer->corrupt);
        to->failed = atomic_load(&peer->failed);
    }
    pthread_mutex_unlock(&peers->lock);
    *out = list;
    *count = n;
    return 0;
}
