#include "meta/catalog_inside.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <utlist.h>

#include "meta/base/log.h"
#include "meta/base/util.h"

/* ---- the table of what we hold ---- */

struct held *hold_find(struct catalog *c, const struct model_id *id)
{
    struct held *held;
    HASH_FIND(hh, c->held, id, sizeof(*id), held);
    return held;
}

struct held *hold_get(struct catalog *c, const struct model_id *id)
{
    struct held *held = hold_find(c, id);
    if (held)
        return held;
    held = calloc(1, sizeof(*held));
    if (!held)
        return NULL;
    held->id = *id;
    HASH_ADD(hh, c->held, id, sizeof(held->id), held);
    if (!held->hh.tbl) {
        free(held);
        return NULL;
    }
    return held;
}

void hold_forget(struct catalog *c, struct held *held)
{
    if (held) {
        HASH_DEL(c->held, held);
        free(held);
    }
}

/* The serving catalogs of this process. Its own id says nothing of who left a node record, since the first process of a
 * container always has the same one; the record's boot does. */
static struct catalog *serving;
static pthread_mutex_t serving_lock = PTHREAD_MUTEX_INITIALIZER;

static bool hold_is_ours(uint64_t boot)
{
    const struct catalog *c;
    pthread_mutex_lock(&serving_lock);
    LL_SEARCH_SCALAR(serving, c, self.boot, boot);
    pthread_mutex_unlock(&serving_lock);
    return c != NULL;
}

void hold_clear(struct catalog *c)
{
    struct held *held;
    struct held *next;
    HASH_ITER(hh, c->held, held, next)
        hold_forget(c, held);
    pthread_mutex_lock(&serving_lock);
    if (c->serving)
        LL_DELETE(serving, c);
    pthread_mutex_unlock(&serving_lock);
}

void hold_plan_put(struct catalog *c, struct plan *plan, const struct model_id *id, bool complete)
{
    char key[CODEC_KEY_MAX];
    struct model_holder holder = {.node = c->self, .complete = complete};
    codec_key_holder(id, c->self.name, key);
    plan_put(plan, key, codec_holder_encode(&holder), c->lease);
}

bool hold_is_live(const struct catalog *c, const struct model_node *node)
{
    const struct tree_node *live = tree_node_find(c->tree, node->name);
    return live && live->node.boot == node->boot;
}

/* ---- the lease ---- */

static void hold_lease_began(struct catalog *c)
{
    c->renew_ms = util_now_ms() + c->lease_ms / 3;
}

int hold_lease(struct catalog *c)
{
    if (c->lease != 0)
        return 0;
    int rc = feed_answer(c, c->store->ops->lease_grant(c->store, c->lease_ms, &c->lease));
    if (rc < 0) {
        c->lease = 0;
        return rc;
    }
    hold_lease_began(c);
    /* what stood with the last lease went with it */
    c->node_stored = false;
    for (struct held *held = c->held; held; held = held->hh.next)
        held->stored = false;
    c->held_open = c->held != NULL;
    return 0;
}

static void hold_plan_node(struct catalog *c, struct plan *plan)
{
    char key[CODEC_KEY_MAX];
    const struct tree_node *node = tree_node_find(c->tree, c->self.name);
    codec_key_node(c->self.name, key);
    if (node)
        plan_compare(plan, META_REVISION, key, node->node.revision);
    else
        plan_compare(plan, META_ABSENT, key, 0);
    plan_put(plan, key, codec_node_encode(&c->self), c->lease);
}

/* Writes the node record again. Losing the name is no outage: it is tried again with every renewal. */
static int hold_node_put(struct catalog *c)
{
    if (!c->serving || c->node_stored)
        return 0;
    struct plan plan = {0};
    const struct tree_node *node = tree_node_find(c->tree, c->self.name);
    if (node && node->node.boot != c->self.boot) {
        if (!c->name_lost)
            log_error("another node at %s has taken the name %s; until it ends, nobody finds what "
                      "this node holds: mount with another node=",
                      node->node.address, c->self.name);
        c->name_lost = true;
        return 0;
    }
    hold_plan_node(c, &plan);
    int rc = plan_commit(c, &plan);
    plan_clear(&plan);
    if (rc == 0) {
        c->node_stored = true;
        c->name_lost = false;
    }
    return rc == -EAGAIN ? 0 : rc;
}

