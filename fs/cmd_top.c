#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "fs/cmd_tools.h"
#include "meta/base/util.h"

#define INTERVAL_S 1.0
#define SLOW_PART \
    4 /* a peer is slow that delivers less than this part of the mean of those that deliver */

struct top {
    const char *root, *below;
    bool once, as_json, terminal;
    double interval_s;
    struct json *before; /* the answer before this one, for rates; NULL: there is none */
};

static unsigned long long number(const struct json *object, const char *key)
{
    return json_u64(object, key);
}

/* ---- rates ---- */

/* Bytes a second since the answer before; `now` and `then` are objects of the same thing in both. */
static double rate_of(const struct top *top, const struct json *answer, const struct json *now,
                      const struct json *then, const char *key)
{
    double span = json_number(answer, "clock_s") - json_number(top->before, "clock_s");
    if (!then || span <= 0 || json_u64(now, key) < json_u64(then, key))
        return 0;
    return (double)(json_u64(now, key) - json_u64(then, key)) / span;
}

static const struct json *same_find(const struct json *array, const char *key, const char *value)
{
    const struct json *item = json_first(array);
    for (; item; item = json_next(item)) {
        const char *its = json_text(item, key);
        if (its && value && strcmp(its, value) == 0)
            return item;
    }
    return NULL;
}

/* The first answer has none before it: then the mean since the pull began. */
static double pull_rate(const struct top *top, const struct json *answer, const struct json *pull)
{
    const struct json *then =
        same_find(json_member(top->before, "pulls"), "version", json_text(pull, "version"));
    double seconds = json_number(pull, "seconds");
    if (then)
        return rate_of(top, answer, pull, then, "resident");
    return seconds > 0 ? (double)json_u64(pull, "resident") / seconds : 0;
}

static double peer_rate(const struct top *top, const struct json *answer, const struct json *peer,
                        const char *bytes, const char *rate)
{
    const struct json *then =
        same_find(json_member(top->before, "peers"), "node", json_text(peer, "node"));
    return then ? rate_of(top, answer, peer, then, bytes) : (double)json_u64(peer, rate);
}

/* ---- one picture ---- */

static void rate_put(struct cmd_grid *grid, double bytes_s)
{
    char text[32];
    util_size_print((uint64_t)bytes_s, text, sizeof(text));
    cmd_grid_put(grid, "%s/s", text);
}

static void limit_print(const char *what, uint64_t rate)
{
    if (rate == 0)
        return;
    printf(", %s at most ", what);
    cmd_put_size(stdout, rate);
    fputs("/s", stdout);
}

/* Without an answer before, what the mount itself has measured. */
static double sum_rate(const struct top *top, const struct json *answer, const char *bytes,
                       const char *rate)
{
    if (top->before)
        return rate_of(top, answer, answer, top->before, bytes);
    double sum = 0;
    const struct json *peer = json_first(json_member(answer, "peers"));
    for (; peer; peer = json_next(peer))
        sum += (double)json_u64(peer, rate);
    return sum;
}

static void head_print(const struct top *top, const struct json *answer)
{
    printf("%s: down ", json_text(answer, "node"));
    cmd_put_size(stdout, (uint64_t)sum_rate(top, answer, "bytes_received", "rate_down"));
    fputs("/s, up ", stdout);
    cmd_put_size(stdout, (uint64_t)sum_rate(top, answer, "bytes_served", "rate_up"));
    fputs("/s", stdout);
    limit_print("up", json_u64(answer, "max_upload"));
    limit_print("down", json_u64(answer, "max_download"));
    if (!json_true(answer, "online"))
        fputs(", metadata OFFLINE", stdout);
    fputs("\ncache ", stdout);
    cmd_put_size(stdout, json_u64(answer, "cache_used"));
    fputs(" of ", stdout);
    cmd_put_size(stdout, json_u64(answer, "cache_limit"));
    printf(", %llu readers waiting, %llu shards being served\n", number(answer, "readers_waiting"),
           number(answer, "grants_open"));
}

static void left_put(struct cmd_grid *grid, uint64_t bytes, double rate)
{
    if (rate < 1) {
        cmd_grid_put(grid, "-");
        return;
    }
    unsigned long long s = (unsigned long long)((double)bytes / rate + 0.5);
    cmd_grid_put(grid, "%llu:%02llu", s / 60, s % 60);
}

static int pulls_print(const struct top *top, const struct json *answer)
{
    const struct json *pull = json_first(json_member(answer, "pulls"));
    if (!pull) {
        puts("\nnothing is being pulled");
        return 0;
    }
    struct cmd_grid *grid = cmd_grid_new("rrrrrrl");
    const char *const head[] = {"DONE", "SIZE", "GB/S", "LEFT", "FROM", "READERS", "NAME"};
    for (size_t i = 0; i < util_count(head); i++)
        cmd_grid_put(grid, "%s", head[i]);
    for (; pull; pull = json_next(pull)) {
        uint64_t size = json_u64(pull, "size"), here = json_u64(pull, "resident");
        double rate = pull_rate(top, answer, pull);
        util_autofree char *name = json_name(json_text(pull, "name"));
        cmd_grid_put(grid, "%d%%", size > 0 ? (int)((double)here / (double)size * 100) : 100);
        cmd_grid_put_size(grid, size);
        cmd_grid_put(grid, "%.3f", rate / 1e9);
        left_put(grid, size > here ? size - here : 0, rate);
        cmd_grid_put(grid, "%llu", number(pull, "sources"));
        cmd_grid_put(grid, "%llu", number(pull, "readers_waiting"));
        cmd_grid_put(grid, "%s", name && *name ? name : json_text(pull, "version"));
    }
    putchar('\n');
    return cmd_grid_end(grid, stdout);
}

