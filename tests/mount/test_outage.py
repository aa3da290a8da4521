"""The metadata service is killed, stopped, cut off, slow, or comes back without its data."""
# ctest: timeout=400
# ctest: jobs=4

import errno
import os
import subprocess
import threading
import time
import urllib.error

import pytest

from harness import data, env
from harness.node import free_port
from harness.services import KINDS, Link, etcd_cluster
from harness.wait import eventually

LEASE = 10  # seconds
NETWORK = (
    errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.EPIPE,
    errno.EIO,
)  # fmt: skip


@pytest.fixture(params=list(KINDS))
def service(request, mounts, tmp_path):
    one = KINDS[request.param](tmp_path / "service").start()
    yield one
    one.kill()


def tree(node):
    """All names, with what ls -l shows of them."""
    found = {}
    for where, dirs, files in os.walk(node.dir):
        for name in dirs + files:
            path = os.path.join(where, name)
            info = os.lstat(path)
            found[os.path.relpath(path, node.dir)] = (info.st_mode, info.st_size)
    return found


def online(node):
    return node.status()["online"]


def answers(node):
    """ls, stat and df, none of which may wait for the service."""
    names = os.listdir(node.dir)
    for name in names:
        os.stat(node.path(name))
    os.statvfs(node.dir)
    return names


def answers_while_a_change_waits(node):
    """The change waits for the service until its deadline."""
    change = threading.Thread(target=registering_fails, args=(node, "waits"))
    change.start()
    time.sleep(0.2)
    for _ in range(20):
        answers(node)
    assert change.is_alive()
    change.join()


def registering_fails(node, name, errors=NETWORK):
    """With an error of the network."""
    with pytest.raises(OSError) as raised:
        with open(node.path(name), "wb") as out:
            out.write(b"never seen")
    assert raised.value.errno in errors, raised.value
    return raised.value


def populate(node, other):
    """Some of everything, known to both."""
    node.path("dir/sub").mkdir(parents=True)
    for i in range(5):
        node.path(f"dir/f{i}").write_bytes(data.pattern(100_000, i))
    node.path("big").write_bytes(data.pattern(8 << 20, 9))
    os.symlink("big", node.path("latest"))
    eventually(lambda: tree(other) == tree(node) and len(tree(node)) == 9)


def served_as_before(a, b):
    """What b has is read, and what only a has is pulled: peers need no service for that."""
    assert sorted(answers(b)) == ["big", "dir", "latest"]
    for i in range(5):
        assert b.path(f"dir/f{i}").read_bytes() == data.pattern(100_000, i)
        assert a.path(f"dir/f{i}").read_bytes() == data.pattern(100_000, i)


def agree(*nodes):
    eventually(lambda: all(map(online, nodes)), what="all nodes online")
    eventually(lambda: all(tree(n) == tree(nodes[0]) for n in nodes), what="nodes agree")


def works(a, b, name):
    a.path(name).write_bytes(b"registered after the outage")
    eventually(lambda: b.path(name).read_bytes() == b"registered after the outage")


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_an_outage_costs_registrations_only(service, make_cluster, how):
    a, b = make_cluster(service.url()).nodes(2)
    populate(a, b)
    for i in range(5):  # b has these, and knows its peer
        b.path(f"dir/f{i}").read_bytes()
    before = tree(a)
    if how == "killed":
        service.kill()
    else:
        service.pause()
        answers_while_a_change_waits(a)
    served_as_before(a, b)
    registering_fails(a, "during")
    served_as_before(a, b)
    eventually(lambda: not online(a) and not online(b), what="the outage is known")
    lines = [line for line in a.log.splitlines() if "error: metadata" in line]
    assert len(lines) == 1, lines  # once per outage
    answers(a)
    service.restart() if how == "killed" else service.resume()
    agree(a, b)
    eventually(lambda: tree(a) == before, what="nothing is left of a registration that failed")
    works(b, a, "after")
    assert [line for line in a.log.splitlines() if "answers again" in line]


