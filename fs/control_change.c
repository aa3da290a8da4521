#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "fs/control_parts.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

#define LINGER_MS      1000
#define LINGER_LOOK_MS 5

/* ---- limits ---- */

/* What is not given stays as it is. */
void control_op_limit(struct control_call *call)
{
    struct engine *engine = call->control->house->engine;
    struct engine_stats stats;
    engine_stats(engine, &stats);
    const char *const keys[] = {"upload", "download"};
    uint64_t rates[] = {stats.max_upload, stats.max_download};
    for (size_t i = 0; i < util_count(keys); i++) {
        const char *text = json_text(call->request, keys[i]);
        if (text && options_rate_parse(text, &rates[i]) != 0) {
            control_fail(call, -EINVAL,
                         "%s: '%.64s' is not a rate; write bytes a second (K, M, G), at least 64K, "
                         "or 0 for no limit",
                         keys[i], text);
            return;
        }
    }
    if (rates[0] != stats.max_upload || rates[1] != stats.max_download) {
        engine_limits_set(engine, rates[0], rates[1]);
        log_info("limits are now %llu bytes/s up and %llu down (0: none)",
                 (unsigned long long)rates[0], (unsigned long long)rates[1]);
    }
    control_good(call);
    json_put_u64(call->answer, "max_upload", rates[0]);
    json_put_u64(call->answer, "max_download", rates[1]);
    json_end(call->answer);
}

/* ---- register ---- */

/* Where registered files go: a directory of the namespace, or one that is being built and gets its name at the end. */
struct landing {
    uint64_t dir;
    char *name;      /* of the one file in `dir`; NULL: each keeps its own */
    bool building;   /* `dir` has no name yet */
    uint64_t parent; /* building: where it is attached, and as what */
    char *as;
};

static void landing_clear(struct landing *landing)
{
    free(landing->name);
    free(landing->as);
}

static int tree_begin(struct control *control, uint64_t *dir)
{
    struct control_wait *wait = control_wait_new(control, NULL, NULL);
    if (!wait)
        return -ENOMEM;
    int rc = catalog_tree_begin(control->house->catalog, dir, control_wait_catalog, wait);
    return control_wait_end(wait, rc);
}

static int tree_attach(struct control_call *call, const struct landing *landing)
{
    struct control_wait *wait = control_wait_new(call->control, NULL, NULL);
    if (!wait)
        return -ENOMEM;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    struct model_attr attr = {.mode = 0755,
                              .uid = call->uid,
                              .gid = getgid(),
                              .mtime_ns = now.tv_sec * 1000000000LL + now.tv_nsec};
    int rc = catalog_tree_attach(call->control->house->catalog, landing->dir, landing->parent,
                                 landing->as, &attr, control_wait_catalog, wait);
    return control_wait_end(wait, rc);
}

static void tree_drop(struct control *control, uint64_t dir)
{
    struct control_wait *wait = control_wait_new(control, NULL, NULL);
    if (!wait)
        return; /* nobody can see it, and the sweep takes it */
    int rc = catalog_tree_drop(control->house->catalog, dir, control_wait_catalog, wait);
    control_wait_end(wait, rc);
}

/* The destination does not exist: it becomes the file's name, or a new directory for several. */
static int landing_new(struct control *control, const char *path, bool several, struct landing *out)
{
    char *copy = strdup(path);
    if (!copy)
        return -ENOMEM;
    size_t length = strlen(copy);
    while (length > 0 && copy[length - 1] == '/')
        copy[--length] = '\0';
    char *slash = strrchr(copy, '/');
    const char *leaf = slash ? slash + 1 : copy;
    struct model_entry parent = {0};
    int rc = model_name_check(leaf);
    char *name = rc == 0 ? strdup(leaf) : NULL;
    if (rc == 0 && !name)
        rc = -ENOMEM;
    if (slash)
        *slash = '\0';
    if (rc == 0)
        rc = control_resolve(control, slash ? copy : "", true, &parent);
    if (rc == 0 && parent.kind != MODEL_DIR)
        rc = -ENOTDIR;
    if (rc == 0 && parent.id == MODEL_ROOT && strcmp(name, CONTROL_DIR) == 0)
        rc = -EEXIST;
    if (rc == 0 && several) {
        *out = (struct landing){.building = true, .parent = parent.id, .as = name};
        rc = tree_begin(control, &out->dir);
    } else if (rc == 0) {
        *out = (struct landing){.dir = parent.id, .name = name};
    }
    if (rc != 0) {
        free(name);
        *out = (struct landing){0};
    }
    model_entry_clear(&parent);
    free(copy);
    return rc;
}

