"""What every transport promises, over RDMA."""

import os
import subprocess

import pytest

from harness.env import BINARY
from harness.guest import HOSTS

PROGRAMS = BINARY.parents[1] / "tests"
IPV4 = f"{HOSTS[0].ipv4}:0"
IPV6 = f"[{HOSTS[0].ipv6}]:0"


@pytest.mark.parametrize(
    "program, address, stories",
    [
        ("test_transport", IPV4, "rdma*"),
        ("test_transport", IPV6, "rdma: shards*"),
        ("test_transport_own", IPV4, "rdma*"),
    ],
)
@pytest.mark.limit(90)
def test_stories(program, address, stories):
    done = subprocess.run(
        [PROGRAMS / program, stories],
        env={**os.environ, "P2PFS_RDMA_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=80,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert "[       OK ] rdma: " in done.stdout + done.stderr
