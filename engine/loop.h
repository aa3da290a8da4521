/* Loop: one thread's event loop: file descriptors, timers and tasks posted by other threads.
 *
 * io_uring where the kernel lets this process have it, epoll otherwise (containers often forbid io_uring); callers
 * see no difference. Only loop.c knows either. Everything runs on the thread that is in loop_run, but for loop_post
 * and loop_stop, which any thread may call. Callbacks may set, clear and free their own watch or timer. Zero watches
 * and timers before they are first set. */
#ifndef P2PFS_ENGINE_LOOP_H
#define P2PFS_ENGINE_LOOP_H

#include <stdbool.h>
#include <stdint.h>

struct loop;

/* Owned by the caller; must stay where it is while set. events as in poll(2): POLLIN, POLLOUT; POLLERR and POLLHUP are
 * always reported. Level-triggered. */
struct loop_watch {
    int fd;
    void (*ready)(struct loop_watch *watch, uint32_t events);
    uint32_t events; /* the rest is the loop's */
    uint32_t armed;
    uint64_t tag;
};

struct loop_timer {
    void (*due)(struct loop_timer *timer);
    uint64_t due_ns; /* the rest is the loop's; CLOCK_MONOTONIC, 0: not set */
    uint32_t slot;
};

/* Owned by the poster until run; run once, then never touched again (it may free itself in `run`). */
struct loop_task {
    void (*run)(struct loop_task *task);
    struct loop_task *next; /* the loop's */
};

int loop_open(struct loop **loop); /* 0, -ENOMEM, -EMFILE */
void loop_close(
    struct loop *loop); /* after loop_run has returned; runs no more tasks; NULL is harmless */
/* Runs until loop_stop; tasks that were posted before loop_stop still run. May run again, on the same thread. Blocks
 * SIGPIPE for the thread: sendfile(2) has no other way to keep a closed socket from ending the process. */
void loop_run(struct loop *loop);
void loop_stop(struct loop *loop);
void loop_post(struct loop *loop, struct loop_task *task);
/* True on the thread that is in loop_run (or on any thread before it runs). */
bool loop_here(const struct loop *loop);
uint64_t loop_now_ns(const struct loop *loop); /* CLOCK_MONOTONIC as of this turn */

/* Sets what to wait for; again for another set. 0, -ENOMEM. */
int loop_watch_set(struct loop *loop, struct loop_watch *watch, uint32_t events);
/* Ends it: after return `ready` is not called any more and the watch may be freed (also inside its own callback). */
void loop_watch_clear(struct loop *loop, struct loop_watch *watch);
int loop_timer_set(struct loop *loop, struct loop_timer *timer,
                   uint64_t delay_ns); /* again: moves it. 0, -ENOMEM */
void loop_timer_clear(struct loop *loop, struct loop_timer *timer);
bool loop_is_uring(const struct loop *loop);

#endif
