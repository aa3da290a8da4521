#include <stdlib.h>

#include "fs/cmd_tools.h"
#include "fs/options.h"
#include "meta/base/util.h"

static void put(const char *label, uint64_t rate)
{
    char text[32];
    util_size_print(rate, text, sizeof(text));
    printf("%s: %s%s\n", label, rate ? text : "no limit", rate ? "/s" : "");
}

static int ask(const char *root, const char *upload, const char *download, bool as_json)
{
    struct json_out request = {0};
    struct json *answer = NULL;
    char *text = NULL;
    json_object(&request, NULL);
    json_put_text(&request, "op", "limit");
    if (upload)
        json_put_text(&request, "upload", upload);
    if (download)
        json_put_text(&request, "download", download);
    int rc = cmd_ask_json(root, &request, &text, &answer);
    if (rc == 0 && as_json) {
        fputs(text, stdout);
    } else if (rc == 0) {
        put("upload", json_u64(answer, "max_upload"));
        put("download", json_u64(answer, "max_download"));
    }
    json_free(answer);
    free(text);
    return rc;
}

static int run(int argc, char **argv)
{
    const char *upload = NULL, *download = NULL;
    bool as_json = false;
    uint64_t rate;
    const struct cmd_option options[] = {{.name = "upload", .value = &upload},
                                         {.name = "download", .value = &download},
                                         {.name = "json", .flag = &as_json},
                                         {.name = NULL}};
    int status = cmd_options(&cmd_limit, &argc, &argv, options);
    if (status >= 0)
        return status;
    if (argc > 1)
        return cmd_usage(&cmd_limit, "more than one path");
    if ((upload && options_rate_parse(upload, &rate) != 0) ||
        (download && options_rate_parse(download, &rate) != 0))
        return cmd_usage(&cmd_limit, "a rate is bytes a second (K, M, G), at least 64K, or 0");
    char *root = NULL, *below = NULL;
    int rc = cmd_mount_find_any(argc ? argv[0] : NULL, &root, &below);
    if (rc == 0)
        rc = ask(root, upload, download, as_json);
    free(root);
    free(below);
    return rc < 0;
}

const struct cmd cmd_limit = {
    .name = "limit",
    .usage = "limit [--upload=RATE] [--download=RATE] [--json] [PATH]",
    .summary = "show or change how fast a mount may send to and receive from other nodes",
    .details = "RATE is bytes a second, with a suffix K, M or G, at least 64K; 0 lifts the limit.\n"
               "What is not named stays as it is. It counts at once, for transfers under way too,\n"
               "until the end of the mount; max_upload= and max_download= set it from the start.\n"
               "PATH is the mount or any path below it; it may be left out inside a mount, or\n"
               "when there is only one.\n"
               "\n"
               "  --upload=RATE     what goes to other nodes\n"
               "  --download=RATE   what comes from them\n"
               "  --json            one JSON object\n"
               "\n"
               "  p2pfs limit --upload=200M /mnt/p2pfs\n",
    .run = run,
};
