/* Cmd: the subcommands, one file each (cmd_NAME.c), in a static table from which main, help and the man-page test live. */
#ifndef P2PFS_FS_CMD_H
#define P2PFS_FS_CMD_H

#include <stdbool.h>
#include <stddef.h>

struct cmd {
    const char *name;
    const char *usage;   /* "pull [--quiet] PATH..." */
    const char *summary; /* one line */
    const char *details; /* for `help NAME`: options and examples, or NULL */
    int (*run)(
        int argc,
        char **argv); /* argv[0] is the subcommand; returns the exit status: 0, 1 failed, 2 usage */
};
extern const struct cmd *const cmd_table[]; /* ends with NULL */
const struct cmd *cmd_find(const char *name);

/* Prints "p2pfs NAME: ..." to stderr and returns 2. */
int cmd_usage(const struct cmd *cmd, const char *problem);

/* The mount above a path. root and below (path relative to the root, "" for the root) are malloc'd. The last component
 * need not exist, and is not followed where it is a symbolic link. Prints one line and returns -ENOENT or -ENOTCONN
 * (with the remedy) when the path is not below a p2pfs mount that answers. */
int cmd_mount_find(const char *path, char **root, char **below);
/* The same for a path that may be left out: NULL means the working directory, or else the only p2pfs mount. */
int cmd_mount_find_any(const char *path, char **root, char **below);
/* One request to that mount's control file; *answer is the JSON text (malloc'd). Prints the mount's own error sentence
 * when the answer is not ok; 0 or negative errno. */
int cmd_ask(const char *root, const char *request, char **answer);
/* The same, but an answer that is not ok is the caller's to judge: 0. Prints a line when the mount does not answer. */
int cmd_exchange(const char *root, const char *request, char **answer, size_t *length);

extern const struct cmd cmd_bench, cmd_doctor, cmd_evict, cmd_help, cmd_info, cmd_limit, cmd_ls,
    cmd_peers, cmd_pin, cmd_pull, cmd_register, cmd_status, cmd_top, cmd_unpin, cmd_unregister,
    cmd_version, cmd_wait, cmd_why;

#endif
