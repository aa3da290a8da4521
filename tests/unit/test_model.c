#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "meta/base/util.h"
#include "meta/model.h"

static void names_are_checked(void **state)
{
    char name[300];
    memset(name, 'a', sizeof(name));
    name[255] = '\0';
    assert_int_equal(model_name_check(name), 0);
    name[255] = 'a';
    name[256] = '\0';
    assert_int_equal(model_name_check(name), -ENAMETOOLONG);
    assert_int_equal(model_name_check("model.safetensors"), 0);
    assert_int_equal(model_name_check("..."), 0);
    assert_int_equal(model_name_check(" \n\xff%"), 0); /* any other bytes are kept as they are */
    assert_int_equal(model_name_check(""), -EINVAL);
    assert_int_equal(model_name_check("."), -EINVAL);
    assert_int_equal(model_name_check(".."), -EINVAL);
    assert_int_equal(model_name_check("a/b"), -EINVAL);
}

static void node_names_are_checked(void **state)
{
    char name[300];
    memset(name, 'n', sizeof(name));
    name[255] = '\0';
    assert_int_equal(model_node_check(name), 0);
    name[255] = 'n';
    name[256] = '\0';
    assert_int_equal(model_node_check(name), -EINVAL);
    assert_int_equal(model_node_check("host-1.example:7800"), 0);
    static const char *const bad[] = {"", "a b", "a/b", "a%b", "a\n", "n\xc3\xb6", "a\x7f"};
    for (size_t i = 0; i < util_count(bad); i++)
        assert_int_equal(model_node_check(bad[i]), -EINVAL);
}

static void ids_are_random_and_print_as_hex(void **state)
{
    struct model_id a = model_id_new();
    struct model_id b = model_id_new();
    struct model_id back;
    struct model_id zero = {{0}};
    char text[MODEL_ID_TEXT];
    assert_false(model_id_equal(&a, &b));
    assert_false(model_id_zero(&a));
    assert_true(model_id_zero(&zero));
    model_id_print(&a, text);
    assert_int_equal(strlen(text), 32);
    assert_int_equal(model_id_parse(text, &back), 0);
    assert_true(model_id_equal(&a, &back));
    text[31] = '\0';
    assert_int_equal(model_id_parse(text, &back), -EINVAL);
    assert_int_equal(model_id_parse("zz112233445566778899aabbccddeeff", &back), -EINVAL);
}

static void shards_cover_a_file_exactly(void **state)
{
    static const uint64_t sizes[] = {0,
                                     1,
                                     4096,
                                     (1 << 20) - 1,
                                     1 << 20,
                                     (1 << 20) + 1,
                                     5 << 20,
                                     300 << 20,
                                     (16ull << 30) - 1,
                                     16ull << 30,
                                     (16ull << 30) + 1,
                                     1ull << 40,
                                     MODEL_SIZE_MAX};
    for (size_t i = 0; i < util_count(sizes); i++) {
        uint64_t size = sizes[i];
        uint32_t shard_size = model_shard_auto(size);
        uint32_t count = model_shard_count(size, shard_size);
        assert_in_range(shard_size, MODEL_AUTO_MIN, MODEL_AUTO_MAX);
        assert_int_equal(shard_size % MODEL_AUTO_MIN, 0);
        if (size <= 16ull << 30)
            assert_in_range(count, 0, 256);
        uint64_t covered = 0;
        for (uint32_t shard = 0; shard < count; shard++) {
            uint64_t length = model_shard_length(size, shard_size, shard);
            assert_true(length > 0 && (length == shard_size || shard == count - 1));
            covered += length;
        }
        assert_true(covered == size);
        assert_int_equal(model_shard_length(size, shard_size, count), 0);
    }
    assert_int_equal(model_shard_auto(1ull << 40), 64 << 20);
    assert_int_equal(model_shard_count(1ull << 40, 64 << 20), 16384);
}

static void entries_are_copied_deeply(void **state)
{
    struct model_entry entry = {
        .id = 5, .name = strdup("latest"), .kind = MODEL_SYMLINK, .target = strdup("step-2000")};
    struct model_entry copy;
    assert_int_equal(model_entry_copy(&copy, &entry), 0);
    entry.name[0] = 'x';
    entry.target[0] = 'x';
    assert_string_equal(copy.name, "latest");
    assert_string_equal(copy.target, "step-2000");
    assert_int_equal(copy.id, 5);
    model_entry_clear(&entry);
    assert_null(entry.name);
    model_entry_clear(&entry); /* twice is harmless */
    model_entry_clear(&copy);
}

static void versions_are_copied_deeply(void **state)
{
    struct model_version version = {.size = 7, .origin_path = strdup("/data/m")};
    struct model_version copy;
    assert_int_equal(model_version_copy(&copy, &version), 0);
    version.origin_path[0] = 'x';
    assert_string_equal(copy.origin_path, "/data/m");
    model_version_clear(&version);
    model_version_clear(&version);
    assert_int_equal(model_version_copy(&version, &copy), 0);
    model_version_clear(&version);
    model_version_clear(&copy);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names_are_checked),
        cmocka_unit_test(node_names_are_checked),
        cmocka_unit_test(ids_are_random_and_print_as_hex),
        cmocka_unit_test(shards_cover_a_file_exactly),
        cmocka_unit_test(entries_are_copied_deeply),
        cmocka_unit_test(versions_are_copied_deeply),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