def test_a_running_pull_ends_while_the_service_is_stopped(service, make_cluster, tmp_path):
    cluster = make_cluster(service.url())
    port = free_port()
    road = Link(port)  # b reaches a over this one
    a = cluster.node(listen=f"127.0.0.1:{port}", advertise=f"127.0.0.1:{road.port}")
    b = cluster.node()
    source = data.write_file(tmp_path / "model", 40 << 20)
    a.path("model").write_bytes(source.read_bytes())
    eventually(b.path("model").exists)
    road.delay = 0.01  # for each 64 KiB at most
    result = []
    reader = threading.Thread(target=lambda: result.append(data.digest(b.path("model"))))
    reader.start()
    eventually(lambda: b.status()["bytes_received"] > 2 << 20, what="the pull runs")
    service.pause()
    try:
        assert b.status()["bytes_received"] < 30 << 20
        reader.join(40 * env.SLOWNESS)
        assert result == [data.digest(source)]
        answers(b)
    finally:
        service.resume()
        road.close()
    agree(a, b)


def test_all_is_rebuilt_in_a_service_that_comes_back_empty(service, make_cluster):
    cluster = make_cluster(service.url())
    a, b = cluster.nodes(2)
    populate(a, b)
    b.path("dir/f1").read_bytes()
    before = tree(a)
    service.restart(empty=True)
    agree(a, b)
    eventually(lambda: tree(a) == before and tree(b) == before, what="all names are back")
    c = cluster.node()
    eventually(lambda: tree(c) == before, what="all names are back in the service")
    for name in ("big", "dir/f1"):
        eventually(lambda: int(c.xattr(name, "replicas")) > 0, what=f"somebody holds {name} again")
    assert c.path("big").read_bytes() == data.pattern(8 << 20, 9)
    assert c.path("dir/f1").read_bytes() == data.pattern(100_000, 1)
    assert os.readlink(c.path("latest")) == "big"
    works(a, c, "after")
    os.unlink(b.path("dir/f1"))
    eventually(lambda: not a.path("dir/f1").exists() and not c.path("dir/f1").exists())


def test_a_flush_of_redis_is_an_outage_too(mounts, make_cluster, tmp_path):
    service = KINDS["redis"](tmp_path / "service").start()
    try:
        cluster = make_cluster(service.url())
        a, b = cluster.nodes(2)
        populate(a, b)
        before = tree(a)
        assert service.ask("FLUSHALL").startswith("+OK")
        time.sleep(3)
        agree(a, b)
        c = cluster.node()
        eventually(lambda: tree(c) == before, what="all names are back in the service")
        works(a, b, "after")
    finally:
        service.kill()


@pytest.fixture(params=list(KINDS))
def far_service(request, network, tmp_path):
    """A service that each node reaches over a link of its own."""
    one = KINDS[request.param](tmp_path / "service")
    one.host = network.service
    yield one.start()
    one.kill()


def live_peers(node):
    return {p["node"] for p in node.peers()["peers"] if p["live"]}


def test_a_node_cut_off_longer_than_its_lease_comes_back_by_itself(
    network, far_service, make_cluster
):
    cluster = make_cluster(far_service.url())
    a, b, c = (
        cluster.node_on(network, name, read_timeout=20) for name in ("cut", "other", "dead")
    )
    address = a.host
    for seed, node in enumerate((a, b, c)):
        node.path(f"of-{node.name}").write_bytes(data.pattern(1 << 20, seed))
    names = ["of-cut", "of-dead", "of-other"]
    eventually(lambda: all(sorted(os.listdir(n.dir)) == names for n in (a, b, c)))
    eventually(lambda: live_peers(b) == {"cut", "dead"})
    eventually(lambda: b.xattr("of-cut", "replicas") == "1")
    assert a.path("of-other").read_bytes() == data.pattern(1 << 20, 1)
    assert b.path("of-cut").read_bytes() == data.pattern(1 << 20, 0)
    eventually(lambda: b.cli("evict", "of-cut", check=False).returncode == 0)  # once the kernel has told of the close
    network.cut(address)
    c.kill9()
    began = time.monotonic()
    b.cli("pull", "of-cut")  # peers need no service for each other
    assert b.path("of-cut").read_bytes() == data.pattern(1 << 20, 0)
    registering_fails(a, "during")
    eventually(lambda: not live_peers(b), what="the cut and the dead one are gone")
    assert time.monotonic() - began > LEASE / 3, "it was gone before its lease ended"
    eventually(lambda: b.xattr("of-dead", "replicas") == "0", what="it has no holder")
    eventually(lambda: b.xattr("of-cut", "replicas") == "1", what="only b holds it")
    assert sorted(answers(a)) == names
    b.path("new").write_bytes(b"while a was away")
    assert not a.path("new").exists()
    network.heal(address)
    agree(a, b)  # as soon as TCP tries again
    eventually(lambda: b.xattr("of-cut", "replicas") == "2", what="it is announced again")
    eventually(lambda: live_peers(b) == {"cut"})
    assert a.path("new").read_bytes() == b"while a was away"
    assert sorted(os.listdir(b.dir)) == ["new", *names]


