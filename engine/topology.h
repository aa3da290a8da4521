/* Topology: the RDMA adapters of this machine as sysfs shows them, and which of them carry shards.
 *
 * Pure but for reading files below `sysfs` ("/sys") and, for InfiniBand, the addresses of network interfaces. Any
 * thread. */
#ifndef P2PFS_ENGINE_TOPOLOGY_H
#define P2PFS_ENGINE_TOPOLOGY_H

#include "engine/transport.h"

#define TOPOLOGY_NAME_MAX    63
#define TOPOLOGY_DEVICES_MAX 32
#define TOPOLOGY_RAILS_MAX   8 /* what a link can have */
#define TOPOLOGY_WHY_MAX     320

struct topology_device {
    char name[TOPOLOGY_NAME_MAX + 1];
    int numa;      /* -1: unknown */
    char pci[256]; /* its path below /sys/devices: near ones share a beginning; "": virtual */
    unsigned port;
    bool active;
    bool infiniband;
    char address[64]; /* that connections of it come from; "": none */
    int gid_index;    /* of that address; -1: it is an interface's (InfiniBand) */
    bool roce_v2;
    bool listens; /* it has the host of the wish */
};

/* In the order of NUMA node, place in the PCI tree and name: on equal machines the same. */
struct topology {
    struct topology_device list[TOPOLOGY_DEVICES_MAX];
    unsigned count;
};

struct topology_names {
    char list[TOPOLOGY_DEVICES_MAX][TOPOLOGY_NAME_MAX + 1];
    unsigned count;
};
/* Of Mooncake's {"cpu:0": [["mlx5_0"], ["mlx5_1"]], ...}: which adapters are to be used for memory of this machine, and
 * which while none of those works. Rows of CPUs and "*" count together, since shards have no place of their own; rows of
 * other memory ("cuda:0") count where there are no others. */
struct topology_matrix {
    struct topology_names preferred, standby;
};
/* 0; -EINVAL, and `why` says at which line and column, and what is wrong. */
int topology_matrix_parse(const char *text, struct topology_matrix *out,
                          char why[TOPOLOGY_WHY_MAX]);
/* `given`: the matrix itself, or the name of a file that holds it. *text is the matrix, and good; the caller frees it.
 * -EINVAL with `why`; -ENOMEM. */
int topology_matrix_load(const char *given, char **text, char why[TOPOLOGY_WHY_MAX]);

/* What the user asked for. Zero it first, but for gid_index. */
struct topology_wish {
    const char *devices; /* NAME[,NAME], or NULL */
    const char *matrix;  /* as text, or NULL */
    int gid_index;       /* -1: RoCE v2 before v1, IPv4 before IPv6 */
    unsigned port;       /* 0: the first one that is up */
    const char *host;    /* where this node listens; NULL: everywhere */
};

/* 0, also where there is no RDMA. */
int topology_read(const char *sysfs, const struct topology_wish *wish, struct topology *out);
/* The adapters to use: those wished for; else those that are up, when the node listens everywhere; else the one that has
 * its host. *count 0: none was found, and none asked for. -ENODEV, -EINVAL: `why` names what is wrong. */
int topology_choose(const struct topology *topology, const struct topology_wish *wish,
                    struct transport_rail rails[TOPOLOGY_RAILS_MAX], unsigned *count,
                    char why[TOPOLOGY_WHY_MAX]);

/* Both, for this machine and a node that listens on `listen` (HOST:PORT): without wish and device, the adapter that has
 * that address, should there be one. wish->host does not count. */
int topology_rails(const char *listen, const struct topology_wish *wish,
                   struct transport_rail rails[TOPOLOGY_RAILS_MAX], unsigned *count,
                   char why[TOPOLOGY_WHY_MAX]);
/* The NUMA node that the network interfaces with these addresses hang on ("any address": all that are up), -1: there is
 * only one node, they are on several, or it is not known. */
int topology_node(const char *sysfs, const struct transport_rail *rails, unsigned count);

#endif
