/* Extents: ranges of the calling program's memory, one behind the other, as the bytes of a replica.
 *
 * The memory stays the program's. Whoever touches it from a thread that the owner cannot wait for by itself does so
 * between extents_enter and extents_leave; a lane's thread need not, for the owner sends every lane a message and
 * counts as entered until the answer. When the owner has ended the extents and the last one has left, `released` runs
 * once: from then on nothing reads or writes the memory. Any thread. */
#ifndef P2PFS_ENGINE_EXTENTS_H
#define P2PFS_ENGINE_EXTENTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

struct engine_range;
struct extents;

/* Copies the list; the owner has entered. -ENOMEM. */
int extents_new(const struct engine_range *ranges, size_t count, void (*released)(void *arg),
                void *arg, struct extents **extents);
/* Once it has ended, its users may still leave it afterwards; never calls released itself. NULL is harmless. */
void extents_free(struct extents *extents);
uint64_t extents_size(const struct extents *extents);

bool extents_enter(struct extents *extents); /* false: it has ended */
void extents_leave(struct extents *extents);
/* Nobody enters any more; adds `more` who have to leave, besides the owner. */
void extents_end(struct extents *extents, unsigned more);

/* The address of [offset, offset + length) where it lies in one range, or NULL. */
uint8_t *extents_at(const struct extents *extents, uint64_t offset, uint64_t length);
/* Its pieces, where it does not; malloc'd, or NULL: no memory. */
struct iovec *extents_pieces(const struct extents *extents, uint64_t offset, uint64_t length,
                             size_t *count);
/* Copies out of the memory, through the kernel, so that memory which is not there any more is an error, not a crash.
 * -EFAULT. */
int extents_read(const struct extents *extents, uint64_t offset, size_t length, void *out);
/* Copies into it. The caller has seen to it that it is there (extents_check). */
void extents_write(const struct extents *extents, uint64_t offset, size_t length, const void *in);

/* Whether every byte of the ranges is mapped readable (and writable), as /proc/self/maps has it now. 0; -EFAULT, with
 * the first bad range in *bad; else errors of reading that file. */
int extents_check(const struct engine_range *ranges, size_t count, bool writable, size_t *bad);
/* Whether two of the ranges overlap, or one wraps around the end of the address space: -EINVAL, with one such range in
 * *bad. -ENOMEM. */
int extents_check_apart(const struct engine_range *ranges, size_t count, size_t *bad);
/* Whether the extents have a byte in common with the ranges. */
bool extents_overlap(const struct extents *extents, const struct engine_range *ranges,
                     size_t count);

#endif
