#include "meta/codec.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "meta/base/util.h"
#include "meta/codec_text.h"

/* ---- fields ---- */

/* Puts gather a failure in *ok, so that a record is written first and checked once. */
static cJSON *codec_begin(bool *ok)
{
    cJSON *object = cJSON_CreateObject();
    *ok = object && cJSON_AddNumberToObject(object, "v", CODEC_FORMAT);
    return object;
}

static char *codec_finish(cJSON *object, bool ok)
{
    char *text = ok ? cJSON_PrintUnformatted(object) : NULL;
    cJSON_Delete(object);
    return text;
}

static void codec_put_word(cJSON *object, const char *field, const char *word, bool *ok)
{
    *ok = *ok && cJSON_AddStringToObject(object, field, word);
}

static void codec_put_number(cJSON *object, const char *field, uint64_t number, bool *ok)
{
    *ok = *ok && cJSON_AddNumberToObject(object, field, (double)number);
}

static void codec_put_bytes(cJSON *object, const char *field, const char *bytes, bool *ok)
{
    util_autofree char *text = malloc(3 * strlen(bytes) + 1);
    *ok = *ok && text;
    if (*ok) {
        codec_percent_encode(bytes, text);
        codec_put_word(object, field, text, ok);
    }
}

static void codec_put_u64(cJSON *object, const char *field, uint64_t v, bool *ok)
{
    char text[17];
    snprintf(text, sizeof(text), "%016" PRIx64, v);
    codec_put_word(object, field, text, ok);
}

/* Nanoseconds don't fit the 53 bits that every JSON reader keeps of a number. */
static void codec_put_time(cJSON *object, const char *field, int64_t ns, bool *ok)
{
    char text[24];
    snprintf(text, sizeof(text), "%" PRId64, ns);
    codec_put_word(object, field, text, ok);
}

static void codec_put_id(cJSON *object, const char *field, const struct model_id *id, bool *ok)
{
    char text[MODEL_ID_TEXT];
    model_id_print(id, text);
    codec_put_word(object, field, text, ok);
}

static int codec_parse(const char *json, cJSON **object)
{
    /* cJSON calls itself for every level; records have one. */
    int depth = 0;
    for (const char *p = json; *p; p++) {
        if (*p == '{' || *p == '[')
            depth++;
        if (depth > 64)
            return -EBADMSG;
    }
    *object = cJSON_ParseWithOpts(json, NULL, true);
    if (!*object)
        return -EBADMSG;
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(*object, "v");
    if (!cJSON_IsObject(*object) || !cJSON_IsNumber(v)) {
        cJSON_Delete(*object);
        return -EBADMSG;
    }
    if (v->valuedouble != CODEC_FORMAT) {
        cJSON_Delete(*object);
        return -EPROTONOSUPPORT;
    }
    return 0;
}

static int codec_get_word(const cJSON *object, const char *field, const char **word)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, field);
    if (!cJSON_IsString(item) || !item->valuestring)
        return -EBADMSG;
    *word = item->valuestring;
    return 0;
}

static int codec_number(const cJSON *item, uint64_t least, uint64_t most, uint64_t *out)
{
    if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0 && item->valuedouble <= 0x1p53))
        return -EBADMSG;
    uint64_t number = (uint64_t)item->valuedouble;
    if ((double)number != item->valuedouble || number < least || number > most)
        return -EBADMSG;
    *out = number;
    return 0;
}

static int codec_get_number(const cJSON *object, const char *field, uint64_t least, uint64_t most,
                            uint64_t *out)
{
    return codec_number(cJSON_GetObjectItemCaseSensitive(object, field), least, most, out);
}

static int codec_get_bytes(const cJSON *object, const char *field, char *out, size_t size)
{
    const char *word;
    return codec_get_word(object, field, &word) < 0 ? -EBADMSG
                                                    : codec_percent_decode(word, out, size);
}

/* A string of 1 to `max` bytes on the heap. */
static int codec_get_heap(const cJSON *object, const char *field, size_t max, char **out)
{
    const char *word;
    if (codec_get_word(object, field, &word) < 0 || !*word || strlen(word) > 3 * max)
        return -EBADMSG;
    util_autofree char *bytes = malloc(max + 1);
    if (!bytes)
        return -ENOMEM;
    if (codec_percent_decode(word, bytes, max + 1) < 0)
        return -EBADMSG;
    *out = strdup(bytes);
    return *out ? 0 : -ENOMEM;
}

static int codec_get_u64(const cJSON *object, const char *field, uint64_t *v)
{
    const char *word;
    return codec_get_word(object, field, &word) < 0 ? -EBADMSG : codec_u64_decode(word, v);
}

