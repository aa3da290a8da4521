#include "meta/meta_etcd_call.h"

#include <errno.h>
#include <openssl/evp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "meta/base/log.h"
#include "meta/base/util.h"

#define ETCD_TRY_MS 1200 /* one endpoint of several, before another one is asked */

struct etcd_error {
    const char *part; /* what etcd's sentence contains */
    const char *remedy;
    int code; /* of gRPC; 0: any */
    int rc;
    bool log_in; /* our token is no longer good */
};
static const struct etcd_error *etcd_error_of(const char *text, int code);

int etcd_fail(struct etcd *s, int rc, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(s->cause, sizeof(s->cause), format, arguments);
    va_end(arguments);
    return rc;
}

int etcd_senseless(struct etcd *s)
{
    return etcd_fail(s, -EBADMSG, "what answers there is no etcd 3.4 or newer; check the URL");
}

void etcd_enter(struct etcd *s)
{
    s->deadline_ms = util_now_ms() + META_DEADLINE_MS;
    s->cause[0] = '\0';
}

int etcd_answer(struct etcd *s, int rc)
{
    bool answered = rc >= 0 || rc == -EAGAIN || rc == -ENOENT || rc == -ESTALE || rc == -ENOMEM;
    if (!answered && !s->down)
        log_error("metadata etcd: %s", s->cause);
    else if (answered && s->down)
        log_info("metadata etcd: %s answers again", s->endpoints[s->endpoint]);
    s->down = !answered;
    return rc;
}

void etcd_next_endpoint(struct etcd *s)
{
    s->endpoint = (s->endpoint + 1) % s->endpoint_count;
}

/* ---- JSON ---- */

static char *etcd_base64(const char *bytes, size_t length)
{
    char *text = malloc(4 * ((length + 2) / 3) + 1);
    if (text)
        EVP_EncodeBlock((unsigned char *)text, (const unsigned char *)bytes, (int)length);
    return text;
}

static void etcd_put_text(cJSON *object, const char *name, const char *bytes, size_t length)
{
    util_autofree char *text = etcd_base64(bytes, length);
    if (text)
        cJSON_AddStringToObject(object, name, text);
}

void etcd_put_bytes(cJSON *object, const char *name, const char *bytes)
{
    etcd_put_text(object, name, bytes, strlen(bytes));
}

void etcd_put_number(cJSON *object, const char *name, uint64_t number)
{
    char text[24];
    snprintf(text, sizeof(text), "%llu", (unsigned long long)number);
    cJSON_AddStringToObject(object, name, text);
}

void etcd_put_key(const struct etcd *s, cJSON *object, const char *key)
{
    util_autofree char *whole = NULL;
    if (asprintf(&whole, "%s%s", s->prefix, key) < 0) {
        whole = NULL;
        return;
    }
    etcd_put_bytes(object, "key", whole);
}

void etcd_put_range(const struct etcd *s, cJSON *object, const char *prefix)
{
    util_autofree char *end = NULL;
    int length = asprintf(&end, "%s%s", s->prefix, prefix);
    if (length < 0) {
        end = NULL;
        return;
    }
    etcd_put_bytes(object, "key", end);
    end[length - 1]++; /* our prefix is never empty, and a printable byte has a successor */
    etcd_put_bytes(object, "range_end", end);
}

void etcd_put_after(cJSON *object, const char *key)
{
    etcd_put_text(object, "key", key, strlen(key) + 1); /* with a NUL behind it */
}

uint64_t etcd_get_number(const cJSON *object, const char *name)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, name);
    if (cJSON_IsString(item))
        return strtoull(item->valuestring, NULL, 10);
    return cJSON_IsNumber(item) && item->valuedouble > 0 ? (uint64_t)item->valuedouble : 0;
}

char *etcd_get_bytes(const cJSON *object, const char *name)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, name);
    if (!cJSON_IsString(item))
        return NULL;
    char *text = item->valuestring;
    size_t length = strlen(text);
    size_t padding = 0;
    while (padding < 2 && padding < length && text[length - 1 - padding] == '=')
        padding++;
    /* decoding in place: three bytes are written where four have been read */
    int decoded = EVP_DecodeBlock((unsigned char *)text, (const unsigned char *)text, (int)length);
    if (decoded < 0 || (size_t)decoded < padding)
        return NULL;
    text[(size_t)decoded - padding] = '\0';
    return text;
}

void etcd_cluster_note(struct etcd *s, const char *id)
{
    if (s->cluster[0] != '\0' && strcmp(s->cluster, id) != 0)
        s->gap = true;
    snprintf(s->cluster, sizeof(s->cluster), "%s", id);
}

