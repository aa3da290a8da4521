#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/address.h"
#include "engine/bench.h"
#include "engine/topology.h"
#include "fs/cmd_tools.h"
#include "meta/base/log.h"
#include "meta/base/util.h"
#include "meta/catalog.h"
#include "meta/meta.h"

#define LEASE_MS 10000
#define FIND_MS  5000 /* a target that has just been started is waited for */

struct words {
    const char *mode, *metadata_server, *local_server_name, *segment_id, *operation, *protocol;
    const char *device_name, *nic_priority_matrix, *buffer_size, *batch_size, *block_size;
    const char *threads, *duration, *report_unit, *report_precision, *credentials;
    bool auto_discovery, verify;
};

struct unit {
    const char *name;
    double bytes;
};

struct bench {
    struct bench_config config;
    struct transport_rail rails[TOPOLOGY_RAILS_MAX];
    struct words words;
    const struct unit *unit;
    int precision;
    char *url, *node, *listen, *advertise;
};

static const struct unit units[] = {
    {"GB", 1e9},     {"GiB", 1 << 30}, {"Gb", 1e9 / 8},  {"MB", 1e6},     {"MiB", 1 << 20},
    {"Mb", 1e6 / 8}, {"KB", 1e3},      {"KiB", 1 << 10}, {"Kb", 1e3 / 8},
};

static bool is(const char *word, const char *other)
{
    return strcmp(word, other) == 0;
}

/* ---- what was asked for ---- */

static int wrong(const char *option, const char *value, const char *expected)
{
    char problem[256];
    snprintf(problem, sizeof(problem), "--%s=%.60s: %s", option, value, expected);
    return cmd_usage(&cmd_bench, problem);
}

/* -1: go on; else the exit status. */
static int number(const char *option, const char *value, uint64_t least, uint64_t most,
                  uint64_t *out)
{
    char expected[80];
    snprintf(expected, sizeof(expected), "from %llu to %llu", (unsigned long long)least,
             (unsigned long long)most);
    if (util_size_parse(value, 0, out) < 0 || *out < least || *out > most)
        return wrong(option, value, expected);
    return -1;
}

static int numbers(struct bench *b)
{
    const struct words *w = &b->words;
    uint64_t batch, block, threads, duration, precision;
    int status = number("buffer_size", w->buffer_size, 4096, 1ull << 40, &b->config.buffer_size);
    if (status < 0)
        status = number("batch_size", w->batch_size, 1, BENCH_BATCH_MAX, &batch);
    if (status < 0)
        status = number("block_size", w->block_size, 8, 1u << 30, &block);
    if (status < 0)
        status = number("threads", w->threads, 1, BENCH_THREADS_MAX, &threads);
    if (status < 0)
        status = number("duration", w->duration, 1, 86400, &duration);
    if (status < 0)
        status = number("report_precision", w->report_precision, 0, 9, &precision);
    if (status >= 0)
        return status;
    if (block % 8)
        return wrong("block_size", w->block_size, "a multiple of 8");
    if (is(w->mode, "initiator") && b->config.buffer_size / block / threads < batch)
        return cmd_usage(&cmd_bench, "the blocks of all threads' batches do not fit into "
                                     "--buffer_size; make one of them smaller");
    b->config.batch_size = (uint32_t)batch;
    b->config.block_size = (uint32_t)block;
    b->config.threads = (unsigned)threads;
    b->config.seconds = (double)duration;
    b->precision = (int)precision;
    return -1;
}

static int choices(struct bench *b)
{
    struct words *w = &b->words;
    if (!is(w->mode, "target") && !is(w->mode, "initiator"))
        return wrong("mode", w->mode, "target or initiator");
    if (!is(w->operation, "read") && !is(w->operation, "write"))
        return wrong("operation", w->operation, "read or write");
    if (!is(w->protocol, "rdma") && !is(w->protocol, "tcp"))
        return wrong("protocol", w->protocol, "rdma or tcp");
    for (size_t i = 0; i < util_count(units) && !b->unit; i++)
        if (is(w->report_unit, units[i].name))
            b->unit = &units[i];
    if (!b->unit)
        return wrong("report_unit", w->report_unit, "GB, GiB, Gb, MB, MiB, Mb, KB, KiB or Kb");
    if (!w->metadata_server)
        return cmd_usage(&cmd_bench, "--metadata_server= says where target and initiator meet");
    if (is(w->mode, "initiator") && !w->segment_id)
        return cmd_usage(&cmd_bench, "--segment_id= names the target (its --local_server_name)");
    b->config.write = is(w->operation, "write");
    b->config.verify = w->verify;
    return -1;
}

