/* What the command line and -o say, and what is refused by name with a remedy. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "meta/base/memory.h"
#include "fs/options.h"

#define META "local:///var/lib/p2pfs"

static int parse(const char *options, struct options *out, char **error)
{
    char *argv[] = {(char *)"p2pfs", (char *)META, (char *)"/mnt", (char *)"-o", (char *)options};
    return options_parse(options == NULL ? 3 : 5, argv, out, error);
}

/* The options are refused, and the sentence holds both words. */
static void refused(const char *options, const char *word, const char *remedy)
{
    struct options out;
    char *error = NULL;
    assert_int_equal(parse(options, &out, &error), -EINVAL);
    assert_non_null(error);
    if (strstr(error, word) == NULL || strstr(error, remedy) == NULL)
        fail_msg("-o %s: \"%s\" lacks \"%s\" or \"%s\"", options, error, word, remedy);
    assert_null(strchr(error, '\n'));
    free(error);
}

static struct options accepted(const char *options)
{
    struct options out;
    char *error = NULL;
    int rc = parse(options, &out, &error);
    if (rc != 0)
        fail_msg("-o %s: refused: %s", options, error);
    assert_null(error);
    return out;
}

static void defaults(void **state)
{
    struct options out = accepted(NULL);
    assert_string_equal(out.meta, META);
    assert_string_equal(out.mountpoint, "/mnt");
    assert_false(out.foreground);
    assert_int_equal(out.cache_size, memory_limit() / 2);
    assert_int_equal(out.fetch, OPTIONS_FETCH_WHOLE);
    assert_int_equal(out.read_timeout_s, 60);
    assert_int_equal(out.orphan_ttl_s, 3600);
    assert_int_equal(out.digest, MODEL_XXH3);
    assert_int_equal(out.shard_size, 0);
    assert_false(out.allow_overwrite);
    assert_null(out.node);
    assert_int_equal(out.transport, OPTIONS_TRANSPORT_AUTO);
    options_clear(&out);
}

static void every_value_lands(void **state)
{
    struct options out = accepted(
        "node=gpu1,listen=[::1]:7000,advertise=10.0.0.1,transport=tcp,shard_size=2M,cache_size=3G,"
        "cache_dir=/var/cache,fetch=demand,open=wait,read_timeout=5,orphan_ttl=0,"
        "tcp_congestion=cubic,digest=sha256,allow_overwrite,credentials=/c,secret_file=/s,"
        "encryption=off,locality=z1/r2,log_level=debug,seed=idle,max_upload=10M,max_download=1.5G");
    assert_string_equal(out.node, "gpu1");
    assert_string_equal(out.listen, "[::1]:7000");
    assert_string_equal(out.advertise, "10.0.0.1");
    assert_int_equal(out.shard_size, 2 << 20);
    assert_int_equal(out.cache_size, 3ull << 30);
    assert_string_equal(out.cache_dir, "/var/cache");
    assert_int_equal(out.fetch, OPTIONS_FETCH_DEMAND);
    assert_int_equal(out.open, OPTIONS_OPEN_WAIT);
    assert_int_equal(out.read_timeout_s, 5);
    assert_int_equal(out.orphan_ttl_s, 0);
    assert_string_equal(out.tcp_congestion, "cubic");
    assert_int_equal(out.digest, MODEL_SHA256);
    assert_true(out.allow_overwrite);
    assert_string_equal(out.credentials, "/c");
    assert_string_equal(out.secret_file, "/s");
    assert_string_equal(out.locality, "z1/r2");
    assert_int_equal(out.seed, OPTIONS_SEED_IDLE);
    assert_int_equal(out.max_upload, 10 << 20);
    assert_int_equal(out.max_download, 3ull << 29);
    assert_int_equal(out.log_level, LOG_DEBUG);
    options_clear(&out);
}

