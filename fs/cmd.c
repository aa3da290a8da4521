#include "fs/cmd.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

const struct cmd *cmd_find(const char *name)
{
    for (size_t i = 0; cmd_table[i]; i++)
        if (strcmp(cmd_table[i]->name, name) == 0)
            return cmd_table[i];
    return NULL;
}

int cmd_usage(const struct cmd *cmd, const char *problem)
{
    fprintf(stderr, "p2pfs %s: %s; usage: p2pfs %s (p2pfs help %s says more)\n", cmd->name, problem,
            cmd->usage, cmd->name);
    return 2;
}

/* In the order in which help shows them. */
const struct cmd *const cmd_table[] = {
    &cmd_ls,         &cmd_info,   &cmd_status,  &cmd_top,   &cmd_peers, &cmd_why,   &cmd_register,
    &cmd_unregister, &cmd_pull,   &cmd_wait,    &cmd_evict, &cmd_pin,   &cmd_unpin, &cmd_limit,
    &cmd_bench,      &cmd_doctor, &cmd_version, &cmd_help,  NULL,
};
