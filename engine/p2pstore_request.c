#include "engine/p2pstore_inside.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>
#include <utlist.h>

#include "engine/extents.h"
#include "meta/base/util.h"

static _Thread_local char last_error[P2PSTORE_TEXT];

const char *p2pstore_error(void)
{
    return last_error;
}

void store_say(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
}

int store_fail_why(int status, const char *what, char *why)
{
    if (why) {
        store_say("%s", why);
    } else {
        store_say("%s: %s", what, strerror(-status));
    }
    free(why);
    return status;
}

int store_enter(struct p2pstore *store)
{
    if (!store) {
        return store_fail(-EINVAL, "the store is NULL");
    }
    if (store->pid != getpid()) {
        return store_fail(-EPERM,
                          "the store belongs to process %d, which forked this one: open another",
                          (int)store->pid);
    }
    pthread_mutex_lock(&store->lock);
    bool open = !store->closing;
    store->inside += open;
    pthread_mutex_unlock(&store->lock);
    return open ? 0 : store_fail(-ESHUTDOWN, "the store is being closed");
}

void store_leave(struct p2pstore *store)
{
    pthread_mutex_lock(&store->lock);
    store->inside--;
    pthread_cond_broadcast(&store->changed);
    pthread_mutex_unlock(&store->lock);
}

void store_put(struct p2pstore *store)
{
    if (atomic_fetch_sub(&store->references, 1) != 1) {
        return;
    }
    if (store->event_fd >= 0) {
        close(store->event_fd);
    }
    pthread_mutex_destroy(&store->lock);
    pthread_mutex_destroy(&store->gate);
    pthread_cond_destroy(&store->changed);
    handshake_secret_wipe(&store->secret);
    free(store->node);
    free(store);
}

/* ---- requests ---- */

struct p2pstore_request *store_request_new(struct p2pstore *store, enum p2pstore_call call,
                                           const char *name, p2pstore_callback callback, void *arg)
{
    struct p2pstore_request *request = calloc(1, sizeof *request);
    if (!request || !(request->name = strdup(name))) {
        free(request);
        return NULL;
    }
    atomic_init(&request->references, 2);
    atomic_fetch_add(&store->references, 1);
    request->store = store;
    request->call = call;
    request->callback = callback;
    request->arg = arg;
    request->status = -EINPROGRESS;
    return request;
}

void store_request_put(struct p2pstore_request *request)
{
    if (atomic_fetch_sub(&request->references, 1) == 1) {
        store_put(request->store);
        free(request->name);
        free(request);
    }
}

static _Thread_local const struct p2pstore *calling_back;

bool store_in_callback(const struct p2pstore *store)
{
    return calling_back == store;
}

static void callback_run(struct work_job *job)
{
    struct p2pstore_request *request = util_container(job, struct p2pstore_request, callback_job);
    calling_back = request->store;
    request->callback(request, request->arg);
    calling_back = NULL;
    store_request_put(request);
}

/* The descriptor is readable while there are any. Lock held. */
static void store_completed_clear(struct p2pstore *store)
{
    eventfd_t count;
    if (!store->completed) {
        (void)eventfd_read(store->event_fd, &count);
    }
}

/* Lock held. */
static void store_request_finish(struct p2pstore_request *request)
{
    struct p2pstore *store = request->store;
    request->status = request->verdict;
    request->hold = NULL;
    DL_DELETE(store->running, request);
    if (request->callback) {
        request->callback_job.run = callback_run;
        work_post(store->callbacks, &request->callback_job);
        return;
    }
    if (!request->blocking && !request->freed) {
        request->queued = true;
        DL_APPEND(store->completed, request);
        eventfd_write(store->event_fd, 1);
    }
    store_request_put(request);
}

/* Lock held. */
void store_request_decide(struct p2pstore_request *request, int verdict, const char *why)
{
    if (!request || request->decided) {
        return;
    }
    request->decided = true;
    request->verdict = verdict;
    if (verdict < 0) {
        snprintf(request->error, sizeof request->error, "%s: %s", request->name,
                 why ? why : strerror(-verdict));
    }
}

