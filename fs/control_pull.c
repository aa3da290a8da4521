/* Pulls as jobs: a job starts the pulls of its files a window at a time, so that a tree of 100,000 files does not open
 * them all at once, and goes on when the command that asked for it is gone.
 *
 *   QUEUED -> RUNNING -> DONE      all of it is here
 *                     -> FAILED    with the engine's errno and its words
 *
 * A file's state belongs to the job's thread; the sums that a request reads are guarded by job->lock. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "engine/storage.h"
#include "fs/control_parts.h"
#include "meta/base/util.h"

#define WINDOW        64 /* files of one job that are pulled at a time */
#define LOOK_MS       1  /* between looks at the running files, at first */
#define LOOK_LATER_MS 10 /* after the first second */
#define IDLE_MS       2000 /* a file that is neither here nor fetched for so long is asked for again */
#define FULL_MS       200 /* one that found the cache full, too: others may have ended since */
#define TRIES         3
#define KEEP_MS       60000 /* a finished job waits so long for somebody to read its end */
#define WAIT_MAX_MS   1000
#define FAILURES_MAX  8

enum file_state { QUEUED, RUNNING, DONE, FAILED };

struct file {
    struct model_id version;
    char *path;
    uint64_t size;
    enum file_state state;
    unsigned tries;
    uint64_t idle_ms; /* since when nothing fetches it; 0: something does */
};

struct failure {
    char *path;
    int error;
    char why[200];
};

struct control_job {
    struct control_job *next; /* in control->jobs, under control->lock */
    uint64_t id;
    struct control *control;
    struct file *files; /* the thread's */
    size_t count, room;

    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t moved; /* finished */
    unsigned users;       /* the list, the thread, requests */
    bool finished;
    uint64_t finished_ms;
    uint64_t bytes, bytes_before, bytes_here;
    size_t done, failed;
    uint64_t elapsed_ns;
    struct failure failures[FAILURES_MAX];
};

/* ---- a job's life ---- */

static struct control_job *job_new(struct control *control)
{
    struct control_job *job = calloc(1, sizeof(*job));
    if (!job)
        return NULL;
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&job->moved, &attr);
    pthread_condattr_destroy(&attr);
    pthread_mutex_init(&job->lock, NULL);
    job->control = control;
    job->users = 1;
    return job;
}

static void job_release(struct control_job *job)
{
    pthread_mutex_lock(&job->lock);
    bool last = --job->users == 0;
    pthread_mutex_unlock(&job->lock);
    if (!last)
        return;
    for (size_t i = 0; i < job->count; i++)
        free(job->files[i].path);
    for (size_t i = 0; i < FAILURES_MAX; i++)
        free(job->failures[i].path);
    free(job->files);
    pthread_cond_destroy(&job->moved);
    pthread_mutex_destroy(&job->lock);
    free(job);
}

static void job_hold(struct control_job *job)
{
    pthread_mutex_lock(&job->lock);
    job->users++;
    pthread_mutex_unlock(&job->lock);
}

static int job_visit(void *arg, const char *path, const struct model_entry *entry)
{
    struct control_job *job = arg;
    if (entry->kind != MODEL_FILE)
        return 0;
    if (job->count == job->room) {
        size_t room = job->room ? 2 * job->room : 16;
        struct file *files = realloc(job->files, room * sizeof(*files));
        if (!files)
            return -ENOMEM;
        job->files = files;
        job->room = room;
    }
    char *copy = strdup(path);
    if (!copy)
        return -ENOMEM;
    job->files[job->count++] =
        (struct file){.version = entry->version, .path = copy, .size = entry->size};
    return 0;
}

static int file_compare(const void *a, const void *b)
{
    const struct file *x = *(struct file *const *)a;
    const struct file *y = *(struct file *const *)b;
    int order = memcmp(&x->version, &y->version, sizeof(x->version));
    return order ? order : x < y ? -1 : x > y;
}

/* Several names may lead to one version: its bytes count once, under the first name. */
static int job_unique(struct control_job *job)
{
    if (job->count < 2)
        return 0;
    struct file **order = malloc(job->count * sizeof(*order));
    if (!order)
        return -ENOMEM;
    for (size_t i = 0; i < job->count; i++)
        order[i] = &job->files[i];
    qsort(order, job->count, sizeof(*order), file_compare);
    for (size_t i = job->count - 1; i > 0; i--)
        if (model_id_equal(&order[i]->version, &order[i - 1]->version)) {
            free(order[i]->path);
            order[i]->path = NULL;
        }
    free(order);
    size_t kept = 0;
    for (size_t i = 0; i < job->count; i++)
        if (job->files[i].path)
            job->files[kept++] = job->files[i];
    job->count = kept;
    return 0;
}

