/* A relay chain: each host receives a file from the one before it and passes on what it has at once, so that every link
 * carries one copy. What a swarm of equal links can reach at best.
 *
 *   bench_chain serve LISTEN FILE                   the head; FILE is whole
 *   bench_chain relay LISTEN UPSTREAM FILE BYTES    a line on stdout when FILE is whole, then it goes on relaying
 *
 * LISTEN and UPSTREAM are ADDRESS:PORT. Both run until they are killed. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define RECV_BYTES (1u << 20)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t more = PTHREAD_COND_INITIALIZER;
static size_t here; /* bytes of the file that are here; under the lock */
static size_t bytes;
static int file, listener;

static void die(const char *what)
{
    fprintf(stderr, "bench_chain: %s: %s\n", what, strerror(errno));
    exit(1);
}

static struct sockaddr_in address_of(const char *text)
{
    char host[INET_ADDRSTRLEN] = "";
    struct sockaddr_in address = {.sin_family = AF_INET};
    const char *colon = strchr(text, ':');
    if (colon && (size_t)(colon - text) < sizeof(host)) {
        memcpy(host, text, (size_t)(colon - text));
        address.sin_port = htons((uint16_t)strtoul(colon + 1, NULL, 10));
    }
    errno = EINVAL;
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1)
        die(text);
    return address;
}

static void listen_at(const char *text)
{
    struct sockaddr_in address = address_of(text);
    listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(listener, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(listener, 1) < 0)
        die(text);
}

/* Whoever comes next gets the file, as fast as it arrives. */
static void *relay(void *unused)
{
    int fd = accept(listener, NULL, NULL);
    if (fd < 0)
        die("accept");
    for (off_t at = 0; (size_t)at < bytes;) {
        pthread_mutex_lock(&lock);
        while (here <= (size_t)at)
            pthread_cond_wait(&more, &lock);
        size_t until = here;
        pthread_mutex_unlock(&lock);
        while ((size_t)at < until)
            if (sendfile(fd, file, &at, until - (size_t)at) <= 0)
                die("sendfile");
    }
    return unused;
}

static void receive(const char *upstream)
{
    struct sockaddr_in address = address_of(upstream);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    while (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
        if (errno != ECONNREFUSED)
            die(upstream);
        close(fd); // it has not started yet
        usleep(1000);
        fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    }
    uint8_t *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (map == MAP_FAILED)
        die("mmap");
    for (size_t at = 0; at < bytes;) {
        size_t left = bytes - at;
        ssize_t n = recv(fd, map + at, left < RECV_BYTES ? left : RECV_BYTES, 0);
        if (n <= 0)
            die("recv");
        at += (size_t)n;
        pthread_mutex_lock(&lock);
        here = at;
        pthread_cond_signal(&more);
        pthread_mutex_unlock(&lock);
    }
    close(fd);
}

int main(int argc, char **argv)
{
    pthread_t thread;
    struct stat stat;
    if (argc == 4 && strcmp(argv[1], "serve") == 0) {
        file = open(argv[3], O_RDONLY | O_CLOEXEC);
        if (file < 0 || fstat(file, &stat) < 0)
            die(argv[3]);
        here = bytes = (size_t)stat.st_size;
        listen_at(argv[2]);
        relay(NULL);
    } else if (argc == 6 && strcmp(argv[1], "relay") == 0) {
        bytes = strtoull(argv[5], NULL, 10);
        file = open(argv[4], O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        if (file < 0 || ftruncate(file, (off_t)bytes) < 0)
            die(argv[4]);
        listen_at(argv[2]);
        if (pthread_create(&thread, NULL, relay, NULL) != 0)
            die("thread");
        receive(argv[3]);
        puts("whole");
        fflush(stdout);
    } else {
        fprintf(stderr,
                "usage: bench_chain serve LISTEN FILE | relay LISTEN UPSTREAM FILE BYTES\n");
        return 2;
    }
    for (;;)
        pause();
}
