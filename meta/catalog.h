/* Catalog: this node's copy of the cluster's namespace, and the one thread that talks to the metadata service.
 *
 * Readers answer from memory, never wait for the service and may be called from any thread. Changes are queued to the
 * catalog's thread; `done` runs exactly once, on that thread, within CATALOG_DEADLINE_MS, after the change is visible
 * to readers here; it must not block and may queue further changes. A call that returns an error instead of 0 never
 * runs `done`. A change made elsewhere is seen here within 1 s while the service answers. When the service is away,
 * the copy stays readable, changes fail with -ETIMEDOUT or another network error, and the catalog reconnects by
 * itself, renews or re-creates its lease and announces again what this node holds.
 *
 * Errors of changes: -EEXIST, -ENOENT, -ENOTDIR, -EISDIR, -ENOTEMPTY, -EPERM (replacing a registered file without
 * CATALOG_OVERWRITE), -EINVAL (bad name; a directory into itself), -ENAMETOOLONG, -ENOSPC, -ENOMEM, -EIO (the service
 * answered nonsense), or a network error as in meta.h. Nothing is half done.
 *
 * Undecodable records are left alone, logged once each, and not shown. */
#ifndef P2PFS_META_CATALOG_H
#define P2PFS_META_CATALOG_H

#include "meta/model.h"

#define CATALOG_DEADLINE_MS 10000

struct catalog;

/* What the upper floors are told, on the catalog's thread, without any lock held; handlers must not block. */
struct catalog_events {
    void *arg;
    /* A name was added, changed or removed by another node (or by the sweep). */
    void (*name_changed)(void *arg, uint64_t parent, const char *name);
    /* The version's record is gone: no name leads to it any more. Bytes may be dropped when nobody reads them. */
    void (*version_gone)(void *arg, const struct model_id *version);
    /* The version got its root. */
    void (*version_sealed)(void *arg, const struct model_id *version);
    /* A node is up (again), or gone. */
    void (*node_changed)(void *arg, const char *node, bool up);
};

struct catalog_config {
    const char *url;
    const char *credentials_file; /* or NULL */
    struct model_node
        self;          /* name, boot, locality; the address may be set later by catalog_serve */
    uint32_t lease_ms; /* default 10000 */
    uint32_t
        orphan_ttl_s; /* names whose versions nobody has held for so long are removed; 0: never */
    struct catalog_events events;
};

/* Opens the service, lists the namespace, starts the thread. `error` gets one sentence for the user when it fails
 * (malloc'd, caller frees; NULL when there is none). */
int catalog_open(const struct catalog_config *config, struct catalog **catalog, char **error);
/* Announces this node under its name with a lease. -EEXIST: another live node has that name; a record left by a
 * process of this machine that is dead is taken over at once, another one when its lease has ended (waits up to
 * lease_ms + 1 s). Blocking; call once, before the node serves. */
int catalog_serve(struct catalog *catalog, const char *address, char **error);
/* Before catalog_serve: where peers reach this node over RDMA. */
void catalog_rdma_set(struct catalog *catalog, const char *address);
/* Withdraws everything of this node (the lease is revoked), ends the thread, fails what is queued with -ESHUTDOWN. */
void catalog_close(struct catalog *catalog);

/* ---- readers ---- */

/* The entry as a copy (model_entry_clear it). 0, -ENOENT, -ENOMEM. The root has id MODEL_ROOT and name "". */
int catalog_lookup(struct catalog *catalog, uint64_t parent, const char *name,
                   struct model_entry *out);
