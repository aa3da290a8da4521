"""The metadata service is killed, stopped, cut off, slow, or comes back without its data."""
# ctest: timeout=700

import errno
import os
import subprocess
import threading
import time

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


def answers_at_once(node):
    """ls, stat and df, none of which may wait for the service."""
    began = time.monotonic()
    names = os.listdir(node.dir)
    for name in names:
        os.stat(node.path(name))
    os.statvfs(node.dir)
    took = time.monotonic() - began
    assert took < 0.3 * env.SLOWNESS, f"took {took:.2f} s"
    return names


def registering_fails(node, name):
    """With an error of the network, within the deadline of a change."""
    began = time.monotonic()
    with pytest.raises(OSError) as raised:
        with open(node.path(name), "wb") as out:
            out.write(b"never seen")
    assert raised.value.errno in NETWORK, raised.value
    assert time.monotonic() - began < 12 * env.SLOWNESS
    return raised.value


def populate(node, other):
    """Some of everything, known to both."""
    node.path("dir/sub").mkdir(parents=True)
    for i in range(5):
        node.path(f"dir/f{i}").write_bytes(data.pattern(100_000, i))
    node.path("big").write_bytes(data.pattern(8 << 20, 9))
    os.symlink("big", node.path("latest"))
    eventually(lambda: tree(other) == tree(node) and len(tree(node)) == 9, 3)


def served_as_before(a, b):
    """What b has is read, and what only a has is pulled: peers need no service for that."""
    assert sorted(answers_at_once(b)) == ["big", "dir", "latest"]
    for i in range(5):
        assert b.path(f"dir/f{i}").read_bytes() == data.pattern(100_000, i)
        assert a.path(f"dir/f{i}").read_bytes() == data.pattern(100_000, i)


def agree(*nodes, seconds=LEASE):
    eventually(lambda: all(map(online, nodes)), seconds, "all nodes online")
    eventually(lambda: all(tree(n) == tree(nodes[0]) for n in nodes), seconds, "nodes agree")


def works(a, b, name):
    a.path(name).write_bytes(b"registered after the outage")
    eventually(lambda: b.path(name).read_bytes() == b"registered after the outage", 3)


@pytest.mark.limit(100)
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_an_outage_costs_registrations_only(service, make_cluster, how):
    a, b = make_cluster(service.url()).nodes(2)
    populate(a, b)
    for i in range(5):  # b has these, and knows its peer
        b.path(f"dir/f{i}").read_bytes()
    before = tree(a)
    service.kill() if how == "killed" else service.pause()
    served_as_before(a, b)
    registering_fails(a, "during")
    served_as_before(a, b)
    eventually(lambda: not online(a) and not online(b), 10, "the outage is known")
    lines = [line for line in a.log.splitlines() if "error: metadata" in line]
    assert len(lines) == 1, lines  # once per outage
    answers_at_once(a)
    service.restart() if how == "killed" else service.resume()
    agree(a, b)
    assert tree(a) == before, "a registration that failed left something"
    works(b, a, "after")
    assert [line for line in a.log.splitlines() if "answers again" in line]


@pytest.mark.limit(100)
def test_a_running_pull_ends_while_the_service_is_stopped(service, make_cluster, tmp_path):
    cluster = make_cluster(service.url())
    port = free_port()
    road = Link(port)  # b reaches a over this one
    a = cluster.node(listen=f"127.0.0.1:{port}", advertise=f"127.0.0.1:{road.port}")
    b = cluster.node()
    source = data.write_file(tmp_path / "model", 40 << 20)
    a.path("model").write_bytes(source.read_bytes())
    eventually(b.path("model").exists, 2)
    road.delay = 0.01  # for each 64 KiB at most
    result = []
    reader = threading.Thread(target=lambda: result.append(data.digest(b.path("model"))))
    reader.start()
    eventually(lambda: b.status()["bytes_received"] > 2 << 20, 10, "the pull runs")
    service.pause()
    try:
        assert b.status()["bytes_received"] < 30 << 20
        reader.join(40 * env.SLOWNESS)
        assert result == [data.digest(source)]
        answers_at_once(b)
    finally:
        service.resume()
        road.close()
    agree(a, b)


