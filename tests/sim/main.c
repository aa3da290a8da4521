/* Runs one swarm and says how it went.
 *
 *   sim [--nodes N] [--files N] [--size 140G] [--shard SIZE] [--rate 100gbit] [--latency US] [--message US]
 *       [--sessions N] [--racks N] [--others N] [--trunk N] [--no-locality] [--churn PERCENT] [--stall PERCENT]
 *       [--liars PERCENT] [--spread SECONDS] [--seed S] [--within N] [--egress N] [--rack-copies N] [--json]
 *
 * --files: each node pulls so many of the size, and none may fail. --others: nodes of each rack that do not pull.
 * --within, --egress and --rack-copies are bounds: of the last node's time over the ideal, of the copies that the
 * registrar sent, and of those that came into another rack than its own. 0; 1: a bound or an invariant is broken; 2:
 * wrong usage. */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "meta/base/util.h"
#include "meta/model.h"
#include "tests/sim/sim.h"

struct bounds {
    double within;
    double egress;
    double rack_copies;
};

struct result {
    double ideal, first, median, last; /* s, x, x, x */
    double egress;                     /* copies */
    double rack_copies;                /* the most that came into a rack */
    double waste;                      /* bytes sent and not used, over those that were */
    double messages;                   /* of a node */
    double starved;                    /* s, the longest */
    uint32_t done, lost;               /* nodes */
};

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a;
    double y = *(const double *)b;
    return (x > y) - (x < y);
}

static struct result result_of(const struct sim *sim)
{
    const struct sim_options *o = &sim->options;
    double bytes = (double)o->size * o->files;
    struct result r = {.ideal = bytes / o->rate};
    double *times = calloc(sim->hosts, sizeof *times);
    double sent = (double)sim->host[0].up.bytes;
    double used = 0;
    if (!times) {
        abort();
    }
    for (uint32_t i = 1; i < sim->hosts; i++) {
        const struct sim_host *host = &sim->host[i];
        double starved = (double)host->starved_ns / (double)SIM_NS;
        uint64_t done_ns = 0;
        bool lost = false;
        r.starved = starved > r.starved ? starved : r.starved;
        sent += (double)host->up.bytes;
        for (uint32_t n = i; n < sim->count; n += sim->hosts) {
            const struct sim_node *node = &sim->nodes[n];
            used += (double)node->present / sim->shards * (double)o->size;
            done_ns = node->done_ns > done_ns ? node->done_ns : done_ns;
            lost |= !node->done_ns;
        }
        if (!lost) {
            times[r.done++] = (double)(done_ns - host->begun_ns) / (double)SIM_NS / r.ideal;
        }
        r.lost += lost;
    }
    qsort(times, r.done, sizeof *times, compare);
    if (r.done) {
        r.first = times[0];
        r.median = times[r.done / 2];
        r.last = times[r.done - 1];
    }
    free(times);
    r.egress = (double)sim->host[0].up.bytes / bytes;
    r.waste = used > 0 ? sent / used - 1 : 0;
    r.messages = (double)sim->counters.messages / sim->hosts;
    for (uint32_t i = 1; i < o->racks; i++) {
        double copies = (double)sim->trunk_in[i].bytes / bytes;
        r.rack_copies = copies > r.rack_copies ? copies : r.rack_copies;
    }
    return r;
}

/* ---- what must hold ---- */

static uint32_t broken;

static void must(bool holds, const char *what, double is, double most)
{
    if (!holds) {
        fprintf(stderr, "sim: broken: %s (%g, at most %g)\n", what, is, most);
        broken++;
    }
}

