#include "engine/p2pstore_inside.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "meta/base/util.h"

/* One entry and what it points to. */
struct item {
    struct p2pstore_entry entry;
    struct model_version version; /* owned; entry points into it */
    char name[];
};

struct p2pstore_list {
    struct item **items;
    size_t count;
    size_t room;
};

void p2pstore_list_free(struct p2pstore_list *list)
{
    for (size_t i = 0; list && i < list->count; i++) {
        model_version_clear(&list->items[i]->version);
        free(list->items[i]);
    }
    if (list) {
        free(list->items);
    }
    free(list);
}

size_t p2pstore_list_count(const struct p2pstore_list *list)
{
    return list->count;
}

const struct p2pstore_entry *p2pstore_list_entry(const struct p2pstore_list *list, size_t index)
{
    return index < list->count ? &list->items[index]->entry : NULL;
}

/* ---- who holds what ---- */

struct tally {
    struct model_id version;
    uint32_t holders;
    uint32_t complete;
    UT_hash_handle hh;
};

/* The catalog's answer may come after we have stopped waiting: whoever is last frees. */
struct census {
    pthread_mutex_t lock;
    pthread_cond_t over;
    unsigned references;
    bool done;
    int status;
    struct tally *tallies;
};

static struct census *census_new(void)
{
    struct census *census = calloc(1, sizeof *census);
    if (census) {
        pthread_condattr_t monotonic;
        pthread_condattr_init(&monotonic);
        pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
        pthread_cond_init(&census->over, &monotonic);
        pthread_condattr_destroy(&monotonic);
        pthread_mutex_init(&census->lock, NULL);
        census->references = 2;
    }
    return census;
}

static void census_put(struct census *census)
{
    pthread_mutex_lock(&census->lock);
    bool last = --census->references == 0;
    pthread_mutex_unlock(&census->lock);
    if (!last) {
        return;
    }
    struct tally *tally = census->tallies;
    HASH_CLEAR(hh, census->tallies);
    while (tally) {
        struct tally *next = tally->hh.next;
        free(tally);
        tally = next;
    }
    pthread_mutex_destroy(&census->lock);
    pthread_cond_destroy(&census->over);
    free(census);
}

static void census_each(void *arg, const struct model_id *version, uint32_t holders,
                        uint32_t complete)
{
    struct census *census = arg;
    struct tally *tally = calloc(1, sizeof *tally);
    if (tally) {
        tally->version = *version;
        tally->holders = holders;
        tally->complete = complete;
        HASH_ADD(hh, census->tallies, version, sizeof tally->version, tally);
    } else {
        census->status = -ENOMEM;
    }
}

static void census_done(void *arg, int status, const struct model_entry *entry)
{
    struct census *census = arg;
    (void)entry;
    pthread_mutex_lock(&census->lock);
    census->done = true;
    census->status = status < 0 ? status : census->status;
    pthread_cond_signal(&census->over);
    pthread_mutex_unlock(&census->lock);
    census_put(census);
}

/* Whether it has an answer within the time. */
static bool census_wait(struct census *census, int64_t timeout_ms)
{
    struct timespec end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    int64_t limit = timeout_ms < 0 || timeout_ms > 2 * CATALOG_DEADLINE_MS ? 2 * CATALOG_DEADLINE_MS
                                                                           : timeout_ms;
    end.tv_sec += limit / 1000;
    end.tv_nsec += limit % 1000 * 1000000;
    end.tv_sec += end.tv_nsec / 1000000000;
    end.tv_nsec %= 1000000000;
    int waited = 0;
    pthread_mutex_lock(&census->lock);
    while (!census->done && waited == 0) {
        waited = pthread_cond_timedwait(&census->over, &census->lock, &end);
    }
    bool good = census->done && census->status == 0;
    pthread_mutex_unlock(&census->lock);
    return good;
}

/* ---- names ---- */

static int list_add(struct p2pstore *store, struct p2pstore_list *list, const char *name,
                    const struct model_id *version)
{
    if (list->count == list->room) {
        size_t room = list->room ? 2 * list->room : 64;
        struct item **grown = reallocarray(list->items, room, sizeof(struct item *));
        if (!grown) {
            return -ENOMEM;
        }
        list->items = grown;
        list->room = room;
    }
    struct item *item = calloc(1, sizeof *item + strlen(name) + 1);
    if (!item) {
        return -ENOMEM;
    }
    int status = catalog_version(store->catalog, version, &item->version);
    if (status < 0) {
        free(item);
        return status == -ENOENT ? 0 : status; /* removed meanwhile */
    }
    memcpy(item->name, name, strlen(name) + 1);
    struct p2pstore_entry *entry = &item->entry;
    entry->name = item->name;
    entry->max_shard_size = item->version.shard_size;
    entry->total_size = item->version.size;
    entry->sizes = item->version.pieces ? item->version.pieces : &item->version.size;
    entry->size_count = item->version.pieces ? item->version.piece_count : 1;
    entry->origin = item->version.origin_node;
    list->items[list->count++] = item;
    return 0;
}

