#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "meta/base/util.h"
#include "meta/codec.h"

static struct model_id id_of(uint8_t byte)
{
    struct model_id id;
    memset(id.bytes, byte, sizeof(id.bytes));
    return id;
}

/* ---- keys ---- */

static void every_name_has_one_key(void **state)
{
    char all[256];
    static const char *const names[] = {
        "model.safetensors", " ",   "%", "%20",  "\xff\xfe\x80", "na\xc3\xafve", "a\nb",
        "*?[]{}\\\"'`$",     "...", "~", "\x7f", "\x01"};
    for (int i = 1; i < 256; i++)
        all[i - 1] = (char)(i == '/' ? 'x' : i);
    all[255] = '\0';
    for (size_t i = 0; i <= util_count(names); i++) {
        const char *name = i < util_count(names) ? names[i] : all;
        char key[CODEC_KEY_MAX];
        char again[CODEC_KEY_MAX];
        struct codec_key parsed;
        codec_key_entry(0x12ab, name, key);
        for (const char *p = key; *p; p++)
            assert_in_range(*p, '!', '~');
        assert_memory_equal(key, "t/e/00000000000012ab/", 21);
        assert_int_equal(codec_key_parse(key, &parsed), 0);
        assert_int_equal(parsed.kind, CODEC_ENTRY);
        assert_int_equal(parsed.parent, 0x12ab);
        assert_string_equal(parsed.name, name);
        codec_key_entry(parsed.parent, parsed.name, again);
        assert_string_equal(key, again);
    }
}

static void a_name_of_255_odd_bytes_fits_a_key(void **state)
{
    char name[256];
    char key[CODEC_KEY_MAX];
    struct codec_key parsed;
    memset(name, 0xff, 255);
    name[255] = '\0';
    codec_key_entry(UINT64_MAX, name, key);
    assert_true(strlen(key) < CODEC_KEY_MAX);
    assert_int_equal(codec_key_parse(key, &parsed), 0);
    assert_string_equal(parsed.name, name);
}

static void all_keys_are_parsed(void **state)
{
    char key[CODEC_KEY_MAX];
    char prefix[CODEC_KEY_MAX];
    struct codec_key parsed;
    struct model_id id = id_of(0xc3);
    codec_key_dir(7, key);
    assert_string_equal(key, "t/d/0000000000000007");
    assert_int_equal(codec_key_parse(key, &parsed), 0);
    assert_int_equal(parsed.kind, CODEC_DIR);
    assert_int_equal(parsed.parent, 7);
    codec_key_version(&id, key);
    assert_int_equal(codec_key_parse(key, &parsed), 0);
    assert_int_equal(parsed.kind, CODEC_VERSION);
    assert_true(model_id_equal(&parsed.version, &id));
    codec_key_node("host:1", key);
    assert_string_equal(key, "t/n/host:1");
    assert_int_equal(codec_key_parse(key, &parsed), 0);
    assert_int_equal(parsed.kind, CODEC_NODE);
    assert_string_equal(parsed.name, "host:1");
    codec_key_holder(&id, "host:1", key);
    codec_key_holders(&id, prefix);
    assert_memory_equal(key, prefix, strlen(prefix));
    assert_string_equal(key + strlen(prefix), "host:1");
    assert_int_equal(codec_key_parse(key, &parsed), 0);
    assert_int_equal(parsed.kind, CODEC_HOLDER);
    assert_true(model_id_equal(&parsed.version, &id));
    assert_string_equal(parsed.name, "host:1");
    codec_key_entry(3, "x", key);
    codec_key_children(3, prefix);
    assert_memory_equal(key, prefix, strlen(prefix));
    assert_int_equal(codec_key_parse(CODEC_RENAMES, &parsed), 0);
    assert_int_equal(parsed.kind, CODEC_OTHER);
    assert_int_equal(codec_key_parse("l/sweep", &parsed), 0);
    assert_int_equal(parsed.kind, CODEC_OTHER);
    codec_key_entry(0, "", key); /* the root itself */
    assert_int_equal(codec_key_parse(key, &parsed), 0);
    assert_int_equal(parsed.kind, CODEC_ENTRY);
    assert_int_equal(parsed.parent, 0);
    assert_string_equal(parsed.name, "");
}

