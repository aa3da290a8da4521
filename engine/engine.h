/* Engine: moves checkpoint bytes between nodes and keeps this node's replicas. The face of the floor: everything that
 * fs/ (and a program without FUSE) calls.
 *
 * Threads: every call may come from any thread and returns without waiting for the network, the disk or the metadata
 * service, but where its comment says "blocking". Callbacks come from a lane, a work thread or the catalog's thread,
 * exactly once, never from inside the call, must not block, and may call the engine again.
 * Errors: 0 or negative errno; the cause is logged where it is learnt. */
#ifndef P2PFS_ENGINE_ENGINE_H
#define P2PFS_ENGINE_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>

#include "engine/handshake.h"
#include "meta/catalog.h"
#include "meta/model.h"

struct engine;
struct replica; /* one version's bytes on this node; opaque, counted by open and close */

enum engine_rdma {
    ENGINE_RDMA_OFF,
    ENGINE_RDMA_AUTO, /* beside the transport, with peers that both ends reach over it */
    ENGINE_RDMA_ON,   /* the same; engine_open fails where this machine has none */
    ENGINE_RDMA_ONLY  /* no byte moves by other ways */
};

struct engine_config {
    struct catalog *catalog; /* borrowed for the engine's life */
    const char *node;        /* this node's name and incarnation; as announced */
    uint64_t boot;
    const char *listen;    /* "host:port"; port 0: any */
    const char *transport; /* "tcp" */
    enum engine_rdma rdma;
    const char *rdma_devices; /* NAME[,NAME], or NULL; see topology.h */
    const char *rdma_matrix;  /* as text, or NULL */
    unsigned rdma_gid;        /* index + 1; 0: chosen */
    unsigned rdma_port;       /* 0: chosen */
    const char *congestion;   /* or NULL */
    uint64_t cache_size;   /* bytes of replicas in memory (files registered in place don't count) */
    const char *cache_dir; /* NULL: memory; else replicas are unnamed files in that directory */
    uint32_t shard_size;   /* 0: model_shard_auto */
    enum model_digest digest;
    bool fetch_whole; /* a read starts the pull of the whole file, not only of the shards touched */
    uint32_t read_timeout_ms;          /* without any progress */
    bool seed_idle;                    /* uploads go behind everything else: see p2pfs(1), seed= */
    uint64_t max_upload, max_download; /* bytes of shards a second, 0: no limit; see bucket.h */
    const struct handshake_secret *secret; /* borrowed; length 0: none */
    unsigned lanes;                        /* 0: the default */
    const char
        *exclude_dir; /* registering in place refuses paths below it (the mount itself); or NULL */
};

/* Opens storage, lanes and the listening socket. `error`: one sentence for the user (malloc'd), or NULL. Blocking. */
int engine_open(const struct engine_config *config, struct engine **engine, char **error);
const char *engine_address(const struct engine *engine);      /* "host:port" as bound */
const char *engine_rdma_address(const struct engine *engine); /* the same for RDMA; "": not used */
/* The adapters that RDMA uses; how many were filled in. */
struct transport_adapter;
size_t engine_adapters(const struct engine *engine, struct transport_adapter *out, size_t room);
/* After catalog_serve: offers again the files that this node (by name) had registered in place and that are unchanged. */
void engine_adopt(struct engine *engine);
/* Withdraws, fails every waiter with -ESHUTDOWN, ends all threads. All replicas must be closed. Blocking. */
void engine_close(struct engine *engine);

/* From catalog_events. */
void engine_version_gone(struct engine *engine, const struct model_id *version);
void engine_version_sealed(struct engine *engine, const struct model_id *version);

/* ---- reading ---- */

/* The replica of a registered version, made when this node has none yet; moves no byte. While open it is not evicted.
 * -ENOENT: the catalog has no such version; -ENOMEM. */
int engine_replica_open(struct engine *engine, const struct model_id *version,
                        struct replica **replica);
void engine_replica_close(struct engine *engine, struct replica *replica);
uint64_t replica_size(const struct replica *replica);
bool replica_here(struct replica *replica, uint64_t offset, uint64_t length); /* all of it, now */
const struct model_id *replica_version(const struct replica *replica);

