#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fs/control_parts.h"
#include "meta/base/util.h"

#define HOPS_MAX 40 /* symbolic links in one path, as the kernel's own limit */

/* ---- from a path to an entry ---- */

struct walk_path {
    char rest[2 * MODEL_PATH_MAX + 2]; /* what is still to be walked */
    unsigned hops;
};

/* Takes the first component off `rest`; false: there is none. */
static bool component_take(struct walk_path *path, char name[MODEL_NAME_MAX + 1], int *error)
{
    const char *at = path->rest + strspn(path->rest, "/");
    size_t length = strcspn(at, "/");
    *error = length > MODEL_NAME_MAX ? -ENAMETOOLONG : 0;
    if (length == 0 || *error < 0)
        return false;
    memcpy(name, at, length);
    name[length] = '\0';
    memmove(path->rest, at + length, strlen(at + length) + 1);
    return true;
}

/* Puts a link's target before what is still to be walked. */
static int link_follow(struct walk_path *path, const char *target)
{
    if (!target || target[0] == '/')
        return -EXDEV;
    if (++path->hops > HOPS_MAX)
        return -ELOOP;
    size_t ahead = strlen(target);
    size_t behind = strlen(path->rest);
    if (ahead + behind + 2 > sizeof(path->rest))
        return -ENAMETOOLONG;
    memmove(path->rest + ahead + 1, path->rest, behind + 1);
    memcpy(path->rest, target, ahead);
    path->rest[ahead] = '/';
    return 0;
}

/* One step from `here`, which becomes where it leads; a link that is to be followed only changes `path`. */
static int step(struct control *control, struct walk_path *path, const char *name, bool follow,
                struct model_entry *here)
{
    struct catalog *catalog = control->house->catalog;
    struct model_entry next = {0};
    int rc;
    if (strcmp(name, ".") == 0)
        return 0;
    if (here->kind != MODEL_DIR)
        return -ENOTDIR;
    bool up = strcmp(name, "..") == 0;
    if (up && here->id == MODEL_ROOT)
        return -EXDEV;
    rc = up ? catalog_entry(catalog, here->parent, &next)
            : catalog_lookup(catalog, here->id, name, &next);
    if (rc < 0)
        return rc;
    bool more = path->rest[strspn(path->rest, "/")] != '\0';
    if (next.kind == MODEL_SYMLINK && (follow || more)) {
        rc = link_follow(path, next.target);
        model_entry_clear(&next);
        return rc;
    }
    model_entry_clear(here);
    *here = next;
    return 0;
}

int control_resolve(struct control *control, const char *text, bool follow, struct model_entry *out)
{
    struct walk_path path = {.hops = 0};
    if (strlen(text) > MODEL_PATH_MAX)
        return -ENAMETOOLONG;
    snprintf(path.rest, sizeof(path.rest), "%s", text);
    struct model_entry here = {0};
    int rc = catalog_entry(control->house->catalog, MODEL_ROOT, &here);
    char name[MODEL_NAME_MAX + 1];
    int error = 0;
    while (rc == 0 && component_take(&path, name, &error))
        rc = step(control, &path, name, follow, &here);
    if (rc == 0)
        rc = error;
    if (rc < 0) {
        model_entry_clear(&here);
        return rc;
    }
    *out = here;
    return 0;
}

static int path_of(struct control *control, uint64_t id, char **out)
{
    char path[MODEL_PATH_MAX + 1];
    int rc = catalog_path(control->house->catalog, id, path, sizeof(path));
    if (rc < 0)
        return rc;
    *out = strdup(path);
    return *out ? 0 : -ENOMEM;
}

int control_target_of(struct control_call *call, const char *text, bool follow,
                      struct model_entry *out, char **name)
{
    char *path = json_name(text ? text : "");
    if (!path) {
        control_fail(call, -EINVAL, "the path is not a name");
        return -EINVAL;
    }
    *name = NULL;
    int rc = control_resolve(call->control, path, follow, out);
    if (rc == 0) {
        rc = path_of(call->control, out->id, name);
        if (rc < 0)
            model_entry_clear(out);
    }
    if (rc < 0)
        control_fail(call, rc, "'%s': %s", text ? text : "", control_why(rc));
    free(path);
    return rc;
}

