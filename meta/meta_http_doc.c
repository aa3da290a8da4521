#include "meta/meta_http_doc.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "meta/base/util.h"

#define WEB_DOC_GONE_MAX 100000       /* remembered deletions */
#define WEB_DOC_EXACT    (1ull << 53) /* numbers in JSON are exact below */

/* ---- keys and leases ---- */

/* In this layer alone. */
static struct web_key *doc_own(const struct web_doc *doc, const char *key)
{
    struct web_key *found;
    HASH_FIND_STR(doc->keys, key, found);
    return found;
}

/* The key as it is, NULL: there is none. */
static struct web_key *doc_find(const struct web_doc *doc, const char *key)
{
    struct web_key *found = doc_own(doc, key);
    if (!found && doc->below)
        found = doc_own(doc->below, key);
    return found && found->value ? found : NULL;
}

/* All keys of both layers, each once and also those that are gone: the next behind `key`, NULL: the first. */
static struct web_key *doc_next(const struct web_doc *doc, const struct web_key *key)
{
    bool own = !key || !doc->below || doc_own(doc, key->key) == key;
    struct web_key *next = key ? key->hh.next : doc->keys;
    if (own && !next && doc->below)
        next = doc->below->keys;
    else if (own)
        return next;
    while (next && doc_own(doc, next->key))
        next = next->hh.next;
    return next;
}

static void doc_forget(struct web_doc *doc, struct web_key *key)
{
    HASH_DEL(doc->keys, key);
    free(key);
}

/* `text` as it stands between quotes in JSON, behind `out`; NULL only counts. The bytes it takes. */
static size_t doc_escape(const char *text, char *out)
{
    size_t used = 0;
    for (const char *p = text; *p; p++) {
        char escape[8] = {*p};
        size_t length = 1;
        if ((unsigned char)*p < ' ')
            length = (size_t)snprintf(escape, sizeof(escape), "\\u%04x", *p);
        else if (*p == '"' || *p == '\\')
            length = (size_t)snprintf(escape, sizeof(escape), "\\%c", *p);
        if (out)
            memcpy(out + used, escape, length);
        used += length;
    }
    return used;
}

static void doc_key_json(struct web_key *key)
{
    char *at = key->json;
    *at++ = '"';
    at += doc_escape(key->key, at);
    at += sprintf(at, "\":[%" PRIu64, key->revision);
    if (key->value) {
        at = stpcpy(at, ",\"");
        at += doc_escape(key->value, at);
        *at++ = '"';
    }
    if (key->lease != 0)
        at += sprintf(at, ",\"%016" PRIx64 "\"", key->lease);
    at = stpcpy(at, "]");
    key->length = (size_t)(at - key->json);
}

/* Takes the key, in place of one that is there. */
static int doc_add(struct web_doc *doc, struct web_key *key)
{
    struct web_key *old = doc_own(doc, key->key);
    if (old)
        doc_forget(doc, old);
    HASH_ADD_KEYPTR(hh, doc->keys, key->key, strlen(key->key), key);
    if (key->hh.tbl)
        return 0;
    free(key);
    return -ENOMEM;
}

#define DOC_KEY_ROOM 64 /* of its JSON, without its texts */

/* value NULL: the key is gone. */
static int doc_put(struct web_doc *doc, const char *key, const char *value, uint64_t revision,
                   uint64_t lease)
{
    size_t key_size = strlen(key) + 1;
    size_t value_size = value ? strlen(value) + 1 : 0;
    size_t json = doc_escape(key, NULL) + (value ? doc_escape(value, NULL) : 0) + DOC_KEY_ROOM;
    struct web_key *fresh = calloc(1, sizeof(*fresh) + key_size + value_size + json);
    if (!fresh)
        return -ENOMEM;
    memcpy(fresh->key, key, key_size);
    fresh->revision = revision;
    fresh->lease = lease;
    fresh->json = fresh->key + key_size + value_size;
    if (value) {
        fresh->value = fresh->key + key_size;
        memcpy(fresh->value, value, value_size);
    }
    doc_key_json(fresh);
    return doc_add(doc, fresh);
}

