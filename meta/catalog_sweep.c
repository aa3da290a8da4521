#include "meta/catalog_inside.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "meta/base/log.h"
#include "meta/base/util.h"

#define SWEEP_UNNAMED_MS    60000 /* how long a directory without a name is left alone */
#define SWEEP_PERIOD_MIN_MS 1000
#define SWEEP_PERIOD_MAX_MS 60000
#define SWEEP_LOCK          "sweep"
#define SWEEP_ENTRY_STEPS   3 /* writes, and compares, that removing one entry takes at most */

/* ---- what nobody reaches ---- */

/* An entry at the end of a way down from `dir`, so that what is removed is always empty. NULL: dir is empty. */
static const struct tree_entry *sweep_deepest(const struct catalog *c, uint64_t dir,
                                              uint64_t *parent)
{
    const struct tree_entry *entry = NULL;
    *parent = dir;
    for (int depth = 0; depth < MODEL_PATH_MAX; depth++) {
        const struct tree_dir *found = tree_dir_find(c->tree, *parent);
        const struct tree_entry *child = found ? found->children : NULL;
        if (!child)
            break;
        entry = child;
        if (entry->kind != MODEL_DIR)
            break;
        *parent = entry->id;
    }
    return entry;
}

/* Adds the removal of `entry`, unless the plan is full or already writes what it would. */
static bool sweep_plan_entry(struct catalog *c, struct plan *plan, const struct tree_entry *entry)
{
    char key[CODEC_KEY_MAX];
    if (plan->compare_count + SWEEP_ENTRY_STEPS > META_TXN_MAX ||
        plan->write_count + SWEEP_ENTRY_STEPS > META_TXN_MAX)
        return false;
    if (entry->kind == MODEL_FILE) {
        codec_key_version(&entry->version->id, key);
        if (plan_writes(plan, key))
            return false; /* another name of the same version: in the next batch */
    }
    plan_remove_entry(c, plan, entry);
    return true;
}

/* The directory itself, once nothing is left in it. */
static int sweep_clear_dir(struct catalog *c, struct plan *plan, uint64_t id)
{
    char key[CODEC_KEY_MAX];
    const struct tree_dir *dir = tree_dir_find(c->tree, id);
    if (!dir || dir->revision == 0)
        return 1;
    codec_key_children(id, key);
    if (feed_any_bad_below(c, key))
        return 1; /* left alone, like what is in it */
    plan_compare(plan, META_EMPTY, key, 0);
    codec_key_dir(id, key);
    plan_compare(plan, META_REVISION, key, dir->revision);
    plan_delete(plan, key);
    return 0;
}

int sweep_clear(struct catalog *c)
{
    struct plan plan = {0};
    if (c->doomed_count == 0)
        return 0;
    uint64_t dir = c->doomed[c->doomed_count - 1];
    uint64_t parent;
    const struct tree_entry *entry = sweep_deepest(c, dir, &parent);
    bool done = false;
    if (dir == MODEL_ROOT || tree_entry_by_id(c->tree, dir)) {
        done = true; /* it has a name (again) */
    } else if (!entry) {
        done = sweep_clear_dir(c, &plan, dir) != 0;
    } else if (entry->kind == MODEL_DIR) {
        char key[CODEC_KEY_MAX];
        codec_key_children(entry->id, key);
        if (feed_any_bad_below(c, key))
            done = true;
        else
            plan_remove_entry(c, &plan, entry);
    } else {
        /* siblings of one directory, as many as one transaction takes */
        for (const struct tree_entry *e = entry; e; e = e->next) {
            if (e->kind != MODEL_DIR && !sweep_plan_entry(c, &plan, e))
                break;
        }
    }
    int rc = plan.write_count > 0 ? plan_commit(c, &plan) : 0;
    plan_clear(&plan);
    if (rc == -EAGAIN) {
        size_t news = 0;
        rc = feed_pull(c, 0, -1, &news);
        done = news == 0; /* nothing explains it: a later round tries again */
    }
    if (rc == 0 && done)
        c->doomed_count--;
    return rc;
}

/* A live node is still filling it. */
static bool sweep_is_staged(const struct catalog *c, const struct tree_dir *dir)
{
    if (!dir->stager)
        return false;
    const struct tree_node *node = tree_node_find(c->tree, dir->stager);
    return node && node->node.boot == dir->stager_boot;
}

