#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/transport.h"
#include "fs/control_parts.h"
#include "fs/through.h"
#include "meta/base/util.h"
#include "p2pfs_config.h"

struct metric {
    const char *name;
    const char *type; /* "gauge" or "counter" */
    const char *help;
    size_t offset; /* of a uint64_t in struct engine_stats */
};
#define ENGINE_METRICS 20
static const struct metric engine_metrics[ENGINE_METRICS];

/* ---- status ---- */

/* How many live nodes there are besides this one. */
static uint64_t peers_live(const struct house *house)
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
    json_put_u64(out, "peers_live", peers_live(house));
}

static void status_engine(const struct house *house, struct json_out *out)
{
    static const char *const transports[] = {"rdma", "tcp"};
    struct engine_stats stats;
    engine_stats(house->engine, &stats);
    json_put_u64(out, "cache_used", stats.cache_used);
    json_put_u64(out, "cache_limit", stats.cache_limit);
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
    json_put_text(out, "loop", stats.loop);
    json_put_u64(out, "lanes", stats.lanes);
    json_array(out, "transports");
    for (size_t i = 0; i < util_count(transports); i++)
        if (transport_by_name(transports[i]))
            json_put_text(out, NULL, transports[i]);
    json_end(out);
    json_put_text(out, "fetch", house->options.fetch_whole ? "whole" : "demand");
    struct through_status through;
    through_status(house->through, &through);
    json_put_text(out, "io_path", through.enabled ? "passthrough" : "buffered");
    json_put_text(out, "io_path_why", through.why);
    json_put_u64(out, "passthrough_opens", through.opens);
}