static int codec_get_time(const cJSON *object, const char *field, int64_t *ns)
{
    const char *word;
    char back[24];
    if (codec_get_word(object, field, &word) < 0)
        return -EBADMSG;
    errno = 0;
    long long value = strtoll(word, NULL, 10);
    if (errno)
        return -EBADMSG;
    snprintf(back, sizeof(back), "%lld", value);
    if (strcmp(word, back) != 0)
        return -EBADMSG;
    *ns = value;
    return 0;
}

static int codec_get_id(const cJSON *object, const char *field, struct model_id *id)
{
    const char *word;
    if (codec_get_word(object, field, &word) < 0 || model_id_parse(word, id) < 0)
        return -EBADMSG;
    return model_id_zero(id) ? -EBADMSG : 0;
}

/* A node's name and boot: who, in which incarnation. */
static int codec_get_node(const cJSON *object, char name[MODEL_NODE_MAX + 1], uint64_t *boot)
{
    const char *word;
    if (codec_get_word(object, "node", &word) < 0 || model_node_check(word) < 0)
        return -EBADMSG;
    memcpy(name, word, strlen(word) + 1);
    return codec_get_u64(object, "boot", boot);
}

/* ---- kinds ---- */

static const char *const codec_kinds[] = {
    [MODEL_DIR] = "dir",
    [MODEL_FILE] = "file",
    [MODEL_SYMLINK] = "symlink",
};

static const struct {
    const char *word;
    size_t length;
} codec_digests[] = {
    [MODEL_XXH3] = {"xxh3", 16},
    [MODEL_SHA256] = {"sha256", 32},
};

char *codec_entry_encode(const struct model_entry *entry)
{
    bool ok;
    cJSON *object = codec_begin(&ok);
    codec_put_word(object, "kind", codec_kinds[entry->kind], &ok);
    codec_put_u64(object, "id", entry->id, &ok);
    codec_put_number(object, "mode", entry->attr.mode, &ok);
    codec_put_number(object, "uid", entry->attr.uid, &ok);
    codec_put_number(object, "gid", entry->attr.gid, &ok);
    codec_put_time(object, "mtime", entry->attr.mtime_ns, &ok);
    if (entry->kind == MODEL_FILE) {
        codec_put_id(object, "version", &entry->version, &ok);
        codec_put_number(object, "size", entry->size, &ok);
    } else if (entry->kind == MODEL_SYMLINK) {
        codec_put_bytes(object, "target", entry->target, &ok);
    }
    return codec_finish(object, ok);
}

static int codec_get_attr(const cJSON *object, struct model_attr *attr)
{
    uint64_t mode;
    uint64_t uid;
    uint64_t gid;
    if (codec_get_number(object, "mode", 0, 07777, &mode) < 0 ||
        codec_get_number(object, "uid", 0, UINT32_MAX, &uid) < 0 ||
        codec_get_number(object, "gid", 0, UINT32_MAX, &gid) < 0)
        return -EBADMSG;
    attr->mode = (uint32_t)mode;
    attr->uid = (uint32_t)uid;
    attr->gid = (uint32_t)gid;
    return codec_get_time(object, "mtime", &attr->mtime_ns);
}

static int codec_entry_fields(const cJSON *object, struct model_entry *out)
{
    const char *word;
    if (codec_get_word(object, "kind", &word) < 0)
        return -EBADMSG;
    for (size_t i = MODEL_DIR; i < util_count(codec_kinds); i++) {
        if (strcmp(word, codec_kinds[i]) == 0)
            out->kind = (enum model_kind)i;
    }
    if (codec_get_u64(object, "id", &out->id) < 0 || out->id == 0 ||
        codec_get_attr(object, &out->attr) < 0)
        return -EBADMSG;
    switch (out->kind) {
    case MODEL_DIR:
        return 0;
    case MODEL_FILE:
        if (codec_get_id(object, "version", &out->version) < 0)
            return -EBADMSG;
        return codec_get_number(object, "size", 0, MODEL_SIZE_MAX, &out->size);
    case MODEL_SYMLINK:
        return codec_get_heap(object, "target", MODEL_PATH_MAX, &out->target);
    }
    return -EBADMSG;
}

int codec_entry_decode(const char *json, struct model_entry *out)
{
    cJSON *object;
    memset(out, 0, sizeof(*out));
    int rc = codec_parse(json, &object);
    if (rc < 0)
        return rc;
    rc = codec_entry_fields(object, out);
    cJSON_Delete(object);
    if (rc < 0)
        model_entry_clear(out);
    return rc;
}