static void check(const struct sim *sim, const struct result *r, const struct bounds *bounds)
{
    uint32_t budget = spread_hedge_budget(sim->shards);
    uint32_t wrong = 0;
    for (uint32_t i = 1; i < sim->count; i++) {
        const struct sim_node *node = &sim->nodes[i];
        if (node->id == 0) {
            continue; /* the registrar */
        }
        uint32_t bits = 0;
        for (uint32_t k = 0; k < sim->shards; k++) {
            bits += sim_has(node, k);
        }
        wrong += bits != node->present;
        bool lives = node->alive && !node->stopped;
        must(!lives || node->present == sim->shards, "a node is not whole: shards missing",
             sim->shards - node->present, 0);
        must(node->twice == 0, "shards that a node took twice", node->twice, 0);
        must(node->hedges <= budget, "hedges of a node", node->hedges, budget);
    }
    must(wrong == 0, "nodes that have other shards than they counted", wrong, 0);
    must(r->last <= bounds->within, "the last node, over the ideal", r->last, bounds->within);
    must(r->egress <= bounds->egress, "copies that the registrar sent", r->egress, bounds->egress);
    must(r->rack_copies <= bounds->rack_copies, "copies into a rack", r->rack_copies,
         bounds->rack_copies);
    double most = r->ideal / 4 > 5 ? r->ideal / 4 : 5;
    must(r->starved <= most, "seconds for which a node got nothing", r->starved, most);
}

/* ---- what is said ---- */

static void say(const struct sim *sim, const struct result *r)
{
    const struct sim_counters *c = &sim->counters;
    printf("%u nodes, %u x %u shards, ideal %.2f s: first %.3f, median %.3f, last %.3f x ideal\n",
           sim->options.nodes, sim->options.files, sim->shards, r->ideal, r->first, r->median,
           r->last);
    printf(
        "registrar sent %.2f copies, %.2f came into the fullest other rack; %.1f %% of all bytes "
        "wasted\n",
        r->egress, r->rack_copies, r->waste * 100);
    printf("%.0f messages per node; longest without a shard %.2f s; %u done, %u lost\n",
           r->messages, r->starved, r->done, r->lost);
    printf("busy %llu, gone %llu, moved %llu, hedged %llu, stalled %llu, corrupt %llu, cancelled "
           "%llu, refused %llu, looks %llu; %llu events\n",
           (unsigned long long)c->busy, (unsigned long long)c->gone, (unsigned long long)c->moved,
           (unsigned long long)c->hedged, (unsigned long long)c->stalled,
           (unsigned long long)c->corrupt, (unsigned long long)c->cancelled,
           (unsigned long long)c->refused, (unsigned long long)c->looks,
           (unsigned long long)c->events);
}

static void say_json(const struct sim *sim, const struct result *r)
{
    printf(
        "{\"nodes\":%u,\"shards\":%u,\"ideal\":%.6f,\"first\":%.4f,\"median\":%.4f,\"last\":%.4f,"
        "\"egress\":%.4f,\"rack_copies\":%.4f,\"waste\":%.5f,\"messages\":%.1f,\"starved\":%.3f,"
        "\"done\":%u,\"lost\":%u,\"events\":%llu,\"broken\":%u}\n",
        sim->options.nodes, sim->shards, r->ideal, r->first, r->median, r->last, r->egress,
        r->rack_copies, r->waste, r->messages, r->starved, r->done, r->lost,
        (unsigned long long)sim->counters.events, broken);
}

/* ---- options ---- */

static int usage(const char *what)
{
    fprintf(stderr, "sim: %s (see the top of tests/sim/main.c)\n", what);
    return 2;
}

static double rate_of(const char *text) /* bytes/s of "100gbit" */
{
    char *end;
    double value = strtod(text, &end);
    double unit = strcmp(end, "gbit") == 0 ? 1e9 : strcmp(end, "mbit") == 0 ? 1e6 : 0;
    return value * unit / 8;
}

enum {
    NODES = 1,
    FILES,
    SIZE,
    SHARD,
    RATE,
    LATENCY,
    MESSAGE,
    SESSIONS,
    RACKS,
    OTHERS,
    TRUNK,
    NO_LOCALITY,
    CHURN,
    STALL,
    LIARS,
    SPREAD,
    SEED,
    WITHIN,
    EGRESS,
    RACK_COPIES,
    JSON
};

