/* Inode: what the kernel knows a name by (a nodeid), from its first lookup to its last forget.
 *
 * A file's inode belongs to one version: when a name gets another version, it gets another
 * nodeid, so that open files keep their version and their page cache. Directories and symbolic
 * links are known by their entry's id alone. st_ino is the entry's id always. Any thread; one
 * lock inside, never held while calling out. */
#ifndef P2PFS_FS_INODE_H
#define P2PFS_FS_INODE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

#include <uthash.h>

#include "fs/control.h"
#include "meta/catalog.h"
#include "meta/model.h"

struct inodes;
struct fresh;

enum inode_kind {
    INODE_DIR = MODEL_DIR,
    INODE_FILE = MODEL_FILE,
    INODE_SYMLINK = MODEL_SYMLINK,
    INODE_GHOST, /* the symbolic link that the kernel wants from SYMLINK; gone when forgotten */
    INODE_CONTROL_DIR, /* .p2pfs */
    INODE_REPORT,      /* a file in it */
};

struct inode_key {
    uint64_t id;
    struct model_id version; /* zeros but for files */
    uint64_t twin;           /* 1: the second nodeid of a file; see through.h */
};

/* What is open on a nodeid, for through.c, whose lock guards it. */
struct inode_io {
    unsigned buffered, through; /* handles */
    int backing;             /* the kernel's name for the file that `through` ones read; 0: none */
    atomic_bool twin_wanted; /* lookups get the twin; read without the lock */
};

/* All but what is marked is constant from birth. */
struct inode {
    struct inode_key key;
    enum inode_kind kind;
    enum control_file report;
    char *target; /* ghosts */
    struct fresh
        *draft; /* files that were written on this node since the mount; it lives as long as this */
    void (*draft_free)(struct fresh *draft);
    uint64_t lookups;       /* the kernel's; guarded by the table's lock, like all that follows */
    uint64_t holds;         /* handles' and requests' */
    struct model_attr attr; /* as last seen */
    uint64_t size;
    bool gone; /* no name leads here any more */
    struct inode_io io;
    UT_hash_handle hh;
};

/* st_blksize: programs read in pieces of this size. torch reads one for each tensor that it maps, so that smaller is
 * faster there, and cat slower. */
#define INODE_BLOCK (1u << 20)
/* The same of a draft: cp writes such pieces. A huge page of tmpfs that is written at once need not be cleared before. */
#define INODE_BLOCK_DRAFT (2u << 20)

/* root: owner and mode of the mount's own directory. */
int inodes_open(struct catalog *catalog, const struct model_attr *root, struct inodes **inodes);
void inodes_close(struct inodes *inodes); /* frees all, whatever the kernel still counts */

struct inode *inode_root(struct inodes *inodes);
struct inode *inode_control(struct inodes *inodes);
struct inode *inode_report(struct inodes *inodes, enum control_file file);
struct inode *inode_by_nodeid(struct inodes *inodes, uint64_t nodeid);
uint64_t inode_nodeid(struct inodes *inodes, const struct inode *inode);

/* The inode of an entry, with one more lookup. -ENOMEM. */
int inode_get(struct inodes *inodes, const struct model_entry *entry, struct inode **out);
/* A new one with one lookup, in the table from now on. Takes draft on success; -EEXIST, -ENOMEM. */
int inode_new_draft(struct inodes *inodes, const struct inode_key *key, struct fresh *draft,
                    void (*draft_free)(struct fresh *draft), struct inode **out);
int inode_new_ghost(struct inodes *inodes, const char *target, struct inode **out);
/* The inode that is in the table, with one more hold; NULL: none. */
struct inode *inode_find(struct inodes *inodes, const struct inode_key *key);

void inode_lookup(struct inodes *inodes, struct inode *inode); /* one more */
void inode_forget(struct inodes *inodes, struct inode *inode, uint64_t lookups);
void inode_hold(struct inodes *inodes, struct inode *inode);
void inode_release(struct inodes *inodes, struct inode *inode);

/* Attributes of all but drafts: from the catalog, or as last seen when the name is gone. */
void inode_stat(struct inodes *inodes, struct inode *inode, struct stat *out);
/* Fills st from plain values. */
void inode_stat_fill(enum inode_kind kind, uint64_t id, const struct model_attr *attr,
                     uint64_t size, unsigned links, struct stat *out);
/* The root's attributes belong to this mount, not to the cluster. mask: CATALOG_SET_*. */
void inode_root_setattr(struct inodes *inodes, unsigned mask, const struct model_attr *attr);
/* Puts the fields named by mask (CATALOG_SET_*) into *to. */
void inode_attr_merge(struct model_attr *to, unsigned mask, const struct model_attr *from);

#endif
