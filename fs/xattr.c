#include "fs/xattr.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/digest.h"
#include "fs/fresh.h"
#include "fs/reply.h"
#include "meta/base/util.h"

#define XATTR_PREFIX "user.p2pfs."
#define XATTR_VALUE  160

/* The attributes: each prints its value into out (XATTR_VALUE bytes). */
struct xattr {
    const char *name;
    void (*print)(const struct model_id *version, const struct engine_info *info, char *out);
};
static const struct xattr table[11];

static const struct xattr *find(const char *name)
{
    if (strncmp(name, XATTR_PREFIX, strlen(XATTR_PREFIX)) != 0)
        return NULL;
    for (const struct xattr *xattr = table; xattr->name != NULL; xattr++)
        if (strcmp(name + strlen(XATTR_PREFIX), xattr->name) == 0)
            return xattr;
    return NULL;
}

static void answer(fuse_req_t req, const char *value, size_t length, size_t size)
{
    if (size == 0)
        fuse_reply_xattr(req, length);
    else if (length > size)
        reply_status(req, -ERANGE);
    else
        fuse_reply_buf(req, value, length);
}

/* ---- replicas: asked of the metadata service ---- */

struct count {
    fuse_req_t req;
    size_t size;
    unsigned here; /* this node's own */
};

static void counted(void *arg, int status, const struct model_holder *holders, size_t holder_count)
{
    struct count *count = arg;
    (void)holders;
    char text[24];
    if (status == 0)
        answer(count->req, text,
               (size_t)snprintf(text, sizeof(text), "%zu", holder_count + count->here),
               count->size);
    else
        reply_status(count->req, status);
    free(count);
}

static int count_replicas(fuse_req_t req, const struct inode *inode, const struct engine_info *info,
                          size_t size)
{
    struct count *count = malloc(sizeof(*count));
    if (count == NULL)
        return -ENOMEM;
    bool here =
        info->shards_present > 0 || info->state == ENGINE_COMPLETE || info->state == ENGINE_INPLACE;
    *count = (struct count){.req = req, .size = size, .here = here};
    int rc = catalog_holders(reply_house(req)->catalog, &inode->key.version, counted, count);
    if (rc != 0)
        free(count);
    return rc;
}

/* ---- the calls ---- */

static int info_get(struct house *house, struct inode *inode, struct engine_info *info)
{
    return fresh_is(house, inode) ? fresh_info(house, inode, info)
                                  : engine_info(house->engine, &inode->key.version, info);
}

void xattr_get(fuse_req_t req, fuse_ino_t nodeid, const char *name, size_t size)
{
    struct house *house = reply_house(req);
    struct inode *inode = inode_by_nodeid(house->inodes, nodeid);
    const struct xattr *xattr = inode->kind == INODE_FILE ? find(name) : NULL;
    struct engine_info info;
    int rc = xattr == NULL ? -ENODATA : info_get(house, inode, &info);
    if (strncmp(name, "system.", 7) == 0)
        rc = -EOPNOTSUPP; /* no access control lists */
    if (rc == 0 && xattr->print == NULL && info.state != ENGINE_WRITING) {
        rc = count_replicas(req, inode, &info, size);
    } else if (rc == 0) {
        char value[XATTR_VALUE] = "0";
        if (xattr->print != NULL)
            xattr->print(&inode->key.version, &info, value);
        answer(req, value, strlen(value), size);
    }
    if (rc != 0)
        reply_status(req, rc);
}

void xattr_list(fuse_req_t req, fuse_ino_t nodeid, size_t size)
{
    char names[1024];
    size_t length = 0;
    if (reply_inode(req, nodeid)->kind == INODE_FILE)
        for (const struct xattr *xattr = table; xattr->name != NULL; xattr++)
            length += (size_t)snprintf(names + length, sizeof(names) - length, XATTR_PREFIX "%s",
                                       xattr->name) +
                      1;
    answer(req, names, length, size);
}

