/* Any bytes as a key and as each kind of record: what is decoded can be encoded, and means the same then. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "meta/codec.h"

#define MUST(condition)   \
    do {                  \
        if (!(condition)) \
            abort();      \
    } while (0)

static void try_key(const char *text)
{
    struct codec_key key;
    char again[CODEC_KEY_MAX];
    if (codec_key_parse(text, &key) < 0)
        return;
    switch (key.kind) {
    case CODEC_ENTRY:
        codec_key_entry(key.parent, key.name, again);
        break;
    case CODEC_DIR:
        codec_key_dir(key.parent, again);
        break;
    case CODEC_VERSION:
        codec_key_version(&key.version, again);
        break;
    case CODEC_NODE:
        codec_key_node(key.name, again);
        break;
    case CODEC_HOLDER:
        codec_key_holder(&key.version, key.name, again);
        break;
    case CODEC_OTHER:
        return;
    }
    MUST(strcmp(text, again) == 0);
}

static void try_entry(const char *json)
{
    struct model_entry first;
    struct model_entry second;
    if (codec_entry_decode(json, &first) < 0)
        return;
    char *once = codec_entry_encode(&first);
    MUST(once && codec_entry_decode(once, &second) == 0);
    char *twice = codec_entry_encode(&second);
    MUST(twice && strcmp(once, twice) == 0 && first.id == second.id && first.size == second.size);
    free(once);
    free(twice);
    model_entry_clear(&first);
    model_entry_clear(&second);
}

static void try_version(const char *json)
{
    struct model_version first;
    struct model_version second;
    if (codec_version_decode(json, &first) < 0)
        return;
    MUST(model_shard_count(first.size, first.shard_size) <= MODEL_SHARDS_MAX);
    char *once = codec_version_encode(&first);
    MUST(once && codec_version_decode(once, &second) == 0);
    char *twice = codec_version_encode(&second);
    MUST(twice && strcmp(once, twice) == 0 && first.size == second.size);
    free(once);
    free(twice);
    model_version_clear(&first);
    model_version_clear(&second);
}

static void try_node(const char *json)
{
    struct model_node first;
    struct model_node second;
    if (codec_node_decode(json, &first) < 0)
        return;
    char *once = codec_node_encode(&first);
    MUST(once && codec_node_decode(once, &second) == 0);
    MUST(memcmp(&first, &second, sizeof(first)) == 0);
    free(once);
}

static void try_holder(const char *json)
{
    struct model_holder first;
    struct model_holder second;
    if (codec_holder_decode(json, &first) < 0)
        return;
    char *once = codec_holder_encode(&first);
    MUST(once && codec_holder_decode(once, &second) == 0);
    MUST(memcmp(&first, &second, sizeof(first)) == 0);
    free(once);
}

static void try_others(const char *json)
{
    struct model_node first;
    struct model_node second;
    struct model_id id;
    struct model_id again;
    if (codec_dir_decode(json, &first) == 0) {
        char *once = codec_dir_encode(first.name[0] ? &first : NULL);
        MUST(once && codec_dir_decode(once, &second) == 0);
        MUST(strcmp(first.name, second.name) == 0 && first.boot == second.boot);
        free(once);
    }
    if (codec_instance_decode(json, &id) == 0) {
        char *once = codec_instance_encode(&id);
        MUST(once && codec_instance_decode(once, &again) == 0 && model_id_equal(&id, &again));
        free(once);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char *text = malloc(size + 1);
    if (!text)
        return 0;
    memcpy(text, data, size);
    text[size] = '\0';
    try_key(text);
    try_entry(text);
    try_version(text);
    try_node(text);
    try_holder(text);
    try_others(text);
    free(text);
    return 0;
}
