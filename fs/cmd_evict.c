#include <stdlib.h>

#include "fs/cmd_tools.h"

static int one(const char *root, const char *below, void *arg)
{
    struct json_out request = {0};
    struct json *answer = NULL;
    char *text = NULL;
    json_object(&request, NULL);
    json_put_text(&request, "op", "evict");
    json_put_name(&request, "path", below);
    json_put_bool(&request, "force", *(bool *)arg);
    int rc = cmd_ask_json(root, &request, &text, &answer);
    if (rc == 0) {
        printf("evicted %llu files, ", (unsigned long long)json_u64(answer, "files"));
        cmd_put_size(stdout, json_u64(answer, "bytes"));
        putchar('\n');
    }
    json_free(answer);
    free(text);
    return rc;
}

static int run(int argc, char **argv)
{
    bool force = false;
    const struct cmd_option options[] = {{.name = "force", .flag = &force}, {.name = NULL}};
    int status = cmd_options(&cmd_evict, &argc, &argv, options);
    if (status >= 0)
        return status;
    if (argc == 0)
        return cmd_usage(&cmd_evict, "no path");
    return cmd_each_path(argc, argv, one, &force);
}

const struct cmd cmd_evict = {
    .name = "evict",
    .usage = "evict [--force] PATH...",
    .summary = "drop this node's copy of a file, or of every file below a directory",
    .details = "The names stay. What is open here or pinned stays too, and so does what no other\n"
               "live node holds completely. What has no bytes in the cache (files\n"
               "registered in place among them) is passed over.\n"
               "\n"
               "  --force   drop also a last copy: the name is offline until a holder returns\n",
    .run = run,
};
