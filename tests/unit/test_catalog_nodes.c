/* Nodes: their leases and names, who holds what, and what becomes of it when they end. */
#include "test_catalog_kit.h"

/* A node that registers or holds "f" and then waits to be killed. */
static int role_registers(const char *argument)
{
    struct kit_node *node = kit_up(argument);
    do_file(node, MODEL_ROOT, "f", 1);
    kit_ready();
    pause();
    return 0;
}

static int role_holds(const char *argument)
{
    struct kit_node *node = kit_up(argument);
    struct model_id id = version_at(node, "f");
    if (do_announce(node, &id, CATALOG_COMPLETE) != 0)
        return 1;
    kit_ready();
    pause();
    return 0;
}

static int role_serves(const char *argument)
{
    kit_up(argument);
    kit_ready();
    pause();
    return 0;
}

static void kill_now(pid_t pid)
{
    kill(pid, SIGKILL);
    kit_reap(pid);
}

/* ---- up and down ---- */

static void nodes_know_each_other(void **state)
{
    struct model_node node;
    struct model_node *nodes;
    size_t count;
    kit_until(1000, kit_told(a, "up:b"));
    assert_false(kit_told(a, "up:a"));
    assert_int_equal(catalog_node(a->catalog, "b", &node), 0);
    assert_string_equal(node.address, "127.0.0.1:1");
    assert_int_equal(node.pid, getpid());
    assert_true(node.boot != 0 && node.host[0]);
    assert_int_equal(catalog_node(a->catalog, "c", &node), -ENOENT);
    assert_int_equal(catalog_nodes(a->catalog, &nodes, &count), 0);
    assert_int_equal(count, 2);
    free(nodes);
    struct kit_node *c = kit_up("c");
    kit_until(1000, kit_told(a, "up:c"));
    kit_close(c);
    kit_until(1000, kit_told(a, "down:c"));
}

static void a_node_that_never_serves_is_not_listed(void **state)
{
    struct model_node node;
    struct kit_node *watcher = kit_open("watcher");
    struct model_id id = do_file(watcher, MODEL_ROOT, "f", 1);
    kit_until(1000, sees(a, "f"));
    assert_int_equal(catalog_node(a->catalog, "watcher", &node), -ENOENT);
    assert_string_equal(do_holders(a, &id), "");
    kit_close(watcher);
}

static void bad_node_names_are_refused(void **state)
{
    static const char *const bad[] = {"", "a b", "a/b", "a%", "\xc3\xa4"};
    for (size_t i = 0; i < util_count(bad); i++) {
        struct catalog *catalog;
        char *error;
        struct catalog_config config = {.url = kit_url};
        snprintf(config.self.name, sizeof(config.self.name), "%s", bad[i]);
        assert_int_equal(catalog_open(&config, &catalog, &error), -EINVAL);
        assert_non_null(strstr(error, "node="));
        free(error);
    }
}

static int serve_as(const char *name, struct kit_node **out, char **error)
{
    *out = kit_open(name);
    return catalog_serve((*out)->catalog, "127.0.0.1:9", error);
}

static void a_name_in_use_by_a_live_process_is_refused_at_once(void **state)
{
    struct kit_node *second;
    char *error;
    pid_t child = kit_spawn("serves", "twin");
    assert_int_equal(serve_as("twin", &second, &error), -EEXIST);
    assert_non_null(strstr(error, "twin"));
    assert_non_null(strstr(error, "127.0.0.1:1"));
    assert_non_null(strstr(error, "node="));
    free(error);
    kit_close(second);
    kill_now(child);
}

static struct catalog *opened(const char *name, const char *host, uint32_t lease_ms)
{
    struct catalog *catalog;
    struct catalog_config config = {.url = kit_url, .lease_ms = lease_ms};
    snprintf(config.self.name, sizeof(config.self.name), "%s", name);
    snprintf(config.self.host, sizeof(config.self.host), "%s", host);
    assert_int_equal(catalog_open(&config, &catalog, NULL), 0);
    return catalog;
}

static void a_name_in_use_in_this_process_is_refused_at_once(void **state)
{
    struct catalog *first = opened("twin", "", 60000);
    struct catalog *second = opened("twin", "", 60000);
    uint64_t start = util_now_ms();
    assert_int_equal(catalog_serve(first, "127.0.0.1:1", NULL), 0);
    assert_int_equal(catalog_serve(second, "127.0.0.1:2", NULL), -EEXIST);
    assert_true(util_now_ms() - start < 30000); /* the lease is not waited for */
    catalog_close(first);
    assert_int_equal(catalog_serve(second, "127.0.0.1:2", NULL), 0);
    catalog_close(second);
}

