#include "meta/meta_redis_link.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "meta/base/util.h"

#define REDIS_PAGE  500 /* keys of one page of a listing */
#define REDIS_TRIES 3

/* A long listing comes in pages, so that the server does not keep its other clients waiting. They are told when all
 * are here, with what changed meanwhile put right from the feed: so the caller sees one state. */

/* Some keys of a listing: "key\0revision lease value\0" each. */
struct redis_page {
    struct redis_page *next;
    size_t size;
    char text[];
};

/* What changed while the pages came, by key. */
struct redis_late {
    char *key; /* owned; the value stands behind it */
    const char *value;
    uint64_t revision;
    size_t order;
};
struct redis_lates {
    struct redis_late *all;
    size_t count;
    size_t room;
};

/* Copied out of the answer, whose small pieces would stay with malloc for good. */
static int redis_page_copy(struct redis *s, const redisReply *records, struct redis_page **out)
{
    size_t size = 0;
    for (size_t i = 0; i < records->elements; i++) {
        if (!redis_is_text(records->element[i]))
            return redis_fail(s, -EBADMSG, "%s and %s contradict each other", s->keys[1],
                              s->keys[2]);
        size += records->element[i]->len + 1;
    }
    struct redis_page *page = malloc(sizeof(*page) + size);
    if (!page)
        return redis_fail(s, -ENOMEM, "out of memory");
    page->next = NULL;
    page->size = 0;
    for (size_t i = 0; i < records->elements; i++) {
        memcpy(page->text + page->size, records->element[i]->str, records->element[i]->len);
        page->size += records->element[i]->len;
        page->text[page->size++] = '\0';
    }
    *out = page;
    return 0;
}

static void redis_pages_free(struct redis_page *page)
{
    while (page) {
        struct redis_page *next = page->next;
        free(page);
        page = next;
    }
}

/* All pages; they are of *first, the revision before the first one, up to *last. */
static int redis_pages_get(struct redis *s, const char *prefix, struct redis_page **pages,
                           uint64_t *first, uint64_t *last)
{
    struct redis_page **end = pages;
    char *after = strdup("");
    char limit[16];
    int rc = after ? 0 : -ENOMEM;
    snprintf(limit, sizeof(limit), "%d", REDIS_PAGE);
    for (bool more = true; rc == 0 && more;) {
        redisReply *reply = NULL;
        s->deadline_ms = util_now_ms() + META_DEADLINE_MS; /* each page is an answer */
        rc = redis_run(s, 4, (const char *[]){"page", prefix, after, limit}, &reply);
        if (rc < 0)
            break;
        rc = redis_head(s, reply, 4, last);
        if (rc == 0 &&
            (reply->element[3]->type != REDIS_REPLY_ARRAY || reply->element[3]->elements % 2 != 0))
            rc = redis_senseless(s);
        if (rc == 0 && !*pages)
            *first = *last;
        if (rc == 0)
            rc = redis_page_copy(s, reply->element[3], end);
        if (rc == 0) {
            const redisReply *records = reply->element[3];
            more = records->elements == 2 * REDIS_PAGE;
            free(after);
            after = strdup(more ? records->element[2 * REDIS_PAGE - 2]->str : "");
            if (!after)
                rc = redis_fail(s, -ENOMEM, "out of memory");
            while (*end)
                end = &(*end)->next;
        }
        freeReplyObject(reply);
    }
    free(after);
    return rc;
}

static int redis_late_add(void *arg, const struct meta_event *event)
{
    struct redis_lates *lates = arg;
    size_t key_size = strlen(event->key) + 1;
    size_t value_size = event->value ? strlen(event->value) + 1 : 0;
    if (lates->count == lates->room) {
        size_t room = lates->room ? 2 * lates->room : 64;
        struct redis_late *all = realloc(lates->all, room * sizeof(*all));
        if (!all)
            return -ENOMEM;
        lates->all = all;
        lates->room = room;
    }
    char *key = malloc(key_size + value_size);
    if (!key)
        return -ENOMEM;
    memcpy(key, event->key, key_size);
    if (event->value)
        memcpy(key + key_size, event->value, value_size);
    lates->all[lates->count] = (struct redis_late){key, event->value ? key + key_size : NULL,
                                                   event->revision, lates->count};
    lates->count++;
    return 0;
}

static void redis_lates_free(struct redis_lates *lates)
{
    for (size_t i = 0; i < lates->count; i++)
        free(lates->all[i].key);
    free(lates->all);
}

