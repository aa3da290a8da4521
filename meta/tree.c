#include "meta/tree.h"

#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <utlist.h>

#include "meta/base/util.h"

#define TREE_DEPTH_MAX \
    (MODEL_PATH_MAX / 2 + 2) /* no path has more components; ends a loop of bad records */

/* A node's name, kept once. */
struct tree_text {
    UT_hash_handle hh;
    char text[];
};

/* ---- the whole ---- */

int tree_new(struct tree **out)
{
    pthread_rwlockattr_t attributes;
    struct timespec now;
    struct tree *tree = calloc(1, sizeof(*tree));
    if (!tree)
        return -ENOMEM;
    /* the one writer must not starve behind readers that never pause */
    pthread_rwlockattr_init(&attributes);
    pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&tree->lock, &attributes);
    pthread_rwlockattr_destroy(&attributes);

    clock_gettime(CLOCK_REALTIME, &now);
    tree->root_attr = (struct model_attr){
        .mode = 0755,
        .uid = geteuid(),
        .gid = getegid(),
        .mtime_ns = (int64_t)now.tv_sec * 1000000000 + now.tv_nsec,
    };
    struct model_entry root = {
        .id = MODEL_ROOT, .name = (char[]){""}, .kind = MODEL_DIR, .attr = tree->root_attr};
    int rc = tree_entry_put(tree, &root);
    if (rc < 0) {
        tree_free(tree);
        return rc;
    }
    *out = tree;
    return 0;
}

static void tree_entry_free(struct tree_entry *entry)
{
    if (entry->kind == MODEL_SYMLINK)
        free(entry->target);
    free(entry);
}

static void tree_version_free(struct tree_version *version)
{
    free(version->origin_path);
    free(version->pieces);
    free(version);
}

/* HASH_CLEAR leaves the elements linked as they were: each is freed once the next one is known. */
static void tree_free_names(struct tree *tree)
{
    struct tree_entry *entry = tree->entries;
    struct tree_dir *dir = tree->dirs;
    struct tree_version *version = tree->versions;
    HASH_CLEAR(by_id, tree->ids);
    HASH_CLEAR(by_name, tree->entries);
    while (entry) {
        struct tree_entry *next = entry->by_name.next;
        tree_entry_free(entry);
        entry = next;
    }
    HASH_CLEAR(hh, tree->dirs);
    while (dir) {
        struct tree_dir *next = dir->hh.next;
        free(dir);
        dir = next;
    }
    HASH_CLEAR(hh, tree->versions);
    while (version) {
        struct tree_version *next = version->hh.next;
        tree_version_free(version);
        version = next;
    }
}

void tree_free(struct tree *tree)
{
    if (!tree)
        return;
    struct tree_node *node = tree->nodes;
    struct tree_text *text = tree->texts;
    tree_free_names(tree);
    HASH_CLEAR(hh, tree->nodes);
    while (node) {
        struct tree_node *next = node->hh.next;
        free(node);
        node = next;
    }
    HASH_CLEAR(hh, tree->texts);
    while (text) {
        struct tree_text *next = text->hh.next;
        free(text);
        text = next;
    }
    pthread_rwlock_destroy(&tree->lock);
    free(tree);
}

void tree_read_lock(struct tree *tree)
{
    pthread_rwlock_rdlock(&tree->lock);
}

void tree_write_lock(struct tree *tree)
{
    pthread_rwlock_wrlock(&tree->lock);
}

void tree_unlock(struct tree *tree)
{
    pthread_rwlock_unlock(&tree->lock);
}

/* ---- finding ---- */

struct tree_entry *tree_entry_find(const struct tree *tree, uint64_t parent, const char *name)
{
    char key[sizeof(parent) + MODEL_NAME_MAX + 1];
    struct tree_entry *entry;
    size_t length = strlen(name);
    if (length > MODEL_NAME_MAX)
        return NULL;
    memcpy(key, &parent, sizeof(parent));
    memcpy(key + sizeof(parent), name, length);
    HASH_FIND(by_name, tree->entries, key, sizeof(parent) + length, entry);
    return entry;
}

struct tree_entry *tree_entry_by_id(const struct tree *tree, uint64_t id)
{
    struct tree_entry *entry;
    HASH_FIND(by_id, tree->ids, &id, sizeof(id), entry);
    return entry;
}

struct tree_dir *tree_dir_find(const struct tree *tree, uint64_t id)
{
    struct tree_dir *dir;
    HASH_FIND(hh, tree->dirs, &id, sizeof(id), dir);
    return dir;
}

struct tree_version *tree_version_find(const struct tree *tree, const struct model_id *id)
{
    struct tree_version *version;
    HASH_FIND(hh, tree->versions, id, sizeof(*id), version);
    return version;
}