static void a_name_in_use_that_may_be_dead_is_refused_after_a_lease(void **state)
{
    struct kit_node *second;
    char *error;
    struct catalog *far = opened("far", "another machine", KIT_LEASE_MS);
    assert_int_equal(catalog_serve(far, "127.0.0.1:1", NULL), 0);
    uint64_t start = util_now_ms();
    assert_int_equal(serve_as("far", &second, &error), -EEXIST);
    assert_true(util_now_ms() - start >= KIT_LEASE_MS);
    free(error);
    kit_close(second);
    assert_false(kit_told(b, "down:far"));
    catalog_close(far);
}

static void the_name_of_a_dead_process_is_taken_over_at_once(void **state)
{
    struct kit_node *second;
    char *error;
    pid_t child = kit_spawn("registers", "crashed");
    kit_until(1000, kit_told(a, "up:crashed"));
    kill_now(child);
    kit_forget(a);
    assert_int_equal(serve_as("crashed", &second, &error), 0);
    kit_until(1000, kit_told(a, "down:crashed up:crashed"));
    /* names carry incarnations: what the dead one held is not held by its successor */
    struct model_id id = version_at(a, "f");
    assert_string_equal(do_holders(a, &id), "");
    assert_int_equal(do_announce(second, &id, 0), 0);
    assert_string_equal(do_holders(a, &id), "crashed ");
    usleep((KIT_LEASE_MS + 1000) * 1000); /* the dead one's lease takes nothing of ours along */
    assert_string_equal(do_holders(a, &id), "crashed ");
    kit_close(second);
}

static void a_killed_node_is_gone_within_its_lease(void **state)
{
    pid_t child = kit_spawn("registers", "victim");
    kit_until(1000, sees(a, "f"));
    struct model_id id = version_at(a, "f");
    assert_string_equal(do_holders(a, &id), "victim+ ");
    kill_now(child);
    kit_until(KIT_LEASE_MS + 1000, kit_told(a, "down:victim"));
    assert_string_equal(do_holders(a, &id), "");
    assert_true(sees(a, "f")); /* the name stays */
    assert_int_equal(raw_count("h/"), 0);
}

static void a_stopped_node_loses_its_place_and_gets_it_back(void **state)
{
    pid_t child = kit_spawn("registers", "sleeper");
    kit_until(1000, sees(a, "f"));
    struct model_id id = version_at(a, "f");
    kill(child, SIGSTOP);
    kit_until(KIT_LEASE_MS + 1000, kit_told(a, "down:sleeper"));
    assert_string_equal(do_holders(a, &id), "");
    kit_forget(a);
    kill(child, SIGCONT);
    kit_until(2000, kit_told(a, "up:sleeper"));
    kit_until(2000, strcmp(do_holders(a, &id), "sleeper+ ") == 0);
    kill_now(child);
}

/* ---- holders ---- */

static void holders_are_announced_and_withdrawn(void **state)
{
    struct model_id id = do_file(a, MODEL_ROOT, "f", 1);
    struct model_id none = model_id_new();
    kit_until(1000, sees(b, "f"));
    assert_string_equal(do_holders(b, &id), "a+ ");
    assert_string_equal(do_holders(a, &id), ""); /* this node is not told of itself */
    assert_int_equal(do_announce(b, &id, 0), 0);
    assert_string_equal(do_holders(a, &id), "b ");
    assert_int_equal(do_announce(b, &id, CATALOG_COMPLETE), 0);
    assert_string_equal(do_holders(a, &id), "b+ ");
    assert_int_equal(do_announce(b, &none, 0), -ENOENT);

    uint64_t before;
    uint64_t after;
    raw_count_at("h/", &before);
    assert_int_equal(do_announce(b, &id, CATALOG_COMPLETE), 0); /* said already: no traffic */
    raw_count_at("h/", &after);
    assert_int_equal(before, after);

    assert_int_equal(do_withdraw(b, &id, false), 0);
    assert_string_equal(do_holders(a, &id), "");
    assert_int_equal(do_withdraw(b, &id, false), 0);
    assert_int_equal(raw_count("h/"), 1);
    assert_int_equal(do_unlink(b, MODEL_ROOT, "f"), 0);
    assert_int_equal(raw_count("h/"), 0);
    kit_until(1000, kit_gone(a) == 1);
    assert_int_equal(do_announce(a, &id, 0), -ENOENT);
    assert_int_equal(do_withdraw(a, &id, false), 0);
}

