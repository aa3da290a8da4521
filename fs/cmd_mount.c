/* Which mount a path belongs to, and talking to it through its control file. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fs/cmd_tools.h"
#include "fs/control.h"
#include "meta/base/util.h"

#define MOUNT_TYPE "fuse.p2pfs"

struct mount {
    char *point;
    char *root;   /* what of the file system is mounted there: "/", or less for a bind mount */
    char *device; /* "major:minor" */
};

struct mounts {
    struct mount *list;
    size_t count;
};

/* ---- the mount table ---- */

/* Undoes the octal escapes of /proc/self/mountinfo, in place. */
static void unescape(char *text)
{
    char *to = text;
    for (const char *from = text; *from; to++) {
        bool octal = from[0] == '\\';
        for (int i = 1; octal && i <= 3; i++)
            octal = from[i] >= '0' && from[i] <= '7';
        if (octal) {
            *to = (char)((from[1] - '0') * 64 + (from[2] - '0') * 8 + (from[3] - '0'));
            from += 4;
        } else {
            *to = *from++;
        }
    }
    *to = '\0';
}

/* A line: id parent major:minor root point options [optional...] - type source superoptions. */
static bool line_parse(char *line, struct mount *out)
{
    char *fields[5];
    char *rest = line;
    for (int i = 0; i < 5; i++)
        if (!(fields[i] = strsep(&rest, " ")))
            return false;
    char *type = rest ? strstr(rest, " - ") : NULL;
    size_t length = strlen(MOUNT_TYPE);
    if (!type || strncmp(type + 3, MOUNT_TYPE, length) != 0 || type[3 + length] != ' ')
        return false;
    *out = (struct mount){
        .device = strdup(fields[2]), .root = strdup(fields[3]), .point = strdup(fields[4])};
    if (!out->device || !out->root || !out->point)
        abort(); /* a few bytes at the start of a short-lived command */
    unescape(out->root);
    unescape(out->point);
    return true;
}

static void mounts_clear(struct mounts *mounts)
{
    for (size_t i = 0; i < mounts->count; i++) {
        free(mounts->list[i].point);
        free(mounts->list[i].root);
        free(mounts->list[i].device);
    }
    free(mounts->list);
}

static int mounts_read(struct mounts *mounts)
{
    *mounts = (struct mounts){0};
    FILE *table = fopen("/proc/self/mountinfo", "re");
    if (!table) {
        cmd_error("/proc/self/mountinfo: %s; is /proc mounted?", strerror(errno));
        return -ENOENT;
    }
    char *line = NULL;
    size_t room = 0;
    struct mount one;
    while (getline(&line, &room, table) > 0)
        if (line_parse(line, &one)) {
            struct mount *list = realloc(mounts->list, (mounts->count + 1) * sizeof(*list));
            if (!list)
                abort();
            mounts->list = list;
            mounts->list[mounts->count++] = one;
        }
    free(line);
    fclose(table);
    return 0;
}

int cmd_mounts(char ***points, size_t *count)
{
    struct mounts mounts;
    int rc = mounts_read(&mounts);
    if (rc < 0)
        return rc;
    *points = calloc(mounts.count + 1, sizeof(**points));
    *count = 0;
    for (size_t i = 0; *points && i < mounts.count; i++) {
        (*points)[(*count)++] = mounts.list[i].point;
        mounts.list[i].point = NULL;
    }
    mounts_clear(&mounts);
    return *points ? 0 : -ENOMEM;
}

/* Whether `path` is `point` or lies below it; *rest is then what follows. */
static bool below_point(const char *path, const char *point, const char **rest)
{
    size_t length = strlen(point);
    if (strcmp(point, "/") == 0)
        length = 0;
    if (strncmp(path, point, length) != 0 || (path[length] != '\0' && path[length] != '/'))
        return false;
    *rest = path + length + strspn(path + length, "/");
    return true;
}

/* The innermost mount above an absolute path without links; of several at one place the topmost. */
static const struct mount *mounts_find(const struct mounts *mounts, const char *path,
                                       const char **rest)
{
    const struct mount *best = NULL;
    for (size_t i = 0; i < mounts->count; i++) {
        const char *tail;
        if (below_point(path, mounts->list[i].point, &tail) &&
            (!best || strlen(mounts->list[i].point) >= strlen(best->point))) {
            best = &mounts->list[i];
            *rest = tail;
        }
    }
    return best;
}

