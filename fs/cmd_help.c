#include <string.h>

#include "fs/cmd_tools.h"
#include "fs/options.h"
#include "meta/base/util.h"

static int print_all(void)
{
    puts("p2pfs shows the checkpoints of a cluster as a file system; bytes travel between nodes.\n"
         "\n"
         "usage: p2pfs META DIR [-f] [-o OPTION[,OPTION...]]   mount\n"
         "       p2pfs COMMAND [ARGUMENT...]                   look at and steer a mount\n"
         "\n"
         "META: local:///DIRECTORY   metadata in that directory, for the mounts of this machine\n"
         "      redis://[USER@]HOST[:PORT][,HOST[:PORT]...][/DB][?prefix=NAME]\n"
         "                                                      in Redis or Valkey, for all that "
         "reach it\n"
         "      etcd://HOST:PORT[,HOST:PORT...][/PREFIX]        in etcd v3, likewise\n"
         "      http://HOST:PORT/PATH[?prefix=NAME]             in a small HTTP key-value service\n"
         "-f: stay in the foreground. umount DIR ends a mount.\n"
         "\n"
         "commands (p2pfs help COMMAND says more):");
    struct cmd_grid *grid = cmd_grid_new("lll");
    for (size_t i = 0; cmd_table[i]; i++) {
        cmd_grid_put(grid, " ");
        cmd_grid_put(grid, "%s", cmd_table[i]->name);
        cmd_grid_put(grid, "%s", cmd_table[i]->summary);
    }
    if (cmd_grid_end(grid, stdout) < 0)
        return 1;
    puts("\nmount options (-o; p2pfs(1) describes them):");
    grid = cmd_grid_new("lll");
    for (const struct options_entry *option = options_table; option->name; option++) {
        if (option->refused)
            continue;
        cmd_grid_put(grid, " ");
        cmd_grid_put(grid, "%s%s%s", option->name, option->argument ? "=" : "",
                     option->argument ? option->argument : "");
        cmd_grid_put(grid, "%s", option->summary);
    }
    int rc = cmd_grid_end(grid, stdout);
    puts("\nmanual pages: p2pfs(1), mount.p2pfs(8), p2pfs-semantics(7), p2pfs-design(7)");
    return rc < 0;
}

static int run(int argc, char **argv)
{
    const struct cmd_option options[] = {{.name = NULL}};
    int status = cmd_options(&cmd_help, &argc, &argv, options);
    if (status >= 0)
        return status;
    if (argc > 1)
        return cmd_usage(&cmd_help, "more than one command");
    if (argc == 0)
        return print_all();
    const struct cmd *cmd = cmd_find(argv[0]);
    if (!cmd)
        return cmd_usage(&cmd_help, "there is no such command");
    cmd_help_print(cmd, stdout);
    return 0;
}

const struct cmd cmd_help = {
    .name = "help",
    .usage = "help [COMMAND]",
    .summary = "print this overview, or all about one command",
    .run = run,
};
