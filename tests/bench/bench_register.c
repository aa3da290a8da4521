/* How fast this machine's RDMA device takes memory in and lets go of it: GB/s of registering and of deregistering, for
 * populated pages of 4 KiB and huge ones, a shard of 1 MiB at a time.
 *
 *   bench_register DEVICE [MIB] */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "meta/base/util.h"
#include "p2pfs_config.h"

#if P2PFS_HAVE_RDMA
#include <infiniband/verbs.h>

#define SHARD (1ull << 20)

static struct ibv_pd *domain(const char *name)
{
    int count;
    struct ibv_device **list = ibv_get_device_list(&count);
    for (int i = 0; list && i < count; i++) {
        struct ibv_context *verbs =
            strcmp(ibv_get_device_name(list[i]), name) == 0 ? ibv_open_device(list[i]) : NULL;
        if (verbs)
            return ibv_alloc_pd(verbs);
    }
    return NULL;
}

static int measure(struct ibv_pd *pd, size_t bytes, int advice, const char *pages)
{
    size_t count = bytes / SHARD;
    struct ibv_mr **regions = calloc(count, sizeof(struct ibv_mr *));
    uint8_t *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED || !regions || madvise(map, bytes, advice) < 0)
        return perror("memory"), 1;
    memset(map, 1, bytes);
    uint64_t begun = util_now_ns();
    for (size_t i = 0; i < count; i++)
        if (!(regions[i] = ibv_reg_mr(pd, map + i * SHARD, SHARD, IBV_ACCESS_LOCAL_WRITE)))
            return perror("ibv_reg_mr"), 1;
    uint64_t registered = util_now_ns();
    for (size_t i = 0; i < count; i++)
        ibv_dereg_mr(regions[i]);
    uint64_t ended = util_now_ns();
    printf("%s %.2f %.2f\n", pages, (double)bytes / (double)(registered - begun),
           (double)bytes / (double)(ended - registered));
    munmap(map, bytes);
    free(regions);
    return 0;
}

int main(int argc, char **argv)
{
    size_t bytes = (argc > 2 ? strtoull(argv[2], NULL, 10) : 256) << 20;
    struct ibv_pd *pd = argc > 1 ? domain(argv[1]) : NULL;
    if (!pd)
        return fprintf(stderr, "usage: bench_register DEVICE [MIB]; DEVICE cannot be opened\n"), 1;
    return measure(pd, bytes, MADV_NOHUGEPAGE, "4K") || measure(pd, bytes, MADV_HUGEPAGE, "huge");
}
#else
int main(void)
{
    return fprintf(stderr, "this build has no libibverbs\n"), 1;
}
#endif
