/* Format: files of models that begin with a header: names, types and places of the tensors. Many a program reads the
 * headers of all files first, and of most of them nothing else, so that reading one is no reason to pull the file.
 * Any thread. */
#ifndef P2PFS_FS_FORMAT_H
#define P2PFS_FS_FORMAT_H

#include "fs/house.h"

struct handle;
struct inode;

enum format { FORMAT_OTHER, FORMAT_SAFETENSORS, FORMAT_GGUF };

enum format format_of(struct house *house, const struct inode *inode); /* by the end of its name */
/* Whether a read at this offset may be one of the header. */
bool format_peek(struct house *house, const struct handle *handle, uint64_t offset);

#endif
