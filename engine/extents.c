#include "engine/extents.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/engine.h"
#include "meta/base/util.h"

#define EXTENTS_IOV 64 /* ranges that one call to the kernel copies from */

struct extent {
    uint8_t *address;
    uint64_t length;
    uint64_t offset; /* of its first byte in the whole */
};

struct extents {
    pthread_mutex_t lock; /* guards users, ended and freed */
    unsigned users;
    bool ended;
    bool freed; /* nobody but its users knows of it any more */
    void (*released)(void *arg);
    void *arg;
    uint64_t size;
    size_t count;
    struct extent *sorted; /* by address, without empty ones */
    size_t sorted_count;
    struct extent list[]; /* in order */
};

static int by_address(const void *a, const void *b)
{
    const struct extent *left = a;
    const struct extent *right = b;
    return left->address < right->address ? -1 : left->address > right->address;
}

/* A copy by address, without empty ranges; `offset` is the range's number in the list. */
static struct extent *sorted_copy(const struct engine_range *ranges, size_t count, size_t *left)
{
    struct extent *sorted = calloc(count + 1, sizeof *sorted);
    *left = 0;
    for (size_t i = 0; i < count && sorted; i++) {
        if (ranges[i].length) {
            sorted[(*left)++] = (struct extent){ranges[i].address, ranges[i].length, i};
        }
    }
    if (sorted) {
        qsort(sorted, *left, sizeof *sorted, by_address);
    }
    return sorted;
}

int extents_new(const struct engine_range *ranges, size_t count, void (*released)(void *arg),
                void *arg, struct extents **extents)
{
    struct extents *x = calloc(1, sizeof *x + count * sizeof x->list[0]);
    if (!x || !(x->sorted = sorted_copy(ranges, count, &x->sorted_count))) {
        free(x);
        return -ENOMEM;
    }
    pthread_mutex_init(&x->lock, NULL);
    x->users = 1;
    x->released = released;
    x->arg = arg;
    x->count = count;
    for (size_t i = 0; i < count; i++) {
        x->list[i] = (struct extent){ranges[i].address, ranges[i].length, x->size};
        x->size += ranges[i].length;
    }
    *extents = x;
    return 0;
}

static void destroy(struct extents *extents)
{
    pthread_mutex_destroy(&extents->lock);
    free(extents->sorted);
    free(extents);
}

void extents_free(struct extents *extents)
{
    if (!extents) {
        return;
    }
    pthread_mutex_lock(&extents->lock);
    extents->freed = extents->ended && extents->users > 0;
    bool now = !extents->freed;
    pthread_mutex_unlock(&extents->lock);
    if (now) {
        destroy(extents);
    }
}

uint64_t extents_size(const struct extents *extents)
{
    return extents->size;
}

bool extents_enter(struct extents *extents)
{
    pthread_mutex_lock(&extents->lock);
    bool may = !extents->ended;
    extents->users += may;
    pthread_mutex_unlock(&extents->lock);
    return may;
}

void extents_leave(struct extents *extents)
{
    void (*released)(void *arg) = extents->released;
    void *arg = extents->arg;
    pthread_mutex_lock(&extents->lock);
    bool last = --extents->users == 0;
    bool freed = last && extents->freed;
    pthread_mutex_unlock(&extents->lock);
    if (freed) {
        destroy(extents);
    }
    if (last && released) {
        released(arg);
    }
}

void extents_end(struct extents *extents, unsigned more)
{
    pthread_mutex_lock(&extents->lock);
    extents->ended = true;
    extents->users += more;
    pthread_mutex_unlock(&extents->lock);
}

/* ---- bytes ---- */

