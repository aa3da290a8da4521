#include "meta/base/log.h"

/* syslog.h takes two of our names for itself: from here on levels are numbers. */
_Static_assert(LOG_ERROR == 0 && LOG_WARN == 1 && LOG_INFO == 2 && LOG_DEBUG == 3,
               "the table of levels is in this order");
#include <syslog.h>

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define LOG_RING  (64 << 10)
#define LOG_STAMP 40 /* "2025-01-31T12:00:00.123Z level " */

static const struct {
    const char *word;
    int priority;
} log_levels[] = {
    {"error", LOG_ERR},
    {"warn", LOG_WARNING},
    {"info", LOG_INFO},
    {"debug", LOG_DEBUG},
};
#define LOG_LEVELS (sizeof(log_levels) / sizeof(log_levels[0]))

static atomic_int log_least = 2; /* info */
static atomic_bool log_syslog;

static pthread_mutex_t log_mutex = PTHREAD_MUTEX_INITIALIZER;
static char log_ring[LOG_RING]; /* under log_mutex */
static size_t log_ring_at;      /* next byte to write */
static bool log_ring_wrapped;   /* the whole ring holds bytes */

void log_setup(enum log_level level, bool to_syslog)
{
    log_least = (int)level;
    log_syslog = to_syslog;
    if (to_syslog)
        openlog("p2pfs", LOG_PID, LOG_DAEMON);
}

int log_level_parse(const char *word, enum log_level *level)
{
    for (size_t i = 0; i < LOG_LEVELS; i++) {
        if (strcmp(word, log_levels[i].word) == 0) {
            *level = (enum log_level)i;
            return 0;
        }
    }
    return -EINVAL;
}

static void log_ring_add(const char *bytes, size_t length)
{
    while (length > 0) {
        size_t part = LOG_RING - log_ring_at;
        if (part > length)
            part = length;
        memcpy(log_ring + log_ring_at, bytes, part);
        log_ring_at += part;
        bytes += part;
        length -= part;
        if (log_ring_at == LOG_RING) {
            log_ring_at = 0;
            log_ring_wrapped = true;
        }
    }
}

static size_t log_stamp(enum log_level level, char out[LOG_STAMP])
{
    struct timespec now;
    struct tm tm;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &tm);
    size_t length = strftime(out, LOG_STAMP, "%Y-%m-%dT%H:%M:%S", &tm);
    length += (size_t)snprintf(out + length, LOG_STAMP - length, ".%03ldZ %s ",
                               now.tv_nsec / 1000000, log_levels[level].word);
    return length;
}

/* stderr may be a closed pipe or a full disk; there is nobody to tell. */
static void log_print(enum log_level level, const char *line)
{
    char out[LOG_LINE + 32];
    int length = snprintf(out, sizeof(out), "p2pfs: %s: %s\n", log_levels[level].word, line);
    if (length > 0 && write(STDERR_FILENO, out, (size_t)length) < 0)
        return;
}

void log_say(enum log_level level, const char *format, ...)
{
    if ((int)level > log_least || (size_t)level >= LOG_LEVELS)
        return;
    int saved_errno = errno;
    char line[LOG_LINE];
    va_list arguments;
    va_start(arguments, format);
    int wanted = vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
    if (wanted < 0)
        snprintf(line, sizeof(line), "(a message could not be formatted: %s)", format);

    /* One line per event, and no terminal escapes: names come from users and from peers. */
    for (char *p = line; *p; p++) {
        if ((unsigned char)*p < ' ' || *p == 0x7f)
            *p = '?';
    }
    if (log_syslog)
        syslog(log_levels[level].priority, "%s", line);
    else
        log_print(level, line);

    char stamp[LOG_STAMP];
    size_t stamp_length = log_stamp(level, stamp);
    pthread_mutex_lock(&log_mutex);
    log_ring_add(stamp, stamp_length);
    log_ring_add(line, strlen(line));
    log_ring_add("\n", 1);
    pthread_mutex_unlock(&log_mutex);
    errno = saved_errno;
}

char *log_ring_copy(size_t *length)
{
    char *copy = malloc(LOG_RING + 1);
    if (!copy)
        return NULL;
    size_t used = 0;
    pthread_mutex_lock(&log_mutex);
    if (log_ring_wrapped) {
        /* begin with a whole line: the oldest one has been overwritten in part */
        used = LOG_RING - log_ring_at;
        memcpy(copy, log_ring + log_ring_at, used);
    }
    memcpy(copy + used, log_ring, log_ring_at);
    used += log_ring_at;
    bool wrapped = log_ring_wrapped;
    pthread_mutex_unlock(&log_mutex);

    const char *first = wrapped ? memchr(copy, '\n', used) : NULL;
    if (first) {
        size_t cut = (size_t)(first + 1 - copy);
        used -= cut;
        memmove(copy, first + 1, used);
    }
    copy[used] = '\0';
    if (length)
        *length = used;
    return copy;
}
