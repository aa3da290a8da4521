/* p2pfs: the mount program and the control tool in one. Builds the house of one mount in one
 * visible order, serves, and takes it down in reverse. */
#include <errno.h>
#include <fcntl.h>
#include <pwd.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine/address.h"
#include "engine/engine.h"
#include "engine/handshake.h"
#include "engine/work.h"
#include "fs/cmd.h"
#include "fs/control.h"
#include "fs/exporter.h"
#include "fs/fresh.h"
#include "fs/hold.h"
#include "fs/house.h"
#include "fs/inode.h"
#include "fs/mountpoint.h"
#include "fs/notice.h"
#include "fs/opened.h"
#include "fs/options.h"
#include "fs/parking.h"
#include "fs/session.h"
#include "fs/through.h"
#include "meta/base/log.h"
#include "meta/base/util.h"
#include "meta/meta.h"

#define MAIN_LEASE_MS    10000
#define MAIN_PATIENCE_MS 2000
#define MAIN_CHORES      4 /* registering in place waits for local disks */

static struct handshake_secret secret;

/* One line for the user. Takes `why`, which may be NULL; then the errno speaks. */
static void complain(const char *what, int rc, char *why)
{
    if (why != NULL)
        fprintf(stderr, "p2pfs: %s\n", why);
    else
        fprintf(stderr, "p2pfs: %s: %s\n", what, strerror(-rc));
    free(why);
}

/* ---- events of the catalog, for the engine while it lives ---- */

static void version_gone(void *arg, const struct model_id *version)
{
    struct house *house = arg;
    pthread_mutex_lock(&house->gate);
    if (house->events_to != NULL)
        engine_version_gone(house->events_to, version);
    pthread_mutex_unlock(&house->gate);
}

static void version_sealed(void *arg, const struct model_id *version)
{
    struct house *house = arg;
    pthread_mutex_lock(&house->gate);
    if (house->events_to != NULL)
        engine_version_sealed(house->events_to, version);
    pthread_mutex_unlock(&house->gate);
}

static void name_changed(void *arg, uint64_t parent, const char *name)
{
    struct house *house = arg;
    pthread_mutex_lock(&house->gate);
    if (house->notices != NULL)
        notice_stale(house, parent, name);
    pthread_mutex_unlock(&house->gate);
}

static void gate_set(struct house *house, struct engine *engine)
{
    pthread_mutex_lock(&house->gate);
    house->events_to = engine;
    pthread_mutex_unlock(&house->gate);
}

/* ---- the steps ---- */

/* umount(8) returns before its process has let go of its name and port, so a mount that follows
 * at once waits for it a moment. True: try again. */
static bool again(const struct house *house, int rc, char **why)
{
    if ((rc != -EADDRINUSE && rc != -EEXIST) ||
        util_now_ms() - house->started_ms > MAIN_PATIENCE_MS)
        return false;
    free(*why);
    *why = NULL;
    usleep(50 * 1000);
    return true;
}

static int secret_read(const struct options *options)
{
    if (options->secret_file == NULL)
        return 0;
    int rc = handshake_secret_read(options->secret_file, &secret);
    if (rc == -EPERM)
        fprintf(stderr, "p2pfs: secret_file=%s: others may read it; chmod 600 it\n",
                options->secret_file);
    else if (rc == -EINVAL)
        fprintf(stderr,
                "p2pfs: secret_file=%s: a secret is 16 to %d bytes; make one with openssl rand "
                "-hex 32\n",
                options->secret_file, HANDSHAKE_SECRET_MAX);
    else if (rc != 0)
        fprintf(stderr, "p2pfs: secret_file=%s: %s\n", options->secret_file, strerror(-rc));
    return rc;
}

static int open_catalog(struct house *house, uint64_t boot)
{
    const struct options *options = &house->options;
    struct catalog_config config = {.url = options->meta,
                                    .credentials_file = options->credentials,
                                    .self = {.boot = boot, .pid = getpid()},
                                    .lease_ms = MAIN_LEASE_MS,
                                    .orphan_ttl_s = options->orphan_ttl_s,
                                    .events = {.arg = house,
                                               .name_changed = name_changed,
                                               .version_gone = version_gone,
                                               .version_sealed = version_sealed}};
    snprintf(config.self.name, sizeof(config.self.name), "%s", options->node);
    snprintf(config.self.locality, sizeof(config.self.locality), "%s",
             options->locality == NULL ? "" : options->locality);
    address_host(config.self.host);
    char *why = NULL;
    int rc = catalog_open(&config, &house->catalog, &why);
    if (rc != 0)
        complain(options->meta, rc, why);
    return rc;
}

