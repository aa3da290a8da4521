/* The backend on a plain key-value service over HTTP: GET, PUT and DELETE of a key, and preconditions (ETag, If-Match,
 * If-None-Match).
 *
 * All keys of a cluster stand in one document, which is changed by compare-and-swap on its tag, so that a transaction is
 * one PUT whatever it writes. Changes are found by asking for the document every so often, which costs little as long
 * as it is the same. A service that does not honour preconditions is read, and never written. */
#include <ctype.h>
#include <errno.h>
#include <openssl/evp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "meta/base/log.h"
#include "meta/base/util.h"
#include "meta/meta_http_call.h"

#define WEB_STATE    "state"
#define WEB_POLL_MS  400 /* so that a change is seen within a second */
#define WEB_PAUSE_MS 40  /* at the most, after another writer was faster */
#define WEB_EAGER_MS 500 /* whoever has tried for so long does not pause any more */
#define WEB_YIELD_MS 300 /* at the most, after a change that others had been in the way of */
#define WEB_NAME     32  /* of a base */

/* Beyond so many bytes and that part of all, what changed behind the base goes into a new one: each change writes it, and
 * every node fetches it. */
#define WEB_ROOT_MIN  (32u << 10)
#define WEB_ROOT_PART 16

/* ---- the document ---- */

static void web_text_set(struct web *s, char *text, const char *etag)
{
    free(s->text);
    s->text = text;
    snprintf(s->etag, sizeof(s->etag), "%s", web_strong(etag));
}

/* Takes over a document (an empty one: there is none). Takes `text`. */
static void web_take(struct web *s, struct web_doc *newer, char *text, const char *etag)
{
    bool some = newer->epoch[0] != '\0';
    bool replaced = web_doc_follow(&s->doc, newer);
    web_text_set(s, text, etag);
    if (some && s->doc.epoch[0] == '\0')
        web_text_set(s, NULL, ""); /* out of memory: all of it is fetched again */
    if (!s->fetched)
        s->doc.since = s->doc.revision;
    s->fetched = true;
    if (replaced) {
        s->gap = true;
        s->store.epoch++;
    }
}

static int web_not_ours(struct web *s, int rc)
{
    if (rc == -ENOMEM)
        return web_fail(s, rc, "out of memory");
    return web_fail(s, -EBADMSG, "what %s%s." WEB_STATE " holds is %s; nothing is written there",
                    s->base, s->prefix,
                    rc == -EPROTONOSUPPORT ? "of another version of p2pfs"
                                           : "no metadata of p2pfs: give ?prefix= another name");
}

static void web_base_name(uint64_t base, char out[WEB_NAME])
{
    snprintf(out, WEB_NAME, "base.%016llx", (unsigned long long)base);
}

static int web_unconditional(struct web *s)
{
    return web_fail(s, -EBADMSG,
                    "%s no longer honours If-Match and If-None-Match; nothing is written until it "
                    "does",
                    s->base);
}

/* Puts the base below *newer. 1: there is no such base (any more). */
static int web_base_get(struct web *s, struct web_doc *newer)
{
    struct http_reply reply;
    char name[WEB_NAME];
    web_base_name(newer->base, name);
    int rc = web_call(s, "GET", name, NULL, NULL, NULL, &reply);
    if (rc < 0)
        return rc;
    rc = web_done(&reply) ? web_doc_read_base(newer, reply.body) : 1;
    free(reply.body);
    return rc < 0 ? web_not_ours(s, rc) : rc;
}

/* Whoever makes a new base removes the old one behind: the document then names the new one. One that stays without its
 * base has lost its names, as if the service had come back empty. Takes reply->body. 1: fetch once more. */
static int web_reply_take(struct web *s, struct http_reply *reply, uint64_t *missing)
{
    struct web_doc newer = {0};
    int rc = web_doc_read(&newer, reply->body);
    rc = rc < 0 ? web_not_ours(s, rc) : 0;
    if (rc == 0 && !web_doc_continues(&s->doc, &newer))
        rc = web_base_get(s, &newer);
    if (rc > 0 && *missing == newer.base && !s->store.read_only) {
        web_doc_clear(&newer);
        rc = 0;
    } else if (rc > 0) {
        *missing = newer.base;
    }
    if (rc == 0)
        web_take(s, &newer, reply->body, reply->etag);
    else
        free(reply->body);
    web_doc_clear(&newer);
    return rc;
}

