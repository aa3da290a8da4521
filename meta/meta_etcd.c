/* The backend on etcd, over its JSON gateway.
 *
 * Each of our keys is one key of etcd below the prefix, its revision is etcd's, leases are etcd's. Changes come on a
 * stream that stays open between waits. What is read again after that stream broke is read from the revision that was
 * told last; etcd says when that has been compacted, and an own key with a random value says when the data is not what
 * it was, as a cluster that was emptied and made again has the same id. */
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "meta/base/util.h"
#include "meta/meta_etcd_call.h"

#define ETCD_EPOCH      "epoch"
#define ETCD_GRACE_MS   150  /* how long a change that is known to be there may take to come */
#define ETCD_CONFIRM_MS 2500 /* how long a new stream may take to be confirmed */

/* ---- transactions and leases ---- */

static void etcd_compare_add(const struct etcd *s, cJSON *list, const struct meta_compare *from)
{
    cJSON *compare = cJSON_CreateObject();
    cJSON_AddItemToArray(list, compare);
    cJSON_AddStringToObject(compare, "result",
                            from->condition == META_EXISTS ? "GREATER" : "EQUAL");
    if (from->condition == META_REVISION) {
        cJSON_AddStringToObject(compare, "target", "MOD");
        etcd_put_number(compare, "mod_revision", from->revision);
    } else {
        cJSON_AddStringToObject(compare, "target", "CREATE");
        etcd_put_number(compare, "create_revision", 0);
    }
    if (from->condition == META_EMPTY)
        etcd_put_range(s, compare, from->key);
    else
        etcd_put_key(s, compare, from->key);
}

static void etcd_write_add(const struct etcd *s, cJSON *list, const struct meta_write *from)
{
    bool put = from->action == META_PUT;
    cJSON *operation = cJSON_CreateObject();
    cJSON_AddItemToArray(list, operation);
    cJSON *request =
        cJSON_AddObjectToObject(operation, put ? "request_put" : "request_delete_range");
    if (from->action == META_DELETE_PREFIX)
        etcd_put_range(s, request, from->key);
    else
        etcd_put_key(s, request, from->key);
    if (put) {
        etcd_put_bytes(request, "value", from->value);
        if (from->lease != 0)
            etcd_put_number(request, "lease", from->lease);
    }
}

static int etcd_txn(struct meta_store *store, struct meta_txn *txn)
{
    struct etcd *s = etcd_of(store);
    cJSON *answer;
    cJSON *request = cJSON_CreateObject();
    cJSON *compares = cJSON_AddArrayToObject(request, "compare");
    cJSON *writes = cJSON_AddArrayToObject(request, "success");
    for (size_t i = 0; i < txn->compare_count; i++)
        etcd_compare_add(s, compares, &txn->compares[i]);
    for (size_t i = 0; i < txn->write_count; i++)
        etcd_write_add(s, writes, &txn->writes[i]);
    etcd_enter(s);
    int rc = etcd_call(s, "/v3/kv/txn", request, false, &answer);
    if (rc == 0) {
        if (!cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(answer, "succeeded")))
            rc = -EAGAIN;
        else
            txn->revision = etcd_revision_of(answer);
        if (rc == 0 && txn->revision > s->newest)
            s->newest = txn->revision;
        cJSON_Delete(answer);
    }
    return etcd_answer(s, rc);
}

static int etcd_lease_grant(struct meta_store *store, uint32_t ttl_ms, uint64_t *lease)
{
    struct etcd *s = etcd_of(store);
    cJSON *answer;
    cJSON *request = cJSON_CreateObject();
    *lease = util_random_u64() >> 1 | 1; /* etcd's have a sign */
    etcd_put_number(request, "ID", *lease);
    etcd_put_number(request, "TTL", (ttl_ms + 999) / 1000);
    etcd_enter(s);
    int rc = etcd_call(s, "/v3/lease/grant", request, false, &answer);
    if (rc == 0)
        cJSON_Delete(answer);
    return etcd_answer(s, rc);
}

