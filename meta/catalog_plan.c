#include "meta/catalog_inside.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "meta/base/util.h"

#define PLAN_SHARED_MAX (256 << 10)

void plan_clear(struct plan *plan)
{
    plan_rewind(plan, &(struct plan_mark){0});
}

struct plan_mark plan_mark(const struct plan *plan)
{
    return (struct plan_mark){plan->compare_count, plan->write_count, plan->text_count,
                              plan->bytes};
}

void plan_rewind(struct plan *plan, const struct plan_mark *mark)
{
    for (size_t i = mark->texts; i < plan->text_count; i++)
        free(plan->texts[i]);
    plan->compare_count = mark->compares;
    plan->write_count = mark->writes;
    plan->text_count = mark->texts;
    plan->bytes = mark->bytes;
    plan->error = 0;
}

bool plan_stands_beside(const struct plan *plan, const struct plan_mark *mark)
{
    for (size_t i = mark->writes; i < plan->write_count; i++) {
        if (plan->writes[i].action != META_PUT)
            return false;
        for (size_t k = 0; k < mark->writes; k++) {
            if (strcmp(plan->writes[i].key, plan->writes[k].key) == 0)
                return false;
        }
    }
    return plan->error == 0 && plan->bytes <= PLAN_SHARED_MAX;
}

/* The plan's own; NULL after a failure. */
static char *plan_keep(struct plan *plan, char *text)
{
    if (!text && plan->error == 0)
        plan->error = -ENOMEM;
    if (text) {
        plan->texts[plan->text_count++] = text;
        plan->bytes += strlen(text);
    }
    return text;
}

void plan_compare(struct plan *plan, enum meta_condition condition, const char *key,
                  uint64_t revision)
{
    for (size_t i = 0; condition == META_EXISTS && i < plan->compare_count; i++) {
        if (plan->compares[i].condition == condition && strcmp(plan->compares[i].key, key) == 0)
            return; /* the directory of many new names */
    }
    if (plan->compare_count == META_TXN_MAX) {
        plan->error = -E2BIG;
        return;
    }
    char *copy = plan_keep(plan, strdup(key));
    if (copy)
        plan->compares[plan->compare_count++] =
            (struct meta_compare){.condition = condition, .key = copy, .revision = revision};
}

static void plan_write(struct plan *plan, enum meta_action action, const char *key, char *value,
                       uint64_t lease)
{
    if (plan->write_count == META_TXN_MAX) {
        plan->error = -E2BIG;
        free(value);
        return;
    }
    char *copy = plan_keep(plan, strdup(key));
    if (action == META_PUT)
        value = plan_keep(plan, value);
    if (copy && (value || action != META_PUT))
        plan->writes[plan->write_count++] =
            (struct meta_write){.action = action, .key = copy, .value = value, .lease = lease};
}

void plan_put(struct plan *plan, const char *key, char *value, uint64_t lease)
{
    plan_write(plan, META_PUT, key, value, lease);
}

void plan_delete(struct plan *plan, const char *key)
{
    plan_write(plan, META_DELETE, key, NULL, 0);
}

void plan_delete_prefix(struct plan *plan, const char *prefix)
{
    plan_write(plan, META_DELETE_PREFIX, prefix, NULL, 0);
}

bool plan_writes(const struct plan *plan, const char *key)
{
    for (size_t i = 0; i < plan->write_count; i++) {
        if (strcmp(plan->writes[i].key, key) == 0)
            return true;
    }
    return false;
}

int plan_send(struct catalog *c, const struct plan *plan, uint64_t *revision)
{
    struct meta_txn txn = {
        .compares = plan->compares,
        .compare_count = plan->compare_count,
        .writes = plan->writes,
        .write_count = plan->write_count,
    };
    if (plan->error < 0)
        return plan->error;
    int rc = feed_answer(c, c->store->ops->txn(c->store, &txn));
    if (rc == 0 && revision)
        *revision = txn.revision;
    return rc;
}

int plan_commit(struct catalog *c, const struct plan *plan)
{
    uint64_t revision = 0;
    int rc = plan_send(c, plan, &revision);
    if (rc < 0)
        return rc;
    tree_write_lock(c->tree);
    for (size_t i = 0; i < plan->write_count; i++) {
        const struct meta_write *write = &plan->writes[i];
        /* only the holders of a version are deleted by prefix, and those are not in memory */
        if (write->action != META_DELETE_PREFIX &&
            strncmp(write->key, CODEC_TREE, strlen(CODEC_TREE)) == 0 &&
            feed_apply(c, write->key, write->action == META_PUT ? write->value : NULL, revision,
                       FEED_OWN) < 0)
            c->stale = true;
    }
    tree_unlock(c->tree);
    feed_tell(c);
    return 0;
}

/* ---- shared steps ---- */

void plan_put_entry(struct plan *plan, const struct model_entry *entry)
{
    char key[CODEC_KEY_MAX];
    codec_key_entry(entry->parent, entry->name, key);
    plan_put(plan, key, codec_entry_encode(entry), 0);
}

void plan_parent_stands(struct plan *plan, uint64_t parent)
{
    char key[CODEC_KEY_MAX];
    if (parent == MODEL_ROOT)
        return; /* the root has no record, and nobody removes it */
    codec_key_dir(parent, key);
    plan_compare(plan, META_EXISTS, key, 0);
}

void plan_name_is(struct plan *plan, uint64_t parent, const char *name,
                  const struct tree_entry *entry)
{
    char key[CODEC_KEY_MAX];
    codec_key_entry(parent, name, key);
    if (entry && entry->revision != 0)
        plan_compare(plan, META_REVISION, key, entry->revision);
    else
        plan_compare(plan, META_ABSENT, key, 0);
}

static void plan_put_version(struct plan *plan, const char *key, const struct tree_version *version)
{
    struct model_version view;
    tree_version_view(version, &view);
    plan_put(plan, key, codec_version_encode(&view), 0);
}

void plan_unname_version(struct catalog *c, struct plan *plan, const struct tree_version *version)
{
    char key[CODEC_KEY_MAX];
    codec_key_version(&version->id, key);
    if (version->revision == 0) {
        /* No record, or one that we can't read and therefore leave alone. */
        if (!feed_is_bad(c, key))
            plan_compare(plan, META_ABSENT, key, 0);
        return;
    }
    plan_compare(plan, META_REVISION, key, version->revision);
    if (version->names > 1) {
        /* Rewritten, so that two nodes that remove the last two names don't each leave it to the other. */
        plan_put_version(plan, key, version);
        return;
    }
    plan_delete(plan, key);
    codec_key_holders(&version->id, key);
    plan_delete_prefix(plan, key);
}

void plan_name_version(struct plan *plan, const struct tree_version *version)
{
    char key[CODEC_KEY_MAX];
    codec_key_version(&version->id, key);
    plan_compare(plan, META_REVISION, key, version->revision);
    plan_put_version(plan, key, version);
}

void plan_remove_entry(struct catalog *c, struct plan *plan, const struct tree_entry *entry)
{
    char key[CODEC_KEY_MAX];
    codec_key_entry(entry->parent, entry->name, key);
    plan_compare(plan, META_REVISION, key, entry->revision);
    plan_delete(plan, key);
    if (entry->kind == MODEL_FILE) {
        plan_unname_version(c, plan, entry->version);
    } else if (entry->kind == MODEL_DIR) {
        codec_key_children(entry->id, key);
        plan_compare(plan, META_EMPTY, key, 0);
        codec_key_dir(entry->id, key);
        plan_delete(plan, key);
    }
}
