#include "meta/meta_redis_link.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include "meta/base/log.h"
#include "meta/base/util.h"
#include "p2pfs_config.h"

#if P2PFS_HAVE_REDIS_TLS
#include <hiredis/hiredis_ssl.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#endif

int redis_fail(struct redis *s, int rc, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(s->cause, sizeof(s->cause), format, arguments);
    va_end(arguments);
    return rc;
}

int redis_senseless(struct redis *s)
{
    return redis_fail(s, -EBADMSG, "the server's answer makes no sense");
}

void redis_hang_up(redisContext **context)
{
    if (*context)
        redisFree(*context);
    *context = NULL;
}

void redis_address_use(struct redis *s, size_t address)
{
    s->address = address;
    s->host = s->addresses[address].host;
    s->port = s->addresses[address].port;
}

/* Every call ends here: the cause is said once per outage, and its end too. A connection whose call failed may still
 * get that call's answer: the next call takes another one. */
int redis_answer(struct redis *s, int rc)
{
    bool answered = rc >= 0 || rc == -EAGAIN || rc == -ENOENT || rc == -ESTALE || rc == -ENOMEM;
    if (!answered && rc != -ENOSPC)
        redis_hang_up(&s->ask);
    if (!answered && !s->down)
        log_error("metadata redis://%s:%d: %s", s->host, s->port, s->cause);
    else if (answered && s->down)
        log_info("metadata redis://%s:%d answers again", s->host, s->port);
    s->down = !answered;
    if (rc == -EROFS) /* a replica that does not say so when it is asked */
        redis_address_use(s, (s->address + 1) % s->address_count);
    return rc;
}

/* ---- errors ---- */

struct redis_error {
    const char *part; /* what the server's error contains */
    int rc;
    const char *remedy;
};
static const struct redis_error *redis_error_of(const char *text);

/* The server's own words may quote what we sent; only their first word is shown, with what we know about it. */
int redis_refused(struct redis *s, const char *text)
{
    const struct redis_error *error = redis_error_of(text);
    int length = (int)strcspn(text, " ");
    if (length > 32)
        length = 32;
    return redis_fail(s, error->rc, "the server answers %.*s: %s", length, text, error->remedy);
}

/* ---- connections ---- */

static int redis_left_ms(const struct redis *s)
{
    uint64_t now = util_now_ms();
    return now < s->deadline_ms ? (int)(s->deadline_ms - now) : 0;
}

int redis_broken(struct redis *s, const redisContext *context)
{
    switch (context->err) {
    case REDIS_ERR_EOF:
        return redis_fail(s, -ECONNRESET, "the server closed the connection; is it running?");
    case REDIS_ERR_PROTOCOL:
        return redis_fail(s, -EBADMSG, "what answers there is no Redis server; check the URL");
    case REDIS_ERR_OOM:
        return redis_fail(s, -ENOMEM, "out of memory");
    }
    if (s->tls && errno == ECONNRESET)
        return redis_fail(s, -ECONNRESET,
                          "the server closed the connection; does it want a certificate (cert= and "
                          "key= in the credentials file)?");
    int rc = errno == 0 || errno == EAGAIN || errno == EINPROGRESS ? -ETIMEDOUT : -errno;
    return redis_fail(s, rc, "%s; is the server running, and is the URL right?",
                      context->errstr[0] ? context->errstr : strerror(-rc));
}

/* hiredis writes without MSG_NOSIGNAL, and a library must not let its program be killed by that. */
static int redis_push(redisContext *context, int *done)
{
    sigset_t pipe;
    sigset_t pending;
    sigset_t before;
    sigemptyset(&pipe);
    sigaddset(&pipe, SIGPIPE);
    sigpending(&pending);
    pthread_sigmask(SIG_BLOCK, &pipe, &before);
    int code = redisBufferWrite(context, done);
    int error = errno;
    struct timespec now = {0};
    if (code != REDIS_OK && !sigismember(&pending, SIGPIPE))
        sigtimedwait(&pipe, NULL, &now);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    errno = error;
    return code;
}