static int etcd_lease_renew(struct meta_store *store, uint64_t lease)
{
    struct etcd *s = etcd_of(store);
    cJSON *answer;
    cJSON *request = cJSON_CreateObject();
    etcd_put_number(request, "ID", lease);
    etcd_enter(s);
    int rc = etcd_call(s, "/v3/lease/keepalive", request, true, &answer);
    if (rc == 0) {
        const cJSON *result = cJSON_GetObjectItemCaseSensitive(answer, "result");
        etcd_header_note(s, result);
        if (etcd_get_number(result, "TTL") == 0)
            rc = -ENOENT;
        cJSON_Delete(answer);
    }
    return etcd_answer(s, rc);
}

static int etcd_lease_revoke(struct meta_store *store, uint64_t lease)
{
    struct etcd *s = etcd_of(store);
    cJSON *answer;
    cJSON *request = cJSON_CreateObject();
    etcd_put_number(request, "ID", lease);
    etcd_enter(s);
    int rc = etcd_call(s, "/v3/lease/revoke", request, true, &answer);
    if (rc == 0)
        cJSON_Delete(answer);
    return etcd_answer(s, rc);
}

/* ---- whose data it is ---- */

int etcd_epoch_get(struct etcd *s, bool make, char epoch[33])
{
    cJSON *answer;
    char fresh[33];
    uint8_t bytes[16];
    util_random(bytes, sizeof(bytes));
    util_hex_encode(bytes, sizeof(bytes), fresh);
    cJSON *request = cJSON_CreateObject();
    cJSON *compares = cJSON_AddArrayToObject(request, "compare");
    cJSON *success = cJSON_AddArrayToObject(request, "success");
    cJSON *failure = cJSON_AddArrayToObject(request, "failure");
    const struct meta_compare absent = {.condition = META_ABSENT, .key = ETCD_EPOCH};
    const struct meta_write put = {.action = META_PUT, .key = ETCD_EPOCH, .value = fresh};
    etcd_compare_add(s, compares, &absent);
    if (make)
        etcd_write_add(s, success, &put);
    cJSON *range = cJSON_CreateObject();
    cJSON_AddItemToArray(failure, range);
    etcd_put_key(s, cJSON_AddObjectToObject(range, "request_range"), ETCD_EPOCH);
    int rc = etcd_call(s, "/v3/kv/txn", request, true, &answer);
    if (rc < 0)
        return rc;
    if (cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(answer, "succeeded"))) {
        snprintf(epoch, 33, "%s", make ? fresh : "");
    } else {
        const cJSON *part =
            cJSON_GetArrayItem(cJSON_GetObjectItemCaseSensitive(answer, "responses"), 0);
        part = cJSON_GetObjectItemCaseSensitive(part, "response_range");
        const cJSON *kv = cJSON_GetArrayItem(cJSON_GetObjectItemCaseSensitive(part, "kvs"), 0);
        const char *value = etcd_get_bytes(kv, "value");
        snprintf(epoch, 33, "%s", value ? value : "");
        if (!value)
            rc = etcd_senseless(s);
    }
    cJSON_Delete(answer);
    return rc;
}

/* ---- the change feed ---- */

static void etcd_watch_close(struct etcd *s)
{
    http_stream_close(s->watch);
    s->watch = NULL;
    free(s->watched);
    s->watched = NULL;
}

/* The revision that the service has now. */
static int etcd_now(struct etcd *s, uint64_t *revision)
{
    cJSON *answer;
    cJSON *request = cJSON_CreateObject();
    etcd_put_key(s, request, ETCD_EPOCH);
    cJSON_AddTrueToObject(request, "count_only");
    int rc = etcd_call(s, "/v3/kv/range", request, true, &answer);
    if (rc < 0)
        return rc;
    *revision = etcd_revision_of(answer);
    cJSON_Delete(answer);
    return 0;
}

