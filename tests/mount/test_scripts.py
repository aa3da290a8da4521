# ctest: label=plain
# ctest: timeout=400
"""The scripts that a newcomer runs first."""

import filecmp
import json
import os
import shutil
import subprocess

import pytest

from harness import env, fuse

SCRIPTS = env.SOURCE / "scripts"


def checkpoint(*arguments):
    return subprocess.run(
        [SCRIPTS / "make-checkpoint", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("size", [1, 16, 100])
def test_a_checkpoint_has_its_size_and_is_valid(tmp_path, size):
    assert checkpoint("--size", size, tmp_path / "one").returncode == 0
    done = checkpoint("--verify", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in tmp_path.glob("one/*.safetensors"))
    assert names == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    stored = sum(path.stat().st_size for path in tmp_path.glob("one/*.safetensors"))
    assert abs(stored - (size << 20)) < 0.15 * (size << 20)


def test_the_same_seed_gives_the_same_bytes_and_another_gives_others(tmp_path):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        checkpoint("--size", 4, "--seed", seed, tmp_path / name)
    names = os.listdir(tmp_path / "a")
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False)[0] == names
    _, different, _ = filecmp.cmpfiles(tmp_path / "a", tmp_path / "c", names, shallow=False)
    assert len(different) == 4


def test_verify_sees_a_short_file_and_a_broken_header(tmp_path):
    checkpoint("--size", 4, tmp_path / "one")
    victim = tmp_path / "one/model-00002-of-00004.safetensors"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1])
    done = checkpoint("--verify", tmp_path / "one")
    assert done.returncode == 1 and victim.name in done.stderr
    victim.write_bytes(b"\xff" * 8 + whole[8:])
    done = checkpoint("--verify", tmp_path / "one")
    assert done.returncode == 1 and victim.name in done.stderr


def quickstart(tmp_path, *arguments, **environment):
    return subprocess.run(
        [SCRIPTS / "quickstart", *arguments],
        env={**os.environ, "P2PFS_BIN": str(env.BINARY), "TMPDIR": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_quickstart_ends_with_all_done_and_leaves_nothing(mounts, tmp_path):
    before = fuse.mounts()
    done = quickstart(tmp_path, "--size", "100")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "ALL DONE"
    assert fuse.mounts() == before
    assert os.listdir(tmp_path) == []


def test_quickstart_names_the_step_that_failed_and_leaves_nothing(mounts, tmp_path):
    liar = tmp_path / "p2pfs"
    liar.write_text('#!/bin/sh\n[ "$1" = version ] && exit 0\necho "no mount today" >&2\nexit 1\n')
    liar.chmod(0o755)
    done = quickstart(tmp_path, "--size", "1", P2PFS_BIN=str(liar))
    assert done.returncode == 1
    assert "no mount today" in done.stderr
    assert "FAILED at: mount two nodes" in done.stderr
    assert os.listdir(tmp_path) == ["p2pfs"]


def test_bench_swarm_measures_hosts_with_links_of_their_own(mounts, tmp_path):
    for program in ("nsenter", "tc", "redis-server"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (scripts/bootstrap --bench)")
    plot = tmp_path / "swarm.svg"
    command = [
        SCRIPTS / "bench", "--json", "--nodes", "1,2", "--size", "8M", "--rate", "400mbit", "--rounds", "1",
        "--methods", "chain,p2pfs", "--plot", plot, "swarm",
    ]  # fmt: skip
    build = env.BINARY.parents[1]
    done = subprocess.run(
        command, env={**os.environ, "P2PFS_BUILD": str(build)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["swarm"]
    assert [(row["nodes"], row["method"]) for row in rows] == [
        (1, "chain"), (1, "p2pfs"), (2, "chain"), (2, "p2pfs")
    ]  # fmt: skip
    for row in rows:
        (one,) = row["rounds"]
        assert len(one["seconds"]) == row["nodes"]
        assert row["last"] >= 0.9  # the links are capped
        assert row["copies"] >= 0.99  # the bytes came from the first host
    assert "p2pfs" in plot.read_text()


def test_bench_keeps_what_was_measured_before_and_draws_it(mounts, tmp_path):
    kept, drawn = tmp_path / "kept.json", tmp_path / "drawn.svg"
    build = env.BINARY.parents[1]
    for case, cases in (("register", {"register"}), ("arrive", {"register", "arrive"})):
        done = subprocess.run(
            [SCRIPTS / "bench", "--json", "--rounds", "1", "--size", "8M", "--keep", kept, "--bars", drawn, case],
            env={**os.environ, "P2PFS_BUILD": str(build)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        rows = json.loads(done.stdout)["rows"]
        assert {row["case"] for row in rows} == cases
        assert all(row["median"] > 0 for row in rows)
    assert "cat of a file that is not here yet" in drawn.read_text()
