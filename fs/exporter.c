#include "fs/exporter.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fs/control.h"
#include "meta/base/log.h"
#include "p2pfs_config.h"

#if P2PFS_HAVE_MICROHTTPD

#include <microhttpd.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#define EXPORTER_CONNECTIONS 16
#define EXPORTER_TIMEOUT_S   10
#define EXPORTER_MEMORY      (16u << 10) /* of one connection: no request is longer */

struct exporter {
    struct MHD_Daemon *daemon;
    struct control *control;
};

static enum MHD_Result reply(struct MHD_Connection *connection, unsigned status, const char *type,
                             char *text, size_t length, enum MHD_ResponseMemoryMode mode)
{
    struct MHD_Response *response = MHD_create_response_from_buffer(length, text, mode);
    if (!response) {
        if (mode == MHD_RESPMEM_MUST_FREE)
            free(text);
        return MHD_NO;
    }
    MHD_add_response_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, type);
    enum MHD_Result queued = MHD_queue_response(connection, status, response);
    MHD_destroy_response(response);
    return queued;
}

static enum MHD_Result refuse(struct MHD_Connection *connection, unsigned status, const char *why)
{
    return reply(connection, status, "text/plain; charset=utf-8", (char *)why, strlen(why),
                 MHD_RESPMEM_PERSISTENT);
}

static enum MHD_Result answer(void *arg, struct MHD_Connection *connection, const char *url,
                              const char *method, const char *version, const char *upload,
                              size_t *upload_size, void **of_request)
{
    (void)version;
    (void)upload;
    (void)upload_size;
    (void)of_request;
    struct exporter *exporter = arg;
    if (strcmp(method, "GET") != 0 && strcmp(method, "HEAD") != 0)
        return refuse(connection, MHD_HTTP_METHOD_NOT_ALLOWED, "GET /metrics\n");
    if (strcmp(url, "/metrics") != 0 && strcmp(url, "/") != 0)
        return refuse(connection, MHD_HTTP_NOT_FOUND, "GET /metrics\n");
    char *text = NULL;
    size_t length = 0;
    if (control_render(exporter->control, CONTROL_METRICS, &text, &length) < 0)
        return refuse(connection, MHD_HTTP_INTERNAL_SERVER_ERROR, "out of memory\n");
    return reply(connection, MHD_HTTP_OK, "text/plain; version=0.0.4; charset=utf-8", text, length,
                 MHD_RESPMEM_MUST_FREE);
}

static void logged(void *arg, const char *format, va_list arguments)
    __attribute__((format(printf, 2, 0)));
static void logged(void *arg, const char *format, va_list arguments)
{
    (void)arg;
    char line[256];
    vsnprintf(line, sizeof(line), format, arguments);
    line[strcspn(line, "\n")] = '\0';
    log_debug("metrics=: %s", line);
}

/* The first address that HOST:PORT or [IPV6]:PORT means. The caller frees. */
static struct addrinfo *address_find(const char *text)
{
    char host[256];
    const char *colon = strrchr(text, ':');
    size_t length = colon ? (size_t)(colon - text) : 0;
    const char *begin = text;
    if (length > 2 && text[0] == '[' && colon[-1] == ']') {
        begin++;
        length -= 2;
    }
    if (length == 0 || length >= sizeof(host))
        return NULL;
    snprintf(host, sizeof(host), "%.*s", (int)length, begin);
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
    struct addrinfo *found = NULL;
    return getaddrinfo(host, colon + 1, &hints, &found) == 0 ? found : NULL;
}

/* A socket that listens there, or negative errno; libmicrohttpd does not tell what its own one failed with. */
static int socket_listen(const struct addrinfo *at)
{
    int fd = socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int on = 1;
    if (fd < 0)
        return -errno;
    (void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
    if (bind(fd, at->ai_addr, at->ai_addrlen) == 0 && listen(fd, EXPORTER_CONNECTIONS) == 0)
        return fd;
    int rc = -errno;
    close(fd);
    return rc;
}

int exporter_open(struct control *control, const char *address, struct exporter **out, char **error)
{
    *error = NULL;
    struct exporter *exporter = calloc(1, sizeof(*exporter));
    if (!exporter)
        return -ENOMEM;
    exporter->control = control;
    int rc = -EADDRNOTAVAIL;
    struct addrinfo *found = address_find(address);
    if (!found)
        goto complain;
    unsigned flags = MHD_USE_INTERNAL_POLLING_THREAD | MHD_USE_AUTO | MHD_USE_ERROR_LOG |
                     (found->ai_family == AF_INET6 ? MHD_USE_IPv6 : 0);
    int fd = socket_listen(found);
    freeaddrinfo(found);
    rc = fd < 0 ? fd : 0;
    if (rc < 0)
        goto complain;
    /* Takes the socket, also when it fails. */
    exporter->daemon = MHD_start_daemon(
        flags, 0, NULL, NULL, answer, exporter, MHD_OPTION_EXTERNAL_LOGGER, logged, NULL,
        MHD_OPTION_LISTEN_SOCKET, fd, MHD_OPTION_CONNECTION_LIMIT, EXPORTER_CONNECTIONS,
        MHD_OPTION_CONNECTION_TIMEOUT, EXPORTER_TIMEOUT_S, MHD_OPTION_CONNECTION_MEMORY_LIMIT,
        (size_t)EXPORTER_MEMORY, MHD_OPTION_END);
    rc = exporter->daemon ? 0 : -ENOMEM;
    if (rc < 0)
        goto complain;
    *out = exporter;
    return 0;

complain:
    if (asprintf(error, "metrics=%s: %s; name an address of this machine and a free port", address,
                 strerror(-rc)) < 0)
        *error = NULL;
    free(exporter);
    return rc;
}

void exporter_close(struct exporter *exporter)
{
    if (!exporter)
        return;
    MHD_stop_daemon(exporter->daemon);
    free(exporter);
}

#else

int exporter_open(struct control *control, const char *address, struct exporter **exporter,
                  char **error)
{
    (void)control;
    (void)exporter;
    if (asprintf(
            error,
            "metrics=%s: this build has no libmicrohttpd; read .p2pfs/metrics in the mount, or "
            "build with libmicrohttpd-dev",
            address) < 0)
        *error = NULL;
    return -EOPNOTSUPP;
}

void exporter_close(struct exporter *exporter)
{
    (void)exporter;
}

#endif