int catalog_entry(struct catalog *catalog, uint64_t id, struct model_entry *out);
/* By path relative to the root ("" or "/": the root); no symbolic link is followed. 0, -ENOENT, -ENOTDIR. */
int catalog_resolve(struct catalog *catalog, const char *path, struct model_entry *out);
/* The whole path of an entry without a leading '/', NUL-terminated. -ENOENT, -ENAMETOOLONG. */
int catalog_path(struct catalog *catalog, uint64_t id, char *out, size_t size);
int catalog_version(struct catalog *catalog, const struct model_id *id, struct model_version *out);
/* Every version that a node registered in place (by the node's name, whatever its incarnation), as borrowed copies. */
typedef void (*catalog_version_each)(void *arg, const struct model_version *version);
int catalog_registered(struct catalog *catalog, const char *node, catalog_version_each each,
                       void *arg);
/* The sizes of the largest versions that have a name, but for those that a node registered in place; largest first.
 * Returns how many of them (at most `count`, which is not 0) were written to `sizes`. */
size_t catalog_largest(struct catalog *catalog, const char *but_node, uint64_t *sizes,
                       size_t count);
/* How many names lead to a version. */
uint32_t catalog_version_names(struct catalog *catalog, const struct model_id *id);
/* A path below the root of each of these versions, malloc'd; NULL: no name leads there. One look at every entry, for the
 * few that a person wants to see named. -ENOMEM. */
int catalog_version_paths(struct catalog *catalog, const struct model_id *ids, size_t count,
                          char **paths);
/* A live node by name. 0, -ENOENT. */
int catalog_node(struct catalog *catalog, const char *name, struct model_node *out);
/* All live nodes, this one included, malloc'd, caller frees. */
int catalog_nodes(struct catalog *catalog, struct model_node **out, size_t *count);

/* The children of a directory in byte order of their names, a snapshot; the caller frees with catalog_list_free.
 * -ENOENT: no such directory. */
struct catalog_list {
    struct model_entry *entries;
    size_t count;
};
int catalog_list(struct catalog *catalog, uint64_t dir, struct catalog_list *out);
void catalog_list_free(struct catalog_list *list);

struct catalog_totals {
    uint64_t files;
    uint64_t dirs;
    uint64_t symlinks;
    uint64_t bytes; /* of all versions that have a name, each once */
};
void catalog_totals(struct catalog *catalog, struct catalog_totals *out);
/* Whether the service answers now, and since when (CLOCK_MONOTONIC ms) it has not. */
bool catalog_online(struct catalog *catalog, uint64_t *since_ms);
uint64_t catalog_outages(struct catalog *catalog);    /* how often it stopped answering so far */
const char *catalog_backend(struct catalog *catalog); /* "local", ... */
bool catalog_single_machine(struct catalog *catalog);

/* ---- changes ---- */

/* status as above; entry: what the name is now (borrowed; NULL on failure and for removals). */
typedef void (*catalog_done)(void *arg, int status, const struct model_entry *entry);

#define CATALOG_OVERWRITE \
    1u /* publish, rename: may replace a registered file (and rename: a symlink always may be) */
#define CATALOG_NOREPLACE 2u /* rename: RENAME_NOREPLACE */
#define CATALOG_EXCHANGE  4u /* rename: RENAME_EXCHANGE */
#define CATALOG_COMPLETE  8u /* publish, announce: this node holds every shard */

/* All strings and structs are copied before the call returns. `id` 0: the catalog chooses one. */
int catalog_mkdir(struct catalog *c, uint64_t parent, const char *name,
                  const struct model_attr *attr, catalog_done done, void *arg);
int catalog_symlink(struct catalog *c, uint64_t parent, const char *name, const char *target,
                    const struct model_attr *attr, catalog_done done, void *arg);
/* Registers a version under a name and announces this node as its holder, in one transaction. */
int catalog_publish(struct catalog *c, uint64_t parent, const char *name, uint64_t id,
                    const struct model_attr *attr, const struct model_version *version,
                    unsigned flags, catalog_done done, void *arg);
/* Another name, with an id of its own, for what `id` is (a file or symlink): link(2) and copies inside the mount. */
int catalog_link(struct catalog *c, uint64_t id, uint64_t parent, const char *name,
                 catalog_done done, void *arg);
