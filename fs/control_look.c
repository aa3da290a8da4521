/* What p2pfs why and p2pfs top show: how shards came here, and what moves now. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <uthash.h>

#include "fs/control_parts.h"
#include "meta/base/util.h"

#define SLOWEST 5

/* ---- why ---- */

/* What came from one node over one transport. */
struct from {
    const char *node;
    const char *transport;
    uint64_t shards, bytes, missed, urgent, hedged;
    uint64_t queued_ns, wire_ns, verify_ns; /* sums */
    uint64_t queued_max_ns, wire_max_ns;
    UT_hash_handle hh; /* by node */
};

static uint64_t shard_bytes(const struct engine_why *why, uint32_t shard)
{
    return model_shard_length(why->size, why->shard_size, shard);
}

static void larger(uint64_t *most, uint64_t value)
{
    if (value > *most)
        *most = value;
}

static void from_add(struct from *from, const struct engine_why_shard *shard, uint64_t bytes)
{
    from->shards++;
    from->bytes += bytes;
    from->missed += shard->missed;
    from->urgent += shard->urgent;
    from->hedged += shard->hedged;
    from->queued_ns += shard->queued_ns;
    from->wire_ns += shard->wire_ns;
    from->verify_ns += shard->verify_ns;
    larger(&from->queued_max_ns, shard->queued_ns);
    larger(&from->wire_max_ns, shard->wire_ns);
}

/* A node is one row, whose transport is that of its last shard; a change of transport is rare, and `shards` has it. */
static struct from *from_get(struct from **table, const struct engine_why_shard *shard)
{
    struct from *from;
    HASH_FIND_STR(*table, shard->node, from);
    if (!from) {
        from = calloc(1, sizeof(*from));
        if (!from)
            return NULL;
        from->node = shard->node;
        HASH_ADD_KEYPTR(hh, *table, from->node, strlen(from->node), from);
    }
    from->transport = shard->transport;
    return from;
}

static void from_put(struct json_out *out, const struct from *from)
{
    json_object(out, NULL);
    json_put_text(out, "node", from->node);
    json_put_text(out, "transport", from->transport);
    json_put_u64(out, "shards", from->shards);
    json_put_u64(out, "bytes", from->bytes);
    json_put_u64(out, "missed", from->missed);
    json_put_u64(out, "urgent", from->urgent);
    json_put_u64(out, "hedged", from->hedged);
    json_put_time(out, "queued_s", (int64_t)from->queued_ns);
    json_put_time(out, "queued_max_s", (int64_t)from->queued_max_ns);
    json_put_time(out, "wire_s", (int64_t)from->wire_ns);
    json_put_time(out, "wire_max_s", (int64_t)from->wire_max_ns);
    json_put_time(out, "verify_s", (int64_t)from->verify_ns);
    json_end(out);
}

static void shard_put(struct json_out *out, uint32_t number, const struct engine_why_shard *shard)
{
    json_object(out, NULL);
    json_put_u64(out, "shard", number);
    json_put_bool(out, "present", shard->present);
    json_put_text(out, "node", shard->node);
    json_put_text(out, "transport", shard->transport);
    json_put_time(out, "queued_s", (int64_t)shard->queued_ns);
    json_put_time(out, "wire_s", (int64_t)shard->wire_ns);
    json_put_time(out, "verify_s", (int64_t)shard->verify_ns);
    json_put_u64(out, "missed", shard->missed);
    json_put_bool(out, "urgent", shard->urgent);
    json_put_bool(out, "hedged", shard->hedged);
    json_end(out);
}

static uint64_t shard_ns(const struct engine_why_shard *shard)
{
    return shard->node ? shard->queued_ns + shard->wire_ns : 0;
}

/* The slowest shards, the worst first. */
static void slowest_put(struct json_out *out, const struct engine_why *why)
{
    uint32_t worst[SLOWEST];
    size_t count = 0;
    for (uint32_t k = 0; k < why->count; k++) {
        size_t at = count;
        while (at > 0 && shard_ns(&why->shards[k]) > shard_ns(&why->shards[worst[at - 1]]))
            at--;
        if (at == SLOWEST || !why->shards[k].node)
            continue;
        count += count < SLOWEST;
        memmove(&worst[at + 1], &worst[at], (count - at - 1) * sizeof(worst[0]));
        worst[at] = k;
    }
    json_array(out, "slowest");
    for (size_t i = 0; i < count; i++)
        shard_put(out, worst[i], &why->shards[worst[i]]);
    json_end(out);
}