static int parse(struct bench *b, int argc, char **argv)
{
    struct words *w = &b->words;
    *w = (struct words){.mode = "initiator",
                        .operation = "read",
                        .protocol = "rdma",
                        .buffer_size = "1G",
                        .batch_size = "128",
                        .block_size = "64K",
                        .threads = "4",
                        .duration = "10",
                        .report_unit = "GB",
                        .report_precision = "2"};
    const struct cmd_option options[] = {
        {.name = "mode", .value = &w->mode},
        {.name = "metadata_server", .value = &w->metadata_server},
        {.name = "local_server_name", .value = &w->local_server_name},
        {.name = "segment_id", .value = &w->segment_id},
        {.name = "operation", .value = &w->operation},
        {.name = "protocol", .value = &w->protocol},
        {.name = "device_name", .value = &w->device_name},
        {.name = "nic_priority_matrix", .value = &w->nic_priority_matrix},
        {.name = "auto_discovery", .flag = &w->auto_discovery},
        {.name = "buffer_size", .value = &w->buffer_size},
        {.name = "batch_size", .value = &w->batch_size},
        {.name = "block_size", .value = &w->block_size},
        {.name = "threads", .value = &w->threads},
        {.name = "duration", .value = &w->duration},
        {.name = "report_unit", .value = &w->report_unit},
        {.name = "report_precision", .value = &w->report_precision},
        {.name = "credentials", .value = &w->credentials},
        {.name = "verify", .flag = &w->verify},
        {.name = NULL},
    };
    int status = cmd_options(&cmd_bench, &argc, &argv, options);
    if (status < 0 && argc > 0)
        status = cmd_usage(&cmd_bench, "it takes options only");
    if (status < 0)
        status = choices(b);
    return status < 0 ? numbers(b) : status;
}

/* Those asked for; else the one that has the address of --local_server_name. */
static int adapters(struct bench *b)
{
    const struct words *w = &b->words;
    util_autofree char *matrix = NULL;
    char why[TOPOLOGY_WHY_MAX] = "out of memory";
    bool asked = w->device_name || w->nic_priority_matrix || w->auto_discovery;
    bool placed = b->node && address_valid(b->node, false);
    if (!asked && !placed)
        return 0; /* whichever the way to the target leads through */
    int status = 0;
    if (w->nic_priority_matrix) {
        status = topology_matrix_load(w->nic_priority_matrix, &matrix, why);
        if (status < 0)
            cmd_error("--nic_priority_matrix: %s", why);
    }
    if (status == 0) {
        struct topology_wish wish = {.devices = w->device_name, .matrix = matrix, .gid_index = -1};
        status = topology_rails(asked ? "0.0.0.0:0" : b->node, &wish, b->rails,
                                &b->config.transport_config.rail_count, why);
        if (status < 0)
            cmd_error("%s", why);
    }
    b->config.transport_config.rails = b->rails;
    return status;
}