/* rename(2) of one entry; a directory takes its whole tree along, atomically, whatever its size. A symbolic link or
 * an empty directory may be replaced by its like; a registered file only with CATALOG_OVERWRITE. */
int catalog_rename(struct catalog *c, uint64_t parent, const char *name, uint64_t new_parent,
                   const char *new_name, unsigned flags, catalog_done done, void *arg);
/* unlink(2) and rmdir(2). */
int catalog_unlink(struct catalog *c, uint64_t parent, const char *name, catalog_done done,
                   void *arg);
int catalog_rmdir(struct catalog *c, uint64_t parent, const char *name, catalog_done done,
                  void *arg);
/* A whole tree or one name, at once: the name disappears in one transaction, what was below is cleared afterwards. */
int catalog_remove_tree(struct catalog *c, uint64_t parent, const char *name, catalog_done done,
                        void *arg);

#define CATALOG_SET_MODE  1u
#define CATALOG_SET_UID   2u
#define CATALOG_SET_GID   4u
#define CATALOG_SET_MTIME 8u
int catalog_setattr(struct catalog *c, uint64_t id, unsigned mask, const struct model_attr *attr,
                    catalog_done done, void *arg);

/* A tree registered as a whole, seen by nobody before it is complete: begin gives a directory id that no name leads
 * to; mkdir, symlink and publish below it as usual; attach gives it its name (EEXIST etc.), drop forgets it. */
int catalog_tree_begin(struct catalog *c, uint64_t *dir, catalog_done done,
                       void *arg); /* *dir is set on return */
int catalog_tree_attach(struct catalog *c, uint64_t dir, uint64_t parent, const char *name,
                        const struct model_attr *attr, catalog_done done, void *arg);
int catalog_tree_drop(struct catalog *c, uint64_t dir, catalog_done done, void *arg);

/* Stores the root (MODEL_DIGEST_MAX bytes, as in struct model_version) of a version registered in place. -ENOENT: the
 * version is gone; -EEXIST: it has another root. */
int catalog_seal(struct catalog *c, const struct model_id *version, const uint8_t *root,
                 catalog_done done, void *arg);

/* This node holds bytes of the version from now on (flags: CATALOG_COMPLETE, all of them). Idempotent; repeated by
 * the catalog itself after an outage until withdrawn. */
int catalog_announce(struct catalog *c, const struct model_id *version, unsigned flags,
                     catalog_done done, void *arg);
/* No longer. `keep_other`: only if another live node holds the version completely; -EBUSY otherwise, and the
 * announcement stands. Atomic, so two nodes never withdraw the last two copies at once. */
int catalog_withdraw(struct catalog *c, const struct model_id *version, bool keep_other,
                     catalog_done done, void *arg);

/* Who holds a version, this node not included: live nodes only. `holders` is borrowed during the call. */
typedef void (*catalog_holders_done)(void *arg, int status, const struct model_holder *holders,
                                     size_t count);
int catalog_holders(struct catalog *c, const struct model_id *version, catalog_holders_done done,
                    void *arg);
/* Holder counts of all versions in one listing, for `ls` and status: each(version, holders, complete). */
typedef void (*catalog_census_each)(void *arg, const struct model_id *version, uint32_t holders,
                                    uint32_t complete);
int catalog_census(struct catalog *c, catalog_census_each each, catalog_done done, void *arg);

/* Waits in the calling thread for one change: pass catalog_sync_done and a struct catalog_sync as arg, then call
 * catalog_sync_wait. Never from a FUSE worker, a lane or the catalog's thread. */
struct catalog_sync {
    int state;
    int status;
    uint64_t id; /* of the entry, 0 when there is none */
};
void catalog_sync_done(void *arg, int status, const struct model_entry *entry);
int catalog_sync_wait(struct catalog_sync *sync);

#endif
