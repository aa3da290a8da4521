#include "meta/meta_http_call.h"

#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "meta/base/log.h"
#include "meta/base/util.h"

/* What a status means that is an error. */
struct web_status {
    long first;
    long last;
    int rc;
    const char *remedy;
};
static const struct web_status *web_status_of(long status);

int web_fail(struct web *s, int rc, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(s->cause, sizeof(s->cause), format, arguments);
    va_end(arguments);
    return rc;
}

void web_enter(struct web *s)
{
    s->deadline_ms = util_now_ms() + META_DEADLINE_MS;
    s->cause[0] = '\0';
}

int web_answer(struct web *s, int rc)
{
    bool answered = rc >= 0 || rc == -EAGAIN || rc == -ENOENT || rc == -ESTALE || rc == -ENOMEM ||
                    rc == -ENOSPC || rc == -EOPNOTSUPP;
    if (rc == -ENOSPC && !s->full)
        log_error("metadata http: %s", s->cause);
    s->full = s->full || rc == -ENOSPC;
    /* a service that is back, but not as it was, wants another remedy than one that is away */
    bool worse = rc == -EBADMSG && !s->senseless;
    if (!answered && (!s->down || worse) && s->opened)
        log_error("metadata http: %s", s->cause);
    if (answered && s->down) {
        log_info("metadata http: %s answers again", s->base);
        web_lease_restart(s);
    }
    s->down = !answered;
    s->senseless = s->down && (s->senseless || rc == -EBADMSG);
    s->doubt = s->doubt || !answered;
    return rc;
}

/* ---- requests ---- */

bool web_done(const struct http_reply *reply)
{
    return reply->status >= 200 && reply->status < 300;
}

const char *web_strong(const char *etag)
{
    return etag[0] == '"' ? etag : "";
}

int web_call(struct web *s, const char *method, const char *name, const char *value,
             const char *if_match, const char *if_none_match, struct http_reply *reply)
{
    util_autofree char *url = NULL;
    uint64_t now = util_now_ms();
    *reply = (struct http_reply){0};
    if (now >= s->deadline_ms)
        return web_fail(s, -ETIMEDOUT,
                        "%s: not done within %d ms; is it stopped, or are there too many writers?",
                        s->base, META_DEADLINE_MS);
    if (asprintf(&url, "%s%s.%s", s->base, s->prefix, name) < 0) {
        url = NULL;
        return web_fail(s, -ENOMEM, "out of memory");
    }
    const struct http_request request = {
        .method = method,
        .url = url,
        .body = value,
        .authorization = s->authorization,
        .if_match = if_match,
        .if_none_match = if_none_match,
        .limit = WEB_DOC_MAX,
        .timeout_ms = (long)(s->deadline_ms - now),
    };
    int rc = http_send(s->http, &request, reply);
    if (rc < 0)
        return web_fail(s, rc, "%s: %s", url, http_cause(s->http));
    if (web_done(reply) || reply->status == 304 || reply->status == 404 || reply->status == 412)
        return 0;
    const struct web_status *status = web_status_of(reply->status);
    free(reply->body);
    reply->body = NULL;
    return web_fail(s, status->rc, "%s of %s is answered with status %ld: %s", method, url,
                    reply->status, status->remedy);
}

/* ---- what the service can do ---- */

/* One step: whether the request is answered with one of two statuses' kinds. */
static int web_probe_step(struct web *s, const char *method, const char *name, const char *value,
                          const char *if_match, const char *if_none_match, bool carried_out,
                          char etag[HTTP_ETAG_MAX])
{
    struct http_reply reply;
    web_enter(s); /* each is an answer */
    int rc = web_call(s, method, name, value, if_match, if_none_match, &reply);
    if (rc < 0)
        return rc;
    free(reply.body);
    if (etag)
        memcpy(etag, reply.etag, sizeof(reply.etag));
    return web_done(&reply) == carried_out ? 0 : -EOPNOTSUPP;
}

