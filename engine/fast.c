#include "engine/fast.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/lane.h"
#include "engine/topology.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

static struct transport *next_fast(void *arg)
{
    struct lane *first = arg;
    static _Thread_local unsigned turn;
    struct engine *engine = first->engine;
    return engine->lanes[turn++ % engine->lane_count]->fast;
}

static int lane_fast_open(struct lane *lane)
{
    struct engine *engine = lane->engine;
    const struct transport_ops *fast = engine->fast;
    struct transport_config config = {.upload = &engine->upload,
                                      .download = &engine->download,
                                      .rails = engine->rails,
                                      .rail_count = engine->rail_count};
    int status = fast->open(lane->loop, &config, &lane_events, lane, &lane->fast);
    if (status < 0 || lane->index > 0) {
        return status;
    }
    /* RDMA's ports are not TCP's, so the same number is as good as any. */
    char address[TRANSPORT_NAME_MAX + 1];
    const char *host = engine->rail_count > 0 ? engine->rails[0].address : engine->address;
    snprintf(address, sizeof address, "%.*s%s", (int)(strrchr(host, ':') - host), host,
             strrchr(engine->address, ':'));
    status = fast->listen(lane->fast, address, engine->fast_address);
    if (status < 0) {
        fast->close(lane->fast);
        lane->fast = NULL;
        return status;
    }
    fast->share(lane->fast, next_fast, lane);
    return 0;
}

static int rails_choose(struct engine *engine)
{
    const struct engine_config *config = &engine->config;
    struct topology_wish wish = {.devices = config->rdma_devices,
                                 .matrix = config->rdma_matrix,
                                 .gid_index = (int)config->rdma_gid - 1,
                                 .port = config->rdma_port};
    return topology_rails(engine->address, &wish, engine->rails, &engine->rail_count,
                          engine->fast_why);
}

static bool loopback(const struct engine *engine)
{
    return strncmp(engine->address, "127.", 4) == 0 || strncmp(engine->address, "[::1]", 5) == 0;
}

static const char *fast_reason(const struct engine *engine, int status)
{
    return !transport_by_name("rdma") ? "this build has no libibverbs"
           : status == -ENODEV
               ? "no RDMA device here, or /dev/infiniband/rdma_cm is missing (modprobe rdma_ucm)"
           : status == -EADDRNOTAVAIL ? "no RDMA device has the address that listen= names"
           : status == -EACCES || status == -EPERM
               ? "no access to /dev/infiniband (give the process the device files)"
           : loopback(engine) ? "peers are on this machine only; listen= names another address"
                              : strerror(-status);
}

/* RDMA beside the transport on all lanes, or on none. */
int fast_open(struct engine *engine, char **error)
{
    enum engine_rdma wanted = engine->config.rdma;
    if (wanted == ENGINE_RDMA_OFF) {
        snprintf(engine->fast_why, sizeof engine->fast_why, "not asked for");
        return 0;
    }
    engine->fast = loopback(engine) ? NULL : transport_by_name("rdma");
    int status = engine->fast ? rails_choose(engine) : -EOPNOTSUPP;
    for (unsigned i = 0; status == 0 && i < engine->lane_count; i++) {
        status = lane_fast_open(engine->lanes[i]);
    }
    if (status == 0) {
        return 0;
    }
    for (unsigned i = 0; i < engine->lane_count; i++) {
        struct transport *fast = engine->lanes[i]->fast;
        if (fast) {
            fast->ops->close(fast);
        }
        engine->lanes[i]->fast = NULL;
    }
    engine->fast = NULL;
    bool named =
        engine->config.rdma_devices || engine->config.rdma_matrix || engine->config.rdma_gid > 0;
    if (!engine->fast_why[0]) {
        snprintf(engine->fast_why, sizeof engine->fast_why, "%s", fast_reason(engine, status));
    }
    if (wanted == ENGINE_RDMA_AUTO) {
        log_say(named ? LOG_WARN : LOG_DEBUG, "RDMA is not used: %s", engine->fast_why);
        return 0;
    }
    if (asprintf(error, "%s: %s; p2pfs doctor tells more",
                 wanted == ENGINE_RDMA_ONLY ? "require_rdma" : "transport=rdma",
                 engine->fast_why) < 0) {
        *error = NULL;
    }
    return status;
}

bool fast_may(const struct engine *engine, const struct peer *peer, const struct model_node *node)
{
    return node->rdma[0] && (engine->config.rdma == ENGINE_RDMA_ONLY ||
                             util_now_ns() >= atomic_load(&peer->rdma_after_ns));
}

bool fast_at_fault(int error, bool shards_came)
{
    switch (error) {
    case -ECONNRESET:
        return !shards_came;
    case -EIO:
    case -EPROTO:
    case -EACCES:
    case -ESTALE:
    case -ECONNABORTED:
    case -ESHUTDOWN:
        return false;
    default:
        return true;
    }
}
