/* The backend on Redis or Valkey, over hiredis.
 *
 * Two connections. `ask` carries all calls: each is one run of the script in meta_redis_script.c, which decides and
 * writes atomically and gives every transaction the next revision. `bell` is parked in XREAD BLOCK on the stream of
 * changes while a wait has nothing to tell; what it answers only says that there is something, and the script is asked
 * what. So a wait can be left at any time, and the next one goes on with the parked command.
 *
 * A gap in the feed is noticed by the store's epoch (the data is another), by the revision (it went back), by what has
 * been trimmed, and by a reconnection to a server process that is another one: a server that lost its last seconds
 * may have reached our revision again with other changes. Then the caller lists again. */
#include <ctype.h>
#include <errno.h>
#include <openssl/evp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "meta/base/log.h"
#include "meta/base/util.h"
#include "meta/meta_redis_link.h"

#define REDIS_PORT 6379
#define REDIS_LOOK_MS \
    2000 /* while nothing rings: a flushed or silent server is noticed after so long */
#define REDIS_BLOCK_MS 60000 /* of the parked XREAD */
#define REDIS_CHANGES  2000  /* changes that one poll asks for at first */

/* ---- transactions and leases ---- */

static const char *redis_condition(enum meta_condition condition);
static const char *redis_action(enum meta_action action);

static int redis_txn(struct meta_store *store, struct meta_txn *txn)
{
    struct redis *s = redis_of(store);
    char numbers[2 + 2 * META_TXN_MAX][24];
    const char *words[REDIS_ARGS];
    int used = 0;
    int number = 0;
    if (txn->compare_count > META_TXN_MAX || txn->write_count > META_TXN_MAX)
        return -EINVAL;
    words[used++] = "txn";
    snprintf(numbers[number], sizeof(numbers[0]), "%zu", txn->compare_count);
    words[used++] = numbers[number++];
    for (size_t i = 0; i < txn->compare_count; i++) {
        const struct meta_compare *compare = &txn->compares[i];
        snprintf(numbers[number], sizeof(numbers[0]), "%llu",
                 (unsigned long long)compare->revision);
        words[used++] = redis_condition(compare->condition);
        words[used++] = compare->key;
        words[used++] = numbers[number++];
    }
    snprintf(numbers[number], sizeof(numbers[0]), "%zu", txn->write_count);
    words[used++] = numbers[number++];
    for (size_t i = 0; i < txn->write_count; i++) {
        const struct meta_write *write = &txn->writes[i];
        bool put = write->action == META_PUT;
        snprintf(numbers[number], sizeof(numbers[0]), "%llu",
                 put ? (unsigned long long)write->lease : 0);
        words[used++] = redis_action(write->action);
        words[used++] = write->key;
        words[used++] = put ? write->value : "";
        words[used++] = numbers[number++];
    }
    redisReply *reply = NULL;
    int rc = redis_enter(s);
    if (rc == 0)
        rc = redis_run(s, used, words, &reply);
    if (rc == 0) {
        bool whole = redis_is_array(reply, 2) && redis_is_text(reply->element[1]);
        txn->revision = whole ? strtoull(reply->element[1]->str, NULL, 10) : 0;
        if (!whole)
            rc = redis_senseless(s);
        else if (txn->revision > s->newest)
            s->newest = txn->revision;
        freeReplyObject(reply);
    }
    return redis_answer(s, rc);
}

static int redis_lease(struct redis *s, const char *operation, uint64_t lease, uint32_t ttl_ms)
{
    char id[24];
    char ttl[16];
    snprintf(id, sizeof(id), "%llu", (unsigned long long)lease);
    snprintf(ttl, sizeof(ttl), "%u", ttl_ms);
    int rc = redis_enter(s);
    if (rc == 0)
        rc = redis_run(s, 3, (const char *[]){operation, id, ttl}, NULL);
    return redis_answer(s, rc);
}

static int redis_lease_grant(struct meta_store *store, uint32_t ttl_ms, uint64_t *lease)
{
    *lease = util_random_u64();
    return redis_lease(redis_of(store), "grant", *lease, ttl_ms);
}

