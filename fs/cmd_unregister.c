#include "fs/cmd_tools.h"

static int run(int argc, char **argv)
{
    return cmd_run_each(&cmd_unregister, argc, argv);
}

const struct cmd cmd_unregister = {
    .name = "unregister",
    .usage = "unregister PATH...",
    .summary = "remove a name, or a directory with all that is below it, at once, on every node",
    .details = "All nodes see the whole tree disappear in one step, and drop its bytes when their\n"
               "last reader closes. Files that were registered in place are not touched. A\n"
               "symbolic link is removed itself, not what it leads to.\n",
    .run = run,
};
