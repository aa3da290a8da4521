"""Every node on a host of its own: a network namespace with a soft-RoCE device, on one switch."""

import os
import subprocess
import time
from itertools import count
from pathlib import Path

import pytest
from test_rdma_mount import MIB, SIZE, Reading, arriving, register, seen

from harness.wait import SLOWNESS, eventually

pytestmark = [
    pytest.mark.limit(150),
    pytest.mark.skipif(
        "rxe_ns_pernet_sk4" not in Path("/proc/kallsyms").read_text(encoding="ascii"),
        reason="this kernel's soft-RoCE receives in the first network namespace only",
    ),
]

_numbers = count(1)


def run(*words, on=None):
    subprocess.run([*(on.before if on else ()), *words], check=True)


@pytest.fixture
def hosts(cluster, network):
    """Makes so many nodes. Their TCP goes over the switch too, or beside it, where it outlives the switch."""
    nodes = []

    def make(number, beside=False, **options):
        run("ip", "link", "add", "name", "switch", "type", "bridge")
        run("ip", "link", "set", "switch", "up")
        for i in range(1, number + 1):
            device, address = f"host{next(_numbers)}", f"10.78.0.{i}"
            ways = {"device": device} if beside else {"listen": f"{address}:7700"}
            node = cluster.node_on(network, start=False, **{**options, **ways})
            node.device, node.port = device, f"port{i}"
            namespace = node.before[1].split("=")[1]
            run("ip", "link", "add", node.port, "type", "veth", "peer", "name", "wire", "netns", namespace)
            run("ip", "link", "set", node.port, "master", "switch", "up")
            run("ip", "addr", "add", f"{address}/24", "dev", "wire", on=node)
            run("ip", "link", "set", "wire", "up", on=node)
            device_add(node)
            nodes.append(node)
            node.start()
        return nodes

    yield make
    for node in nodes:
        node.kill9()
    for node in nodes:  # with its namespace it would go some time later
        device_delete(node)


def device_add(node):
    run("rdma", "link", "add", node.device, "type", "rxe", "netdev", "wire", on=node)


def device_delete(node):
    run("rdma", "link", "del", node.device, on=node)


def test_four_hosts_pull_at_once(hosts):
    nodes = hosts(4)
    data = register(nodes[0], "f", size=3 * SIZE)
    readings = [Reading(seen(node, "f")) for node in nodes[1:]]
    for reading in readings:
        assert reading.result() == data
    for node in nodes[1:]:
        status = node.status()
        assert status["bytes_rdma"] == status["bytes_received"] >= 3 * SIZE
        assert {adapter["device"] for adapter in status["adapters"]} == {node.device}


def reading_begun(first, second):
    """The file and its reading, of which some seconds are left."""
    data = register(first, "f", size=4 * SIZE)
    reading = Reading(seen(second, "f"))
    arriving(second, 0)
    return data, reading


def bytes_tcp(node):
    status = node.status()
    return status["bytes_received"] - status["bytes_rdma"]


def rdma_again(first, second):
    """Pulls until one comes by RDMA."""
    end = time.monotonic() + 60 * SLOWNESS
    for i in count(1):
        data = register(first, f"again{i}", seed=i, size=2 * MIB)
        before = second.status()["bytes_rdma"]
        assert seen(second, f"again{i}").read_bytes() == data
        if second.status()["bytes_rdma"] > before:
            return
        assert time.monotonic() < end, "RDMA did not come back"
        time.sleep(0.5)


def test_a_link_that_goes_down_leaves_the_pull_to_tcp_until_it_is_up_again(hosts):
    """The carrier is lost, as when the wire is pulled. `ip link set wire down` under a connection is another matter:
    soft-RoCE then makes no connection any more, by rping neither, until its device is deleted and added."""
    first, second = hosts(2, beside=True, max_download="4M")
    data, reading = reading_begun(first, second)
    run("ip", "link", "set", first.port, "down")
    second.cli("limit", "--download=0", "")
    assert reading.result() == data
    assert bytes_tcp(second) > 0
    run("ip", "link", "set", first.port, "up")
    rdma_again(first, second)
    assert second.log.count("TCP is used") == 1
    eventually(lambda: "RDMA works again" in second.log)


def removed_and_held(node):
    """Device files that are gone, and still open."""
    files = [os.readlink(fd) for fd in Path(f"/proc/{node.process.pid}/fd").iterdir()]
    return [file for file in files if "uverbs" in file and "deleted" in file]


@pytest.mark.parametrize("lost", [0, 1], ids=["source", "reader"])
def test_a_device_that_is_removed_and_returns_is_used_again(hosts, lost):
    first, second = nodes = hosts(2, beside=True, max_download="4M")
    data, reading = reading_begun(first, second)
    device_delete(nodes[lost])
    second.cli("limit", "--download=0", "")
    assert reading.result() == data
    assert bytes_tcp(second) > 0
    device_add(nodes[lost])
    rdma_again(first, second)
    eventually(lambda: not removed_and_held(nodes[lost]), 60, "the old device is let go of")
    assert [adapter["device"] for adapter in second.status()["adapters"]] == [second.device]