/* ---- from a path to its mount ---- */

static char *joined(const char *a, const char *b)
{
    char *path = NULL;
    const char *slash = a[0] && a[strlen(a) - 1] != '/' && b[0] ? "/" : "";
    return asprintf(&path, "%s%s%s", a, slash, b) < 0 ? NULL : path;
}

/* Cuts the last component off, in place; NULL: there is none that is a name. *dir is what it lies in. */
static char *last_cut(char *path, const char **dir)
{
    size_t length = strlen(path);
    while (length > 1 && path[length - 1] == '/')
        path[--length] = '\0';
    char *slash = strrchr(path, '/');
    char *last = slash ? slash + 1 : path;
    if (!*last || strcmp(last, ".") == 0 || strcmp(last, "..") == 0)
        return NULL;
    *dir = !slash ? "." : slash == path ? "/" : path;
    if (slash)
        *slash = '\0';
    return last;
}

char *cmd_path_whole(const char *path, bool missing)
{
    char *copy = strdup(path);
    if (!copy)
        return NULL;
    const char *dir;
    char *whole = NULL;
    const char *last = last_cut(copy, &dir);
    if (!last) {
        whole = realpath(copy, NULL);
    } else {
        char *real = realpath(dir, NULL);
        if (!real && missing && (errno == ENOENT || errno == ENOTDIR) && strcmp(dir, ".") != 0 &&
            strcmp(dir, "/") != 0)
            real = cmd_path_whole(dir, true);
        if (real)
            whole = joined(real, last);
        free(real);
    }
    free(copy);
    return whole;
}

/* An absolute path without "." and "..", by its text alone: for mounts that do not answer any more. */
static char *path_lexical(const char *path)
{
    char *cwd = path[0] == '/' ? strdup("") : get_current_dir_name();
    if (!cwd)
        return NULL;
    char *whole = joined(cwd, path);
    free(cwd);
    char *out = whole ? calloc(1, strlen(whole) + 2) : NULL;
    size_t length = 0;
    for (char *at = whole; out && *at;) {
        at += strspn(at, "/");
        size_t part = strcspn(at, "/");
        if (part == 2 && at[0] == '.' && at[1] == '.') {
            char *up = strrchr(out, '/');
            length = up ? (size_t)(up - out) : 0;
        } else if (part > 0 && !(part == 1 && at[0] == '.')) {
            out[length++] = '/';
            memcpy(out + length, at, part);
            length += part;
        }
        out[length] = '\0';
        at += part;
    }
    free(whole);
    return out;
}

static int stale_say(const char *point)
{
    cmd_error("%s: the p2pfs that served this mount has ended; umount -l %s, then mount it again",
              point, point);
    return -ENOTCONN;
}

/* A bind mount of a directory inside the mount: the control file is reachable at the whole mount only. */
static int bind_follow(const struct mounts *mounts, const struct mount *mount, const char *rest,
                       char **root, char **below)
{
    const struct mount *whole = mount;
    for (size_t i = 0; strcmp(whole->root, "/") != 0 && i < mounts->count; i++)
        if (strcmp(mounts->list[i].device, mount->device) == 0 &&
            strcmp(mounts->list[i].root, "/") == 0)
            whole = &mounts->list[i];
    if (strcmp(whole->root, "/") != 0) {
        cmd_error("%s shows a part of a p2pfs mount that is not mounted as a whole here; name a "
                  "path below the whole mount",
                  mount->point);
        return -ENOENT;
    }
    *root = strdup(whole->point);
    *below = whole == mount ? strdup(rest) : joined(mount->root + 1, rest);
    if (*root && *below)
        return 0;
    free(*root);
    free(*below);
    return -ENOMEM;
}

