/* Draft: a replica while it is written on this node: bytes through pwrite, digests of leaves behind the writer, and
 * the registration that turns it into an ordinary complete replica. Any thread, but for what says otherwise. */
#ifndef P2PFS_ENGINE_DRAFT_H
#define P2PFS_ENGINE_DRAFT_H

#include "engine/replica.h"

int draft_new(struct engine *engine, struct replica **draft);
/* As engine.h's engine_draft_*. */
int draft_write(struct replica *draft, uint64_t offset, const void *data, size_t length,
                engine_done done, void *arg);
int draft_truncate(struct replica *draft, uint64_t size);
void draft_fail(struct replica *draft, int error);
int draft_register(struct replica *draft, uint64_t parent, const char *name, uint64_t id,
                   const struct model_attr *attr, unsigned flags, catalog_done done, void *arg);
/* A range below the size as it is now. */
int draft_read(struct replica *draft, uint64_t offset, size_t length, void *out);
uint64_t draft_size(struct replica *draft);
/* When it is not a draft any more, or dies. */
void draft_free(struct draft *draft);

#endif