def test_a_slow_service_delays_changes_only(service, make_cluster):
    link = Link(service.port)
    try:
        a = make_cluster(service.url(port=link.port)).node("slow")
        b = make_cluster(service.url()).node("fast")
        b.path("x").write_bytes(data.pattern(1 << 20))
        eventually(a.path("x").exists)
        link.delay = 0.2
        assert a.path("x").read_bytes() == data.pattern(1 << 20)
        answers(a)
        a.path("late").write_bytes(b"late but whole")
        eventually(lambda: b.path("late").read_bytes() == b"late but whole")
    finally:
        link.close()


def test_changes_that_etcd_has_compacted_are_not_missed(mounts, make_cluster, tmp_path):
    service = KINDS["etcd"](tmp_path / "service").start()
    link = Link(service.port)
    key = {"key": "YQ=="}
    try:
        a = make_cluster(service.url(port=link.port)).node("away")
        b = make_cluster(service.url()).node("here")
        populate(b, a)
        link.cut(for_good=True)
        known = int(service.ask("kv/range", key)["header"]["revision"])
        b.path("more").write_bytes(b"x")
        b.path("dir").rename(b.path("moved"))
        b.path("latest").unlink()
        now = service.ask("kv/range", key)["header"]["revision"]
        service.ask("kv/compaction", {"revision": now, "physical": True})
        with pytest.raises(urllib.error.HTTPError) as raised:
            service.ask("kv/range", key | {"revision": str(known)})
        assert b"compacted" in raised.value.read()
        link.heal()
        agree(a, b)
        assert set(answers(a)) == {"big", "moved", "more"}
        works(a, b, "after")
    finally:
        link.close()
        service.kill()


def test_members_of_an_etcd_cluster_die_in_turn(mounts, make_cluster, tmp_path):
    members, url = etcd_cluster(tmp_path / "etcd", 3)
    try:
        a, b = make_cluster(url).nodes(2)
        populate(a, b)
        for i, member in enumerate(members):
            member.kill()

            def registered(i=i):  # a change that was on its way may have failed with the member
                a.path(f"after-{i}").write_bytes(b"x")
                return True

            eventually(registered, what=f"registering without member {i}")
            eventually(b.path(f"after-{i}").exists, what=f"seen without member {i}")
            assert {"big", "dir", "latest"} <= set(answers(b))
            member.restart()
        agree(a, b)
        for member in members[:2]:
            member.kill()
        registering_fails(a, "without-a-majority")
        assert "without-a-majority" not in answers(b)
        for member in members[:2]:
            member.start(wait=False)
        for member in members[:2]:
            member.wait_ready()
        agree(a, b)
        works(b, a, "after-all")
    finally:
        for member in members:
            member.kill()


