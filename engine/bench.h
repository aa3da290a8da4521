/* Bench: blocks that two processes move over one transport, timed: what a pull has under it, without metadata, upload
 * slots and digests.
 *
 * Each thread has a loop and a link of its own, and keeps batch_size blocks under way. A block takes the way of a shard:
 * the side that has it exposes it and sends the descriptor, the other side fetches it and says so, and the first takes
 * it back. In a write the initiator has it and the target fetches, since nothing writes into another node's memory.
 * Messages begin with {kind u8, verify u8, id u32, offset u64, length u32}; a grant's descriptor, or a done's status
 * (i32, an errno), follows. Errors: negative errno. */
#ifndef P2PFS_ENGINE_BENCH_H
#define P2PFS_ENGINE_BENCH_H

#include <stdbool.h>
#include <stdint.h>

#include "engine/transport.h"

#define BENCH_THREADS_MAX 256
#define BENCH_BATCH_MAX   4096
#define BENCH_BUCKETS     1024

struct bench_config {
    const struct transport_ops *transport;
    struct transport_config transport_config;
    const char *address; /* where the target listens ("host:port", port 0: any), or is */
    uint64_t buffer_size;
    unsigned threads;
    /* Of the initiator only. */
    uint32_t block_size;
    uint32_t batch_size;
    double seconds;
    bool write;
    bool verify; /* every byte, after it has landed */
};

/* A process that is read from and written to, until it is closed. NULL is harmless for close. */
struct bench_target;
int bench_target_open(const struct bench_config *config, struct bench_target **target);
const char *bench_target_address(const struct bench_target *target); /* as bound */
void bench_target_close(struct bench_target *target);

struct bench_result {
    double seconds;
    uint64_t batches;
    uint64_t blocks;
    uint64_t latencies[BENCH_BUCKETS]; /* blocks by the time from asking to landing */
    char reason[160];                  /* why it failed */
};
/* Blocking. A batch that was begun is ended. -EBADMSG: wrong bytes landed; -EINVAL: the threads' batches are more than
 * the buffer; else why the target could not be reached or was lost. */
int bench_run(const struct bench_config *config, struct bench_result *result);
/* The time in ns that a share (0 to 1) of the blocks did not exceed, within 6 percent; 0: there were none. */
uint64_t bench_latency(const struct bench_result *result, double share);

#endif