static int redis_flush(struct redis *s, redisContext *context)
{
    int done = 0;
    while (!done) {
        if (redis_push(context, &done) != REDIS_OK)
            return redis_broken(s, context);
        struct pollfd fd = {.fd = context->fd, .events = POLLOUT};
        if (!done && poll(&fd, 1, redis_left_ms(s)) == 0)
            return redis_fail(s, -ETIMEDOUT, "the server takes no data; is it stopped?");
    }
    return 0;
}

/* The next answer, which the caller frees. */
static int redis_take(struct redis *s, redisContext *context, redisReply **reply)
{
    void *taken = NULL;
    for (;;) {
        if (redisGetReplyFromReader(context, &taken) != REDIS_OK)
            return redis_broken(s, context);
        if (taken)
            break;
        struct pollfd fd = {.fd = context->fd, .events = POLLIN};
        int ready = poll(&fd, 1, redis_left_ms(s));
        if (ready == 0)
            return redis_fail(s, -ETIMEDOUT, "no answer within %d ms; is the server stopped?",
                              META_DEADLINE_MS);
        if (ready > 0 && redisBufferRead(context) != REDIS_OK)
            return redis_broken(s, context);
    }
    *reply = taken;
    return 0;
}

int redis_send(struct redis *s, redisContext *context, int argc, const char *const *argv)
{
    const char *words[REDIS_ARGS];
    memcpy(words, argv, (size_t)argc * sizeof(*argv));
    if (redisAppendCommandArgv(context, argc, words, NULL) != REDIS_OK)
        return redis_fail(s, -ENOMEM, "out of memory");
    return redis_flush(s, context);
}

/* One command; an error answer is translated. */
static int redis_command(struct redis *s, redisContext *context, int argc, const char *const *argv,
                         redisReply **reply)
{
    int rc = redis_send(s, context, argc, argv);
    if (rc == 0)
        rc = redis_take(s, context, reply);
    if (rc != 0 || !*reply)
        return rc;
    if ((*reply)->type != REDIS_REPLY_ERROR)
        return 0;
    rc = redis_refused(s, (*reply)->str);
    freeReplyObject(*reply);
    *reply = NULL;
    return rc;
}

static int redis_order(struct redis *s, redisContext *context, int argc, const char *const *argv)
{
    redisReply *reply = NULL;
    int rc = redis_command(s, context, argc, argv, &reply);
    if (rc == 0)
        freeReplyObject(reply);
    return rc;
}

static int redis_log_in(struct redis *s, redisContext *context)
{
    const struct credentials *known = &s->credentials;
    int rc = 0;
    if (known->password && known->user)
        rc = redis_order(s, context, 3, (const char *[]){"AUTH", known->user, known->password});
    else if (known->password)
        rc = redis_order(s, context, 2, (const char *[]){"AUTH", known->password});
    if (rc == 0 && s->number != 0) {
        char number[16];
        snprintf(number, sizeof(number), "%d", s->number);
        rc = redis_order(s, context, 2, (const char *[]){"SELECT", number});
    }
    return rc;
}

#if P2PFS_HAVE_REDIS_TLS
struct redis_tls {
    SSL_CTX *context;
};

int redis_tls_open(struct redis *s)
{
    const struct credentials *known = &s->credentials;
    s->tls = calloc(1, sizeof(*s->tls));
    if (s->tls)
        s->tls->context = SSL_CTX_new(TLS_client_method());
    if (!s->tls || !s->tls->context)
        return redis_fail(s, -ENOMEM, "out of memory");
    SSL_CTX *context = s->tls->context;
    SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION);
    SSL_CTX_set_verify(context, SSL_VERIFY_PEER, NULL);
    if (known->ca ? SSL_CTX_load_verify_locations(context, known->ca, NULL) != 1
                  : SSL_CTX_set_default_verify_paths(context) != 1)
        return redis_fail(s, -EINVAL, "ca=%s is no readable PEM file of certificates",
                          known->ca ? known->ca : "(the system's)");
    if (known->cert && SSL_CTX_use_certificate_chain_file(context, known->cert) != 1)
        return redis_fail(s, -EINVAL, "cert=%s is no readable PEM certificate", known->cert);
    const char *key = known->key ? known->key : known->cert;
    if (key && SSL_CTX_use_PrivateKey_file(context, key, SSL_FILETYPE_PEM) != 1)
        return redis_fail(s, -EINVAL, "key=%s is no readable PEM key of the certificate", key);
    return 0;
}

