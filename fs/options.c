#include "fs/options.h"

#include <errno.h>
#include <limits.h>
#include <netinet/in.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "engine/address.h"
#include "engine/bucket.h"
#include "engine/topology.h"
#include "meta/base/memory.h"
#include "meta/base/util.h"
#include "meta/meta.h"
#include "p2pfs_config.h"

#define OPTIONS_READ_TIMEOUT 60
#define OPTIONS_ORPHAN_TTL   3600

/* An option's value goes into *out; *error is set where it does not suit. NULL value: a flag
 * without one. */
struct options_parse {
    struct options *out;
    const struct options_entry *entry; /* NULL: an environment variable */
    const char *name;
    const char *value;
    char **error;
};

static int refuse(char **error, const char *format, ...) __attribute__((format(printf, 2, 3)));
static int refuse(char **error, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    free(*error);
    if (vasprintf(error, format, arguments) < 0)
        *error = NULL;
    va_end(arguments);
    return -EINVAL;
}

static int text_set(char **to, const char *value)
{
    char *copy = strdup(value);
    if (copy == NULL)
        return -ENOMEM;
    free(*to);
    *to = copy;
    return 0;
}

/* ---- one function for each kind of value ---- */

/* Setters of several options: the value goes to where the table says. */
static void *place_of(struct options_parse *p)
{
    return (char *)p->out + p->entry->place;
}

static int set_flag(struct options_parse *p)
{
    *(bool *)place_of(p) = true;
    return 0;
}

static int set_text(struct options_parse *p)
{
    return text_set(place_of(p), p->value);
}

/* Which of the words the value is; the enum has them in the order of the option's argument, "one|two|three". */
static int set_word(struct options_parse *p)
{
    const char *at = p->entry->argument;
    size_t length = strlen(p->value);
    for (unsigned word = 0;; word++) {
        size_t span = strcspn(at, "|");
        if (span == length && memcmp(at, p->value, length) == 0) {
            *(unsigned *)place_of(p) = p->entry->least + word;
            return 0;
        }
        at += span;
        if (*at++ == '\0')
            return refuse(p->error, "%s=%s: use %s", p->name, p->value, p->entry->argument);
    }
}

static int set_node(struct options_parse *p)
{
    if (model_node_check(p->value) != 0)
        return refuse(
            p->error,
            "node=%s: write 1 to %d printable ASCII characters without '/', '%%' and blanks",
            p->value, MODEL_NODE_MAX);
    return text_set(&p->out->node, p->value);
}

static int set_listen(struct options_parse *p)
{
    if (!address_valid(p->value, false))
        return refuse(
            p->error,
            "listen=%s: not an address; write HOST:PORT, [IPV6]:PORT, or HOST:0 for any port",
            p->value);
    return text_set(&p->out->listen, p->value);
}

static int set_advertise(struct options_parse *p)
{
    if (!address_valid(p->value, true))
        return refuse(
            p->error,
            "advertise=%s: not an address; write HOST or HOST:PORT as peers reach this node",
            p->value);
    return text_set(&p->out->advertise, p->value);
}

static int set_device(struct options_parse *p)
{
    const char *allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.,";
    if (p->value[strspn(p->value, allowed)] != '\0')
        return refuse(p->error, "device=%s: not names of RDMA devices; write NAME or NAME\\,NAME",
                      p->value);
    return text_set(&p->out->device, p->value);
}

static int set_ib_port(struct options_parse *p)
{
    if (p->value[0] < '1' || p->value[0] > '9' || strlen(p->value) > 2)
        return refuse(p->error, "%s=%s: not a port; write a number from 1 to 99", p->name,
                      p->value);
    p->out->ib_port = (unsigned)atoi(p->value);
    return 0;
}

static int set_gid_index(struct options_parse *p)
{
    char *end = NULL;
    unsigned long index = strtoul(p->value, &end, 10);
    if (p->value[0] < '0' || p->value[0] > '9' || *end != '\0' || index > 255)
        return refuse(p->error, "%s=%s: not an index; write a number from 0 to 255", p->name,
                      p->value);
    p->out->gid_index = (int)index;
    return 0;
}

