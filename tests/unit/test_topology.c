/* Topology: adapters found in made trees of sysfs, and what the user may ask for. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/topology.h"
#include "meta/base/util.h"

static char root[] = "/tmp/p2pfs-topology-XXXXXX";
static struct topology found;
static struct transport_rail rails[TOPOLOGY_RAILS_MAX];
static unsigned count;
static char why[TOPOLOGY_WHY_MAX];

// -- Making a tree --------------------------------------------------------------------------------

static void put(const char *text, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void put(const char *text, const char *format, ...)
{
    char path[512];
    va_list args;
    int length = snprintf(path, sizeof(path), "%s/", root);
    va_start(args, format);
    vsnprintf(path + length, sizeof(path) - (size_t)length, format, args);
    va_end(args);
    for (char *at = path + length; (at = strchr(at, '/')); at++) {
        *at = '\0';
        assert_true(mkdir(path, 0755) == 0 || errno == EEXIST);
        *at = '/';
    }
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fprintf(file, "%s\n", text);
    assert_int_equal(fclose(file), 0);
}

static void gid(const char *device, int index, const char *text, const char *type)
{
    put(text, "class/infiniband/%s/ports/1/gids/%d", device, index);
    if (type) // an empty place has none
        put(type, "class/infiniband/%s/ports/1/gid_attrs/types/%d", device, index);
}

#define EMPTY   "0000:0000:0000:0000:0000:0000:0000:0000"
#define LOCAL_6 "fe80:0000:0000:0000:0000:00ff:fe00:0001"

/* A RoCE adapter as mlx5 shows it: link-local v1 and v2, IPv4 v1 and v2. */
static void adapter(const char *name, int numa, const char *pci, const char *state, unsigned host)
{
    char text[64], path[256], link[256];
    snprintf(path, sizeof(path), "devices/%s/numa_node", pci);
    snprintf(text, sizeof(text), "%d", numa);
    put(text, "%s", path);
    put(state, "class/infiniband/%s/ports/1/state", name);
    put("Ethernet", "class/infiniband/%s/ports/1/link_layer", name);
    gid(name, 0, LOCAL_6, "IB/RoCE v1");
    gid(name, 1, LOCAL_6, "RoCE v2");
    snprintf(text, sizeof(text), "0000:0000:0000:0000:0000:ffff:0a00:%04x", host);
    gid(name, 2, text, "IB/RoCE v1");
    gid(name, 3, text, "RoCE v2");
    gid(name, 4, EMPTY, NULL);
    snprintf(path, sizeof(path), "%s/devices/%s", root, pci);
    snprintf(link, sizeof(link), "%s/class/infiniband/%s/device", root, name);
    assert_int_equal(symlink(path, link), 0);
}

static int tree_setup(void **state)
{
    (void)state;
    strcpy(root + strlen(root) - 6, "XXXXXX");
    assert_non_null(mkdtemp(root));
    return 0;
}

static int forget(const char *path, const struct stat *status, int kind, struct FTW *where)
{
    (void)status, (void)kind, (void)where;
    return remove(path);
}

static int tree_end(void **state)
{
    (void)state;
    return nftw(root, forget, 16, FTW_DEPTH | FTW_PHYS);
}

/* Eight adapters on two nodes, their names in another order than their places; the sixth is down. */
static void eight_adapters(void)
{
    for (unsigned i = 0; i < 8; i++) {
        char name[16], pci[64];
        snprintf(name, sizeof(name), "mlx5_%u", 7 - i);
        snprintf(pci, sizeof(pci), "pci0000:%u0/0000:%u1:00.0", i, i);
        adapter(name, i < 4 ? 0 : 1, pci, i == 5 ? "1: DOWN" : "4: ACTIVE", i + 1);
    }
}

static int choose(const struct topology_wish *wish)
{
    assert_int_equal(topology_read(root, wish, &found), 0);
    return topology_choose(&found, wish, rails, &count, why);
}

// -- Stories --------------------------------------------------------------------------------------

static void a_machine_without_rdma_has_none(void **state)
{
    (void)state;
    assert_int_equal(choose(&(struct topology_wish){.gid_index = -1}), 0);
    assert_int_equal(found.count, 0);
    assert_int_equal(count, 0);
    assert_int_equal(choose(&(struct topology_wish){.gid_index = -1, .devices = "mlx5_0"}),
                     -ENODEV);
    assert_string_equal(why, "mlx5_0: this machine has no such RDMA device; it has none");
}

static void adapters_come_in_the_order_of_their_places(void **state)
{
    (void)state;
    eight_adapters();
    assert_int_equal(choose(&(struct topology_wish){.gid_index = -1}), 0);
    assert_int_equal(found.count, 8);
    for (unsigned i = 0; i < 8; i++) {
        char name[16], address[64];
        snprintf(name, sizeof(name), "mlx5_%u", 7 - i);
        snprintf(address, sizeof(address), "10.0.0.%u", i + 1);
        assert_string_equal(found.list[i].name, name);
        assert_string_equal(found.list[i].address, address);
        assert_int_equal(found.list[i].numa, i < 4 ? 0 : 1);
        assert_int_equal(found.list[i].active, i != 5);
        assert_int_equal(found.list[i].gid_index, 3);
        assert_true(found.list[i].roce_v2);
        assert_non_null(strstr(found.list[i].pci, ":00.0"));
    }
    assert_int_equal(count, 7); // the one that is down is left out
    assert_string_equal(rails[0].address, "10.0.0.1:0");
    assert_string_equal(rails[5].address, "10.0.0.7:0");
}

