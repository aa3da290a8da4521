/* House: what one mount consists of, built by main in this order and unbuilt in reverse. Handlers borrow it. */
#ifndef P2PFS_FS_HOUSE_H
#define P2PFS_FS_HOUSE_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/engine.h"
#include "fs/options.h"
#include "meta/catalog.h"

struct inodes;
struct control;
struct fuse_session;

struct house {
    struct options options;
    struct catalog *catalog;
    struct engine *engine;
    struct inodes *inodes;
    struct control *control;
    struct fuse_session *session;
    char *mountpoint; /* absolute */
    uint64_t started_ms;
    uint32_t uid; /* of the mounting user: may use the control file besides root */
};

#endif
