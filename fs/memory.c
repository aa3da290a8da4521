#include "fs/memory.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The number in a file; UINT64_MAX: none ("max"), or no such file. */
static uint64_t read_number(const char *path)
{
    FILE *file = fopen(path, "re");
    if (file == NULL)
        return UINT64_MAX;
    unsigned long long number = 0;
    int found = fscanf(file, "%llu", &number);
    fclose(file);
    return found == 1 ? number : UINT64_MAX;
}

/* The smallest limit from a group up to the root of its hierarchy. */
static uint64_t group_limit(const char *root, const char *group, const char *file)
{
    char path[PATH_MAX];
    uint64_t least = UINT64_MAX;
    size_t root_length = strlen(root);
    if (snprintf(path, sizeof(path), "%s%s", root, group) >= (int)sizeof(path))
        return least;
    for (;;) {
        char *end = path + strlen(path);
        if ((size_t)(end - path) + strlen(file) + 2 > sizeof(path))
            return least;
        sprintf(end, "/%s", file);
        uint64_t limit = read_number(path);
        least = limit < least ? limit : least;
        *end = '\0';
        char *slash = strrchr(path, '/');
        if (slash == NULL || (size_t)(slash - path) < root_length)
            return least;
        *slash = '\0';
    }
}

uint64_t memory_limit(void)
{
    uint64_t least = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    FILE *groups = fopen("/proc/self/cgroup", "re");
    char line[PATH_MAX];
    while (groups != NULL && fgets(line, sizeof(line), groups) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':');
        char *group = controllers == NULL ? NULL : strchr(controllers + 1, ':');
        if (group == NULL)
            continue;
        *group++ = '\0';
        uint64_t limit = UINT64_MAX;
        if (controllers[1] == '\0')
            limit = group_limit("/sys/fs/cgroup", group, "memory.max");
        else if (strstr(controllers, "memory") != NULL)
            limit = group_limit("/sys/fs/cgroup/memory", group, "memory.limit_in_bytes");
        least = limit < least ? limit : least;
    }
    if (groups != NULL)
        fclose(groups);
    return least;
}
