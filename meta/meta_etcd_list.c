#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "meta/base/log.h"
#include "meta/base/util.h"
#include "meta/meta_etcd_call.h"

/* Keys of a page of a listing. etcd looks at all that follow for each page, so there should be few; and two of them are in
 * memory while they are read. */
#define ETCD_PAGE  20000
#define ETCD_FIRST 500 /* of the first page, which is all of most listings */

/* One page: the keys behind `after` at a revision. The next one is fetched, by a thread of its own, while this one is
 * told. */
struct etcd_page {
    struct etcd *s;
    struct http *rpc; /* NULL: the gateway is asked */
    const char *prefix;
    char *after;       /* a whole key; NULL: from the first */
    uint64_t revision; /* 0: now */
    struct etcd_range got;
    int rc;
};

static void etcd_range_free(struct etcd_range *range)
{
    cJSON_Delete(range->json);
    free(range->bytes);
    free(range->kvs);
    *range = (struct etcd_range){0};
}

/* ---- one page ---- */

static int etcd_range_read(struct etcd *s, struct etcd_range *out)
{
    const cJSON *kv;
    const cJSON *list = cJSON_GetObjectItemCaseSensitive(out->json, "kvs");
    out->kvs = calloc((size_t)cJSON_GetArraySize(list) + 1, sizeof(*out->kvs));
    if (!out->kvs)
        return etcd_fail(s, -ENOMEM, "out of memory");
    cJSON_ArrayForEach(kv, list) {
        struct etcd_kv *one = &out->kvs[out->count++];
        one->key = etcd_get_bytes(kv, "key");
        one->value = etcd_get_bytes(kv, "value");
        one->revision = etcd_get_number(kv, "mod_revision");
    }
    out->more = cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(out->json, "more"));
    out->revision = etcd_revision_of(out->json);
    return 0;
}

/* By the JSON gateway, which also says what is wrong. */
static int etcd_page_ask(struct etcd_page *page)
{
    cJSON *request = cJSON_CreateObject();
    etcd_put_range(page->s, request, page->prefix);
    if (page->after) {
        cJSON_DeleteItemFromObjectCaseSensitive(request, "key");
        etcd_put_after(request, page->after);
    }
    etcd_put_number(request, "limit", page->after ? ETCD_PAGE : ETCD_FIRST);
    if (page->revision != 0)
        etcd_put_number(request, "revision", page->revision);
    int rc = etcd_call(page->s, "/v3/kv/range", request, true, &page->got.json);
    return rc < 0 ? rc : etcd_range_read(page->s, &page->got);
}

static int etcd_page_rpc(struct etcd_page *page)
{
    util_autofree char *end = NULL;
    int length = asprintf(&end, "%s%s", page->s->prefix, page->prefix);
    if (length < 0) {
        end = NULL;
        return -ENOMEM;
    }
    end[length - 1]++; /* as in etcd_put_range */
    return etcd_rpc_range(page->s, page->rpc, page->after, end, ETCD_PAGE, page->revision,
                          &page->got);
}

static void *etcd_page_fetch(void *arg)
{
    struct etcd_page *page = arg;
    struct etcd *s = page->s;
    s->deadline_ms = util_now_ms() + META_DEADLINE_MS; /* each page is an answer */
    bool rpc = page->rpc && page->after && !s->no_rpc;
    page->rc = rpc ? etcd_page_rpc(page) : -EPROTO;
    if (page->rc == 0) {
        etcd_cluster_note(s, page->got.cluster);
        return NULL;
    }
    if (rpc) {
        s->no_rpc = true;
        log_info("metadata etcd: %s does not answer gRPC; listing many names takes longer",
                 s->endpoints[s->endpoint]);
    }
    etcd_range_free(&page->got);
    page->rc = etcd_page_ask(page);
    return NULL;
}

/* The page behind this one; true: there is one. */
static bool etcd_page_next(const struct etcd_page *page, struct etcd_page *next)
{
    *next = (struct etcd_page){
        .s = page->s, .rpc = page->rpc, .prefix = page->prefix, .revision = page->revision};
    if (!page->got.more || page->got.count == 0)
        return false;
    const char *last = page->got.kvs[page->got.count - 1].key;
    next->after = last ? strdup(last) : NULL;
    next->rc = next->after ? 0 : -EBADMSG;
    return true;
}