int hold_recover(struct catalog *c)
{
    size_t news;
    c->lease = 0;
    /* the feed first: our old node record may still be in memory */
    int rc = feed_pull(c, 0, -1, &news);
    if (rc == 0 && (c->serving || c->held))
        rc = hold_lease(c);
    return rc == 0 ? hold_reconcile(c) : rc;
}

int hold_renew(struct catalog *c)
{
    int rc = c->lease != 0 ? feed_answer(c, c->store->ops->lease_renew(c->store, c->lease)) : 0;
    if (rc == -ENOENT) {
        log_warn("the lease of this node has ended (it was stopped, or cut off, for more than %u "
                 "ms); announcing again what it holds",
                 c->lease_ms);
        return hold_recover(c);
    }
    if (rc < 0)
        return rc;
    hold_lease_began(c);
    return hold_reconcile(c);
}

/* ---- announcements in bulk ---- */

static void hold_plan_one(struct catalog *c, struct plan *plan, const struct held *held)
{
    char key[CODEC_KEY_MAX];
    if (held->wanted) {
        codec_key_version(&held->id, key);
        plan_compare(plan, META_EXISTS, key, 0);
        hold_plan_put(c, plan, &held->id, held->complete);
    } else {
        codec_key_holder(&held->id, c->self.name, key);
        plan_delete(plan, key);
    }
}

/* `count` of them in one transaction. */
static int hold_commit(struct catalog *c, struct held **some, size_t count)
{
    struct plan plan = {0};
    for (size_t i = 0; i < count; i++)
        hold_plan_one(c, &plan, some[i]);
    int rc = plan_commit(c, &plan);
    plan_clear(&plan);
    for (size_t i = 0; rc == 0 && i < count; i++) {
        some[i]->stored = true;
        if (!some[i]->wanted)
            hold_forget(c, some[i]);
    }
    return rc;
}

/* One by one after a batch that failed: the version that is gone must not keep the others back. */
static int hold_commit_each(struct catalog *c, struct held **some, size_t count)
{
    int rc = hold_commit(c, some, count);
    if (rc != -EAGAIN)
        return rc;
    rc = 0;
    for (size_t i = 0; rc == 0 && i < count; i++) {
        rc = hold_commit(c, &some[i], 1);
        if (rc == -EAGAIN) {
            hold_forget(c, some[i]);
            rc = 0;
        }
    }
    return rc;
}

/* A version whose record is gone has no holders any more. */
static bool hold_is_moot(struct catalog *c, const struct held *held)
{
    char key[CODEC_KEY_MAX];
    const struct tree_version *version = tree_version_find(c->tree, &held->id);
    if (version && version->revision != 0)
        return false;
    codec_key_version(&held->id, key);
    return !feed_is_bad(c, key);
}

int hold_reconcile(struct catalog *c)
{
    struct held *some[CATALOG_BATCH];
    struct held *held;
    struct held *next;
    size_t count = 0;
    int rc = hold_node_put(c);
    if (rc < 0 || !c->held_open || (c->serving && !c->node_stored))
        return rc;
    HASH_ITER(hh, c->held, held, next) {
        if (hold_is_moot(c, held)) {
            hold_forget(c, held);
            continue;
        }
        if (held->stored && held->wanted)
            continue;
        some[count++] = held;
        if (count == CATALOG_BATCH) {
            rc = hold_commit_each(c, some, count);
            count = 0;
            if (rc < 0)
                return rc;
        }
    }
    if (count > 0)
        rc = hold_commit_each(c, some, count);
    if (rc == 0)
        c->held_open = false;
    return rc;
}

/* ---- changes ---- */

/* What the change asks for is ours to bring about from now on, whatever becomes of this attempt. */
static int hold_intend_announce(struct catalog *c, const struct change *change)
{
    struct held *held = hold_get(c, &change->version.id);
    if (!held)
        return -ENOMEM;
    bool complete = (change->flags & CATALOG_COMPLETE) != 0;
    if (held->wanted && held->stored && held->complete == complete)
        return 1;
    held->wanted = true;
    held->stored = false;
    held->complete = complete;
    c->held_open = true;
    return 0;
}

/* If we don't hear what became of it: it stands (keep_other), or goes as soon as the service answers. */
static void hold_intend_withdraw(struct catalog *c, const struct change *change, struct held *held)
{
    held->wanted = change->keep_other;
    held->stored = false;
    c->held_open = true;
}

