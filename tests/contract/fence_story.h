/* The fence of RDMA: stories that a device must keep, a real one and the one that the unit tests play. */
#ifndef P2PFS_TESTS_FENCE_STORY_H
#define P2PFS_TESTS_FENCE_STORY_H

#include "p2pfs_config.h"
#if P2PFS_HAVE_RDMA
#include "engine/rdma_link.h"
#include "meta/base/buf.h"
#endif
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

/* By verbs of its own: the transport writes nowhere. */
static void rdma_what_was_granted_cannot_be_written(void **state)
{
#if P2PFS_HAVE_RDMA
    link_up();
    kept.kind = 0;
    puller.on_message = keep_grant;
    offer(1, 0, 4096, false);
    assert_true(run_until(grant_kept, 5000));
    struct rdma_link *link = (struct rdma_link *)puller.link;
    struct buf b = buf_over(kept.descriptor.bytes + 14, 12);
    unsigned slot = link->idle_slots[--link->idle_count];
    struct ibv_sge piece = {
        .addr = (uintptr_t)link->frames, .length = 4096, .lkey = link->frames_memory.region->lkey};
    struct ibv_send_wr *bad, request = {.wr_id = RDMA_WORK_SEND * 256 + slot,
                                        .sg_list = &piece,
                                        .num_sge = 1,
                                        .opcode = IBV_WR_RDMA_WRITE};
    request.wr.rdma.remote_addr = buf_get_u64(&b);
    request.wr.rdma.rkey = buf_get_u32(&b);
    assert_int_equal(request.wr.rdma.remote_addr, (uintptr_t)source);
    uint8_t before[4096];
    memcpy(before, source, sizeof(before));
    memset(link->frames, 0x55, sizeof(before));
    assert_int_equal(ibv_post_send(link->rails[0].id->qp, &request, &bad), 0);
    assert_true(run_until(puller_down, 5000));
    assert_int_equal(puller.error, -EIO);
    assert_memory_equal(source, before, sizeof(before));
#endif
}

#define FENCE_STORIES                                                      \
    STORY(rdma_what_was_taken_back_cannot_be_read),                        \
        STORY(rdma_nothing_beside_the_shard_can_be_read),                  \
        STORY(rdma_what_was_granted_to_one_peer_opens_nothing_to_another), \
        STORY(rdma_what_was_granted_cannot_be_written)

#endif
