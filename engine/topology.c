#include "engine/topology.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <ifaddrs.h>
#include <limits.h>
#include <net/if.h>
#include <netinet/in.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "meta/base/log.h"
#include "meta/base/util.h"

#define GIDS_MAX 256

// -- Reading sysfs --------------------------------------------------------------------------------

/* The first line of a file, without its end. False: there is none (sysfs refuses to show an empty place of a table). */
static bool line_read(char *out, size_t size, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static bool line_read(char *out, size_t size, const char *format, ...)
{
    char path[PATH_MAX];
    va_list args;
    va_start(args, format);
    int length = vsnprintf(path, sizeof(path), format, args);
    va_end(args);
    FILE *file = length < (int)sizeof(path) ? fopen(path, "re") : NULL;
    bool read = file && fgets(out, (int)size, file);
    if (file)
        fclose(file);
    if (read)
        out[strcspn(out, "\n")] = '\0';
    return read;
}

/* "fe80:0000:...": 8 groups, as sysfs prints them. False: malformed, or the empty place of a table. */
static bool gid_parse(const char *text, struct in6_addr *out)
{
    static const struct in6_addr none;
    return inet_pton(AF_INET6, text, out) == 1 && memcmp(out, &none, sizeof(none)) != 0;
}

static void gid_print(const struct in6_addr *gid, char out[64])
{
    if (IN6_IS_ADDR_V4MAPPED(gid))
        inet_ntop(AF_INET, gid->s6_addr + 12, out, 64);
    else
        inet_ntop(AF_INET6, gid, out, 64);
}

/* How well an address of a RoCE port suits; 0: not at all. */
static unsigned gid_merit(const struct in6_addr *gid, bool v2)
{
    if (IN6_IS_ADDR_LINKLOCAL(gid))
        return 0; // it would need an interface's name on the other side
    return 1 + (IN6_IS_ADDR_V4MAPPED(gid) ? 1 : 0) + (v2 ? 2 : 0);
}

static void gids_read(const char *port, const struct topology_wish *wish,
                      struct topology_device *device)
{
    unsigned best = 0;
    for (int i = 0; i < GIDS_MAX; i++) {
        char text[64], type[32] = "", address[64];
        struct in6_addr gid;
        if (!line_read(text, sizeof(text), "%s/gids/%d", port, i))
            break; // the table's end
        if (!gid_parse(text, &gid))
            continue;
        gid_print(&gid, address);
        bool listens = wish->host && strcmp(wish->host, address) == 0;
        device->listens |= listens;
        if (wish->gid_index >= 0 && i != wish->gid_index)
            continue;
        line_read(type, sizeof(type), "%s/gid_attrs/types/%d", port, i);
        bool v2 = strcmp(type, "RoCE v2") == 0;
        unsigned merit = gid_merit(&gid, v2);
        if (merit == 0 || merit + 8 * listens <= best)
            continue;
        best = merit + 8 * listens;
        device->gid_index = i;
        device->roce_v2 = v2;
        memcpy(device->address, address, sizeof(address));
    }
}

/* InfiniBand's GIDs are no addresses: librdmacm knows a port by that of its interface (IPoIB). */
static void interface_read(const char *root, const struct topology_wish *wish,
                           struct topology_device *device)
{
    char path[PATH_MAX], name[64] = "", text[16];
    snprintf(path, sizeof(path), "%s/device/net", root);
    DIR *dir = opendir(path);
    for (struct dirent *entry; dir && (entry = readdir(dir));) {
        if (entry->d_name[0] == '.')
            continue;
        bool ours = line_read(text, sizeof(text), "%s/%s/dev_port", path, entry->d_name) &&
                    strtoul(text, NULL, 10) + 1 == device->port;
        if (ours || !name[0])
            snprintf(name, sizeof(name), "%.63s", entry->d_name);
    }
    if (dir)
        closedir(dir);
    struct ifaddrs *all = NULL;
    if (!name[0] || getifaddrs(&all) != 0)
        return;
    for (struct ifaddrs *one = all; one && !device->address[0]; one = one->ifa_next)
        if (one->ifa_addr && one->ifa_addr->sa_family == AF_INET &&
            strcmp(one->ifa_name, name) == 0)
            inet_ntop(AF_INET, &((struct sockaddr_in *)one->ifa_addr)->sin_addr, device->address,
                      sizeof(device->address));
    freeifaddrs(all);
    device->listens = wish->host && strcmp(wish->host, device->address) == 0;
}

static bool port_active(const char *root, unsigned port)
{
    char text[32];
    return line_read(text, sizeof(text), "%s/ports/%u/state", root, port) &&
           strtoul(text, NULL, 10) == 4; // IB_PORT_ACTIVE
}

/* The one wished for; else the first that is up; else 1. */
static unsigned port_choose(const char *root, unsigned wished)
{
    char text[32];
    unsigned port = wished > 0 ? wished : 1;
    if (wished > 0)
        return port;
    while (!port_active(root, port) &&
           line_read(text, sizeof(text), "%s/ports/%u/state", root, port))
        port++;
    return port_active(root, port) ? port : 1;
}

static void device_read(const char *root, const struct topology_wish *wish,
                        struct topology_device *device)
{
    char text[64], path[PATH_MAX], link[PATH_MAX];
    device->numa = line_read(text, sizeof(text), "%s/device/numa_node", root) ? atoi(text) : -1;
    device->gid_index = -1;
    device->port = port_choose(root, wish->port);
    device->active = port_active(root, device->port);
    snprintf(path, sizeof(path), "%s/device", root);
    const char *at = realpath(path, link) ? strstr(link, "/devices/") : NULL;
    if (at)
        snprintf(device->pci, sizeof(device->pci), "%.255s", at + strlen("/devices/"));
    snprintf(path, sizeof(path), "%s/ports/%u", root, device->port);
    device->infiniband =
        line_read(text, sizeof(text), "%s/link_layer", path) && strcmp(text, "InfiniBand") == 0;
    if (device->infiniband)
        interface_read(root, wish, device);
    else
        gids_read(path, wish, device);
}

static int device_order(const void *a, const void *b)
{
    const struct topology_device *x = a, *y = b;
    if (x->numa != y->numa)
        return x->numa < y->numa ? -1 : 1;
    int pci = strcmp(x->pci, y->pci);
    return pci ? pci : strverscmp(x->name, y->name);
}

int topology_read(const char *sysfs, const struct topology_wish *wish, struct topology *out)
{
    char path[PATH_MAX / 4], root[PATH_MAX / 2];
    out->count = 0;
    snprintf(path, sizeof(path), "%s/class/infiniband", sysfs);
    DIR *dir = opendir(path);
    if (!dir)
        return errno == ENOENT ? 0 : -errno;
    for (struct dirent *entry; (entry = readdir(dir)) && out->count < TOPOLOGY_DEVICES_MAX;) {
        if (entry->d_name[0] == '.' || strlen(entry->d_name) > TOPOLOGY_NAME_MAX)
            continue;
        struct topology_device *device = &out->list[out->count++];
        *device = (struct topology_device){0};
        snprintf(device->name, sizeof(device->name), "%.*s", TOPOLOGY_NAME_MAX, entry->d_name);
        snprintf(root, sizeof(root), "%s/%s", path, device->name);
        device_read(root, wish, device);
    }
    closedir(dir);
    qsort(out->list, out->count, sizeof(out->list[0]), device_order);
    return 0;
}

// -- Choosing -------------------------------------------------------------------------------------

struct choice {
    const struct topology *topology;
    const struct topology_wish *wish;
    struct transport_rail *rails;
    unsigned count;
    char *why;
};

static void rail_add(struct choice *c, const char *address, bool standby)
{
    bool v6 = strchr(address, ':') != NULL;
    char text[TRANSPORT_NAME_MAX + 1];
    snprintf(text, sizeof(text), "%s%.64s%s:0", v6 ? "[" : "", address, v6 ? "]" : "");
    for (unsigned i = 0; i < c->count; i++)
        if (strcmp(c->rails[i].address, text) == 0)
            return;
    if (c->count == TOPOLOGY_RAILS_MAX) {
        log_warn("RDMA: %s is not used: a mount uses %d adapters", address, TOPOLOGY_RAILS_MAX);
        return;
    }
    struct transport_rail *rail = &c->rails[c->count++];
    memcpy(rail->address, text, sizeof(text));
    rail->standby = standby;
}

static int device_add(struct choice *c, const char *name, bool standby)
{
    const struct topology *t = c->topology;
    const struct topology_device *device = NULL;
    for (unsigned i = 0; i < t->count; i++)
        if (strcmp(t->list[i].name, name) == 0)
            device = &t->list[i];
    if (!device) {
        int used = snprintf(c->why, TOPOLOGY_WHY_MAX,
                            "%s: this machine has no such RDMA device; it has", name);
        for (unsigned i = 0; i < t->count && used < TOPOLOGY_WHY_MAX; i++)
            used +=
                snprintf(c->why + used, (size_t)(TOPOLOGY_WHY_MAX - used), " %s", t->list[i].name);
        if (t->count == 0 && used < TOPOLOGY_WHY_MAX)
            snprintf(c->why + used, (size_t)(TOPOLOGY_WHY_MAX - used), " none");
        return -ENODEV;
    }
    if (!device->address[0] && c->wish->gid_index >= 0 && !device->infiniband)
        snprintf(c->why, TOPOLOGY_WHY_MAX,
                 "gid_index=%d: %s port %u has no address there (show_gids lists them)",
                 c->wish->gid_index, name, device->port);
    else if (!device->address[0])
        snprintf(c->why, TOPOLOGY_WHY_MAX,
                 "%s: port %u has no address; give its network interface one", name, device->port);
    if (!device->address[0])
        return -ENODEV;
    if (!device->active)
        log_warn("RDMA: port %u of %s is down; it is used when it is up", device->port, name);
    rail_add(c, device->address, standby);
    return 0;
}

static int wished_add(struct choice *c)
{
    char name[TOPOLOGY_NAME_MAX + 1];
    for (const char *at = c->wish->devices; *at;) {
        size_t length = strcspn(at, ",");
        snprintf(name, sizeof(name), "%.*s",
                 (int)(length < TOPOLOGY_NAME_MAX ? length : TOPOLOGY_NAME_MAX), at);
        int r = length > 0 ? device_add(c, name, false) : 0;
        if (r < 0)
            return r;
        at += length + (at[length] == ',');
    }
    return 0;
}

static int matrix_add(struct choice *c)
{
    struct topology_matrix *matrix = malloc(sizeof(*matrix));
    if (!matrix)
        return -ENOMEM;
    int r = topology_matrix_parse(c->wish->matrix, matrix, c->why);
    for (unsigned i = 0; r == 0 && i < matrix->preferred.count; i++)
        r = device_add(c, matrix->preferred.list[i], false);
    for (unsigned i = 0; r == 0 && i < matrix->standby.count; i++)
        r = device_add(c, matrix->standby.list[i], true);
    free(matrix);
    return r;
}

/* The adapter that has the address of listen= carries the messages. */
static void listening_first(struct choice *c)
{
    for (unsigned i = 1; c->wish->host && i < c->count; i++) {
        const char *at = c->rails[i].address + (c->rails[i].address[0] == '[');
        size_t length = strlen(c->wish->host);
        if (strncmp(at, c->wish->host, length) != 0 || (at[length] != ':' && at[length] != ']'))
            continue;
        struct transport_rail first = c->rails[i];
        memmove(c->rails + 1, c->rails, i * sizeof(first));
        c->rails[0] = first;
        return;
    }
}

int topology_choose(const struct topology *topology, const struct topology_wish *wish,
                    struct transport_rail rails[TOPOLOGY_RAILS_MAX], unsigned *count,
                    char why[TOPOLOGY_WHY_MAX])
{
    struct choice c = {.topology = topology, .wish = wish, .rails = rails, .why = why};
    int r = 0;
    why[0] = '\0';
    if (wish->devices) {
        r = wished_add(&c);
    } else if (wish->matrix) {
        r = matrix_add(&c);
    } else {
        for (unsigned i = 0; r == 0 && i < topology->count; i++)
            if (topology->list[i].active && topology->list[i].address[0] &&
                (!wish->host || topology->list[i].listens))
                rail_add(&c, topology->list[i].address, false);
    }
    listening_first(&c);
    *count = r == 0 ? c.count : 0;
    return r;
}

int topology_rails(const char *listen, const struct topology_wish *wish,
                   struct transport_rail rails[TOPOLOGY_RAILS_MAX], unsigned *count,
                   char why[TOPOLOGY_WHY_MAX])
{
    bool v6 = listen[0] == '[';
    bool any = strncmp(listen, "0.0.0.0:", 8) == 0 || strncmp(listen, "[::]:", 5) == 0;
    char host[TRANSPORT_NAME_MAX + 1];
    snprintf(host, sizeof(host), "%.*s", (int)(strrchr(listen, ':') - listen - 2 * v6),
             listen + v6);
    struct topology_wish mine = *wish;
    mine.host = any ? NULL : host;
    *count = 0;
    struct topology *topology = malloc(sizeof(*topology));
    int status = topology ? topology_read("/sys", &mine, topology) : -ENOMEM;
    if (status == 0)
        status = topology_choose(topology, &mine, rails, count, why);
    free(topology);
    if (status == 0 && *count == 0 && !any) {
        snprintf(rails[0].address, sizeof(rails[0].address), "%s", listen);
        *count = 1;
    }
    return status;
}

// -- Memory ---------------------------------------------------------------------------------------

/* Whether one of them is this address, or any. */
static bool address_among(const struct sockaddr *address, const struct transport_rail *rails,
                          unsigned count)
{
    char host[INET6_ADDRSTRLEN], text[INET6_ADDRSTRLEN + 4];
    bool v6 = address->sa_family == AF_INET6;
    inet_ntop(address->sa_family,
              v6 ? (const void *)&((const struct sockaddr_in6 *)address)->sin6_addr
                 : (const void *)&((const struct sockaddr_in *)address)->sin_addr,
              host, sizeof(host));
    snprintf(text, sizeof(text), v6 ? "[%s]:" : "%s:", host);
    for (unsigned i = 0; i < count; i++)
        if (strncmp(rails[i].address, text, strlen(text)) == 0 ||
            strncmp(rails[i].address, "0.0.0.0:", 8) == 0 ||
            strncmp(rails[i].address, "[::]:", 5) == 0)
            return true;
    return false;
}

int topology_node(const char *sysfs, const struct transport_rail *rails, unsigned count)
{
    char text[64];
    struct ifaddrs *all = NULL;
    if (!line_read(text, sizeof(text), "%s/devices/system/node/online", sysfs) ||
        !strpbrk(text, "-,") || getifaddrs(&all) != 0)
        return -1;
    int node = -1;
    for (struct ifaddrs *one = all; one; one = one->ifa_next) {
        int family = one->ifa_addr ? one->ifa_addr->sa_family : AF_UNSPEC;
        if ((family != AF_INET && family != AF_INET6) || !(one->ifa_flags & IFF_UP) ||
            !address_among(one->ifa_addr, rails, count) ||
            !line_read(text, sizeof(text), "%s/class/net/%s/device/numa_node", sysfs,
                       one->ifa_name) ||
            text[0] == '-')
            continue;
        int its = atoi(text);
        if (node >= 0 && its != node) {
            node = -1;
            break;
        }
        node = its;
    }
    freeifaddrs(all);
    return node;
}
