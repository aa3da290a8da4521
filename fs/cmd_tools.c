#include "fs/cmd_tools.h"

#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "meta/base/util.h"

/* ---- options ---- */

void cmd_help_print(const struct cmd *cmd, FILE *out)
{
    fprintf(out, "usage: p2pfs %s\n%s\n", cmd->usage, cmd->summary);
    if (cmd->details)
        fprintf(out, "\n%s", cmd->details);
}

/* One option at argv[*at]; -1: go on. */
static int option_take(const struct cmd *cmd, const struct cmd_option *options, char **argv,
                       int argc, int *at)
{
    char problem[256];
    const char *name = argv[*at] + 2;
    size_t length = strcspn(name, "=");
    for (const struct cmd_option *option = options; option->name; option++) {
        if (strlen(option->name) != length || strncmp(option->name, name, length) != 0)
            continue;
        if (option->flag && name[length] == '=') {
            snprintf(problem, sizeof(problem), "--%s takes no value", option->name);
            return cmd_usage(cmd, problem);
        }
        if (option->flag) {
            *option->flag = true;
        } else if (name[length] == '=') {
            *option->value = name + length + 1;
        } else if (*at + 1 < argc) {
            *option->value = argv[++*at];
        } else {
            snprintf(problem, sizeof(problem), "--%s needs a value", option->name);
            return cmd_usage(cmd, problem);
        }
        return -1;
    }
    snprintf(problem, sizeof(problem), "unknown option '%.100s'", argv[*at]);
    return cmd_usage(cmd, problem);
}

int cmd_options(const struct cmd *cmd, int *argc, char ***argv, const struct cmd_option *options)
{
    int kept = 0;
    bool ended = false;
    char **words = *argv;
    for (int i = 1; i < *argc; i++) {
        if (!ended && (strcmp(words[i], "-h") == 0 || strcmp(words[i], "--help") == 0)) {
            cmd_help_print(cmd, stdout);
            return 0;
        }
        if (!ended && strcmp(words[i], "--") == 0) {
            ended = true;
        } else if (!ended && strncmp(words[i], "--", 2) == 0) {
            int status = option_take(cmd, options, words, *argc, &i);
            if (status >= 0)
                return status;
        } else if (!ended && words[i][0] == '-' && words[i][1]) {
            char problem[256];
            snprintf(problem, sizeof(problem), "unknown option '%.100s'", words[i]);
            return cmd_usage(cmd, problem);
        } else {
            words[1 + kept++] = words[i];
        }
    }
    *argv = words + 1;
    *argc = kept;
    return -1;
}

/* ---- requests ---- */

