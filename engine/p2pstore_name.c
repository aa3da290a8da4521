#include "engine/p2pstore_inside.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "meta/base/util.h"

#define NAME_LINKS_MAX 16

/* The next component of *path into `out`, and *path behind it. False: there is none. */
static bool component(const char **path, char out[MODEL_NAME_MAX + 1])
{
    while (**path == '/') {
        (*path)++;
    }
    size_t length = strcspn(*path, "/");
    if (length == 0) {
        return false;
    }
    snprintf(out, MODEL_NAME_MAX + 1, "%.*s", (int)length, *path);
    *path += length;
    return true;
}

int name_check(const char *name)
{
    char part[MODEL_NAME_MAX + 1];
    if (strlen(name) > MODEL_PATH_MAX) {
        return -ENAMETOOLONG;
    }
    for (const char *at = name;; at++) {
        size_t length = strcspn(at, "/");
        if (length > MODEL_NAME_MAX) {
            return -ENAMETOOLONG;
        }
        snprintf(part, sizeof part, "%.*s", (int)length, at);
        int status = model_name_check(part);
        at += length;
        if (status < 0 || *at == '\0') {
            return status;
        }
    }
}

struct model_attr name_attr(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (struct model_attr){.mode = 0644,
                               .uid = geteuid(),
                               .gid = getegid(),
                               .mtime_ns = (int64_t)now.tv_sec * 1000000000 + now.tv_nsec};
}

/* The directory `name` in `parent`, made when it is not there. */
static int dir_get(struct catalog *catalog, uint64_t parent, const char *name, uint64_t *id)
{
    for (;;) {
        struct model_entry entry;
        int status = catalog_lookup(catalog, parent, name, &entry);
        if (status == 0) {
            status = entry.kind == MODEL_DIR ? 0 : -ENOTDIR;
            *id = entry.id;
            model_entry_clear(&entry);
            return status;
        }
        if (status != -ENOENT) {
            return status;
        }
        struct catalog_sync sync = {0};
        struct model_attr attr = name_attr();
        attr.mode = 0755;
        status = catalog_mkdir(catalog, parent, name, &attr, catalog_sync_done, &sync);
        if (status == 0) {
            status = catalog_sync_wait(&sync);
        }
        if (status < 0 && status != -EEXIST) { /* somebody was quicker: look again */
            return status;
        }
    }
}

int name_parent(struct catalog *catalog, const char *name, uint64_t *parent, const char **leaf)
{
    char part[MODEL_NAME_MAX + 1];
    const char *last = strrchr(name, '/');
    *leaf = last ? last + 1 : name;
    *parent = MODEL_ROOT;
    const char *at = name;
    int status = 0;
    while (status == 0 && at < *leaf - 1 && component(&at, part)) {
        status = dir_get(catalog, *parent, part, parent);
    }
    return status;
}

/* NOLINTNEXTLINE(misc-no-recursion): as deep as links lead to links, NAME_LINKS_MAX */
static int resolve(struct catalog *catalog, uint64_t dir, const char *path, unsigned links,
                   struct model_entry *out)
{
    char part[MODEL_NAME_MAX + 1];
    int status = catalog_entry(catalog, dir, out);
    while (status == 0 && component(&path, part)) {
        uint64_t here = out->id;
        uint64_t above = out->parent;
        if (out->kind != MODEL_DIR) {
            status = -ENOTDIR;
            break;
        }
        if (strcmp(part, ".") == 0) {
            continue;
        }
        model_entry_clear(out);
        if (strcmp(part, "..") == 0) {
            status = catalog_entry(catalog, here == MODEL_ROOT ? MODEL_ROOT : above, out);
            continue;
        }
        status = catalog_lookup(catalog, here, part, out);
        if (status == 0 && out->kind == MODEL_SYMLINK) {
            struct model_entry link = *out;
            *out = (struct model_entry){0};
            status = links == 0              ? -ELOOP
                     : link.target[0] == '/' ? -ENOENT
                                             : resolve(catalog, here, link.target, links - 1, out);
            model_entry_clear(&link);
        }
    }
    if (status < 0) {
        model_entry_clear(out);
    }
    return status;
}

int name_resolve(struct catalog *catalog, const char *name, struct model_entry *entry)
{
    *entry = (struct model_entry){0};
    return resolve(catalog, MODEL_ROOT, name, NAME_LINKS_MAX, entry);
}

int name_unlink(struct catalog *catalog, const char *name, const struct model_id *version)
{
    struct model_entry entry;
    int status = catalog_resolve(catalog, name, &entry);
    if (status < 0) {
        return status == -ENOENT || status == -ENOTDIR ? 0 : status;
    }
    if (entry.kind == MODEL_FILE && model_id_equal(&entry.version, version)) {
        struct catalog_sync sync = {0};
        status = catalog_unlink(catalog, entry.parent, entry.name, catalog_sync_done, &sync);
        if (status == 0) {
            status = catalog_sync_wait(&sync);
        }
        status = status == -ENOENT ? 0 : status;
    }
    model_entry_clear(&entry);
    return status;
}