struct tree_node *tree_node_find(const struct tree *tree, const char *name)
{
    struct tree_node *node;
    HASH_FIND(hh, tree->nodes, name, strlen(name), node);
    return node;
}

bool tree_dir_stands(const struct tree *tree, uint64_t id)
{
    if (id == MODEL_ROOT)
        return true;
    const struct tree_dir *dir = tree_dir_find(tree, id);
    return dir && dir->revision != 0;
}

int tree_path(const struct tree *tree, uint64_t id, char *out, size_t size)
{
    /* written from the end, then moved to the front */
    size_t at = size;
    if (size == 0)
        return -ENAMETOOLONG;
    out[--at] = '\0';
    for (int depth = 0; id != MODEL_ROOT; depth++) {
        const struct tree_entry *entry = tree_entry_by_id(tree, id);
        if (!entry || depth > TREE_DEPTH_MAX)
            return -ENOENT;
        size_t length = strlen(entry->name);
        bool last = out[at] == '\0';
        if (at < length + (last ? 0 : 1))
            return -ENAMETOOLONG;
        if (!last)
            out[--at] = '/';
        at -= length;
        memcpy(out + at, entry->name, length);
        id = entry->parent;
    }
    memmove(out, out + at, size - at);
    return 0;
}

size_t tree_path_length(const struct tree *tree, uint64_t id)
{
    size_t length = 0;
    for (int depth = 0; id != MODEL_ROOT && depth <= TREE_DEPTH_MAX; depth++) {
        const struct tree_entry *entry = tree_entry_by_id(tree, id);
        if (!entry)
            break;
        length += strlen(entry->name) + (length > 0);
        id = entry->parent;
    }
    return length;
}

bool tree_is_below(const struct tree *tree, uint64_t id, uint64_t above)
{
    for (int depth = 0; depth <= TREE_DEPTH_MAX; depth++) {
        if (id == above)
            return true;
        const struct tree_entry *entry = id == MODEL_ROOT ? NULL : tree_entry_by_id(tree, id);
        if (!entry)
            return false;
        id = entry->parent;
    }
    return true; /* a loop: nothing may be moved in there */
}

uint64_t tree_top(const struct tree *tree, uint64_t id)
{
    for (int depth = 0; id != MODEL_ROOT && depth <= TREE_DEPTH_MAX; depth++) {
        const struct tree_entry *entry = tree_entry_by_id(tree, id);
        if (!entry || entry->kind != MODEL_DIR)
            break;
        id = entry->parent;
    }
    return id;
}

int tree_resolve(const struct tree *tree, const char *path, struct tree_entry **out)
{
    struct tree_entry *entry = tree_entry_by_id(tree, MODEL_ROOT);
    for (;;) {
        char name[MODEL_NAME_MAX + 1];
        path += strspn(path, "/");
        size_t length = strcspn(path, "/");
        if (length == 0)
            break;
        if (entry->kind != MODEL_DIR)
            return -ENOTDIR;
        if (length > MODEL_NAME_MAX)
            return -ENOENT;
        memcpy(name, path, length);
        name[length] = '\0';
        entry = tree_entry_find(tree, entry->id, name);
        if (!entry)
            return -ENOENT;
        path += length;
    }
    *out = entry;
    return 0;
}

void tree_entry_view(const struct tree_entry *entry, struct model_entry *out)
{
    *out = (struct model_entry){
        .id = entry->id,
        .parent = entry->parent,
        .name = (char *)entry->name,
        .kind = (enum model_kind)entry->kind,
        .attr = entry->attr,
        .size = entry->size,
        .revision = entry->revision,
    };
    if (entry->kind == MODEL_FILE)
        out->version = entry->version->id;
    else if (entry->kind == MODEL_SYMLINK)
        out->target = entry->target;
}

void tree_version_view(const struct tree_version *version, struct model_version *out)
{
    *out = (struct model_version){
        .id = version->id,
        .size = version->size,
        .shard_size = version->shard_size,
        .digest = (enum model_digest)version->digest,
        .sealed = version->sealed,
        .origin_boot = version->origin_boot,
        .origin_path = version->origin_path,
        .origin_ino = version->origin_ino,
        .origin_mtime_ns = version->origin_mtime_ns,
        .pieces = version->pieces,
        .piece_count = version->piece_count,
        .revision = version->revision,
    };
    memcpy(out->root, version->root, sizeof(out->root));
    out->origin_node = version->origin_node;
}

/* ---- what others refer to ---- */

static const char *tree_text_keep(struct tree *tree, const char *string)
{
    struct tree_text *text;
    size_t length = strlen(string);
    HASH_FIND(hh, tree->texts, string, length, text);
    if (text)
        return text->text;
    text = calloc(1, sizeof(*text) + length + 1);
    if (!text)
        return NULL;
    memcpy(text->text, string, length);
    HASH_ADD_KEYPTR(hh, tree->texts, text->text, length, text);
    if (!text->hh.tbl) {
        free(text);
        return NULL;
    }
    return text->text;
}

