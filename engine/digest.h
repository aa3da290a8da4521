/* Digest: what a shard's bytes must hash to.
 *
 * A shard is cut into leaves of DIGEST_LEAF bytes (the last one shorter); its digest is the digest of its leaves'
 * digests, concatenated; a version's root is the digest of its size (u64, big-endian), its shard size (u32) and the digest
 * of all its shards' digests, concatenated. So a shard can be hashed piece by piece while it lands or is written, before the shard size is
 * known, and every holder can prove the whole list of digests against the root in the metadata.
 * XXH3-128 (xxHash, canonical big-endian form) guards against damage, SHA-256 (OpenSSL) against malice too. */
#ifndef P2PFS_ENGINE_DIGEST_H
#define P2PFS_ENGINE_DIGEST_H

#include <stddef.h>
#include <stdint.h>

#include "meta/model.h"

#define DIGEST_LEAF (1u << 20)

struct digest_ops {
    const char *name; /* "xxh3", "sha256" */
    enum model_digest kind;
    size_t size; /* bytes of a digest, at most MODEL_DIGEST_MAX */
    void (*hash)(const void *data, size_t length, uint8_t *out);
};
const struct digest_ops *digest_by_kind(enum model_digest kind); /* NULL: unknown */
const struct digest_ops *digest_by_name(const char *name);       /* NULL: unknown */

/* A running hash over one shard whose bytes come in order, in pieces of any size. */
struct digest_shard {
    const struct digest_ops *ops;
    const uint8_t *data; /* the shard's first byte, in memory that stays; NULL: see gather */
    /* Of a shard that lies in several places: where [offset, offset + length) is, in one piece, or `leaf`, filled. */
    const uint8_t *(*gather)(void *arg, size_t offset, size_t length, uint8_t *leaf);
    void *arg;
    uint8_t *leaf;   /* room for one (malloc'd) */
    size_t length;   /* of the shard */
    size_t hashed;   /* leaves up to here are in */
    uint8_t *leaves; /* digests of the leaves so far (malloc'd) */
};
/* data NULL: the caller sets gather and arg next. -ENOMEM. */
int digest_shard_begin(struct digest_shard *d, const struct digest_ops *ops, const void *data,
                       size_t length);
/* The first `landed` bytes are there: hashes every leaf that is complete. */
void digest_shard_advance(struct digest_shard *d, size_t landed);
/* All bytes are there: the shard's digest into out (ops->size bytes). */
void digest_shard_finish(struct digest_shard *d, uint8_t *out);
void digest_shard_clear(struct digest_shard *d); /* frees; harmless twice */

/* From the digests of its leaves (`count` of them, concatenated). */
void digest_shard_from_leaves(const struct digest_ops *ops, const uint8_t *leaves, size_t count,
                              uint8_t *out);
/* The whole shard at once. */
int digest_of_shard(const struct digest_ops *ops, const void *data, size_t length, uint8_t *out);
void digest_root(const struct digest_ops *ops, uint64_t size, uint32_t shard_size,
                 const uint8_t *shards, uint32_t count, uint8_t *out);

#endif