struct engine_waiter {
    void (*ready)(struct engine_waiter *waiter, int status);
    struct engine_waiter *prev, *next; /* the rest is the engine's while parked */
    bool
        patient; /* wants all of it in any order: hurries nobody, and always pulls the whole file */
    bool peek;   /* is no reason to pull the whole file */
    uint64_t by_ns; /* patient: util_now_ns until when; 0: as long as it takes */
    uint64_t since_ns, since;
    uint32_t first, last;
    struct replica *replica;
    bool parked;
};
/* Makes [offset, offset + length) present (inside the file, length > 0). 0: it is, now; -EINPROGRESS: parked, `ready`
 * follows with 0 or an error (-EIO: every source failed or read_timeout passed; -ENOSPC: no room in the cache;
 * -ETIMEDOUT: at the rate at which it comes it will not all be here by by_ns); another error: not parked. */
int engine_read(struct engine *engine, struct replica *replica, uint64_t offset, size_t length,
                struct engine_waiter *waiter);
/* Takes a parked waiter back: true: it is the caller's again and `ready` will not run; false: `ready` has run, runs or
 * is about to. */
bool engine_read_cancel(struct engine *engine, struct engine_waiter *waiter);
/* The bytes of a present range: *bytes points into the replica's mapping (valid while it is open), or at `scratch`
 * (length bytes), into which a file registered in place was read. -EIO: that file has changed or cannot be read.
 * May wait for a local disk, not for anything else. */
int engine_bytes(struct engine *engine, struct replica *replica, uint64_t offset, size_t length,
                 void *scratch, const void **bytes);
/* A descriptor of all the bytes of a replica that is open here, for the kernel to read and map them by itself; the
 * engine's, valid while the replica is open. From the first call on its pages are never filled with others, because a
 * mapping may outlive everything that is known of it. -EAGAIN: not complete, empty, or a draft; -EIO: registered in
 * place, and the local file has changed. May wait for a local disk. */
int engine_lend(struct engine *engine, struct replica *replica, int *fd);

/* ---- writing ---- */

/* A draft: a replica under construction, seen on this node only. Opened like a replica; close it with
 * engine_replica_close, which drops the bytes unless they were registered. Writers of one draft may be several threads. */
int engine_draft_new(struct engine *engine, struct replica **draft);
/* pwrite(2). 0: done. -EINPROGRESS: room has to be made first; data was copied and `done` follows with 0 or -ENOSPC. A
 * draft that once failed a write stays failed: registering it returns that error. -EROFS: already registered. */
typedef void (*engine_done)(void *arg, int status);
int engine_draft_write(struct engine *engine, struct replica *draft, uint64_t offset,
                       const void *data, size_t length, engine_done done, void *arg);
/* ftruncate(2), and fallocate(2) mode 0 by growing; holes read as zeros. -ENOSPC, -EFBIG, -EROFS. */
int engine_draft_truncate(struct engine *engine, struct replica *draft, uint64_t size);
/* A descriptor of an empty draft's bytes, for the kernel to write and read them by itself; the engine's, valid while
 * the draft is open. 0; -EAGAIN: not this one, not now: write it here. */
int engine_draft_lend(struct engine *engine, struct replica *draft, int *fd);
/* No writer can write any more, here or through the kernel; registered or not. A lent draft is served, and gets its
 * digest, only from then on. */
void engine_draft_written(struct engine *engine, struct replica *draft);
/* When the kernel last wrote to a lent draft, ns since the epoch; 0: it does not. */
int64_t engine_draft_mtime(struct replica *draft);
/* Marks the draft as failed: it will never be registered (its writer was killed). */
void engine_draft_fail(struct replica *draft, int error);
/* Digests what is not digested yet (of a lent draft: later) and publishes the version under the name (catalog_publish). On success the draft is
 * an ordinary complete replica, held and served by this node. `entry` is borrowed. */
int engine_draft_register(struct engine *engine, struct replica *draft, uint64_t parent,
                          const char *name, uint64_t id, const struct model_attr *attr,
                          unsigned flags, catalog_done done, void *arg);

/* ---- registering where it lies ---- */

/* Registers the regular file `path` (absolute) without reading it; its bytes are digested in the background. -EINVAL:
 * not a regular file; -ELOOP: it lies below exclude_dir; else as open(2). attr comes from the file. */
int engine_register_file(struct engine *engine, const char *path, uint64_t parent, const char *name,
                         unsigned flags, catalog_done done, void *arg);
