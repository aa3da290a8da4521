#include "engine/handshake.h"

#include <errno.h>
#include <fcntl.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "meta/base/buf.h"
#include "meta/base/log.h"
#include "meta/base/util.h"

#define SECRET_MIN 16

/* At most HANDSHAKE_SECRET_MAX bytes and two newlines count; a longer file is refused. */
static ssize_t file_read(int fd, uint8_t *bytes, size_t size)
{
    size_t have = 0;
    while (have < size) {
        ssize_t n = read(fd, bytes + have, size - have);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (n == 0)
            break;
        have += (size_t)n;
    }
    return (ssize_t)have;
}

int handshake_secret_read(const char *path, struct handshake_secret *secret)
{
    memset(secret, 0, sizeof(*secret));
    // O_NONBLOCK: opening a FIFO by mistake must not hang the mount
    util_autoclose int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return -errno;
    struct stat st;
    if (fstat(fd, &st) < 0)
        return -errno;
    if (S_ISDIR(st.st_mode))
        return -EISDIR;
    if (!S_ISREG(st.st_mode))
        return -EINVAL;
    if (st.st_mode & (S_IRWXG | S_IRWXO) & ~(mode_t)(S_IXGRP | S_IXOTH))
        return -EPERM;

    uint8_t bytes[HANDSHAKE_SECRET_MAX + 3];
    ssize_t length = file_read(fd, bytes, sizeof(bytes));
    int r = length < 0 ? (int)length : 0;
    if (r == 0) {
        bool whole = (size_t)length < sizeof(bytes);
        while (length > 0 && (bytes[length - 1] == '\n' || bytes[length - 1] == '\r'))
            length--;
        if (!whole || length < SECRET_MIN || length > HANDSHAKE_SECRET_MAX) {
            r = -EINVAL;
        } else {
            memcpy(secret->bytes, bytes, (size_t)length);
            secret->length = (size_t)length;
        }
    }
    OPENSSL_cleanse(bytes, sizeof(bytes));
    return r;
}

void handshake_secret_wipe(struct handshake_secret *secret)
{
    OPENSSL_cleanse(secret, sizeof(*secret));
}

static void prove(const char *label, const struct handshake_secret *secret,
                  const struct handshake_side *puller, const struct handshake_side *holder,
                  uint8_t proof[WIRE_PROOF])
{
    memset(proof, 0, WIRE_PROOF);
    if (secret->length == 0)
        return;

    // names carry their length, so that no two pairs of identities make the same bytes
    uint8_t text[1024];
    struct buf b = buf_over(text, sizeof(text));
    buf_put_string(&b, label);
    buf_put_bytes(&b, puller->nonce, WIRE_NONCE);
    buf_put_bytes(&b, holder->nonce, WIRE_NONCE);
    buf_put_string(&b, puller->node);
    buf_put_u64(&b, puller->boot);
    buf_put_string(&b, holder->node);
    buf_put_u64(&b, holder->boot);

    unsigned length = WIRE_PROOF;
    if (b.bad ||
        !HMAC(EVP_sha256(), secret->bytes, (int)secret->length, text, b.at, proof, &length)) {
        // a proof of zeros would pass for "no secret"; without memory there is nothing better to do
        log_error("HMAC-SHA-256 cannot be computed: OpenSSL is out of memory");
        abort();
    }
}

void handshake_prove_holder(const struct handshake_secret *secret,
                            const struct handshake_side *puller,
                            const struct handshake_side *holder, uint8_t proof[WIRE_PROOF])
{
    prove("p2pfs holder 1", secret, puller, holder, proof);
}

void handshake_prove_puller(const struct handshake_secret *secret,
                            const struct handshake_side *puller,
                            const struct handshake_side *holder, uint8_t proof[WIRE_PROOF])
{
    prove("p2pfs puller 1", secret, puller, holder, proof);
}

bool handshake_equal(const uint8_t a[WIRE_PROOF], const uint8_t b[WIRE_PROOF])
{
    return CRYPTO_memcmp(a, b, WIRE_PROOF) == 0;
}