static bool doc_below(const struct web_key *key, const char *prefix)
{
    return strncmp(key->key, prefix, strlen(prefix)) == 0;
}

struct web_lease *web_doc_lease(const struct web_doc *doc, uint64_t id)
{
    struct web_lease *lease;
    HASH_FIND(hh, doc->leases, &id, sizeof(id), lease);
    return lease;
}

static int doc_lease_order(const struct web_lease *a, const struct web_lease *b)
{
    return a->id < b->id ? -1 : a->id > b->id;
}

int web_doc_lease_add(struct web_doc *doc, uint64_t id, uint32_t ttl_ms)
{
    struct web_lease *lease = calloc(1, sizeof(*lease));
    if (!lease)
        return -ENOMEM;
    lease->id = id;
    lease->ttl_ms = ttl_ms;
    HASH_ADD_INORDER(hh, doc->leases, id, sizeof(lease->id), lease, doc_lease_order);
    if (lease->hh.tbl)
        return 0;
    free(lease);
    return -ENOMEM;
}

static int doc_drop(struct web_doc *draft, const struct web_key *key)
{
    return doc_put(draft, key->key, NULL, draft->revision, 0);
}

/* Below the prefix, or (lease not 0) with that lease. What is dropped is put behind all that is looked at. */
static int doc_drop_all(struct web_doc *draft, const char *prefix, uint64_t lease)
{
    int rc = 0;
    struct web_key *key;
    struct web_key *next;
    HASH_ITER(hh, draft->keys, key, next) {
        if (rc == 0 && key->value && doc_below(key, prefix) && (lease == 0 || key->lease == lease))
            rc = doc_drop(draft, key);
    }
    for (key = draft->below ? draft->below->keys : NULL; rc == 0 && key; key = key->hh.next) {
        if (key->value && doc_below(key, prefix) && (lease == 0 || key->lease == lease) &&
            !doc_own(draft, key->key))
            rc = doc_drop(draft, key);
    }
    return rc;
}

int web_doc_lease_end(struct web_doc *draft, uint64_t id)
{
    struct web_lease *lease = web_doc_lease(draft, id);
    if (!lease)
        return -ENOENT;
    HASH_DEL(draft->leases, lease);
    free(lease);
    draft->revision++;
    return doc_drop_all(draft, "", id);
}

static void doc_leases_clear(struct web_doc *doc)
{
    struct web_lease *lease = doc->leases;
    HASH_CLEAR(hh, doc->leases);
    while (lease) {
        struct web_lease *next = lease->hh.next;
        free(lease);
        lease = next;
    }
}

void web_doc_clear(struct web_doc *doc)
{
    struct web_key *key = doc->keys;
    HASH_CLEAR(hh, doc->keys);
    while (key) {
        struct web_key *next = key->hh.next;
        free(key);
        key = next;
    }
    doc_leases_clear(doc);
    *doc = (struct web_doc){0};
}

/* ---- reading ---- */

static bool doc_number(const cJSON *item, uint64_t *number)
{
    if (!cJSON_IsNumber(item) || item->valuedouble < 0 ||
        item->valuedouble >= (double)WEB_DOC_EXACT)
        return false;
    *number = (uint64_t)item->valuedouble;
    return (double)*number == item->valuedouble;
}

/* 16 hexadecimal digits. */
static bool doc_id(const char *text, uint64_t *id)
{
    if (!text || strlen(text) != 16 || strspn(text, "0123456789abcdef") != 16)
        return false;
    *id = strtoull(text, NULL, 16);
    return true;
}

