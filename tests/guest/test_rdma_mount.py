"""Mounts that pull over RDMA, each node on a device of its own."""

import json
import re
import subprocess
import threading
from pathlib import Path

import pytest

from harness.data import pattern
from harness.env import SLOWNESS
from harness.guest import HOSTS, SECOND
from harness.node import MountFailed
from harness.wait import eventually

MIB = 1 << 20
SIZE = 6 * MIB + 345


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
    eventually(node.path(name).exists, what=f"{name} on {node.name}")
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
        self.join(60 * SLOWNESS)
        assert not self.is_alive(), "the read does not end"
        assert self.error is None, self.error
        return self.data


def arriving(node, bytes_before):
    """Waits until shards come in."""
    eventually(lambda: node.status()["bytes_received"] > bytes_before, what="the first shard")


def mappings_cut(node):
    """Where registered memory was cut out of a mapping, for the sake of forks: huge pages would be cut as well, and this
    kernel sees to forks by itself."""
    mappings = re.split("^(?=[0-9a-f]+-)", Path(f"/proc/{node.pid}/smaps").read_text(), flags=re.MULTILINE)
    return [text for text in mappings if " rw-p " in text and " dc" in text.split("VmFlags:")[1]]


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
    assert not mappings_cut(first) + mappings_cut(second)


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
            deletion.wait(30 * SLOWNESS)
            subprocess.run(["rdma", "link", "add", device, "type", "rxe", "netdev", netdev], check=True)


# -- Several adapters

BOTH = [f"{HOSTS[end].device},{SECOND[end].device}" for end in range(2)]


@pytest.fixture
def twin(cluster):
    """The pair again, each with two adapters."""
    first = node_on(cluster, 0, "first", 7001, device=BOTH[0])
    second = node_on(cluster, 1, "second", 7002, device=BOTH[1])
    return first, second


def adapters(node):
    return {adapter["device"]: adapter for adapter in node.status()["adapters"]}


def by_adapter(node):
    """Bytes that came by the first and the second one."""
    found = adapters(node)
    return [found.get(end[1].device, {"bytes_received": 0})["bytes_received"] for end in (HOSTS, SECOND)]


def warm(first, second):
    """Until both adapters carry shards: the second one joins while the first is at work."""
    count = 0

    def both():
        nonlocal count
        count += 1
        data = register(first, f"warm{count}", seed=count, size=MIB)
        assert seen(second, f"warm{count}").read_bytes() == data
        return min(by_adapter(second)) > 0

    eventually(both, what="both adapters carry shards")


def test_every_shard_is_striped_over_two_adapters(twin):
    first, second = twin
    warm(first, second)
    data = register(first, "f", size=4 * MIB)
    before = by_adapter(second)
    assert seen(second, "f").read_bytes() == data
    assert first.status()["rdma_address"] == f"{HOSTS[0].ipv4}:7001,{SECOND[0].ipv4}:7001"
    both = by_adapter(second)
    assert sum(both) == second.status()["bytes_rdma"]
    assert min(after - before for before, after in zip(before, both)) > MIB // 4
    metrics = second.metrics()
    for device, adapter in adapters(second).items():
        label = f'{{device="{device}"}}'
        assert metrics["p2pfs_rdma_device_received_bytes_total" + label] == adapter["bytes_received"]
        assert metrics["p2pfs_rdma_device_failures_total" + label] == 0
        assert metrics["p2pfs_rdma_device_connections" + label] > 0


def test_a_device_that_is_deleted_leaves_the_pull_to_the_other(twin):
    first, second = twin
    gone = SECOND[1]
    warm(first, second)
    before = second.status()["bytes_received"]
    data = register(first, "f", size=4 * SIZE)
    reading = Reading(seen(second, "f"))
    arriving(second, before)
    with subprocess.Popen(["rdma", "link", "del", gone.device]) as deletion:
        try:
            assert reading.result() == data
            status = second.status()
            assert status["bytes_rdma"] == status["bytes_received"]
        finally:
            first.kill9()
            second.kill9()
            deletion.wait(30 * SLOWNESS)
            again = ["rdma", "link", "add", gone.device, "type", "rxe", "netdev", gone.netdev]
            subprocess.run(again, check=True)


def test_an_adapter_that_stands_by_reads_nothing_while_the_other_works(cluster):
    matrix = json.dumps({"cpu:0": [[HOSTS[1].device], [SECOND[1].device]]})
    first = node_on(cluster, 0, "first", 7001, device=BOTH[0])
    second = node_on(cluster, 1, "second", 7002, nic_priority_matrix=matrix)
    data = register(first, "f", size=2 * MIB)
    assert seen(second, "f").read_bytes() == data
    assert by_adapter(second) == [2 * MIB, 0]


def test_four_nodes_pull_at_once(cluster):
    nodes = [
        cluster.node(f"node{i}", listen=f"{(HOSTS, SECOND)[i // 2][i % 2].ipv4}:{7001 + i}", device=BOTH[i % 2])
        for i in range(4)
    ]
    data = register(nodes[0], "f", size=2 * MIB)
    readings = [Reading(seen(node, "f")) for node in nodes[1:]]
    for reading in readings:
        assert reading.result() == data
    assert sum(node.status()["bytes_received"] for node in nodes[1:]) >= 6 * MIB


def test_the_limit_of_uploads_holds_up_grants(cluster):
    first = node_on(cluster, 0, "first", 7001, max_upload="64K")
    second = node_on(cluster, 1, "second", 7002)
    data = register(first, "f")
    reading = Reading(seen(second, "f"))
    arriving(second, 0)
    reading.join(3)  # at that rate it would take a minute and a half
    assert reading.is_alive()
    assert second.status()["bytes_received"] < SIZE
    first.cli("limit", "--upload=0", "")
    assert reading.result() == data
    assert second.status()["bytes_rdma"] == SIZE


def test_a_device_that_is_not_there_is_named(cluster):
    with pytest.raises(MountFailed, match="mlx5_9: this machine has no such RDMA device; it has rxe0"):
        node_on(cluster, 0, "first", 7001, device="mlx5_9", transport="rdma")
    with pytest.raises(MountFailed, match="gid_index=200: rxe0 port 1 has no address there"):
        node_on(cluster, 0, "second", 7002, device="rxe0", gid_index=200, require_rdma=True)