static void malformed_keys_are_refused(void **state)
{
    char large[2000];
    memset(large, 'a', sizeof(large) - 1);
    memcpy(large, "t/e/0000000000000001/", 21);
    large[sizeof(large) - 1] = '\0';
    const char *const bad[] = {
        "t/e/",
        "t/e/0000000000000001",
        "t/e/0000000000000001/",
        "t/e/000000000000001/a",
        "t/e/00000000000000001/a",
        "t/e/000000000000000G/a",
        "t/e/00000000000000AB/a", /* the one spelling is lower case */
        "t/e/0000000000000000/a",
        "t/e/0000000000000001/a/b",
        "t/e/0000000000000001/.",
        "t/e/0000000000000001/..",
        "t/e/0000000000000001/a b",
        "t/e/0000000000000001/a\xff",
        "t/e/0000000000000001/%",
        "t/e/0000000000000001/%2",
        "t/e/0000000000000001/%zz",
        "t/e/0000000000000001/%41", /* a letter needs no escape */
        "t/e/0000000000000001/%FF",
        "t/e/0000000000000001/%00",
        "t/d/",
        "t/d/0000000000000000",
        "t/d/0000000000000007/",
        "t/d/0000000000000007x",
        "t/v/",
        "t/v/c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c",
        "t/v/C3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3",
        "t/v/00000000000000000000000000000000",
        "t/v/c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3/x",
        "t/n/",
        "t/n/a/b",
        "t/n/a%20b",
        "h/",
        "h/c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3",
        "h/c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3/",
        "h/c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3/a/b",
        large,
    };
    for (size_t i = 0; i < util_count(bad); i++) {
        struct codec_key parsed;
        if (codec_key_parse(bad[i], &parsed) != -EBADMSG)
            fail_msg("%s was taken", bad[i]);
    }
}

/* ---- records ---- */

static void entries_survive(void **state)
{
    char odd[256];
    for (int i = 1; i < 256; i++)
        odd[i - 1] = (char)i;
    odd[255] = '\0';
    struct model_entry entries[] = {
        {.id = 2, .kind = MODEL_DIR, .attr = {0755, 1000, 1001, 1700000000123456789}},
        {.id = UINT64_MAX,
         .kind = MODEL_FILE,
         .attr = {07777, UINT32_MAX, UINT32_MAX, INT64_MIN},
         .version = id_of(1),
         .size = MODEL_SIZE_MAX},
        {.id = 3, .kind = MODEL_FILE, .attr = {0, 0, 0, INT64_MAX}, .version = id_of(2), .size = 0},
        {.id = 4, .kind = MODEL_SYMLINK, .attr = {0777, 0, 0, -1}, .target = odd},
    };
    for (size_t i = 0; i < util_count(entries); i++) {
        struct model_entry out;
        char *json = codec_entry_encode(&entries[i]);
        assert_non_null(json);
        assert_memory_equal(json, "{\"v\":1,", 7);
        assert_int_equal(codec_entry_decode(json, &out), 0);
        assert_true(out.id == entries[i].id);
        assert_int_equal(out.kind, entries[i].kind);
        assert_int_equal(out.attr.mode, entries[i].attr.mode);
        assert_int_equal(out.attr.uid, entries[i].attr.uid);
        assert_int_equal(out.attr.gid, entries[i].attr.gid);
        assert_true(out.attr.mtime_ns == entries[i].attr.mtime_ns);
        assert_true(model_id_equal(&out.version, &entries[i].version));
        assert_true(out.size == entries[i].size);
        if (entries[i].target)
            assert_string_equal(out.target, entries[i].target);
        else
            assert_null(out.target);
        model_entry_clear(&out);
        free(json);
    }
}