int control_target(struct control_call *call, bool follow, struct model_entry *out, char **name)
{
    return control_target_of(call, json_text(call->request, "path"), follow, out, name);
}

/* ---- a whole tree ---- */

struct level {
    struct catalog_list list;
    size_t at;
    size_t path_length; /* of the directory's own path */
};

struct walk {
    struct catalog *catalog;
    struct level *levels;
    size_t depth, room;
    char path[MODEL_PATH_MAX + 1];
};

static int level_push(struct walk *walk, uint64_t dir, size_t path_length)
{
    if (walk->depth == walk->room) {
        size_t room = walk->room ? 2 * walk->room : 16;
        struct level *levels = realloc(walk->levels, room * sizeof(*levels));
        if (!levels)
            return -ENOMEM;
        walk->levels = levels;
        walk->room = room;
    }
    struct level *level = &walk->levels[walk->depth];
    *level = (struct level){.path_length = path_length};
    int rc = catalog_list(walk->catalog, dir, &level->list);
    if (rc == -ENOENT) /* removed since its parent was listed */
        return 0;
    if (rc == 0)
        walk->depth++;
    return rc;
}

static void level_pop(struct walk *walk)
{
    catalog_list_free(&walk->levels[--walk->depth].list);
}

static int walk_on(struct walk *walk, control_visit visit, void *arg)
{
    while (walk->depth > 0) {
        struct level *level = &walk->levels[walk->depth - 1];
        if (level->at == level->list.count) {
            level_pop(walk);
            continue;
        }
        const struct model_entry *entry = &level->list.entries[level->at++];
        size_t length = level->path_length;
        size_t room = sizeof(walk->path) - length;
        int added = snprintf(walk->path + length, room, "%s%s", length ? "/" : "", entry->name);
        if (added < 0 || (size_t)added >= room)
            return -ENAMETOOLONG;
        int rc = visit(arg, walk->path, entry);
        if (rc == 0 && entry->kind == MODEL_DIR)
            rc = level_push(walk, entry->id, length + (size_t)added);
        if (rc != 0)
            return rc;
    }
    return 0;
}

int control_walk(struct control *control, const struct model_entry *top, const char *path,
                 control_visit visit, void *arg)
{
    if (top->kind != MODEL_DIR)
        return visit(arg, path, top);
    struct walk *walk = calloc(1, sizeof(*walk));
    if (!walk)
        return -ENOMEM;
    walk->catalog = control->house->catalog;
    snprintf(walk->path, sizeof(walk->path), "%s", path);
    int rc = level_push(walk, top->id, strlen(walk->path));
    if (rc == 0)
        rc = walk_on(walk, visit, arg);
    while (walk->depth > 0)
        level_pop(walk);
    free(walk->levels);
    free(walk);
    return rc;
}

/* ---- ls ---- */

struct count {
    struct model_id version;
    uint32_t holders, complete;
};

struct census {
    struct count *counts; /* in order of version once it is complete */
    size_t length, room;
    bool failed;
};

static void census_free(void *data)
{
    struct census *census = data;
    free(census->counts);
    free(census);
}

static void census_each(void *arg, const struct model_id *version, uint32_t holders,
                        uint32_t complete)
{
    struct census *census = control_wait_data(arg);
    if (census->length == census->room && !census->failed) {
        size_t room = census->room ? 2 * census->room : 256;
        struct count *counts = realloc(census->counts, room * sizeof(*counts));
        census->failed = !counts;
        census->counts = counts ? counts : census->counts;
        census->room = counts ? room : census->room;
    }
    if (!census->failed)
        census->counts[census->length++] = (struct count){*version, holders, complete};
}

static int count_compare(const void *a, const void *b)
{
    return memcmp(a, b, sizeof(struct model_id));
}

