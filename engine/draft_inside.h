/* What draft.c and direct.c share. */
#ifndef P2PFS_ENGINE_DRAFT_INSIDE_H
#define P2PFS_ENGINE_DRAFT_INSIDE_H

#include <stdbool.h>

#include "engine/draft.h"

/* A leaf's digest is valid while `hashed` says so. Every write bumps `stamp` before and after it touches the leaf, so
 * a job that read bytes in the middle of a write sees another stamp at its end. Guarded by the replica's lock. */
struct leaf {
    uint32_t stamp;
    bool hashed;
};

struct draft {
    uint64_t size;     /* what readers see */
    uint64_t extended; /* the file's own size, ahead of it, so that huge pages fit */
    int failed;        /* the first error of a write; never registers */
    unsigned writing;  /* writes and hashing jobs under way */
    struct leaf *leaves;
    uint8_t *digests;  /* leaves x digest->size */
    size_t leaf_count; /* room */
    size_t queued;     /* leaves handed to jobs so far, from the start */
    uint32_t leaf_size;

    /* direct.c's: of a draft that the kernel writes by itself. */
    struct replica *replica;
    unsigned fills; /* storage_direct_fills when it began */
    bool making;    /* a job makes room */
    bool listed;    /* in the engine's list, under its lock, with what follows */
    struct draft *prev, *next;
};

/* Room for the leaves of so many bytes. Lock held. -ENOMEM. */
int draft_leaves_room(struct replica *replica, uint64_t size);

#endif
