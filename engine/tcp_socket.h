/* Tcp_socket: addresses, and sockets with every option that the TCP transport wants. Any thread. */
#ifndef P2PFS_ENGINE_TCP_SOCKET_H
#define P2PFS_ENGINE_TCP_SOCKET_H

#include <stdbool.h>
#include <sys/socket.h>

#include "engine/transport.h"

#define TCP_ADDRESSES_MAX 8

struct tcp_address {
    struct sockaddr_storage storage;
    socklen_t length;
};

struct tcp_addresses {
    struct tcp_address list[TCP_ADDRESSES_MAX];
    unsigned count;
};

struct tcp_tuning {
    char congestion[16]; /* asked for, "": none */
    char usual[16];      /* the system's */
    int buffer_bytes;
    bool lower_effort;
};

/* "host:port" or "[v6]:port". With `names`, a host that is no number is looked up, which may block for seconds. 0;
 * -EINVAL (malformed, or no such name); -EAGAIN (a name, and `names` is false); -EHOSTUNREACH (no answer). */
int tcp_address_parse(const char *text, bool names, bool passive, struct tcp_addresses *out);
uint16_t tcp_address_port(const struct tcp_address *address);
void tcp_address_port_set(struct tcp_address *address, uint16_t port);
void tcp_address_print(const struct tcp_address *address, char out[TRANSPORT_NAME_MAX + 1]);

/* 0, or -ENOPROTOOPT: the kernel has no such congestion control for us; logged with the remedy. */
int tcp_tuning_from(const struct transport_config *config, struct tcp_tuning *tuning);

/* A nonblocking socket, or negative errno. */
int tcp_socket_listen(const struct tcp_tuning *tuning, const struct tcp_address *address);
int tcp_socket_connect(const struct tcp_tuning *tuning, const struct tcp_address *address);
void tcp_socket_accepted(const struct tcp_tuning *tuning,
                         int fd); /* gives an accepted one its options */
/* So many bytes went into the socket in so long: how much of what follows the kernel takes before it is sent. Little on
 * a slow link, where a message would wait behind it; more on a quick one, which would run dry. *unsent: the caller keeps
 * it for the socket, 0 at first. */
void tcp_socket_fit(int fd, uint64_t bytes, uint64_t ns, uint32_t *unsent);

#endif
