#include "meta/base/util.h"

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

void util_free_pointer(void *pointer_to_pointer)
{
    free(*(void **)pointer_to_pointer);
}

void util_close_fd(const int *fd)
{
    if (*fd >= 0)
        close(*fd);
}

void util_hex_encode(const void *bytes, size_t length, char *out)
{
    static const char digits[] = "0123456789abcdef";
    const uint8_t *p = bytes;
    for (size_t i = 0; i < length; i++) {
        *out++ = digits[p[i] >> 4];
        *out++ = digits[p[i] & 15];
    }
    *out = '\0';
}

static int util_hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    if (c >= 'A' && c <= 'F')
        return c - 'A' + 10;
    return -1;
}

int util_hex_decode(const char *hex, void *bytes, size_t length)
{
    uint8_t *out = bytes;
    if (strnlen(hex, 2 * length + 1) != 2 * length)
        return -EINVAL;
    for (size_t i = 0; i < length; i++) {
        int high = util_hex_digit(hex[2 * i]);
        int low = util_hex_digit(hex[2 * i + 1]);
        if (high < 0 || low < 0)
            return -EINVAL;
        out[i] = (uint8_t)(high << 4 | low);
    }
    return 0;
}

/* What stands behind the number: the shift it means, or -1. */
static int util_size_shift(const char *unit)
{
    static const char letters[] = "KMGTPE";
    int shift = 0;
    if (*unit) {
        const char *letter = strchr(letters, toupper((unsigned char)*unit));
        if (letter) {
            shift = 10 * (int)(letter - letters + 1);
            unit++;
        }
    }
    bool bare = *unit == '\0' || strcmp(unit, "B") == 0;
    return bare || (shift > 0 && strcmp(unit, "iB") == 0) ? shift : -1;
}

int util_size_parse(const char *text, uint64_t whole, uint64_t *bytes)
{
    typedef unsigned __int128 wide;
    const wide limit = (wide)1 << 63;
    wide number = 0;
    wide scale = 1; /* the value is number / scale */
    bool any = false;
    for (; isdigit((unsigned char)*text); text++) {
        number = number * 10 + (wide)(*text - '0');
        any = true;
        if (number > limit)
            return -ERANGE;
    }
    if (*text == '.') {
        bool digits = false;
        for (text++; isdigit((unsigned char)*text); text++) {
            digits = true;
            if (scale >= 1000000000) /* further digits are less than a byte in a GiB */
                continue;
            number = number * 10 + (wide)(*text - '0');
            scale *= 10;
        }
        any = any && digits;
    }
    if (!any)
        return -EINVAL;
    if (strcmp(text, "%") == 0) {
        if (whole == 0 || number > 100 * scale)
            return -EINVAL;
        *bytes = (uint64_t)(number * whole / (100 * scale));
        return 0;
    }
    int shift = util_size_shift(text);
    if (shift < 0)
        return -EINVAL;
    if (number / scale > limit >> shift)
        return -ERANGE;
    wide value = (number << shift) / scale;
    if (value > limit)
        return -ERANGE;
    *bytes = (uint64_t)value;
    return 0;
}

void util_size_print(uint64_t bytes, char *out, size_t size)
{
    static const char *const units[] = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    if (bytes < 1024) {
        snprintf(out, size, "%u B", (unsigned)bytes);
        return;
    }
    double value = (double)bytes / 1024;
    size_t unit = 0;
    while (value >= 1023.95 && unit + 1 < util_count(units)) {
        value /= 1024;
        unit++;
    }
    snprintf(out, size, "%.1f %s", value, units[unit]);
}

uint64_t util_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

uint64_t util_now_ms(void)
{
    return util_now_ns() / 1000000;
}

void util_random(void *bytes, size_t length)
{
    uint8_t *p = bytes;
    while (length > 0) {
        ssize_t got = getrandom(p, length, 0);
        if (got < 0) {
            if (errno == EINTR)
                continue;
            abort(); /* ids that are not random would collide silently */
        }
        p += got;
        length -= (size_t)got;
    }
}

uint64_t util_random_u64(void)
{
    uint64_t v = 0;
    while (v == 0)
        util_random(&v, sizeof(v));
    return v;
}
