/* p2pstore: share objects that lie in memory with the nodes of a p2pfs cluster, without a file system.
 *
 * A program registers ranges of its memory under a name; others pull the name into memory of theirs, from everybody who
 * has it, and pass on what they have pulled. Names, versions and bytes are those of the p2pfs mounts on the same
 * metadata: what is registered here is a file on every mount, and what was copied to a mount can be pulled here.
 *
 * Errors. Functions return 0 or a negative errno value; p2pstore_error() gives the calling thread's last failure as a
 * sentence. Any function:
 *   -EINVAL     an argument that cannot be meant (NULL, a bad name, shard size or range); nothing was done
 *   -EPERM      the store was opened by another process: this one was forked from it; open one of your own
 *   -ESHUTDOWN  p2pstore_close() has begun
 *   -ENOMEM     out of memory
 *
 * Threads. Every function may be called from any thread, at the same time, but for p2pstore_close (once, by one), and
 * for freeing a request or list, which is its user's last call with it. A callback runs on a thread of the library, one
 * callback of a store at a time; it may call everything but p2pstore_close, and should not take long. The library's
 * threads take no signals. After fork() only the parent may use the store.
 *
 * Times are in milliseconds from the call on; negative: no limit. Sizes are in bytes. Strings and lists that are passed
 * in are copied before the call returns; the bytes behind ranges never are.
 *
 * Memory. The library reads registered ranges, and writes and reads the ranges of a pull:
 *   from the call that names them until the call fails, or the request ends with an error (cancelled and timed out are
 *   such errors), or p2pstore_unregister, p2pstore_delete_replica or p2pstore_close returns, with whatever status.
 * So long they must stay mapped, and registered ranges and those of a finished pull unchanged: peers check what they
 * read of them, and reject it when it has changed. From then on nothing touches them any more. While a pull runs, and
 * after one that failed, its ranges hold anything. */
#ifndef P2PSTORE_H
#define P2PSTORE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define P2PSTORE_API __attribute__((visibility("default")))
#else
#define P2PSTORE_API
#endif

struct p2pstore;
struct p2pstore_request;
struct p2pstore_list;

#define P2PSTORE_RANGES_MAX 65536      /* ranges of one registration or pull */
#define P2PSTORE_SHARD_MIN  (64 << 10) /* smallest max_shard_size */

/* One range of the program's memory. Its address needs no alignment; one of length 0 is allowed, and has no bytes. */
struct p2pstore_range {
    void *address;
    uint64_t length;
};

/* "0.1.0". Static. */
P2PSTORE_API const char *p2pstore_version(void);
/* Why the calling thread's last failed call failed: one sentence that names the cause and, where there is one, the
 * remedy. Never NULL; valid until the thread's next call. */
P2PSTORE_API const char *p2pstore_error(void);

/* ---- a store: this process as a node of the cluster ---- */

/* metadata: as for p2pfs (local:///DIRECTORY, redis://HOST:PORT, etcd://HOST:PORT, ...), or HOST:PORT[,HOST:PORT] alone
 *   for etcd.
 * node: this node's name, unique in the cluster. HOST:PORT is also where it listens and what peers are told, unless
 *   options say otherwise. NULL: the host's name and a free port.
 * options: strings "key=value", NULL behind the last; or NULL:
 *   listen=ADDR:PORT       where peers connect
 *   advertise=ADDR[:PORT]  the address that peers are told
 *   transport=auto|tcp|rdma    auto: RDMA with peers that both ends reach over it, else TCP; rdma: the same, and opening
 *                          fails where this machine has no RDMA
 *   require_rdma           no byte moves over TCP
 *   device=NAME[,NAME]     RDMA devices (default: the one that has the address of listen=, or all that are up)
 *   nic_priority_matrix=JSON   which devices come first: {"cpu:0": [["mlx5_0"], ["mlx5_1"]], ...}; or a file with it
 *   credentials=FILE       user and password for the metadata service
 *   secret_file=FILE       the cluster's secret
 *   tcp_congestion=NAME, locality=ZONE[/RACK]   as mount options of p2pfs
 *   digest=xxh3|sha256     how registrations are digested (xxh3)
 *   read_timeout=SECONDS   a pull without any progress fails after this (60)
 *   orphan_ttl=SECONDS     a name that nobody holds goes after this (3600; 0: never)
 *   allow_overwrite        a registration may replace a name that exists
 *   log_level=error|warn|info|debug   what goes to standard error (warn); for the whole process
 * Over RDMA the devices read and write ranges in place. Each shard is known to them, and locked in memory, only while it
 * is on its way, so RLIMIT_MEMLOCK must allow for some shards ("ulimit -l unlimited").
 * Blocks until the metadata service has answered, or has not (about 10 s); a node of this name that died without
 * closing is waited for (10 s), on another machine. The library starts about twelve threads.
 * -EINVAL: a bad argument or option; -EOPNOTSUPP, -ENODEV, -EADDRNOTAVAIL: RDMA is demanded and not here; -EEXIST: a live node has this name;
 * -EADDRINUSE, -EADDRNOTAVAIL: listen=; -EACCES: credentials; else why the metadata service could not be reached. */
