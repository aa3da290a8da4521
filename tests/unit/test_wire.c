/* Messages between peers: there and back, and everything that must be refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "engine/wire.h"
#include "meta/base/util.h"

static uint8_t bitmap[(WIRE_PONG + 300) / 8 + 64];
static uint8_t digests[WIRE_DIGESTS_MAX * MODEL_DIGEST_MAX];
static uint8_t shards[WIRE_HAVE_MAX * 4];
static uint8_t peers[WIRE_PEERS_MAX * WIRE_PEER_BYTES];

/* One good message of each type, with every field away from zero. */
static void samples_fill(struct wire_message m[WIRE_PONG + 1])
{
    memset(m, 0, (WIRE_PONG + 1) * sizeof(*m));
    for (size_t i = 0; i < sizeof(digests); i++)
        digests[i] = (uint8_t)(i * 13);
    memset(bitmap, 0xff, sizeof(bitmap));
    bitmap[37] = 0x0f; // 300 shards: 37 bytes and 4 bits
    for (uint32_t i = 0; i < WIRE_HAVE_MAX; i++)
        wire_have_put(shards, i, i * 1000003);

    m[WIRE_HELLO] = (struct wire_message){.protocol = WIRE_PROTOCOL,
                                          .node = "gpu-01:7070",
                                          .boot = 0x1122334455667788,
                                          .wanted_boot = 99,
                                          .has_secret = true,
                                          .nonce = {7, 8, 9}};
    m[WIRE_WELCOME] = (struct wire_message){
        .protocol = WIRE_PROTOCOL, .node = "n", .boot = 1, .nonce = {1}, .proof = {2}};
    m[WIRE_PROOF_MESSAGE] = (struct wire_message){.proof = {3, 4}};
    m[WIRE_ATTACH] = (struct wire_message){.handle = 5, .version = {.bytes = {1, 2, 3}}};
    m[WIRE_ATTACHED] = (struct wire_message){.handle = 5, .count = 300, .bitmap = bitmap};
    m[WIRE_DIGESTS] = (struct wire_message){
        .handle = 5, .first = 77, .count = WIRE_DIGESTS_MAX, .digest_size = 32, .digests = digests};
    m[WIRE_HAVE] = (struct wire_message){.handle = 5, .count = WIRE_HAVE_MAX, .shards = shards};
    m[WIRE_ASK] = (struct wire_message){
        .handle = 5, .request = 6, .shard = 70000, .urgent = true, .progress = 9};
    m[WIRE_GRANT] =
        (struct wire_message){.request = 6,
                              .length = 8 << 20,
                              .digest_size = 16,
                              .digests = digests,
                              .descriptor = {.bytes = {9, 9}, .length = TRANSPORT_DESCRIPTOR_MAX}};
    m[WIRE_BUSY] = (struct wire_message){
        .request = 6, .retry_ms = 250, .count = WIRE_ADVICE_MAX, .shards = shards};
    size_t peers_length = wire_peer_put(peers, 0, "gpu-02", 0x8877665544332211);
    peers_length = wire_peer_put(peers, peers_length, "n", 7);
    m[WIRE_PEERS] = (struct wire_message){
        .handle = 5, .count = 2, .peers = peers, .peers_length = peers_length};
    m[WIRE_GONE] = (struct wire_message){.handle = 5, .request = 0, .reason = WIRE_GONE_CHANGED};
    m[WIRE_DONE] = (struct wire_message){.request = 6};
    m[WIRE_DETACH] = (struct wire_message){.handle = 5};
    m[WIRE_PING] = (struct wire_message){.token = ~0ull};
    m[WIRE_PONG] = (struct wire_message){.token = 1};
    for (int t = WIRE_HELLO; t <= WIRE_PONG; t++)
        m[t].type = (enum wire_type)t;
}

