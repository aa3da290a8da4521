"""The guest's own RDMA, with the tools of rdma-core: what fails here is not p2pfs's fault."""

import subprocess
from pathlib import Path

import pytest

from harness.env import SLOWNESS
from harness.guest import HOSTS


def together(server, client):
    """Runs both; returns what the client says."""
    with subprocess.Popen(server, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT) as listener:
        try:
            for _ in range(10):
                done = subprocess.run(client, capture_output=True, text=True, timeout=40 * SLOWNESS, check=False)
                if done.returncode == 0:
                    assert listener.wait(20 * SLOWNESS) == 0
                    return done.stdout
            raise AssertionError(f"{client}\n{done.stdout}{done.stderr}")
        finally:
            listener.kill()


def packets(device):
    return int(Path(f"/sys/class/infiniband/{device}/ports/1/hw_counters/sent_pkts").read_text())


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_rping_goes_from_one_device_to_the_other(family):
    here, there = (getattr(host, family) for host in HOSTS)
    before = packets("rxe1")
    output = together(
        ["rping", "-s", "-a", there, "-C", "3"],
        ["rping", "-c", "-a", there, "-I", here, "-C", "3", "-v"],
    )
    assert output.count("rdma-ping-") == 3
    assert packets("rxe1") > before


def test_ib_read_bw_reads():
    output = together(
        ["ib_read_bw", "-R", "-d", "rxe0", "-s", "65536", "-n", "20"],
        ["ib_read_bw", "-R", "-d", "rxe0", "-s", "65536", "-n", "20", HOSTS[0].ipv4],
    )
    assert " 65536      20 " in output
