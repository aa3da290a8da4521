#include "meta/catalog_inside.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "meta/base/log.h"
#include "meta/base/util.h"

/* A record that could not be decoded, and when that was said. */
struct feed_bad {
    UT_hash_handle hh;
    uint64_t revision;
    uint32_t mark;
    char key[];
};

/* A key that we deleted: what the feed still tells of it from before is no news. */
struct feed_tomb {
    UT_hash_handle hh;
    uint64_t revision;
    char key[];
};

int feed_answer(struct catalog *c, int rc)
{
    switch (-rc) {
    case EAGAIN:
    case ENOENT:
    case ESTALE:
    case ENOMEM:
    case ENOSPC:
    case EOPNOTSUPP:
        return rc;
    }
    if (rc < 0)
        c->failed = rc;
    return rc;
}

/* ---- notes ---- */

static void feed_note(struct catalog *c, const struct note *from, const char *name)
{
    struct note *note = malloc(sizeof(*note) + strlen(name) + 1);
    if (!note) {
        log_warn("out of memory: a change of the namespace is not told to the kernel at once");
        return;
    }
    *note = *from;
    note->next = NULL;
    memcpy(note->name, name, strlen(name) + 1);
    *c->notes_end = note;
    c->notes_end = &note->next;
}

static void feed_note_name(struct catalog *c, uint64_t parent, const char *name,
                           enum feed_source source)
{
    if (source != FEED_OWN && parent != 0)
        feed_note(c, &(struct note){.kind = NOTE_NAME, .parent = parent}, name);
}

static void feed_note_node(struct catalog *c, const struct model_node *node, bool up)
{
    if (strcmp(node->name, c->self.name) != 0 || node->boot != c->self.boot)
        feed_note(c, &(struct note){.kind = NOTE_NODE, .up = up}, node->name);
}

void feed_tell_name(struct catalog *c, uint64_t parent, const char *name)
{
    feed_note_name(c, parent, name, FEED_CHANGE);
    feed_tell(c);
}

void feed_tell(struct catalog *c)
{
    const struct catalog_events *events = &c->events;
    while (c->notes) {
        struct note *note = c->notes;
        c->notes = note->next;
        if (!c->notes)
            c->notes_end = &c->notes;
        switch (note->kind) {
        case NOTE_NAME:
            if (events->name_changed)
                events->name_changed(events->arg, note->parent, note->name);
            break;
        case NOTE_GONE:
            if (events->version_gone)
                events->version_gone(events->arg, &note->version);
            break;
        case NOTE_SEALED:
            if (events->version_sealed)
                events->version_sealed(events->arg, &note->version);
            break;
        case NOTE_NODE:
            if (events->node_changed)
                events->node_changed(events->arg, note->name, note->up);
            break;
        }
        free(note);
    }
}

/* ---- bad records ---- */

static struct feed_bad *feed_bad_find(const struct catalog *c, const char *key)
{
    struct feed_bad *bad;
    HASH_FIND_STR(c->bad, key, bad);
    return bad;
}

bool feed_is_bad(const struct catalog *c, const char *key)
{
    return feed_bad_find(c, key) != NULL;
}

bool feed_any_bad_below(const struct catalog *c, const char *prefix)
{
    for (const struct feed_bad *bad = c->bad; bad; bad = bad->hh.next) {
        if (strncmp(bad->key, prefix, strlen(prefix)) == 0)
            return true;
    }
    return false;
}

void feed_bad_note(struct catalog *c, const char *key, uint64_t revision, int error)
{
    struct feed_bad *bad = feed_bad_find(c, key);
    bool said = bad && bad->revision == revision;
    if (!bad) {
        bad = calloc(1, sizeof(*bad) + strlen(key) + 1);
        if (bad) {
            memcpy(bad->key, key, strlen(key) + 1);
            HASH_ADD_STR(c->bad, key, bad);
            if (!bad->hh.tbl) {
                free(bad);
                bad = NULL;
            }
        }
    }
    if (bad) {
        bad->revision = revision;
        bad->mark = c->tree->mark;
    }
    if (said)
        return;
    if (error == -EPROTONOSUPPORT)
        log_warn("metadata record %s has another format version; it is left alone and not shown: "
                 "run the p2pfs that wrote it",
                 key);
    else
        log_warn("metadata record %s is malformed; it is left alone and not shown: remove or "
                 "repair it in the metadata service",
                 key);
}

