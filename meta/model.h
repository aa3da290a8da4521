/* Model: the plain values that the whole program speaks about: names, checkpoint versions, shards, peers, holders.
 *
 * Values only: no I/O, no locks, no library. A struct that holds pointers says who owns them. */
#ifndef P2PFS_META_MODEL_H
#define P2PFS_META_MODEL_H

#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <time.h>

#define MODEL_NAME_MAX    255         /* bytes of one path component */
#define MODEL_PATH_MAX    4095        /* bytes of a whole name below the mount */
#define MODEL_NODE_MAX    255         /* bytes of a node's name */
#define MODEL_ADDRESS_MAX 271         /* "[v6]:port" or "host:port" */
#define MODEL_ROOT        1ull        /* id of the root directory */
#define MODEL_SHARD_MIN   (64u << 10) /* smallest shard_size= that is accepted */
#define MODEL_SHARD_MAX   (1u << 30)  /* largest */
#define MODEL_SHARD_STEP  4096u       /* a shard size is a multiple of this */
#define MODEL_AUTO_MIN    (1u << 20)  /* shard_size=auto: size / 256 within these */
#define MODEL_AUTO_MAX    (64u << 20)
#define MODEL_SIZE_MAX    (1ull << 45) /* 32 TiB a file, so that a shard map stays below 64 KiB */
#define MODEL_SHARDS_MAX  (1u << 22)   /* shards of a file, so that its map stays below 512 KiB */
#define MODEL_DIGEST_MAX  32           /* bytes of the longest digest */
#define MODEL_PIECES_MAX  65536        /* ranges of memory that one registration consists of */

/* A version's id: 128 random bits, written as 32 hex digits. */
struct model_id {
    uint8_t bytes[16];
};
#define MODEL_ID_TEXT 33

struct model_id model_id_new(void);
bool model_id_equal(const struct model_id *a, const struct model_id *b);
bool model_id_zero(const struct model_id *id);
void model_id_print(const struct model_id *id, char out[MODEL_ID_TEXT]);
int model_id_parse(const char *text, struct model_id *id); /* -EINVAL */

enum model_kind { MODEL_DIR = 1, MODEL_FILE, MODEL_SYMLINK };
enum model_digest { MODEL_XXH3 = 1, MODEL_SHA256 };

/* Attributes of a name, kept from the source. mode: permission bits only (07777). */
struct model_attr {
    uint32_t mode;
    uint32_t uid;
    uint32_t gid;
    int64_t mtime_ns; /* since the epoch */
};

/* One name: a directory entry. `id` is the inode number, unique in the cluster, and for a directory also the
 * `parent` of its children. Owned pointers: name, target (model_entry_clear frees them). */
struct model_entry {
    uint64_t id;
    uint64_t parent;
    char *name; /* as given by the user: any bytes but NUL and '/' */
    enum model_kind kind;
    struct model_attr attr;
    struct model_id version; /* files */
    uint64_t size;           /* files: bytes, a copy of the version's */
    char *target;            /* symbolic links */
    uint64_t revision;       /* of the stored record; 0: never stored */
};
void model_entry_clear(struct model_entry *entry);
int model_entry_copy(struct model_entry *to, const struct model_entry *from); /* -ENOMEM */

/* One registration: immutable but for `root`, which a file registered in place gets when its bytes have been read
 * once. Shard k covers bytes [k * shard_size, min(size, (k + 1) * shard_size)). A shard's digest is the digest of the
 * concatenated digests of its leaves of 1 MiB (the last one shorter); the root is the digest of all shard digests.
 * Owned pointers: origin_node, origin_path, pieces. */
struct model_version {
    struct model_id id;
    uint64_t size;
    uint32_t shard_size;
    enum model_digest digest;
    bool sealed; /* root is known */
    uint8_t root[MODEL_DIGEST_MAX];
    const char *origin_node; /* the node that registered it; NULL: not said yet */
    uint64_t origin_boot;
    char *origin_path;   /* registered in place: the file on that node; NULL otherwise */
    uint64_t origin_ino; /* in place: what the file was when it was registered */
    int64_t origin_mtime_ns;
    /* Registered from several ranges of a program's memory: their sizes, in order; they add up to size. */
    uint64_t *pieces; /* NULL: of one piece */
    uint32_t piece_count;
    uint64_t revision;
};
void model_version_clear(struct model_version *version);
/* NULL: there are none, or no memory. */
uint64_t *model_pieces_copy(const uint64_t *pieces, uint32_t count);
int model_version_copy(struct model_version *to, const struct model_version *from); /* -ENOMEM */

uint32_t model_shard_auto(uint64_t size); /* whole MiB, at most 256 shards up to 16 GiB */
uint32_t model_shard_count(uint64_t size, uint32_t shard_size); /* 0 for an empty file */
uint64_t model_shard_length(uint64_t size, uint32_t shard_size, uint32_t shard);

/* A node that is up: a leased record. */
struct model_node {
    char name[MODEL_NODE_MAX + 1];
    uint64_t boot;                       /* random, new at every mount: names carry incarnations */
    char address[MODEL_ADDRESS_MAX + 1]; /* where peers reach it over TCP */
    char rdma[MODEL_ADDRESS_MAX + 1];    /* and over RDMA; "": they do not */
    char locality[MODEL_NODE_MAX + 1];   /* "zone/rack" or "" */
    char host[65]; /* the machine's boot id and pid namespace, to tell a dead local process */
    int32_t pid;
    uint64_t revision;
};

/* A node on a version: a leased record. Which shards it has travels between peers, not here. */
struct model_holder {
    struct model_node
        node; /* name and boot from the record, the rest looked up among the live nodes */
    bool complete;
    uint64_t revision;
};

/* 0, or -EINVAL (empty, ".", "..", a '/'), -ENAMETOOLONG. */
int model_name_check(const char *name);
/* 1 to 255 printable ASCII bytes without '/', '%' and blanks; -EINVAL. */
int model_node_check(const char *name);

#endif
