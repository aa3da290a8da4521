#include "engine/loop.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "meta/base/log.h"
#include "meta/base/util.h"
#include "p2pfs_config.h"

#if P2PFS_HAVE_URING
#include <liburing.h>
#endif

/* A watch is known to the kernel by a tag (generation << 32 | slot + 1), never by its address: a completion that comes
 * after loop_watch_clear carries a tag whose generation is over and is dropped. What the kernel must be told (a poll to
 * arm, to change, to remove) is gathered in `dirty` during a turn and leaves with the one system call that waits.
 *
 * A turn: tell and wait -> ready watches -> due timers -> posted tasks.
 *
 * watch->armed: 0 = the kernel does not watch, else ARMED | the events it watches for. */
#define ARMED      (1u << 31)
#define ALWAYS     (POLLERR | POLLHUP | POLLNVAL)
#define BATCH      128
#define QUEUE_SIZE 256
#define CQ_SIZE    4096
#define FOREVER    (-1)

struct slot {
    struct loop_watch *watch; /* NULL: free, or about to be */
    uint64_t remove_tag;      /* io_uring: a poll that must be taken back, 0: none */
    uint32_t generation;
    bool dirty;
};

struct backend {
    const char *name;
    void (*close)(struct loop *loop);
    void (*start)(struct loop *loop); /* first thing on the thread that runs */
    int (*add)(struct loop *loop, struct loop_watch *watch);
    void (*remove)(struct loop *loop, struct slot *slot);
    void (*flush)(struct loop *loop,
                  struct slot *slot); /* a dirty slot that has a watch, or a remove_tag */
    void (*wait)(struct loop *loop, int64_t timeout_ns); /* and runs what is ready */
};

struct loop {
    const struct backend *backend;
    struct slot *slots;
    uint32_t *dirty; /* slot numbers; room for all */
    uint32_t *free;  /* slot numbers; room for all */
    uint32_t slot_count;
    uint32_t dirty_count;
    uint32_t free_count;

    struct loop_timer **heap; /* the earliest first; heap[timer->slot] == timer */
    uint32_t timer_count;
    uint32_t timer_room;

    _Atomic(struct loop_task *) tasks; /* newest first */
    atomic_bool sleeping;              /* a poster must write to `bell` */
    atomic_bool stop;
    atomic_uintptr_t runner; /* pthread_self of the thread in loop_run, 0: none */
    struct loop_watch bell;
    uint64_t now;
    int epoll;
#if P2PFS_HAVE_URING
    struct io_uring ring;
    bool started;
#endif
};

static const struct backend backend_epoll;
#if P2PFS_HAVE_URING
static const struct backend backend_uring;
static int uring_open(struct loop *loop);
#endif

static void loop_bell_rang(struct loop_watch *watch, uint32_t events)
{
    (void)events;
    uint64_t count;
    while (read(watch->fd, &count, sizeof(count)) < 0 && errno == EINTR)
        ;
}

static int backend_open(struct loop *loop)
{
#if P2PFS_HAVE_URING
    const char *forbidden = getenv("P2PFS_NO_URING");
    if ((!forbidden || strcmp(forbidden, "1") != 0) && uring_open(loop) == 0) {
        loop->backend = &backend_uring;
        return 0;
    }
#endif
    loop->backend = &backend_epoll;
    loop->epoll = epoll_create1(EPOLL_CLOEXEC);
    return loop->epoll < 0 ? -errno : 0;
}

int loop_open(struct loop **out)
{
    struct loop *loop = calloc(1, sizeof(*loop));
    if (!loop)
        return -ENOMEM;
    loop->epoll = -1;
    loop->now = util_now_ns();
    loop->bell.ready = loop_bell_rang;

    int r = backend_open(loop);
    if (r < 0)
        goto free_loop;
    loop->bell.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (loop->bell.fd < 0) {
        r = -errno;
        goto close_backend;
    }
    r = loop_watch_set(loop, &loop->bell, POLLIN);
    if (r < 0)
        goto close_bell;
    *out = loop;
    return 0;

close_bell:
    close(loop->bell.fd);
close_backend:
    loop->backend->close(loop);
free_loop:
    free(loop);
    return r;
}

