#include <utlist.h>

#include "tests/sim/sim.h"

/* ---- the way out ---- */

/* What each of the uploads has got until now. */
static void uplink_advance(struct sim *sim, struct sim_uplink *up)
{
    if (up->count) {
        up->served += (double)(sim->now_ns - up->at_ns) / up->ns_per_byte / up->count;
    }
    up->at_ns = sim->now_ns;
}

/* Waits for the first of the uploads that there are now. */
static void uplink_wait(struct sim *sim, struct sim_node *node)
{
    struct sim_uplink *up = &node->host->up;
    const struct sim_fill *first = up->uploads;
    up->generation++;
    if (first) {
        double left = (first->finish - up->served) * up->ns_per_byte * up->count;
        sim_at(sim, sim->now_ns + (left > 0 ? (uint64_t)left + 1 : 1), SIM_SENT, node,
               up->generation, 0);
    }
}

void links_upload(struct sim *sim, struct sim_fill *fill)
{
    struct sim_node *node = fill->conn->holder;
    uplink_advance(sim, &node->host->up);
    fill->upload_ns = sim->now_ns;
    fill->finish = node->host->up.served + (double)sim_shard_size(sim, fill->shard);
    fill->uploading = true;
    /* They are kept in the order in which they end: that in which they began, unless one is smaller. */
    struct sim_fill *before = node->host->up.uploads ? node->host->up.uploads->upload_prev : NULL;
    while (before && before->finish > fill->finish) {
        before = before == node->host->up.uploads ? NULL : before->upload_prev;
    }
    DL_APPEND_ELEM2(node->host->up.uploads, before, fill, upload_prev, upload_next);
    node->host->up.count++;
    uplink_wait(sim, node);
}

void links_stop(struct sim *sim, struct sim_fill *fill)
{
    struct sim_node *node = fill->conn->holder;
    if (!fill->uploading) {
        return;
    }
    uplink_advance(sim, &node->host->up);
    double left = fill->finish - node->host->up.served;
    uint64_t sent = sim_shard_size(sim, fill->shard) - (left > 0 ? (uint64_t)left : 0);
    node->host->up.bytes += sent;
    fill->uploading = false;
    DL_DELETE2(node->host->up.uploads, fill, upload_prev, upload_next);
    node->host->up.count--;
    uplink_wait(sim, node);
}

/* ---- the way in ---- */

/* When the last byte has passed a pipe that it reaches at last_ns, the first one having reached it at first_ns: at once
 * where there is room, else behind what came before. */
static uint64_t pipe_pass(struct sim_pipe *pipe, uint64_t first_ns, uint64_t last_ns,
                          uint64_t bytes)
{
    uint64_t from = pipe->free_ns > first_ns ? pipe->free_ns : first_ns;
    pipe->free_ns = from + (uint64_t)((double)bytes * pipe->ns_per_byte);
    pipe->bytes += bytes;
    return pipe->free_ns > last_ns ? pipe->free_ns : last_ns;
}

void links_sent(struct sim *sim, struct sim_node *node)
{
    struct sim_fill *fill = node->host->up.uploads;
    uint64_t latency = sim->options.latency;
    struct sim_node *to = fill->conn->puller;
    links_stop(sim, fill);
    uint64_t bytes = sim_shard_size(sim, fill->shard);
    uint64_t first = fill->upload_ns + latency;
    uint64_t last = sim->now_ns + latency;
    if (node->rack != to->rack) {
        last = pipe_pass(&sim->trunk_out[node->rack], first, last, bytes);
        last = pipe_pass(&sim->trunk_in[to->rack], first, last, bytes);
    }
    last = pipe_pass(&to->host->down, first, last, bytes);
    sim_at(sim, last, SIM_LANDED, fill, fill->generation, 0);
}
