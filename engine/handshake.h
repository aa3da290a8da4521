/* Handshake: the mutual challenge-response with which two nodes prove that they have the cluster secret.
 *
 * proof = HMAC-SHA-256(secret, label | nonce of the puller | nonce of the holder | puller's node, boot | holder's node,
 * boot), with the label "p2pfs holder 1" for the holder's proof (in WELCOME) and "p2pfs puller 1" for the puller's: both
 * nonces are fresh, the labels differ so that no proof can be reflected, and both identities are bound. Without a
 * secret the proofs are zeros and a side that has one ends the link. Any thread; values only. */
#ifndef P2PFS_ENGINE_HANDSHAKE_H
#define P2PFS_ENGINE_HANDSHAKE_H

#include <stdbool.h>

#include "engine/wire.h"

#define HANDSHAKE_SECRET_MAX 4096

struct handshake_secret {
    uint8_t bytes[HANDSHAKE_SECRET_MAX];
    size_t length; /* 0: none */
};
/* Reads a secret file: trailing newlines are dropped; at least 16 bytes. -EPERM: group or others may read or write it
 * (remedy: chmod 600); -EINVAL: too short or too long; else as open(2). Logs nothing. */
int handshake_secret_read(const char *path, struct handshake_secret *secret);
void handshake_secret_wipe(struct handshake_secret *secret);

struct handshake_side {
    const char *node;
    uint64_t boot;
    const uint8_t *nonce; /* WIRE_NONCE bytes */
};
void handshake_prove_holder(const struct handshake_secret *secret,
                            const struct handshake_side *puller,
                            const struct handshake_side *holder, uint8_t proof[WIRE_PROOF]);
void handshake_prove_puller(const struct handshake_secret *secret,
                            const struct handshake_side *puller,
                            const struct handshake_side *holder, uint8_t proof[WIRE_PROOF]);
/* Constant-time. */
bool handshake_equal(const uint8_t a[WIRE_PROOF], const uint8_t b[WIRE_PROOF]);

#endif
