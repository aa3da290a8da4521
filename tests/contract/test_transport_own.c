/* What one transport promises by itself: TCP against peers that misbehave, mem with its faults. */
#include "tests/contract/fence_story.h"

// -- TCP: peers that misbehave ---------------------------------------------------------------------

static int raw_connect(void)
{
    struct sockaddr_in to = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)atoi(strrchr(address, ':') + 1)),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        abort();
    assert_int_equal(connect(fd, (struct sockaddr *)&to, sizeof(to)), 0);
    return fd;
}

static const char good_preface[] = "p2pftcp1";

static void tcp_garbage_ends_the_link_with_a_phrase(void **state)
{
    static const struct {
        const char *bytes;
        size_t length;
        const char *phrase;
    } garbage[] = {
        {"GET / HTTP/1.1\r\n\r\n", 18, "HTTP"},
        {"\x16\x03\x01\x02\x00\x01\x00", 7, "TLS"},
        {"SSH-2.0-OpenSSH_9", 17, "does not speak p2pfs"},
        {"p2pftcp9", 8, "another version"},
        {"p2pftcp1\0\x9\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 28, "unknown kind"},
        {"p2pftcp1\0\x1\0\0\0\0\0\0\xff\xff\xff\xff\0\0\0\0\0\0\0\0", 28, "message of"},
        {"p2pftcp1\0\x2\0\0\0\0\0\7\x7f\xff\xff\xff\0\0\0\0\0\0\0\0", 28, "slice of"},
        {"p2pftcp1\0\x3\0\0\0\0\0\7\0\0\0\x9\0\0\0\0\0\0\0\0", 28, "malformed"},
        {"p2pftcp1", 8, "closed"},
        {"", 0, "before it said anything"},
    };
    for (size_t i = 0; i < util_count(garbage); i++) {
        memset(&holder, 0, sizeof(holder));
        int fd = raw_connect();
        if (garbage[i].length > 0)
            assert_int_equal(send(fd, garbage[i].bytes, garbage[i].length, 0), garbage[i].length);
        shutdown(fd, SHUT_WR);
        assert_true(run_until(holder_down, 2000));
        assert_non_null(strstr(holder.reason, garbage[i].phrase));
        close(fd);
    }
}

static bool holder_accepted(void)
{
    return holder.connected > 0;
}

static bool one_message(void)
{
    return holder.messages == 1;
}

static void tcp_bytes_outside_of_a_fetch_end_the_link(void **state)
{
    int fd = raw_connect();
    assert_true(run_until(holder_accepted, 2000));
    // the raw peer plays the holder: a DATA frame for id 5 that begins where nothing was asked
    struct transport_descriptor d = {.length = 13,
                                     .bytes = {'T', 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 100}};
    struct transport_fetch f = {.destination = landing, .length = 100, .id = 5};
    memset(landing, 0x55, 200);
    assert_int_equal(ops->fetch(holder.link, &d, &f), 0);
    uint8_t frame[8 + 20 + 50] = "p2pftcp1\0\2\0\0\0\0\0\5\0\0\0\62\0\0\0\0\0\0\0\74";
    assert_int_equal(send(fd, frame, sizeof(frame), 0), sizeof(frame));
    assert_true(run_until(holder_down, 2000));
    assert_int_equal(holder.done[5], 1);
    assert_int_equal(holder.status[5], -EPROTO);
    for (int i = 0; i < 200; i++)
        assert_int_equal(landing[i], 0x55);
    close(fd);
}

static void tcp_half_a_frame_then_silence_holds_nothing_up(void **state)
{
    int fd = raw_connect();
    assert_int_equal(send(fd, good_preface, 8, 0), 8);
    assert_int_equal(send(fd, "\0\1\0\0\0\0\0\0\0\0\1", 11, 0), 11);
    assert_true(run_until(holder_accepted, 2000));
    run_for(50);
    assert_int_equal(holder.downs + (int)holder.messages, 0);
    struct side silent = holder;
    link_up(); // others are served
    assert_int_equal(ops->send(puller.link, "x", 1), 0);
    assert_true(run_until(one_message, 2000));
    ops->shut(silent.link);
    close(fd);
}

/* A holder in a process of its own that offers 64 MiB and then does nothing but serve. */
static pid_t fork_holder(void)
{
    int p[2];
    assert_int_equal(pipe(p), 0);
    pid_t pid = fork();
    if (pid == 0) {
        struct loop *own;
        alarm(60);
        if (loop_open(&own) < 0)
            _exit(1);
        loop = own;
        if (ops->open(own, NULL, &events, &holder, &transport) < 0 ||
            ops->listen(transport, kind->address, address) < 0)
            _exit(1);
        if (write(p[1], address, sizeof(address)) != sizeof(address))
            _exit(1);
        run_until(holder_accepted, 10000);
        offer(1, 0, 64u << 20, false);
        run_for(60000);
        _exit(0);
    }
    assert_int_equal(read(p[0], address, sizeof(address)), sizeof(address));
    close(p[0]);
    close(p[1]);
    return pid;
}

static pid_t holder_pid;
static int holder_signal;

static void signal_on_landed(struct side *side, struct transport_fetch *fetch)
{
    side->on_landed = NULL;
    kill(holder_pid, holder_signal);
}

static bool puller_connected(void)
{
    return puller.connected;
}

static bool landing_begun(void)
{
    return puller.on_landed == NULL;
}

static void pull_from_process(int signal)
{
    holder_pid = fork_holder();
    holder_signal = signal;
    puller.on_message = take_grant;
    puller.on_landed = signal_on_landed;
    assert_int_equal(ops->connect(transport, address, 20000, &puller, &puller.link), 0);
    assert_true(run_until(puller_connected, 2000));
    assert_true(run_until(landing_begun, 5000));
}

static void tcp_a_killed_holder_fails_the_fetch_at_once(void **state)
{
    pull_from_process(SIGKILL);
    uint64_t begun = util_now_ns();
    assert_true(run_until(puller_down, 5000));
    assert_true(util_now_ns() - begun < 6000 * MS); // the silence of a host is noticed in 8 s
    assert_int_equal(puller.done[1], 1);
    assert_true(puller.status[1] < 0);
    waitpid(holder_pid, NULL, 0);
}

static void tcp_a_stopped_holder_holds_nothing_up(void **state)
{
    pull_from_process(SIGSTOP);
    size_t landed;
    do { // what is on its way still comes
        landed = puller.fetch[1].landed;
        run_for(300);
    } while (puller.fetch[1].landed > landed);
    assert_true(landed < puller.fetch[1].length);
    ops->cancel(puller.link, &puller.fetch[1]);
    memset(landing, 0x33, SOURCE_BYTES);
    kill(holder_pid, SIGCONT);
    run_for(300);
    for (size_t i = 0; i < SOURCE_BYTES; i += 1024)
        assert_int_equal(landing[i], 0x33);
    assert_int_equal(puller.done[1] + puller.downs, 0);
    kill(holder_pid, SIGKILL);
    waitpid(holder_pid, NULL, 0);
}

static void tcp_a_file_that_shrinks_fails_the_fetch_and_not_the_link(void **state)
{
    link_up();
    int fd = memfd_create("shrinks", MFD_CLOEXEC);
    assert_int_equal(ftruncate(fd, 3500000), 0);
    struct grant g = {.kind = 'G', .id = 1, .length = 9u << 20};
    struct transport_region part = {.fd = fd, .length = 9u << 20};
    assert_int_equal(ops->expose(holder.link, 1, &part, false, &g.descriptor), 0);
    assert_int_equal(ops->send(holder.link, &g, sizeof(g)), 0);
    puller.on_message = take_grant;
    awaited_fetches = 1;
    assert_true(run_until(fetches_finished, 5000));
    assert_int_equal(puller.status[1], -EIO);
    assert_int_equal(holder.sent, 0);
    offer(2, 5, 100000, false);
    awaited_fetches = 2;
    assert_true(run_until(fetches_finished, 5000));
    assert_int_equal(puller.status[2], 0);
    close(fd);
}

static void tcp_names_are_resolved_beside_the_loop(void **state)
{
    char name[64];
    snprintf(name, sizeof(name), "localhost:%s", strrchr(address, ':') + 1);
    assert_int_equal(ops->connect(transport, name, 5000, &puller, &puller.link), 0);
    assert_true(run_until(both_connected, 5000));
    side_shut(&puller);
    puller.downs = 0;
    assert_int_equal(ops->connect(transport, "no.such.host.invalid:1", 5000, &puller, &puller.link),
                     0);
    assert_true(run_until(puller_down, 6000));
    // one that is shut while its name is looked up
    struct link *link;
    assert_int_equal(ops->connect(transport, "no.such.host.invalid:1", 5000, &puller, &link), 0);
    ops->shut(link);
    run_for(100);
}

static void tcp_malformed_addresses_are_refused(void **state)
{
    static const char *const bad[] = {"",           "127.0.0.1",   ":1",
                                      "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:65536",
                                      "::1:80",     "[::1:80",     "[]:80"};
    for (size_t i = 0; i < util_count(bad); i++) {
        char bound[TRANSPORT_NAME_MAX + 1];
        struct transport *second;
        assert_int_equal(ops->open(loop, NULL, &events, &holder, &second), 0);
        assert_int_equal(ops->listen(second, bad[i], bound), -EINVAL);
        assert_int_equal(ops->connect(transport, bad[i], 100, &puller, &puller.link), -EINVAL);
        ops->close(second);
    }
}

static void tcp_an_unknown_congestion_control_is_refused(void **state)
{
    struct transport *second;
    struct transport_config config = {.congestion = "nonsense"};
    assert_int_equal(ops->open(loop, &config, &events, &holder, &second), -ENOPROTOOPT);
    config.congestion = "reno";
    assert_int_equal(ops->open(loop, &config, &events, &holder, &second), 0);
    ops->close(second);
}

static void tcp_over_ipv6(void **state)
{
    struct transport *second;
    char bound[TRANSPORT_NAME_MAX + 1];
    assert_int_equal(ops->open(loop, NULL, &events, &holder, &second), 0);
    int r = ops->listen(second, "[::1]:0", bound);
    if (r == -EADDRNOTAVAIL || r == -EAFNOSUPPORT) {
        ops->close(second);
        print_message("SKIP: no IPv6 on this machine\n");
        skip();
    }
    assert_int_equal(r, 0);
    assert_int_equal(strncmp(bound, "[::1]:", 6), 0);
    assert_int_equal(ops->connect(transport, bound, 20000, &puller, &puller.link), 0);
    assert_true(run_until(both_connected, 2000));
    side_shut(&holder);
    side_shut(&puller);
    ops->close(second);
}

// -- Mem: faults on demand --------------------------------------------------------------------------

static void mem_delay(void **state)
{
    link_up();
    transport_mem_faults_set(&(struct transport_mem_faults){.delay_ms = 80});
    uint64_t begun = util_now_ns();
    assert_int_equal(ops->send(puller.link, "x", 1), 0);
    assert_true(run_until(one_message, 2000));
    assert_true(util_now_ns() - begun >= 80 * MS);
    puller.on_message = take_grant;
    offer(1, 0, 500000, false);
    awaited_fetches = 1;
    assert_true(run_until(fetches_finished, 5000));
    assert_true(landed_right(0, 500000));
}

static void mem_loss(void **state)
{
    link_up();
    transport_mem_faults_set(&(struct transport_mem_faults){.lose_message_each = 3});
    for (int i = 0; i < 3; i++)
        assert_int_equal(ops->send(puller.link, "x", 1), 0);
    assert_true(run_until(puller_down, 2000));
    assert_true(run_until(holder_down, 2000));
    assert_int_equal(holder.messages, 2);
}

static void mem_short_flipped_and_stalled(void **state)
{
    link_up();
    puller.on_message = take_grant;
    transport_mem_faults_set(&(struct transport_mem_faults){.short_fetch_each = 2});
    offer(1, 0, 1000000, false);
    offer(2, 0, 1000000, false);
    awaited_fetches = 2;
    assert_true(run_until(fetches_finished, 5000));
    assert_int_equal(puller.status[1], 0);
    assert_int_equal(puller.status[2], -EIO);
    assert_int_equal(puller.fetch[2].landed, 500000);

    transport_mem_faults_set(&(struct transport_mem_faults){.flip_fetch_each = 1});
    memset(landing, 0, 2000000);
    offer(3, 0, 1000000, false);
    awaited_fetches = 3;
    assert_true(run_until(fetches_finished, 5000));
    assert_int_equal(puller.status[3], 0);
    int bits = 0;
    for (size_t i = 0; i < 1000000; i++)
        bits += __builtin_popcount(landing[i] ^ source[i]);
    assert_int_equal(bits, 1);

    transport_mem_faults_set(&(struct transport_mem_faults){.stall_fetch_each = 1});
    offer(4, 0, 1000000, false);
    run_for(100);
    assert_int_equal(puller.done[4], 0);
    assert_int_equal(puller.fetch[4].landed, 0);
    ops->cancel(puller.link, &puller.fetch[4]);
}

static bool puller_writable(void)
{
    return puller.writables == 1;
}

static void mem_submit_fails(void **state)
{
    link_up();
    transport_mem_faults_set(&(struct transport_mem_faults){.refuse_submit_each = 1});
    struct transport_region part = {.fd = region.fd, .map = source, .length = 100};
    struct transport_descriptor d;
    assert_int_equal(ops->send(puller.link, "x", 1), -ENOMEM);
    assert_int_equal(ops->expose(holder.link, 1, &part, false, &d), -ENOMEM);
    transport_mem_faults_set(&(struct transport_mem_faults){.full_queue_each = 1});
    assert_int_equal(ops->send(puller.link, "x", 1), -EAGAIN);
    assert_int_equal(puller.writables, 0);
    assert_true(run_until(puller_writable, 2000));
    assert_int_equal(holder.messages, 0);
}

// -- RDMA: memory that will not do -------------------------------------------------------------------

static void rdma_memory_that_cannot_be_written_fails_the_fetch_and_not_the_link(void **state)
{
    link_up();
    kept.kind = 0;
    puller.on_message = keep_grant;
    offer(1, 0, 4096, false);
    assert_true(run_until(grant_kept, 5000));
    void *nothing = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    puller.fetch[1] = (struct transport_fetch){.destination = nothing, .length = 4096, .id = 1};
    assert_int_equal(ops->fetch(puller.link, &kept.descriptor, &puller.fetch[1]), 0);
    awaited_fetches = 1;
    assert_true(run_until(fetches_finished, 5000));
    assert_true(puller.status[1] < 0);
    assert_int_equal(puller.downs, 0);
    munmap(nothing, 4096);
    puller.on_message = take_grant;
    offer(2, 5, 100000, false);
    awaited_fetches = 2;
    assert_true(run_until(fetches_finished, 5000));
    assert_int_equal(puller.status[2], 0);
    assert_true(landed_right(5, 100000));
}

// -- The table ------------------------------------------------------------------------------------

static const struct story stories[] = {
    STORY(tcp_garbage_ends_the_link_with_a_phrase),
    STORY(tcp_bytes_outside_of_a_fetch_end_the_link),
    STORY(tcp_half_a_frame_then_silence_holds_nothing_up),
    STORY(tcp_a_killed_holder_fails_the_fetch_at_once),
    STORY(tcp_a_stopped_holder_holds_nothing_up),
    STORY(tcp_a_file_that_shrinks_fails_the_fetch_and_not_the_link),
    STORY(tcp_names_are_resolved_beside_the_loop),
    STORY(tcp_malformed_addresses_are_refused),
    STORY(tcp_an_unknown_congestion_control_is_refused),
    STORY(tcp_over_ipv6),
    STORY(mem_delay),
    STORY(mem_loss),
    STORY(mem_short_flipped_and_stalled),
    STORY(mem_submit_fails),
    FENCE_STORIES,
    STORY(rdma_memory_that_cannot_be_written_fails_the_fetch_and_not_the_link),
};

int main(int argc, char **argv)
{
    return stories_run(stories, util_count(stories), argc, argv);
}
