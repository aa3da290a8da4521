#include "tests/sim/queue.h"

#include <stdlib.h>

/* Events of a bucket differ from last_ns first in the bit below its number; those of bucket 0 not at all. */
static unsigned bucket_of(const struct queue *queue, uint64_t at_ns)
{
    uint64_t difference = at_ns ^ queue->last_ns;
    return difference ? 64 - (unsigned)__builtin_clzll(difference) : 0;
}

void queue_put(struct queue *queue, const struct event *event)
{
    if (event->at_ns < queue->last_ns) {
        abort(); /* the past */
    }
    struct queue_bucket *bucket = &queue->buckets[bucket_of(queue, event->at_ns)];
    if (bucket->count == bucket->room) {
        bucket->room = bucket->room ? bucket->room * 2 : 64;
        bucket->events = reallocarray(bucket->events, bucket->room, sizeof(struct event));
        if (!bucket->events) {
            abort();
        }
    }
    bucket->events[bucket->count++] = *event;
    queue->count++;
}

bool queue_take(struct queue *queue, struct event *event)
{
    if (queue->count == 0) {
        return false;
    }
    struct queue_bucket *bucket = queue->buckets;
    while (bucket->count == 0) {
        bucket++;
    }
    if (bucket !=
        queue->buckets) { /* the clock goes on to the first of these, and the rest come nearer */
        uint64_t first = UINT64_MAX;
        for (size_t i = 0; i < bucket->count; i++) {
            first = bucket->events[i].at_ns < first ? bucket->events[i].at_ns : first;
        }
        queue->last_ns = first;
        size_t count = bucket->count;
        queue->count -= count;
        bucket->count = 0; /* none comes back into this one */
        for (size_t i = 0; i < count; i++) {
            queue_put(queue, &bucket->events[i]);
        }
        bucket = queue->buckets;
    }
    *event = bucket->events[--bucket->count];
    queue->count--;
    return true;
}

void queue_clear(struct queue *queue)
{
    for (size_t i = 0; i < sizeof(queue->buckets) / sizeof(queue->buckets[0]); i++) {
        free(queue->buckets[i].events);
    }
    *queue = (struct queue){0};
}