static int set_nic_priority_matrix(struct options_parse *p)
{
    char *text = NULL, why[TOPOLOGY_WHY_MAX];
    bool itself = p->value[strspn(p->value, " \t\r\n")] == '{';
    int rc = topology_matrix_load(p->value, &text, why);
    if (rc == -EINVAL)
        return refuse(p->error, "%s=%s: %s", p->name, itself ? "{...}" : p->value, why);
    if (rc != 0)
        return rc;
    free(p->out->nic_priority_matrix);
    p->out->nic_priority_matrix = text;
    return 0;
}

static int set_shard_size(struct options_parse *p)
{
    uint64_t size = 0;
    if (strcmp(p->value, "auto") == 0) {
        p->out->shard_size = 0;
        return 0;
    }
    if (util_size_parse(p->value, 0, &size) != 0 || size < MODEL_SHARD_MIN ||
        size > MODEL_SHARD_MAX || size % MODEL_SHARD_STEP != 0)
        return refuse(
            p->error,
            "shard_size=%s: not a shard size; write a multiple of 4K from 64K to 1G, or auto",
            p->value);
    p->out->shard_size = (uint32_t)size;
    return 0;
}

static int set_cache_size(struct options_parse *p)
{
    uint64_t size = 0;
    if (util_size_parse(p->value, memory_limit(), &size) != 0 || size < MODEL_AUTO_MIN)
        return refuse(
            p->error,
            "cache_size=%s: not a size; write bytes (K, M, G, T), at least 1M, or N%% of memory",
            p->value);
    p->out->cache_size = size;
    return 0;
}

static int set_cache_dir(struct options_parse *p)
{
    if (p->value[0] != '/')
        return refuse(p->error, "cache_dir=%s: not an absolute path; write /DIRECTORY", p->value);
    return text_set(&p->out->cache_dir, p->value);
}

static int set_seconds(struct options_parse *p)
{
    char *end = NULL;
    errno = 0;
    unsigned long seconds = strtoul(p->value, &end, 10);
    if (p->value[0] < '0' || p->value[0] > '9' || *end != '\0' || errno != 0 ||
        seconds < p->entry->least || seconds > 1000000000)
        return refuse(p->error, "%s=%s: not a number of seconds; write %u or more", p->name,
                      p->value, p->entry->least);
    *(uint32_t *)place_of(p) = (uint32_t)seconds;
    return 0;
}

static int set_tcp_congestion(struct options_parse *p)
{
    if (p->value[0] == '\0' || strlen(p->value) > 15)
        return refuse(p->error,
                      "tcp_congestion=%s: see sysctl net.ipv4.tcp_available_congestion_control",
                      p->value);
    return text_set(&p->out->tcp_congestion, p->value);
}

int options_rate_parse(const char *text, uint64_t *rate)
{
    int rc = util_size_parse(text, 0, rate);
    return rc != 0 || (*rate > 0 && *rate < BUCKET_RATE_MIN) ? -EINVAL : 0;
}

static int set_rate(struct options_parse *p)
{
    if (options_rate_parse(p->value, place_of(p)) != 0)
        return refuse(
            p->error,
            "%s=%s: not a rate; write bytes a second (K, M, G), at least 64K, or 0 for no "
            "limit",
            p->name, p->value);
    return 0;
}

static int set_encryption(struct options_parse *p)
{
    return strcmp(p->value, "off") == 0
               ? 0
               : refuse(p->error,
                        "encryption=%s: this build cannot encrypt; use encryption=off on a trusted "
                        "network, or a VPN",
                        p->value);
}

static int set_locality(struct options_parse *p)
{
    const char *slash = strchr(p->value, '/');
    bool valid = p->value[0] != '\0' && strlen(p->value) <= MODEL_NODE_MAX &&
                 (slash == NULL ||
                  (slash != p->value && slash[1] != '\0' && strchr(slash + 1, '/') == NULL));
    for (const char *at = p->value; *at != '\0'; at++)
        valid = valid && *at > ' ' && *at < 0x7f;
    if (!valid)
        return refuse(p->error, "locality=%s: write ZONE or ZONE/RACK", p->value);
    return text_set(&p->out->locality, p->value);
}