static void adapters_are_named_by_options_files_and_mooncakes_variables(void **state)
{
    struct options out =
        accepted("device=mlx5_0\\,mlx5_1,gid_index=3,nic_priority_matrix={\"*\": [[\"a\"]\\,[]]}");
    assert_string_equal(out.device, "mlx5_0,mlx5_1");
    assert_int_equal(out.gid_index, 3);
    assert_string_equal(out.nic_priority_matrix, "{\"*\": [[\"a\"],[]]}");
    options_clear(&out);
    char path[] = "/tmp/p2pfs-matrix-XXXXXX";
    int fd = mkstemp(path);
    assert_int_equal(write(fd, "{\"*\": [[\"b\"]]}", 14), 14);
    setenv("MC_CUSTOM_TOPO_JSON", path, 1);
    setenv("MC_GID_INDEX", "1", 1);
    setenv("MC_IB_PORT", "2", 1);
    out = accepted(NULL);
    assert_string_equal(out.nic_priority_matrix, "{\"*\": [[\"b\"]]}");
    assert_int_equal(out.gid_index, 1);
    assert_int_equal(out.ib_port, 2);
    options_clear(&out);
    out = accepted("gid_index=0");
    assert_int_equal(out.gid_index, 0);
    options_clear(&out);
    unsetenv("MC_CUSTOM_TOPO_JSON");
    unsetenv("MC_GID_INDEX");
    unsetenv("MC_IB_PORT");
    close(fd);
    unlink(path);
    out = accepted(NULL);
    assert_int_equal(out.gid_index, -1);
    assert_null(out.device);
    options_clear(&out);
}

static void cache_size_in_percent(void **state)
{
    struct options out = accepted("cache_size=25%");
    assert_in_range(out.cache_size, memory_limit() / 4 - 4096, memory_limit() / 4 + 4096);
    options_clear(&out);
}

static void a_later_option_beats_an_earlier_one_and_the_environment(void **state)
{
    setenv("MC_LOG_LEVEL", "ERROR", 1);
    struct options out = accepted(NULL);
    assert_int_equal(out.log_level, LOG_ERROR);
    options_clear(&out);
    out = accepted("log_level=warn,log_level=info");
    assert_int_equal(out.log_level, LOG_INFO);
    options_clear(&out);
    unsetenv("MC_LOG_LEVEL");
    setenv("MC_FORCE_TCP", "1", 1);
    out = accepted(NULL);
    assert_int_equal(out.transport, OPTIONS_TRANSPORT_TCP);
    options_clear(&out);
    unsetenv("MC_FORCE_TCP");
}

static void commas_and_backslashes_are_escaped(void **state)
{
    struct options out = accepted("credentials=/a\\,b\\\\c,node=x");
    assert_string_equal(out.credentials, "/a,b\\c");
    assert_string_equal(out.node, "x");
    options_clear(&out);
}

static void what_mount_and_libfuse_add_is_taken(void **state)
{
    struct options out =
        accepted("rw,nosuid,nodev,relatime,_netdev,nofail,noauto,user=joe,users,defaults,"
                 "x-systemd.automount,comment=hi,allow_other,max_read=65536,auto_unmount");
    assert_true(out.allow_other);
    assert_non_null(strstr(out.fuse, "nosuid"));
    assert_non_null(strstr(out.fuse, "allow_other"));
    assert_non_null(strstr(out.fuse, "max_read=65536"));
    assert_non_null(strstr(out.fuse, "default_permissions"));
    assert_non_null(strstr(out.fuse, "subtype=p2pfs"));
    assert_non_null(strstr(out.fuse, "fsname=" META));
    assert_null(strstr(out.fuse, "_netdev"));
    assert_null(strstr(out.fuse, "x-systemd"));
    options_clear(&out);
}

static void bad_values_are_refused_by_name(void **state)
{
    refused("shard_size=3", "shard_size=3", "64K");
    refused("shard_size=2G", "shard_size=2G", "1G");
    refused("shard_size=65537", "shard_size=65537", "multiple");
    refused("cache_size=", "cache_size", "SIZE");
    refused("cache_size=lots", "cache_size=lots", "K, M, G, T");
    refused("cache_size=-1", "cache_size=-1", "K, M, G, T");
    refused("cache_size=0", "cache_size=0", "at least 1M");
    refused("listen=nowhere", "listen=nowhere", "HOST:PORT");
    refused("listen=1.2.3.4:99999", "listen=1.2.3.4:99999", "HOST:PORT");
    refused("listen=1.2.3.4:x", "listen=1.2.3.4:x", "HOST:PORT");
    refused("node=a b", "node=a b", "blanks");
    refused("read_timeout=0", "read_timeout=0", "1 or more");
    refused("read_timeout=soon", "read_timeout=soon", "seconds");
    refused("fetch=some", "fetch=some", "whole|demand");
    refused("digest=md5", "digest=md5", "xxh3|sha256");
    refused("log_level=loud", "log_level=loud", "debug");
    refused("cache_dir=relative", "cache_dir=relative", "absolute");
    refused("locality=/r", "locality=/r", "ZONE");
    refused("locality=z/", "locality=z/", "ZONE");
    refused("locality=z/r/s", "locality=z/r/s", "ZONE");
    refused("locality=z one", "locality=z one", "ZONE");
    refused("seed=never", "seed=never", "normal|idle");
    refused("max_upload=fast", "max_upload=fast", "K, M, G");
    refused("max_upload=1K", "max_upload=1K", "64K");
    refused("max_download=-1", "max_download=-1", "64K");
    refused("allow_overwrite=yes", "allow_overwrite=yes", "no value");
    refused("node", "node", "node=NAME");
    refused("transport=pigeon", "transport=pigeon", "tcp");
    refused("encryption=maybe", "encryption=maybe", "off");
}

