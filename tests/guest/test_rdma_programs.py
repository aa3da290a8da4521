"""Programs without a mount that move bytes over RDMA."""

import subprocess
from pathlib import Path

import pytest

from harness.env import BINARY, SLOWNESS
from harness.guest import HOSTS

EXAMPLE = BINARY.parent / "p2p-store-example"
MIB = 1 << 20


def packets(device):
    return int(Path(f"/sys/class/infiniband/{device}/ports/1/hw_counters/sent_pkts").read_text())


def example(cmd, meta, host, *more):
    return [
        EXAMPLE,
        f"--cmd={cmd}",
        f"--metadata_server={meta}",
        f"--local_server_name={HOSTS[host].ipv4}:{7301 + host}",
        f"--device_name={HOSTS[host].device}",
        "--protocol=rdma",
        *more,
    ]


def test_a_model_in_memory_comes_by_rdma(tmp_path):
    before = packets(HOSTS[0].device)
    meta = f"local://{tmp_path}"
    trainer = example("trainer", meta, 0, "--file_size_mb=8", "--wait_for=1")
    with subprocess.Popen(trainer, stdout=subprocess.PIPE, text=True) as training:
        try:
            done = subprocess.run(
                example("inferencer", meta, 1, "--timeout=60"),
                capture_output=True,
                text=True,
                timeout=90 * SLOWNESS,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            assert "every byte is right" in done.stdout
            assert done.stdout.endswith("ALL DONE\n")
            training.terminate()
            assert training.communicate(timeout=30 * SLOWNESS)[0].endswith("ALL DONE\n")
        finally:
            training.kill()
    # a packet carries at most 4 KiB of a READ
    assert packets(HOSTS[0].device) - before >= 8 * MIB // 4096


@pytest.mark.parametrize("operation", ["read", "write"])
def test_bench(tmp_path, operation):
    common = [BINARY, "bench", f"--metadata_server=local://{tmp_path}", "--buffer_size=4M", "--threads=2"]
    name = f"{HOSTS[0].ipv4}:7311"
    target = [*common, "--mode=target", f"--local_server_name={name}"]
    senders = packets(HOSTS[operation == "write"].device)
    with subprocess.Popen(target, stdout=subprocess.PIPE, text=True) as serving:
        try:
            assert serving.stdout.readline().startswith(f"target {name} serves at {name} (rdma)")
            done = subprocess.run(
                [
                    *common,
                    f"--segment_id={name}",
                    f"--local_server_name={HOSTS[1].ipv4}:7312",
                    f"--device_name={HOSTS[1].device}",
                    f"--operation={operation}",
                    "--batch_size=4",
                    "--block_size=256K",
                    "--duration=1",
                    "--verify",
                ],
                capture_output=True,
                text=True,
                timeout=60 * SLOWNESS,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            assert "Test completed: duration " in done.stdout
            serving.terminate()
            assert serving.wait(20 * SLOWNESS) == 0
        finally:
            serving.kill()
    assert packets(HOSTS[operation == "write"].device) - senders >= 2 * 4 * 256 // 4


def test_doctor_looks_at_ports_and_peers(cluster):
    nodes = [cluster.node(f"n{i}", listen=f"{host.ipv4}:{7321 + i}") for i, host in enumerate(HOSTS)]
    done = subprocess.run([BINARY, "doctor"], capture_output=True, text=True, timeout=60 * SLOWNESS, check=False)
    for host in HOSTS:
        line = next(line for line in done.stdout.splitlines() if f" {host.device}/1 " in line)
        assert line.startswith("good") and "RoCE v2 GID" in line and f" of {host.netdev}, MTU 9000" in line
    for node in nodes:
        assert f"of {node.dir}: 1 of 1 answer by TCP, 1 of 1 by RDMA" in done.stdout
    assert done.returncode == 0