static int set_metrics(struct options_parse *p)
{
    if (!P2PFS_HAVE_MICROHTTPD)
        return refuse(p->error,
                      "metrics=%s: this build has no libmicrohttpd; read .p2pfs/metrics in the "
                      "mount, or build with libmicrohttpd-dev",
                      p->value);
    if (!address_valid(p->value, false))
        return refuse(p->error, "metrics=%s: not an address; write ADDR:PORT or [IPV6]:PORT",
                      p->value);
    return text_set(&p->out->metrics, p->value);
}

/* ---- options of libfuse and of mount(8) ---- */

static int fuse_add(struct options *out, const char *option)
{
    char *joined = NULL;
    if (asprintf(&joined, "%s%s%s", out->fuse == NULL ? "" : out->fuse,
                 out->fuse == NULL ? "" : ",", option) < 0)
        return -ENOMEM;
    free(out->fuse);
    out->fuse = joined;
    return 0;
}

/* Passed on to libfuse as they are. */
static const char *const passed_on[] = {
    "allow_root", "auto_unmount", "max_read=",     "ro",    "rw",         "dev",
    "nodev",      "suid",         "nosuid",        "exec",  "noexec",     "async",
    "sync",       "dirsync",      "noatime",       "atime", "nodiratime", "relatime",
    "norelatime", "strictatime",  "nostrictatime", "debug", NULL,
};
/* For mount(8), fstab(5) and systemd; or always so. */
static const char *const ignored[] = {
    "defaults", "auto",     "noauto",   "user",     "user=",      "nouser",   "users",
    "nousers",  "owner",    "noowner",  "group",    "nogroup",    "_netdev",  "nofail",
    "x-*",      "X-*",      "comment=", "lazytime", "nolazytime", "diratime", "default_permissions",
    "fsname=",  "subtype=", NULL,
};

/* Patterns: "name", "name=" (anything behind), "name*" (any name that begins so). */
static bool listed(const char *const *list, const char *option)
{
    for (; *list != NULL; list++) {
        size_t length = strlen(*list);
        char last = (*list)[length - 1];
        if (last == '*'   ? strncmp(option, *list, length - 1) == 0
            : last == '=' ? strncmp(option, *list, length) == 0
                          : strcmp(option, *list) == 0)
            return true;
    }
    return false;
}

/* ---- the table ---- */

/* How many letters differ, for "did you mean": the edit distance, small words only. */
static unsigned distance(const char *a, const char *b)
{
    unsigned row[64];
    size_t length = strlen(b);
    if (length >= util_count(row))
        return UINT_MAX;
    for (size_t j = 0; j <= length; j++)
        row[j] = (unsigned)j;
    for (size_t i = 1; a[i - 1] != '\0'; i++) {
        unsigned diagonal = row[0];
        row[0] = (unsigned)i;
        for (size_t j = 1; j <= length; j++) {
            unsigned best = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            if (row[j] + 1 < best)
                best = row[j] + 1;
            if (row[j - 1] + 1 < best)
                best = row[j - 1] + 1;
            row[j] = best;
        }
    }
    return row[length];
}

static int refuse_unknown(char **error, const char *option)
{
    char name[64];
    snprintf(name, sizeof(name), "%.*s", (int)strcspn(option, "="), option);
    const char *nearest = NULL;
    unsigned best = 3; /* two letters wrong is a slip, more is another word */
    for (const struct options_entry *entry = options_table; entry->name != NULL; entry++) {
        unsigned wrong = distance(name, entry->name);
        if (wrong < best && entry->refused == NULL) {
            best = wrong;
            nearest = entry->name;
        }
    }
    if (nearest != NULL)
        return refuse(error, "%s: there is no such mount option; did you mean %s?", name, nearest);
    return refuse(error, "%s: there is no such mount option; p2pfs help lists them", name);
}

static int apply(struct options_parse *p, const char *option)
{
    if (strcmp(option, "allow_other") == 0)
        p->out->allow_other = true;
    if (strcmp(option, "allow_other") == 0 || listed(passed_on, option))
        return fuse_add(p->out, option);
    if (listed(ignored, option))
        return 0;
    size_t length = strcspn(option, "=");
    for (const struct options_entry *entry = options_table; entry->name != NULL; entry++) {
        if (strlen(entry->name) != length || strncmp(option, entry->name, length) != 0)
            continue;
        if (entry->refused != NULL)
            return refuse(p->error, "%s: %s", entry->name, entry->refused);
        bool has_value = option[length] == '=';
        if (entry->argument != NULL && (!has_value || option[length + 1] == '\0'))
            return refuse(p->error, "%s: it needs a value; write %s=%s", entry->name, entry->name,
                          entry->argument);
        if (entry->argument == NULL && has_value)
            return refuse(p->error, "%s: it takes no value; write %s alone", option, entry->name);
        p->name = entry->name;
        p->entry = entry;
        p->value = has_value ? option + length + 1 : NULL;
        return entry->set(p);
    }
    return refuse_unknown(p->error, option);
}