def test_a_replica_that_is_promoted_takes_over(mounts, make_cluster, tmp_path):
    primary = KINDS["redis"](tmp_path / "primary").start()
    replica = KINDS["redis"](
        tmp_path / "replica", ["--replicaof", "127.0.0.1", str(primary.port)]
    ).start()
    address = Link(primary.port)  # as a name or an address that moves
    try:
        eventually(lambda: "master_link_status:up" in replica.ask("INFO", "replication"))
        both = f"{primary.port},127.0.0.1:{replica.port}"
        a = make_cluster(primary.url(port=both)).node("knows-both")
        b = make_cluster(primary.url(port=address.port)).node("knows-one")
        populate(a, b)
        before = tree(a)
        eventually(lambda: replica.ask("HLEN", "p2pfs:kv") == primary.ask("HLEN", "p2pfs:kv"))
        primary.kill()
        address.target = replica.port
        eventually(lambda: not online(a) and not online(b))
        for node in (a, b):  # the replica may have been reached by then
            registering_fails(node, "to-a-replica", (errno.EROFS, *NETWORK))
        assert replica.ask("REPLICAOF", "NO", "ONE").startswith("+OK")
        agree(a, b)
        eventually(lambda: tree(a) == before)
        works(a, b, "after")
    finally:
        address.close()
        primary.kill()
        replica.kill()


CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long ahead(void)
{
    return access(getenv("TEST_CLOCK_JUMP"), F_OK) == 0 ? atol(getenv("TEST_CLOCK_BY")) : 0;
}
int clock_gettime(clockid_t id, struct timespec *out)
{
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int rc = real(id, out);
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)
        out->tv_sec += ahead();
    return rc;
}
int gettimeofday(struct timeval *out, void *zone)
{
    int (*real)(struct timeval *, void *) = dlsym(RTLD_NEXT, "gettimeofday");
    int rc = real(out, zone);
    out->tv_sec += ahead();
    return rc;
}
time_t time(time_t *out)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out)
        *out = now.tv_sec;
    return now.tv_sec;
}
"""


def test_a_clock_that_jumps_by_an_hour_changes_nothing(service, make_cluster, tmp_path):
    if env.SANITIZE:
        pytest.skip("a preloaded library and a sanitizer do not go together")
    (tmp_path / "clock.c").write_text(CLOCK)
    shim = tmp_path / "clock.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", shim, tmp_path / "clock.c", "-ldl"], check=True
    )
    cluster = make_cluster(service.url())
    a, b, c = cluster.node(start=False), cluster.node(), cluster.node(start=False)
    for node, by in ((a, 3600), (c, -3600)):
        node.env |= {
            "LD_PRELOAD": str(shim),
            "TEST_CLOCK_JUMP": str(tmp_path / "jump"),
            "TEST_CLOCK_BY": str(by),
        }
        node.start()
    populate(a, b)
    eventually(lambda: len(live_peers(b)) == 2)
    (tmp_path / "jump").touch()
    end = time.monotonic() + LEASE + 2
    while time.monotonic() < end:
        assert len(live_peers(b)) == 2
        assert all(map(online, (a, b, c)))
        time.sleep(0.2)
    eventually(lambda: b.xattr("big", "replicas") == "1")
    works(a, b, "ahead")
    works(c, a, "behind")
    (tmp_path / "jump").unlink()  # and back
    works(b, a, "after")
    works(a, c, "after-too")
    assert not any("lease" in node.log for node in (a, b, c))


def test_last_seconds_that_redis_lost_are_written_again(mounts, make_cluster, tmp_path):
    service = KINDS["redis"](tmp_path / "service", ["--appendonly", "no"]).start()
    try:
        cluster = make_cluster(service.url())
        a, b = cluster.nodes(2)
        populate(a, b)
        assert service.ask("SAVE").startswith("+OK")
        for i in range(5):
            a.path(f"later-{i}").write_bytes(b"not on the server's disk")
        eventually(lambda: tree(a) == tree(b))
        before = tree(a)
        service.restart()
        agree(a, b)
        eventually(lambda: tree(a) == before and tree(b) == before)
        c = cluster.node()
        eventually(lambda: tree(c) == before, what="all names are back in the service")
        assert c.path("later-3").read_bytes() == b"not on the server's disk"
        works(b, c, "after")
    finally:
        service.kill()
