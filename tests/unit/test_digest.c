/* Digests: against known values, and piece by piece against all at once. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "engine/digest.h"
#include "meta/base/util.h"

static void hex_of(const struct digest_ops *ops, const void *data, size_t length, char *hex)
{
    uint8_t out[MODEL_DIGEST_MAX];
    ops->hash(data, length, out);
    util_hex_encode(out, ops->size, hex);
}

static void known_values(void **state)
{
    char hex[2 * MODEL_DIGEST_MAX + 1];
    const struct digest_ops *xxh3 = digest_by_name("xxh3"), *sha = digest_by_name("sha256");
    assert_ptr_equal(xxh3, digest_by_kind(MODEL_XXH3));
    assert_ptr_equal(sha, digest_by_kind(MODEL_SHA256));
    // as `xxh128sum` prints them
    hex_of(xxh3, "", 0, hex);
    assert_string_equal(hex, "99aa06d3014798d86001c324468d497f");
    hex_of(xxh3, "abc", 3, hex);
    assert_string_equal(hex, "06b05ab6733a618578af5f94892f3950");
    // as `sha256sum` prints them
    hex_of(sha, "", 0, hex);
    assert_string_equal(hex, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    hex_of(sha, "abc", 3, hex);
    assert_string_equal(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    assert_null(digest_by_name("md5"));
    assert_null(digest_by_name(""));
    assert_null(digest_by_kind(0));
}

static void a_shard_is_the_digest_of_its_leaves(void **state)
{
    static const size_t lengths[] = {
        0, 1, DIGEST_LEAF - 1, DIGEST_LEAF, DIGEST_LEAF + 1, 3 * DIGEST_LEAF + 12345};
    size_t most = 4 * (size_t)DIGEST_LEAF;
    uint8_t *data = malloc(most);
    for (size_t i = 0; i < most; i++)
        data[i] = (uint8_t)(i * 31 + (i >> 13));
    for (size_t n = 0; n < util_count(lengths); n++) {
        for (int kind = MODEL_XXH3; kind <= MODEL_SHA256; kind++) {
            const struct digest_ops *ops = digest_by_kind((enum model_digest)kind);
            size_t length = lengths[n];
            uint8_t leaves[4 * MODEL_DIGEST_MAX], expected[MODEL_DIGEST_MAX], out[MODEL_DIGEST_MAX];
            size_t count = 0;
            for (size_t at = 0; at < length; at += DIGEST_LEAF, count++)
                ops->hash(data + at, length - at < DIGEST_LEAF ? length - at : DIGEST_LEAF,
                          leaves + count * ops->size);
            ops->hash(leaves, count * ops->size, expected);

            assert_int_equal(digest_of_shard(ops, data, length, out), 0);
            assert_memory_equal(out, expected, ops->size);
            digest_shard_from_leaves(ops, leaves, count, out);
            assert_memory_equal(out, expected, ops->size);

            struct digest_shard d;
            assert_int_equal(digest_shard_begin(&d, ops, data, length), 0);
            for (size_t landed = 0; landed < length; landed += 70001) {
                digest_shard_advance(&d, landed);
                assert_true(d.hashed <= landed && landed - d.hashed < DIGEST_LEAF);
            }
            memset(out, 0, sizeof(out));
            digest_shard_finish(&d, out);
            assert_memory_equal(out, expected, ops->size);
            digest_shard_clear(&d);
            digest_shard_clear(&d);
        }
    }
    free(data);
}

static void bytes_that_have_not_landed_are_not_read(void **state)
{
    // the second leaf changes after the first has been hashed, as it does while a shard lands
    const struct digest_ops *ops = digest_by_kind(MODEL_XXH3);
    size_t length = 2 * (size_t)DIGEST_LEAF;
    uint8_t *data = calloc(1, length), one[16], other[16];
    struct digest_shard d;
    assert_int_equal(digest_shard_begin(&d, ops, data, length), 0);
    digest_shard_advance(&d, DIGEST_LEAF + 5);
    memset(data + DIGEST_LEAF, 9, DIGEST_LEAF);
    digest_shard_finish(&d, one);
    digest_shard_clear(&d);
    assert_int_equal(digest_of_shard(ops, data, length, other), 0);
    assert_memory_equal(one, other, 16);
    free(data);
}

static void the_root_binds_size_and_shard_size_and_every_shard(void **state)
{
    for (int kind = MODEL_XXH3; kind <= MODEL_SHA256; kind++) {
        const struct digest_ops *ops = digest_by_kind((enum model_digest)kind);
        uint8_t shards[3 * MODEL_DIGEST_MAX], root[MODEL_DIGEST_MAX], other[MODEL_DIGEST_MAX];
        for (size_t i = 0; i < sizeof(shards); i++)
            shards[i] = (uint8_t)(i * 7);
        digest_root(ops, 1000, 400, shards, 3, root);

        uint8_t all[12 + MODEL_DIGEST_MAX] = {0, 0, 0, 0, 0, 0, 0x03, 0xe8, 0, 0, 0x01, 0x90};
        ops->hash(shards, 3 * ops->size, all + 12);
        ops->hash(all, 12 + ops->size, other);
        assert_memory_equal(root, other, ops->size);

        digest_root(ops, 1001, 400, shards, 3, other);
        assert_memory_not_equal(root, other, ops->size);
        digest_root(ops, 1000, 401, shards, 3, other);
        assert_memory_not_equal(root, other, ops->size);
        digest_root(ops, 1000, 400, shards, 2, other);
        assert_memory_not_equal(root, other, ops->size);
        shards[ops->size] ^= 1;
        digest_root(ops, 1000, 400, shards, 3, other);
        assert_memory_not_equal(root, other, ops->size);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(known_values),
        cmocka_unit_test(a_shard_is_the_digest_of_its_leaves),
        cmocka_unit_test(bytes_that_have_not_landed_are_not_read),
        cmocka_unit_test(the_root_binds_size_and_shard_size_and_every_shard),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
