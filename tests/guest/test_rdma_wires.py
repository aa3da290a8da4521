"""Wires that are cut."""

import subprocess

import pytest
from test_rdma_mount import MIB, SIZE, Reading, arriving, by_adapter, pair, register, seen, twin, warm  # noqa: F401

from harness.env import SLOWNESS
from harness.guest import HOSTS, SECOND
from harness.wait import eventually


def wire(ends, cut):
    """What the two ends of a pair send each other is lost in the switch, or arrives again, and nothing tells them."""
    for end in ends:
        subprocess.run(["ip", "link", "set", end.port, *(["nomaster"] if cut else ["master", end.switch])], check=True)


def connected(node):
    return node.peers()["peers"][0]["connected"]


def test_a_peer_that_falls_silent_is_noticed_though_nothing_is_asked_of_it(pair):
    """Its lease lasts all the while, and a link that nobody needs stays for 30 s: it is the link that tells."""
    first, second = pair
    register(first, "f", size=MIB)
    seen(second, "f").read_bytes()
    assert connected(second)
    wire(HOSTS, cut=True)
    try:
        eventually(lambda: not connected(second), 20 / SLOWNESS, "the silence is noticed")
    finally:
        wire(HOSTS, cut=False)


@pytest.mark.parametrize("lost", [1, 0], ids=["second", "first"])
def test_a_wire_that_is_cut_is_paused_and_comes_back(twin, lost):
    first, second = twin
    ends = (HOSTS, SECOND)[lost]
    warm(first, second)
    before = second.status()["bytes_received"]
    data = register(first, "f", size=6 * SIZE)
    reading = Reading(seen(second, "f"))
    arriving(second, before)
    wire(ends, cut=True)
    try:
        assert reading.result() == data
        status = second.status()
        assert status["bytes_rdma"] == status["bytes_received"]  # none of it by TCP
        alone = by_adapter(second)
        data = register(first, "g", seed=2)
        assert seen(second, "g").read_bytes() == data
        assert by_adapter(second)[lost] == alone[lost]
    finally:
        wire(ends, cut=False)
    count = 0

    def returned():
        nonlocal count
        count += 1
        more = register(first, f"h{count}", seed=count, size=2 * MIB)
        assert seen(second, f"h{count}").read_bytes() == more
        return by_adapter(second)[lost] > alone[lost]

    eventually(returned, what=f"{ends[1].device} carries shards again")