static int web_fetch_once(struct web *s, uint64_t *missing)
{
    struct http_reply reply;
    int rc =
        web_call(s, "GET", WEB_STATE, NULL, NULL, s->text && s->etag[0] ? s->etag : NULL, &reply);
    if (rc < 0)
        return rc;
    if (web_done(&reply) && !s->store.read_only && !web_strong(reply.etag)[0]) {
        free(reply.body);
        return web_unconditional(s);
    }
    if (web_done(&reply) && s->text && strcmp(reply.body, s->text) == 0) {
        web_text_set(s, reply.body, reply.etag); /* a service without tags */
        return 0;
    }
    if (web_done(&reply))
        return web_reply_take(s, &reply, missing);
    free(reply.body);
    if (reply.status == 304 && s->text)
        return 0;
    if (reply.status != 404)
        return web_fail(s, -EBADMSG, "%s answers a GET with status %ld", s->base, reply.status);
    if (s->store.read_only)
        return web_fail(
            s, -ENODATA,
            "%s has no metadata of the cluster \"%s\", and does not honour If-Match and "
            "If-None-Match, without which none can be written; use another service, as "
            "that of scripts/metadata-server",
            s->base, s->prefix);
    struct web_doc none = {0};
    web_take(s, &none, NULL, "");
    return 0;
}

int web_fetch(struct web *s)
{
    uint64_t missing = 0;
    int rc;
    do
        rc = web_fetch_once(s, &missing);
    while (rc > 0);
    return rc;
}

/* ---- changing it ---- */

/* A base that one update has made: of the document as it was then, so that it serves also when others write meanwhile. */
struct web_made {
    uint64_t base; /* 0: none */
    uint64_t revision;
    uint64_t epoch; /* of the store */
};

/* Lets the draft lead to a base of its own, unless several that were made before led nowhere. The document does not lead
 * there before it is written. */
static int web_base_put(struct web *s, struct web_doc *draft, struct web_made *made)
{
    struct http_reply reply;
    char name[WEB_NAME];
    uint64_t base = util_random_u64();
    if (made->base != 0 && made->epoch == s->store.epoch && made->revision > draft->base_revision) {
        draft->base = made->base;
        draft->base_revision = made->revision;
        return 0;
    }
    if (s->stray_count == WEB_STRAYS_MAX || s->doc.revision == s->doc.base_revision)
        return 0; /* the latter also where there is no document yet */
    util_autofree char *text = web_doc_print_base(&s->doc);
    if (!text)
        return web_fail(s, -ENOMEM, "out of memory");
    web_base_name(base, name);
    s->strays[s->stray_count++] = base;
    int rc = web_call(s, "PUT", name, text, NULL, "*", &reply);
    if (rc < 0)
        return rc;
    free(reply.body);
    if (!web_done(&reply))
        return web_fail(s, -EBADMSG, "%s: a new key is refused with status %ld", s->base,
                        reply.status);
    *made = (struct web_made){base, s->doc.revision, s->store.epoch};
    draft->base = base;
    draft->base_revision = s->doc.revision;
    return 0;
}

/* What stays when that fails is bytes that nobody looks at. */
static void web_base_forget(struct web *s, uint64_t base)
{
    struct http_reply reply;
    char name[WEB_NAME];
    web_base_name(base, name);
    if (base != 0 && web_call(s, "DELETE", name, NULL, NULL, NULL, &reply) == 0)
        free(reply.body);
}

/* After a write that leads to `base`: whatever write of ours would still lead to another comes too late now. */
static void web_strays_forget(struct web *s, uint64_t base)
{
    for (size_t i = 0; i < s->stray_count; i++) {
        if (s->strays[i] != base)
            web_base_forget(s, s->strays[i]);
    }
    s->stray_count = 0;
}

