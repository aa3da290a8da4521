/* Changes that wait in the queue together share transactions, and each one gets the answer that it would get alone. */
#include <semaphore.h>

#include "test_catalog_kit.h"

#define COUNT 200
#define BELOW (CODEC_TREE "e/")

static struct model_version versions[COUNT];

static int setup(void **state)
{
    if (kit_setup(state) < 0)
        return -1;
    for (int i = 0; i < COUNT; i++)
        versions[i] = kit_version(1);
    return 0;
}

/* ---- a catalog that is kept busy until the queue is full ---- */

struct hold {
    sem_t held;
    sem_t go;
};

static void hold_done(void *arg, int status, const struct model_entry *entry)
{
    struct hold *hold = arg;
    sem_post(&hold->held);
    sem_wait(&hold->go);
}

static void hold(struct hold *hold)
{
    sem_init(&hold->held, 0, 0);
    sem_init(&hold->go, 0, 0);
    assert_int_equal(catalog_mkdir(a->catalog, MODEL_ROOT, "d", &kit_attr, hold_done, hold), 0);
    sem_wait(&hold->held);
}

static void publish_queued(struct catalog_sync *sync, const char *name, int version)
{
    *sync = (struct catalog_sync){0};
    assert_int_equal(catalog_publish(a->catalog, MODEL_ROOT, name, 0, &kit_attr, &versions[version],
                                     CATALOG_COMPLETE, catalog_sync_done, sync),
                     0);
}

/* Names f0, f1, ... */
static void publish_all(struct catalog_sync *syncs)
{
    for (int i = 0; i < COUNT; i++) {
        char name[16];
        snprintf(name, sizeof(name), "f%d", i);
        publish_queued(&syncs[i], name, i);
    }
}

struct revisions {
    uint64_t seen[COUNT + 1];
    size_t count;
};

static int revisions_each(void *arg, const struct meta_event *event)
{
    struct revisions *all = arg;
    for (size_t i = 0; i < all->count; i++) {
        if (all->seen[i] == event->revision)
            return 0;
    }
    if (all->count <= COUNT)
        all->seen[all->count++] = event->revision;
    return 0;
}

/* Of how many transactions the records below a prefix are. */
static size_t transactions(const char *prefix)
{
    struct meta_store *store = raw_open();
    struct revisions all = {0};
    uint64_t revision;
    assert_int_equal(store->ops->list(store, prefix, revisions_each, &all, &revision), 0);
    meta_close(store);
    return all.count;
}

/* ---- stories ---- */

static void what_is_queued_together_shares_transactions(void **state)
{
    struct catalog_sync syncs[COUNT];
    struct hold busy;
    uint8_t root[MODEL_DIGEST_MAX] = {7};
    for (int i = 0; i < COUNT; i++)
        versions[i].sealed = false;
    hold(&busy);
    publish_all(syncs);
    sem_post(&busy.go);
    for (int i = 0; i < COUNT; i++) {
        assert_int_equal(catalog_sync_wait(&syncs[i]), 0);
        assert_int_not_equal(syncs[i].id, 0);
    }
    assert_in_range(transactions(BELOW), 2, 1 + COUNT / (META_TXN_MAX / 3) + 1); /* and "d" */
    kit_until(1000, sees(b, "f0") && sees(b, "f199"));
    assert_string_equal(do_holders(b, &versions[COUNT - 1].id), "a+ ");

    assert_int_equal(do_rmdir(a, MODEL_ROOT, "d"), 0);
    hold(&busy);
    for (int i = 0; i < COUNT; i++) {
        syncs[i] = (struct catalog_sync){0};
        assert_int_equal(
            catalog_seal(a->catalog, &versions[i].id, root, catalog_sync_done, &syncs[i]), 0);
    }
    sem_post(&busy.go);
    for (int i = 0; i < COUNT; i++)
        assert_int_equal(catalog_sync_wait(&syncs[i]), 0);
    assert_in_range(transactions(CODEC_TREE "v/"), 1, COUNT / META_TXN_MAX + 1);
}

static void each_of_them_gets_its_own_answer(void **state)
{
    struct catalog_sync syncs[COUNT];
    struct catalog_sync again;
    struct catalog_sync missing = {0};
    struct hold busy;
    struct model_id none = model_id_new();
    hold(&busy);
    publish_all(syncs);
    publish_queued(&again, "f7", 8); /* the name is taken, by a change before it */
    assert_int_equal(catalog_announce(a->catalog, &none, 0, catalog_sync_done, &missing), 0);
    do_file(b, MODEL_ROOT, "f60", 3); /* and that by another node, which a does not know yet */
    sem_post(&busy.go);
    for (int i = 0; i < COUNT; i++) {
        int rc = catalog_sync_wait(&syncs[i]);
        if (rc != (i == 60 ? -EEXIST : 0))
            fail_msg("f%d: %s", i, strerror(-rc));
    }
    assert_int_equal(catalog_sync_wait(&again), -EEXIST);
    assert_int_equal(catalog_sync_wait(&missing), -ENOENT);
    assert_string_equal(do_holders(a, &versions[60].id), "");
    assert_int_equal(raw_count(CODEC_TREE "v/"), COUNT); /* b's instead of ours */
    assert_in_range(transactions(BELOW), 2, COUNT / 3);
}

static void records_of_long_paths_share_less(void **state)
{
    static char path[MODEL_PATH_MAX + 1];
    struct catalog_sync syncs[COUNT];
    struct hold busy;
    memset(path, 0xff, MODEL_PATH_MAX); /* each byte takes three in a record */
    for (int i = 0; i < COUNT; i++)
        versions[i].origin_path = path;
    hold(&busy);
    publish_all(syncs);
    sem_post(&busy.go);
    for (int i = 0; i < COUNT; i++)
        assert_int_equal(catalog_sync_wait(&syncs[i]), 0);
    assert_in_range(transactions(BELOW), COUNT * 3 * MODEL_PATH_MAX / (512 << 10), COUNT / 4);
}

static void an_outage_fails_all_of_them_and_leaves_nothing(void **state)
{
    struct catalog_sync syncs[COUNT];
    struct hold busy;
    char away[80];
    snprintf(away, sizeof(away), "%s.away", kit_dir);
    hold(&busy);
    publish_all(syncs);
    assert_int_equal(rename(kit_dir, away), 0);
    sem_post(&busy.go);
    for (int i = 0; i < COUNT; i++) {
        int rc = catalog_sync_wait(&syncs[i]);
        assert_true(rc < 0 && rc != -EAGAIN && rc != -EEXIST);
    }
    assert_int_equal(rename(away, kit_dir), 0);
    kit_until(4000, catalog_online(a->catalog, NULL) && catalog_online(b->catalog, NULL));
    assert_string_equal(names_in(a, MODEL_ROOT), "d ");
    assert_int_equal(raw_count(CODEC_TREE "v/"), 0);
    assert_int_equal(do_publish(a, MODEL_ROOT, "f1", &versions[1], CATALOG_COMPLETE), 0);
    kit_until(1000, sees(b, "f1"));
}

#define STORY(test) cmocka_unit_test_setup_teardown(test, setup, kit_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        STORY(what_is_queued_together_shares_transactions),
        STORY(each_of_them_gets_its_own_answer),
        STORY(records_of_long_paths_share_less),
        STORY(an_outage_fails_all_of_them_and_leaves_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
