/* p2p-store-example: a simulated trainer registers a model that lies in its memory; simulated inferencers pull it into
 * theirs, and compare every byte. Uses nothing but p2pstore.h. */
#include <errno.h>
#include <getopt.h>
#include <p2pstore.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define MIB         (1ull << 20)
#define SHARD_BYTES (64 * MIB)
#define LAYERS      8 /* ranges that the model consists of */

struct arguments {
    const char *cmd;
    const char *metadata_server;
    const char *local_server_name;
    const char *device_name;
    const char *nic_priority_matrix;
    const char *protocol;
    const char *name;
    const char *secret_file;
    uint64_t file_size_mb;
    long wait_for; /* trainer: end when so many others have all of it; 0: at a signal */
    long timeout;  /* inferencer: seconds */
};

static const char usage[] =
    "usage: p2p-store-example --cmd=trainer|inferencer --metadata_server=URL [OPTION...]\n"
    "\n"
    "  --cmd=trainer             registers a model, and offers it until it is interrupted\n"
    "  --cmd=inferencer          pulls the model, compares it, and ends\n"
    "  --metadata_server=URL     HOST:PORT of an etcd, or redis://, etcd://, local:///DIRECTORY\n"
    "  --local_server_name=HOST:PORT   this node's name, and where others reach it\n"
    "  --device_name=NAME[,NAME] RDMA devices\n"
    "  --nic_priority_matrix=FILE      which device for which memory, as JSON\n"
    "  --protocol=auto|tcp|rdma  how bytes travel (auto)\n"
    "  --name=NAME               the model's name (foo/bar)\n"
    "  --file_size_mb=N          the model's size (256)\n"
    "  --secret_file=FILE        the cluster's secret\n"
    "  --wait_for=N              trainer: ends when N others have all of it\n"
    "  --timeout=SECONDS         inferencer: how long it waits for the model (300)\n"
    "\n"
    "It ends with \"ALL DONE\" when all went well.\n";

static int complain(const char *what)
{
    fprintf(stderr, "p2p-store-example: %s: %s\n", what, p2pstore_error());
    return 1;
}

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* ---- the model ---- */

/* Word `i` of the model; every byte depends on its place. */
static uint64_t word(uint64_t i)
{
    uint64_t x = i * 0x9e3779b97f4a7c15ull;
    x ^= x >> 32;
    return x * 0xd6e8feb86659fd93ull;
}

static void fill(const struct p2pstore_range *ranges, size_t count)
{
    uint64_t i = 0;
    for (size_t r = 0; r < count; r++)
        for (uint64_t at = 0; at < ranges[r].length; at += sizeof i, i++)
            ((uint64_t *)ranges[r].address)[at / sizeof i] = word(i);
}

static bool compare(const struct p2pstore_range *ranges, size_t count)
{
    uint64_t i = 0;
    for (size_t r = 0; r < count; r++)
        for (uint64_t at = 0; at < ranges[r].length; at += sizeof i, i++)
            if (((uint64_t *)ranges[r].address)[at / sizeof i] != word(i)) {
                fprintf(stderr, "p2p-store-example: byte %llu is wrong\n",
                        (unsigned long long)i * sizeof i);
                return false;
            }
    return true;
}

