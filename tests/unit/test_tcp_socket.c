/* How much a socket holds back from a message follows the speed of its link. */
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

#include "engine/tcp_socket.h"

#define MS 1000000ull

static int unsent_of(int fd)
{
    int value = 0;
    socklen_t length = sizeof value;
    assert_int_equal(getsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &value, &length), 0);
    return value;
}

static void a_slow_link_gets_little_ahead_and_a_quick_one_more(void **state)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    uint32_t unsent = 0;
    tcp_socket_fit(fd, 8 << 20, 2 * MS, &unsent); /* 4 GB/s */
    assert_int_equal(unsent, 1 << 20);
    assert_int_equal(unsent_of(fd), 1 << 20);

    tcp_socket_fit(fd, 2 << 20, 84 * MS, &unsent); /* 200 Mbit/s, alone, */
    assert_true(unsent >= 128 << 10 && unsent < 256 << 10);
    assert_int_equal(unsent_of(fd), unsent);
    uint32_t before = unsent;
    tcp_socket_fit(fd, 2 << 20, 80 * MS, &unsent); /* and much the same */
    assert_int_equal(unsent, before);
    tcp_socket_fit(fd, 2 << 20, 700 * MS, &unsent);
    assert_int_equal(unsent, before);

    tcp_socket_fit(fd, 8 << 20, 2 * MS, &unsent);
    for (unsigned i = 0; i < 8; i++) { /* what fits into the socket says nothing of the link */
        tcp_socket_fit(fd, 4096, 1, &unsent);
    }
    assert_true(unsent <= 256 << 10);
    close(fd);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_slow_link_gets_little_ahead_and_a_quick_one_more),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