static double mean_down(const struct top *top, const struct json *answer)
{
    double sum = 0;
    unsigned count = 0;
    const struct json *peer = json_first(json_member(answer, "peers"));
    for (; peer; peer = json_next(peer)) {
        double rate = peer_rate(top, answer, peer, "received", "rate_down");
        sum += rate;
        count += rate > 0;
    }
    return count ? sum / count : 0;
}

static int peers_print(const struct top *top, const struct json *answer)
{
    const struct json *peer = json_first(json_member(answer, "peers"));
    if (!peer)
        return 0;
    struct cmd_grid *grid = cmd_grid_new("lrrrrl");
    const char *const head[] = {"PEER", "DOWN", "UP", "BUSY", "FAILED", "STATE"};
    double mean = mean_down(top, answer);
    for (size_t i = 0; i < util_count(head); i++)
        cmd_grid_put(grid, "%s", head[i]);
    for (; peer; peer = json_next(peer)) {
        double down = peer_rate(top, answer, peer, "received", "rate_down");
        double up = peer_rate(top, answer, peer, "sent", "rate_up");
        if (!json_true(peer, "live") && down == 0 && up == 0)
            continue; /* p2pfs peers remembers who is gone */
        cmd_grid_put(grid, "%s", json_text(peer, "node"));
        rate_put(grid, down);
        rate_put(grid, up);
        cmd_grid_put(grid, "%llu", number(peer, "busy"));
        cmd_grid_put(grid, "%llu", number(peer, "failed"));
        cmd_grid_put(grid, "%s%s", cmd_peer_state(peer),
                     down > 0 && down * SLOW_PART < mean ? ", SLOW" : "");
    }
    putchar('\n');
    return cmd_grid_end(grid, stdout);
}

/* On a terminal each picture is drawn over the one before. */
static int picture(const struct top *top, const struct json *answer)
{
    bool over = top->terminal && !top->once;
    if (over)
        fputs("\033[H\033[2J", stdout);
    head_print(top, answer);
    int rc = pulls_print(top, answer);
    if (rc == 0)
        rc = peers_print(top, answer);
    if (!over && !top->once)
        putchar('\n');
    return rc;
}

/* ---- the command ---- */

/* Strings have no newlines in JSON, so none is missed. */
static void line_print(const char *text)
{
    for (; *text; text++)
        if (*text != '\n')
            putchar(*text);
    putchar('\n');
}

static int show(struct top *top)
{
    char *text = NULL;
    struct json *answer = NULL;
    int rc = cmd_ask_path(top->root, "top", top->below, &text, &answer);
    if (rc < 0)
        return rc;
    if (top->as_json)
        line_print(text);
    else
        rc = picture(top, answer);
    free(text);
    json_free(top->before);
    top->before = answer;
    if (fflush(stdout) != 0)
        return -1; /* nobody reads it any more */
    return rc;
}

static void pause_for(double seconds)
{
    struct timespec pause = {.tv_sec = (time_t)seconds,
                             .tv_nsec = (long)((seconds - (double)(time_t)seconds) * 1e9)};
    nanosleep(&pause, NULL);
}

static int run(int argc, char **argv)
{
    struct top top = {.interval_s = INTERVAL_S, .terminal = isatty(STDOUT_FILENO)};
    const char *interval = NULL;
    const struct cmd_option options[] = {{.name = "once", .flag = &top.once},
                                         {.name = "interval", .value = &interval},
                                         {.name = "json", .flag = &top.as_json},
                                         {.name = NULL}};
    int status = cmd_options(&cmd_top, &argc, &argv, options);
    if (status >= 0)
        return status;
    if (argc > 1)
        return cmd_usage(&cmd_top, "more than one path");
    char *end = NULL;
    if (interval)
        top.interval_s = strtod(interval, &end);
    if (interval &&
        (end == interval || *end || !(top.interval_s >= 0.05) || top.interval_s > 86400))
        return cmd_usage(&cmd_top, "--interval is a number of seconds, at least 0.05");
    char *root = NULL, *below = NULL;
    int rc = cmd_mount_find_any(argc ? argv[0] : NULL, &root, &below);
    top.root = root;
    top.below = below;
    while (rc == 0) {
        rc = show(&top);
        if (rc < 0 || top.once)
            break;
        pause_for(top.interval_s);
    }
    json_free(top.before);
    free(root);
    free(below);
    return rc < 0;
}

const struct cmd cmd_top = {
    .name = "top",
    .usage = "top [--once] [--interval=S] [--json] [PATH]",
    .summary = "watch what moves: progress of each file, rates of each peer, the cache",
    .details =
        "Draws itself anew every second until it is interrupted. Files that are being pulled come\n"
        "with what is done, GB/s (10^9 bytes a second), minutes and seconds left, how many\n"
        "links deliver and how many reads wait; peers with their rates down and up, how often\n"
        "they were busy, and shards that they failed to deliver. SLOW: less than a quarter of\n"
        "the mean of those that deliver.\n"
        "PATH is the mount or any path below it; it may be left out inside a mount, or\n"
        "when there is only one.\n"
        "\n"
        "  --once         show it once; rates are then those of the last seconds\n"
        "  --interval=S   seconds between pictures (1)\n"
        "  --json         one JSON object a line, with totals instead of rates\n",
    .run = run,
};