/* The files below a directory whose path has `length` bytes in `path`, with the slash; names that do not begin with the
 * prefix are passed by. */
/* NOLINTNEXTLINE(misc-no-recursion): as deep as a name has components */
static int list_dir(struct p2pstore *store, struct p2pstore_list *list, uint64_t dir, char *path,
                    size_t length, const char *prefix)
{
    struct catalog_list children;
    int status = catalog_list(store->catalog, dir, &children);
    if (status < 0) {
        return status == -ENOENT ? 0 : status;
    }
    for (size_t i = 0; i < children.count && status == 0; i++) {
        const struct model_entry *child = &children.entries[i];
        size_t more = strlen(child->name);
        if (length + more > MODEL_PATH_MAX) {
            continue;
        }
        memcpy(path + length, child->name, more + 1);
        size_t both = strlen(prefix) < length + more ? strlen(prefix) : length + more;
        if (strncmp(path, prefix, both) != 0) {
            continue;
        }
        if (child->kind == MODEL_FILE && both == strlen(prefix)) {
            status = list_add(store, list, path, &child->version);
        } else if (child->kind == MODEL_DIR && length + more < MODEL_PATH_MAX) {
            path[length + more] = '/';
            path[length + more + 1] = '\0';
            status = list_dir(store, list, child->id, path, length + more + 1, prefix);
        }
    }
    catalog_list_free(&children);
    return status;
}

static int by_name(const void *a, const void *b)
{
    const struct item *const *left = a;
    const struct item *const *right = b;
    return strcmp((*left)->name, (*right)->name);
}

/* ---- both ---- */

static enum p2pstore_state state_of(struct p2pstore *store, const struct item *item)
{
    struct store_hold *hold = store_hold_find(store, item->name);
    if (hold && hold->lent && model_id_equal(&hold->version, &item->version.id)) {
        return hold->state == HOLD_REGISTERED ? P2PSTORE_REGISTERED
               : hold->state == HOLD_PULLED   ? P2PSTORE_REPLICA
               : hold->pulled                 ? P2PSTORE_PULLING
                                              : P2PSTORE_REGISTERED;
    }
    return item->entry.holders < 0    ? P2PSTORE_UNKNOWN
           : item->entry.complete > 0 ? P2PSTORE_AVAILABLE
           : item->entry.holders > 0  ? P2PSTORE_PARTIAL
                                      : P2PSTORE_OFFLINE;
}

static void list_finish(struct p2pstore *store, struct p2pstore_list *list,
                        struct census *census /* NULL: not known */)
{
    for (size_t i = 0; i < list->count; i++) {
        struct item *item = list->items[i];
        struct tally *tally = NULL;
        if (census) {
            HASH_FIND(hh, census->tallies, &item->version.id, sizeof item->version.id, tally);
        }
        item->entry.holders = census ? 0 : -1;
        item->entry.complete = item->entry.holders;
        if (tally) {
            item->entry.holders = tally->holders;
            item->entry.complete = tally->complete;
        }
    }
    pthread_mutex_lock(&store->lock);
    for (size_t i = 0; i < list->count; i++) {
        list->items[i]->entry.state = state_of(store, list->items[i]);
    }
    pthread_mutex_unlock(&store->lock);
}

static int list_make(struct p2pstore *store, const char *prefix, int64_t timeout_ms,
                     struct p2pstore_list *list)
{
    char path[MODEL_PATH_MAX + 2];
    struct census *census = census_new();
    if (!census) {
        return -ENOMEM;
    }
    int status = catalog_census(store->catalog, census_each, census_done, census);
    if (status < 0) {
        census->references = 1; /* no answer will come */
    }
    int listed = list_dir(store, list, MODEL_ROOT, path, 0, prefix);
    if (listed == 0 && list->count) {
        qsort(list->items, list->count, sizeof(struct item *), by_name);
    }
    bool known = status == 0 && listed == 0 && census_wait(census, timeout_ms);
    list_finish(store, list, known ? census : NULL);
    census_put(census);
    return listed;
}

int p2pstore_list(struct p2pstore *store, const char *prefix, int64_t timeout_ms,
                  struct p2pstore_list **list)
{
    if (!list) {
        return store_fail(-EINVAL, "there is no place for the list");
    }
    *list = NULL;
    int status = store_enter(store);
    if (status < 0) {
        return status;
    }
    struct p2pstore_list *made = calloc(1, sizeof *made);
    status = made ? list_make(store, prefix ? prefix : "", timeout_ms, made) : -ENOMEM;
    store_leave(store);
    if (status < 0) {
        p2pstore_list_free(made);
        return store_fail(status, "listing: %s", strerror(-status));
    }
    *list = made;
    return 0;
}