void xattr_set(fuse_req_t req, fuse_ino_t nodeid, const char *name, const char *value, size_t size,
               int flags)
{
    struct house *house = reply_house(req);
    struct inode *inode = inode_by_nodeid(house->inodes, nodeid);
    int rc = -EOPNOTSUPP;
    (void)flags;
    if (strcmp(name, XATTR_PREFIX "pinned") == 0 && inode->kind == INODE_FILE) {
        bool valid = size == 1 && (value[0] == '0' || value[0] == '1');
        rc = !valid ? -EINVAL
             : fresh_is(house, inode)
                 ? -EPERM
                 : engine_pin(house->engine, &inode->key.version, value[0] == '1');
    } else if (strncmp(name, XATTR_PREFIX, strlen(XATTR_PREFIX)) == 0) {
        rc = -EPERM;
    }
    reply_status(req, rc);
}

void xattr_remove(fuse_req_t req, fuse_ino_t nodeid, const char *name)
{
    bool ours = strncmp(name, XATTR_PREFIX, strlen(XATTR_PREFIX)) == 0;
    (void)nodeid;
    reply_status(req, ours ? -EPERM : -ENODATA);
}

/* ---- values ---- */

static void print_version(const struct model_id *version, const struct engine_info *info, char *out)
{
    (void)info;
    model_id_print(version, out);
}

static void print_digest(const struct model_id *version, const struct engine_info *info, char *out)
{
    (void)version;
    const struct digest_ops *digest = digest_by_kind(info->digest);
    const char *name = digest == NULL ? "unknown" : digest->name;
    if (info->sealed && digest != NULL) {
        char hex[2 * MODEL_DIGEST_MAX + 1];
        util_hex_encode(info->root, digest->size, hex);
        snprintf(out, XATTR_VALUE, "%s:%s", name, hex);
    } else {
        snprintf(out, XATTR_VALUE,
                 "%s:", name); /* not known before the bytes have been read once */
    }
}

static void print_shard_size(const struct model_id *version, const struct engine_info *info,
                             char *out)
{
    (void)version;
    snprintf(out, XATTR_VALUE, "%" PRIu32, info->shard_size);
}

static void print_shards(const struct model_id *version, const struct engine_info *info, char *out)
{
    (void)version;
    snprintf(out, XATTR_VALUE, "%" PRIu32, info->shards);
}

static void print_resident(const struct model_id *version, const struct engine_info *info,
                           char *out)
{
    (void)version;
    snprintf(out, XATTR_VALUE, "%" PRIu64, info->resident);
}

static void print_sources(const struct model_id *version, const struct engine_info *info, char *out)
{
    (void)version;
    snprintf(out, XATTR_VALUE, "%" PRIu32, info->sources);
}

static void print_state(const struct model_id *version, const struct engine_info *info, char *out)
{
    (void)version;
    snprintf(out, XATTR_VALUE, "%s", engine_state_name(info->state));
}

static void print_transport(const struct model_id *version, const struct engine_info *info,
                            char *out)
{
    (void)version;
    snprintf(out, XATTR_VALUE, "%s", info->transport == NULL ? "" : info->transport);
}

static void print_pinned(const struct model_id *version, const struct engine_info *info, char *out)
{
    (void)version;
    snprintf(out, XATTR_VALUE, "%d", info->pinned);
}

static const struct xattr table[] = {
    {.name = "version", .print = print_version},
    {.name = "digest", .print = print_digest},
    {.name = "shard_size", .print = print_shard_size},
    {.name = "shards", .print = print_shards},
    {.name = "resident", .print = print_resident},
    {.name = "replicas", .print = NULL}, /* counted among the nodes */
    {.name = "sources", .print = print_sources},
    {.name = "state", .print = print_state},
    {.name = "transport", .print = print_transport},
    {.name = "pinned", .print = print_pinned},
    {.name = NULL},
};
