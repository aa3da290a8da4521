/* Options: what the command line and -o say, checked; and the table from which help, man page
 * test and parser live. */
#ifndef P2PFS_FS_OPTIONS_H
#define P2PFS_FS_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "meta/base/log.h"
#include "meta/model.h"

/* What an open of a file waits for that is still arriving; see hold.h. */
enum options_open { OPTIONS_OPEN_STREAM, OPTIONS_OPEN_WAIT, OPTIONS_OPEN_AUTO };
enum options_transport { OPTIONS_TRANSPORT_AUTO, OPTIONS_TRANSPORT_RDMA, OPTIONS_TRANSPORT_TCP };
enum options_fetch { OPTIONS_FETCH_WHOLE, OPTIONS_FETCH_DEMAND };
enum options_seed { OPTIONS_SEED_NORMAL, OPTIONS_SEED_IDLE };

/* Every string is owned; options_clear frees. */
struct options {
    char *meta;       /* URL */
    char *mountpoint; /* as given */
    bool foreground;
    char *node;
    char *listen;
    char *advertise;
    enum options_transport transport;
    bool require_rdma;
    char *device;              /* NAME[,NAME], or NULL */
    char *nic_priority_matrix; /* its text, or NULL */
    int gid_index;             /* -1: chosen */
    unsigned ib_port;          /* 0: chosen */
    uint32_t shard_size;       /* 0: auto */
    uint64_t cache_size;
    char *cache_dir;
    enum options_fetch fetch;
    enum options_open open;
    uint32_t read_timeout_s;
    uint32_t orphan_ttl_s;
    char *tcp_congestion;
    enum options_seed seed;
    uint64_t max_upload, max_download; /* bytes a second; 0: no limit */
    enum model_digest digest;
    bool allow_overwrite;
    char *credentials;
    char *secret_file;
    char *locality;
    char *metrics; /* ADDR:PORT, or NULL */
    enum log_level log_level;
    bool allow_other;
    bool default_permissions;
    char *fuse; /* options for libfuse, comma-separated (fsname, subtype, allow_other, ...) */
};

struct options_parse;

/* One accepted -o option. `refused`: accepted by the contract, but this build cannot do it; says
 * what instead. */
struct options_entry {
    const char *name;     /* "cache_size" */
    const char *argument; /* "SIZE", or NULL for a flag */
    const char *summary;  /* one line for help and man page */
    const char *refused;
    int (*set)(struct options_parse *parse); /* options.c's own; NULL: refused */
    size_t place;                            /* in struct options, for setters of several options */
    unsigned least;                          /* the least value, or the enum's first */
};
extern const struct options_entry options_table[]; /* ends with name NULL */

/* Parses `p2pfs META DIR [-f] [-o OPTIONS]...` (argv[0] is the program). 0, or -EINVAL with
 * *error: one sentence that names the option, the value and the remedy (malloc'd). Environment
 * variables of Mooncake count where no option does. */
int options_parse(int argc, char *const *argv, struct options *out, char **error);
void options_clear(struct options *options);
/* A rate: bytes a second as a size, 0 for none. -EINVAL also for one that is too low to work. */
int options_rate_parse(const char *text, uint64_t *rate);

#endif
