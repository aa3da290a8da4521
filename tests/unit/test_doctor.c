/* What p2pfs doctor says of RDMA devices, over trees that look like sysfs. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "fs/doctor.h"

static char sys[64];

static int setup(void **state)
{
    snprintf(sys, sizeof sys, "/tmp/p2pfs-doctor-XXXXXX");
    return mkdtemp(sys) ? 0 : -1;
}

static int teardown(void **state)
{
    char command[96];
    snprintf(command, sizeof command, "rm -rf '%s'", sys);
    return system(command);
}

/* A file with one line, and the directories above it. */
static void line(const char *path, const char *text)
{
    char command[512];
    snprintf(command, sizeof command, "mkdir -p \"$(dirname '%s/%s')\" && echo '%s' > '%s/%s'", sys,
             path, text, sys, path);
    assert_int_equal(system(command), 0);
}

static void port(const char *device, const char *state, const char *layer)
{
    const char *const files[][2] = {
        {"state", state}, {"link_layer", layer}, {"rate", "100 Gb/sec (4X EDR)"}};
    char path[128];
    for (size_t i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "class/infiniband/%s/ports/1/%s", device, files[i][0]);
        line(path, files[i][1]);
    }
}

static void gid(const char *device, unsigned index, const char *address, const char *type,
                const char *netdev)
{
    const char *const files[][2] = {
        {"gids", address}, {"gid_attrs/types", type}, {"gid_attrs/ndevs", netdev}};
    char path[128];
    for (size_t i = 0; i < 3; i++) {
        snprintf(path, sizeof path, "class/infiniband/%s/ports/1/%s/%u", device, files[i][0],
                 index);
        line(path, files[i][1]);
    }
}

/* The findings, as JSON. */
static char *look(size_t devices)
{
    struct doctor doctor = {.as_json = true};
    size_t length;
    json_array(&doctor.out, NULL);
    assert_int_equal(doctor_devices(&doctor, sys), devices);
    json_end(&doctor.out);
    assert_false(doctor.stops); // TCP is always there
    char *text = json_take(&doctor.out, &length);
    assert_non_null(text);
    return text;
}

static void says(size_t devices, const char *const *words)
{
    char *text = look(devices);
    for (; *words; words++)
        if (!strstr(text, *words))
            fail_msg("\"%s\" is not in %s", *words, text);
    free(text);
}

static void a_port_that_works_tells_its_gid_and_packets(void **state)
{
    port("mlx5_0", "4: ACTIVE", "Ethernet");
    gid("mlx5_0", 0, "fe80:0000:0000:0000:0000:0000:0000:0001", "IB/RoCE v1", "eth7");
    gid("mlx5_0", 1, "fe80:0000:0000:0000:0000:0000:0000:0001", "RoCE v2", "eth7");
    gid("mlx5_0", 2, "0000:0000:0000:0000:0000:ffff:0a09:0001", "IB/RoCE v1", "eth7");
    gid("mlx5_0", 3, "0000:0000:0000:0000:0000:ffff:0a09:0001", "RoCE v2", "eth7");
    line("class/net/eth7/mtu", "9000");
    says(1, (const char *const[]){"\"level\":\"good\"", "GID 3 (", "of eth7",
                                  "packets of 4096 bytes", "100 Gb/sec", NULL});
    line("class/net/eth7/mtu", "1500");
    says(1, (const char *const[]){"\"level\":\"warn\"", "packets of 1024 bytes",
                                  "ip link set eth7 mtu 9000", NULL});
}

static void a_port_without_an_address_is_told_to_get_one(void **state)
{
    port("mlx5_0", "4: ACTIVE", "Ethernet");
    gid("mlx5_0", 0, "fe80:0000:0000:0000:0000:0000:0000:0001", "RoCE v2", "eth7");
    gid("mlx5_0", 1, "0000:0000:0000:0000:0000:0000:0000:0000", "", "");
    says(1,
         (const char *const[]){"\"level\":\"warn\"", "ip addr add ADDRESS/PREFIX dev eth7", NULL});
}

static void a_port_that_is_down_is_told_to_come_up(void **state)
{
    port("mlx5_0", "1: DOWN", "Ethernet");
    gid("mlx5_0", 0, "fe80:0000:0000:0000:0000:0000:0000:0001", "RoCE v2", "eth7");
    port("mlx5_1", "2: INIT", "InfiniBand");
    port("mlx5_2", "4: ACTIVE", "InfiniBand");
    says(3, (const char *const[]){"DOWN: nothing travels", "ip link set eth7 up", "opensm",
                                  "ACTIVE, InfiniBand, 100 Gb/sec", NULL});
}

static void adapters_without_their_module_are_seen(void **state)
{
    line("bus/pci/devices/0000:01:00.0/vendor", "0x15b3");
    line("bus/pci/devices/0000:01:00.0/class", "0x020700");
    line("bus/pci/devices/0000:02:00.0/vendor", "0x8086");
    line("bus/pci/devices/0000:02:00.0/class", "0x020000");
    says(0, (const char *const[]){"modprobe mlx5_ib", "1 adapters", NULL});
}

static void a_machine_without_any_is_fine(void **state)
{
    char *text = look(0);
    assert_string_equal(text, "[]\n");
    free(text);
}

#define TEST(function) cmocka_unit_test_setup_teardown(function, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_port_that_works_tells_its_gid_and_packets),
        TEST(a_port_without_an_address_is_told_to_get_one),
        TEST(a_port_that_is_down_is_told_to_come_up),
        TEST(adapters_without_their_module_are_seen),
        TEST(a_machine_without_any_is_fine),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
