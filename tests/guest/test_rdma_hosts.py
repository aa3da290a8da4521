"""Every node on a host of its own: a network namespace with a soft-RoCE device, on one switch."""

import subprocess
from itertools import count
from pathlib import Path

import pytest
from test_rdma_mount import SIZE, Reading, register, seen

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
    """Makes so many nodes."""

    def make(number, **options):
        run("ip", "link", "add", "name", "switch", "type", "bridge")
        run("ip", "link", "set", "switch", "up")
        nodes = []
        for i in range(1, number + 1):
            node = cluster.node_on(network, start=False, **{**options, "listen": f"10.78.0.{i}:7700"})
            namespace = node.before[1].split("=")[1]
            ends = [f"port{i}", "type", "veth", "peer", "name", "wire", "netns", namespace]
            node.device = f"host{next(_numbers)}"  # it goes with its namespace, some time after the test
            run("ip", "link", "add", *ends)
            run("ip", "link", "set", f"port{i}", "master", "switch", "up")
            run("ip", "addr", "add", f"10.78.0.{i}/24", "dev", "wire", on=node)
            run("ip", "link", "set", "wire", "up", on=node)
            run("rdma", "link", "add", node.device, "type", "rxe", "netdev", "wire", on=node)
            nodes.append(node.start())
        return nodes

    return make


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
