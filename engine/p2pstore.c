#include "engine/p2pstore_inside.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <utlist.h>

#include "engine/extents.h"
#include "engine/wire.h"
#include "meta/base/util.h"

/* ---- what is wrong at first sight ---- */

static int check_name(const char *name, const char *what)
{
    int status = name ? name_check(name) : -EINVAL;
    return status == 0 ? 0
                       : store_fail(status,
                                    "%s%s%s: not a name; write components of 1 to 255 bytes with / "
                                    "between them",
                                    what, name ? " " : "", name ? name : "");
}

static int check_ranges(const struct p2pstore_range *ranges, size_t count, bool writable,
                        uint64_t *total)
{
    size_t bad = 0;
    if (!ranges || count < 1 || count > P2PSTORE_RANGES_MAX) {
        return store_fail(-EINVAL, "%zu ranges: give 1 to %d", count, P2PSTORE_RANGES_MAX);
    }
    *total = 0;
    for (size_t i = 0; i < count; i++) {
        if (ranges[i].length > MODEL_SIZE_MAX - *total) {
            return store_fail(-EFBIG, "more than 32 TiB in one object");
        }
        *total += ranges[i].length;
    }
    const struct engine_range *same = (const struct engine_range *)ranges;
    int status = extents_check_apart(same, count, &bad);
    if (status == -EINVAL) {
        return store_fail(status,
                          "range %zu (%p, %llu bytes) overlaps another one, or is no memory", bad,
                          ranges[bad].address, (unsigned long long)ranges[bad].length);
    }
    if (status == 0) {
        status = extents_check(same, count, writable, &bad);
    }
    if (status == -EFAULT) {
        return store_fail(status, "range %zu (%p, %llu bytes) is not %s memory of this process",
                          bad, ranges[bad].address, (unsigned long long)ranges[bad].length,
                          writable ? "writable" : "readable");
    }
    return status < 0 ? store_fail(status, "checking the ranges: %s", strerror(-status)) : 0;
}

_Static_assert(sizeof(struct p2pstore_range) == sizeof(struct engine_range) &&
                   offsetof(struct p2pstore_range, length) == offsetof(struct engine_range, length),
               "the engine's ranges are the library's");

static int check_shard(uint64_t total, uint64_t wanted, uint32_t *shard_size)
{
    uint64_t size = wanted < MODEL_SHARD_MAX ? wanted : MODEL_SHARD_MAX;
    size -= size % MODEL_SHARD_STEP;
    if (size < P2PSTORE_SHARD_MIN) {
        return store_fail(-EINVAL, "a maximum shard size of %llu bytes: give at least %d",
                          (unsigned long long)wanted, P2PSTORE_SHARD_MIN);
    }
    if (total / size >= WIRE_SHARDS_MAX) {
        return store_fail(-EINVAL, "more than %d shards: give a larger maximum shard size",
                          WIRE_SHARDS_MAX);
    }
    *shard_size = (uint32_t)size;
    return 0;
}

static int check_location(const char *location)
{
    if (location && (strncmp(location, "cuda", 4) == 0 || strncmp(location, "gpu", 3) == 0)) {
        return store_fail(
            -EOPNOTSUPP,
            "location %s: memory of a GPU can only travel over RDMA, which this store "
            "does not use; copy it to the host first",
            location);
    }
    return 0;
}

/* ---- register ---- */

/* On a thread of the store. */
static int register_publish(struct store_hold *hold)
{
    struct p2pstore *store = hold->store;
    const char *leaf;
    uint64_t parent;
    int status = name_parent(store->catalog, hold->name, &parent, &leaf);
    if (status < 0) {
        return status;
    }
    struct catalog_sync sync = {0};
    struct model_attr attr = name_attr();
    pthread_mutex_lock(&store->lock);
    status = hold->replica ? engine_lent_publish(store->engine, hold->replica, parent, leaf, &attr,
                                                 store->overwrite ? CATALOG_OVERWRITE : 0,
                                                 catalog_sync_done, &sync)
                           : -ECANCELED;
    pthread_mutex_unlock(&store->lock);
    return status == 0 ? catalog_sync_wait(&sync) : status;
}

static void register_run(struct work_job *job)
{
    struct store_hold *hold = util_container(job, struct store_hold, job);
    struct p2pstore *store = hold->store;
    int status = register_publish(hold);
    pthread_mutex_lock(&store->lock);
    if (status == 0 && hold->replica) {
        engine_lent_published(store->engine, hold->replica);
        hold->state = HOLD_REGISTERED;
        store_request_decide(hold->request, 0, NULL);
    } else if (status == 0) { /* cancelled meanwhile: nobody shall find it */
        pthread_mutex_unlock(&store->lock);
        (void)name_unlink(store->catalog, hold->name, &hold->version);
        pthread_mutex_lock(&store->lock);
    } else {
        store_request_decide(hold->request, status, NULL);
        store_hold_release(hold); /* it stays: we are working */
    }
    hold->working = false;
    store_hold_settle(hold);
    pthread_mutex_unlock(&store->lock);
    store_leave(store);
}

