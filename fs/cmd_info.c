#include <stdlib.h>
#include <string.h>

#include "fs/cmd_tools.h"
#include "meta/base/util.h"

static void text_row(struct cmd_grid *grid, const char *label, const char *text)
{
    if (text && *text) {
        cmd_grid_put(grid, "%s", label);
        cmd_grid_put(grid, "%s", text);
    }
}

static void size_row(struct cmd_grid *grid, const char *label, uint64_t bytes)
{
    char text[32];
    util_size_print(bytes, text, sizeof(text));
    cmd_grid_put(grid, "%s", label);
    if (bytes < 1024)
        cmd_grid_put(grid, "%llu bytes", (unsigned long long)bytes);
    else
        cmd_grid_put(grid, "%s (%llu bytes)", text, (unsigned long long)bytes);
}

static void holder_rows(struct cmd_grid *grid, const struct json *info)
{
    const struct json *holders = json_member(info, "holders");
    if (!holders) {
        text_row(grid, "replicas:", "unknown, the metadata service does not answer");
        return;
    }
    cmd_grid_put(grid, "replicas:");
    cmd_grid_put(grid, "%llu, complete %llu", (unsigned long long)json_u64(info, "replicas"),
                 (unsigned long long)json_u64(info, "complete"));
    for (const struct json *one = json_first(holders); one; one = json_next(one)) {
        cmd_grid_put(grid, "holder:");
        cmd_grid_put(grid, "%s at %s, %s%s", json_text(one, "node"), json_text(one, "address"),
                     json_true(one, "complete") ? "complete" : "in part",
                     json_true(one, "self") ? " (this node)" : "");
    }
}

static void file_rows(struct cmd_grid *grid, const struct json *info)
{
    const char *transport = json_text(info, "transport");
    size_row(grid, "size:", json_u64(info, "size"));
    cmd_grid_put(grid, "state:");
    cmd_grid_put(grid, "%s%s%s%s", json_text(info, "state"),
                 json_true(info, "pinned") ? ", pinned" : "",
                 transport && *transport ? ", by " : "", transport ? transport : "");
    size_row(grid, "resident:", json_u64(info, "resident"));
    cmd_grid_put(grid, "shards:");
    cmd_grid_put(grid, "%llu of %llu here, %llu bytes each",
                 (unsigned long long)json_u64(info, "shards_present"),
                 (unsigned long long)json_u64(info, "shards"),
                 (unsigned long long)json_u64(info, "shard_size"));
    text_row(grid, "version:", json_text(info, "version"));
    text_row(grid, "digest:", json_text(info, "digest"));
    cmd_grid_put(grid, "origin:");
    util_autofree char *path = json_name(json_text(info, "origin_path"));
    cmd_grid_put(grid, "%s%s%s", json_text(info, "origin_node"), path ? ":" : "", path ? path : "");
    cmd_grid_put(grid, "names:");
    cmd_grid_put(grid, "%llu", (unsigned long long)json_u64(info, "names"));
    cmd_grid_put(grid, "open:");
    cmd_grid_put(grid, "%llu", (unsigned long long)json_u64(info, "open"));
    text_row(grid, "last error:", json_text(info, "last_error"));
    holder_rows(grid, info);
}

static void dir_rows(struct cmd_grid *grid, const struct json *info)
{
    cmd_grid_put(grid, "holds:");
    cmd_grid_put(grid, "%llu files, %llu directories, %llu symbolic links",
                 (unsigned long long)json_u64(info, "files"),
                 (unsigned long long)json_u64(info, "dirs"),
                 (unsigned long long)json_u64(info, "symlinks"));
    size_row(grid, "size:", json_u64(info, "size"));
    size_row(grid, "resident:", json_u64(info, "resident"));
    cmd_grid_put(grid, "complete:");
    cmd_grid_put(grid, "%llu of %llu files", (unsigned long long)json_u64(info, "files_complete"),
                 (unsigned long long)json_u64(info, "files"));
}

static int print(const struct json *info)
{
    struct cmd_grid *grid = cmd_grid_new("ll");
    const char *kind = json_text(info, "kind");
    util_autofree char *name = json_name(json_text(info, "name"));
    text_row(grid, "name:", name && *name ? name : "/");
    text_row(grid, "kind:", kind);
    cmd_grid_put(grid, "mode:");
    cmd_grid_put(grid, "%s, uid %llu, gid %llu", json_text(info, "mode"),
                 (unsigned long long)json_u64(info, "uid"),
                 (unsigned long long)json_u64(info, "gid"));
    if (kind && strcmp(kind, "file") == 0)
        file_rows(grid, info);
    else if (kind && strcmp(kind, "dir") == 0)
        dir_rows(grid, info);
    return cmd_grid_end(grid, stdout);
}

static int one(const char *root, const char *below, void *arg)
{
    char *text = NULL;
    struct json *answer = NULL;
    int rc = cmd_ask_path(root, "info", below, &text, &answer);
    if (rc == 0 && *(bool *)arg)
        fputs(text, stdout);
    else if (rc == 0)
        rc = print(answer);
    json_free(answer);
    free(text);
    return rc;
}

static int run(int argc, char **argv)
{
    bool as_json = false;
    const struct cmd_option options[] = {{.name = "json", .flag = &as_json}, {.name = NULL}};
    int status = cmd_options(&cmd_info, &argc, &argv, options);
    if (status >= 0)
        return status;
    if (argc == 0)
        return cmd_usage(&cmd_info, "no path");
    return cmd_each_path(argc, argv, one, &as_json);
}

const struct cmd cmd_info = {
    .name = "info",
    .usage = "info [--json] PATH...",
    .summary = "say all about a name: version, digest, shards, state here, who holds it",
    .details = "The digest is 'pending' while a file that was registered in place has not been\n"
               "read once. Symbolic links are followed.\n"
               "\n"
               "  --json   a JSON object for each PATH\n",
    .run = run,
};