static int redis_lease_renew(struct meta_store *store, uint64_t lease)
{
    return redis_lease(redis_of(store), "renew", lease, 0);
}

static int redis_lease_revoke(struct meta_store *store, uint64_t lease)
{
    return redis_lease(redis_of(store), "revoke", lease, 0);
}

/* ---- the change feed ---- */

/* "key K" or "key K value V" of a stream entry "revision-n". */
static int redis_change_read(struct redis *s, const redisReply *entry, struct meta_event *event)
{
    if (redis_is_array(entry, 2) && redis_is_text(entry->element[0]) &&
        redis_is_array(entry->element[1], 2)) {
        const redisReply *fields = entry->element[1];
        bool put = fields->elements >= 4;
        if (redis_is_text(fields->element[1]) && (!put || redis_is_text(fields->element[3]))) {
            event->revision = strtoull(entry->element[0]->str, NULL, 10);
            event->key = fields->element[1]->str;
            event->value = put ? fields->element[3]->str : NULL;
            return 0;
        }
    }
    return redis_fail(s, -EBADMSG, "the stream %s holds what p2pfs did not write",
                      s->keys[REDIS_SCRIPT_KEYS - 1]);
}

/* Tells the whole transactions of `changed`. `limit` of them were asked for: then the last one may be cut, and
 * *reached stays before it. */
static int redis_changes_tell(struct redis *s, const redisReply *changed, size_t limit,
                              const char *prefix, uint64_t *reached, meta_event_fn each, void *arg,
                              int *told, int *asked)
{
    struct meta_event event = {0};
    size_t count = changed->elements;
    int rc = 0;
    if (count >= limit) {
        rc = redis_change_read(s, changed->element[count - 1], &event);
        uint64_t cut = event.revision;
        while (rc == 0 && count > 0) {
            rc = redis_change_read(s, changed->element[count - 1], &event);
            if (rc < 0 || event.revision != cut)
                break;
            count--;
        }
        *reached = cut - 1;
    }
    for (size_t i = 0; rc == 0 && i < count; i++) {
        rc = redis_change_read(s, changed->element[i], &event);
        if (rc != 0 || !event.key || strncmp(event.key, prefix, strlen(prefix)) != 0)
            continue;
        (*told)++;
        *asked = each(arg, &event);
        if (*asked < 0)
            return 0;
    }
    return rc;
}

int redis_changes(struct redis *s, const char *prefix, const char *group, uint64_t *revision,
                  meta_event_fn each, void *arg, int *asked, int64_t *rest_ms)
{
    size_t limit = REDIS_CHANGES;
    int told = 0;
    *asked = 0;
    for (;;) {
        char behind[24];
        char count[24];
        redisReply *reply;
        uint64_t now = 0;
        snprintf(behind, sizeof(behind), "%llu", (unsigned long long)*revision);
        snprintf(count, sizeof(count), "%zu", limit);
        int rc = redis_run(s, 4, (const char *[]){"poll", group, behind, count}, &reply);
        if (rc < 0)
            return rc;
        rc = redis_head(s, reply, 5, &now);
        if (rc == 0 && (reply->element[3]->type != REDIS_REPLY_INTEGER ||
                        reply->element[4]->type != REDIS_REPLY_ARRAY))
            rc = redis_senseless(s);
        if (rc == 0 && s->gap)
            rc = -ESTALE;
        uint64_t reached = now;
        if (rc == 0) {
            *rest_ms = reply->element[3]->integer;
            rc = redis_changes_tell(s, reply->element[4], limit, prefix, &reached, each, arg, &told,
                                    asked);
        }
        freeReplyObject(reply);
        if (rc < 0 || *asked < 0)
            return rc < 0 ? rc : told;
        if (reached == *revision && reached < now)
            limit *= 2; /* one transaction is larger than all that */
        *revision = reached;
        if (reached == now)
            return told;
    }
}