@pytest.mark.limit(150)
def test_all_is_rebuilt_in_a_service_that_comes_back_empty(service, make_cluster):
    cluster = make_cluster(service.url())
    a, b = cluster.nodes(2)
    populate(a, b)
    b.path("dir/f1").read_bytes()
    before = tree(a)
    service.restart(empty=True)
    agree(a, b, seconds=2 * LEASE)
    eventually(lambda: tree(a) == before, LEASE, "all names are back")
    assert tree(b) == before
    c = cluster.node()
    assert tree(c) == before
    assert c.path("big").read_bytes() == data.pattern(8 << 20, 9)
    assert c.path("dir/f1").read_bytes() == data.pattern(100_000, 1)
    assert os.readlink(c.path("latest")) == "big"
    works(a, c, "after")
    os.unlink(b.path("dir/f1"))
    eventually(lambda: not a.path("dir/f1").exists() and not c.path("dir/f1").exists(), 2)


@pytest.mark.limit(150)
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
        eventually(lambda: tree(c) == before, LEASE, "all names are back in the service")
        works(a, b, "after")
    finally:
        service.kill()


@pytest.mark.limit(150)
def test_a_node_cut_off_longer_than_its_lease_comes_back_by_itself(service, make_cluster):
    link = Link(service.port)
    try:
        a = make_cluster(service.url(port=link.port)).node("cut")
        b = make_cluster(service.url()).node("other")
        a.path("x").write_bytes(data.pattern(1 << 20))
        b.path("y").write_bytes(data.pattern(1 << 20, 1))
        eventually(lambda: len(tree(b)) == 2 and len(tree(a)) == 2, 3)
        assert b.xattr("x", "replicas") == "1"
        link.cut()
        eventually(lambda: not any(p["live"] for p in b.peers()["peers"]), LEASE + 4, "a is gone")
        eventually(lambda: b.xattr("x", "replicas") == "0", 2, "x has no holder")
        assert sorted(answers_at_once(a)) == ["x", "y"]
        b.path("z").write_bytes(b"while a was away")
        assert not a.path("z").exists()
        link.heal()
        agree(a, b)
        eventually(lambda: b.xattr("x", "replicas") == "1", LEASE, "x is announced again")
        assert b.path("x").read_bytes() == data.pattern(1 << 20)
        assert a.path("z").read_bytes() == b"while a was away"
    finally:
        link.close()


@pytest.mark.limit(100)
def test_a_slow_service_delays_changes_only(service, make_cluster):
    link = Link(service.port)
    try:
        a = make_cluster(service.url(port=link.port)).node("slow")
        b = make_cluster(service.url()).node("fast")
        b.path("x").write_bytes(data.pattern(1 << 20))
        eventually(a.path("x").exists, 2)
        link.delay = 0.2
        assert a.path("x").read_bytes() == data.pattern(1 << 20)
        answers_at_once(a)
        a.path("late").write_bytes(b"late but whole")
        eventually(lambda: b.path("late").read_bytes() == b"late but whole", 5)
    finally:
        link.close()


@pytest.mark.limit(100)
def test_a_dead_node_is_gone_within_its_lease(service, make_cluster):
    a, b = make_cluster(service.url()).nodes(2)
    a.path("x").write_bytes(data.pattern(1 << 20))
    eventually(lambda: any(p["live"] for p in b.peers()["peers"]), 3)
    a.kill9()
    began = time.monotonic()
    eventually(lambda: not any(p["live"] for p in b.peers()["peers"]), LEASE + 3)
    assert time.monotonic() - began < LEASE + 3
    assert b.path("x").exists()
    eventually(lambda: b.xattr("x", "replicas") == "0", 2)


