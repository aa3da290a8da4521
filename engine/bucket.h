/* Bucket: a limit in bytes a second that everybody who moves bytes in one direction shares.
 *
 * Pure but for its lock: the clock is the caller's (any that only grows, in nanoseconds). A token bucket in its form
 * as a virtual schedule (the GCRA of ITU-T I.371): a piece gets the moment at which all that was taken before it has
 * passed at the rate. So takers stand in line, each with one piece at most, and share alike; nobody has to wake
 * anybody. Urgent takers have a line of their own that goes before: what they take puts off all who wait in the other,
 * to whom an eighth of the rate stays, so that their links live.
 *
 * Any thread. */
#ifndef P2PFS_ENGINE_BUCKET_H
#define P2PFS_ENGINE_BUCKET_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BUCKET_RATE_MIN  (64u << 10) /* less could not keep a link alive */
#define BUCKET_PIECE_MIN (4u << 10)
#define BUCKET_PIECE_MAX (1u << 20)
#define BUCKET_BURST_NS  50000000ull  /* what was not used for so long may be made up for at once */
#define BUCKET_WAIT_NS   200000000ull /* the longest answer, so that a new rate counts soon */

struct bucket {
    _Atomic uint64_t rate; /* bytes a second; 0: no limit */
    pthread_mutex_t lock;  /* guards what follows */
    uint64_t epoch;        /* of the rate */
    uint64_t free_ns;      /* when everything taken so far has passed */
    uint64_t urgent_ns;    /* when what was taken urgently has */
    uint64_t
        pushed_ns; /* the time that urgent pieces have taken, for those who stood in line before */
    unsigned waiting; /* tickets of the line that is not urgent */
};

/* A place in line. Zero it before it is first used; it belongs to one taker. */
struct bucket_ticket {
    size_t bytes; /* 0: not in line */
    bool urgent;
    uint64_t epoch;
    uint64_t due_ns;
    uint64_t pushed_ns;
};

void bucket_open(struct bucket *bucket, uint64_t rate);
void bucket_close(struct bucket *bucket);
void bucket_rate_set(struct bucket *bucket, uint64_t rate);
uint64_t bucket_rate(const struct bucket *bucket);
/* How much is given at once: a power of two, about 5 ms at the rate; SIZE_MAX where there is no limit. */
size_t bucket_piece(const struct bucket *bucket);

/* How many of `want` (> 0) bytes may move now: at most a piece, and they count from now on. 0: not before *wait_ns have
 * passed; ask again then, with the same ticket, which keeps the place. */
size_t bucket_take(struct bucket *bucket, struct bucket_ticket *ticket, size_t want, bool urgent,
                   uint64_t now_ns, uint64_t *wait_ns);
/* The same, but all of `want` or nothing: for what cannot be given by pieces. */
size_t bucket_take_whole(struct bucket *bucket, struct bucket_ticket *ticket, size_t want,
                         bool urgent, uint64_t now_ns, uint64_t *wait_ns);
/* Leaves the line. Harmless for who is not in it. */
void bucket_leave(struct bucket *bucket, struct bucket_ticket *ticket);

#endif
