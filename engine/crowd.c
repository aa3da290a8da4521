#include "engine/crowd.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct crowd {
    size_t count;
    size_t room;
    struct crowd_member **members;
};

static struct crowd_member **member_find(const struct crowd *crowd, const char *node, uint64_t boot)
{
    for (size_t i = 0; crowd && i < crowd->count; i++) {
        struct crowd_member *member = crowd->members[i];
        if (member->boot == boot && strcmp(member->node, node) == 0) {
            return &crowd->members[i];
        }
    }
    return NULL;
}

int crowd_join(struct crowd **crowd, const char *node, uint64_t boot)
{
    struct crowd_member **known = member_find(*crowd, node, boot);
    if (known) {
        bool room = (*known)->links < CROWD_LINKS_MAX;
        (*known)->links += room;
        return room ? 0 : -EMFILE;
    }
    if (!*crowd && !(*crowd = calloc(1, sizeof **crowd))) {
        return -ENOMEM;
    }
    struct crowd *c = *crowd;
    if (c->count == c->room) {
        size_t room = c->room ? c->room * 2 : 8;
        struct crowd_member **grown = reallocarray(c->members, room, sizeof(struct crowd_member *));
        if (!grown) {
            return -ENOMEM;
        }
        c->members = grown;
        c->room = room;
    }
    struct crowd_member *member = calloc(1, sizeof *member);
    if (!member) {
        return -ENOMEM;
    }
    snprintf(member->node, sizeof member->node, "%s", node);
    member->boot = boot;
    member->links = 1;
    c->members[c->count++] = member;
    return 0;
}

void crowd_leave(struct crowd *crowd, const char *node, uint64_t boot)
{
    struct crowd_member **known = member_find(crowd, node, boot);
    if (known && --(*known)->links == 0) {
        free(*known);
        *known = crowd->members[--crowd->count];
    }
}

size_t crowd_size(const struct crowd *crowd)
{
    return crowd ? crowd->count : 0;
}

size_t crowd_sample(const struct crowd *crowd, const char *but, uint64_t random,
                    const struct crowd_member **members, size_t most)
{
    size_t count = 0;
    for (size_t i = 0; i < crowd_size(crowd) && count < most; i++) {
        const struct crowd_member *member = crowd->members[(random + i) % crowd->count];
        if (strcmp(member->node, but) != 0) {
            members[count++] = member;
        }
    }
    return count;
}

void crowd_free(struct crowd *crowd)
{
    if (!crowd) {
        return;
    }
    for (size_t i = 0; i < crowd->count; i++) {
        free(crowd->members[i]);
    }
    free(crowd->members);
    free(crowd);
}
