#include "fs/control.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/storage.h"
#include "fs/control_parts.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

#define THREADS_MAX  256
#define THREAD_STACK (1u << 20)
#define WAIT_LOOK_MS 100 /* how often a waiting request looks whether the mount closes */

struct op {
    const char *name;
    bool changes; /* for root and the mounting user only */
    void (*run)(struct control_call *call);
};
static const struct op *op_find(const char *name);

/* ---- opening and closing ---- */

int control_open(struct house *house, struct control **out)
{
    struct control *control = calloc(1, sizeof(*control));
    if (!control)
        return -ENOMEM;
    control->house = house;
    pthread_mutex_init(&control->lock, NULL);
    pthread_cond_init(&control->quiet, NULL);
    *out = control;
    return 0;
}

void control_close(struct control *control)
{
    if (!control)
        return;
    pthread_mutex_lock(&control->lock);
    control->closing = true;
    while (control->threads > 0)
        pthread_cond_wait(&control->quiet, &control->lock);
    pthread_mutex_unlock(&control->lock);
    control_jobs_free(control);
    pthread_cond_destroy(&control->quiet);
    pthread_mutex_destroy(&control->lock);
    free(control);
}

bool control_closing(struct control *control)
{
    pthread_mutex_lock(&control->lock);
    bool closing = control->closing;
    pthread_mutex_unlock(&control->lock);
    return closing;
}

/* ---- reports ---- */

int control_render(struct control *control, enum control_file file, char **text, size_t *length)
{
    struct json_out out = {0};
    switch (file) {
    case CONTROL_STATUS:
        json_object(&out, NULL);
        control_status_put(control, &out, false);
        json_end(&out);
        *text = json_take(&out, length);
        break;
    case CONTROL_PEERS:
        json_object(&out, NULL);
        control_peers_put(control, &out);
        json_end(&out);
        *text = json_take(&out, length);
        break;
    case CONTROL_METRICS:
        *text = control_metrics(control, length);
        break;
    case CONTROL_LOG:
        *text = log_ring_copy(length);
        break;
    case CONTROL_REQUEST:
    case CONTROL_FILES:
        return -EINVAL;
    }
    return *text ? 0 : -ENOMEM;
}

/* ---- threads ---- */

struct task {
    struct control *control;
    void (*run)(void *arg);
    void *arg;
};

static void thread_ends(struct control *control)
{
    pthread_mutex_lock(&control->lock);
    if (--control->threads == 0)
        pthread_cond_broadcast(&control->quiet);
    pthread_mutex_unlock(&control->lock);
}

static void *thread_main(void *arg)
{
    struct task task = *(struct task *)arg;
    free(arg);
    task.run(task.arg);
    thread_ends(task.control);
    return NULL;
}

/* Signals stay with the main thread. */
static int thread_start(struct task *task)
{
    pthread_attr_t attr;
    if (pthread_attr_init(&attr) != 0)
        return -ENOMEM;
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attr, THREAD_STACK);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    int rc = pthread_create(&thread, &attr, thread_main, task);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
    return rc == 0 ? 0 : -EAGAIN;
}

int control_spawn(struct control *control, void (*run)(void *arg), void *arg)
{
    struct task *task = malloc(sizeof(*task));
    if (!task)
        return -ENOMEM;
    *task = (struct task){.control = control, .run = run, .arg = arg};
    pthread_mutex_lock(&control->lock);
    int rc = control->closing ? -ESHUTDOWN : control->threads >= THREADS_MAX ? -EAGAIN : 0;
    if (rc == 0)
        control->threads++;
    pthread_mutex_unlock(&control->lock);
    if (rc < 0)
        goto free_task;
    rc = thread_start(task);
    if (rc < 0)
        goto count_down;
    return 0;

count_down:
    thread_ends(control);
free_task:
    free(task);
    return rc;
}

/* ---- requests ---- */

struct request {
    struct control *control;
    uint32_t uid;
    struct json *json;
    const struct op *op;
    control_answer answer;
    void *arg;
};

