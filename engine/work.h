/* Work: a few threads for what may block or take long: hashing, populating memory, reading local files, answering
 * readers. Lanes and FUSE workers hand such jobs over and go on. */
#ifndef P2PFS_ENGINE_WORK_H
#define P2PFS_ENGINE_WORK_H

struct work;

/* Owned by the poster until run; run once on one of the threads, then never touched again (it may free itself). */
struct work_job {
    void (*run)(struct work_job *job);
    struct work_job *next; /* the pool's */
};

int work_open(unsigned threads, struct work **work); /* 0, -ENOMEM, -EAGAIN */
/* Runs everything that was posted, then ends the threads. Jobs may still post while it does. NULL is harmless. */
void work_close(struct work *work);
void work_post(struct work *work, struct work_job *job);        /* first in, first out */
void work_post_urgent(struct work *work, struct work_job *job); /* before all that is not urgent */

#endif
