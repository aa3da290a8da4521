/* Address: the defaults of where a node listens, what it tells its peers, and what it is called. */
#ifndef P2PFS_ENGINE_ADDRESS_H
#define P2PFS_ENGINE_ADDRESS_H

#include <stdbool.h>

#include "meta/model.h"

/* Fills in *listen_at and *node (malloc'd) where they are NULL. A node that is named after its port
 * gets a port now, so that its name is known before it listens. local: everybody is on this
 * machine. 0, or negative errno. */
int address_defaults(char **listen_at, char **node, bool local);
/* The same, and *advertise, for a node that may be called HOST:PORT: it listens there, on that host's own address when
 * that is loopback, else on every one. */
int address_of_node(char **node, bool local, char **listen_at, char **advertise);
/* What peers are told: `advertise`, or when that is NULL where the engine listens; for "any
 * address", one of this machine's. */
int address_advertised(const char *advertise, const char *bound, char out[MODEL_ADDRESS_MAX + 1]);
/* Whether it is "host:port" or "[v6]:port", or, with `portless`, one of them without the port. */
bool address_valid(const char *text, bool portless);
/* The machine's boot and this pid namespace, in words. */
void address_host(char out[65]);

#endif
