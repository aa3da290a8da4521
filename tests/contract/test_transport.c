/* What every transport promises, told over each of them: transport.h read aloud. */
#include "transport_story.h"

// -- Stories of all transports --------------------------------------------------------------------

static void a_connection_is_made_and_ends(void **state)
{
    link_up();
    assert_true(puller.link->peer[0] && holder.link->peer[0]);
    side_shut(&puller);
    assert_true(run_until(holder_down, 2000));
    assert_int_equal(holder.downs, 1);
    assert_int_equal(puller.downs, 0); // who shuts hears nothing
}

static void nobody_listens(void **state)
{
    char nowhere[TRANSPORT_NAME_MAX + 1];
    snprintf(nowhere, sizeof(nowhere), "%s", kind->address);
    *strrchr(nowhere, ':') = '\0';
    strcat(nowhere, strcmp(kind->transport, "mem") == 0 ? "less:1" : ":1");
    assert_int_equal(ops->connect(transport, nowhere, 1000, &puller, &puller.link), 0);
    assert_int_equal(puller.downs, 0); // not inside the call
    assert_true(run_until(puller_down, 1500));
    assert_int_equal(puller.error, -ECONNREFUSED);
    assert_int_equal(puller.connected, 0);
}

static void an_address_in_use_is_refused(void **state)
{
    struct transport *second;
    char bound[TRANSPORT_NAME_MAX + 1];
    assert_int_equal(ops->open(loop, NULL, &events, &holder, &second), 0);
    assert_int_equal(ops->listen(second, address, bound), -EADDRINUSE);
    ops->close(second);
}

static void the_holder_shuts_at_once(void **state)
{
    refuse_accepted = true;
    assert_int_equal(ops->connect(transport, address, 1000, &puller, &puller.link), 0);
    assert_true(run_until(puller_down, 2000));
}

static size_t size_of_message(size_t i)
{
    static const size_t sizes[] = {0, 1, 19, 20, 21, 4095, 4096, 16385, 65535, 65536};
    return i < util_count(sizes) ? sizes[i] : (i * 2654435761u) % 3000;
}

static void check_message(struct side *side, const void *bytes, size_t length)
{
    size_t i = side->messages - 1;
    assert_int_equal(length, size_of_message(i));
    assert_memory_equal(bytes, source + i, length);
}

static size_t awaited_messages;

static bool all_messages(void)
{
    return holder.messages == awaited_messages && puller.messages == awaited_messages;
}

struct flood {
    struct side *side;
    size_t next;
};
static struct flood floods[2];

static void flood_on(struct side *side)
{
    struct flood *f = &floods[side == &holder];
    while (f->next < awaited_messages) {
        int r = ops->send(side->link, source + f->next, size_of_message(f->next));
        if (r == -EAGAIN)
            return;
        assert_int_equal(r, 0);
        f->next++;
    }
}

static void ten_thousand_messages_both_ways_whole_and_in_order(void **state)
{
    link_up();
    memset(floods, 0, sizeof(floods));
    awaited_messages = 10000;
    puller.on_message = holder.on_message = check_message;
    puller.on_writable = holder.on_writable = flood_on;
    flood_on(&puller);
    flood_on(&holder);
    assert_int_equal(holder.messages, 0); // not inside the call
    assert_true(run_until(all_messages, 30000));
    assert_int_equal(puller.downs + holder.downs, 0);
}

static void a_message_too_long_is_refused(void **state)
{
    link_up();
    assert_int_equal(ops->send(puller.link, source, TRANSPORT_MESSAGE_MAX + 1), -EMSGSIZE);
    assert_int_equal(ops->send(puller.link, source, TRANSPORT_MESSAGE_MAX), 0);
}

static size_t kept;

static bool all_kept_arrived(void)
{
    return holder.messages == kept && puller.writables > 0;
}

static void a_full_queue_says_so_and_then_is_writable(void **state)
{
    link_up();
    kept = 0;
    int r;
    while ((r = ops->send(puller.link, source, 60000)) == 0) {
        kept++;
        assert_true(kept * 60000 <= (8u << 20)); // bounded
    }
    assert_int_equal(r, -EAGAIN);
    assert_int_equal(puller.writables, 0);
    assert_true(run_until(all_kept_arrived, 10000));
    assert_int_equal(puller.writables, 1);
    assert_int_equal(holder.bytes, kept * 60000); // what was refused never comes
}