static int redis_park(struct redis *s, const char *group, uint64_t revision)
{
    char stream[2 * REDIS_NAME_MAX + 16];
    char block[16];
    char behind[48];
    s->deadline_ms = util_now_ms() + META_DEADLINE_MS;
    if (s->bell && s->parked[0] != '\0' && strcmp(s->parked, group) == 0)
        return 0;
    if (s->bell && s->parked[0] != '\0')
        redis_hang_up(&s->bell);
    s->parked[0] = '\0';
    int rc = s->bell ? 0 : redis_connect(s, &s->bell);
    snprintf(stream, sizeof(stream), "%s%s", s->keys[REDIS_SCRIPT_KEYS - 1], group);
    snprintf(block, sizeof(block), "%d", REDIS_BLOCK_MS);
    snprintf(behind, sizeof(behind), "%llu-18446744073709551615", (unsigned long long)revision);
    const char *words[] = {"XREAD", "COUNT", "1", "BLOCK", block, "STREAMS", stream, behind};
    if (rc == 0)
        rc = redis_send(s, s->bell, (int)util_count(words), words);
    if (rc == 0)
        snprintf(s->parked, sizeof(s->parked), "%s", group);
    else
        redis_hang_up(&s->bell);
    return rc;
}

/* Sleeps until the feed has something newer, the caller is woken (1) or `ms` have passed. */
static int redis_sleep(struct redis *s, const char *group, uint64_t revision, uint64_t ms,
                       int wake_fd)
{
    int rc = redis_park(s, group, revision);
    if (rc < 0)
        return rc;
    uint64_t end = util_now_ms() + ms;
    for (;;) {
        uint64_t now = util_now_ms();
        struct pollfd fds[2] = {
            {.fd = wake_fd, .events = POLLIN}, /* poll ignores -1 */
            {.fd = s->bell->fd, .events = POLLIN},
        };
        int ready = now < end ? poll(fds, 2, (int)(end - now)) : 0;
        if (ready > 0 && (fds[0].revents & POLLIN))
            return 1;
        if (ready == 0)
            return 0;
        if (ready < 0 || !fds[1].revents)
            continue;
        void *reply = NULL;
        if (redisBufferRead(s->bell) != REDIS_OK ||
            redisGetReplyFromReader(s->bell, &reply) != REDIS_OK) {
            rc = redis_broken(s, s->bell);
        } else if (reply) {
            s->parked[0] = '\0';
            const redisReply *said = reply;
            rc = said->type == REDIS_REPLY_ERROR ? redis_refused(s, said->str) : 0;
            freeReplyObject(reply);
        } else {
            continue;
        }
        if (rc < 0)
            redis_hang_up(&s->bell);
        return rc;
    }
}

int redis_group(const char *prefix, char group[REDIS_NAME_MAX + 1])
{
    size_t length = strcspn(prefix, "/");
    if (prefix[length] != '/' || length > REDIS_NAME_MAX)
        return -EINVAL;
    snprintf(group, REDIS_NAME_MAX + 1, "%.*s", (int)length, prefix);
    return 0;
}

static int redis_wait(struct meta_store *store, const char *prefix, uint64_t *revision,
                      uint32_t timeout_ms, int wake_fd, meta_event_fn each, void *arg)
{
    struct redis *s = redis_of(store);
    char group[REDIS_NAME_MAX + 1];
    uint64_t end = util_now_ms() + timeout_ms;
    if (redis_group(prefix, group) < 0)
        return -EINVAL;
    if (!s->waited && !(s->waited = strdup(prefix)))
        return -ENOMEM;
    for (;;) {
        int asked = 0;
        int64_t rest_ms = -1;
        int rc = redis_enter(s);
        if (rc == 0)
            rc = redis_changes(s, prefix, group, revision, each, arg, &asked, &rest_ms);
        redis_answer(s, rc);
        if (asked < 0)
            return asked;
        uint64_t now = util_now_ms();
        if (rc != 0 || now >= end)
            return rc < 0 ? rc : 0;
        uint64_t ms = end - now < REDIS_LOOK_MS ? end - now : REDIS_LOOK_MS;
        if (rest_ms >= 0 && (uint64_t)rest_ms < ms)
            ms = (uint64_t)rest_ms + 1;
        rc = redis_sleep(s, group, *revision, ms, wake_fd);
        if (rc < 0)
            return redis_answer(s, rc);
        if (rc > 0)
            return 0;
    }
}