/* Options between commas; "\," is a comma inside one, "\\" a backslash. */
static int apply_all(struct options_parse *p, const char *text)
{
    char *option = malloc(strlen(text) + 1);
    if (option == NULL)
        return -ENOMEM;
    size_t length = 0;
    int rc = 0;
    for (const char *at = text; rc == 0; at++) {
        if (*at == '\\' && (at[1] == ',' || at[1] == '\\')) {
            option[length++] = *++at;
        } else if (*at != ',' && *at != '\0') {
            option[length++] = *at;
        } else {
            option[length] = '\0';
            if (length > 0)
                rc = apply(p, option);
            length = 0;
            if (*at == '\0')
                break;
        }
    }
    free(option);
    return rc;
}

/* ---- the command line ---- */

static int set_meta(struct options *out, const char *url, char **error)
{
    const char *authority = strstr(url, "://");
    if (authority == NULL)
        return refuse(error, "%s: not a metadata URL; write local:///DIRECTORY", url);
    authority += 3;
    const char *end = authority + strcspn(authority, "/?#");
    const char *at = memchr(authority, '@', (size_t)(end - authority));
    const char *colon = at == NULL ? NULL : memchr(authority, ':', (size_t)(at - authority));
    if (colon != NULL)
        return refuse(
            error,
            "%.*s://...: /proc/mounts would show a password in the URL; write it into a file "
            "and use -o credentials=FILE",
            (int)(authority - 3 - url), url);
    if (meta_backend(url) == NULL)
        return refuse(error,
                      "%s: no metadata service of this build speaks %.*s; use local:///DIRECTORY, "
                      "redis://HOST:PORT, etcd://HOST:PORT or http://HOST:PORT/PATH",
                      url, (int)(authority - url), url);
    return text_set(&out->meta, url);
}

/* Mooncake's variables count where no option was given: they are applied first. */
static int apply_environment(struct options_parse *p)
{
    static const struct {
        const char *theirs;
        enum log_level ours;
    } levels[] = {{"TRACE", LOG_DEBUG},  {"DEBUG", LOG_DEBUG}, {"INFO", LOG_INFO},
                  {"WARNING", LOG_WARN}, {"WARN", LOG_WARN},   {"ERROR", LOG_ERROR},
                  {"FATAL", LOG_ERROR}};
    const char *level = getenv("MC_LOG_LEVEL");
    for (size_t i = 0; level != NULL && i < util_count(levels); i++)
        if (strcasecmp(level, levels[i].theirs) == 0)
            p->out->log_level = levels[i].ours;
    static const struct {
        const char *variable;
        int (*set)(struct options_parse *p);
    } same[] = {{"MC_GID_INDEX", set_gid_index},
                {"MC_IB_PORT", set_ib_port},
                {"MC_CUSTOM_TOPO_JSON", set_nic_priority_matrix}};
    for (size_t i = 0; i < util_count(same); i++) {
        p->name = same[i].variable;
        p->value = getenv(p->name);
        int rc = p->value == NULL || p->value[0] == '\0' ? 0 : same[i].set(p);
        if (rc != 0)
            return rc;
    }
    if (getenv("MC_MTU"))
        log_warn(
            "MC_MTU is ignored: connections take the largest MTU that the way to the peer has; "
            "set that of the network interface instead (ip link set dev NAME mtu N)");
    const char *tcp = getenv("MC_FORCE_TCP");
    if (tcp != NULL && tcp[0] != '\0' && strcmp(tcp, "0") != 0)
        p->out->transport = OPTIONS_TRANSPORT_TCP;
    return 0;
}