static void feed_bad_forget(struct catalog *c, const char *key)
{
    struct feed_bad *bad = c->bad ? feed_bad_find(c, key) : NULL;
    if (bad) {
        HASH_DEL(c->bad, bad);
        free(bad);
    }
}

/* ---- our own deletions ---- */

static struct feed_tomb *feed_tomb_find(const struct catalog *c, const char *key)
{
    struct feed_tomb *tomb;
    HASH_FIND_STR(c->tombs, key, tomb);
    return tomb;
}

/* Without memory for it, an old change may show for as long as the feed needs to tell the deletion. */
static void feed_tomb_add(struct catalog *c, const char *key, uint64_t revision)
{
    struct feed_tomb *tomb = feed_tomb_find(c, key);
    if (!tomb) {
        tomb = calloc(1, sizeof(*tomb) + strlen(key) + 1);
        if (!tomb)
            return;
        memcpy(tomb->key, key, strlen(key) + 1);
        HASH_ADD_STR(c->tombs, key, tomb);
        if (!tomb->hh.tbl) {
            free(tomb);
            return;
        }
    }
    tomb->revision = revision;
    if (c->tombs_newest < revision)
        c->tombs_newest = revision;
}

static void feed_tombs_clear(struct catalog *c)
{
    struct feed_tomb *tomb = c->tombs;
    HASH_CLEAR(hh, c->tombs);
    while (tomb) {
        struct feed_tomb *next = tomb->hh.next;
        free(tomb);
        tomb = next;
    }
    c->tombs_newest = 0;
}

/* ---- applying ---- */

/* Whether a change that arrives is older than what memory has. A listing is the truth whatever its revisions:
 * the service may have come back in an older state. */
static bool feed_is_old(const struct catalog *c, uint64_t known, uint64_t revision,
                        enum feed_source source)
{
    if (source == FEED_LIST)
        return known == revision && !c->relearn;
    return known >= revision;
}

/* Whether the user sees no difference: then the kernel need not hear of it. */
static bool feed_looks_same(const struct tree_entry *old, const struct model_entry *entry)
{
    if (!old || old->id != entry->id || old->kind != entry->kind || old->size != entry->size ||
        old->attr.mode != entry->attr.mode || old->attr.uid != entry->attr.uid ||
        old->attr.gid != entry->attr.gid || old->attr.mtime_ns != entry->attr.mtime_ns)
        return false;
    if (entry->kind == MODEL_FILE)
        return model_id_equal(&old->version->id, &entry->version);
    return entry->kind != MODEL_SYMLINK || strcmp(old->target, entry->target) == 0;
}

static int feed_put_entry(struct catalog *c, const struct codec_key *key, const char *value,
                          uint64_t revision, enum feed_source source)
{
    struct tree_entry *old = tree_entry_find(c->tree, key->parent, key->name);
    if (old && feed_is_old(c, old->revision, revision, source)) {
        old->mark = c->tree->mark;
        return 0;
    }
    struct model_entry entry;
    int rc = codec_entry_decode(value, &entry);
    if (rc < 0)
        return rc;
    bool root = key->parent == 0;
    if ((entry.id == MODEL_ROOT) != root || (root && entry.kind != MODEL_DIR) ||
        entry.id == key->parent) {
        model_entry_clear(&entry);
        return -EBADMSG;
    }
    entry.parent = key->parent;
    entry.revision = revision;
    entry.name = strdup(key->name);
    bool same = feed_looks_same(old, &entry);
    rc = entry.name ? tree_entry_put(c->tree, &entry) : -ENOMEM;
    model_entry_clear(&entry);
    if (rc == 0 && !same)
        feed_note_name(c, key->parent, key->name, source);
    return rc;
}

static int feed_put_dir(struct catalog *c, const struct codec_key *key, const char *value,
                        uint64_t revision, enum feed_source source)
{
    struct model_node stager;
    struct tree_dir *old = tree_dir_find(c->tree, key->parent);
    if (old && old->revision != 0 && feed_is_old(c, old->revision, revision, source)) {
        old->mark = c->tree->mark;
        return 0;
    }
    int rc = codec_dir_decode(value, &stager);
    return rc < 0 ? rc : tree_dir_put(c->tree, key->parent, revision, &stager);
}