static void shards_of_all_sizes_land(void **state)
{
    static const size_t sizes[] = {1,        2,        4095,           4097,
                                   65536,    1u << 20, (1u << 20) + 1, (3u << 20) - 7,
                                   8u << 20, 13000001, 64u << 20};
    link_up();
    puller.on_message = take_grant;
    memset(landing, 0, SOURCE_BYTES);
    for (uint32_t i = 0; i < util_count(sizes); i++) {
        size_t offset = i * 321;
        awaited_fetches = (int)i + 1;
        offer(i, offset, sizes[i], false);
        assert_true(run_until(fetches_finished, 20000));
        assert_int_equal(puller.status[i], 0);
        assert_true(landed_right(offset, sizes[i]));
        assert_int_equal(holder.sent, ops->one_sided ? 0 : i + 1);
        ops->unexpose(holder.link, i);
    }
    assert_int_equal(landing[(64u << 20) + 321 * util_count(sizes)], 0); // not a byte too far
    assert_true(puller.link->received >= (64u << 20));
    assert_true(ops->one_sided || holder.link->sent == puller.link->received);
}

static void many_shards_at_once_and_the_urgent_one_is_not_last(void **state)
{
    enum { COUNT = 16, URGENT = 16 };
    link_up();
    puller.on_message = take_grant;
    memset(landing, 0, SOURCE_BYTES);
    for (uint32_t i = 0; i < COUNT; i++)
        offer(i, (size_t)i * 3500001, 3500001, false);
    offer(URGENT, (size_t)COUNT * 3500001, 1500001, true);
    awaited_fetches = COUNT + 1;
    assert_true(run_until(fetches_finished, 20000));
    for (int i = 0; i <= COUNT; i++) {
        assert_int_equal(puller.done[i], 1);
        assert_int_equal(puller.status[i], 0);
    }
    assert_int_equal(puller.order[0], URGENT);
    assert_true(landed_right(0, (size_t)COUNT * 3500001 + 1500001));
}

static void check_between(struct side *side, const void *bytes, size_t length)
{
    size_t i = side->messages - 2; // the first was the grant
    assert_int_equal(length, size_of_message(i));
    assert_memory_equal(bytes, source + i, length);
}

static void messages_go_between_the_bytes_of_a_shard(void **state)
{
    enum { COUNT = 10 };
    link_up();
    puller.on_message = take_grant;
    offer(1, 0, 64u << 20, false);
    while (puller.messages < 1)
        run_for(1);
    puller.on_message = check_between;
    assert_int_equal(puller.finished, 0);
    for (size_t i = 0; i < COUNT; i++) {
        int r;
        while ((r = ops->send(holder.link, source + i, size_of_message(i))) == -EAGAIN)
            run_for(1);
        assert_int_equal(r, 0);
    }
    awaited_fetches = 1;
    while (puller.messages < 2 && puller.finished == 0)
        run_for(1);
    assert_int_equal(puller.finished, 0);
    assert_true(run_until(fetches_finished, 20000));
    assert_true(landed_right(0, 64u << 20));
    while (puller.messages < COUNT + 1)
        run_for(1);
}

static size_t cancel_at;

static void cancel_on_landed(struct side *side, struct transport_fetch *fetch)
{
    if (fetch->id != 1 || fetch->landed < cancel_at)
        return;
    ops->cancel(side->link, fetch);
    memset(landing, 0x77, 32u << 20);
    side->on_landed = NULL;
}

static void a_cancelled_fetch_touches_nothing_more(void **state)
{
    link_up();
    puller.on_message = take_grant;
    puller.on_landed = cancel_on_landed;
    cancel_at = 3u << 20;
    offer(1, 0, 32u << 20, false);
    offer(2, 32u << 20, 5000000, false);
    awaited_fetches = 1;
    assert_true(run_until(fetches_finished, 20000));
    run_for(200);
    ops->unexpose(holder.link, 1);
    run_for(50);
    assert_int_equal(puller.done[1], 0); // no fetch_done after cancel
    assert_int_equal(puller.done[2], 1);
    assert_int_equal(puller.status[2], 0);
    assert_true(landed_right(32u << 20, 5000000));
    for (size_t i = 0; i < (32u << 20); i += 512)
        assert_int_equal(landing[i], 0x77);
    // the link is as good as before
    offer(3, 100, 999, false);
    awaited_fetches = 2;
    assert_true(run_until(fetches_finished, 5000));
    assert_true(landed_right(100, 999));
}

static void unexpose_on_landed(struct side *side, struct transport_fetch *fetch)
{
    if (fetch->id != 1 || fetch->landed < (2u << 20))
        return;
    side->on_landed = NULL;
    ops->unexpose(holder.link, 1);
}

