#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "meta/base/buf.h"

static void what_is_put_is_got(void **state)
{
    uint8_t bytes[256];
    char text[32];
    uint8_t raw[3];
    struct buf out = buf_over(bytes, sizeof(bytes));
    buf_put_u8(&out, 0xab);
    buf_put_u16(&out, 0x1234);
    buf_put_u32(&out, 0xdeadbeef);
    buf_put_u64(&out, 0x0123456789abcdefull);
    buf_put_string(&out, "node-1");
    buf_put_string(&out, "");
    buf_put_bytes(&out, "xyz", 3);
    assert_false(out.bad);
    struct buf in = buf_over(bytes, out.at);
    assert_int_equal(buf_get_u8(&in), 0xab);
    assert_int_equal(buf_get_u16(&in), 0x1234);
    assert_int_equal(buf_get_u32(&in), 0xdeadbeef);
    assert_true(buf_get_u64(&in) == 0x0123456789abcdefull);
    buf_get_string(&in, text, sizeof(text));
    assert_string_equal(text, "node-1");
    buf_get_string(&in, text, sizeof(text));
    assert_string_equal(text, "");
    assert_int_equal(buf_end(&in), -EBADMSG); /* something is left */
    buf_get_bytes(&in, raw, 3);
    assert_memory_equal(raw, "xyz", 3);
    assert_int_equal(buf_end(&in), 0);
}

static void integers_are_big_endian(void **state)
{
    uint8_t bytes[6];
    struct buf b = buf_over(bytes, sizeof(bytes));
    buf_put_u16(&b, 0x0102);
    buf_put_u32(&b, 0x03040506);
    assert_memory_equal(bytes, "\1\2\3\4\5\6", 6);
}

static void a_put_beyond_the_end_writes_nothing(void **state)
{
    uint8_t bytes[4] = {9, 9, 9, 9};
    struct buf b = buf_over(bytes, 3);
    buf_put_u32(&b, 0);
    assert_true(b.bad);
    buf_put_u8(&b, 0); /* would fit, but the message is bad already */
    assert_memory_equal(bytes, "\11\11\11\11", 4);
    assert_int_equal(buf_end(&b), -EBADMSG);

    b = buf_over(bytes, 3);
    buf_put_string(&b, "ab"); /* its length would fit, it would not */
    assert_true(b.bad);
    assert_memory_equal(bytes, "\11\11\11\11", 4);
}

static void a_get_beyond_the_end_is_zero_and_bad(void **state)
{
    uint8_t bytes[3] = {1, 2, 3};
    uint8_t raw[4] = {7, 7, 7, 7};
    struct buf b = buf_over(bytes, sizeof(bytes));
    assert_int_equal(buf_get_u32(&b), 0);
    assert_true(b.bad);
    assert_int_equal(buf_get_u8(&b), 0);
    buf_get_bytes(&b, raw, 4);
    assert_memory_equal(raw, "\0\0\0\0", 4);
    assert_null(buf_get_view(&b, 1));
    assert_int_equal(buf_end(&b), -EBADMSG);
}

static void a_length_that_would_wrap_is_refused(void **state)
{
    uint8_t bytes[8] = {0};
    struct buf b = buf_over(bytes, sizeof(bytes));
    buf_get_u8(&b);
    assert_null(buf_get_view(&b, SIZE_MAX));
    assert_true(b.bad);
    b = buf_over(bytes, sizeof(bytes));
    buf_get_u64(&b);
    assert_non_null(buf_get_view(&b, 0)); /* nothing is always there */
    assert_int_equal(buf_end(&b), 0);
}

static void a_string_must_fit_and_hold_no_nul(void **state)
{
    uint8_t with_nul[] = {0, 3, 'a', 0, 'b'};
    uint8_t cut[] = {0, 9, 'a'};
    uint8_t three[] = {0, 3, 'a', 'b', 'c'};
    char text[4];
    struct buf b = buf_over(with_nul, sizeof(with_nul));
    buf_get_string(&b, text, sizeof(text));
    assert_true(b.bad);
    assert_string_equal(text, "");
    b = buf_over(cut, sizeof(cut));
    buf_get_string(&b, text, sizeof(text));
    assert_true(b.bad);
    b = buf_over(three, sizeof(three));
    buf_get_string(&b, text, 3); /* no room for its end */
    assert_true(b.bad);
    b = buf_over(three, sizeof(three));
    buf_get_string(&b, text, 4);
    assert_false(b.bad);
    assert_string_equal(text, "abc");
}

static void a_string_beyond_64_kib_is_refused(void **state)
{
    size_t size = 70000;
    char *text = malloc(size);
    uint8_t *bytes = malloc(size + 2);
    memset(text, 'a', size - 1);
    text[size - 1] = '\0';
    struct buf b = buf_over(bytes, size + 2);
    buf_put_string(&b, text);
    assert_true(b.bad);
    text[65535] = '\0';
    b = buf_over(bytes, size + 2);
    buf_put_string(&b, text);
    assert_false(b.bad);
    assert_int_equal(b.at, 65537);
    free(text);
    free(bytes);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_put_is_got),
        cmocka_unit_test(integers_are_big_endian),
        cmocka_unit_test(a_put_beyond_the_end_writes_nothing),
        cmocka_unit_test(a_get_beyond_the_end_is_zero_and_bad),
        cmocka_unit_test(a_length_that_would_wrap_is_refused),
        cmocka_unit_test(a_string_must_fit_and_hold_no_nul),
        cmocka_unit_test(a_string_beyond_64_kib_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