void hold_intend(struct catalog *c, const struct change *change)
{
    struct held *held = hold_find(c, &change->version.id);
    const struct tree_version *version = tree_version_find(c->tree, &change->version.id);
    if (change->kind == CHANGE_ANNOUNCE && version && version->revision != 0)
        hold_intend_announce(c, change);
    else if (change->kind == CHANGE_WITHDRAW && held && !change->keep_other)
        hold_intend_withdraw(c, change, held);
}

int hold_build_announce(struct catalog *c, struct change *change, struct plan *plan)
{
    char key[CODEC_KEY_MAX];
    const struct model_id *id = &change->version.id;
    const struct tree_version *version = tree_version_find(c->tree, id);
    if (!version || version->revision == 0) {
        hold_forget(c, hold_find(c, id));
        return -ENOENT;
    }
    int rc = hold_intend_announce(c, change);
    if (rc == 0)
        rc = hold_lease(c);
    if (rc != 0)
        return rc;
    codec_key_version(id, key);
    plan_compare(plan, META_EXISTS, key, 0);
    hold_plan_put(c, plan, id, (change->flags & CATALOG_COMPLETE) != 0);
    return 0;
}

struct hold_other {
    struct catalog *catalog;
    bool found;
    struct model_node node;
    uint64_t revision;
};

static int hold_other_each(void *arg, const struct meta_event *event)
{
    struct hold_other *other = arg;
    struct model_holder holder = {0};
    int rc = codec_holder_decode(event->value, &holder);
    if (rc < 0) {
        feed_bad_note(other->catalog, event->key, event->revision, rc);
        return 0;
    }
    if (!other->found && holder.complete && hold_is_live(other->catalog, &holder.node) &&
        strcmp(holder.node.name, other->catalog->self.name) != 0) {
        other->found = true;
        other->node = holder.node;
        other->revision = event->revision;
    }
    return 0;
}

/* Our record goes only while the other's stands: of two nodes that withdraw at once, one finds the other gone. */
static int hold_plan_keep_other(struct catalog *c, struct plan *plan, const struct model_id *id)
{
    char key[CODEC_KEY_MAX];
    struct hold_other other = {.catalog = c};
    uint64_t revision;
    codec_key_holders(id, key);
    int rc = feed_answer(c, c->store->ops->list(c->store, key, hold_other_each, &other, &revision));
    if (rc < 0)
        return rc;
    if (!other.found)
        return -EBUSY;
    codec_key_holder(id, other.node.name, key);
    plan_compare(plan, META_REVISION, key, other.revision);
    codec_key_node(other.node.name, key);
    plan_compare(plan, META_EXISTS, key, 0);
    return 0;
}

int hold_build_withdraw(struct catalog *c, struct change *change, struct plan *plan)
{
    char key[CODEC_KEY_MAX];
    const struct model_id *id = &change->version.id;
    struct held *held = hold_find(c, id);
    if (!held)
        return 1;
    int rc = change->keep_other && held->wanted ? hold_plan_keep_other(c, plan, id) : 0;
    if (rc < 0)
        return rc;
    hold_intend_withdraw(c, change, held);
    codec_key_holder(id, c->self.name, key);
    plan_delete(plan, key);
    return 0;
}

/* Whether a node record was left by a process of this machine: 1 it runs, 0 it is dead, -1 can't say. */
static int hold_local_process(const struct catalog *c, const struct model_node *node)
{
    char path[64];
    char theirs[32] = "";
    char ours[32] = "";
    if (c->self.host[0] == '\0' || strcmp(node->host, c->self.host) != 0 || node->pid <= 0)
        return -1;
    if (kill(node->pid, 0) < 0 && errno == ESRCH)
        return 0;
    if (node->pid == getpid())
        return hold_is_ours(node->boot) ? 1 : -1;
    snprintf(path, sizeof(path), "/proc/%d/comm", (int)node->pid);
    FILE *file = fopen(path, "re");
    if (file && !fgets(theirs, sizeof(theirs), file))
        theirs[0] = '\0';
    if (file)
        fclose(file);
    file = fopen("/proc/self/comm", "re");
    if (file && !fgets(ours, sizeof(ours), file))
        ours[0] = '\0';
    if (file)
        fclose(file);
    return theirs[0] && strcmp(theirs, ours) == 0 ? 1
                                                  : -1; /* a process id is used again by others */
}

