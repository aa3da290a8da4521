/* Mailbox: items that any thread hands to the owner of a loop, safe against the owner's end.
 *
 * Unlike loop_post, a mailbox may be closed while its loop runs on and others still post: what is posted to a closed
 * mailbox is disposed of at once. Whoever posts holds a reference. */
#ifndef P2PFS_ENGINE_MAILBOX_H
#define P2PFS_ENGINE_MAILBOX_H

#include "engine/loop.h"

struct mailbox;

/* Owned by the poster until run. `run` gets the owner's arg, on the loop's thread; or NULL when the mailbox is closed,
 * on any thread: then it only frees what it holds. */
struct mailbox_item {
    void (*run)(struct mailbox_item *item, void *arg);
    struct mailbox_item *next; /* the mailbox's */
};

int mailbox_open(struct loop *loop, void *arg,
                 struct mailbox **box); /* 0, -ENOMEM, -EMFILE; one reference */
/* On the loop's thread (not inside an item), or when the loop does not run: disposes of what is left and drops the
 * owner's reference. NULL is harmless. */
void mailbox_close(struct mailbox *box);
struct mailbox *mailbox_ref(struct mailbox *box); /* any thread */
void mailbox_unref(struct mailbox *box);          /* any thread; NULL is harmless */
void mailbox_post(struct mailbox *box, struct mailbox_item *item); /* any thread; order is kept */

#endif
