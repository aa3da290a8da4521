#include "engine/transport.h"

#include <string.h>

#include "meta/base/util.h"
#include "p2pfs_config.h"

static const struct transport_ops *const transports[] = {
    &transport_tcp,
#if P2PFS_HAVE_RDMA
    &transport_rdma,
#endif
    &transport_mem,
};

size_t transport_pieces(const struct iovec *pieces, size_t count, size_t at, size_t length,
                        struct iovec *out, size_t room)
{
    size_t used = 0;
    for (size_t i = 0; i < count && length > 0 && used < room; i++) {
        if (at >= pieces[i].iov_len) {
            at -= pieces[i].iov_len;
            continue;
        }
        size_t part = pieces[i].iov_len - at < length ? pieces[i].iov_len - at : length;
        out[used++] = (struct iovec){(uint8_t *)pieces[i].iov_base + at, part};
        length -= part;
        at = 0;
    }
    return used;
}

bool transport_same_host(const char *one, const char *other)
{
    const char *port = strrchr(one, ':');
    return port && strrchr(other, ':') - other == port - one &&
           strncmp(one, other, (size_t)(port - one)) == 0;
}

const struct transport_ops *transport_by_name(const char *name)
{
    for (size_t i = 0; i < util_count(transports); i++)
        if (strcmp(transports[i]->name, name) == 0)
            return transports[i];
    return NULL;
}