void loop_close(struct loop *loop)
{
    if (!loop)
        return;
    loop->backend->close(loop);
    close(loop->bell.fd);
    free(loop->slots);
    free(loop->dirty);
    free(loop->free);
    free(loop->heap);
    free(loop);
}

bool loop_is_uring(const struct loop *loop)
{
    return loop->backend != &backend_epoll;
}

bool loop_here(const struct loop *loop)
{
    uintptr_t runner = atomic_load(&((struct loop *)loop)->runner);
    return runner == 0 || runner == (uintptr_t)pthread_self();
}

uint64_t loop_now_ns(const struct loop *loop)
{
    return loop->now;
}

// -- Tasks ----------------------------------------------------------------------------------------

static void loop_wake(struct loop *loop)
{
    if (!atomic_exchange(&loop->sleeping, false))
        return;
    uint64_t one = 1;
    while (write(loop->bell.fd, &one, sizeof(one)) < 0 && errno == EINTR)
        ;
}

void loop_post(struct loop *loop, struct loop_task *task)
{
    struct loop_task *head = atomic_load(&loop->tasks);
    do
        task->next = head;
    while (!atomic_compare_exchange_weak(&loop->tasks, &head, task));
    loop_wake(loop);
}

void loop_stop(struct loop *loop)
{
    atomic_store(&loop->stop, true);
    loop_wake(loop);
}

static void tasks_run(struct loop *loop)
{
    if (!atomic_load(&loop->tasks))
        return;
    struct loop_task *newest = atomic_exchange(&loop->tasks, NULL);
    struct loop_task *oldest = NULL;
    while (newest) {
        struct loop_task *next = newest->next;
        newest->next = oldest;
        oldest = newest;
        newest = next;
    }
    while (oldest) {
        struct loop_task *task = oldest;
        oldest = task->next;
        task->run(task);
    }
}

// -- Timers ---------------------------------------------------------------------------------------

static void heap_put(struct loop *loop, uint32_t slot, struct loop_timer *timer)
{
    loop->heap[slot] = timer;
    timer->slot = slot;
}

static void heap_rise(struct loop *loop, uint32_t slot, struct loop_timer *timer)
{
    while (slot > 0 && loop->heap[(slot - 1) / 2]->due_ns > timer->due_ns) {
        heap_put(loop, slot, loop->heap[(slot - 1) / 2]);
        slot = (slot - 1) / 2;
    }
    heap_put(loop, slot, timer);
}

/* Puts the timer where it belongs, at or below or above `slot`, which is vacant. */
static void heap_settle(struct loop *loop, uint32_t slot, struct loop_timer *timer)
{
    for (;;) {
        uint32_t child = 2 * slot + 1;
        if (child >= loop->timer_count)
            break;
        if (child + 1 < loop->timer_count &&
            loop->heap[child + 1]->due_ns < loop->heap[child]->due_ns)
            child++;
        if (loop->heap[child]->due_ns >= timer->due_ns)
            break;
        heap_put(loop, slot, loop->heap[child]);
        slot = child;
    }
    heap_rise(loop, slot, timer);
}

int loop_timer_set(struct loop *loop, struct loop_timer *timer, uint64_t delay_ns)
{
    uint64_t due = util_now_ns() + delay_ns;
    if (due < delay_ns)
        due = UINT64_MAX;
    if (timer->due_ns) {
        timer->due_ns = due;
        heap_settle(loop, timer->slot, timer);
        return 0;
    }
    if (loop->timer_count == loop->timer_room) {
        uint32_t room = loop->timer_room ? loop->timer_room * 2 : 32;
        void *heap = realloc(loop->heap, room * sizeof(*loop->heap));
        if (!heap)
            return -ENOMEM;
        loop->heap = heap;
        loop->timer_room = room;
    }
    timer->due_ns = due;
    heap_rise(loop, loop->timer_count++, timer);
    return 0;
}

void loop_timer_clear(struct loop *loop, struct loop_timer *timer)
{
    if (!timer->due_ns)
        return;
    timer->due_ns = 0;
    struct loop_timer *last = loop->heap[--loop->timer_count];
    if (last != timer)
        heap_settle(loop, timer->slot, last);
}

