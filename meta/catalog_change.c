#include "meta/catalog_inside.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "meta/base/log.h"
#include "meta/base/util.h"

#define CHANGE_TRIES       7    /* without news */
#define CHANGE_PATIENCE_MS 5000 /* with news: others are changing the same */

/* ---- what most changes ask first ---- */

/* A new name in a directory: whether memory would allow it. */
static int change_check_name(const struct catalog *c, uint64_t parent, const char *name)
{
    char key[CODEC_KEY_MAX];
    int rc = model_name_check(name);
    if (rc < 0)
        return rc;
    if (!tree_dir_stands(c->tree, parent)) {
        const struct tree_entry *entry = tree_entry_by_id(c->tree, parent);
        return entry && entry->kind != MODEL_DIR ? -ENOTDIR : -ENOENT;
    }
    size_t above = tree_path_length(c->tree, parent);
    if (above + (above > 0) + strlen(name) > MODEL_PATH_MAX)
        return -ENAMETOOLONG;
    codec_key_entry(parent, name, key);
    return feed_is_bad(c, key) ? -EIO : 0;
}

static int change_find(const struct catalog *c, uint64_t parent, const char *name,
                       struct tree_entry **out)
{
    char key[CODEC_KEY_MAX];
    int rc = model_name_check(name);
    if (rc < 0)
        return rc;
    *out = tree_entry_find(c->tree, parent, name);
    if (*out)
        return 0;
    codec_key_entry(parent, name, key);
    return feed_is_bad(c, key) ? -EIO : -ENOENT;
}

/* Random, but never a small number: those are for the root and for what a mount makes up. */
static uint64_t change_id_new(const struct catalog *c)
{
    uint64_t id;
    do {
        id = util_random_u64() >> 1;
    } while (id < 1u << 20 || tree_entry_by_id(c->tree, id));
    return id;
}

static void change_result(struct change *change, uint64_t parent, const char *name)
{
    change->result_parent = parent;
    change->result_name = name;
}

/* The entry that the change makes, without what its kind adds. */
static struct model_entry change_entry(struct catalog *c, struct change *change,
                                       enum model_kind kind)
{
    if (change->id == 0)
        change->id = change_id_new(c);
    change_result(change, change->parent, change->name);
    return (struct model_entry){
        .id = change->id,
        .parent = change->parent,
        .name = change->name,
        .kind = kind,
        .attr = change->attr,
    };
}

static bool change_is_empty(const struct catalog *c, uint64_t dir, bool *bad)
{
    char key[CODEC_KEY_MAX];
    const struct tree_dir *found = tree_dir_find(c->tree, dir);
    codec_key_children(dir, key);
    *bad = feed_any_bad_below(c, key);
    return (!found || !found->children) && !*bad;
}

/* ---- building: 0 the plan is ready; 1 there is nothing to do; or the error ---- */

static int change_build_mkdir(struct catalog *c, struct change *change, struct plan *plan)
{
    char key[CODEC_KEY_MAX];
    int rc = change_check_name(c, change->parent, change->name);
    if (rc < 0)
        return rc;
    if (tree_entry_find(c->tree, change->parent, change->name))
        return -EEXIST;
    struct model_entry entry = change_entry(c, change, MODEL_DIR);
    plan_parent_stands(plan, change->parent);
    plan_name_is(plan, change->parent, change->name, NULL);
    plan_put_entry(plan, &entry);
    codec_key_dir(change->id, key);
    plan_compare(plan, META_ABSENT, key, 0);
    plan_put(plan, key, codec_dir_encode(NULL), 0);
    return 0;
}

static int change_build_symlink(struct catalog *c, struct change *change, struct plan *plan)
{
    int rc = change_check_name(c, change->parent, change->name);
    if (rc < 0)
        return rc;
    if (tree_entry_find(c->tree, change->parent, change->name))
        return -EEXIST;
    struct model_entry entry = change_entry(c, change, MODEL_SYMLINK);
    entry.target = change->target;
    plan_parent_stands(plan, change->parent);
    plan_name_is(plan, change->parent, change->name, NULL);
    plan_put_entry(plan, &entry);
    return 0;
}

