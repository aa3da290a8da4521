#include "fs/mountpoint.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "meta/base/util.h"

struct mount_line {
    dev_t device;
    char *type;
};

/* Blanks and the like stand as three octal digits. */
static void unescape(char *text)
{
    char *to = text;
    for (const char *at = text; *at != '\0'; at++) {
        if (at[0] == '\\' && at[1] != '\0' && at[2] != '\0' && at[3] != '\0') {
            *to++ = (char)((at[1] - '0') << 6 | (at[2] - '0') << 3 | (at[3] - '0'));
            at += 3;
        } else {
            *to++ = *at;
        }
    }
    *to = '\0';
}

/* The topmost mount at a path; false: nothing is mounted there. type: malloc'd. */
static bool topmost(const char *absolute, struct mount_line *out)
{
    FILE *table = fopen("/proc/self/mountinfo", "re");
    char *line = NULL;
    size_t size = 0;
    *out = (struct mount_line){0};
    while (table != NULL && getline(&line, &size, table) > 0) {
        unsigned major = 0, minor = 0;
        int at = 0, end = 0;
        if (sscanf(line, "%*s %*s %u:%u %*s %n%*s%n", &major, &minor, &at, &end) != 2 || end == 0)
            continue;
        const char *rest = strstr(line + end, " - ");
        line[end] = '\0';
        unescape(line + at);
        if (rest == NULL || strcmp(line + at, absolute) != 0)
            continue;
        free(out->type);
        out->type = strndup(rest + 3, strcspn(rest + 3, " "));
        out->device = makedev(major, minor);
    }
    free(line);
    if (table != NULL)
        fclose(table);
    return out->type != NULL;
}

dev_t mountpoint_device(const char *absolute)
{
    struct mount_line mount;
    dev_t device = topmost(absolute, &mount) ? mount.device : 0;
    free(mount.type);
    return device;
}

/* An absolute path for the last component as it stands, for looking it up among the mounts
 * without entering it. */
static char *absolute_path(const char *dir)
{
    size_t length = strlen(dir);
    while (length > 1 && dir[length - 1] == '/')
        length--;
    const char *slash = memrchr(dir, '/', length);
    const char *last = slash == NULL ? dir : slash + 1;
    int last_length = (int)(dir + length - last);
    if (last_length == 0 || (last_length <= 2 && strncmp(last, "..", (size_t)last_length) == 0))
        return realpath(dir, NULL);
    char parent[PATH_MAX], above[PATH_MAX];
    int parent_length = slash == NULL ? 1 : slash == dir ? 1 : (int)(slash - dir);
    if (snprintf(parent, sizeof(parent), "%.*s", parent_length, slash == NULL ? "." : dir) >=
        (int)sizeof(parent)) {
        errno = ENAMETOOLONG;
        return NULL;
    }
    char *joined = NULL;
    if (realpath(parent, above) == NULL ||
        asprintf(&joined, "%s/%.*s", strcmp(above, "/") == 0 ? "" : above, last_length, last) < 0)
        return NULL;
    return joined;
}

static int refuse(char **error, int rc, const char *dir, const char *why)
{
    if (asprintf(error, "%s: %s", dir, why) < 0)
        *error = NULL;
    return rc;
}

/* 0: nothing but "." and "..". */
static int check_empty(const char *path)
{
    DIR *dir = opendir(path);
    if (dir == NULL)
        return -errno;
    int rc = 0;
    struct dirent *entry;
    while (rc == 0 && (entry = readdir(dir)) != NULL)
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            rc = -ENOTEMPTY;
    closedir(dir);
    return rc;
}

static int check_mounts(const char *dir, const char *absolute, char **error)
{
    struct mount_line mount;
    int rc = 0;
    if (topmost(absolute, &mount) && mount.type != NULL && strncmp(mount.type, "fuse", 4) == 0) {
        struct statvfs st; /* never from a cache, as attributes of the root may be */
        if (statvfs(absolute, &st) != 0 && (errno == ENOTCONN || errno == ECONNABORTED))
            rc = refuse(error, -ENOTCONN, dir,
                        "a dead mount is left there (its process ended without unmounting); "
                        "umount -l it first");
        else if (strcmp(mount.type, "fuse.p2pfs") == 0)
            rc =
                refuse(error, -EBUSY, dir,
                       "it is a p2pfs mount already; umount it first, or choose another directory");
    }
    free(mount.type);
    return rc;
}

int mountpoint_check(const char *dir, char **out, struct model_attr *root, char **error)
{
    util_autofree char *path = absolute_path(dir);
    int rc = path != NULL ? 0 : errno != 0 ? -errno : -ENOMEM;
    if (rc == 0)
        rc = check_mounts(dir, path, error);
    if (rc != 0 && *error != NULL)
        return rc;
    util_autofree char *real = rc == 0 ? realpath(path, NULL) : NULL;
    struct stat st;
    if (rc == 0 && (real == NULL || stat(real, &st) != 0))
        rc = -errno;
    if (rc == -ENOENT)
        return refuse(error, rc, dir, "there is no such directory; mkdir it first");
    if (rc == -ENOTCONN)
        return refuse(error, rc, dir, "a dead mount is left there or above; umount -l it first");
    if (rc != 0)
        return refuse(error, rc, dir, strerror(-rc));
    if (!S_ISDIR(st.st_mode))
        return refuse(error, -ENOTDIR, dir, "it is not a directory; choose an empty directory");
    rc = check_mounts(dir, real, error);
    if (rc != 0)
        return rc;
    rc = check_empty(real);
    if (rc == -ENOTEMPTY)
        return refuse(
            error, rc, dir,
            "it is not empty, and a mount would hide what it holds; choose an empty directory");
    if (rc != 0)
        return refuse(error, rc, dir, strerror(-rc));
    *root = (struct model_attr){.mode = st.st_mode & 07777,
                                .uid = st.st_uid,
                                .gid = st.st_gid,
                                .mtime_ns = st.st_mtim.tv_sec * 1000000000LL + st.st_mtim.tv_nsec};
    *out = strdup(real);
    return *out == NULL ? -ENOMEM : 0;
}