static struct tree_dir *tree_dir_get(struct tree *tree, uint64_t id)
{
    struct tree_dir *dir = tree_dir_find(tree, id);
    if (dir)
        return dir;
    dir = calloc(1, sizeof(*dir));
    if (!dir)
        return NULL;
    dir->id = id;
    dir->mark = tree->mark;
    HASH_ADD(hh, tree->dirs, id, sizeof(dir->id), dir);
    if (!dir->hh.tbl) {
        free(dir);
        return NULL;
    }
    return dir;
}

static void tree_dir_unneeded(struct tree *tree, struct tree_dir *dir)
{
    if (dir && !dir->children && dir->revision == 0) {
        HASH_DEL(tree->dirs, dir);
        free(dir);
    }
}

static struct tree_version *tree_version_get(struct tree *tree, const struct model_id *id)
{
    struct tree_version *version = tree_version_find(tree, id);
    if (version)
        return version;
    version = calloc(1, sizeof(*version));
    if (!version)
        return NULL;
    version->id = *id;
    version->mark = tree->mark;
    HASH_ADD(hh, tree->versions, id, sizeof(version->id), version);
    if (!version->hh.tbl) {
        free(version);
        return NULL;
    }
    return version;
}

/* Bytes that the version stands for in the totals: around every change, taken out and put in again. */
static uint64_t tree_version_bytes(const struct tree_version *version)
{
    return version->revision != 0 && version->names > 0 ? version->size : 0;
}

static void tree_version_unneeded(struct tree *tree, struct tree_version *version)
{
    if (version && version->names == 0 && version->revision == 0) {
        HASH_DEL(tree->versions, version);
        tree_version_free(version);
    }
}

static void tree_version_name(struct tree *tree, struct tree_version *version, int by)
{
    tree->totals.bytes -= tree_version_bytes(version);
    version->names += (uint32_t)by;
    tree->totals.bytes += tree_version_bytes(version);
}

static void tree_count(struct tree *tree, const struct tree_entry *entry, int by)
{
    if (entry->kind == MODEL_FILE)
        tree->totals.files += (uint64_t)by;
    else if (entry->kind == MODEL_SYMLINK)
        tree->totals.symlinks += (uint64_t)by;
    else if (entry->parent != 0)
        tree->totals.dirs += (uint64_t)by;
}

/* ---- entries ---- */

static void tree_entry_remove(struct tree *tree, struct tree_entry *entry)
{
    if (entry->indexed)
        HASH_DELETE(by_id, tree->ids, entry);
    HASH_DELETE(by_name, tree->entries, entry);
    tree_count(tree, entry, -1);
    if (entry->kind == MODEL_FILE) {
        tree_version_name(tree, entry->version, -1);
        tree_version_unneeded(tree, entry->version);
    }
    if (entry->parent != 0) {
        struct tree_dir *dir = tree_dir_find(tree, entry->parent);
        DL_DELETE(dir->children, entry);
        dir->count--;
        tree_dir_unneeded(tree, dir);
    }
    tree_entry_free(entry);
}

/* An entry that stands nowhere yet. Its version exists in the tree afterwards. */
static struct tree_entry *tree_entry_make(struct tree *tree, const struct model_entry *from)
{
    size_t length = strlen(from->name);
    struct tree_entry *entry = calloc(1, sizeof(*entry) + length + 1);
    if (!entry)
        return NULL;
    entry->id = from->id;
    entry->revision = from->revision;
    entry->attr = from->attr;
    entry->kind = (uint8_t)from->kind;
    entry->mark = tree->mark;
    entry->parent = from->parent;
    memcpy(entry->name, from->name, length);
    if (from->kind == MODEL_FILE) {
        entry->size = from->size;
        entry->version = tree_version_get(tree, &from->version);
    } else if (from->kind == MODEL_SYMLINK) {
        entry->target = strdup(from->target);
    }
    if ((from->kind == MODEL_FILE && !entry->version) ||
        (from->kind == MODEL_SYMLINK && !entry->target)) {
        free(entry);
        return NULL;
    }
    return entry;
}

/* Takes the id over from another name, if one has it: a move is told as two changes. */
static bool tree_entry_index(struct tree *tree, struct tree_entry *entry)
{
    struct tree_entry *other = tree_entry_by_id(tree, entry->id);
    HASH_ADD(by_id, tree->ids, id, sizeof(entry->id), entry);
    if (!entry->by_id.tbl)
        return false;
    entry->indexed = true;
    if (other) {
        HASH_DELETE(by_id, tree->ids, other);
        other->indexed = false;
    }
    return true;
}

