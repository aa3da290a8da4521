#include "meta/catalog_inside.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "meta/base/log.h"
#include "meta/base/util.h"

#define LOOP_IDLE_MS        60000
#define LOOP_BACKOFF_MIN_MS 100
#define LOOP_BACKOFF_MAX_MS 2000
#define LOOP_AGAIN_MS       1000 /* a duty that failed although the service answers */
#define LOOP_AGE_MAX_MS     (CATALOG_DEADLINE_MS - META_DEADLINE_MS - 1000)

/* States: online; offline (c->failed says why). Online -> offline: the store did not answer a call. Offline -> online:
 * loop_connect went through. `online` and `since_ms` are written under the mutex, for catalog_online. */

static bool loop_is_stopping(struct catalog *c)
{
    pthread_mutex_lock(&c->mutex);
    bool stopping = c->stopping;
    pthread_mutex_unlock(&c->mutex);
    return stopping;
}

static void loop_set_online(struct catalog *c, bool online)
{
    uint64_t now = util_now_ms();
    pthread_mutex_lock(&c->mutex);
    uint64_t away = now - c->since_ms;
    bool changed = c->online != online;
    c->online = online;
    if (changed)
        c->since_ms = now;
    c->outages += changed && !online;
    pthread_mutex_unlock(&c->mutex);
    if (changed && online)
        log_info("metadata %s: back after %.1f s", c->backend, (double)away / 1000);
    else if (changed)
        log_warn("metadata %s: offline (%s); names stay readable, changes fail until it is back",
                 c->backend, strerror(-c->failed));
}

static void loop_go_offline(struct catalog *c)
{
    loop_set_online(c, false);
    c->backoff_ms = LOOP_BACKOFF_MIN_MS;
    c->retry_ms = util_now_ms() + c->backoff_ms;
}

/* Lists everything and brings memory in line; restores what a service has lost that came back empty. */
static int loop_relist(struct catalog *c)
{
    bool replaced;
    int rc = feed_list(c, &replaced);
    if (rc < 0 || !replaced)
        return rc;
    rc = sweep_republish(c);
    if (rc < 0)
        return rc;
    feed_adopt(c);
    c->relearn = true;
    c->lease = 0; /* leases went with the service */
    c->renew_ms = 0;
    rc = feed_list(c, &replaced);
    if (rc == 0 && replaced)
        c->stale = true; /* and once more: it was replaced again meanwhile */
    return rc;
}

static int loop_connect_steps(struct catalog *c)
{
    int rc = loop_relist(c);
    if (rc == 0 && !loop_is_stopping(c)) {
        if (c->lease != 0)
            rc = hold_renew(c);
        else if (c->serving || c->held)
            rc = hold_recover(c);
    }
    if (rc == 0)
        rc = sweep_doubts(c);
    return rc;
}

static void loop_connect(struct catalog *c)
{
    uint64_t now = util_now_ms();
    if (now < c->retry_ms)
        return;
    int failed = c->failed;
    c->failed = 0;
    int rc = loop_connect_steps(c);
    if (rc == 0) {
        sweep_restart(c);
        loop_set_online(c, true);
        return;
    }
    if (c->failed == 0)
        c->failed = rc == -ESTALE || rc == -EAGAIN ? failed : rc;
    c->backoff_ms =
        c->backoff_ms * 2 < LOOP_BACKOFF_MAX_MS ? c->backoff_ms * 2 : LOOP_BACKOFF_MAX_MS;
    c->retry_ms = util_now_ms() + c->backoff_ms;
}

/* Whether this node has something that stands with a lease; it may have lost the lease itself. */
static bool loop_wants_lease(const struct catalog *c)
{
    return c->lease != 0 || c->serving || c->held;
}

/* Renews the lease. Also between changes, when the queue is long. */
static void loop_renew(struct catalog *c)
{
    uint64_t now = util_now_ms();
    if (!loop_wants_lease(c) || now < c->renew_ms || c->failed != 0)
        return;
    int rc = c->lease != 0 ? hold_renew(c) : hold_recover(c);
    if (rc == -ESTALE)
        c->stale = true;
    if (rc < 0)
        c->renew_ms = now + LOOP_AGAIN_MS;
}

static void loop_duties(struct catalog *c)
{
    loop_renew(c);
    int rc = c->failed == 0 && c->stale ? loop_relist(c) : 0;
    loop_renew(c); /* the service may have turned out to be another one */
    bool sweeps = !c->store->read_only;
    if (rc == 0 && c->failed == 0 && sweeps)
        rc = sweep_clear(c);
    if (rc == 0 && c->failed == 0 && sweeps)
        rc = sweep_round(c);
    if (rc == -ESTALE)
        c->stale = true;
    else if (rc == -ENOENT)
        c->renew_ms = 0; /* our lease has ended: the renewal finds out */
    else if (rc < 0 && c->failed == 0 && c->sweep_ms < util_now_ms() + LOOP_AGAIN_MS)
        c->sweep_ms = util_now_ms() + LOOP_AGAIN_MS;
}

