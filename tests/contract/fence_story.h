/* The fence of RDMA: stories that a device must keep, a real one and the one that the unit tests play. */
#ifndef P2PFS_TESTS_FENCE_STORY_H
#define P2PFS_TESTS_FENCE_STORY_H

#include "tests/contract/transport_story.h"

static struct grant kept;

static void keep_grant(struct side *side, const void *bytes, size_t length)
{
    assert_int_equal(length, sizeof(kept));
    memcpy(&kept, bytes, sizeof(kept));
}

static bool grant_kept(void)
{
    return kept.kind == 'G';
}

static void rdma_what_was_taken_back_cannot_be_read(void **state)
{
    link_up();
    kept.kind = 0;
    puller.on_message = keep_grant;
    offer(1, 0, 1u << 20, false);
    assert_true(run_until(grant_kept, 5000));
    ops->unexpose(holder.link, 1);
    memset(landing, 0x55, 1u << 20);
    take_grant(&puller, &kept, sizeof(kept));
    assert_true(run_until(puller_down, 5000));
    assert_int_equal(puller.status[1], -EIO);
    assert_int_equal(puller.done[1], 1);
    for (size_t i = 0; i < (1u << 20); i++)
        assert_int_equal(landing[i], 0x55);
}

static void rdma_nothing_beside_the_shard_can_be_read(void **state)
{
    link_up();
    kept.kind = 0;
    puller.on_message = keep_grant;
    offer(1, 8192, 4096, false);
    assert_true(run_until(grant_kept, 5000));
    kept.descriptor.bytes[21] += 1; // the lowest byte of its address: one byte further
    memset(landing, 0x55, 1u << 20);
    take_grant(&puller, &kept, sizeof(kept));
    assert_true(run_until(puller_down, 5000));
    assert_int_equal(puller.status[1], -EIO);
    for (size_t i = 0; i < (1u << 20); i++)
        assert_int_equal(landing[i], 0x55);
}

static struct side thief;

static bool thief_connected(void)
{
    return thief.connected && holder.connected == 2;
}

static bool thief_down(void)
{
    return thief.downs && holder.downs;
}

static void rdma_what_was_granted_to_one_peer_opens_nothing_to_another(void **state)
{
    link_up();
    kept.kind = 0;
    puller.on_message = keep_grant;
    offer(1, 0, 1u << 20, false);
    assert_true(run_until(grant_kept, 5000));
    struct link *lender = holder.link;
    memset(&thief, 0, sizeof(thief));
    assert_int_equal(ops->connect(transport, address, 5000, &thief, &thief.link), 0);
    assert_true(run_until(thief_connected, 5000));
    memset(landing, 0x55, 1u << 20);
    take_grant(&thief, &kept, sizeof(kept));
    assert_true(run_until(thief_down, 5000));
    assert_int_equal(thief.status[1], -EIO);
    for (size_t i = 0; i < (1u << 20); i++)
        assert_int_equal(landing[i], 0x55);
    // it still serves whom it was granted to
    holder.link = lender;
    take_grant(&puller, &kept, sizeof(kept));
    awaited_fetches = 1;
    assert_true(run_until(fetches_finished, 5000));
    assert_int_equal(puller.status[1], 0);
    assert_true(landed_right(0, 1u << 20));
    assert_int_equal(puller.downs, 0);
}

#define FENCE_STORIES                                     \
    STORY(rdma_what_was_taken_back_cannot_be_read),       \
        STORY(rdma_nothing_beside_the_shard_can_be_read), \
        STORY(rdma_what_was_granted_to_one_peer_opens_nothing_to_another)

#endif
