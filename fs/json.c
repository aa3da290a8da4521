#include "fs/json.h"

#include <cjson/cJSON.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- writing ---- */

static void append(struct json_out *out, const char *bytes, size_t length)
{
    if (out->failed)
        return;
    if (out->room - out->length < length + 1) {
        size_t room = out->room ? out->room : 1024;
        while (room - out->length < length + 1)
            room *= 2;
        char *data = realloc(out->data, room);
        if (!data) {
            out->failed = true;
            return;
        }
        out->data = data;
        out->room = room;
    }
    memcpy(out->data + out->length, bytes, length);
    out->length += length;
}

/* How many bytes the well-formed UTF-8 sequence at `s` has (no overlong form, no surrogate); 0: there is none. */
static size_t sequence(const uint8_t *s)
{
    uint8_t first = s[0];
    if (first < 0x80)
        return first ? 1 : 0;
    size_t length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
    if (first < 0xc2 || first > 0xf4)
        return 0;
    uint8_t least = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
    uint8_t most = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
    if (s[1] < least || s[1] > most)
        return 0;
    for (size_t i = 2; i < length; i++) /* stops at the NUL at the latest */
        if ((s[i] & 0xc0) != 0x80)
            return 0;
    return length;
}

enum escape { TEXT, NAME };

static void append_string(struct json_out *out, const char *text, enum escape escape)
{
    append(out, "\"", 1);
    const uint8_t *s = (const uint8_t *)text;
    size_t plain = 0; /* bytes before s that can be copied as they are */
    while (*s) {
        size_t length = sequence(s);
        bool control = *s < 0x20 || *s == 0x7f;
        bool percent = escape == NAME && (length == 0 || control || *s == '%');
        if (!percent && length > 0 && !control && *s != '"' && *s != '\\') {
            s += length;
            plain += length;
            continue;
        }
        append(out, (const char *)s - plain, plain);
        plain = 0;
        char code[8];
        if (percent)
            snprintf(code, sizeof(code), "%%%02X", *s);
        else if (length == 0)
            snprintf(code, sizeof(code), "\\ufffd");
        else if (control)
            snprintf(code, sizeof(code), "\\u%04x", *s);
        else
            snprintf(code, sizeof(code), "\\%c", *s);
        append(out, code, strlen(code));
        s++;
    }
    append(out, (const char *)s - plain, plain);
    append(out, "\"", 1);
}

/* What stands before every value: the comma and the key. */
static void lead(struct json_out *out, const char *key)
{
    if (out->depth > 0) {
        bool *filled = &out->filled[out->depth - 1];
        if (*filled)
            append(out, out->depth == 1 ? ",\n" : ",", out->depth == 1 ? 2 : 1);
        *filled = true;
    }
    if (key) {
        append_string(out, key, TEXT);
        append(out, ":", 1);
    }
}

static void enter(struct json_out *out, const char *key, const char *open, char close)
{
    lead(out, key);
    append(out, open, 1);
    if (out->depth == JSON_DEPTH_MAX) {
        out->failed = true;
        return;
    }
    out->close[out->depth] = close;
    out->filled[out->depth] = false;
    out->depth++;
}

void json_object(struct json_out *out, const char *key)
{
    enter(out, key, "{", '}');
}

void json_array(struct json_out *out, const char *key)
{
    enter(out, key, "[", ']');
}

void json_end(struct json_out *out)
{
    if (out->depth == 0) {
        out->failed = true;
        return;
    }
    out->depth--;
    append(out, &out->close[out->depth], 1);
}

void json_put_text(struct json_out *out, const char *key, const char *text)
{
    lead(out, key);
    if (text)
        append_string(out, text, TEXT);
    else
        append(out, "null", 4);
}

void json_put_format(struct json_out *out, const char *key, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    char *text = NULL;
    if (vasprintf(&text, format, arguments) < 0) {
        text = NULL;
        out->failed = true;
    }
    va_end(arguments);
    if (text)
        json_put_text(out, key, text);
    free(text);
}

