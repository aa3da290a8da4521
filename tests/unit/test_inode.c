/* What the kernel knows names by: lookups, forgets, versions, and attributes as the catalog has them. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <unistd.h>

#include "fs/inode.h"
#include "meta/catalog.h"

struct ground {
    char home[32];
    struct catalog *catalog;
    struct inodes *inodes;
};

static const struct model_attr root_attr = {
    .mode = 0750, .uid = 12, .gid = 34, .mtime_ns = 5000000000};

static int ground_open(void **state)
{
    struct ground *ground = calloc(1, sizeof(*ground));
    strcpy(ground->home, "/tmp/p2pfs-inode-XXXXXX");
    assert_non_null(mkdtemp(ground->home));
    char url[64], *error = NULL;
    snprintf(url, sizeof(url), "local://%s", ground->home);
    struct catalog_config config = {
        .url = url, .self = {.name = "n1", .boot = 1, .pid = getpid()}, .lease_ms = 10000};
    assert_int_equal(catalog_open(&config, &ground->catalog, &error), 0);
    assert_int_equal(catalog_serve(ground->catalog, "127.0.0.1:1", &error), 0);
    assert_int_equal(inodes_open(ground->catalog, &root_attr, &ground->inodes), 0);
    *state = ground;
    return 0;
}

static int ground_close(void **state)
{
    struct ground *ground = *state;
    inodes_close(ground->inodes);
    catalog_close(ground->catalog);
    char command[64];
    snprintf(command, sizeof(command), "rm -rf %s", ground->home);
    int status = system(command);
    free(ground);
    return status;
}

static struct model_entry file_entry(uint64_t id, uint8_t version)
{
    return (struct model_entry){.id = id,
                                .parent = MODEL_ROOT,
                                .name = (char *)"f",
                                .kind = MODEL_FILE,
                                .attr = {.mode = 0644},
                                .version = {.bytes = {version}},
                                .size = 7};
}

static void the_same_version_has_one_nodeid_another_has_its_own(void **state)
{
    struct ground *ground = *state;
    struct model_entry first = file_entry(100, 1), second = file_entry(100, 2);
    struct inode *a, *b, *c;
    assert_int_equal(inode_get(ground->inodes, &first, &a), 0);
    assert_int_equal(inode_get(ground->inodes, &first, &b), 0);
    assert_int_equal(inode_get(ground->inodes, &second, &c), 0);
    assert_ptr_equal(a, b);
    assert_ptr_not_equal(a, c);
    assert_int_equal(a->lookups, 2);
    assert_int_not_equal(inode_nodeid(ground->inodes, a), inode_nodeid(ground->inodes, c));
    assert_ptr_equal(inode_by_nodeid(ground->inodes, inode_nodeid(ground->inodes, a)), a);
    inode_forget(ground->inodes, a, 2);
    inode_forget(ground->inodes, c, 1);
}

static void an_inode_lives_until_its_last_lookup_and_hold(void **state)
{
    struct ground *ground = *state;
    struct model_entry entry = file_entry(200, 1);
    struct inode_key key = {.id = 200, .version = entry.version};
    struct inode *inode;
    assert_int_equal(inode_get(ground->inodes, &entry, &inode), 0);
    inode_hold(ground->inodes, inode);
    inode_forget(ground->inodes, inode, 1);
    struct inode *found = inode_find(ground->inodes, &key);
    assert_ptr_equal(found, inode);
    inode_release(ground->inodes, found);
    inode_release(ground->inodes, inode);
    assert_null(inode_find(ground->inodes, &key));
}

static void the_root_and_the_reports_are_never_forgotten(void **state)
{
    struct ground *ground = *state;
    struct inode *root = inode_root(ground->inodes);
    assert_int_equal(inode_nodeid(ground->inodes, root), 1);
    inode_forget(ground->inodes, root, 1000);
    inode_lookup(ground->inodes, inode_control(ground->inodes));
    inode_forget(ground->inodes, inode_control(ground->inodes), 1);
    struct stat st;
    inode_stat(ground->inodes, root, &st);
    assert_int_equal(st.st_mode, S_IFDIR | 0750);
    assert_int_equal(st.st_uid, 12);
    assert_int_equal(st.st_mtim.tv_sec, 5);
    inode_stat(ground->inodes, inode_report(ground->inodes, CONTROL_STATUS), &st);
    assert_int_equal(st.st_mode, S_IFREG | 0444);
    inode_root_setattr(ground->inodes, CATALOG_SET_MODE,
                       &(struct model_attr){.mode = 0700, .uid = 99});
    inode_stat(ground->inodes, root, &st);
    assert_int_equal(st.st_mode, S_IFDIR | 0700);
    assert_int_equal(st.st_uid, 12);
}

static void attributes_follow_the_catalog_and_outlive_the_name(void **state)
{
    struct ground *ground = *state;
    struct model_attr attr = {.mode = 0711, .uid = 1, .gid = 2, .mtime_ns = -1500000000};
    struct catalog_sync sync = {0};
    assert_int_equal(
        catalog_mkdir(ground->catalog, MODEL_ROOT, "d", &attr, catalog_sync_done, &sync), 0);
    assert_int_equal(catalog_sync_wait(&sync), 0);
    struct model_entry entry;
    assert_int_equal(catalog_lookup(ground->catalog, MODEL_ROOT, "d", &entry), 0);
    struct inode *inode;
    assert_int_equal(inode_get(ground->inodes, &entry, &inode), 0);
    struct stat st;
    inode_stat(ground->inodes, inode, &st);
    assert_int_equal(st.st_ino, entry.id);
    assert_int_equal(st.st_mode, S_IFDIR | 0711);
    assert_int_equal(st.st_nlink, 2);
    assert_int_equal(st.st_mtim.tv_sec, -2); /* 1.5 s before 1970 */
    assert_int_equal(st.st_mtim.tv_nsec, 500000000);

    attr.mode = 0700;
    sync = (struct catalog_sync){0};
    assert_int_equal(catalog_setattr(ground->catalog, entry.id, CATALOG_SET_MODE, &attr,
                                     catalog_sync_done, &sync),
                     0);
    assert_int_equal(catalog_sync_wait(&sync), 0);
    inode_stat(ground->inodes, inode, &st);
    assert_int_equal(st.st_mode, S_IFDIR | 0700);

    sync = (struct catalog_sync){0};
    assert_int_equal(catalog_rmdir(ground->catalog, MODEL_ROOT, "d", catalog_sync_done, &sync), 0);
    assert_int_equal(catalog_sync_wait(&sync), 0);
    inode_stat(ground->inodes, inode, &st);
    assert_int_equal(st.st_mode, S_IFDIR | 0700);
    assert_int_equal(st.st_nlink, 0);
    inode_forget(ground->inodes, inode, 1);
    model_entry_clear(&entry);
}

