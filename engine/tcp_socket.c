#include "engine/tcp_socket.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "meta/base/log.h"
#include "meta/base/util.h"

#define BUFFER_BYTES (4 << 20)
#define UNSENT_MOST  (1 << 20) /* more stays with us: a message need not wait behind 4 MiB */
#define UNSENT_LEAST (128 << 10)
#define UNSENT_NS    10000000 /* what leaves within so long, within these bounds */
#define BACKLOG      512
#define LOCAL_CONGESTION \
    "reno" /* bbr paces, which costs 4/5 of the speed inside one machine; needs no privilege */

#define LOWER_EFFORT 0x04 /* DSCP 000001, in the byte that holds it: RFC 8622 */
#define FILLER       1    /* TC_PRIO_FILLER: what nobody waits for */

/* A host that vanished is noticed in 8 s: data that nobody acknowledges, or a silent link that answers no probe. */
#define GONE_MS       8000
#define PROBE_AFTER_S 3
#define PROBE_EVERY_S 1
#define PROBES        5

// -- Addresses ------------------------------------------------------------------------------------

static int address_split(const char *text, char host[TRANSPORT_NAME_MAX + 1], char port[6])
{
    const char *colon = strrchr(text, ':');
    if (!colon || colon == text || strlen(text) > TRANSPORT_NAME_MAX)
        return -EINVAL;
    size_t digits = strlen(colon + 1);
    if (digits < 1 || digits > 5 || strspn(colon + 1, "0123456789") != digits ||
        atoi(colon + 1) > 65535)
        return -EINVAL;
    const char *begin = text, *end = colon;
    if (*begin == '[') {
        if (end[-1] != ']')
            return -EINVAL;
        begin++;
        end--;
    } else if (memchr(begin, ':', (size_t)(end - begin))) {
        return -EINVAL; // a bare IPv6 address: where would its port begin?
    }
    if (begin == end)
        return -EINVAL;
    snprintf(host, TRANSPORT_NAME_MAX + 1, "%.*s", (int)(end - begin), begin);
    snprintf(port, 6, "%s", colon + 1);
    return 0;
}

int tcp_address_parse(const char *text, bool names, bool passive, struct tcp_addresses *out)
{
    char host[TRANSPORT_NAME_MAX + 1], port[6];
    int r = address_split(text, host, port);
    if (r < 0)
        return r;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM,
                             .ai_flags =
                                 AI_NUMERICSERV | AI_NUMERICHOST | (passive ? AI_PASSIVE : 0)};
    struct addrinfo *found = NULL;
    int e = getaddrinfo(host, port, &hints, &found);
    if (e == EAI_NONAME && !names)
        return -EAGAIN;
    if (e == EAI_NONAME) {
        hints.ai_flags &= ~AI_NUMERICHOST;
        e = getaddrinfo(host, port, &hints, &found);
    }
    if (e == EAI_AGAIN)
        return -EHOSTUNREACH;
    if (e == EAI_MEMORY)
        return -ENOMEM;
    if (e != 0)
        return -EINVAL;
    out->count = 0;
    for (struct addrinfo *ai = found; ai && out->count < TCP_ADDRESSES_MAX; ai = ai->ai_next) {
        struct tcp_address *a = &out->list[out->count++];
        memcpy(&a->storage, ai->ai_addr, ai->ai_addrlen);
        a->length = ai->ai_addrlen;
    }
    freeaddrinfo(found);
    return out->count > 0 ? 0 : -EINVAL;
}

/* IPv4 and IPv6 have it in the same place. */
uint16_t tcp_address_port(const struct tcp_address *address)
{
    return ntohs(((const struct sockaddr_in *)&address->storage)->sin_port);
}

void tcp_address_port_set(struct tcp_address *address, uint16_t port)
{
    ((struct sockaddr_in *)&address->storage)->sin_port = htons(port);
}

void tcp_address_print(const struct tcp_address *address, char out[TRANSPORT_NAME_MAX + 1])
{
    char host[128], port[8]; // numbers only
    if (getnameinfo((const struct sockaddr *)&address->storage, address->length, host, sizeof(host),
                    port, sizeof(port), NI_NUMERICHOST | NI_NUMERICSERV) != 0) {
        snprintf(out, TRANSPORT_NAME_MAX + 1, "(unknown)");
        return;
    }
    bool v6 = address->storage.ss_family == AF_INET6;
    snprintf(out, TRANSPORT_NAME_MAX + 1, "%s%s%s:%s", v6 ? "[" : "", host, v6 ? "]" : "", port);
}