/* The number of the range that has the byte at `offset`; below extents->size. */
static size_t find(const struct extents *extents, uint64_t offset)
{
    size_t low = 0;
    size_t high = extents->count;
    while (high - low >
           1) { /* the last one that begins at or before it: empty ones are passed by */
        size_t middle = low + (high - low) / 2;
        if (extents->list[middle].offset <= offset) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

uint8_t *extents_at(const struct extents *extents, uint64_t offset, uint64_t length)
{
    const struct extent *extent = &extents->list[find(extents, offset)];
    uint64_t inside = offset - extent->offset;
    return length <= extent->length - inside ? extent->address + inside : NULL;
}

/* Some of [offset, offset + length) as a vector; returns how many bytes it covers. */
static size_t vector(const struct extents *extents, uint64_t offset, size_t length,
                     struct iovec iov[EXTENTS_IOV], size_t *count)
{
    size_t covered = 0;
    *count = 0;
    for (size_t i = find(extents, offset); covered < length && *count < EXTENTS_IOV; i++) {
        const struct extent *extent = &extents->list[i];
        uint64_t inside = offset + covered - extent->offset;
        size_t piece =
            extent->length - inside < length - covered ? extent->length - inside : length - covered;
        if (piece) {
            iov[(*count)++] = (struct iovec){extent->address + inside, piece};
        }
        covered += piece;
    }
    return covered;
}

struct iovec *extents_pieces(const struct extents *extents, uint64_t offset, uint64_t length,
                             size_t *count)
{
    size_t first = find(extents, offset);
    size_t last = find(extents, offset + length - 1);
    struct iovec *pieces = calloc(last - first + 1, sizeof *pieces);
    *count = 0;
    for (uint64_t done = 0; pieces && done < length;) {
        struct iovec some[EXTENTS_IOV];
        size_t got;
        done += vector(extents, offset + done, length - done, some, &got);
        memcpy(pieces + *count, some, got * sizeof *some);
        *count += got;
    }
    return pieces;
}

int extents_read(const struct extents *extents, uint64_t offset, size_t length, void *out)
{
    struct iovec iov[EXTENTS_IOV];
    size_t count;
    for (size_t done = 0; done < length;) {
        size_t piece = vector(extents, offset + done, length - done, iov, &count);
        struct iovec local = {(uint8_t *)out + done, piece};
        ssize_t n = process_vm_readv(getpid(), &local, 1, iov, count, 0);
        if (n < 0 && (errno == EPERM || errno == ENOSYS)) { /* a sandbox that forbids the call */
            for (size_t i = 0, at = done; i < count; at += iov[i++].iov_len) {
                memcpy((uint8_t *)out + at, iov[i].iov_base, iov[i].iov_len);
            }
            n = (ssize_t)piece;
        }
        if (n <= 0) {
            return n < 0 ? -errno : -EFAULT;
        }
        done += (size_t)n;
    }
    return 0;
}

void extents_write(const struct extents *extents, uint64_t offset, size_t length, const void *in)
{
    struct iovec iov[EXTENTS_IOV];
    size_t count;
    for (size_t done = 0; done < length;) {
        (void)vector(extents, offset + done, length - done, iov, &count);
        for (size_t i = 0; i < count; i++) {
            memcpy(iov[i].iov_base, (const uint8_t *)in + done, iov[i].iov_len);
            done += iov[i].iov_len;
        }
    }
}

/* ---- looking before ---- */

/* Goes through the ranges by address along the lines of the file. 0 or -EFAULT. */
static int maps_walk(FILE *maps, const struct extent *sorted, size_t count, bool writable,
                     size_t *bad)
{
    char *line = NULL;
    size_t room = 0;
    size_t i = 0;
    uintptr_t covered = count ? (uintptr_t)sorted[0].address : 0; /* of range i, up to here */
    bool broken = false;
    while (i < count && !broken && getline(&line, &room, maps) > 0) {
        char *at = line;
        uintptr_t begin = strtoul(at, &at, 16);
        uintptr_t end = *at == '-' ? strtoul(at + 1, &at, 16) : 0;
        bool fits = at[0] == ' ' && at[1] == 'r' && (!writable || at[2] == 'w');
        while (i < count && covered < end && !broken) {
            uintptr_t range_end = (uintptr_t)sorted[i].address + sorted[i].length;
            if (covered < begin || !fits) {
                broken = true;
            } else if (range_end > end) {
                covered = end;
            } else if (++i < count) {
                covered = (uintptr_t)sorted[i].address;
            }
        }
    }
    free(line);
    if (i < count) {
        *bad = sorted[i].offset;
        return -EFAULT;
    }
    return 0;
}

int extents_check(const struct engine_range *ranges, size_t count, bool writable, size_t *bad)
{
    size_t left;
    FILE *maps = fopen("/proc/self/maps", "re");
    if (!maps) {
        return -errno;
    }
    struct extent *sorted = sorted_copy(ranges, count, &left);
    int status = sorted ? maps_walk(maps, sorted, left, writable, bad) : -ENOMEM;
    free(sorted);
    fclose(maps);
    return status;
}

int extents_check_apart(const struct engine_range *ranges, size_t count, size_t *bad)
{
    size_t left;
    struct extent *sorted = sorted_copy(ranges, count, &left);
    if (!sorted) {
        return -ENOMEM;
    }
    int status = 0;
    for (size_t i = 0; i < left && status == 0; i++) {
        uintptr_t begin = (uintptr_t)sorted[i].address;
        bool wraps = begin + sorted[i].length < begin;
        bool overlaps = i > 0 && sorted[i - 1].address + sorted[i - 1].length > sorted[i].address;
        if (wraps || overlaps || !begin) {
            *bad = sorted[i].offset;
            status = -EINVAL;
        }
    }
    free(sorted);
    return status;
}

bool extents_overlap(const struct extents *extents, const struct engine_range *ranges, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        const uint8_t *begin = ranges[i].address;
        const uint8_t *end = begin + ranges[i].length;
        /* The first of ours that ends behind its begin. */
        size_t low = 0;
        size_t high = extents->sorted_count;
        while (low < high) {
            size_t middle = low + (high - low) / 2;
            if (extents->sorted[middle].address + extents->sorted[middle].length > begin) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        if (begin < end && low < extents->sorted_count && extents->sorted[low].address < end) {
            return true;
        }
    }
    return false;
}