/* ---- holds ---- */

/* Whatever has come to its end, ends. Lock held. */
void store_hold_settle(struct store_hold *hold)
{
    struct p2pstore *store = hold->store;
    struct p2pstore_request *request = hold->request;
    bool kept = hold->state == HOLD_REGISTERED || hold->state == HOLD_PULLED;
    if (request && request->decided && (kept || !hold->lent) &&
        (!hold->working || request->cancelled)) {
        hold->request = NULL;
        store_request_finish(request);
    }
    pthread_cond_broadcast(&store->changed);
    if (!hold->lent && !hold->working && !hold->request && hold->state != HOLD_NAME) {
        HASH_DEL(store->holds, hold);
        extents_free(hold->extents);
        free(hold->name);
        free(hold);
    }
}

/* Nobody waits for it; the catalog goes on by itself. */
static void withdrawn(void *arg, int status, const struct model_entry *entry)
{
    (void)arg;
    (void)status;
    (void)entry;
}

/* From the engine: nothing touches the memory any more. */
void store_hold_released(void *arg)
{
    struct store_hold *hold = arg;
    struct p2pstore *store = hold->store;
    pthread_mutex_lock(&store->lock);
    if (hold->pulled && !hold->working && !store->closing) {
        /* A pull that failed may have been announced with its first shards. */
        (void)catalog_withdraw(store->catalog, &hold->version, false, withdrawn, NULL);
    }
    hold->lent = false;
    store_hold_settle(hold);
    pthread_mutex_unlock(&store->lock);
}

/* Takes the memory back; store_hold_released follows. Lock held, and let go of meanwhile: `hold` may be gone on return. */
void store_hold_release(struct store_hold *hold)
{
    struct p2pstore *store = hold->store;
    struct replica *replica = hold->replica;
    hold->replica = NULL;
    if (replica) {
        pthread_mutex_unlock(&store->lock);
        engine_lent_release(store->engine, replica);
        pthread_mutex_lock(&store->lock);
    }
}

/* Lock held. */
struct store_hold *store_hold_find(struct p2pstore *store, const char *name)
{
    struct store_hold *hold;
    HASH_FIND_STR(store->holds, name, hold);
    return hold;
}

/* Memory that is written may not be anybody else's here, and nobody else's may be written. Lock held. */
static bool ranges_taken(struct p2pstore *store, const struct engine_range *ranges, size_t count,
                         bool pull)
{
    for (const struct store_hold *hold = store->holds; hold; hold = hold->hh.next) {
        bool moving = hold->pulled && hold->state == HOLD_BUSY;
        if (hold->lent && (pull || moving) && extents_overlap(hold->extents, ranges, count)) {
            return true;
        }
    }
    return false;
}

static int store_hold_busy(const struct store_hold *hold)
{
    return hold->request || hold->working || (hold->state == HOLD_BUSY)
               ? store_fail(-EBUSY, "%s: another call works on it", hold->name)
               : store_fail(-EEXIST, "%s: this store has it already", hold->name);
}

/* A hold for memory that is about to be lent. */
int store_hold_new(struct p2pstore *store, struct p2pstore_request *request,
                   const struct engine_range *ranges, size_t count, struct store_hold **out)
{
    bool pull = request->call == P2PSTORE_GET_REPLICA;
    struct store_hold *hold = calloc(1, sizeof *hold);
    if (!hold || !(hold->name = strdup(request->name)) ||
        extents_new(ranges, count, NULL, NULL, &hold->extents) < 0) {
        if (hold) {
            free(hold->name);
        }
        free(hold);
        return store_fail(-ENOMEM, "out of memory");
    }
    hold->store = store;
    hold->pulled = pull;
    hold->request = request;
    hold->lent = true;
    int status = 0;
    pthread_mutex_lock(&store->lock);
    const struct store_hold *there = store_hold_find(store, hold->name);
    if (there && there->state == HOLD_NAME && !there->working) {
        status = store_fail(-EBUSY, "%s: unregistering it failed; call it again", hold->name);
    } else if (there) {
        status = store_hold_busy(there);
    } else if (ranges_taken(store, ranges, count, pull)) {
        status = store_fail(-EBUSY,
                            "%s: its ranges overlap memory that this store has registered or pulls",
                            hold->name);
    } else {
        HASH_ADD_KEYPTR(hh, store->holds, hold->name, strlen(hold->name), hold);
        DL_APPEND(store->running, request);
        request->hold = hold;
    }
    pthread_mutex_unlock(&store->lock);
    if (status < 0) {
        extents_free(hold->extents);
        free(hold->name);
        free(hold);
        return status;
    }
    *out = hold;
    return 0;
}