/* ---- opening ---- */

/* What may stand in a prefix or a user's name. */
static bool redis_name_fits(const char *name)
{
    size_t length = strlen(name);
    for (const char *p = name; *p; p++) {
        if (!isalnum((unsigned char)*p) && !strchr("-_.:{}", *p))
            return false;
    }
    return length >= 1 && length <= REDIS_NAME_MAX;
}

static int redis_malformed(const char *what)
{
    meta_open_error("%s; write redis://[USER@]HOST[:PORT][,HOST[:PORT]...][/DB][?prefix=NAME]",
                    what);
    return -EINVAL;
}

/* Cuts `text` at the first `mark`, and gives what stands behind it; NULL: it has none. */
static char *redis_cut(char *text, char mark)
{
    char *at = strchr(text, mark);
    if (!at)
        return NULL;
    *at = '\0';
    return at + 1;
}

static int redis_number(const char *text, int most, int *out)
{
    size_t length = strspn(text, "0123456789");
    if (length == 0 || length > 6 || text[length] != '\0' || atoi(text) > most)
        return -EINVAL;
    *out = atoi(text);
    return 0;
}

/* "HOST", "HOST:PORT", "[V6]:PORT" */
static int redis_host_parse(struct redis *s, char *text)
{
    struct redis_address *address = &s->addresses[s->address_count];
    char *port;
    if (s->address_count == REDIS_ADDRESSES_MAX)
        return redis_malformed("the metadata URL names more than 8 hosts");
    if (text[0] == '[') {
        char *end = strchr(text, ']');
        if (!end || (end[1] != '\0' && end[1] != ':'))
            return redis_malformed("the metadata URL's [address] is not closed");
        *end = '\0';
        port = end[1] == ':' ? end + 2 : NULL;
        text++;
    } else {
        port = redis_cut(text, ':');
    }
    address->port = REDIS_PORT;
    if (port && (redis_number(port, 65535, &address->port) < 0 || address->port == 0))
        return redis_malformed("the metadata URL's port is no number from 1 to 65535");
    if (text[0] == '\0')
        return redis_malformed("the metadata URL names no host");
    address->host = strdup(text);
    if (!address->host)
        return -ENOMEM;
    s->address_count++;
    return 0;
}

static int redis_hosts_parse(struct redis *s, char *text)
{
    int rc = 0;
    while (rc == 0 && text) {
        char *more = redis_cut(text, ',');
        rc = redis_host_parse(s, text);
        text = more;
    }
    if (rc == 0)
        redis_address_use(s, 0);
    return rc;
}

/* What stands behind "redis://", which is cut in pieces. */
static int redis_rest_parse(struct redis *s, char *text)
{
    char *query = redis_cut(text, '?');
    char *number = redis_cut(text, '/');
    char *host = redis_cut(text, '@');
    const char *prefix = "p2pfs";
    if (query && strncmp(query, "prefix=", 7) != 0)
        return redis_malformed("the metadata URL has an unknown part behind '?'");
    if (query)
        prefix = query + 7;
    if (!redis_name_fits(prefix))
        return redis_malformed("the metadata URL's prefix= must be 1 to 64 of A-Z a-z 0-9 - _ . :");
    snprintf(s->prefix, sizeof(s->prefix), "%s", prefix);
    if (number && number[0] && redis_number(number, 65535, &s->number) < 0)
        return redis_malformed("the metadata URL's database is no number");
    if (host && !redis_name_fits(text))
        return redis_malformed("the metadata URL's user is not understood");
    if (host && !s->credentials.user && !(s->credentials.user = strdup(text)))
        return -ENOMEM;
    return redis_hosts_parse(s, host ? host : text);
}

