#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine/loop.h"
#include "engine/storage.h"
#include "engine/transport.h"
#include "fs/cmd_tools.h"
#include "fs/control.h"
#include "fs/doctor.h"
#include "meta/base/log.h"
#include "meta/base/util.h"
#include "p2pfs_config.h"

#define ANSWER_MS      2000 /* a mount that does not answer for so long does not answer */
#define NOFILE_WANTED  16384
#define TMPFS_TRY_SIZE (64u << 20)

void doctor_find(struct doctor *doctor, enum doctor_level level, const char *what,
                 const char *remedy, const char *format, ...)
{
    static const char *const names[] = {[GOOD] = "good", [WARN] = "warn", [STOP] = "STOP"};
    static const char *const keys[] = {[GOOD] = "good", [WARN] = "warn", [STOP] = "stop"};
    char seen[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(seen, sizeof(seen), format, arguments);
    va_end(arguments);
    doctor->stops = doctor->stops || level == STOP;
    if (doctor->as_json) {
        json_object(&doctor->out, NULL);
        json_put_text(&doctor->out, "what", what);
        json_put_text(&doctor->out, "level", keys[level]);
        json_put_text(&doctor->out, "finding", seen);
        json_put_text(&doctor->out, "remedy", remedy);
        json_end(&doctor->out);
        return;
    }
    printf("%s  %-16s %s\n", names[level], what, seen);
    if (remedy)
        printf("%*s-> %s\n", 23, "", remedy);
}

void doctor_line(const char *path, char *out, size_t size)
{
    util_autoclose int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, out, size - 1);
    out[got > 0 ? got : 0] = '\0';
    out[strcspn(out, "\n")] = '\0';
}

static bool in_path(const char *program)
{
    const char *path = getenv("PATH");
    for (const char *dir = path ? path : "/usr/bin:/bin"; *dir;) {
        char whole[4096];
        size_t part = strcspn(dir, ":");
        int length = snprintf(whole, sizeof(whole), "%.*s/%s", (int)part, dir, program);
        if (length > 0 && (size_t)length < sizeof(whole) && access(whole, X_OK) == 0)
            return true;
        dir += part + (dir[part] == ':');
    }
    return false;
}

/* ---- the checks ---- */

static void check_fuse(struct doctor *doctor)
{
    util_autoclose int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    if (fd >= 0)
        doctor_find(doctor, GOOD, "/dev/fuse", NULL, "can be opened");
    else if (errno == ENOENT || errno == ENODEV || errno == ENXIO)
        doctor_find(doctor, STOP, "/dev/fuse",
                    "modprobe fuse; in a container: start it with --device /dev/fuse", "%s",
                    strerror(errno));
    else
        doctor_find(doctor, STOP, "/dev/fuse",
                    "chmod 666 /dev/fuse; in a container: --device /dev/fuse --cap-add SYS_ADMIN",
                    "%s", strerror(errno));
}

static void check_mounting(struct doctor *doctor)
{
    bool helper = in_path("fusermount3");
    bool root = geteuid() == 0;
    char line[64] = "";
    if (helper)
        doctor_find(doctor, GOOD, "fusermount3", NULL, "is in PATH");
    else if (root)
        doctor_find(doctor, WARN, "fusermount3",
                    "apt install fuse3, if users other than root are to mount or unmount",
                    "is not in PATH; root does not need it");
    else
        doctor_find(doctor, STOP, "fusermount3", "apt install fuse3, or mount as root",
                    "is not in PATH, and only root mounts without it");
    if (root)
        return;
    FILE *conf = fopen("/etc/fuse.conf", "re");
    bool allowed = false;
    while (conf && fgets(line, sizeof(line), conf))
        allowed = allowed || strncmp(line, "user_allow_other", 16) == 0;
    if (conf)
        fclose(conf);
    if (!allowed)
        doctor_find(doctor, WARN, "allow_other", "put user_allow_other into /etc/fuse.conf",
                    "is refused to users other than root here");
}

static void check_kernel(struct doctor *doctor)
{
    struct utsname name;
    int major = 0, minor = 0;
    if (uname(&name) == 0 && sscanf(name.release, "%d.%d", &major, &minor) == 2 &&
        (major > 6 || (major == 6 && minor >= 9)))
        doctor_find(
            doctor, GOOD, "kernel", NULL, "%s, new enough for FUSE passthrough%s", name.release,
            P2PFS_HAVE_PASSTHROUGH ? "" : " (this p2pfs was built with a libfuse before 3.17)");
    else
        doctor_find(doctor, WARN, "kernel", "Linux 6.9 or later",
                    "%s, too old for FUSE passthrough: reads are slower and keep a second copy",
                    name.release);
    doctor_find(doctor, GOOD, "libfuse", NULL, "%s", fuse_pkgversion());
}

