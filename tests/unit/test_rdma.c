/* What the RDMA transport does when the device, the fabric or memory fails: over a device that fails on demand. */
#include "p2pfs_config.h"
#if !P2PFS_HAVE_RDMA
int main(void)
{
    return 77; // a build without it
}
#else
#include "engine/engine.h"
#include "engine/extents.h"
#include "engine/rdma_link.h"
#include "tests/unit/fake_rdma.h"

#include "tests/contract/fence_story.h"

#define SHARD (3u << 20)
#define PULLS 4
#define SOON  5000 /* ms: it must happen at all */

static int setup(void **state)
{
    fake_reset();
    return story_setup(state);
}

/* Nothing is left behind, whatever the story was. */
static int end(void **state)
{
    story_end(state);
    for (int turn = 0; !fake_empty() && turn < SOON; turn++)
        usleep(1000); // memory is deregistered by threads
    if (!fake_empty())
        print_error(
            "left behind: %d domains, %d regions, %d queues, %d pairs, %d ids, %d channels, %d events\n",
            fake.domains, fake.regions, fake.queues, fake.pairs, fake.ids, fake.channels,
            fake.events);
    return fake_empty() ? 0 : -1;
}

static void offer_all(void)
{
    puller.on_message = take_grant;
    awaited_fetches = PULLS;
    for (uint32_t id = 1; id <= PULLS; id++)
        offer(id, (size_t)(id - 1) * SHARD, SHARD, false);
}

/* Each fetch was answered once; the first failure's status. */
static int answers(void)
{
    int first = 0;
    for (uint32_t id = 1; id <= PULLS; id++) {
        assert_int_equal(puller.done[id], 1);
        first = first ? first : puller.status[id];
    }
    return first;
}

static void all_arrive(void)
{
    assert_true(run_until(fetches_finished, SOON));
    assert_int_equal(answers(), 0);
    assert_true(landed_right(0, (size_t)PULLS * SHARD));
    assert_int_equal(puller.downs + holder.downs, 0);
}

static void rdma_shards_arrive_over_the_device_of_this_test(void **state)
{
    link_up();
    offer_all();
    all_arrive();
}

static struct fake_id *id_of(const struct side *side)
{
    return fake_id_of(((struct rdma_link *)side->link)->rails[0].id);
}

// -- Connecting -----------------------------------------------------------------------------------

static void connect_fails(int error)
{
    memset(&puller, 0, sizeof puller);
    memset(&holder, 0, sizeof holder);
    assert_int_equal(ops->connect(transport, address, SOON, &puller, &puller.link), 0);
    assert_true(run_until(puller_down, 2 * SOON));
    assert_int_equal(puller.downs, 1);
    assert_int_equal(puller.connected, 0);
    assert_int_equal(puller.error, error);
    run_for(5); // whatever is still told
    assert_int_equal(holder.connected, 0);
}

/* And the next one, without a fault, succeeds. */
static void then_connects(void)
{
    fake_fail_at(FAKE_NONE, 0, EIO);
    fake.event = RDMA_CM_EVENT_ADDR_RESOLVED;
    memset(&puller, 0, sizeof puller);
    memset(&holder, 0, sizeof holder);
    link_up();
}

static void rdma_what_cannot_be_made_ends_the_connection(void **state)
{
    static const enum fake_call calls[] = {FAKE_QUERY_DEVICE,  FAKE_CREATE_CHANNEL,  FAKE_ALLOC_PD,
                                           FAKE_REGISTER,      FAKE_CREATE_CQ,       FAKE_CREATE_QP,
                                           FAKE_POST_RECEIVE,  FAKE_NOTIFY,          FAKE_CREATE_ID,
                                           FAKE_RESOLVE_ROUTE, FAKE_RESOLVE_ADDRESS, FAKE_CONNECT};
    for (size_t i = 0; i < util_count(calls); i++) {
        fake_fail_at(calls[i], 0, ENOSPC);
        connect_fails(-ENOSPC);
    }
    then_connects();
}

/* One request that fails is made again, at once, and nobody hears of the first. */
static void rdma_a_request_that_fails_is_repeated_once(void **state)
{
    static const enum fake_call calls[] = {FAKE_ACCEPT, FAKE_CREATE_CQ, FAKE_CREATE_QP};
    for (size_t i = 0; i < util_count(calls); i++) {
        fake_fail_at(calls[i], i > 0, EINVAL); // the connecting side makes its own first
        memset(&puller, 0, sizeof puller);
        memset(&holder, 0, sizeof holder);
        link_up();
        assert_int_equal(holder.connected, 1);
        side_shut(&puller);
        assert_true(run_until(holder_down, SOON));
    }
    fake.instead_of = RDMA_CM_EVENT_ESTABLISHED;
    fake.event = RDMA_CM_EVENT_UNREACHABLE;
    fake.event_status = -ETIMEDOUT;
    connect_fails(-ETIMEDOUT);
    then_connects();
}