/* A one-sided transport has no other fence against a READ that is under way than the end of the connection. */
static void a_region_taken_back_fails_the_fetch_and_not_the_link(void **state)
{
    link_up();
    puller.on_message = take_grant;
    puller.on_landed = unexpose_on_landed;
    offer(1, 0, 60u << 20, false);
    awaited_fetches = 1;
    assert_true(run_until(fetches_finished, 20000));
    assert_int_equal(puller.status[1], -EIO);
    assert_int_equal(puller.done[1], 1);
    if (ops->one_sided) {
        assert_true(puller.fetch[1].landed < puller.fetch[1].length);
        assert_true(landed_right(0, puller.fetch[1].landed));
        assert_true(run_until(puller_down, 5000));
        assert_true(run_until(holder_down, 5000));
        memset(&puller, 0, sizeof(puller));
        memset(&holder, 0, sizeof(holder));
        link_up();
        puller.on_message = take_grant;
    }
    puller.on_landed = NULL;
    offer(2, 77, 3000000, false);
    awaited_fetches = puller.finished + 1;
    assert_true(run_until(fetches_finished, 20000));
    assert_int_equal(puller.status[2], 0);
    assert_true(landed_right(77, 3000000));
    assert_int_equal(puller.downs + holder.downs, 0);
}

static void holder_shuts_on_landed(struct side *side, struct transport_fetch *fetch)
{
    side->on_landed = NULL;
    side_shut(&holder);
}

static void a_link_that_goes_answers_every_fetch_once(void **state)
{
    link_up();
    puller.on_message = take_grant;
    puller.on_landed = holder_shuts_on_landed;
    for (uint32_t i = 0; i < 8; i++)
        offer(i, (size_t)i * (8u << 20), 8u << 20, false);
    // GRANTs go before bytes, so all eight fetches are under way when the first byte lands
    assert_true(run_until(puller_down, 5000));
    assert_int_equal(puller.downs, 1);
    assert_int_equal(puller.finished, 8);
    for (int i = 0; i < 8; i++) {
        assert_int_equal(puller.done[i], 1);
        assert_true(puller.status[i] < 0);
    }
    run_for(20);
    assert_int_equal(puller.finished, 8);
}

static void wrong_descriptors_are_refused(void **state)
{
    link_up();
    struct transport_descriptor d = {.length = 5, .bytes = "TMabc"};
    struct transport_fetch f = {.destination = landing, .length = 10, .id = 1};
    assert_true(ops->fetch(puller.link, &d, &f) < 0);
    struct transport_region part = {.fd = region.fd, .map = source, .length = 100};
    assert_int_equal(ops->expose(holder.link, 1, &part, false, &d), 0);
    assert_int_equal(ops->expose(holder.link, 1, &part, false, &d), -EEXIST);
    f.length = 101; // more than what is granted
    assert_true(ops->fetch(puller.link, &d, &f) < 0);
    ops->unexpose(holder.link, 1);
    ops->unexpose(holder.link, 1); // harmless
    ops->cancel(puller.link, &f);  // so is this: it never began
}

// Shut from inside each event.

static bool nobody(void)
{
    return !puller.link && !holder.link;
}

static void shut_connected(struct side *side)
{
    side_shut(side);
}

static void shut_message(struct side *side, const void *bytes, size_t length)
{
    char copy[64];
    side_shut(side);
    memcpy(copy, bytes, length < 64 ? length : 64); // still borrowed
    assert_memory_equal(copy, source, length < 64 ? length : 64);
}

static void shut_fetch(struct side *side, struct transport_fetch *fetch)
{
    side_shut(side);
}

static void shut_done(struct side *side, struct transport_fetch *fetch, int status)
{
    side_shut(side);
}

static void shut_sent(struct side *side, uint32_t id)
{
    side_shut(side);
}

static void shut_inside_every_event(void **state)
{
    for (int event = 0; event < 7; event++) {
        if (event == 4 && ops->one_sided)
            continue; // nothing is sent
        memset(&puller, 0, sizeof(puller));
        memset(&holder, 0, sizeof(holder));
        if (event == 0)
            puller.on_connected = shut_connected;
        assert_int_equal(ops->connect(transport, address, 20000, &puller, &puller.link), 0);
        if (event == 0) {
            assert_true(run_until(nobody, 2000));
            continue;
        }
        assert_true(run_until(both_connected, 2000));
        puller.on_message = take_grant;
        switch (event) {
        case 1:
            puller.on_message = shut_message;
            for (int i = 0; i < 5; i++)
                assert_int_equal(ops->send(holder.link, source, 3000), 0);
            break;
        case 2:
            puller.on_landed = shut_fetch;
            offer(1, 0, 5u << 20, false);
            offer(2, 0, 5u << 20, false);
            break;
        case 3:
            puller.on_done = shut_done;
            offer(1, 0, 100, false);
            offer(2, 0, 5u << 20, false);
            break;
        case 4:
            holder.on_sent = shut_sent;
            offer(1, 0, 100, false);
            offer(2, 0, 5u << 20, false);
            break;
        case 5:
            puller.on_writable = shut_connected;
            while (ops->send(puller.link, source, 60000) == 0)
                ;
            break;
        case 6: // a fetch that the link's end answers
            puller.on_done = shut_done;
            puller.on_landed = holder_shuts_on_landed;
            for (uint32_t i = 0; i < 4; i++)
                offer(i, 0, 5u << 20, false);
            break;
        }
        assert_true(run_until(nobody, 5000));
        assert_true(puller.downs + holder.downs <= 1);
    }
}

