/* Wire: the messages between two peers, encoded by hand into big-endian bytes.
 *
 * Roles on a link: the PULLER connected, the HOLDER accepted. A pulling node that also serves has links of both kinds.
 * Sequence: HELLO -> WELCOME -> PROOF (both sides know now that the other has the cluster secret, and which
 * incarnation of which node it is), then any of the rest. Anything else before PROOF, an unknown type, a trailing byte
 * or a field out of bounds ends the link.
 *
 *   puller                              holder
 *   HELLO   magic, protocol, node, boot, boot wanted, nonce, has_secret
 *                                       WELCOME  protocol, node, boot, nonce, proof
 *   PROOF   proof
 *   ATTACH  handle, version             ATTACHED handle, count, complete, bitmap of present shards
 *                                       DIGESTS  handle, first, digests...      (as far as known; more follow)
 *                                       HAVE     handle, shards...              (as they land there)
 *   ASK     handle, request, shard, urgent, progress
 *                                       GRANT    request, length, digest, descriptor
 *                                       BUSY     request, retry_ms, shards...   (what to ask for instead, if any)
 *                                       GONE     handle, request, reason        (request 0: the whole version)
 *                                       PEERS    handle, {node, boot}...        (who else pulls or holds the version)
 *   DONE    request                     (landed and verified, or given up: the holder lets go of the bytes)
 *   DETACH  handle
 *   PING    token                       PONG     token                          (either side)
 *
 * handle: chosen by the puller, names an attached version on this link. request: chosen by the puller, unique among
 * its open requests on the link, never 0; it is also the transport's fetch id. PEERS names nodes, not addresses: those
 * are taken from the metadata, so that nobody can be sent to a stranger.
 * Encoders: the message's length, or -EMSGSIZE. Decoders: 0, -EBADMSG, -EPROTONOSUPPORT (HELLO and WELCOME of another
 * protocol version; `protocol` is then set). Pointers in a decoded message borrow from the buffer. Any thread. */
#ifndef P2PFS_ENGINE_WIRE_H
#define P2PFS_ENGINE_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "engine/transport.h"
#include "meta/model.h"

#define WIRE_MAGIC        0x70327066u /* "p2pf" */
#define WIRE_PROTOCOL     1
#define WIRE_NONCE        32
#define WIRE_PROOF        32
#define WIRE_SHARDS_MAX   524160 /* shards of a version: their bitmap fits into one ATTACHED */
#define WIRE_HAVE_MAX     1024   /* shards in one HAVE */
#define WIRE_DIGESTS_MAX  1024   /* digests in one DIGESTS */
#define WIRE_ADVICE_MAX   16     /* shards in one BUSY */
#define WIRE_PROGRESS_ALL 64
#define WIRE_PEERS_MAX    16 /* nodes in one PEERS */

enum wire_type {
    WIRE_HELLO = 1,
    WIRE_WELCOME,
    WIRE_PROOF_MESSAGE,
    WIRE_ATTACH,
    WIRE_ATTACHED,
    WIRE_DIGESTS,
    WIRE_HAVE,
    WIRE_ASK,
    WIRE_GRANT,
    WIRE_BUSY,
    WIRE_GONE,
    WIRE_PEERS,
    WIRE_DONE,
    WIRE_DETACH,
    WIRE_PING,
    WIRE_PONG,
};

enum wire_reason {                        /* in GONE */
                   WIRE_GONE_EVICTED = 1, /* this node does not have it (any more) */
                   WIRE_GONE_CHANGED, /* registered in place, and the local file is not what it was */
                   WIRE_GONE_SHARD,   /* this shard is not here yet */
                   WIRE_GONE_ERROR,   /* reading it failed here */
};

struct wire_message {
    enum wire_type type;
    uint16_t protocol;             /* HELLO, WELCOME */
    char node[MODEL_NODE_MAX + 1]; /* HELLO, WELCOME: the sender */
    uint64_t boot;                 /* HELLO, WELCOME: the sender's incarnation */
    uint64_t wanted_boot;          /* HELLO: the incarnation that is meant, 0: any */
    bool has_secret;               /* HELLO */
    uint8_t nonce[WIRE_NONCE];     /* HELLO, WELCOME */
    uint8_t proof[WIRE_PROOF];     /* WELCOME, PROOF; zeros without a secret */
    uint32_t handle;
    uint32_t request;
    struct model_id version; /* ATTACH */
    bool complete;           /* ATTACHED */
    uint32_t count; /* ATTACHED: shards of the version; DIGESTS, HAVE, BUSY, PEERS: items */
    const uint8_t
        *bitmap;    /* ATTACHED, not complete: (count + 7) / 8 bytes, bit k % 8 of byte k / 8 */
    uint32_t first; /* DIGESTS */
    uint8_t digest_size;    /* DIGESTS, GRANT */
    const uint8_t *digests; /* DIGESTS: count * digest_size bytes; GRANT: one, or digest_size 0 */
    const uint8_t *shards;  /* HAVE, BUSY: count big-endian u32 */
    const uint8_t *peers;   /* PEERS: count entries, read by wire_peer_get */
    size_t peers_length;
    uint32_t shard;   /* ASK */
    bool urgent;      /* ASK */
    uint8_t progress; /* ASK: how much of the version the puller has, 0 to WIRE_PROGRESS_ALL */
    uint64_t length;  /* GRANT */
    struct transport_descriptor descriptor; /* GRANT */
    uint32_t retry_ms;                      /* BUSY */
    enum wire_reason reason;                /* GONE */
    uint64_t token;                         /* PING, PONG */
};

ssize_t wire_encode(const struct wire_message *message, void *out, size_t size);
int wire_decode(const void *bytes, size_t length, struct wire_message *out);
uint32_t wire_have_shard(const struct wire_message *message, uint32_t index);
void wire_have_put(uint8_t *shards, uint32_t index, uint32_t shard);
/* An entry of PEERS at `at` bytes (0: the first) into or out of `peers`; returns where the next one begins. */
#define WIRE_PEER_BYTES (MODEL_NODE_MAX + 10) /* of the longest */
size_t wire_peer_put(uint8_t *peers, size_t at, const char *node, uint64_t boot);
size_t wire_peer_get(const struct wire_message *message, size_t at, char node[MODEL_NODE_MAX + 1],
                     uint64_t *boot);

#endif