/* Where it is in the cluster. 0, or negative errno after a line on stderr. */
static int place(struct bench *b)
{
    struct words *w = &b->words;
    b->config.transport = transport_by_name(w->protocol);
    if (!b->config.transport) {
        cmd_error("this build has no libibverbs; use --protocol=tcp");
        return -EOPNOTSUPP;
    }
    const char *scheme = strstr(w->metadata_server, "://") ? "" : "etcd://";
    if (asprintf(&b->url, "%s%s", scheme, w->metadata_server) < 0)
        b->url = NULL;
    b->node = w->local_server_name ? strdup(w->local_server_name) : NULL;
    if (!b->url || (w->local_server_name && !b->node)) {
        cmd_error("out of memory");
        return -ENOMEM;
    }
    const struct meta_ops *backend = meta_backend(b->url);
    bool local = backend && backend->single_machine && is(w->protocol, "tcp");
    int status = address_of_node(&b->node, local, &b->listen, &b->advertise);
    if (status == 0 && model_node_check(b->node) < 0)
        status = -EINVAL;
    if (status < 0)
        cmd_error("--local_server_name=%s: %s", b->node ? b->node : "", strerror(-status));
    return status == 0 && is(w->protocol, "rdma") ? adapters(b) : status;
}

/* ---- the two modes ---- */

static int catalog_up(const struct bench *b, struct catalog **catalog)
{
    util_autofree char *why = NULL;
    struct catalog_config config = {.url = b->url,
                                    .credentials_file = b->words.credentials,
                                    .self = {.boot = util_random_u64(), .pid = getpid()},
                                    .lease_ms = LEASE_MS};
    snprintf(config.self.name, sizeof(config.self.name), "%s", b->node);
    address_host(config.self.host);
    int status = catalog_open(&config, catalog, &why);
    if (status < 0)
        cmd_error("%s", why ? why : strerror(-status));
    return status;
}

static int transport_failed(const struct bench *b, const char *what, int status, const char *why)
{
    bool none = status == -ENODEV && is(b->words.protocol, "rdma");
    cmd_error("%s: %s", what,
              none ? "no RDMA device here (p2pfs doctor tells more); use --protocol=tcp" : why);
    return status;
}

static int announce(const struct bench *b, struct catalog *catalog, const char *bound)
{
    char address[MODEL_ADDRESS_MAX + 1];
    util_autofree char *why = NULL;
    int status = address_advertised(b->advertise, bound, address);
    if (status == 0 && is(b->words.protocol, "rdma"))
        catalog_rdma_set(catalog, address);
    if (status == 0)
        status = catalog_serve(catalog, address, &why);
    if (status < 0) {
        cmd_error("%s: %s", b->node, why ? why : strerror(-status));
        return status;
    }
    printf("target %s serves at %s (%s); end me with Ctrl-C\n", b->node, address,
           b->words.protocol);
    fflush(stdout);
    return 0;
}

static int target(struct bench *b)
{
    struct catalog *catalog;
    struct bench_target *target = NULL;
    sigset_t ends;
    int number;
    sigemptyset(&ends);
    sigaddset(&ends, SIGINT);
    sigaddset(&ends, SIGTERM);
    sigprocmask(SIG_BLOCK, &ends, NULL);
    int status = catalog_up(b, &catalog);
    if (status < 0)
        return status;
    b->config.address = b->listen;
    status = bench_target_open(&b->config, &target);
    if (status < 0)
        transport_failed(b, b->listen, status, strerror(-status));
    else
        status = announce(b, catalog, bench_target_address(target));
    if (status == 0)
        sigwait(&ends, &number);
    bench_target_close(target);
    catalog_close(catalog);
    return status;
}

static int find(const struct bench *b, struct catalog *catalog, char address[MODEL_ADDRESS_MAX + 1])
{
    struct model_node node;
    uint64_t until = util_now_ms() + FIND_MS;
    const char *name = b->words.segment_id;
    int status;
    while ((status = catalog_node(catalog, name, &node)) == -ENOENT && util_now_ms() < until)
        usleep(50000);
    if (status < 0) {
        cmd_error("%s: there is no such target; start one with --mode=target "
                  "--local_server_name=%s",
                  name, name);
        return status;
    }
    const char *found = is(b->words.protocol, "rdma") ? node.rdma : node.address;
    if (!found[0]) {
        cmd_error("%s: it was started without --protocol=rdma", name);
        return -EPROTO;
    }
    snprintf(address, MODEL_ADDRESS_MAX + 1, "%s", found);
    return 0;
}

