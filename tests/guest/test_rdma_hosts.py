"""Every node on a host of its own: a network namespace with a soft-RoCE device, on one switch."""

import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest
from test_rdma_mount import MIB, SIZE, Reading, arriving, register, seen

from harness.wait import SLOWNESS, eventually

pytestmark = pytest.mark.skipif(
    "rxe_ns_pernet_sk4" not in Path("/proc/kallsyms").read_text(encoding="ascii"),
    reason="this kernel's soft-RoCE receives in the first network namespace only",
)

_numbers = count(1)


def run(*words, on=None):
    subprocess.run([*(on.before if on else ()), *words], check=True)


def wired(node, number):
    """Its wire to the switch."""
    node.port, node.wire = f"port{number}", "wire"
    namespace = node.before[1].split("=")[1]
    run("ip", "link", "add", node.port, "type", "veth", "peer", "name", "wire", "netns", namespace)
    run("ip", "link", "set", node.port, "master", "switch", "up")
    run("ip", "addr", "add", f"10.78.0.{number}/24", "dev", "wire", on=node)
    run("ip", "link", "set", "wire", "up", on=node)


@pytest.fixture
def hosts(cluster, network):
    """Makes so many nodes. Their TCP goes over the switch too, or beside it, where it outlives the switch; or all that
    there is is a router between them."""
    nodes = []

    def make(number, beside=False, routed=False, **options):
        if not routed:
            run("ip", "link", "add", "name", "switch", "type", "bridge")
            run("ip", "link", "set", "switch", "up")
        for i in range(1, number + 1):
            device = f"host{next(_numbers)}"
            ways = {} if routed else {"device": device} if beside else {"listen": f"10.78.0.{i}:7700"}
            node = cluster.node_on(network, start=False, **{**options, **ways})
            node.device, node.wire = device, "eth0"
            if not routed:
                wired(node, i)
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
    run("rdma", "link", "add", node.device, "type", "rxe", "netdev", node.wire, on=node)


def device_delete(node):
    run("rdma", "link", "del", node.device, on=node)


def test_four_hosts_pull_at_once(hosts):
    nodes = hosts(4)
    data = register(nodes[0], "f")
    readings = [Reading(seen(node, "f")) for node in nodes[1:]]
    for reading in readings:
        assert reading.result() == data
    for node in nodes[1:]:
        status = node.status()
        assert status["bytes_rdma"] == status["bytes_received"] >= SIZE
        assert {adapter["device"] for adapter in status["adapters"]} == {node.device}


def test_hosts_behind_a_router_meet_at_once(hosts):
    """The kernel ends what begins to connect when it learns the hardware address of an equal interface of another host."""
    nodes = hosts(3, routed=True)
    data = register(nodes[0], "f", size=MIB)
    for node in nodes[1:]:
        assert seen(node, "f").read_bytes() == data
        status = node.status()
        assert status["bytes_rdma"] == status["bytes_received"] >= MIB
        assert status["rdma_failures"] == 0


def bytes_tcp(node):
    status = node.status()
    return status["bytes_received"] - status["bytes_rdma"]


def rdma_again(first, second):
    """Pulls until one comes by RDMA."""
    end = time.monotonic() + 60 * SLOWNESS
    for i in count(1):
        name = f"again-{second.name}-{i}"
        data = register(first, name, seed=i, size=2 * MIB)
        before = second.status()["bytes_rdma"]
        assert seen(second, name).read_bytes() == data
        if second.status()["bytes_rdma"] > before:
            return
        assert time.monotonic() < end, "RDMA did not come back"
        time.sleep(0.5)


def removed_and_held(node):
    """Device files that are gone, and still open."""
    files = [os.readlink(fd) for fd in Path(f"/proc/{node.process.pid}/fd").iterdir()]
    return [file for file in files if "uverbs" in file and "deleted" in file]


def carrier(node, state):
    """As when the wire is pulled. `ip link set wire down` under a connection is another matter: soft-RoCE then makes no
    connection any more, by rping neither, until its device is deleted and added."""
    run("ip", "link", "set", node.port, state)


def lost_and_found(first, second, lose, find):
    data = register(first, f"f-{second.name}", size=4 * SIZE)
    reading = Reading(seen(second, f"f-{second.name}"))
    arriving(second, 0)
    lose()
    second.cli("limit", "--download=0", "")
    assert reading.result() == data
    assert bytes_tcp(second) > 0
    find()
    rdma_again(first, second)
    eventually(lambda: "RDMA works again" in second.log)
    eventually(lambda: not removed_and_held(first) + removed_and_held(second), 60, "the old device is let go of")
    assert [adapter["device"] for adapter in second.status()["adapters"]] == [second.device]


def test_a_link_or_a_device_that_is_lost_leaves_the_pull_to_tcp_until_it_returns(hosts):
    """Three pairs at once, for most of it is waiting."""
    nodes = hosts(6, beside=True, max_download="4M")
    with ThreadPoolExecutor(3) as pool:
        pairs = [
            pool.submit(lost_and_found, nodes[0], nodes[1], lambda: carrier(nodes[0], "down"), lambda: carrier(nodes[0], "up")),
            pool.submit(lost_and_found, nodes[2], nodes[3], lambda: device_delete(nodes[2]), lambda: device_add(nodes[2])),
            pool.submit(lost_and_found, nodes[4], nodes[5], lambda: device_delete(nodes[5]), lambda: device_add(nodes[5])),
        ]  # fmt: skip
    for pair in pairs:
        pair.result()
    assert nodes[1].log.count("TCP is used") == 1
