#include <stdlib.h>
#include <string.h>

#include "fs/cmd_tools.h"
#include "meta/base/util.h"

static void row(struct cmd_grid *grid, const char *label, const char *text)
{
    cmd_grid_put(grid, "%s", label);
    cmd_grid_put(grid, "%s", text ? text : "");
}

static unsigned long long number(const struct json *status, const char *key)
{
    return json_u64(status, key);
}

static void node_rows(struct cmd_grid *grid, const struct json *status)
{
    unsigned long long up = number(status, "uptime_s");
    util_autofree char *point = json_name(json_text(status, "mountpoint"));
    util_autofree char *meta = json_name(json_text(status, "meta"));
    cmd_grid_put(grid, "node:");
    cmd_grid_put(grid, "%s at %s, boot %s", json_text(status, "node"), json_text(status, "address"),
                 json_text(status, "boot"));
    row(grid, "mounted at:", point);
    cmd_grid_put(grid, "up:");
    cmd_grid_put(grid, "%llu:%02llu:%02llu, p2pfs %s, pid %llu", up / 3600, up / 60 % 60, up % 60,
                 json_text(status, "version"), number(status, "pid"));
    cmd_grid_put(grid, "metadata:");
    if (json_true(status, "online"))
        cmd_grid_put(grid, "%s, online", meta ? meta : "");
    else
        cmd_grid_put(grid, "%s, OFFLINE for %llu s: names stay readable, registering fails",
                     meta ? meta : "", number(status, "offline_s"));
    cmd_grid_put(grid, "peers:");
    cmd_grid_put(grid, "%llu live", number(status, "peers_live"));
}

/* Only a limit is worth a line. */
static void rate_row(struct cmd_grid *grid, const char *label, uint64_t rate)
{
    char text[32];
    if (rate == 0)
        return;
    util_size_print(rate, text, sizeof(text));
    cmd_grid_put(grid, "%s", label);
    cmd_grid_put(grid, "at most %s/s", text);
}

static void engine_rows(struct cmd_grid *grid, const struct json *status)
{
    char used[32], limit[32], bytes[32], in[32], out[32], reserve[32];
    const char *why = json_text(status, "storage_why");
    util_size_print(json_u64(status, "cache_used"), used, sizeof(used));
    util_size_print(json_u64(status, "cache_limit"), limit, sizeof(limit));
    util_size_print(json_u64(status, "bytes"), bytes, sizeof(bytes));
    util_size_print(json_u64(status, "bytes_received"), in, sizeof(in));
    util_size_print(json_u64(status, "bytes_served"), out, sizeof(out));
    util_size_print(json_u64(status, "reserve"), reserve, sizeof(reserve));
    cmd_grid_put(grid, "names:");
    cmd_grid_put(grid, "%llu files (%s), %llu directories, %llu symbolic links",
                 number(status, "files"), bytes, number(status, "dirs"),
                 number(status, "symlinks"));
    cmd_grid_put(grid, "cache:");
    cmd_grid_put(grid, "%s of %s used, %llu replicas, %llu of them complete", used, limit,
                 number(status, "replicas"), number(status, "replicas_complete"));
    cmd_grid_put(grid, "storage:");
    cmd_grid_put(grid, "%s%s%s%s, %llu huge pages mapped; %s cleared ahead",
                 json_text(status, "storage"), why && *why ? " (" : "", why ? why : "",
                 why && *why ? ")" : "", number(status, "storage_huge_pages"), reserve);
    cmd_grid_put(grid, "moving:");
    cmd_grid_put(grid, "%llu pulls running, %llu readers waiting; %s received, %s served",
                 number(status, "pulls_running"), number(status, "readers_waiting"), in, out);
    rate_row(grid, "upload:", json_u64(status, "max_upload"));
    rate_row(grid, "download:", json_u64(status, "max_download"));
    const char *transport = json_item_text(json_first(json_member(status, "transports")));
    cmd_grid_put(grid, "how:");
    cmd_grid_put(grid, "%s, %llu lanes on %s, fetch=%s", transport, number(status, "lanes"),
                 json_text(status, "loop"), json_text(status, "fetch"));
    const char *path_why = json_text(status, "io_path_why");
    cmd_grid_put(grid, "reads:");
    cmd_grid_put(grid, "%s%s%s", json_text(status, "io_path"), path_why && *path_why ? ": " : "",
                 path_why ? path_why : "");
}

static int print(const struct json *status)
{
    struct cmd_grid *grid = cmd_grid_new("ll");
    node_rows(grid, status);
    engine_rows(grid, status);
    return cmd_grid_end(grid, stdout);
}

static int run(int argc, char **argv)
{
    return cmd_run_report(&cmd_status, argc, argv, print);
}

const struct cmd cmd_status = {
    .name = "status",
    .usage = "status [--json] [PATH]",
    .summary = "show how a mount fares: node, metadata, peers, cache, transfers",
    .details = "PATH is the mount or any path below it; it may be left out inside a mount, or\n"
               "when there is only one.\n"
               "\n"
               "  --json   one JSON object, as .p2pfs/status.json, with the huge pages mapped\n",
    .run = run,
};
