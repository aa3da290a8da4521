/* Service: a real metadata server on a loopback port with a directory of its own, for the contract suite. */
#ifndef P2PFS_TESTS_CONTRACT_SERVICE_H
#define P2PFS_TESTS_CONTRACT_SERVICE_H

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

struct service {
    char dir[64];
    int port;
    int peer_port;
    pid_t pid; /* 0: not running */
};

static inline struct sockaddr_in service_address(int port)
{
    return (struct sockaddr_in){.sin_family = AF_INET,
                                .sin_port = htons((uint16_t)port),
                                .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

/* Below those that the kernel hands out by itself, and far from what a process beside this one begins with: whoever
 * asks for a port is given none that another one is about to listen on. */
static inline int service_free_port(void)
{
    static unsigned turn;
    for (int tries = 0; tries < 10000; tries++) {
        int port = 20000 + (int)(((unsigned)getpid() * 16 + turn++) % 10000);
        struct sockaddr_in address = service_address(port);
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        bool free = bind(fd, (struct sockaddr *)&address, sizeof(address)) == 0;
        close(fd);
        if (free)
            return port;
    }
    return 0;
}

static inline bool service_listens(int port)
{
    struct sockaddr_in address = service_address(port);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    bool listens = connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0;
    close(fd);
    return listens;
}

static inline bool service_installed(const char *program)
{
    char command[128];
    snprintf(command, sizeof(command), "command -v %s >/dev/null 2>&1", program);
    return system(command) == 0;
}

/* Runs the program until service_end; it dies with the test. Its output lies in dir/log. */
static inline pid_t service_spawn(const struct service *service, const char *const argv[])
{
    pid_t pid = fork();
    if (pid != 0)
        return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (chdir(service->dir) < 0)
        _exit(127);
    int fd = open("log", O_CREAT | O_APPEND | O_WRONLY, 0600);
    dup2(fd, STDOUT_FILENO);
    dup2(fd, STDERR_FILENO);
    execvp(argv[0], (char *const *)(uintptr_t)argv); /* execvp changes nothing */
    _exit(127);
}

/* 0, or -1 when the server does not listen after 60 s. */
static inline int service_run(struct service *service, const char *const argv[])
{
    service->pid = service_spawn(service, argv);
    for (int i = 0; i < 6000; i++) {
        if (service_listens(service->port))
            return 0;
        usleep(10000);
    }
    return -1;
}

static inline int service_place(struct service *service)
{
    snprintf(service->dir, sizeof(service->dir), "/tmp/p2pfs-test-service-XXXXXX");
    service->port = service_free_port();
    service->peer_port = service_free_port();
    return mkdtemp(service->dir) ? 0 : -1;
}

static inline int service_start_redis(struct service *service, const char *program)
{
    char port[16];
    snprintf(port, sizeof(port), "%d", service->port);
    const char *argv[] = {program,  "--port", port,    "--bind",     "127.0.0.1",
                          "--save", "",       "--dir", service->dir, NULL};
    return service_run(service, argv);
}

static inline int service_start_etcd(struct service *service)
{
    char client[64];
    char peer[64];
    char cluster[80];
    snprintf(client, sizeof(client), "http://127.0.0.1:%d", service->port);
    snprintf(peer, sizeof(peer), "http://127.0.0.1:%d", service->peer_port);
    snprintf(cluster, sizeof(cluster), "default=%s", peer);
    const char *argv[] = {"etcd",
                          "--data-dir",
                          "data",
                          "--listen-client-urls",
                          client,
                          "--advertise-client-urls",
                          client,
                          "--listen-peer-urls",
                          peer,
                          "--initial-advertise-peer-urls",
                          peer,
                          "--initial-cluster",
                          cluster,
                          "--unsafe-no-fsync",
                          "--heartbeat-interval",
                          "50",
                          "--election-timeout",
                          "500",
                          NULL};
    return service_run(service, argv);
}

/* The repository's own HTTP service. option: one more, or NULL. */
static inline int service_start_http(struct service *service, const char *option)
{
    char listen[64];
    snprintf(listen, sizeof(listen), "127.0.0.1:%d", service->port);
    const char *argv[] = {TEST_SOURCE_DIR "/scripts/metadata-server", "--listen", listen, option,
                          NULL};
    return service_run(service, argv);
}

static inline void service_end(struct service *service)
{
    char command[128];
    if (service->pid > 0) {
        kill(service->pid, SIGKILL);
        waitpid(service->pid, NULL, 0);
        service->pid = 0;
    }
    snprintf(command, sizeof(command), "rm -rf '%s'", service->dir);
    if (service->dir[0] && system(command) != 0)
        printf("%s failed\n", command);
}

#endif