static int landing_find(struct control *control, const char *path, bool several,
                        struct landing *out)
{
    struct model_entry entry = {0};
    *out = (struct landing){0};
    int rc = control_resolve(control, path, true, &entry);
    if (rc == -ENOENT)
        return landing_new(control, path, several, out);
    if (rc < 0)
        return rc;
    if (entry.kind == MODEL_DIR) {
        out->dir = entry.id;
    } else if (several) {
        rc = -ENOTDIR;
    } else {
        out->dir = entry.parent;
        out->name = strdup(entry.name);
        rc = out->name ? 0 : -ENOMEM;
    }
    model_entry_clear(&entry);
    return rc;
}

static int register_one(struct control *control, const char *file, const struct landing *landing)
{
    struct house *house = control->house;
    struct stat st;
    const char *slash = strrchr(file, '/');
    const char *name = landing->name ? landing->name : slash ? slash + 1 : file;
    if (file[0] != '/')
        return -EINVAL;
    int rc = model_name_check(name);
    if (rc < 0)
        return rc;
    if (landing->dir == MODEL_ROOT && strcmp(name, CONTROL_DIR) == 0)
        return -EEXIST;
    if (stat(file, &st) < 0)
        return -errno;
    if (!S_ISREG(st.st_mode) && !S_ISDIR(st.st_mode))
        return -EINVAL;
    struct control_wait *wait = control_wait_new(control, NULL, NULL);
    if (!wait)
        return -ENOMEM;
    unsigned flags = house->options.allow_overwrite ? CATALOG_OVERWRITE : 0;
    rc = (S_ISDIR(st.st_mode) ? engine_register_tree : engine_register_file)(
        house->engine, file, landing->dir, name, flags, control_wait_catalog, wait);
    return control_wait_end(wait, rc);
}

static const char *register_why(int error)
{
    switch (-error) {
    case ENOENT:
        return "no such file or directory";
    case EINVAL:
        return "only regular files and directories can be registered, by absolute path";
    case ELOOP:
        return "it lies inside the mount: copy or link it there with cp or ln";
    case EACCES:
        return "the mount may not read it";
    case EXDEV:
        return "the name leads out of the mount";
    default:
        return control_why(error);
    }
}

/* How many files were given, or a failed call. */
static size_t files_count(struct control_call *call, const struct json *files)
{
    size_t count = 0;
    for (const struct json *item = json_first(files); item; item = json_next(item)) {
        if (!json_item_text(item)) {
            count = 0;
            break;
        }
        count++;
    }
    if (count == 0)
        control_fail(call, -EINVAL, "register needs \"files\": an array of absolute paths");
    return count;
}

static void register_into(struct control_call *call, const struct json *files,
                          struct landing *landing, const char *to)
{
    uint64_t count = 0;
    for (const struct json *item = json_first(files); item; item = json_next(item)) {
        util_autofree char *file = json_name(json_item_text(item));
        int rc = file ? register_one(call->control, file, landing) : -EINVAL;
        if (rc < 0) {
            if (landing->building)
                tree_drop(call->control, landing->dir);
            control_fail(call, rc, "cannot register '%s' as '%s': %s", json_item_text(item), to,
                         register_why(rc));
            return;
        }
        count++;
    }
    int rc = landing->building ? tree_attach(call, landing) : 0;
    if (rc < 0) {
        tree_drop(call->control, landing->dir);
        control_fail(call, rc, "cannot register as '%s': %s", to, control_why(rc));
        return;
    }
    control_good(call);
    json_put_text(call->answer, "name", to);
    json_put_u64(call->answer, "registered", count);
    json_end(call->answer);
}