static int change_build_publish(struct catalog *c, struct change *change, struct plan *plan)
{
    char key[CODEC_KEY_MAX];
    const struct model_version *version = &change->version;
    int rc = change_check_name(c, change->parent, change->name);
    if (rc < 0)
        return rc;
    const struct tree_entry *old = tree_entry_find(c->tree, change->parent, change->name);
    if (old && old->kind == MODEL_DIR)
        return -EISDIR;
    if (old && old->kind == MODEL_FILE && model_id_equal(&old->version->id, &version->id)) {
        /* asked again, because nobody heard the answer */
        change_result(change, change->parent, change->name);
        return hold_build_announce(c, change, plan);
    }
    if (old && !(change->flags & CATALOG_OVERWRITE))
        return -EEXIST;
    const struct tree_version *known = tree_version_find(c->tree, &version->id);
    rc = hold_lease(c);
    if (rc < 0)
        return rc;
    struct model_entry entry = change_entry(c, change, MODEL_FILE);
    entry.version = version->id;
    entry.size = version->size;
    plan_parent_stands(plan, change->parent);
    plan_name_is(plan, change->parent, change->name, old);
    plan_put_entry(plan, &entry);
    if (known && known->revision != 0) {
        plan_name_version(plan, known);
    } else {
        codec_key_version(&version->id, key);
        plan_compare(plan, META_ABSENT, key, 0);
        plan_put(plan, key, codec_version_encode(version), 0);
    }
    if (old && old->kind == MODEL_FILE)
        plan_unname_version(c, plan, old->version);
    hold_plan_put(c, plan, &version->id, (change->flags & CATALOG_COMPLETE) != 0);
    return 0;
}

static int change_build_link(struct catalog *c, struct change *change, struct plan *plan)
{
    const struct tree_entry *source = tree_entry_by_id(c->tree, change->id);
    int rc = change_check_name(c, change->parent, change->name);
    if (rc < 0)
        return rc;
    if (!source)
        return -ENOENT;
    if (source->kind == MODEL_DIR)
        return -EPERM;
    if (source->kind == MODEL_FILE && source->version->revision == 0)
        return -EIO;
    if (tree_entry_find(c->tree, change->parent, change->name))
        return -EEXIST;
    struct model_entry entry;
    tree_entry_view(source, &entry);
    entry.id = change_id_new(c);
    entry.parent = change->parent;
    entry.name = change->name;
    change_result(change, change->parent, change->name);
    plan_parent_stands(plan, change->parent);
    plan_name_is(plan, change->parent, change->name, NULL);
    plan_put_entry(plan, &entry);
    if (source->kind == MODEL_FILE)
        plan_name_version(plan, source->version);
    return 0;
}

/* Whether `from` may replace `to` (not by exchange). */
static int change_check_replace(const struct catalog *c, const struct tree_entry *from,
                                const struct tree_entry *to, unsigned flags)
{
    bool bad;
    if (flags & CATALOG_NOREPLACE)
        return -EEXIST;
    if (from->kind == MODEL_DIR && to->kind != MODEL_DIR)
        return -ENOTDIR;
    if (from->kind != MODEL_DIR && to->kind == MODEL_DIR)
        return -EISDIR;
    if (to->kind == MODEL_DIR)
        return change_is_empty(c, to->id, &bad) ? 0 : -ENOTEMPTY;
    if (to->kind == MODEL_FILE && !(flags & CATALOG_OVERWRITE))
        return -EPERM;
    return 0;
}

/* Directories that change their parent do so one after the other, so that no two form a loop. */
static void change_plan_move(struct catalog *c, struct plan *plan)
{
    if (c->renames_revision != 0)
        plan_compare(plan, META_REVISION, CODEC_RENAMES, c->renames_revision);
    else
        plan_compare(plan, META_ABSENT, CODEC_RENAMES, 0);
    plan_put(plan, CODEC_RENAMES, strdup(CODEC_PLAIN), 0);
}

static int change_plan_exchange(struct catalog *c, const struct change *change, struct plan *plan,
                                const struct tree_entry *from, const struct tree_entry *to)
{
    struct model_entry here;
    struct model_entry there;
    if (!(change->flags & CATALOG_OVERWRITE) &&
        (from->kind == MODEL_FILE || to->kind == MODEL_FILE))
        return -EPERM;
    if (to->kind == MODEL_DIR && tree_is_below(c->tree, from->parent, to->id))
        return -EINVAL;
    tree_entry_view(from, &there);
    there.parent = to->parent;
    there.name = change->new_name;
    tree_entry_view(to, &here);
    here.parent = from->parent;
    here.name = change->name;
    plan_name_is(plan, from->parent, from->name, from);
    plan_name_is(plan, to->parent, to->name, to);
    plan_put_entry(plan, &there);
    plan_put_entry(plan, &here);
    if (from->parent != to->parent && (from->kind == MODEL_DIR || to->kind == MODEL_DIR))
        change_plan_move(c, plan);
    return 0;
}