P2PSTORE_API int p2pstore_open(const char *metadata, const char *node, const char *const *options,
                               struct p2pstore **store);

/* Ends the node: what it registered and pulled is offered no more, requests under way end with -ESHUTDOWN, and blocking
 * calls in other threads return that. When it returns nothing touches the program's memory, all callbacks have run, and
 * `store` is gone; requests remain until they are freed. Names stay: other nodes may hold the bytes (unregister what shall
 * go). Blocks for some milliseconds; up to 10 s while the metadata service does not answer. NULL is harmless.
 * -EDEADLK: called from a callback; -EPERM: forked; in both cases nothing happens. */
P2PSTORE_API int p2pstore_close(struct p2pstore *store);

/* ---- calls that block ---- */

/* Each ends with -ETIMEDOUT when timeout_ms has passed, as if its request had then been cancelled. */

/* Registers the ranges, one behind the other, as the bytes of a new version under `name`. No byte moves; they are
 * digested in the background, and at once where a peer asks.
 * name: a path below the root of the namespace, "models/llama/shard-1"; directories are made. At most 4095 bytes, each
 *   component at most 255 bytes and neither empty, "." nor "..".
 * count: 1 to P2PSTORE_RANGES_MAX.
 * max_shard_size: bytes that travel as one; 64 MiB is a good value. At least P2PSTORE_SHARD_MIN; rounded down to a
 *   multiple of 4096, and to 1 GiB.
 * location: the device that the memory belongs to ("cpu:0"), matched with nic_priority_matrix; NULL or "*": any.
 * -EINVAL: also ranges that overlap each other, and a shard size that would make more than 524,160 shards; -EFAULT: a
 * range is not readable memory; -EOPNOTSUPP: the location is a GPU's, whose memory is not read; -EEXIST: the name is
 * registered, here or elsewhere; -EBUSY: another call works on the name in this store, or the ranges overlap those of a
 * pull in this store; -ENOTDIR, -EISDIR: the name runs through a file, or is a directory; -EFBIG: more than 32 TiB;
 * else why the metadata service did not take it. */
P2PSTORE_API int p2pstore_register(struct p2pstore *store, const char *name,
                                   const struct p2pstore_range *ranges, size_t count,
                                   uint64_t max_shard_size, const char *location,
                                   int64_t timeout_ms);

/* Takes back what this store registered: the memory at once, then the name from the whole cluster. Peers that were
 * reading go on at other holders. A name that this node left behind in an earlier life is removed too.
 * -ENOENT: no such name; -EPERM: registered by another node; -EBUSY: another call works on it. Where the name could not
 * be removed (a network error, or -ETIMEDOUT), the memory is the program's all the same, and the call can be repeated. */
P2PSTORE_API int p2pstore_unregister(struct p2pstore *store, const char *name, int64_t timeout_ms);

/* Pulls the registered name into the ranges, one behind the other, verified; from then on this node passes it on. What
 * has landed is passed on earlier. Symbolic links in the name are followed.
 * -ENOENT: no such name; -EISDIR; -ELOOP; -EMSGSIZE: the ranges together have another size than what is registered;
 * -EINVAL: also ranges that overlap each other; -EFAULT: a range is not writable memory; -EEXIST: this store has the
 * name, or the same version under another one; -EBUSY: another call works on it, or a range overlaps memory that this
 * store has registered or pulled; -EIO: every holder failed, there is none alive, or nothing arrived for read_timeout=. */
P2PSTORE_API int p2pstore_get_replica(struct p2pstore *store, const char *name,
                                      const struct p2pstore_range *ranges, size_t count,
                                      int64_t timeout_ms);

/* Takes back what this store pulled: the memory at once, then the announcement that this node has it. The name stays.
 * -ENOENT: this store has not pulled it; -EBUSY: another call works on it; network errors and -ETIMEDOUT as for
 * p2pstore_unregister, and the announcement is withdrawn as soon as the service answers. */
P2PSTORE_API int p2pstore_delete_replica(struct p2pstore *store, const char *name,
                                         int64_t timeout_ms);

/* ---- the same as requests ---- */

enum p2pstore_call {
    P2PSTORE_REGISTER = 1,
    P2PSTORE_UNREGISTER,
    P2PSTORE_GET_REPLICA,
    P2PSTORE_DELETE_REPLICA
};

/* Runs once, when the request has ended, on a thread of the library, perhaps before the call that started it has
 * returned. It may free the request. */
typedef void (*p2pstore_callback)(struct p2pstore_request *request, void *arg);

/* Each starts what its namesake does, and returns without waiting. 0: *request is the caller's, to be freed; what can be
 * seen to be wrong at once is returned at once, and there is no request. callback NULL: the end shows at p2pstore_fd. */
