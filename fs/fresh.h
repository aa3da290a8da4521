/* Fresh: drafts: a file that is being written on this node and that no other node sees yet. Its
 * last close registers it.
 *
 * Drafts have names of their own here, keyed by the parent's id, so that a renamed directory
 * takes them along; lookup and readdir show them before what the catalog says. The entry's id
 * and the version are fixed at the start, so the nodeid stays when the draft becomes a
 * registered file.
 *
 *   WRITING -> REGISTERING -> REGISTERED   its last writer closed it, and the catalog took it
 *   WRITING, REGISTERING -> FAILED         its writer was killed, or the catalog refused it
 *
 * An unlinked draft stays WRITING without a name, and is dropped with its last handle. Any
 * thread. */
#ifndef P2PFS_FS_FRESH_H
#define P2PFS_FS_FRESH_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

#include "engine/engine.h"
#include "fs/house.h"
#include "fs/inode.h"

struct fresh_files;
struct fresh;

int fresh_files_open(struct house *house, struct fresh_files **drafts);
/* The mount ends: waits for registrations that run (catalog's deadline), fails the other drafts.
 * Handles may be closed afterwards, nothing else. NULL is harmless. */
void fresh_files_shut(struct fresh_files *drafts);
void fresh_files_close(struct fresh_files *drafts);

/* An empty draft under a name; its inode with one lookup. The name may lead to a registered file
 * already, which the draft hides, and replaces when it registers (allow_overwrite). -EEXIST:
 * there is a draft of that name. */
int fresh_create(struct house *house, uint64_t parent, const char *name,
                 const struct model_attr *attr, struct inode **out);
/* Its inode with one more lookup, or NULL. */
struct inode *fresh_lookup(struct house *house, uint64_t parent, const char *name);
bool fresh_exists(struct house *house, uint64_t parent, const char *name);
/* Names of the drafts in a directory, malloc'd each and together; the caller frees. -ENOMEM. */
int fresh_names(struct house *house, uint64_t parent, char ***names, size_t *count);
bool fresh_any(struct house *house, uint64_t parent);

/* Whether the inode is a draft still: neither registered nor made by the catalog. */
bool fresh_is(struct house *house, const struct inode *inode);
void fresh_stat(struct house *house, struct inode *inode, struct stat *out);
/* Of the bytes behind a draft, as written or as registered. */
uint64_t fresh_size(struct house *house, struct replica *draft);
void fresh_setattr(struct house *house, struct inode *inode, unsigned mask,
                   const struct model_attr *attr);
/* -EROFS: registered already. */
int fresh_truncate(struct house *house, struct inode *inode, uint64_t size);
int fresh_info(struct house *house, struct inode *inode, struct engine_info *out);
/* Its bytes have changed now, by a caller who is not root when `strip` (which clears setuid and
 * setgid). */
void fresh_touch(struct house *house, struct inode *inode, bool strip);

/* Another handle; *replica is borrowed until fresh_close. -ESTALE: it is not a draft any more;
 * look the name up again. -EPERM: being registered, and writes. */
int fresh_open(struct house *house, struct inode *inode, bool writes, struct replica **replica);
void fresh_close(struct house *house, struct inode *inode, bool writes);
/* A writable handle was closed once (FLUSH) by `thread`; registers the draft when that was its
 * last writer. done: 0, or what close(2) must return; perhaps inside the call. */
void fresh_flush(struct house *house, struct inode *inode, pid_t thread, pid_t opener,
                 bool mappable, engine_done done, void *arg);

/* unlink(2) and rename(2) of a draft. -ENOENT: no such draft; -EBUSY: it is being registered
 * right now. A draft of the new name is replaced. */
int fresh_unlink(struct house *house, uint64_t parent, const char *name);
int fresh_rename(struct house *house, uint64_t parent, const char *name, uint64_t new_parent,
                 const char *new_name);

#endif
