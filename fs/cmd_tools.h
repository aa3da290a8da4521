/* Cmd tools: what the subcommands share: options, requests, and output in columns. One thread. */
#ifndef P2PFS_FS_CMD_TOOLS_H
#define P2PFS_FS_CMD_TOOLS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "fs/cmd.h"
#include "fs/json.h"

/* ---- options ---- */

struct cmd_option {
    const char *name;   /* "json"; the array ends with NULL */
    bool *flag;         /* set by --name */
    const char **value; /* or set by --name=VALUE and --name VALUE */
};
/* Takes the options out of argv, wherever they stand ("--" ends them); --help prints the help. What is left, without
 * argv[0], is argv[0 .. *argc). -1: go on; otherwise the exit status. */
int cmd_options(const struct cmd *cmd, int *argc, char ***argv, const struct cmd_option *options);
void cmd_help_print(const struct cmd *cmd, FILE *out);

/* ---- mounts ---- */

/* The mount points of all p2pfs mounts here, the array and each malloc'd. 0, or -ENOENT after a line on stderr. */
int cmd_mounts(char ***points, size_t *count);

/* An absolute path whose directory has no links; the last component stays as it is. missing: what does not exist (yet)
 * is taken as it stands. malloc'd; NULL: errno says why. */
char *cmd_path_whole(const char *path, bool missing);

/* ---- requests ---- */

/* "p2pfs: ..." on stderr. */
void cmd_error(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Ends a request that was begun as an object, and asks. *text is the answer (malloc'd), *parsed the same; 0, or
 * negative errno after a line on stderr. */
int cmd_ask_json(const char *root, struct json_out *request, char **text, struct json **parsed);
/* {"op": op, "path": path} */
int cmd_ask_path(const char *root, const char *op, const char *path, char **text,
                 struct json **parsed);
/* For each operand: finds its mount and runs one(root, below, arg) -> 0 or negative errno (said already). Exit status. */
int cmd_each_path(int argc, char **argv, int (*one)(const char *root, const char *below, void *arg),
                  void *arg);

/* A whole subcommand: asks the operation of the command's own name for each PATH; nothing to print. Exit status. */
int cmd_run_each(const struct cmd *cmd, int argc, char **argv);
/* A whole subcommand [--json] [PATH]: asks the operation of its name and prints the answer. Exit status. */
int cmd_run_report(const struct cmd *cmd, int argc, char **argv,
                   int (*print)(const struct json *answer));

/* A peer's state in words, as control_peers_put has it. */
const char *cmd_peer_state(const struct json *peer);

/* ---- output ---- */

/* A name from JSON as bytes, with '?' for control characters when `out` is a terminal. */
void cmd_put_name(FILE *out, const char *json_text);
void cmd_put_size(FILE *out, uint64_t bytes); /* "1.5 GiB" */

struct cmd_grid; /* rows of cells, printed in columns that fit; NULL is harmless everywhere */
struct cmd_grid *cmd_grid_new(const char *align); /* a letter per column: 'l' or 'r' */
void cmd_grid_put(struct cmd_grid *grid, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
void cmd_grid_put_size(struct cmd_grid *grid, uint64_t bytes);
/* Prints it and frees it. 0, or -ENOMEM when a row got lost. */
int cmd_grid_end(struct cmd_grid *grid, FILE *out);

#endif
