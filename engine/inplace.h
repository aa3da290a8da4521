/* Inplace: what is registered where it lies: files, opened when somebody wants them, digested in the background, checked
 * against what they were before and after every use; and a program's memory (extents.h), which is digested alike but
 * cannot be checked. Work threads (they may wait for a local disk). */
#ifndef P2PFS_ENGINE_INPLACE_H
#define P2PFS_ENGINE_INPLACE_H

#include "engine/replica.h"

/* The file behind the replica is open and what it was when it was registered. 0; -ESTALE: it has changed or vanished
 * (withdrawn and logged, once); -EMFILE and the like. */
int inplace_open(struct replica *replica);
/* Shard: inplace_open, its digest known, its bytes on their way into the page cache. */
int inplace_prepare(struct replica *replica, uint32_t shard);
/* Reads a range; -ESTALE or -EIO when the file is not what it was. */
int inplace_read(struct replica *replica, uint64_t offset, size_t length, void *out);
/* Closes the file when nobody reads it: whoever was an open, a user or a grant less calls it. Any thread; nothing to do
 * for a replica that does not lie in place. */
void inplace_idle(struct replica *replica);
/* Digests all shards in the background, then seals the version in the metadata. Also for a replica of ours that is
 * LIVE without a digest (direct.h). */
void inplace_hash_start(struct replica *replica);

/* A version that describes the file as it is now. -EINVAL: not a regular file; else as open(2). */
int inplace_version(struct engine *engine, const char *path, struct model_version *version,
                    struct model_attr *attr);

#endif
