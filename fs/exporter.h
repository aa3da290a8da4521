/* Exporter: .p2pfs/metrics over HTTP (metrics=ADDR:PORT), for Prometheus.
 *
 * One thread of its own, a bounded number of connections, each with a time-out: it never holds up the mount. Where
 * libmicrohttpd was missing when this was built, opening fails with the remedy. */
#ifndef P2PFS_FS_EXPORTER_H
#define P2PFS_FS_EXPORTER_H

struct control;
struct exporter;

/* Serves at exactly that address. 0; negative errno with *error, one sentence for the user (malloc'd). */
int exporter_open(struct control *control, const char *address, struct exporter **exporter,
                  char **error);
void exporter_close(struct exporter *exporter); /* before its control; NULL is harmless */

#endif
