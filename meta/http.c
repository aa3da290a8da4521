#include "meta/http.h"

#include <curl/curl.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "meta/base/util.h"

#define HTTP_CONNECT_MS 1500
#define HTTP_ANSWER_MAX (256u << 20) /* bytes of one answer, or of one line of a stream */
#define HTTP_KEEPALIVE  5L           /* s */

/* Bytes as they come. */
struct http_bytes {
    char *data;
    size_t used;
    size_t room;
    size_t limit; /* 0: HTTP_ANSWER_MAX */
};

struct http {
    CURL *easy;
    char *ca;
    char *cert;
    char *key;
    char cause[CURL_ERROR_SIZE + 128];
};

struct http_stream {
    struct http *http;
    CURLM *multi;
    CURL *easy;
    struct curl_slist *headers;
    struct http_bytes bytes;
    size_t at; /* where the next line begins */
    char error[CURL_ERROR_SIZE];
    int ended; /* errno of its end */
};

static void http_global_init(void)
{
    curl_global_init(CURL_GLOBAL_DEFAULT);
}

const char *http_cause(const struct http *http)
{
    return http->cause;
}

static size_t http_take(char *data, size_t size, size_t count, void *arg)
{
    struct http_bytes *bytes = arg;
    size_t length = size * count;
    size_t limit = bytes->limit ? bytes->limit : HTTP_ANSWER_MAX;
    if (length > limit || bytes->used + length > limit)
        return 0;
    if (!bytes->data || bytes->used + length + 1 > bytes->room) {
        size_t room = 2 * (bytes->used + length + 1);
        char *grown = realloc(bytes->data, room);
        if (!grown)
            return 0;
        bytes->data = grown;
        bytes->room = room;
    }
    memcpy(bytes->data + bytes->used, data, length);
    bytes->used += length;
    bytes->data[bytes->used] = '\0';
    return length;
}

/* Whether the request can have reached the service. */
static bool http_was_sent(CURLcode code)
{
    switch (code) {
    case CURLE_COULDNT_RESOLVE_HOST:
    case CURLE_COULDNT_CONNECT:
    case CURLE_SSL_CONNECT_ERROR:
    case CURLE_PEER_FAILED_VERIFICATION:
    case CURLE_SSL_CERTPROBLEM:
    case CURLE_SSL_CACERT_BADFILE:
    case CURLE_URL_MALFORMAT:
        return false;
    default:
        return true;
    }
}

static int http_errno(CURL *easy, CURLcode code)
{
    long error = 0;
    switch (code) {
    case CURLE_OK:
        return 0;
    case CURLE_OPERATION_TIMEDOUT:
        return -ETIMEDOUT;
    case CURLE_COULDNT_RESOLVE_HOST:
        return -EHOSTUNREACH;
    case CURLE_COULDNT_CONNECT:
        curl_easy_getinfo(easy, CURLINFO_OS_ERRNO, &error);
        return error > 0 ? (int)-error : -ECONNREFUSED;
    case CURLE_SSL_CONNECT_ERROR:
    case CURLE_PEER_FAILED_VERIFICATION:
    case CURLE_SSL_CERTPROBLEM:
    case CURLE_SSL_CACERT_BADFILE:
        return -EACCES;
    case CURLE_OUT_OF_MEMORY:
        return -ENOMEM;
    case CURLE_URL_MALFORMAT:
        return -EINVAL;
    case CURLE_WRITE_ERROR: /* http_take refused */
    case CURLE_UNSUPPORTED_PROTOCOL:
    case CURLE_WEIRD_SERVER_REPLY:
        return -EBADMSG;
    default:
        return -ECONNRESET;
    }
}

static void http_explain(struct http *http, CURLcode code, const char *error)
{
    const char *text = code == CURLE_WRITE_ERROR ? "the answer is too large"
                       : error[0]                ? error
                                                 : curl_easy_strerror(code);
    const char *remedy = "is the service running, and is the URL right?";
    if (code == CURLE_PEER_FAILED_VERIFICATION || code == CURLE_SSL_CACERT_BADFILE)
        remedy = "check ca= in the credentials file, and whose certificate the service has";
    else if (code == CURLE_SSL_CONNECT_ERROR || code == CURLE_SSL_CERTPROBLEM)
        remedy = "check cert= and key= in the credentials file, and that the service speaks TLS";
    snprintf(http->cause, sizeof(http->cause), "%s; %s", text, remedy);
}

