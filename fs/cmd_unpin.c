#include "fs/cmd_tools.h"

static int run(int argc, char **argv)
{
    return cmd_run_each(&cmd_unpin, argc, argv);
}

const struct cmd cmd_unpin = {
    .name = "unpin",
    .usage = "unpin PATH...",
    .summary = "allow a pinned file, or every file below a directory, to be evicted again",
    .details = NULL,
    .run = run,
};