// -- Lanes: connections shared between threads -----------------------------------------------------

struct lane {
    struct loop *loop;
    struct transport *transport;
    pthread_t thread;
    atomic_int accepted;
    atomic_int echoed;
};
static struct lane lanes[2];
static atomic_uint turn;

static void lane_accepted(void *arg, struct link *link)
{
    struct lane *lane = arg;
    assert_true(loop_here(lane->loop));
    assert_ptr_equal(link->transport, lane->transport);
    atomic_fetch_add(&lane->accepted, 1);
    link->user = lane;
}

static void lane_message(struct link *link, const void *message, size_t length)
{
    struct lane *lane = link->user;
    atomic_fetch_add(&lane->echoed, 1);
    assert_int_equal(ops->send(link, message, length), 0);
}

static void lane_down(struct link *link, int error, const char *reason)
{
    ops->shut(link);
}

static const struct transport_events lane_events = {
    .accepted = lane_accepted,
    .message = lane_message,
    .down = lane_down,
};

static struct transport *lane_next(void *arg)
{
    return lanes[atomic_fetch_add(&turn, 1) % 2].transport;
}

static void *lane_run(void *arg)
{
    loop_run(((struct lane *)arg)->loop);
    return NULL;
}

static struct side callers[4];

static bool callers_connected(void)
{
    return callers[0].connected && callers[1].connected && callers[2].connected &&
           callers[3].connected;
}

static bool callers_answered(void)
{
    return callers[0].messages == 50 && callers[1].messages == 50 && callers[2].messages == 50 &&
           callers[3].messages == 50;
}

static void connections_are_shared_between_lanes(void **state)
{
    char bound[TRANSPORT_NAME_MAX + 1];
    memset(callers, 0, sizeof(callers));
    for (int i = 0; i < 2; i++) {
        lanes[i].accepted = lanes[i].echoed = 0;
        assert_int_equal(loop_open(&lanes[i].loop), 0);
        assert_int_equal(
            ops->open(lanes[i].loop, NULL, &lane_events, &lanes[i], &lanes[i].transport), 0);
    }
    assert_int_equal(ops->listen(lanes[0].transport, kind->address, bound), 0);
    ops->share(lanes[0].transport, lane_next, NULL);
    for (int i = 0; i < 2; i++)
        pthread_create(&lanes[i].thread, NULL, lane_run, &lanes[i]);
    for (int i = 0; i < 4; i++)
        assert_int_equal(ops->connect(transport, bound, 20000, &callers[i], &callers[i].link), 0);
    assert_true(run_until(callers_connected, 2000));
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 50; k++)
            assert_int_equal(ops->send(callers[i].link, source + k, 100), 0);
    assert_true(run_until(callers_answered, 5000));
    for (int i = 0; i < 4; i++)
        side_shut(&callers[i]);
    run_for(20);
    for (int i = 0; i < 2; i++) {
        loop_stop(lanes[i].loop);
        pthread_join(lanes[i].thread, NULL);
    }
    for (int i = 0; i < 2; i++) {
        assert_int_equal(lanes[i].accepted, 2);
        assert_int_equal(lanes[i].echoed, 100);
        ops->close(lanes[i].transport);
        loop_close(lanes[i].loop);
    }
}

// -- The table ------------------------------------------------------------------------------------

static const struct story stories[] = {
    STORY(a_connection_is_made_and_ends),
    STORY(nobody_listens),
    STORY(an_address_in_use_is_refused),
    STORY(the_holder_shuts_at_once),
    STORY(ten_thousand_messages_both_ways_whole_and_in_order),
    STORY(a_message_too_long_is_refused),
    STORY(a_full_queue_says_so_and_then_is_writable),
    STORY(shards_of_all_sizes_land),
    STORY(many_shards_at_once_and_the_urgent_one_is_not_last),
    STORY(messages_go_between_the_bytes_of_a_shard),
    STORY(a_cancelled_fetch_touches_nothing_more),
    STORY(a_region_taken_back_fails_the_fetch_and_not_the_link),
    STORY(a_link_that_goes_answers_every_fetch_once),
    STORY(wrong_descriptors_are_refused),
    STORY(shut_inside_every_event),
    STORY(connections_are_shared_between_lanes),
};

int main(int argc, char **argv)
{
    return stories_run(stories, util_count(stories), argc, argv);
}