static int register_start(struct p2pstore *store, struct p2pstore_request *request,
                          const struct p2pstore_range *ranges, size_t count, uint32_t shard_size)
{
    const struct engine_range *same = (const struct engine_range *)ranges;
    struct store_hold *hold;
    struct replica *replica;
    int status = store_hold_new(store, request, same, count, &hold);
    if (status < 0) {
        return status;
    }
    status = engine_lent_offer(store->engine, same, count, shard_size, store_hold_released, hold,
                               &replica);
    if (status < 0) {
        store_hold_drop(hold);
        return store_fail(status, "%s: %s", request->name, strerror(-status));
    }
    pthread_mutex_lock(&store->lock);
    hold->replica = replica;
    hold->version = *replica_version(replica);
    store_hold_work(hold, register_run);
    pthread_mutex_unlock(&store->lock);
    return 0;
}

/* ---- pull ---- */

static void pull_ready(struct engine_waiter *waiter, int status)
{
    struct p2pstore_request *request = util_container(waiter, struct p2pstore_request, waiter);
    struct p2pstore *store = request->store;
    pthread_mutex_lock(&store->lock);
    struct store_hold *hold = request->hold;
    if (status == 0) {
        hold->state = HOLD_PULLED;
        store_request_decide(request, 0, NULL);
        store_hold_settle(hold);
    } else {
        util_autofree char *why = engine_lent_reason(hold->replica);
        store_request_decide(request, status, why);
        store_hold_release(hold);
    }
    pthread_mutex_unlock(&store->lock);
}

static int pull_find(struct p2pstore *store, const char *name, struct model_id *version)
{
    struct model_entry entry;
    int status = name_resolve(store->catalog, name, &entry);
    if (status < 0) {
        return store_fail(status, "%s: %s", name,
                          status == -ENOENT ? "no such name is registered" : strerror(-status));
    }
    *version = entry.version;
    status = entry.kind == MODEL_FILE ? 0 : -EISDIR;
    model_entry_clear(&entry);
    return status < 0 ? store_fail(status, "%s: it is a directory", name) : 0;
}

static int pull_lend(struct store_hold *hold, const struct engine_range *ranges, size_t count,
                     struct replica **replica)
{
    struct p2pstore *store = hold->store;
    int status = pull_find(store, hold->name, &hold->version);
    if (status < 0) {
        return status;
    }
    status = engine_lent_pull(store->engine, &hold->version, ranges, count, store_hold_released,
                              hold, replica);
    switch (status) {
    case 0:
        return 0;
    case -EMSGSIZE:
        return store_fail(status,
                          "%s: the ranges together have another size than what is registered",
                          hold->name);
    case -EEXIST:
        return store_fail(status, "%s: this store has the same version under another name",
                          hold->name);
    default:
        return store_fail(status, "%s: %s", hold->name, strerror(-status));
    }
}

static int pull_start(struct p2pstore *store, struct p2pstore_request *request,
                      const struct p2pstore_range *ranges, size_t count)
{
    const struct engine_range *same = (const struct engine_range *)ranges;
    struct store_hold *hold;
    struct replica *replica = NULL;
    int status = store_hold_new(store, request, same, count, &hold);
    if (status < 0) {
        return status;
    }
    status = pull_lend(hold, same, count, &replica);
    if (status < 0) {
        store_hold_drop(hold);
        return status;
    }
    request->waiter.ready = pull_ready;
    pthread_mutex_lock(&store->lock);
    hold->replica = replica;
    status = engine_lent_wait(store->engine, replica, &request->waiter);
    if (status == 0) {
        hold->state = HOLD_PULLED;
        store_request_decide(request, 0, NULL);
        store_hold_settle(hold);
    } else if (status != -EINPROGRESS) {
        store_request_decide(request, status, NULL);
        store_hold_release(hold);
    }
    pthread_mutex_unlock(&store->lock);
    return 0;
}

/* ---- unregister and delete ---- */

