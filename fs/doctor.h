/* Doctor: findings of `p2pfs doctor`, and the checks that have files of their own. One thread. */
#ifndef P2PFS_FS_DOCTOR_H
#define P2PFS_FS_DOCTOR_H

#include <stdbool.h>
#include <stddef.h>

#include "fs/json.h"

enum doctor_level { GOOD, WARN, STOP };

struct doctor {
    bool as_json;
    struct json_out out;
    bool stops; /* something keeps a mount from working, or from a node */
};

/* One finding: what was looked at, what was seen, and what to do about it (NULL: nothing). */
void doctor_find(struct doctor *doctor, enum doctor_level level, const char *what,
                 const char *remedy, const char *format, ...) __attribute__((format(printf, 5, 6)));

/* The first line of a small file, without its newline; "" when there is none. */
void doctor_line(const char *path, char *out, size_t size);

/* The ports of every RDMA device, as the sysfs below `sys` ("/sys") has them. Returns the number of devices. */
size_t doctor_devices(struct doctor *doctor, const char *sys);

/* Whether the live nodes that a mount knows accept connections from here. */
void doctor_peers(struct doctor *doctor, const char *mount);

#endif
