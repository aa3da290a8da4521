#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/storage.h"
#include "engine/topology.h"
#include "fs/control_parts.h"
#include "fs/through.h"
#include "meta/base/util.h"
#include "p2pfs_config.h"

/* ---- status ---- */

/* How many live nodes there are besides this one. */
uint64_t control_peers_live(const struct house *house)
{
    struct model_node *nodes = NULL;
    size_t count = 0;
    uint64_t live = 0;
    if (catalog_nodes(house->catalog, &nodes, &count) < 0)
        return 0;
    for (size_t i = 0; i < count; i++)
        live += strcmp(nodes[i].name, house->options.node) != 0;
    free(nodes);
    return live;
}

static void status_node(const struct house *house, struct json_out *out)
{
    struct model_node self = {.boot = 0};
    catalog_node(house->catalog, house->options.node, &self);
    json_put_text(out, "version", P2PFS_VERSION);
    json_put_text(out, "node", house->options.node);
    json_put_format(out, "boot", "%016llx", (unsigned long long)self.boot);
    json_put_text(out, "address", self.address);
    json_put_text(out, "listen", engine_address(house->engine));
    json_put_text(out, "locality", house->options.locality ? house->options.locality : "");
    json_put_name(out, "mountpoint", house->mountpoint ? house->mountpoint : "");
    json_put_u64(out, "pid", (uint64_t)getpid());
    json_put_u64(out, "uptime_s", (util_now_ms() - house->started_ms) / 1000);
}

static void status_meta(const struct house *house, struct json_out *out)
{
    uint64_t since_ms = 0;
    bool online = catalog_online(house->catalog, &since_ms);
    struct catalog_totals totals = {0};
    catalog_totals(house->catalog, &totals);
    json_put_name(out, "meta", house->options.meta ? house->options.meta : "");
    json_put_text(out, "backend", catalog_backend(house->catalog));
    json_put_bool(out, "online", online);
    if (!online)
        json_put_u64(out, "offline_s", (util_now_ms() - since_ms) / 1000);
    json_put_u64(out, "files", totals.files);
    json_put_u64(out, "dirs", totals.dirs);
    json_put_u64(out, "symlinks", totals.symlinks);
    json_put_u64(out, "bytes", totals.bytes);
    json_put_u64(out, "peers_live", control_peers_live(house));
}

static void status_engine(const struct house *house, struct json_out *out)
{
    struct engine_stats stats;
    engine_stats(house->engine, &stats);
    json_put_u64(out, "cache_used", stats.cache_used);
    json_put_u64(out, "cache_limit", stats.cache_limit);
    json_put_text(out, "seed", house->options.seed == OPTIONS_SEED_IDLE ? "idle" : "normal");
    json_put_u64(out, "max_upload", stats.max_upload);
    json_put_u64(out, "max_download", stats.max_download);
    json_put_u64(out, "replicas", stats.replicas);
    json_put_u64(out, "replicas_complete", stats.replicas_complete);
    json_put_u64(out, "pulls_running", stats.pulls_running);
    json_put_u64(out, "readers_waiting", stats.readers_waiting);
    json_put_u64(out, "bytes_received", stats.bytes_received);
    json_put_u64(out, "bytes_served", stats.bytes_served);
    json_put_text(out, "storage", stats.storage);
    json_put_text(out, "storage_why", stats.storage_why ? stats.storage_why : "");
    if (stats.storage_node >= 0)
        json_put_u64(out, "storage_node", (uint64_t)stats.storage_node);
    json_put_u64(out, "reserve", stats.reserve);
    json_put_text(out, "loop", stats.loop);
    json_put_u64(out, "lanes", stats.lanes);
    json_array(out, "transports");
    if (stats.rdma_why[0] == '\0')
        json_put_text(out, NULL, "rdma");
    if (!house->options.require_rdma)
        json_put_text(out, NULL, "tcp");
    json_end(out);
    json_put_text(out, "rdma_address", engine_rdma_address(house->engine));
    json_put_text(out, "rdma_why", stats.rdma_why);
    json_put_u64(out, "bytes_rdma", stats.bytes_rdma);
    json_put_u64(out, "rdma_failures", stats.rdma_failures);
    json_array(out, "adapters");
    struct transport_adapter adapters[TOPOLOGY_RAILS_MAX];
    size_t count = engine_adapters(house->engine, adapters, util_count(adapters));
    for (size_t i = 0; i < count; i++) {
        json_object(out, NULL);
        json_put_text(out, "device", adapters[i].device);
        json_put_u64(out, "connections", adapters[i].rails);
        json_put_u64(out, "bytes_received", adapters[i].received);
        json_put_u64(out, "failures", adapters[i].failures);
        json_end(out);
    }
    json_end(out);
    json_put_text(out, "fetch", house->options.fetch == OPTIONS_FETCH_WHOLE ? "whole" : "demand");
    struct through_status through;
    through_status(house->through, &through);
    json_put_text(out, "io_path", through.enabled ? "passthrough" : "buffered");
    json_put_text(out, "io_path_why", through.why);
    json_put_u64(out, "passthrough_opens", through.opens);
    json_put_u64(out, "passthrough_creates", through.creates);
}