struct census {
    char text[512];
    struct catalog_sync sync;
};

static void census_each(void *arg, const struct model_id *version, uint32_t holders,
                        uint32_t complete)
{
    struct census *census = arg;
    size_t used = strlen(census->text);
    snprintf(census->text + used, sizeof(census->text) - used, "%02x:%u/%u ", version->bytes[0],
             holders, complete);
}

static void census_done(void *arg, int status, const struct model_entry *entry)
{
    struct census *census = arg;
    catalog_sync_done(&census->sync, status, entry);
}

static void the_census_counts_live_holders(void **state)
{
    struct census census = {0};
    struct model_version versions[3];
    for (uint8_t i = 0; i < 3; i++) {
        char name[2] = {(char)('x' + i), '\0'};
        versions[i] = kit_version(1);
        versions[i].id.bytes[0] = (uint8_t)(0x10 + i);
        assert_int_equal(do_publish(a, MODEL_ROOT, name, &versions[i], CATALOG_COMPLETE), 0);
        kit_until(1000, sees(b, name));
    }
    assert_int_equal(do_announce(b, &versions[0].id, CATALOG_COMPLETE), 0);
    assert_int_equal(do_announce(b, &versions[1].id, 0), 0);
    assert_int_equal(do_withdraw(a, &versions[2].id, false), 0);
    struct kit_node *ghost = kit_open("ghost"); /* never serves, so it counts for nothing */
    assert_int_equal(do_announce(ghost, &versions[2].id, CATALOG_COMPLETE), 0);
    int rc = catalog_census(b->catalog, census_each, census_done, &census);
    assert_int_equal(kit_wait(rc, &census.sync), 0);
    assert_string_equal(census.text, "10:2/2 11:2/1 ");
    kit_close(ghost);
}

static void the_last_copy_is_never_withdrawn(void **state)
{
    struct model_id id = do_file(a, MODEL_ROOT, "f", 1);
    kit_until(1000, sees(b, "f"));
    assert_int_equal(do_withdraw(a, &id, true), -EBUSY);
    assert_int_equal(do_announce(b, &id, 0), 0);
    assert_int_equal(do_withdraw(a, &id, true), -EBUSY); /* b has only a part */
    assert_int_equal(do_announce(b, &id, CATALOG_COMPLETE), 0);
    assert_int_equal(do_withdraw(a, &id, true), 0);
    assert_string_equal(do_holders(a, &id), "b+ ");
    assert_int_equal(do_withdraw(b, &id, true), -EBUSY);
    assert_string_equal(do_holders(a, &id), "b+ ");
}

static void two_never_withdraw_the_last_two_copies(void **state)
{
    struct model_id id = do_file(a, MODEL_ROOT, "f", 1);
    kit_until(1000, sees(b, "f"));
    for (int round = 0; round < 60; round++) {
        struct catalog_sync first = {0};
        struct catalog_sync second = {0};
        assert_int_equal(do_announce(a, &id, CATALOG_COMPLETE), 0);
        assert_int_equal(do_announce(b, &id, CATALOG_COMPLETE), 0);
        assert_int_equal(catalog_withdraw(a->catalog, &id, true, catalog_sync_done, &first), 0);
        assert_int_equal(catalog_withdraw(b->catalog, &id, true, catalog_sync_done, &second), 0);
        int one = catalog_sync_wait(&first);
        int two = catalog_sync_wait(&second);
        assert_true((one == 0 && two == -EBUSY) || (one == -EBUSY && two == 0));
        assert_int_equal(raw_count("h/"), 1);
    }
}

static void a_closing_node_withdraws_everything(void **state)
{
    struct kit_node *c = kit_up("c");
    struct model_id id = do_file(c, MODEL_ROOT, "f", 1);
    do_file(c, MODEL_ROOT, "g", 1);
    kit_until(1000, sees(a, "g"));
    assert_string_equal(do_holders(a, &id), "c+ ");
    kit_close(c);
    kit_until(500, kit_told(a, "down:c"));
    assert_string_equal(do_holders(a, &id), "");
    assert_int_equal(raw_count("h/"), 0);
    assert_true(sees(a, "f"));
}