static void rdma_a_fabric_that_refuses_says_why(void **state)
{
    static const struct {
        enum rdma_cm_event_type at, instead;
        int status, error;
    } cases[] = {
        {RDMA_CM_EVENT_ADDR_RESOLVED, RDMA_CM_EVENT_ADDR_ERROR, -ENODEV, -ENODEV},
        {RDMA_CM_EVENT_ROUTE_RESOLVED, RDMA_CM_EVENT_ROUTE_ERROR, -EHOSTUNREACH, -EHOSTUNREACH},
        {RDMA_CM_EVENT_ROUTE_RESOLVED, RDMA_CM_EVENT_CONNECT_ERROR, 5, -EHOSTUNREACH},
        {RDMA_CM_EVENT_ROUTE_RESOLVED, RDMA_CM_EVENT_REJECTED, 28, -ECONNREFUSED},
        {RDMA_CM_EVENT_ADDR_RESOLVED, RDMA_CM_EVENT_DEVICE_REMOVAL, 0, -ENODEV},
    };
    for (size_t i = 0; i < util_count(cases); i++) {
        fake.instead_of = cases[i].at;
        fake.event = cases[i].instead;
        fake.event_status = cases[i].status;
        connect_fails(cases[i].error);
    }
    then_connects();
}

static int refusals;

static bool refused(void)
{
    return puller.downs >= refusals;
}

static unsigned accepting(uint64_t since_ns)
{
    struct rdma_link *link;
    unsigned count = 0;
    DL_FOREACH(((struct rdma_transport *)transport)->links, link) {
        if (link->state == RDMA_ACCEPTING) {
            count++;
            if (since_ns)
                link->rails[0].since_ns = since_ns;
        }
    }
    return count;
}

/* Their connections never come to be. */
static void strangers(unsigned hosts, int count, int refused_of_all)
{
    fake.instead_of = RDMA_CM_EVENT_ESTABLISHED;
    fake.event = RDMA_CM_EVENT_TIMEWAIT_EXIT;
    fake.hosts = hosts;
    for (int i = 0; i < count; i++)
        assert_int_equal(ops->connect(transport, address, 120000, &puller, &puller.link), 0);
    refusals = refused_of_all;
    assert_true(run_until(refused, SOON));
}

/* No more of them are begun than there is room for, for one host and for all. */
static void rdma_strangers_who_fall_silent_are_bounded(void **state)
{
    strangers(1, 64 + 3, 3);
    assert_int_equal(accepting(0), 64);
    strangers(8, 256, 3 + 64);
    assert_int_equal(accepting(0), 256);
    assert_true(fake.pairs <= 2 * 256);
    assert_int_equal(holder.connected, 0);
}

static bool all_let_go(void)
{
    accepting(1); // as if they had begun long ago
    return refused();
}

static void rdma_strangers_who_fall_silent_are_let_go(void **state)
{
    strangers(1, 3, 0);
    refusals = 3;
    assert_true(run_until(all_let_go, SOON));
    assert_int_equal(accepting(0), 0);
    assert_int_equal(holder.connected, 0);
    then_connects();
}

static void rdma_what_is_told_twice_counts_once(void **state)
{
    struct transport_adapter known[2];
    link_up();
    fake_tell(&id_of(&puller)->id, NULL, RDMA_CM_EVENT_ESTABLISHED, NULL);
    fake_tell(&id_of(&holder)->id, NULL, RDMA_CM_EVENT_ESTABLISHED, NULL);
    offer_all();
    all_arrive();
    assert_int_equal(puller.connected + holder.connected, 2);
    assert_int_equal(ops->adapters(known, util_count(known)), 1);
    assert_int_equal(known[0].rails, 2);
}

/* Another version, other frames, other counts of them, or a rail of a link that nobody has. */
static void rdma_who_says_other_things_of_itself_is_refused(void **state)
{
    static const unsigned bytes[] = {8, 10, 12, 21};
    for (size_t i = 0; i < util_count(bytes); i++) {
        fake.spoiled = bytes[i];
        connect_fails(-ECONNREFUSED);
    }
    fake.spoiled = 0;
    then_connects();
}

