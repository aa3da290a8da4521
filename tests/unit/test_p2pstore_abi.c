/* What programs that were built against libp2pstore.so.0 rely on, frozen: this file is added to, and never changed,
 * while the soname stays. Most of it is checked by the compiler. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <string.h>

#include "engine/p2pstore.h"

#define PLACE(type, member, at) \
    _Static_assert(offsetof(struct type, member) == (at), #type "." #member " has moved")

_Static_assert(sizeof(struct p2pstore_range) == 16, "a range has another size");
PLACE(p2pstore_range, address, 0);
PLACE(p2pstore_range, length, 8);
/* Entries belong to the library, so members may be appended. */
PLACE(p2pstore_entry, name, 0);
PLACE(p2pstore_entry, max_shard_size, 8);
PLACE(p2pstore_entry, total_size, 16);
PLACE(p2pstore_entry, sizes, 24);
PLACE(p2pstore_entry, size_count, 32);
PLACE(p2pstore_entry, holders, 40);
PLACE(p2pstore_entry, complete, 48);
PLACE(p2pstore_entry, state, 56);
PLACE(p2pstore_entry, origin, 64);
_Static_assert(P2PSTORE_REGISTER == 1 && P2PSTORE_UNREGISTER == 2 && P2PSTORE_GET_REPLICA == 3 &&
                   P2PSTORE_DELETE_REPLICA == 4,
               "calls have other numbers");
_Static_assert(P2PSTORE_OFFLINE == 1 && P2PSTORE_PARTIAL == 2 && P2PSTORE_AVAILABLE == 3 &&
                   P2PSTORE_PULLING == 4 && P2PSTORE_REPLICA == 5 && P2PSTORE_REGISTERED == 6 &&
                   P2PSTORE_UNKNOWN == 7,
               "states have other numbers");

#define SAME(function, ...) \
    _Static_assert(_Generic(&(function), __VA_ARGS__: 1, default: 0), #function " has changed")

typedef struct p2pstore *store;
typedef struct p2pstore_request *request;
typedef const struct p2pstore_request *seen;
typedef const struct p2pstore_range *ranges;

SAME(p2pstore_version, const char *(*)(void));
SAME(p2pstore_error, const char *(*)(void));
SAME(p2pstore_open, int (*)(const char *, const char *, const char *const *, store *));
SAME(p2pstore_close, int (*)(store));
SAME(p2pstore_register,
     int (*)(store, const char *, ranges, size_t, uint64_t, const char *, int64_t));
SAME(p2pstore_unregister, int (*)(store, const char *, int64_t));
SAME(p2pstore_get_replica, int (*)(store, const char *, ranges, size_t, int64_t));
SAME(p2pstore_delete_replica, int (*)(store, const char *, int64_t));
SAME(p2pstore_register_start, int (*)(store, const char *, ranges, size_t, uint64_t, const char *,
                                      p2pstore_callback, void *, request *));
SAME(p2pstore_unregister_start, int (*)(store, const char *, p2pstore_callback, void *, request *));
SAME(p2pstore_get_replica_start,
     int (*)(store, const char *, ranges, size_t, p2pstore_callback, void *, request *));
SAME(p2pstore_delete_replica_start,
     int (*)(store, const char *, p2pstore_callback, void *, request *));
SAME(p2pstore_request_status, int (*)(seen));
SAME(p2pstore_request_error, const char *(*)(seen));
SAME(p2pstore_request_call, enum p2pstore_call (*)(seen));
SAME(p2pstore_request_name, const char *(*)(seen));
SAME(p2pstore_request_progress, void (*)(seen, uint64_t *, uint64_t *));
SAME(p2pstore_request_wait, int (*)(request, int64_t));
SAME(p2pstore_request_cancel, int (*)(request));
SAME(p2pstore_request_free, void (*)(request));
SAME(p2pstore_fd, int (*)(const struct p2pstore *));
SAME(p2pstore_completed, request (*)(store));
SAME(p2pstore_list, int (*)(store, const char *, int64_t, struct p2pstore_list **));
SAME(p2pstore_list_count, size_t (*)(const struct p2pstore_list *));
SAME(p2pstore_list_entry, const struct p2pstore_entry *(*)(const struct p2pstore_list *, size_t));
SAME(p2pstore_list_free, void (*)(struct p2pstore_list *));

static void the_version_script_exports_what_the_header_declares(void **state)
{
    char line[512];
    unsigned exported = 0, declared = 0;
    FILE *map = fopen(TEST_SOURCE_DIR "/engine/p2pstore.map", "r");
    FILE *header = fopen(TEST_SOURCE_DIR "/engine/p2pstore.h", "r");
    assert_non_null(map);
    assert_non_null(header);
    while (fgets(line, sizeof line, map))
        exported += strncmp(line, "    p2pstore_", 13) == 0;
    while (fgets(line, sizeof line, header))
        declared += strncmp(line, "P2PSTORE_API ", 13) == 0;
    fclose(map);
    fclose(header);
    assert_int_equal(declared, exported);
    assert_int_equal(exported, 26);
    assert_string_equal(p2pstore_error(), "");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_version_script_exports_what_the_header_declares),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
