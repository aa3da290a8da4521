#include "meta/base/buf.h"

#include <errno.h>
#include <string.h>

/* The next `length` bytes, or NULL and bad. A length of 0 is always there. */
static uint8_t *buf_take(struct buf *b, size_t length)
{
    if (b->bad || length > b->size - b->at) {
        b->bad = true;
        return NULL;
    }
    uint8_t *p = b->data + b->at;
    b->at += length;
    return p;
}

static void buf_put_number(struct buf *b, uint64_t v, size_t length)
{
    uint8_t *p = buf_take(b, length);
    if (!p)
        return;
    for (size_t i = 0; i < length; i++)
        p[i] = (uint8_t)(v >> (8 * (length - 1 - i)));
}

static uint64_t buf_get_number(struct buf *b, size_t length)
{
    const uint8_t *p = buf_take(b, length);
    uint64_t v = 0;
    for (size_t i = 0; p && i < length; i++)
        v = v << 8 | p[i];
    return v;
}

void buf_put_u8(struct buf *b, uint8_t v)
{
    buf_put_number(b, v, 1);
}

void buf_put_u16(struct buf *b, uint16_t v)
{
    buf_put_number(b, v, 2);
}

void buf_put_u32(struct buf *b, uint32_t v)
{
    buf_put_number(b, v, 4);
}

void buf_put_u64(struct buf *b, uint64_t v)
{
    buf_put_number(b, v, 8);
}

void buf_put_bytes(struct buf *b, const void *bytes, size_t length)
{
    uint8_t *p = buf_take(b, length);
    if (p && length > 0)
        memcpy(p, bytes, length);
}

void buf_put_string(struct buf *b, const char *string)
{
    size_t length = strlen(string);
    if (length > UINT16_MAX || b->bad || 2 + length > b->size - b->at) {
        b->bad = true; /* not even the length, so that nothing of it is written */
        return;
    }
    buf_put_u16(b, (uint16_t)length);
    buf_put_bytes(b, string, length);
}

uint8_t buf_get_u8(struct buf *b)
{
    return (uint8_t)buf_get_number(b, 1);
}

uint16_t buf_get_u16(struct buf *b)
{
    return (uint16_t)buf_get_number(b, 2);
}

uint32_t buf_get_u32(struct buf *b)
{
    return (uint32_t)buf_get_number(b, 4);
}

uint64_t buf_get_u64(struct buf *b)
{
    return buf_get_number(b, 8);
}

void buf_get_bytes(struct buf *b, void *bytes, size_t length)
{
    const uint8_t *p = buf_take(b, length);
    if (length == 0)
        return;
    if (p)
        memcpy(bytes, p, length);
    else
        memset(bytes, 0, length);
}

void buf_get_string(struct buf *b, char *out, size_t size)
{
    size_t length = buf_get_u16(b);
    const uint8_t *p = buf_take(b, length);
    if (size > 0)
        out[0] = '\0';
    if (!p || length >= size || memchr(p, '\0', length)) {
        b->bad = true;
        return;
    }
    memcpy(out, p, length);
    out[length] = '\0';
}

const uint8_t *buf_get_view(struct buf *b, size_t length)
{
    return buf_take(b, length);
}

int buf_end(const struct buf *b)
{
    return b->bad || b->at != b->size ? -EBADMSG : 0;
}
