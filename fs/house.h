/* House: what one mount consists of, built by main in this order and unbuilt in reverse.
 * Handlers borrow it. */
#ifndef P2PFS_FS_HOUSE_H
#define P2PFS_FS_HOUSE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "engine/engine.h"
#include "fs/options.h"
#include "meta/catalog.h"

struct inodes;
struct fresh_files;
struct parking;
struct holds;
struct through;
struct opened;
struct control;
struct exporter;
struct fuse_session;
struct work;

struct house {
    struct options options; /* with every default filled in */
    struct catalog *catalog;
    struct engine *engine;
    struct inodes *inodes;
    struct fresh_files *fresh; /* being written on this node */
    struct parking *parking;   /* requests that wait for bytes */
    struct holds *holds;       /* opens that do */
    struct through *through;   /* files that the kernel reads by itself */
    struct control *control;
    struct exporter *exporter; /* metrics over HTTP; or NULL */
    struct fuse_session *session;
    struct work *chores; /* what may wait for a local disk or for this very mount */
    /* Invalidations: they may wait for requests of this mount, so nothing else queues here. */
    struct work *notices;
    char *mountpoint; /* absolute */
    dev_t dev;        /* of the mount; 0 until it serves */
    uint64_t started_ms;
    uint32_t uid; /* of the mounting user: may use the control file besides root */

    /* Events of the catalog pass here: events_to and notices are cleared under the gate before
     * they are closed. */
    pthread_mutex_t gate;
    struct engine *events_to;

    pthread_mutex_t opened_lock;
    struct opened *opened; /* what the kernel has open; under opened_lock */

    void (*serving)(struct house *house); /* called once, when the mount answers; from a chore */
    int ready_fd;                         /* gets one byte then; -1: nobody waits */
};

#endif