/* What all requests have in common. */
static void http_prepare(const struct http *http, CURL *easy)
{
    curl_easy_setopt(easy, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(easy, CURLOPT_PROTOCOLS_STR, "http,https");
    curl_easy_setopt(easy, CURLOPT_HTTP_VERSION, (long)CURL_HTTP_VERSION_1_1);
    curl_easy_setopt(easy, CURLOPT_PROXY, "");
    curl_easy_setopt(easy, CURLOPT_CONNECTTIMEOUT_MS, (long)HTTP_CONNECT_MS);
    curl_easy_setopt(easy, CURLOPT_TCP_KEEPALIVE, 1L);
    curl_easy_setopt(easy, CURLOPT_TCP_KEEPIDLE, HTTP_KEEPALIVE);
    curl_easy_setopt(easy, CURLOPT_TCP_KEEPINTVL, HTTP_KEEPALIVE);
    curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, http_take);
    if (http->ca)
        curl_easy_setopt(easy, CURLOPT_CAINFO, http->ca);
    if (http->cert)
        curl_easy_setopt(easy, CURLOPT_SSLCERT, http->cert);
    if (http->key)
        curl_easy_setopt(easy, CURLOPT_SSLKEY, http->key);
}

static int http_header_add(struct curl_slist **list, const char *text)
{
    struct curl_slist *longer = curl_slist_append(*list, text);
    if (!longer)
        return -ENOMEM;
    *list = longer;
    return 0;
}

static void http_headers_free(struct curl_slist **list)
{
    curl_slist_free_all(*list);
    *list = NULL;
}

/* A header line "name: value"; without a value there is none. */
static int http_field_add(struct curl_slist **list, const char *name, const char *value)
{
    util_autofree char *line = NULL;
    if (!value)
        return 0;
    if (asprintf(&line, "%s: %s", name, value) < 0)
        line = NULL;
    return line ? http_header_add(list, line) : -ENOMEM;
}

/* Expect without a value: curl would ask before it sends a large body. */
static int http_headers_make(const struct http_request *request, struct curl_slist **list)
{
    *list = NULL;
    int rc = http_header_add(list, "Expect:");
    if (rc == 0 && request->body)
        rc = http_header_add(list, "Content-Type: application/json");
    if (rc == 0)
        rc = http_field_add(list, "Authorization", request->authorization);
    if (rc == 0)
        rc = http_field_add(list, "If-Match", request->if_match);
    if (rc == 0)
        rc = http_field_add(list, "If-None-Match", request->if_none_match);
    if (rc < 0)
        http_headers_free(list);
    return rc;
}

/* hasleader: etcd then ends a stream of a member that is cut off, rather than leave it silent. */
static int http_headers_etcd(const char *authorization, const char *body, struct curl_slist **list)
{
    const struct http_request request = {.authorization = authorization, .body = body};
    int rc = http_headers_make(&request, list);
    if (rc == 0 && (rc = http_header_add(list, "Grpc-Metadata-hasleader: true")) < 0)
        http_headers_free(list);
    return rc;
}

/* Carries out what has been set, with those headers, which it takes. */
static int http_perform(struct http *http, const char *url, struct curl_slist *headers,
                        size_t limit, long timeout_ms, struct http_reply *reply, bool *sent)
{
    struct http_bytes bytes = {.limit = limit};
    struct curl_header *etag;
    char error[CURL_ERROR_SIZE] = "";
    curl_easy_setopt(http->easy, CURLOPT_URL, url);
    curl_easy_setopt(http->easy, CURLOPT_HTTPHEADER, headers);
    curl_easy_setopt(http->easy, CURLOPT_WRITEDATA, &bytes);
    curl_easy_setopt(http->easy, CURLOPT_ERRORBUFFER, error);
    curl_easy_setopt(http->easy, CURLOPT_TIMEOUT_MS, timeout_ms > 0 ? timeout_ms : 1L);
    CURLcode code = curl_easy_perform(http->easy);
    int rc = http_errno(http->easy, code);
    curl_easy_getinfo(http->easy, CURLINFO_RESPONSE_CODE, &reply->status);
    if (curl_easy_header(http->easy, "ETag", 0, CURLH_HEADER, -1, &etag) == CURLHE_OK &&
        strlen(etag->value) < sizeof(reply->etag))
        memcpy(reply->etag, etag->value, strlen(etag->value) + 1);
    curl_easy_setopt(http->easy, CURLOPT_ERRORBUFFER, NULL);
    curl_easy_setopt(http->easy, CURLOPT_HTTPHEADER, NULL);
    curl_slist_free_all(headers);
    *sent = http_was_sent(code);
    if (rc == 0 && !bytes.data)
        rc = http_take((char[]){""}, 1, 0, &bytes) == 0 && bytes.data ? 0 : -ENOMEM;
    if (rc < 0) {
        http_explain(http, code, error);
        free(bytes.data);
        return rc;
    }
    reply->body = bytes.data;
    reply->length = bytes.used;
    return 0;
}