void etcd_header_note(struct etcd *s, const cJSON *answer)
{
    const cJSON *header = cJSON_GetObjectItemCaseSensitive(answer, "header");
    const cJSON *id = cJSON_GetObjectItemCaseSensitive(header, "cluster_id");
    if (cJSON_IsString(id))
        etcd_cluster_note(s, id->valuestring);
}

uint64_t etcd_revision_of(const cJSON *answer)
{
    return etcd_get_number(cJSON_GetObjectItemCaseSensitive(answer, "header"), "revision");
}

/* ---- calls ---- */

int etcd_refused(struct etcd *s, const char *text, int code)
{
    const struct etcd_error *error = etcd_error_of(text, code);
    if (error->log_in) {
        free(s->token);
        s->token = NULL;
    }
    /* etcd's sentences quote nothing of a request; what is no etcd may say anything. */
    if (error->rc == -ENOENT || error->rc == -ESTALE)
        return error->rc;
    return etcd_fail(s, error->rc, "%s answers \"%.120s\": %s", s->endpoints[s->endpoint], text,
                     error->remedy);
}

static char *etcd_url(struct etcd *s, const char *path)
{
    char *url;
    return asprintf(&url, "%s%s", s->endpoints[s->endpoint], path) < 0 ? NULL : url;
}

static long etcd_left_ms(const struct etcd *s)
{
    uint64_t now = util_now_ms();
    return now < s->deadline_ms ? (long)(s->deadline_ms - now) : 0;
}

int etcd_error_read(struct etcd *s, const cJSON *answer)
{
    const cJSON *error = cJSON_GetObjectItemCaseSensitive(answer, "error");
    const cJSON *inner = cJSON_IsObject(error) ? error : answer;
    const cJSON *text = cJSON_GetObjectItemCaseSensitive(inner, "message");
    const cJSON *code = cJSON_GetObjectItemCaseSensitive(inner, "grpc_code");
    if (!code)
        code = cJSON_GetObjectItemCaseSensitive(inner, "code");
    if (!cJSON_IsString(text) || !cJSON_IsNumber(code))
        return etcd_senseless(s);
    return etcd_refused(s, text->valuestring, code->valueint);
}

/* What an answer holds, or why it is a refusal. Takes reply->body. */
static int etcd_reply_read(struct etcd *s, struct http_reply *reply, cJSON **answer)
{
    cJSON *json = cJSON_ParseWithOpts(reply->body, NULL, false);
    free(reply->body);
    reply->body = NULL;
    int rc = 0;
    if (!cJSON_IsObject(json))
        rc = etcd_senseless(s);
    else if (reply->status != 200 || cJSON_HasObjectItem(json, "error"))
        rc = etcd_error_read(s, json);
    if (rc < 0)
        cJSON_Delete(json);
    else
        *answer = json;
    return rc;
}

/* Whether another endpoint may do better. */
static bool etcd_is_outage(int rc)
{
    switch (-rc) {
    case EACCES:
    case EBADMSG:
    case EIO:
    case ENOENT:
    case ENOMEM:
    case ENOSPC:
    case ESTALE:
        return false;
    }
    return rc < 0;
}

/* Asks one endpoint after the other, within the deadline. */
static int etcd_try(struct etcd *s, const char *path, const char *body, bool safe, cJSON **answer)
{
    int rc = -ETIMEDOUT;
    etcd_fail(s, rc, "no answer within %d ms; is it stopped?", META_DEADLINE_MS);
    for (size_t tries = 0; tries < s->endpoint_count; tries++) {
        struct http_reply reply = {0};
        bool sent = false;
        bool last = tries + 1 == s->endpoint_count;
        long left = etcd_left_ms(s);
        if (left == 0)
            break;
        util_autofree char *url = etcd_url(s, path);
        if (!url)
            return etcd_fail(s, -ENOMEM, "out of memory");
        rc = http_post(s->http, url, s->token, body,
                       !last && safe && left > ETCD_TRY_MS ? ETCD_TRY_MS : left, &reply, &sent);
        if (rc < 0)
            etcd_fail(s, rc, "%s: %s", s->endpoints[s->endpoint], http_cause(s->http));
        else
            rc = etcd_reply_read(s, &reply, answer);
        if (!etcd_is_outage(rc))
            return rc;
        etcd_next_endpoint(s);
        if (sent && !safe)
            return rc;
    }
    return rc;
}