static void versions_survive(void **state)
{
    char path[] = "/data/\xff \"odd\"/model";
    uint64_t pieces[] = {0, 1, MODEL_SIZE_MAX - 1};
    struct model_version versions[] = {
        {.id = id_of(1),
         .size = 0,
         .shard_size = MODEL_SHARD_MIN,
         .digest = MODEL_XXH3,
         .sealed = true,
         .root = {1, 2, 3, 0xff},
         .origin_node = "n1",
         .origin_boot = UINT64_MAX},
        {.id = id_of(2),
         .size = MODEL_SIZE_MAX,
         .shard_size = MODEL_AUTO_MAX,
         .digest = MODEL_SHA256,
         .sealed = true,
         .root = {[31] = 9},
         .origin_node = "n2"},
        {.id = id_of(3),
         .size = 1ull << 30,
         .shard_size = MODEL_SHARD_MAX,
         .digest = MODEL_XXH3,
         .origin_node = "n3",
         .origin_boot = 3,
         .origin_path = path,
         .origin_ino = UINT64_MAX,
         .origin_mtime_ns = -5},
        {.id = id_of(4),
         .size = MODEL_SIZE_MAX,
         .shard_size = MODEL_SHARD_MAX,
         .digest = MODEL_XXH3,
         .origin_node = "n4",
         .pieces = pieces,
         .piece_count = util_count(pieces)},
    };
    for (size_t i = 0; i < util_count(versions); i++) {
        struct model_version out;
        char *json = codec_version_encode(&versions[i]);
        assert_non_null(json);
        assert_int_equal(codec_version_decode(json, &out), 0);
        assert_true(model_id_equal(&out.id, &versions[i].id));
        assert_true(out.size == versions[i].size);
        assert_int_equal(out.shard_size, versions[i].shard_size);
        assert_int_equal(out.digest, versions[i].digest);
        assert_int_equal(out.sealed, versions[i].sealed);
        assert_memory_equal(out.root, versions[i].root, sizeof(out.root));
        assert_string_equal(out.origin_node, versions[i].origin_node);
        assert_true(out.origin_boot == versions[i].origin_boot);
        if (versions[i].origin_path)
            assert_string_equal(out.origin_path, versions[i].origin_path);
        assert_true(out.origin_ino == versions[i].origin_ino);
        assert_true(out.origin_mtime_ns == versions[i].origin_mtime_ns);
        assert_int_equal(out.piece_count, versions[i].piece_count);
        if (out.piece_count)
            assert_memory_equal(out.pieces, pieces, sizeof(pieces));
        model_version_clear(&out);
        free(json);
    }
}

static void nodes_holders_and_dirs_survive(void **state)
{
    struct model_node node = {.name = "n1",
                              .boot = 0xfedcba9876543210,
                              .address = "[::1]:7800",
                              .locality = "zone a/rack%1",
                              .host = "boot:4026531836",
                              .pid = 4711};
    struct model_node node_out;
    char *json = codec_node_encode(&node);
    assert_int_equal(codec_node_decode(json, &node_out), 0);
    assert_memory_equal(&node, &node_out, sizeof(node));
    assert_null(strstr(json, "rdma"));
    free(json);
    strcpy(node.rdma, "[::1]:7801");
    json = codec_node_encode(&node);
    assert_int_equal(codec_node_decode(json, &node_out), 0);
    assert_memory_equal(&node, &node_out, sizeof(node));
    free(json);

    struct model_holder holder = {.node = {.name = "n1", .boot = 5}, .complete = true};
    struct model_holder holder_out;
    json = codec_holder_encode(&holder);
    assert_int_equal(codec_holder_decode(json, &holder_out), 0);
    assert_memory_equal(&holder, &holder_out, sizeof(holder));
    free(json);

    json = codec_dir_encode(&node);
    assert_int_equal(codec_dir_decode(json, &node_out), 0);
    assert_string_equal(node_out.name, "n1");
    assert_true(node_out.boot == node.boot);
    free(json);
    json = codec_dir_encode(NULL);
    assert_string_equal(json, CODEC_PLAIN);
    assert_int_equal(codec_dir_decode(json, &node_out), 0);
    assert_string_equal(node_out.name, "");
    free(json);

    struct model_id id = id_of(8);
    struct model_id id_out;
    json = codec_instance_encode(&id);
    assert_int_equal(codec_instance_decode(json, &id_out), 0);
    assert_true(model_id_equal(&id, &id_out));
    free(json);
}

static void records_stay_small(void **state)
{
    /* the largest there is: a file of 2 TiB is no larger than another, whoever holds it */
    static char path[MODEL_PATH_MAX + 1];
    struct model_version version = {.id = id_of(1),
                                    .size = 2ull << 40,
                                    .shard_size = MODEL_AUTO_MAX,
                                    .digest = MODEL_SHA256,
                                    .sealed = true,
                                    .origin_path = path};
    memset(path, 0xff, MODEL_PATH_MAX);
    char node[MODEL_NODE_MAX + 1] = {0};
    memset(node, 'n', MODEL_NODE_MAX);
    version.origin_node = node;
    char *json = codec_version_encode(&version);
    assert_in_range(strlen(json), 1, 13 << 10);
    free(json);
}

