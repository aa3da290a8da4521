/* Log: one line per event, to stderr or syslog, and into a ring that the mount shows as .p2pfs/log.
 *
 * Any thread. A line is at most LOG_LINE bytes and is truncated beyond that. Secrets never go into a line.
 * log_say() never fails and never changes errno. */
#ifndef P2PFS_META_BASE_LOG_H
#define P2PFS_META_BASE_LOG_H

#include <stdbool.h>
#include <stddef.h>

enum log_level { LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG };

#define LOG_LINE 1024

/* Sets the least important level that is kept, and where lines go. */
void log_setup(enum log_level level, bool to_syslog);
/* "error", "warn", "info" or "debug" -> level; -EINVAL for another word. */
int log_level_parse(const char *word, enum log_level *level);

void log_say(enum log_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));
#define log_error(...) log_say(LOG_ERROR, __VA_ARGS__)
#define log_warn(...)  log_say(LOG_WARN, __VA_ARGS__)
#define log_info(...)  log_say(LOG_INFO, __VA_ARGS__)
#define log_debug(...) log_say(LOG_DEBUG, __VA_ARGS__)

/* A copy of the newest lines (about 64 KiB, oldest first), NUL-terminated; the caller frees it. NULL: out of memory. */
char *log_ring_copy(size_t *length);

#endif
