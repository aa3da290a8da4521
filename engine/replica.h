/* Replica: one version's bytes on this node: its shards' states, their digests, and the readers that wait for them.
 *
 *   phase      DRAFT -> SEALING -> LIVE | DRAFT (registering failed)     being written here
 *              LIVE -> EVICTING -> LIVE (refused) | DEAD                 evicted
 *              LIVE -> DOOMED -> DEAD                                    unregistered; dies with its last user
 *   shard      ABSENT -> FILLING -> PRESENT | ABSENT                     under `lock`; PRESENT never goes back
 *
 * A PRESENT shard's bytes are verified and never change; `states` may therefore be read without the lock to find out
 * that a shard is present (acquire), everything else needs it. A replica dies when its last reference goes: the
 * cache's table, open handles, pulls, sessions and jobs each hold one. `opens` and `users` say who needs the bytes. */
#ifndef P2PFS_ENGINE_REPLICA_H
#define P2PFS_ENGINE_REPLICA_H

#include <pthread.h>
#include <stdatomic.h>
#include <uthash.h>

#include "engine/core.h"
#include "engine/spread.h"

enum replica_phase {
    REPLICA_DRAFT,
    REPLICA_SEALING,
    REPLICA_LIVE,
    REPLICA_EVICTING,
    REPLICA_DOOMED,
    REPLICA_DEAD,
};

struct neighbours;
struct crowd;
struct slots_book;
struct trace;
struct draft; /* what only a draft needs; draft.c */
struct extents;

enum replica_announced { REPLICA_SILENT, REPLICA_SOME, REPLICA_ALL };

struct replica {
    struct engine *engine;
    struct model_version version; /* fixed once LIVE, but for sealed and root (lock) */
    const struct digest_ops *digest;
    atomic_uint references;
    UT_hash_handle hh; /* in the cache's table, by version.id */

    pthread_mutex_t lock; /* guards all below, unless said otherwise */
    enum replica_phase phase;
    int fd;       /* -1: no bytes yet, or in place and not opened */
    uint8_t *map; /* NULL: not mapped */
    uint32_t shards;
    _Atomic uint8_t *
        states; /* shards x spread_shard_state; NULL: registered in place (all present), or a draft */
    atomic_uint present;
    atomic_bool by_rdma;    /* the last shard came that way */
    atomic_ullong resident; /* bytes of present shards */
    uint64_t reserved;      /* bytes of the cache that are ours */
    uint8_t *digests;       /* shards x digest->size; NULL: none known */
    uint8_t *known;         /* bitmap over digests */
    uint32_t known_count;
    atomic_bool
        all_known; /* every digest is known (and agrees with the root, when that is known) */

    unsigned opens;   /* handles */
    unsigned users;   /* attached sessions of peers, and shards that are prepared for them */
    unsigned grants;  /* shards that peers read now */
    uint64_t used_ns; /* last open or read, for eviction */
    bool pinned;
    bool inplace;
    struct extents *extents; /* the bytes lie in memory of the program; NULL: in a file. Fixed */
    bool torn;  /* a grant ended before its peer was done: pages may still be on their way to it */
    bool lent;  /* the kernel may have mapped its pages into processes that nothing is known of */
    bool loose; /* the kernel may still write its bytes; see direct.h */
    bool changed; /* in place: the local file is not what was registered */
    bool hashing; /* the background pass over what was registered without a digest runs */

