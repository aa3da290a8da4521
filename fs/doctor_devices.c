#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fs/doctor.h"

/* Bytes of headers that RoCE v2 puts around a packet's payload, over IPv6: IP 40, UDP 8, BTH 12, RETH 16, ICRC 4. */
#define ROCE_HEADERS 80
#define DEVICES_PATH 512

struct port {
    const char *sys, *device;
    char number[16];
    char state[32], layer[32], rate[64];
    char gid[64], netdev[64]; /* RoCE v2 with an address of its own; "": none */
    unsigned index;
};

static void attribute(const struct port *port, const char *name, char *out, size_t size)
{
    char path[DEVICES_PATH];
    snprintf(path, sizeof(path), "%s/class/infiniband/%s/ports/%s/%s", port->sys, port->device,
             port->number, name);
    doctor_line(path, out, size);
}

static bool gid_empty(const char *gid)
{
    return gid[strspn(gid, "0:")] == '\0';
}

/* The first GID that routed RoCE can use; any of its network device's names otherwise. */
static void gid_find(struct port *port)
{
    char gid[64], type[32], netdev[64], name[64];
    for (unsigned i = 0; i < 256 && !port->gid[0]; i++) {
        snprintf(name, sizeof(name), "gids/%u", i);
        attribute(port, name, gid, sizeof(gid));
        if (!gid[0])
            return;
        snprintf(name, sizeof(name), "gid_attrs/types/%u", i);
        attribute(port, name, type, sizeof(type));
        snprintf(name, sizeof(name), "gid_attrs/ndevs/%u", i);
        attribute(port, name, netdev, sizeof(netdev));
        if (netdev[0])
            snprintf(port->netdev, sizeof(port->netdev), "%s", netdev);
        if (!gid_empty(gid) && strncmp(gid, "fe80:", 5) != 0 && strcmp(type, "RoCE v2") == 0) {
            snprintf(port->gid, sizeof(port->gid), "%s", gid);
            port->index = i;
        }
    }
}

static unsigned netdev_mtu(const struct port *port)
{
    char path[DEVICES_PATH], line[32];
    snprintf(path, sizeof(path), "%s/class/net/%s/mtu", port->sys, port->netdev);
    doctor_line(path, line, sizeof(line));
    return (unsigned)strtoul(line, NULL, 10);
}

/* What a packet of RDMA carries where the network's frames carry `mtu` bytes. */
static unsigned payload(unsigned mtu)
{
    unsigned bytes = 4096;
    while (bytes > 256 && bytes + ROCE_HEADERS > mtu)
        bytes /= 2;
    return bytes;
}

static void port_ethernet(struct doctor *doctor, const struct port *port, const char *what)
{
    char remedy[256];
    unsigned mtu = netdev_mtu(port);
    if (!port->gid[0]) {
        snprintf(remedy, sizeof(remedy), "ip addr add ADDRESS/PREFIX dev %s",
                 port->netdev[0] ? port->netdev : "its network device");
        doctor_find(doctor, WARN, what, remedy,
                    "ACTIVE, but it has no address: RoCE v2 has no GID to use");
        return;
    }
    bool small = mtu > 0 && payload(mtu) < 4096;
    snprintf(remedy, sizeof(remedy), "ip link set %s mtu 9000, if all switches between nodes do",
             port->netdev);
    doctor_find(doctor, small ? WARN : GOOD, what, small ? remedy : NULL,
                "ACTIVE, Ethernet, %s, RoCE v2 GID %u (%s) of %s, MTU %u: packets of %u bytes",
                port->rate, port->index, port->gid, port->netdev, mtu, payload(mtu));
}

static void port_check(struct doctor *doctor, struct port *port)
{
    char what[64], remedy[256];
    attribute(port, "state", port->state, sizeof(port->state));
    attribute(port, "link_layer", port->layer, sizeof(port->layer));
    attribute(port, "rate", port->rate, sizeof(port->rate));
    snprintf(what, sizeof(what), "%s/%s", port->device, port->number);
    const char *state = strchr(port->state, ' ') ? strchr(port->state, ' ') + 1 : port->state;
    bool ethernet = strcmp(port->layer, "Ethernet") == 0;
    gid_find(port);
    if (strcmp(state, "ACTIVE") == 0 && ethernet) {
        port_ethernet(doctor, port, what);
    } else if (strcmp(state, "ACTIVE") == 0) {
        doctor_find(doctor, GOOD, what, NULL, "ACTIVE, %s, %s", port->layer, port->rate);
    } else if (ethernet) {
        snprintf(remedy, sizeof(remedy), "ip link set %s up; else look at cable and switch",
                 port->netdev[0] ? port->netdev : "its network device");
        doctor_find(doctor, WARN, what, remedy, "%s: nothing travels over it", state);
    } else {
        doctor_find(doctor, WARN, what,
                    strcmp(state, "INIT") == 0 ? "start a subnet manager (opensm) in the fabric"
                                               : "look at cable and switch",
                    "%s: nothing travels over it", state);
    }
}

static int named(const struct dirent *entry)
{
    return entry->d_name[0] != '.';
}

/* Runs `one` for each name in a directory, in order; returns how many there are. */
static size_t each(const char *dir, void (*one)(const char *name, void *arg), void *arg)
{
    struct dirent **list = NULL;
    int count = scandir(dir, &list, named, alphasort);
    for (int i = 0; i < count; i++) {
        one(list[i]->d_name, arg);
        free(list[i]);
    }
    free(list);
    return count > 0 ? (size_t)count : 0;
}

struct look {
    struct doctor *doctor;
    const char *sys, *device;
    unsigned adapters;
};

static void look_port(const char *name, void *arg)
{
    struct look *look = arg;
    struct port port = {.sys = look->sys, .device = look->device};
    snprintf(port.number, sizeof(port.number), "%.15s", name);
    port_check(look->doctor, &port);
}

static void look_device(const char *name, void *arg)
{
    struct look look = *(struct look *)arg;
    char path[DEVICES_PATH];
    look.device = name;
    snprintf(path, sizeof(path), "%s/class/infiniband/%s/ports", look.sys, name);
    each(path, look_port, &look);
}

/* Network adapters of NVIDIA (Mellanox), each of which does RDMA. */
static void look_pci(const char *name, void *arg)
{
    struct look *look = arg;
    char path[DEVICES_PATH], vendor[16], class[16];
    snprintf(path, sizeof(path), "%s/bus/pci/devices/%s/vendor", look->sys, name);
    doctor_line(path, vendor, sizeof(vendor));
    snprintf(path, sizeof(path), "%s/bus/pci/devices/%s/class", look->sys, name);
    doctor_line(path, class, sizeof(class));
    look->adapters += strcmp(vendor, "0x15b3") == 0 && strncmp(class, "0x02", 4) == 0;
}

size_t doctor_devices(struct doctor *doctor, const char *sys)
{
    struct look look = {.doctor = doctor, .sys = sys};
    char path[DEVICES_PATH];
    snprintf(path, sizeof(path), "%s/class/infiniband", sys);
    size_t count = each(path, look_device, &look);
    snprintf(path, sizeof(path), "%s/bus/pci/devices", sys);
    if (count == 0)
        each(path, look_pci, &look);
    if (look.adapters > 0)
        doctor_find(doctor, WARN, "RDMA modules", "modprobe mlx5_ib (or mlx4_ib)",
                    "%u adapters that can do RDMA, and no RDMA device", look.adapters);
    return count;
}
