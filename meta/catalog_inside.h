/* Catalog, inside: what the files of the catalog share. Only meta/catalog*.c includes this.
 *
 * catalog.c and catalog_queue (the face: open, readers, queueing) -> catalog_loop (the thread, outages) -> catalog_sweep (orphans, what
 * removed trees leave behind) -> catalog_change (what each change writes) -> catalog_hold (this node's lease, node
 * record and announcements) -> catalog_plan (a transaction in the making) -> catalog_feed (changes into memory). All but
 * the face run on the catalog's thread. */
#ifndef P2PFS_META_CATALOG_INSIDE_H
#define P2PFS_META_CATALOG_INSIDE_H

#include "meta/catalog.h"
#include "meta/codec.h"
#include "meta/meta.h"
#include "meta/tree.h"

#define CATALOG_BATCH 32 /* writes of one kind that share a transaction */

/* ---- one queued change ---- */

enum change_kind {
    CHANGE_MKDIR,
    CHANGE_SYMLINK,
    CHANGE_PUBLISH,
    CHANGE_LINK,
    CHANGE_RENAME,
    CHANGE_UNLINK,
    CHANGE_RMDIR,
    CHANGE_REMOVE_TREE,
    CHANGE_SETATTR,
    CHANGE_TREE_BEGIN,
    CHANGE_TREE_ATTACH,
    CHANGE_TREE_DROP,
    CHANGE_SEAL,
    CHANGE_ANNOUNCE,
    CHANGE_WITHDRAW,
    CHANGE_SERVE,
    CHANGE_HOLDERS,
    CHANGE_CENSUS,
    CHANGE_KINDS
};

struct change {
    struct change *next;
    enum change_kind kind;
    uint64_t queued_ms;
    uint64_t id; /* the entry or directory it is about; what a new one gets */
    uint64_t parent;
    uint64_t new_parent;
    char *name;
    char *new_name;
    char *target; /* symbolic link; serve: the address */
    struct model_attr attr;
    struct model_version version; /* publish; of all others only the id */
    uint8_t root[MODEL_DIGEST_MAX];
    unsigned flags;
    bool keep_other;
    catalog_done done;
    catalog_holders_done holders_done;
    catalog_census_each census_each;
    void *arg;

    /* where the entry is that `done` is told of; borrowed from the fields above */
    uint64_t result_parent;
    const char *result_name; /* NULL: by result_id, if that isn't 0 */
    uint64_t result_id;
};

/* ---- what this node holds ---- */

/* A version of which this node has bytes. `stored`: the service says so, as far as we know. */
struct held {
    UT_hash_handle hh;
    struct model_id id;
    bool wanted; /* false: only its record is still to be removed */
    bool complete;
    bool stored;
};

/* ---- what readers of the events are told, once no lock is held ---- */

enum note_kind { NOTE_NAME, NOTE_GONE, NOTE_SEALED, NOTE_NODE };

struct note {
    struct note *next;
    enum note_kind kind;
    uint64_t parent;
    struct model_id version;
    bool up;
    char name[]; /* of the entry or the node */
};

/* Where a record comes from: the feed; our own transaction; a listing. */
enum feed_source { FEED_CHANGE, FEED_OWN, FEED_LIST };

struct catalog {
    struct tree *tree;
    struct meta_store *store;
    const char *backend;
    bool single_machine;
    struct model_node self;
    uint32_t lease_ms;
    uint32_t orphan_ttl_s;
    struct catalog_events events;
    pthread_t thread;
    int wake_fd;

    pthread_mutex_t mutex;
    struct change *queue; /* under mutex, as all to the blank line */
    struct change **queue_end;
    bool stopping;
    bool detached; /* the thread frees the catalog when it ends */
    bool online;
    uint64_t since_ms; /* when it went offline */
    uint64_t outages;

    /* the catalog's thread only, from here on */
    int failed; /* the store does not answer, with this error; 0: it does */
    uint64_t retry_ms;
    uint32_t backoff_ms;

    uint64_t revision;        /* of the feed */
    bool stale;               /* something was missed: list again */
    struct model_id instance; /* of the service that memory is a copy of; zero: not known yet */
    struct model_id listed_instance;
    uint64_t instance_revision; /* of the record of listed_instance */
    uint64_t listed_revision;
    uint64_t epoch;            /* of the store when memory became a copy of it */
    bool relearn;              /* revisions of the service before say nothing about this one's */
    uint64_t renames_revision; /* of CODEC_RENAMES, 0: absent */
    struct feed_bad *bad;      /* records that could not be decoded, by key */
    struct feed_tomb *tombs;   /* our own deletions that the feed has not told yet */
    uint64_t tombs_newest;
    struct note *notes;
    struct note **notes_end;

