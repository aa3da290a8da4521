#include <stdlib.h>
#include <string.h>

#include "fs/cmd_tools.h"

static int print(const struct json *answer)
{
    struct cmd_grid *grid = cmd_grid_new("lllrrrrrr");
    const char *const head[] = {"NODE", "ADDRESS",  "STATE",   "LINKS", "RECEIVED",
                                "SENT", "VERIFIED", "CORRUPT", "FAILED"};
    for (size_t i = 0; i < sizeof(head) / sizeof(head[0]); i++)
        cmd_grid_put(grid, "%s", head[i]);
    const struct json *peer = json_first(json_member(answer, "peers"));
    for (; peer; peer = json_next(peer)) {
        cmd_grid_put(grid, "%s", json_text(peer, "node"));
        cmd_grid_put(grid, "%s", json_text(peer, "address"));
        cmd_grid_put(grid, "%s%s",
                     !json_true(peer, "live")       ? "gone"
                     : json_true(peer, "connected") ? "connected"
                                                    : "live",
                     json_true(peer, "quarantined") ? ",quarantined" : "");
        cmd_grid_put(grid, "%llu", (unsigned long long)json_u64(peer, "links"));
        cmd_grid_put_size(grid, json_u64(peer, "received"));
        cmd_grid_put_size(grid, json_u64(peer, "sent"));
        cmd_grid_put(grid, "%llu", (unsigned long long)json_u64(peer, "verified"));
        cmd_grid_put(grid, "%llu", (unsigned long long)json_u64(peer, "corrupt"));
        cmd_grid_put(grid, "%llu", (unsigned long long)json_u64(peer, "failed"));
    }
    return cmd_grid_end(grid, stdout);
}

static int run(int argc, char **argv)
{
    return cmd_run_report(&cmd_peers, argc, argv, print);
}

const struct cmd cmd_peers = {
    .name = "peers",
    .usage = "peers [--json] [PATH]",
    .summary = "list the other nodes and what went to and came from each since the mount",
    .details = "States: live (announced), connected (links are open), gone; quarantined: it sent\n"
               "wrong bytes. VERIFIED, CORRUPT and FAILED count shards asked from that node.\n"
               "PATH is the mount or any path below it; it may be left out inside a mount, or\n"
               "when there is only one.\n"
               "\n"
               "  --json   one JSON object, the same as in .p2pfs/peers.json\n",
    .run = run,
};