    struct engine_waiter *waiters; /* doubly linked, in order of arrival (utlist) */
    uint32_t cursor;
    bool whole;       /* the whole file is wanted */
    bool pulling;     /* the lanes work on it */
    bool room_wanted; /* a job makes room in the cache */
    uint64_t pull_started_ns;
    _Atomic uint64_t progress_ns; /* something landed, or the first waiter came */
    enum replica_announced announced;
    bool rooting;                  /* the root is on its way to the metadata (replica_seal) */
    struct spread *spread;         /* what is to come, in which order; NULL: no lane pulls */
    unsigned pulls;                /* lanes that do */
    struct neighbours *neighbours; /* whom to pull from; as long as spread */
    size_t holder_count;           /* of the last look */
    bool looking;                  /* a look is under way */
    bool looked;                   /* one has succeeded */
    bool offline;                  /* and found nobody */
    uint32_t sources;              /* attached suppliers of all lanes */
    uint32_t near_sources;         /* of them, not in another locality */
    int error;                     /* the last failure */
    uint64_t failed_ns;            /* and when it failed readers */
    char *reason;                  /* and its cause; owned; NULL: none */
    atomic_uint
        changes; /* grows with every shard and digest, so that sessions know when to speak */
    struct crowd *crowd;     /* who pulls it from here; NULL: nobody yet */
    struct slots_book *book; /* what was handed out to whom; NULL: nothing yet */
    struct trace *trace;     /* how its shards came; NULL: none was pulled */
    struct draft *draft;     /* DRAFT and SEALING only */
};

/* With one reference, the caller's. inplace: its bytes are this node's file version->origin_path, all present. */
int replica_new(struct engine *engine, const struct model_version *version, bool inplace,
                struct replica **replica);
void replica_get(struct replica *replica);
void replica_put(struct replica *replica); /* NULL is harmless */

/* For a replica whose bytes will come from peers: file, mapping and states. Lock held. 0, -ENOMEM, -EMFILE, ... */
int replica_storage_open(struct replica *replica);
bool replica_shard_present(const struct replica *replica, uint32_t shard);
bool replica_complete(const struct replica *replica);
/* Peers may attach and ask: its bytes are fixed, and nobody is taking them away. Lock held. */
bool replica_servable(const struct replica *replica);
bool replica_range_present(const struct replica *replica, uint32_t first, uint32_t last);
/* A filled (or failed) shard leaves FILLING here and nowhere else: publishes the state, detaches the readers that have
 * all they waited for, unlocks, answers them, tells peers. status 0: verified. Takes and releases the lock. */
void replica_shard_settle(struct replica *replica, uint32_t shard, int status);
/* Detaches every waiter and answers it with the error; the whole file is no longer wanted. Remembers the reason, and
 * logs it once when anybody wanted something. Takes the lock. */
void replica_fail(struct replica *replica, int error, const char *reason);
/* Answers those with -ETIMEDOUT that will not have all by when they want it (by_ns). Takes the lock. */
void replica_late(struct replica *replica);
/* NULL: none. Lock held. */
void replica_reason_set(struct replica *replica, const char *reason);
/* Answers waiters on a work thread: `list` is a detached chain by next. */
void replica_answer(struct engine *engine, struct engine_waiter *list, int status);

/* The digest of one shard became known; verified says it was proven by the root or comes from the registrar. Lock
 * held. */
void replica_digest_set(struct replica *replica, uint32_t shard, const uint8_t *digest);
bool replica_digest_known(const struct replica *replica, uint32_t shard);
const uint8_t *replica_digest(const struct replica *replica, uint32_t shard);
/* Whether all known digests make up the root; true when the root is not known. Lock held. */
bool replica_root_agrees(const struct replica *replica);
int replica_digests_room(struct replica *replica); /* lock held; -ENOMEM */

/* Takes over the root when the catalog has got it since. No lock held. */
void replica_refresh(struct replica *replica);

/* A version registered in place has no root before its registrar has digested all of it, and until then newcomers trust
 * the registrar alone. Who holds every shard of it has the registrar's digest of each, so it can give the version its
 * root just as well: newcomers must not be stranded when the registrar leaves first. Harmless when there is nothing to
 * do. Any thread, no lock held. */
void replica_seal(struct replica *replica);

/* Announces to the cluster what this node holds now, if that is news. Any thread, no lock held. */
void replica_announce(struct replica *replica);

uint64_t replica_shard_offset(const struct replica *replica, uint32_t shard);
uint64_t replica_shard_size(const struct replica *replica, uint32_t shard);

#ifdef P2PFS_CHECKS
/* Walks the table above and aborts with the invariant that is broken. Lock held. */
void replica_check(const struct replica *replica);
#else
static inline void replica_check(const struct replica *replica)
{
    (void)replica;
}
#endif

#endif
