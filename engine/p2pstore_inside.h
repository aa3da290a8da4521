/* What the files of p2pstore share.
 *
 * A `hold` is what this store has under a name. Its memory is with the engine from the call that names it until
 * `released` (lent); its catalog work is one job on a thread of the store. A request ends when it is decided, and its
 * hold's memory is where it shall be:
 *
 *   register    decided by the job:   0: HOLD_REGISTERED, the memory stays;  error: when the memory is back
 *   get         decided by the pull:  0: HOLD_PULLED;                        error: when the memory is back
 *   unregister  gives the memory back at once; decided by the job, which unlinks
 *   delete      the same; the job withdraws
 *   cancelled   decided there and then, ends when the memory is back; the job goes on behind it
 *
 * A hold goes when it has no memory, no job and no request; but one whose name could not be unlinked stays for another
 * try (HOLD_NAME). */
#ifndef P2PFS_ENGINE_P2PSTORE_INSIDE_H
#define P2PFS_ENGINE_P2PSTORE_INSIDE_H

#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>
#include <uthash.h>

#include "engine/engine.h"
#include "engine/p2pstore.h"
#include "engine/work.h"

struct extents;

#define P2PSTORE_TEXT 512

enum hold_state { HOLD_BUSY, HOLD_REGISTERED, HOLD_PULLED, HOLD_NAME };

struct store_hold {
    struct p2pstore *store;
    char *name;
    enum hold_state state;
    struct replica *replica; /* the engine's; NULL: not yet, or released */
    struct extents *extents; /* the ranges, to compare with */
    bool pulled;             /* the ranges are written */
    bool lent;               /* the engine has the memory */
    bool working;            /* the job is queued or runs */
    struct work_job job;
    struct p2pstore_request *request; /* under way; NULL: none */
    struct model_id version;          /* pulled: zero until known. registered: once published */
    UT_hash_handle hh;
};

struct p2pstore_request {
    atomic_uint references; /* the user's; the store's while it runs or waits for its callback */
    struct p2pstore *store; /* with a reference */
    enum p2pstore_call call;
    char *name;
    p2pstore_callback callback;
    void *arg;
    bool blocking; /* somebody waits: it need not show at the fd */
    struct store_hold *hold;
    struct engine_waiter waiter;
    struct work_job callback_job;
    uint64_t total;

    /* under the store's lock */
    int status; /* -EINPROGRESS until the end */
    bool decided;
    bool cancelled;
    int verdict; /* once decided */
    char error[P2PSTORE_TEXT];
    bool queued; /* among the completed */
    bool freed;  /* by its user */
    struct p2pstore_request *prev, *next;
};

struct p2pstore {
    pid_t pid;
    atomic_uint references; /* the owner's and every request's: of this struct only */
    int event_fd;
    bool overwrite;
    char *node;
    struct handshake_secret secret;
    struct catalog *catalog;
    struct engine *engine;
    struct work *jobs;
    struct work *callbacks;

    pthread_mutex_t gate; /* guards events_to */
    struct engine *events_to;

    pthread_mutex_t
        lock; /* guards all below, holds and requests; taken before every lock of engine and catalog */
    pthread_cond_t changed;
    bool closing;
    unsigned inside;          /* calls of other threads that use catalog and engine */
    struct store_hold *holds; /* uthash by name */
    struct p2pstore_request *running;
    struct p2pstore_request *completed; /* utlist, oldest first */
};

/* Keeps the sentence for p2pstore_error; its value is the status. */
#define store_fail(status, ...) (store_say(__VA_ARGS__), (status))
void store_say(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* The same for one that was made elsewhere; takes it (malloc'd or NULL: strerror speaks). */
int store_fail_why(int status, const char *what, char *why);
/* Brackets every public call. 0 or the error to return. */
int store_enter(struct p2pstore *store);
void store_leave(struct p2pstore *store);
void store_put(struct p2pstore *store);
/* Ends all requests with -ESHUTDOWN and takes all memory back; returns when it is back. `closing` is set. */
void store_requests_end(struct p2pstore *store);

bool store_in_callback(const struct p2pstore *store); /* this thread runs one of its callbacks */

/* p2pstore_request.c. Two references: the user's and the library's. NULL: no memory. */
struct p2pstore_request *store_request_new(struct p2pstore *store, enum p2pstore_call call,
                                           const char *name, p2pstore_callback callback, void *arg);
void store_request_put(struct p2pstore_request *request);
/* How it will end; the first word counts, and `why` NULL lets the errno speak. NULL is harmless. Lock held. */
void store_request_decide(struct p2pstore_request *request, int verdict, const char *why);
/* 0 when it ended with the verdict, or -EALREADY. */
int store_request_cancel(struct p2pstore_request *request, int verdict, const char *why);

/* A hold for memory that is about to be lent; the request is under way on it. Fails as the public calls do. */
int store_hold_new(struct p2pstore *store, struct p2pstore_request *request,
                   const struct engine_range *ranges, size_t count, struct store_hold **out);
/* Undoes that, where the engine has not taken the memory: the request was never started. */
void store_hold_drop(struct store_hold *hold);
struct store_hold *store_hold_find(struct p2pstore *store, const char *name); /* lock held */
/* Whatever of it has come to its end, ends; the hold may be gone on return. Lock held. */
void store_hold_settle(struct store_hold *hold);
/* From the engine (struct store_hold): nothing touches the memory any more. */
void store_hold_released(void *hold);
/* Takes the memory back; store_hold_released follows. Lock held, and let go of meanwhile: the hold may be gone on return,
 * unless it is working. */
void store_hold_release(struct store_hold *hold);
/* Posts its job, which counts as inside until it calls store_leave. Lock held. */
void store_hold_work(struct store_hold *hold, void (*run)(struct work_job *job));

/* p2pstore_name.c. Blocking means: on the catalog, at most CATALOG_DEADLINE_MS. */
int name_check(const char *name); /* -EINVAL, -ENAMETOOLONG */
/* Where the name's last component belongs; directories are made. *leaf points into name. Blocking. */
int name_parent(struct catalog *catalog, const char *name, uint64_t *parent, const char **leaf);
/* What the name leads to, links followed. -ENOENT, -ENOTDIR, -ELOOP, -ENOMEM. */
int name_resolve(struct catalog *catalog, const char *name, struct model_entry *entry);
/* Unlinks the name if it is still that version's; 0 also when it is not. Blocking. */
int name_unlink(struct catalog *catalog, const char *name, const struct model_id *version);
/* What p2pfs registered files have; the mount shows it. */
struct model_attr name_attr(void);

#endif
