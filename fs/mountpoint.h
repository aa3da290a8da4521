/* Mountpoint: whether a directory can be mounted on, and what the kernel's table of mounts says
 * about it. */
#ifndef P2PFS_FS_MOUNTPOINT_H
#define P2PFS_FS_MOUNTPOINT_H

#include <stdbool.h>
#include <sys/types.h>

#include "meta/model.h"

/* An empty directory that is no p2pfs mount: *absolute is its path (malloc'd) and *root the
 * attributes that the mount's root takes over. Otherwise negative errno and one sentence with
 * the remedy (malloc'd). */
int mountpoint_check(const char *dir, char **absolute, struct model_attr *root, char **error);
/* The device of what is mounted at the absolute path, the topmost; 0: nothing. Touches no file
 * system but /proc. */
dev_t mountpoint_device(const char *absolute);

#endif