static int change_build_rename(struct catalog *c, struct change *change, struct plan *plan)
{
    char key[CODEC_KEY_MAX];
    struct tree_entry *from;
    int rc = change_find(c, change->parent, change->name, &from);
    if (rc == 0)
        rc = change_check_name(c, change->new_parent, change->new_name);
    if (rc < 0)
        return rc;
    const struct tree_entry *to = tree_entry_find(c->tree, change->new_parent, change->new_name);
    change_result(change, change->new_parent, change->new_name);
    if (from->kind == MODEL_DIR && tree_is_below(c->tree, change->new_parent, from->id))
        return -EINVAL;
    if (change->flags & CATALOG_EXCHANGE) {
        if (!to)
            return -ENOENT;
        return to == from ? 1 : change_plan_exchange(c, change, plan, from, to);
    }
    if (to == from)
        return change->flags & CATALOG_NOREPLACE ? -EEXIST : 1;
    if (to && (rc = change_check_replace(c, from, to, change->flags)) < 0)
        return rc;
    struct model_entry entry;
    tree_entry_view(from, &entry);
    entry.parent = change->new_parent;
    entry.name = change->new_name;
    plan_parent_stands(plan, change->new_parent);
    plan_name_is(plan, change->parent, change->name, from);
    plan_name_is(plan, change->new_parent, change->new_name, to);
    codec_key_entry(change->parent, change->name, key);
    plan_delete(plan, key);
    plan_put_entry(plan, &entry);
    if (from->kind == MODEL_DIR && change->parent != change->new_parent)
        change_plan_move(c, plan);
    if (to && to->kind == MODEL_FILE)
        plan_unname_version(c, plan, to->version);
    if (to && to->kind == MODEL_DIR) {
        codec_key_children(to->id, key);
        plan_compare(plan, META_EMPTY, key, 0);
        codec_key_dir(to->id, key);
        plan_delete(plan, key);
    }
    return 0;
}

static int change_build_unlink(struct catalog *c, struct change *change, struct plan *plan)
{
    struct tree_entry *entry;
    int rc = change_find(c, change->parent, change->name, &entry);
    if (rc < 0)
        return rc;
    if (entry->kind == MODEL_DIR)
        return -EISDIR;
    plan_remove_entry(c, plan, entry);
    return 0;
}

static int change_build_rmdir(struct catalog *c, struct change *change, struct plan *plan)
{
    bool bad;
    struct tree_entry *entry;
    int rc = change_find(c, change->parent, change->name, &entry);
    if (rc < 0)
        return rc;
    if (entry->kind != MODEL_DIR)
        return -ENOTDIR;
    if (!change_is_empty(c, entry->id, &bad)) {
        if (bad)
            log_warn("directory %s is not empty: it holds a name whose record can't be decoded",
                     change->name);
        return -ENOTEMPTY;
    }
    plan_remove_entry(c, plan, entry);
    return 0;
}

/* Only the top name; the directory's own record stays until all below is cleared. */
static int change_build_remove_tree(struct catalog *c, struct change *change, struct plan *plan)
{
    char key[CODEC_KEY_MAX];
    struct tree_entry *entry;
    int rc = change_find(c, change->parent, change->name, &entry);
    change->id = 0;
    if (rc < 0)
        return rc;
    if (entry->kind != MODEL_DIR) {
        plan_remove_entry(c, plan, entry);
        return 0;
    }
    change->id = entry->id;
    codec_key_entry(entry->parent, entry->name, key);
    plan_compare(plan, META_REVISION, key, entry->revision);
    plan_delete(plan, key);
    return 0;
}

static int change_build_setattr(struct catalog *c, struct change *change, struct plan *plan)
{
    const struct tree_entry *old = tree_entry_by_id(c->tree, change->id);
    struct model_entry entry;
    if (!old)
        return -ENOENT;
    tree_entry_view(old, &entry);
    if (change->flags & CATALOG_SET_MODE)
        entry.attr.mode = change->attr.mode;
    if (change->flags & CATALOG_SET_UID)
        entry.attr.uid = change->attr.uid;
    if (change->flags & CATALOG_SET_GID)
        entry.attr.gid = change->attr.gid;
    if (change->flags & CATALOG_SET_MTIME)
        entry.attr.mtime_ns = change->attr.mtime_ns;
    change->result_id = change->id;
    plan_name_is(plan, entry.parent, entry.name, old);
    plan_put_entry(plan, &entry);
    return 0;
}

static int change_build_tree_begin(struct catalog *c, struct change *change, struct plan *plan)
{
    char key[CODEC_KEY_MAX];
    codec_key_dir(change->id, key);
    plan_compare(plan, META_ABSENT, key, 0);
    plan_put(plan, key, codec_dir_encode(&c->self), 0);
    return 0;
}