/* Undoes store_hold_new, where the engine has not taken the memory: the request was never started. */
void store_hold_drop(struct store_hold *hold)
{
    struct p2pstore *store = hold->store;
    pthread_mutex_lock(&store->lock);
    DL_DELETE(store->running, hold->request);
    hold->request = NULL;
    hold->lent = false;
    store_hold_settle(hold);
    pthread_mutex_unlock(&store->lock);
}

/* Posts the hold's job, which counts as inside. Lock held. */
void store_hold_work(struct store_hold *hold, void (*run)(struct work_job *job))
{
    hold->working = true;
    hold->job.run = run;
    hold->store->inside++;
    work_post(hold->store->jobs, &hold->job);
}

/* ---- ending them ---- */

/* Decides it if nobody has; its memory comes back. Lock held, and let go of meanwhile. */
static void cancel_begin(struct p2pstore_request *request, int verdict, const char *why)
{
    struct p2pstore *store = request->store;
    struct store_hold *hold = request->hold;
    if (request->decided || (request->call == P2PSTORE_GET_REPLICA &&
                             !engine_read_cancel(store->engine, &request->waiter))) {
        return; /* it ends by itself, now */
    }
    store_request_decide(request, verdict, why);
    request->cancelled = true;
    if (hold->replica) {
        store_hold_release(hold);
    } else {
        store_hold_settle(hold);
    }
}

int store_request_cancel(struct p2pstore_request *request, int verdict, const char *why)
{
    struct p2pstore *store = request->store;
    pthread_mutex_lock(&store->lock);
    bool over = request->status != -EINPROGRESS;
    if (!over) {
        cancel_begin(request, verdict, why);
    }
    while (request->status == -EINPROGRESS) {
        pthread_cond_wait(&store->changed, &store->lock);
    }
    int status = request->status;
    pthread_mutex_unlock(&store->lock);
    return over || status != verdict ? -EALREADY : 0;
}

/* One that can be ended now; those that are being started can in a moment. Lock held. */
static struct p2pstore_request *running_find(const struct p2pstore *store)
{
    struct p2pstore_request *request;
    DL_FOREACH(store->running, request) {
        if (!request->decided && (request->hold->replica || request->hold->working)) {
            return request;
        }
    }
    return NULL;
}

/* Memory that no request works on. Lock held. */
static struct store_hold *lent_find(const struct p2pstore *store)
{
    for (struct store_hold *hold = store->holds; hold; hold = hold->hh.next) {
        if (hold->replica && !hold->request) {
            return hold;
        }
    }
    return NULL;
}

static bool lent_any(const struct p2pstore *store)
{
    for (const struct store_hold *hold = store->holds; hold; hold = hold->hh.next) {
        if (hold->lent) {
            return true;
        }
    }
    return false;
}

void store_requests_end(struct p2pstore *store)
{
    struct p2pstore_request *request;
    struct store_hold *hold;
    pthread_mutex_lock(&store->lock);
    while (store->inside || store->running || lent_any(store)) {
        while ((request = running_find(store))) {
            cancel_begin(request, -ESHUTDOWN, "the store is being closed");
            if (!request->decided) {
                break; /* its pull has just ended, and is about to say so */
            }
        }
        while ((hold = lent_find(store))) {
            hold->state = HOLD_BUSY;
            store_hold_release(hold);
        }
        struct timespec soon;
        clock_gettime(CLOCK_MONOTONIC, &soon);
        soon.tv_nsec += 5000000;
        soon.tv_sec += soon.tv_nsec / 1000000000;
        soon.tv_nsec %= 1000000000;
        pthread_cond_timedwait(&store->changed, &store->lock, &soon);
    }
    pthread_mutex_unlock(&store->lock);
}