static void answer_take(struct json_out *out, control_answer answer, void *arg)
{
    size_t length = 0;
    char *text = json_take(out, &length);
    if (!text) {
        text = strdup("{\"ok\":false,\"errno\":12,\"error\":\"the mount is out of memory\"}\n");
        length = text ? strlen(text) : 0;
    }
    answer(arg, text, length);
}

static void request_run(void *arg)
{
    struct request *request = arg;
    struct json_out out = {0};
    struct control_call call = {
        .control = request->control, .uid = request->uid, .request = request->json, .answer = &out};
    request->op->run(&call);
    answer_take(&out, request->answer, request->arg);
    json_free(request->json);
    free(request);
}

/* What forbids the request, as a finished answer; 0: nothing does. */
static int request_check(struct control_call *call, const struct op *op, const char *name)
{
    if (!json_is_object(call->request) || !name) {
        control_fail(call, -EINVAL, "the request is not a JSON object with a member \"op\"");
        return -EINVAL;
    }
    if (!op) {
        control_fail(call, -EOPNOTSUPP,
                     "this mount has no operation '%.64s': it is another "
                     "version of p2pfs than the command",
                     name);
        return -EOPNOTSUPP;
    }
    if (op->changes && call->uid != 0 && call->uid != call->control->house->uid) {
        control_fail(call, -EPERM, "%s is for root and the user who mounted (uid %u) only", name,
                     call->control->house->uid);
        return -EPERM;
    }
    return 0;
}

void control_request(struct control *control, uint32_t uid, const char *text, size_t length,
                     control_answer answer, void *arg)
{
    struct json_out out = {0};
    struct json *json = json_parse(text, length);
    struct control_call call = {.control = control, .uid = uid, .request = json, .answer = &out};
    const char *name = json_text(json, "op");
    const struct op *op = name ? op_find(name) : NULL;
    int rc = request_check(&call, op, name);
    if (rc < 0)
        goto answer_here;
    struct request *request = malloc(sizeof(*request));
    if (!request) {
        control_fail(&call, -ENOMEM, "the mount is out of memory");
        goto answer_here;
    }
    *request = (struct request){
        .control = control, .uid = uid, .json = json, .op = op, .answer = answer, .arg = arg};
    rc = control_spawn(control, request_run, request);
    if (rc == 0)
        return;
    free(request);
    control_fail(&call, rc, "%s: %s", name,
                 rc == -ESHUTDOWN ? "the mount is ending"
                                  : "too many requests at once: try again in a moment");

answer_here:
    json_free(json);
    answer_take(&out, answer, arg);
}

void control_good(struct control_call *call)
{
    json_object(call->answer, NULL);
    json_put_bool(call->answer, "ok", true);
}

void control_fail(struct control_call *call, int error, const char *format, ...)
{
    char sentence[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(sentence, sizeof(sentence), format, arguments);
    va_end(arguments);
    json_object(call->answer, NULL);
    json_put_bool(call->answer, "ok", false);
    json_put_u64(call->answer, "errno", (uint64_t)-error);
    json_put_text(call->answer, "error", sentence);
    json_end(call->answer);
}

const char *control_why(int error)
{
    switch (-error) {
    case ENOENT:
        return "no such name";
    case ENOTDIR:
        return "a part of the path is not a directory";
    case EXDEV:
        return "it leads out of the mount";
    case ELOOP:
        return "it lies inside the mount, or symbolic links lead in a circle";
    case EEXIST:
        return "the name exists already: choose another, or unregister it first";
    case EPERM:
        return "a registered file is replaced only on a mount with -o allow_overwrite";
    case ETIMEDOUT:
    case ECONNREFUSED:
    case ENOTCONN:
        return "the metadata service does not answer: see .p2pfs/log, then try again";
    case ENOSPC:
        return "the cache or the metadata service is full: raise cache_size=, or evict something";
    case ESHUTDOWN:
        return "the mount is ending";
    default:
        return strerror(-error);
    }
}

/* ---- waiting for a callback ---- */

struct control_wait {
    struct control *control;
    pthread_mutex_t lock;
    pthread_cond_t over;
    unsigned holders; /* the request and the callback */
    bool done;
    int status;
    void *data;
    void (*data_free)(void *data);
};

struct control_wait *control_wait_new(struct control *control, void *data,
                                      void (*data_free)(void *data))
{
    struct control_wait *wait = calloc(1, sizeof(*wait));
    if (!wait)
        return NULL;
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&wait->over, &attr);
    pthread_condattr_destroy(&attr);
    pthread_mutex_init(&wait->lock, NULL);
    wait->control = control;
    wait->holders = 2;
    wait->data = data;
    wait->data_free = data_free;
    return wait;
}