// -- Sending and reading --------------------------------------------------------------------------

static bool both_down(void)
{
    return puller.downs > 0 && holder.downs > 0;
}

static void rdma_a_message_that_cannot_be_posted_ends_the_link(void **state)
{
    link_up();
    fake_fail_at(FAKE_POST_SEND, 0, ENOMEM);
    assert_int_equal(ops->send(puller.link, "hello", 5), 0);
    assert_true(run_until(puller_down, SOON));
    assert_int_equal(puller.error, -ENOMEM);
    assert_non_null(strstr(puller.reason, "message"));
    assert_true(run_until(holder_down, SOON));
}

/* A frame as no link of ours sends it. */
static void frame_post(const uint8_t *head, size_t length)
{
    struct rdma_link *link = (struct rdma_link *)puller.link;
    unsigned slot = link->idle_slots[--link->idle_count];
    uint8_t *frame = link->frames + (size_t)(RDMA_FRAMES + slot) * RDMA_FRAME_BYTES;
    memset(frame, 0, RDMA_FRAME_BYTES);
    memcpy(frame, head, length < RDMA_HEAD_BYTES ? length : RDMA_HEAD_BYTES);
    struct ibv_sge piece = {.addr = (uintptr_t)frame,
                            .length = (uint32_t)length,
                            .lkey = link->frames_memory.region->lkey};
    struct ibv_send_wr *bad, request = {.wr_id = RDMA_WORK_SEND * 256 + slot,
                                        .sg_list = &piece,
                                        .num_sge = 1,
                                        .opcode = IBV_WR_SEND};
    assert_int_equal(ibv_post_send(link->rails[0].id->qp, &request, &bad), 0);
}

static void rdma_a_peer_that_lies_in_its_frames_ends_the_link(void **state)
{
    static const struct {
        uint8_t head[RDMA_HEAD_BYTES]; // kind, more, credits, length
        size_t length;
        int count;
    } cases[] = {
        {{1, 0, 0, 0, 0, 0, 0, 8}, 7, 1},  // no whole head
        {{1, 0, 0, 0, 0, 0, 0, 8}, 0, 1},  // nothing
        {{0, 0, 0, 0, 0, 0, 0, 8}, 16, 1}, // no such kind
        {{3, 0, 0, 0, 0, 0, 0, 8}, 16, 1}, // no such kind
        {{1, 2, 0, 0, 0, 0, 0, 8}, 16, 1}, // neither more nor not
        {{1, 0, 0, 1, 0, 0, 0, 8}, 16, 1}, // a credit more than there are buffers
        {{2, 0, 255, 255, 0, 0, 0, 0}, 8, 1},
        {{1, 0, 0, 0, 0, 0, 0, 9}, 16, 1}, // longer than the frame
        {{1, 0, 0, 0, 255, 255, 255, 255}, 16, 1},
        {{1, 0, 0, 0, 0, 0, 0, 7}, 16, 1},                   // shorter
        {{1, 1, 0, 0, 0, 0, 0, 0}, 8, 1},                    // a part of nothing
        {{1, 1, 0, 0, 0, 0, 15, 248}, RDMA_FRAME_BYTES, 17}, // a message that does not end
    };
    for (size_t i = 0; i < util_count(cases); i++) {
        memset(&puller, 0, sizeof puller);
        memset(&holder, 0, sizeof holder);
        link_up();
        for (int n = 0; n < cases[i].count; n++)
            frame_post(cases[i].head, cases[i].length);
        assert_true(run_until(both_down, SOON));
        assert_int_equal(holder.error, -EPROTO);
        assert_int_equal(holder.messages, 0);
    }
}

static void rdma_a_holder_that_lies_in_its_grant_is_told_apart(void **state)
{
    link_up();
    kept.kind = 0;
    puller.on_message = keep_grant;
    offer(1, 0, 4096, false);
    assert_true(run_until(grant_kept, SOON));
    struct transport_fetch fetch = {.destination = landing, .length = 4096, .id = 1};
    for (unsigned at = 0; at < 26; at++) {
        struct transport_descriptor lie = kept.descriptor;
        if (at >= 14 && at < 22)
            continue; // where the shard lies is the holder's to say
        if (at >= 22)
            memset(lie.bytes + 22, 0, 4); // no key
        else
            lie.bytes[at] ^= 0x82;
        assert_int_equal(ops->fetch(puller.link, &lie, &fetch), -EINVAL);
    }
    for (unsigned length = 0; length < kept.descriptor.length; length++) {
        struct transport_descriptor lie = kept.descriptor;
        lie.length = (uint8_t)length;
        assert_int_equal(ops->fetch(puller.link, &lie, &fetch), -EINVAL);
    }
    take_grant(&puller, &kept, sizeof(kept));
    awaited_fetches = 1;
    assert_true(run_until(fetches_finished, SOON));
    assert_int_equal(puller.status[1], 0);
}