int cmd_mount_find(const char *path, char **root, char **below)
{
    struct mounts mounts;
    int rc = mounts_read(&mounts);
    if (rc < 0)
        return rc;
    const char *rest = NULL;
    const struct mount *mount = NULL;
    char *real = cmd_path_whole(path, true);
    int error = real ? 0 : errno;
    if (real)
        mount = mounts_find(&mounts, real, &rest);
    if (real && !mount) { /* perhaps the last component is a link that leads to the mount */
        free(real);
        real = realpath(path, NULL);
        error = real ? 0 : errno;
        mount = real ? mounts_find(&mounts, real, &rest) : NULL;
    }
    if (!real && error == ENOTCONN) {
        real = path_lexical(path);
        mount = real ? mounts_find(&mounts, real, &rest) : NULL;
    }
    struct stat st;
    if (mount && stat(mount->point, &st) < 0 && errno == ENOTCONN) {
        rc = stale_say(mount->point);
    } else if (mount) {
        rc = bind_follow(&mounts, mount, rest, root, below);
    } else {
        if (!real && error && error != ENOENT)
            cmd_error("%s: %s", path, strerror(error));
        else
            cmd_error("%s is not below a p2pfs mount (findmnt -t " MOUNT_TYPE " lists them)", path);
        rc = -ENOENT;
    }
    free(real);
    mounts_clear(&mounts);
    return rc;
}

int cmd_mount_find_any(const char *path, char **root, char **below)
{
    if (path)
        return cmd_mount_find(path, root, below);
    struct mounts mounts;
    int rc = mounts_read(&mounts);
    if (rc < 0)
        return rc;
    util_autofree char *cwd = get_current_dir_name();
    const char *rest;
    if (cwd && mounts_find(&mounts, cwd, &rest)) {
        rc = cmd_mount_find(cwd, root, below);
    } else if (mounts.count == 1) {
        rc = cmd_mount_find(mounts.list[0].point, root, below);
    } else {
        if (mounts.count == 0)
            cmd_error("no p2pfs is mounted here; p2pfs META DIR mounts one");
        else
            cmd_error("%zu p2pfs mounts are here: name one of them", mounts.count);
        rc = -ENOENT;
    }
    mounts_clear(&mounts);
    return rc;
}

/* ---- one request, one answer ---- */

static int answer_read(int fd, char **answer, size_t *length)
{
    size_t room = 64u << 10;
    char *text = malloc(room);
    *length = 0;
    while (text) {
        if (room - *length < 2) {
            char *more = realloc(text, room *= 2);
            if (!more)
                break;
            text = more;
        }
        ssize_t got = read(fd, text + *length, room - *length - 1);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0) {
            free(text);
            return -errno;
        }
        if (got == 0) {
            text[*length] = '\0';
            *answer = text;
            return 0;
        }
        *length += (size_t)got;
    }
    free(text);
    return -ENOMEM;
}

static void exchange_say(const char *root, int error)
{
    if (error == -ENOTCONN)
        stale_say(root);
    else if (error == -EACCES || error == -EPERM)
        cmd_error("%s: %s; ask as the user who mounted it, or mount with -o allow_other", root,
                  strerror(-error));
    else
        cmd_error("%s does not answer: %s; see its log, or umount -l %s and mount it again", root,
                  strerror(-error), root);
}

int cmd_exchange(const char *root, const char *request, char **answer, size_t *length)
{
    util_autofree char *path = joined(root, CONTROL_DIR "/control");
    if (!path)
        return -ENOMEM;
    int rc = 0;
    util_autoclose int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        rc = -errno;
    } else {
        size_t size = strlen(request);
        ssize_t put = write(fd, request, size);
        rc = put < 0 ? -errno : (size_t)put == size ? answer_read(fd, answer, length) : -EIO;
    }
    if (rc < 0)
        exchange_say(root, rc);
    return rc;
}

int cmd_ask(const char *root, const char *request, char **answer)
{
    size_t length;
    int rc = cmd_exchange(root, request, answer, &length);
    if (rc < 0)
        return rc;
    struct json *json = json_parse(*answer, length);
    if (json && json_true(json, "ok")) {
        json_free(json);
        return 0;
    }
    const char *error = json_text(json, "error");
    int number = (int)json_u64(json, "errno");
    cmd_error("%s", error ? error : "the mount gave an answer that makes no sense");
    json_free(json);
    free(*answer);
    *answer = NULL;
    return number > 0 && number < 4096 ? -number : -EIO;
}