static void etcd_page_free(struct etcd_page *page)
{
    etcd_range_free(&page->got);
    free(page->after);
}

/* Touches nothing of the store, which fetches meanwhile. */
static int etcd_page_tell(const struct etcd_page *page, meta_event_fn each, void *arg, int *asked)
{
    size_t skip = strlen(page->s->prefix);
    for (size_t i = 0; i < page->got.count; i++) {
        const struct etcd_kv *kv = &page->got.kvs[i];
        if (!kv->key || strlen(kv->key) < skip)
            return -EBADMSG;
        const struct meta_event event = {
            .key = kv->key + skip,
            .value = kv->value ? kv->value : "", /* an empty one is left out */
            .revision = kv->revision,
        };
        *asked = each(arg, &event);
        if (*asked < 0)
            return 0;
    }
    return 0;
}

/* ---- all of them ---- */

/* Tells all pages. *revision: of them all. */
static int etcd_pages(struct etcd *s, const char *prefix, meta_event_fn each, void *arg,
                      uint64_t *revision, int *asked)
{
    const struct credentials *known = &s->credentials;
    struct etcd_page page = {.s = s, .prefix = prefix};
    struct http *rpc = NULL;
    etcd_page_fetch(&page);
    if (page.got.more && !s->no_rpc && http_open(known->ca, known->cert, known->key, &rpc) == 0)
        page.rpc = rpc;
    if (page.rc == 0)
        *revision = page.revision = page.got.revision;
    bool more = page.rc == 0;
    int rc = page.rc;
    while (more) {
        struct etcd_page next;
        more = etcd_page_next(&page, &next);
        pthread_t thread;
        bool ahead =
            more && next.rc == 0 && pthread_create(&thread, NULL, etcd_page_fetch, &next) == 0;
        int told = etcd_page_tell(&page, each, arg, asked);
        if (ahead)
            pthread_join(thread, NULL);
        else if (more && told == 0 && next.rc == 0 && *asked == 0)
            etcd_page_fetch(&next);
        rc = told < 0 ? told : *asked < 0 ? 0 : next.rc;
        more = more && rc == 0 && *asked == 0;
        etcd_page_free(&page);
        page = next;
    }
    etcd_page_free(&page);
    http_close(rpc);
    return rc == -EBADMSG ? etcd_senseless(s) : rc;
}

/* Learns whose data it is that is listed next: another's than before counts in store.epoch. */
static int etcd_epoch_learn(struct etcd *s)
{
    char epoch[33];
    s->cluster[0] = '\0';
    int rc = etcd_epoch_get(s, true, epoch);
    if (rc < 0)
        return rc;
    if (s->epoch[0] != '\0' && strcmp(s->epoch, epoch) != 0)
        s->store.epoch++;
    memcpy(s->epoch, epoch, sizeof(epoch));
    return 0;
}

int etcd_list(struct meta_store *store, const char *prefix, meta_event_fn each, void *arg,
              uint64_t *revision)
{
    struct etcd *s = etcd_of(store);
    int asked = 0;
    /* what another prefix's feed has missed, this listing does not bring */
    bool covers = !s->waited || strncmp(s->waited, prefix, strlen(prefix)) == 0;
    bool gap = s->gap;
    int rc = 0;
    etcd_enter(s);
    *revision = 0;
    s->gap = false;
    if (covers)
        rc = etcd_epoch_learn(s);
    if (rc == 0)
        rc = etcd_pages(s, prefix, each, arg, revision, &asked);
    if (rc == 0 && covers) {
        if (*revision < s->newest)
            s->store.epoch++; /* it went back */
        s->newest = *revision;
    }
    if (rc == -ESTALE)
        rc = etcd_fail(s, -ETIMEDOUT, "what was being listed has been compacted");
    if (rc == 0 && s->gap)
        rc = etcd_fail(s, -ECONNRESET, "the data was replaced while it was listed");
    s->gap = (gap || s->gap) && !(covers && rc == 0);
    rc = etcd_answer(s, rc);
    return rc < 0 ? rc : asked;
}