int http_post(struct http *http, const char *url, const char *authorization, const char *body,
              long timeout_ms, struct http_reply *reply, bool *sent)
{
    struct curl_slist *headers;
    *reply = (struct http_reply){0};
    *sent = false;
    if (http_headers_etcd(authorization, body, &headers) < 0)
        return -ENOMEM;
    curl_easy_setopt(http->easy, CURLOPT_POSTFIELDS, body);
    return http_perform(http, url, headers, 0, timeout_ms, reply, sent);
}

int http_send(struct http *http, const struct http_request *request, struct http_reply *reply)
{
    struct curl_slist *headers;
    bool sent;
    *reply = (struct http_reply){0};
    if (http_headers_make(request, &headers) < 0)
        return -ENOMEM;
    curl_easy_setopt(http->easy, CURLOPT_HTTPGET, 1L);
    if (request->body) {
        curl_easy_setopt(http->easy, CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t)-1);
        curl_easy_setopt(http->easy, CURLOPT_POSTFIELDS, request->body);
    }
    curl_easy_setopt(http->easy, CURLOPT_CUSTOMREQUEST, request->method);
    return http_perform(http, request->url, headers, request->limit, request->timeout_ms, reply,
                        &sent);
}

int http_rpc(struct http *http, const char *url, const char *authorization, const void *body,
             size_t length, long timeout_ms, struct http_reply *reply, long *status)
{
    struct curl_slist *headers = NULL;
    struct curl_header *said;
    bool sent;
    *reply = (struct http_reply){0};
    *status = -1;
    if (http_header_add(&headers, "Content-Type: application/grpc") < 0 ||
        http_header_add(&headers, "TE: trailers") < 0 ||
        http_field_add(&headers, "Authorization", authorization) < 0) {
        http_headers_free(&headers);
        return -ENOMEM;
    }
    curl_easy_setopt(http->easy, CURLOPT_HTTP_VERSION, (long)CURL_HTTP_VERSION_2_PRIOR_KNOWLEDGE);
    /* libcurl 7.88 cannot use such a connection a second time: "Error in the HTTP2 framing layer" */
    curl_easy_setopt(http->easy, CURLOPT_FRESH_CONNECT, 1L);
    curl_easy_setopt(http->easy, CURLOPT_FORBID_REUSE, 1L);
    curl_easy_setopt(http->easy, CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t)length);
    curl_easy_setopt(http->easy, CURLOPT_POSTFIELDS, body);
    int rc = http_perform(http, url, headers, 0, timeout_ms, reply, &sent);
    if (rc == 0 && curl_easy_header(http->easy, "grpc-status", 0, CURLH_HEADER | CURLH_TRAILER, -1,
                                    &said) == CURLHE_OK)
        *status = strtol(said->value, NULL, 10);
    return rc;
}

/* ---- streams ---- */

int http_stream_open(struct http *http, const char *url, const char *authorization,
                     const char *body, struct http_stream **out)
{
    struct http_stream *stream = calloc(1, sizeof(*stream));
    if (!stream)
        return -ENOMEM;
    stream->http = http;
    stream->multi = curl_multi_init();
    stream->easy = curl_easy_init();
    if (!stream->multi || !stream->easy ||
        http_headers_etcd(authorization, body, &stream->headers) < 0)
        goto close_stream;
    http_prepare(http, stream->easy);
    curl_easy_setopt(stream->easy, CURLOPT_URL, url);
    curl_easy_setopt(stream->easy, CURLOPT_HTTPHEADER, stream->headers);
    curl_easy_setopt(stream->easy, CURLOPT_COPYPOSTFIELDS, body);
    curl_easy_setopt(stream->easy, CURLOPT_WRITEDATA, &stream->bytes);
    curl_easy_setopt(stream->easy, CURLOPT_ERRORBUFFER, stream->error);
    if (curl_multi_add_handle(stream->multi, stream->easy) != CURLM_OK)
        goto close_stream;
    *out = stream;
    return 0;

close_stream:
    http_stream_close(stream);
    return -ENOMEM;
}

