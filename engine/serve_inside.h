/* Serve_inside: what the files of serve share: a session, the versions that its peer follows, its grants. Lane thread
 * only; what lies in the replica is guarded by its lock, slots by the engine's. */
#ifndef P2PFS_ENGINE_SERVE_INSIDE_H
#define P2PFS_ENGINE_SERVE_INSIDE_H

#include "engine/lent.h"
#include "engine/peers.h"
#include "engine/serve.h"
#include "engine/slots.h"
#include "engine/wire.h"

#define SERVE_BUSY_MS 20

enum session_state { SESSION_NEW, SESSION_GREETED, SESSION_READY };

/* A version that the peer follows. */
struct follow {
    uint32_t handle;
    struct replica *replica; /* with a reference, counted in users */
    bool directed; /* it was complete here: each shard is handed out once before one is repeated */
    uint8_t *told; /* bitmap of what the peer knows that we have */
    unsigned told_changes;
    bool told_digests;
    uint64_t referred_ms; /* when it was last told of others */
    UT_hash_handle hh;
};

/* An ask, from when it comes until it is answered for good: it waits for a slot, an in-place shard is prepared, its
 * bytes are exposed until the peer says DONE. */
struct grant {
    uint32_t request;
    uint32_t shard;
    uint64_t
        serial; /* a puller may use a request's number again, also while an older one is prepared */
    struct replica *replica; /* with a reference, counted in grants once exposed */
    struct slots_ask ask;    /* engine->slots_lock */
    struct session *session;
    uint64_t since_ns; /* exposed */
    uint64_t gone_ns;  /* its peer was told to let go; 0: not */
    uint64_t length;
    struct lent_place place; /* of the bytes */
    bool exposed;  /* false: waits, or an in-place shard is being looked at by a work thread */
    bool sent;     /* all of it has been handed to the network */
    bool promised; /* it stands in the version's book */
    bool paced;    /* it waits for the limit of uploads, in which `ticket` is its place */
    struct bucket_ticket ticket;
    UT_hash_handle hh;
};

struct session {
    struct lane *lane;
    struct link *link;
    uint64_t serial; /* finds it again after a detour over another thread */
    enum session_state state;
    bool welcome_owed; /* the queue was full */
    bool broken;       /* is of no use: the next tick ends it */
    uint64_t since_ns;
    struct peer *peer;
    char node[MODEL_NODE_MAX + 1];
    uint64_t boot;
    uint32_t mark; /* tells it apart in the books of versions */
    uint8_t nonce_puller[WIRE_NONCE];
    uint8_t nonce_holder[WIRE_NONCE];
    struct follow *follows;  /* uthash by handle */
    struct grant *grants;    /* uthash by request */
    struct slots_peer slots; /* engine->slots_lock */
    struct session *prev, *next;
};

int serve_send(struct session *s, const struct wire_message *message);
void serve_refuse(struct session *s, const char *reason); /* ends the session */
struct session *serve_find(struct lane *lane, uint64_t serial);

/* serve_follow.c */
void follow_attach(struct session *s, const struct wire_message *message);
void follow_detach(struct session *s, uint32_t handle);
void follow_end(struct session *s, struct follow *follow);
void follow_news(struct session *s, struct follow *follow);
/* Names others who pull the version, unless it has just been told. */
void follow_refer(struct session *s, struct follow *follow);
void follow_user_end(struct lane *lane, struct replica *replica);

/* serve_grant.c */
void grant_ask(struct session *s, const struct wire_message *message);
void grant_done(struct session *s, uint32_t request);
/* done: the peer has said that it does not read any more. Its slot is free, until grant_dispatch gives it on. */
void grant_end(struct session *s, struct grant *grant, bool done);
/* Takes it back; from a peer that reads by itself only after it had time to let go (SERVE_FENCE_NS). */
void grant_revoke(struct session *s, struct grant *grant);
/* What waited for the limit of uploads may have its turn. */
void grant_pace(struct session *s, struct grant *grant);
/* A grant that no longer counts, or waits behind one: what was promised to its peer is free for others. */
void grant_overdue(struct session *s, struct grant *grant);
/* Free slots go on to whoever waits, on whichever lane. Outside of every loop over grants and sessions. */
void grant_dispatch(struct lane *lane);
void grant_gone_send(struct session *s, uint32_t handle, uint32_t request, enum wire_reason reason);

#endif