static int redis_url_parse(struct redis *s, const char *url)
{
    int rc = credentials_url_check(url);
    if (rc < 0)
        return rc;
    s->encrypted = strncmp(url, "rediss:", 7) == 0;
    char *text = strdup(strstr(url, "://") + 3);
    rc = text ? redis_rest_parse(s, text) : -ENOMEM;
    free(text);
    return rc;
}

static int redis_credentials(struct redis *s, const char *file)
{
    int rc = credentials_load(file, &s->credentials);
    const char *password = getenv("MC_REDIS_PASSWORD");
    if (rc == 0 && !file && password && password[0])
        rc = credentials_password_set(&s->credentials, password);
    return rc;
}

static void redis_names_make(struct redis *s)
{
    static const char *const parts[REDIS_SCRIPT_KEYS] = {"state", "kv",     "keys", "leases",
                                                         "ttls",  "leased", "feed:"};
    unsigned char sha[EVP_MAX_MD_SIZE];
    unsigned length = 0;
    uint8_t epoch[16];
    for (size_t i = 0; i < REDIS_SCRIPT_KEYS; i++)
        snprintf(s->keys[i], sizeof(s->keys[i]), "%s:%s", s->prefix, parts[i]);
    EVP_Digest(redis_script, strlen(redis_script), sha, &length, EVP_sha1(), NULL);
    util_hex_encode(sha, length == 20 ? 20 : 0, s->sha);
    util_random(epoch, sizeof(epoch));
    util_hex_encode(epoch, sizeof(epoch), s->candidate);
}

static void redis_close(struct meta_store *store)
{
    if (!store)
        return;
    struct redis *s = redis_of(store);
    redis_hang_up(&s->ask);
    redis_hang_up(&s->bell);
    redis_tls_close(s);
    credentials_clear(&s->credentials);
    for (size_t i = 0; i < s->address_count; i++)
        free(s->addresses[i].host);
    free(s->waited);
    free(s);
}

/* The first answer shows whether the server is there, lets us in and holds data that we understand. */
static int redis_try(struct redis *s)
{
    redisReply *reply = NULL;
    int rc = s->encrypted ? redis_tls_open(s) : 0;
    if (rc == 0)
        rc = redis_enter(s);
    if (rc == 0)
        rc = redis_run(s, 4, (const char *[]){"page", "t/", "", "1"}, &reply);
    if (rc == 0)
        freeReplyObject(reply);
    if (rc < 0)
        meta_open_error("redis%s://%s:%d: %s", s->encrypted ? "s" : "", s->host, s->port,
                        s->cause[0] ? s->cause : strerror(-rc));
    return rc;
}

static int redis_open(const struct meta_config *config, struct meta_store **store)
{
    struct redis *s = calloc(1, sizeof(*s));
    if (!s)
        return -ENOMEM;
    s->store.ops = &meta_redis_ops;
    int rc = redis_credentials(s, config->credentials_file);
    if (rc == 0)
        rc = redis_url_parse(s, config->url);
    if (rc == 0) {
        redis_names_make(s);
        rc = redis_try(s);
    }
    if (rc < 0) {
        redis_close(&s->store);
        return rc;
    }
    *store = &s->store;
    return 0;
}

static const char *const redis_conditions[] = {
    [META_ABSENT] = "absent",
    [META_EXISTS] = "exists",
    [META_REVISION] = "revision",
    [META_EMPTY] = "empty",
};
static const char *const redis_actions[] = {
    [META_PUT] = "put",
    [META_DELETE] = "delete",
    [META_DELETE_PREFIX] = "clear",
};

static const char *redis_condition(enum meta_condition condition)
{
    return redis_conditions[condition];
}

static const char *redis_action(enum meta_action action)
{
    return redis_actions[action];
}

static const char *const redis_schemes[] = {"redis", "rediss", NULL};

const struct meta_ops meta_redis_ops = {
    .name = "redis",
    .schemes = redis_schemes,
    .open = redis_open,
    .close = redis_close,
    .list = redis_list,
    .txn = redis_txn,
    .lease_grant = redis_lease_grant,
    .lease_renew = redis_lease_renew,
    .lease_revoke = redis_lease_revoke,
    .wait = redis_wait,
};