void redis_tls_close(struct redis *s)
{
    if (s->tls)
        SSL_CTX_free(s->tls->context);
    free(s->tls);
}

/* hiredis would verify the certificate but not whose it is. */
static int redis_encrypt(struct redis *s, redisContext *context)
{
    unsigned char address[16];
    SSL *ssl = SSL_new(s->tls->context);
    if (!ssl)
        return redis_fail(s, -ENOMEM, "out of memory");
    bool numeric =
        inet_pton(AF_INET, s->host, address) == 1 || inet_pton(AF_INET6, s->host, address) == 1;
    bool named =
        numeric ? X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(ssl), s->host) == 1
                : SSL_set1_host(ssl, s->host) == 1 && SSL_set_tlsext_host_name(ssl, s->host) == 1;
    if (!named) {
        SSL_free(ssl);
        return redis_fail(s, -EINVAL, "%s cannot be verified as a TLS name", s->host);
    }
    if (redisInitiateSSL(context, ssl) == REDIS_OK) /* takes ssl, or else leaves it */
        return 0;
    SSL_free(ssl);
    return redis_fail(s, -EACCES,
                      "TLS: %s; check ca=, cert= and key= in the credentials file, and that the "
                      "server's certificate is for %s",
                      context->errstr, s->host);
}
#else
int redis_tls_open(struct redis *s)
{
    return redis_fail(s, -EINVAL,
                      "rediss:// needs hiredis with TLS, which this p2pfs was built without "
                      "(Debian 13 has it); build it there, or use redis:// through a TLS tunnel");
}

void redis_tls_close(struct redis *s)
{
    (void)s;
}

static int redis_encrypt(struct redis *s, redisContext *context)
{
    (void)context;
    return redis_tls_open(s);
}
#endif

int redis_connect(struct redis *s, redisContext **out)
{
    int left = redis_left_ms(s);
    struct timeval timeout = {.tv_sec = left / 1000, .tv_usec = left % 1000 * 1000 + 1};
    errno = 0;
    redisContext *context = redisConnectWithTimeout(s->host, s->port, timeout);
    if (!context)
        return redis_fail(s, -ENOMEM, "out of memory");
    int rc = 0;
    if (context->err)
        rc = redis_broken(s, context);
    if (rc == 0 && s->tls) {
        redisSetTimeout(context, timeout); /* of the handshake */
        rc = redis_encrypt(s, context);
    }
    if (rc == 0) {
        /* From here on every wait is a poll with the call's deadline. */
        fcntl(context->fd, F_SETFD, FD_CLOEXEC);
        fcntl(context->fd, F_SETFL, fcntl(context->fd, F_GETFL) | O_NONBLOCK);
        context->flags &= ~REDIS_BLOCK;
        redisEnableKeepAlive(context);
        rc = redis_log_in(s, context);
    }
    if (rc < 0) {
        redisFree(context);
        return rc;
    }
    *out = context;
    return 0;
}

/* "name:value\r\n" of an INFO answer. */
static bool redis_info_read(const char *info, const char *name, char *out, size_t size)
{
    const char *line = strstr(info, name);
    if (!line)
        return false;
    line += strlen(name);
    snprintf(out, size, "%.*s", (int)strcspn(line, "\r\n"), line);
    return true;
}

/* Which process answers, and whether it keeps what it is given. Where that may not be asked, every connection could
 * be to another one. */