static const struct option words[] = {
    {"nodes", required_argument, NULL, NODES},
    {"files", required_argument, NULL, FILES},
    {"size", required_argument, NULL, SIZE},
    {"shard", required_argument, NULL, SHARD},
    {"rate", required_argument, NULL, RATE},
    {"latency", required_argument, NULL, LATENCY},
    {"message", required_argument, NULL, MESSAGE},
    {"sessions", required_argument, NULL, SESSIONS},
    {"racks", required_argument, NULL, RACKS},
    {"others", required_argument, NULL, OTHERS},
    {"trunk", required_argument, NULL, TRUNK},
    {"no-locality", no_argument, NULL, NO_LOCALITY},
    {"churn", required_argument, NULL, CHURN},
    {"stall", required_argument, NULL, STALL},
    {"liars", required_argument, NULL, LIARS},
    {"spread", required_argument, NULL, SPREAD},
    {"seed", required_argument, NULL, SEED},
    {"within", required_argument, NULL, WITHIN},
    {"egress", required_argument, NULL, EGRESS},
    {"rack-copies", required_argument, NULL, RACK_COPIES},
    {"json", no_argument, NULL, JSON},
    {0},
};

static int option_take(int word, const char *text, struct sim_options *o, struct bounds *bounds,
                       bool *json)
{
    double value = text ? strtod(text, NULL) : 0;
    switch (word) {
    case NODES:
        o->nodes = (uint32_t)value;
        return 0;
    case FILES:
        o->files = (uint32_t)value;
        return 0;
    case SIZE:
        return util_size_parse(text, 0, &o->size);
    case SHARD:
        return util_size_parse(text, 0, &o->shard_size);
    case RATE:
        o->rate = rate_of(text);
        return 0;
    case LATENCY:
        o->latency = (uint64_t)(value * 1000);
        return 0;
    case MESSAGE:
        o->message = (uint64_t)(value * 1000);
        return 0;
    case SESSIONS:
        o->sessions = (uint32_t)value;
        return 0;
    case RACKS:
        o->racks = (uint32_t)value;
        return 0;
    case OTHERS:
        o->others = (uint32_t)value;
        return 0;
    case TRUNK:
        o->trunk = value;
        return 0;
    case NO_LOCALITY:
        o->locality = false;
        return 0;
    case CHURN:
        o->churn = value / 100;
        return 0;
    case STALL:
        o->stall = value / 100;
        return 0;
    case LIARS:
        o->liars = value / 100;
        return 0;
    case SPREAD:
        o->spread_ns = (uint64_t)(value * (double)SIM_NS);
        return 0;
    case SEED:
        o->seed = strtoull(text, NULL, 0);
        return 0;
    case WITHIN:
        bounds->within = value;
        return 0;
    case EGRESS:
        bounds->egress = value;
        return 0;
    case RACK_COPIES:
        bounds->rack_copies = value;
        return 0;
    case JSON:
        *json = true;
        return 0;
    default:
        return -1;
    }
}

int main(int argc, char **argv)
{
    struct sim_options o = {.nodes = 100,
                            .files = 1,
                            .size = 140000000000ull,
                            .rate = 100e9 / 8,
                            .latency = 20000,
                            .message = 5000,
                            .sessions = 4096,
                            .racks = 1,
                            .trunk = 1,
                            .locality = true,
                            .seed = 1};
    struct bounds bounds = {1e9, 1e9, 1e9};
    bool json = false;
    int word;
    while ((word = getopt_long(argc, argv, "", words, NULL)) != -1) {
        if (option_take(word, optarg, &o, &bounds, &json) < 0) {
            return usage("wrong options");
        }
    }
    if (!o.shard_size) {
        o.shard_size = model_shard_auto(o.size);
    }
    if (optind != argc || o.nodes < 1 || o.files < 1 ||
        (o.files > 1 && o.churn + o.stall + o.liars > 0) || o.rate <= 0 || o.size < 1 ||
        o.message < 1 || o.shard_size < 4096 || o.racks < 1 || o.racks > SIM_RACKS_MAX ||
        o.trunk <= 0) {
        return usage("wrong options");
    }
    struct sim *sim = sim_open(&o);
    sim_run(sim,
            (uint64_t)((double)o.size * o.files / o.rate * 10 * (double)SIM_NS) + 600 * SIM_NS);
    struct result r = result_of(sim);
    check(sim, &r, &bounds);
    if (json) {
        say_json(sim, &r);
    } else {
        say(sim, &r);
        printf("seed %llu\n", (unsigned long long)o.seed);
    }
    sim_close(sim);
    return broken > 0;
}
