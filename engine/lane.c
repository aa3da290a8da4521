#include "engine/lane.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <utlist.h>

#include "engine/direct.h"
#include "engine/peers.h"
#include "engine/pull.h"
#include "engine/reserve.h"
#include "engine/serve.h"
#include "engine/storage.h"
#include "engine/supplier.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

static void tick(struct loop_timer *timer)
{
    struct lane *lane = util_container(timer, struct lane, tick);
    uint64_t now = loop_now_ns(lane->loop);
    supplier_tick(lane, now);
    pull_tick(lane, now);
    serve_tick(lane, now);
    if (lane->index == 0) {
        direct_tick(lane->engine);
    }
    if (lane->index == 0 && now - lane->trimmed_ns > LANE_TRIM_NS) {
        lane->trimmed_ns = now;
        storage_trim(lane->engine->storage, UINT64_MAX);
        reserve_tick(lane->engine->reserve);
        peers_sample(lane->engine->peers, now);
    }
    (void)loop_timer_set(lane->loop, &lane->tick, LANE_TICK_MS * 1000000ull);
}

static void kicked(struct loop_task *task)
{
    struct lane *lane = util_container(task, struct lane, kick);
    atomic_store(&lane->kicked, false);
    serve_news(lane);
}

static struct transport *next_transport(void *arg)
{
    struct lane *first = arg;
    static _Thread_local unsigned turn;
    struct engine *engine = first->engine;
    return engine->lanes[turn++ % engine->lane_count]->transport;
}

int lane_open(struct engine *engine, unsigned index, struct lane **lane)
{
    struct lane *l = calloc(1, sizeof *l);
    if (!l) {
        return -ENOMEM;
    }
    l->engine = engine;
    l->index = index;
    l->tick.due = tick;
    l->pace.due = serve_pace;
    l->kick.run = kicked;
    int status = loop_open(&l->loop);
    if (status < 0) {
        goto free_lane;
    }
    struct transport_config config = {.congestion = engine->config.congestion,
                                      .lower_effort = engine->config.seed_idle,
                                      .upload = &engine->upload,
                                      .download = &engine->download};
    status = engine->transport->open(l->loop, &config, &lane_events, l, &l->transport);
    if (status < 0) {
        goto close_loop;
    }
    if (index == 0) {
        status = engine->transport->listen(l->transport, engine->config.listen, engine->address);
        if (status < 0) {
            goto close_transport;
        }
        engine->transport->share(l->transport, next_transport, l);
    }
    *lane = l;
    return 0;

close_transport:
    engine->transport->close(l->transport);
close_loop:
    loop_close(l->loop);
free_lane:
    free(l);
    return status;
}

static void *lane_main(void *arg)
{
    struct lane *lane = arg;
    char name[16];
    snprintf(name, sizeof name, "p2pfs-lane%u", lane->index);
    pthread_setname_np(pthread_self(), name);
    /* sendfile raises SIGPIPE on a link that the peer has closed; its error is enough. */
    sigset_t pipe;
    sigemptyset(&pipe);
    sigaddset(&pipe, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &pipe, NULL);
    (void)loop_timer_set(lane->loop, &lane->tick, LANE_TICK_MS * 1000000ull);
    lane->trimmed_ns = loop_now_ns(lane->loop);
    loop_run(lane->loop);
    /* Still on this thread, so that links and fetches end where they lived. */
    loop_timer_clear(lane->loop, &lane->tick);
    loop_timer_clear(lane->loop, &lane->pace);
    pull_close_all(lane);
    supplier_close_all(lane);
    serve_close_all(lane);
    return NULL;
}

int lane_start(struct lane *lane)
{
    return -pthread_create(&lane->thread, NULL, lane_main, lane);
}

void lane_stop(struct lane *lane)
{
    if (lane && lane->thread) {
        loop_stop(lane->loop);
        pthread_join(lane->thread, NULL);
        lane->thread = 0;
    }
}

void lane_close(struct lane *lane)
{
    if (!lane) {
        return;
    }
    lane_stop(lane);
    if (lane->fast) {
        lane->fast->ops->close(lane->fast);
    }
    lane->engine->transport->close(lane->transport);
    loop_close(lane->loop);
    free(lane);
}

/* ---- posting ---- */

struct post {
    struct loop_task task;
    struct lane *lane;
    void (*fn)(struct lane *lane, void *arg);
    void *arg;
};

static void post_run(struct loop_task *task)
{
    struct post post = *util_container(task, struct post, task);
    free(util_container(task, struct post, task));
    post.fn(post.lane, post.arg);
}

void lane_post(struct lane *lane, void (*fn)(struct lane *lane, void *arg), void *arg)
{
    struct post *post = malloc(sizeof *post);
    if (!post) {
        log_error("out of memory for a task of %zu bytes", sizeof *post);
        abort();
    }
    *post = (struct post){.task.run = post_run, .lane = lane, .fn = fn, .arg = arg};
    loop_post(lane->loop, &post->task);
}

void lane_post_all(struct engine *engine, void (*fn)(struct lane *lane, void *replica),
                   struct replica *replica)
{
    for (unsigned i = 0; i < engine->lane_count; i++) {
        replica_get(replica);
        lane_post(engine->lanes[i], fn, replica);
    }
}

void lane_kick_all(struct engine *engine)
{
    for (unsigned i = 0; i < engine->lane_count; i++) {
        struct lane *lane = engine->lanes[i];
        if (!atomic_exchange(&lane->kicked, true)) {
            loop_post(lane->loop, &lane->kick);
        }
    }
}

/* ---- transport events: accepted links serve, ours ask ---- */

static void on_accepted(void *arg, struct link *link)
{
    serve_accepted(arg, link);
}

static void on_message(struct link *link, const void *message, size_t length)
{
    if (link->outgoing) {
        supplier_message(link, message, length);
    } else {
        serve_message(link, message, length);
    }
}

static void on_writable(struct link *link)
{
    if (link->outgoing) {
        supplier_writable(link);
    } else {
        serve_writable(link);
    }
}

static void on_down(struct link *link, int error, const char *reason)
{
    if (link->outgoing) {
        supplier_down(link, error, reason);
    } else {
        serve_down(link, error, reason);
    }
}

const struct transport_events lane_events = {
    .accepted = on_accepted,
    .connected = supplier_connected,
    .message = on_message,
    .fetch_landed = supplier_fetch_landed,
    .fetch_done = supplier_fetch_done,
    .exposed_sent = serve_exposed_sent,
    .writable = on_writable,
    .down = on_down,
};
