#include "fs/hold.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "fs/closer.h"
#include "fs/parking.h"
#include "fs/read.h"
#include "fs/reply.h"
#include "fs/through.h"
#include "meta/base/util.h"

/* Bytes a second that programs get out of the page cache of an arriving file, as measured on two
 * cores: what arrives more slowly is better loaded while it arrives. `scripts/bench loaders` shows
 * both ways beside each other. */
#define HOLD_RATE   2600000000ull
#define HOLD_MOST   500000000ull /* ns; who opens a file may have other things to do meanwhile */
#define HOLD_LEAST  50000000ull  /* ns, however small the file: nobody notices */
#define HOLD_OPENED 256

/* Which processes have opened which arriving file, by a hash: one entry each, where the last to
 * come is the one that is known. Who has been forgotten is not held. */
struct holds {
    pthread_mutex_t lock;
    uint64_t opened[HOLD_OPENED]; /* under lock */
};

int holds_open(struct holds **out)
{
    struct holds *holds = calloc(1, sizeof(*holds));
    if (holds == NULL)
        return -ENOMEM;
    pthread_mutex_init(&holds->lock, NULL);
    *out = holds;
    return 0;
}

void holds_close(struct holds *holds)
{
    if (holds == NULL)
        return;
    pthread_mutex_destroy(&holds->lock);
    free(holds);
}

/* Whether the process has opened this version before. */
static bool opens_again(struct holds *holds, const struct model_id *version, pid_t process)
{
    uint64_t key;
    memcpy(&key, version->bytes, sizeof(key));
    key ^= (uint64_t)process * 0x9e3779b97f4a7c15ull; /* 2^64 / golden ratio: spreads neighbours */
    uint64_t *place = &holds->opened[key >> 56];
    pthread_mutex_lock(&holds->lock);
    bool again = *place == key;
    *place = key;
    pthread_mutex_unlock(&holds->lock);
    return again;
}

static bool is_through(struct house *house)
{
    struct through_status status;
    through_status(house->through, &status);
    return status.enabled;
}

static void held(const struct parked *parked, int status)
{
    struct fuse_file_info fi = parked->fi;
    if (status == 0 || parked->waiter.by_ns != 0) { /* auto: what is not here is streamed */
        read_opened(parked->req, parked->house, parked->handle, &fi);
        return;
    }
    read_handle_free(parked->house, parked->handle, parked->req);
    reply_status(parked->req, status);
}

bool hold_open(fuse_req_t req, struct house *house, struct handle *handle,
               const struct fuse_file_info *fi)
{
    enum options_open how = house->options.open;
    if (how == OPTIONS_OPEN_STREAM || handle->draft || replica_here(handle->replica, 0, UINT64_MAX))
        return false;
    uint64_t size = replica_size(handle->replica), by_ns = 0;
    if (how == OPTIONS_OPEN_AUTO) {
        pid_t process = closer_process(fuse_req_ctx(req)->pid);
        bool again =
            process != 0 && opens_again(house->holds, replica_version(handle->replica), process);
        if (!again || house->options.fetch != OPTIONS_FETCH_WHOLE ||
            !replica_here(handle->replica, 0, 1) || !is_through(house))
            return false;
        uint64_t worth = (uint64_t)((double)size / HOLD_RATE * 1e9);
        worth = worth < HOLD_LEAST ? HOLD_LEAST : worth;
        by_ns = util_now_ns() + (worth < HOLD_MOST ? worth : HOLD_MOST);
    }
    handle->held = true;
    parking_wait(&(struct parked){.house = house,
                                  .handle = handle,
                                  .req = req,
                                  .length = size,
                                  .fi = *fi,
                                  .waiter = {.patient = true, .by_ns = by_ns},
                                  .answer = held});
    return true;
}
