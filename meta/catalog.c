#include "meta/catalog.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "meta/base/log.h"
#include "meta/base/util.h"
#include "meta/catalog_inside.h"

#define CATALOG_LEASE_MS     10000
#define CATALOG_LEASE_MIN_MS 1000
#define CATALOG_JOIN_MS      (2 * CATALOG_DEADLINE_MS)

/* ---- opening ---- */

static void __attribute__((format(printf, 2, 3))) catalog_say(char **error, const char *format, ...)
{
    va_list arguments;
    if (!error)
        return;
    va_start(arguments, format);
    if (vasprintf(error, format, arguments) < 0)
        *error = NULL;
    va_end(arguments);
}

/* Which machine, and which of its pid namespaces: there a process id means something. */
static void catalog_host(char out[65])
{
    char boot[37] = "";
    struct stat st;
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    ssize_t length = fd >= 0 ? read(fd, boot, 36) : 0;
    if (fd >= 0)
        close(fd);
    if (length == 36 && stat("/proc/self/ns/pid", &st) == 0)
        snprintf(out, 65, "%s:%llu", boot, (unsigned long long)st.st_ino);
}

static int catalog_self(struct catalog *c, const struct catalog_config *config, char **error)
{
    c->self = config->self;
    if (model_node_check(c->self.name) < 0) {
        catalog_say(error,
                    "node=%s: a node's name is 1 to %d printable ASCII characters without blanks, "
                    "'/' and '%%'",
                    c->self.name, MODEL_NODE_MAX);
        return -EINVAL;
    }
    if (c->self.boot == 0)
        c->self.boot = util_random_u64();
    if (c->self.host[0] == '\0')
        catalog_host(c->self.host);
    if (c->self.pid == 0)
        c->self.pid = getpid();
    return 0;
}

static int catalog_connect(struct catalog *c, const struct catalog_config *config, char **error)
{
    const char *reason;
    bool replaced;
    struct meta_config meta = {.url = config->url, .credentials_file = config->credentials_file};
    int rc = meta_open(&meta, &c->store, &reason);
    if (rc < 0) {
        catalog_say(error, "%s", reason);
        return rc;
    }
    c->backend = c->store->ops->name;
    c->single_machine = c->store->ops->single_machine;
    rc = feed_list(c, &replaced);
    if (rc == 0 && model_id_zero(&c->instance))
        rc = sweep_instance(c);
    if (rc == 0)
        rc = feed_pull(c, 0, -1, NULL); /* the instance, ours or another's */
    if (rc < 0)
        catalog_say(error,
                    "the metadata service at %s can be opened but not read: %s (see the log)",
                    c->backend, strerror(-rc));
    return rc;
}

/* Signals are the business of those who started the threads. */
static int catalog_start(struct catalog *c)
{
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = -pthread_create(&c->thread, NULL, loop_main, c);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (rc == 0)
        pthread_setname_np(c->thread, "p2pfs-catalog");
    return rc;
}

int catalog_open(const struct catalog_config *config, struct catalog **catalog, char **error)
{
    if (error)
        *error = NULL;
    struct catalog *c = calloc(1, sizeof(*c));
    if (!c)
        return -ENOMEM;
    c->wake_fd = -1;
    c->queue_end = &c->queue;
    c->notes_end = &c->notes;
    c->online = true;
    c->sweep_clock = 1;
    c->lease_ms = config->lease_ms != 0 ? config->lease_ms : CATALOG_LEASE_MS;
    if (c->lease_ms < CATALOG_LEASE_MIN_MS)
        c->lease_ms = CATALOG_LEASE_MIN_MS;
    c->orphan_ttl_s = config->orphan_ttl_s;
    pthread_mutex_init(&c->mutex, NULL);
    int rc = catalog_self(c, config, error);
    if (rc < 0)
        goto free_catalog;
    c->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    rc = c->wake_fd < 0 ? -errno : tree_new(&c->tree);
    if (rc == 0)
        rc = catalog_connect(c, config, error);
    if (rc < 0)
        goto free_catalog;
    c->events = config->events; /* from here on: what stood already is no change */
    sweep_restart(c);
    rc = catalog_start(c);
    if (rc < 0)
        goto free_catalog;
    *catalog = c;
    return 0;

free_catalog:
    catalog_free(c);
    return rc;
}

void catalog_rdma_set(struct catalog *catalog, const char *address)
{
    snprintf(catalog->self.rdma, sizeof(catalog->self.rdma), "%s", address);
}

int catalog_serve(struct catalog *catalog, const char *address, char **error)
{
    struct model_node other;
    if (error)
        *error = NULL;
    if (strlen(address) > MODEL_ADDRESS_MAX)
        return -ENAMETOOLONG;
    uint64_t end = util_now_ms() + catalog->lease_ms + 1000;
    int rc;
    for (;;) {
        struct catalog_sync sync = {0};
        rc = queue_serve(catalog, address, catalog_sync_done, &sync);
        if (rc == 0)
            rc = catalog_sync_wait(&sync);
        if (rc != -EBUSY || util_now_ms() > end)
            break;
        nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
    }
    if (rc == -EBUSY)
        rc = -EEXIST;
    if (rc == -EEXIST && catalog_node(catalog, catalog->self.name, &other) == 0)
        catalog_say(error,
                    "the node name %s is in use by the node at %s; give this one another with "
                    "node=",
                    catalog->self.name, other.address);
    else if (rc < 0)
        catalog_say(error, "node %s cannot be announced: %s", catalog->self.name, strerror(-rc));
    return rc;
}