void *control_wait_data(struct control_wait *wait)
{
    return wait->data;
}

/* Called with the lock held. */
static void wait_release(struct control_wait *wait, unsigned holders)
{
    wait->holders -= holders;
    bool last = wait->holders == 0;
    pthread_mutex_unlock(&wait->lock);
    if (!last)
        return;
    if (wait->data && wait->data_free)
        wait->data_free(wait->data);
    pthread_cond_destroy(&wait->over);
    pthread_mutex_destroy(&wait->lock);
    free(wait);
}

void control_wait_engine(void *arg, int status)
{
    struct control_wait *wait = arg;
    pthread_mutex_lock(&wait->lock);
    wait->done = true;
    wait->status = status;
    pthread_cond_signal(&wait->over);
    wait_release(wait, 1);
}

void control_wait_catalog(void *arg, int status, const struct model_entry *entry)
{
    (void)entry;
    control_wait_engine(arg, status);
}

int control_wait_end(struct control_wait *wait, int started)
{
    pthread_mutex_lock(&wait->lock);
    if (started < 0) { /* no callback comes */
        if (started != -ESHUTDOWN)
            wait->data = NULL;
        wait_release(wait, 2);
        return started;
    }
    while (!wait->done && !control_closing(wait->control)) {
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += WAIT_LOOK_MS * 1000000L;
        until.tv_sec += until.tv_nsec / 1000000000L;
        until.tv_nsec %= 1000000000L;
        pthread_cond_timedwait(&wait->over, &wait->lock, &until);
    }
    int status = wait->done ? wait->status : -ESHUTDOWN;
    if (wait->done && status != -ESHUTDOWN)
        wait->data = NULL;
    wait_release(wait, 1);
    return status;
}

/* ---- status and peers as requests ---- */

static void op_status(struct control_call *call)
{
    control_good(call);
    control_status_put(call->control, call->answer, true);
    json_end(call->answer);
}

static void op_peers(struct control_call *call)
{
    control_good(call);
    control_peers_put(call->control, call->answer);
    json_end(call->answer);
}

static const struct op ops[] = {
    {.name = "status", .run = op_status},
    {.name = "peers", .run = op_peers},
    {.name = "why", .run = control_op_why},
    {.name = "top", .run = control_op_top},
    {.name = "ls", .run = control_op_ls},
    {.name = "info", .run = control_op_info},
    {.name = "register", .changes = true, .run = control_op_register},
    {.name = "unregister", .changes = true, .run = control_op_unregister},
    {.name = "pull", .changes = true, .run = control_op_pull},
    {.name = "progress", .run = control_op_progress},
    {.name = "evict", .changes = true, .run = control_op_evict},
    {.name = "limit", .changes = true, .run = control_op_limit},
    {.name = "pin", .changes = true, .run = control_op_pin},
    {.name = "unpin", .changes = true, .run = control_op_unpin},
};

static const struct op *op_find(const char *name)
{
    for (size_t i = 0; i < util_count(ops); i++)
        if (strcmp(ops[i].name, name) == 0)
            return &ops[i];
    return NULL;
}

const char *const control_names[CONTROL_FILES] = {
    [CONTROL_STATUS] = "status.json", [CONTROL_PEERS] = "peers.json",
    [CONTROL_METRICS] = "metrics",    [CONTROL_LOG] = "log",
    [CONTROL_REQUEST] = "control",
};
