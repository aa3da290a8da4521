/* Address: the defaults of where a node listens, what it tells its peers, and what it is called. */
#ifndef P2PFS_FS_ADDRESS_H
#define P2PFS_FS_ADDRESS_H

#include <stdbool.h>

#include "fs/options.h"
#include "meta/model.h"

/* Fills in listen and node where they were not given. A node that is named after its port gets a
 * port now, so that its name is known before it listens. local: everybody is on this machine. 0,
 * or negative errno. */
int address_defaults(struct options *options, bool local);
/* What peers are told: advertise=, or where the engine listens; for "any address", one of this
 * machine's. */
int address_advertised(const struct options *options, const char *bound,
                       char out[MODEL_ADDRESS_MAX + 1]);
/* The machine's boot and this pid namespace, in words. */
void address_host(char out[65]);

#endif
