#include "engine/reach.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/loop.h"
#include "meta/base/util.h"

/* One kind of transport after the other, so that all links of a run have the same. */
struct run {
    struct loop *loop;
    struct transport *transport;
    size_t waiting;
};

static void answered(struct link *link, int status, const char *reason)
{
    struct reach *reach = link->user;
    struct run *run = link->transport->arg;
    reach->status = status;
    snprintf(reach->reason, sizeof(reach->reason), "%s", reason);
    link->transport->ops->shut(link);
    if (--run->waiting == 0)
        loop_stop(run->loop);
}

static void connected(struct link *link)
{
    answered(link, 0, "");
}

static void down(struct link *link, int error, const char *reason)
{
    answered(link, error, reason);
}

static const struct transport_events events = {.connected = connected, .down = down};

static void failed(struct reach *reach, int status)
{
    reach->status = status;
    snprintf(reach->reason, sizeof(reach->reason), "%s", strerror(-status));
}

static void run_kind(struct reach *list, size_t count, const struct transport_ops *ops,
                     uint32_t timeout_ms)
{
    struct run run = {0};
    struct transport_config config = {0};
    int opened = loop_open(&run.loop);
    if (opened == 0)
        opened = ops->open(run.loop, &config, &events, &run, &run.transport);
    for (size_t i = 0; i < count; i++) {
        struct link *link;
        if (list[i].transport != ops)
            continue;
        int status =
            opened < 0 ? opened
                       : ops->connect(run.transport, list[i].address, timeout_ms, &list[i], &link);
        if (status < 0)
            failed(&list[i], status);
        else
            run.waiting++;
    }
    if (run.waiting > 0)
        loop_run(run.loop);
    if (run.transport)
        ops->close(run.transport);
    loop_close(run.loop);
}

void reach_all(struct reach *list, size_t count, uint32_t timeout_ms)
{
    for (size_t i = 0; i < count; i++) {
        bool first = true;
        for (size_t k = 0; k < i; k++)
            first = first && list[k].transport != list[i].transport;
        if (first)
            run_kind(list, count, list[i].transport, timeout_ms);
    }
}