static void timers_run(struct loop *loop)
{
    if (loop->timer_count == 0)
        return;
    uint64_t until = util_now_ns();
    while (loop->timer_count > 0 && loop->heap[0]->due_ns <= until) {
        struct loop_timer *timer = loop->heap[0];
        loop_timer_clear(loop, timer);
        timer->due(timer);
    }
}

// -- Watches --------------------------------------------------------------------------------------

static int slots_grow(struct loop *loop)
{
    uint32_t count = loop->slot_count ? loop->slot_count * 2 : 64;
    struct slot *slots = realloc(loop->slots, count * sizeof(*slots));
    if (!slots)
        return -ENOMEM;
    loop->slots = slots;
    uint32_t *dirty = realloc(loop->dirty, count * sizeof(*dirty));
    if (!dirty)
        return -ENOMEM;
    loop->dirty = dirty;
    uint32_t *vacant = realloc(loop->free, count * sizeof(*vacant));
    if (!vacant)
        return -ENOMEM;
    loop->free = vacant;
    for (uint32_t i = count; i-- > loop->slot_count;) {
        slots[i] = (struct slot){.generation = 1};
        vacant[loop->free_count++] = i;
    }
    loop->slot_count = count;
    return 0;
}

static struct slot *watch_slot(struct loop *loop, const struct loop_watch *watch)
{
    return &loop->slots[(uint32_t)watch->tag - 1];
}

static uint64_t slot_tag(const struct loop *loop, const struct slot *slot)
{
    return ((uint64_t)slot->generation << 32) | (uint64_t)(slot - loop->slots + 1);
}

static void slot_mark(struct loop *loop, struct slot *slot)
{
    if (slot->dirty)
        return;
    slot->dirty = true;
    loop->dirty[loop->dirty_count++] = (uint32_t)(slot - loop->slots);
}

int loop_watch_set(struct loop *loop, struct loop_watch *watch, uint32_t events)
{
    events &= ~ARMED;
    if (watch->tag) {
        if (watch->events != events) {
            watch->events = events;
            slot_mark(loop, watch_slot(loop, watch));
        }
        return 0;
    }
    if (loop->free_count == 0) {
        int r = slots_grow(loop);
        if (r < 0)
            return r;
    }
    struct slot *slot = &loop->slots[loop->free[loop->free_count - 1]];
    watch->tag = slot_tag(loop, slot);
    watch->events = events;
    watch->armed = 0;
    int r = loop->backend->add(loop, watch);
    if (r < 0) {
        watch->tag = 0;
        return r;
    }
    loop->free_count--;
    slot->watch = watch;
    slot_mark(loop, slot);
    return 0;
}

void loop_watch_clear(struct loop *loop, struct loop_watch *watch)
{
    if (!watch->tag)
        return;
    struct slot *slot = watch_slot(loop, watch);
    loop->backend->remove(loop, slot);
    slot->watch = NULL;
    slot->generation++;
    slot_mark(loop, slot); // the slot is free again after the flush, when the kernel has been told
    watch->tag = 0;
    watch->armed = 0;
}

static void watches_flush(struct loop *loop)
{
    for (uint32_t i = 0; i < loop->dirty_count; i++) {
        struct slot *slot = &loop->slots[loop->dirty[i]];
        slot->dirty = false;
        loop->backend->flush(loop, slot);
        if (!slot->watch)
            loop->free[loop->free_count++] = loop->dirty[i];
    }
    loop->dirty_count = 0;
}

static struct loop_watch *watch_by_tag(struct loop *loop, uint64_t tag)
{
    uint32_t number = (uint32_t)tag;
    if (number == 0 || number > loop->slot_count)
        return NULL;
    struct slot *slot = &loop->slots[number - 1];
    return slot->generation == (uint32_t)(tag >> 32) ? slot->watch : NULL;
}

// -- Running --------------------------------------------------------------------------------------

static int64_t loop_patience(struct loop *loop)
{
    if (atomic_load(&loop->tasks) || atomic_load(&loop->stop))
        return 0;
    int64_t patience = FOREVER;
    if (loop->timer_count > 0) {
        uint64_t due = loop->heap[0]->due_ns;
        uint64_t now = util_now_ns();
        if (due <= now)
            return 0;
        patience = due - now > INT64_MAX ? INT64_MAX : (int64_t)(due - now);
    }
    // whoever posts from here on rings the bell; what was posted just before is seen by the second look
    atomic_store(&loop->sleeping, true);
    if (atomic_load(&loop->tasks) || atomic_load(&loop->stop)) {
        atomic_store(&loop->sleeping, false);
        return 0;
    }
    return patience;
}