static int doc_read_lease(struct web_doc *doc, const cJSON *item)
{
    uint64_t id;
    uint64_t ttl_ms;
    if (!doc_id(item->string, &id) || id == 0 || web_doc_lease(doc, id) ||
        !doc_number(item, &ttl_ms) || ttl_ms == 0 || ttl_ms > UINT32_MAX)
        return -EBADMSG;
    return web_doc_lease_add(doc, id, (uint32_t)ttl_ms);
}

static bool doc_key_is_good(const char *key)
{
    for (const char *p = key; *p; p++) {
        if (*p <= ' ' || *p > '~')
            return false;
    }
    return key[0] != '\0';
}

static int doc_read_key(struct web_doc *doc, const cJSON *item)
{
    uint64_t revision;
    uint64_t lease = 0;
    const cJSON *record = cJSON_GetArrayItem(item, 1);
    const cJSON *leased = cJSON_GetArrayItem(item, 2);
    if (!cJSON_IsArray(item) || !item->string || !doc_key_is_good(item->string) ||
        doc_own(doc, item->string) || !doc_number(cJSON_GetArrayItem(item, 0), &revision) ||
        revision > doc->revision || (record && !cJSON_IsString(record)))
        return -EBADMSG;
    if (leased && (!doc_id(cJSON_GetStringValue(leased), &lease) || !web_doc_lease(doc, lease)))
        return -EBADMSG;
    return doc_put(doc, item->string, cJSON_GetStringValue(record), revision, lease);
}

static int doc_read_writes(struct web_doc *doc, const cJSON *writes)
{
    const cJSON *item;
    cJSON_ArrayForEach(item, writes) {
        if (doc->write_count == WEB_DOC_WRITES ||
            !doc_id(cJSON_GetStringValue(item), &doc->writes[doc->write_count]))
            return -EBADMSG;
        doc->write_count++;
    }
    return 0;
}

/* What a document and its base have in common: the format, the epoch and the revision. */
static int doc_read_head(const cJSON *json, const char **epoch, uint64_t *revision)
{
    uint64_t format;
    *epoch = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(json, "epoch"));
    if (!cJSON_IsObject(json) || !*epoch || !**epoch ||
        !doc_number(cJSON_GetObjectItemCaseSensitive(json, "v"), &format))
        return -EBADMSG;
    if (format != WEB_DOC_FORMAT)
        return -EPROTONOSUPPORT;
    if (strlen(*epoch) >= WEB_DOC_EPOCH ||
        !doc_number(cJSON_GetObjectItemCaseSensitive(json, "revision"), revision) ||
        !cJSON_IsObject(cJSON_GetObjectItemCaseSensitive(json, "keys")))
        return -EBADMSG;
    return 0;
}

static int doc_read_json(struct web_doc *doc, const cJSON *json)
{
    const char *epoch;
    const cJSON *item;
    const cJSON *leases = cJSON_GetObjectItemCaseSensitive(json, "leases");
    const char *base = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(json, "base"));
    int rc = doc_read_head(json, &epoch, &doc->revision);
    if (rc < 0)
        return rc;
    if (!cJSON_IsObject(leases) || !base || (*base && !doc_id(base, &doc->base)) ||
        !doc_number(cJSON_GetObjectItemCaseSensitive(json, "base_revision"), &doc->base_revision) ||
        doc->base_revision > doc->revision)
        return -EBADMSG;
    memcpy(doc->epoch, epoch, strlen(epoch) + 1);
    rc = doc_read_writes(doc, cJSON_GetObjectItemCaseSensitive(json, "writes"));
    cJSON_ArrayForEach(item, leases) {
        if (rc == 0)
            rc = doc_read_lease(doc, item);
    }
    cJSON_ArrayForEach(item, cJSON_GetObjectItemCaseSensitive(json, "keys")) {
        if (rc == 0)
            rc = doc_read_key(doc, item);
    }
    doc->since = doc->revision;
    return rc;
}

int web_doc_read(struct web_doc *doc, const char *text)
{
    cJSON *json = cJSON_ParseWithOpts(text, NULL, true);
    int rc = json ? doc_read_json(doc, json) : -EBADMSG;
    cJSON_Delete(json);
    return rc;
}

