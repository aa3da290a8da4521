#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "fs/cmd_tools.h"
#include "meta/base/util.h"

#define POLL_MS 50

enum wish { EXISTS, COMPLETE, ONLINE, OFFLINE, GONE };

struct waiting {
    enum wish wish;
    const char *root, *below;
    char now[200]; /* how it stood when it was last looked at */
};

static bool state_is(const struct json *info, const char *state)
{
    const char *text = json_text(info, "state");
    return text && strcmp(text, state) == 0;
}

static bool complete(const struct json *info)
{
    const char *kind = json_text(info, "kind");
    if (kind && strcmp(kind, "dir") == 0)
        return json_u64(info, "files_complete") == json_u64(info, "files");
    return state_is(info, "complete") || state_is(info, "inplace");
}

static bool fulfilled(struct waiting *waiting, const struct json *info)
{
    const char *state = json_text(info, "state");
    if (!json_true(info, "ok")) {
        snprintf(waiting->now, sizeof(waiting->now), "it does not exist");
        return waiting->wish == GONE;
    }
    if (state)
        snprintf(waiting->now, sizeof(waiting->now), "it is %s, %llu of %llu shards are here",
                 state, (unsigned long long)json_u64(info, "shards_present"),
                 (unsigned long long)json_u64(info, "shards"));
    else
        snprintf(waiting->now, sizeof(waiting->now), "%llu of %llu files are here",
                 (unsigned long long)json_u64(info, "files_complete"),
                 (unsigned long long)json_u64(info, "files"));
    switch (waiting->wish) {
    case EXISTS:
        return true;
    case COMPLETE:
        return complete(info);
    case ONLINE:
        return !state_is(info, "offline");
    case OFFLINE:
        return state_is(info, "offline");
    case GONE:
        return false;
    }
    return false;
}

/* 1: it is so; 0: not yet; negative errno after a line on stderr. */
static int look(struct waiting *waiting)
{
    struct json_out request = {0};
    size_t length;
    char *text = NULL;
    json_object(&request, NULL);
    json_put_text(&request, "op", "info");
    json_put_name(&request, "path", waiting->below);
    json_put_bool(&request, "brief", waiting->wish != ONLINE && waiting->wish != OFFLINE);
    json_end(&request);
    util_autofree char *line = json_take(&request, &length);
    int rc = line ? cmd_exchange(waiting->root, line, &text, &length) : -ENOMEM;
    if (rc < 0)
        return rc;
    struct json *info = json_parse(text, length);
    uint64_t error = json_u64(info, "errno");
    if (info && (json_true(info, "ok") || error == ENOENT || error == ENOTDIR)) {
        rc = fulfilled(waiting, info);
    } else {
        cmd_error("%s", json_text(info, "error") ? json_text(info, "error") : "out of memory");
        rc = -EIO;
    }
    json_free(info);
    free(text);
    return rc;
}

static int wait_for(struct waiting *waiting, double seconds)
{
    uint64_t begun_ns = util_now_ns();
    for (;;) {
        int rc = look(waiting);
        if (rc != 0)
            return rc < 0 ? rc : 0;
        if (seconds >= 0 && (double)(util_now_ns() - begun_ns) / 1e9 >= seconds) {
            cmd_error("'%s' after %g s: %s", waiting->below, seconds, waiting->now);
            return -ETIMEDOUT;
        }
        struct timespec pause = {.tv_nsec = POLL_MS * 1000000L};
        nanosleep(&pause, NULL);
    }
}

static int run(int argc, char **argv)
{
    bool wishes[5] = {false};
    const char *timeout = NULL;
    const struct cmd_option options[] = {{.name = "complete", .flag = &wishes[COMPLETE]},
                                         {.name = "online", .flag = &wishes[ONLINE]},
                                         {.name = "offline", .flag = &wishes[OFFLINE]},
                                         {.name = "gone", .flag = &wishes[GONE]},
                                         {.name = "timeout", .value = &timeout},
                                         {.name = NULL}};
    int status = cmd_options(&cmd_wait, &argc, &argv, options);
    if (status >= 0)
        return status;
    if (argc != 1)
        return cmd_usage(&cmd_wait, argc ? "more than one path" : "no path");
    struct waiting waiting = {.wish = EXISTS};
    int said = 0;
    for (enum wish wish = COMPLETE; wish <= GONE; wish++)
        if (wishes[wish]) {
            waiting.wish = wish;
            said++;
        }
    if (said > 1)
        return cmd_usage(&cmd_wait, "only one of --complete, --online, --offline and --gone");
    char *end = NULL;
    double seconds = timeout ? strtod(timeout, &end) : -1;
    if (timeout && (end == timeout || *end || !(seconds >= 0)))
        return cmd_usage(&cmd_wait, "--timeout is a number of seconds");
    char *root = NULL, *below = NULL;
    int rc = cmd_mount_find(argv[0], &root, &below);
    waiting.root = root;
    waiting.below = below;
    if (rc == 0)
        rc = wait_for(&waiting, seconds);
    free(root);
    free(below);
    return rc < 0;
}

const struct cmd cmd_wait = {
    .name = "wait",
    .usage = "wait [--complete | --online | --offline | --gone] [--timeout=S] PATH",
    .summary = "wait until a name is registered, or until something else is true of it",
    .details =
        "  --complete    until all bytes of the file, or of all files below it, are on this node\n"
        "                (this fetches nothing: p2pfs pull does)\n"
        "  --online      until a live node holds bytes of it\n"
        "  --offline     until no live node does\n"
        "  --gone        until the name does not exist\n"
        "  --timeout=S   give up after S seconds, with exit status 1; without it: never\n"
        "\n"
        "  p2pfs wait --timeout=60 /mnt/p2pfs/step-2000 && python3 evaluate.py\n",
    .run = run,
};