static void damaged_holder_records_are_passed_over(void **state)
{
    char key[CODEC_KEY_MAX];
    struct model_id id = do_file(a, MODEL_ROOT, "f", 1);
    kit_until(1000, sees(b, "f"));
    struct meta_store *store = raw_open();
    codec_key_holder(&id, "zz", key);
    raw_put(store, key, "nonsense");
    codec_key_holder(&id, "yy", key);
    raw_put(store, key, "{\"v\":9}");
    meta_close(store);
    assert_string_equal(do_holders(b, &id), "a+ ");
    assert_int_equal(raw_count("h/"), 3);
}

/* ---- orphans ---- */

static void a_name_that_nobody_holds_is_swept_after_its_time(void **state)
{
    struct kit_node *sweeper = kit_up_ttl("sweeper", 2);
    struct kit_node *other = kit_up_ttl("other", 2);
    pid_t child = kit_spawn("registers", "victim");
    do_file(a, MODEL_ROOT, "held", 1);
    assert_int_equal(do_mkdir(a, MODEL_ROOT, "dir"), 0);
    assert_int_equal(do_symlink(a, MODEL_ROOT, "link", "f"), 0);
    kit_until(1000, sees(sweeper, "f"));
    assert_int_equal(do_link(a, id_at(a, "f"), kit_id, "x"), -ENOTDIR);
    assert_int_equal(do_link(a, id_at(a, "f"), id_at(a, "dir"), "alias"), 0);
    kill_now(child);
    uint64_t start = util_now_ms();
    kit_until(10000, !sees(sweeper, "f") && !sees(sweeper, "dir/alias"));
    assert_true(util_now_ms() - start >= 2000);
    kit_until(1000, kit_told(sweeper, "name:f") && kit_told(other, "name:f"));
    kit_until(1000, kit_told(a, "name:alias"));
    kit_until(1000, raw_count("t/v/") == 1 && raw_count("t/e/") == 3);
    usleep(3000000);
    assert_true(sees(a, "held") && sees(a, "dir") && sees(a, "link"));
    assert_int_equal(raw_count("l/"), 0);
    kit_close(sweeper);
    kit_close(other);
}

static void a_holder_that_returns_in_time_saves_the_name(void **state)
{
    struct kit_node *sweeper = kit_up_ttl("sweeper", 4);
    pid_t child = kit_spawn("registers", "victim");
    kit_until(1000, sees(sweeper, "f"));
    kill_now(child);
    kit_until(KIT_LEASE_MS + 1000, kit_told(sweeper, "down:victim"));
    usleep(300000);
    child = kit_spawn("holds", "victim");
    usleep(5500000);
    assert_true(sees(sweeper, "f"));
    kill_now(child);
    kit_until(12000, !sees(sweeper, "f"));
    kit_close(sweeper);
}

static void without_a_time_nothing_is_swept(void **state)
{
    pid_t child = kit_spawn("registers", "victim");
    kit_until(1000, sees(a, "f"));
    kill_now(child);
    usleep(4000000);
    assert_true(sees(a, "f") && sees(b, "f"));
}

static const struct kit_role roles[] = {
    {"registers", role_registers},
    {"holds", role_holds},
    {"serves", role_serves},
    {NULL, NULL},
};

int main(int argc, char **argv)
{
    kit_play(argc, argv, roles);
    const struct CMUnitTest tests[] = {
        KIT_STORY(nodes_know_each_other),
        KIT_STORY(a_node_that_never_serves_is_not_listed),
        KIT_STORY(bad_node_names_are_refused),
        KIT_STORY(a_name_in_use_by_a_live_process_is_refused_at_once),
        KIT_STORY(a_name_in_use_in_this_process_is_refused_at_once),
        KIT_STORY(a_name_in_use_that_may_be_dead_is_refused_after_a_lease),
        KIT_STORY(the_name_of_a_dead_process_is_taken_over_at_once),
        KIT_STORY(a_killed_node_is_gone_within_its_lease),
        KIT_STORY(a_stopped_node_loses_its_place_and_gets_it_back),
        KIT_STORY(holders_are_announced_and_withdrawn),
        KIT_STORY(the_census_counts_live_holders),
        KIT_STORY(the_last_copy_is_never_withdrawn),
        KIT_STORY(two_never_withdraw_the_last_two_copies),
        KIT_STORY(a_closing_node_withdraws_everything),
        KIT_STORY(damaged_holder_records_are_passed_over),
        KIT_STORY(a_name_that_nobody_holds_is_swept_after_its_time),
        KIT_STORY(a_holder_that_returns_in_time_saves_the_name),
        KIT_STORY(without_a_time_nothing_is_swept),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