static void a_node_that_listens_on_one_address_uses_its_adapter(void **state)
{
    (void)state;
    eight_adapters();
    assert_int_equal(choose(&(struct topology_wish){.gid_index = -1, .host = "10.0.0.3"}), 0);
    assert_int_equal(count, 1);
    assert_string_equal(rails[0].address, "10.0.0.3:0");
    assert_int_equal(choose(&(struct topology_wish){.gid_index = -1, .host = "192.168.0.1"}), 0);
    assert_int_equal(count, 0);
}

static void devices_are_taken_as_listed_but_the_listening_one_is_first(void **state)
{
    (void)state;
    eight_adapters();
    struct topology_wish wish = {.gid_index = -1, .devices = "mlx5_7,mlx5_2,mlx5_5"};
    assert_int_equal(choose(&wish), 0);
    assert_int_equal(count, 3);
    assert_string_equal(rails[0].address, "10.0.0.1:0");
    assert_string_equal(rails[1].address, "10.0.0.6:0"); // down, but named: used when it is up
    assert_string_equal(rails[2].address, "10.0.0.3:0");
    wish.host = "10.0.0.3";
    assert_int_equal(choose(&wish), 0);
    assert_string_equal(rails[0].address, "10.0.0.3:0");
    assert_string_equal(rails[1].address, "10.0.0.1:0");
    wish.devices = "mlx5_1,mlx5_8";
    assert_int_equal(choose(&wish), -ENODEV);
    assert_non_null(strstr(why, "mlx5_8: this machine has no such RDMA device; it has mlx5_7 "));
    assert_int_equal(count, 0);
}

static void an_index_chooses_the_address(void **state)
{
    (void)state;
    adapter("mlx5_0", 0, "pci0000:00/0000:01:00.0", "4: ACTIVE", 1);
    gid("mlx5_0", 4, "2001:0db8:0000:0000:0000:0000:0000:0001", "RoCE v2");
    gid("mlx5_0", 5, "0000:0000:0000:0000:0000:ffff:0a00:0009", "IB/RoCE v1");
    assert_int_equal(choose(&(struct topology_wish){.gid_index = 4, .host = "10.0.0.1"}), 0);
    assert_string_equal(rails[0].address, "[2001:db8::1]:0");
    assert_int_equal(choose(&(struct topology_wish){.gid_index = 5}), 0);
    assert_string_equal(rails[0].address, "10.0.0.9:0");
    assert_false(found.list[0].roce_v2);
    // without one, where the node listens decides, if it has to
    assert_int_equal(choose(&(struct topology_wish){.gid_index = -1, .host = "10.0.0.9"}), 0);
    assert_string_equal(rails[0].address, "10.0.0.9:0");
    for (int bad = 0; bad <= 9; bad += 9) { // link-local; beyond the table's end
        assert_int_equal(choose(&(struct topology_wish){.gid_index = bad, .devices = "mlx5_0"}),
                         -ENODEV);
        assert_non_null(strstr(why, "mlx5_0 port 1 has no address there"));
    }
}

static void infiniband_has_the_address_of_its_interface(void **state)
{
    (void)state;
    put("4: ACTIVE", "class/infiniband/mlx5_0/ports/1/state");
    put("InfiniBand", "class/infiniband/mlx5_0/ports/1/link_layer");
    gid("mlx5_0", 0, LOCAL_6, NULL);
    put("0", "class/infiniband/mlx5_0/device/net/lo/dev_port");
    assert_int_equal(choose(&(struct topology_wish){.gid_index = -1}), 0);
    assert_true(found.list[0].infiniband);
    assert_string_equal(found.list[0].address, "127.0.0.1");
    assert_int_equal(found.list[0].gid_index, -1);
}

static void the_port_that_is_up_is_used(void **state)
{
    (void)state;
    adapter("mlx4_0", 0, "pci0000:00/0000:01:00.0", "1: DOWN", 1);
    put("4: ACTIVE", "class/infiniband/mlx4_0/ports/2/state");
    put("Ethernet", "class/infiniband/mlx4_0/ports/2/link_layer");
    put("0000:0000:0000:0000:0000:ffff:0a00:0002", "class/infiniband/mlx4_0/ports/2/gids/0");
    put("RoCE v2", "class/infiniband/mlx4_0/ports/2/gid_attrs/types/0");
    assert_int_equal(choose(&(struct topology_wish){.gid_index = -1}), 0);
    assert_int_equal(found.list[0].port, 2);
    assert_string_equal(rails[0].address, "10.0.0.2:0");
    assert_int_equal(choose(&(struct topology_wish){.gid_index = -1, .port = 1}), 0);
    assert_int_equal(count, 0);
}