static void limit_print(rlim_t limit, char out[32])
{
    if (limit == RLIM_INFINITY)
        snprintf(out, 32, "unlimited");
    else
        snprintf(out, 32, "%llu", (unsigned long long)limit);
}

static void check_limits(struct doctor *doctor)
{
    struct rlimit files, locked;
    char soft[32], hard[32];
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        limit_print(files.rlim_cur, soft);
        limit_print(files.rlim_max, hard);
        bool low = files.rlim_max != RLIM_INFINITY && files.rlim_max < NOFILE_WANTED;
        doctor_find(
            doctor, low ? WARN : GOOD, "RLIMIT_NOFILE",
            low ? "raise the hard limit (LimitNOFILE=, docker --ulimit nofile): every replica "
                  "takes a descriptor"
                : NULL,
            "soft %s, hard %s; a mount raises its own to the hard one", soft, hard);
    }
    if (getrlimit(RLIMIT_MEMLOCK, &locked) == 0) {
        limit_print(locked.rlim_cur, soft);
        limit_print(locked.rlim_max, hard);
        doctor_find(doctor, GOOD, "RLIMIT_MEMLOCK", NULL, "soft %s, hard %s bytes", soft, hard);
    }
}

static void check_storage(struct doctor *doctor)
{
    struct storage *storage = NULL;
    util_autofree char *error = NULL;
    int rc = storage_open(TMPFS_TRY_SIZE, NULL, &storage, &error);
    if (rc < 0)
        doctor_find(doctor, STOP, "storage", "free memory, or give the mount a cache_dir=",
                    "replicas cannot be kept in memory: %s", error ? error : strerror(-rc));
    else if (strcmp(storage_kind(storage), "huge tmpfs") == 0)
        doctor_find(doctor, GOOD, "storage", NULL, "huge tmpfs");
    else
        doctor_find(doctor, WARN, "storage",
                    "mount as root (CAP_SYS_ADMIN) on a kernel with CONFIG_TRANSPARENT_HUGEPAGE",
                    "%s, slower than huge pages: %s", storage_kind(storage), storage_why(storage));
    if (rc == 0)
        storage_close(storage);
}

static void check_loop(struct doctor *doctor)
{
    struct loop *loop = NULL;
    int rc = loop_open(&loop);
    if (rc < 0)
        doctor_find(doctor, STOP, "event loop", "raise RLIMIT_NOFILE, or free memory", "%s",
                    strerror(-rc));
    else if (loop_is_uring(loop))
        doctor_find(doctor, GOOD, "event loop", NULL, "io_uring");
    else
        doctor_find(doctor, WARN, "event loop",
                    "sysctl kernel.io_uring_disabled=0, or a seccomp profile that allows io_uring",
                    "epoll, because io_uring is not to be had; it works, with more system calls");
    if (rc == 0)
        loop_close(loop);
}

static void check_network(struct doctor *doctor)
{
    char congestion[64], available[256];
    doctor_line("/proc/sys/net/ipv4/tcp_congestion_control", congestion, sizeof(congestion));
    doctor_line("/proc/sys/net/ipv4/tcp_available_congestion_control", available,
                sizeof(available));
    doctor_find(doctor, GOOD, "TCP", NULL,
                "congestion control %s of %s; tcp_congestion= chooses another",
                congestion[0] ? congestion : "unknown", available[0] ? available : "unknown");
}

static void check_rdma(struct doctor *doctor)
{
    size_t devices = doctor_devices(doctor, "/sys");
    if (!transport_by_name("rdma"))
        doctor_find(doctor, devices ? WARN : GOOD, "RDMA",
                    devices ? "build with libibverbs-dev" : NULL,
                    "%zu devices; this build has no libibverbs and uses TCP", devices);
    else if (devices && access("/dev/infiniband/rdma_cm", R_OK | W_OK) < 0)
        doctor_find(
            doctor, WARN, "RDMA", "modprobe rdma_ucm; give a container --device /dev/infiniband",
            "%zu devices; /dev/infiniband/rdma_cm: %s, so TCP is used", devices, strerror(errno));
    else if (devices)
        doctor_find(doctor, GOOD, "RDMA", NULL, "%zu devices", devices);
    else
        doctor_find(doctor, GOOD, "RDMA", NULL, "no device, TCP is used");

    struct rlimit locked;
    if (!devices || getrlimit(RLIMIT_MEMLOCK, &locked) < 0)
        return;
    bool unlimited = locked.rlim_cur == RLIM_INFINITY;
    doctor_find(
        doctor, unlimited ? GOOD : WARN, "RDMA memory",
        unlimited
            ? NULL
            : "ulimit -l unlimited, LimitMEMLOCK=infinity, or --ulimit memlock=-1 for a container",
        unlimited
            ? "no limit of locked memory"
            : "locked memory is limited (RLIMIT_MEMLOCK above), and RDMA locks what it moves");
}

