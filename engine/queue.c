#include "engine/queue.h"

#include <stdlib.h>
#include <string.h>

#define QUEUE_FIRST 4096
#define QUEUE_KEEP  (64u << 10)

uint8_t *queue_reserve(struct queue *queue, size_t length)
{
    if (queue->room - queue->end < length && queue->begin > 0) {
        memmove(queue->bytes, queue->bytes + queue->begin, queue_length(queue));
        queue->end -= queue->begin;
        queue->begin = 0;
    }
    if (queue->room - queue->end < length) {
        size_t room = queue->room ? queue->room : QUEUE_FIRST;
        while (room - queue->end < length)
            room *= 2;
        uint8_t *bytes = realloc(queue->bytes, room);
        if (!bytes)
            return NULL;
        queue->bytes = bytes;
        queue->room = room;
    }
    uint8_t *at = queue->bytes + queue->end;
    queue->end += length;
    return at;
}

void queue_drop(struct queue *queue, size_t length)
{
    queue->begin += length;
    if (queue->begin < queue->end)
        return;
    queue->begin = queue->end = 0;
    if (queue->room > QUEUE_KEEP) // many links must not keep megabytes each
        queue_free(queue);
}

void queue_free(struct queue *queue)
{
    free(queue->bytes);
    *queue = (struct queue){.bytes = NULL};
}
