"""What every transport promises, over RDMA."""

import os
import subprocess

import pytest

from harness.env import BINARY, SLOWNESS
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
        ("test_p2pstore_rdma", IPV4, "*"),
    ],
)
def test_stories(program, address, stories):
    done = subprocess.run(
        [PROGRAMS / program, stories],
        env={**os.environ, "P2PFS_RDMA_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=140 * SLOWNESS,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert "[       OK ] " in done.stdout + done.stderr


def test_too_little_locked_memory_is_said_once_with_the_remedy():
    """Without the privilege to lock memory beyond the limit, no queue pair gets its buffers."""
    done = subprocess.run(
        ["setpriv", "--bounding-set", "-ipc_lock", "prlimit", "--memlock=65536"]
        + [PROGRAMS / "test_transport", "rdma: a_connection_is_made*"],
        env={**os.environ, "P2PFS_RDMA_ADDRESS": IPV4},
        capture_output=True,
        text=True,
        timeout=60 * SLOWNESS,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.count("cannot be registered for RDMA: this process may lock 64 KiB") == 1
    assert "ulimit -l unlimited" in done.stderr
