#include <stdlib.h>
#include <string.h>

#include "fs/cmd_tools.h"
#include "meta/base/util.h"

const char *cmd_peer_state(const struct json *peer)
{
    bool live = json_true(peer, "live"), connected = json_true(peer, "connected");
    if (json_true(peer, "quarantined"))
        return live ? "quarantined" : "gone,quarantined";
    return !live ? "gone" : connected ? "connected" : "live";
}

static int print(const struct json *answer)
{
    struct cmd_grid *grid = cmd_grid_new("llllrrrrrrrrr");
    const char *const head[] = {"NODE", "ADDRESS", "STATE", "OVER",   "DOWN", "UP",     "GOT",
                                "SENT", "RIGHT",   "WRONG", "FAILED", "BUSY", "REFUSED"};
    const char *const counts[] = {"verified", "corrupt", "failed", "busy", "refused"};
    for (size_t i = 0; i < util_count(head); i++)
        cmd_grid_put(grid, "%s", head[i]);
    const struct json *peer = json_first(json_member(answer, "peers"));
    for (; peer; peer = json_next(peer)) {
        char down[32], up[32];
        uint64_t left = json_u64(peer, "quarantine_s");
        util_size_print(json_u64(peer, "rate_down"), down, sizeof(down));
        util_size_print(json_u64(peer, "rate_up"), up, sizeof(up));
        cmd_grid_put(grid, "%s", json_text(peer, "node"));
        cmd_grid_put(grid, "%s", json_text(peer, "address"));
        if (left > 0)
            cmd_grid_put(grid, "%s %llu s", cmd_peer_state(peer), (unsigned long long)left);
        else
            cmd_grid_put(grid, "%s", cmd_peer_state(peer));
        cmd_grid_put(grid, "%s", json_text(peer, "transport"));
        cmd_grid_put(grid, "%s/s", down);
        cmd_grid_put(grid, "%s/s", up);
        cmd_grid_put_size(grid, json_u64(peer, "received"));
        cmd_grid_put_size(grid, json_u64(peer, "sent"));
        for (size_t i = 0; i < util_count(counts); i++)
            cmd_grid_put(grid, "%llu", (unsigned long long)json_u64(peer, counts[i]));
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
    .summary = "list the other nodes, what went to and came from each, and how well",
    .details =
        "States: live (announced), connected (links are open), gone; quarantined: it sent\n"
        "wrong bytes, and is left alone for so many seconds more. DOWN and UP are rates\n"
        "of the last seconds, GOT and SENT bytes since the mount. RIGHT, WRONG and FAILED\n"
        "count shards asked from that node, BUSY the asks that it put off, REFUSED its asks\n"
        "that were put off here.\n"
        "PATH is the mount or any path below it; it may be left out inside a mount, or\n"
        "when there is only one.\n"
        "\n"
        "  --json   one JSON object, the same as in .p2pfs/peers.json\n",
    .run = run,
};