static void rdma_a_buffer_that_cannot_be_posted_again_ends_the_link(void **state)
{
    link_up();
    fake_fail_at(FAKE_POST_RECEIVE, 0, ENOMEM);
    assert_int_equal(ops->send(puller.link, "hello", 5), 0);
    assert_true(run_until(holder_down, SOON));
    assert_int_equal(holder.messages, 1);
    assert_int_equal(holder.error, -ENOMEM);
    assert_true(run_until(puller_down, SOON));
}

static void rdma_a_read_that_cannot_be_posted_answers_every_fetch(void **state)
{
    for (unsigned after = 0; after < 20; after += 3) {
        memset(&puller, 0, sizeof puller);
        memset(&holder, 0, sizeof holder);
        link_up();
        fake_fail_at(FAKE_POST_READ, after, EINVAL);
        offer_all();
        assert_true(run_until(puller_down, SOON));
        assert_int_equal(answers(), -EINVAL);
        assert_int_equal(puller.error, -EINVAL);
        assert_true(run_until(holder_down, SOON));
    }
}

static int error_of(enum ibv_wc_status status)
{
    switch (status) {
    case IBV_WC_WR_FLUSH_ERR:
        return -ECONNRESET;
    case IBV_WC_RETRY_EXC_ERR:
    case IBV_WC_RNR_RETRY_EXC_ERR:
        return -ETIMEDOUT;
    case IBV_WC_REM_ACCESS_ERR:
        return -EIO;
    default:
        return -ENETDOWN;
    }
}

static void rdma_every_failed_completion_answers_every_fetch(void **state)
{
    for (enum ibv_wc_status status = IBV_WC_LOC_LEN_ERR; status <= IBV_WC_GENERAL_ERR; status++) {
        memset(&puller, 0, sizeof puller);
        memset(&holder, 0, sizeof holder);
        link_up();
        fake.read_status = status;
        offer_all();
        assert_true(run_until(puller_down, SOON));
        assert_int_equal(answers(), error_of(status));
        assert_int_equal(puller.error, error_of(status));
        assert_int_equal(puller.downs, 1);
        assert_true(run_until(holder_down, SOON));
    }
}

static void rdma_every_failed_completion_of_a_message_ends_the_link(void **state)
{
    for (enum ibv_wc_status status = IBV_WC_LOC_LEN_ERR; status <= IBV_WC_GENERAL_ERR; status++) {
        memset(&puller, 0, sizeof puller);
        memset(&holder, 0, sizeof holder);
        link_up();
        fake.send_status = status;
        assert_int_equal(ops->send(puller.link, "hello", 5), 0);
        assert_true(run_until(puller_down, SOON));
        assert_int_equal(puller.error, error_of(status));
        assert_int_equal(holder.messages, 0);
        assert_true(run_until(holder_down, SOON));
    }
}

static bool reads_under_way(void)
{
    return ((struct rdma_link *)puller.link)->reads_count > 0;
}

static void rdma_a_device_that_is_removed_answers_every_fetch(void **state)
{
    link_up();
    fake.reads_stall = true;
    offer_all();
    assert_true(run_until(reads_under_way, SOON));
    fake_tell(&id_of(&puller)->id, NULL, RDMA_CM_EVENT_DEVICE_REMOVAL, NULL);
    assert_true(run_until(puller_down, SOON));
    assert_int_equal(answers(), -ENODEV);
    assert_non_null(strstr(puller.reason, "fake0 is gone"));
    assert_true(run_until(holder_down, SOON));
}

static struct ibv_context *removed;

static bool let_go(void)
{
    return !fake_held(removed);
}

static bool listens_again(void)
{
    return fake.listeners;
}