static int doc_read_base_json(struct web_doc *doc, const cJSON *json)
{
    const char *epoch;
    uint64_t revision;
    const cJSON *item;
    int rc = doc_read_head(json, &epoch, &revision);
    if (rc == 0 && (strcmp(epoch, doc->epoch) != 0 || revision != doc->base_revision))
        rc = -EBADMSG;
    cJSON_ArrayForEach(item, cJSON_GetObjectItemCaseSensitive(json, "keys")) {
        /* what changed behind the base is there already; that a lease has ended is among it */
        if (rc == 0 && !doc_own(doc, item->string ? item->string : ""))
            rc = doc_read_key(doc, item);
    }
    return rc;
}

int web_doc_read_base(struct web_doc *doc, const char *text)
{
    cJSON *json = cJSON_ParseWithOpts(text, NULL, true);
    int rc = json ? doc_read_base_json(doc, json) : -EBADMSG;
    cJSON_Delete(json);
    return rc;
}

/* ---- writing ---- */

/* Those keys that changed behind a revision, with or without those that are gone; NULL: how long it becomes. */
static size_t doc_print_keys(const struct web_doc *doc, uint64_t behind, bool gone, char *at)
{
    size_t used = 0;
    for (const struct web_key *key = doc_next(doc, NULL); key; key = doc_next(doc, key)) {
        if ((!key->value && !gone) || (key->revision <= behind && doc->base != 0))
            continue;
        if (at && used > 0)
            at[used] = ',';
        used += used > 0;
        if (at)
            memcpy(at + used, key->json, key->length);
        used += key->length;
    }
    return used;
}

size_t web_doc_bytes(const struct web_doc *doc)
{
    struct web_doc all = *doc;
    all.base = 0;
    return doc_print_keys(&all, 0, false, NULL);
}

/* By hand: the records are there as text already. */
char *web_doc_print(const struct web_doc *doc)
{
    char base[17] = "";
    const char *comma = "";
    size_t room = 512 + doc->write_count * 32 + HASH_COUNT(doc->leases) * 64 +
                  doc_print_keys(doc, doc->base_revision, true, NULL);
    char *text = malloc(room);
    if (!text)
        return NULL;
    char *at = text;
    if (doc->base != 0)
        snprintf(base, sizeof(base), "%016" PRIx64, doc->base);
    at += sprintf(at,
                  "{\"v\":%d,\"epoch\":\"%s\",\"revision\":%" PRIu64
                  ",\"base\":\"%s\",\"base_revision\":%" PRIu64 ",\"writes\":[",
                  WEB_DOC_FORMAT, doc->epoch, doc->revision, base, doc->base_revision);
    for (size_t i = 0; i < doc->write_count; i++)
        at += sprintf(at, "%s\"%016" PRIx64 "\"", i > 0 ? "," : "", doc->writes[i]);
    at += sprintf(at, "],\"leases\":{");
    for (const struct web_lease *lease = doc->leases; lease; lease = lease->hh.next) {
        at += sprintf(at, "%s\"%016" PRIx64 "\":%" PRIu32, comma, lease->id, lease->ttl_ms);
        comma = ",";
    }
    at += sprintf(at, "},\"keys\":{");
    at += doc_print_keys(doc, doc->base_revision, true, at);
    memcpy(at, "}}", 3);
    return text;
}

char *web_doc_print_base(const struct web_doc *doc)
{
    struct web_doc all = *doc;
    all.base = 0;
    char *text = malloc(512 + doc_print_keys(&all, 0, false, NULL));
    if (!text)
        return NULL;
    char *at = text;
    at += sprintf(at, "{\"v\":%d,\"epoch\":\"%s\",\"revision\":%" PRIu64 ",\"keys\":{",
                  WEB_DOC_FORMAT, doc->epoch, doc->revision);
    at += doc_print_keys(&all, 0, false, at);
    memcpy(at, "}}", 3);
    return text;
}

