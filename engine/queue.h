/* Queue: bytes that wait to be sent, first in, first out, in one piece of memory that grows and is given back. */
#ifndef P2PFS_ENGINE_QUEUE_H
#define P2PFS_ENGINE_QUEUE_H

#include <stddef.h>
#include <stdint.h>

/* Zero it first; the first byte is bytes[begin]. */
struct queue {
    uint8_t *bytes;
    size_t begin, end, room;
};

static inline size_t queue_length(const struct queue *queue)
{
    return queue->end - queue->begin;
}

/* Room for `length` more bytes at the end, which count as queued; NULL: out of memory. */
uint8_t *queue_reserve(struct queue *queue, size_t length);
/* Takes `length` bytes off the front. An empty queue gives back what a burst made it grow to. */
void queue_drop(struct queue *queue, size_t length);
void queue_free(struct queue *queue);

#endif
