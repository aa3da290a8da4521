#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "engine/cache.h"
#include "engine/crowd.h"
#include "engine/inplace.h"
#include "engine/neighbours.h"
#include "engine/pull.h"
#include "engine/serve_inside.h"
#include "meta/base/util.h"

#define FOLLOW_PEER_MAX 65536 /* versions on all sessions of a peer */
#define FOLLOW_REFER_MS 1000

/* One who may ask for the replica's bytes less; a file in place is closed behind the last one. */
void follow_user_end(struct lane *lane, struct replica *replica)
{
    pthread_mutex_lock(&replica->lock);
    replica->users--;
    pthread_mutex_unlock(&replica->lock);
    inplace_idle(replica);
    cache_retire(lane->engine->cache, replica);
}

void follow_end(struct session *s, struct follow *follow)
{
    struct replica *replica = follow->replica;
    /* NOLINTNEXTLINE(clang-analyzer-unix.Malloc): the loop took the next one before */
    HASH_DEL(s->follows, follow);
    atomic_fetch_sub(&s->peer->follows, 1);
    free(follow->told);
    free(follow);
    pthread_mutex_lock(&replica->lock);
    crowd_leave(replica->crowd, s->node, s->boot);
    pthread_mutex_unlock(&replica->lock);
    follow_user_end(s->lane, replica);
    replica_put(replica);
}

static void digests_send(struct session *s, struct follow *follow)
{
    struct replica *replica = follow->replica;
    if (follow->told_digests || !atomic_load(&replica->all_known)) {
        return;
    }
    /* Once all are known they never change, so they can be read without the lock. */
    for (uint32_t first = 0; first < replica->shards; first += WIRE_DIGESTS_MAX) {
        uint32_t left = replica->shards - first;
        struct wire_message digests = {.type = WIRE_DIGESTS,
                                       .handle = follow->handle,
                                       .first = first,
                                       .count = left < WIRE_DIGESTS_MAX ? left : WIRE_DIGESTS_MAX,
                                       .digest_size = (uint8_t)replica->digest->size,
                                       .digests = replica_digest(replica, first)};
        if (serve_send(s, &digests) < 0) {
            return; /* the queue is full: all again at the next news; a digest told twice is harmless */
        }
    }
    follow->told_digests = true;
}

void follow_attach(struct session *s, const struct wire_message *message)
{
    struct engine *engine = s->lane->engine;
    struct follow *follow;
    HASH_FIND(hh, s->follows, &message->handle, sizeof message->handle, follow);
    if (follow || atomic_load(&s->peer->follows) >= FOLLOW_PEER_MAX) {
        serve_refuse(s, "attached too much, or one handle twice");
        return;
    }
    struct replica *replica = cache_find(engine->cache, &message->version);
    if (!replica) {
        grant_gone_send(s, message->handle, 0, WIRE_GONE_EVICTED);
        return;
    }
    uint32_t bytes = (replica->shards + 7) / 8;
    follow = calloc(1, sizeof *follow);
    uint8_t *told = calloc(bytes + 1, 1);
    pthread_mutex_lock(&replica->lock);
    bool held = replica_servable(replica);
    bool able = follow && told && (!held || crowd_join(&replica->crowd, s->node, s->boot) == 0);
    if (held && able) {
        replica->users++;
    }
    unsigned changes = atomic_load(&replica->changes);
    bool complete = replica_complete(replica);
    pthread_mutex_unlock(&replica->lock);
    if (!held || !able) {
        grant_gone_send(s, message->handle, 0,
                        replica->changed ? WIRE_GONE_CHANGED : WIRE_GONE_EVICTED);
        free(follow);
        free(told);
        replica_put(replica);
        return;
    }
    for (uint32_t k = 0; k < replica->shards; k++) {
        told[k / 8] |= (uint8_t)(replica_shard_present(replica, k) << (k % 8));
    }
    *follow = (struct follow){.handle = message->handle,
                              .replica = replica,
                              .directed = complete,
                              .told = told,
                              .told_changes = changes};
    HASH_ADD(hh, s->follows, handle, sizeof follow->handle, follow);
    atomic_fetch_add(&s->peer->follows, 1);

    struct wire_message attached = {.type = WIRE_ATTACHED,
                                    .handle = message->handle,
                                    .count = replica->shards,
                                    .complete = complete,
                                    .bitmap = told};
    digests_send(s, follow); /* first, so that the puller can ask anybody at once */
    if (!follow->told_digests && atomic_load(&replica->all_known)) {
        follow->told_changes = changes - 1; /* the queue was full: still news */
    }
    if (serve_send(s, &attached) < 0) {
        serve_refuse(s, "does not read what it is sent");
        return;
    }
    follow_refer(s, follow);
    replica_seal(replica);
    /* Who pulls a version from us while we pull it too may have what we lack. */
    if (!complete && neighbours_hear(replica, s->node, s->boot, true)) {
        pull_neighbours_changed(replica);
    }
}

void follow_refer(struct session *s, struct follow *follow)
{
    uint64_t now = util_now_ns() / 1000000;
    if (follow->referred_ms && now - follow->referred_ms < FOLLOW_REFER_MS) {
        return;
    }
    follow->referred_ms = now;
    struct replica *replica = follow->replica;
    const struct crowd_member *members[WIRE_PEERS_MAX];
    uint8_t peers[WIRE_PEERS_MAX * WIRE_PEER_BYTES];
    size_t length = 0;
    pthread_mutex_lock(&replica->lock);
    size_t count =
        crowd_sample(replica->crowd, s->node, util_random_u64(), members, WIRE_PEERS_MAX);
    for (size_t i = 0; i < count; i++) {
        length = wire_peer_put(peers, length, members[i]->node, members[i]->boot);
    }
    pthread_mutex_unlock(&replica->lock);
    if (count) {
        struct wire_message message = {.type = WIRE_PEERS,
                                       .handle = follow->handle,
                                       .count = (uint32_t)count,
                                       .peers = peers,
                                       .peers_length = length};
        (void)serve_send(s, &message); /* full: it hears of them another time */
    }
}

void follow_detach(struct session *s, uint32_t handle)
{
    struct follow *follow;
    HASH_FIND(hh, s->follows, &handle, sizeof handle, follow);
    if (follow) {
        follow_end(s, follow);
    }
}

void follow_news(struct session *s, struct follow *follow)
{
    struct replica *replica = follow->replica;
    unsigned changes = atomic_load(&replica->changes);
    if (changes == follow->told_changes) {
        return;
    }
    uint8_t shards[4 * WIRE_HAVE_MAX];
    uint32_t count = 0;
    for (uint32_t k = 0; k < replica->shards && count < WIRE_HAVE_MAX; k++) {
        if (!(follow->told[k / 8] >> (k % 8) & 1) && replica_shard_present(replica, k)) {
            wire_have_put(shards, count++, k);
        }
    }
    digests_send(s, follow);
    if (count) {
        struct wire_message have = {
            .type = WIRE_HAVE, .handle = follow->handle, .count = count, .shards = shards};
        if (serve_send(s, &have) < 0) {
            return; /* the next news tells all of it */
        }
        for (uint32_t i = 0; i < count; i++) {
            uint32_t k = wire_have_shard(&have, i);
            follow->told[k / 8] |= (uint8_t)(1u << (k % 8));
        }
    }
    if (count < WIRE_HAVE_MAX && (follow->told_digests || !atomic_load(&replica->all_known))) {
        follow->told_changes = changes;
    }
}