static int redis_identify(struct redis *s)
{
    redisReply *reply = NULL;
    char run[sizeof(s->run)] = "";
    char role[16] = "";
    char policy[32] = "";
    char limit[32] = "0";
    int rc = redis_command(s, s->ask, 1, (const char *[]){"INFO"}, &reply);
    if (rc == 0 && reply) {
        if (reply->type == REDIS_REPLY_STRING) {
            redis_info_read(reply->str, "\nrun_id:", run, sizeof(run));
            redis_info_read(reply->str, "\nrole:", role, sizeof(role));
            redis_info_read(reply->str, "\nmaxmemory:", limit, sizeof(limit));
            redis_info_read(reply->str, "\nmaxmemory_policy:", policy, sizeof(policy));
        }
        freeReplyObject(reply);
    } else if (rc != -EACCES && rc != -EBADMSG) {
        return rc;
    }
    if (s->run[0] == '\0' && strncmp(policy, "allkeys", 7) == 0 && strcmp(limit, "0") != 0)
        log_warn("metadata redis://%s:%d: maxmemory-policy is %s, so the server may drop names "
                 "when its memory is full; set it to noeviction",
                 s->host, s->port, policy);
    if (run[0] == '\0' || strcmp(run, s->run) != 0)
        s->gap = true;
    memcpy(s->run, run, sizeof(run));
    s->replica = strcmp(role, "slave") == 0;
    return 0;
}

/* Connects to the address in use. Where there are others, a replica will not do: one of them is its primary. */
static int redis_call_up(struct redis *s)
{
    int rc = redis_connect(s, &s->ask);
    if (rc == 0)
        rc = redis_identify(s);
    if (rc == 0 && s->replica && s->address_count > 1)
        rc = redis_fail(s, -EROFS, "it is a replica, and no other address is a primary");
    if (rc < 0)
        redis_hang_up(&s->ask);
    return rc;
}

/* Tries the addresses in turn, each with its share of the time. The other connection led to the same server: what broke
 * this one would show there only later, and be taken for one more outage. */
static int redis_call_up_any(struct redis *s)
{
    uint64_t end = s->deadline_ms;
    int rc = -ETIMEDOUT;
    redis_hang_up(&s->bell);
    for (size_t left = s->address_count; left > 0 && rc < 0; left--) {
        uint64_t now = util_now_ms();
        if (left < s->address_count)
            redis_address_use(s, (s->address + 1) % s->address_count);
        s->deadline_ms = now + (end > now ? (end - now) / left : 0);
        rc = redis_call_up(s);
    }
    s->deadline_ms = end;
    return rc;
}