/* Has a stream of what changes behind `revision`. */
static int etcd_watch_open(struct etcd *s, const char *prefix, uint64_t revision)
{
    char epoch[33];
    if (s->watch && s->position == revision && strcmp(s->watched, prefix) == 0)
        return 0;
    etcd_watch_close(s);
    etcd_enter(s);
    int rc = etcd_epoch_get(s, false, epoch);
    if (rc < 0)
        return rc;
    if (s->epoch[0] == '\0')
        snprintf(s->epoch, sizeof(s->epoch), "%s", epoch);
    if (s->gap || strcmp(s->epoch, epoch) != 0)
        return -ESTALE;
    cJSON *request = cJSON_CreateObject();
    cJSON *create = cJSON_AddObjectToObject(request, "create_request");
    etcd_put_range(s, create, prefix);
    etcd_put_number(create, "start_revision", revision + 1);
    cJSON_AddTrueToObject(create, "progress_notify");
    s->watched = strdup(prefix);
    rc = s->watched ? etcd_stream(s, "/v3/watch", request, &s->watch) : -ENOMEM;
    s->position = revision;
    s->created = false;
    s->watch_ms = util_now_ms() + ETCD_CONFIRM_MS;
    if (rc < 0)
        etcd_watch_close(s);
    return rc;
}

static int etcd_events_tell(struct etcd *s, const cJSON *events, meta_event_fn each, void *arg,
                            int *told, int *asked)
{
    size_t skip = strlen(s->prefix);
    const cJSON *item;
    cJSON_ArrayForEach(item, events) {
        const cJSON *kv = cJSON_GetObjectItemCaseSensitive(item, "kv");
        const cJSON *type = cJSON_GetObjectItemCaseSensitive(item, "type");
        bool gone = cJSON_IsString(type) && strcmp(type->valuestring, "DELETE") == 0;
        struct meta_event event = {
            .key = etcd_get_bytes(kv, "key"),
            .value = gone ? NULL : etcd_get_bytes(kv, "value"),
            .revision = etcd_get_number(kv, "mod_revision"),
        };
        if (!event.key || strlen(event.key) < skip)
            return etcd_senseless(s);
        event.key += skip;
        if (!gone && !event.value)
            event.value = "";
        (*told)++;
        *asked = each(arg, &event);
        if (*asked < 0)
            return 0;
        if (event.revision > s->position)
            s->position = event.revision;
    }
    return 0;
}

/* One message of the stream. */
static int etcd_message_read(struct etcd *s, const cJSON *message, meta_event_fn each, void *arg,
                             int *told, int *asked)
{
    const cJSON *error = cJSON_GetObjectItemCaseSensitive(message, "error");
    const cJSON *result = cJSON_GetObjectItemCaseSensitive(message, "result");
    if (error || http_stream_status(s->watch) != 200)
        return etcd_error_read(s, message);
    if (!cJSON_IsObject(result))
        return etcd_senseless(s);
    etcd_header_note(s, result);
    if (s->gap)
        return -ESTALE;
    if (cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(result, "canceled"))) {
        if (etcd_get_number(result, "compact_revision") != 0)
            return -ESTALE;
        const cJSON *why = cJSON_GetObjectItemCaseSensitive(result, "cancel_reason");
        return etcd_refused(s, cJSON_IsString(why) ? why->valuestring : "the watch was cancelled",
                            14);
    }
    uint64_t now = etcd_revision_of(result);
    if (cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(result, "created"))) {
        s->created = true;
        return now < s->position ? -ESTALE : 0; /* it went back */
    }
    const cJSON *events = cJSON_GetObjectItemCaseSensitive(result, "events");
    if (cJSON_GetArraySize(events) > 0)
        return etcd_events_tell(s, events, each, arg, told, asked);
    if (now > s->position)
        s->position = now; /* a message without changes says that there were none up to here */
    return 0;
}

/* Tells what has come. A message holds whole transactions. */
static int etcd_watch_read(struct etcd *s, meta_event_fn each, void *arg, int *told, int *asked)
{
    int rc = 0;
    char *line;
    while (rc == 0 && *asked == 0 && (line = http_stream_line(s->watch))) {
        if (line[0] == '\0')
            continue;
        cJSON *message = cJSON_Parse(line);
        rc = message ? etcd_message_read(s, message, each, arg, told, asked) : etcd_senseless(s);
        cJSON_Delete(message);
    }
    return rc;
}