void catalog_close(struct catalog *c)
{
    if (!c)
        return;
    bool own = pthread_equal(pthread_self(), c->thread) != 0;
    pthread_mutex_lock(&c->mutex);
    c->stopping = true;
    c->detached = own;
    pthread_mutex_unlock(&c->mutex);
    queue_wake(c);
    if (own) {
        /* called from an event or a `done`: the thread ends itself as soon as that returns */
        pthread_detach(c->thread);
        return;
    }
    /* pthread_timedjoin_np goes by the time of day, which may jump; thread sanitizers know no other that waits */
    uint64_t end = util_now_ms() + CATALOG_JOIN_MS;
    int rc;
    while ((rc = pthread_tryjoin_np(c->thread, NULL)) == EBUSY && util_now_ms() < end)
        nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
    if (rc != 0) {
        log_error("a handler of a metadata change does not return; leaving the catalog behind");
        pthread_detach(c->thread);
        return;
    }
    queue_fail(c, -ESHUTDOWN);
    catalog_free(c);
}

/* ---- reading names ---- */

/* Copies what was found and lets the tree go. */
static int catalog_copy_entry(struct catalog *c, const struct tree_entry *entry,
                              struct model_entry *out)
{
    int rc = -ENOENT;
    if (entry) {
        struct model_entry view;
        tree_entry_view(entry, &view);
        rc = model_entry_copy(out, &view);
    }
    tree_unlock(c->tree);
    return rc;
}

int catalog_lookup(struct catalog *c, uint64_t parent, const char *name, struct model_entry *out)
{
    tree_read_lock(c->tree);
    return catalog_copy_entry(c, tree_entry_find(c->tree, parent, name), out);
}

int catalog_entry(struct catalog *c, uint64_t id, struct model_entry *out)
{
    tree_read_lock(c->tree);
    return catalog_copy_entry(c, tree_entry_by_id(c->tree, id), out);
}

int catalog_resolve(struct catalog *c, const char *path, struct model_entry *out)
{
    struct tree_entry *entry = NULL;
    tree_read_lock(c->tree);
    int rc = tree_resolve(c->tree, path, &entry);
    int copied = catalog_copy_entry(c, rc == 0 ? entry : NULL, out);
    return rc < 0 ? rc : copied;
}

int catalog_path(struct catalog *c, uint64_t id, char *out, size_t size)
{
    tree_read_lock(c->tree);
    int rc = tree_path(c->tree, id, out, size);
    tree_unlock(c->tree);
    return rc;
}

static int catalog_list_compare(const void *a, const void *b)
{
    return strcmp(((const struct model_entry *)a)->name, ((const struct model_entry *)b)->name);
}

int catalog_list(struct catalog *c, uint64_t dir, struct catalog_list *out)
{
    int rc = 0;
    memset(out, 0, sizeof(*out));
    tree_read_lock(c->tree);
    const struct tree_dir *found = tree_dir_find(c->tree, dir);
    if (!found && dir != MODEL_ROOT)
        rc = -ENOENT;
    if (found && found->count > 0) {
        out->entries = calloc(found->count, sizeof(*out->entries));
        rc = out->entries ? 0 : -ENOMEM;
        for (const struct tree_entry *e = found->children; rc == 0 && e; e = e->next) {
            struct model_entry view;
            tree_entry_view(e, &view);
            rc = model_entry_copy(&out->entries[out->count], &view);
            out->count += rc == 0;
        }
    }
    tree_unlock(c->tree);
    if (rc < 0)
        catalog_list_free(out);
    else if (out->count > 1)
        qsort(out->entries, out->count, sizeof(*out->entries), catalog_list_compare);
    return rc;
}

void catalog_list_free(struct catalog_list *list)
{
    for (size_t i = 0; i < list->count; i++)
        model_entry_clear(&list->entries[i]);
    free(list->entries);
    memset(list, 0, sizeof(*list));
}

/* ---- reading the rest ---- */

int catalog_version(struct catalog *c, const struct model_id *id, struct model_version *out)
{
    int rc = -ENOENT;
    tree_read_lock(c->tree);
    const struct tree_version *version = tree_version_find(c->tree, id);
    if (version && version->revision != 0) {
        struct model_version view;
        tree_version_view(version, &view);
        rc = model_version_copy(out, &view);
    }
    tree_unlock(c->tree);
    return rc;
}