void control_status_put(struct control *control, struct json_out *out, bool huge)
{
    status_node(control->house, out);
    status_meta(control->house, out);
    status_engine(control->house, out);
    if (huge)
        json_put_u64(out, "storage_huge_pages", storage_huge() / STORAGE_HUGE);
}

/* ---- peers ---- */

static const struct engine_peer *known_find(const struct engine_peer *known, size_t count,
                                            const char *node)
{
    for (size_t i = 0; i < count; i++)
        if (strcmp(known[i].node, node) == 0)
            return &known[i];
    return NULL;
}

static void peer_put(struct json_out *out, const struct model_node *node,
                     const struct engine_peer *peer)
{
    json_object(out, NULL);
    json_put_text(out, "node", node ? node->name : peer->node);
    json_put_text(out, "address", node ? node->address : peer->address);
    json_put_text(out, "rdma", node ? node->rdma : "");
    json_put_text(out, "locality", node ? node->locality : "");
    json_put_bool(out, "live", node != NULL);
    json_put_bool(out, "connected", peer && peer->connected);
    json_put_bool(out, "quarantined", peer && peer->quarantined);
    json_put_text(out, "transport", peer && peer->transport ? peer->transport : "");
    json_put_u64(out, "links", peer ? peer->links : 0);
    json_put_u64(out, "received", peer ? peer->received : 0);
    json_put_u64(out, "sent", peer ? peer->sent : 0);
    json_put_u64(out, "verified", peer ? peer->verified : 0);
    json_put_u64(out, "corrupt", peer ? peer->corrupt : 0);
    json_put_u64(out, "failed", peer ? peer->failed : 0);
    json_put_u64(out, "busy", peer ? peer->busy : 0);
    json_put_u64(out, "refused", peer ? peer->refused : 0);
    json_put_u64(out, "rate_down", peer ? peer->rate_down : 0);
    json_put_u64(out, "rate_up", peer ? peer->rate_up : 0);
    json_put_u64(out, "quarantine_s", peer ? peer->quarantine_s : 0);
    json_end(out);
}

static int node_compare(const void *a, const void *b)
{
    return strcmp(((const struct model_node *)a)->name, ((const struct model_node *)b)->name);
}

/* Live nodes first, in order of name; then those that this node knew and that are gone. */
void control_peers_put(struct control *control, struct json_out *out)
{
    struct house *house = control->house;
    struct model_node *nodes = NULL;
    struct engine_peer *known = NULL;
    size_t node_count = 0, known_count = 0;
    if (catalog_nodes(house->catalog, &nodes, &node_count) < 0 ||
        engine_peers(house->engine, &known, &known_count) < 0) {
        out->failed = true;
        goto free_lists;
    }
    if (node_count > 1)
        qsort(nodes, node_count, sizeof(*nodes), node_compare);
    json_array(out, "peers");
    for (size_t i = 0; i < node_count; i++)
        if (strcmp(nodes[i].name, house->options.node) != 0)
            peer_put(out, &nodes[i], known_find(known, known_count, nodes[i].name));
    for (size_t i = 0; i < known_count; i++) {
        bool live = false;
        for (size_t k = 0; k < node_count && !live; k++)
            live = strcmp(nodes[k].name, known[i].node) == 0;
        if (!live)
            peer_put(out, NULL, &known[i]);
    }
    json_end(out);

free_lists:
    free(nodes);
    free(known);
}
