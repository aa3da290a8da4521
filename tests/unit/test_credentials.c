/* Credentials: what the file may hold, who may read it, and that nothing of it is ever said. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "meta/base/log.h"
#include "meta/base/util.h"
#include "meta/credentials.h"
#include "meta/meta.h"

static char path[] = "/tmp/p2pfs-test-credentials-XXXXXX";

static int setup(void **state)
{
    int fd = mkstemp(path);
    close(fd);
    return fd < 0 ? -1 : 0;
}

static int teardown(void **state)
{
    unlink(path);
    return 0;
}

static void write_file(const char *text, mode_t mode)
{
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fputs(text, file);
    fclose(file);
    assert_int_equal(chmod(path, mode), 0);
}

/* What meta_open tells the user when the file is given with a service that is not reached for it. */
static int open_with_file(const char *url, const char **error)
{
    struct meta_store *store;
    struct meta_config config = {.url = url, .credentials_file = path};
    int rc = meta_open(&config, &store, error);
    assert_true(rc < 0);
    assert_null(store);
    return rc;
}

static void all_fields_are_read(void **state)
{
    struct credentials got;
    write_file("# who we are\nuser=me\r\n\npassword=a=b c#d\nca=/ca.pem\ncert=/c.pem\nkey=/k.pem",
               0600);
    assert_int_equal(credentials_load(path, &got), 0);
    assert_string_equal(got.user, "me");
    assert_string_equal(got.password, "a=b c#d");
    assert_string_equal(got.ca, "/ca.pem");
    assert_string_equal(got.cert, "/c.pem");
    assert_string_equal(got.key, "/k.pem");
    credentials_clear(&got);
    assert_null(got.password);
    credentials_clear(&got);
}

static void no_file_gives_nothing_and_the_last_line_counts(void **state)
{
    struct credentials got;
    assert_int_equal(credentials_load(NULL, &got), 0);
    assert_null(got.user);
    assert_int_equal(credentials_password_set(&got, "from elsewhere"), 0);
    assert_string_equal(got.password, "from elsewhere");
    credentials_clear(&got);
    write_file("user=first\nuser=second\n", 0400);
    assert_int_equal(credentials_load(path, &got), 0);
    assert_string_equal(got.user, "second");
    credentials_clear(&got);
}

static void a_file_that_others_can_use_is_refused(void **state)
{
    static const mode_t modes[] = {0640, 0604, 0620, 0602, 0610, 0666};
    const char *error;
    for (size_t i = 0; i < util_count(modes); i++) {
        write_file("password=s3cret\n", modes[i]);
        assert_int_equal(open_with_file("redis://127.0.0.1:1", &error), -EACCES);
        assert_non_null(strstr(error, "chmod 600"));
        assert_null(strstr(error, "s3cret"));
    }
}

static void a_line_that_is_not_understood_is_named_by_its_number(void **state)
{
    static const char *const wrong[] = {"user=me\npasswd=s3cret\n", "user=me\ns3cret\n",
                                        "user=me\n=s3cret\n"};
    const char *error;
    for (size_t i = 0; i < util_count(wrong); i++) {
        write_file(wrong[i], 0600);
        assert_int_equal(open_with_file("etcd://127.0.0.1:1", &error), -EINVAL);
        assert_non_null(strstr(error, "line 2"));
        assert_null(strstr(error, "s3cret"));
    }
}

static void what_is_no_file_is_refused(void **state)
{
    struct credentials got;
    assert_int_equal(credentials_load("/no/such/file", &got), -ENOENT);
    credentials_clear(&got);
    assert_int_equal(credentials_load("/dev", &got), -EINVAL);
    credentials_clear(&got);
    char *large = malloc(70001);
    memset(large, '#', 70000);
    large[70000] = '\0';
    write_file(large, 0600);
    free(large);
    assert_int_equal(credentials_load(path, &got), -EINVAL);
    credentials_clear(&got);
}

static void a_password_in_a_url_is_refused_without_repeating_it(void **state)
{
    static const char *const wrong[] = {
        "redis://me:s3cret@127.0.0.1:6379/0", "redis://:s3cret@127.0.0.1",
        "rediss://me:s3c/s3cret@127.0.0.1",   "etcd://me:s3cret@127.0.0.1:2379/x",
        "etcd://a:s3cret?s3cret@host:1",
    };
    const char *error;
    write_file("", 0600);
    for (size_t i = 0; i < util_count(wrong); i++) {
        assert_int_equal(open_with_file(wrong[i], &error), -EACCES);
        assert_non_null(strstr(error, "credentials=FILE"));
        assert_null(strstr(error, "s3c"));
    }
    assert_int_equal(credentials_url_check("redis://me@127.0.0.1:6379/0?prefix=a:b"), 0);
    assert_int_equal(credentials_url_check("etcd://[::1]:2379,[::2]:2379/x"), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(all_fields_are_read),
        cmocka_unit_test(no_file_gives_nothing_and_the_last_line_counts),
        cmocka_unit_test(a_file_that_others_can_use_is_refused),
        cmocka_unit_test(a_line_that_is_not_understood_is_named_by_its_number),
        cmocka_unit_test(what_is_no_file_is_refused),
        cmocka_unit_test(a_password_in_a_url_is_refused_without_repeating_it),
    };
    log_setup(LOG_ERROR, false);
    return cmocka_run_group_tests_name("credentials", tests, setup, teardown);
}