static void sweep_find_unnamed(struct catalog *c, uint64_t now)
{
    uint64_t patience = SWEEP_UNNAMED_MS;
    if (c->orphan_ttl_s != 0 && (uint64_t)c->orphan_ttl_s * 1000 < patience)
        patience = (uint64_t)c->orphan_ttl_s * 1000;
    for (struct tree_dir *dir = c->tree->dirs; dir; dir = dir->hh.next) {
        if (dir->id == MODEL_ROOT || tree_entry_by_id(c->tree, dir->id) ||
            sweep_is_staged(c, dir)) {
            dir->unnamed_ms = 0;
        } else if (dir->unnamed_ms == 0) {
            dir->unnamed_ms = now;
        } else if (now - dir->unnamed_ms >= patience) {
            change_doom(c, dir->id);
        }
    }
}

/* ---- versions that nobody holds ---- */

static void sweep_seen(void *arg, const struct model_id *id, uint32_t holders, uint32_t complete)
{
    struct catalog *c = arg;
    struct tree_version *version = tree_version_find(c->tree, id);
    (void)holders;
    (void)complete;
    if (version)
        version->held_at = c->sweep_clock;
}

static bool sweep_is_orphan(const struct catalog *c, const struct tree_version *version)
{
    char key[CODEC_KEY_MAX];
    if (c->sweep_clock - version->held_at < (uint64_t)c->orphan_ttl_s * 1000)
        return false;
    codec_key_version(&version->id, key);
    return !feed_is_bad(c, key);
}

/* Removes one name as unlink would, if still nobody holds what it leads to. */
static int sweep_remove_orphan(struct catalog *c, const struct tree_entry *entry)
{
    char key[CODEC_KEY_MAX];
    struct plan plan = {0};
    uint64_t parent = entry->parent;
    char name[MODEL_NAME_MAX + 1];
    memcpy(name, entry->name, strlen(entry->name) + 1);
    codec_key_holders(&entry->version->id, key);
    plan_compare(&plan, META_EMPTY, key, 0);
    plan_remove_entry(c, &plan, entry);
    int rc = plan_commit(c, &plan);
    plan_clear(&plan);
    if (rc == -EAGAIN)
        return feed_pull(c, 0, -1, NULL); /* a holder came, or the name changed */
    if (rc < 0)
        return rc;
    log_info("removed \"%s\": for %u s no live node has held it", name, c->orphan_ttl_s);
    feed_tell_name(c, parent, name);
    return 0;
}

static int sweep_remove_orphans(struct catalog *c)
{
    int rc = 0;
    struct tree_entry *entry;
    struct tree_entry *next;
    /* removing one entry frees that entry alone, so `next` stands; a pull may free any, so begin again then */
    HASH_ITER(by_name, c->tree->entries, entry, next) {
        if (entry->kind != MODEL_FILE || !sweep_is_orphan(c, entry->version))
            continue;
        uint64_t before = c->revision;
        rc = sweep_remove_orphan(c, entry);
        if (rc < 0 || c->revision != before)
            break;
    }
    return rc;
}

static bool sweep_any_orphan(const struct catalog *c)
{
    for (const struct tree_version *v = c->tree->versions; v; v = v->hh.next) {
        if (v->names > 0 && sweep_is_orphan(c, v))
            return true;
    }
    return false;
}

static uint64_t sweep_period(const struct catalog *c)
{
    uint64_t period = (uint64_t)c->orphan_ttl_s * 1000 / 8;
    if (c->orphan_ttl_s == 0 || period > SWEEP_PERIOD_MAX_MS)
        period = SWEEP_PERIOD_MAX_MS;
    return period < SWEEP_PERIOD_MIN_MS ? SWEEP_PERIOD_MIN_MS : period;
}

static int sweep_orphans(struct catalog *c)
{
    uint64_t token = 0;
    /* a version counts as held when it is seen first */
    for (struct tree_version *v = c->tree->versions; v; v = v->hh.next) {
        if (v->held_at == 0)
            v->held_at = c->sweep_clock;
    }
    int rc = hold_census(c, sweep_seen, c);
    if (rc < 0 || !sweep_any_orphan(c))
        return rc;
    rc = hold_lease(c);
    if (rc == 0)
        rc = feed_answer(c, meta_lock(c->store, SWEEP_LOCK, c->lease, &token));
    if (rc < 0)
        return rc == -EAGAIN ? 0 : rc; /* another node sweeps */
    rc = sweep_remove_orphans(c);
    int unlocked = feed_answer(c, meta_unlock(c->store, SWEEP_LOCK, token));
    return rc < 0 ? rc : unlocked == -ENOENT ? 0 : unlocked;
}