static struct options defaults(void)
{
    return (struct options){.cache_size = memory_limit() / 2,
                            .transport = OPTIONS_TRANSPORT_AUTO,
                            .fetch = OPTIONS_FETCH_WHOLE,
                            .open = OPTIONS_OPEN_AUTO,
                            .read_timeout_s = OPTIONS_READ_TIMEOUT,
                            .orphan_ttl_s = OPTIONS_ORPHAN_TTL,
                            .digest = MODEL_XXH3,
                            .log_level = LOG_INFO,
                            .gid_index = -1,
                            .default_permissions = true};
}

/* libfuse's own escapes: a comma in a value must not end it. */
static int fuse_add_source(struct options *out)
{
    char *option = out->meta == NULL ? NULL : malloc(2 * strlen(out->meta) + 16);
    if (option == NULL)
        return -ENOMEM;
    char *to = stpcpy(option, "fsname=");
    for (const char *at = out->meta; *at != '\0'; at++) {
        if (*at == ',' || *at == '\\')
            *to++ = '\\';
        *to++ = *at;
    }
    *to = '\0';
    int rc = fuse_add(out, "subtype=p2pfs,default_permissions");
    if (rc == 0)
        rc = fuse_add(out, option);
    free(option);
    return rc;
}

int options_parse(int argc, char *const *argv, struct options *out, char **error)
{
    *error = NULL;
    struct options_parse p = {.out = out, .error = error};
    *out = defaults();
    int rc = apply_environment(&p);
    for (int i = 1; rc == 0 && i < argc; i++) {
        const char *word = argv[i];
        if (strcmp(word, "-f") == 0) {
            out->foreground = true;
        } else if (strncmp(word, "-o", 2) == 0) {
            const char *list = word[2] != '\0' ? word + 2 : i + 1 < argc ? argv[++i] : NULL;
            rc = list == NULL ? refuse(error, "-o: it needs options; write -o NAME=VALUE,...")
                              : apply_all(&p, list);
        } else if (word[0] == '-' && word[1] != '\0') {
            rc = refuse(error, "%s: there is no such switch; use p2pfs META DIR [-f] [-o OPTIONS]",
                        word);
        } else if (out->meta == NULL) {
            rc = set_meta(out, word, error);
        } else if (out->mountpoint == NULL) {
            rc = text_set(&out->mountpoint, word);
        } else {
            rc = refuse(error, "%s: one directory too many; use p2pfs META DIR [-f] [-o OPTIONS]",
                        word);
        }
    }
    if (rc == 0 && (out->meta == NULL || out->mountpoint == NULL))
        rc = refuse(error, "no directory to mount at; use p2pfs META DIR [-f] [-o OPTIONS]");
    if (rc == 0)
        rc = fuse_add_source(out);
    if (rc != 0)
        options_clear(out);
    return rc;
}

void options_clear(struct options *options)
{
    free(options->meta);
    free(options->mountpoint);
    free(options->node);
    free(options->listen);
    free(options->advertise);
    free(options->device);
    free(options->nic_priority_matrix);
    free(options->cache_dir);
    free(options->tcp_congestion);
    free(options->credentials);
    free(options->secret_file);
    free(options->locality);
    free(options->metrics);
    free(options->fuse);
    *options = (struct options){0};
}

#define NO_TLS "this build cannot encrypt; leave it out, or use a VPN"