static int feed_put_version(struct catalog *c, const struct codec_key *key, const char *value,
                            uint64_t revision, enum feed_source source)
{
    struct tree_version *old = tree_version_find(c->tree, &key->version);
    if (old && old->revision != 0 && feed_is_old(c, old->revision, revision, source)) {
        old->mark = c->tree->mark;
        return 0;
    }
    struct model_version version;
    int rc = codec_version_decode(value, &version);
    if (rc < 0)
        return rc;
    bool seals = version.sealed && old && old->revision != 0 && !old->sealed;
    version.revision = revision;
    rc =
        model_id_equal(&version.id, &key->version) ? tree_version_put(c->tree, &version) : -EBADMSG;
    if (rc == 0 && seals)
        feed_note(c, &(struct note){.kind = NOTE_SEALED, .version = version.id}, "");
    model_version_clear(&version);
    return rc;
}

static int feed_put_node(struct catalog *c, const struct codec_key *key, const char *value,
                         uint64_t revision, enum feed_source source)
{
    struct tree_node *old = tree_node_find(c->tree, key->name);
    if (old && feed_is_old(c, old->node.revision, revision, source)) {
        old->mark = c->tree->mark;
        return 0;
    }
    struct model_node node;
    int rc = codec_node_decode(value, &node);
    if (rc == 0 && strcmp(node.name, key->name) != 0)
        rc = -EBADMSG;
    if (rc < 0)
        return rc;
    node.revision = revision;
    bool another = !old || old->node.boot != node.boot;
    if (old && another)
        feed_note_node(c, &old->node, false);
    rc = tree_node_put(c->tree, &node);
    if (rc == 0 && (another || source != FEED_OWN))
        feed_note_node(c, &node, true);
    return rc;
}

static int feed_put_other(struct catalog *c, const char *key, const char *value, uint64_t revision,
                          enum feed_source source)
{
    struct model_id instance;
    if (strcmp(key, CODEC_RENAMES) == 0 && revision > c->renames_revision)
        c->renames_revision = revision;
    if (strcmp(key, CODEC_INSTANCE) != 0)
        return 0;
    int rc = codec_instance_decode(value, &instance);
    if (rc < 0)
        return rc;
    if (source == FEED_LIST) {
        c->listed_instance = instance;
        c->instance_revision = revision;
    } else if (model_id_zero(&c->instance))
        c->instance = instance;
    else if (!model_id_equal(&c->instance, &instance))
        c->stale = true; /* another service took this one's place */
    return 0;
}

static void feed_delete_entry(struct catalog *c, struct tree_entry *entry, enum feed_source source)
{
    feed_note_name(c, entry->parent, entry->name, source);
    tree_entry_delete(c->tree, entry);
}

static void feed_delete_version(struct catalog *c, struct tree_version *version)
{
    feed_note(c, &(struct note){.kind = NOTE_GONE, .version = version->id}, "");
    tree_version_delete(c->tree, version);
}

static void feed_delete_node(struct catalog *c, struct tree_node *node)
{
    feed_note_node(c, &node->node, false);
    tree_node_delete(c->tree, node);
}

static void feed_delete(struct catalog *c, const char *text, const struct codec_key *key,
                        uint64_t revision, enum feed_source source)
{
    struct tree_entry *entry;
    struct tree_dir *dir;
    struct tree_version *version;
    struct tree_node *node;
    switch (key->kind) {
    case CODEC_ENTRY:
        entry = tree_entry_find(c->tree, key->parent, key->name);
        if (entry && !feed_is_old(c, entry->revision, revision, source))
            feed_delete_entry(c, entry, source);
        break;
    case CODEC_DIR:
        dir = tree_dir_find(c->tree, key->parent);
        if (dir && dir->revision != 0 && !feed_is_old(c, dir->revision, revision, source))
            tree_dir_delete(c->tree, dir);
        break;
    case CODEC_VERSION:
        version = tree_version_find(c->tree, &key->version);
        if (version && version->revision != 0 &&
            !feed_is_old(c, version->revision, revision, source))
            feed_delete_version(c, version);
        break;
    case CODEC_NODE:
        node = tree_node_find(c->tree, key->name);
        if (node && !feed_is_old(c, node->node.revision, revision, source))
            feed_delete_node(c, node);
        break;
    case CODEC_HOLDER:
    case CODEC_OTHER:
        if (strcmp(text, CODEC_RENAMES) == 0)
            c->renames_revision = 0;
        else if (strcmp(text, CODEC_INSTANCE) == 0)
            c->stale = true;
        break;
    }
}

