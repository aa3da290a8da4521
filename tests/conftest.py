"""Fixtures of the mount tests. See harness/ for what they are made of."""

import faulthandler
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(__file__))

from harness import env  # noqa: E402
from harness.network import Network  # noqa: E402
from harness.node import Cluster  # noqa: E402
from harness.watchdog import Watchdog  # noqa: E402

LIMIT = 200  # seconds for a test without a mark of its own, on a plain build

_watchdog = None


def pytest_configure(config):
    global _watchdog
    faulthandler.enable()
    if not env.BINARY.exists():
        raise pytest.UsageError(f"{env.BINARY} does not exist: build first, or set P2PFS_BIN")
    if env.why_no_mounts() is None:
        env.enter_own_mount_namespace()
    _watchdog = Watchdog()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    mark = item.get_closest_marker("limit")
    _watchdog.arm((mark.args[0] if mark else LIMIT) * env.SLOWNESS)
    yield
    _watchdog.disarm()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed test shows what its nodes said; one that ran into the watchdog has failed, even if
    it took the error of its aborted mount for the one that it expected."""
    outcome = yield
    report = outcome.get_result()
    if _watchdog.barked and report.passed and call.when == "call":
        report.outcome = "failed"
        report.longrepr = "the watchdog aborted the mounts: the test took longer than its limit"
    if report.failed:
        make_cluster = getattr(item, "funcargs", {}).get("make_cluster")
        for one in make_cluster.made if make_cluster else ():
            for node in one.all:
                lines = node.log.splitlines()[-60:]
                report.sections.append((f"log of {node.dir}", "\n".join(lines)))


@pytest.fixture
def tmp_path():
    """A directory of the test's own that is gone afterwards (checkpoints are too large to keep)."""
    base = os.environ.get("P2PFS_TEST_TMP") or tempfile.gettempdir()
    path = Path(tempfile.mkdtemp(prefix="p2pfs-test-", dir=base)).resolve()
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def mounts():
    """Skips where nothing can be mounted."""
    reason = env.why_no_mounts()
    if reason is not None:
        pytest.skip(f"no FUSE mounts here: {reason}")


@pytest.fixture
def make_cluster(mounts, tmp_path):
    """Makes clusters that are taken down at the end, whatever happened: make_cluster(meta=URL)."""
    made = []

    def make(meta=None):
        home = tmp_path / f"cluster{len(made)}"
        home.mkdir()
        one = Cluster(home, meta)
        made.append(one)
        _watchdog.watch(one)
        return one

    make.made = made
    yield make
    findings = []
    for one in made:
        findings.append(one.cleanup())
        _watchdog.unwatch(one)
    findings = "\n".join(filter(None, findings))
    assert not findings, f"a sanitizer found something\n{findings}"


@pytest.fixture
def cluster(make_cluster):
    """One cluster with local: metadata; cluster.node(...) starts nodes."""
    return make_cluster()


@pytest.fixture
def node(cluster):
    """One mounted node."""
    return cluster.node()


@pytest.fixture
def network(mounts):
    """Hosts of their own, for cluster.node_on; the test itself is where their roads meet."""
    with Network() as net:
        yield net


@pytest.fixture
def two(cluster):
    """Two mounted nodes of one cluster."""
    return cluster.nodes(2)


@pytest.fixture
def sh():
    """Runs a shell command line, returns its output, fails with what it said on stderr."""

    def run(line, check=True, timeout=60, **more):
        done = subprocess.run(
            ["/bin/sh", "-c", line],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout * env.SLOWNESS,
            check=False,
            **more,
        )
        if check:
            assert done.returncode == 0, f"{line}\nended with {done.returncode}\n{done.stderr}"
        return done

    return run