/* ---- pulling ---- */

static bool here(const struct engine_info *info)
{
    return info->state == ENGINE_COMPLETE || info->state == ENGINE_INPLACE;
}

static uint64_t resident(const struct file *file, const struct engine_info *info)
{
    return here(info) ? file->size : info->resident < file->size ? info->resident : file->size;
}

static void file_fail(struct control_job *job, struct file *file, int error, const char *why)
{
    file->state = FAILED;
    pthread_mutex_lock(&job->lock);
    if (job->failed < FAILURES_MAX) {
        struct failure *failure = &job->failures[job->failed];
        failure->path = strdup(file->path);
        failure->error = error;
        snprintf(failure->why, sizeof(failure->why), "%s", why);
    }
    job->failed++;
    pthread_mutex_unlock(&job->lock);
}

static void file_done(struct control_job *job, struct file *file)
{
    file->state = DONE;
    pthread_mutex_lock(&job->lock);
    job->done++;
    pthread_mutex_unlock(&job->lock);
}

static void file_start(struct control_job *job, struct file *file)
{
    file->tries++;
    file->idle_ms = 0;
    file->state = RUNNING;
    int rc = engine_pull(job->control->house->engine, &file->version);
    if (rc < 0)
        file_fail(job, file, rc, control_why(rc));
}

/* A running file: is it here, did it fail, or has it come to rest without either (evicted while it arrived)? */
static void file_look(struct control_job *job, struct file *file, uint64_t now_ms, uint64_t *bytes)
{
    struct engine_info info;
    int rc = engine_info(job->control->house->engine, &file->version, &info);
    if (rc < 0) {
        file_fail(job, file, rc, "it was unregistered meanwhile");
        return;
    }
    *bytes += resident(file, &info);
    if (here(&info)) {
        file_done(job, file);
    } else if (info.state == ENGINE_CHANGED) {
        file_fail(job, file, -EIO, "the file that was registered in place here has changed");
    } else if (info.state == ENGINE_FETCHING) {
        file->idle_ms = 0;
    } else if (abs(info.error) == ENOSPC && file->tries < TRIES) {
        if (file->idle_ms == 0)
            file->idle_ms = now_ms;
        else if (now_ms - file->idle_ms > FULL_MS)
            file_start(job, file);
    } else if (info.error != 0) {
        file_fail(job, file, info.error < 0 ? info.error : -info.error,
                  info.reason[0] ? info.reason : control_why(info.error));
    } else if (file->idle_ms == 0) {
        file->idle_ms = now_ms;
    } else if (now_ms - file->idle_ms > IDLE_MS && file->tries < TRIES) {
        file_start(job, file);
    } else if (now_ms - file->idle_ms > IDLE_MS) {
        file_fail(job, file, -EIO, "it is dropped again as it arrives: raise cache_size=");
    }
}

static void job_finish(struct control_job *job)
{
    pthread_mutex_lock(&job->lock);
    job->finished = true;
    job->finished_ms = util_now_ms();
    pthread_cond_broadcast(&job->moved);
    pthread_mutex_unlock(&job->lock);
}

/* What came first may have made room for what came last. */
static void job_check(struct control_job *job)
{
    for (size_t i = 0; i < job->count; i++) {
        struct engine_info info;
        struct file *file = &job->files[i];
        if (file->state != DONE ||
            engine_info(job->control->house->engine, &file->version, &info) < 0 || here(&info))
            continue;
        pthread_mutex_lock(&job->lock);
        job->done--;
        pthread_mutex_unlock(&job->lock);
        file_fail(job, file, -ENOSPC,
                  "it was evicted again to make room for others: raise cache_size=, or pull less");
    }
}

static void job_sleep(uint64_t begun_ms)
{
    uint64_t ms = util_now_ms() - begun_ms < 1000 ? LOOK_MS : LOOK_LATER_MS;
    struct timespec pause = {.tv_nsec = (long)ms * 1000000L};
    nanosleep(&pause, NULL);
}

