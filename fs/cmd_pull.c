#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fs/cmd_tools.h"
#include "fs/control.h"
#include "meta/base/util.h"

#define WAIT_MS \
    100 /* how long the mount may hold an answer back; the end of the pull is told at once */
#define BAR_WIDTH 28

struct pull {
    const char *root;
    bool bar;
    uint64_t begun_ns;
    /* Sums over all requests. */
    uint64_t files, failed, bytes, moved, here;
    bool drawn;
};

/* ---- the bar ---- */

static void bar_draw(struct pull *pull, const struct json *answer)
{
    uint64_t bytes = json_u64(answer, "bytes");
    uint64_t here = json_u64(answer, "bytes_here");
    uint64_t before = json_u64(answer, "bytes_before");
    double seconds = json_number(answer, "seconds");
    double rate = seconds > 0 && here > before ? (double)(here - before) / seconds : 0;
    double part = bytes > 0 ? (double)here / (double)bytes : 1;
    int filled = (int)(part * BAR_WIDTH);
    char got[32], all[32], left[32] = "";
    util_size_print(here, got, sizeof(got));
    util_size_print(bytes, all, sizeof(all));
    if (rate > 0) {
        unsigned long s = (unsigned long)((double)(bytes - here) / rate + 0.5);
        snprintf(left, sizeof(left), "  %lu:%02lu left", s / 60, s % 60);
    }
    fprintf(stderr, "\r[%.*s%*s] %3d%%  %s of %s  %.2f GB/s%s\033[K", filled,
            "############################", BAR_WIDTH - filled, "", (int)(part * 100), got, all,
            rate / 1e9, left);
    fflush(stderr);
    pull->drawn = true;
}

static void bar_clear(struct pull *pull)
{
    if (pull->drawn)
        fputs("\r\033[K", stderr);
    pull->drawn = false;
}

/* ---- requests ---- */

static void failures_say(const struct json *answer)
{
    const struct json *one = json_first(json_member(answer, "failures"));
    uint64_t said = 0;
    for (; one; one = json_next(one), said++) {
        util_autofree char *name = json_name(json_text(one, "name"));
        cmd_error("cannot pull '%s': %s", name ? name : "?", json_text(one, "error"));
    }
    uint64_t failed = json_u64(answer, "files_failed");
    if (failed > said)
        cmd_error("and %llu files more", (unsigned long long)(failed - said));
}

static int progress_ask(struct pull *pull, uint64_t job, char **text, struct json **answer)
{
    struct json_out request = {0};
    json_object(&request, NULL);
    json_put_text(&request, "op", "progress");
    json_put_u64(&request, "job", job);
    json_put_u64(&request, "wait_ms", WAIT_MS);
    return cmd_ask_json(pull->root, &request, text, answer);
}

/* Follows a pull that was started to its end. */
static int follow(struct pull *pull, char **text, struct json **answer)
{
    while (!json_true(*answer, "finished")) {
        if (pull->bar)
            bar_draw(pull, *answer);
        uint64_t job = json_u64(*answer, "job");
        json_free(*answer);
        free(*text);
        *answer = NULL;
        *text = NULL;
        int rc = progress_ask(pull, job, text, answer);
        if (rc < 0)
            return rc;
    }
    if (pull->bar && pull->drawn)
        bar_draw(pull, *answer);
    return 0;
}

static int request_run(struct pull *pull, struct json_out *request)
{
    char *text = NULL;
    struct json *answer = NULL;
    int rc = cmd_ask_json(pull->root, request, &text, &answer);
    if (rc == 0)
        rc = follow(pull, &text, &answer);
    bar_clear(pull);
    if (rc == 0) {
        uint64_t here = json_u64(answer, "bytes_here");
        uint64_t before = json_u64(answer, "bytes_before");
        pull->files += json_u64(answer, "files");
        pull->failed += json_u64(answer, "files_failed");
        pull->bytes += json_u64(answer, "bytes");
        pull->here += here;
        pull->moved += here > before ? here - before : 0;
        failures_say(answer);
    }
    json_free(answer);
    free(text);
    return rc;
}

/* ---- the command ---- */