/* A token for user and password. A service without authentication gives none. */
static int etcd_log_in(struct etcd *s)
{
    if (s->token || !s->credentials.user || !s->credentials.password)
        return 0;
    cJSON *answer = NULL;
    cJSON *request = cJSON_CreateObject();
    cJSON_AddStringToObject(request, "name", s->credentials.user);
    cJSON_AddStringToObject(request, "password", s->credentials.password);
    char *body = cJSON_PrintUnformatted(request);
    cJSON *password = cJSON_GetObjectItemCaseSensitive(request, "password");
    if (password)
        explicit_bzero(password->valuestring, strlen(password->valuestring));
    cJSON_Delete(request);
    if (!body)
        return etcd_fail(s, -ENOMEM, "out of memory");
    int rc = etcd_try(s, "/v3/auth/authenticate", body, true, &answer);
    explicit_bzero(body, strlen(body));
    free(body);
    if (rc < 0)
        return rc;
    const cJSON *token = cJSON_GetObjectItemCaseSensitive(answer, "token");
    s->token = cJSON_IsString(token) ? strdup(token->valuestring) : NULL;
    cJSON_Delete(answer);
    return s->token ? 0 : etcd_senseless(s);
}

int etcd_call(struct etcd *s, const char *path, cJSON *request, bool safe, cJSON **answer)
{
    util_autofree char *body = cJSON_PrintUnformatted(request);
    cJSON_Delete(request);
    *answer = NULL;
    if (!body)
        return etcd_fail(s, -ENOMEM, "out of memory");
    bool had_token = s->token != NULL;
    int rc = etcd_log_in(s);
    if (rc == 0)
        rc = etcd_try(s, path, body, safe, answer);
    /* a token ends when it has not been used for long, or when its member was restarted */
    if (rc == -EACCES && had_token && !s->token) {
        rc = etcd_log_in(s);
        if (rc == 0)
            rc = etcd_try(s, path, body, safe, answer);
    }
    if (rc == 0)
        etcd_header_note(s, *answer);
    return rc;
}

int etcd_stream(struct etcd *s, const char *path, cJSON *request, struct http_stream **stream)
{
    util_autofree char *body = cJSON_PrintUnformatted(request);
    cJSON_Delete(request);
    int rc = body ? etcd_log_in(s) : etcd_fail(s, -ENOMEM, "out of memory");
    if (rc < 0)
        return rc;
    util_autofree char *url = etcd_url(s, path);
    rc = url ? http_stream_open(s->http, url, s->token, body, stream) : -ENOMEM;
    return rc < 0 ? etcd_fail(s, rc, "out of memory") : 0;
}

static const struct etcd_error etcd_errors[] = {
    {.code = 5, .part = "lease", .rc = -ENOENT, .remedy = ""},
    {.code = 11, .part = "required revision", .rc = -ESTALE, .remedy = ""},
    {.code = 8,
     .part = "space",
     .rc = -ENOSPC,
     .remedy = "its quota is full; compact and defragment it, then disarm its alarm"},
    {.code = 8, .part = "", .rc = -ETIMEDOUT, .remedy = "it is overloaded"},
    {.code = 0,
     .part = "invalid auth token",
     .rc = -EACCES,
     .remedy = "check user and password in the credentials file",
     .log_in = true},
    {.code = 0,
     .part = "revision of auth store",
     .rc = -EACCES,
     .remedy = "its users were changed just now",
     .log_in = true},
    {.code = 0,
     .part = "user name is empty",
     .rc = -EACCES,
     .remedy = "it wants a user; give -o credentials=FILE",
     .log_in = true},
    {.code = 0,
     .part = "authentication failed",
     .rc = -EACCES,
     .remedy = "user or password is wrong; check the credentials file",
     .log_in = true},
    {.code = 0,
     .part = "authentication is not enabled",
     .rc = -EACCES,
     .remedy = "it has no users; leave user= and password= out of the credentials file"},
    {.code = 0,
     .part = "permission denied",
     .rc = -EACCES,
     .remedy = "the user may not read and write below the prefix; see p2pfs-metadata(5)"},
    {.code = 16,
     .part = "",
     .rc = -EACCES,
     .remedy = "check user and password in the credentials file",
     .log_in = true},
    {.code = 7,
     .part = "",
     .rc = -EACCES,
     .remedy = "the user may not do that; see p2pfs-metadata(5)"},
    {.code = 3, .part = "too large", .rc = -EBADMSG, .remedy = "raise --max-request-bytes"},
    {.code = 0, .part = "corrupt", .rc = -EIO, .remedy = "look at its log"},
    {.code = 4, .part = "", .rc = -ETIMEDOUT, .remedy = "is its cluster healthy?"},
    {.code = 14, .part = "", .rc = -ETIMEDOUT, .remedy = "is its cluster healthy?"},
    {.code = 0,
     .part = "",
     .rc = -EBADMSG,
     .remedy = "p2pfs did not expect that; it needs etcd 3.4 or newer"},
};

static const struct etcd_error *etcd_error_of(const char *text, int code)
{
    const struct etcd_error *error = etcd_errors;
    while ((error->code != 0 && error->code != code) || !strstr(text, error->part))
        error++;
    return error;
}