static void job_run(void *arg)
{
    struct control_job *job = arg;
    uint64_t begun_ns = util_now_ns();
    uint64_t settled = 0;       /* bytes here of files that are not running */
    size_t first = 0, next = 0; /* files before `first` are over, from `next` on are queued */
    for (size_t i = 0; i < job->count; i++)
        settled += job->files[i].state == DONE ? job->files[i].size : 0;
    while (first < job->count && !control_closing(job->control)) {
        uint64_t now_ms = util_now_ms();
        uint64_t bytes = 0;
        size_t running = 0;
        for (size_t i = first; i < next; i++) {
            struct file *file = &job->files[i];
            if (file->state != RUNNING)
                continue;
            uint64_t of_file = 0;
            file_look(job, file, now_ms, &of_file);
            running += file->state == RUNNING;
            uint64_t *sum = file->state == RUNNING ? &bytes : &settled;
            *sum += of_file;
        }
        while (first < next && job->files[first].state != RUNNING)
            first++;
        for (; running < WINDOW && next < job->count; next++) {
            if (job->files[next].state == QUEUED)
                file_start(job, &job->files[next]);
            running += job->files[next].state == RUNNING;
        }
        pthread_mutex_lock(&job->lock);
        job->bytes_here = settled + bytes;
        job->elapsed_ns = util_now_ns() - begun_ns;
        pthread_mutex_unlock(&job->lock);
        if (running > 0)
            job_sleep(begun_ns / 1000000);
    }
    job_check(job);
    for (size_t i = first; i < job->count; i++) /* the mount closes */
        if (job->files[i].state == RUNNING || job->files[i].state == QUEUED)
            file_fail(job, &job->files[i], -ESHUTDOWN, control_why(-ESHUTDOWN));
    job_finish(job);
    job_release(job);
}

/* ---- requests ---- */

/* Takes what finished long ago, and was never asked for, off the list. */
static void jobs_tidy(struct control *control)
{
    uint64_t now_ms = util_now_ms();
    struct control_job *old = NULL;
    pthread_mutex_lock(&control->lock);
    for (struct control_job **at = &control->jobs; *at;) {
        struct control_job *job = *at;
        pthread_mutex_lock(&job->lock);
        bool over = job->finished && now_ms - job->finished_ms > KEEP_MS;
        pthread_mutex_unlock(&job->lock);
        if (over) {
            *at = job->next;
            job->next = old;
            old = job;
        } else {
            at = &job->next;
        }
    }
    pthread_mutex_unlock(&control->lock);
    while (old) {
        struct control_job *job = old;
        old = job->next;
        job_release(job);
    }
}

void control_jobs_free(struct control *control)
{
    while (control->jobs) {
        struct control_job *job = control->jobs;
        control->jobs = job->next;
        job_release(job);
    }
}

static void progress_put(struct control_call *call, struct control_job *job)
{
    struct json_out *out = call->answer;
    control_good(call);
    pthread_mutex_lock(&job->lock);
    json_put_u64(out, "job", job->id);
    json_put_bool(out, "finished", job->finished);
    json_put_u64(out, "files", job->count);
    json_put_u64(out, "files_done", job->done);
    json_put_u64(out, "files_failed", job->failed);
    json_put_u64(out, "bytes", job->bytes);
    json_put_u64(out, "bytes_before", job->bytes_before);
    json_put_u64(out, "bytes_here", job->bytes_here);
    json_put_time(out, "seconds", (int64_t)job->elapsed_ns);
    json_array(out, "failures");
    for (size_t i = 0; i < FAILURES_MAX && i < job->failed; i++) {
        json_object(out, NULL);
        json_put_name(out, "name", job->failures[i].path ? job->failures[i].path : "");
        json_put_u64(out, "errno", (uint64_t)-job->failures[i].error);
        json_put_text(out, "error", job->failures[i].why);
        json_end(out);
    }
    json_end(out);
    pthread_mutex_unlock(&job->lock);
    json_end(out);
}

/* Waits up to the request's "wait_ms" for the end of the job; the list forgets a job whose end was told. */
static void job_await(struct control_call *call, struct control_job *job)
{
    uint64_t wait_ms = json_u64(call->request, "wait_ms");
    uint64_t until = util_now_ms() + (wait_ms < WAIT_MAX_MS ? wait_ms : WAIT_MAX_MS);
    struct timespec at = {.tv_sec = (time_t)(until / 1000),
                          .tv_nsec = (long)(until % 1000) * 1000000};
    pthread_mutex_lock(&job->lock);
    while (!job->finished && util_now_ms() < until)
        pthread_cond_timedwait(&job->moved, &job->lock, &at);
    bool finished = job->finished;
    pthread_mutex_unlock(&job->lock);
    progress_put(call, job);
    if (!finished)
        return;
    struct control *control = call->control;
    pthread_mutex_lock(&control->lock);
    struct control_job **link = &control->jobs;
    while (*link && *link != job)
        link = &(*link)->next;
    bool listed = *link == job;
    if (listed)
        *link = job->next;
    pthread_mutex_unlock(&control->lock);
    if (listed)
        job_release(job);
}

