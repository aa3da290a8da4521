/* Any bytes: they are refused, or they are exactly what encoding their meaning gives. */
#include <stdlib.h>
#include <string.h>

#include "engine/wire.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t again[TRANSPORT_MESSAGE_MAX];
    struct wire_message message, back;
    if (size > TRANSPORT_MESSAGE_MAX || wire_decode(data, size, &message) != 0)
        return 0;
    // one form for each meaning: no two byte strings say the same
    if (wire_encode(&message, again, sizeof(again)) != (ssize_t)size ||
        memcmp(again, data, size) != 0)
        abort();
    if (wire_decode(again, size, &back) != 0 || back.type != message.type)
        abort();
    for (uint32_t i = 0; message.type == WIRE_HAVE && i < message.count; i++)
        if (wire_have_shard(&message, i) != wire_have_shard(&back, i))
            abort();
    return 0;
}
