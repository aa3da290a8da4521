#include "engine/address.h"

#include <arpa/inet.h>
#include <errno.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "meta/base/util.h"

#define ADDRESS_LOCAL "127.0.0.1:0"
#define ADDRESS_ANY   "0.0.0.0:0"

/* A port that is free now on the host of "host:0"; -errno. */
static int port_pick(const char *listen_at)
{
    char host[MODEL_ADDRESS_MAX + 1];
    snprintf(host, sizeof(host), "%s", listen_at);
    *strrchr(host, ':') = '\0';
    size_t length = strlen(host);
    bool bracketed = host[0] == '[' && host[length - 1] == ']';
    if (bracketed)
        host[length - 1] = '\0';
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *found = NULL;
    if (getaddrinfo(host + bracketed, "0", &hints, &found) != 0)
        return -EADDRNOTAVAIL;
    struct sockaddr_storage bound = {0};
    socklen_t size = sizeof(bound);
    util_autoclose int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int rc = fd < 0 || bind(fd, found->ai_addr, found->ai_addrlen) != 0 ||
                     getsockname(fd, (struct sockaddr *)&bound, &size) != 0
                 ? -errno
                 : 0;
    freeaddrinfo(found);
    if (rc != 0)
        return rc;
    return ntohs(bound.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&bound)->sin6_port
                                             : ((struct sockaddr_in *)&bound)->sin_port);
}

static int name_after_port(char **listen_at, char **node)
{
    char *colon = strrchr(*listen_at, ':');
    int port = atoi(colon + 1);
    if (port == 0) {
        port = port_pick(*listen_at);
        char *picked = NULL;
        if (port < 0)
            return port;
        if (asprintf(&picked, "%.*s:%d", (int)(colon - *listen_at), *listen_at, port) < 0)
            return -ENOMEM;
        free(*listen_at);
        *listen_at = picked;
    }
    char host[65] = "";
    if (gethostname(host, sizeof(host) - 1) != 0 || host[0] == '\0')
        strcpy(host, "node");
    for (char *at = host; *at != '\0'; at++)
        if (*at <= ' ' || *at > '~' || *at == '/' || *at == '%')
            *at = '-';
    return asprintf(node, "%s:%d", host, port) < 0 ? -ENOMEM : 0;
}

int address_defaults(char **listen_at, char **node, bool local)
{
    if (*listen_at == NULL)
        *listen_at = strdup(local ? ADDRESS_LOCAL : ADDRESS_ANY);
    if (*listen_at == NULL)
        return -ENOMEM;
    return *node == NULL ? name_after_port(listen_at, node) : 0;
}

int address_of_node(char **node, bool local, char **listen_at, char **advertise)
{
    if (!*node || *listen_at || !address_valid(*node, false))
        return address_defaults(listen_at, node, local);
    bool loopback = local || strncmp(*node, "127.", 4) == 0 ||
                    strncmp(*node, "localhost:", 10) == 0 || strncmp(*node, "[::1]", 5) == 0;
    const char *host = (*node)[0] == '[' ? loopback ? "[::1]" : "[::]"
                       : loopback        ? "127.0.0.1"
                                         : "0.0.0.0";
    if (asprintf(listen_at, "%s%s", host, strrchr(*node, ':')) < 0) {
        *listen_at = NULL;
        return -ENOMEM;
    }
    if (!*advertise && !local && !(*advertise = strdup(*node)))
        return -ENOMEM;
    return 0;
}

/* The first address of an interface that is up and no loopback; IPv4 before IPv6. */
static bool own_address(char *out, size_t size)
{
    struct ifaddrs *all = NULL;
    if (getifaddrs(&all) != 0)
        return false;
    static const int families[] = {AF_INET, AF_INET6};
    bool found = false;
    for (size_t i = 0; i < util_count(families) && !found; i++) {
        for (struct ifaddrs *one = all; one != NULL && !found; one = one->ifa_next) {
            if (one->ifa_addr == NULL || one->ifa_addr->sa_family != families[i] ||
                !(one->ifa_flags & IFF_UP) || (one->ifa_flags & IFF_LOOPBACK))
                continue;
            char text[INET6_ADDRSTRLEN];
            const struct in6_addr *six = &((struct sockaddr_in6 *)one->ifa_addr)->sin6_addr;
            const void *raw = &((struct sockaddr_in *)one->ifa_addr)->sin_addr;
            if (families[i] == AF_INET6)
                raw = six;
            if (families[i] == AF_INET6 && IN6_IS_ADDR_LINKLOCAL(six))
                continue;
            inet_ntop(families[i], raw, text, sizeof(text));
            snprintf(out, size, families[i] == AF_INET6 ? "[%s]" : "%s", text);
            found = true;
        }
    }
    freeifaddrs(all);
    return found;
}

bool address_valid(const char *text, bool portless)
{
    const char *colon = strrchr(text, ':');
    const char *bracket = strrchr(text, ']');
    if (strlen(text) > MODEL_ADDRESS_MAX || text[0] == '\0')
        return false;
    if (colon == NULL || (bracket != NULL && colon < bracket))
        return portless;
    char *end = NULL;
    errno = 0;
    unsigned long port = strtoul(colon + 1, &end, 10);
    return colon[1] >= '0' && colon[1] <= '9' && *end == '\0' && port <= UINT16_MAX &&
           colon != text;
}

int address_advertised(const char *advertise, const char *bound, char out[MODEL_ADDRESS_MAX + 1])
{
    const char *port = strrchr(bound, ':');
    char host[MODEL_ADDRESS_MAX + 1];
    if (strchr(bound, ',') != NULL) // of several adapters, which one name cannot stand for
        return snprintf(out, MODEL_ADDRESS_MAX + 1, "%s", bound) > MODEL_ADDRESS_MAX ? -ENAMETOOLONG
                                                                                     : 0;
    if (advertise != NULL) {
        bool whole = address_valid(advertise, false);
        int length = snprintf(out, MODEL_ADDRESS_MAX + 1, "%s%s", advertise, whole ? "" : port);
        return length > MODEL_ADDRESS_MAX ? -ENAMETOOLONG : 0;
    }
    snprintf(host, sizeof(host), "%.*s", (int)(port - bound), bound);
    if ((strcmp(host, "0.0.0.0") == 0 || strcmp(host, "[::]") == 0) &&
        !own_address(host, sizeof(host)))
        strcpy(host, "127.0.0.1");
    return snprintf(out, MODEL_ADDRESS_MAX + 1, "%s%s", host, port) > MODEL_ADDRESS_MAX
               ? -ENAMETOOLONG
               : 0;
}

void address_host(char out[65])
{
    char boot[40] = "", namespace[64] = "";
    FILE *file = fopen("/proc/sys/kernel/random/boot_id", "re");
    if (file != NULL) {
        if (fscanf(file, "%36s", boot) != 1)
            boot[0] = '\0';
        fclose(file);
    }
    ssize_t length = readlink("/proc/self/ns/pid", namespace, sizeof(namespace) - 1);
    namespace[length < 0 ? 0 : length] = '\0';
    snprintf(out, 65, "%s/%llu", boot,
             strtoull(namespace + strcspn(namespace, "0123456789"), NULL, 10));
}
