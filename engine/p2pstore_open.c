#include "engine/p2pstore_inside.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "engine/address.h"
#include "engine/digest.h"
#include "engine/extents.h"
#include "engine/handshake.h"
#include "engine/topology.h"
#include "meta/base/log.h"
#include "meta/base/util.h"
#include "meta/meta.h"
#include "p2pfs_config.h"

#define STORE_JOBS     8 /* catalog changes under way at once */
#define STORE_LEASE_MS 10000

const char *p2pstore_version(void)
{
    return P2PFS_VERSION;
}

/* ---- options ---- */

struct settings {
    char *url;
    char *node;
    char *listen;
    char *advertise;
    char *transport;
    char *device;
    char *nic_priority_matrix;
    char *credentials;
    char *secret_file;
    char *tcp_congestion;
    char *locality;
    char *log_level;
    enum model_digest digest;
    uint32_t read_timeout_s;
    uint32_t orphan_ttl_s;
    bool overwrite;
    bool require_rdma;
};

static void settings_clear(struct settings *s)
{
    free(s->url);
    free(s->node);
    free(s->listen);
    free(s->advertise);
    free(s->transport);
    free(s->device);
    free(s->nic_priority_matrix);
    free(s->credentials);
    free(s->secret_file);
    free(s->tcp_congestion);
    free(s->locality);
    free(s->log_level);
}

static int text_set(char **to, const char *value)
{
    char *copy = strdup(value);
    if (!copy) {
        return store_fail(-ENOMEM, "out of memory");
    }
    free(*to);
    *to = copy;
    return 0;
}

static int seconds_set(uint32_t *to, const char *value, uint32_t least)
{
    char *end = NULL;
    unsigned long seconds = strtoul(value, &end, 10);
    if (*value < '0' || *value > '9' || *end || seconds < least || seconds > 1000000000) {
        return -EINVAL;
    }
    *to = (uint32_t)seconds;
    return 0;
}

static int digest_set(enum model_digest *to, const char *value)
{
    const struct digest_ops *digest = digest_by_name(value);
    *to = digest ? digest->kind : MODEL_XXH3;
    return digest ? 0 : -EINVAL;
}

static int log_set(const char *value)
{
    enum log_level level;
    int status = log_level_parse(value, &level);
    if (status == 0) {
        log_setup(level, false);
    }
    return status;
}

/* "key=value" into its place. */
static int option_set(struct settings *s, const char *option)
{
    const char *equals = strchr(option, '=');
    const char *value = equals ? equals + 1 : "";
    size_t length = strcspn(option, "=");
    const struct {
        const char *key;
        char **text;
    } texts[] = {{"listen", &s->listen},
                 {"advertise", &s->advertise},
                 {"transport", &s->transport},
                 {"device", &s->device},
                 {"nic_priority_matrix", &s->nic_priority_matrix},
                 {"credentials", &s->credentials},
                 {"secret_file", &s->secret_file},
                 {"tcp_congestion", &s->tcp_congestion},
                 {"locality", &s->locality},
                 {"log_level", &s->log_level}};
    for (size_t i = 0; i < util_count(texts); i++) {
        if (strlen(texts[i].key) == length && strncmp(option, texts[i].key, length) == 0) {
            return *value ? text_set(texts[i].text, value)
                          : store_fail(-EINVAL, "%s: it needs a value", option);
        }
    }
    int status = -ENOENT;
    if (strcmp(option, "allow_overwrite") == 0) {
        s->overwrite = true;
        return 0;
    }
    if (strcmp(option, "require_rdma") == 0) {
        s->require_rdma = true;
        return 0;
    }
    if (strncmp(option, "digest=", 7) == 0) {
        status = digest_set(&s->digest, value);
    } else if (strncmp(option, "read_timeout=", 13) == 0) {
        status = seconds_set(&s->read_timeout_s, value, 1);
    } else if (strncmp(option, "orphan_ttl=", 11) == 0) {
        status = seconds_set(&s->orphan_ttl_s, value, 0);
    }
    if (status == -ENOENT) {
        return store_fail(-EINVAL, "%s: there is no such option; p2pstore.h lists them", option);
    }
    return status < 0
               ? store_fail(-EINVAL, "%s: not a value of this option; see p2pstore.h", option)
               : 0;
}

static enum engine_rdma rdma_wanted(const struct settings *s)
{
    const char *transport = s->transport ? s->transport : "auto";
    return s->require_rdma                  ? ENGINE_RDMA_ONLY
           : strcmp(transport, "rdma") == 0 ? ENGINE_RDMA_ON
           : strcmp(transport, "auto") == 0 ? ENGINE_RDMA_AUTO
                                            : ENGINE_RDMA_OFF;
}

