# ctest: label=plain
# ctest: timeout=1200
"""What a node has room for: the cache, memory, and the number of names."""

import errno
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from harness import env
from harness.data import digest, pattern, write_file
from harness.wait import eventually

KIB = 1 << 10
MIB = 1 << 20


def register(node, name, size, seed=0):
    data = pattern(size, seed)
    node.path(name).write_bytes(data)
    return data


def appears(node, name):
    eventually(node.path(name).exists, what=f"{name} on {node.name}")
    return node.path(name)


def read_anew(path):
    """The file's bytes from the node, not from the kernel's cache."""
    with open(path, "rb", buffering=0) as source:
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return source.read()


def state(node, name):
    return node.xattr(name, "state")


def used(node):
    return node.status()["cache_used"]


def settled(node):
    eventually(lambda: node.status()["pulls_running"] == 0)


# -- the cache


def test_what_cannot_fit_is_not_registered(cluster):
    small = cluster.node(cache_size="8M")
    other = cluster.node()
    register(small, "first", 5 * MIB)
    for attempt in range(2):
        with pytest.raises(OSError) as raised:
            register(small, "second", 5 * MIB)
        assert raised.value.errno == errno.ENOSPC
        eventually(lambda: os.listdir(small.dir) == ["first"])  # once the kernel has told of the close
    appears(other, "first")
    assert os.listdir(other.dir) == ["first"]
    assert used(small) <= 8 * MIB
    register(small, "third", 2 * MIB)  # what fits, fits
    os.unlink(small.path("first"))
    eventually(lambda: used(small) <= 2 * MIB)
    register(small, "second", 5 * MIB)


