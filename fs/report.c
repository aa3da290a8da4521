#include "fs/report.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>

#include "fs/control.h"
#include "fs/opened.h"
#include "fs/reply.h"
#include "meta/base/util.h"

/* A read that waits for the answer. */
struct report_reader {
    struct report *report;
    fuse_req_t req;
    size_t size;
    off_t offset;
    struct report_reader *next;
};

/* One open of one file. Counted by the handle, the unanswered request and parked readers;
 * guarded by lock. */
struct report {
    pthread_mutex_t lock;
    unsigned count;
    bool conversation;
    bool asked, answered;
    off_t base; /* where the answer begins for the reader; -1: not read yet */
    char *text;
    size_t length;
    struct report_reader *readers;
    struct opened opened;
};

static void report_drop(struct report *report, unsigned count)
{
    pthread_mutex_lock(&report->lock);
    report->count -= count;
    bool last = report->count == 0;
    pthread_mutex_unlock(&report->lock);
    if (!last)
        return;
    pthread_mutex_destroy(&report->lock);
    free(report->text);
    free(report);
}

static void report_shut(struct house *house, struct opened *opened)
{
    opened_remove(house, opened);
    report_drop(util_container(opened, struct report, opened), 1);
}

void report_open(fuse_req_t req, struct inode *inode, struct fuse_file_info *fi)
{
    struct house *house = reply_house(req);
    bool conversation = inode->report == CONTROL_REQUEST;
    if (!conversation && (fi->flags & O_ACCMODE) != O_RDONLY) {
        reply_status(req, -EPERM);
        return;
    }
    struct report *report = calloc(1, sizeof(*report));
    int rc = report == NULL ? -ENOMEM : 0;
    if (rc == 0) {
        *report = (struct report){.count = 1,
                                  .conversation = conversation,
                                  .base = conversation ? -1 : 0,
                                  .opened.drop = report_shut};
        pthread_mutex_init(&report->lock, NULL);
        report->answered = !conversation;
        if (!conversation)
            rc = control_render(house->control, inode->report, &report->text, &report->length);
    }
    if (rc != 0) {
        if (report != NULL)
            report_drop(report, 1);
        reply_status(req, rc);
        return;
    }
    fi->fh = (uintptr_t)report;
    fi->direct_io = 1; /* its size is not known before it is rendered */
    opened_add(house, &report->opened);
    if (fuse_reply_open(req, fi) != 0)
        report_shut(house, &report->opened);
}

void report_release(struct house *house, struct fuse_file_info *fi)
{
    report_shut(house, &((struct report *)(uintptr_t)fi->fh)->opened);
}

/* Called with the lock; the text is complete. */
static void answer(struct report *report, fuse_req_t req, size_t size, off_t offset)
{
    if (report->base < 0)
        report->base = offset;
    size_t at = offset < report->base ? 0 : (size_t)(offset - report->base);
    if (at >= report->length)
        fuse_reply_buf(req, NULL, 0);
    else
        fuse_reply_buf(req, report->text + at,
                       size < report->length - at ? size : report->length - at);
}

/* With the request's lock in libfuse held; that one comes before ours. */
static void reader_interrupt(fuse_req_t req, void *arg)
{
    struct report_reader *reader = arg;
    struct report *report = reader->report;
    pthread_mutex_lock(&report->lock);
    struct report_reader **at = &report->readers;
    while (*at != NULL && *at != reader)
        at = &(*at)->next;
    bool found = *at != NULL;
    if (found)
        *at = reader->next;
    pthread_mutex_unlock(&report->lock);
    if (!found)
        return; /* it is not in the list yet, and looks itself; or it is being answered */
    reply_status(req, -EINTR);
    free(reader);
    report_drop(report, 1);
}

void report_read(fuse_req_t req, size_t size, off_t offset, struct fuse_file_info *fi)
{
    struct report *report = (struct report *)(uintptr_t)fi->fh;
    struct report_reader *reader = malloc(sizeof(*reader));
    if (reader == NULL) {
        reply_status(req, -ENOMEM);
        return;
    }
    *reader = (struct report_reader){.report = report, .req = req, .size = size, .offset = offset};
    fuse_req_interrupt_func(req, reader_interrupt, reader);
    pthread_mutex_lock(&report->lock);
    bool interrupted = fuse_req_interrupted(req) != 0;
    bool parks = report->asked && !report->answered && !interrupted;
    if (parks) {
        reader->next = report->readers;
        report->readers = reader;
        report->count++;
    }
    pthread_mutex_unlock(&report->lock);
    if (parks)
        return;
    fuse_req_interrupt_func(req, NULL, NULL);
    free(reader);
    pthread_mutex_lock(&report->lock);
    if (report->answered)
        answer(report, req, size, offset);
    else
        reply_status(req, interrupted ? -EINTR : -EINVAL);
    pthread_mutex_unlock(&report->lock);
}

static void answered(void *arg, char *text, size_t length)
{
    struct report *report = arg;
    pthread_mutex_lock(&report->lock);
    report->text = text;
    report->length = text == NULL ? 0 : length;
    report->answered = true;
    struct report_reader *readers = report->readers;
    report->readers = NULL;
    pthread_mutex_unlock(&report->lock);
    unsigned done = 1; /* the request itself */
    while (readers != NULL) {
        struct report_reader *reader = readers;
        readers = reader->next;
        fuse_req_interrupt_func(reader->req, NULL,
                                NULL); /* returns when no interrupt is under way */
        pthread_mutex_lock(&report->lock);
        answer(report, reader->req, reader->size, reader->offset);
        pthread_mutex_unlock(&report->lock);
        free(reader);
        done++;
    }
    report_drop(report, done);
}

void report_write(fuse_req_t req, const char *bytes, size_t size, struct fuse_file_info *fi)
{
    struct report *report = (struct report *)(uintptr_t)fi->fh;
    struct house *house = reply_house(req);
    uint32_t uid = fuse_req_ctx(req)->uid;
    int rc = 0;
    pthread_mutex_lock(&report->lock);
    if (!report->conversation)
        rc = -EPERM;
    else if (report->asked)
        rc = -EBUSY; /* one request for each open */
    else if (size > CONTROL_REQUEST_MAX)
        rc = -EMSGSIZE;
    if (rc == 0) {
        report->asked = true;
        report->count++;
    }
    pthread_mutex_unlock(&report->lock);
    if (rc != 0) {
        reply_status(req, rc);
        return;
    }
    control_request(house->control, uid, bytes, size, answered, report);
    fuse_reply_write(req, size);
}