/* A directory that tree_begin made and that has no name yet. */
static int change_find_staged(const struct catalog *c, uint64_t id, const struct tree_dir **out)
{
    *out = tree_dir_find(c->tree, id);
    if (!*out || (*out)->revision == 0)
        return -ENOENT;
    return id == MODEL_ROOT || tree_entry_by_id(c->tree, id) ? -EINVAL : 0;
}

static int change_build_tree_attach(struct catalog *c, struct change *change, struct plan *plan)
{
    char key[CODEC_KEY_MAX];
    const struct tree_dir *dir;
    int rc = change_find_staged(c, change->id, &dir);
    if (rc == 0)
        rc = change_check_name(c, change->parent, change->name);
    if (rc < 0)
        return rc;
    if (tree_entry_find(c->tree, change->parent, change->name))
        return -EEXIST;
    if (tree_is_below(c->tree, change->parent, change->id))
        return -EINVAL;
    struct model_entry entry = change_entry(c, change, MODEL_DIR);
    plan_parent_stands(plan, change->parent);
    plan_name_is(plan, change->parent, change->name, NULL);
    plan_put_entry(plan, &entry);
    codec_key_dir(change->id, key);
    plan_compare(plan, META_REVISION, key, dir->revision);
    plan_put(plan, key, codec_dir_encode(NULL), 0);
    return 0;
}

/* Nobody's any more: if we die before all is cleared, another node's sweep finds it. */
static int change_build_tree_drop(struct catalog *c, struct change *change, struct plan *plan)
{
    char key[CODEC_KEY_MAX];
    const struct tree_dir *dir;
    int rc = change_find_staged(c, change->id, &dir);
    if (rc < 0)
        return rc;
    codec_key_dir(change->id, key);
    plan_compare(plan, META_REVISION, key, dir->revision);
    plan_put(plan, key, codec_dir_encode(NULL), 0);
    return 0;
}

static int change_build_seal(struct catalog *c, struct change *change, struct plan *plan)
{
    char key[CODEC_KEY_MAX];
    struct model_version view;
    const struct tree_version *version = tree_version_find(c->tree, &change->version.id);
    if (!version || version->revision == 0)
        return -ENOENT;
    size_t length = codec_digest_length((enum model_digest)version->digest);
    if (version->sealed)
        return memcmp(version->root, change->root, length) == 0 ? 1 : -EEXIST;
    tree_version_view(version, &view);
    view.sealed = true;
    memcpy(view.root, change->root, length);
    codec_key_version(&view.id, key);
    plan_compare(plan, META_REVISION, key, version->revision);
    plan_put(plan, key, codec_version_encode(&view), 0);
    return 0;
}

static int change_build_holders(struct catalog *c, struct change *change, struct plan *plan)
{
    (void)plan;
    int rc = hold_holders(c, change);
    return rc < 0 ? rc : 1;
}

static int change_build_census(struct catalog *c, struct change *change, struct plan *plan)
{
    (void)plan;
    int rc = hold_census(c, change->census_each, change->arg);
    return rc < 0 ? rc : 1;
}

/* ---- running ---- */

static void change_settled_tree(struct catalog *c, const struct change *change)
{
    if (change->id != 0)
        change_doom(c, change->id);
}

struct change_ops {
    int (*build)(struct catalog *c, struct change *change, struct plan *plan);
    void (*settled)(struct catalog *c, const struct change *change); /* after its transaction */
    bool
        shares; /* a transaction with its like: what it builds depends on nothing that they write */
};
static const struct change_ops change_table[CHANGE_KINDS];

void change_doom(struct catalog *c, uint64_t dir)
{
    for (size_t i = 0; i < c->doomed_count; i++) {
        if (c->doomed[i] == dir)
            return;
    }
    uint64_t *more = realloc(c->doomed, (c->doomed_count + 1) * sizeof(*more));
    if (!more)
        return; /* the sweep finds it again */
    c->doomed = more;
    c->doomed[c->doomed_count++] = dir;
}

