/* JSON as the control files and the subcommands exchange it: what is written can be read back, names survive as bytes. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "fs/json.h"

static struct json *finished(struct json_out *out, char **text)
{
    size_t length = 0;
    *text = json_take(out, &length);
    assert_non_null(*text);
    assert_int_equal(length, strlen(*text));
    struct json *value = json_parse(*text, length);
    assert_non_null(value);
    return value;
}

static void values_come_back(void **state)
{
    struct json_out out = {0};
    char *text;
    json_object(&out, NULL);
    json_put_text(&out, "text", "a \"quoted\" \\ line\n\twith \x01 and \xc3\xa4");
    json_put_text(&out, "nothing", NULL);
    json_put_format(&out, "format", "%d-%s", 7, "x");
    json_put_u64(&out, "zero", 0);
    json_put_u64(&out, "large", 1ull << 45);
    json_put_bool(&out, "yes", true);
    json_put_bool(&out, "no", false);
    json_put_time(&out, "time", 1732000000123456789);
    json_put_time(&out, "before", -1500000000);
    json_array(&out, "list");
    json_put_text(&out, NULL, "one");
    json_object(&out, NULL);
    json_end(&out);
    json_put_u64(&out, NULL, 3);
    json_end(&out);
    json_end(&out);
    struct json *value = finished(&out, &text);
    assert_string_equal(json_text(value, "text"), "a \"quoted\" \\ line\n\twith \x01 and \xc3\xa4");
    assert_null(json_text(value, "nothing"));
    assert_string_equal(json_text(value, "format"), "7-x");
    assert_int_equal(json_u64(value, "zero"), 0);
    assert_int_equal(json_u64(value, "large"), 1ull << 45);
    assert_true(json_true(value, "yes"));
    assert_false(json_true(value, "no"));
    assert_true(json_number(value, "time") > 1732000000.12 &&
                json_number(value, "time") < 1732000000.13);
    assert_true(json_number(value, "before") == -1.5);
    const struct json *item = json_first(json_member(value, "list"));
    assert_string_equal(json_item_text(item), "one");
    item = json_next(item);
    assert_true(json_is_object(item));
    assert_null(json_next(json_next(item)));
    json_free(value);
    free(text);
}

static void any_name_survives(void **state)
{
    const char *const names[] = {
        "plain",
        "",
        "with space and / slash",
        "100%",
        "%41 is not A",
        "%",
        "tab\tnewline\n\x7f",
        "quote\" back\\slash",
        "gr\xc3\xbc\xc3\x9f \xe2\x82\xac \xf0\x9f\x98\x80", /* valid: kept */
        "\xff\xfe broken",
        "cut \xe2\x82",
        "overlong \xc0\xaf \xe0\x80\xaf \xf0\x80\x80\xaf",
        "surrogate \xed\xa0\x80",
        "beyond \xf4\x90\x80\x80 \xf5",
    };
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        struct json_out out = {0};
        char *text;
        json_object(&out, NULL);
        json_put_name(&out, "name", names[i]);
        json_end(&out);
        struct json *value = finished(&out, &text);
        char *name = json_name(json_text(value, "name"));
        assert_string_equal(name, names[i]);
        for (const char *c = text; *c; c++) /* nothing that could end a line or a terminal's mind */
            assert_true((unsigned char)*c >= 0x20 || (*c == '\n' && !c[1]));
        free(name);
        json_free(value);
        free(text);
    }
}

static void well_formed_names_stay_readable(void **state)
{
    struct json_out out = {0};
    size_t length;
    json_put_name(&out, NULL, "gr\xc3\xbc\xc3\x9f-100%\xff");
    char *text = json_take(&out, &length);
    assert_string_equal(text, "\"gr\xc3\xbc\xc3\x9f-100%25%FF\"\n");
    free(text);
}

static void foreign_text_is_mended(void **state)
{
    struct json_out out = {0};
    size_t length;
    json_put_text(&out, NULL,
                  "a\xff"
                  "b%");
    char *text = json_take(&out, &length);
    assert_string_equal(text, "\"a\\ufffdb%\"\n");
    free(text);
}

static void odd_escapes_are_names_too(void **state)
{
    char *name = json_name("%4");
    assert_string_equal(name, "%4");
    free(name);
    name = json_name("%zz%e2%82%AC");
    assert_string_equal(name, "%zz\xe2\x82\xac");
    free(name);
    assert_null(json_name("a%00b"));
    assert_null(json_name(NULL));
}

static void unbalanced_text_is_refused(void **state)
{
    struct json_out out = {0};
    size_t length = 1;
    json_object(&out, NULL);
    assert_null(json_take(&out, &length));
    assert_int_equal(length, 0);
    json_end(&out);
    assert_null(json_take(&out, &length));
    for (int i = 0; i <= JSON_DEPTH_MAX; i++)
        json_array(&out, NULL);
    for (int i = 0; i <= JSON_DEPTH_MAX; i++)
        json_end(&out);
    assert_null(json_take(&out, &length));
}

static void wrong_types_read_as_nothing(void **state)
{
    const char *text = "{\"a\":\"x\",\"b\":-5,\"c\":1e300,\"d\":[1,\"s\"],\"e\":null}";
    struct json *value = json_parse(text, strlen(text));
    assert_int_equal(json_u64(value, "a"), 0);
    assert_int_equal(json_u64(value, "b"), 0);
    assert_true(json_u64(value, "c") == UINT64_MAX);
    assert_null(json_text(value, "b"));
    assert_false(json_true(value, "a"));
    assert_null(json_item_text(json_first(json_member(value, "d"))));
    assert_null(json_first(json_member(value, "e")));
    assert_null(json_first(json_member(value, "absent")));
    assert_null(json_text(NULL, "a"));
    json_free(value);
    assert_null(json_parse("{\"a\":", 5));
    assert_null(json_parse("", 0));
    assert_false(json_is_object(NULL));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(values_come_back),
        cmocka_unit_test(any_name_survives),
        cmocka_unit_test(well_formed_names_stay_readable),
        cmocka_unit_test(foreign_text_is_mended),
        cmocka_unit_test(odd_escapes_are_names_too),
        cmocka_unit_test(unbalanced_text_is_refused),
        cmocka_unit_test(wrong_types_read_as_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