static void closing_print(const struct pull *pull, bool as_json, uint64_t ns)
{
    double seconds = (double)ns / 1e9;
    double rate = ns > 0 ? (double)pull->moved / (double)ns : 0; /* bytes per ns are GB/s */
    if (as_json) {
        printf("{\"ok\":%s,\"files\":%llu,\"files_failed\":%llu,\"bytes\":%llu,\"bytes_here\":%llu,"
               "\"bytes_moved\":%llu,\"seconds\":%.6f,\"gb_per_s\":%.3f}\n",
               pull->failed ? "false" : "true", (unsigned long long)pull->files,
               (unsigned long long)pull->failed, (unsigned long long)pull->bytes,
               (unsigned long long)pull->here, (unsigned long long)pull->moved, seconds, rate);
        return;
    }
    printf("%llu file%s, ", (unsigned long long)(pull->files - pull->failed),
           pull->files - pull->failed == 1 ? "" : "s");
    cmd_put_size(stdout, pull->moved);
    printf(" (%llu bytes) pulled in %.3f s, %.*f GB/s", (unsigned long long)pull->moved, seconds,
           rate < 0.1 && pull->moved > 0 ? 5 : 2, rate);
    if (pull->here > pull->moved) {
        fputs("; ", stdout);
        cmd_put_size(stdout, pull->here - pull->moved);
        fputs(" were here already", stdout);
    }
    putchar('\n');
}

/* Every path must be of one mount, so that one bar shows all of it. */
static int paths_find(int argc, char **argv, char **root, char **belows)
{
    for (int i = 0; i < argc; i++) {
        char *its = NULL;
        int rc = cmd_mount_find(argv[i], &its, &belows[i]);
        if (rc < 0)
            return rc;
        if (*root && strcmp(*root, its) != 0) {
            cmd_error("%s is on another mount than %s: pull them one after the other", argv[i],
                      argv[0]);
            free(its);
            return -EXDEV;
        }
        free(*root);
        *root = its;
    }
    return 0;
}

static int run_all(struct pull *pull, int argc, char *const *belows)
{
    int rc = 0;
    for (int at = 0; rc == 0 && at < argc;) {
        struct json_out request = {0};
        json_object(&request, NULL);
        json_put_text(&request, "op", "pull");
        json_put_u64(&request, "wait_ms", WAIT_MS);
        json_array(&request, "paths");
        for (; at < argc && request.length < CONTROL_REQUEST_MAX / 2; at++)
            json_put_name(&request, NULL, belows[at]);
        json_end(&request);
        rc = request_run(pull, &request);
    }
    return rc;
}

static int run(int argc, char **argv)
{
    bool quiet = false, as_json = false;
    const struct cmd_option options[] = {
        {.name = "quiet", .flag = &quiet}, {.name = "json", .flag = &as_json}, {.name = NULL}};
    int status = cmd_options(&cmd_pull, &argc, &argv, options);
    if (status >= 0)
        return status;
    if (argc == 0)
        return cmd_usage(&cmd_pull, "no path");
    char *root = NULL;
    char **belows = calloc((size_t)argc, sizeof(*belows));
    int rc = belows ? paths_find(argc, argv, &root, belows) : -ENOMEM;
    if (rc == 0) {
        struct pull pull = {.root = root,
                            .bar = !quiet && !as_json && isatty(STDERR_FILENO),
                            .begun_ns = util_now_ns()};
        rc = run_all(&pull, argc, belows);
        if (rc == 0 && !quiet)
            closing_print(&pull, as_json, util_now_ns() - pull.begun_ns);
        if (rc == 0 && pull.failed > 0)
            rc = -EIO;
    }
    for (int i = 0; belows && i < argc; i++)
        free(belows[i]);
    free(belows);
    free(root);
    return rc < 0;
}

const struct cmd cmd_pull = {
    .name = "pull",
    .usage = "pull [--quiet] [--json] PATH...",
    .summary = "fetch files, or every file below directories, to this node, and wait for them",
    .details =
        "On a terminal a bar shows percent, rate and time left. One line at the end says how many\n"
        "bytes came, in how many seconds, and GB/s (10^9 bytes a second). Interrupting the\n"
        "command does not stop the pull. It fails when a file cannot be fetched, with the cause;\n"
        "at once when the cache could not hold all of it.\n"
        "\n"
        "  --quiet   print nothing but errors\n"
        "  --json    one JSON object at the end\n"
        "\n"
        "  p2pfs pull /mnt/p2pfs/llama-70b\n",
    .run = run,
};
