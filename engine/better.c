#include "engine/better.h"

#include "engine/fast.h"
#include "engine/lane.h"

#define BETTER_DRAIN_NS 2000000000ull /* for what is under way on the old link */

void better_try(struct better *better, struct lane *lane, struct peer *peer,
                const struct model_node *node, uint32_t connect_ms, void *user)
{
    struct transport *fast = lane->fast;
    if (!fast || !fast_may(lane->engine, peer, node)) {
        return;
    }
    if (fast->ops->connect(fast, node->rdma, connect_ms, user, &better->link) < 0) {
        better->link = NULL;
        peer_rdma_failed(peer, "no connection can be begun", true);
    }
}

bool better_due(const struct better *better, bool under_way, uint64_t now_ns)
{
    return better->made_ns && (!under_way || now_ns - better->made_ns >= BETTER_DRAIN_NS);
}

struct link *better_take(struct better *better)
{
    struct link *link = better->link;
    *better = (struct better){0};
    return link;
}

void better_end(struct better *better)
{
    struct link *link = better_take(better);
    if (link) {
        link->transport->ops->shut(link);
    }
}

void better_fail(struct better *better, struct peer *peer, const char *reason)
{
    better_end(better);
    peer_rdma_failed(peer, reason, true);
}