static void a_file_of_2_tib_on_1000_nodes_has_1000_small_records(void **state)
{
    struct model_version version = {.id = id_of(1),
                                    .size = 2ull << 40,
                                    .shard_size = model_shard_auto(2ull << 40),
                                    .digest = MODEL_SHA256,
                                    .sealed = true,
                                    .origin_node = "node-0000.rack-17.zone-b.example.org"};
    char *json = codec_version_encode(&version);
    size_t largest = strlen(json);
    size_t all = largest;
    free(json);
    for (int i = 0; i < 1000; i++) {
        char key[CODEC_KEY_MAX];
        struct model_holder holder = {.node.boot = UINT64_MAX, .complete = true};
        snprintf(holder.node.name, sizeof(holder.node.name), "node-%04d.rack-17.zone-b.example.org",
                 i);
        codec_key_holder(&version.id, holder.node.name, key);
        json = codec_holder_encode(&holder);
        size_t size = strlen(key) + strlen(json);
        largest = size > largest ? size : largest;
        all += size;
        free(json);
    }
    print_message("the largest of 1001 records has %zu bytes, all of them %zu\n", largest, all);
    assert_in_range(largest, 1, 512); /* etcd takes 1.5 MiB */
    assert_in_range(all, 1, 300000);
}

/* ---- malformed records: each field in turn ---- */

static const char good_file[] =
    "{\"v\":1,\"kind\":\"file\",\"id\":\"0000000000000002\",\"mode\":420,\"uid\":0,\"gid\":0,"
    "\"mtime\":\"1\",\"version\":\"01010101010101010101010101010101\",\"size\":5}";
static const char good_symlink[] =
    "{\"v\":1,\"kind\":\"symlink\",\"id\":\"0000000000000002\",\"mode\":511,\"uid\":0,\"gid\":0,"
    "\"mtime\":\"1\",\"target\":\"a\"}";
static const char good_version[] =
    "{\"v\":1,\"id\":\"01010101010101010101010101010101\",\"size\":5,\"shard_size\":1048576,"
    "\"digest\":\"xxh3\",\"root\":\"00112233445566778899aabbccddeeff\",\"node\":\"n\","
    "\"boot\":\"0000000000000001\",\"path\":\"/x\",\"ino\":\"0000000000000001\",\"mtime\":\"7\"}";
static const char good_node[] =
    "{\"v\":1,\"node\":\"n\",\"boot\":\"0000000000000001\",\"address\":\"h:1\",\"locality\":\"\","
    "\"host\":\"\",\"pid\":1}";
static const char good_holder[] =
    "{\"v\":1,\"node\":\"n\",\"boot\":\"0000000000000001\",\"complete\":true}";

static int decode_entry(const char *json)
{
    struct model_entry out;
    int rc = codec_entry_decode(json, &out);
    if (rc < 0)
        assert_true(out.id == 0 && !out.name && !out.target);
    model_entry_clear(&out);
    return rc;
}

static int decode_version(const char *json)
{
    struct model_version out;
    int rc = codec_version_decode(json, &out);
    if (rc < 0)
        assert_true(out.size == 0 && !out.origin_path);
    model_version_clear(&out);
    return rc;
}

static int decode_node(const char *json)
{
    struct model_node out;
    int rc = codec_node_decode(json, &out);
    if (rc < 0)
        assert_int_equal(out.name[0], '\0');
    return rc;
}

static int decode_holder(const char *json)
{
    struct model_holder out;
    int rc = codec_holder_decode(json, &out);
    if (rc < 0)
        assert_int_equal(out.node.name[0], '\0');
    return rc;
}

/* The good record with `from` replaced by `to`. */
static void expect_refused(int (*decode)(const char *), const char *good, const char *from,
                           const char *to)
{
    char json[2048];
    const char *at = strstr(good, from);
    assert_non_null(at);
    snprintf(json, sizeof(json), "%.*s%s%s", (int)(at - good), good, to, at + strlen(from));
    if (decode(json) != -EBADMSG)
        fail_msg("taken: %s", json);
}