/* -EEXIST: the name is taken; -EBUSY: perhaps, its lease will tell. */
int hold_build_serve(struct catalog *c, struct change *change, struct plan *plan)
{
    const struct tree_node *node = tree_node_find(c->tree, c->self.name);
    if (node && node->node.boot != c->self.boot) {
        int running = hold_local_process(c, &node->node);
        if (running != 0)
            return running > 0 ? -EEXIST : -EBUSY;
        log_info("node %s: taking over from process %d, which is dead", c->self.name,
                 (int)node->node.pid);
    }
    snprintf(c->self.address, sizeof(c->self.address), "%s", change->target);
    int rc = hold_lease(c);
    if (rc < 0)
        return rc;
    hold_plan_node(c, plan);
    return 0;
}

void hold_announced(struct catalog *c, const struct change *change)
{
    struct held *held = hold_get(c, &change->version.id);
    if (!held) {
        log_warn("out of memory: what this node holds is not announced again after an outage");
        return;
    }
    held->wanted = true;
    held->stored = true;
    held->complete = (change->flags & CATALOG_COMPLETE) != 0;
}

void hold_withdrawn(struct catalog *c, const struct change *change)
{
    hold_forget(c, hold_find(c, &change->version.id));
}

void hold_served(struct catalog *c, const struct change *change)
{
    (void)change;
    pthread_mutex_lock(&serving_lock);
    if (!c->serving)
        LL_PREPEND(serving, c);
    c->serving = true;
    pthread_mutex_unlock(&serving_lock);
    c->node_stored = true;
}

/* ---- reading ---- */

struct hold_holders {
    struct catalog *catalog;
    struct model_holder *holders;
    size_t count;
    size_t room;
};

static int hold_holders_each(void *arg, const struct meta_event *event)
{
    struct hold_holders *all = arg;
    struct model_holder holder = {0};
    int rc = codec_holder_decode(event->value, &holder);
    if (rc < 0) {
        feed_bad_note(all->catalog, event->key, event->revision, rc);
        return 0;
    }
    const struct model_node *self = &all->catalog->self;
    if (!hold_is_live(all->catalog, &holder.node) ||
        (holder.node.boot == self->boot && strcmp(holder.node.name, self->name) == 0))
        return 0;
    if (all->count == all->room) {
        size_t room = all->room ? 2 * all->room : 8;
        struct model_holder *more = realloc(all->holders, room * sizeof(*more));
        if (!more)
            return -ENOMEM;
        all->holders = more;
        all->room = room;
    }
    holder.node = tree_node_find(all->catalog->tree, holder.node.name)->node;
    holder.revision = event->revision;
    all->holders[all->count++] = holder;
    return 0;
}

int hold_holders(struct catalog *c, const struct change *change)
{
    char key[CODEC_KEY_MAX];
    struct hold_holders all = {.catalog = c};
    uint64_t revision;
    codec_key_holders(&change->version.id, key);
    int rc = feed_answer(c, c->store->ops->list(c->store, key, hold_holders_each, &all, &revision));
    if (rc == 0)
        change->holders_done(change->arg, 0, all.holders, all.count);
    free(all.holders);
    return rc;
}

struct hold_census {
    struct catalog *catalog;
    catalog_census_each each;
    void *arg;
    struct model_id version; /* that is being counted */
    uint32_t holders;
    uint32_t complete;
};

static void hold_census_tell(struct hold_census *census)
{
    if (census->holders > 0)
        census->each(census->arg, &census->version, census->holders, census->complete);
    census->holders = 0;
    census->complete = 0;
}

static int hold_census_each(void *arg, const struct meta_event *event)
{
    struct hold_census *census = arg;
    struct codec_key key;
    struct model_holder holder = {0};
    int rc = codec_key_parse(event->key, &key);
    if (rc == 0)
        rc = codec_holder_decode(event->value, &holder);
    if (rc < 0) {
        feed_bad_note(census->catalog, event->key, event->revision, rc);
        return 0;
    }
    if (!model_id_equal(&key.version, &census->version)) {
        hold_census_tell(census);
        census->version = key.version;
    }
    if (hold_is_live(census->catalog, &holder.node)) {
        census->holders++;
        census->complete += holder.complete;
    }
    return 0;
}

int hold_census(struct catalog *c, catalog_census_each each, void *arg)
{
    struct hold_census census = {.catalog = c, .each = each, .arg = arg};
    uint64_t revision;
    int rc = feed_answer(
        c, c->store->ops->list(c->store, CODEC_HOLDERS, hold_census_each, &census, &revision));
    if (rc == 0)
        hold_census_tell(&census);
    return rc;
}