static void check_bytes(const uint8_t *a, const uint8_t *b, size_t length)
{
    assert_true(length == 0 || (a && b));
    if (length > 0)
        assert_memory_equal(a, b, length);
}

static void check_equal(const struct wire_message *a, const struct wire_message *b)
{
    assert_int_equal(a->type, b->type);
    assert_int_equal(a->protocol, b->protocol);
    assert_string_equal(a->node, b->node);
    assert_true(a->boot == b->boot && a->wanted_boot == b->wanted_boot && a->token == b->token);
    assert_int_equal(a->has_secret, b->has_secret);
    assert_memory_equal(a->nonce, b->nonce, WIRE_NONCE);
    assert_memory_equal(a->proof, b->proof, WIRE_PROOF);
    assert_int_equal(a->handle, b->handle);
    assert_int_equal(a->request, b->request);
    assert_true(model_id_equal(&a->version, &b->version));
    assert_int_equal(a->complete, b->complete);
    assert_int_equal(a->count, b->count);
    assert_int_equal(a->first, b->first);
    assert_int_equal(a->digest_size, b->digest_size);
    assert_int_equal(a->shard, b->shard);
    assert_int_equal(a->urgent, b->urgent);
    assert_int_equal(a->progress, b->progress);
    assert_true(a->length == b->length);
    assert_int_equal(a->retry_ms, b->retry_ms);
    assert_int_equal(a->reason, b->reason);
    assert_memory_equal(&a->descriptor, &b->descriptor, sizeof(a->descriptor));
    if (a->type == WIRE_ATTACHED && !a->complete)
        check_bytes(a->bitmap, b->bitmap, (a->count + 7) / 8);
    if (a->type == WIRE_DIGESTS)
        check_bytes(a->digests, b->digests, (size_t)a->count * a->digest_size);
    if (a->type == WIRE_GRANT)
        check_bytes(a->digests, b->digests, a->digest_size);
    assert_true(a->peers_length == b->peers_length);
    check_bytes(a->peers, b->peers, a->peers_length);
    if (a->type == WIRE_HAVE || a->type == WIRE_BUSY)
        check_bytes(a->shards, b->shards, (size_t)a->count * 4);
}

static uint8_t bytes[TRANSPORT_MESSAGE_MAX + 16];

static void every_message_comes_back_as_it_went(void **state)
{
    struct wire_message m[WIRE_PONG + 1], back;
    samples_fill(m);
    for (int t = WIRE_HELLO; t <= WIRE_PONG; t++) {
        ssize_t n = wire_encode(&m[t], bytes, TRANSPORT_MESSAGE_MAX);
        assert_true(n > 0);
        assert_int_equal(wire_decode(bytes, (size_t)n, &back), 0);
        check_equal(&m[t], &back);
    }
    for (uint32_t i = 0; i < WIRE_HAVE_MAX; i++)
        assert_int_equal(wire_have_shard(&m[WIRE_HAVE], i), i * 1000003);

    char node[MODEL_NODE_MAX + 1];
    uint64_t boot;
    size_t at = wire_peer_get(&m[WIRE_PEERS], 0, node, &boot);
    assert_string_equal(node, "gpu-02");
    assert_true(boot == 0x8877665544332211);
    at = wire_peer_get(&m[WIRE_PEERS], at, node, &boot);
    assert_string_equal(node, "n");
    assert_int_equal(boot, 7);
    assert_int_equal(at, m[WIRE_PEERS].peers_length);
}