@pytest.mark.limit(150)
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

            eventually(registered, 20, f"registering without member {i}")
            eventually(b.path(f"after-{i}").exists, 15, f"seen without member {i}")
            assert {"big", "dir", "latest"} <= set(answers_at_once(b))
            member.restart()
        agree(a, b)
        for member in members[:2]:
            member.kill()
        registering_fails(a, "without-a-majority")
        assert "without-a-majority" not in answers_at_once(b)
        for member in members[:2]:
            member.start(wait=False)
        for member in members[:2]:
            member.wait_ready()
        agree(a, b, seconds=2 * LEASE)
        works(b, a, "after-all")
    finally:
        for member in members:
            member.kill()


@pytest.mark.limit(100)
def test_a_replica_that_is_promoted_takes_over(mounts, make_cluster, tmp_path):
    primary = KINDS["redis"](tmp_path / "primary").start()
    replica = KINDS["redis"](
        tmp_path / "replica", ["--replicaof", "127.0.0.1", str(primary.port)]
    ).start()
    address = Link(primary.port)  # as a name or an address that moves
    try:
        eventually(lambda: "master_link_status:up" in replica.ask("INFO", "replication"), 10)
        a, b = make_cluster(primary.url(port=address.port)).nodes(2)
        populate(a, b)
        before = tree(a)
        eventually(lambda: replica.ask("HLEN", "p2pfs:kv") == primary.ask("HLEN", "p2pfs:kv"), 5)
        primary.kill()
        address.target = replica.port
        eventually(lambda: not online(a), 10)
        registering_fails(a, "to-a-replica")
        assert replica.ask("REPLICAOF", "NO", "ONE").startswith("+OK")
        agree(a, b)
        assert tree(a) == before
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
    return access(getenv("TEST_CLOCK_JUMP"), F_OK) == 0 ? 3600 : 0;
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


@pytest.mark.limit(60)
def test_a_clock_that_jumps_by_an_hour_changes_nothing(service, make_cluster, tmp_path):
    if env.SANITIZE:
        pytest.skip("a preloaded library and a sanitizer do not go together")
    (tmp_path / "clock.c").write_text(CLOCK)
    shim = tmp_path / "clock.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", shim, tmp_path / "clock.c", "-ldl"], check=True
    )
    cluster = make_cluster(service.url())
    a, b = cluster.node(start=False), cluster.node()
    a.env |= {"LD_PRELOAD": str(shim), "TEST_CLOCK_JUMP": str(tmp_path / "jump")}
    a.start()
    populate(a, b)
    (tmp_path / "jump").touch()
    end = time.monotonic() + LEASE + 2
    while time.monotonic() < end:
        assert any(p["live"] for p in b.peers()["peers"])
        assert online(a) and online(b)
        assert b.xattr("big", "replicas") in ("1", "2")
        time.sleep(0.2)
    works(a, b, "during")
    (tmp_path / "jump").unlink()  # and back
    time.sleep(LEASE / 2)
    works(b, a, "after")
    assert "lease" not in a.log and "lease" not in b.log


@pytest.mark.limit(60)
def test_last_seconds_that_redis_lost_are_written_again(mounts, make_cluster, tmp_path):
    service = KINDS["redis"](tmp_path / "service", ["--appendonly", "no"]).start()
    try:
        cluster = make_cluster(service.url())
        a, b = cluster.nodes(2)
        populate(a, b)
        assert service.ask("SAVE").startswith("+OK")
        for i in range(5):
            a.path(f"later-{i}").write_bytes(b"not on the server's disk")
        eventually(lambda: tree(a) == tree(b), 2)
        before = tree(a)
        service.restart()
        agree(a, b)
        eventually(lambda: tree(a) == before and tree(b) == before, LEASE)
        c = cluster.node()
        eventually(lambda: tree(c) == before, LEASE, "all names are back in the service")
        assert c.path("later-3").read_bytes() == b"not on the server's disk"
        works(b, c, "after")
    finally:
        service.kill()
