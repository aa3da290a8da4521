/* Any text: it is refused with its place, or names devices that are no longer than they may be. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "engine/topology.h"

static void check(const struct topology_names *names)
{
    for (unsigned i = 0; i < names->count; i++)
        if (names->list[i][0] == '\0' || !memchr(names->list[i], '\0', sizeof(names->list[i])))
            abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct topology_matrix matrix;
    char why[TOPOLOGY_WHY_MAX];
    char *text = malloc(size + 1);
    if (!text)
        return 0;
    memcpy(text, data, size);
    text[size] = '\0';
    int r = topology_matrix_parse(text, &matrix, why);
    if (r == 0 && matrix.preferred.count + matrix.standby.count == 0)
        abort();
    if (r < 0 && (r != -EINVAL || strncmp(why, "line ", 5) != 0))
        abort();
    if (r == 0) {
        check(&matrix.preferred);
        check(&matrix.standby);
    }
    free(text);
    return 0;
}
