#include "engine/digest.h"

#include <errno.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

// The library's AVX2 and AVX-512 code is reached only through its dispatcher: 2-3 x the plain entry point.
#if defined(__x86_64__) && defined(__has_include)
#if __has_include(<xxh_x86dispatch.h>)
#include <xxh_x86dispatch.h>
#endif
#endif

#include "meta/base/log.h"
#include "meta/base/util.h"

static const struct digest_ops digests[2];

const struct digest_ops *digest_by_kind(enum model_digest kind)
{
    for (size_t i = 0; i < util_count(digests); i++)
        if (digests[i].kind == kind)
            return &digests[i];
    return NULL;
}

const struct digest_ops *digest_by_name(const char *name)
{
    for (size_t i = 0; i < util_count(digests); i++)
        if (strcmp(digests[i].name, name) == 0)
            return &digests[i];
    return NULL;
}

// -- One shard ------------------------------------------------------------------------------------

static size_t leaf_count(size_t length)
{
    return length / DIGEST_LEAF + (length % DIGEST_LEAF != 0);
}

int digest_shard_begin(struct digest_shard *d, const struct digest_ops *ops, const void *data,
                       size_t length)
{
    *d = (struct digest_shard){.ops = ops, .data = data, .length = length};
    d->leaves = malloc(leaf_count(length) * ops->size + 1); // an empty shard has no leaves
    d->leaf = data ? NULL : malloc(DIGEST_LEAF);
    if (d->leaves && (data || d->leaf))
        return 0;
    digest_shard_clear(d);
    return -ENOMEM;
}

void digest_shard_advance(struct digest_shard *d, size_t landed)
{
    while (d->hashed < d->length) {
        size_t leaf = d->length - d->hashed;
        if (leaf > DIGEST_LEAF)
            leaf = DIGEST_LEAF;
        if (landed < d->hashed + leaf)
            return;
        const uint8_t *bytes =
            d->gather ? d->gather(d->arg, d->hashed, leaf, d->leaf) : d->data + d->hashed;
        d->ops->hash(bytes, leaf, d->leaves + d->hashed / DIGEST_LEAF * d->ops->size);
        d->hashed += leaf;
    }
}

void digest_shard_finish(struct digest_shard *d, uint8_t *out)
{
    digest_shard_advance(d, d->length);
    digest_shard_from_leaves(d->ops, d->leaves, leaf_count(d->length), out);
}

void digest_shard_clear(struct digest_shard *d)
{
    free(d->leaves);
    free(d->leaf);
    d->leaves = NULL;
    d->leaf = NULL;
}

void digest_shard_from_leaves(const struct digest_ops *ops, const uint8_t *leaves, size_t count,
                              uint8_t *out)
{
    ops->hash(leaves, count * ops->size, out);
}

int digest_of_shard(const struct digest_ops *ops, const void *data, size_t length, uint8_t *out)
{
    struct digest_shard d;
    int r = digest_shard_begin(&d, ops, data, length);
    if (r < 0)
        return r;
    digest_shard_finish(&d, out);
    digest_shard_clear(&d);
    return 0;
}

// -- A version ------------------------------------------------------------------------------------

void digest_root(const struct digest_ops *ops, uint64_t size, uint32_t shard_size,
                 const uint8_t *shards, uint32_t count, uint8_t *out)
{
    uint8_t all[12 + MODEL_DIGEST_MAX];
    for (int i = 0; i < 8; i++)
        all[i] = (uint8_t)(size >> (56 - 8 * i));
    for (int i = 0; i < 4; i++)
        all[8 + i] = (uint8_t)(shard_size >> (24 - 8 * i));
    ops->hash(shards, (size_t)count * ops->size, all + 12);
    ops->hash(all, 12 + ops->size, out);
}

// -- Kinds ----------------------------------------------------------------------------------------

static void xxh3_hash(const void *data, size_t length, uint8_t *out)
{
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits(data, length));
    memcpy(out, canonical.digest, sizeof(canonical.digest));
}

static void sha256_hash(const void *data, size_t length, uint8_t *out)
{
    if (!EVP_Digest(data, length, out, NULL, EVP_sha256(), NULL)) {
        // only without memory; a made-up digest would be worse than no process
        log_error("SHA-256 cannot be computed: OpenSSL is out of memory");
        abort();
    }
}

static const struct digest_ops digests[2] = {
    {
        .name = "xxh3",
        .kind = MODEL_XXH3,
        .size = 16,
        .hash = xxh3_hash,
    },
    {
        .name = "sha256",
        .kind = MODEL_SHA256,
        .size = 32,
        .hash = sha256_hash,
    },
};