char *codec_dir_encode(const struct model_node *stager)
{
    bool ok;
    cJSON *object = codec_begin(&ok);
    if (stager) {
        codec_put_word(object, "node", stager->name, &ok);
        codec_put_u64(object, "boot", stager->boot, &ok);
    }
    return codec_finish(object, ok);
}

int codec_dir_decode(const char *json, struct model_node *stager)
{
    cJSON *object;
    memset(stager, 0, sizeof(*stager));
    int rc = codec_parse(json, &object);
    if (rc < 0)
        return rc;
    if (cJSON_HasObjectItem(object, "node"))
        rc = codec_get_node(object, stager->name, &stager->boot);
    cJSON_Delete(object);
    if (rc < 0)
        memset(stager, 0, sizeof(*stager));
    return rc;
}

char *codec_instance_encode(const struct model_id *instance)
{
    bool ok;
    cJSON *object = codec_begin(&ok);
    codec_put_id(object, "instance", instance, &ok);
    return codec_finish(object, ok);
}

int codec_instance_decode(const char *json, struct model_id *instance)
{
    cJSON *object;
    memset(instance, 0, sizeof(*instance));
    int rc = codec_parse(json, &object);
    if (rc < 0)
        return rc;
    rc = codec_get_id(object, "instance", instance);
    cJSON_Delete(object);
    if (rc < 0)
        memset(instance, 0, sizeof(*instance));
    return rc;
}

size_t codec_digest_length(enum model_digest digest)
{
    return digest > 0 && (size_t)digest < util_count(codec_digests) ? codec_digests[digest].length
                                                                    : 0;
}

static void codec_put_pieces(cJSON *object, const struct model_version *version, bool *ok)
{
    cJSON *list = cJSON_AddArrayToObject(object, "pieces");
    for (uint32_t i = 0; i < version->piece_count && list; i++) {
        cJSON *item = cJSON_CreateNumber((double)version->pieces[i]);
        if (!item || !cJSON_AddItemToArray(list, item)) {
            cJSON_Delete(item);
            list = NULL;
        }
    }
    *ok = *ok && list;
}

char *codec_version_encode(const struct model_version *version)
{
    bool ok;
    cJSON *object = codec_begin(&ok);
    codec_put_id(object, "id", &version->id, &ok);
    codec_put_number(object, "size", version->size, &ok);
    codec_put_number(object, "shard_size", version->shard_size, &ok);
    codec_put_word(object, "digest", codec_digests[version->digest].word, &ok);
    if (version->sealed) {
        char root[2 * MODEL_DIGEST_MAX + 1];
        util_hex_encode(version->root, codec_digests[version->digest].length, root);
        codec_put_word(object, "root", root, &ok);
    }
    codec_put_word(object, "node", version->origin_node, &ok);
    codec_put_u64(object, "boot", version->origin_boot, &ok);
    if (version->origin_path) {
        codec_put_bytes(object, "path", version->origin_path, &ok);
        codec_put_u64(object, "ino", version->origin_ino, &ok);
        codec_put_time(object, "mtime", version->origin_mtime_ns, &ok);
    }
    if (version->pieces)
        codec_put_pieces(object, version, &ok);
    return codec_finish(object, ok);
}

/* They are what the size is made of, or nothing that we wrote. */
static int codec_get_pieces(const cJSON *object, struct model_version *out)
{
    const cJSON *list = cJSON_GetObjectItemCaseSensitive(object, "pieces");
    const cJSON *item;
    uint64_t sum = 0;
    if (!list)
        return 0;
    int count = cJSON_GetArraySize(list);
    if (!cJSON_IsArray(list) || count < 1 || count > MODEL_PIECES_MAX)
        return -EBADMSG;
    out->pieces = calloc((size_t)count, sizeof(*out->pieces));
    if (!out->pieces)
        return -ENOMEM;
    cJSON_ArrayForEach(item, list) {
        if (codec_number(item, 0, MODEL_SIZE_MAX, &out->pieces[out->piece_count]) < 0)
            return -EBADMSG;
        sum += out->pieces[out->piece_count++];
    }
    return sum == out->size ? 0 : -EBADMSG;
}

static int codec_get_digest(const cJSON *object, struct model_version *out)
{
    const char *word;
    if (codec_get_word(object, "digest", &word) < 0)
        return -EBADMSG;
    for (size_t i = MODEL_XXH3; i < util_count(codec_digests); i++) {
        if (strcmp(word, codec_digests[i].word) == 0)
            out->digest = (enum model_digest)i;
    }
    if (out->digest == 0)
        return -EBADMSG;
    if (!cJSON_HasObjectItem(object, "root"))
        return 0;
    out->sealed = true;
    if (codec_get_word(object, "root", &word) < 0 ||
        util_hex_decode(word, out->root, codec_digests[out->digest].length) < 0)
        return -EBADMSG;
    return 0;
}