static void unregister_run(struct work_job *job)
{
    struct store_hold *hold = util_container(job, struct store_hold, job);
    struct p2pstore *store = hold->store;
    int status = name_unlink(store->catalog, hold->name, &hold->version);
    if (status < 0) { /* at least nobody is sent here */
        struct catalog_sync sync = {0};
        if (catalog_withdraw(store->catalog, &hold->version, false, catalog_sync_done, &sync) ==
            0) {
            (void)catalog_sync_wait(&sync);
        }
    }
    pthread_mutex_lock(&store->lock);
    hold->state = status < 0 ? HOLD_NAME : HOLD_BUSY;
    store_request_decide(hold->request, status, NULL);
    hold->working = false;
    store_hold_settle(hold);
    pthread_mutex_unlock(&store->lock);
    store_leave(store);
}

static void delete_run(struct work_job *job)
{
    struct store_hold *hold = util_container(job, struct store_hold, job);
    struct p2pstore *store = hold->store;
    struct catalog_sync sync = {0};
    pthread_mutex_lock(&store->lock);
    while (hold->lent) { /* a shard that lands until then is still announced */
        pthread_cond_wait(&store->changed, &store->lock);
    }
    pthread_mutex_unlock(&store->lock);
    int status = catalog_withdraw(store->catalog, &hold->version, false, catalog_sync_done, &sync);
    if (status == 0) {
        status = catalog_sync_wait(&sync);
    }
    pthread_mutex_lock(&store->lock);
    store_request_decide(hold->request, status == -ENOENT ? 0 : status, NULL);
    hold->working = false;
    store_hold_settle(hold);
    pthread_mutex_unlock(&store->lock);
    store_leave(store);
}

/* A name that an earlier life of this node left behind gets a hold without memory. Lock held. */
static int stale_find(struct p2pstore *store, const char *name, struct store_hold **out)
{
    struct model_entry entry;
    struct model_version version;
    int status = catalog_resolve(store->catalog, name, &entry);
    if (status == 0) {
        status = entry.kind == MODEL_FILE
                     ? catalog_version(store->catalog, &entry.version, &version)
                     : -ENOENT;
        model_entry_clear(&entry);
    }
    if (status != 0) {
        return store_fail(-ENOENT, "%s: no such name is registered", name);
    }
    if (strcmp(version.origin_node, store->node) != 0) {
        status = store_fail(-EPERM, "%s: registered by node %s", name, version.origin_node);
    }
    struct store_hold *hold = status == 0 ? calloc(1, sizeof *hold) : NULL;
    if (hold && (hold->name = strdup(name))) {
        hold->store = store;
        hold->state = HOLD_NAME;
        hold->version = version.id;
        HASH_ADD_KEYPTR(hh, store->holds, hold->name, strlen(hold->name), hold);
        *out = hold;
    } else if (status == 0) {
        free(hold);
        status = store_fail(-ENOMEM, "out of memory");
    }
    model_version_clear(&version);
    return status;
}

static int leave_start(struct p2pstore *store, struct p2pstore_request *request)
{
    bool delete = request->call == P2PSTORE_DELETE_REPLICA;
    int status = 0;
    pthread_mutex_lock(&store->lock);
    struct store_hold *hold = store_hold_find(store, request->name);
    if (hold && (hold->request || hold->working || hold->state == HOLD_BUSY)) {
        status = store_fail(-EBUSY, "%s: another call works on it", request->name);
    } else if (delete && (!hold || hold->state != HOLD_PULLED)) {
        status = store_fail(-ENOENT, "%s: this store has not pulled it", request->name);
    } else if (!delete && (!hold || hold->state == HOLD_PULLED)) {
        status = hold ? store_fail(-EPERM,
                                   "%s: pulled, not registered, by this store; delete the "
                                   "replica",
                                   request->name)
                      : stale_find(store, request->name, &hold);
    }
    if (status == 0) {
        hold->state = HOLD_BUSY;
        hold->request = request;
        request->hold = hold;
        DL_APPEND(store->running, request);
        store_hold_work(hold, delete ? delete_run : unregister_run);
        store_hold_release(hold);
    }
    pthread_mutex_unlock(&store->lock);
    return status;
}

/* ---- public: starting ---- */

struct call {
    enum p2pstore_call call;
    const char *name;
    const struct p2pstore_range *ranges;
    size_t count;
    uint64_t max_shard_size;
    const char *location;
};

static int call_check(const struct call *call, uint64_t *total, uint32_t *shard_size)
{
    bool pull = call->call == P2PSTORE_GET_REPLICA;
    int status = check_name(call->name, "name");
    if (status == 0 && (pull || call->call == P2PSTORE_REGISTER)) {
        status = check_ranges(call->ranges, call->count, pull, total);
    }
    if (status == 0 && call->call == P2PSTORE_REGISTER) {
        status = check_shard(*total, call->max_shard_size, shard_size);
    }
    return status < 0 ? status : check_location(call->location);
}