int catalog_registered(struct catalog *c, const char *node, catalog_version_each each, void *arg)
{
    struct model_version *found = NULL;
    size_t count = 0;
    size_t room = 0;
    int rc = 0;
    tree_read_lock(c->tree);
    for (const struct tree_version *v = c->tree->versions; rc == 0 && v; v = v->hh.next) {
        struct model_version view;
        if (v->revision == 0 || !v->origin_path || strcmp(v->origin_node, node) != 0)
            continue;
        if (count == room) {
            room = room > 0 ? 2 * room : 16;
            struct model_version *more = realloc(found, room * sizeof(*more));
            if (!more) {
                rc = -ENOMEM;
                break;
            }
            found = more;
        }
        tree_version_view(v, &view);
        rc = model_version_copy(&found[count], &view);
        count += rc == 0;
    }
    tree_unlock(c->tree);
    for (size_t i = 0; i < count; i++) {
        if (rc == 0)
            each(arg, &found[i]);
        model_version_clear(&found[i]);
    }
    free(found);
    return rc;
}

size_t catalog_largest(struct catalog *c, const char *but_node, uint64_t *sizes, size_t count)
{
    size_t found = 0;
    tree_read_lock(c->tree);
    for (const struct tree_version *v = c->tree->versions; v; v = v->hh.next) {
        if (v->revision == 0 || v->names == 0 || (found == count && v->size <= sizes[count - 1]) ||
            (v->origin_path && strcmp(v->origin_node, but_node) == 0))
            continue;
        size_t at = found < count ? found++ : count - 1;
        for (; at > 0 && sizes[at - 1] < v->size; at--)
            sizes[at] = sizes[at - 1];
        sizes[at] = v->size;
    }
    tree_unlock(c->tree);
    return found;
}

uint32_t catalog_version_names(struct catalog *c, const struct model_id *id)
{
    tree_read_lock(c->tree);
    const struct tree_version *version = tree_version_find(c->tree, id);
    uint32_t names = version ? version->names : 0;
    tree_unlock(c->tree);
    return names;
}

/* The path of an entry of one of the versions, where none is known yet. Read lock held. */
static int version_path_note(const struct tree *tree, const struct tree_entry *entry,
                             const struct model_id *ids, size_t count, char **paths)
{
    for (size_t i = 0; i < count; i++) {
        if (paths[i] || !model_id_equal(&entry->version->id, &ids[i]))
            continue;
        size_t room = tree_path_length(tree, entry->id) + 1;
        char *path = malloc(room);
        if (!path)
            return -ENOMEM;
        if (tree_path(tree, entry->id, path, room) == 0)
            paths[i] = path;
        else
            free(path); /* in a tree that has no name yet */
    }
    return 0;
}

int catalog_version_paths(struct catalog *c, const struct model_id *ids, size_t count, char **paths)
{
    int rc = 0;
    memset(paths, 0, count * sizeof(*paths));
    tree_read_lock(c->tree);
    for (const struct tree_entry *e = c->tree->entries; rc == 0 && count > 0 && e;
         e = e->by_name.next)
        if (e->kind == MODEL_FILE && e->version)
            rc = version_path_note(c->tree, e, ids, count, paths);
    tree_unlock(c->tree);
    for (size_t i = 0; rc < 0 && i < count; i++) {
        free(paths[i]);
        paths[i] = NULL;
    }
    return rc;
}

int catalog_node(struct catalog *c, const char *name, struct model_node *out)
{
    tree_read_lock(c->tree);
    const struct tree_node *node = tree_node_find(c->tree, name);
    if (node)
        *out = node->node;
    tree_unlock(c->tree);
    return node ? 0 : -ENOENT;
}

int catalog_nodes(struct catalog *c, struct model_node **out, size_t *count)
{
    size_t used = 0;
    tree_read_lock(c->tree);
    size_t wanted = HASH_COUNT(c->tree->nodes);
    struct model_node *nodes = calloc(wanted > 0 ? wanted : 1, sizeof(*nodes));
    for (const struct tree_node *n = c->tree->nodes; nodes && n; n = n->hh.next)
        nodes[used++] = n->node;
    tree_unlock(c->tree);
    if (!nodes)
        return -ENOMEM;
    *out = nodes;
    *count = used;
    return 0;
}

void catalog_totals(struct catalog *c, struct catalog_totals *out)
{
    tree_read_lock(c->tree);
    const struct tree_totals *totals = &c->tree->totals;
    *out = (struct catalog_totals){
        .files = totals->files,
        .dirs = totals->dirs,
        .symlinks = totals->symlinks,
        .bytes = totals->bytes,
    };
    tree_unlock(c->tree);
}

bool catalog_online(struct catalog *c, uint64_t *since_ms)
{
    pthread_mutex_lock(&c->mutex);
    bool online = c->online;
    if (since_ms && !online)
        *since_ms = c->since_ms;
    pthread_mutex_unlock(&c->mutex);
    return online;
}

uint64_t catalog_outages(struct catalog *c)
{
    pthread_mutex_lock(&c->mutex);
    uint64_t outages = c->outages;
    pthread_mutex_unlock(&c->mutex);
    return outages;
}

const char *catalog_backend(struct catalog *c)
{
    return c->backend;
}

bool catalog_single_machine(struct catalog *c)
{
    return c->single_machine;
}