/* A draft of the document with the change, signed, and its text. */
static int web_update_prepare(struct web *s, web_change change, void *arg, uint64_t write,
                              struct web_made *made, struct web_doc *draft, char **text)
{
    int rc = web_doc_draft(&s->doc, draft);
    if (rc == 0)
        rc = change(draft, arg);
    if (rc < 0)
        return rc;
    web_doc_sign(draft, write);
    size_t bytes = web_doc_bytes(draft);
    if (bytes > WEB_DOC_MAX && bytes > web_doc_bytes(&s->doc))
        return web_fail(s, -ENOSPC,
                        "the metadata would grow beyond %u MiB, the most that is kept in an HTTP "
                        "service; remove names, or use redis:// or etcd://",
                        WEB_DOC_MAX >> 20);
    *text = web_doc_print(draft);
    if (*text && strlen(*text) > WEB_ROOT_MIN + bytes / WEB_ROOT_PART) {
        rc = web_base_put(s, draft, made);
        free(*text);
        *text = rc == 0 ? web_doc_print(draft) : NULL;
    }
    return *text ? 0 : rc < 0 ? rc : web_fail(s, -ENOMEM, "out of memory");
}

/* 0: written, and then the draft and the text have been taken. 1: another writer was faster. */
static int web_update_send(struct web *s, struct web_doc *draft, char **text)
{
    struct http_reply reply;
    uint64_t before = s->doc.base;
    int rc = web_call(s, "PUT", WEB_STATE, *text, s->text ? s->etag : NULL, s->text ? NULL : "*",
                      &reply);
    if (rc < 0) {
        s->etag[0] = '\0'; /* it may have been carried out */
        return rc;
    }
    free(reply.body);
    if (!web_done(&reply))
        return 1;
    uint64_t base = draft->base;
    web_take(s, draft, *text, reply.etag);
    *text = NULL;
    if (base != before)
        web_base_forget(s, before);
    web_strays_forget(s, base);
    return 0;
}

static void web_pause(uint64_t ms)
{
    const struct timespec pause = {.tv_nsec = (long)ms * 1000000};
    nanosleep(&pause, NULL);
}

/* Who has just written has the newest document, and could write again and again before those that have to fetch it first:
 * so it lets them go before for as long as they were in its way. */
static int web_yield(struct web *s)
{
    if (s->struggle_ms == 0)
        return 0;
    web_pause(s->struggle_ms < WEB_YIELD_MS ? s->struggle_ms : WEB_YIELD_MS);
    return web_fetch(s);
}

/* What the probe found out when the store was opened must still hold: a service that has lost its preconditions would
 * let two writers overwrite each other. */
static int web_update_allowed(struct web *s)
{
    if (s->store.read_only)
        return -EOPNOTSUPP;
    int rc = s->doubt ? web_probe(s) : 0;
    if (rc == 0)
        s->doubt = false;
    if (rc == 0 && s->text && !s->etag[0])
        rc = web_fetch(s);
    return rc == -EOPNOTSUPP ? web_unconditional(s) : rc;
}

int web_update(struct web *s, web_change change, void *arg)
{
    uint64_t write = util_random_u64();
    struct web_made made = {0};
    bool newest = false; /* fetched since this call began */
    int rc = web_update_allowed(s);
    if (rc == 0)
        rc = web_yield(s);
    uint64_t began = util_now_ms();
    s->struggle_ms = 0;
    while (rc == 0) {
        struct web_doc draft = {0};
        util_autofree char *text = NULL;
        rc = web_update_prepare(s, change, arg, write, &made, &draft, &text);
        bool again = (rc == -EAGAIN || rc == -ENOENT) && !newest;
        if (rc == 0) {
            rc = web_update_send(s, &draft, &text);
            again = rc > 0;
        }
        web_doc_clear(&draft);
        if (!again)
            break;
        uint64_t tried = util_now_ms() - began;
        if (rc > 0 && newest && tried < WEB_EAGER_MS)
            web_pause(util_random_u64() % WEB_PAUSE_MS);
        s->struggle_ms = tried;
        newest = true;
        rc = web_fetch(s);
        /* a connection may have broken behind a write that was carried out, and was then sent once more */
        if (rc == 0 && web_doc_signed(&s->doc, write))
            return 0;
        if (rc == 0)
            rc = web_update_allowed(s);
    }
    return rc;
}