/* Begins a call: sets its deadline, and connects unless the connection still stands. */
int redis_enter(struct redis *s)
{
    char byte;
    s->deadline_ms = util_now_ms() + META_DEADLINE_MS;
    s->cause[0] = '\0';
    if (s->ask) {
        ssize_t got = recv(s->ask->fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
        if (got > 0 || (got < 0 && (errno == EAGAIN || errno == EINTR)))
            return 0;
        redis_hang_up(&s->ask); /* it idled too long for the server, or the server went */
    }
    return redis_call_up_any(s);
}

/* ---- the script ---- */

bool redis_is_array(const redisReply *reply, size_t least)
{
    return reply->type == REDIS_REPLY_ARRAY && reply->elements >= least;
}

bool redis_is_text(const redisReply *reply)
{
    return reply->type == REDIS_REPLY_STRING || reply->type == REDIS_REPLY_STATUS;
}

/* The script's first word. */
static int redis_word(struct redis *s, const redisReply *reply)
{
    if (redis_is_array(reply, 1) && redis_is_text(reply->element[0])) {
        const char *word = reply->element[0]->str;
        if (strcmp(word, "ok") == 0)
            return 0;
        if (strcmp(word, "again") == 0)
            return -EAGAIN;
        if (strcmp(word, "noent") == 0)
            return -ENOENT;
        if (strcmp(word, "stale") == 0)
            return -ESTALE;
        if (strcmp(word, "format") == 0)
            return redis_fail(s, -EBADMSG,
                              "the data below \"%s\" has another format than " REDIS_FORMAT
                              "; run the p2pfs that wrote it, or use another ?prefix=",
                              s->prefix);
    }
    return redis_senseless(s);
}

/* Runs one operation of the script. The server may not know the script yet, or no longer. */
int redis_run(struct redis *s, int argc, const char *const *argv, redisReply **out)
{
    const char *words[REDIS_ARGS];
    int used = 0;
    words[used++] = "EVALSHA";
    words[used++] = s->sha;
    words[used++] = "7";
    for (int i = 0; i < REDIS_SCRIPT_KEYS; i++)
        words[used++] = s->keys[i];
    words[used++] = argv[0];
    words[used++] = s->candidate;
    for (int i = 1; i < argc; i++)
        words[used++] = argv[i];
    redisReply *reply = NULL;
    int rc = redis_send(s, s->ask, used, words);
    if (rc == 0)
        rc = redis_take(s, s->ask, &reply);
    if (rc == 0 && reply->type == REDIS_REPLY_ERROR && strncmp(reply->str, "NOSCRIPT", 8) == 0) {
        freeReplyObject(reply);
        words[0] = "EVAL";
        words[1] = redis_script;
        rc = redis_send(s, s->ask, used, words);
        if (rc == 0)
            rc = redis_take(s, s->ask, &reply);
    }
    if (rc != 0)
        return rc;
    if (reply->type == REDIS_REPLY_ERROR)
        rc = redis_refused(s, reply->str);
    else
        rc = redis_word(s, reply);
    if (rc == 0 && out)
        *out = reply;
    else
        freeReplyObject(reply);
    return rc;
}

/* Notes whose data this is: the epoch of an answer that begins with "ok epoch revision". */
int redis_head(struct redis *s, const redisReply *reply, size_t least, uint64_t *revision)
{
    if (!redis_is_array(reply, least) || !redis_is_text(reply->element[1]) ||
        !redis_is_text(reply->element[2]))
        return redis_senseless(s);
    const char *epoch = reply->element[1]->str;
    *revision = strtoull(reply->element[2]->str, NULL, 10);
    if (s->epoch[0] != '\0' && (strcmp(s->epoch, epoch) != 0 || *revision < s->newest)) {
        s->gap = true;
        s->store.epoch++;
    }
    snprintf(s->epoch, sizeof(s->epoch), "%s", epoch);
    s->newest = *revision;
    return 0;
}

static const struct redis_error redis_errors[] = {
    {"The user executing the script", -EACCES,
     "the user may not do what p2pfs needs; see ACL in p2pfs-metadata(5)"},
    {"unauthenticated", -EACCES, "it wants a password; give -o credentials=FILE"},
    {"NOAUTH", -EACCES, "it wants a password; give -o credentials=FILE"},
    {"WRONGPASS", -EACCES, "user or password is wrong; check the credentials file"},
    {"invalid password", -EACCES, "the password is wrong; check the credentials file"},
    {"AUTH", -EACCES, "it knows no such user or wants no password; check the credentials file"},
    {"NOPERM", -EACCES, "the user may not do what p2pfs needs; see ACL in p2pfs-metadata(5)"},
    {"READONLY", -EROFS, "it is a replica; give the address of its primary, too"},
    {"OOM", -ENOSPC, "its memory is full; raise maxmemory"},
    {"MISCONF", -EIO, "it cannot save to its disk; see its log"},
    {"NOREPLICAS", -EROFS, "too few of its replicas are connected"},
    {"LOADING", -ECONNREFUSED, "it is still loading its data"},
    {"BUSY", -ETIMEDOUT, "a script keeps it busy"},
    {"MASTERDOWN", -ECONNREFUSED, "it is a replica without its primary"},
    {"CLUSTERDOWN", -ECONNREFUSED, "its cluster is down"},
    {"MOVED", -EACCES, "it is a Redis Cluster, which is not supported; use a plain one"},
    {"CROSSSLOT", -EACCES, "it is a Redis Cluster, which is not supported; use a plain one"},
    {"DB index", -EACCES, "it has no such database; check the number in the URL"},
    {"WRONGTYPE", -EBADMSG, "another program uses these keys; give another ?prefix= in the URL"},
    {"", -EBADMSG, "p2pfs did not expect that; it needs Redis 7 or Valkey"},
};

static const struct redis_error *redis_error_of(const char *text)
{
    const struct redis_error *error = redis_errors;
    while (!strstr(text, error->part))
        error++;
    return error;
}