/* The tree below the directory `path`, all or nothing: regular files in place, relative symbolic links as they are,
 * absolute ones that lead to regular files as files; other kinds are skipped with one line in the log. */
int engine_register_tree(struct engine *engine, const char *path, uint64_t parent, const char *name,
                         unsigned flags, catalog_done done, void *arg);

/* ---- memory of the program ---- */

/* For programs that hold weights in memory of their own (p2pstore.h): the bytes of such a replica lie in ranges that
 * the program owns, one behind the other; an empty range is harmless. From the call that makes the replica until
 * `released` runs, and no longer, the engine may read them, and engine_lent_pull write them. */
struct engine_range {
    void *address;
    uint64_t length;
};
/* A new version whose bytes are there. Until it is published nobody knows of it. shard_size: as model.h has it. */
int engine_lent_offer(struct engine *engine, const struct engine_range *ranges, size_t count,
                      uint32_t shard_size, void (*released)(void *arg), void *arg,
                      struct replica **replica);
/* catalog_publish of that version. Once `done` has said 0, call engine_lent_published if the replica is still there. */
int engine_lent_publish(struct engine *engine, struct replica *replica, uint64_t parent,
                        const char *name, const struct model_attr *attr, unsigned flags,
                        catalog_done done, void *arg);
/* Digests it in the background; until then peers are told digests as they ask. */
void engine_lent_published(struct engine *engine, struct replica *replica);
/* A registered version, to be pulled into the ranges. -ENOENT; -EMSGSIZE: the ranges have another size than the
 * version; -EEXIST: this node has the version already. */
int engine_lent_pull(struct engine *engine, const struct model_id *version,
                     const struct engine_range *ranges, size_t count, void (*released)(void *arg),
                     void *arg, struct replica **replica);
/* Pulls all of it. As engine_read (engine_read_cancel takes the waiter back); `ready` is the caller's, the rest is
 * filled in. */
int engine_lent_wait(struct engine *engine, struct replica *replica, struct engine_waiter *waiter);
uint64_t engine_lent_resident(const struct replica *replica); /* bytes that are there */
/* The last failure's cause in words, malloc'd, or NULL. */
char *engine_lent_reason(struct replica *replica);
/* Ends every transfer of it and lets go: `released` follows, soon, whatever the metadata service does. Nobody may wait
 * for it any more. The cluster is not told: unlink the name, or call catalog_withdraw. */
void engine_lent_release(struct engine *engine, struct replica *replica);

/* ---- control ---- */

/* New limits, as in engine_config; they count within BUCKET_WAIT_NS. */
void engine_limits_set(struct engine *engine, uint64_t max_upload, uint64_t max_download);

/* Starts to pull the whole file in the background. Idempotent. -ENOENT, -ENOSPC, -ENOMEM. */
int engine_pull(struct engine *engine, const struct model_id *version);
/* Drops this node's copy: withdraws it, waits for peers that read it, frees it. -EBUSY: open here, or (without `force`)
 * no other live node holds all of it; -ENOENT: nothing here; -EPERM: pinned. */
int engine_evict(struct engine *engine, const struct model_id *version, bool force,
                 engine_done done, void *arg);
int engine_pin(struct engine *engine, const struct model_id *version, bool pinned);

enum engine_state {
    ENGINE_REMOTE,   /* nothing here, holders elsewhere or not known yet */
    ENGINE_PARTIAL,  /* some shards here */
    ENGINE_FETCHING, /* a pull is running */
    ENGINE_COMPLETE, /* all here, in memory (or cache_dir) */
    ENGINE_INPLACE,  /* registered in place by this node */
    ENGINE_CHANGED,  /* registered in place, but the local file has changed or vanished */
    ENGINE_OFFLINE,  /* the last look found no live holder */
    ENGINE_WRITING,  /* a draft */
};
const char *engine_state_name(enum engine_state state); /* "remote", ... */

struct engine_info {
    enum engine_state state;
    uint64_t size;
    uint32_t shard_size;
    uint32_t shards;
    uint32_t shards_present;
    uint64_t resident; /* bytes here */
    uint32_t sources;  /* peers that the running pull uses */
    bool pinned;
    bool sealed;
    uint32_t open; /* handles */
    enum model_digest digest;
    uint8_t root[MODEL_DIGEST_MAX];
    const char
        *transport; /* of the running or last pull; "" when none, "local" for what was made here */
    int error;      /* the last pull's failure, 0: none */
    char reason[160]; /* and its cause in words */
};
int engine_info(struct engine *engine, const struct model_id *version,
                struct engine_info *out); /* -ENOENT */
