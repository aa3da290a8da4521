/* Turn: what calls left to do for the loop's next turn, link by link, and links that are freed behind it.
 *
 * A transport promises that no event runs inside the call that causes it, and that a link may be shut inside every
 * event: so calls only mark, and who is shut stays in memory until nothing of it is on the stack any more. On the
 * loop's thread only. */
#ifndef P2PFS_ENGINE_TURN_H
#define P2PFS_ENGINE_TURN_H

#include "engine/loop.h"

/* Part of a link; zero it first. */
struct turn_item {
    bool dead; /* buried */
    bool marked;
    struct turn_item *marked_next, *dead_next;
};

struct turn {
    struct loop *loop;
    struct loop_timer timer; /* always set, so that moving it cannot fail */
    struct turn_item *marked, *dead;
    void (*run)(struct turn_item *item); /* once for each that was marked; not for the dead */
    void (*end)(struct turn_item *item); /* frees it */
};

int turn_open(struct turn *turn, struct loop *loop, void (*run)(struct turn_item *item),
              void (*end)(struct turn_item *item)); /* 0, -ENOMEM */
/* All items are buried before. */
void turn_close(struct turn *turn);
void turn_mark(struct turn *turn, struct turn_item *item);
void turn_bury(struct turn *turn, struct turn_item *item); /* it is run no more, and ended soon */

#endif
