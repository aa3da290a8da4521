/* Bounce: memory for shards that lie in several ranges of a program's memory, while they travel.
 *
 * Buffers are used again while others are out, since fresh pages cost more than the copy; when the last one comes back,
 * all of it goes back to the machine. Any thread. */
#ifndef P2PFS_ENGINE_BOUNCE_H
#define P2PFS_ENGINE_BOUNCE_H

#include <stdint.h>

struct bounce;

int bounce_open(struct bounce **bounce);  /* -ENOMEM */
void bounce_close(struct bounce *bounce); /* every buffer has come back */
/* At least `size` bytes, with what was there before; NULL: no memory. */
uint8_t *bounce_take(struct bounce *bounce, uint64_t size);
void bounce_give(struct bounce *bounce, uint8_t *buffer); /* NULL is harmless */

#endif
