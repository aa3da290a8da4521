#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "fs/cmd_tools.h"
#include "meta/base/util.h"

/* "drwxr-xr-x" */
static void mode_print(const char *kind, const char *octal, char out[11])
{
    unsigned long mode = strtoul(octal ? octal : "0", NULL, 8);
    out[0] = kind[0] == 'd' ? 'd' : kind[0] == 's' ? 'l' : '-';
    for (int i = 0; i < 9; i++)
        out[1 + i] = mode & (0400u >> i) ? "rwx"[i % 3] : '-';
    out[10] = '\0';
    if (mode & 04000)
        out[3] = mode & 0100 ? 's' : 'S';
    if (mode & 02000)
        out[6] = mode & 010 ? 's' : 'S';
    if (mode & 01000)
        out[9] = mode & 01 ? 't' : 'T';
}

/* "2" complete copies, or "1+2": one, and two that are still arriving. */
static void replicas_put(struct cmd_grid *grid, const struct json *entry, bool counted)
{
    uint64_t all = json_u64(entry, "replicas");
    uint64_t complete = json_u64(entry, "complete");
    if (!counted)
        cmd_grid_put(grid, "?");
    else if (all > complete)
        cmd_grid_put(grid, "%llu+%llu", (unsigned long long)complete,
                     (unsigned long long)(all - complete));
    else
        cmd_grid_put(grid, "%llu", (unsigned long long)complete);
}

/* The name as it is shown: below the listed directory. malloc'd. */
static char *name_shown(const struct json *entry, size_t skip)
{
    const char *encoded = json_text(entry, "name");
    char *name = json_name(encoded);
    const char *target = json_text(entry, "target");
    if (!name)
        return strdup("?");
    char *shown = NULL;
    const char *tail = strlen(name) > skip ? name + skip : name;
    util_autofree char *to = target ? json_name(target) : NULL;
    if (asprintf(&shown, "%s%s%s", tail, to ? " -> " : "", to ? to : "") < 0)
        shown = NULL;
    free(name);
    return shown;
}

static void row_put(struct cmd_grid *grid, const struct json *entry, bool counted, size_t skip)
{
    char mode[11], date[32] = "";
    const char *kind = json_text(entry, "kind");
    const char *state = json_text(entry, "state");
    time_t when = (time_t)json_number(entry, "mtime");
    struct tm local;
    kind = kind ? kind : "file";
    mode_print(kind, json_text(entry, "mode"), mode);
    cmd_grid_put(grid, "%s", mode);
    if (state)
        cmd_grid_put_size(grid, json_u64(entry, "size"));
    else
        cmd_grid_put(grid, "-");
    if (localtime_r(&when, &local))
        strftime(date, sizeof(date), "%Y-%m-%d %H:%M", &local);
    cmd_grid_put(grid, "%s", date);
    cmd_grid_put(grid, "%s%s", state ? state : "-", json_true(entry, "pinned") ? ",pinned" : "");
    if (state)
        replicas_put(grid, entry, counted);
    else
        cmd_grid_put(grid, "-");
    util_autofree char *name = name_shown(entry, skip);
    if (name && isatty(STDOUT_FILENO))
        for (char *c = name; *c; c++)
            if ((unsigned char)*c < 0x20 || *c == 0x7f)
                *c = '?';
    cmd_grid_put(grid, "%s", name ? name : "?");
}

static int print(const struct json *answer)
{
    bool counted = json_true(answer, "counted");
    const char *kind = json_text(answer, "kind");
    util_autofree char *path = json_name(json_text(answer, "path"));
    size_t skip = path ? strlen(path) : 0;
    if (skip > 0 && kind && strcmp(kind, "dir") == 0) {
        skip++; /* and the slash */
    } else {
        char *slash = path ? strrchr(path, '/') : NULL;
        skip = slash ? (size_t)(slash + 1 - path) : 0;
    }
    struct cmd_grid *grid = cmd_grid_new("lrllrl");
    const struct json *entry = json_first(json_member(answer, "entries"));
    for (; entry; entry = json_next(entry))
        row_put(grid, entry, counted, skip);
    return cmd_grid_end(grid, stdout);
}

static int run(int argc, char **argv)
{
    return cmd_run_report(&cmd_ls, argc, argv, print);
}

const struct cmd cmd_ls = {
    .name = "ls",
    .usage = "ls [--json] [PATH]",
    .summary = "list every registered name below PATH, with its state here and its replicas",
    .details =
        "Columns: mode, size, modification time, state on this node, replicas, name.\n"
        "States: complete (all bytes here), inplace (registered where it lies on this node),\n"
        "fetching (a pull runs), partial (some shards here), remote (elsewhere), offline (no\n"
        "live node holds it), changed (registered in place, and the file is not what it was).\n"
        "Replicas: complete copies, and behind a + those that are still arriving.\n"
        "PATH may be left out inside a mount, or when there is only one.\n"
        "\n"
        "  --json   one JSON object; names with bytes that are not UTF-8 are %XX-encoded\n",
    .run = run,
};