static void one_byte_less_or_more_is_refused(void **state)
{
    struct wire_message m[WIRE_PONG + 1], back;
    samples_fill(m);
    for (int t = WIRE_HELLO; t <= WIRE_PONG; t++) {
        size_t n = (size_t)wire_encode(&m[t], bytes, TRANSPORT_MESSAGE_MAX);
        bytes[n] = 0;
        assert_int_equal(wire_decode(bytes, n + 1, &back), -EBADMSG);
        for (size_t less = 0; less < n; less++) {
            uint8_t *exact = malloc(less + 1); // a sanitizer sees what reads beyond
            memcpy(exact, bytes, less);
            assert_int_equal(wire_decode(exact, less, &back), -EBADMSG);
            free(exact);
            if (n > 2000)
                less += 97;
        }
        assert_int_equal(wire_encode(&m[t], bytes, n - 1), -EMSGSIZE);
        assert_int_equal(wire_encode(&m[t], bytes, n), (ssize_t)n);
    }
}

static void unknown_types_are_refused(void **state)
{
    struct wire_message back, none = {.type = 0},
                              beyond = {.type = (enum wire_type)(WIRE_PONG + 1)};
    memset(bytes, 0, sizeof(bytes));
    for (int type = 0; type < 256; type++) {
        if (type >= WIRE_HELLO && type <= WIRE_PONG)
            continue;
        bytes[0] = (uint8_t)type;
        assert_int_equal(wire_decode(bytes, 9, &back), -EBADMSG);
    }
    assert_int_equal(wire_encode(&none, bytes, 100), -EMSGSIZE);
    assert_int_equal(wire_encode(&beyond, bytes, 100), -EMSGSIZE);
}

static void another_protocol_version_is_told_apart_from_garbage(void **state)
{
    struct wire_message m[WIRE_PONG + 1], back;
    samples_fill(m);
    static const enum wire_type opening[] = {WIRE_HELLO, WIRE_WELCOME};
    for (size_t i = 0; i < 2; i++) {
        struct wire_message *o = &m[opening[i]];
        o->protocol = WIRE_PROTOCOL + 1;
        size_t n = (size_t)wire_encode(o, bytes, sizeof(bytes));
        assert_int_equal(wire_decode(bytes, n, &back), -EPROTONOSUPPORT);
        assert_int_equal(back.protocol, WIRE_PROTOCOL + 1);
        // its other fields may be laid out in any way
        assert_int_equal(wire_decode(bytes, opening[i] == WIRE_HELLO ? 9 : 5, &back),
                         -EPROTONOSUPPORT);
    }
    m[WIRE_HELLO].protocol = WIRE_PROTOCOL + 1;
    size_t n = (size_t)wire_encode(&m[WIRE_HELLO], bytes, sizeof(bytes));
    bytes[1] ^= 1; // the magic
    assert_int_equal(wire_decode(bytes, n, &back), -EBADMSG);
}

/* Encodes, puts `value` into the byte at `at`, and expects refusal. */
static void refuse_byte(const struct wire_message *m, size_t at, uint8_t value)
{
    struct wire_message back;
    size_t n = (size_t)wire_encode(m, bytes, TRANSPORT_MESSAGE_MAX);
    assert_int_equal(wire_decode(bytes, n, &back), 0);
    assert_int_not_equal(bytes[at], value);
    bytes[at] = value;
    assert_int_equal(wire_decode(bytes, n, &back), -EBADMSG);
}

