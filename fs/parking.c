#include "fs/parking.h"

#include <errno.h>
#include <stdlib.h>
#include <utlist.h>

#include "fs/read.h"
#include "meta/base/util.h"

/* What waits. */
struct parking {
    pthread_mutex_t lock;
    pthread_cond_t empty;
    struct parked *requests;
};

/* A request is answered once, by whoever takes it out of its phase:
 *
 *   STARTING -> (engine: ready) EARLY -> answered by the handler, which has not come round yet
 *   STARTING -> WAITING -> answered by `ready`, or by an interrupt that takes the waiter back
 *
 * Phase, interrupted and status are guarded by its lock. The interrupt function runs with the
 * request's lock in libfuse held, so that lock comes before this one. */

int parking_open(struct parking **out)
{
    struct parking *parking = calloc(1, sizeof(*parking));
    if (parking == NULL)
        return -ENOMEM;
    pthread_mutex_init(&parking->lock, NULL);
    pthread_cond_init(&parking->empty, NULL);
    *out = parking;
    return 0;
}

void parking_close(struct parking *parking)
{
    if (parking == NULL)
        return;
    pthread_cond_destroy(&parking->empty);
    pthread_mutex_destroy(&parking->lock);
    free(parking);
}

static void parked_free(struct parked *parked)
{
    struct parking *parking = parked->house->parking;
    pthread_mutex_lock(&parking->lock);
    DL_DELETE(parking->requests, parked);
    if (parking->requests == NULL)
        pthread_cond_broadcast(&parking->empty);
    pthread_mutex_unlock(&parking->lock);
    pthread_mutex_destroy(&parked->lock);
    free(parked);
}

/* Taken by the caller, which nobody else answers for any more. */
static void parked_answer(struct parked *parked, int status)
{
    parked->answer(parked, status);
    parked_free(parked);
}

static void parked_ready(struct engine_waiter *waiter, int status)
{
    struct parked *parked = util_container(waiter, struct parked, waiter);
    pthread_mutex_lock(&parked->lock);
    bool early = parked->phase == PARKED_STARTING;
    parked->phase = early ? PARKED_EARLY : PARKED_TAKEN;
    parked->status = status;
    pthread_mutex_unlock(&parked->lock);
    if (early)
        return;
    fuse_req_interrupt_func(parked->req, NULL, NULL); /* returns when no interrupt is under way */
    parked_answer(parked, status);
}

/* True: the waiter was taken back, and the caller answers. Called with parked->lock. */
static bool parked_take_back(struct parked *parked)
{
    if (parked->phase != PARKED_WAITING ||
        !engine_read_cancel(parked->house->engine, &parked->waiter))
        return false;
    parked->phase = PARKED_TAKEN;
    return true;
}

static void parked_interrupt(fuse_req_t req, void *arg)
{
    struct parked *parked = arg;
    (void)req;
    pthread_mutex_lock(&parked->lock);
    parked->interrupted = true;
    bool taken = parked_take_back(parked);
    pthread_mutex_unlock(&parked->lock);
    if (taken)
        parked_answer(parked, -EINTR);
}

/* The engine has the waiter: lets interrupts reach it, and answers what was ready before that. */
static void parked_wait(struct parked *parked)
{
    fuse_req_interrupt_func(parked->req, parked_interrupt, parked);
    pthread_mutex_lock(&parked->lock);
    if (parked->phase == PARKED_EARLY) {
        pthread_mutex_unlock(&parked->lock);
        fuse_req_interrupt_func(parked->req, NULL, NULL);
        parked_answer(parked, parked->status);
        return;
    }
    parked->phase = PARKED_WAITING;
    bool taken = parked->interrupted && parked_take_back(parked);
    fuse_req_t req = parked->req;
    pthread_mutex_unlock(&parked->lock);
    if (taken) {
        fuse_req_interrupt_func(req, NULL, NULL);
        parked_answer(parked, -EINTR);
    }
}

void parking_wait(const struct parked *wish)
{
    struct house *house = wish->house;
    struct parked *parked = malloc(sizeof(*parked));
    if (parked == NULL) {
        wish->answer(wish, -ENOMEM);
        return;
    }
    *parked = *wish;
    parked->waiter.ready = parked_ready;
    pthread_mutex_init(&parked->lock, NULL);
    pthread_mutex_lock(&house->parking->lock);
    DL_APPEND(house->parking->requests, parked);
    pthread_mutex_unlock(&house->parking->lock);

    int rc = engine_read(house->engine, parked->handle->replica, parked->offset, parked->length,
                         &parked->waiter);
    if (rc == -EINPROGRESS)
        parked_wait(parked);
    else
        parked_answer(parked, rc);
}

void parking_clear(struct parking *parking)
{
    if (parking == NULL)
        return;
    pthread_mutex_lock(&parking->lock);
    struct parked *parked = parking->requests;
    while (parked != NULL) {
        pthread_mutex_lock(&parked->lock);
        bool taken = parked_take_back(parked);
        pthread_mutex_unlock(&parked->lock);
        if (taken) {
            pthread_mutex_unlock(&parking->lock);
            fuse_req_interrupt_func(parked->req, NULL, NULL);
            parked_answer(parked, -EIO);
            pthread_mutex_lock(&parking->lock);
            parked = parking->requests; /* the list has changed meanwhile */
        } else {
            parked = parked->next; /* it is being answered */
        }
    }
    while (parking->requests != NULL)
        pthread_cond_wait(&parking->empty, &parking->lock);
    pthread_mutex_unlock(&parking->lock);
}
