#include "engine/turn.h"

#include <stddef.h>

#include "meta/base/util.h"

#define TURN_NEVER_NS (3600ull * 1000000000)

/* A dead item that is marked is still in that list: it goes one turn later. */
static void reap(struct turn *turn)
{
    struct turn_item *item = turn->dead;
    turn->dead = NULL;
    while (item) {
        struct turn_item *after = item->dead_next;
        if (item->marked) {
            item->dead_next = turn->dead;
            turn->dead = item;
        } else {
            turn->end(item);
        }
        item = after;
    }
}

static void due(struct loop_timer *timer)
{
    struct turn *turn = util_container(timer, struct turn, timer);
    loop_timer_set(turn->loop, timer, TURN_NEVER_NS); // first, while its place is sure to be there
    struct turn_item *marked = turn->marked;
    turn->marked = NULL;
    for (struct turn_item *item = marked, *after; item; item = after) {
        after = item->marked_next;
        item->marked = false;
        if (!item->dead)
            turn->run(item);
    }
    reap(turn);
}

int turn_open(struct turn *turn, struct loop *loop, void (*run)(struct turn_item *item),
              void (*end)(struct turn_item *item))
{
    *turn = (struct turn){.loop = loop, .timer.due = due, .run = run, .end = end};
    return loop_timer_set(loop, &turn->timer, TURN_NEVER_NS);
}

void turn_close(struct turn *turn)
{
    for (struct turn_item *item = turn->marked; item; item = item->marked_next)
        item->marked = false;
    turn->marked = NULL;
    reap(turn);
    loop_timer_clear(turn->loop, &turn->timer);
}

void turn_mark(struct turn *turn, struct turn_item *item)
{
    if (item->marked || item->dead)
        return;
    item->marked = true;
    item->marked_next = turn->marked;
    turn->marked = item;
    loop_timer_set(turn->loop, &turn->timer, 0);
}

void turn_bury(struct turn *turn, struct turn_item *item)
{
    item->dead = true;
    item->dead_next = turn->dead;
    turn->dead = item;
    loop_timer_set(turn->loop, &turn->timer, 0);
}