static int path_collect(struct control_call *call, struct control_job *job, const char *path)
{
    struct model_entry top = {0};
    char *name = NULL;
    int rc = control_target_of(call, path, true, &top, &name);
    if (rc < 0)
        return rc;
    rc = control_walk(call->control, &top, name, job_visit, job);
    if (rc < 0)
        control_fail(call, rc, "cannot pull '%s': %s", name, control_why(rc));
    model_entry_clear(&top);
    free(name);
    return rc;
}

/* What is here already. Returns what the job takes of the cache. */
static uint64_t job_measure(struct control_job *job)
{
    uint64_t charge = 0;
    for (size_t i = 0; i < job->count; i++) {
        struct engine_info info;
        struct file *file = &job->files[i];
        job->bytes += file->size;
        if (engine_info(job->control->house->engine, &file->version, &info) < 0)
            continue;
        charge += info.state == ENGINE_INPLACE ? 0 : storage_charge(file->size);
        job->bytes_before += resident(file, &info);
        if (here(&info)) {
            file->state = DONE;
            job->done++;
        }
    }
    job->bytes_here = job->bytes_before;
    return charge;
}

/* Says so before anything moves, when the cache can never hold all of it. */
static int job_fits(struct control_call *call, struct control_job *job)
{
    struct engine_stats stats;
    char wanted[32], limit[32];
    engine_stats(call->control->house->engine, &stats);
    uint64_t charge = job_measure(job);
    if (charge <= stats.cache_limit)
        return 0;
    util_size_print(charge, wanted, sizeof(wanted));
    util_size_print(stats.cache_limit, limit, sizeof(limit));
    control_fail(call, -ENOSPC,
                 "cannot pull: %s do not fit the cache of %s: raise cache_size=, or pull less",
                 wanted, limit);
    return -ENOSPC;
}

/* The files that "path", or each of "paths", names. Fails the call with a sentence. */
static int job_collect(struct control_call *call, struct control_job *job)
{
    const struct json *paths = json_member(call->request, "paths");
    int rc = 0;
    if (!paths)
        rc = path_collect(call, job, json_text(call->request, "path"));
    for (const struct json *item = json_first(paths); item && rc == 0; item = json_next(item))
        rc = path_collect(call, job, json_item_text(item));
    if (rc < 0)
        return rc;
    rc = job_unique(job);
    if (rc < 0)
        control_fail(call, rc, "the mount is out of memory");
    return rc < 0 ? rc : job_fits(call, job);
}

void control_op_pull(struct control_call *call)
{
    struct control *control = call->control;
    jobs_tidy(control);
    struct control_job *job = job_new(control);
    if (!job) {
        control_fail(call, -ENOMEM, "the mount is out of memory");
        return;
    }
    if (job_collect(call, job) < 0)
        goto release_job;
    pthread_mutex_lock(&control->lock);
    job->id = ++control->last_job;
    job->users += 2; /* the thread and the list */
    job->next = control->jobs;
    control->jobs = job;
    pthread_mutex_unlock(&control->lock);
    int rc = control_spawn(control, job_run, job);
    if (rc < 0) {
        job_finish(job); /* jobs_tidy takes it off the list */
        control_fail(call, rc, "cannot pull: %s",
                     rc == -ESHUTDOWN ? "the mount is ending" : "too many pulls at once");
        job_release(job); /* the thread's share */
        goto release_job;
    }
    job_await(call, job);

release_job:
    job_release(job);
}

void control_op_progress(struct control_call *call)
{
    struct control *control = call->control;
    uint64_t id = json_u64(call->request, "job");
    pthread_mutex_lock(&control->lock);
    struct control_job *job = control->jobs;
    while (job && job->id != id)
        job = job->next;
    if (job)
        job_hold(job);
    pthread_mutex_unlock(&control->lock);
    if (!job) {
        control_fail(call, -ENOENT, "no such pull: it has ended, and its end was told");
        return;
    }
    job_await(call, job);
    job_release(job);
}