void cmd_error(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("p2pfs: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
}

int cmd_ask_json(const char *root, struct json_out *request, char **text, struct json **parsed)
{
    size_t length;
    json_end(request);
    util_autofree char *line = json_take(request, &length);
    if (!line) {
        cmd_error("out of memory");
        return -ENOMEM;
    }
    int rc = cmd_ask(root, line, text);
    if (rc < 0)
        return rc;
    *parsed = json_parse(*text, strlen(*text));
    if (*parsed)
        return 0;
    cmd_error("out of memory");
    free(*text);
    *text = NULL;
    return -ENOMEM;
}

int cmd_ask_path(const char *root, const char *op, const char *path, char **text,
                 struct json **parsed)
{
    struct json_out request = {0};
    json_object(&request, NULL);
    json_put_text(&request, "op", op);
    json_put_name(&request, "path", path);
    return cmd_ask_json(root, &request, text, parsed);
}

int cmd_each_path(int argc, char **argv, int (*one)(const char *root, const char *below, void *arg),
                  void *arg)
{
    int status = 0;
    for (int i = 0; i < argc; i++) {
        char *root = NULL, *below = NULL;
        int rc = cmd_mount_find(argv[i], &root, &below);
        if (rc == 0)
            rc = one(root, below, arg);
        if (rc < 0)
            status = 1;
        free(root);
        free(below);
    }
    return status;
}

static int each_ask(const char *root, const char *below, void *op)
{
    char *text = NULL;
    struct json *answer = NULL;
    int rc = cmd_ask_path(root, op, below, &text, &answer);
    json_free(answer);
    free(text);
    return rc;
}

int cmd_run_each(const struct cmd *cmd, int argc, char **argv)
{
    const struct cmd_option options[] = {{.name = NULL}};
    int status = cmd_options(cmd, &argc, &argv, options);
    if (status >= 0)
        return status;
    if (argc == 0)
        return cmd_usage(cmd, "no path");
    return cmd_each_path(argc, argv, each_ask, (void *)cmd->name);
}

int cmd_run_report(const struct cmd *cmd, int argc, char **argv,
                   int (*print)(const struct json *answer))
{
    bool as_json = false;
    const struct cmd_option options[] = {{.name = "json", .flag = &as_json}, {.name = NULL}};
    int status = cmd_options(cmd, &argc, &argv, options);
    if (status >= 0)
        return status;
    if (argc > 1)
        return cmd_usage(cmd, "more than one path");
    char *root = NULL, *below = NULL, *text = NULL;
    struct json *answer = NULL;
    int rc = cmd_mount_find_any(argc ? argv[0] : NULL, &root, &below);
    if (rc == 0)
        rc = cmd_ask_path(root, cmd->name, below, &text, &answer);
    if (rc == 0 && as_json)
        fputs(text, stdout);
    else if (rc == 0)
        rc = print(answer);
    json_free(answer);
    free(text);
    free(root);
    free(below);
    return rc < 0;
}

/* ---- output ---- */

void cmd_put_name(FILE *out, const char *json_text)
{
    util_autofree char *name = json_name(json_text ? json_text : "");
    bool terminal = isatty(fileno(out));
    for (const char *c = name ? name : ""; *c; c++)
        fputc(terminal && ((unsigned char)*c < 0x20 || *c == 0x7f) ? '?' : *c, out);
}

void cmd_put_size(FILE *out, uint64_t bytes)
{
    char text[32];
    util_size_print(bytes, text, sizeof(text));
    fputs(text, out);
}

struct cmd_grid {
    char *align;
    size_t columns;
    char **cells;
    size_t count, room;
    bool failed;
};

struct cmd_grid *cmd_grid_new(const char *align)
{
    struct cmd_grid *grid = calloc(1, sizeof(*grid));
    char *copy = strdup(align);
    if (!grid || !copy) {
        free(grid);
        free(copy);
        return NULL;
    }
    grid->align = copy;
    grid->columns = strlen(align);
    return grid;
}

void cmd_grid_put(struct cmd_grid *grid, const char *format, ...)
{
    if (!grid || grid->failed)
        return;
    if (grid->count == grid->room) {
        size_t room = grid->room ? 2 * grid->room : 64;
        char **cells = realloc(grid->cells, room * sizeof(*cells));
        if (!cells) {
            grid->failed = true;
            return;
        }
        grid->cells = cells;
        grid->room = room;
    }
    va_list arguments;
    va_start(arguments, format);
    if (vasprintf(&grid->cells[grid->count], format, arguments) >= 0)
        grid->count++;
    else
        grid->failed = true;
    va_end(arguments);
}

void cmd_grid_put_size(struct cmd_grid *grid, uint64_t bytes)
{
    char text[32];
    util_size_print(bytes, text, sizeof(text));
    cmd_grid_put(grid, "%s", text);
}

/* Columns on a terminal: characters, as far as UTF-8 tells. */
static size_t width(const char *text)
{
    size_t columns = 0;
    for (; *text; text++)
        columns += ((unsigned char)*text & 0xc0) != 0x80;
    return columns;
}

int cmd_grid_end(struct cmd_grid *grid, FILE *out)
{
    if (!grid)
        return -ENOMEM;
    size_t *widths = calloc(grid->columns, sizeof(*widths));
    bool failed = grid->failed || !widths;
    for (size_t i = 0; !failed && i < grid->count; i++) {
        size_t w = width(grid->cells[i]);
        if (w > widths[i % grid->columns])
            widths[i % grid->columns] = w;
    }
    for (size_t i = 0; !failed && i < grid->count; i++) {
        size_t column = i % grid->columns;
        bool last = column + 1 == grid->columns;
        int pad = (int)(widths[column] - width(grid->cells[i]));
        if (grid->align[column] == 'r')
            fprintf(out, "%*s%s", pad, "", grid->cells[i]);
        else
            fprintf(out, "%s%*s", grid->cells[i], last ? 0 : pad, "");
        fputs(last ? "\n" : "  ", out);
    }
    for (size_t i = 0; i < grid->count; i++)
        free(grid->cells[i]);
    free(grid->cells);
    free(grid->align);
    free(widths);
    free(grid);
    return failed ? -ENOMEM : 0;
}
