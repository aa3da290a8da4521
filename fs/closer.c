#include "fs/closer.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "meta/base/util.h"

#define CLOSER_EXITING 0x4ull /* PF_EXITING, in the ninth field of /proc/PID/stat */
#define CLOSER_FLAGS   9
#define CLOSER_STATUS  52
#define CLOSER_DEPTH \
    32 /* generations of descendants that are looked at; beyond that nobody can tell */

/* The bytes read, NUL-terminated; negative errno. */
static ssize_t read_text(int dir, const char *path, char *out, size_t size)
{
    if (dir < 0 && dir != AT_FDCWD)
        return -EBADF;
    util_autoclose int fd = openat(dir, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    ssize_t length = read(fd, out, size - 1);
    if (length < 0)
        return -errno;
    out[length] = '\0';
    return length;
}

pid_t closer_process(pid_t thread)
{
    char path[64], text[1024];
    snprintf(path, sizeof(path), "/proc/%d/status", thread);
    if (thread <= 0 || read_text(AT_FDCWD, path, text, sizeof(text)) < 0)
        return 0;
    const char *line = strstr(text, "\nTgid:");
    return line == NULL ? 0 : (pid_t)strtol(line + 6, NULL, 10);
}

bool closer_killed(pid_t process, int *status)
{
    char path[64], text[2048];
    *status = 0;
    snprintf(path, sizeof(path), "/proc/%d/stat", process);
    if (process <= 0 || read_text(AT_FDCWD, path, text, sizeof(text)) < 0)
        return false;
    char *at = strrchr(text, ')'); /* the name may hold anything; two fields end here */
    if (at == NULL)
        return false;
    unsigned long long flags = 0;
    int field = 3;
    char *save = NULL;
    for (char *word = strtok_r(at + 1, " \n", &save); word != NULL;
         word = strtok_r(NULL, " \n", &save), field++) {
        if (field == CLOSER_FLAGS)
            flags = strtoull(word, NULL, 10);
        else if (field == CLOSER_STATUS)
            *status = (int)strtol(word, NULL, 10);
    }
    return (flags & CLOSER_EXITING) != 0 && *status != 0;
}

/* Whether an open descriptor is of our inode and may write. */
static bool descriptor_matches(int fdinfo, const char *name, uint64_t inode)
{
    char text[1024], wanted[48];
    if (read_text(fdinfo, name, text, sizeof(text)) < 0)
        return false;
    snprintf(wanted, sizeof(wanted), "\nino:\t%llu\n", (unsigned long long)inode);
    if (strstr(text, wanted) == NULL)
        return false;
    const char *flags = strstr(text, "flags:");
    return flags != NULL && (strtol(flags + 6, NULL, 8) & O_ACCMODE) != O_RDONLY;
}

static bool process_has(pid_t process, uint64_t inode)
{
    char path[64], link[32];
    snprintf(path, sizeof(path), "/proc/%d/fd", process);
    DIR *fds = opendir(path);
    if (fds == NULL)
        return false;
    snprintf(path, sizeof(path), "/proc/%d/fdinfo", process);
    util_autoclose int fdinfo = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool found = false;
    struct dirent *entry;
    int dir = dirfd(fds);
    while (!found && dir >= 0 && fdinfo >= 0 && (entry = readdir(fds)) != NULL) {
        if (!isdigit((unsigned char)entry->d_name[0]))
            continue;
        /* The link's text comes from the dentry: files have absolute paths, sockets and pipes
         * have not. */
        ssize_t length = readlinkat(dir, entry->d_name, link, sizeof(link));
        if (length <= 0 || link[0] != '/' || (length >= 5 && memcmp(link, "/dev/", 5) == 0))
            continue;
        found = descriptor_matches(fdinfo, entry->d_name, inode);
    }
    closedir(fds);
    return found;
}

static bool process_maps(pid_t process, uint64_t inode)
{
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/maps", process);
    FILE *maps = fopen(path, "re");
    if (maps == NULL)
        return false;
    char *line = NULL;
    size_t size = 0;
    bool found = false;
    while (!found && getline(&line, &size, maps) > 0) {
        char permissions[8];
        unsigned long long number;
        found = sscanf(line, "%*s %7s %*s %*s %llu", permissions, &number) == 2 &&
                number == inode && permissions[3] == 's';
    }
    free(line);
    fclose(maps);
    return found;
}

static bool descendant_has(pid_t process, uint64_t inode, unsigned depth);

/* Whether a task's children, or theirs, have it: descriptors are inherited downwards. */
static bool child_has(int tasks, const char *task, uint64_t inode, unsigned depth)
{
    char name[NAME_MAX + 16], text[4096];
    snprintf(name, sizeof(name), "%s/children", task);
    ssize_t length = read_text(tasks, name, text, sizeof(text));
    /* A kernel without these files, or more children than fit, can't tell; a task that has just
     * ended has none. */
    if (length < 0)
        return tasks < 0 || faccessat(tasks, task, F_OK, 0) == 0;
    if (length == (ssize_t)sizeof(text) - 1)
        return true;
    char *save = NULL;
    for (char *word = strtok_r(text, " \n", &save); word != NULL;
         word = strtok_r(NULL, " \n", &save)) {
        pid_t child = (pid_t)strtol(word, NULL, 10);
        if (process_has(child, inode) || descendant_has(child, inode, depth + 1))
            return true;
    }
    return false;
}

static bool descendant_has(pid_t process, uint64_t inode, unsigned depth)
{
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/task", process);
    DIR *tasks = depth < CLOSER_DEPTH ? opendir(path) : NULL;
    if (tasks == NULL)
        return depth == CLOSER_DEPTH;
    bool found = false;
    struct dirent *entry;
    while (!found && (entry = readdir(tasks)) != NULL)
        if (isdigit((unsigned char)entry->d_name[0]))
            found = child_has(dirfd(tasks), entry->d_name, inode, depth);
    closedir(tasks);
    return found;
}

static bool anybody_has(pid_t but, uint64_t inode)
{
    DIR *processes = opendir("/proc");
    if (processes == NULL)
        return true;
    pid_t self = getpid();
    bool found = false;
    struct dirent *entry;
    while (!found && (entry = readdir(processes)) != NULL) {
        pid_t process = (pid_t)strtol(entry->d_name, NULL, 10);
        if (process > 0 && process != but && process != self)
            found = process_has(process, inode);
    }
    closedir(processes);
    return found;
}

enum closer_verdict closer_examine(pid_t thread, pid_t opener, uint64_t inode, bool mappable,
                                   int *status)
{
    *status = 0;
    pid_t process = closer_process(thread);
    if (process == 0)
        return CLOSER_SHARED;
    if (process_has(process, inode))
        return CLOSER_SHARED;
    if (process !=
        opener) { /* the likeliest other one first: it spares the walk over all processes */
        if (opener != 0 && process_has(opener, inode))
            return CLOSER_SHARED;
        if (anybody_has(process, inode))
            return CLOSER_SHARED;
    } else if (descendant_has(process, inode, 0)) {
        return CLOSER_SHARED;
    }
    if (mappable && process_maps(process, inode))
        return CLOSER_MAPPED;
    return closer_killed(thread, status) ? CLOSER_KILLED : CLOSER_LAST;
}