struct host {
    uint8_t bytes[16]; /* IPv4 as IPv6 has it, mapped */
};

static struct host host_of(const struct sockaddr_storage *a)
{
    struct host host = {.bytes = {[10] = 0xff, [11] = 0xff}};
    const uint8_t *bytes = (const uint8_t *)a;
    if (a->ss_family == AF_INET)
        memcpy(host.bytes + 12, bytes + offsetof(struct sockaddr_in, sin_addr), 4);
    else
        memcpy(host.bytes, bytes + offsetof(struct sockaddr_in6, sin6_addr), 16);
    return host;
}

static bool host_equal(const struct host *a, const struct host *b)
{
    return memcmp(a, b, sizeof(*a)) == 0;
}

static bool host_loopback(const struct host *host)
{
    static const struct host v6 = {.bytes = {[15] = 1}};
    static const struct host v4 = {.bytes = {[10] = 0xff, [11] = 0xff, [12] = 127}};
    return host_equal(host, &v6) || memcmp(host, &v4, 13) == 0;
}

/* Is it an address of this machine? Asked of the routing table: the way to oneself starts at oneself. */
static bool host_ours(const struct tcp_address *address)
{
    struct host other = host_of(&address->storage);
    if (host_loopback(&other))
        return true;
    util_autoclose int fd = socket(address->storage.ss_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct sockaddr_storage own = {.ss_family = AF_UNSPEC};
    socklen_t length = sizeof(own);
    if (fd < 0 || connect(fd, (const struct sockaddr *)&address->storage, address->length) < 0 ||
        getsockname(fd, (struct sockaddr *)&own, &length) < 0)
        return false;
    struct host start = host_of(&own);
    return host_equal(&start, &other);
}

// -- Options --------------------------------------------------------------------------------------

static int congestion_set(int fd, const char *name)
{
    return setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, (socklen_t)strlen(name)) < 0 ? -errno
                                                                                          : 0;
}

int tcp_tuning_from(const struct transport_config *config, struct tcp_tuning *tuning)
{
    *tuning = (struct tcp_tuning){.buffer_bytes = BUFFER_BYTES};
    if (config && config->buffer_bytes > 0)
        tuning->buffer_bytes =
            config->buffer_bytes > INT32_MAX / 2 ? INT32_MAX / 2 : (int)config->buffer_bytes;
    tuning->lower_effort = config && config->lower_effort;

    util_autoclose int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    socklen_t length = sizeof(tuning->usual) - 1;
    if (getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, tuning->usual, &length) < 0)
        tuning->usual[0] = '\0';
    if (!config || !config->congestion || !*config->congestion)
        return 0;
    int r = strlen(config->congestion) < sizeof(tuning->congestion)
                ? congestion_set(fd, config->congestion)
                : -ENOENT;
    if (r < 0) {
        log_error("tcp_congestion=%s: %s (see /proc/sys/net/ipv4/tcp_%s_congestion_control)",
                  config->congestion,
                  r == -EPERM ? "not allowed to this user" : "not in this kernel",
                  r == -EPERM ? "allowed" : "available");
        return -ENOPROTOOPT;
    }
    snprintf(tuning->congestion, sizeof(tuning->congestion), "%s", config->congestion);
    return 0;
}

static void option(int fd, int level, int name, int value)
{
    setsockopt(fd, level, name, &value, sizeof(value)); // each is a wish: the link works without it
}

/* A plain SO_RCVBUF is cut to net.core.rmem_max and turns the kernel's own tuning off, which reaches further: so a cut
 * size is worse than none. */
static void buffer_set(int fd, int force, int plain, const char *limit_path, int bytes)
{
    if (setsockopt(fd, SOL_SOCKET, force, &bytes, sizeof(bytes)) == 0)
        return;
    long limit = 0;
    FILE *file = fopen(limit_path, "re");
    if (file) {
        if (fscanf(file, "%ld", &limit) != 1)
            limit = 0;
        fclose(file);
    }
    if (limit >= bytes)
        option(fd, SOL_SOCKET, plain, bytes);
}

