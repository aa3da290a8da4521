/* Buf: a bounds-checked cursor over bytes that someone else owns, for wire messages.
 *
 * Integers are big-endian. The first call that does not fit sets `bad`; every later call is then harmless (gets
 * return 0, puts write nothing), so that a whole message is parsed first and checked once. One thread at a time. */
#ifndef P2PFS_META_BASE_BUF_H
#define P2PFS_META_BASE_BUF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct buf {
    uint8_t *data;
    size_t size; /* bytes that may be read or written */
    size_t at;   /* next byte */
    bool bad;
};

static inline struct buf buf_over(void *data, size_t size)
{
    return (struct buf){.data = data, .size = size};
}

void buf_put_u8(struct buf *b, uint8_t v);
void buf_put_u16(struct buf *b, uint16_t v);
void buf_put_u32(struct buf *b, uint32_t v);
void buf_put_u64(struct buf *b, uint64_t v);
void buf_put_bytes(struct buf *b, const void *bytes, size_t length);
/* u16 length, then the bytes without a NUL. */
void buf_put_string(struct buf *b, const char *string);

uint8_t buf_get_u8(struct buf *b);
uint16_t buf_get_u16(struct buf *b);
uint32_t buf_get_u32(struct buf *b);
uint64_t buf_get_u64(struct buf *b);
void buf_get_bytes(struct buf *b, void *bytes, size_t length);
/* Into `out` of `size` bytes, NUL-terminated; a string that does not fit or holds a NUL sets bad. */
void buf_get_string(struct buf *b, char *out, size_t size);
/* A pointer to the next `length` bytes inside the buffer (borrowed), or NULL and bad. */
const uint8_t *buf_get_view(struct buf *b, size_t length);
/* 0 when everything was in bounds and nothing is left over; -EBADMSG otherwise. */
int buf_end(const struct buf *b);

#endif