static void fields_out_of_bounds_are_refused(void **state)
{
    struct wire_message m[WIRE_PONG + 1];
    samples_fill(m);
    size_t hello_end = (size_t)wire_encode(&m[WIRE_HELLO], bytes, sizeof(bytes));
    refuse_byte(&m[WIRE_HELLO], hello_end - 1, 2); // a flag that is neither
    refuse_byte(&m[WIRE_HELLO], 9, '/');           // a node's name is checked
    refuse_byte(&m[WIRE_WELCOME], 5, 0);
    refuse_byte(&m[WIRE_ATTACHED], 5, 0x40);       // more shards than a version can have
    refuse_byte(&m[WIRE_ATTACHED], 9, 7);          // complete: neither
    refuse_byte(&m[WIRE_ATTACHED], 10 + 37, 0x1f); // a shard beyond the last
    refuse_byte(&m[WIRE_DIGESTS], 5, 0x80);        // first beyond all
    refuse_byte(&m[WIRE_DIGESTS], 12, 1);          // too many (1025)
    refuse_byte(&m[WIRE_DIGESTS], 13, 33);         // a digest that is too long
    refuse_byte(&m[WIRE_DIGESTS], 13, 0);
    refuse_byte(&m[WIRE_HAVE], 8, 1);   // too many (1025)
    refuse_byte(&m[WIRE_ASK], 8, 0);    // request 0
    refuse_byte(&m[WIRE_ASK], 9, 0xff); // shard
    refuse_byte(&m[WIRE_ASK], 13, 2);
    refuse_byte(&m[WIRE_ASK], 14, WIRE_PROGRESS_ALL + 1);
    refuse_byte(&m[WIRE_GRANT], 5, 1);   // a shard's length
    refuse_byte(&m[WIRE_GRANT], 10, 0);  // ... of 0
    refuse_byte(&m[WIRE_GRANT], 13, 15); // digest size
    refuse_byte(&m[WIRE_GRANT], 13 + 17, TRANSPORT_DESCRIPTOR_MAX + 1);
    refuse_byte(&m[WIRE_BUSY], 4, 0);
    refuse_byte(&m[WIRE_BUSY], 9, WIRE_ADVICE_MAX + 1);
    refuse_byte(&m[WIRE_PEERS], 5, WIRE_PEERS_MAX + 1);
    refuse_byte(&m[WIRE_PEERS], 8, '/'); // a node's name is checked
    refuse_byte(&m[WIRE_GONE], 9, 0);
    refuse_byte(&m[WIRE_GONE], 9, WIRE_GONE_ERROR + 1);
    refuse_byte(&m[WIRE_DONE], 4, 0);
}

static void what_would_not_decode_is_not_encoded(void **state)
{
    struct wire_message m[WIRE_PONG + 1];
    samples_fill(m);
    m[WIRE_DIGESTS].count = WIRE_DIGESTS_MAX + 1;
    assert_int_equal(wire_encode(&m[WIRE_DIGESTS], bytes, sizeof(bytes)), -EMSGSIZE);
    m[WIRE_HAVE].count = WIRE_HAVE_MAX + 1;
    assert_int_equal(wire_encode(&m[WIRE_HAVE], bytes, sizeof(bytes)), -EMSGSIZE);
    m[WIRE_BUSY].count = WIRE_ADVICE_MAX + 1;
    assert_int_equal(wire_encode(&m[WIRE_BUSY], bytes, sizeof(bytes)), -EMSGSIZE);
    m[WIRE_PEERS].count = WIRE_PEERS_MAX + 1;
    assert_int_equal(wire_encode(&m[WIRE_PEERS], bytes, sizeof(bytes)), -EMSGSIZE);
    m[WIRE_GRANT].descriptor.length = TRANSPORT_DESCRIPTOR_MAX + 1;
    assert_int_equal(wire_encode(&m[WIRE_GRANT], bytes, sizeof(bytes)), -EMSGSIZE);
    m[WIRE_ATTACHED].count = 1u << 20; // a bitmap of 128 KiB; the reader of it need not exist
    assert_int_equal(wire_encode(&m[WIRE_ATTACHED], bytes, sizeof(bytes)), -EMSGSIZE);
    m[WIRE_ATTACHED].complete = true; // no bitmap is needed
    assert_true(wire_encode(&m[WIRE_ATTACHED], bytes, sizeof(bytes)) > 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_message_comes_back_as_it_went),
        cmocka_unit_test(one_byte_less_or_more_is_refused),
        cmocka_unit_test(unknown_types_are_refused),
        cmocka_unit_test(another_protocol_version_is_told_apart_from_garbage),
        cmocka_unit_test(fields_out_of_bounds_are_refused),
        cmocka_unit_test(what_would_not_decode_is_not_encoded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
