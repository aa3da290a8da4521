#include "meta/meta.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define META_KEY_MAX 300

/* The i-th backend of the table at the end, NULL behind the last. */
static const struct meta_ops *meta_backend_at(size_t i);

static _Thread_local char meta_error[1024];

void meta_open_error(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(meta_error, sizeof(meta_error), format, arguments);
    va_end(arguments);
}

/* The length of "scheme" in "scheme://...", 0 when there is none. */
static size_t meta_scheme_length(const char *url)
{
    const char *end = strstr(url, "://");
    return end ? (size_t)(end - url) : 0;
}

const struct meta_ops *meta_backend(const char *url)
{
    size_t length = meta_scheme_length(url);
    const struct meta_ops *ops;
    for (size_t i = 0; length > 0 && (ops = meta_backend_at(i)); i++) {
        for (const char *const *scheme = ops->schemes; *scheme; scheme++) {
            if (strlen(*scheme) == length && strncmp(url, *scheme, length) == 0)
                return ops;
        }
    }
    return NULL;
}

/* Only the scheme is shown: the rest may hold a password that somebody put there by mistake. */
static void meta_open_unknown(const char *url)
{
    char known[256] = "";
    size_t used = 0;
    const struct meta_ops *ops;
    for (size_t i = 0; (ops = meta_backend_at(i)); i++) {
        for (const char *const *scheme = ops->schemes; *scheme; scheme++) {
            if (used < sizeof(known))
                used += (size_t)snprintf(known + used, sizeof(known) - used, "%s%s://",
                                         used ? ", " : "", *scheme);
        }
    }
    size_t length = meta_scheme_length(url);
    if (length > 0)
        meta_open_error("no metadata service is called \"%.*s://\"; known: %s",
                        length > 32 ? 32 : (int)length, url, known);
    else
        meta_open_error("the metadata URL has no scheme; give one like local:///var/lib/p2pfs "
                        "(known: %s)",
                        known);
}

int meta_open(const struct meta_config *config, struct meta_store **store, const char **error)
{
    *store = NULL;
    *error = NULL;
    meta_error[0] = '\0';
    int rc = -EINVAL;
    const struct meta_ops *ops = meta_backend(config->url);
    if (strlen(config->url) > META_URL_MAX)
        meta_open_error("the metadata URL is longer than %d bytes", META_URL_MAX);
    else if (!ops)
        meta_open_unknown(config->url);
    else
        rc = ops->open(config, store);
    if (rc < 0) {
        if (!meta_error[0])
            meta_open_error("cannot open the metadata service: %s", strerror(-rc));
        *error = meta_error;
    }
    return rc;
}

void meta_close(struct meta_store *store)
{
    if (store)
        store->ops->close(store);
}

/* The token is the revision of the transaction that took the lock: it grows with every holder, and a
 * release that comes late can't release a successor's lock. */
int meta_lock(struct meta_store *store, const char *name, uint64_t lease, uint64_t *token)
{
    char key[META_KEY_MAX];
    if (snprintf(key, sizeof(key), "l/%s", name) >= (int)sizeof(key))
        return -ENAMETOOLONG;
    struct meta_compare compare = {.condition = META_ABSENT, .key = key};
    struct meta_write write = {
        .action = META_PUT, .key = key, .value = "{\"v\":1}", .lease = lease};
    struct meta_txn txn = {
        .compares = &compare, .compare_count = 1, .writes = &write, .write_count = 1};
    int rc = store->ops->txn(store, &txn);
    if (rc == 0)
        *token = txn.revision;
    return rc;
}

int meta_unlock(struct meta_store *store, const char *name, uint64_t token)
{
    char key[META_KEY_MAX];
    if (snprintf(key, sizeof(key), "l/%s", name) >= (int)sizeof(key))
        return -ENAMETOOLONG;
    struct meta_compare compare = {.condition = META_REVISION, .key = key, .revision = token};
    struct meta_write write = {.action = META_DELETE, .key = key};
    struct meta_txn txn = {
        .compares = &compare, .compare_count = 1, .writes = &write, .write_count = 1};
    int rc = store->ops->txn(store, &txn);
    return rc == -EAGAIN ? -ENOENT : rc;
}

static const struct meta_ops *const meta_backends[] = {
    &meta_local_ops,
    &meta_redis_ops,
    &meta_etcd_ops,
    &meta_http_ops,
};

static const struct meta_ops *meta_backend_at(size_t i)
{
    return i < sizeof(meta_backends) / sizeof(meta_backends[0]) ? meta_backends[i] : NULL;
}