/* What can't be decoded any more is not shown any more either. Its bytes stay: no version_gone. */
static void feed_hide(struct catalog *c, const struct codec_key *key, enum feed_source source)
{
    struct tree_entry *entry = NULL;
    struct tree_version *version = NULL;
    struct tree_node *node = NULL;
    if (key->kind == CODEC_ENTRY && key->parent != 0)
        entry = tree_entry_find(c->tree, key->parent, key->name);
    else if (key->kind == CODEC_VERSION)
        version = tree_version_find(c->tree, &key->version);
    else if (key->kind == CODEC_NODE)
        node = tree_node_find(c->tree, key->name);
    if (entry)
        feed_delete_entry(c, entry, source);
    if (version)
        tree_version_delete(c->tree, version);
    if (node)
        feed_delete_node(c, node);
}

int feed_apply(struct catalog *c, const char *text, const char *value, uint64_t revision,
               enum feed_source source)
{
    struct codec_key key;
    int rc = codec_key_parse(text, &key);
    if (source == FEED_CHANGE && c->tombs) {
        const struct feed_tomb *tomb = feed_tomb_find(c, text);
        if (tomb && revision <= tomb->revision)
            return 0;
    }
    if (!value) {
        feed_bad_forget(c, text);
        if (rc == 0)
            feed_delete(c, text, &key, revision, source);
        if (source == FEED_OWN)
            feed_tomb_add(c, text, revision);
        return 0;
    }
    if (rc == 0) {
        switch (key.kind) {
        case CODEC_ENTRY:
            rc = feed_put_entry(c, &key, value, revision, source);
            break;
        case CODEC_DIR:
            rc = feed_put_dir(c, &key, value, revision, source);
            break;
        case CODEC_VERSION:
            rc = feed_put_version(c, &key, value, revision, source);
            break;
        case CODEC_NODE:
            rc = feed_put_node(c, &key, value, revision, source);
            break;
        case CODEC_HOLDER:
        case CODEC_OTHER:
            rc = feed_put_other(c, text, value, revision, source);
            break;
        }
    }
    if (rc == -EBADMSG || rc == -EPROTONOSUPPORT) {
        feed_hide(c, &key, source);
        feed_bad_note(c, text, revision, rc);
        return 0;
    }
    if (rc == 0)
        feed_bad_forget(c, text);
    return rc;
}

/* ---- the change feed ---- */

/* A change as it was told, kept until all of its transaction are there: readers see a rename as a whole. */
struct feed_change {
    struct feed_change *next;
    char *value; /* behind the key, NULL: deleted */
    uint64_t revision;
    char key[];
};

struct feed_changes {
    struct feed_change *first;
    struct feed_change **end;
};

static int feed_gather(void *arg, const struct meta_event *event)
{
    struct feed_changes *changes = arg;
    size_t key_size = strlen(event->key) + 1;
    size_t value_size = event->value ? strlen(event->value) + 1 : 0;
    struct feed_change *change = malloc(sizeof(*change) + key_size + value_size);
    if (!change)
        return -ENOMEM;
    memcpy(change->key, event->key, key_size);
    change->value = event->value ? change->key + key_size : NULL;
    if (event->value)
        memcpy(change->value, event->value, value_size);
    change->revision = event->revision;
    change->next = NULL;
    *changes->end = change;
    changes->end = &change->next;
    return 0;
}

static void feed_apply_all(struct catalog *c, const struct feed_change *change)
{
    tree_write_lock(c->tree);
    for (; change; change = change->next) {
        if (feed_apply(c, change->key, change->value, change->revision, FEED_CHANGE) < 0)
            c->stale = true;
    }
    tree_unlock(c->tree);
}