/* What was said, on its own. */
static int settings_check(struct settings *s)
{
    if (s->node && model_node_check(s->node) < 0) {
        return store_fail(-EINVAL,
                          "node %s: write 1 to %d printable ASCII characters without '/', '%%' and "
                          "blanks",
                          s->node, MODEL_NODE_MAX);
    }
    if (s->listen && !address_valid(s->listen, false)) {
        return store_fail(-EINVAL, "listen=%s: write HOST:PORT, or HOST:0 for any port", s->listen);
    }
    if (s->advertise && !address_valid(s->advertise, true)) {
        return store_fail(-EINVAL, "advertise=%s: write HOST or HOST:PORT", s->advertise);
    }
    if (s->log_level && log_set(s->log_level) < 0) {
        return store_fail(-EINVAL, "log_level=%s: use error, warn, info or debug", s->log_level);
    }
    if (s->nic_priority_matrix) {
        char *matrix = NULL, why[TOPOLOGY_WHY_MAX] = "out of memory";
        int status = topology_matrix_load(s->nic_priority_matrix, &matrix, why);
        if (status < 0) {
            return store_fail(status, "nic_priority_matrix: %s", why);
        }
        free(s->nic_priority_matrix);
        s->nic_priority_matrix = matrix;
    }
    const char *transport = s->transport ? s->transport : "auto";
    if (strcmp(transport, "auto") != 0 && strcmp(transport, "tcp") != 0 &&
        strcmp(transport, "rdma") != 0) {
        return store_fail(-EINVAL, "transport=%s: use auto, tcp or rdma", transport);
    }
    if (s->require_rdma && strcmp(transport, "tcp") == 0) {
        return store_fail(-EINVAL, "transport=tcp and require_rdma exclude each other");
    }
    return 0;
}

static int settings_make(struct settings *s, const char *metadata, const char *node,
                         const char *const *options)
{
    *s = (struct settings){.digest = MODEL_XXH3, .read_timeout_s = 60, .orphan_ttl_s = 3600};
    if (!metadata || !*metadata) {
        return store_fail(-EINVAL, "no metadata service; give HOST:PORT of an etcd, or a URL");
    }
    log_setup(LOG_WARN, false);
    if (asprintf(&s->url, "%s%s", strstr(metadata, "://") ? "" : "etcd://", metadata) < 0) {
        s->url = NULL;
        return store_fail(-ENOMEM, "out of memory");
    }
    int status = node ? text_set(&s->node, node) : 0;
    for (; status == 0 && options && *options; options++) {
        status = option_set(s, *options);
    }
    if (status == 0) {
        status = settings_check(s);
    }
    const struct meta_ops *backend = meta_backend(s->url);
    bool local = backend && backend->single_machine &&
                 rdma_wanted(s) < ENGINE_RDMA_ON; /* no device is at 127.0.0.1 */
    if (status == 0) {
        status = address_of_node(&s->node, local, &s->listen, &s->advertise);
        status = status < 0 ? store_fail(status, "listen: %s", strerror(-status)) : 0;
    }
    return status;
}

/* ---- events of the catalog, for the engine while it lives ---- */

static void version_gone(void *arg, const struct model_id *version)
{
    struct p2pstore *store = arg;
    pthread_mutex_lock(&store->gate);
    if (store->events_to) {
        engine_version_gone(store->events_to, version);
    }
    pthread_mutex_unlock(&store->gate);
}

static void version_sealed(void *arg, const struct model_id *version)
{
    struct p2pstore *store = arg;
    pthread_mutex_lock(&store->gate);
    if (store->events_to) {
        engine_version_sealed(store->events_to, version);
    }
    pthread_mutex_unlock(&store->gate);
}

static void gate_set(struct p2pstore *store, struct engine *engine)
{
    pthread_mutex_lock(&store->gate);
    store->events_to = engine;
    pthread_mutex_unlock(&store->gate);
}

/* ---- the steps ---- */

static struct p2pstore *store_new(const struct settings *s)
{
    struct p2pstore *store = calloc(1, sizeof *store);
    if (!store) {
        return NULL;
    }
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&store->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&store->lock, NULL);
    pthread_mutex_init(&store->gate, NULL);
    atomic_init(&store->references, 1);
    store->pid = getpid();
    store->overwrite = s->overwrite;
    store->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    store->node = strdup(s->node);
    if (store->event_fd < 0 || !store->node) {
        store_put(store);
        return NULL;
    }
    return store;
}

static int secret_open(struct p2pstore *store, const struct settings *s)
{
    int status = s->secret_file ? handshake_secret_read(s->secret_file, &store->secret) : 0;
    switch (status) {
    case 0:
        return 0;
    case -EPERM:
        return store_fail(-EACCES, "secret_file=%s: others may read it; chmod 600 it",
                          s->secret_file);
    case -EINVAL:
        return store_fail(status, "secret_file=%s: a secret is 16 to %d bytes", s->secret_file,
                          HANDSHAKE_SECRET_MAX);
    default:
        return store_fail(status, "secret_file=%s: %s", s->secret_file, strerror(-status));
    }
}