void json_put_name(struct json_out *out, const char *key, const char *bytes)
{
    lead(out, key);
    append_string(out, bytes, NAME);
}

void json_put_u64(struct json_out *out, const char *key, uint64_t value)
{
    char text[24];
    int length = snprintf(text, sizeof(text), "%llu", (unsigned long long)value);
    lead(out, key);
    append(out, text, (size_t)length);
}

void json_put_bool(struct json_out *out, const char *key, bool value)
{
    lead(out, key);
    append(out, value ? "true" : "false", value ? 4 : 5);
}

void json_put_time(struct json_out *out, const char *key, int64_t ns)
{
    char text[40];
    bool before = ns < 0;
    uint64_t distance = before ? 0 - (uint64_t)ns : (uint64_t)ns;
    int length = snprintf(text, sizeof(text), "%s%llu.%09llu", before ? "-" : "",
                          (unsigned long long)(distance / 1000000000),
                          (unsigned long long)(distance % 1000000000));
    lead(out, key);
    append(out, text, (size_t)length);
}

char *json_take(struct json_out *out, size_t *length)
{
    append(out, "\n", 1);
    char *text = NULL;
    if (!out->failed && out->depth == 0) {
        out->data[out->length] = '\0'; /* append keeps a byte for it */
        text = out->data;
        *length = out->length;
    } else {
        free(out->data);
        *length = 0;
    }
    *out = (struct json_out){0};
    return text;
}

/* ---- reading: cJSON behind a name of our own ---- */

static const cJSON *node(const struct json *value)
{
    return (const cJSON *)value;
}

static const cJSON *member(const struct json *object, const char *key)
{
    return cJSON_GetObjectItemCaseSensitive(node(object), key);
}

struct json *json_parse(const char *text, size_t length)
{
    return (struct json *)cJSON_ParseWithLength(text, length);
}

void json_free(struct json *value)
{
    cJSON_Delete((cJSON *)value);
}

const struct json *json_member(const struct json *object, const char *key)
{
    return (const struct json *)member(object, key);
}

bool json_is_object(const struct json *value)
{
    return cJSON_IsObject(node(value));
}

const char *json_text(const struct json *object, const char *key)
{
    return cJSON_GetStringValue(member(object, key));
}

double json_number(const struct json *object, const char *key)
{
    const cJSON *item = member(object, key);
    return cJSON_IsNumber(item) && isfinite(item->valuedouble) ? item->valuedouble : 0;
}

uint64_t json_u64(const struct json *object, const char *key)
{
    double value = json_number(object, key);
    return value <= 0 ? 0 : value >= 18e18 ? UINT64_MAX : (uint64_t)value;
}

bool json_true(const struct json *object, const char *key)
{
    return cJSON_IsTrue(member(object, key));
}

const struct json *json_first(const struct json *array)
{
    return cJSON_IsArray(node(array)) ? (const struct json *)node(array)->child : NULL;
}

const struct json *json_next(const struct json *item)
{
    return (const struct json *)node(item)->next;
}

const char *json_item_text(const struct json *item)
{
    return cJSON_GetStringValue(node(item));
}

static int digit(char c)
{
    const char *digits = "0123456789ABCDEFabcdef";
    const char *at = c ? strchr(digits, c) : NULL;
    if (!at)
        return -1;
    return (int)(at - digits) < 16 ? (int)(at - digits) : (int)(at - digits) - 6;
}

char *json_name(const char *text)
{
    char *name = text ? malloc(strlen(text) + 1) : NULL;
    if (!name)
        return NULL;
    char *to = name;
    while (*text) {
        if (text[0] == '%' && digit(text[1]) >= 0 && digit(text[2]) >= 0) {
            *to = (char)(digit(text[1]) * 16 + digit(text[2]));
            if (*to == '\0') {
                free(name);
                return NULL;
            }
            text += 3;
        } else {
            *to = *text++;
        }
        to++;
    }
    *to = '\0';
    return name;
}