void web_doc_sign(struct web_doc *doc, uint64_t write)
{
    uint8_t epoch[(WEB_DOC_EPOCH - 1) / 2];
    if (doc->epoch[0] == '\0') {
        util_random(epoch, sizeof(epoch));
        util_hex_encode(epoch, sizeof(epoch), doc->epoch);
    }
    if (doc->write_count == WEB_DOC_WRITES)
        memmove(&doc->writes[0], &doc->writes[1], --doc->write_count * sizeof(doc->writes[0]));
    doc->writes[doc->write_count++] = write;
}

bool web_doc_signed(const struct web_doc *doc, uint64_t write)
{
    for (size_t i = 0; i < doc->write_count; i++) {
        if (doc->writes[i] == write)
            return true;
    }
    return false;
}

/* ---- following ---- */

/* Notes in `newer` what the document had before and has no more: it went before the base was made, or else the newer one
 * would say when. */
static int doc_note_gone(struct web_doc *newer, const struct web_doc *doc)
{
    for (const struct web_key *key = doc->keys; key; key = key->hh.next) {
        if (doc_own(newer, key->key))
            continue;
        if (doc_put(newer, key->key, NULL, key->value ? newer->base_revision : key->revision, 0) <
            0)
            return -ENOMEM;
    }
    return 0;
}

/* Whoever is behind lists again. What went behind the base is part of the document. */
static void doc_forget_gone(struct web_doc *doc)
{
    struct web_key *key;
    struct web_key *next;
    HASH_ITER(hh, doc->keys, key, next) {
        if (!key->value && key->revision <= doc->base_revision)
            doc_forget(doc, key);
    }
    doc->since = doc->revision;
}

bool web_doc_continues(const struct web_doc *doc, const struct web_doc *newer)
{
    return newer->base == 0 || (strcmp(doc->epoch, newer->epoch) == 0 && doc->base == newer->base &&
                                doc->revision <= newer->revision);
}

/* The keys of `newer` go over to the document, and all else that it is. false: out of memory, and nothing is left. */
static bool doc_overlay(struct web_doc *doc, struct web_doc *newer)
{
    struct web_key *key;
    struct web_key *next;
    bool whole = true;
    HASH_ITER(hh, newer->keys, key, next) {
        HASH_DEL(newer->keys, key);
        whole = doc_add(doc, key) == 0 && whole;
    }
    if (!whole) {
        web_doc_clear(doc);
        return false;
    }
    bool rebased = doc->base != newer->base;
    doc_leases_clear(doc);
    newer->keys = doc->keys;
    newer->since = doc->since;
    newer->below = NULL;
    *doc = *newer;
    *newer = (struct web_doc){0};
    if (rebased && HASH_COUNT(doc->keys) > WEB_DOC_GONE_MAX)
        doc_forget_gone(doc);
    return true;
}

bool web_doc_follow(struct web_doc *doc, struct web_doc *newer)
{
    bool began = doc->epoch[0] == '\0';
    bool same = began || strcmp(doc->epoch, newer->epoch) == 0;
    bool replaced = !same || newer->revision < doc->revision;
    if (!replaced && (newer->below || (doc->base == newer->base && !began)))
        return !doc_overlay(doc, newer);
    if (!replaced) {
        newer->since = doc->since;
        if (doc_note_gone(newer, doc) < 0 || HASH_COUNT(newer->keys) > WEB_DOC_GONE_MAX)
            doc_forget_gone(newer);
    }
    web_doc_clear(doc);
    *doc = *newer;
    *newer = (struct web_doc){0};
    return replaced;
}

int web_doc_draft(const struct web_doc *doc, struct web_doc *draft)
{
    int rc = 0;
    *draft = *doc;
    draft->below = doc;
    draft->keys = NULL;
    draft->leases = NULL;
    for (const struct web_lease *lease = doc->leases; rc == 0 && lease; lease = lease->hh.next)
        rc = web_doc_lease_add(draft, lease->id, lease->ttl_ms);
    return rc;
}

