/* Queue: what is to happen, by time. A radix heap (R. Ahuja et al., "Faster Algorithms for the Shortest Path Problem",
 * 1990): nothing may be put in before what came out last, and a virtual clock never does. What is due at one time comes
 * out in an order of the heap's own, the same in every run. */
#ifndef P2PFS_TESTS_SIM_QUEUE_H
#define P2PFS_TESTS_SIM_QUEUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct event {
    uint64_t at_ns;
    void *object;
    uint32_t generation; /* of the object; void when it has another by then */
    uint16_t kind;
    uint32_t shard;
};

struct queue_bucket {
    struct event *events;
    size_t count;
    size_t room;
};

struct queue { /* all zero is empty, at time 0 */
    uint64_t last_ns;
    size_t count;
    struct queue_bucket buckets[65];
};

void queue_put(struct queue *queue, const struct event *event);
bool queue_take(struct queue *queue, struct event *event); /* false: empty */
void queue_clear(struct queue *queue);

#endif
