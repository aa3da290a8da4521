/* Closer: who closes a file, and whether anybody else still has it open for writing.
 *
 * FUSE tells every close (FLUSH), but not whether it was the last one of an open file
 * description, which may have been duplicated and inherited; and RELEASE, which tells, is waited
 * for by nobody, so no error can come back from it. So /proc is asked when a writable file is
 * closed. Nothing here touches the mount itself. Any thread. */
#ifndef P2PFS_FS_CLOSER_H
#define P2PFS_FS_CLOSER_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

enum closer_verdict {
    CLOSER_LAST,   /* nobody else has it */
    CLOSER_SHARED, /* somebody has; or that cannot be told */
    CLOSER_MAPPED, /* only a writable shared mapping of the closing process is left */
    CLOSER_KILLED, /* nobody else has it, and the process ends by a signal or a failure */
};

/* The process (thread group) of a thread; 0: it is gone or in another pid namespace. */
pid_t closer_process(pid_t thread);

/* thread: who closes, as FUSE says; opener: the process that opened it; inode: st_ino of the
 * file; mappable: it was opened for reading and writing. *status: of an ending process, as of
 * wait(2). */
enum closer_verdict closer_examine(pid_t thread, pid_t opener, uint64_t inode, bool mappable,
                                   int *status);
/* Whether a process is ending by a signal or with a failure, now. */
bool closer_killed(pid_t process, int *status);

#endif
