# ctest: timeout=120
# ctest: label=plain
"""p2pfs bench, over TCP; tests/guest has it over RDMA."""

import re
import shutil
import subprocess

import pytest
from harness.env import BINARY
from harness.node import free_port
from harness.services import Etcd

CLOSING = re.compile(
    r"Test completed: duration (\d+\.\d\d), batch count (\d+), throughput (\d+\.\d+) (\w+)/s\n$"
)


def bench(*arguments, **more):
    return subprocess.run(
        [BINARY, "bench", *arguments], capture_output=True, text=True, timeout=60, check=False, **more
    )


class Target:
    """A target that serves while the block runs, and ends well behind it."""

    def __init__(self, meta):
        self.common = [f"--metadata_server={meta}", "--protocol=tcp", "--buffer_size=8M", "--threads=2"]
        self.name = f"127.0.0.1:{free_port()}"

    def __enter__(self):
        self.process = subprocess.Popen(
            [BINARY, "bench", "--mode=target", f"--local_server_name={self.name}", *self.common],
            stdout=subprocess.PIPE,
            text=True,
        )
        line = self.process.stdout.readline()
        assert line.startswith(f"target {self.name} serves at {self.name} (tcp)"), line
        return self

    def run(self, *more):
        return bench(*self.common, f"--segment_id={self.name}", "--duration=1", *more)

    def __exit__(self, *error):
        self.process.terminate()
        try:
            assert self.process.wait(20) == 0
        finally:
            self.process.kill()
            self.process.stdout.close()


@pytest.fixture
def meta(tmp_path):
    return f"local://{tmp_path}"


@pytest.mark.parametrize("operation", ["read", "write"])
def test_blocks_move_and_are_right(meta, operation):
    with Target(meta) as target:
        done = target.run(f"--operation={operation}", "--verify", "--batch_size=16", "--report_unit=MiB")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^Latency of a block: p50 .*, p99\.9 .*, max .*s$", done.stdout, re.MULTILINE)
    closing = CLOSING.search(done.stdout)
    batches = int(closing[2])
    assert batches >= 2
    assert f"Verified: every byte of {batches * 16} blocks" in done.stdout
    assert closing[4] == "MiB"
    # the line agrees with itself
    assert abs(batches / float(closing[1]) - float(closing[3])) <= 0.02 * float(closing[3])


@pytest.mark.skipif(shutil.which("etcd") is None, reason="etcd is not installed (scripts/bootstrap --test)")
def test_they_meet_in_etcd(tmp_path):
    etcd = Etcd(tmp_path).start()
    try:
        with Target(etcd.url()) as target:
            done = target.run("--block_size=1M", "--batch_size=4", "--auto_discovery=false")
    finally:
        etcd.kill()
    assert done.returncode == 0, done.stderr
    assert CLOSING.search(done.stdout)


def test_a_target_that_dies_ends_the_run(meta):
    with Target(meta) as target:
        command = [BINARY, "bench", *target.common, f"--segment_id={target.name}", "--duration=60"]
        with subprocess.Popen(
            [*command, "--batch_size=16"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as run:
            try:
                with pytest.raises(subprocess.TimeoutExpired):
                    run.wait(1)
                target.process.terminate()
                _, error = run.communicate(timeout=30)
            finally:
                run.kill()
        assert run.returncode == 1
        assert error.startswith(f"p2pfs: {target.name}: ")


@pytest.mark.parametrize(
    "arguments, status, says",
    [
        (["--mode=both"], 2, "--mode=both"),
        (["--operation=append"], 2, "--operation=append"),
        (["--protocol=udp"], 2, "--protocol=udp"),
        (["--report_unit=PB"], 2, "--report_unit=PB"),
        (["--block_size=12"], 2, "--block_size=12"),
        (["--threads=0"], 2, "--threads=0"),
        (["--colour=red"], 2, "--colour"),
        (["--buffer_size=1M"], 2, "--buffer_size"),
        (["somewhere"], 2, "options only"),
        (["--mode=target", "--protocol=rdma"], 1, "--protocol=tcp"),
    ],
)
def test_wrong_arguments_are_refused(meta, arguments, status, says):
    done = bench(f"--metadata_server={meta}", "--segment_id=x", "--protocol=tcp", *arguments)
    assert done.returncode == status, done.stderr
    assert done.stderr.count("\n") == 1 and says in done.stderr


def test_it_says_what_is_missing(tmp_path):
    assert "--metadata_server=" in bench("--mode=target").stderr
    assert "--segment_id=" in bench(f"--metadata_server=local://{tmp_path}").stderr
    done = bench(f"--metadata_server=local://{tmp_path}", "--segment_id=nobody", "--protocol=tcp")
    assert done.returncode == 1
    assert "nobody: there is no such target" in done.stderr