/* Lets the stream bring something, at most until `end`. 1: the caller is wanted elsewhere. */
static int etcd_watch_wait(struct etcd *s, uint64_t end, int wake_fd, meta_event_fn each, void *arg,
                           int *told, int *asked)
{
    bool woken = false;
    do {
        uint64_t now = util_now_ms();
        uint64_t until = s->created || s->watch_ms > end ? end : s->watch_ms;
        int rest = until > now ? (int)(until - now) : 0;
        int ended = http_stream_wait(s->watch, rest, wake_fd, &woken);
        int rc = etcd_watch_read(s, each, arg, told, asked);
        if (rc < 0)
            return rc;
        if (ended < 0)
            return etcd_fail(s, ended, "%s: %s", s->endpoints[s->endpoint], http_cause(s->http));
        if (!s->created && util_now_ms() >= s->watch_ms)
            return etcd_fail(s, -ETIMEDOUT, "it confirms no watch; is it stopped?");
    } while (!woken && *told == 0 && *asked == 0 && util_now_ms() < end);
    return woken ? 1 : 0;
}

/* The changes that are there now. The stream may lag behind what another call has just shown. */
static int etcd_catch_up(struct etcd *s, const char *prefix, uint64_t revision, meta_event_fn each,
                         void *arg, int *told, int *asked)
{
    uint64_t now = 0;
    etcd_enter(s);
    int rc = etcd_now(s, &now);
    if (rc < 0)
        return rc;
    if (s->gap || now < revision)
        return -ESTALE;
    if (now == revision)
        return 0;
    rc = etcd_watch_open(s, prefix, revision);
    if (rc < 0)
        return rc;
    return etcd_watch_wait(s, util_now_ms() + ETCD_GRACE_MS, -1, each, arg, told, asked);
}

static int etcd_wait(struct meta_store *store, const char *prefix, uint64_t *revision,
                     uint32_t timeout_ms, int wake_fd, meta_event_fn each, void *arg)
{
    struct etcd *s = etcd_of(store);
    uint64_t end = util_now_ms() + timeout_ms;
    int told = 0;
    int asked = 0;
    int rc = 0;
    if (!s->waited && !(s->waited = strdup(prefix)))
        return -ENOMEM;
    for (int tries = 0; tries < 2; tries++) {
        if (timeout_ms == 0)
            rc = etcd_catch_up(s, prefix, *revision, each, arg, &told, &asked);
        else if ((rc = etcd_watch_open(s, prefix, *revision)) == 0)
            rc = etcd_watch_wait(s, end, wake_fd, each, arg, &told, &asked);
        if (rc >= 0 || rc == -ESTALE || rc == -ENOMEM)
            break;
        /* the stream's end may be that of its member alone, or of our token */
        etcd_watch_close(s);
        etcd_next_endpoint(s);
        if (told > 0 || asked < 0 || (rc == -ETIMEDOUT && s->endpoint_count == 1))
            break;
    }
    if (asked < 0 || rc < 0)
        etcd_watch_close(s);
    if (asked < 0)
        return asked;
    if (told > 0 && rc < 0 && rc != -ESTALE)
        rc = 0; /* what was told counts; the next wait says what is wrong */
    if (rc >= 0 && (s->watch || told > 0))
        *revision = s->position > *revision ? s->position : *revision;
    etcd_answer(s, rc);
    return rc < 0 ? rc : 0;
}

/* ---- opening ---- */

static int etcd_malformed(const char *what)
{
    meta_open_error("%s; write etcd://HOST:PORT[,HOST:PORT...][/PREFIX]", what);
    return -EINVAL;
}

static bool etcd_endpoint_fits(const char *text)
{
    const char *colon = strrchr(text, ':');
    size_t digits = colon ? strspn(colon + 1, "0123456789") : 0;
    if (!colon || colon == text || digits == 0 || digits > 5 || colon[1 + digits] != '\0' ||
        atoi(colon + 1) < 1 || atoi(colon + 1) > 65535)
        return false;
    if (text[0] == '[')
        return colon[-1] == ']' &&
               strspn(text + 1, "0123456789abcdefABCDEF:.") == (size_t)(colon - text) - 2;
    for (const char *p = text; p < colon; p++) {
        if (!isalnum((unsigned char)*p) && !strchr("-_.", *p))
            return false;
    }
    return true;
}

