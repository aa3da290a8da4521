#include "fs/list.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "fs/fresh.h"
#include "fs/opened.h"
#include "fs/reply.h"
#include "meta/base/util.h"

/* One open directory. Offsets: 0 is ".", 1 "..", then the drafts, then the catalog's entries;
 * the offset that goes with an entry is the next one's. The kernel reads one directory with one
 * request at a time. */
struct listing {
    char **drafts;
    size_t draft_count;
    struct catalog_list entries;
    bool begun;
    struct opened opened;
};

static void listing_clear(struct listing *listing)
{
    while (listing->draft_count > 0)
        free(listing->drafts[--listing->draft_count]);
    free(listing->drafts);
    if (listing->entries.entries != NULL)
        catalog_list_free(&listing->entries);
    listing->drafts = NULL;
    listing->entries = (struct catalog_list){0};
    listing->begun = false;
}

static void listing_free(struct house *house, struct opened *opened)
{
    struct listing *listing = util_container(opened, struct listing, opened);
    opened_remove(house, opened);
    listing_clear(listing);
    free(listing);
}

static int listing_fill(struct house *house, const struct inode *dir, struct listing *listing)
{
    if (dir->kind != INODE_DIR)
        return 0;
    /* Drafts first: one that registers in between is then found twice, not missed. */
    int rc = fresh_names(house, dir->key.id, &listing->drafts, &listing->draft_count);
    if (rc == 0)
        rc = catalog_list(house->catalog, dir->key.id, &listing->entries);
    return rc;
}

void list_opendir(fuse_req_t req, fuse_ino_t nodeid, struct fuse_file_info *fi)
{
    struct house *house = reply_house(req);
    struct inode *dir = inode_by_nodeid(house->inodes, nodeid);
    struct listing *listing = calloc(1, sizeof(*listing));
    int rc = listing == NULL ? -ENOMEM : listing_fill(house, dir, listing);
    if (rc == -ENOENT)
        rc = -ESTALE; /* removed or replaced since the kernel looked: it shall look again */
    if (rc != 0) {
        if (listing != NULL)
            listing_clear(listing);
        free(listing);
        reply_status(req, rc);
        return;
    }
    fi->fh = (uintptr_t)listing;
    listing->opened.drop = listing_free;
    opened_add(house, &listing->opened);
    if (fuse_reply_open(req, fi) != 0)
        listing_free(house, &listing->opened);
}

void list_releasedir(fuse_req_t req, fuse_ino_t nodeid, struct fuse_file_info *fi)
{
    struct listing *listing = (struct listing *)(uintptr_t)fi->fh;
    (void)nodeid;
    listing_free(reply_house(req), &listing->opened);
    reply_status(req, 0);
}

/* One answer under construction. */
struct filling {
    fuse_req_t req;
    struct house *house;
    struct inode *dir;
    char *bytes;
    size_t size, used;
    bool plus;
};

/* False: no room left. */
static bool put(struct filling *filling, const char *name, const struct fuse_entry_param *entry,
                off_t next)
{
    char *at = filling->bytes + filling->used;
    size_t room = filling->size - filling->used;
    size_t length = filling->plus
                        ? fuse_add_direntry_plus(filling->req, at, room, name, entry, next)
                        : fuse_add_direntry(filling->req, at, room, name, &entry->attr, next);
    if (length > room)
        return false;
    filling->used += length;
    return true;
}

/* A name with nothing more: for plain readdir, and for "." and ".." always. */
static bool put_plain(struct filling *filling, const char *name, uint64_t id, mode_t type,
                      off_t next)
{
    struct fuse_entry_param entry = {.attr = {.st_ino = id, .st_mode = type}};
    return put(filling, name, &entry, next);
}

/* Gives a lookup of the inode to the kernel, or back when there is no room. */
static bool put_inode(struct filling *filling, const char *name, struct inode *inode, off_t next)
{
    struct fuse_entry_param entry;
    reply_entry_fill(filling->house, inode, &entry);
    bool fits = put(filling, name, &entry, next);
    if (!fits || !filling->plus)
        inode_forget(filling->house->inodes, inode, 1);
    return fits;
}