void http_stream_close(struct http_stream *stream)
{
    if (!stream)
        return;
    if (stream->multi && stream->easy)
        curl_multi_remove_handle(stream->multi, stream->easy);
    if (stream->easy)
        curl_easy_cleanup(stream->easy);
    if (stream->multi)
        curl_multi_cleanup(stream->multi);
    curl_slist_free_all(stream->headers);
    free(stream->bytes.data);
    free(stream);
}

static bool http_stream_has_line(const struct http_stream *stream)
{
    const struct http_bytes *bytes = &stream->bytes;
    return bytes->used > stream->at &&
           memchr(bytes->data + stream->at, '\n', bytes->used - stream->at);
}

/* Notes the end of the transfer. */
static void http_stream_check(struct http_stream *stream)
{
    int left;
    const CURLMsg *message;
    while ((message = curl_multi_info_read(stream->multi, &left))) {
        if (message->msg != CURLMSG_DONE)
            continue;
        CURLcode code = message->data.result;
        stream->ended = code == CURLE_OK ? -ECONNRESET : http_errno(stream->easy, code);
        if (code == CURLE_OK)
            snprintf(stream->http->cause, sizeof(stream->http->cause),
                     "the service ended the stream of changes");
        else
            http_explain(stream->http, code, stream->error);
        if (stream->bytes.used > stream->at) /* what says why may have no end of line */
            http_take((char[]){"\n"}, 1, 1, &stream->bytes);
    }
}

int http_stream_wait(struct http_stream *stream, int timeout_ms, int wake_fd, bool *woken)
{
    uint64_t end = util_now_ms() + (uint64_t)timeout_ms;
    *woken = false;
    for (;;) {
        int running;
        CURLMcode code = curl_multi_perform(stream->multi, &running);
        http_stream_check(stream);
        if (http_stream_has_line(stream))
            return 0;
        if (code != CURLM_OK || stream->ended != 0)
            return code != CURLM_OK ? -ENOMEM : stream->ended;
        uint64_t now = util_now_ms();
        if (now >= end)
            return 0;
        struct curl_waitfd extra = {.fd = wake_fd, .events = CURL_WAIT_POLLIN};
        code = curl_multi_poll(stream->multi, &extra, wake_fd >= 0 ? 1 : 0, (int)(end - now), NULL);
        if (code != CURLM_OK)
            return -ENOMEM;
        if (wake_fd >= 0 && extra.revents) {
            *woken = true;
            return 0;
        }
    }
}

char *http_stream_line(struct http_stream *stream)
{
    struct http_bytes *bytes = &stream->bytes;
    if (!http_stream_has_line(stream)) {
        if (stream->at > 0) {
            memmove(bytes->data, bytes->data + stream->at, bytes->used - stream->at);
            bytes->used -= stream->at;
            stream->at = 0;
        }
        return NULL;
    }
    char *line = bytes->data + stream->at;
    char *end = memchr(line, '\n', bytes->used - stream->at);
    *end = '\0';
    stream->at = (size_t)(end + 1 - bytes->data);
    return line;
}

long http_stream_status(const struct http_stream *stream)
{
    long status = 0;
    curl_easy_getinfo(stream->easy, CURLINFO_RESPONSE_CODE, &status);
    return status;
}

/* ---- opening ---- */

static int http_copy(const char *text, char **copy)
{
    *copy = text ? strdup(text) : NULL;
    return text && !*copy ? -ENOMEM : 0;
}

int http_open(const char *ca, const char *cert, const char *key, struct http **out)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, http_global_init);
    struct http *http = calloc(1, sizeof(*http));
    if (!http)
        return -ENOMEM;
    if (http_copy(ca, &http->ca) < 0 || http_copy(cert, &http->cert) < 0 ||
        http_copy(key, &http->key) < 0 || !(http->easy = curl_easy_init())) {
        http_close(http);
        return -ENOMEM;
    }
    http_prepare(http, http->easy);
    *out = http;
    return 0;
}

void http_close(struct http *http)
{
    if (!http)
        return;
    if (http->easy)
        curl_easy_cleanup(http->easy);
    free(http->ca);
    free(http->cert);
    free(http->key);
    free(http);
}
