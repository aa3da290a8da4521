/* Session: the FUSE session: its operations, what is agreed with the kernel, and the loop that
 * serves. */
#ifndef P2PFS_FS_SESSION_H
#define P2PFS_FS_SESSION_H

#include "fs/house.h"

/* Makes the session and mounts. *error: one sentence with the remedy (malloc'd). */
int session_open(struct house *house, char **error);
/* Serves until the mount is unmounted or a signal (TERM, INT, HUP) asks to end. Negative errno:
 * the kernel broke it. */
int session_serve(struct house *house);
/* Takes the mount away where it still stands; whoever waits for a request gets an error. Others
 * may still answer. */
void session_unmount(struct house *house);
/* Closes the device and frees the session; nobody answers any more. No session is harmless. */
void session_close(struct house *house);

#endif