static enum engine_rdma rdma_wanted(const struct options *options)
{
    static const enum engine_rdma wanted[] = {[OPTIONS_TRANSPORT_AUTO] = ENGINE_RDMA_AUTO,
                                              [OPTIONS_TRANSPORT_RDMA] = ENGINE_RDMA_ON,
                                              [OPTIONS_TRANSPORT_TCP] = ENGINE_RDMA_OFF};
    return options->require_rdma ? ENGINE_RDMA_ONLY : wanted[options->transport];
}

static int open_engine(struct house *house, uint64_t boot)
{
    const struct options *options = &house->options;
    struct engine_config config = {.catalog = house->catalog,
                                   .node = options->node,
                                   .boot = boot,
                                   .listen = options->listen,
                                   .transport = "tcp",
                                   .rdma = rdma_wanted(options),
                                   .rdma_devices = options->device,
                                   .rdma_matrix = options->nic_priority_matrix,
                                   .rdma_gid = (unsigned)(options->gid_index + 1),
                                   .rdma_port = options->ib_port,
                                   .congestion = options->tcp_congestion,
                                   .cache_size = options->cache_size,
                                   .cache_dir = options->cache_dir,
                                   .shard_size = options->shard_size,
                                   .digest = options->digest,
                                   .fetch_whole = options->fetch == OPTIONS_FETCH_WHOLE,
                                   .read_timeout_ms = options->read_timeout_s * 1000u,
                                   .seed_idle = options->seed == OPTIONS_SEED_IDLE,
                                   .max_upload = options->max_upload,
                                   .max_download = options->max_download,
                                   .secret = &secret,
                                   .exclude_dir = house->mountpoint};
    char *why = NULL;
    int rc;
    do
        rc = engine_open(&config, &house->engine, &why);
    while (again(house, rc, &why));
    if (rc != 0)
        complain(options->listen, rc, why);
    return rc;
}

static int announce(struct house *house)
{
    char address[MODEL_ADDRESS_MAX + 1], rdma[MODEL_ADDRESS_MAX + 1] = "", *why = NULL;
    int rc = address_advertised(house->options.advertise, engine_address(house->engine), address);
    if (rc == 0 && engine_rdma_address(house->engine)[0])
        rc = address_advertised(house->options.advertise, engine_rdma_address(house->engine), rdma);
    catalog_rdma_set(house->catalog, rdma);
    if (rc == 0)
        do
            rc = catalog_serve(house->catalog, address, &why);
        while (again(house, rc, &why));
    if (rc != 0)
        complain(house->options.node, rc, why);
    return rc;
}

static int open_files(struct house *house, const struct model_attr *root)
{
    int rc = inodes_open(house->catalog, root, &house->inodes);
    if (rc == 0)
        rc = fresh_files_open(house, &house->fresh);
    if (rc == 0)
        rc = parking_open(&house->parking);
    if (rc == 0)
        rc = holds_open(&house->holds);
    if (rc == 0)
        rc = through_open(&house->through);
    if (rc == 0)
        rc = work_open(MAIN_CHORES, &house->chores);
    if (rc == 0)
        rc = control_open(house, &house->control);
    char *why = NULL;
    if (rc == 0 && house->options.metrics)
        rc = exporter_open(house->control, house->options.metrics, &house->exporter, &why);
    if (rc != 0)
        complain("starting", rc, why);
    return rc;
}

/* With a session to tell. Without a thread for them, there are no notices. */
static void notices_open(struct house *house)
{
    struct work *notices = NULL;
    if (work_open(1, &notices) != 0)
        return;
    pthread_mutex_lock(&house->gate);
    house->notices = notices;
    pthread_mutex_unlock(&house->gate);
}

/* Ends what answers requests. The engine and the catalog still run, for what is under way. */
static void quiet_files(struct house *house)
{
    fresh_files_shut(house->fresh);
    parking_clear(house->parking);
    session_unmount(house);
    exporter_close(house->exporter);
    control_close(house->control);
    work_close(house->chores);
    pthread_mutex_lock(&house->gate);
    struct work *notices = house->notices;
    house->notices = NULL;
    pthread_mutex_unlock(&house->gate);
    work_close(notices);
    opened_close(house);
    holds_close(house->holds);
    parking_close(house->parking);
    through_close(house->through);
}

/* Before it serves, somebody may wait for this process to go on by itself. */
static void serving(struct house *house)
{
    if (house->ready_fd < 0)
        return;
    util_autoclose int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (chdir("/") != 0 || null < 0)
        log_debug("cannot let go of the terminal: %s", strerror(errno));
    for (int fd = 0; fd <= 2 && null >= 0; fd++)
        dup2(null, fd);
    if (write(house->ready_fd, "+", 1) != 1)
        log_warn("nobody waited for the mount");
    close(house->ready_fd);
}

