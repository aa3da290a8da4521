/* What the tests of the catalog share: a directory with a local: service, nodes on it, changes that wait. */
#ifndef P2PFS_TESTS_CATALOG_KIT_H
#define P2PFS_TESTS_CATALOG_KIT_H

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "meta/base/log.h"
#include "meta/base/util.h"
#include "meta/catalog.h"
#include "meta/codec.h"
#include "meta/meta.h"

#define KIT_LEASE_MS 3000
#define KIT_UNUSED   __attribute__((unused))

/* Waits until the condition holds, and fails when it never did. `ms` is what a quiet machine needs
 * at most; a busy one, or a sanitizer, gets ten times as much. */
#define kit_until(ms, condition)                                         \
    do {                                                                 \
        uint64_t kit_end = util_now_ms() + 10 * (uint64_t)(ms);          \
        while (!(condition)) {                                           \
            if (util_now_ms() > kit_end)                                 \
                fail_msg("not within %d ms: %s", (int)(ms), #condition); \
            usleep(2000);                                                \
        }                                                                \
    } while (0)

static char kit_dir[64];
static char kit_url[96];

/* What a node was told, in words. */
struct kit_node {
    struct catalog *catalog;
    pthread_mutex_t mutex;
    char told[1 << 16]; /* "name:x gone sealed up:n down:n " */
    int gone;
};

static void kit_tell(struct kit_node *node, const char *word, const char *detail)
{
    pthread_mutex_lock(&node->mutex);
    size_t used = strlen(node->told);
    snprintf(node->told + used, sizeof(node->told) - used, "%s%s ", word, detail);
    pthread_mutex_unlock(&node->mutex);
}

static void kit_name_changed(void *arg, uint64_t parent, const char *name)
{
    (void)parent;
    kit_tell(arg, "name:", name);
}

static void kit_version_gone(void *arg, const struct model_id *version)
{
    struct kit_node *node = arg;
    (void)version;
    kit_tell(node, "gone", "");
    pthread_mutex_lock(&node->mutex);
    node->gone++;
    pthread_mutex_unlock(&node->mutex);
}

static void kit_version_sealed(void *arg, const struct model_id *version)
{
    (void)version;
    kit_tell(arg, "sealed", "");
}

static void kit_node_changed(void *arg, const char *name, bool up)
{
    kit_tell(arg, up ? "up:" : "down:", name);
}

static KIT_UNUSED bool kit_told(struct kit_node *node, const char *words)
{
    pthread_mutex_lock(&node->mutex);
    bool told = strstr(node->told, words) != NULL;
    pthread_mutex_unlock(&node->mutex);
    return told;
}

static KIT_UNUSED int kit_gone(struct kit_node *node)
{
    pthread_mutex_lock(&node->mutex);
    int gone = node->gone;
    pthread_mutex_unlock(&node->mutex);
    return gone;
}

static KIT_UNUSED void kit_forget(struct kit_node *node)
{
    pthread_mutex_lock(&node->mutex);
    node->told[0] = '\0';
    node->gone = 0;
    pthread_mutex_unlock(&node->mutex);
}

static struct kit_node *kit_open_ttl(const char *name, uint32_t orphan_ttl_s)
{
    struct kit_node *node = calloc(1, sizeof(*node));
    char *error = NULL;
    pthread_mutex_init(&node->mutex, NULL);
    struct catalog_config config = {
        .url = kit_url,
        .lease_ms = KIT_LEASE_MS,
        .orphan_ttl_s = orphan_ttl_s,
        .events = {node, kit_name_changed, kit_version_gone, kit_version_sealed, kit_node_changed},
    };
    snprintf(config.self.name, sizeof(config.self.name), "%s", name);
    int rc = catalog_open(&config, &node->catalog, &error);
    if (rc < 0)
        fail_msg("catalog_open: %s", error ? error : strerror(-rc));
    return node;
}

static KIT_UNUSED struct kit_node *kit_open(const char *name)
{
    return kit_open_ttl(name, 0);
}

static KIT_UNUSED void kit_serve(struct kit_node *node, const char *address)
{
    char *error = NULL;
    int rc = catalog_serve(node->catalog, address, &error);
    if (rc < 0)
        fail_msg("catalog_serve: %s", error ? error : strerror(-rc));
}

static KIT_UNUSED struct kit_node *kit_up_ttl(const char *name, uint32_t orphan_ttl_s)
{
    struct kit_node *node = kit_open_ttl(name, orphan_ttl_s);
    kit_serve(node, "127.0.0.1:1");
    return node;
}

static KIT_UNUSED struct kit_node *kit_up(const char *name)
{
    return kit_up_ttl(name, 0);
}

static KIT_UNUSED void kit_close(struct kit_node *node)
{
    catalog_close(node->catalog);
    pthread_mutex_destroy(&node->mutex);
    free(node);
}

/* ---- a story: a directory and two nodes ---- */

static struct kit_node *a;
static struct kit_node *b;

static KIT_UNUSED int kit_setup(void **state)
{
    log_setup(LOG_ERROR, false);
    snprintf(kit_dir, sizeof(kit_dir), "/tmp/p2pfs-test-catalog-XXXXXX");
    if (!mkdtemp(kit_dir))
        return -1;
    snprintf(kit_url, sizeof(kit_url), "local://%s", kit_dir);
    a = kit_up("a");
    b = kit_up("b");
    return 0;
}

static KIT_UNUSED int kit_teardown(void **state)
{
    char command[160];
    kit_close(a);
    kit_close(b);
    snprintf(command, sizeof(command), "rm -rf %s %s.*", kit_dir, kit_dir);
    return system(command);
}

#define KIT_STORY(test) cmocka_unit_test_setup_teardown(test, kit_setup, kit_teardown)

/* ---- changes that wait ---- */

static uint64_t kit_id; /* of the entry that the last change left */

static int kit_wait(int rc, struct catalog_sync *sync)
{
    if (rc == 0)
        rc = catalog_sync_wait(sync);
    kit_id = sync->id;
    return rc;
}

#define KIT_CHANGE(call)            \
    struct catalog_sync sync = {0}; \
    return kit_wait(call, &sync)

static const struct model_attr kit_attr = {0640, 11, 12, 1234567890123456789};

static KIT_UNUSED int do_mkdir(struct kit_node *n, uint64_t parent, const char *name)
{
    KIT_CHANGE(catalog_mkdir(n->catalog, parent, name, &kit_attr, catalog_sync_done, &sync));
}

static KIT_UNUSED int do_symlink(struct kit_node *n, uint64_t parent, const char *name,
                                 const char *target)
{
    KIT_CHANGE(
        catalog_symlink(n->catalog, parent, name, target, &kit_attr, catalog_sync_done, &sync));
}

static KIT_UNUSED struct model_version kit_version(uint64_t size)
{
    return (struct model_version){.id = model_id_new(),
                                  .size = size,
                                  .shard_size = MODEL_AUTO_MIN,
                                  .digest = MODEL_XXH3,
                                  .sealed = true,
                                  .root = {1, 2, 3}};
}

static KIT_UNUSED int do_publish(struct kit_node *n, uint64_t parent, const char *name,
                                 const struct model_version *version, unsigned flags)
{
    KIT_CHANGE(catalog_publish(n->catalog, parent, name, 0, &kit_attr, version, flags,
                               catalog_sync_done, &sync));
}

/* A complete file of `size` bytes; its version's id. */
static KIT_UNUSED struct model_id do_file(struct kit_node *n, uint64_t parent, const char *name,
                                          uint64_t size)
{
    struct model_version version = kit_version(size);
    assert_int_equal(do_publish(n, parent, name, &version, CATALOG_COMPLETE), 0);
    return version.id;
}

static KIT_UNUSED int do_link(struct kit_node *n, uint64_t id, uint64_t parent, const char *name)
{
    KIT_CHANGE(catalog_link(n->catalog, id, parent, name, catalog_sync_done, &sync));
}

static KIT_UNUSED int do_rename(struct kit_node *n, uint64_t parent, const char *name,
                                uint64_t new_parent, const char *new_name, unsigned flags)
{
    KIT_CHANGE(catalog_rename(n->catalog, parent, name, new_parent, new_name, flags,
                              catalog_sync_done, &sync));
}

static KIT_UNUSED int do_unlink(struct kit_node *n, uint64_t parent, const char *name)
{
    KIT_CHANGE(catalog_unlink(n->catalog, parent, name, catalog_sync_done, &sync));
}

static KIT_UNUSED int do_rmdir(struct kit_node *n, uint64_t parent, const char *name)
{
    KIT_CHANGE(catalog_rmdir(n->catalog, parent, name, catalog_sync_done, &sync));
}

static KIT_UNUSED int do_remove_tree(struct kit_node *n, uint64_t parent, const char *name)
{
    KIT_CHANGE(catalog_remove_tree(n->catalog, parent, name, catalog_sync_done, &sync));
}

static KIT_UNUSED int do_setattr(struct kit_node *n, uint64_t id, unsigned mask,
                                 const struct model_attr *attr)
{
    KIT_CHANGE(catalog_setattr(n->catalog, id, mask, attr, catalog_sync_done, &sync));
}

static KIT_UNUSED int do_tree_begin(struct kit_node *n, uint64_t *dir)
{
    KIT_CHANGE(catalog_tree_begin(n->catalog, dir, catalog_sync_done, &sync));
}

static KIT_UNUSED int do_tree_attach(struct kit_node *n, uint64_t dir, uint64_t parent,
                                     const char *name)
{
    KIT_CHANGE(
        catalog_tree_attach(n->catalog, dir, parent, name, &kit_attr, catalog_sync_done, &sync));
}

static KIT_UNUSED int do_tree_drop(struct kit_node *n, uint64_t dir)
{
    KIT_CHANGE(catalog_tree_drop(n->catalog, dir, catalog_sync_done, &sync));
}

static KIT_UNUSED int do_seal(struct kit_node *n, const struct model_id *id, const uint8_t *root)
{
    KIT_CHANGE(catalog_seal(n->catalog, id, root, catalog_sync_done, &sync));
}

static KIT_UNUSED int do_announce(struct kit_node *n, const struct model_id *id, unsigned flags)
{
    KIT_CHANGE(catalog_announce(n->catalog, id, flags, catalog_sync_done, &sync));
}

static KIT_UNUSED int do_withdraw(struct kit_node *n, const struct model_id *id, bool keep_other)
{
    KIT_CHANGE(catalog_withdraw(n->catalog, id, keep_other, catalog_sync_done, &sync));
}

struct kit_holders {
    struct catalog_sync sync;
    char names[512]; /* "a+ b " with + for complete */
};

static void kit_holders_done(void *arg, int status, const struct model_holder *holders,
                             size_t count)
{
    struct kit_holders *all = arg;
    for (size_t i = 0; i < count; i++) {
        size_t used = strlen(all->names);
        snprintf(all->names + used, sizeof(all->names) - used, "%s%s ", holders[i].node.name,
                 holders[i].complete ? "+" : "");
    }
    catalog_sync_done(&all->sync, status, NULL);
}

/* Who holds it, seen from n: "a+ b ", or the error's name. Static. */
static KIT_UNUSED const char *do_holders(struct kit_node *n, const struct model_id *id)
{
    static struct kit_holders all;
    memset(&all, 0, sizeof(all));
    int rc = kit_wait(catalog_holders(n->catalog, id, kit_holders_done, &all), &all.sync);
    return rc < 0 ? strerrorname_np(-rc) : all.names;
}

/* ---- looking ---- */

static KIT_UNUSED bool sees(struct kit_node *n, const char *path)
{
    struct model_entry entry = {0};
    int rc = catalog_resolve(n->catalog, path, &entry);
    model_entry_clear(&entry);
    return rc == 0;
}

static KIT_UNUSED uint64_t id_at(struct kit_node *n, const char *path)
{
    struct model_entry entry = {0};
    int rc = catalog_resolve(n->catalog, path, &entry);
    uint64_t id = entry.id;
    model_entry_clear(&entry);
    return rc == 0 ? id : 0;
}

static KIT_UNUSED struct model_id version_at(struct kit_node *n, const char *path)
{
    struct model_entry entry = {0};
    if (catalog_resolve(n->catalog, path, &entry) < 0)
        fail_msg("%s is not seen yet", path);
    struct model_id id = entry.version;
    model_entry_clear(&entry);
    return id;
}

/* The names in a directory: "a b c ". Static. */
static KIT_UNUSED const char *names_in(struct kit_node *n, uint64_t dir)
{
    static char names[1024];
    struct catalog_list list;
    names[0] = '\0';
    int rc = catalog_list(n->catalog, dir, &list);
    if (rc < 0)
        return strerrorname_np(-rc);
    for (size_t i = 0; i < list.count; i++) {
        size_t used = strlen(names);
        snprintf(names + used, sizeof(names) - used, "%s ", list.entries[i].name);
    }
    catalog_list_free(&list);
    return names;
}

/* ---- other processes ---- */

/* What this program does when kit_spawn runs it again: a role returns the exit status. */
struct kit_role {
    const char *name;
    int (*run)(const char *argument);
};

static int kit_ready_fd = -1;

/* In a child: it is so far. */
static KIT_UNUSED void kit_ready(void)
{
    if (write(kit_ready_fd, "x", 1) != 1)
        _exit(3);
}

/* A process of its own (this program again, so that threads are no concern of fork), which has called kit_ready. */
static KIT_UNUSED pid_t kit_spawn(const char *role, const char *argument)
{
    int ready[2];
    char fd[16];
    char byte;
    char self[4096]; /* by its own name, which tells processes apart from those that reuse an id */
    ssize_t length = readlink("/proc/self/exe", self, sizeof(self) - 1);
    assert_in_range(length, 1, sizeof(self) - 2);
    self[length] = '\0';
    assert_int_equal(pipe(ready), 0);
    snprintf(fd, sizeof(fd), "%d", ready[1]);
    pid_t pid = fork();
    if (pid == 0) {
        close(ready[0]);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        execl(self, "test", role, argument, kit_dir, fd, (char *)NULL);
        _exit(4);
    }
    close(ready[1]);
    if (read(ready[0], &byte, 1) != 1)
        fail_msg("the process in the role %s did not come up", role);
    close(ready[0]);
    return pid;
}

static KIT_UNUSED int kit_reap(pid_t pid)
{
    int status = -1;
    waitpid(pid, &status, 0);
    return status;
}

/* At the beginning of main: plays the role when there is one, and returns otherwise. */
static KIT_UNUSED void kit_play(int argc, char **argv, const struct kit_role *roles)
{
    log_setup(LOG_ERROR, false);
    if (argc != 5)
        return;
    snprintf(kit_dir, sizeof(kit_dir), "%s", argv[3]);
    snprintf(kit_url, sizeof(kit_url), "local://%s", kit_dir);
    kit_ready_fd = atoi(argv[4]);
    for (; roles->name; roles++) {
        if (strcmp(roles->name, argv[1]) == 0)
            exit(roles->run(argv[2]));
    }
    exit(5);
}

/* ---- the service itself ---- */

static KIT_UNUSED struct meta_store *raw_open(void)
{
    struct meta_store *store;
    const char *error;
    struct meta_config config = {.url = kit_url};
    if (meta_open(&config, &store, &error) < 0)
        fail_msg("meta_open: %s", error);
    return store;
}

static KIT_UNUSED void raw_put(struct meta_store *store, const char *key, const char *value)
{
    struct meta_write write = {META_PUT, key, value, 0};
    struct meta_txn txn = {.writes = &write, .write_count = 1};
    assert_int_equal(store->ops->txn(store, &txn), 0);
}

static int raw_count_each(void *arg, const struct meta_event *event)
{
    (void)event;
    ++*(size_t *)arg;
    return 0;
}

/* How many keys the service has below a prefix, and its revision. */
static KIT_UNUSED size_t raw_count_at(const char *prefix, uint64_t *revision)
{
    struct meta_store *store = raw_open();
    size_t count = 0;
    assert_int_equal(store->ops->list(store, prefix, raw_count_each, &count, revision), 0);
    meta_close(store);
    return count;
}

static KIT_UNUSED size_t raw_count(const char *prefix)
{
    uint64_t revision;
    return raw_count_at(prefix, &revision);
}

#endif