const struct options_entry options_table[] = {
    {.name = "node",
     .argument = "NAME",
     .summary = "this node's name, unique in the cluster (default: the host's name and the port)",
     .set = set_node},
    {.name = "listen",
     .argument = "ADDR:PORT",
     .summary = "where peers connect (default: loopback with local: metadata, else any address)",
     .set = set_listen},
    {.name = "advertise",
     .argument = "ADDR[:PORT]",
     .summary = "the address that peers are told (default: as listened on)",
     .set = set_advertise},
    {.name = "transport",
     .argument = "auto|rdma|tcp",
     .summary = "how bytes travel (default: auto, by RDMA with peers that it reaches)",
     .set = set_word,
     .place = offsetof(struct options, transport)},
    {.name = "require_rdma",
     .summary = "move bytes by RDMA or not at all",
     .set = set_flag,
     .place = offsetof(struct options, require_rdma)},
    {.name = "device",
     .argument = "NAME[,NAME]",
     .summary = "RDMA devices (default: that of listen=, or all that are up)",
     .set = set_device},
    {.name = "gid_index",
     .argument = "N",
     .summary = "which of an RDMA device's addresses (default: RoCE v2, IPv4)",
     .set = set_gid_index},
    {.name = "nic_priority_matrix",
     .argument = "FILE",
     .summary = "which RDMA devices come first, in Mooncake's JSON",
     .set = set_nic_priority_matrix},
    {.name = "shard_size",
     .argument = "SIZE|auto",
     .summary = "bytes of a shard (default: file size / 256, from 1M to 64M)",
     .set = set_shard_size},
    {.name = "cache_size",
     .argument = "SIZE|N%",
     .summary = "memory for replicas (default: half of the memory)",
     .set = set_cache_size},
    {.name = "cache_dir",
     .argument = "DIR",
     .summary = "keep replicas in files there instead of memory",
     .set = set_cache_dir},
    {.name = "fetch",
     .argument = "whole|demand",
     .summary = "pull the whole file at the first read (default), or only what is read",
     .set = set_word,
     .place = offsetof(struct options, fetch)},
    {.name = "open",
     .argument = "stream|wait|auto",
     .summary = "whether an open waits for the file (default: auto, where that is faster)",
     .set = set_word,
     .place = offsetof(struct options, open)},
    {.name = "read_timeout",
     .argument = "SECONDS",
     .summary = "a read without any progress fails after this (default: 60)",
     .set = set_seconds,
     .place = offsetof(struct options, read_timeout_s),
     .least = 1},
    {.name = "orphan_ttl",
     .argument = "SECONDS",
     .summary = "a name that nobody holds goes after this (default: 3600; 0: never)",
     .set = set_seconds,
     .place = offsetof(struct options, orphan_ttl_s)},
    {.name = "tcp_congestion",
     .argument = "NAME",
     .summary = "congestion control of connections to peers",
     .set = set_tcp_congestion},
    {.name = "max_download",
     .argument = "RATE",
     .summary = "limit of what comes from peers, in bytes a second (default: 0, none)",
     .set = set_rate,
     .place = offsetof(struct options, max_download)},
    {.name = "max_upload",
     .argument = "RATE",
     .summary = "limit of what goes to peers, in bytes a second (default: 0, none)",
     .set = set_rate,
     .place = offsetof(struct options, max_upload)},
    {.name = "seed",
     .argument = "normal|idle",
     .summary = "whether uploads go behind all other work of this machine (default: normal)",
     .set = set_word,
     .place = offsetof(struct options, seed)},
    {.name = "digest",
     .argument = "xxh3|sha256",
     .summary = "how new files are digested (default: xxh3)",
     .set = set_word,
     .place = offsetof(struct options, digest),
     .least = MODEL_XXH3},
    {.name = "allow_overwrite",
     .summary = "a registered name may be replaced by a new version",
     .set = set_flag,
     .place = offsetof(struct options, allow_overwrite)},
    {.name = "credentials",
     .argument = "FILE",
     .summary = "user and password for the metadata service",
     .set = set_text,
     .place = offsetof(struct options, credentials)},
    {.name = "secret_file",
     .argument = "FILE",
     .summary = "the cluster's secret; only nodes that have it are served and believed",
     .set = set_text,
     .place = offsetof(struct options, secret_file)},
    {.name = "tls_cert",
     .argument = "FILE",
     .summary = "certificate of this node",
     .refused = NO_TLS},
    {.name = "tls_key", .argument = "FILE", .summary = "its key", .refused = NO_TLS},
    {.name = "tls_ca", .argument = "FILE", .summary = "who signs certificates", .refused = NO_TLS},
    {.name = "encryption",
     .argument = "off",
     .summary = "of connections to peers",
     .set = set_encryption},
    {.name = "locality",
     .argument = "ZONE[/RACK]",
     .summary = "where this node stands",
     .set = set_locality},
    {.name = "metrics",
     .argument = "ADDR:PORT",
     .summary = "serve .p2pfs/metrics over HTTP there (default: no HTTP)",
     .set = set_metrics},
    {.name = "log_level",
     .argument = "error|warn|info|debug",
     .summary = "what is worth a line (default: info)",
     .set = set_word,
     .place = offsetof(struct options, log_level)},
    {.name = NULL},
};
