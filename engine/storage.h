/* Storage: where replicas' bytes lie: unnamed files, one each, on a tmpfs of our own that nothing else can see.
 *
 * A detached tmpfs (fsopen, huge=within_size, noswap, size = the cache limit) gives huge pages without touching the
 * machine's settings; where the kernel or the privilege is missing, memfd; with a directory, O_TMPFILE files there.
 * Any thread. Errors: negative errno. */
#ifndef P2PFS_ENGINE_STORAGE_H
#define P2PFS_ENGINE_STORAGE_H

#include <stddef.h>
#include <stdint.h>

#define STORAGE_HUGE (2ull << 20) /* a huge page */

struct storage;

/* limit: bytes that all files together may take; 0: there will be none. dir: NULL or a directory. `error` as in engine_open. */
int storage_open(uint64_t limit, const char *dir, struct storage **storage, char **error);
void storage_close(struct storage *storage); /* files that are open live on */
/* Files that are made from now on take memory of this NUMA node while it has some. -EOPNOTSUPP: no tmpfs. */
int storage_prefer(struct storage *storage, int node);
int storage_node(const struct storage *storage);         /* that node; -1: none */
const char *storage_kind(const struct storage *storage); /* "huge tmpfs", "memfd" or "cache_dir" */
const char *storage_why(const struct storage *storage);  /* why not huge tmpfs, or "" */

/* An empty unnamed file; the caller closes it. `name` is for /proc only. */
int storage_file(struct storage *storage, const char *name);
/* A file of `size` bytes for bytes that will all be written before they are read: a spare one when there is one, so
 * that its pages need not be cleared again; what it holds until then is somebody else's. The caller closes it. */
int storage_file_dirty(struct storage *storage, const char *name, uint64_t size);
/* An empty unnamed file that is written without this process: on a second tmpfs, whose size is all that stops such a
 * writer, so that it takes no room that others were promised. -EOPNOTSUPP: no tmpfs. */
int storage_file_direct(struct storage *storage);
/* Gives back what lies in its last huge page behind its `size` bytes. */
void storage_direct_fit(int fd, uint64_t size);
/* How often that tmpfs was found full, this look included: another number than before means that a write may have
 * failed unseen. Who makes room there looks first. */
unsigned storage_direct_fills(struct storage *storage);
/* Takes a file that nobody maps, reads or sends from any more, as a spare for the next; small ones, and what would be
 * too much, are closed. Never a file whose descriptor has left this process. */
void storage_give_back(struct storage *storage, int fd, uint64_t size);
/* Closes spares until they take at most `keep` bytes, and those of files that have waited for STORAGE_SPARE_MS. */
#define STORAGE_SPARE_MS 10000
void storage_trim(struct storage *storage, uint64_t keep);
/* The reserve: spares of these sizes that nobody has used yet, whose pages a thread of its own clears while cores have
 * nothing else to do (SCHED_IDLE), in steps of a huge page. Whatever asks for a file here makes it pause; calling this
 * again makes it go on. What is of other sizes is closed; count 0: all of it. At most STORAGE_RESERVE_FILES, each at
 * least STORAGE_SPARE_MIN. */
#define STORAGE_RESERVE_FILES 4
#define STORAGE_SPARE_MIN     (64ull << 20) /* below, clearing costs less than the bookkeeping */
#define STORAGE_SPARE_MAX     (4ull << 30)  /* all spares together */
void storage_reserve(struct storage *storage, const uint64_t *sizes, size_t count);
void storage_reserve_pause(struct storage *storage);
uint64_t storage_reserved(struct storage *storage); /* bytes that are cleared */
/* Bytes of shared memory that this process maps by huge pages: its replicas. Reads /proc. */
uint64_t storage_huge(void);
/* What a file of `size` bytes takes. */
uint64_t storage_charge(uint64_t size);
/* Maps a file of `size` bytes read-write and shared, at an address that huge pages can serve. */
int storage_map(int fd, uint64_t size, uint8_t **map);
void storage_unmap(uint8_t *map, uint64_t size);
/* Gives a range its pages before somebody writes there. Failure is harmless but for -ENOSPC and -ENOMEM, which a later
 * write would meet as SIGBUS. */
int storage_populate(uint8_t *at, uint64_t length);

#endif