int sweep_round(struct catalog *c)
{
    uint64_t now = util_now_ms();
    uint64_t period = sweep_period(c);
    if (now < c->sweep_ms)
        return 0;
    /* the clock stands while we don't watch: stopped, suspended, cut off */
    uint64_t passed = now - c->swept_ms;
    c->sweep_clock += passed < 2 * period ? passed : 2 * period;
    c->swept_ms = now;
    c->sweep_ms = now + period - period / 4 + util_random_u64() % (period / 2);
    sweep_find_unnamed(c, now);
    return c->orphan_ttl_s != 0 ? sweep_orphans(c) : 0;
}

void sweep_restart(struct catalog *c)
{
    uint64_t now = util_now_ms();
    c->swept_ms = now;
    c->sweep_ms = now + sweep_period(c);
    c->sweep_clock++;
    for (struct tree_version *v = c->tree->versions; v; v = v->hh.next)
        v->held_at = c->sweep_clock;
    for (struct tree_dir *dir = c->tree->dirs; dir; dir = dir->hh.next)
        dir->unnamed_ms = 0;
}

/* ---- publications without an answer ---- */

void sweep_doubt_add(struct catalog *c, const struct model_id *version)
{
    struct model_id *more = realloc(c->doubts, (c->doubt_count + 1) * sizeof(*more));
    if (!more)
        return; /* it may stay, as an orphan that the sweep removes */
    c->doubts = more;
    c->doubts[c->doubt_count++] = *version;
}

void sweep_doubt_drop(struct catalog *c, const struct model_id *version)
{
    for (size_t i = 0; i < c->doubt_count; i++) {
        if (model_id_equal(&c->doubts[i], version))
            c->doubts[i--] = c->doubts[--c->doubt_count];
    }
}

static const struct tree_entry *sweep_any_name(const struct catalog *c, const struct model_id *id)
{
    const struct tree_version *version = tree_version_find(c->tree, id);
    if (!version || version->names == 0 || version->revision == 0)
        return NULL;
    for (const struct tree_entry *e = c->tree->entries; e; e = e->by_name.next) {
        if (e->kind == MODEL_FILE && e->version == version)
            return e;
    }
    return NULL;
}

int sweep_doubts(struct catalog *c)
{
    while (c->doubt_count > 0) {
        const struct tree_entry *entry = sweep_any_name(c, &c->doubts[c->doubt_count - 1]);
        if (!entry) {
            c->doubt_count--;
            continue;
        }
        struct plan plan = {0};
        log_info("undoing the registration of \"%s\", which was reported as failed", entry->name);
        plan_remove_entry(c, &plan, entry);
        int rc = plan_commit(c, &plan);
        plan_clear(&plan);
        if (rc == -EAGAIN)
            rc = feed_pull(c, 0, -1, NULL);
        if (rc < 0)
            return rc;
    }
    return 0;
}

/* ---- after the service was replaced ---- */

/* A batch of records that the service lacks, each under its key. */
struct sweep_batch {
    struct catalog *catalog;
    char *keys[CATALOG_BATCH];
    char *values[CATALOG_BATCH];
    size_t count;
    size_t written;
};

static int sweep_batch_commit(struct sweep_batch *batch, size_t from, size_t count)
{
    struct plan plan = {0};
    for (size_t i = from; i < from + count; i++) {
        plan_compare(&plan, META_ABSENT, batch->keys[i], 0);
        plan_put(&plan, batch->keys[i], strdup(batch->values[i]), 0);
    }
    int rc = plan_send(batch->catalog, &plan,
                       NULL); /* memory has it already, and learns the rest by listing */
    plan_clear(&plan);
    if (rc == 0)
        batch->written += count;
    return rc;
}

/* Another node may have been faster with some of them. */
static int sweep_batch_flush(struct sweep_batch *batch)
{
    int rc = batch->count > 0 ? sweep_batch_commit(batch, 0, batch->count) : 0;
    if (rc == -EAGAIN) {
        rc = 0;
        for (size_t i = 0; rc == 0 && i < batch->count; i++) {
            rc = sweep_batch_commit(batch, i, 1);
            if (rc == -EAGAIN)
                rc = 0;
        }
    }
    for (size_t i = 0; i < batch->count; i++) {
        free(batch->keys[i]);
        free(batch->values[i]);
    }
    batch->count = 0;
    return rc;
}

