/* Text as keys and records spell it. A value has one spelling: what a decoder would have to normalise is malformed.
 * Any thread. */
#ifndef P2PFS_META_CODEC_TEXT_H
#define P2PFS_META_CODEC_TEXT_H

#include <stddef.h>
#include <stdint.h>

/* What is not printable ASCII as %xx, and '%' itself; `out` has room for 3 * strlen(in) + 1 bytes. Its end. */
char *codec_percent_encode(const char *in, char *out);
/* Only what codec_percent_encode writes; without NUL bytes. 0; -EBADMSG, also where `size` does not hold it. */
int codec_percent_decode(const char *in, char *out, size_t size);
/* 16 lower-case hex digits. 0; -EBADMSG. */
int codec_u64_decode(const char *hex, uint64_t *v);

#endif