/* Builds, serves, unbuilds. The exit status. */
static int mount_run(struct house *house, const struct model_attr *root)
{
    uint64_t boot = util_random_u64();
    int status = 1;
    if (secret_read(&house->options) != 0)
        return status;
    const struct meta_ops *backend = meta_backend(house->options.meta);
    int rc =
        address_defaults(&house->options.listen, &house->options.node, backend->single_machine);
    if (rc != 0) {
        complain("listen", rc, NULL);
        goto wipe_secret;
    }
    if (open_catalog(house, boot) != 0)
        goto wipe_secret;
    if (open_engine(house, boot) != 0)
        goto close_catalog;
    gate_set(house, house->engine);
    if (announce(house) != 0)
        goto close_engine;
    engine_adopt(house->engine);
    if (open_files(house, root) != 0)
        goto quiet_files;

    char *why = NULL;
    rc = session_open(house, &why);
    if (rc != 0) {
        complain(house->mountpoint, rc, why);
        goto quiet_files;
    }
    notices_open(house);
    rc = session_serve(house);
    status = rc == 0 ? 0 : 1;
    if (rc != 0)
        log_error("%s: the kernel ended the mount: %s", house->mountpoint, strerror(-rc));
    else
        log_info("%s: unmounted", house->mountpoint);

quiet_files:
    quiet_files(house);
close_engine:
    gate_set(house, NULL);
    engine_close(house->engine);
close_catalog:
    catalog_close(house->catalog);
    fresh_files_close(house->fresh);
    inodes_close(house->inodes);
    session_close(house);
wipe_secret:
    handshake_secret_wipe(&secret);
    return status;
}

/* Every open file and peer costs a descriptor, and the soft limit is often 1024. */
static void limits_raise(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

/* In the background: the parent returns its exit status when the child serves or has failed,
 * with *child unset. Before any thread is made. */
static int daemonise(struct house *house, bool *child)
{
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) {
        complain("pipe", -errno, NULL);
        return 1;
    }
    pid_t pid = fork();
    if (pid < 0) {
        complain("fork", -errno, NULL);
        return 1;
    }
    if (pid == 0) {
        close(ends[0]);
        setsid();
        house->ready_fd = ends[1];
        *child = true;
        return 0;
    }
    close(ends[1]);
    char mark = 0;
    int status = 0;
    if (read(ends[0], &mark, 1) == 1)
        return 0;
    if (waitpid(pid, &status, 0) != pid || !WIFEXITED(status)) {
        fprintf(stderr,
                "p2pfs: the mount process died before it served; run it with -f to see why\n");
        return 1;
    }
    return WEXITSTATUS(status);
}

static int mount_main(int argc, char **argv)
{
    struct house house = {.ready_fd = -1,
                          .gate = PTHREAD_MUTEX_INITIALIZER,
                          .opened_lock = PTHREAD_MUTEX_INITIALIZER,
                          .serving = serving,
                          .started_ms = util_now_ms(),
                          .uid = getuid()};
    char *why = NULL;
    int rc = options_parse(argc, argv, &house.options, &why);
    if (rc != 0) {
        complain("options", rc, why);
        return rc == -EINVAL ? 2 : 1;
    }
    struct model_attr root = {0};
    int status = 1;
    rc = mountpoint_check(house.options.mountpoint, &house.mountpoint, &root, &why);
    if (rc != 0) {
        complain(house.options.mountpoint, rc, why);
        goto clear_options;
    }
    limits_raise();
    umask(0);
    sigset_t held;
    sigemptyset(&held);
    sigaddset(&held, SIGTERM);
    sigaddset(&held, SIGINT);
    sigaddset(&held, SIGHUP);
    pthread_sigmask(SIG_BLOCK, &held, NULL);
    signal(SIGPIPE, SIG_IGN);
    bool child = house.options.foreground;
    if (!child)
        status = daemonise(&house, &child);
    if (child) {
        log_setup(house.options.log_level, !house.options.foreground);
        status = mount_run(&house, &root);
    }
clear_options:
    free(house.mountpoint);
    options_clear(&house.options);
    return status;
}

static int usage(const char *problem, const char *word)
{
    fprintf(stderr, "p2pfs: %s%s; p2pfs help lists the commands, and p2pfs META DIR mounts\n", word,
            problem);
    return 2;
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return usage("what to do?", "");
    const char *word = argv[1];
    if (strcmp(word, "-h") == 0 || strcmp(word, "--help") == 0)
        word = "help";
    else if (strcmp(word, "-V") == 0 || strcmp(word, "--version") == 0)
        word = "version";
    const struct cmd *cmd = cmd_find(word);
    if (cmd != NULL)
        return cmd->run(argc - 1, argv + 1);
    if (word[0] == '-' || strstr(word, "://") != NULL)
        return mount_main(argc, argv);
    return usage(": there is no such command", word);
}
