#include "meta/base/memory.h"

#include <limits.h>
#include <stdbool.h>
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

/* The smallest limit, less what is used of it, from a group up to the root of its hierarchy. used: a file of numbers, or
 * NULL: the limit alone. */
static uint64_t group_least(const char *root, const char *group, const char *limit,
                            const char *used)
{
    char path[PATH_MAX];
    char file[PATH_MAX + 32];
    uint64_t least = UINT64_MAX;
    if (snprintf(path, sizeof(path), "%s%s", root, group) >= (int)sizeof(path))
        return least;
    for (;;) {
        snprintf(file, sizeof(file), "%s/%s", path, limit);
        uint64_t left = read_number(file);
        if (left != UINT64_MAX && used != NULL) {
            snprintf(file, sizeof(file), "%s/%s", path, used);
            uint64_t taken = read_number(file);
            left = taken < left ? left - taken : 0;
        }
        least = left < least ? left : least;
        char *slash = strrchr(path, '/');
        if (slash == NULL || (size_t)(slash - path) < strlen(root))
            return least;
        *slash = '\0';
    }
}

/* The same over all groups of this process. */
static uint64_t groups_least(bool left)
{
    uint64_t least = UINT64_MAX;
    FILE *groups = fopen("/proc/self/cgroup", "re");
    char line[PATH_MAX];
    while (groups != NULL && fgets(line, sizeof(line), groups) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        char *controllers = strchr(line, ':');
        char *group = controllers == NULL ? NULL : strchr(controllers + 1, ':');
        if (group == NULL)
            continue;
        *group++ = '\0';
        uint64_t one = UINT64_MAX;
        if (controllers[1] == '\0')
            one =
                group_least("/sys/fs/cgroup", group, "memory.max", left ? "memory.current" : NULL);
        else if (strstr(controllers, "memory") != NULL)
            one = group_least("/sys/fs/cgroup/memory", group, "memory.limit_in_bytes",
                              left ? "memory.usage_in_bytes" : NULL);
        least = one < least ? one : least;
    }
    if (groups != NULL)
        fclose(groups);
    return least;
}

uint64_t memory_limit(void)
{
    uint64_t all = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t least = groups_least(false);
    return least < all ? least : all;
}

uint64_t memory_available(void)
{
    uint64_t all = 0;
    FILE *table = fopen("/proc/meminfo", "re");
    char line[256];
    unsigned long long kib = 0;
    while (table != NULL && fgets(line, sizeof(line), table) != NULL)
        if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1)
            all = kib * 1024;
    if (table != NULL)
        fclose(table);
    uint64_t least = groups_least(true);
    return least < all ? least : all;
}
