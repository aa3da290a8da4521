/* Crowd: who follows a version here, over all lanes: the peers that pull it from this node, and whom this node
 * therefore names to each other. Guarded by the replica's lock. */
#ifndef P2PFS_ENGINE_CROWD_H
#define P2PFS_ENGINE_CROWD_H

#include "meta/model.h"

struct crowd;

struct crowd_member {
    char node[MODEL_NODE_MAX + 1];
    uint64_t boot;
    unsigned links; /* sessions that follow */
};

/* A node follows a version once on each of its lanes; some of its links may be about to break. */
#define CROWD_LINKS_MAX 64
/* Once more; *crowd is made when NULL. 0, -ENOMEM, -EMFILE (it follows CROWD_LINKS_MAX times already). */
int crowd_join(struct crowd **crowd, const char *node, uint64_t boot);
void crowd_leave(struct crowd *crowd, const char *node, uint64_t boot);
size_t crowd_size(const struct crowd *crowd); /* NULL: 0 */
/* Up to `most` members but the one that is named, from a random place on; how many. */
size_t crowd_sample(const struct crowd *crowd, const char *but, uint64_t random,
                    const struct crowd_member **members, size_t most);
void crowd_free(struct crowd *crowd); /* NULL is harmless */

#endif