static void unknown_options_get_a_suggestion(void **state)
{
    refused("cache_sise=1G", "cache_sise", "did you mean cache_size?");
    refused("alow_overwrite", "alow_overwrite", "did you mean allow_overwrite?");
    refused("frobnicate", "frobnicate", "p2pfs help");
}

static void what_this_build_cannot_do_is_refused_with_a_way_out(void **state)
{
    refused("encryption=required", "encryption=required", "encryption=off");
    refused("open=later", "open=later", "wait");
    for (const struct options_entry *entry = options_table; entry->name != NULL; entry++) {
        assert_true((entry->refused == NULL) != (entry->set == NULL));
        if (entry->refused != NULL)
            refused(entry->name, entry->name, "this build");
    }
}

static int parse_words(int argc, const char *const *words, char **error)
{
    struct options out;
    int rc = options_parse(argc, (char *const *)words, &out, error);
    if (rc == 0)
        options_clear(&out);
    return rc;
}

static void the_command_line_is_checked(void **state)
{
    static const struct {
        const char *words[6];
        int count;
        const char *says; /* NULL: accepted */
    } lines[] = {
        {{"p2pfs", META}, 2, "no directory"},
        {{"p2pfs", META, "/a", "/b"}, 4, "/b"},
        {{"p2pfs", META, "/a", "-o"}, 4, "-o"},
        {{"p2pfs", META, "/a", "-z"}, 4, "-z"},
        {{"p2pfs", "nonsense", "/a"}, 3, "metadata URL"},
        {{"p2pfs", "gopher://x/y", "/a"}, 3, "gopher://"},
        {{"p2pfs", "redis://me:secret@host/0", "/a"}, 3, "credentials=FILE"},
        {{"p2pfs", META, "/a", "-f"}, 4, NULL},
        {{"p2pfs", "-f", META, "-onode=x", "/a"}, 5, NULL},
    };
    for (size_t i = 0; i < sizeof(lines) / sizeof(lines[0]); i++) {
        char *error = NULL;
        int rc = parse_words(lines[i].count, lines[i].words, &error);
        if (lines[i].says == NULL) {
            assert_int_equal(rc, 0);
        } else {
            assert_int_equal(rc, -EINVAL);
            assert_non_null(error);
            assert_non_null(strstr(error, lines[i].says));
            assert_null(strstr(error, "secret@"));
        }
        free(error);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(defaults),
        cmocka_unit_test(every_value_lands),
        cmocka_unit_test(adapters_are_named_by_options_files_and_mooncakes_variables),
        cmocka_unit_test(cache_size_in_percent),
        cmocka_unit_test(a_later_option_beats_an_earlier_one_and_the_environment),
        cmocka_unit_test(commas_and_backslashes_are_escaped),
        cmocka_unit_test(what_mount_and_libfuse_add_is_taken),
        cmocka_unit_test(bad_values_are_refused_by_name),
        cmocka_unit_test(unknown_options_get_a_suggestion),
        cmocka_unit_test(what_this_build_cannot_do_is_refused_with_a_way_out),
        cmocka_unit_test(the_command_line_is_checked),
    };
    unsetenv("MC_LOG_LEVEL");
    unsetenv("MC_FORCE_TCP");
    return cmocka_run_group_tests(tests, NULL, NULL);
}