static void a_matrix_names_what_comes_first_and_what_stands_by(void **state)
{
    (void)state;
    eight_adapters();
    struct topology_wish wish = {
        .gid_index = -1,
        .matrix =
            "{\"cpu:0\": [[\"mlx5_7\", \"mlx5_6\"], [\"mlx5_3\"]],\n"
            " \"cpu:1\": [ [ \"mlx5_3\" ] , [\"mlx5_0\"] ],\n \"cuda:0\": [[\"mlx5_1\"], []]}"};
    assert_int_equal(choose(&wish), 0);
    assert_int_equal(count, 4);
    assert_string_equal(rails[2].address, "10.0.0.5:0");
    assert_false(rails[2].standby); // first for one, so not only standing by
    assert_string_equal(rails[3].address, "10.0.0.8:0");
    assert_true(rails[3].standby);
    wish.matrix = "{\"cuda:0\": [[\"mlx5_1\"]]}";
    assert_int_equal(choose(&wish), 0);
    assert_int_equal(count, 1);
    wish.matrix = "{\"*\": [[\"nowhere\"]]}";
    assert_int_equal(choose(&wish), -ENODEV);
}

static void a_malformed_matrix_is_refused_with_the_place(void **state)
{
    (void)state;
    static const struct {
        const char *text, *why;
    } bad[] = {
        {"", "line 1, column 1: expected '{'"},
        {"mlx5_0", "line 1, column 1: expected '{'"},
        {"{}", "line 1, column 2: expected the name of a memory"},
        {"{\"cpu:0\" [[\"a\"]]}", "line 1, column 10: expected ':'"},
        {"{\"cpu:0\": \"a\"}", "line 1, column 11: expected '['"},
        {"{\"cpu:0\": [\"a\"]}", "line 1, column 12: expected '['"},
        {"{\"cpu:0\": [[a]]}", "line 1, column 13: expected a device's name"},
        {"{\"cpu:0\": [[\"a\"\n \"b\"]]}", "line 2, column 2: expected ',' or ']'"},
        {"{\"cpu:0\": [[\"a\"], [], []]}", "line 1, column 21: expected ']'"},
        {"{\"cpu:0\": [[\"a\"]]", "line 1, column 18: expected ',' or '}'"},
        {"{\"cpu:0\": [[\"a\"]]} x", "line 1, column 20: expected nothing"},
        {"{\"cpu:0\": [[\"\"]]}", "line 1, column 13: expected a device's name"},
        {"{\"cpu:0\": [[\"a\\\"\"]]}", "line 1, column 13: expected a device's name"},
        {"{\"cpu:0\": [[], []]}", "expected a device"},
    };
    struct topology_matrix *matrix = malloc(sizeof(*matrix));
    for (size_t i = 0; i < util_count(bad); i++) {
        assert_int_equal(topology_matrix_parse(bad[i].text, matrix, why), -EINVAL);
        if (!strstr(why, bad[i].why))
            fail_msg("%s: %s", bad[i].text, why);
    }
    free(matrix);
}

static int node_of(const char *first, const char *second)
{
    struct transport_rail both[2] = {{.standby = false}};
    snprintf(both[0].address, sizeof(both[0].address), "%s", first);
    snprintf(both[1].address, sizeof(both[1].address), "%s", second ? second : "");
    return topology_node(root, both, second ? 2 : 1);
}

static void memory_is_wanted_near_the_interface(void **state)
{
    (void)state;
    put("1", "class/net/lo/device/numa_node");
    put("0", "devices/system/node/online");
    assert_int_equal(node_of("127.0.0.1:7", NULL), -1); // there is no other
    put("0-1", "devices/system/node/online");
    assert_int_equal(node_of("127.0.0.1:7", NULL), 1);
    assert_int_equal(node_of("192.0.2.1:7", "127.0.0.1:0"), 1);
    assert_int_equal(node_of("0.0.0.0:7", NULL), 1);
    assert_int_equal(node_of("[::]:7", NULL), 1);
    assert_int_equal(node_of("192.0.2.1:7", NULL), -1);
    assert_int_equal(node_of("127.0.0.11:7", NULL), -1); // which only begins alike
    put("-1", "class/net/lo/device/numa_node");
    assert_int_equal(node_of("127.0.0.1:7", NULL), -1);
}

int main(void)
{
#define STORY(tell) cmocka_unit_test_setup_teardown(tell, tree_setup, tree_end)
    const struct CMUnitTest tests[] = {
        STORY(a_machine_without_rdma_has_none),
        STORY(adapters_come_in_the_order_of_their_places),
        STORY(a_node_that_listens_on_one_address_uses_its_adapter),
        STORY(devices_are_taken_as_listed_but_the_listening_one_is_first),
        STORY(an_index_chooses_the_address),
        STORY(infiniband_has_the_address_of_its_interface),
        STORY(the_port_that_is_up_is_used),
        STORY(a_matrix_names_what_comes_first_and_what_stands_by),
        STORY(a_malformed_matrix_is_refused_with_the_place),
        STORY(memory_is_wanted_near_the_interface),
    };
    return cmocka_run_group_tests_name("topology", tests, NULL, NULL);
}
