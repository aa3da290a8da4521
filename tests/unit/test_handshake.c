/* The challenge-response, and the file that holds the secret. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/handshake.h"
#include "meta/base/util.h"

static const uint8_t nonce_a[WIRE_NONCE] = {1, 2, 3}, nonce_b[WIRE_NONCE] = {4, 5, 6};
static const struct handshake_side node_a = {.node = "a", .boot = 11, .nonce = nonce_a};
static const struct handshake_side node_b = {.node = "b", .boot = 22, .nonce = nonce_b};

static struct handshake_secret secret_of(const char *text)
{
    struct handshake_secret s = {.length = strlen(text)};
    memcpy(s.bytes, text, s.length);
    return s;
}

static void a_proof_is_the_hmac_that_the_header_describes(void **state)
{
    struct handshake_secret s = secret_of("0123456789abcdef");
    uint8_t proof[WIRE_PROOF];
    char hex[2 * WIRE_PROOF + 1];
    // from python3: hmac.new(b"0123456789abcdef", s(b"p2pfs holder 1") + nonce_a + nonce_b + s(b"a") +
    //   pack(">Q", 11) + s(b"b") + pack(">Q", 22), "sha256"), where s() puts a u16 length in front
    handshake_prove_holder(&s, &node_a, &node_b, proof);
    util_hex_encode(proof, sizeof(proof), hex);
    assert_string_equal(hex, "64f5432b303ced128f0ac0ccbb7be7ad9a46afc7d9886ee4fc189d8deb994a58");
    handshake_prove_puller(&s, &node_a, &node_b, proof);
    util_hex_encode(proof, sizeof(proof), hex);
    assert_string_equal(hex, "a6fcbf6f08f83a518529fb299c2df7cedb7e495c739f99939827f76dc3d78f1b");
}

static void every_part_is_bound(void **state)
{
    struct handshake_secret s = secret_of("a secret of some length"),
                            t = secret_of("a secret of some lengtH");
    uint8_t good[WIRE_PROOF], other[WIRE_PROOF];
    handshake_prove_holder(&s, &node_a, &node_b, good);
    handshake_prove_holder(&s, &node_a, &node_b, other);
    assert_true(handshake_equal(good, other));

    handshake_prove_puller(&s, &node_a, &node_b, other); // cannot be reflected
    assert_false(handshake_equal(good, other));
    handshake_prove_holder(&s, &node_b, &node_a, other); // nor turned round
    assert_false(handshake_equal(good, other));
    handshake_prove_holder(&t, &node_a, &node_b, other);
    assert_false(handshake_equal(good, other));

    for (int part = 0; part < 6; part++) {
        struct handshake_side a = node_a, b = node_b;
        struct handshake_side *side = part < 3 ? &a : &b;
        if (part % 3 == 0)
            side->node = "c";
        else if (part % 3 == 1)
            side->boot++;
        else
            side->nonce = (const uint8_t *)"another nonce of thirty-two byte";
        handshake_prove_holder(&s, &a, &b, other);
        assert_false(handshake_equal(good, other));
    }
}

static void without_a_secret_proofs_are_zeros(void **state)
{
    struct handshake_secret none = {.length = 0};
    uint8_t proof[WIRE_PROOF], zeros[WIRE_PROOF] = {0};
    memset(proof, 1, sizeof(proof));
    handshake_prove_holder(&none, &node_a, &node_b, proof);
    assert_memory_equal(proof, zeros, sizeof(proof));
    memset(proof, 1, sizeof(proof));
    handshake_prove_puller(&none, &node_a, &node_b, proof);
    assert_memory_equal(proof, zeros, sizeof(proof));
}

static char path[] = "/tmp/p2pfs-secret-XXXXXX";

static int file_new(void **state)
{
    memcpy(path + sizeof(path) - 7, "XXXXXX", 6);
    int fd = mkstemp(path);
    close(fd);
    return fd < 0;
}

static int file_gone(void **state)
{
    return unlink(path);
}

static int read_back(const void *bytes, size_t length, struct handshake_secret *s)
{
    FILE *f = fopen(path, "we");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, length, f), length);
    assert_int_equal(fclose(f), 0);
    return handshake_secret_read(path, s);
}

static void a_secret_file_is_read_and_checked(void **state)
{
    static char bytes[HANDSHAKE_SECRET_MAX + 100];
    memset(bytes, 'x', sizeof(bytes));
    struct handshake_secret s;
    assert_int_equal(read_back("0123456789abcdef\n", 17, &s), 0);
    assert_int_equal(s.length, 16);
    assert_memory_equal(s.bytes, "0123456789abcdef", 16);
    assert_int_equal(read_back("0123456789\0abcdef\r\n\n", 20, &s), 0); // any bytes
    assert_int_equal(s.length, 17);
    assert_int_equal(read_back("0123456789abcde\n", 16, &s), -EINVAL); // too short
    assert_int_equal(s.length, 0);
    assert_int_equal(read_back("", 0, &s), -EINVAL);
    assert_int_equal(read_back(bytes, HANDSHAKE_SECRET_MAX, &s), 0);
    assert_int_equal(s.length, HANDSHAKE_SECRET_MAX);
    assert_int_equal(read_back(bytes, HANDSHAKE_SECRET_MAX + 1, &s), -EINVAL);
    assert_int_equal(read_back(bytes, sizeof(bytes), &s), -EINVAL);

    assert_int_equal(read_back(bytes, 100, &s), 0);
    handshake_secret_wipe(&s);
    assert_int_equal(s.length, 0);
    for (size_t i = 0; i < sizeof(s.bytes); i++)
        assert_int_equal(s.bytes[i], 0);
}

static void a_file_that_others_may_read_is_refused(void **state)
{
    struct handshake_secret s;
    static const mode_t bad[] = {0640, 0604, 0620, 0602, 0666};
    for (size_t i = 0; i < util_count(bad); i++) {
        assert_int_equal(chmod(path, bad[i]), 0);
        assert_int_equal(read_back("0123456789abcdef", 16, &s), -EPERM);
    }
    assert_int_equal(chmod(path, 0400), 0);
    assert_int_equal(handshake_secret_read(path, &s), 0);
    assert_int_equal(handshake_secret_read("/no/such/file", &s), -ENOENT);
    assert_int_equal(handshake_secret_read("/tmp", &s), -EISDIR);
    assert_int_equal(handshake_secret_read("/dev/zero", &s), -EINVAL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_proof_is_the_hmac_that_the_header_describes),
        cmocka_unit_test(every_part_is_bound),
        cmocka_unit_test(without_a_secret_proofs_are_zeros),
        cmocka_unit_test_setup_teardown(a_secret_file_is_read_and_checked, file_new, file_gone),
        cmocka_unit_test_setup_teardown(a_file_that_others_may_read_is_refused, file_new,
                                        file_gone),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