static void options_set(const struct tcp_tuning *tuning, int fd)
{
    buffer_set(fd, SO_SNDBUFFORCE, SO_SNDBUF, "/proc/sys/net/core/wmem_max", tuning->buffer_bytes);
    buffer_set(fd, SO_RCVBUFFORCE, SO_RCVBUF, "/proc/sys/net/core/rmem_max", tuning->buffer_bytes);
    option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    option(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, UNSENT_LEAST);
    option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, GONE_MS);
    option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
    option(fd, IPPROTO_TCP, TCP_KEEPIDLE, PROBE_AFTER_S);
    option(fd, IPPROTO_TCP, TCP_KEEPINTVL, PROBE_EVERY_S);
    option(fd, IPPROTO_TCP, TCP_KEEPCNT, PROBES);
}

void tcp_socket_fit(int fd, uint64_t bytes, uint64_t ns, uint32_t *unsent)
{
    uint64_t now = *unsent ? *unsent : UNSENT_LEAST;
    /* The kernel took so much at once; only the rest had to wait for the link. Where there was no rest, less tells. */
    uint64_t most = bytes > now ? (bytes - now) * UNSENT_NS / (ns + 1) : now / 2;
    most = most > UNSENT_MOST ? UNSENT_MOST : most < UNSENT_LEAST ? UNSENT_LEAST : most;
    if (most * 2 > now && most < now * 2)
        return;
    *unsent = (uint32_t)most;
    option(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, (int)most);
}

/* The queues of this host and of the network take everything else first. The priority comes last: IP_TOS sets it too. */
static void effort_lower(int fd)
{
    option(fd, IPPROTO_IP, IP_TOS, LOWER_EFFORT);
    option(fd, IPPROTO_IPV6, IPV6_TCLASS, LOWER_EFFORT);
    option(fd, SOL_SOCKET, SO_PRIORITY, FILLER);
}

/* Set before the connection exists: what bbr once set (pacing) stays on the socket when it goes. */
static void congestion_choose(const struct tcp_tuning *tuning, int fd, bool local)
{
    if (tuning->congestion[0])
        congestion_set(fd, tuning->congestion);
    else if (local)
        congestion_set(fd, LOCAL_CONGESTION);
}

// -- Sockets --------------------------------------------------------------------------------------

int tcp_socket_listen(const struct tcp_tuning *tuning, const struct tcp_address *address)
{
    int fd = socket(address->storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    option(fd, SOL_SOCKET, SO_REUSEADDR, 1);
    options_set(tuning, fd);
    congestion_choose(tuning, fd,
                      true); // accepted sockets inherit it; tcp_socket_accepted corrects
    if (bind(fd, (const struct sockaddr *)&address->storage, address->length) < 0 ||
        listen(fd, BACKLOG) < 0) {
        int r = -errno;
        close(fd);
        return r;
    }
    return fd;
}

int tcp_socket_connect(const struct tcp_tuning *tuning, const struct tcp_address *address)
{
    int fd = socket(address->storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    options_set(tuning, fd);
    congestion_choose(tuning, fd, host_ours(address));
    if (connect(fd, (const struct sockaddr *)&address->storage, address->length) < 0 &&
        errno != EINPROGRESS && errno != EINTR) {
        int r = -errno;
        close(fd);
        return r;
    }
    return fd;
}

void tcp_socket_accepted(const struct tcp_tuning *tuning, int fd)
{
    options_set(tuning, fd);
    if (tuning->lower_effort)
        effort_lower(fd);
    if (tuning->congestion[0])
        return;
    struct sockaddr_storage own = {.ss_family = AF_UNSPEC}, other = {.ss_family = AF_UNSPEC};
    socklen_t own_length = sizeof(own), other_length = sizeof(other);
    if (getsockname(fd, (struct sockaddr *)&own, &own_length) < 0 ||
        getpeername(fd, (struct sockaddr *)&other, &other_length) < 0)
        return;
    struct host here = host_of(&own), there = host_of(&other);
    if (!host_loopback(&there) && !host_equal(&here, &there) && tuning->usual[0])
        congestion_set(fd, tuning->usual);
}