void loop_run(struct loop *loop)
{
    // sendfile(2) to a closed socket has no MSG_NOSIGNAL
    sigset_t pipe;
    sigemptyset(&pipe);
    sigaddset(&pipe, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &pipe, NULL);

    atomic_store(&loop->runner, (uintptr_t)pthread_self());
    loop->backend->start(loop);
    while (!atomic_load(&loop->stop)) {
        watches_flush(loop);
        loop->backend->wait(loop, loop_patience(loop));
        timers_run(loop);
        tasks_run(loop);
    }
    tasks_run(loop);
    atomic_store(&loop->stop, false);
    atomic_store(&loop->runner, 0);
}

/* After the wait: nobody needs to ring any more. */
static void loop_awake(struct loop *loop)
{
    atomic_store(&loop->sleeping, false);
    loop->now = util_now_ns();
}

// -- io_uring -------------------------------------------------------------------------------------

#if P2PFS_HAVE_URING
static int uring_open(struct loop *loop)
{
    // The ring is opened on one thread and run on another, so it starts disabled and the runner becomes its issuer.
    static const unsigned flags[] = {
        IORING_SETUP_R_DISABLED | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
        IORING_SETUP_R_DISABLED | IORING_SETUP_COOP_TASKRUN,
        IORING_SETUP_R_DISABLED,
    };
    int r = -EINVAL;
    for (size_t i = 0; i < util_count(flags) && r == -EINVAL; i++) {
        struct io_uring_params params = {.flags = flags[i] | IORING_SETUP_CQSIZE,
                                         .cq_entries = CQ_SIZE};
        r = io_uring_queue_init_params(QUEUE_SIZE, &loop->ring, &params);
        // without these a wait with a timeout needs entries of its own, and completions could be lost
        unsigned needed = IORING_FEAT_EXT_ARG | IORING_FEAT_NODROP;
        if (r == 0 && (params.features & needed) != needed) {
            io_uring_queue_exit(&loop->ring);
            r = -ENOSYS;
        }
    }
    return r;
}

static void uring_close(struct loop *loop)
{
    io_uring_queue_exit(&loop->ring);
}

static void uring_start(struct loop *loop)
{
    if (loop->started)
        return;
    loop->started = true;
    // not io_uring_enable_rings(): liburing 2.3 declares it and does not export it
    if (syscall(SYS_io_uring_register, loop->ring.ring_fd, IORING_REGISTER_ENABLE_RINGS, NULL, 0) <
        0)
        log_error("io_uring cannot be enabled: %s (set P2PFS_NO_URING=1 to do without)",
                  strerror(errno));
}

static int uring_add(struct loop *loop, struct loop_watch *watch)
{
    (void)loop;
    (void)watch;
    return 0;
}

static void uring_remove(struct loop *loop, struct slot *slot)
{
    if (slot->watch->armed)
        slot->remove_tag = slot_tag(loop, slot);
}

static struct io_uring_sqe *uring_sqe(struct loop *loop)
{
    struct io_uring_sqe *sqe;
    while (!(sqe = io_uring_get_sqe(&loop->ring)))
        io_uring_submit(&loop->ring);
    return sqe;
}

static void uring_flush(struct loop *loop, struct slot *slot)
{
    struct loop_watch *watch = slot->watch;
    if (watch && watch->armed) {
        // Fewer events than the kernel watches for: what is not wanted is dropped when it comes.
        if ((watch->events & ~watch->armed) == 0)
            return;
        slot->remove_tag = watch->tag;
        slot->generation++;
        watch->tag = slot_tag(loop, slot);
        watch->armed = 0;
    }
    if (slot->remove_tag) {
        struct io_uring_sqe *sqe = uring_sqe(loop);
        io_uring_prep_poll_remove(sqe, slot->remove_tag);
        io_uring_sqe_set_data64(sqe, 0);
        slot->remove_tag = 0;
    }
    if (watch) {
        struct io_uring_sqe *sqe = uring_sqe(loop);
        io_uring_prep_poll_add(sqe, watch->fd, watch->events);
        io_uring_sqe_set_data64(sqe, watch->tag);
        watch->armed = ARMED | watch->events;
    }
}