void control_op_register(struct control_call *call)
{
    const struct json *files = json_member(call->request, "files");
    const char *to = json_text(call->request, "name");
    util_autofree char *name = json_name(to);
    size_t count = files_count(call, files);
    if (count == 0)
        return;
    if (!name) {
        control_fail(call, -EINVAL, "register needs \"name\": where to register");
        return;
    }
    struct landing landing;
    int rc = landing_find(call->control, name, count > 1, &landing);
    if (rc < 0) {
        control_fail(call, rc, "cannot register as '%s': %s", to,
                     rc == -ENOENT    ? "its directory does not exist: mkdir it first"
                     : rc == -ENOTDIR ? "it is not a directory"
                                      : register_why(rc));
        return;
    }
    register_into(call, files, &landing, to);
    landing_clear(&landing);
}

/* ---- unregister ---- */

void control_op_unregister(struct control_call *call)
{
    struct model_entry entry = {0};
    char *name = NULL;
    if (control_target(call, false, &entry, &name) < 0)
        return;
    if (entry.id == MODEL_ROOT) {
        control_fail(call, -EBUSY,
                     "the root of the mount cannot be unregistered: name what is "
                     "below it");
        goto clear_entry;
    }
    struct control_wait *wait = control_wait_new(call->control, NULL, NULL);
    int rc = -ENOMEM;
    if (wait) {
        rc = catalog_remove_tree(call->control->house->catalog, entry.parent, entry.name,
                                 control_wait_catalog, wait);
        rc = control_wait_end(wait, rc);
    }
    if (rc < 0) {
        control_fail(call, rc, "cannot unregister '%s': %s", name, control_why(rc));
        goto clear_entry;
    }
    control_good(call);
    json_put_name(call->answer, "name", name);
    json_end(call->answer);

clear_entry:
    model_entry_clear(&entry);
    free(name);
}

/* ---- evict, pin and unpin: something for every file of a tree ---- */

struct sweep {
    struct control_call *call;
    int (*one)(struct sweep *sweep, const struct model_id *version);
    bool force;
    uint64_t files, bytes, touched, failed, inplace;
    bool open, pulled;    /* what refused to be evicted is so here */
    unsigned lingered_ms; /* waited for that, over all files */
    int error;            /* the first, and whose it was */
    char path[MODEL_PATH_MAX + 1];
};

static int sweep_visit(void *arg, const char *path, const struct model_entry *entry)
{
    struct sweep *sweep = arg;
    if (entry->kind != MODEL_FILE)
        return 0;
    sweep->files++;
    int rc = sweep->one(sweep, &entry->version);
    if (rc == -ESHUTDOWN)
        return rc;
    if (rc < 0 && sweep->failed++ == 0) {
        sweep->error = rc;
        snprintf(sweep->path, sizeof(sweep->path), "%s", path);
    }
    return 0;
}

static int evict_once(struct sweep *sweep, const struct model_id *version)
{
    struct control *control = sweep->call->control;
    struct control_wait *wait = control_wait_new(control, NULL, NULL);
    if (!wait)
        return -ENOMEM;
    int rc = engine_evict(control->house->engine, version, sweep->force, control_wait_engine, wait);
    return control_wait_end(wait, rc);
}

/* A pull that has ended holds its file for a moment longer, and the kernel tells of a close after it. */
static bool lingers(struct sweep *sweep, const struct model_id *version)
{
    struct engine *engine = sweep->call->control->house->engine;
    struct engine_info info = {.open = 0};
    struct engine_stats stats;
    engine_info(engine, version, &info);
    engine_stats(engine, &stats);
    if ((stats.pulls_running == 0 && info.open == 0) || sweep->lingered_ms >= LINGER_MS)
        return false;
    struct timespec pause = {.tv_nsec = LINGER_LOOK_MS * 1000000L};
    nanosleep(&pause, NULL);
    sweep->lingered_ms += LINGER_LOOK_MS;
    return true;
}

