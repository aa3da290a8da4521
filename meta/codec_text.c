#include "meta/codec_text.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>

#include "meta/base/util.h"

static bool codec_literal(unsigned char c)
{
    return c > ' ' && c <= '~' && c != '%';
}

char *codec_percent_encode(const char *in, char *out)
{
    for (; *in; in++) {
        unsigned char c = (unsigned char)*in;
        if (codec_literal(c)) {
            *out++ = (char)c;
        } else {
            *out++ = '%';
            util_hex_encode(&c, 1, out);
            out += 2;
        }
    }
    *out = '\0';
    return out;
}

int codec_percent_decode(const char *in, char *out, size_t size)
{
    size_t length = 0;
    while (*in) {
        unsigned char c = (unsigned char)*in;
        char hex[3] = {0};
        if (c == '%') {
            unsigned char again = 0;
            char back[3];
            memcpy(hex, in + 1, strnlen(in + 1, 2));
            if (util_hex_decode(hex, &again, 1) < 0)
                return -EBADMSG;
            util_hex_encode(&again, 1, back);
            if (again == '\0' || codec_literal(again) || strcmp(hex, back) != 0)
                return -EBADMSG;
            c = again;
            in += 3;
        } else if (codec_literal(c)) {
            in++;
        } else {
            return -EBADMSG;
        }
        if (length + 1 >= size)
            return -EBADMSG;
        out[length++] = (char)c;
    }
    out[length] = '\0';
    return 0;
}

int codec_u64_decode(const char *hex, uint64_t *v)
{
    uint8_t bytes[8];
    char back[17];
    if (util_hex_decode(hex, bytes, sizeof(bytes)) < 0)
        return -EBADMSG;
    util_hex_encode(bytes, sizeof(bytes), back);
    if (strcmp(hex, back) != 0)
        return -EBADMSG;
    *v = 0;
    for (size_t i = 0; i < sizeof(bytes); i++)
        *v = *v << 8 | bytes[i];
    return 0;
}