    uint64_t lease; /* 0: none */
    uint64_t renew_ms;
    bool serving;     /* wants a node record; then among those of the process, by `next` */
    bool node_stored; /* has it */
    bool name_lost;   /* another node took our name, and it was logged */
    struct catalog *next;
    struct held *held;
    bool held_open; /* some held.stored != held.wanted */

    struct model_id *doubts; /* publications of which we don't know whether they were carried out */
    size_t doubt_count;
    uint64_t *doomed; /* directories that nobody reaches, to be cleared */
    size_t doomed_count;
    uint64_t sweep_ms;    /* when the next round is due */
    uint64_t swept_ms;    /* when the last one was */
    uint64_t sweep_clock; /* ms that this node watched over holders */
};

/* ---- catalog_feed ---- */

/* What the store answered, on its way up: notes in c->failed when that is an outage. */
int feed_answer(struct catalog *c, int rc);
/* Applies one record (value NULL: deleted) under the tree's write lock. -ENOMEM: the copy is now stale. */
int feed_apply(struct catalog *c, const char *key, const char *value, uint64_t revision,
               enum feed_source source);
/* Pulls the changes that are known within timeout_ms, and tells them. *news: how many. */
int feed_pull(struct catalog *c, uint32_t timeout_ms, int wake_fd, size_t *news);
/* Lists everything. *replaced: it is not the service that was listed before, or an older state of it; then what
 * the listing lacks is kept in memory, with another mark than tree->mark, until feed_adopt. Otherwise it is removed. */
int feed_list(struct catalog *c, bool *replaced);
/* From now on memory is a copy of what was listed last. */
void feed_adopt(struct catalog *c);
bool feed_is_bad(const struct catalog *c, const char *key);
bool feed_any_bad_below(const struct catalog *c, const char *prefix);
/* Notes that a record can't be decoded: said once for each of its revisions. */
void feed_bad_note(struct catalog *c, const char *key, uint64_t revision, int error);
/* Tells of a name that this node itself removed without being asked. */
void feed_tell_name(struct catalog *c, uint64_t parent, const char *name);
/* Tells what has been noted. No lock is held. */
void feed_tell(struct catalog *c);
void feed_clear(struct catalog *c);

/* ---- catalog_plan ---- */

struct plan {
    struct meta_compare compares[META_TXN_MAX];
    struct meta_write writes[META_TXN_MAX];
    char *texts[3 * META_TXN_MAX]; /* keys and values */
    size_t compare_count;
    size_t write_count;
    size_t text_count;
    size_t bytes; /* of the texts */
    int error;    /* of the first step that failed */
};

/* A plan is zeroed, filled (a failure is kept and returned by plan_commit) and cleared. Keys are copied. */
void plan_clear(struct plan *plan);
/* How full it is, and back to that, with whatever failed since then forgotten. */
struct plan_mark {
    size_t compares;
    size_t writes;
    size_t texts;
    size_t bytes;
};
struct plan_mark plan_mark(const struct plan *plan);
void plan_rewind(struct plan *plan, const struct plan_mark *mark);
/* Whether what was added behind the mark, in a plan of puts, stands beside what was there before it: it only puts, and
 * other keys, and all of it is far from what a service takes at once (etcd: 1.5 MiB). */
bool plan_stands_beside(const struct plan *plan, const struct plan_mark *mark);
void plan_compare(struct plan *plan, enum meta_condition condition, const char *key,
                  uint64_t revision);
/* Takes `value`; NULL is out of memory. */
void plan_put(struct plan *plan, const char *key, char *value, uint64_t lease);
void plan_delete(struct plan *plan, const char *key);
void plan_delete_prefix(struct plan *plan, const char *prefix);
bool plan_writes(const struct plan *plan, const char *key);
/* Carries it out and applies it to memory. 0; -EAGAIN; -ENOENT: our lease has ended; as meta.h. */
int plan_commit(struct catalog *c, const struct plan *plan);
/* Only carries it out. revision: may be NULL. */
int plan_send(struct catalog *c, const struct plan *plan, uint64_t *revision);

