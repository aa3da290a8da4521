#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "meta/codec.h"
#include "meta/codec_text.h"

/* `count` hex digits and then `end` (or, for '\0', the end of the key). */
static int codec_key_hex(const char **at, size_t count, char end, char *hex)
{
    if (strnlen(*at, count) < count)
        return -EBADMSG;
    memcpy(hex, *at, count);
    hex[count] = '\0';
    if ((*at)[count] != end)
        return -EBADMSG;
    *at += count + (end != '\0');
    return 0;
}

static int codec_key_id(const char **at, char end, uint64_t *id)
{
    char hex[17];
    return codec_key_hex(at, 16, end, hex) < 0 ? -EBADMSG : codec_u64_decode(hex, id);
}

static int codec_key_version_id(const char **at, char end, struct model_id *id)
{
    char hex[MODEL_ID_TEXT];
    char back[MODEL_ID_TEXT];
    if (codec_key_hex(at, MODEL_ID_TEXT - 1, end, hex) < 0 || model_id_parse(hex, id) < 0)
        return -EBADMSG;
    model_id_print(id, back);
    return strcmp(hex, back) == 0 && !model_id_zero(id) ? 0 : -EBADMSG;
}

static int codec_key_node_name(const char *at, struct codec_key *out)
{
    if (model_node_check(at) < 0)
        return -EBADMSG;
    memcpy(out->name, at, strlen(at) + 1);
    return 0;
}

static int codec_key_entry_parse(const char *at, struct codec_key *out)
{
    out->kind = CODEC_ENTRY;
    if (codec_key_id(&at, '/', &out->parent) < 0)
        return -EBADMSG;
    if (codec_percent_decode(at, out->name, sizeof(out->name)) < 0)
        return -EBADMSG;
    if (out->parent == 0)
        return out->name[0] == '\0' ? 0 : -EBADMSG; /* the root itself */
    return model_name_check(out->name) == 0 ? 0 : -EBADMSG;
}

static int codec_key_holder_parse(const char *at, struct codec_key *out)
{
    out->kind = CODEC_HOLDER;
    if (codec_key_version_id(&at, '/', &out->version) < 0)
        return -EBADMSG;
    return codec_key_node_name(at, out);
}

int codec_key_parse(const char *key, struct codec_key *out)
{
    int rc = 0;
    memset(out, 0, sizeof(*out));
    if (strncmp(key, "t/e/", 4) == 0) {
        rc = codec_key_entry_parse(key + 4, out);
    } else if (strncmp(key, "t/d/", 4) == 0) {
        const char *at = key + 4;
        out->kind = CODEC_DIR;
        rc = codec_key_id(&at, '\0', &out->parent);
        if (rc == 0 && out->parent == 0)
            rc = -EBADMSG;
    } else if (strncmp(key, "t/v/", 4) == 0) {
        const char *at = key + 4;
        out->kind = CODEC_VERSION;
        rc = codec_key_version_id(&at, '\0', &out->version);
    } else if (strncmp(key, "t/n/", 4) == 0) {
        out->kind = CODEC_NODE;
        rc = codec_key_node_name(key + 4, out);
    } else if (strncmp(key, "h/", 2) == 0) {
        rc = codec_key_holder_parse(key + 2, out);
    }
    if (rc < 0) {
        enum codec_kind kind = out->kind; /* whose it would have been is known even so */
        memset(out, 0, sizeof(*out));
        out->kind = kind;
    }
    return rc;
}

void codec_key_entry(uint64_t parent, const char *name, char out[CODEC_KEY_MAX])
{
    int length = snprintf(out, CODEC_KEY_MAX, "t/e/%016" PRIx64 "/", parent);
    codec_percent_encode(name, out + length);
}

void codec_key_children(uint64_t parent, char out[CODEC_KEY_MAX])
{
    snprintf(out, CODEC_KEY_MAX, "t/e/%016" PRIx64 "/", parent);
}

void codec_key_dir(uint64_t id, char out[CODEC_KEY_MAX])
{
    snprintf(out, CODEC_KEY_MAX, "t/d/%016" PRIx64, id);
}

void codec_key_version(const struct model_id *id, char out[CODEC_KEY_MAX])
{
    char text[MODEL_ID_TEXT];
    model_id_print(id, text);
    snprintf(out, CODEC_KEY_MAX, "t/v/%s", text);
}

void codec_key_node(const char *node, char out[CODEC_KEY_MAX])
{
    snprintf(out, CODEC_KEY_MAX, "t/n/%s", node);
}

void codec_key_holder(const struct model_id *version, const char *node, char out[CODEC_KEY_MAX])
{
    char text[MODEL_ID_TEXT];
    model_id_print(version, text);
    snprintf(out, CODEC_KEY_MAX, "h/%s/%s", text, node);
}

void codec_key_holders(const struct model_id *version, char out[CODEC_KEY_MAX])
{
    char text[MODEL_ID_TEXT];
    model_id_print(version, text);
    snprintf(out, CODEC_KEY_MAX, "h/%s/", text);
}
