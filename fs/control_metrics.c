/* .p2pfs/metrics: the Prometheus text exposition format 0.0.4. The tables at the end are what p2pfs(1) documents. */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/topology.h"
#include "fs/control_parts.h"
#include "meta/base/util.h"
#include "p2pfs_config.h"

/* What the values are taken from. */
struct reading {
    struct engine_stats engine;
    struct catalog_totals totals;
    struct engine_peer *peers;
    size_t peer_count;
    struct transport_adapter adapters[TOPOLOGY_RAILS_MAX];
    size_t adapter_count;
    uint64_t uptime_s, online, peers_live, outages;
};

enum unit { PLAIN, NANOSECONDS }; /* nanoseconds are shown as seconds */

struct metric {
    const char *name;
    const char *type; /* "gauge" or "counter" */
    const char *help;
    size_t offset; /* of a uint64_t in struct reading, engine_peer or transport_adapter */
    enum unit unit;
};
#define METRICS         40
#define PEER_METRICS    9
#define ADAPTER_METRICS 3
static const struct metric metrics[METRICS];
static const struct metric peer_metrics[PEER_METRICS];
static const struct metric adapter_metrics[ADAPTER_METRICS];

static void reading_take(const struct house *house, struct reading *out)
{
    uint64_t since_ms;
    *out = (struct reading){.uptime_s = (util_now_ms() - house->started_ms) / 1000,
                            .online = catalog_online(house->catalog, &since_ms),
                            .outages = catalog_outages(house->catalog),
                            .peers_live = control_peers_live(house)};
    engine_stats(house->engine, &out->engine);
    catalog_totals(house->catalog, &out->totals);
    out->adapter_count = engine_adapters(house->engine, out->adapters, util_count(out->adapters));
    if (engine_peers(house->engine, &out->peers, &out->peer_count) < 0)
        out->peer_count = 0;
}

static void head_put(FILE *out, const char *name, const char *type, const char *help)
{
    fprintf(out, "# HELP p2pfs_%s %s\n# TYPE p2pfs_%s %s\n", name, help, name, type);
}