void control_status_put(struct control *control, struct json_out *out)
{
    status_node(control->house, out);
    status_meta(control->house, out);
    status_engine(control->house, out);
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

/* ---- metrics: Prometheus text exposition format 0.0.4 ---- */

static void sample(FILE *out, const char *name, const char *type, const char *help, uint64_t value)
{
    fprintf(out, "# HELP p2pfs_%s %s\n# TYPE p2pfs_%s %s\np2pfs_%s %llu\n", name, help, name, type,
            name, (unsigned long long)value);
}

static void label_put(FILE *out, const char *name, const char *value)
{
    fprintf(out, "%s=\"", name);
    for (; *value; value++) {
        if (*value == '"' || *value == '\\')
            fputc('\\', out);
        if (*value == '\n')
            fputs("\\n", out);
        else
            fputc(*value, out);
    }
    fputc('"', out);
}

static void metrics_info(FILE *out, const struct house *house, const struct engine_stats *stats)
{
    fputs("# HELP p2pfs_info What this mount is; always 1.\n# TYPE p2pfs_info gauge\np2pfs_info{",
          out);
    label_put(out, "version", P2PFS_VERSION);
    fputc(',', out);
    label_put(out, "node", house->options.node);
    fputc(',', out);
    label_put(out, "backend", catalog_backend(house->catalog));
    fputc(',', out);
    label_put(out, "storage", stats->storage);
    fputc(',', out);
    label_put(out, "loop", stats->loop);
    fputs("} 1\n", out);
}

static void metrics_catalog(FILE *out, const struct house *house)
{
    uint64_t since_ms;
    struct catalog_totals totals = {0};
    catalog_totals(house->catalog, &totals);
    sample(out, "uptime_seconds", "gauge", "Seconds since the mount began to serve.",
           (util_now_ms() - house->started_ms) / 1000);
    sample(out, "metadata_online", "gauge", "1 while the metadata service answers.",
           catalog_online(house->catalog, &since_ms));
    sample(out, "peers_live", "gauge", "Live nodes besides this one.", peers_live(house));
    sample(out, "files", "gauge", "Registered files in the cluster.", totals.files);
    sample(out, "directories", "gauge", "Directories in the cluster.", totals.dirs);
    sample(out, "symlinks", "gauge", "Symbolic links in the cluster.", totals.symlinks);
    sample(out, "registered_bytes", "gauge", "Bytes of all versions that have a name.",
           totals.bytes);
}

struct peer_metric {
    const char *name;
    const char *help;
    size_t offset; /* of a uint64_t in struct engine_peer */
};
#define PEER_METRICS 5
static const struct peer_metric peer_metrics[PEER_METRICS];

static void metrics_peers(FILE *out, const struct house *house)
{
    struct engine_peer *known = NULL;
    size_t count = 0;
    if (engine_peers(house->engine, &known, &count) < 0)
        return;
    for (size_t m = 0; m < PEER_METRICS && count > 0; m++) {
        const struct peer_metric *metric = &peer_metrics[m];
        fprintf(out, "# HELP p2pfs_%s %s\n# TYPE p2pfs_%s counter\n", metric->name, metric->help,
                metric->name);
        for (size_t i = 0; i < count; i++) {
            uint64_t value;
            memcpy(&value, (const char *)&known[i] + metric->offset, sizeof(value));
            fprintf(out, "p2pfs_%s{", metric->name);
            label_put(out, "peer", known[i].node);
            fprintf(out, "} %llu\n", (unsigned long long)value);
        }
    }
    free(known);
}

char *control_metrics(struct control *control, size_t *length)
{
    char *text = NULL;
    FILE *out = open_memstream(&text, length);
    if (!out)
        return NULL;
    struct engine_stats stats;
    engine_stats(control->house->engine, &stats);
    metrics_info(out, control->house, &stats);
    metrics_catalog(out, control->house);
    sample(out, "lanes", "gauge", "Lanes (threads with links and pulls).", stats.lanes);
    for (size_t i = 0; i < ENGINE_METRICS; i++) {
        uint64_t value;
        memcpy(&value, (const char *)&stats + engine_metrics[i].offset, sizeof(value));
        sample(out, engine_metrics[i].name, engine_metrics[i].type, engine_metrics[i].help, value);
    }
    metrics_peers(out, control->house);
    if (fclose(out) != 0) {
        free(text);
        return NULL;
    }
    return text;
}

/* Every number of struct engine_stats. */
#define GAUGE(field, metric, words) \
    {.name = (metric),              \
     .type = "gauge",               \
     .help = (words),               \
     .offset = offsetof(struct engine_stats, field)}
#define COUNTER(field, metric, words) \
    {.name = (metric),                \
     .type = "counter",               \
     .help = (words),                 \
     .offset = offsetof(struct engine_stats, field)}

static const struct metric engine_metrics[ENGINE_METRICS] = {
    GAUGE(cache_limit, "cache_limit_bytes", "What replicas may occupy (cache_size=)."),
    GAUGE(cache_used, "cache_used_bytes", "What replicas occupy now."),
    GAUGE(replicas, "replicas", "Versions with bytes on this node."),
    GAUGE(replicas_complete, "replicas_complete", "Versions that are here completely."),
    GAUGE(pulls_running, "pulls_running", "Versions that are being pulled."),
    GAUGE(readers_waiting, "readers_waiting", "Reads that wait for bytes."),
    GAUGE(grants_open, "grants_open", "Shards that peers are reading here now."),
    COUNTER(bytes_received, "received_bytes_total", "Bytes of shards received from peers."),
    COUNTER(bytes_served, "served_bytes_total", "Bytes of shards sent to peers."),
    COUNTER(bytes_written, "written_bytes_total", "Bytes written into the mount."),
    COUNTER(shards_fetched, "shards_fetched_total", "Shards received and verified."),
    COUNTER(shards_served, "shards_served_total", "Shards sent to peers."),
    COUNTER(shards_corrupt, "shards_corrupt_total", "Shards whose digest differed."),
    COUNTER(shards_failed, "shards_failed_total", "Fetches of shards that failed."),
    COUNTER(reads_hit, "reads_hit_total", "Reads answered at once."),
    COUNTER(reads_waited, "reads_waited_total", "Reads that waited for bytes."),
    COUNTER(reads_failed, "reads_failed_total", "Reads that failed."),
    COUNTER(pulls_completed, "pulls_completed_total", "Versions that became complete by a pull."),
    COUNTER(evictions, "evictions_total", "Replicas dropped to make room or on request."),
    COUNTER(links_refused, "links_refused_total", "Handshakes with peers that failed."),
};

static const struct peer_metric peer_metrics[PEER_METRICS] = {
    {"peer_received_bytes_total", "Bytes of shards received from the peer.",
     offsetof(struct engine_peer, received)},
    {"peer_sent_bytes_total", "Bytes of shards sent to the peer.",
     offsetof(struct engine_peer, sent)},
    {"peer_shards_verified_total", "Shards from the peer that were right.",
     offsetof(struct engine_peer, verified)},
    {"peer_shards_corrupt_total", "Shards from the peer whose digest differed.",
     offsetof(struct engine_peer, corrupt)},
    {"peer_shards_failed_total", "Shards that the peer did not deliver.",
     offsetof(struct engine_peer, failed)},
};