/* The steps with a key that exists. */
static int web_probe_key(struct web *s, const char *name, const char *other)
{
    char first[HTTP_ETAG_MAX] = "";
    char second[HTTP_ETAG_MAX] = "";
    int rc = web_probe_step(s, "GET", other, NULL, NULL, NULL, false, NULL);
    if (rc < 0)
        return rc == -EOPNOTSUPP ? web_fail(s, -EBADMSG,
                                            "%s keeps one value for all keys; is the URL's path "
                                            "right? (a path that ends with / has keys below it)",
                                            s->base)
                                 : rc;
    rc = web_probe_step(s, "PUT", name, "2", NULL, "*", false, NULL);
    if (rc == 0)
        rc = web_probe_step(s, "GET", name, NULL, NULL, NULL, true, first);
    if (rc == 0)
        rc = web_strong(first)[0] ? 0 : -EOPNOTSUPP;
    if (rc == 0)
        rc = web_probe_step(s, "PUT", name, "3", "\"p2pfs\"", NULL, false, NULL);
    if (rc == 0)
        rc = web_probe_step(s, "PUT", name, "4", first, NULL, true, NULL);
    if (rc == 0)
        rc = web_probe_step(s, "PUT", name, "5", first, NULL, false, NULL);
    if (rc == 0)
        rc = web_probe_step(s, "GET", name, NULL, NULL, NULL, true, second);
    if (rc == 0)
        rc = strcmp(first, second) != 0 ? 0 : -EOPNOTSUPP;
    return rc;
}

/* Nothing but a random key that nobody has is ever written here. */
int web_probe(struct web *s)
{
    char name[40];
    char other[40];
    snprintf(name, sizeof(name), "probe.%016llx", (unsigned long long)util_random_u64());
    snprintf(other, sizeof(other), "probe.%016llx", (unsigned long long)util_random_u64());
    int rc = web_probe_step(s, "GET", name, NULL, NULL, NULL, false, NULL);
    if (rc == -EOPNOTSUPP)
        return web_fail(s, -EBADMSG,
                        "%s has a value for a key that nobody wrote; is this a key-value service, "
                        "and is the URL's path right?",
                        s->base);
    if (rc < 0)
        return rc;
    struct http_reply reply;
    rc = web_call(s, "PUT", name, "1", NULL, "*", &reply);
    free(reply.body);
    if (rc == 0 && !web_done(&reply))
        rc = -EOPNOTSUPP; /* it takes no values, as a mirror */
    if (rc == -EOPNOTSUPP)
        return rc;
    if (rc == 0)
        rc = web_probe_key(s, name, other);
    /* the first write may have been carried out although it was not answered */
    struct http_reply gone;
    char why[sizeof(s->cause)];
    memcpy(why, s->cause, sizeof(why));
    if (web_call(s, "DELETE", name, NULL, NULL, NULL, &gone) == 0)
        free(gone.body);
    memcpy(s->cause, why, sizeof(why));
    return rc;
}

static const struct web_status web_statuses[] = {
    {300, 399, -EBADMSG, "redirections are not followed; give the address that it leads to"},
    {401, 401, -EACCES, "it wants a user; check user= and password= in -o credentials=FILE"},
    {403, 403, -EACCES, "it does not let us; check who may read and write there"},
    {405, 405, -EOPNOTSUPP, "it takes no such request"},
    {413, 413, -ENOSPC,
     "it takes no value of that size; raise its limit, or use redis:// or etcd://"},
    {428, 428, -EBADMSG, "it wants another precondition than p2pfs gives"},
    {429, 429, -ETIMEDOUT, "it is overloaded"},
    {500, 500, -EIO, "look at its log"},
    {501, 501, -EOPNOTSUPP, "it takes no such request"},
    {502, 504, -ECONNRESET, "is it running, behind what answers for it?"},
    {507, 507, -ENOSPC, "its storage is full"},
    {LONG_MIN, LONG_MAX, -EBADMSG, "is this a key-value service, and is the URL's path right?"},
};

static const struct web_status *web_status_of(long status)
{
    const struct web_status *one = web_statuses;
    while (status < one->first || status > one->last)
        one++;
    return one;
}