static int codec_version_fields(const cJSON *object, struct model_version *out)
{
    uint64_t shard_size;
    if (codec_get_id(object, "id", &out->id) < 0 ||
        codec_get_number(object, "size", 0, MODEL_SIZE_MAX, &out->size) < 0 ||
        codec_get_number(object, "shard_size", MODEL_SHARD_MIN, MODEL_SHARD_MAX, &shard_size) < 0 ||
        shard_size % MODEL_SHARD_STEP != 0)
        return -EBADMSG;
    out->shard_size = (uint32_t)shard_size;
    if (out->size / shard_size >= MODEL_SHARDS_MAX)
        return -EBADMSG;
    char node[MODEL_NODE_MAX + 1];
    if (codec_get_digest(object, out) < 0 || codec_get_node(object, node, &out->origin_boot) < 0)
        return -EBADMSG;
    out->origin_node = strdup(node);
    if (!out->origin_node)
        return -ENOMEM;
    int rc = codec_get_pieces(object, out);
    if (rc < 0 || !cJSON_HasObjectItem(object, "path"))
        return rc;
    if (codec_get_u64(object, "ino", &out->origin_ino) < 0 ||
        codec_get_time(object, "mtime", &out->origin_mtime_ns) < 0)
        return -EBADMSG;
    return codec_get_heap(object, "path", MODEL_PATH_MAX, &out->origin_path);
}

int codec_version_decode(const char *json, struct model_version *out)
{
    cJSON *object;
    memset(out, 0, sizeof(*out));
    int rc = codec_parse(json, &object);
    if (rc < 0)
        return rc;
    rc = codec_version_fields(object, out);
    cJSON_Delete(object);
    if (rc < 0)
        model_version_clear(out);
    return rc;
}

char *codec_node_encode(const struct model_node *node)
{
    bool ok;
    cJSON *object = codec_begin(&ok);
    codec_put_word(object, "node", node->name, &ok);
    codec_put_u64(object, "boot", node->boot, &ok);
    codec_put_bytes(object, "address", node->address, &ok);
    if (node->rdma[0])
        codec_put_bytes(object, "rdma", node->rdma, &ok);
    codec_put_bytes(object, "locality", node->locality, &ok);
    codec_put_bytes(object, "host", node->host, &ok);
    codec_put_number(object, "pid", (uint64_t)node->pid, &ok);
    return codec_finish(object, ok);
}

static int codec_node_fields(const cJSON *object, struct model_node *out)
{
    uint64_t pid;
    int rc = codec_get_node(object, out->name, &out->boot);
    if (rc == 0)
        rc = codec_get_bytes(object, "address", out->address, sizeof(out->address));
    if (rc == 0 && cJSON_HasObjectItem(object, "rdma"))
        rc = codec_get_bytes(object, "rdma", out->rdma, sizeof(out->rdma));
    if (rc == 0)
        rc = codec_get_bytes(object, "locality", out->locality, sizeof(out->locality));
    if (rc == 0)
        rc = codec_get_bytes(object, "host", out->host, sizeof(out->host));
    if (rc == 0)
        rc = codec_get_number(object, "pid", 0, INT32_MAX, &pid);
    if (rc == 0)
        out->pid = (int32_t)pid;
    return rc;
}

int codec_node_decode(const char *json, struct model_node *out)
{
    cJSON *object;
    memset(out, 0, sizeof(*out));
    int rc = codec_parse(json, &object);
    if (rc < 0)
        return rc;
    rc = codec_node_fields(object, out);
    cJSON_Delete(object);
    if (rc < 0)
        memset(out, 0, sizeof(*out));
    return rc;
}

char *codec_holder_encode(const struct model_holder *holder)
{
    bool ok;
    cJSON *object = codec_begin(&ok);
    codec_put_word(object, "node", holder->node.name, &ok);
    codec_put_u64(object, "boot", holder->node.boot, &ok);
    ok = ok && cJSON_AddBoolToObject(object, "complete", holder->complete);
    return codec_finish(object, ok);
}

int codec_holder_decode(const char *json, struct model_holder *out)
{
    cJSON *object;
    memset(out, 0, sizeof(*out));
    int rc = codec_parse(json, &object);
    if (rc < 0)
        return rc;
    const cJSON *complete = cJSON_GetObjectItemCaseSensitive(object, "complete");
    rc =
        cJSON_IsBool(complete) ? codec_get_node(object, out->node.name, &out->node.boot) : -EBADMSG;
    out->complete = cJSON_IsTrue(complete);
    cJSON_Delete(object);
    if (rc < 0)
        memset(out, 0, sizeof(*out));
    return rc;
}
