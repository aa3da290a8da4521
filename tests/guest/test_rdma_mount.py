"""Mounts that pull over RDMA, each node on a device of its own."""

import json
import subprocess
import threading

import pytest

from harness.data import pattern
from harness.guest import HOSTS
from harness.node import MountFailed
from harness.wait import eventually

MIB = 1 << 20
SIZE = 6 * MIB + 345

pytestmark = pytest.mark.limit(150)


def node_on(cluster, host, name, port, **options):
    return cluster.node(name, listen=f"{HOSTS[host].ipv4}:{port}", **options)


@pytest.fixture
def pair(cluster):
    """A node on each device, and on the second one the file that the first registered."""
    first = node_on(cluster, 0, "first", 7001)
    second = node_on(cluster, 1, "second", 7002)
    return first, second


def register(node, name, seed=1, size=SIZE):
    data = pattern(size, seed)
    node.path(name).write_bytes(data)
    return data


def seen(node, name):
    eventually(node.path(name).exists, 5, f"{name} on {node.name}")
    return node.path(name)


class Reading(threading.Thread):
    """Reads a file to its end beside the test."""

    def __init__(self, path):
        super().__init__(daemon=True)
        self.path, self.data, self.error = path, None, None
        self.start()

    def run(self):
        try:
            self.data = self.path.read_bytes()
        except OSError as error:
            self.error = error

    def result(self):
        self.join(60)
        assert not self.is_alive(), "the read does not end"
        assert self.error is None, self.error
        return self.data


def arriving(node, bytes_before):
    """Waits until shards come in."""
    eventually(lambda: node.status()["bytes_received"] > bytes_before, 20, "the first shard")


def test_a_file_comes_by_rdma(pair):
    first, second = pair
    data = register(first, "f")
    assert seen(second, "f").read_bytes() == data
    status = second.status()
    assert status["transports"] == ["rdma", "tcp"]
    assert status["bytes_rdma"] == SIZE
    assert status["rdma_failures"] == 0
    assert second.xattr("f", "transport") == "rdma"
    assert [peer["transport"] for peer in second.peers()["peers"]] == ["rdma"]
    why = json.loads(second.cli("why", "--json", "f").stdout)
    assert {shard["transport"] for shard in why["each"]} == {"rdma"}
    assert second.metrics()["p2pfs_received_rdma_bytes_total"] == SIZE
    assert first.status()["bytes_served"] == SIZE


def test_a_file_registered_in_place_comes_by_rdma(pair, tmp_path):
    first, second = pair
    data = pattern(SIZE, 2)
    (tmp_path / "local").write_bytes(data)
    first.path("f").symlink_to(tmp_path / "local")
    assert seen(second, "f").read_bytes() == data
    assert second.status()["bytes_rdma"] == SIZE


def test_a_node_without_rdma_is_served_by_tcp(cluster):
    first = node_on(cluster, 0, "first", 7001)
    second = node_on(cluster, 1, "second", 7002, transport="tcp")
    data = register(first, "f")
    assert seen(second, "f").read_bytes() == data
    status = second.status()
    assert (status["transports"], status["bytes_rdma"]) == (["tcp"], 0)
    back = register(second, "g", seed=3)
    assert seen(first, "g").read_bytes() == back
    assert first.status()["bytes_rdma"] == 0
    assert first.xattr("g", "transport") == "tcp"


def test_require_rdma_takes_no_byte_by_tcp(cluster):
    first = node_on(cluster, 0, "first", 7001, transport="tcp")
    second = node_on(cluster, 1, "second", 7002, require_rdma=True, read_timeout=2)
    register(first, "f", size=MIB)
    with pytest.raises(OSError):
        seen(second, "f").read_bytes()
    assert second.status()["bytes_received"] == 0
    with pytest.raises(MountFailed, match="require_rdma: "):
        cluster.node("third", require_rdma=True)  # listens on loopback


def test_the_source_is_killed_while_others_read(cluster):
    sources = [node_on(cluster, 0, f"source{i}", 7001 + i) for i in range(2)]
    reader = node_on(cluster, 1, "reader", 7009)
    data = register(sources[0], "f", size=3 * SIZE)
    assert seen(sources[1], "f").read_bytes() == data
    reading = Reading(seen(reader, "f"))
    arriving(reader, 0)
    sources[0].kill9()
    assert reading.result() == data
    assert reader.status()["bytes_rdma"] == 3 * SIZE


def test_what_is_evicted_while_others_read_comes_from_elsewhere(cluster):
    sources = [node_on(cluster, 0, f"source{i}", 7001 + i) for i in range(2)]
    reader = node_on(cluster, 1, "reader", 7009)
    data = register(sources[0], "f", size=3 * SIZE)
    assert seen(sources[1], "f").read_bytes() == data
    reading = Reading(seen(reader, "f"))
    arriving(reader, 0)
    sources[1].cli("evict", "f")
    assert reading.result() == data
    assert sources[1].status()["replicas"] == 0


def test_a_device_that_goes_moves_the_pull_to_tcp(pair):
    first, second = pair
    device, netdev = HOSTS[1].device, HOSTS[1].netdev
    data = register(first, "f", size=8 * SIZE)
    reading = Reading(seen(second, "f"))
    arriving(second, 0)
    # soft-RoCE lets go of a device only when every process that has it open has ended
    with subprocess.Popen(["rdma", "link", "del", device]) as deletion:
        try:
            assert reading.result() == data
            status = second.status()
            assert 0 < status["bytes_rdma"] < 8 * SIZE
            assert status["rdma_failures"] > 0
            assert second.metrics()["p2pfs_rdma_failures_total"] == status["rdma_failures"]
            assert second.xattr("f", "transport") == "tcp"
            assert second.log.count("TCP is used") == 1
        finally:
            first.kill9()
            second.kill9()
            deletion.wait(30)
            subprocess.run(["rdma", "link", "add", device, "type", "rxe", "netdev", netdev], check=True)