static void uring_completed(struct loop *loop, uint64_t tag, int result)
{
    struct loop_watch *watch = watch_by_tag(loop, tag);
    if (!watch)
        return;
    watch->armed = 0; // one-shot: armed again with the next flush, which looks at the level anew
    slot_mark(loop, watch_slot(loop, watch));
    uint32_t events = result < 0 ? POLLERR : (uint32_t)result & (watch->events | ALWAYS);
    if (events)
        watch->ready(watch, events);
}

static void uring_wait(struct loop *loop, int64_t timeout_ns)
{
    struct io_uring_cqe *cqe;
    int r;
    if (timeout_ns == 0) {
        r = io_uring_submit_and_get_events(&loop->ring);
    } else {
        struct __kernel_timespec ts = {.tv_sec = timeout_ns / 1000000000,
                                       .tv_nsec = timeout_ns % 1000000000};
        r = io_uring_submit_and_wait_timeout(&loop->ring, &cqe, 1, timeout_ns < 0 ? NULL : &ts,
                                             NULL);
    }
    loop_awake(loop);
    if (r < 0 && r != -ETIME && r != -EINTR && r != -EAGAIN && r != -EBUSY) {
        log_error("io_uring wait: %s", strerror(-r));
        usleep(100000); // a ring that is broken for good must not take a core
    }
    unsigned head, seen = 0;
    io_uring_for_each_cqe(&loop->ring, head, cqe)
    {
        uring_completed(loop, io_uring_cqe_get_data64(cqe), cqe->res);
        if (++seen == BATCH)
            break;
    }
    io_uring_cq_advance(&loop->ring, seen);
}

static const struct backend backend_uring = {
    .name = "io_uring",
    .close = uring_close,
    .start = uring_start,
    .add = uring_add,
    .remove = uring_remove,
    .flush = uring_flush,
    .wait = uring_wait,
};
#endif

// -- epoll ----------------------------------------------------------------------------------------

static void epoll_close(struct loop *loop)
{
    close(loop->epoll);
}

static void epoll_start(struct loop *loop)
{
    (void)loop;
}

static int epoll_tell(struct loop *loop, int operation, struct loop_watch *watch)
{
    struct epoll_event event = {.events = watch->events, .data.u64 = watch->tag};
    if (epoll_ctl(loop->epoll, operation, watch->fd, &event) < 0)
        return -errno;
    watch->armed = ARMED | watch->events;
    return 0;
}

static int epoll_add(struct loop *loop, struct loop_watch *watch)
{
    return epoll_tell(loop, EPOLL_CTL_ADD, watch);
}

static void epoll_remove(struct loop *loop, struct slot *slot)
{
    epoll_ctl(loop->epoll, EPOLL_CTL_DEL, slot->watch->fd, NULL);
}

static void epoll_flush(struct loop *loop, struct slot *slot)
{
    struct loop_watch *watch = slot->watch;
    if (!watch || watch->armed == (ARMED | watch->events))
        return;
    int r = epoll_tell(loop, EPOLL_CTL_MOD, watch);
    if (r < 0)
        log_error("epoll: file descriptor %d: %s", watch->fd, strerror(-r));
}

static void epoll_wait_run(struct loop *loop, int64_t timeout_ns)
{
    struct epoll_event events[BATCH];
    int timeout_ms = -1;
    if (timeout_ns >= 0)
        timeout_ms =
            timeout_ns > 86400000000000 ? 86400000 : (int)((timeout_ns + 999999) / 1000000);
    int count = epoll_wait(loop->epoll, events, BATCH, timeout_ms);
    loop_awake(loop);
    for (int i = 0; i < count; i++) {
        struct loop_watch *watch = watch_by_tag(loop, events[i].data.u64);
        uint32_t seen = watch ? events[i].events & (watch->events | ALWAYS) : 0;
        if (seen)
            watch->ready(watch, seen);
    }
}

static const struct backend backend_epoll = {
    .name = "epoll",
    .close = epoll_close,
    .start = epoll_start,
    .add = epoll_add,
    .remove = epoll_remove,
    .flush = epoll_flush,
    .wait = epoll_wait_run,
};
