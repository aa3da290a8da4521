/* Json: text that the control files and the subcommands exchange: a writer into one growing buffer, and a reader.
 *
 * Names are bytes, JSON is UTF-8. So wherever a name or path stands in JSON, '%', control characters and bytes that
 * are not part of well-formed UTF-8 are written as %XX (two upper-case hex digits); json_name turns that back. One
 * value is used by one thread at a time. */
#ifndef P2PFS_FS_JSON_H
#define P2PFS_FS_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- writing ---- */

#define JSON_DEPTH_MAX 8

/* Zero-initialised by the caller. Running out of memory is remembered and told by json_take. */
struct json_out {
    char *data;
    size_t length;
    size_t room;
    bool failed;
    unsigned depth;
    char close[JSON_DEPTH_MAX];  /* what ends each open level */
    bool filled[JSON_DEPTH_MAX]; /* the level has a member already */
};

/* key: NULL at the top and inside arrays. Objects and arrays end with json_end, the innermost first. */
void json_object(struct json_out *out, const char *key);
void json_array(struct json_out *out, const char *key);
void json_end(struct json_out *out);
/* Text of our own, UTF-8; a byte that is not is replaced. NULL: null. */
void json_put_text(struct json_out *out, const char *key, const char *text);
void json_put_format(struct json_out *out, const char *key, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* A name or path, see above. */
void json_put_name(struct json_out *out, const char *key, const char *bytes);
void json_put_u64(struct json_out *out, const char *key, uint64_t value);
void json_put_bool(struct json_out *out, const char *key, bool value);
/* Nanoseconds since the epoch (or of a duration) as seconds with nine decimals. */
void json_put_time(struct json_out *out, const char *key, int64_t ns);
/* The text (malloc'd, NUL-terminated, ends with a newline), and *out is empty again. NULL: out of memory. */
char *json_take(struct json_out *out, size_t *length);

/* ---- reading ---- */

struct json; /* a parsed value; members live as long as the value that json_parse gave */

struct json *json_parse(const char *text, size_t length); /* NULL: not JSON, or out of memory */
void json_free(struct json *value);
/* A member that is missing or of another type reads as NULL, 0 or false. */
const struct json *json_member(const struct json *object, const char *key);
bool json_is_object(const struct json *value);
const char *json_text(const struct json *object, const char *key); /* borrowed */
uint64_t json_u64(const struct json *object, const char *key);
double json_number(const struct json *object, const char *key);
bool json_true(const struct json *object, const char *key);
const struct json *json_first(const struct json *array);
const struct json *json_next(const struct json *item);
const char *json_item_text(const struct json *item); /* of a string in an array */
/* Turns %XX back into bytes; malloc'd. NULL: out of memory, or the text is NULL or stands for a NUL byte. */
char *json_name(const char *text);

#endif
