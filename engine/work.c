#include "engine/work.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>

struct queue {
    struct work_job *first;
    struct work_job **last;
};

struct work {
    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t news;  /* a job came, or the last running one ended while closing */
    struct queue urgent;
    struct queue normal;
    unsigned idle;    /* threads that wait for news */
    unsigned running; /* jobs that run now: they may still post */
    bool closing;
    unsigned count;
    pthread_t threads[];
};

static void queue_put(struct queue *queue, struct work_job *job)
{
    job->next = NULL;
    *queue->last = job;
    queue->last = &job->next;
}

static struct work_job *queue_take(struct queue *queue)
{
    struct work_job *job = queue->first;
    if (!job)
        return NULL;
    queue->first = job->next;
    if (!queue->first)
        queue->last = &queue->first;
    return job;
}

/* The next job, or NULL when the pool is closed and nothing can come any more. Holds the lock. */
static struct work_job *work_next(struct work *work)
{
    for (;;) {
        struct work_job *job = queue_take(&work->urgent);
        if (!job)
            job = queue_take(&work->normal);
        if (job || (work->closing && work->running == 0))
            return job;
        work->idle++;
        pthread_cond_wait(&work->news, &work->lock);
        work->idle--;
    }
}

static void *work_thread(void *arg)
{
    struct work *work = arg;
    pthread_mutex_lock(&work->lock);
    struct work_job *job;
    while ((job = work_next(work))) {
        work->running++;
        pthread_mutex_unlock(&work->lock);
        job->run(job);
        pthread_mutex_lock(&work->lock);
        work->running--;
        if (work->closing && work->running == 0)
            pthread_cond_broadcast(&work->news);
    }
    pthread_mutex_unlock(&work->lock);
    return NULL;
}

int work_open(unsigned threads, struct work **out)
{
    if (threads == 0)
        threads = 1;
    struct work *work = calloc(1, sizeof(*work) + threads * sizeof(work->threads[0]));
    if (!work)
        return -ENOMEM;
    pthread_mutex_init(&work->lock, NULL);
    pthread_cond_init(&work->news, NULL);
    work->urgent.last = &work->urgent.first;
    work->normal.last = &work->normal.first;

    // signals belong to the thread that serves the mount
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int r = 0;
    while (r == 0 && work->count < threads) {
        r = -pthread_create(&work->threads[work->count], NULL, work_thread, work);
        if (r == 0) {
            pthread_setname_np(work->threads[work->count], "p2pfs-work");
            work->count++;
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (r < 0) {
        work_close(work);
        return r;
    }
    *out = work;
    return 0;
}

void work_close(struct work *work)
{
    if (!work)
        return;
    pthread_mutex_lock(&work->lock);
    work->closing = true;
    pthread_cond_broadcast(&work->news);
    pthread_mutex_unlock(&work->lock);
    for (unsigned i = 0; i < work->count; i++)
        pthread_join(work->threads[i], NULL);
    pthread_cond_destroy(&work->news);
    pthread_mutex_destroy(&work->lock);
    free(work);
}

static void work_put(struct work *work, struct queue *queue, struct work_job *job)
{
    pthread_mutex_lock(&work->lock);
    queue_put(queue, job);
    if (work->idle > 0)
        pthread_cond_signal(&work->news);
    pthread_mutex_unlock(&work->lock);
}

void work_post(struct work *work, struct work_job *job)
{
    work_put(work, &work->normal, job);
}

void work_post_urgent(struct work *work, struct work_job *job)
{
    work_put(work, &work->urgent, job);
}