static void malformed_fields_are_refused(void **state)
{
    static const struct {
        int (*decode)(const char *);
        const char *good;
        const char *from;
        const char *to;
    } bad[] = {
        {decode_entry, good_file, "\"file\"", "\"pipe\""},
        {decode_entry, good_file, "\"file\"", "2"},
        {decode_entry, good_file, "\"kind\"", "\"kinds\""},
        {decode_entry, good_file, "\"0000000000000002\"", "\"0000000000000000\""},
        {decode_entry, good_file, "\"0000000000000002\"", "2"},
        {decode_entry, good_file, "\"0000000000000002\"", "\"02\""},
        {decode_entry, good_file, "\"0000000000000002\"", "\"000000000000000A\""},
        {decode_entry, good_file, "420", "4096"},
        {decode_entry, good_file, "420", "-1"},
        {decode_entry, good_file, "420", "1.5"},
        {decode_entry, good_file, "420", "\"420\""},
        {decode_entry, good_file, "\"uid\":0", "\"uid\":4294967296"},
        {decode_entry, good_file, "\"uid\":0,", ""},
        {decode_entry, good_file, "\"gid\":0", "\"gid\":1e300"},
        {decode_entry, good_file, "\"mtime\":\"1\"", "\"mtime\":1"},
        {decode_entry, good_file, "\"mtime\":\"1\"", "\"mtime\":\"\""},
        {decode_entry, good_file, "\"mtime\":\"1\"", "\"mtime\":\"1x\""},
        {decode_entry, good_file, "\"mtime\":\"1\"", "\"mtime\":\" 1\""},
        {decode_entry, good_file, "\"mtime\":\"1\"", "\"mtime\":\"9223372036854775808\""},
        {decode_entry, good_file, "01010101010101010101010101010101", "0101"},
        {decode_entry, good_file, "01010101010101010101010101010101",
         "00000000000000000000000000000000"},
        {decode_entry, good_file, "\"size\":5", "\"size\":35184372088833"},
        {decode_entry, good_file, "\"size\":5", "\"size\":-5"},
        {decode_entry, good_file, "\"size\":5", "\"size\":null"},
        {decode_entry, good_file, ",\"size\":5", ""},
        {decode_entry, good_file, "}", ""},
        {decode_entry, good_file, "}", "}x"},
        {decode_entry, good_file, "{", "[{"},
        {decode_entry, good_symlink, "\"a\"", "\"\""},
        {decode_entry, good_symlink, "\"a\"", "\"%00\""},
        {decode_entry, good_symlink, "\"a\"", "\"a%\""},
        {decode_entry, good_symlink, "\"a\"", "\"a b\""},
        {decode_entry, good_symlink, "\"a\"", "[\"a\"]"},
        {decode_entry, good_symlink, "\"target\"", "\"goal\""},
        {decode_version, good_version, "\"size\":5", "\"size\":35184372088833"},
        {decode_version, good_version, "1048576", "1048577"},
        {decode_version, good_version, "1048576", "4096"},
        {decode_version, good_version, "1048576", "2147483648"},
        {decode_version, good_version, "1048576", "0"},
        {decode_version, good_version, "\"size\":5,\"shard_size\":1048576",
         "\"size\":35184372088832,\"shard_size\":65536"}, /* half a milliard shards */
        {decode_version, good_version, "xxh3", "md5"},
        {decode_version, good_version, "\"digest\":\"xxh3\",", ""},
        {decode_version, good_version, "00112233445566778899aabbccddeeff", "0011"},
        {decode_version, good_version, "\"xxh3\"", "\"sha256\""}, /* its root is longer */
        {decode_version, good_version, "\"node\":\"n\"", "\"node\":\"\""},
        {decode_version, good_version, "\"node\":\"n\"", "\"node\":\"a b\""},
        {decode_version, good_version, "\"boot\":\"0000000000000001\"", "\"boot\":1"},
        {decode_version, good_version, "\"path\":\"/x\"", "\"path\":\"\""},
        {decode_version, good_version, "\"path\":\"/x\"", "\"path\":7"},
        {decode_version, good_version, "\"ino\":\"0000000000000001\",", ""},
        {decode_version, good_version, "\"mtime\":\"7\"", "\"mtime\":7"},
        {decode_version, good_version, "\"mtime\":\"7\"", "\"mtime\":\"7\",\"pieces\":[2,2]"},
        {decode_version, good_version, "\"mtime\":\"7\"", "\"mtime\":\"7\",\"pieces\":[2,\"3\"]"},
        {decode_version, good_version, "\"mtime\":\"7\"", "\"mtime\":\"7\",\"pieces\":[6,-1]"},
        {decode_version, good_version, "\"mtime\":\"7\"", "\"mtime\":\"7\",\"pieces\":[]"},
        {decode_version, good_version, "\"mtime\":\"7\"", "\"mtime\":\"7\",\"pieces\":5"},
        {decode_version, good_version, "01010101010101010101010101010101",
         "00000000000000000000000000000000"},
        {decode_node, good_node, "\"n\"", "\"a/b\""},
        {decode_node, good_node, "\"h:1\"", "\"h 1\""},
        {decode_node, good_node, "\"address\":\"h:1\",", ""},
        {decode_node, good_node, "\"locality\":\"\"", "\"locality\":null"},
        {decode_node, good_node, "\"pid\":1", "\"pid\":-1"},
        {decode_node, good_node, "\"pid\":1", "\"pid\":2147483648"},
        {decode_node, good_node, "0000000000000001", "1"},
        {decode_holder, good_holder, "true", "1"},
        {decode_holder, good_holder, ",\"complete\":true", ""},
        {decode_holder, good_holder, "\"n\"", "7"},
        {decode_holder, good_holder, "\"v\":1", "\"v\":\"1\""},
        {decode_holder, good_holder, "\"v\":1,", ""},
    };
    assert_int_equal(decode_entry(good_file), 0);
    assert_int_equal(decode_entry(good_symlink), 0);
    assert_int_equal(decode_version(good_version), 0);
    assert_int_equal(decode_node(good_node), 0);
    assert_int_equal(decode_holder(good_holder), 0);
    for (size_t i = 0; i < util_count(bad); i++)
        expect_refused(bad[i].decode, bad[i].good, bad[i].from, bad[i].to);
}

