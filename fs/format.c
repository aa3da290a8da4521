#include "fs/format.h"

#include <endian.h>
#include <string.h>

#include "fs/inode.h"
#include "fs/read.h"

/* So far beyond the header may its readers and the kernel's read-ahead go: programs read a block
 * (INODE_BLOCK) at once, and the kernel as much ahead of those that read in sequence. */
#define FORMAT_AHEAD (4u << 20)
/* safetensors: 8 bytes, little-endian, that tell the length of the JSON behind them; its own
 * readers take no more than this. */
#define FORMAT_SAFETENSORS_MAX 100000000u
/* GGUF: where it ends is told by reading it word for word. Vocabularies of 256,000 words take 12 MiB, and taking the
 * begin of the tensors for header costs little: whoever goes on reading has the rest pulled 16 MiB later. */
#define FORMAT_GGUF_HEADER (16u << 20)

static bool ends(const char *name, const char *end)
{
    size_t length = strlen(name), tail = strlen(end);
    return length > tail && strcasecmp(name + length - tail, end) == 0;
}

enum format format_of(struct house *house, const struct inode *inode)
{
    struct model_entry entry;
    if (catalog_entry(house->catalog, inode->key.id, &entry) != 0)
        return FORMAT_OTHER;
    enum format format = ends(entry.name, ".safetensors") ? FORMAT_SAFETENSORS
                         : ends(entry.name, ".gguf")      ? FORMAT_GGUF
                                                          : FORMAT_OTHER;
    model_entry_clear(&entry);
    return format;
}

static uint64_t safetensors_end(struct house *house, struct replica *replica)
{
    uint64_t room = 0, length;
    const void *bytes = NULL;
    if (replica_size(replica) < sizeof(length) || !replica_here(replica, 0, sizeof(length)) ||
        engine_bytes(house->engine, replica, 0, sizeof(length), &room, &bytes) != 0)
        return 0;
    memcpy(&length, bytes, sizeof(length));
    length = le64toh(length);
    return length <= FORMAT_SAFETENSORS_MAX ? sizeof(length) + length : 0;
}

bool format_peek(struct house *house, const struct handle *handle, uint64_t offset)
{
    switch (handle->format) {
    case FORMAT_SAFETENSORS:
        return offset < FORMAT_AHEAD ||
               offset < safetensors_end(house, handle->replica) + FORMAT_AHEAD;
    case FORMAT_GGUF:
        return offset < FORMAT_GGUF_HEADER;
    default:
        return false;
    }
}