int tree_entry_put(struct tree *tree, const struct model_entry *from)
{
    struct tree_entry *old = tree_entry_find(tree, from->parent, from->name);
    struct tree_dir *dir = NULL;
    struct tree_entry *entry = tree_entry_make(tree, from);
    if (!entry)
        return -ENOMEM;
    if (from->parent != 0) {
        dir = tree_dir_get(tree, from->parent);
        if (!dir)
            goto free_entry;
    }
    if (!tree_entry_index(tree, entry))
        goto drop_dir;
    /* for a moment two entries have the name; the old one goes by its handle */
    HASH_ADD_KEYPTR(by_name, tree->entries, &entry->parent,
                    sizeof(entry->parent) + strlen(entry->name), entry);
    if (!entry->by_name.tbl)
        goto unindex;
    if (dir) {
        DL_APPEND(dir->children, entry);
        dir->count++;
    }
    tree_count(tree, entry, 1);
    if (entry->kind == MODEL_FILE)
        tree_version_name(tree, entry->version, 1);
    if (old)
        tree_entry_remove(tree, old);
    return 0;

unindex:
    HASH_DELETE(by_id, tree->ids, entry);
drop_dir:
    tree_dir_unneeded(tree, dir);
free_entry:
    if (entry->kind == MODEL_FILE)
        tree_version_unneeded(tree, entry->version);
    tree_entry_free(entry);
    return -ENOMEM;
}

void tree_entry_delete(struct tree *tree, struct tree_entry *entry)
{
    if (entry->parent != 0) {
        tree_entry_remove(tree, entry);
        return;
    }
    entry->revision = 0; /* the root is always there */
    entry->attr = tree->root_attr;
}

/* ---- directories, versions, nodes ---- */

int tree_dir_put(struct tree *tree, uint64_t id, uint64_t revision, const struct model_node *stager)
{
    const char *name = NULL;
    if (stager && stager->name[0]) {
        name = tree_text_keep(tree, stager->name);
        if (!name)
            return -ENOMEM;
    }
    struct tree_dir *dir = tree_dir_get(tree, id);
    if (!dir)
        return -ENOMEM;
    dir->revision = revision;
    dir->stager = name;
    dir->stager_boot = name ? stager->boot : 0;
    dir->mark = tree->mark;
    return 0;
}

void tree_dir_delete(struct tree *tree, struct tree_dir *dir)
{
    dir->revision = 0;
    dir->stager = NULL;
    tree_dir_unneeded(tree, dir);
}

int tree_version_put(struct tree *tree, const struct model_version *from)
{
    const char *node = tree_text_keep(tree, from->origin_node);
    char *path = from->origin_path ? strdup(from->origin_path) : NULL;
    uint64_t *pieces = model_pieces_copy(from->pieces, from->piece_count);
    struct tree_version *version = NULL;
    if (node && (path || !from->origin_path) && (pieces || !from->pieces))
        version = tree_version_get(tree, &from->id);
    if (!version) {
        free(path);
        free(pieces);
        return -ENOMEM;
    }
    tree->totals.bytes -= tree_version_bytes(version);
    version->revision = from->revision;
    version->size = from->size;
    version->origin_boot = from->origin_boot;
    version->origin_ino = from->origin_ino;
    version->origin_mtime_ns = from->origin_mtime_ns;
    version->origin_node = node;
    free(version->origin_path);
    version->origin_path = path;
    free(version->pieces);
    version->pieces = pieces;
    version->piece_count = from->piece_count;
    version->shard_size = from->shard_size;
    memcpy(version->root, from->root, sizeof(version->root));
    version->digest = (uint8_t)from->digest;
    version->sealed = from->sealed;
    version->mark = tree->mark;
    tree->totals.bytes += tree_version_bytes(version);
    return 0;
}

void tree_version_delete(struct tree *tree, struct tree_version *version)
{
    tree->totals.bytes -= tree_version_bytes(version);
    version->revision = 0;
    tree_version_unneeded(tree, version);
}

int tree_node_put(struct tree *tree, const struct model_node *from)
{
    struct tree_node *node = tree_node_find(tree, from->name);
    if (!node) {
        node = calloc(1, sizeof(*node));
        if (!node)
            return -ENOMEM;
        node->node = *from;
        HASH_ADD_KEYPTR(hh, tree->nodes, node->node.name, strlen(node->node.name), node);
        if (!node->hh.tbl) {
            free(node);
            return -ENOMEM;
        }
    }
    node->node = *from;
    node->mark = tree->mark;
    return 0;
}

void tree_node_delete(struct tree *tree, struct tree_node *node)
{
    HASH_DEL(tree->nodes, node);
    free(node);
}