/* In a child, because who asks a mount that does not answer may wait for ever. Opening asks the process itself, where
 * looking at attributes may be answered by the kernel. The exit status is an errno. */
static int probe(const char *point)
{
    char path[4200], byte;
    snprintf(path, sizeof(path), "%s/" CONTROL_DIR "/%s", point, control_names[CONTROL_STATUS]);
    util_autoclose int fd = open(path, O_RDONLY | O_CLOEXEC);
    return fd < 0 || read(fd, &byte, 1) < 0 ? errno : 0;
}

static int answers(const char *point)
{
    pid_t child = fork();
    if (child < 0)
        return EAGAIN;
    if (child == 0)
        _exit(probe(point) & 0xff);
    for (int waited = 0; waited < ANSWER_MS; waited += 20) {
        int status;
        if (waitpid(child, &status, WNOHANG) == child)
            return WIFEXITED(status) ? WEXITSTATUS(status) : EIO;
        poll(NULL, 0, 20);
    }
    kill(child, SIGKILL);
    waitpid(child, NULL, 0); /* waits for replies of FUSE end by SIGKILL */
    return ETIMEDOUT;
}

static void check_mounts(struct doctor *doctor)
{
    char **points = NULL;
    size_t count = 0;
    if (cmd_mounts(&points, &count) < 0)
        return;
    size_t bad = 0;
    for (size_t i = 0; i < count; i++) {
        char remedy[4400];
        int error = answers(points[i]);
        if (error == ENOTCONN) {
            snprintf(remedy, sizeof(remedy), "umount -l %s, then mount it again", points[i]);
            doctor_find(doctor, WARN, "mount", remedy, "%s: its p2pfs has ended", points[i]);
        } else if (error == ETIMEDOUT) {
            snprintf(remedy, sizeof(remedy),
                     "kill -CONT or kill -9 its p2pfs; then umount -l %s and mount it again",
                     points[i]);
            doctor_find(doctor, WARN, "mount", remedy, "%s does not answer for %d s", points[i],
                        ANSWER_MS / 1000);
        } else if (error != 0) {
            doctor_find(doctor, WARN, "mount", "look at it as the user who mounted it", "%s: %s",
                        points[i], strerror(error));
        }
        bad += error != 0;
        if (error == 0)
            doctor_peers(doctor, points[i]);
        free(points[i]);
    }
    free(points);
    doctor_find(doctor, GOOD, "mounts", NULL, "%zu here, %zu of them answer", count, count - bad);
}

static void (*const checks[])(struct doctor *doctor) = {
    check_fuse, check_mounting, check_kernel, check_limits, check_storage,
    check_loop, check_network,  check_rdma,   check_mounts,
};

static int run(int argc, char **argv)
{
    struct doctor doctor = {0};
    const struct cmd_option options[] = {{.name = "json", .flag = &doctor.as_json}, {.name = NULL}};
    int status = cmd_options(&cmd_doctor, &argc, &argv, options);
    if (status >= 0)
        return status;
    if (argc > 0)
        return cmd_usage(&cmd_doctor, "it takes no path");
    log_setup(LOG_ERROR, false);
    if (doctor.as_json) {
        json_object(&doctor.out, NULL);
        json_array(&doctor.out, "findings");
    } else {
        printf("p2pfs %s (%s)\n", P2PFS_VERSION, P2PFS_SUMMARY);
    }
    for (size_t i = 0; i < util_count(checks); i++) {
        checks[i](&doctor);
        fflush(stdout); /* a child must not print it again */
    }
    if (doctor.as_json) {
        size_t length;
        json_end(&doctor.out);
        json_put_bool(&doctor.out, "ok", !doctor.stops);
        json_end(&doctor.out);
        util_autofree char *text = json_take(&doctor.out, &length);
        fputs(text ? text : "", stdout);
    }
    if (doctor.stops)
        cmd_error("what is marked STOP has to be mended; the remedies stand above");
    return doctor.stops;
}

const struct cmd cmd_doctor = {
    .name = "doctor",
    .usage = "doctor [--json]",
    .summary = "check what a mount needs on this machine, and say how to mend what is missing",
    .details =
        "Looks at /dev/fuse, fusermount3, the kernel, libfuse, limits, huge pages, io_uring, TCP,\n"
        "RDMA devices with their ports, addresses and MTU, at p2pfs mounts that do not answer, and\n"
        "whether the other nodes of those that do accept connections from here. Exit status 1 when\n"
        "something would keep a mount from working, or a live node is reached in no way.\n"
        "\n"
        "  --json   one JSON object with all findings\n",
    .run = run,
};