P2PSTORE_API int p2pstore_register_start(struct p2pstore *store, const char *name,
                                         const struct p2pstore_range *ranges, size_t count,
                                         uint64_t max_shard_size, const char *location,
                                         p2pstore_callback callback, void *arg,
                                         struct p2pstore_request **request);
P2PSTORE_API int p2pstore_unregister_start(struct p2pstore *store, const char *name,
                                           p2pstore_callback callback, void *arg,
                                           struct p2pstore_request **request);
P2PSTORE_API int p2pstore_get_replica_start(struct p2pstore *store, const char *name,
                                            const struct p2pstore_range *ranges, size_t count,
                                            p2pstore_callback callback, void *arg,
                                            struct p2pstore_request **request);
P2PSTORE_API int p2pstore_delete_replica_start(struct p2pstore *store, const char *name,
                                               p2pstore_callback callback, void *arg,
                                               struct p2pstore_request **request);

/* -EINPROGRESS, or how it ended: 0 or an error of its call; -ECANCELED; -ESHUTDOWN. */
P2PSTORE_API int p2pstore_request_status(const struct p2pstore_request *request);
/* The sentence that belongs to a status below 0; "" otherwise. Valid until the request is freed. */
P2PSTORE_API const char *p2pstore_request_error(const struct p2pstore_request *request);
P2PSTORE_API enum p2pstore_call p2pstore_request_call(const struct p2pstore_request *request);
P2PSTORE_API const char *p2pstore_request_name(const struct p2pstore_request *request);
/* Bytes of a pull that have arrived and were verified, and all of them; 0 and 0 for other calls. */
P2PSTORE_API void p2pstore_request_progress(const struct p2pstore_request *request, uint64_t *done,
                                            uint64_t *total);
/* Waits for the end, which the request's callback need not have seen then. Its status, or -EINPROGRESS when timeout_ms
 * has passed. */
P2PSTORE_API int p2pstore_request_wait(struct p2pstore_request *request, int64_t timeout_ms);
/* Ends it with -ECANCELED. 0: it has ended, and nothing touches its memory any more; what the metadata service was
 * already asked for is undone (a registration) or goes on (the rest) behind it. -EALREADY: it was over before, its status
 * tells how. Blocks for some milliseconds. */
P2PSTORE_API int p2pstore_request_cancel(struct p2pstore_request *request);
/* Frees it. One that is still running goes on, and its callback runs. NULL is harmless. */
P2PSTORE_API void p2pstore_request_free(struct p2pstore_request *request);

/* A descriptor for poll(2) and its like: readable while requests without a callback have ended that p2pstore_completed
 * has not returned yet. The store's: not to be read, written or closed. */
P2PSTORE_API int p2pstore_fd(const struct p2pstore *store);
/* The next request without a callback that has ended, in order of their ends; NULL: none. It is the one that its start
 * returned, and still to be freed once. */
P2PSTORE_API struct p2pstore_request *p2pstore_completed(struct p2pstore *store);

/* ---- listing ---- */

enum p2pstore_state {
    P2PSTORE_OFFLINE = 1, /* no live node holds bytes of it */
    P2PSTORE_PARTIAL,     /* live nodes hold bytes of it, none of them all */
    P2PSTORE_AVAILABLE,   /* at least one live node holds all of it */
    P2PSTORE_PULLING,     /* this store pulls it */
    P2PSTORE_REPLICA,     /* this store has pulled it */
    P2PSTORE_REGISTERED,  /* this store has registered it */
    P2PSTORE_UNKNOWN      /* the metadata service does not answer now: see holders */
};

/* One registered name. Later versions of the library may append members. */
struct p2pstore_entry {
    const char *name;
    uint64_t max_shard_size; /* of its shards */
    uint64_t total_size;
    const uint64_t *sizes; /* of the ranges that it was registered from; a file has one */
    size_t size_count;
    int64_t
        holders; /* live nodes that hold bytes of it, this one included; -1: the service does not answer */
    int64_t complete; /* those that hold all of it; -1 likewise */
    enum p2pstore_state state;
    const char *origin; /* the node that registered it */
};

/* Every registered name that begins with `prefix` ("" or NULL: all), in byte order. Names come from this node's copy of
 * the namespace (a change made elsewhere shows within 1 s), holders from the metadata service. When that has not
 * answered after timeout_ms, they are unknown, and the call succeeds. */
P2PSTORE_API int p2pstore_list(struct p2pstore *store, const char *prefix, int64_t timeout_ms,
                               struct p2pstore_list **list);
P2PSTORE_API size_t p2pstore_list_count(const struct p2pstore_list *list);
/* index below the count; the entry and what it points to are the list's. */
P2PSTORE_API const struct p2pstore_entry *p2pstore_list_entry(const struct p2pstore_list *list,
                                                              size_t index);
P2PSTORE_API void p2pstore_list_free(struct p2pstore_list *list); /* NULL is harmless */

#ifdef __cplusplus
}
#endif

#endif