/* The store has been entered. */
static int call_start(struct p2pstore *store, const struct call *call, bool blocking,
                      p2pstore_callback callback, void *arg, struct p2pstore_request **out)
{
    uint64_t total = 0;
    uint32_t shard_size = 0;
    int status = call_check(call, &total, &shard_size);
    if (status < 0) {
        return status;
    }
    struct p2pstore_request *request =
        store_request_new(store, call->call, call->name, callback, arg);
    if (!request) {
        return store_fail(-ENOMEM, "out of memory");
    }
    request->blocking = blocking;
    if (out) {
        *out = request; /* before a callback can ask for it */
    }
    switch (call->call) {
    case P2PSTORE_REGISTER:
        status = register_start(store, request, call->ranges, call->count, shard_size);
        break;
    case P2PSTORE_GET_REPLICA:
        request->total = total;
        status = pull_start(store, request, call->ranges, call->count);
        break;
    default:
        status = leave_start(store, request);
        break;
    }
    if (status < 0) {
        *out = NULL;
        atomic_store(&request->references, 1);
        store_request_put(request);
    }
    return status;
}

static int call_async(struct p2pstore *store, const struct call *call, p2pstore_callback callback,
                      void *arg, struct p2pstore_request **request)
{
    if (!request) {
        return store_fail(-EINVAL, "there is no place for the request");
    }
    *request = NULL;
    int status = store_enter(store);
    if (status == 0) {
        status = call_start(store, call, false, callback, arg, request);
        store_leave(store);
    }
    return status;
}

static int call_block(struct p2pstore *store, const struct call *call, int64_t timeout_ms)
{
    struct p2pstore_request *request;
    int status = store_enter(store);
    if (status < 0) {
        return status;
    }
    status = call_start(store, call, true, NULL, NULL, &request);
    if (status == 0) {
        status = p2pstore_request_wait(request, timeout_ms);
        if (status == -EINPROGRESS) {
            (void)store_request_cancel(request, -ETIMEDOUT, "not done in the time that was given");
            status = p2pstore_request_status(request);
        }
        if (status < 0) {
            store_say("%s", request->error);
        }
        p2pstore_request_free(request);
    }
    store_leave(store);
    return status;
}

int p2pstore_register(struct p2pstore *store, const char *name, const struct p2pstore_range *ranges,
                      size_t count, uint64_t max_shard_size, const char *location,
                      int64_t timeout_ms)
{
    struct call call = {P2PSTORE_REGISTER, name, ranges, count, max_shard_size, location};
    return call_block(store, &call, timeout_ms);
}

int p2pstore_unregister(struct p2pstore *store, const char *name, int64_t timeout_ms)
{
    struct call call = {.call = P2PSTORE_UNREGISTER, .name = name};
    return call_block(store, &call, timeout_ms);
}

int p2pstore_get_replica(struct p2pstore *store, const char *name,
                         const struct p2pstore_range *ranges, size_t count, int64_t timeout_ms)
{
    struct call call = {P2PSTORE_GET_REPLICA, name, ranges, count, 0, NULL};
    return call_block(store, &call, timeout_ms);
}

int p2pstore_delete_replica(struct p2pstore *store, const char *name, int64_t timeout_ms)
{
    struct call call = {.call = P2PSTORE_DELETE_REPLICA, .name = name};
    return call_block(store, &call, timeout_ms);
}

int p2pstore_register_start(struct p2pstore *store, const char *name,
                            const struct p2pstore_range *ranges, size_t count,
                            uint64_t max_shard_size, const char *location,
                            p2pstore_callback callback, void *arg,
                            struct p2pstore_request **request)
{
    struct call call = {P2PSTORE_REGISTER, name, ranges, count, max_shard_size, location};
    return call_async(store, &call, callback, arg, request);
}

int p2pstore_unregister_start(struct p2pstore *store, const char *name, p2pstore_callback callback,
                              void *arg, struct p2pstore_request **request)
{
    struct call call = {.call = P2PSTORE_UNREGISTER, .name = name};
    return call_async(store, &call, callback, arg, request);
}

int p2pstore_get_replica_start(struct p2pstore *store, const char *name,
                               const struct p2pstore_range *ranges, size_t count,
                               p2pstore_callback callback, void *arg,
                               struct p2pstore_request **request)
{
    struct call call = {P2PSTORE_GET_REPLICA, name, ranges, count, 0, NULL};
    return call_async(store, &call, callback, arg, request);
}

int p2pstore_delete_replica_start(struct p2pstore *store, const char *name,
                                  p2pstore_callback callback, void *arg,
                                  struct p2pstore_request **request)
{
    struct call call = {.call = P2PSTORE_DELETE_REPLICA, .name = name};
    return call_async(store, &call, callback, arg, request);
}