/* Nothing of the removed one is used any more: librdmacm may close it then. */
static void rdma_a_device_that_returns_is_used_again(void **state)
{
    struct transport_adapter known[2];
    link_up();
    fake.reads_stall = true;
    offer_all();
    assert_true(run_until(reads_under_way, SOON));
    removed = fake_context;
    fake_remove();
    assert_true(run_until(both_down, SOON));
    assert_int_equal(answers(), -ENODEV);
    assert_true(run_until(let_go, SOON));
    memset(removed, 0xff, sizeof(*removed));
    assert_int_equal(ops->adapters(known, util_count(known)), 1);
    assert_string_equal(known[0].device, fake_device.name);
    assert_int_equal(known[0].rails, 0);
    uint64_t received = known[0].received;
    fake_reset();
    assert_true(run_until(listens_again, SOON));
    then_connects();
    offer_all();
    all_arrive();
    assert_int_equal(ops->adapters(known, util_count(known)), 1);
    assert_int_equal(known[0].received, received + (uint64_t)PULLS * SHARD);
}

/* Kernels tell so when the neighbour's hardware address is another than the connection was made with. */
static void rdma_a_neighbour_that_moves_ends_the_link(void **state)
{
    link_up();
    fake.reads_stall = true;
    offer_all();
    assert_true(run_until(reads_under_way, SOON));
    fake_tell(&id_of(&puller)->id, NULL, RDMA_CM_EVENT_UNREACHABLE, NULL);
    assert_true(run_until(both_down, SOON));
    assert_int_equal(answers(), -EHOSTUNREACH);
    assert_int_equal(puller.downs, 1);
}

static void rdma_completions_that_cannot_be_waited_for_end_the_link(void **state)
{
    link_up();
    fake_fail_at(FAKE_NOTIFY, 0, ENOMEM);
    assert_int_equal(ops->send(puller.link, "hello", 5), 0);
    assert_true(run_until(both_down, SOON));
    assert_true(puller.error == -ENOMEM || holder.error == -ENOMEM);
}

// -- Memory ---------------------------------------------------------------------------------------

static void rdma_memory_that_cannot_be_registered_fails_its_fetch_only(void **state)
{
    link_up();
    fake_fail_at(FAKE_REGISTER_WRITE, 0, ENOMEM);
    offer_all();
    assert_true(run_until(fetches_finished, SOON));
    int failed = 0;
    for (uint32_t id = 1; id <= PULLS; id++) {
        assert_int_equal(puller.done[id], 1);
        assert_true(puller.status[id] == 0 || puller.status[id] == -ENOMEM);
        failed += puller.status[id] == -ENOMEM;
        assert_true(puller.status[id] < 0 || landed_right((size_t)(id - 1) * SHARD, SHARD));
    }
    assert_int_equal(failed, 1);
    assert_int_equal(puller.downs + holder.downs, 0);
}

static void rdma_memory_that_cannot_be_offered_is_told_at_once(void **state)
{
    struct transport_descriptor descriptor;
    struct transport_region part = {.fd = region.fd, .map = source, .length = SHARD};
    link_up();
    fake_fail_at(FAKE_REGISTER_READ, 0, EPERM);
    assert_int_equal(ops->expose(holder.link, 1, &part, false, &descriptor), -EPERM);
    offer_all(); // the same id again: nothing was kept
    all_arrive();
}

static void rdma_memory_that_cannot_be_taken_back_ends_the_link(void **state)
{
    link_up();
    offer_all();
    all_arrive();
    fake_fail_at(FAKE_DEREGISTER, 0, EBUSY);
    ops->unexpose(holder.link, 1);
    assert_true(run_until(holder_down, SOON));
    assert_int_equal(holder.error, -EBUSY);
    assert_true(run_until(puller_down, SOON));
}

static void rdma_a_cancelled_read_that_does_not_end_takes_the_link_along(void **state)
{
    link_up();
    fake.reads_stall = true;
    offer_all();
    assert_true(run_until(reads_under_way, SOON));
    ops->cancel(puller.link, &puller.fetch[1]);
    assert_int_equal(fake.pairs, 1); // after return nothing can land
    assert_true(run_until(both_down, SOON));
    assert_int_equal(puller.error, -ETIMEDOUT);
    assert_int_equal(puller.done[1], 0);
    for (uint32_t id = 2; id <= PULLS; id++)
        assert_int_equal(puller.done[id], 1);
}

static atomic_int released;

static void on_released(void *arg)
{
    atomic_fetch_add(&released, 1);
}