/* What stands behind "etcd://", which is cut in pieces. */
static int etcd_rest_parse(struct etcd *s, char *text)
{
    char *slash = strchr(text, '/');
    if (slash)
        *slash = '\0';
    const char *prefix = slash && slash[1] ? slash + 1 : "p2pfs";
    for (const char *p = prefix; *p; p++) {
        if (!isalnum((unsigned char)*p) && !strchr("-_.:/", *p))
            return etcd_malformed("the metadata URL's prefix may have A-Z a-z 0-9 - _ . : / only");
    }
    size_t length = strlen(prefix);
    while (length > 1 && prefix[length - 1] == '/')
        length--;
    if (length > ETCD_PREFIX_MAX)
        return etcd_malformed("the metadata URL's prefix is longer than 64 bytes");
    snprintf(s->prefix, sizeof(s->prefix), "%.*s/", (int)length, prefix);
    char *rest = text;
    for (char *host; (host = strsep(&rest, ","));) {
        if (!etcd_endpoint_fits(host))
            return etcd_malformed("the metadata URL needs HOST:PORT for each endpoint");
        if (s->endpoint_count == ETCD_ENDPOINTS)
            return etcd_malformed("the metadata URL names more than 16 endpoints");
        if (asprintf(&s->endpoints[s->endpoint_count], "http%s://%s", s->encrypted ? "s" : "",
                     host) < 0) {
            s->endpoints[s->endpoint_count] = NULL;
            return -ENOMEM;
        }
        s->endpoint_count++;
    }
    return 0;
}

static int etcd_url_parse(struct etcd *s, const char *url)
{
    int rc = credentials_url_check(url);
    if (rc < 0)
        return rc;
    s->encrypted = strncmp(url, "etcds:", 6) == 0;
    char *text = strdup(strstr(url, "://") + 3);
    rc = text ? etcd_rest_parse(s, text) : -ENOMEM;
    free(text);
    return rc;
}

static void etcd_close(struct meta_store *store)
{
    if (!store)
        return;
    struct etcd *s = etcd_of(store);
    etcd_watch_close(s);
    http_close(s->http);
    credentials_clear(&s->credentials);
    if (s->token)
        explicit_bzero(s->token, strlen(s->token));
    free(s->token);
    free(s->waited);
    for (size_t i = 0; i < s->endpoint_count; i++)
        free(s->endpoints[i]);
    free(s);
}

/* The first answer shows whether the service is there and lets us in. */
static int etcd_open_try(struct etcd *s)
{
    const struct credentials *known = &s->credentials;
    int rc = http_open(known->ca, known->cert, known->key, &s->http);
    if (rc < 0)
        return rc;
    etcd_enter(s);
    rc = etcd_epoch_get(s, true, s->epoch);
    if (rc < 0)
        meta_open_error("%s", s->cause[0] ? s->cause : strerror(-rc));
    return rc;
}

static int etcd_open(const struct meta_config *config, struct meta_store **store)
{
    struct etcd *s = calloc(1, sizeof(*s));
    if (!s)
        return -ENOMEM;
    s->store.ops = &meta_etcd_ops;
    int rc = credentials_load(config->credentials_file, &s->credentials);
    if (rc == 0)
        rc = etcd_url_parse(s, config->url);
    if (rc == 0)
        rc = etcd_open_try(s);
    if (rc < 0) {
        etcd_close(&s->store);
        return rc;
    }
    *store = &s->store;
    return 0;
}

static const char *const etcd_schemes[] = {"etcd", "etcds", NULL};

const struct meta_ops meta_etcd_ops = {
    .name = "etcd",
    .schemes = etcd_schemes,
    .open = etcd_open,
    .close = etcd_close,
    .list = etcd_list,
    .txn = etcd_txn,
    .lease_grant = etcd_lease_grant,
    .lease_renew = etcd_lease_renew,
    .lease_revoke = etcd_lease_revoke,
    .wait = etcd_wait,
};