/* ---- public: requests ---- */

int p2pstore_request_status(const struct p2pstore_request *request)
{
    struct p2pstore *store = request->store;
    pthread_mutex_lock(&store->lock);
    int status = request->status;
    pthread_mutex_unlock(&store->lock);
    return status;
}

const char *p2pstore_request_error(const struct p2pstore_request *request)
{
    int status = p2pstore_request_status(request);
    return status == -EINPROGRESS ? "" : request->error;
}

enum p2pstore_call p2pstore_request_call(const struct p2pstore_request *request)
{
    return request->call;
}

const char *p2pstore_request_name(const struct p2pstore_request *request)
{
    return request->name;
}

void p2pstore_request_progress(const struct p2pstore_request *request, uint64_t *done,
                               uint64_t *total)
{
    struct p2pstore *store = request->store;
    *total = request->total;
    *done = 0;
    pthread_mutex_lock(&store->lock);
    if (request->status == 0) {
        *done = request->total;
    } else if (request->total && request->hold && request->hold->replica) {
        *done = engine_lent_resident(request->hold->replica);
    }
    pthread_mutex_unlock(&store->lock);
}

int p2pstore_request_wait(struct p2pstore_request *request, int64_t timeout_ms)
{
    struct p2pstore *store = request->store;
    struct timespec end;
    if (store->pid != getpid()) {
        return store_fail(-EPERM,
                          "the request belongs to the process that this one was forked from");
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    int64_t limit = timeout_ms < INT32_MAX ? timeout_ms : INT32_MAX;
    end.tv_sec += limit / 1000;
    end.tv_nsec += limit % 1000 * 1000000;
    end.tv_sec += end.tv_nsec / 1000000000;
    end.tv_nsec %= 1000000000;
    int waited = 0;
    pthread_mutex_lock(&store->lock);
    while (request->status == -EINPROGRESS && waited != ETIMEDOUT) {
        waited = timeout_ms < 0 ? pthread_cond_wait(&store->changed, &store->lock)
                                : pthread_cond_timedwait(&store->changed, &store->lock, &end);
    }
    int status = request->status;
    pthread_mutex_unlock(&store->lock);
    return status < 0 && status != -EINPROGRESS ? store_fail(status, "%s", request->error) : status;
}

int p2pstore_request_cancel(struct p2pstore_request *request)
{
    int status = store_enter(request->store);
    if (status == -ESHUTDOWN) { /* close ends it, and waits as we would */
        (void)p2pstore_request_wait(request, -1);
        return -EALREADY;
    }
    if (status == 0) {
        status = store_request_cancel(request, -ECANCELED, NULL);
        store_leave(request->store);
    }
    return status;
}

void p2pstore_request_free(struct p2pstore_request *request)
{
    if (!request || request->store->pid != getpid()) {
        return; /* a forked process cannot tell what its parent's threads were doing to it */
    }
    struct p2pstore *store = request->store;
    pthread_mutex_lock(&store->lock);
    request->freed = true;
    if (request->queued) {
        request->queued = false;
        DL_DELETE(store->completed, request);
        store_completed_clear(store);
    }
    pthread_mutex_unlock(&store->lock);
    store_request_put(request);
}

int p2pstore_fd(const struct p2pstore *store)
{
    return store ? store->event_fd : store_fail(-EINVAL, "the store is NULL");
}

struct p2pstore_request *p2pstore_completed(struct p2pstore *store)
{
    if (store_enter(store) < 0) {
        return NULL;
    }
    pthread_mutex_lock(&store->lock);
    struct p2pstore_request *request = store->completed;
    if (request) {
        request->queued = false;
        DL_DELETE(store->completed, request);
        store_completed_clear(store);
    }
    pthread_mutex_unlock(&store->lock);
    store_leave(store);
    return request;
}