static void strings_beyond_their_limits_are_refused(void **state)
{
    char *json = malloc(20000);
    char *text = malloc(20000);
    memset(text, 'a', 4096);
    text[4096] = '\0';
    snprintf(json, 20000,
             "{\"v\":1,\"kind\":\"symlink\",\"id\":\"0000000000000002\",\"mode\":511,\"uid\":0,"
             "\"gid\":0,\"mtime\":\"1\",\"target\":\"%s\"}",
             text);
    assert_int_equal(decode_entry(json), -EBADMSG);
    text[4095] = '\0';
    snprintf(json, 20000,
             "{\"v\":1,\"kind\":\"symlink\",\"id\":\"0000000000000002\",\"mode\":511,\"uid\":0,"
             "\"gid\":0,\"mtime\":\"1\",\"target\":\"%s\"}",
             text);
    assert_int_equal(decode_entry(json), 0);
    text[272] = '\0';
    snprintf(json, 20000,
             "{\"v\":1,\"node\":\"n\",\"boot\":\"0000000000000001\",\"address\":\"%s\","
             "\"locality\":\"\",\"host\":\"\",\"pid\":1}",
             text);
    assert_int_equal(decode_node(json), -EBADMSG);
    free(json);
    free(text);
}

static void other_formats_are_told_apart_from_damage(void **state)
{
    assert_int_equal(decode_holder("{\"v\":2,\"anything\":[]}"), -EPROTONOSUPPORT);
    assert_int_equal(decode_holder("{\"v\":0}"), -EPROTONOSUPPORT);
    static const char *const junk[] = {"",     "x",           "null", "1",
                                       "\"\"", "[]",          "{}",   "{\"v\"",
                                       "{{{{", "{\"v\":[1]}", "\xff", "{\"v\":1,,}"};
    for (size_t i = 0; i < util_count(junk); i++) {
        assert_int_equal(decode_entry(junk[i]), -EBADMSG);
        assert_int_equal(decode_version(junk[i]), -EBADMSG);
        assert_int_equal(decode_node(junk[i]), -EBADMSG);
        assert_int_equal(decode_holder(junk[i]), -EBADMSG);
    }
    char *deep = malloc(200001);
    memset(deep, '[', 200000);
    deep[200000] = '\0';
    assert_int_equal(decode_holder(deep), -EBADMSG);
    free(deep);
}

static void fields_that_are_new_are_ignored(void **state)
{
    char json[512];
    snprintf(json, sizeof(json), "%.*s,\"later\":{\"x\":[1,2]}}", (int)strlen(good_holder) - 1,
             good_holder);
    assert_int_equal(decode_holder(json), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_name_has_one_key),
        cmocka_unit_test(a_name_of_255_odd_bytes_fits_a_key),
        cmocka_unit_test(all_keys_are_parsed),
        cmocka_unit_test(malformed_keys_are_refused),
        cmocka_unit_test(entries_survive),
        cmocka_unit_test(versions_survive),
        cmocka_unit_test(nodes_holders_and_dirs_survive),
        cmocka_unit_test(records_stay_small),
        cmocka_unit_test(a_file_of_2_tib_on_1000_nodes_has_1000_small_records),
        cmocka_unit_test(malformed_fields_are_refused),
        cmocka_unit_test(strings_beyond_their_limits_are_refused),
        cmocka_unit_test(other_formats_are_told_apart_from_damage),
        cmocka_unit_test(fields_that_are_new_are_ignored),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