/* Sums over all shards, per node and altogether. */
static void sums_put(struct json_out *out, const struct engine_why *why)
{
    struct from *table = NULL, *from, *next;
    uint64_t present = 0, pulled = 0, bytes = 0, missed = 0;
    for (uint32_t k = 0; k < why->count; k++) {
        const struct engine_why_shard *shard = &why->shards[k];
        present += shard->present;
        missed += shard->missed;
        if (!shard->node)
            continue;
        pulled++;
        bytes += shard_bytes(why, k);
        from = from_get(&table, shard);
        if (from)
            from_add(from, shard, shard_bytes(why, k));
        else
            out->failed = true;
    }
    json_put_u64(out, "shards_present", present);
    json_put_u64(out, "shards_pulled", pulled);
    json_put_u64(out, "bytes_pulled", bytes);
    json_put_u64(out, "missed", missed);
    json_array(out, "from");
    HASH_ITER(hh, table, from, next) {
        from_put(out, from);
        /* NOLINTNEXTLINE(clang-analyzer-unix.Malloc): the loop took the next one before */
        HASH_DEL(table, from);
        free(from);
    }
    json_end(out);
}

static void why_put(struct control_call *call, const char *name, const struct engine_why *why)
{
    struct json_out *out = call->answer;
    control_good(call);
    json_put_name(out, "name", name);
    json_put_u64(out, "size", why->size);
    json_put_u64(out, "shards", why->count);
    json_put_u64(out, "shard_size", why->shard_size);
    json_put_bool(out, "pulled", why->shards != NULL);
    json_put_time(out, "took_s", (int64_t)why->took_ns);
    if (why->shards) {
        sums_put(out, why);
        slowest_put(out, why);
        if (json_true(call->request, "whole")) {
            json_array(out, "each");
            for (uint32_t k = 0; k < why->count; k++)
                shard_put(out, k, &why->shards[k]);
            json_end(out);
        }
    }
    json_end(out);
}

void control_op_why(struct control_call *call)
{
    struct model_entry entry = {0};
    struct engine_why why = {0};
    char *name = NULL;
    if (control_target(call, true, &entry, &name) < 0)
        return;
    int rc = entry.kind == MODEL_FILE
                 ? engine_why(call->control->house->engine, &entry.version, &why)
                 : -EISDIR;
    if (rc == 0)
        why_put(call, name, &why);
    else if (rc == -EISDIR)
        control_fail(call, rc, "'%s' is a directory: name a file", name);
    else if (rc == -ENOENT)
        control_fail(call, rc, "nothing of '%s' is on this node: p2pfs pull fetches it", name);
    else
        control_fail(call, rc, "'%s': %s", name, control_why(rc));
    free(why.shards);
    model_entry_clear(&entry);
    free(name);
}

/* ---- top ---- */

static void pull_put(struct json_out *out, const struct engine_pull_info *pull, const char *path)
{
    char version[MODEL_ID_TEXT];
    model_id_print(&pull->version, version);
    json_object(out, NULL);
    json_put_name(out, "name", path ? path : "");
    json_put_text(out, "version", version);
    json_put_u64(out, "size", pull->size);
    json_put_u64(out, "resident", pull->resident);
    json_put_u64(out, "shards", pull->shards);
    json_put_u64(out, "shards_present", pull->shards_present);
    json_put_u64(out, "sources", pull->sources);
    json_put_u64(out, "readers_waiting", pull->waiting);
    json_put_bool(out, "whole", pull->whole);
    json_put_time(out, "seconds", (int64_t)pull->running_ns);
    json_end(out);
}

static void pulls_put(const struct house *house, struct json_out *out)
{
    struct engine_pull_info *pulls = NULL;
    size_t count = 0;
    if (engine_pulls(house->engine, &pulls, &count) < 0)
        count = 0;
    struct model_id *ids = calloc(count + 1, sizeof(*ids));
    char **paths = calloc(count + 1, sizeof(*paths));
    for (size_t i = 0; ids && i < count; i++)
        ids[i] = pulls[i].version;
    if (!ids || !paths || catalog_version_paths(house->catalog, ids, count, paths) < 0)
        out->failed = true;
    json_array(out, "pulls");
    for (size_t i = 0; paths && i < count; i++) {
        pull_put(out, &pulls[i], paths[i]);
        free(paths[i]);
    }
    json_end(out);
    free(paths);
    free(ids);
    free(pulls);
}

void control_op_top(struct control_call *call)
{
    struct house *house = call->control->house;
    struct json_out *out = call->answer;
    struct engine_stats stats;
    uint64_t since_ms;
    engine_stats(house->engine, &stats);
    control_good(call);
    json_put_text(out, "node", house->options.node);
    json_put_time(out, "clock_s", (int64_t)util_now_ns()); /* for rates between two answers */
    json_put_bool(out, "online", catalog_online(house->catalog, &since_ms));
    json_put_u64(out, "cache_used", stats.cache_used);
    json_put_u64(out, "cache_limit", stats.cache_limit);
    json_put_u64(out, "max_upload", stats.max_upload);
    json_put_u64(out, "max_download", stats.max_download);
    json_put_u64(out, "bytes_received", stats.bytes_received);
    json_put_u64(out, "bytes_served", stats.bytes_served);
    json_put_u64(out, "reads_hit", stats.reads_hit);
    json_put_u64(out, "reads_waited", stats.reads_waited);
    json_put_u64(out, "readers_waiting", stats.readers_waiting);
    json_put_u64(out, "grants_open", stats.grants_open);
    pulls_put(house, out);
    control_peers_put(call->control, out);
    json_end(out);
}
