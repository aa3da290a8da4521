#include "meta/model.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "meta/base/util.h"

struct model_id model_id_new(void)
{
    struct model_id id;
    do {
        util_random(id.bytes, sizeof(id.bytes));
    } while (model_id_zero(&id));
    return id;
}

bool model_id_equal(const struct model_id *a, const struct model_id *b)
{
    return memcmp(a->bytes, b->bytes, sizeof(a->bytes)) == 0;
}

bool model_id_zero(const struct model_id *id)
{
    static const struct model_id zero;
    return model_id_equal(id, &zero);
}

void model_id_print(const struct model_id *id, char out[MODEL_ID_TEXT])
{
    util_hex_encode(id->bytes, sizeof(id->bytes), out);
}

int model_id_parse(const char *text, struct model_id *id)
{
    return util_hex_decode(text, id->bytes, sizeof(id->bytes));
}

void model_entry_clear(struct model_entry *entry)
{
    free(entry->name);
    free(entry->target);
    memset(entry, 0, sizeof(*entry));
}

int model_entry_copy(struct model_entry *to, const struct model_entry *from)
{
    struct model_entry copy = *from;
    copy.name = from->name ? strdup(from->name) : NULL;
    copy.target = from->target ? strdup(from->target) : NULL;
    if ((from->name && !copy.name) || (from->target && !copy.target)) {
        model_entry_clear(&copy);
        memset(to, 0, sizeof(*to));
        return -ENOMEM;
    }
    *to = copy;
    return 0;
}

void model_version_clear(struct model_version *version)
{
    free((char *)(uintptr_t)version->origin_node);
    free(version->origin_path);
    free(version->pieces);
    memset(version, 0, sizeof(*version));
}

uint64_t *model_pieces_copy(const uint64_t *pieces, uint32_t count)
{
    uint64_t *copy = pieces ? malloc(count * sizeof *copy) : NULL;
    return copy ? memcpy(copy, pieces, count * sizeof *copy) : NULL;
}

int model_version_copy(struct model_version *to, const struct model_version *from)
{
    char *node = from->origin_node ? strdup(from->origin_node) : NULL;
    char *path = from->origin_path ? strdup(from->origin_path) : NULL;
    uint64_t *pieces = model_pieces_copy(from->pieces, from->piece_count);
    if ((from->origin_node && !node) || (from->origin_path && !path) || (from->pieces && !pieces)) {
        free(node);
        free(path);
        free(pieces);
        memset(to, 0, sizeof(*to));
        return -ENOMEM;
    }
    *to = *from;
    to->origin_node = node;
    to->origin_path = path;
    to->pieces = pieces;
    return 0;
}

uint32_t model_shard_auto(uint64_t size)
{
    /* Whole MiB, so that the leaves of a digest are whole too; rounded up, so that 256 suffice. */
    const uint64_t step = MODEL_AUTO_MIN;
    uint64_t share = size / 256 + (size % 256 != 0);
    if (share > MODEL_AUTO_MAX - step)
        return MODEL_AUTO_MAX;
    share = (share + step - 1) / step * step;
    return share < MODEL_AUTO_MIN ? MODEL_AUTO_MIN : (uint32_t)share;
}

uint32_t model_shard_count(uint64_t size, uint32_t shard_size)
{
    if (shard_size == 0)
        return 0;
    return (uint32_t)(size / shard_size + (size % shard_size != 0));
}

uint64_t model_shard_length(uint64_t size, uint32_t shard_size, uint32_t shard)
{
    uint64_t start = (uint64_t)shard * shard_size;
    if (start >= size)
        return 0;
    return size - start < shard_size ? size - start : shard_size;
}

int model_name_check(const char *name)
{
    if (!*name || strcmp(name, ".") == 0 || strcmp(name, "..") == 0 || strchr(name, '/'))
        return -EINVAL;
    return strlen(name) > MODEL_NAME_MAX ? -ENAMETOOLONG : 0;
}

int model_node_check(const char *name)
{
    size_t length = strlen(name);
    if (length == 0 || length > MODEL_NODE_MAX)
        return -EINVAL;
    for (const char *p = name; *p; p++) {
        if (*p <= ' ' || *p > '~' || *p == '/' || *p == '%')
            return -EINVAL;
    }
    return 0;
}