/* The steps that several changes share. */
void plan_put_entry(struct plan *plan, const struct model_entry *entry);
void plan_parent_stands(struct plan *plan, uint64_t parent);
/* The name is as memory has it: at that entry's revision, or (NULL) absent. */
void plan_name_is(struct plan *plan, uint64_t parent, const char *name,
                  const struct tree_entry *entry);
/* One name of the version goes; with the last one its record and its holders. */
void plan_unname_version(struct catalog *c, struct plan *plan, const struct tree_version *version);
/* The version gets one more name. */
void plan_name_version(struct plan *plan, const struct tree_version *version);
/* The entry goes, with what belongs to it: an empty directory, a version's last name. */
void plan_remove_entry(struct catalog *c, struct plan *plan, const struct tree_entry *entry);

/* ---- catalog_hold ---- */

struct held *hold_find(struct catalog *c, const struct model_id *id);
struct held *hold_get(struct catalog *c, const struct model_id *id); /* NULL: out of memory */
void hold_forget(struct catalog *c, struct held *held);
void hold_plan_put(struct catalog *c, struct plan *plan, const struct model_id *id, bool complete);
bool hold_is_live(const struct catalog *c, const struct model_node *node);
/* Has a lease: renews nothing, grants one when there is none. */
int hold_lease(struct catalog *c);
int hold_renew(struct catalog *c); /* renews it, or recovers as hold_recover */
/* The lease has ended: a new one, the node record, all announcements. */
int hold_recover(struct catalog *c);
/* Brings the service's records of what we hold in line. */
int hold_reconcile(struct catalog *c);
/* An announcement or withdrawal that can't be tried now is remembered for when the service answers. */
void hold_intend(struct catalog *c, const struct change *change);
int hold_build_announce(struct catalog *c, struct change *change, struct plan *plan);
int hold_build_withdraw(struct catalog *c, struct change *change, struct plan *plan);
int hold_build_serve(struct catalog *c, struct change *change, struct plan *plan);
/* After such a change has been carried out. */
void hold_announced(struct catalog *c, const struct change *change);
void hold_withdrawn(struct catalog *c, const struct change *change);
void hold_served(struct catalog *c, const struct change *change);
int hold_holders(struct catalog *c, const struct change *change);
/* One listing of all holders, grouped by version. */
int hold_census(struct catalog *c, catalog_census_each each, void *arg);
void hold_clear(struct catalog *c);

/* ---- catalog_change ---- */

/* Carries one change out, as often as others come in between. 0, -ESTALE (list, and try again), or an error of
 * catalog.h. */
int change_run(struct catalog *c, struct change *change);
/* Carries out the first changes of a queue in one transaction, as many as don't touch each other. How many; 0: `first`
 * has to be run alone. *status: of all of them, 0 or an outage, of which nobody knows whether it came before or after. */
size_t change_run_together(struct catalog *c, struct change *first, int *status);
/* Tells the caller and frees it. */
void change_finish(struct catalog *c, struct change *change, int status);
void change_free(struct change *change);
/* Adds a directory to those that are cleared. */
void change_doom(struct catalog *c, uint64_t dir);

/* ---- catalog_sweep ---- */

/* Clears one batch of what nobody reaches. */
int sweep_clear(struct catalog *c);
/* A round of sweeping, when it is due. */
int sweep_round(struct catalog *c);
/* After an outage: nobody's absence counts from before. */
void sweep_restart(struct catalog *c);
/* Undoes publications that were reported as failed. */
int sweep_doubts(struct catalog *c);
void sweep_doubt_add(struct catalog *c, const struct model_id *version);
void sweep_doubt_drop(struct catalog *c, const struct model_id *version);
/* All we have and the service lacks, after it was replaced. */
int sweep_republish(struct catalog *c);
/* Gives a new service its instance, unless another node was faster. */
int sweep_instance(struct catalog *c);

/* ---- catalog_queue ---- */

void queue_wake(struct catalog *c);
int queue_serve(struct catalog *c, const char *address, catalog_done done, void *arg);
/* What is still queued when the thread has ended. */
void queue_fail(struct catalog *c, int status);

/* ---- catalog_loop ---- */

void *loop_main(void *catalog);
/* Frees all that catalog_open made; the thread has ended or never began. */
void catalog_free(struct catalog *c);

#endif