/* NULL when the metadata service cannot be asked now; the listing then goes without counts. */
static struct census *census_take(struct control *control)
{
    uint64_t since_ms;
    if (!catalog_online(control->house->catalog, &since_ms))
        return NULL;
    struct census *census = calloc(1, sizeof(*census));
    struct control_wait *wait = census ? control_wait_new(control, census, census_free) : NULL;
    if (!wait) {
        free(census);
        return NULL;
    }
    int rc = catalog_census(control->house->catalog, census_each, control_wait_catalog, wait);
    rc = control_wait_end(wait, rc);
    if (rc == -ESHUTDOWN)
        return NULL;
    if (rc < 0 || census->failed) {
        census_free(census);
        return NULL;
    }
    if (census->length > 0)
        qsort(census->counts, census->length, sizeof(struct count), count_compare);
    return census;
}

struct listing {
    struct control *control;
    struct json_out *out;
    struct census *census;
};

static void file_put(struct listing *listing, const struct model_entry *entry)
{
    struct engine_info info = {.state = ENGINE_REMOTE};
    int rc = engine_info(listing->control->house->engine, &entry->version, &info);
    enum engine_state state = rc == 0 ? info.state : ENGINE_REMOTE;
    struct count nobody = {.holders = 0};
    const struct count *count = NULL;
    if (listing->census) {
        if (listing->census->length > 0)
            count = bsearch(&entry->version, listing->census->counts, listing->census->length,
                            sizeof(nobody), count_compare);
        count = count ? count : &nobody;
        if (state == ENGINE_REMOTE && count->holders == 0 && entry->size > 0)
            state = ENGINE_OFFLINE;
        else if (state == ENGINE_OFFLINE && count->holders > 0)
            state = ENGINE_REMOTE; /* somebody came back since the engine looked */
    }
    char id[MODEL_ID_TEXT];
    model_id_print(&entry->version, id);
    json_put_u64(listing->out, "size", entry->size);
    json_put_text(listing->out, "version", id);
    json_put_text(listing->out, "state", engine_state_name(state));
    json_put_u64(listing->out, "resident", rc == 0 ? info.resident : 0);
    if (rc == 0 && info.pinned)
        json_put_bool(listing->out, "pinned", true);
    if (count) {
        json_put_u64(listing->out, "replicas", count->holders);
        json_put_u64(listing->out, "complete", count->complete);
    }
}

static const char *kind_name(enum model_kind kind)
{
    return kind == MODEL_DIR ? "dir" : kind == MODEL_SYMLINK ? "symlink" : "file";
}

static void entry_put(struct json_out *out, const char *path, const struct model_entry *entry)
{
    json_put_name(out, "name", path);
    json_put_text(out, "kind", kind_name(entry->kind));
    json_put_format(out, "mode", "%04o", entry->attr.mode);
    json_put_u64(out, "uid", entry->attr.uid);
    json_put_u64(out, "gid", entry->attr.gid);
    json_put_time(out, "mtime", entry->attr.mtime_ns);
    if (entry->kind == MODEL_SYMLINK)
        json_put_name(out, "target", entry->target ? entry->target : "");
}

static int listing_visit(void *arg, const char *path, const struct model_entry *entry)
{
    struct listing *listing = arg;
    json_object(listing->out, NULL);
    entry_put(listing->out, path, entry);
    if (entry->kind == MODEL_FILE)
        file_put(listing, entry);
    json_end(listing->out);
    return listing->out->failed ? -ENOMEM : 0;
}

void control_op_ls(struct control_call *call)
{
    struct model_entry top = {0};
    char *name = NULL;
    if (control_target(call, true, &top, &name) < 0)
        return;
    struct listing listing = {.control = call->control, .out = call->answer};
    listing.census = census_take(call->control);
    control_good(call);
    json_put_name(call->answer, "path", name);
    json_put_text(call->answer, "kind", kind_name(top.kind));
    json_put_bool(call->answer, "counted", listing.census != NULL);
    json_array(call->answer, "entries");
    if (control_walk(call->control, &top, name, listing_visit, &listing) < 0)
        call->answer->failed = true; /* memory: anything else ends up as a shorter list */
    json_end(call->answer);
    json_end(call->answer);
    if (listing.census)
        census_free(listing.census);
    model_entry_clear(&top);
    free(name);
}