static void a_ghost_is_a_link_of_its_own(void **state)
{
    struct ground *ground = *state;
    struct inode *a, *b;
    assert_int_equal(inode_new_ghost(ground->inodes, "/models/x", &a), 0);
    assert_int_equal(inode_new_ghost(ground->inodes, "/models/x", &b), 0);
    assert_ptr_not_equal(a, b);
    struct stat st;
    inode_stat(ground->inodes, a, &st);
    assert_true(S_ISLNK(st.st_mode));
    assert_int_equal(st.st_size, strlen("/models/x"));
    inode_forget(ground->inodes, a, 1);
    inode_forget(ground->inodes, b, 1);
}

static int freed;
static void draft_freed(struct fresh *draft)
{
    freed += draft == (struct fresh *)&freed;
}

static void a_draft_lives_and_dies_with_its_inode(void **state)
{
    struct ground *ground = *state;
    struct inode_key key = {.id = 300, .version = {.bytes = {9}}};
    struct inode *inode, *other;
    freed = 0;
    assert_int_equal(
        inode_new_draft(ground->inodes, &key, (struct fresh *)&freed, draft_freed, &inode), 0);
    assert_int_equal(
        inode_new_draft(ground->inodes, &key, (struct fresh *)&freed, draft_freed, &other),
        -EEXIST);
    assert_int_equal(freed, 0);
    struct model_entry registered = file_entry(300, 9);
    assert_int_equal(inode_get(ground->inodes, &registered, &other), 0);
    assert_ptr_equal(inode, other); /* the nodeid stays when it is registered */
    inode_forget(ground->inodes, inode, 2);
    assert_int_equal(freed, 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_same_version_has_one_nodeid_another_has_its_own),
        cmocka_unit_test(an_inode_lives_until_its_last_lookup_and_hold),
        cmocka_unit_test(the_root_and_the_reports_are_never_forgotten),
        cmocka_unit_test(attributes_follow_the_catalog_and_outlive_the_name),
        cmocka_unit_test(a_ghost_is_a_link_of_its_own),
        cmocka_unit_test(a_draft_lives_and_dies_with_its_inode),
    };
    return cmocka_run_group_tests(tests, ground_open, ground_close);
}