/* Takes `value`. */
static int sweep_batch_add(struct sweep_batch *batch, const char *key, char *value)
{
    char *copy = strdup(key);
    if (!copy || !value) {
        free(copy);
        free(value);
        return -ENOMEM;
    }
    batch->keys[batch->count] = copy;
    /* NOLINTNEXTLINE(clang-analyzer-unix.Malloc): the flush frees it */
    batch->values[batch->count] = value;
    batch->count++;
    return batch->count == CATALOG_BATCH ? sweep_batch_flush(batch) : 0;
}

static int sweep_republish_versions(struct catalog *c, struct sweep_batch *batch)
{
    char key[CODEC_KEY_MAX];
    int rc = 0;
    for (const struct tree_version *v = c->tree->versions; rc == 0 && v; v = v->hh.next) {
        struct model_version view;
        if (v->revision == 0 || v->names == 0 || v->mark == c->tree->mark)
            continue;
        tree_version_view(v, &view);
        codec_key_version(&v->id, key);
        rc = sweep_batch_add(batch, key, codec_version_encode(&view));
    }
    return rc == 0 ? sweep_batch_flush(batch) : rc;
}

static int sweep_republish_dirs(struct catalog *c, struct sweep_batch *batch)
{
    char key[CODEC_KEY_MAX];
    int rc = 0;
    for (const struct tree_dir *d = c->tree->dirs; rc == 0 && d; d = d->hh.next) {
        struct model_node stager = {.boot = d->stager_boot};
        if (d->revision == 0 || d->mark == c->tree->mark)
            continue;
        if (d->stager)
            memcpy(stager.name, d->stager, strlen(d->stager) + 1);
        codec_key_dir(d->id, key);
        rc = sweep_batch_add(batch, key, codec_dir_encode(d->stager ? &stager : NULL));
    }
    return rc == 0 ? sweep_batch_flush(batch) : rc;
}

static int sweep_republish_entries(struct catalog *c, struct sweep_batch *batch)
{
    char key[CODEC_KEY_MAX];
    int rc = 0;
    for (const struct tree_entry *e = c->tree->entries; rc == 0 && e; e = e->by_name.next) {
        struct model_entry view;
        if (e->revision == 0 || e->mark == c->tree->mark)
            continue;
        tree_entry_view(e, &view);
        codec_key_entry(e->parent, e->name, key);
        rc = sweep_batch_add(batch, key, codec_entry_encode(&view));
    }
    return rc == 0 ? sweep_batch_flush(batch) : rc;
}

/* A service without an instance gets one. An older state of the service that we knew gets another, so that every node
 * learns of it, also those that list when its revisions have grown again. */
static int sweep_republish_instance(struct catalog *c)
{
    struct plan plan = {0};
    struct model_id instance = model_id_new();
    if (model_id_zero(&c->listed_instance))
        plan_compare(&plan, META_ABSENT, CODEC_INSTANCE, 0);
    else if (model_id_equal(&c->listed_instance, &c->instance))
        plan_compare(&plan, META_REVISION, CODEC_INSTANCE, c->instance_revision);
    else
        return 0; /* another node was here before */
    plan_put(&plan, CODEC_INSTANCE, codec_instance_encode(&instance), 0);
    int rc = plan_send(c, &plan, NULL);
    plan_clear(&plan);
    if (rc < 0 && rc != -EAGAIN)
        return rc;
    memset(&c->listed_instance, 0, sizeof(c->listed_instance)); /* the next listing says which */
    return 0;
}

int sweep_republish(struct catalog *c)
{
    struct sweep_batch batch = {.catalog = c};
    if (c->store->read_only)
        return 0; /* memory follows the service */
    /* names last, so that each leads somewhere as soon as others see it */
    int rc = sweep_republish_instance(c);
    if (rc == 0)
        rc = sweep_republish_versions(c, &batch);
    if (rc == 0)
        rc = sweep_republish_dirs(c, &batch);
    if (rc == 0)
        rc = sweep_republish_entries(c, &batch);
    for (size_t i = 0; i < batch.count; i++) {
        free(batch.keys[i]);
        free(batch.values[i]);
    }
    log_warn("the metadata service came back empty or in an older state; this node restored %zu "
             "records from memory",
             batch.written);
    return rc;
}

int sweep_instance(struct catalog *c)
{
    bool wanted = model_id_zero(&c->listed_instance) && !c->store->read_only;
    return wanted ? sweep_republish_instance(c) : 0;
}
