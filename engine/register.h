/* Register: files and trees that stay where they are get their names. Any thread. */
#ifndef P2PFS_ENGINE_REGISTER_H
#define P2PFS_ENGINE_REGISTER_H

#include "engine/core.h"

int register_file(struct engine *engine, const char *path, uint64_t parent, const char *name,
                  unsigned flags, catalog_done done, void *arg);
int register_tree(struct engine *engine, const char *path, uint64_t parent, const char *name,
                  unsigned flags, catalog_done done, void *arg);
/* Offers again what this node had registered in place before it was restarted. */
void register_adopt(struct engine *engine);

#endif
