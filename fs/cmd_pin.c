#include "fs/cmd_tools.h"

static int run(int argc, char **argv)
{
    return cmd_run_each(&cmd_pin, argc, argv);
}

const struct cmd cmd_pin = {
    .name = "pin",
    .usage = "pin PATH...",
    .summary = "keep this node's copy: a file, or every file below a directory, is not evicted",
    .details =
        "Pinned files are passed over when room is made for pulls, and p2pfs evict refuses them.\n"
        "Pinning fetches nothing: p2pfs pull does.\n",
    .run = run,
};