/* ---- info ---- */

struct holders {
    struct model_holder *list;
    size_t count;
};

static void holders_free(void *data)
{
    struct holders *holders = data;
    free(holders->list);
    free(holders);
}

static void holders_come(void *arg, int status, const struct model_holder *list, size_t count)
{
    struct holders *holders = control_wait_data(arg);
    if (status == 0 && count > 0) {
        holders->list = malloc(count * sizeof(*list));
        if (holders->list) {
            memcpy(holders->list, list, count * sizeof(*list));
            holders->count = count;
        } else {
            status = -ENOMEM;
        }
    }
    control_wait_engine(arg, status);
}

static struct holders *holders_take(struct control *control, const struct model_id *version)
{
    uint64_t since_ms;
    if (!catalog_online(control->house->catalog, &since_ms))
        return NULL;
    struct holders *holders = calloc(1, sizeof(*holders));
    struct control_wait *wait = holders ? control_wait_new(control, holders, holders_free) : NULL;
    if (!wait) {
        free(holders);
        return NULL;
    }
    int rc = catalog_holders(control->house->catalog, version, holders_come, wait);
    rc = control_wait_end(wait, rc);
    if (rc == -ESHUTDOWN)
        return NULL;
    if (rc < 0) {
        holders_free(holders);
        return NULL;
    }
    return holders;
}

static bool state_holds(enum engine_state state)
{
    return state == ENGINE_COMPLETE || state == ENGINE_INPLACE;
}

static void holder_put(struct json_out *out, const char *node, const char *address, bool complete,
                       bool self)
{
    json_object(out, NULL);
    json_put_text(out, "node", node);
    json_put_text(out, "address", address);
    json_put_bool(out, "complete", complete);
    json_put_bool(out, "self", self);
    json_end(out);
}

static void holders_put(struct control_call *call, const struct holders *holders,
                        const struct engine_info *info)
{
    struct house *house = call->control->house;
    struct model_node node = {.boot = 0};
    catalog_node(house->catalog, house->options.node, &node);
    bool self = info->state != ENGINE_CHANGED && (info->resident > 0 || state_holds(info->state));
    uint64_t complete = state_holds(info->state);
    for (size_t i = 0; i < holders->count; i++)
        complete += holders->list[i].complete;
    json_put_u64(call->answer, "replicas", holders->count + self);
    json_put_u64(call->answer, "complete", complete);
    json_array(call->answer, "holders");
    if (self)
        holder_put(call->answer, house->options.node, node.address, state_holds(info->state), true);
    for (size_t i = 0; i < holders->count; i++)
        holder_put(call->answer, holders->list[i].node.name, holders->list[i].node.address,
                   holders->list[i].complete, false);
    json_end(call->answer);
}

static const char *digest_name(enum model_digest digest)
{
    return digest == MODEL_SHA256 ? "sha256" : "xxh3";
}

static void version_put(struct control_call *call, const struct model_entry *entry,
                        const struct engine_info *info)
{
    struct model_version version = {0};
    struct catalog *catalog = call->control->house->catalog;
    if (catalog_version(catalog, &entry->version, &version) < 0)
        return;
    size_t size = version.digest == MODEL_SHA256 ? 32 : 16;
    char hex[2 * MODEL_DIGEST_MAX + 1];
    const uint8_t *root = version.sealed ? version.root : info->sealed ? info->root : NULL;
    util_hex_encode(root ? root : version.root, size, hex);
    if (root)
        json_put_format(call->answer, "digest", "%s:%s", digest_name(version.digest), hex);
    else
        json_put_text(call->answer, "digest", "pending");
    json_put_bool(call->answer, "sealed", root != NULL);
    json_put_u64(call->answer, "shard_size", version.shard_size);
    json_put_u64(call->answer, "shards", model_shard_count(version.size, version.shard_size));
    json_put_text(call->answer, "origin_node", version.origin_node);
    if (version.origin_path)
        json_put_name(call->answer, "origin_path", version.origin_path);
    json_put_u64(call->answer, "names", catalog_version_names(catalog, &entry->version));
    model_version_clear(&version);
}