static bool put_draft(struct filling *filling, const char *name, off_t next)
{
    struct inode *inode = fresh_lookup(filling->house, filling->dir->key.id, name);
    if (inode != NULL)
        return put_inode(filling, name, inode, next);
    struct model_entry entry; /* registered since */
    if (catalog_lookup(filling->house->catalog, filling->dir->key.id, name, &entry) != 0)
        return true;
    bool fits = inode_get(filling->house->inodes, &entry, &inode) != 0 ||
                put_inode(filling, name, inode, next);
    model_entry_clear(&entry);
    return fits;
}

static bool put_entry(struct filling *filling, const struct model_entry *listed, off_t next)
{
    static const mode_t types[] = {
        [MODEL_DIR] = S_IFDIR, [MODEL_FILE] = S_IFREG, [MODEL_SYMLINK] = S_IFLNK};
    if (!filling->plus)
        return put_plain(filling, listed->name, listed->id, types[listed->kind], next);
    struct model_entry entry; /* as it is now: what readdirplus tells, the kernel believes */
    if (catalog_lookup(filling->house->catalog, filling->dir->key.id, listed->name, &entry) != 0)
        return true;
    struct inode *inode = NULL;
    bool fits = inode_get(filling->house->inodes, &entry, &inode) != 0 ||
                put_inode(filling, entry.name, inode, next);
    model_entry_clear(&entry);
    return fits;
}

/* Whether a draft of that name has been listed already. */
static bool hidden_by_draft(const struct listing *listing, const char *name)
{
    for (size_t i = 0; i < listing->draft_count; i++)
        if (strcmp(listing->drafts[i], name) == 0)
            return true;
    return false;
}

static bool put_at(struct filling *filling, const struct listing *listing, size_t index)
{
    off_t next = (off_t)index + 1;
    if (index < 2)
        return put_plain(filling, index == 0 ? "." : "..", filling->dir->key.id, S_IFDIR, next);
    index -= 2;
    if (filling->dir->kind == INODE_CONTROL_DIR) {
        struct inode *inode = inode_report(filling->house->inodes, (enum control_file)index);
        inode_lookup(filling->house->inodes, inode);
        return put_inode(filling, control_names[index], inode, next);
    }
    if (index < listing->draft_count)
        return put_draft(filling, listing->drafts[index], next);
    const struct model_entry *entry = &listing->entries.entries[index - listing->draft_count];
    return hidden_by_draft(listing, entry->name) || put_entry(filling, entry, next);
}

static void fill(fuse_req_t req, fuse_ino_t nodeid, size_t size, off_t offset,
                 struct fuse_file_info *fi, bool plus)
{
    struct house *house = reply_house(req);
    struct listing *listing = (struct listing *)(uintptr_t)fi->fh;
    struct filling filling = {.req = req,
                              .house = house,
                              .dir = inode_by_nodeid(house->inodes, nodeid),
                              .size = size,
                              .plus = plus};
    int rc = 0;
    if (offset == 0 && listing->begun) { /* rewound */
        listing_clear(listing);
        rc = listing_fill(house, filling.dir, listing);
        if (rc == -ENOENT) /* removed while it is open: empty */
            rc = 0;
    }
    listing->begun = true;
    filling.bytes = malloc(size);
    if (filling.bytes == NULL)
        rc = -ENOMEM;
    size_t count = filling.dir->kind == INODE_CONTROL_DIR
                       ? CONTROL_FILES
                       : listing->draft_count + listing->entries.count;
    for (size_t index = (size_t)offset; rc == 0 && index < count + 2; index++)
        if (!put_at(&filling, listing, index))
            break;
    if (rc != 0)
        reply_status(req, rc);
    else
        fuse_reply_buf(req, filling.bytes, filling.used);
    free(filling.bytes);
}

void list_readdir(fuse_req_t req, fuse_ino_t nodeid, size_t size, off_t offset,
                  struct fuse_file_info *fi)
{
    fill(req, nodeid, size, offset, fi, false);
}

void list_readdirplus(fuse_req_t req, fuse_ino_t nodeid, size_t size, off_t offset,
                      struct fuse_file_info *fi)
{
    fill(req, nodeid, size, offset, fi, true);
}