def test_cp_that_runs_out_of_room_says_so(cluster, tmp_path):
    small = cluster.node(cache_size="4M")
    source = write_file(tmp_path / "source", 6 * MIB)
    done = subprocess.run(
        ["cp", source, small.path("f")], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "No space left on device" in done.stderr
    eventually(lambda: not small.path("f").exists() or state(small, "f") == "writing", what="f is not registered")


def test_a_pull_that_cannot_fit(cluster):
    big = cluster.node()
    small = cluster.node(cache_size="4M", read_timeout=5)
    register(big, "f", 6 * MIB)
    own = register(small, "own", 3 * MIB, 1)
    with pytest.raises(OSError) as raised:
        appears(small, "f").read_bytes()
    assert raised.value.errno in (errno.ENOSPC, errno.EIO)
    assert "cache" in small.log and "cache_size=" in small.log
    assert small.path("own").read_bytes() == own


def test_the_least_recently_used_go_when_others_hold_them(cluster):
    big = cluster.node()
    small = cluster.node(cache_size="12M")
    data = {f"f{k}": register(big, f"f{k}", 3 * MIB, k) for k in range(6)}
    own = register(small, "own", 2 * MIB, 99)
    appears(small, "f5")
    for name in ("f0", "f1", "f2"):
        assert small.path(name).read_bytes() == data[name]
        settled(small)
    with open(small.path("f0"), "rb") as source:  # f0 is used again
        source.read(1)
    assert small.path("f3").read_bytes() == data["f3"]
    assert state(small, "f1") == "remote"
    assert state(small, "f0") == "complete"
    for name in ("f4", "f5", "f1", "f2"):  # and round and round
        assert read_anew(small.path(name)) == data[name]
        settled(small)
        assert used(small) <= 12 * MIB
    assert state(small, "own") == "complete"  # the last copy stays
    assert appears(big, "own").read_bytes() == own
    assert small.metrics()["p2pfs_evictions_total"] >= 4


@pytest.mark.parametrize("grow", (os.ftruncate, lambda fd, size: os.posix_fallocate(fd, 0, size)))
def test_a_file_that_grows_by_a_hole_evicts_too(cluster, grow):
    """What can be evicted is no reason to refuse a size; what cannot, shows at the close at the latest."""
    big = cluster.node()
    small = cluster.node(cache_size="8M")
    data = {name: register(big, name, 3 * MIB, k) for k, name in enumerate(("f0", "f1"))}
    for name, bytes_ in data.items():
        assert appears(small, name).read_bytes() == bytes_
        settled(small)
    with open(small.path("hole"), "wb", buffering=0) as hole:
        grow(hole.fileno(), 5 * MIB)
        os.pwrite(hole.fileno(), b"end", 5 * MIB - 3)
    assert appears(big, "hole").read_bytes() == bytes(5 * MIB - 3) + b"end"
    assert used(small) <= 8 * MIB
    assert small.metrics()["p2pfs_evictions_total"] >= 1
    with open(small.path("never"), "wb", buffering=0) as never, pytest.raises(OSError) as raised:
        grow(never.fileno(), 9 * MIB)
    assert raised.value.errno == errno.ENOSPC
    small.cli("pin", "hole")
    late = os.open(small.path("late"), os.O_CREAT | os.O_WRONLY)
    grow(late, 4 * MIB)  # for which there is no room beside "hole"
    with pytest.raises(OSError) as raised:
        os.close(late)
    assert raised.value.errno == errno.ENOSPC
    eventually(lambda: not small.path("late").exists())  # the kernel tells of a close after close(2) has returned


def test_an_open_file_and_a_pinned_one_are_not_evicted(cluster):
    big = cluster.node()
    small = cluster.node(cache_size="8M", read_timeout=5)
    data = {f"f{k}": register(big, f"f{k}", 3 * MIB, k) for k in range(4)}
    appears(small, "f3")
    small.cli("pull", "f0")
    small.cli("pin", "f0")
    with open(small.path("f1"), "rb") as source:
        assert source.read() == data["f1"]
        with pytest.raises(OSError):
            small.path("f2").read_bytes()
    settled(small)
    assert eventually(lambda: read_anew(small.path("f2"))) == data["f2"]  # f1 made room, once its close was told
    assert state(small, "f0") == "complete"
    done = small.cli("evict", "f0", check=False)
    assert done.returncode == 1 and "pin" in done.stderr
    small.cli("unpin", "f0")
    small.cli("evict", "f0")
    assert state(small, "f0") == "remote"


def test_evicting_the_last_copy_needs_force(two):
    register(two[0], "f", MIB)
    path = appears(two[1], "f")
    done = two[0].cli("evict", "f", check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and "--force" in done.stderr
    path.read_bytes()
    eventually(lambda: two[0].cli("evict", "f", check=False).returncode == 0)
    eventually(lambda: used(two[0]) == 0)
    assert read_anew(two[0].path("f")) == pattern(MIB)
    for node in two:
        eventually(lambda node=node: node.cli("evict", "--force", "f", check=False).returncode == 0)
    with pytest.raises(OSError) as raised:
        read_anew(path)
    assert raised.value.errno == errno.EIO
    assert "f" in os.listdir(two[1].dir)
    two[1].cli("wait", "--offline", "--timeout=60", "f")


def test_eviction_waits_for_a_peer_that_reads(cluster):
    """Evicting while peers pull: they go on elsewhere, and get the right bytes."""
    one, other = cluster.nodes(2)
    size = 64 * MIB
    write_file(one.path("f"), size)
    appears(other, "f")
    other.cli("pull", "f")
    puller = cluster.node()
    path = appears(puller, "f")
    result = []
    reader = threading.Thread(target=lambda: result.append(digest(path)))
    reader.start()
    one.cli("evict", "f", check=False)
    reader.join()
    assert result == [digest(other.path("f"))]


# -- memory


def shared_and_own(node):
    """Bytes of memory of a node: its own, and those of its replicas (shared memory)."""
    with open(f"/proc/{node.pid}/status", encoding="ascii") as table:
        fields = dict(line.split(":", 1) for line in table)
    return [int(fields[key].split()[0]) * KIB for key in ("RssAnon", "RssShmem", "RssFile")]


def shmem():
    with open("/proc/meminfo", encoding="ascii") as table:
        for line in table:
            if line.startswith("Shmem:"):
                return int(line.split()[1]) * KIB
    raise AssertionError("no Shmem")


def test_a_pulled_file_is_in_memory_once(cluster, tmp_path):
    """In the replica; reading it may add pages of the kernel's own cache, which it takes back."""
    size = 256 * MIB
    source = write_file(tmp_path / "source", size)
    one = cluster.node()
    other = cluster.node()
    os.symlink(source, one.path("f"))
    appears(other, "f")
    own_before, shared_before, _ = shared_and_own(other)
    shmem_before = shmem()
    other.cli("pull", "f")
    own, shared, _ = shared_and_own(other)
    grown = own - own_before + shared - shared_before
    print(
        f"own {(own - own_before) / MIB:.1f} MiB, replica {(shared - shared_before) / MIB:.1f} MiB,"
        f" the machine's shared memory {(shmem() - shmem_before) / MIB:.1f} MiB,"
        f" for {size / MIB:.0f} MiB"
    )
    assert grown <= 1.05 * size
    assert used(other) <= 1.05 * size


def storage_of(node):
    """Bytes of the unnamed files that a node holds."""
    taken = {}
    for entry in Path(f"/proc/{node.pid}/fd").iterdir():
        try:
            if "(deleted)" in os.readlink(entry):
                stat = os.stat(entry)
                taken[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
        except FileNotFoundError:
            continue
    return sum(taken.values())


@pytest.mark.limit(350)  # the thread that clears has no claim to a busy machine's cores
def test_pages_are_cleared_ahead_and_given_back(cluster, tmp_path):
    """For what others have, as long as nothing is here; a pull takes them, and what it leaves goes."""
    large, small = 80 * MIB, 70 * MIB
    one = cluster.node()
    os.symlink(write_file(tmp_path / "large", large), one.path("large"))
    os.symlink(write_file(tmp_path / "small", small), one.path("small"))
    other, little = cluster.node(), cluster.node(cache_size="192M")
    eventually(lambda: other.status()["reserve"] == large + small, 100)
    assert one.status()["reserve"] == little.status()["reserve"] == 0
    assert sum(shared_and_own(other)) < 150 * MIB  # it is nobody's memory until it is used
    assert large + small <= storage_of(other) <= 1.05 * (large + small)
    appears(other, "large")
    other.cli("pull", "large")
    assert digest(other.path("large")) == digest(tmp_path / "large")
    eventually(lambda: other.status()["reserve"] == 0)
    eventually(lambda: large <= storage_of(other) <= 1.05 * large)
    eventually(lambda: other.cli("evict", "large", check=False).returncode == 0)
    eventually(lambda: other.status()["reserve"] == large + small, 100)
    os.unlink(one.path("small"))
    eventually(lambda: other.status()["reserve"] == large, 100)


@pytest.fixture
def large_tree(tmp_path, sh):
    """200 directories of 500 tiny files each, in memory."""
    tree = tmp_path / "tree"
    tree.mkdir()
    sh(f"mount -t tmpfs tmpfs {tree}")
    for number in range(200):
        directory = tree / f"d{number:03}"
        directory.mkdir()
        fd = os.open(directory, os.O_RDONLY)
        for k in range(500):
            file = os.open(f"f{k:03}", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=fd)
            os.write(file, b"%d" % k)
            os.close(file)
        os.close(fd)
    yield tree
    sh(f"umount -l {tree}")


@pytest.mark.limit(600)
def test_a_hundred_thousand_names(cluster, large_tree):
    one = cluster.node()
    began = time.monotonic()
    os.symlink(large_tree, one.path("tree"))
    print(f"registered them in {time.monotonic() - began:.1f} s")
    began = time.monotonic()
    other = cluster.node()
    print(f"a mount was ready in {time.monotonic() - began:.2f} s")
    for node in (one, other):
        began = time.monotonic()
        done = subprocess.run(
            ["ls", "-lR", node.dir], stdout=subprocess.PIPE, check=True, timeout=300
        )
        print(f"ls -lR on {node.name} took {time.monotonic() - began:.1f} s")
        assert done.stdout.count(b"\n-rw") == 100_000
        print(f"{node.name}: {node.rss() / MIB:.0f} MiB of its own")
    assert other.rss() < 150 * MIB
    assert other.status()["files"] == 100_000
    assert other.path("tree/d123/f456").read_bytes() == b"456"

    began = time.monotonic()
    other.cli("unregister", "tree")
    print(f"removed in {time.monotonic() - began:.2f} s")
    eventually(lambda: os.listdir(one.dir) == [])
