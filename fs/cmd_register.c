#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fs/cmd_tools.h"
#include "fs/control.h"
#include "meta/base/util.h"

/* Puts files into one request until it is full. Returns how many, or negative errno after a line on stderr. */
static int files_put(struct json_out *request, int argc, char **argv)
{
    int count = 0;
    size_t room = CONTROL_REQUEST_MAX / 2;
    json_array(request, "files");
    for (; count < argc && request->length < room; count++) {
        struct stat st;
        /* The last component stays, even where it is a link: it becomes the registered name. */
        util_autofree char *path =
            stat(argv[count], &st) == 0 ? cmd_path_whole(argv[count], false) : NULL;
        if (!path) {
            cmd_error("cannot register '%s': %s", argv[count], strerror(errno));
            return -errno;
        }
        json_put_name(request, NULL, path);
    }
    json_end(request);
    return count;
}

/* One request with as many files as fit; *count says how many that were. */
static int register_some(const char *root, const char *below, int argc, char **argv, int *count)
{
    struct json_out request = {0};
    struct json *answer = NULL;
    char *text = NULL;
    json_object(&request, NULL);
    json_put_text(&request, "op", "register");
    json_put_name(&request, "name", below);
    *count = files_put(&request, argc, argv);
    if (*count < 0) {
        free(request.data);
        return *count;
    }
    int rc = cmd_ask_json(root, &request, &text, &answer);
    json_free(answer);
    free(text);
    return rc;
}

static int run(int argc, char **argv)
{
    const struct cmd_option options[] = {{.name = NULL}};
    int status = cmd_options(&cmd_register, &argc, &argv, options);
    if (status >= 0)
        return status;
    if (argc < 2)
        return cmd_usage(&cmd_register, argc ? "no NAME to register it as" : "no FILE");
    char *root = NULL, *below = NULL;
    int rc = cmd_mount_find(argv[argc - 1], &root, &below);
    int files = argc - 1;
    for (int at = 0, count; rc == 0 && at < files; at += count)
        rc = register_some(root, below, files - at, argv + at, &count);
    free(root);
    free(below);
    return rc < 0;
}

const struct cmd cmd_register = {
    .name = "register",
    .usage = "register FILE... NAME",
    .summary = "register files and directory trees where they lie, without copying a byte",
    .details =
        "NAME is a path below a mount. One FILE gets that name, or its own name inside it when\n"
        "NAME is a directory; several FILEs go into the directory NAME, which is made when it\n"
        "does not exist and then appears with all of them at once. A directory is registered\n"
        "with the whole tree below it. The files must stay where they are and as they are: peers\n"
        "read them from there, and a file that changes is not served any more.\n"
        "\n"
        "  p2pfs register /data/llama-70b /mnt/p2pfs/llama-70b\n",
    .run = run,
};
