/* Control: the hidden directory .p2pfs at the root: reports that can be read, and one file that takes requests.
 *
 *   .p2pfs/status.json  .p2pfs/peers.json  .p2pfs/metrics  .p2pfs/log     rendered when opened
 *   .p2pfs/control      open it read-write, write ONE request (a JSON object, at most CONTROL_REQUEST_MAX bytes, one
 *                       write call), then read the answer to its end; every open file is a conversation of its own
 *
 * Requests: {"op": OP, "path": PATH below the root, ...}; the answer is {"ok": true, ...} or {"ok": false, "errno": N,
 * "error": "one sentence with name and remedy"}. Ops: status, peers, ls (prefix; every name below with size, state,
 * replicas), info, register (files: absolute paths, name), unregister (a name or a whole tree, at once), pull, evict
 * (force), pin, unpin. Reading is open to all who can reach the mount; changing ops are for root and the mounting user.
 * Whatever waits (holder counts) is answered from a callback: a FUSE worker never blocks here. */
#ifndef P2PFS_FS_CONTROL_H
#define P2PFS_FS_CONTROL_H

#include <stddef.h>
#include <stdint.h>

#define CONTROL_DIR         ".p2pfs"
#define CONTROL_REQUEST_MAX (64u << 10)

struct house;
struct control;

enum control_file {
    CONTROL_STATUS,
    CONTROL_PEERS,
    CONTROL_METRICS,
    CONTROL_LOG,
    CONTROL_REQUEST,
    CONTROL_FILES
};
extern const char *const control_names[CONTROL_FILES]; /* "status.json", ... */

int control_open(struct house *house, struct control **control);
void control_close(struct control *control);
/* A report's text as of now; malloc'd, the caller frees. From memory; any thread. -ENOMEM. */
int control_render(struct control *control, enum control_file file, char **text, size_t *length);

/* The answer: malloc'd text, the receiver frees; from any thread, exactly once, perhaps inside the call. */
typedef void (*control_answer)(void *arg, char *text, size_t length);
void control_request(struct control *control, uint32_t uid, const char *request, size_t length,
                     control_answer answer, void *arg);

#endif