/* ---- the calls ---- */

static int web_change_txn(struct web_doc *doc, void *arg)
{
    return web_doc_txn(doc, arg);
}

static int web_txn(struct meta_store *store, struct meta_txn *txn)
{
    struct web *s = web_of(store);
    web_enter(s);
    int rc = web_lease_look(s);
    if (rc == 0)
        rc = web_update(s, web_change_txn, txn);
    s->full = s->full && rc != 0;
    return web_answer(s, rc);
}

static int web_list(struct meta_store *store, const char *prefix, meta_event_fn each, void *arg,
                    uint64_t *revision)
{
    struct web *s = web_of(store);
    /* what another prefix's feed has missed, this listing does not bring */
    bool covers = !s->waited || strncmp(s->waited, prefix, strlen(prefix)) == 0;
    web_enter(s);
    int rc = web_fetch(s);
    if (rc == 0 && s->doubt && !store->read_only)
        rc = web_update_allowed(s);
    if (rc == 0)
        rc = web_lease_look(s);
    if (web_answer(s, rc) < 0)
        return rc;
    if (covers)
        s->gap = false;
    *revision = s->doc.revision;
    return web_doc_list(&s->doc, prefix, each, arg);
}

/* What changed behind *revision, in the copy that is there. */
static int web_tell(struct web *s, const char *prefix, uint64_t *revision, meta_event_fn each,
                    void *arg, size_t *told)
{
    if (s->gap || *revision < s->doc.since || *revision > s->doc.revision)
        return -ESTALE;
    int rc = web_doc_changes(&s->doc, prefix, *revision, each, arg, told);
    if (rc == 0)
        *revision = s->doc.revision;
    return rc;
}

static int web_wait(struct meta_store *store, const char *prefix, uint64_t *revision,
                    uint32_t timeout_ms, int wake_fd, meta_event_fn each, void *arg)
{
    struct web *s = web_of(store);
    uint64_t end = util_now_ms() + timeout_ms;
    if (!s->waited && !(s->waited = strdup(prefix)))
        return -ENOMEM;
    for (;;) {
        size_t told = 0;
        web_enter(s);
        int rc = web_fetch(s);
        if (rc == 0)
            rc = web_lease_look(s);
        if (web_answer(s, rc) < 0)
            return rc;
        rc = web_tell(s, prefix, revision, each, arg, &told);
        uint64_t now = util_now_ms();
        if (rc < 0 || told > 0 || now >= end)
            return rc;
        struct pollfd wake = {.fd = wake_fd, .events = POLLIN}; /* poll ignores -1 */
        if (poll(&wake, 1, (int)(end - now < WEB_POLL_MS ? end - now : WEB_POLL_MS)) > 0)
            return 0;
    }
}

/* ---- opening ---- */

static int web_malformed(const char *what)
{
    meta_open_error("%s; write http://HOST:PORT/PATH[?prefix=NAME]", what);
    return -EINVAL;
}

static bool web_is_made_of(const char *text, const char *others)
{
    for (const char *p = text; *p; p++) {
        if (!isalnum((unsigned char)*p) && !strchr(others, *p))
            return false;
    }
    return true;
}

/* What stands behind "http://", which is cut in pieces. */
static int web_rest_parse(struct web *s, char *text)
{
    const char *prefix = "p2pfs";
    char *query = strchr(text, '?');
    if (query) {
        *query = '\0';
        if (strncmp(query + 1, "prefix=", strlen("prefix=")) != 0)
            return web_malformed(
                "the metadata URL has something else than ?prefix= behind its path");
        prefix = query + 1 + strlen("prefix=");
    }
    if (!*prefix || strlen(prefix) > WEB_PREFIX_MAX || !web_is_made_of(prefix, "-_.:"))
        return web_malformed("the metadata URL's prefix may have 1 to 64 of A-Z a-z 0-9 - _ . :");
    snprintf(s->prefix, sizeof(s->prefix), "%s", prefix);
    char *path = strchr(text, '/');
    size_t host = path ? (size_t)(path - text) : strlen(text);
    if (host == 0 || strcspn(text, "@") < host)
        return web_malformed("the metadata URL needs HOST:PORT");
    if (!web_is_made_of(text, "-_.:/[]~%"))
        return web_malformed("the metadata URL has characters that must be written as %XX");
    /* a path that ends with / has the keys below it, any other gets them as ?key= */
    const char *join = !path ? "/" : path[strlen(path) - 1] == '/' ? "" : "?key=";
    return asprintf(&s->base, "http://%s%s", text, join) < 0 ? (s->base = NULL, -ENOMEM) : 0;
}

