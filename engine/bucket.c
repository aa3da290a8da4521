#include "engine/bucket.h"

#define SECOND_NS 1000000000ull

void bucket_open(struct bucket *bucket, uint64_t rate)
{
    *bucket = (struct bucket){.epoch = 1};
    pthread_mutex_init(&bucket->lock, NULL);
    atomic_init(&bucket->rate, rate);
}

void bucket_close(struct bucket *bucket)
{
    pthread_mutex_destroy(&bucket->lock);
}

/* Whoever stands in line begins again, for the schedule was made for another rate. */
void bucket_rate_set(struct bucket *bucket, uint64_t rate)
{
    pthread_mutex_lock(&bucket->lock);
    atomic_store(&bucket->rate, rate);
    bucket->epoch++;
    bucket->free_ns = 0;
    bucket->urgent_ns = 0;
    bucket->waiting = 0;
    pthread_mutex_unlock(&bucket->lock);
}

uint64_t bucket_rate(const struct bucket *bucket)
{
    return atomic_load_explicit(&bucket->rate, memory_order_relaxed);
}

static size_t piece(uint64_t rate)
{
    size_t bytes = BUCKET_PIECE_MIN;
    while (bytes < BUCKET_PIECE_MAX && bytes * 2 <= rate / 200) {
        bytes *= 2;
    }
    return bytes;
}

size_t bucket_piece(const struct bucket *bucket)
{
    uint64_t rate = bucket_rate(bucket);
    return rate ? piece(rate) : SIZE_MAX;
}

static uint64_t cost(size_t bytes, uint64_t rate)
{
    return (uint64_t)bytes * SECOND_NS / rate;
}

/* Lock held. */
static void leave(struct bucket *bucket, struct bucket_ticket *ticket)
{
    if (ticket->bytes && !ticket->urgent && ticket->epoch == bucket->epoch) {
        bucket->waiting--;
    }
    ticket->bytes = 0;
}

/* Goes to the end of its line. Lock held. */
static void enter(struct bucket *bucket, struct bucket_ticket *ticket, size_t bytes, bool urgent,
                  uint64_t now, uint64_t rate)
{
    uint64_t ns = cost(bytes, rate);
    uint64_t earliest = now > BUCKET_BURST_NS ? now - BUCKET_BURST_NS : 0;
    uint64_t start = bucket->free_ns > earliest ? bucket->free_ns : earliest;
    bucket->free_ns = start + ns;
    if (urgent) {
        start = bucket->urgent_ns > earliest ? bucket->urgent_ns : earliest;
        bucket->urgent_ns = start + (bucket->waiting ? ns + ns / 7 : ns); /* leaves an eighth */
        bucket->pushed_ns += ns;
    } else {
        bucket->waiting++;
    }
    *ticket = (struct bucket_ticket){.bytes = bytes,
                                     .urgent = urgent,
                                     .epoch = bucket->epoch,
                                     .due_ns = start,
                                     .pushed_ns = bucket->pushed_ns};
}

/* Takes back what the ticket had added to the schedule. Lock held. */
static void give_back(struct bucket *bucket, struct bucket_ticket *ticket, uint64_t rate)
{
    if (ticket->bytes && ticket->epoch == bucket->epoch) {
        uint64_t ns = cost(ticket->bytes, rate);
        bucket->free_ns -= ns < bucket->free_ns ? ns : bucket->free_ns;
        if (ticket->urgent) {
            bucket->urgent_ns -= ns < bucket->urgent_ns ? ns : bucket->urgent_ns;
        }
    }
    leave(bucket, ticket);
}

static size_t take(struct bucket *bucket, struct bucket_ticket *ticket, size_t want, bool whole,
                   bool urgent, uint64_t now_ns, uint64_t *wait_ns)
{
    if (bucket_rate(bucket) == 0) {
        ticket->bytes = 0; /* its epoch is over */
        return want;
    }
    size_t granted = 0;
    pthread_mutex_lock(&bucket->lock);
    uint64_t rate = bucket_rate(bucket);
    if (rate == 0) {
        ticket->bytes = 0;
        granted = want;
        goto unlock;
    }
    if (ticket->bytes && (ticket->epoch != bucket->epoch || (urgent && !ticket->urgent))) {
        give_back(bucket, ticket, rate);
    }
    if (!ticket->bytes) {
        size_t most = whole ? want : piece(rate);
        enter(bucket, ticket, want < most ? want : most, urgent, now_ns, rate);
    }
    if (!ticket->urgent) { /* what went before since */
        ticket->due_ns += bucket->pushed_ns - ticket->pushed_ns;
        ticket->pushed_ns = bucket->pushed_ns;
    }
    if (ticket->due_ns <= now_ns) {
        granted = ticket->bytes < want ? ticket->bytes : want;
        leave(bucket, ticket);
    } else {
        *wait_ns = ticket->due_ns - now_ns;
        *wait_ns = *wait_ns < BUCKET_WAIT_NS ? *wait_ns : BUCKET_WAIT_NS;
    }
unlock:
    pthread_mutex_unlock(&bucket->lock);
    return granted;
}

size_t bucket_take(struct bucket *bucket, struct bucket_ticket *ticket, size_t want, bool urgent,
                   uint64_t now_ns, uint64_t *wait_ns)
{
    return take(bucket, ticket, want, false, urgent, now_ns, wait_ns);
}

size_t bucket_take_whole(struct bucket *bucket, struct bucket_ticket *ticket, size_t want,
                         bool urgent, uint64_t now_ns, uint64_t *wait_ns)
{
    return take(bucket, ticket, want, true, urgent, now_ns, wait_ns);
}

void bucket_leave(struct bucket *bucket, struct bucket_ticket *ticket)
{
    if (!ticket->bytes) {
        return;
    }
    pthread_mutex_lock(&bucket->lock);
    uint64_t rate = bucket_rate(bucket);
    if (rate) {
        give_back(bucket, ticket, rate);
    }
    ticket->bytes = 0;
    pthread_mutex_unlock(&bucket->lock);
}
