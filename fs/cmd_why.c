#include <stdlib.h>
#include <string.h>

#include "fs/cmd_tools.h"
#include "meta/base/util.h"

static void seconds_put(struct cmd_grid *grid, double seconds)
{
    if (seconds >= 1)
        cmd_grid_put(grid, "%.2f s", seconds);
    else if (seconds >= 1e-3)
        cmd_grid_put(grid, "%.1f ms", seconds * 1e3);
    else
        cmd_grid_put(grid, "%.0f us", seconds * 1e6);
}

static unsigned long long number(const struct json *object, const char *key)
{
    return json_u64(object, key);
}

static void summary_print(const struct json *why)
{
    double took = json_number(why, "took_s");
    uint64_t bytes = json_u64(why, "bytes_pulled");
    cmd_put_name(stdout, json_text(why, "name"));
    printf(": %llu of %llu shards are here, %llu were pulled: ", number(why, "shards_present"),
           number(why, "shards"), number(why, "shards_pulled"));
    cmd_put_size(stdout, bytes);
    printf(" in %.3f s", took);
    if (took > 0)
        printf(", %.2f GB/s", (double)bytes / took / 1e9);
    printf("; %llu asks in vain\n\n", number(why, "missed"));
}

/* Times of a node's shards: on average, and of the worst. */
static int nodes_print(const struct json *why)
{
    struct cmd_grid *grid = cmd_grid_new("llrrrrrrrrrr");
    const char *const head[] = {"FROM", "OVER",  "SHARDS", "BYTES", "QUEUED", "WORST",
                                "WIRE", "WORST", "VERIFY", "VAIN",  "URGENT", "TWICE"};
    for (size_t i = 0; i < util_count(head); i++)
        cmd_grid_put(grid, "%s", head[i]);
    const struct json *from = json_first(json_member(why, "from"));
    for (; from; from = json_next(from)) {
        double shards = (double)json_u64(from, "shards");
        cmd_grid_put(grid, "%s", json_text(from, "node"));
        cmd_grid_put(grid, "%s", json_text(from, "transport"));
        cmd_grid_put(grid, "%llu", number(from, "shards"));
        cmd_grid_put_size(grid, json_u64(from, "bytes"));
        seconds_put(grid, json_number(from, "queued_s") / shards);
        seconds_put(grid, json_number(from, "queued_max_s"));
        seconds_put(grid, json_number(from, "wire_s") / shards);
        seconds_put(grid, json_number(from, "wire_max_s"));
        seconds_put(grid, json_number(from, "verify_s") / shards);
        cmd_grid_put(grid, "%llu", number(from, "missed"));
        cmd_grid_put(grid, "%llu", number(from, "urgent"));
        cmd_grid_put(grid, "%llu", number(from, "hedged"));
    }
    return cmd_grid_end(grid, stdout);
}

static int slowest_print(const struct json *why)
{
    struct cmd_grid *grid = cmd_grid_new("lrlrrrr");
    const char *const head[] = {"SLOWEST", "SHARD", "FROM", "QUEUED", "WIRE", "VERIFY", "VAIN"};
    const struct json *shard = json_first(json_member(why, "slowest"));
    for (size_t i = 0; i < util_count(head); i++)
        cmd_grid_put(grid, "%s", head[i]);
    for (; shard; shard = json_next(shard)) {
        cmd_grid_put(grid, " ");
        cmd_grid_put(grid, "%llu", number(shard, "shard"));
        cmd_grid_put(grid, "%s", json_text(shard, "node"));
        seconds_put(grid, json_number(shard, "queued_s"));
        seconds_put(grid, json_number(shard, "wire_s"));
        seconds_put(grid, json_number(shard, "verify_s"));
        cmd_grid_put(grid, "%llu", number(shard, "missed"));
    }
    return cmd_grid_end(grid, stdout);
}

static int print(const struct json *why)
{
    if (!json_true(why, "pulled")) {
        cmd_put_name(stdout, json_text(why, "name"));
        puts(": no shard of it was pulled: it was registered here, or nothing has come yet");
        return 0;
    }
    summary_print(why);
    int rc = nodes_print(why);
    putchar('\n');
    return rc < 0 ? rc : slowest_print(why);
}

static int run(int argc, char **argv)
{
    bool as_json = false;
    const struct cmd_option options[] = {{.name = "json", .flag = &as_json}, {.name = NULL}};
    int status = cmd_options(&cmd_why, &argc, &argv, options);
    if (status >= 0)
        return status;
    if (argc != 1)
        return cmd_usage(&cmd_why, argc ? "more than one name" : "no name");
    char *root = NULL, *below = NULL, *text = NULL;
    struct json *answer = NULL;
    struct json_out request = {0};
    int rc = cmd_mount_find(argv[0], &root, &below);
    if (rc == 0) {
        json_object(&request, NULL);
        json_put_text(&request, "op", "why");
        json_put_name(&request, "path", below);
        json_put_bool(&request, "whole", as_json);
        rc = cmd_ask_json(root, &request, &text, &answer);
    }
    if (rc == 0 && as_json)
        fputs(text, stdout);
    else if (rc == 0)
        rc = print(answer);
    json_free(answer);
    free(text);
    free(root);
    free(below);
    return rc < 0;
}

const struct cmd cmd_why = {
    .name = "why",
    .usage = "why [--json] NAME",
    .summary = "show how a file came to this node, and where the time went",
    .details =
        "First the sums, then a row for each node that shards came from, then the slowest shards.\n"
        "QUEUED: from the ask to the grant. WIRE: from the grant to the last byte. VERIFY:\n"
        "hashing, most of it while bytes still came. Times are of one shard: on average, and of\n"
        "the WORST. VAIN: asks before that brought nothing (busy, failed, stalled, wrong).\n"
        "URGENT: a reader waited. TWICE: asked of a second node too, since the first was slow.\n"
        "It is kept with the replica, and gone when that is evicted.\n"
        "\n"
        "  --json   one JSON object, with every shard in \"each\"\n"
        "\n"
        "  p2pfs why /mnt/p2pfs/llama-70b/model-00001.safetensors\n",
    .run = run,
};