int change_run(struct catalog *c, struct change *change)
{
    const struct change_ops *ops = &change_table[change->kind];
    struct plan plan = {0};
    uint64_t end = util_now_ms() + CHANGE_PATIENCE_MS;
    int tries = 0; /* without any news that would explain why the service says no */
    int rc;
    for (;;) {
        size_t news = 0;
        plan_clear(&plan);
        rc = ops->build(c, change, &plan);
        if (rc != 0)
            break;
        rc = plan_commit(c, &plan);
        if (rc == 0 && ops->settled)
            ops->settled(c, change);
        if (rc == -ENOENT)
            rc = hold_recover(c);
        else if (rc == -EAGAIN)
            rc = feed_pull(c, tries > 0 ? 1u << tries : 0, -1, &news);
        else
            break;
        if (rc < 0)
            break;
        tries += news == 0;
        if (tries > CHANGE_TRIES || util_now_ms() > end) {
            log_warn("the metadata service refuses a change of \"%s\" that nothing seems to stand "
                     "against; giving up",
                     change->name ? change->name : "");
            rc = -EIO;
            break;
        }
    }
    plan_clear(&plan);
    return rc > 0 ? 0 : rc;
}

/* Adds the change to the plan. false: it has to be run alone, and the plan is as it was. */
static bool change_join(struct catalog *c, struct change *change, struct plan *plan)
{
    const struct change_ops *ops = &change_table[change->kind];
    struct plan_mark mark = plan_mark(plan);
    if (ops->shares && ops->build(c, change, plan) == 0 && plan_stands_beside(plan, &mark))
        return true;
    plan_rewind(plan, &mark);
    return false;
}

size_t change_run_together(struct catalog *c, struct change *first, int *status)
{
    struct plan plan = {0};
    struct change *change = first;
    size_t count = 0;
    if (!first->next) /* alone, as most are */
        return 0;
    for (; change && change_join(c, change, &plan); change = change->next)
        count++;
    *status = count > 1 ? plan_commit(c, &plan) : 0;
    plan_clear(&plan);
    if (count <= 1 || (*status < 0 && c->failed == 0))
        return 0; /* run one by one, each learns what stands against it */
    for (struct change *each = first; *status == 0 && each != change; each = each->next) {
        if (change_table[each->kind].settled)
            change_table[each->kind].settled(c, each);
    }
    return count;
}

static const struct tree_entry *change_find_result(const struct catalog *c,
                                                   const struct change *change)
{
    if (change->result_name)
        return tree_entry_find(c->tree, change->result_parent, change->result_name);
    return change->result_id != 0 ? tree_entry_by_id(c->tree, change->result_id) : NULL;
}

void change_finish(struct catalog *c, struct change *change, int status)
{
    struct model_entry view;
    if (status == -EBADMSG || status == -ESTALE || status == -EAGAIN || status == -E2BIG)
        status = -EIO;
    const struct tree_entry *entry = status == 0 ? change_find_result(c, change) : NULL;
    if (entry)
        tree_entry_view(entry, &view);
    if (change->kind == CHANGE_HOLDERS) {
        if (status < 0) /* otherwise the list has been handed over already */
            change->holders_done(change->arg, status, NULL, 0);
    } else if (change->done) {
        change->done(change->arg, status, entry ? &view : NULL);
    }
    change_free(change);
}

void change_free(struct change *change)
{
    free(change->name);
    free(change->new_name);
    free(change->target);
    model_version_clear(&change->version);
    free(change);
}

static const struct change_ops change_table[CHANGE_KINDS] = {
    [CHANGE_MKDIR] = {.build = change_build_mkdir},
    [CHANGE_SYMLINK] = {.build = change_build_symlink},
    [CHANGE_PUBLISH] = {.build = change_build_publish, .settled = hold_announced, .shares = true},
    [CHANGE_LINK] = {.build = change_build_link},
    [CHANGE_RENAME] = {.build = change_build_rename},
    [CHANGE_UNLINK] = {.build = change_build_unlink},
    [CHANGE_RMDIR] = {.build = change_build_rmdir},
    [CHANGE_REMOVE_TREE] = {.build = change_build_remove_tree, .settled = change_settled_tree},
    [CHANGE_SETATTR] = {.build = change_build_setattr},
    [CHANGE_TREE_BEGIN] = {.build = change_build_tree_begin},
    [CHANGE_TREE_ATTACH] = {.build = change_build_tree_attach},
    [CHANGE_TREE_DROP] = {.build = change_build_tree_drop, .settled = change_settled_tree},
    [CHANGE_SEAL] = {.build = change_build_seal, .shares = true},
    [CHANGE_ANNOUNCE] = {.build = hold_build_announce, .settled = hold_announced, .shares = true},
    [CHANGE_WITHDRAW] = {.build = hold_build_withdraw, .settled = hold_withdrawn},
    [CHANGE_SERVE] = {.build = hold_build_serve, .settled = hold_served},
    [CHANGE_HOLDERS] = {.build = change_build_holders},
    [CHANGE_CENSUS] = {.build = change_build_census},
};