static void value_put(FILE *out, const struct metric *metric, const void *from)
{
    uint64_t value;
    memcpy(&value, (const char *)from + metric->offset, sizeof(value));
    if (metric->unit == NANOSECONDS)
        fprintf(out, " %.9f\n", (double)value / 1e9);
    else
        fprintf(out, " %llu\n", (unsigned long long)value);
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

static void info_put(FILE *out, const struct house *house, const struct engine_stats *stats)
{
    const char *const labels[][2] = {
        {"version", P2PFS_VERSION},
        {"node", house->options.node},
        {"backend", catalog_backend(house->catalog)},
        {"storage", stats->storage},
        {"loop", stats->loop},
    };
    head_put(out, "info", "gauge", "What this mount is; always 1.");
    fputs("p2pfs_info{", out);
    for (size_t i = 0; i < util_count(labels); i++) {
        fputs(i ? "," : "", out);
        label_put(out, labels[i][0], labels[i][1]);
    }
    fputs("} 1\n", out);
}

char *control_metrics(struct control *control, size_t *length)
{
    char *text = NULL;
    FILE *out = open_memstream(&text, length);
    if (!out)
        return NULL;
    struct reading reading;
    reading_take(control->house, &reading);
    info_put(out, control->house, &reading.engine);
    for (size_t i = 0; i < METRICS; i++) {
        head_put(out, metrics[i].name, metrics[i].type, metrics[i].help);
        fprintf(out, "p2pfs_%s", metrics[i].name);
        value_put(out, &metrics[i], &reading);
    }
    for (size_t m = 0; m < PEER_METRICS; m++) {
        head_put(out, peer_metrics[m].name, peer_metrics[m].type, peer_metrics[m].help);
        for (size_t i = 0; i < reading.peer_count; i++) {
            fprintf(out, "p2pfs_%s{", peer_metrics[m].name);
            label_put(out, "peer", reading.peers[i].node);
            fputc('}', out);
            value_put(out, &peer_metrics[m], &reading.peers[i]);
        }
    }
    for (size_t m = 0; m < ADAPTER_METRICS; m++) {
        head_put(out, adapter_metrics[m].name, adapter_metrics[m].type, adapter_metrics[m].help);
        for (size_t i = 0; i < reading.adapter_count; i++) {
            fprintf(out, "p2pfs_%s{", adapter_metrics[m].name);
            label_put(out, "device", reading.adapters[i].device);
            fputc('}', out);
            value_put(out, &adapter_metrics[m], &reading.adapters[i]);
        }
    }
    free(reading.peers);
    if (fclose(out) != 0) {
        free(text);
        return NULL;
    }
    return text;
}

#define METRIC(kind, field, metric, words, as)  \
    {.name = (metric),                          \
     .type = (kind),                            \
     .help = (words),                           \
     .offset = offsetof(struct reading, field), \
     .unit = (as)}
#define GAUGE(field, metric, words)   METRIC("gauge", field, metric, words, PLAIN)
#define COUNTER(field, metric, words) METRIC("counter", field, metric, words, PLAIN)
#define SECONDS(field, metric, words) METRIC("counter", field, metric, words, NANOSECONDS)

static const struct metric metrics[METRICS] = {
    GAUGE(uptime_s, "uptime_seconds", "Seconds since the mount began."),
    GAUGE(online, "metadata_online", "1 while the metadata service answers."),
    COUNTER(outages, "metadata_outages_total",
            "Times that the metadata service stopped answering."),
    GAUGE(peers_live, "peers_live", "Live nodes besides this one."),
    GAUGE(totals.files, "files", "Registered files in the cluster."),
    GAUGE(totals.dirs, "directories", "Directories in the cluster."),
    GAUGE(totals.symlinks, "symlinks", "Symbolic links in the cluster."),
    GAUGE(totals.bytes, "registered_bytes", "Bytes of all versions that have a name."),
    GAUGE(engine.cache_limit, "cache_limit_bytes", "What replicas may occupy (cache_size=)."),
    GAUGE(engine.cache_used, "cache_used_bytes", "What replicas occupy now."),
    GAUGE(engine.reserve, "reserve_bytes", "Memory that is cleared ahead of pulls."),
    GAUGE(engine.max_upload, "upload_limit_bytes_per_second", "The limit of uploads; 0: none."),
    GAUGE(engine.max_download, "download_limit_bytes_per_second",
          "The limit of downloads; 0: none."),
    GAUGE(engine.replicas, "replicas", "Versions with bytes on this node."),
    GAUGE(engine.replicas_complete, "replicas_complete", "Versions that are here completely."),
    GAUGE(engine.pulls_running, "pulls_running", "Versions that are being pulled."),
    GAUGE(engine.readers_waiting, "readers_waiting", "Reads that wait for bytes."),
    GAUGE(engine.grants_open, "grants_open", "Shards that peers are reading here now."),
    COUNTER(engine.bytes_received, "received_bytes_total", "Bytes of shards received from peers."),
    COUNTER(engine.bytes_rdma, "received_rdma_bytes_total", "Those of them that came by RDMA."),
    COUNTER(engine.rdma_failures, "rdma_failures_total",
            "Times that RDMA with a peer failed, so that TCP was taken."),
    COUNTER(engine.bytes_served, "served_bytes_total", "Bytes of shards sent to peers."),
    COUNTER(engine.bytes_written, "written_bytes_total", "Bytes written into the mount."),
    COUNTER(engine.shards_fetched, "shards_fetched_total", "Shards received and verified."),
    COUNTER(engine.shards_served, "shards_served_total", "Shards sent to peers."),
    COUNTER(engine.shards_corrupt, "shards_corrupt_total", "Shards whose digest differed."),
    COUNTER(engine.shards_failed, "shards_failed_total", "Fetches of shards that failed."),
    COUNTER(engine.shards_hedged, "shards_hedged_total",
            "Shards asked of a second peer, since the first was slow."),
    COUNTER(engine.asks_busy, "asks_busy_total",
            "Asks of this node that peers answered with BUSY."),
    COUNTER(engine.asks_refused, "asks_refused_total",
            "Asks of peers that this node answered with BUSY."),
    SECONDS(engine.queued_ns, "shard_queue_seconds_total",
            "Time from the ask to the grant, over all shards that came."),
    SECONDS(engine.wire_ns, "shard_wire_seconds_total",
            "Time from the grant to the last byte, likewise."),
    SECONDS(engine.verify_ns, "shard_verify_seconds_total", "Time spent on hashing them."),
    COUNTER(engine.quarantines, "quarantines_total",
            "Times that a peer was left alone for wrong bytes."),
    COUNTER(engine.reads_hit, "reads_hit_total", "Reads answered at once."),
    COUNTER(engine.reads_waited, "reads_waited_total", "Reads that waited for bytes."),
    COUNTER(engine.reads_failed, "reads_failed_total", "Reads that failed."),
    COUNTER(engine.pulls_completed, "pulls_completed_total",
            "Versions that became complete by a pull."),
    COUNTER(engine.evictions, "evictions_total", "Replicas dropped to make room or on request."),
    COUNTER(engine.links_refused, "links_refused_total", "Handshakes with peers that failed."),
};

#define OF_PEER(kind, field, metric, words) \
    {.name = (metric),                      \
     .type = (kind),                        \
     .help = (words),                       \
     .offset = offsetof(struct engine_peer, field)}

static const struct metric peer_metrics[PEER_METRICS] = {
    OF_PEER("counter", received, "peer_received_bytes_total",
            "Bytes of shards received from the peer."),
    OF_PEER("counter", sent, "peer_sent_bytes_total", "Bytes of shards sent to the peer."),
    OF_PEER("gauge", rate_down, "peer_receive_bytes_per_second",
            "What comes from the peer, over the last seconds."),
    OF_PEER("gauge", rate_up, "peer_send_bytes_per_second",
            "What goes to the peer, over the last seconds."),
    OF_PEER("counter", verified, "peer_shards_verified_total",
            "Shards from the peer that were right."),
    OF_PEER("counter", corrupt, "peer_shards_corrupt_total",
            "Shards from the peer whose digest differed."),
    OF_PEER("counter", failed, "peer_shards_failed_total", "Shards that the peer did not deliver."),
    OF_PEER("counter", busy, "peer_asks_busy_total",
            "Asks of this node that the peer answered with BUSY."),
    OF_PEER("counter", refused, "peer_asks_refused_total",
            "Asks of the peer that this node answered with BUSY."),
};

#define OF_ADAPTER(kind, field, metric, words) \
    {.name = (metric),                         \
     .type = (kind),                           \
     .help = (words),                          \
     .offset = offsetof(struct transport_adapter, field)}

static const struct metric adapter_metrics[ADAPTER_METRICS] = {
    OF_ADAPTER("counter", received, "rdma_device_received_bytes_total",
               "Bytes of shards that the device has read."),
    OF_ADAPTER("gauge", rails, "rdma_device_connections",
               "Connections that carry shards by the device."),
    OF_ADAPTER("counter", failures, "rdma_device_failures_total",
               "Connections by the device that failed while they carried shards."),
};
