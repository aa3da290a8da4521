#include "engine/transport.h"

#include <string.h>

#include "meta/base/util.h"
#include "p2pfs_config.h"

static const struct transport_ops *const transports[] = {
    &transport_tcp,
    &transport_mem,
};

const struct transport_ops *transport_by_name(const char *name)
{
    for (size_t i = 0; i < util_count(transports); i++)
        if (strcmp(transports[i]->name, name) == 0)
            return transports[i];
    return NULL;
}
