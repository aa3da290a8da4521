/* A transport under limits: the rate is never exceeded, what is urgent goes first, messages never wait, and links end
 * as they do without. */
#include "transport_story.h"

#include "engine/bucket.h"

#define KIB (1u << 10)
#define MIB (1u << 20)

static struct bucket upload, download;

static void limits_set(uint64_t up, uint64_t down)
{
    bucket_rate_set(&upload, up);
    bucket_rate_set(&download, down);
}

static int limits_setup(void **state)
{
    bucket_open(&upload, 0);
    bucket_open(&download, 0);
    story_config = (struct transport_config){
        .upload = &upload, .download = &download, .buffer_bytes = 128 * KIB};
    return story_setup(state);
}

static int limits_end(void **state)
{
    int rc = story_end(state);
    assert_int_equal(upload.waiting, 0); /* nobody has been forgotten in line */
    assert_int_equal(download.waiting, 0);
    bucket_close(&upload);
    bucket_close(&download);
    return rc;
}

/* Pulls 4 MiB; they may not come faster than the limit allows. */
static void pull_at_most(uint64_t rate)
{
    uint64_t begun = util_now_ns();
    memset(landing, 0, 4 * MIB);
    puller.finished = 0;
    for (uint32_t id = 1; id <= 8; id++)
        offer(id, (id - 1) * MIB / 2, MIB / 2, id % 3 == 0);
    awaited_fetches = 8;
    assert_true(run_until(fetches_finished, 30000));
    double seconds = (double)(util_now_ns() - begun + BUCKET_BURST_NS) / 1e9;
    for (uint32_t id = 1; id <= 8; id++)
        assert_int_equal(puller.status[id], 0);
    assert_true(landed_right(0, 4 * MIB));
    /* less the pieces that were granted before, and what was read along with the first messages */
    assert_true((double)(4 * MIB - MIB / 4) / seconds <= (double)rate);
    for (uint32_t id = 1; id <= 8; id++)
        ops->unexpose(holder.link, id);
    run_for(20);
}

static void tcp_an_upload_limit_holds(void **state)
{
    link_up();
    puller.on_message = take_grant;
    limits_set(8 * MIB, 0);
    pull_at_most(8 * MIB);
}

static void tcp_a_download_limit_holds(void **state)
{
    link_up();
    puller.on_message = take_grant;
    limits_set(0, 8 * MIB);
    pull_at_most(8 * MIB);
}

static void tcp_both_limits_hold_and_the_lower_one_counts(void **state)
{
    link_up();
    puller.on_message = take_grant;
    limits_set(64 * MIB, 8 * MIB);
    pull_at_most(8 * MIB);
    limits_set(8 * MIB, 64 * MIB);
    pull_at_most(8 * MIB);
}

static int awaited_messages;

static bool messages_came(void)
{
    return holder.messages >= (size_t)awaited_messages;
}

/* At the lowest rate the shard alone would take a minute. */
static void tcp_messages_and_urgent_shards_do_not_wait(void **state)
{
    link_up();
    puller.on_message = take_grant;
    limits_set(BUCKET_RATE_MIN, 0);
    offer(1, 0, 4 * MIB, false);
    run_for(50);
    for (int i = 0; i < 10; i++)
        assert_int_equal(ops->send(puller.link, "question", 8), 0);
    awaited_messages = 10;
    assert_true(run_until(messages_came, 5000));
    offer(2, 4 * MIB, 8 * KIB, true);
    awaited_fetches = 1;
    assert_true(run_until(fetches_finished, 20000));
    assert_int_equal(puller.order[0], 2);
    assert_true(landed_right(4 * MIB, 8 * KIB));
    limits_set(0, 0); /* counts for what is under way */
    awaited_fetches = 2;
    assert_true(run_until(fetches_finished, 20000));
    assert_true(landed_right(0, 4 * MIB));
}

static bool some_landed(void)
{
    return puller.fetch[1].landed > 0;
}

static void begin_slowly(bool up)
{
    link_up();
    puller.on_message = take_grant;
    limits_set(up ? 4 * BUCKET_RATE_MIN : 0, up ? 0 : 4 * BUCKET_RATE_MIN);
    offer(1, 0, 32 * MIB, false); /* more than sockets hold */
    assert_true(run_until(some_landed, 20000));
    run_for(100);
}

static void tcp_what_waits_can_be_taken_back(void **state)
{
    begin_slowly(true);
    ops->unexpose(holder.link, 1);
    awaited_fetches = 1;
    assert_true(run_until(fetches_finished, 20000));
    assert_int_equal(puller.status[1], -EIO);
    offer(2, 0, 16 * KIB, false);
    awaited_fetches = 2;
    assert_true(run_until(fetches_finished, 20000));
    assert_true(landed_right(0, 16 * KIB));
}

static void tcp_what_waits_can_be_cancelled(void **state)
{
    begin_slowly(false);
    ops->cancel(puller.link, &puller.fetch[1]);
    memset(landing, 0x55, 4 * MIB);
    run_for(100);
    for (int i = 0; i < 4 * (int)MIB; i++)
        assert_int_equal(landing[i], 0x55);
    ops->unexpose(holder.link, 1);
    limits_set(0, 0);
    offer(2, 0, 16 * KIB, false);
    awaited_fetches = 1;
    assert_true(run_until(fetches_finished, 20000));
    assert_true(landed_right(0, 16 * KIB));
}

static void tcp_the_end_is_noticed_while_a_limit_waits(void **state)
{
    begin_slowly(false);
    side_shut(&holder);
    assert_true(run_until(puller_down, 20000));
    assert_int_equal(puller.done[1], 1);
    assert_true(puller.status[1] < 0);
}

static void tcp_a_link_is_shut_while_a_limit_waits(void **state)
{
    begin_slowly(true);
    side_shut(&puller);
    side_shut(&holder);
    run_for(300);
}

static const struct story stories[] = {
    STORY(tcp_an_upload_limit_holds),
    STORY(tcp_a_download_limit_holds),
    STORY(tcp_both_limits_hold_and_the_lower_one_counts),
    STORY(tcp_messages_and_urgent_shards_do_not_wait),
    STORY(tcp_what_waits_can_be_taken_back),
    STORY(tcp_what_waits_can_be_cancelled),
    STORY(tcp_the_end_is_noticed_while_a_limit_waits),
    STORY(tcp_a_link_is_shut_while_a_limit_waits),
};

int main(int argc, char **argv)
{
    story_begin = limits_setup;
    story_over = limits_end;
    return stories_run(stories, util_count(stories), argc, argv);
}
