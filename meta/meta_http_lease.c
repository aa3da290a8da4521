/* Leases without a clock in common: each lease has a key of its own, outside the document, that its owner rewrites with
 * every renewal, and other nodes look at it. One that has not changed for its duration, by the monotonic clock of the
 * node that looks, has ended: that node takes it and its keys out of the document.
 *
 * So that a node does not look at all others, it looks at those two that follow on its own in the order of the ids;
 * when one of these seems to be late, at all of them, as then more may have died at once. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "meta/base/log.h"
#include "meta/base/util.h"
#include "meta/meta_http_call.h"

#define LEASE_NEXT     2  /* leases that are looked at */
#define LEASE_LOOKS    32 /* at the most at once, so that nothing waits for them */
#define LEASE_SPARE_MS (META_DEADLINE_MS / 2)
#define LEASE_OFTEN    8 /* looks in the duration of a lease */
#define LEASE_FAST_MS  100
#define LEASE_SLOW_MS  2000
#define LEASE_NAME     32

/* What is known of a lease. */
struct web_watch {
    UT_hash_handle hh;
    uint64_t id;
    uint64_t since_ms;  /* when `seen` was seen first */
    uint64_t looked_ms; /* 0: never */
    char seen[32];      /* the beginning of its key's value */
};

static void lease_name(uint64_t id, char out[LEASE_NAME])
{
    snprintf(out, LEASE_NAME, "lease.%016" PRIx64, id);
}

static int lease_beat(struct web *s, uint64_t id)
{
    struct http_reply reply;
    char name[LEASE_NAME];
    char value[32];
    lease_name(id, name);
    snprintf(value, sizeof(value), "%" PRIu64, ++s->beat);
    int rc = web_call(s, "PUT", name, value, NULL, NULL, &reply);
    if (rc < 0)
        return rc;
    free(reply.body);
    if (!web_done(&reply))
        return web_fail(s, -EBADMSG, "%s: a write without a precondition is answered with %ld",
                        s->base, reply.status);
    return 0;
}

/* Removes its key. What stays when that fails is some bytes that nobody looks at. */
static void lease_forget(struct web *s, uint64_t id)
{
    struct http_reply reply;
    char name[LEASE_NAME];
    lease_name(id, name);
    if (web_call(s, "DELETE", name, NULL, NULL, NULL, &reply) == 0)
        free(reply.body);
}

/* ---- ours ---- */

static int lease_add(struct web_doc *doc, void *arg)
{
    const struct web_lease *lease = arg;
    doc->revision++;
    return web_doc_lease_add(doc, lease->id, lease->ttl_ms);
}

int web_lease_grant(struct meta_store *store, uint32_t ttl_ms, uint64_t *lease)
{
    struct web *s = web_of(store);
    struct web_lease fresh = {.id = util_random_u64(), .ttl_ms = ttl_ms};
    web_enter(s);
    int rc = store->read_only ? -EOPNOTSUPP : lease_beat(s, fresh.id);
    if (rc == 0) {
        rc = web_update(s, lease_add, &fresh);
        if (rc < 0)
            lease_forget(s, fresh.id);
    }
    if (rc == 0)
        *lease = s->lease = fresh.id;
    return web_answer(s, rc);
}

/* Whether the document still has it is asked first: a key that is written again belongs to nobody. */
int web_lease_renew(struct meta_store *store, uint64_t lease)
{
    struct web *s = web_of(store);
    web_enter(s);
    int rc = web_fetch(s);
    if (rc == 0 && !web_doc_lease(&s->doc, lease)) {
        lease_forget(s, lease); /* a renewal may have come too late */
        rc = -ENOENT;
    }
    if (rc == 0)
        rc = lease_beat(s, lease);
    if (rc == 0)
        s->lease = lease;
    return web_answer(s, rc);
}

struct lease_ended {
    const uint64_t *ids;
    size_t count;
};

static int lease_end(struct web_doc *doc, void *arg)
{
    const struct lease_ended *ended = arg;
    int rc = -ENOENT;
    for (size_t i = 0; i < ended->count && rc != -ENOMEM; i++) {
        int one = web_doc_lease_end(doc, ended->ids[i]);
        rc = one != -ENOENT ? one : rc;
    }
    return rc;
}

int web_lease_revoke(struct meta_store *store, uint64_t lease)
{
    struct web *s = web_of(store);
    struct lease_ended ended = {&lease, 1};
    web_enter(s);
    int rc = web_update(s, lease_end, &ended);
    if (rc == 0 || rc == -ENOENT)
        lease_forget(s, lease);
    return web_answer(s, rc);
}

/* ---- those of others ---- */

static struct web_watch *lease_watch(struct web *s, uint64_t id)
{
    struct web_watch *watch;
    HASH_FIND(hh, s->watches, &id, sizeof(id), watch);
    if (watch || !(watch = calloc(1, sizeof(*watch))))
        return watch;
    watch->id = id;
    HASH_ADD(hh, s->watches, id, sizeof(watch->id), watch);
    if (!watch->hh.tbl) {
        free(watch);
        return NULL;
    }
    return watch;
}