static int web_url_parse(struct web *s, const char *url)
{
    int rc = credentials_url_check(url);
    if (rc < 0)
        return rc;
    char *text = strdup(strstr(url, "://") + 3);
    rc = text ? web_rest_parse(s, text) : -ENOMEM;
    free(text);
    return rc;
}

/* User and password as RFC 7617 wants them. */
static int web_authorization_make(struct web *s)
{
    const struct credentials *known = &s->credentials;
    char *both;
    if (!known->user && !known->password)
        return 0;
    int length = asprintf(&both, "%s:%s", known->user ? known->user : "",
                          known->password ? known->password : "");
    if (length < 0)
        return -ENOMEM;
    size_t scheme = strlen("Basic ");
    s->authorization = calloc(1, scheme + 4 * (((size_t)length + 2) / 3) + 1);
    if (s->authorization) {
        memcpy(s->authorization, "Basic ", scheme);
        EVP_EncodeBlock((unsigned char *)s->authorization + scheme, (unsigned char *)both, length);
    }
    explicit_bzero(both, (size_t)length);
    free(both);
    return s->authorization ? 0 : -ENOMEM;
}

static void web_close(struct meta_store *store)
{
    if (!store)
        return;
    struct web *s = web_of(store);
    web_lease_clear(s);
    web_doc_clear(&s->doc);
    http_close(s->http);
    credentials_clear(&s->credentials);
    if (s->authorization)
        explicit_bzero(s->authorization, strlen(s->authorization));
    free(s->authorization);
    free(s->text);
    free(s->base);
    free(s->waited);
    free(s);
}

/* The first answers show whether the service is there, lets us in, and can be written. */
static int web_open_try(struct web *s)
{
    int rc = http_open(NULL, NULL, NULL, &s->http);
    if (rc < 0)
        return rc;
    rc = web_probe(s);
    if (rc == -EOPNOTSUPP) {
        s->store.read_only = true;
        rc = 0;
    }
    if (rc == 0) {
        web_enter(s);
        rc = web_fetch(s);
    }
    if (rc < 0)
        meta_open_error("%s", s->cause[0] ? s->cause : strerror(-rc));
    else if (s->store.read_only)
        log_warn("metadata http: %s does not honour If-Match and If-None-Match, so that two nodes "
                 "could overwrite each other: names can be listed and read here, not changed, and "
                 "this node does not offer what it holds to others",
                 s->base);
    s->opened = rc == 0;
    return rc;
}

static int web_open(const struct meta_config *config, struct meta_store **store)
{
    struct web *s = calloc(1, sizeof(*s));
    if (!s)
        return -ENOMEM;
    s->store.ops = &meta_http_ops;
    s->beat = util_random_u64() >> 32;
    int rc = credentials_load(config->credentials_file, &s->credentials);
    if (rc == 0)
        rc = web_url_parse(s, config->url);
    if (rc == 0)
        rc = web_authorization_make(s);
    if (rc == 0)
        rc = web_open_try(s);
    if (rc < 0) {
        web_close(&s->store);
        return rc;
    }
    *store = &s->store;
    return 0;
}

static const char *const web_schemes[] = {"http", NULL};

const struct meta_ops meta_http_ops = {
    .name = "http",
    .schemes = web_schemes,
    .open = web_open,
    .close = web_close,
    .list = web_list,
    .txn = web_txn,
    .lease_grant = web_lease_grant,
    .lease_renew = web_lease_renew,
    .lease_revoke = web_lease_revoke,
    .wait = web_wait,
};
