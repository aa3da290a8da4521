#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "engine/reach.h"
#include "fs/control.h"
#include "fs/doctor.h"
#include "meta/base/util.h"

#define ANSWER_MS 2000
#define PEERS_MAX 256 /* of a mount that are tried */

static struct json *peers_read(const char *mount)
{
    char path[4200];
    snprintf(path, sizeof(path), "%s/" CONTROL_DIR "/%s", mount, control_names[CONTROL_PEERS]);
    FILE *file = fopen(path, "re");
    char *text = NULL;
    size_t room = 0;
    ssize_t length = file ? getdelim(&text, &room, '\0', file) : -1;
    struct json *parsed = length > 0 ? json_parse(text, (size_t)length) : NULL;
    if (file)
        fclose(file);
    free(text);
    return parsed;
}

/* lost: in no other way either. */
static void unreached(struct doctor *doctor, const char *node, const struct reach *reach,
                      bool by_rdma, bool lost)
{
    char what[32];
    snprintf(what, sizeof(what), "peer by %s", by_rdma ? "RDMA" : "TCP");
    doctor_find(
        doctor, lost ? STOP : WARN, what,
        by_rdma && lost ? "run p2pfs doctor there; compare MTU and routes of both ends"
        : by_rdma
            ? "run p2pfs doctor there; compare MTU and routes of both ends. TCP is used meanwhile"
            : "let its port through firewalls, or give it an advertise= that is reached from here",
        "%s at %s: %s", node, reach->address, reach->reason);
}

void doctor_peers(struct doctor *doctor, const char *mount)
{
    struct json *status = peers_read(mount);
    const struct transport_ops *rdma = transport_by_name("rdma");
    struct reach list[2 * PEERS_MAX];
    const char *nodes[2 * PEERS_MAX];
    size_t count = 0, tried[2] = {0}, reached[2] = {0};
    for (const struct json *peer = json_first(json_member(status, "peers"));
         peer && count + 1 < util_count(list); peer = json_next(peer)) {
        const char *addresses[] = {json_text(peer, "address"), json_text(peer, "rdma")};
        for (int i = 0; i < 2; i++) {
            const struct transport_ops *transport = i ? rdma : transport_by_name("tcp");
            if (!json_true(peer, "live") || !transport || !addresses[i] || !addresses[i][0])
                continue;
            nodes[count] = json_text(peer, "node");
            list[count++] = (struct reach){.transport = transport, .address = addresses[i]};
        }
    }
    reach_all(list, count, ANSWER_MS);
    for (size_t i = 0; i < count; i++) {
        tried[list[i].transport == rdma]++;
        reached[list[i].transport == rdma] += list[i].status == 0;
        bool lost = (i == 0 || nodes[i - 1] != nodes[i] || list[i - 1].status < 0) &&
                    (i + 1 == count || nodes[i + 1] != nodes[i] || list[i + 1].status < 0);
        if (list[i].status < 0)
            unreached(doctor, nodes[i], &list[i], list[i].transport == rdma, lost);
    }
    if (count > 0)
        doctor_find(doctor, GOOD, "peers", NULL,
                    "of %s: %zu of %zu answer by TCP, %zu of %zu by RDMA", mount, reached[0],
                    tried[0], reached[1], tried[1]);
    json_free(status);
}
