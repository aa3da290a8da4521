/* Util: what is too small for a file of its own: scoped cleanup, hex, sizes, time, random bytes. Any thread. */
#ifndef P2PFS_META_BASE_UTIL_H
#define P2PFS_META_BASE_UTIL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define util_container(pointer, type, member) ((type *)((char *)(pointer) - offsetof(type, member)))
#define util_count(array)                     (sizeof(array) / sizeof((array)[0]))

/* Scoped cleanup: `util_autofree char *s = ...;` `util_autoclose int fd = -1;` */
void util_free_pointer(void *pointer_to_pointer);
void util_close_fd(const int *fd);
#define util_autofree  __attribute__((cleanup(util_free_pointer)))
#define util_autoclose __attribute__((cleanup(util_close_fd)))

/* The descriptor out of its scope: it is the caller's, and the scope closes nothing. */
static inline int util_fd_take(int *fd)
{
    int taken = *fd;
    *fd = -1;
    return taken;
}

/* Lower-case hex; `out` holds 2 * length + 1 bytes. */
void util_hex_encode(const void *bytes, size_t length, char *out);
/* -EINVAL unless `hex` is exactly 2 * length hex digits. */
int util_hex_decode(const char *hex, void *bytes, size_t length);

/* "4096", "64K", "1.5G", "2T" (powers of 1024, an optional "iB" or "B" behind), or "50%" of `whole` when whole > 0.
 * -EINVAL for anything else, -ERANGE beyond 2^63. */
int util_size_parse(const char *text, uint64_t whole, uint64_t *bytes);
/* "1.5 GiB" and the like into `out`. */
void util_size_print(uint64_t bytes, char *out, size_t size);

uint64_t util_now_ns(void); /* CLOCK_MONOTONIC */
uint64_t util_now_ms(void); /* CLOCK_MONOTONIC */
/* Random bytes from the kernel; never fails (aborts where the machine has none). */
void util_random(void *bytes, size_t length);
uint64_t util_random_u64(void); /* never 0 */

#endif
