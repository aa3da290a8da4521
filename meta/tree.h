/* Tree: the namespace in memory: entries by id and by (parent, name), directories, versions, nodes.
 *
 * One thread writes, under tree_write_lock; it may read without a lock. All others read under tree_read_lock, and copy
 * what they keep. What the tree hands out is borrowed and lives until the next write. Calls that add return 0 or
 * -ENOMEM, and change nothing when they fail. About 500 bytes a name with its version.
 *
 * Records arrive in any order: an entry may come before its directory or its version. Then those stand here without
 * a record (revision 0) as long as something refers to them. */
#ifndef P2PFS_META_TREE_H
#define P2PFS_META_TREE_H

/* A failed allocation leaves the element out of the hash, and us alive. */
#ifndef HASH_NONFATAL_OOM
#define HASH_NONFATAL_OOM 1
#endif
#include <pthread.h>
#include <uthash.h>

#include "meta/model.h"

struct tree_version {
    UT_hash_handle hh;
    struct model_id id;
    uint64_t revision; /* of its record; 0: there is none */
    uint64_t size;
    uint64_t origin_boot;
    uint64_t origin_ino;
    int64_t origin_mtime_ns;
    const char *origin_node; /* shared among all versions of a node */
    char *origin_path;
    uint64_t *pieces;
    uint64_t held_at; /* the sweep's clock when a live holder was seen last */
    uint32_t shard_size;
    uint32_t piece_count;
    uint32_t names; /* entries that lead here */
    uint8_t root[MODEL_DIGEST_MAX];
    uint8_t digest;
    bool sealed;
    uint32_t mark; /* of the listing that saw it last */
};

struct tree_entry {
    UT_hash_handle by_id;
    UT_hash_handle by_name;
    struct tree_entry *prev; /* among its siblings */
    struct tree_entry *next;
    union {
        struct tree_version *version; /* files */
        char *target;                 /* symbolic links */
    };
    uint64_t id;
    uint64_t revision; /* 0: the root without a record */
    uint64_t size;
    struct model_attr attr;
    uint32_t mark;
    uint8_t kind;
    bool indexed;    /* by id: of two records with one id (a move half told) the newer */
    uint64_t parent; /* the key by name is parent and name together */
    char name[];
};

struct tree_dir {
    UT_hash_handle hh;
    uint64_t id;
    uint64_t revision; /* of its record; 0: there is none */
    struct tree_entry *children;
    const char *stager; /* the node that fills it before it gets a name; NULL: none */
    uint64_t stager_boot;
    uint64_t
        unnamed_ms; /* CLOCK_MONOTONIC when the sweep first found it without a name, 0: not yet */
    uint32_t count;
    uint32_t mark;
};

struct tree_node {
    UT_hash_handle hh;
    struct model_node node;
    uint32_t mark;
};

struct tree_totals {
    uint64_t files;
    uint64_t dirs; /* without the root */
    uint64_t symlinks;
    uint64_t bytes; /* of all versions with a record and a name */
};

struct tree {
    struct tree_entry *entries; /* by name */
    struct tree_entry *ids;
    struct tree_dir *dirs;
    struct tree_version *versions;
    struct tree_node *nodes;
    struct tree_text *texts;
    struct tree_totals totals;
    struct model_attr root_attr; /* until the root has a record */
    uint32_t mark;               /* given to all that is put */
    pthread_rwlock_t lock;
};

/* An empty namespace: its root belongs to this process's user. */
int tree_new(struct tree **tree);
void tree_free(struct tree *tree);

void tree_read_lock(struct tree *tree);
void tree_write_lock(struct tree *tree);
void tree_unlock(struct tree *tree);

/* ---- finding ---- */

struct tree_entry *tree_entry_find(const struct tree *tree, uint64_t parent, const char *name);
struct tree_entry *tree_entry_by_id(const struct tree *tree, uint64_t id);
struct tree_dir *tree_dir_find(const struct tree *tree, uint64_t id);
struct tree_version *tree_version_find(const struct tree *tree, const struct model_id *id);
struct tree_node *tree_node_find(const struct tree *tree, const char *name);

/* Whether names can lie in it: the root, or a directory with a record. */
bool tree_dir_stands(const struct tree *tree, uint64_t id);
/* The path without a leading '/'. -ENOENT: no path leads there from the root. -ENAMETOOLONG. */
int tree_path(const struct tree *tree, uint64_t id, char *out, size_t size);
/* Bytes of that path, as far up as names lead. */
size_t tree_path_length(const struct tree *tree, uint64_t id);
/* Whether `id` is `above` or lies somewhere below it. */
bool tree_is_below(const struct tree *tree, uint64_t id, uint64_t above);
/* The topmost directory on the way up from `id`: the root, or one without a name. */
uint64_t tree_top(const struct tree *tree, uint64_t id);
/* By path from the root. 0, -ENOENT, -ENOTDIR. */
int tree_resolve(const struct tree *tree, const char *path, struct tree_entry **out);

/* As the model's values; pointers are the tree's. */
void tree_entry_view(const struct tree_entry *entry, struct model_entry *out);
void tree_version_view(const struct tree_version *version, struct model_version *out);

/* ---- changing ---- */

/* entry->parent, name and revision say which record it is. Replaces what had that name. */
int tree_entry_put(struct tree *tree, const struct model_entry *entry);
void tree_entry_delete(struct tree *tree,
                       struct tree_entry *entry); /* the root: forgets its record */
int tree_dir_put(struct tree *tree, uint64_t id, uint64_t revision,
                 const struct model_node *stager);
void tree_dir_delete(struct tree *tree, struct tree_dir *dir);
int tree_version_put(struct tree *tree, const struct model_version *version);
void tree_version_delete(struct tree *tree, struct tree_version *version);
int tree_node_put(struct tree *tree, const struct model_node *node);
void tree_node_delete(struct tree *tree, struct tree_node *node);

#endif