/* Forgets the watches of leases that have ended. */
static void lease_watches_trim(struct web *s)
{
    struct web_watch *watch;
    struct web_watch *next;
    HASH_ITER(hh, s->watches, watch, next) {
        if (web_doc_lease(&s->doc, watch->id))
            continue;
        /* NOLINTNEXTLINE(clang-analyzer-*): the loop took the next one before */
        HASH_DEL(s->watches, watch);
        free(watch);
    }
}

/* When it is to be looked at again. */
static uint64_t lease_due_ms(const struct web_watch *watch, uint32_t ttl_ms)
{
    uint64_t pause = ttl_ms / LEASE_OFTEN;
    if (watch->looked_ms == 0)
        return 0;
    if (pause < LEASE_FAST_MS || pause > LEASE_SLOW_MS)
        pause = pause < LEASE_FAST_MS ? LEASE_FAST_MS : LEASE_SLOW_MS;
    uint64_t end = watch->since_ms + ttl_ms;
    uint64_t due = watch->looked_ms + pause;
    return watch->looked_ms < end && end < due ? end : due;
}

/* 1: it has ended. The time before the request and the one behind the answer are both on the safe side. */
static int lease_look_at(struct web *s, struct web_watch *watch, uint32_t ttl_ms)
{
    struct http_reply reply;
    char name[LEASE_NAME];
    char seen[sizeof(watch->seen)] = "";
    uint64_t before = util_now_ms();
    lease_name(watch->id, name);
    int rc = web_call(s, "GET", name, NULL, NULL, NULL, &reply);
    if (rc < 0)
        return rc;
    if (web_done(&reply)) /* without a key it is as if it had never been renewed */
        snprintf(seen, sizeof(seen), "%.31s", reply.body);
    free(reply.body);
    bool moved = watch->looked_ms == 0 || strcmp(watch->seen, seen) != 0;
    watch->looked_ms = util_now_ms();
    if (!moved)
        return before >= watch->since_ms + ttl_ms;
    memcpy(watch->seen, seen, sizeof(seen));
    watch->since_ms = watch->looked_ms;
    return 0;
}

/* The lease that comes behind, the first one behind the last. */
static const struct web_lease *lease_behind(const struct web *s, const struct web_lease *lease)
{
    return lease && lease->hh.next ? lease->hh.next : s->doc.leases;
}

/* Looks at those that are due, gathers those that have ended. */
static int lease_look_round(struct web *s, uint64_t ended[LEASE_LOOKS], size_t *count)
{
    const struct web_lease *own = web_doc_lease(&s->doc, s->lease);
    const struct web_lease *lease = lease_behind(s, own);
    size_t reach = own ? LEASE_NEXT : SIZE_MAX;
    size_t looks = 0;
    size_t all = HASH_COUNT(s->doc.leases) - (own ? 1 : 0);
    for (size_t i = 0; i < all && i < reach && looks < LEASE_LOOKS; i++) {
        uint64_t now = util_now_ms();
        if (now + LEASE_SPARE_MS > s->deadline_ms)
            break; /* the rest next time: what the call is for must not fail for it */
        struct web_watch *watch = lease_watch(s, lease->id);
        if (!watch)
            return -ENOMEM;
        if (now >= lease_due_ms(watch, lease->ttl_ms)) {
            int rc = lease_look_at(s, watch, lease->ttl_ms);
            if (rc < 0)
                return rc;
            if (rc > 0)
                ended[(*count)++] = lease->id;
            looks++;
        }
        if (util_now_ms() - watch->since_ms > lease->ttl_ms / 2)
            reach = SIZE_MAX;
        lease = lease_behind(s, lease);
    }
    return 0;
}

int web_lease_look(struct web *s)
{
    uint64_t ids[LEASE_LOOKS];
    struct lease_ended ended = {ids, 0};
    if (s->store.read_only || !s->doc.leases)
        return 0;
    lease_watches_trim(s);
    int rc = lease_look_round(s, ids, &ended.count);
    if (rc < 0 || ended.count == 0)
        return rc;
    rc = web_update(s, lease_end, &ended);
    for (size_t i = 0; (rc == 0 || rc == -ENOENT) && i < ended.count; i++)
        lease_forget(s, ids[i]);
    return rc == -ENOENT ? 0 : rc; /* another node was faster */
}

void web_lease_restart(struct web *s)
{
    for (struct web_watch *watch = s->watches; watch; watch = watch->hh.next)
        watch->looked_ms = 0;
}

void web_lease_clear(struct web *s)
{
    struct web_watch *watch = s->watches;
    HASH_CLEAR(hh, s->watches);
    while (watch) {
        struct web_watch *next = watch->hh.next;
        free(watch);
        watch = next;
    }
}
