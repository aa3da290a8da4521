#include <stdio.h>
#include <stdlib.h>

#include "fs/cmd_tools.h"
#include "p2pfs_config.h"

static int run(int argc, char **argv)
{
    bool as_json = false;
    const struct cmd_option options[] = {{.name = "json", .flag = &as_json}, {.name = NULL}};
    int status = cmd_options(&cmd_version, &argc, &argv, options);
    if (status >= 0)
        return status;
    if (argc > 0)
        return cmd_usage(&cmd_version, "it takes no path");
    if (!as_json) {
        printf("p2pfs %s\n%s\n", P2PFS_VERSION, P2PFS_SUMMARY);
        return 0;
    }
    struct json_out out = {0};
    size_t length;
    json_object(&out, NULL);
    json_put_text(&out, "version", P2PFS_VERSION);
    json_put_text(&out, "built_with", P2PFS_SUMMARY);
    json_end(&out);
    char *text = json_take(&out, &length);
    if (text)
        fputs(text, stdout);
    free(text);
    return text ? 0 : 1;
}

const struct cmd cmd_version = {
    .name = "version",
    .usage = "version [--json]",
    .summary = "print the version and what this build was made with",
    .details = "  --json   one JSON object\n",
    .run = run,
};
