/* Parking: requests of the kernel that wait for bytes of a registered file, each until they are here, the pull fails, a
 * signal comes for the caller, or the mount ends. No worker waits. Any thread. */
#ifndef P2PFS_FS_PARKING_H
#define P2PFS_FS_PARKING_H

#include <fuse_lowlevel.h>
#include <pthread.h>

#include "fs/house.h"

struct parking;
struct handle;

int parking_open(struct parking **parking);
/* The mount ends: answers every parked request with an error, and waits until none is left. */
void parking_clear(struct parking *parking);
void parking_close(struct parking *parking); /* NULL is harmless */

/* A request, and what it waits for. Constant, but for what is parking.c's own. */
struct parked {
    struct house *house;
    struct handle *handle;
    fuse_req_t req;
    uint64_t offset;
    size_t length;
    struct fuse_file_info fi;    /* of an open */
    struct engine_waiter waiter; /* with the caller's wishes: patient, peek, by_ns */
    /* Replies. 0: the bytes are here; -EINTR: a signal; -EIO: also when the mount ends; else as engine_read. May come
     * before parking_wait returns, and from libfuse's interrupt function. */
    void (*answer)(const struct parked *parked, int status);

    pthread_mutex_t lock;
    enum { PARKED_STARTING, PARKED_EARLY, PARKED_WAITING, PARKED_TAKEN } phase;
    bool interrupted;
    int status;
    struct parked *prev, *next; /* of the parking, under its lock */
};
/* Copies *wish; `answer` follows. */
void parking_wait(const struct parked *wish);

#endif