/* Memory for ranges of these lengths, each an allocation of its own as tensors are. */
static bool allocate(struct p2pstore_range *ranges, const uint64_t *sizes, size_t count)
{
    for (size_t r = 0; r < count; r++) {
        ranges[r].length = sizes[r];
        ranges[r].address =
            mmap(NULL, sizes[r], PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (ranges[r].address == MAP_FAILED) {
            perror("p2p-store-example: memory for the model");
            return false;
        }
        madvise(ranges[r].address, sizes[r], MADV_HUGEPAGE);
    }
    return true;
}

/* ---- trainer ---- */

/* How many others hold all of it. */
static long holders(struct p2pstore *store, const char *name)
{
    struct p2pstore_list *list;
    long others = 0;
    if (p2pstore_list(store, name, 5000, &list) < 0)
        return 0;
    for (size_t i = 0; i < p2pstore_list_count(list); i++) {
        const struct p2pstore_entry *entry = p2pstore_list_entry(list, i);
        if (strcmp(entry->name, name) == 0)
            others = (long)entry->complete - 1;
    }
    p2pstore_list_free(list);
    return others;
}

static int train(struct p2pstore *store, const struct arguments *a, const sigset_t *ends)
{
    struct p2pstore_range ranges[LAYERS];
    uint64_t sizes[LAYERS];
    uint64_t left = a->file_size_mb * MIB;
    for (size_t r = 0; r < LAYERS; r++) { /* of different sizes: shards lie across their borders */
        sizes[r] = r + 1 < LAYERS ? left / (LAYERS - r + 1) / 8 * 8 : left;
        left -= sizes[r];
    }
    if (!allocate(ranges, sizes, LAYERS))
        return 1;
    printf("filling %llu MiB\n", (unsigned long long)a->file_size_mb);
    fill(ranges, LAYERS);
    int status = p2pstore_unregister(store, a->name, 10000); /* left by one that was killed */
    if (status < 0 && status != -ENOENT)
        return complain(a->name);
    double begun = seconds();
    if (p2pstore_register(store, a->name, ranges, LAYERS, SHARD_BYTES, "cpu:0", 10000) < 0)
        return complain("register");
    printf("registered %s in %.1f ms; end me with Ctrl-C\n", a->name, (seconds() - begun) * 1e3);
    fflush(stdout);
    while (sigtimedwait(ends, NULL, &(struct timespec){.tv_nsec = 200000000}) < 0)
        if (a->wait_for && holders(store, a->name) >= a->wait_for)
            break;
    if (p2pstore_unregister(store, a->name, 10000) < 0)
        return complain("unregister");
    return 0;
}

/* ---- inferencer ---- */

/* Waits until the name is registered, and allocates what it needs. The number of ranges, 0: failure. */
static size_t prepare(struct p2pstore *store, const struct arguments *a,
                      struct p2pstore_range **ranges)
{
    double end = seconds() + (double)a->timeout;
    while (seconds() < end) {
        struct p2pstore_list *list;
        size_t count = 0;
        if (p2pstore_list(store, a->name, 5000, &list) < 0) {
            complain("list");
            return 0;
        }
        const struct p2pstore_entry *entry =
            p2pstore_list_count(list) ? p2pstore_list_entry(list, 0) : NULL;
        if (entry && strcmp(entry->name, a->name) == 0 && entry->holders != 0) {
            count = entry->size_count;
            *ranges = calloc(count, sizeof **ranges);
            if (!*ranges || !allocate(*ranges, entry->sizes, count))
                count = 0;
            p2pstore_list_free(list);
            return count;
        }
        p2pstore_list_free(list);
        usleep(100000);
    }
    fprintf(stderr, "p2p-store-example: %s: nobody has registered it within %ld s\n", a->name,
            a->timeout);
    return 0;
}

static int pull(struct p2pstore *store, const struct arguments *a, struct p2pstore_range *ranges,
                size_t count)
{
    uint64_t total = 0;
    for (size_t r = 0; r < count; r++)
        total += ranges[r].length;
    double begun = seconds();
    if (p2pstore_get_replica(store, a->name, ranges, count, a->timeout * 1000) < 0)
        return complain("get_replica");
    double took = seconds() - begun;
    printf("pulled %s: %llu bytes in %.3f s, %.2f GB/s\n", a->name, (unsigned long long)total, took,
           (double)total / took / 1e9);
    if (!compare(ranges, count))
        return 1;
    printf("every byte is right\n");
    fflush(stdout);
    if (p2pstore_delete_replica(store, a->name, 10000) < 0)
        return complain("delete_replica");
    return 0;
}

static int infer(struct p2pstore *store, const struct arguments *a)
{
    struct p2pstore_range *ranges = NULL;
    size_t count = prepare(store, a, &ranges);
    int status = count == 0 ? 1 : pull(store, a, ranges, count);
    for (size_t r = 0; r < count; r++)
        munmap(ranges[r].address, ranges[r].length);
    free(ranges);
    return status;
}

/* ---- both ---- */

static bool arguments_parse(int argc, char **argv, struct arguments *a)
{
    static const struct option options[] = {{"cmd", required_argument, NULL, 'c'},
                                            {"metadata_server", required_argument, NULL, 'm'},
                                            {"local_server_name", required_argument, NULL, 'l'},
                                            {"device_name", required_argument, NULL, 'd'},
                                            {"nic_priority_matrix", required_argument, NULL, 'n'},
                                            {"protocol", required_argument, NULL, 'p'},
                                            {"name", required_argument, NULL, 'N'},
                                            {"file_size_mb", required_argument, NULL, 's'},
                                            {"secret_file", required_argument, NULL, 'S'},
                                            {"wait_for", required_argument, NULL, 'w'},
                                            {"timeout", required_argument, NULL, 't'},
                                            {"help", no_argument, NULL, 'h'},
                                            {0}};
    int letter;
    while ((letter = getopt_long_only(argc, argv, "", options, NULL)) != -1) {
        switch (letter) {
        case 'c':
            a->cmd = optarg;
            break;
        case 'm':
            a->metadata_server = optarg;
            break;
        case 'l':
            a->local_server_name = optarg;
            break;
        case 'd':
            a->device_name = optarg;
            break;
        case 'n':
            a->nic_priority_matrix = optarg;
            break;
        case 'p':
            a->protocol = optarg;
            break;
        case 'N':
            a->name = optarg;
            break;
        case 's':
            a->file_size_mb = strtoull(optarg, NULL, 10);
            break;
        case 'S':
            a->secret_file = optarg;
            break;
        case 'w':
            a->wait_for = strtol(optarg, NULL, 10);
            break;
        case 't':
            a->timeout = strtol(optarg, NULL, 10);
            break;
        case 'h':
            fputs(usage, stdout);
            exit(0);
        default:
            return false;
        }
    }
    return optind == argc && a->cmd && a->metadata_server && a->file_size_mb > 0 &&
           (strcmp(a->cmd, "trainer") == 0 || strcmp(a->cmd, "inferencer") == 0);
}

/* The whole file as text, or NULL. */
static char *file_text(const char *path)
{
    FILE *file = fopen(path, "re");
    char *text = NULL;
    size_t room = 0;
    if (!file || getdelim(&text, &room, '\0', file) < 0) {
        fprintf(stderr, "p2p-store-example: %s: %s\n", path, strerror(errno ? errno : EINVAL));
        free(text);
        text = NULL;
    }
    if (file)
        fclose(file);
    return text;
}

static int store_open(const struct arguments *a, struct p2pstore **store)
{
    char *texts[4] = {NULL};
    size_t count = 0;
    char *matrix = a->nic_priority_matrix ? file_text(a->nic_priority_matrix) : NULL;
    if (a->nic_priority_matrix && !matrix)
        return -1;
    const struct {
        const char *key, *value;
    } given[] = {{"transport", a->protocol},
                 {"device", a->device_name},
                 {"nic_priority_matrix", matrix},
                 {"secret_file", a->secret_file}};
    const char *options[5] = {NULL};
    for (size_t i = 0; i < 4; i++)
        if (given[i].value && asprintf(&texts[count], "%s=%s", given[i].key, given[i].value) > 0) {
            options[count] = texts[count];
            count++;
        }
    int status = p2pstore_open(a->metadata_server, a->local_server_name, options, store);
    if (status < 0)
        complain(a->metadata_server);
    for (size_t i = 0; i < count; i++)
        free(texts[i]);
    free(matrix);
    return status;
}

int main(int argc, char **argv)
{
    struct arguments a = {.name = "foo/bar", .file_size_mb = 256, .timeout = 300};
    sigset_t ends;
    struct p2pstore *store;
    if (!arguments_parse(argc, argv, &a)) {
        fputs(usage, stderr);
        return 2;
    }
    sigemptyset(&ends);
    sigaddset(&ends, SIGINT);
    sigaddset(&ends, SIGTERM);
    if (strcmp(a.cmd, "trainer") == 0)
        sigprocmask(SIG_BLOCK, &ends, NULL); /* the trainer waits for them */
    if (store_open(&a, &store) < 0)
        return 1;
    int status = strcmp(a.cmd, "trainer") == 0 ? train(store, &a, &ends) : infer(store, &a);
    if (p2pstore_close(store) < 0)
        status = complain("close");
    if (status == 0)
        puts("ALL DONE");
    return status;
}
