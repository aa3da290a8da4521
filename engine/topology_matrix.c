#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/topology.h"
#include "meta/base/util.h"

/* A reader of its own rather than a JSON library's: whoever wrote the file is told where it is wrong, and also where it
 * is JSON of another shape. Names of devices and memory need no escapes. */

struct scan {
    const char *text, *at;
    char *why;
};

static int scan_fail(const struct scan *s, const char *expected)
{
    unsigned line = 1, column = 1;
    for (const char *c = s->text; c < s->at; c++) {
        line += *c == '\n';
        column = *c == '\n' ? 1 : column + 1;
    }
    snprintf(s->why, TOPOLOGY_WHY_MAX,
             "line %u, column %u: expected %s; write {\"cpu:0\": [[\"mlx5_0\"], [\"mlx5_1\"]]}",
             line, column, expected);
    return -EINVAL;
}

static char scan_peek(struct scan *s)
{
    s->at += strspn(s->at, " \t\r\n");
    return *s->at;
}

static bool scan_take(struct scan *s, char c)
{
    if (scan_peek(s) != c)
        return false;
    s->at++;
    return true;
}

static int scan_string(struct scan *s, const char *what, char out[TOPOLOGY_NAME_MAX + 1])
{
    if (scan_peek(s) != '"')
        return scan_fail(s, what);
    size_t length = strcspn(s->at + 1, "\"\\\n");
    if (length == 0 || length > TOPOLOGY_NAME_MAX || s->at[1 + length] != '"')
        return scan_fail(s, what);
    memcpy(out, s->at + 1, length);
    out[length] = '\0';
    s->at += length + 2;
    return 0;
}

static bool names_have(const struct topology_names *names, const char *name)
{
    for (unsigned i = 0; i < names->count; i++)
        if (strcmp(names->list[i], name) == 0)
            return true;
    return false;
}

/* A list of devices; into `out`, if it is not NULL, without those that are there. */
static int scan_devices(struct scan *s, struct topology_names *out)
{
    if (!scan_take(s, '['))
        return scan_fail(s, "'[' before a list of devices");
    if (scan_take(s, ']'))
        return 0;
    do {
        char name[TOPOLOGY_NAME_MAX + 1];
        int r = scan_string(s, "a device's name in quotes", name);
        if (r < 0)
            return r;
        if (names_have(out, name))
            continue;
        if (out->count == TOPOLOGY_DEVICES_MAX)
            return scan_fail(s, "fewer devices");
        memcpy(out->list[out->count++], name, sizeof(name));
    } while (scan_take(s, ','));
    return scan_take(s, ']') ? 0 : scan_fail(s, "',' or ']' in a list of devices");
}

static int scan_row(struct scan *s, struct topology_matrix *host, struct topology_matrix *other)
{
    char location[TOPOLOGY_NAME_MAX + 1];
    int r = scan_string(s, "the name of a memory in quotes", location);
    if (r < 0)
        return r;
    if (!scan_take(s, ':'))
        return scan_fail(s, "':' behind the name of a memory");
    struct topology_matrix *to =
        strncmp(location, "cpu:", 4) == 0 || strcmp(location, "*") == 0 ? host : other;
    if (!scan_take(s, '['))
        return scan_fail(s, "'[' before two lists of devices");
    r = scan_devices(s, &to->preferred);
    if (r == 0 && scan_take(s, ','))
        r = scan_devices(s, &to->standby);
    if (r == 0 && !scan_take(s, ']'))
        r = scan_fail(s, "']' behind two lists of devices");
    return r;
}

int topology_matrix_parse(const char *text, struct topology_matrix *out, char why[TOPOLOGY_WHY_MAX])
{
    struct scan s = {.text = text, .at = text, .why = why};
    int r = 0;
    *out = (struct topology_matrix){0};
    struct topology_matrix *other = calloc(1, sizeof(*other));
    if (!other)
        return -ENOMEM;
    if (!scan_take(&s, '{'))
        r = scan_fail(&s, "'{'");
    else
        do {
            r = scan_row(&s, out, other);
        } while (r == 0 && scan_take(&s, ','));
    if (r == 0 && !scan_take(&s, '}'))
        r = scan_fail(&s, "',' or '}' behind a memory's devices");
    if (r == 0 && scan_peek(&s) != '\0')
        r = scan_fail(&s, "nothing behind the last '}'");
    if (r == 0 && out->preferred.count + out->standby.count == 0)
        *out = *other;
    if (r == 0 && out->preferred.count + out->standby.count == 0)
        r = scan_fail(&s, "a device");
    free(other);
    return r;
}

int topology_matrix_load(const char *given, char **text, char why[TOPOLOGY_WHY_MAX])
{
    util_autofree char *read = NULL;
    bool itself = given[strspn(given, " \t\r\n")] == '{';
    if (!itself) {
        size_t room = 0;
        FILE *file = fopen(given, "re");
        bool got = file && getdelim(&read, &room, '\0', file) >= 0;
        int error = errno;
        if (file)
            fclose(file);
        if (!got) {
            snprintf(why, TOPOLOGY_WHY_MAX,
                     "%s; write a file that can be read, or the matrix itself",
                     file ? "it is empty" : strerror(error));
            return -EINVAL;
        }
    }
    struct topology_matrix *matrix = malloc(sizeof(*matrix));
    int status = matrix ? topology_matrix_parse(itself ? given : read, matrix, why) : -ENOMEM;
    free(matrix);
    if (status < 0)
        return status;
    *text = strdup(itself ? given : read);
    return *text ? 0 : -ENOMEM;
}