static int evict_one(struct sweep *sweep, const struct model_id *version)
{
    struct control *control = sweep->call->control;
    struct engine_info info = {.state = ENGINE_REMOTE};
    engine_info(control->house->engine, version, &info);
    if (info.state == ENGINE_INPLACE || info.state == ENGINE_CHANGED) {
        sweep->inplace++;
        return 0;
    }
    int rc = evict_once(sweep, version);
    while (rc == -EBUSY && lingers(sweep, version))
        rc = evict_once(sweep, version);
    if (rc == -ENOENT) /* nothing here, which is what was asked for */
        return 0;
    if (rc == -EBUSY && sweep->failed == 0 &&
        engine_info(control->house->engine, version, &info) == 0) {
        sweep->open = info.open > 0;
        sweep->pulled = info.state == ENGINE_FETCHING;
    }
    if (rc == 0) {
        sweep->touched++;
        sweep->bytes += info.resident;
    }
    return rc;
}

static int pin_one(struct sweep *sweep, const struct model_id *version)
{
    sweep->touched++;
    return engine_pin(sweep->call->control->house->engine, version, true);
}

static int unpin_one(struct sweep *sweep, const struct model_id *version)
{
    sweep->touched++;
    int rc = engine_pin(sweep->call->control->house->engine, version, false);
    return rc == -ENOENT ? 0 : rc;
}

static const char *sweep_why(const struct sweep *sweep)
{
    if (sweep->one == evict_one && sweep->error == -EBUSY && sweep->open)
        return "it is open on this node: close its readers first";
    if (sweep->one == evict_one && sweep->error == -EBUSY)
        return sweep->pulled  ? "it is being pulled: try again when that is over"
               : sweep->force ? "peers read it: try again in a moment"
                              : "no other live node holds all of it (--force drops a last copy)";
    if (sweep->one == evict_one && sweep->error == -EPERM)
        return "it is pinned: p2pfs unpin it first";
    return control_why(sweep->error);
}

static void sweep_run(struct control_call *call, const char *verb,
                      int (*one)(struct sweep *sweep, const struct model_id *version))
{
    struct model_entry top = {0};
    char *name = NULL;
    if (control_target(call, true, &top, &name) < 0)
        return;
    struct sweep *sweep = calloc(1, sizeof(*sweep));
    if (!sweep) {
        control_fail(call, -ENOMEM, "the mount is out of memory");
        goto free_name;
    }
    sweep->call = call;
    sweep->one = one;
    sweep->force = json_true(call->request, "force");
    int rc = control_walk(call->control, &top, name, sweep_visit, sweep);
    if (rc == 0 && top.kind == MODEL_FILE && sweep->inplace > 0) {
        control_fail(call, -EINVAL,
                     "cannot %s '%s': it is registered where it lies; unregister it, "
                     "or leave it",
                     verb, name);
    } else if (rc < 0) {
        control_fail(call, rc, "cannot %s '%s': %s", verb, name, control_why(rc));
    } else if (sweep->failed > 0) {
        control_fail(call, sweep->error, "cannot %s '%s' (%llu of %llu files): %s", verb,
                     sweep->path, (unsigned long long)sweep->failed,
                     (unsigned long long)sweep->files, sweep_why(sweep));
    } else {
        control_good(call);
        json_put_name(call->answer, "name", name);
        json_put_u64(call->answer, "files", sweep->touched);
        json_put_u64(call->answer, "bytes", sweep->bytes);
        json_end(call->answer);
    }
    free(sweep);

free_name:
    model_entry_clear(&top);
    free(name);
}

void control_op_evict(struct control_call *call)
{
    sweep_run(call, "evict", evict_one);
}

void control_op_pin(struct control_call *call)
{
    sweep_run(call, "pin", pin_one);
}

void control_op_unpin(struct control_call *call)
{
    sweep_run(call, "unpin", unpin_one);
}
