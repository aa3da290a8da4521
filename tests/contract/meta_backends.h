/* Meta_backends: the backends of the contract suite, and the real servers behind them. */
#ifndef P2PFS_TESTS_CONTRACT_META_BACKENDS_H
#define P2PFS_TESTS_CONTRACT_META_BACKENDS_H

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

#include "meta/http.h"
#include "meta/meta.h"
#include "tests/contract/service.h"

/* A backend under test: start makes its server ready (NULL, or why not; end undoes it), setup gives the URL of an empty
 * service. */
struct backend {
    const char *name;
    const char *(*start)(void);
    void (*end)(void);
    int (*restart)(void); /* the service, with what it has on its disk; NULL: there is none */
    int (*forget)(uint64_t revision); /* changes up to there; NULL: not from outside */
    int lease_grain_ms;               /* by how much leases are rounded up */
    int (*setup)(char url[META_URL_MAX]);
    void (*teardown)(const char *url);
};
static const struct backend *backend; /* of the run */

static int local_setup(char out[META_URL_MAX])
{
    char dir[] = "/tmp/p2pfs-test-meta-XXXXXX";
    if (!mkdtemp(dir))
        return -1;
    snprintf(out, META_URL_MAX, "local://%s", dir);
    return 0;
}

static void local_teardown(const char *store_url)
{
    char command[META_URL_MAX + 16];
    snprintf(command, sizeof(command), "rm -rf '%s'", store_url + strlen("local://"));
    if (system(command) != 0)
        print_message("%s failed\n", command);
}

static struct service service;

static void service_kill(void)
{
    kill(service.pid, SIGKILL);
    waitpid(service.pid, NULL, 0);
}

static void service_stop(void)
{
    service_end(&service);
}

static const char *redis_like_start(const char *program)
{
    static char why[64];
    snprintf(why, sizeof(why), "%s is not installed", program);
    if (!service_installed(program))
        return why;
    snprintf(why, sizeof(why), "%s does not start", program);
    return service_place(&service) == 0 && service_start_redis(&service, program) == 0 ? NULL : why;
}

static const char *redis_start(void)
{
    return redis_like_start("redis-server");
}

static const char *valkey_start(void)
{
    return redis_like_start("valkey-server");
}

static int redis_restart(void)
{
    service_kill();
    return service_start_redis(&service,
                               backend->name[0] == 'r' ? "redis-server" : "valkey-server");
}

static int redis_setup(char out[META_URL_MAX])
{
    static int count;
    snprintf(out, META_URL_MAX, "redis://127.0.0.1:%d/3?prefix=test-%d", service.port, ++count);
    return 0;
}

static void service_teardown(const char *store_url)
{
}

static const char *etcd_start(void)
{
    if (!service_installed("etcd"))
        return "etcd is not installed";
    return service_place(&service) == 0 && service_start_etcd(&service) == 0
               ? NULL
               : "etcd does not start";
}

static int etcd_restart(void)
{
    service_kill();
    return service_start_etcd(&service);
}

static int etcd_setup(char out[META_URL_MAX])
{
    static int count;
    snprintf(out, META_URL_MAX, "etcd://127.0.0.1:%d/test-%d", service.port, ++count);
    return 0;
}

static int etcd_forget(uint64_t revision)
{
    char target[128], body[64];
    struct http *http;
    struct http_reply reply = {0};
    bool sent;
    snprintf(target, sizeof(target), "http://127.0.0.1:%d/v3/kv/compaction", service.port);
    snprintf(body, sizeof(body), "{\"revision\":\"%" PRIu64 "\",\"physical\":true}", revision);
    int rc = http_open(NULL, NULL, NULL, &http);
    if (rc == 0) {
        rc = http_post(http, target, NULL, body, 5000, &reply, &sent);
        free(reply.body);
        http_close(http);
    }
    return rc == 0 && reply.status != 200 ? -EBADMSG : rc;
}

static const char *http_start(void)
{
    return service_place(&service) == 0 && service_start_http(&service, NULL) == 0
               ? NULL
               : "scripts/metadata-server does not start";
}

static int http_restart(void)
{
    service_kill();
    return service_start_http(&service, NULL);
}

static int http_setup(char out[META_URL_MAX])
{
    static int count;
    snprintf(out, META_URL_MAX, "http://127.0.0.1:%d/metadata?prefix=test-%d", service.port,
             ++count);
    return 0;
}

static const struct backend backends[] = {
    {.name = "local", .setup = local_setup, .teardown = local_teardown},
    {.name = "redis",
     .start = redis_start,
     .end = service_stop,
     .restart = redis_restart,
     .setup = redis_setup,
     .teardown = service_teardown},
    {.name = "valkey",
     .start = valkey_start,
     .end = service_stop,
     .restart = redis_restart,
     .setup = redis_setup,
     .teardown = service_teardown},
    {.name = "etcd",
     .start = etcd_start,
     .end = service_stop,
     .lease_grain_ms = 1000,
     .restart = etcd_restart,
     .forget = etcd_forget,
     .setup = etcd_setup,
     .teardown = service_teardown},
    {.name = "http",
     .start = http_start,
     .end = service_stop,
     .restart = http_restart,
     .setup = http_setup,
     .teardown = service_teardown},
};

#endif
