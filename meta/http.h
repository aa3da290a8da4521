/* Http: requests to one kind of service, with connections kept alive: a request and its answer, and an answer without end.
 *
 * One thread at a time, except that clients don't share anything. Calls return 0 or a negative errno, and http_cause
 * then says why, without anything of the request's body. Redirections and proxies of the environment are not followed. */
#ifndef P2PFS_META_HTTP_H
#define P2PFS_META_HTTP_H

#include <stdbool.h>
#include <stddef.h>

struct http;
struct http_stream;

/* ca, cert, key: PEM files for https URLs, each or NULL; copied. */
int http_open(const char *ca, const char *cert, const char *key, struct http **http);
void http_close(struct http *http); /* after its streams; NULL is harmless */
const char *http_cause(const struct http *http);

#define HTTP_ETAG_MAX 256
struct http_reply {
    long status;
    char etag[HTTP_ETAG_MAX]; /* with its quotes; "": none, or one that is longer */
    char *body;               /* NUL-terminated, the caller frees it */
    size_t length;
};
/* Sends `body` as JSON. authorization: the header's value, or NULL. 0 also for a status that means failure. -ETIMEDOUT;
 * -ECONNREFUSED and others of connect(2); -EACCES: TLS does not trust the service, or it does not trust us. *sent: the
 * service may have got the request. */
int http_post(struct http *http, const char *url, const char *authorization, const char *body,
              long timeout_ms, struct http_reply *reply, bool *sent);

struct http_request {
    const char *method; /* "GET", "PUT", "DELETE" */
    const char *url;
    const char *body;          /* or NULL */
    const char *authorization; /* headers' values, each or NULL */
    const char *if_match;
    const char *if_none_match;
    size_t limit; /* bytes of the answer; more is -EBADMSG */
    long timeout_ms;
};
/* As http_post; one http is used either for this or for posts. -EINVAL: malformed URL. */
int http_send(struct http *http, const struct http_request *request, struct http_reply *reply);

/* One call of a gRPC service, over HTTP/2: `body` and the answer are messages in gRPC's frames. 0 also for a call that
 * failed: *status is what gRPC says of it, -1: nothing. As http_post; one http is used either for this or for those. */
int http_rpc(struct http *http, const char *url, const char *authorization, const void *body,
             size_t length, long timeout_ms, struct http_reply *reply, long *status);

/* A POST whose answer comes line by line for as long as it is kept open. */
int http_stream_open(struct http *http, const char *url, const char *authorization,
                     const char *body, struct http_stream **stream);
void http_stream_close(struct http_stream *stream);
/* Lets bytes come until there is a line, `timeout_ms` have passed or `wake_fd` (or -1) is readable, then *woken is set.
 * -ECONNRESET and others as above: the stream has ended; lines that had come are still there. */
int http_stream_wait(struct http_stream *stream, int timeout_ms, int wake_fd, bool *woken);
/* The next line without its end, borrowed until the next call on the stream; NULL: none yet. */
char *http_stream_line(struct http_stream *stream);
/* The answer's status, 0: not known yet. */
long http_stream_status(const struct http_stream *stream);

#endif
