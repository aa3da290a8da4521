/* Many nodes in one process, as the metadata service sees them: each one a catalog with connections, a lease, a node
 * record and a watch of its own. All of them hold the one name, a version of 2 TiB.
 *
 *   bench_nodes URL COUNT   prints "ready SECONDS" when all are up and announced, and ends with its standard input */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "meta/base/log.h"
#include "meta/base/util.h"
#include "meta/catalog.h"

#define NODES_BEGINNERS 16 /* threads that bring nodes up */
#define NODES_STACK     (256 << 10)
#define NODES_WAIT_MS   60000
#define NODES_SIZE      (2ull << 40)

static const char *url;
static size_t count;
static struct catalog **nodes;
static atomic_size_t next;
static atomic_int failed;
static struct model_version version;

/* A node that was just brought up may not have heard of the name yet. */
static int node_announce(struct catalog *node)
{
    uint64_t end = util_now_ms() + NODES_WAIT_MS;
    for (;;) {
        struct catalog_sync sync = {0};
        int rc = catalog_announce(node, &version.id, CATALOG_COMPLETE, catalog_sync_done, &sync);
        if (rc == 0)
            rc = catalog_sync_wait(&sync);
        if (rc == 0 || util_now_ms() > end)
            return rc;
        usleep(10000);
    }
}

static int node_publish(struct catalog *node)
{
    struct catalog_sync sync = {0};
    struct model_attr attr = {.mode = 0644};
    int rc = catalog_publish(node, MODEL_ROOT, "model.safetensors", 0, &attr, &version,
                             CATALOG_COMPLETE, catalog_sync_done, &sync);
    return rc < 0 ? rc : catalog_sync_wait(&sync);
}

static int node_begin(size_t number)
{
    struct catalog_config config = {.url = url};
    char address[32];
    char *error = NULL;
    snprintf(config.self.name, sizeof(config.self.name), "node-%04zu", number);
    snprintf(address, sizeof(address), "10.%zu.%zu.1:7700", number / 250, number % 250);
    int rc = catalog_open(&config, &nodes[number], &error);
    if (rc == 0)
        rc = catalog_serve(nodes[number], address, &error);
    if (rc == 0)
        rc = number == 0 ? node_publish(nodes[number]) : node_announce(nodes[number]);
    if (rc < 0)
        fprintf(stderr, "bench_nodes: node %zu: %s\n", number, error ? error : strerror(-rc));
    free(error);
    return rc;
}

static void *beginner(void *arg)
{
    size_t number;
    (void)arg;
    while ((number = atomic_fetch_add(&next, 1)) < count) {
        if (node_begin(number) < 0)
            atomic_store(&failed, 1);
    }
    return NULL;
}

static void *ender(void *arg)
{
    size_t number;
    (void)arg;
    while ((number = atomic_fetch_add(&next, 1)) < count)
        catalog_close(nodes[number]);
    return NULL;
}

static int all_nodes(void *(*run)(void *))
{
    pthread_t threads[NODES_BEGINNERS];
    for (size_t i = 0; i < NODES_BEGINNERS; i++) {
        if (pthread_create(&threads[i], NULL, run, NULL) != 0) {
            perror("bench_nodes: thread");
            return -1;
        }
    }
    for (size_t i = 0; i < NODES_BEGINNERS; i++)
        pthread_join(threads[i], NULL);
    return 0;
}

int main(int argc, char **argv)
{
    struct rlimit files;
    pthread_attr_t attr;
    if (argc != 3 || (count = strtoul(argv[2], NULL, 10)) == 0) {
        fprintf(stderr, "usage: bench_nodes URL COUNT\n");
        return 2;
    }
    url = argv[1];
    nodes = calloc(count, sizeof(struct catalog *));
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, NODES_STACK);
    pthread_setattr_default_np(&attr);
    version = (struct model_version){
        .id = model_id_new(),
        .size = NODES_SIZE,
        .shard_size = model_shard_auto(NODES_SIZE),
        .digest = MODEL_XXH3,
        .sealed = true,
    };
    uint64_t begun = util_now_ms();
    atomic_store(&next, 1);
    if (!nodes || node_begin(0) < 0 || all_nodes(beginner) < 0 || atomic_load(&failed))
        return 1;
    printf("ready %.3f\n", (double)(util_now_ms() - begun) / 1000);
    fflush(stdout);
    while (getchar() != EOF)
        ;
    atomic_store(&next, 0);
    return all_nodes(ender) < 0;
}