int engine_draft_info(struct engine *engine, struct replica *draft, struct engine_info *out);

struct engine_peer {
    char node[MODEL_NODE_MAX + 1];
    char address[MODEL_ADDRESS_MAX + 1];
    const char *transport;
    bool connected;
    bool quarantined;
    uint32_t links;
    uint64_t received;           /* bytes of shards from it */
    uint64_t sent;               /* to it */
    uint64_t verified;           /* shards from it that were right */
    uint64_t corrupt;            /* shards from it whose digest differed */
    uint64_t failed;             /* shards that it did not deliver */
    uint64_t busy;               /* asks of ours that it answered with BUSY */
    uint64_t refused;            /* asks of its that were answered with BUSY here */
    uint64_t rate_down, rate_up; /* bytes a second from and to it, over the last seconds */
    uint32_t quarantine_s;       /* how long it will still be left alone */
};
/* Everybody this node has had to do with since it mounted; malloc'd, the caller frees. */
int engine_peers(struct engine *engine, struct engine_peer **out, size_t *count);

/* How a shard came here. */
struct engine_why_shard {
    const char
        *node; /* from whom; as long as the engine is open. NULL: it was not pulled, or not yet */
    const char *transport; /* over what, or NULL */
    uint64_t queued_ns;    /* from the ask to the grant */
    uint64_t wire_ns;      /* from the grant to the last byte */
    uint64_t verify_ns;    /* of hashing, most of it while the rest was still on the wire */
    uint32_t missed;       /* asks in vain */
    bool urgent;           /* a reader waited for it */
    bool hedged;           /* it was asked of two peers */
    bool present;
};
struct engine_why {
    uint64_t size;
    uint32_t shard_size;
    uint32_t count;
    uint64_t took_ns; /* from the first ask to the last landing */
    struct engine_why_shard
        *shards; /* malloc'd, the caller frees; NULL: nothing of it was pulled */
};
int engine_why(struct engine *engine, const struct model_id *version,
               struct engine_why *out); /* -ENOENT: nothing here; -ENOMEM */

/* The pulls that run; malloc'd, the caller frees. */
struct engine_pull_info {
    struct model_id version;
    uint64_t size;
    uint64_t resident;
    uint32_t shards;
    uint32_t shards_present;
    uint32_t sources;
    uint32_t waiting; /* reads */
    bool whole;
    uint64_t running_ns;
};
int engine_pulls(struct engine *engine, struct engine_pull_info **out, size_t *count);

struct engine_stats { /* gauges, then counters since the mount */
    uint64_t cache_limit, cache_used;
    uint64_t max_upload, max_download;
    uint64_t replicas, replicas_complete, pulls_running, readers_waiting, grants_open;
    uint64_t bytes_received, bytes_served, bytes_written;
    uint64_t shards_fetched, shards_served, shards_corrupt, shards_failed;
    uint64_t reads_hit, reads_waited, reads_failed, pulls_completed, evictions;
    uint64_t asks_refused;                  /* peers' asks that were answered with BUSY */
    uint64_t shards_hedged;                 /* asked of a second peer, since the first was slow */
    uint64_t links_refused;                 /* handshakes that failed */
    uint64_t asks_busy;                     /* asks of ours that peers answered with BUSY */
    uint64_t quarantines;                   /* times that a peer was left alone for what it sent */
    uint64_t queued_ns, wire_ns, verify_ns; /* of shards that landed, as in engine_why, summed up */
    uint64_t bytes_rdma;                    /* of bytes_received, those by RDMA */
    uint64_t rdma_failures;  /* times that RDMA with a peer failed, so that TCP was taken */
    const char *rdma_why;    /* why RDMA is not used, or "" */
    const char *storage;     /* "huge tmpfs", "memfd", "cache_dir" */
    const char *storage_why; /* why not huge tmpfs, or "" */
    int storage_node;        /* NUMA node that replicas lie on while it has memory; -1: any */
    uint64_t reserve;        /* bytes whose pages are cleared ahead of pulls */
    const char *loop;        /* "io_uring" or "epoll" */
    unsigned lanes;
};
void engine_stats(struct engine *engine, struct engine_stats *out);

#endif
