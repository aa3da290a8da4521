/* Hold: opens of files that are still arriving, answered only when all is here (open=).
 *
 * An open that finds the file complete is read through (through.h): at the speed of memory, from the replica's own
 * pages. One that comes before is answered by this process, through the page cache, for as long as the file or a mapping
 * of it is open. So it pays to wait with the answer, when the rest arrives faster than the page cache could take it.
 *
 *   open=stream   never waits
 *   open=wait     always waits, for as long as the pull makes progress
 *   open=auto     waits when a process opens the file again whose begin is here: so do safetensors, torch and llama.cpp,
 *                 which read the header, and then open the file once more and map it. It waits only while the pull is
 *                 fast enough (HOLD_RATE), and half a second at the most. The first open never waits, so who reads
 *                 headers is not held up. Never with fetch=demand, nor where nothing is read through.
 *
 * Any thread. */
#ifndef P2PFS_FS_HOLD_H
#define P2PFS_FS_HOLD_H

#include <fuse_lowlevel.h>

#include "fs/house.h"

struct holds;
struct handle;

int holds_open(struct holds **holds);  /* -ENOMEM */
void holds_close(struct holds *holds); /* NULL is harmless */

/* True: the answer comes later. */
bool hold_open(fuse_req_t req, struct house *house, struct handle *handle,
               const struct fuse_file_info *fi);

#endif
