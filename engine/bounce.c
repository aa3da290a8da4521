#include "engine/bounce.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <utlist.h>

#define BOUNCE_HUGE (2ull << 20)

struct buffer {
    uint8_t *bytes;
    uint64_t size;
    struct buffer *next;
};

struct bounce {
    pthread_mutex_t lock;
    struct buffer *spare;
    struct buffer *out;
};

int bounce_open(struct bounce **bounce)
{
    struct bounce *b = calloc(1, sizeof *b);
    if (!b) {
        return -ENOMEM;
    }
    pthread_mutex_init(&b->lock, NULL);
    *bounce = b;
    return 0;
}

static void buffers_free(struct buffer *list)
{
    while (list) {
        struct buffer *buffer = list;
        list = list->next;
        munmap(buffer->bytes, buffer->size);
        free(buffer);
    }
}

void bounce_close(struct bounce *bounce)
{
    if (bounce) {
        buffers_free(bounce->spare);
        pthread_mutex_destroy(&bounce->lock);
        free(bounce);
    }
}

static struct buffer *buffer_new(uint64_t size)
{
    struct buffer *buffer = malloc(sizeof *buffer);
    if (!buffer) {
        return NULL;
    }
    buffer->size = (size + BOUNCE_HUGE - 1) / BOUNCE_HUGE * BOUNCE_HUGE;
    buffer->bytes = mmap(NULL, buffer->size, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (buffer->bytes == MAP_FAILED) {
        free(buffer);
        return NULL;
    }
    (void)madvise(buffer->bytes, buffer->size, MADV_HUGEPAGE); /* a kernel without: slower */
    return buffer;
}

uint8_t *bounce_take(struct bounce *bounce, uint64_t size)
{
    struct buffer *buffer;
    pthread_mutex_lock(&bounce->lock);
    LL_FOREACH(bounce->spare, buffer) {
        if (buffer->size >= size) {
            LL_DELETE(bounce->spare, buffer);
            break;
        }
    }
    if (!buffer) {
        buffer = buffer_new(size);
    }
    if (buffer) {
        LL_PREPEND(bounce->out, buffer);
    }
    pthread_mutex_unlock(&bounce->lock);
    return buffer ? buffer->bytes : NULL;
}

void bounce_give(struct bounce *bounce, uint8_t *bytes)
{
    struct buffer *buffer;
    struct buffer *old = NULL;
    if (!bytes) {
        return;
    }
    pthread_mutex_lock(&bounce->lock);
    LL_SEARCH_SCALAR(bounce->out, buffer, bytes, bytes);
    LL_DELETE(bounce->out, buffer);
    LL_PREPEND(bounce->spare, buffer);
    if (!bounce->out) {
        old = bounce->spare;
        bounce->spare = NULL;
    }
    pthread_mutex_unlock(&bounce->lock);
    buffers_free(old);
}