static void time_print(const char *label, uint64_t ns)
{
    printf("%s %.*f %s", label, ns < 1000000 ? 0 : 2, (double)ns / (ns < 1000000 ? 1e3 : 1e6),
           ns < 1000000 ? "us" : "ms");
}

static void result_print(const struct bench *b, const struct bench_result *result)
{
    double bytes = (double)result->blocks * b->config.block_size;
    double rate = result->seconds > 0 ? bytes / result->seconds / b->unit->bytes : 0;
    time_print("Latency of a block: p50", bench_latency(result, 0.5));
    time_print(", p90", bench_latency(result, 0.9));
    time_print(", p99", bench_latency(result, 0.99));
    time_print(", p99.9", bench_latency(result, 0.999));
    time_print(", max", bench_latency(result, 1));
    putchar('\n');
    if (b->config.verify)
        printf("Verified: every byte of %llu blocks\n", (unsigned long long)result->blocks);
    printf("Test completed: duration %.2f, batch count %llu, throughput %.*f %s/s\n",
           result->seconds, (unsigned long long)result->batches, b->precision, rate, b->unit->name);
}

static int initiate(struct bench *b)
{
    struct catalog *catalog;
    struct bench_result result;
    char address[MODEL_ADDRESS_MAX + 1];
    int status = catalog_up(b, &catalog);
    if (status < 0)
        return status;
    status = find(b, catalog, address);
    catalog_close(catalog);
    if (status < 0)
        return status;
    b->config.address = address;
    status = bench_run(&b->config, &result);
    if (status < 0)
        return transport_failed(b, b->words.segment_id, status, result.reason);
    result_print(b, &result);
    return 0;
}

/* As its users write it for other tools. */
static int run(int argc, char **argv)
{
    static char auto_discovery[] = "--auto_discovery";
    int kept = 0;
    for (int i = 0; i < argc; i++) {
        bool given = is(argv[i], "--auto_discovery=true");
        if (!is(argv[i], "--auto_discovery=false"))
            argv[kept++] = given ? auto_discovery : argv[i];
    }
    struct bench b = {0};
    log_setup(LOG_WARN, false);
    int status = parse(&b, kept, argv);
    if (status < 0) {
        status = place(&b);
        if (status == 0)
            status = is(b.words.mode, "target") ? target(&b) : initiate(&b);
        status = status < 0;
    }
    free(b.url);
    free(b.node);
    free(b.listen);
    free(b.advertise);
    return status;
}

const struct cmd cmd_bench = {
    .name = "bench",
    .usage = "bench --mode=target|initiator --metadata_server=URL [OPTION...]",
    .summary = "measure how fast bytes travel between two machines",
    .details =
        "A target offers a buffer; an initiator reads blocks from it, or writes to it, and says how\n"
        "fast. They find each other by name in the metadata.\n"
        "\n"
        "  --mode=target|initiator     (initiator)\n"
        "  --metadata_server=URL       HOST:PORT of an etcd, or a URL as for mounting\n"
        "  --local_server_name=NAME    this process's name; HOST:PORT is also its address\n"
        "  --segment_id=NAME           the target's --local_server_name\n"
        "  --operation=read|write      write: the target reads from the initiator (read)\n"
        "  --protocol=rdma|tcp         (rdma)\n"
        "  --device_name=NAME[,NAME], --nic_priority_matrix=FILE, --auto_discovery\n"
        "                              RDMA devices: these, by FILE's order, or all that are up\n"
        "                              (the one that has the address of --local_server_name)\n"
        "  --buffer_size=SIZE          (1G)\n"
        "  --batch_size=N              blocks under way in each thread (128)\n"
        "  --block_size=SIZE           (64K)\n"
        "  --threads=N                 each with a link of its own (4)\n"
        "  --duration=SECONDS          (10)\n"
        "  --report_unit=UNIT          GB, GiB, Gb, MB, MiB, Mb, KB, KiB or Kb (GB)\n"
        "  --report_precision=DIGITS   (2)\n"
        "  --verify                    compare every byte that has landed\n"
        "  --credentials=FILE          for the metadata service\n",
    .run = run,
};
