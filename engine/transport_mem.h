/* Transport_mem: the transport inside one process, for tests: the same contract, with faults on demand.
 *
 * Addresses are any text; "host:0" gets a number. Faults apply to all links of the process from the call on; they are
 * atomic to set from any thread. */
#ifndef P2PFS_ENGINE_TRANSPORT_MEM_H
#define P2PFS_ENGINE_TRANSPORT_MEM_H

#include <stdint.h>

struct transport_mem_faults {
    uint32_t delay_ms; /* every message and piece of a shard comes so much later */
    uint32_t
        lose_message_each; /* every n-th message is lost with its link (down on both sides); 0: none */
    uint32_t short_fetch_each; /* every n-th fetch ends with -EIO after half of its bytes */
    uint32_t flip_fetch_each;  /* every n-th fetch lands with one bit flipped */
    uint32_t
        refuse_submit_each; /* every n-th send, expose or fetch returns -ENOMEM and never starts */
    uint32_t full_queue_each;  /* every n-th send returns -EAGAIN, `writable` follows */
    uint32_t stall_fetch_each; /* every n-th fetch never lands */
};
void transport_mem_faults_set(const struct transport_mem_faults *faults); /* NULL: none */

#endif
