/* Notice: tells the kernel to forget pages and names. Always later and from a thread of its own,
 * because the kernel may make a notice wait for requests of this mount. Lost notices harm
 * nobody: they only save memory or half a second. */
#ifndef P2PFS_FS_NOTICE_H
#define P2PFS_FS_NOTICE_H

#include "fs/house.h"
#include "fs/inode.h"

void notice_inode(struct house *house, struct inode *inode); /* its pages */
void notice_gone(struct house *house, uint64_t parent, const char *name);
void notice_stale(struct house *house, uint64_t parent,
                  const char *name); /* another node changed it */
void notice_nothing(void *arg, int status,
                    const struct model_entry *entry); /* a catalog_done for nobody */

#endif
