#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "meta/base/util.h"

static void sizes_are_parsed(void **state)
{
    static const struct {
        const char *text;
        uint64_t bytes;
    } good[] = {
        {"0", 0},
        {"4096", 4096},
        {"64K", 64 << 10},
        {"64k", 64 << 10},
        {"64KiB", 64 << 10},
        {"64KB", 64 << 10},
        {"7B", 7},
        {"1.5G", 3ull << 29},
        {"0.5M", 512 << 10},
        {"2T", 2ull << 40},
        {"8191P", 8191ull << 50},
        {"1.000000000000000000000001K", 1024},
        {"9223372036854775808", 1ull << 63},
        {"8E", 1ull << 63},
    };
    for (size_t i = 0; i < util_count(good); i++) {
        uint64_t bytes = 1;
        if (util_size_parse(good[i].text, 0, &bytes) != 0 || bytes != good[i].bytes)
            fail_msg("%s: %llu", good[i].text, (unsigned long long)bytes);
    }
    static const char *const bad[] = {"",    " ",   "K",    "-1",  "+1", "1 K",   "1KK",
                                      "1Ki", "1i",  "0x10", "1.",  ".",  "1.2.3", "1iB",
                                      "1Z",  "50%", "%",    "1e3", "K1", "1K "};
    for (size_t i = 0; i < util_count(bad); i++) {
        uint64_t bytes = 7;
        if (util_size_parse(bad[i], 0, &bytes) != -EINVAL || bytes != 7)
            fail_msg("\"%s\" was taken", bad[i]);
    }
    static const char *const large[] = {"9223372036854775809", "8.1E", "99999999999999999999999999",
                                        "9000P", "9223372036854775808K"};
    for (size_t i = 0; i < util_count(large); i++) {
        uint64_t bytes;
        if (util_size_parse(large[i], 0, &bytes) != -ERANGE)
            fail_msg("%s was taken", large[i]);
    }
}

static void sizes_may_be_a_share(void **state)
{
    uint64_t bytes;
    assert_int_equal(util_size_parse("50%", 1000, &bytes), 0);
    assert_int_equal(bytes, 500);
    assert_int_equal(util_size_parse("12.5%", 1000, &bytes), 0);
    assert_int_equal(bytes, 125);
    assert_int_equal(util_size_parse("100%", 1ull << 62, &bytes), 0);
    assert_true(bytes == 1ull << 62);
    assert_int_equal(util_size_parse("101%", 1000, &bytes), -EINVAL);
    assert_int_equal(util_size_parse("50%%", 1000, &bytes), -EINVAL);
}

static void sizes_are_printed(void **state)
{
    char text[32];
    util_size_print(0, text, sizeof(text));
    assert_string_equal(text, "0 B");
    util_size_print(1023, text, sizeof(text));
    assert_string_equal(text, "1023 B");
    util_size_print(1536, text, sizeof(text));
    assert_string_equal(text, "1.5 KiB");
    util_size_print((1 << 20) - 1, text, sizeof(text));
    assert_string_equal(text, "1.0 MiB");
    util_size_print(3ull << 40, text, sizeof(text));
    assert_string_equal(text, "3.0 TiB");
    util_size_print(UINT64_MAX, text, sizeof(text));
    assert_string_equal(text, "16.0 EiB");
}

static void hex_goes_both_ways(void **state)
{
    uint8_t bytes[4] = {0x00, 0x7f, 0xff, 0xa5};
    uint8_t back[4];
    char text[9];
    util_hex_encode(bytes, 4, text);
    assert_string_equal(text, "007fffa5");
    assert_int_equal(util_hex_decode("007FffA5", back, 4), 0);
    assert_memory_equal(bytes, back, 4);
    assert_int_equal(util_hex_decode("007fffa", back, 4), -EINVAL);
    assert_int_equal(util_hex_decode("007fffa50", back, 4), -EINVAL);
    assert_int_equal(util_hex_decode("007fffag", back, 4), -EINVAL);
    assert_int_equal(util_hex_decode("", back, 0), 0);
}

static void time_goes_forward(void **state)
{
    uint64_t before = util_now_ns();
    uint64_t before_ms = util_now_ms();
    usleep(2000);
    assert_true(util_now_ns() >= before + 2000000);
    assert_true(util_now_ms() > before_ms);
}

static void random_numbers_differ(void **state)
{
    uint8_t a[64] = {0};
    uint8_t b[64] = {0};
    util_random(a, sizeof(a));
    util_random(b, sizeof(b));
    assert_memory_not_equal(a, b, sizeof(a));
    assert_true(util_random_u64() != util_random_u64());
}

static void scopes_clean_up(void **state)
{
    int fds[2];
    assert_int_equal(pipe(fds), 0);
    {
        util_autoclose int writer = fds[1];
        util_autoclose int none = -1;
        util_autofree char *text = strdup("freed by the sanitiser's judgement");
        assert_non_null(text);
        assert_int_equal(none, -1);
        assert_int_equal(write(writer, "x", 1), 1);
    }
    char bytes[2];
    assert_int_equal(read(fds[0], bytes, 2), 1);
    assert_int_equal(read(fds[0], bytes, 2), 0); /* the writer is closed */
    close(fds[0]);
}

struct inner {
    int here;
    int member;
};

static void a_member_leads_to_its_container(void **state)
{
    struct inner inner;
    assert_ptr_equal(util_container(&inner.member, struct inner, member), &inner);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sizes_are_parsed),  cmocka_unit_test(sizes_may_be_a_share),
        cmocka_unit_test(sizes_are_printed), cmocka_unit_test(hex_goes_both_ways),
        cmocka_unit_test(time_goes_forward), cmocka_unit_test(random_numbers_differ),
        cmocka_unit_test(scopes_clean_up),   cmocka_unit_test(a_member_leads_to_its_container),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