int feed_pull(struct catalog *c, uint32_t timeout_ms, int wake_fd, size_t *news)
{
    struct feed_changes changes = {.end = &changes.first};
    uint64_t revision = c->revision;
    size_t count = 0;
    int rc = feed_answer(c, c->store->ops->wait(c->store, CODEC_TREE, &revision, timeout_ms,
                                                wake_fd, feed_gather, &changes));
    if (rc == 0 && changes.first)
        feed_apply_all(c, changes.first);
    while (changes.first) {
        struct feed_change *change = changes.first;
        changes.first = change->next;
        free(change);
        count++;
    }
    if (rc < 0)
        return rc;
    c->revision = revision;
    if (c->tombs && c->tombs_newest <= revision)
        feed_tombs_clear(c);
    if (news)
        *news = count;
    feed_tell(c);
    return 0;
}

/* ---- listing ---- */

/* A listing of many names takes a while, and readers never wait for the service: one lock per record. */
static int feed_list_each(void *arg, const struct meta_event *event)
{
    struct catalog *c = arg;
    tree_write_lock(c->tree);
    int rc = feed_apply(c, event->key, event->value, event->revision, FEED_LIST);
    tree_unlock(c->tree);
    return rc;
}

/* Removes what the listing did not mention. */
/* NOLINTBEGIN(clang-analyzer-unix.Malloc): the loops took the next one before */
static void feed_remove_unmarked(struct catalog *c)
{
    uint32_t mark = c->tree->mark;
    struct tree_entry *entry;
    struct tree_entry *next_entry;
    HASH_ITER(by_name, c->tree->entries, entry, next_entry) {
        if (entry->mark != mark && (entry->parent != 0 || entry->revision != 0))
            feed_delete_entry(c, entry, FEED_LIST);
    }
    struct tree_dir *dir;
    struct tree_dir *next_dir;
    HASH_ITER(hh, c->tree->dirs, dir, next_dir) {
        if (dir->mark != mark && dir->revision != 0)
            tree_dir_delete(c->tree, dir);
    }
    struct tree_version *version;
    struct tree_version *next_version;
    HASH_ITER(hh, c->tree->versions, version, next_version) {
        if (version->mark != mark && version->revision != 0)
            feed_delete_version(c, version);
    }
    struct tree_node *node;
    struct tree_node *next_node;
    HASH_ITER(hh, c->tree->nodes, node, next_node) {
        if (node->mark != mark)
            feed_delete_node(c, node);
    }
    struct feed_bad *bad;
    struct feed_bad *next_bad;
    HASH_ITER(hh, c->bad, bad, next_bad) {
        if (bad->mark != mark && strncmp(bad->key, CODEC_TREE, strlen(CODEC_TREE)) == 0) {
            HASH_DEL(c->bad, bad);
            free(bad);
        }
    }
}
/* NOLINTEND(clang-analyzer-unix.Malloc) */

int feed_list(struct catalog *c, bool *replaced)
{
    uint64_t revision = 0;
    feed_tombs_clear(c);
    c->tree->mark++;
    memset(&c->listed_instance, 0, sizeof(c->listed_instance));
    c->renames_revision = 0;
    int rc =
        feed_answer(c, c->store->ops->list(c->store, CODEC_TREE, feed_list_each, c, &revision));
    if (rc < 0) {
        feed_tell(c);
        return rc;
    }
    c->listed_revision = revision;
    /* What the service lacks is either removed, or was lost with the service that had it. */
    *replaced =
        !model_id_zero(&c->instance) && (!model_id_equal(&c->instance, &c->listed_instance) ||
                                         revision < c->revision || c->store->epoch != c->epoch);
    if (!*replaced) {
        tree_write_lock(c->tree);
        feed_remove_unmarked(c);
        tree_unlock(c->tree);
        feed_adopt(c);
    }
    feed_tell(c);
    return 0;
}

void feed_adopt(struct catalog *c)
{
    c->instance = c->listed_instance;
    c->revision = c->listed_revision;
    c->epoch = c->store->epoch;
    c->relearn = false;
    c->stale = false;
}

void feed_clear(struct catalog *c)
{
    struct feed_bad *bad = c->bad;
    HASH_CLEAR(hh, c->bad);
    while (bad) {
        struct feed_bad *next = bad->hh.next;
        free(bad);
        bad = next;
    }
    feed_tombs_clear(c);
    while (c->notes) {
        struct note *note = c->notes;
        c->notes = note->next;
        free(note);
    }
    c->notes_end = &c->notes;
}