static int node_open(struct p2pstore *store, const struct settings *s)
{
    uint64_t boot = util_random_u64();
    char *why = NULL;
    struct catalog_config catalog = {
        .url = s->url,
        .credentials_file = s->credentials,
        .self = {.boot = boot, .pid = getpid()},
        .lease_ms = STORE_LEASE_MS,
        .orphan_ttl_s = s->orphan_ttl_s,
        .events = {.arg = store, .version_gone = version_gone, .version_sealed = version_sealed}};
    snprintf(catalog.self.name, sizeof catalog.self.name, "%s", s->node);
    snprintf(catalog.self.locality, sizeof catalog.self.locality, "%s",
             s->locality ? s->locality : "");
    address_host(catalog.self.host);
    int status = catalog_open(&catalog, &store->catalog, &why);
    if (status < 0) {
        return store_fail_why(status, s->url, why);
    }
    struct engine_config engine = {.catalog = store->catalog,
                                   .node = s->node,
                                   .boot = boot,
                                   .listen = s->listen,
                                   .transport = "tcp",
                                   .rdma = rdma_wanted(s),
                                   .rdma_devices = s->device,
                                   .rdma_matrix = s->nic_priority_matrix,
                                   .congestion = s->tcp_congestion,
                                   .digest = s->digest,
                                   .fetch_whole = true,
                                   .read_timeout_ms = s->read_timeout_s * 1000u,
                                   .secret = &store->secret};
    status = engine_open(&engine, &store->engine, &why);
    if (status < 0) {
        (void)store_fail_why(status, s->listen, why);
        goto close_catalog;
    }
    gate_set(store, store->engine);
    char address[MODEL_ADDRESS_MAX + 1];
    char rdma[MODEL_ADDRESS_MAX + 1] = "";
    status = address_advertised(s->advertise, engine_address(store->engine), address);
    if (status == 0 && engine_rdma_address(store->engine)[0]) {
        status = address_advertised(s->advertise, engine_rdma_address(store->engine), rdma);
    }
    catalog_rdma_set(store->catalog, rdma);
    if (status == 0) {
        status = catalog_serve(store->catalog, address, &why);
    }
    if (status < 0) {
        (void)store_fail_why(status, s->node, why);
        goto close_engine;
    }
    return 0;

close_engine:
    gate_set(store, NULL);
    engine_close(store->engine);
close_catalog:
    catalog_close(store->catalog);
    return status;
}

static void node_close(struct p2pstore *store)
{
    gate_set(store, NULL);
    engine_close(store->engine);
    catalog_close(store->catalog);
}

static int store_open(const struct settings *s, struct p2pstore **out)
{
    struct p2pstore *store = store_new(s);
    if (!store) {
        return store_fail(-ENOMEM, "out of memory");
    }
    int status = secret_open(store, s);
    if (status < 0) {
        goto put_store;
    }
    status = work_open(STORE_JOBS, &store->jobs);
    if (status < 0) {
        goto put_store;
    }
    status = work_open(1, &store->callbacks);
    if (status < 0) {
        goto close_jobs;
    }
    status = node_open(store, s);
    if (status < 0) {
        goto close_callbacks;
    }
    *out = store;
    return 0;

close_callbacks:
    work_close(store->callbacks);
close_jobs:
    work_close(store->jobs);
put_store:
    store_put(store);
    return status;
}

/* The program's signals are not for threads that it does not know, and what the metadata's libraries send into a closed
 * socket must not end it: while we make threads, and talk to the service ourselves, nothing is delivered here. */
static void signals_hold(sigset_t *before)
{
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, before);
}

static void signals_release(const sigset_t *before)
{
    sigset_t pipe;
    sigemptyset(&pipe);
    sigaddset(&pipe, SIGPIPE);
    if (!sigismember(before, SIGPIPE)) {
        while (sigtimedwait(&pipe, NULL, &(struct timespec){0}) == SIGPIPE) {
        }
    }
    pthread_sigmask(SIG_SETMASK, before, NULL);
}

int p2pstore_open(const char *metadata, const char *node, const char *const *options,
                  struct p2pstore **store)
{
    struct settings settings;
    sigset_t before;
    if (!store) {
        return store_fail(-EINVAL, "there is no place for the store");
    }
    *store = NULL;
    int status = settings_make(&settings, metadata, node, options);
    if (status == 0) {
        signals_hold(&before);
        status = store_open(&settings, store);
        signals_release(&before);
    }
    settings_clear(&settings);
    return status;
}

int p2pstore_close(struct p2pstore *store)
{
    sigset_t before;
    if (!store) {
        return 0;
    }
    if (store_in_callback(store)) {
        return store_fail(-EDEADLK, "a callback cannot close the store, which waits for callbacks");
    }
    int status = store_enter(store);
    if (status < 0) {
        return status;
    }
    pthread_mutex_lock(&store->lock);
    store->closing = true;
    store->inside--;
    pthread_mutex_unlock(&store->lock);
    store_requests_end(store);
    signals_hold(&before);
    work_close(store->jobs);
    node_close(store);
    work_close(store->callbacks);
    signals_release(&before);
    struct store_hold *hold = store->holds; /* names that could not be unlinked */
    HASH_CLEAR(hh, store->holds);
    while (hold) {
        struct store_hold *next = hold->hh.next;
        extents_free(hold->extents);
        free(hold->name);
        free(hold);
        hold = next;
    }
    store_put(store);
    return 0;
}