/* What is left of a change where nothing can be written: this node is not announced, and has nothing to withdraw. */
static int loop_run_read_only(struct catalog *c, struct change *change)
{
    switch (change->kind) {
    case CHANGE_HOLDERS:
    case CHANGE_CENSUS:
        return c->failed != 0 ? c->failed : change_run(c, change);
    case CHANGE_SERVE:
    case CHANGE_WITHDRAW:
        return 0;
    default:
        return -EOPNOTSUPP;
    }
}

/* A publication of which we don't know whether it was carried out is undone when the service answers again. */
static void loop_doubt(struct catalog *c, const struct change *change, int status)
{
    if (change->kind == CHANGE_PUBLISH && c->failed != 0)
        sweep_doubt_add(c, &change->version.id);
    else if (change->kind == CHANGE_PUBLISH && status == 0)
        sweep_doubt_drop(c, &change->version.id);
}

/* Carries out the first of the queue, or some of them at once. How many, at least 1. */
static size_t loop_run(struct catalog *c, struct change *first, int *status)
{
    bool late = util_now_ms() - first->queued_ms > LOOP_AGE_MAX_MS;
    if (c->store->read_only) {
        *status = loop_run_read_only(c, first);
        return 1;
    }
    if (c->failed != 0 || late) {
        hold_intend(c, first);
        *status = c->failed != 0 ? c->failed : -ETIMEDOUT;
        return 1;
    }
    size_t count = change_run_together(c, first, status);
    if (count == 0) {
        count = 1;
        *status = change_run(c, first);
        if (*status == -ESTALE) {
            *status = loop_relist(c);
            if (*status == 0)
                *status = change_run(c, first);
        }
    }
    const struct change *change = first;
    for (size_t i = 0; i < count; i++, change = change->next)
        loop_doubt(c, change, *status);
    return count;
}

/* Carries out what is queued, in order. When the service goes away meanwhile, the rest fails like the first. */
static void loop_queue(struct catalog *c)
{
    pthread_mutex_lock(&c->mutex);
    struct change *queue = c->queue;
    c->queue = NULL;
    c->queue_end = &c->queue;
    pthread_mutex_unlock(&c->mutex);
    while (queue) {
        struct change *change = queue;
        if (loop_is_stopping(c)) {
            queue = change->next;
            change_finish(c, change, -ESHUTDOWN);
            continue;
        }
        int status = 0;
        size_t count = loop_run(c, change, &status);
        if (c->online && c->failed != 0)
            loop_go_offline(c); /* whoever hears of the failure finds us offline */
        for (; count > 0; count--) {
            queue = change->next;
            change_finish(c, change, status);
            change = queue;
        }
        loop_renew(c);
    }
}

/* Until the next duty, a change elsewhere or one of ours. */
static void loop_wait(struct catalog *c)
{
    uint64_t now = util_now_ms();
    uint64_t due = now + LOOP_IDLE_MS;
    uint64_t wakes;
    if (c->failed != 0) {
        struct pollfd wake = {.fd = c->wake_fd, .events = POLLIN};
        poll(&wake, 1, c->retry_ms > now ? (int)(c->retry_ms - now) : 0);
    } else {
        if (loop_wants_lease(c) && c->renew_ms < due)
            due = c->renew_ms;
        if (c->sweep_ms < due && !c->store->read_only)
            due = c->sweep_ms;
        if (c->doomed_count > 0 || c->stale)
            due = now;
        int rc = feed_pull(c, due > now ? (uint32_t)(due - now) : 0, c->wake_fd, NULL);
        if (rc == -ESTALE) {
            c->stale = true;
        } else if (rc < 0 && c->failed == 0) {
            struct pollfd wake = {.fd = c->wake_fd, .events = POLLIN};
            poll(&wake, 1, LOOP_BACKOFF_MIN_MS); /* out of memory: again, but not at once */
        }
    }
    if (read(c->wake_fd, &wakes, sizeof(wakes)) < 0)
        return; /* nothing was queued */
}

void *loop_main(void *arg)
{
    struct catalog *c = arg;
    while (!loop_is_stopping(c)) {
        if (!c->online)
            loop_connect(c);
        loop_queue(c);
        if (c->online && c->failed == 0)
            loop_duties(c);
        if (c->online && c->failed != 0)
            loop_go_offline(c);
        if (!loop_is_stopping(c))
            loop_wait(c);
        if (c->online && c->failed != 0)
            loop_go_offline(c);
    }
    loop_queue(c);
    if (c->lease != 0 && c->failed == 0)
        c->store->ops->lease_revoke(c->store, c->lease);

    pthread_mutex_lock(&c->mutex);
    bool detached = c->detached;
    pthread_mutex_unlock(&c->mutex);
    if (detached)
        catalog_free(c);
    return NULL;
}

void catalog_free(struct catalog *c)
{
    meta_close(c->store);
    feed_clear(c);
    hold_clear(c);
    tree_free(c->tree);
    free(c->doubts);
    free(c->doomed);
    if (c->wake_fd >= 0)
        close(c->wake_fd);
    pthread_mutex_destroy(&c->mutex);
    free(c);
}
