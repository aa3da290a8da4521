/* Reach: whether somebody accepts connections at an address over a transport. */
#ifndef P2PFS_ENGINE_REACH_H
#define P2PFS_ENGINE_REACH_H

#include <stddef.h>
#include <stdint.h>

#include "engine/transport.h"

struct reach {
    const struct transport_ops *transport;
    const char *address;
    int status;       /* 0, or why not */
    char reason[128]; /* the same as a phrase */
};
/* Tries all at once and hangs up again. Blocking, for a little more than timeout_ms at most. */
void reach_all(struct reach *list, size_t count, uint32_t timeout_ms);

#endif