/* ---- transactions ---- */

static bool doc_any_below(const struct web_doc *doc, const char *prefix)
{
    for (const struct web_key *key = doc_next(doc, NULL); key; key = doc_next(doc, key)) {
        if (key->value && doc_below(key, prefix))
            return true;
    }
    return false;
}

static bool doc_holds(const struct web_doc *doc, const struct meta_compare *compare)
{
    const struct web_key *key = doc_find(doc, compare->key);
    switch (compare->condition) {
    case META_ABSENT:
        return !key;
    case META_EXISTS:
        return key;
    case META_REVISION:
        return key && key->revision == compare->revision;
    case META_EMPTY:
        return !doc_any_below(doc, compare->key);
    }
    return false;
}

static int doc_write(struct web_doc *draft, const struct meta_write *write)
{
    const struct web_key *key;
    switch (write->action) {
    case META_PUT:
        if (write->lease != 0 && !web_doc_lease(draft, write->lease))
            return -ENOENT;
        return doc_put(draft, write->key, write->value, draft->revision, write->lease);
    case META_DELETE:
        key = doc_find(draft, write->key);
        return key ? doc_drop(draft, key) : 0;
    case META_DELETE_PREFIX:
        return doc_drop_all(draft, write->key, 0);
    }
    return -EINVAL;
}

int web_doc_txn(struct web_doc *draft, struct meta_txn *txn)
{
    int rc = 0;
    for (size_t i = 0; i < txn->compare_count; i++) {
        if (!doc_holds(draft, &txn->compares[i]))
            return -EAGAIN;
    }
    txn->revision = ++draft->revision;
    for (size_t i = 0; rc == 0 && i < txn->write_count; i++)
        rc = doc_write(draft, &txn->writes[i]);
    return rc;
}

/* ---- telling ---- */

static int doc_key_order(const struct web_key *a, const struct web_key *b)
{
    return strcmp(a->key, b->key);
}

static int doc_tell(const struct web_key *key, meta_event_fn each, void *arg)
{
    const struct meta_event event = {
        .key = key->key, .value = key->value, .revision = key->revision};
    return each(arg, &event);
}

int web_doc_list(struct web_doc *doc, const char *prefix, meta_event_fn each, void *arg)
{
    int rc = 0;
    HASH_SRT(hh, doc->keys, doc_key_order);
    for (const struct web_key *key = doc->keys; rc >= 0 && key; key = key->hh.next) {
        if (key->value && doc_below(key, prefix))
            rc = doc_tell(key, each, arg);
    }
    return rc < 0 ? rc : 0;
}

static int doc_change_order(const void *a, const void *b)
{
    const struct web_key *one = *(const struct web_key *const *)a;
    const struct web_key *two = *(const struct web_key *const *)b;
    if (one->revision != two->revision)
        return one->revision < two->revision ? -1 : 1;
    return strcmp(one->key, two->key);
}

int web_doc_changes(const struct web_doc *doc, const char *prefix, uint64_t revision,
                    meta_event_fn each, void *arg, size_t *told)
{
    size_t count = 0;
    int rc = 0;
    *told = 0;
    if (revision == doc->revision)
        return 0;
    const struct web_key **changed = malloc((HASH_COUNT(doc->keys) + 1) * sizeof(struct web_key *));
    if (!changed)
        return -ENOMEM;
    for (const struct web_key *key = doc->keys; key; key = key->hh.next) {
        if (key->revision > revision && doc_below(key, prefix))
            changed[count++] = key;
    }
    qsort(changed, count, sizeof(struct web_key *), doc_change_order);
    for (size_t i = 0; rc >= 0 && i < count; i++) {
        (*told)++;
        rc = doc_tell(changed[i], each, arg);
    }
    free(changed);
    return rc < 0 ? rc : 0;
}
