/* Control parts: what the files control*.c share; nobody else includes it.
 *
 * Every request runs on a short-lived thread of its own, so an op is written straight down and may wait for the
 * catalog or the engine; no FUSE worker ever does. Pulls go on after their request as jobs. */
#ifndef P2PFS_FS_CONTROL_PARTS_H
#define P2PFS_FS_CONTROL_PARTS_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "fs/control.h"
#include "fs/house.h"
#include "fs/json.h"

struct control_job;

struct control {
    struct house *house;
    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t quiet; /* the last thread has ended */
    unsigned threads;
    bool closing;
    struct control_job *jobs;
    uint64_t last_job;
};

/* Runs run(arg) on a thread of its own. -EAGAIN: too many run already, or no thread to be had; -ESHUTDOWN. */
int control_spawn(struct control *control, void (*run)(void *arg), void *arg);
bool control_closing(struct control *control);

struct control_call {
    struct control *control;
    uint32_t uid; /* who asks */
    const struct json *request;
    struct json_out *answer;
};
/* Opens the answer {"ok": true, ...}; the caller adds members and ends it with json_end. */
void control_good(struct control_call *call);
/* The whole answer {"ok": false, ...}; error: negative errno. */
void control_fail(struct control_call *call, int error, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Waits for one callback of the catalog or the engine on the request's thread. The callback may come after the waiter
 * has given up (the mount closes), so both sides hold the wait. */
struct control_wait;
struct control_wait *control_wait_new(struct control *control, void *data,
                                      void (*data_free)(void *data));
void *control_wait_data(struct control_wait *wait);
void control_wait_catalog(void *wait, int status,
                          const struct model_entry *entry); /* a catalog_done */
void control_wait_engine(void *wait, int status);           /* an engine_done */
/* `started`: what the call that takes the callback returned; waits only when it is 0. The callback's status, or
 * -ESHUTDOWN; frees the wait but for *data, which is the caller's unless -ESHUTDOWN. */
int control_wait_end(struct control_wait *wait, int started);

/* The entry that a path below the root means. Symbolic links in the middle are followed, the last one with `follow`.
 * -ENOENT, -ENOTDIR, -ELOOP, -EXDEV (leads out of the mount), -ENAMETOOLONG, -ENOMEM. */
int control_resolve(struct control *control, const char *path, bool follow,
                    struct model_entry *out);
/* The entry that a path in JSON (NULL: the root) means; fails the call with a sentence when there is none. *name
 * (malloc'd) is the entry's path below the root. control_target takes the request's member "path". */
int control_target_of(struct control_call *call, const char *text, bool follow,
                      struct model_entry *out, char **name);
int control_target(struct control_call *call, bool follow, struct model_entry *out, char **name);
/* Every entry below a directory (parents first), or just the entry when it is none. A non-zero return of `visit`
 * ends the walk and is returned; what vanishes meanwhile is left out. `path` is below the root. */
typedef int (*control_visit)(void *arg, const char *path, const struct model_entry *entry);
int control_walk(struct control *control, const struct model_entry *top, const char *path,
                 control_visit visit, void *arg);

/* Words for an errno as the metadata gives it. */
const char *control_why(int error);

/* huge: also the huge pages mapped, for which the kernel walks all of this process's memory. */
void control_status_put(struct control *control, struct json_out *out, bool huge);
/* How many live nodes there are besides this one. */
uint64_t control_peers_live(const struct house *house);
void control_peers_put(struct control *control, struct json_out *out);
char *control_metrics(struct control *control, size_t *length);

void control_op_ls(struct control_call *call);
void control_op_info(struct control_call *call);
void control_op_register(struct control_call *call);
void control_op_unregister(struct control_call *call);
void control_op_evict(struct control_call *call);
void control_op_limit(struct control_call *call);
void control_op_why(struct control_call *call);
void control_op_top(struct control_call *call);
void control_op_pin(struct control_call *call);
void control_op_unpin(struct control_call *call);
void control_op_pull(struct control_call *call);
void control_op_progress(struct control_call *call);
void control_jobs_free(struct control *control); /* no thread runs any more */

#endif