/* By key, a key's last change first. */
static int redis_late_compare(const void *a, const void *b)
{
    const struct redis_late *one = a;
    const struct redis_late *two = b;
    int order = strcmp(one->key, two->key);
    return order != 0 ? order : one->order > two->order ? -1 : 1;
}

/* Tells the late changes of keys up to `until` (NULL: all), each once. *same: `until` itself was among them. */
static int redis_lates_tell(struct redis_lates *lates, size_t *at, const char *until, bool *same,
                            meta_event_fn each, void *arg)
{
    int rc = 0;
    *same = false;
    while (rc == 0 && *at < lates->count) {
        const struct redis_late *late = &lates->all[*at];
        int order = until ? strcmp(late->key, until) : -1;
        if (order > 0)
            break;
        *same = order == 0;
        if (late->value)
            rc = each(arg, &(struct meta_event){late->key, late->value, late->revision});
        do
            (*at)++;
        while (*at < lates->count && strcmp(lates->all[*at].key, late->key) == 0);
    }
    return rc;
}

/* Tells pages and late changes as what they are together: the state at the last of them. */
static int redis_pages_tell(struct redis *s, const struct redis_page *pages,
                            struct redis_lates *lates, meta_event_fn each, void *arg, int *asked)
{
    size_t late = 0;
    bool same;
    for (const struct redis_page *page = pages; page; page = page->next) {
        for (const char *at = page->text; at < page->text + page->size;) {
            const char *key = at;
            const char *record = key + strlen(key) + 1;
            char *end;
            at = record + strlen(record) + 1;
            unsigned long long revision = strtoull(record, &end, 10);
            const char *value = *end == ' ' ? strchr(end + 1, ' ') : NULL;
            if (!value)
                return redis_fail(s, -EBADMSG, "%s, field %s: not what p2pfs wrote", s->keys[1],
                                  key);
            *asked = redis_lates_tell(lates, &late, key, &same, each, arg);
            if (*asked == 0 && !same)
                *asked = each(arg, &(struct meta_event){key, value + 1, revision});
            if (*asked < 0)
                return 0;
        }
    }
    *asked = redis_lates_tell(lates, &late, NULL, &same, each, arg);
    return 0;
}

/* One listing, as of one revision. -ESTALE: the feed could not say what changed meanwhile. */
static int redis_list_get(struct redis *s, const char *prefix, struct redis_page **pages,
                          struct redis_lates *lates, uint64_t *revision)
{
    char group[REDIS_NAME_MAX + 1];
    uint64_t first = 0;
    int64_t rest_ms;
    int asked = 0;
    s->gap = false;
    int rc = redis_pages_get(s, prefix, pages, &first, revision);
    if (rc < 0 || *revision == first)
        return rc < 0 ? rc : s->gap ? -ESTALE : 0;
    rc = redis_group(prefix, group);
    if (rc < 0)
        return redis_fail(s, rc, "a long listing needs a prefix with a '/'");
    *revision = first;
    rc = redis_changes(s, prefix, group, revision, redis_late_add, lates, &asked, &rest_ms);
    if (lates->count > 0)
        qsort(lates->all, lates->count, sizeof(*lates->all), redis_late_compare);
    return asked < 0 ? asked : rc < 0 ? rc : 0;
}

int redis_list(struct meta_store *store, const char *prefix, meta_event_fn each, void *arg,
               uint64_t *revision)
{
    struct redis *s = redis_of(store);
    int asked = 0;
    int rc = redis_enter(s);
    /* what another prefix's feed has missed, this listing does not bring */
    bool covers = !s->waited || strncmp(s->waited, prefix, strlen(prefix)) == 0;
    bool gap = s->gap;
    for (int tries = 0; rc == 0; tries++) {
        struct redis_page *pages = NULL;
        struct redis_lates lates = {0};
        rc = redis_list_get(s, prefix, &pages, &lates, revision);
        bool again = rc == -ESTALE && tries < REDIS_TRIES;
        gap = gap || s->gap;
        if (rc == 0)
            rc = redis_pages_tell(s, pages, &lates, each, arg, &asked);
        redis_lates_free(&lates);
        redis_pages_free(pages);
        if (!again)
            break;
        rc = 0;
    }
    if (rc == -ESTALE)
        rc = redis_fail(s, -ETIMEDOUT, "the data changes faster than it can be listed");
    s->gap = gap && !(covers && rc == 0);
    rc = redis_answer(s, rc);
    return rc < 0 ? rc : asked;
}