/* A program's memory is its own again when the device has let go of it, not before. */
static void rdma_lent_memory_comes_back_behind_its_deregistration(void **state)
{
    struct engine_range range = {landing, SHARD};
    struct extents *lent;
    atomic_store(&released, 0);
    assert_int_equal(extents_new(&range, 1, on_released, NULL, &lent), 0);
    link_up();
    struct transport_descriptor descriptor;
    struct transport_region part = {.fd = region.fd, .map = source, .length = SHARD};
    assert_int_equal(ops->expose(holder.link, 1, &part, false, &descriptor), 0);
    puller.fetch[1] =
        (struct transport_fetch){.destination = landing, .length = SHARD, .id = 1, .lent = lent};
    assert_int_equal(ops->fetch(puller.link, &descriptor, &puller.fetch[1]), 0);
    fake.reads_stall = true;
    assert_true(run_until(reads_under_way, SOON));
    pthread_mutex_lock(&fake.lock);
    fake.deregister_waits = true;
    pthread_mutex_unlock(&fake.lock);
    ops->cancel(puller.link, &puller.fetch[1]);
    extents_end(lent, 0);
    extents_leave(lent);
    extents_free(lent); // as the replica's last user does
    run_for(50);
    assert_int_equal(atomic_load(&released), 0);
    pthread_mutex_lock(&fake.lock);
    fake.deregister_waits = false;
    pthread_cond_broadcast(&fake.changed);
    pthread_mutex_unlock(&fake.lock);
    for (int turn = 0; atomic_load(&released) == 0 && turn < SOON; turn++)
        usleep(1000);
    assert_int_equal(atomic_load(&released), 1);
}

/* It ended before it was registered: nothing is. */
static void rdma_lent_memory_that_was_taken_back_is_not_registered(void **state)
{
    struct engine_range range = {landing, SHARD};
    struct extents *lent;
    assert_int_equal(extents_new(&range, 1, on_released, NULL, &lent), 0);
    link_up();
    struct transport_descriptor descriptor;
    struct transport_region part = {.fd = region.fd, .map = source, .length = SHARD};
    assert_int_equal(ops->expose(holder.link, 1, &part, false, &descriptor), 0);
    puller.fetch[1] =
        (struct transport_fetch){.destination = landing, .length = SHARD, .id = 1, .lent = lent};
    extents_end(lent, 0);
    assert_int_equal(ops->fetch(puller.link, &descriptor, &puller.fetch[1]), -ECANCELED);
    extents_leave(lent);
    extents_free(lent);
}

static const struct story stories[] = {
    STORY(rdma_shards_arrive_over_the_device_of_this_test),
    STORY(rdma_what_cannot_be_made_ends_the_connection),
    STORY(rdma_a_request_that_fails_is_repeated_once),
    STORY(rdma_a_fabric_that_refuses_says_why),
    STORY(rdma_strangers_who_fall_silent_are_bounded),
    STORY(rdma_strangers_who_fall_silent_are_let_go),
    STORY(rdma_what_is_told_twice_counts_once),
    STORY(rdma_who_says_other_things_of_itself_is_refused),
    STORY(rdma_a_message_that_cannot_be_posted_ends_the_link),
    STORY(rdma_a_peer_that_lies_in_its_frames_ends_the_link),
    STORY(rdma_a_holder_that_lies_in_its_grant_is_told_apart),
    STORY(rdma_a_buffer_that_cannot_be_posted_again_ends_the_link),
    STORY(rdma_a_read_that_cannot_be_posted_answers_every_fetch),
    STORY(rdma_every_failed_completion_answers_every_fetch),
    STORY(rdma_every_failed_completion_of_a_message_ends_the_link),
    STORY(rdma_a_device_that_is_removed_answers_every_fetch),
    STORY(rdma_a_device_that_returns_is_used_again),
    STORY(rdma_a_neighbour_that_moves_ends_the_link),
    STORY(rdma_completions_that_cannot_be_waited_for_end_the_link),
    STORY(rdma_memory_that_cannot_be_registered_fails_its_fetch_only),
    STORY(rdma_memory_that_cannot_be_offered_is_told_at_once),
    STORY(rdma_memory_that_cannot_be_taken_back_ends_the_link),
    STORY(rdma_a_cancelled_read_that_does_not_end_takes_the_link_along),
    FENCE_STORIES,
    STORY(rdma_lent_memory_comes_back_behind_its_deregistration),
    STORY(rdma_lent_memory_that_was_taken_back_is_not_registered),
};

int main(int argc, char **argv)
{
    setenv("P2PFS_RDMA_ADDRESS", "127.0.0.1:0", 1);
    story_begin = setup;
    story_over = end;
    return stories_run(stories, util_count(stories), argc, argv);
}
#endif
