/* Redis script: what the backend runs on the server, so that each step is atomic there.
 *
 * One Lua script with an operation as its first argument. Its keys and what it stores are described in
 * p2pfs-metadata(5); its answer is an array that begins with a word: "ok", "again", "noent", "stale", "format". */
#ifndef P2PFS_META_META_REDIS_SCRIPT_H
#define P2PFS_META_META_REDIS_SCRIPT_H

/* KEYS: state kv keys leases ttls leased feed: (the last one is a beginning: "feed:t" tells what changed below "t/").
 * ARGV: operation, epoch that a new store gets, then
 *   page PREFIX AFTER LIMIT                      -> ok epoch revision {key, "revision lease value", ...}
 *   poll GROUP REVISION LIMIT                    -> ok epoch revision ms-to-next-lease-end {{id, fields}, ...} | stale
 *   txn COUNT {condition key revision}... COUNT {action key value lease}...    -> ok revision | again | noent
 *   grant LEASE TTL, renew LEASE, revoke LEASE   -> ok | noent */
extern const char redis_script[];

#define REDIS_SCRIPT_KEYS 7
#define REDIS_FORMAT      "1"

#endif