static void info_file(struct control_call *call, const struct model_entry *entry)
{
    struct engine_info info = {.state = ENGINE_REMOTE, .transport = ""};
    int rc = engine_info(call->control->house->engine, &entry->version, &info);
    /* The counts need the metadata service; who only waits for a state asks without them. */
    struct holders *holders =
        json_true(call->request, "brief") ? NULL : holders_take(call->control, &entry->version);
    if (holders && holders->count == 0 && info.resident == 0 && info.state == ENGINE_REMOTE &&
        entry->size > 0)
        info.state = ENGINE_OFFLINE;
    else if (holders && holders->count > 0 && info.state == ENGINE_OFFLINE)
        info.state = ENGINE_REMOTE;
    char id[MODEL_ID_TEXT];
    model_id_print(&entry->version, id);
    json_put_u64(call->answer, "size", entry->size);
    json_put_text(call->answer, "version", id);
    json_put_text(call->answer, "state", engine_state_name(info.state));
    json_put_u64(call->answer, "resident", info.resident);
    json_put_u64(call->answer, "shards_present", info.shards_present);
    json_put_bool(call->answer, "pinned", info.pinned);
    json_put_u64(call->answer, "open", info.open);
    json_put_u64(call->answer, "sources", info.sources);
    json_put_text(call->answer, "transport", info.transport ? info.transport : "");
    if (rc == 0 && info.error != 0) {
        json_put_u64(call->answer, "last_errno", (uint64_t)abs(info.error));
        json_put_text(call->answer, "last_error", info.reason);
    }
    version_put(call, entry, &info);
    if (holders) {
        holders_put(call, holders, &info);
        holders_free(holders);
    }
}

struct summary {
    struct control *control;
    uint64_t files, dirs, symlinks, bytes, resident, files_complete;
};

static int summary_visit(void *arg, const char *path, const struct model_entry *entry)
{
    struct summary *sum = arg;
    (void)path;
    sum->dirs += entry->kind == MODEL_DIR;
    sum->symlinks += entry->kind == MODEL_SYMLINK;
    if (entry->kind != MODEL_FILE)
        return 0;
    struct engine_info info;
    sum->files++;
    sum->bytes += entry->size;
    if (engine_info(sum->control->house->engine, &entry->version, &info) == 0) {
        sum->resident += info.resident;
        sum->files_complete += state_holds(info.state);
    }
    return 0;
}

static void info_dir(struct control_call *call, const struct model_entry *entry, const char *name)
{
    struct summary sum = {.control = call->control};
    if (control_walk(call->control, entry, name, summary_visit, &sum) < 0)
        call->answer->failed = true;
    json_put_u64(call->answer, "files", sum.files);
    json_put_u64(call->answer, "dirs", sum.dirs);
    json_put_u64(call->answer, "symlinks", sum.symlinks);
    json_put_u64(call->answer, "size", sum.bytes);
    json_put_u64(call->answer, "resident", sum.resident);
    json_put_u64(call->answer, "files_complete", sum.files_complete);
}

void control_op_info(struct control_call *call)
{
    struct model_entry entry = {0};
    char *name = NULL;
    if (control_target(call, true, &entry, &name) < 0)
        return;
    control_good(call);
    entry_put(call->answer, name, &entry);
    if (entry.kind == MODEL_FILE)
        info_file(call, &entry);
    else if (entry.kind == MODEL_DIR)
        info_dir(call, &entry, name);
    json_end(call->answer);
    model_entry_clear(&entry);
    free(name);
}
