/* Codec: the keys (codec_key.c) and records (codec.c) of the metadata, the same for every backend.
 *
 *   t/e/<parent>/<name>   a directory entry (parent: 16 hex digits, name: percent-encoded)
 *   t/d/<id>              a directory exists (so that creating in it and removing it can't both win)
 *   t/v/<version>         a version
 *   t/n/<node>            a node that is up (leased)
 *   t/r                   rewritten by every move of a directory to another parent, so that two can't form a loop
 *   t/i                   which instance of the service this is, so that one that came back empty is recognised
 *   h/<version>/<node>    a node holds bytes of a version (leased); complete or not
 *   l/<name>              a lock
 *
 * The root's own attributes stand under parent 0 with an empty name. A key has one spelling: what a decoder would have
 * to normalise is malformed.
 *
 * What is under t/ is watched by every node; h/ is listed on demand, so that metadata traffic is O(files + nodes).
 * Records are JSON objects with "v": CODEC_FORMAT first. Names and paths are percent-encoded wherever a byte is not
 * printable ASCII, so any byte string survives. Decoding never trusts: sizes, kinds, ids and counts are checked.
 * Any thread. Encoders return a string that the caller frees, NULL: out of memory. Decoders: 0; -EBADMSG malformed;
 * -EPROTONOSUPPORT another format version; -ENOMEM. On failure *out is cleared. */
#ifndef P2PFS_META_CODEC_H
#define P2PFS_META_CODEC_H

#include "meta/model.h"

#define CODEC_FORMAT  1
#define CODEC_KEY_MAX 1024
#define CODEC_TREE    "t/"
#define CODEC_HOLDERS "h/"

#define CODEC_RENAMES  "t/r"
#define CODEC_INSTANCE "t/i"
#define CODEC_PLAIN    "{\"v\":1}" /* a record that says only that it is there */

enum codec_kind { CODEC_OTHER, CODEC_ENTRY, CODEC_DIR, CODEC_VERSION, CODEC_NODE, CODEC_HOLDER };

/* What a key names. */
struct codec_key {
    enum codec_kind kind;
    uint64_t parent; /* entry; for CODEC_DIR the directory's id */
    struct model_id version;
    char name[MODEL_NAME_MAX + 1]; /* entry: decoded name; node and holder: the node's name */
};
int codec_key_parse(const char *key, struct codec_key *out); /* -EBADMSG */

void codec_key_entry(uint64_t parent, const char *name, char out[CODEC_KEY_MAX]);
void codec_key_children(uint64_t parent,
                        char out[CODEC_KEY_MAX]); /* the prefix of a directory's entries */
void codec_key_dir(uint64_t id, char out[CODEC_KEY_MAX]);
void codec_key_version(const struct model_id *id, char out[CODEC_KEY_MAX]);
void codec_key_node(const char *node, char out[CODEC_KEY_MAX]);
void codec_key_holder(const struct model_id *version, const char *node, char out[CODEC_KEY_MAX]);
void codec_key_holders(const struct model_id *version, char out[CODEC_KEY_MAX]); /* prefix */

char *codec_entry_encode(const struct model_entry *entry);
int codec_entry_decode(const char *json,
                       struct model_entry *out); /* parent and name come from the key */
/* stager: the node that is still filling a directory that has no name yet; NULL (decoded: an empty name) otherwise. */
char *codec_dir_encode(const struct model_node *stager);
int codec_dir_decode(const char *json, struct model_node *stager); /* name and boot */
char *codec_instance_encode(const struct model_id *instance);
int codec_instance_decode(const char *json, struct model_id *instance);
size_t codec_digest_length(enum model_digest digest); /* bytes; 0: no such digest */
char *codec_version_encode(const struct model_version *version);
int codec_version_decode(const char *json, struct model_version *out);
char *codec_node_encode(const struct model_node *node);
int codec_node_decode(const char *json, struct model_node *out);
char *codec_holder_encode(const struct model_holder *holder);
int codec_holder_decode(const char *json,
                        struct model_holder *out); /* node.name, node.boot, complete */

#endif
