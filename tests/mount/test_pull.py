"""What one node registers, the others read: every size, every way to read, from whoever has it."""

import mmap
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from harness import env
from harness.data import digest, pattern, write_file
from harness.node import MountFailed
from harness.wait import eventually

KIB = 1 << 10
MIB = 1 << 20


def register(node, name, size, seed=0):
    """Writes a file into the mount, as cp does; returns its bytes."""
    data = pattern(size, seed)
    node.path(name).write_bytes(data)
    return data


def appears(node, name):
    eventually(node.path(name).exists, what=f"{name} on {node.name}")
    return node.path(name)


def received(node):
    return node.status()["bytes_received"]


def served(node):
    return node.status()["bytes_served"]


class Reader(threading.Thread):
    """Reads a whole file in the background; keeps the bytes or the error."""

    def __init__(self, path, whole=True):
        super().__init__(daemon=True)
        self.path = path
        self.whole = whole
        self.data = None
        self.error = None
        self.start()

    def run(self):
        try:
            with open(self.path, "rb") as source:
                self.data = source.read() if self.whole else source.read(1)
        except OSError as error:
            self.error = error

    def result(self, seconds=30):
        self.join(seconds * env.SLOWNESS)
        assert not self.is_alive(), f"reading {self.path} takes more than {seconds} s"
        if self.error is not None:
            raise self.error
        return self.data


# -- sizes and ways to read


SIZES = [0, 1, 4095, MIB - 1, MIB, MIB + 1, 64 * MIB + 12345]


@pytest.mark.parametrize("size", SIZES)
def test_what_cp_registers_on_one_node_is_read_on_the_other(two, tmp_path, sh, size):
    source = write_file(tmp_path / "source", size, seed=size)
    sh(f"cp {source} {two[0].path('f')}")
    path = appears(two[1], "f")
    assert os.stat(path).st_size == size
    assert digest(path) == digest(source)
    assert digest(two[0].path("f")) == digest(source)
    if size:
        assert received(two[1]) == size  # each byte once, on the network


def test_both_directions_at_once(two):
    one, other = two
    data = [register(one, "a", 8 * MIB + 3, 1), register(other, "b", 8 * MIB + 5, 2)]
    appears(one, "b")
    appears(other, "a")
    readers = [Reader(other.path("a")), Reader(one.path("b"))]
    assert [reader.result() for reader in readers] == data


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "arriving"])
def test_every_way_to_read(two, tmp_path, complete):
    size = 6 * MIB + 1001
    ways = [mmap_shared, mmap_private, by_sendfile, by_splice, by_direct, backwards, by_dd]
    for number, way in enumerate(ways):
        data = register(two[0], f"f{number}", size, number)
        path = appears(two[1], f"f{number}")
        if complete:
            two[1].cli("pull", f"f{number}")
        assert way(path, size, tmp_path) == data, way.__name__


def mmap_shared(path, size, tmp_path):
    with open(path, "rb") as source:
        with mmap.mmap(source.fileno(), size, mmap.MAP_SHARED, mmap.PROT_READ) as view:
            tail = view[size - 10 :]
            data = view[:]
            assert data.endswith(tail)
            return data


def mmap_private(path, size, tmp_path):
    with open(path, "rb") as source:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        with mmap.mmap(source.fileno(), size, mmap.MAP_PRIVATE, protection) as view:
            data = view[:]
            view[100:104] = b"mine"  # copied on write: nobody else sees it
            assert view[100:104] == b"mine"
            assert os.pread(source.fileno(), 4, 100) == data[100:104]
            return data


def by_sendfile(path, size, tmp_path):
    with open(path, "rb") as source, open(tmp_path / "out", "wb+") as out:
        at = 0
        while at < size:
            step = os.sendfile(out.fileno(), source.fileno(), at, size - at)
            assert step > 0
            at += step
        out.seek(0)
        return out.read()


def by_splice(path, size, tmp_path):
    pieces = []
    read_end, write_end = os.pipe()
    try:
        with open(path, "rb") as source:
            while step := os.splice(source.fileno(), write_end, 64 * KIB):
                pieces.append(os.read(read_end, step))
                assert len(pieces[-1]) == step
    finally:
        os.close(read_end)
        os.close(write_end)
    return b"".join(pieces)


def by_direct(path, size, tmp_path):
    step = MIB
    pieces = []
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, step) as buffer:
            at = 0
            while count := os.preadv(fd, [buffer], at):
                pieces.append(buffer[:count])
                at += count
    finally:
        os.close(fd)
    return b"".join(pieces)


def backwards(path, size, tmp_path):
    """The end first, as loaders that look for an index do."""
    pieces = []
    with open(path, "rb", buffering=0) as source:
        end = size
        while end > 0:
            start = max(0, end - 777777)
            piece = os.pread(source.fileno(), end - start, start)
            assert len(piece) == end - start
            pieces.insert(0, piece)
            end = start
    return b"".join(pieces)


def by_dd(path, size, tmp_path):
    done = subprocess.run(
        ["dd", f"if={path}", "bs=100003", "status=none"], capture_output=True, check=True
    )
    return done.stdout


def test_many_threads_read_at_random(two):
    size = 16 * MIB + 7
    data = register(two[0], "f", size)
    path = appears(two[1], "f")
    wrong = []

    def read(seed):
        fd = os.open(path, os.O_RDONLY)
        for number in range(60):
            at = (seed * 7919 + number * 104729 * 31) % size
            if os.pread(fd, 100000, at) != data[at : at + 100000]:
                wrong.append((seed, at))
        os.close(fd)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    eventually(lambda: two[1].xattr("f", "state") == "complete")
    assert received(two[1]) == size


def test_p2pfs_pull_brings_it_here(two):
    two[0].path("dir").mkdir()
    data = {name: register(two[0], f"dir/{name}", 3 * MIB, name) for name in ("a", "b")}
    appears(two[1], "dir/b")
    two[1].cli("pull", "dir/a", "dir/b")
    assert received(two[1]) == 6 * MIB
    for name, content in data.items():
        assert two[1].xattr(f"dir/{name}", "state") == "complete"
        assert int(two[1].xattr(f"dir/{name}", "resident")) == 3 * MIB
        assert two[1].path("dir", name).read_bytes() == content
    assert received(two[1]) == 6 * MIB


# -- what is fetched, and from whom


def test_on_demand_only_what_was_touched_comes(cluster):
    size = 32 * MIB
    one = cluster.node()
    two = cluster.node(fetch="demand")
    data = register(one, "f", size)
    path = appears(two, "f")
    with open(path, "rb", buffering=0) as source:
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
        assert os.pread(source.fileno(), 100, size - 100) == data[-100:]
        assert os.pread(source.fileno(), 100, 5 * MIB) == data[5 * MIB : 5 * MIB + 100]
    assert 0 < int(two.xattr("f", "resident")) <= 6 * MIB  # shards are of 1 MiB
    assert two.xattr("f", "state") in ("partial", "fetching")
    assert path.read_bytes() == data
    eventually(lambda: int(two.xattr("f", "resident")) == size)
    assert received(two) == size


def test_a_second_reader_waits_for_the_same_transfer(two):
    size = 48 * MIB
    data = register(two[0], "f", size)
    path = appears(two[1], "f")
    readers = [Reader(path) for _ in range(4)]
    for reader in readers:
        assert reader.result() == data
    assert received(two[1]) == size
    eventually(lambda: served(two[0]) >= size)
    # On a busy machine a late shard is asked for again: what is given up has been sent for nothing.
    assert served(two[0]) < 2 * size


def test_four_nodes_pull_at_once_and_serve_each_other(cluster):
    """The registrar does not send a copy to each."""
    count, size = 1, 96 * MIB
    registrar = cluster.node(max_upload="48M")  # so that none is done before the last one begins
    pullers = cluster.nodes(4)
    data = {f"f{k}": register(registrar, f"f{k}", size, k) for k in range(count)}
    for node in pullers:
        appears(node, f"f{count - 1}")
    pulls = [
        subprocess.Popen([env.BINARY, "pull", "--quiet", *[node.path(name) for name in data]])
        for node in pullers
    ]
    for pull in pulls:
        assert pull.wait(60 * env.SLOWNESS) == 0
    for node in pullers:
        for name, content in data.items():
            assert node.path(name).read_bytes() == content
        assert received(node) == count * size
    copies = served(registrar) / (count * size)
    print(f"the registrar served {copies:.2f} copies to {len(pullers)} nodes")

    def everything():
        return sum(served(node) for node in [registrar, *pullers])

    eventually(lambda: everything() >= len(pullers) * count * size)
    # A late shard may be asked twice; what is given up on its way has been sent for nothing.
    assert everything() <= 1.6 * len(pullers) * count * size
    assert copies < 3


@pytest.mark.parametrize("begun", [False, True])
def test_a_reader_waits_for_its_shard_only(cluster, begun):
    """The last bytes come first when they are asked for first, and next when what lies in front is coming already."""
    size = 128 * MIB  # shards of 1 MiB
    one = cluster.node(max_upload="8M")
    two = cluster.node()
    write_file(one.path("f"), size)
    path = appears(two, "f")
    with open(path, "rb", buffering=0) as source:
        if begun:
            source.read(1)
        before = int(two.xattr("f", "resident"))
        assert len(os.pread(source.fileno(), 4096, size - 4096)) == 4096
        landed = (int(two.xattr("f", "resident")) - before) // MIB
    print(f"{landed} of {size // MIB} shards landed before the last 4 KiB were read")
    assert 1 <= landed <= 32  # it, and what was on its way
    one.cli("limit", "--upload=0", one.dir)
    assert digest(path) == digest(one.path("f"))


def test_many_pulls_leave_nothing_behind(two):
    """Each is evicted behind: nothing stays for each of them, neither descriptors nor threads, nor memory."""
    size = 2 * MIB
    data = register(two[0], "f", size)
    path = appears(two[1], "f")

    def pull_and_evict():
        def evicted():
            two[1].cli("evict", "f", check=False)
            return two[1].xattr("f", "resident") == "0"

        two[1].cli("pull", "f")
        eventually(evicted)

    def held(node):
        """Descriptors and threads. Of these libfuse has up to 16, which come as they are needed and may stay."""
        return [len(os.listdir(f"/proc/{node.pid}/{what}")) for what in ("fd", "task")]

    for _ in range(4):
        pull_and_evict()
    before = [held(node) for node in two]
    for _ in range(40):
        pull_and_evict()

    def nothing_grew():
        now = [held(node) for node in two]
        grown = [left - had for one, other in zip(now, before) for left, had in zip(one, other)]
        assert max(grown) < 20, f"[descriptors, threads] {before} became {now}"
        used = [node.status()["cache_used"] for node in two]
        assert used == [size, 0], f"{used} bytes are used"
        return True

    eventually(nothing_grew)
    assert path.read_bytes() == data


# -- in place, digests, shards


def test_a_file_in_place_is_pulled_while_it_is_being_digested(two, tmp_path):
    size = 96 * MIB + 11
    source = write_file(tmp_path / "model.safetensors", size)
    os.symlink(source, two[0].path("f"))
    assert digest(appears(two[1], "f")) == digest(source)
    assert digest(two[0].path("f")) == digest(source)
    # and once its digest is known, as ever
    eventually(lambda: not two[0].xattr("f", "digest").endswith(":"))
    eventually(lambda: two[1].cli("evict", "f", check=False).returncode == 0)  # once the kernel has told of the close
    assert digest(two[1].path("f")) == digest(source)


def test_sha256_digests(cluster):
    one, other = cluster.nodes(2, digest="sha256")
    data = register(one, "f", 5 * MIB + 1)
    assert appears(other, "f").read_bytes() == data
    assert "sha256" in other.xattr("f", "digest")
    # the registrar decides, whatever the puller's own option is
    third = cluster.node(digest="xxh3")
    assert appears(third, "f").read_bytes() == data


@pytest.mark.parametrize("shard_size", ["64K", "1M", "100K", "16M"])
def test_shard_sizes(cluster, shard_size):
    one = cluster.node(shard_size=shard_size)
    other = cluster.node()
    size = 9 * MIB + 5
    data = register(one, "f", size)
    assert appears(other, "f").read_bytes() == data
    wanted = {"64K": 64 * KIB, "1M": MIB, "100K": 100 * KIB, "16M": 16 * MIB}[shard_size]
    assert int(other.xattr("f", "shard_size")) == wanted
    assert int(other.xattr("f", "shards")) == -(-size // wanted)


def test_replicas_in_a_directory(cluster, tmp_path):
    (tmp_path / "cache").mkdir()
    one = cluster.node()
    other = cluster.node(cache_dir=tmp_path / "cache")
    data = register(one, "f", 9 * MIB + 5)
    assert appears(other, "f").read_bytes() == data
    assert register(other, "g", 3 * MIB, 2) == appears(one, "g").read_bytes()
    assert os.listdir(tmp_path / "cache") == []  # unnamed, so that nothing is left after a crash


# -- secrets


def secret(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text + "\n")
    path.chmod(0o600)
    return path


def test_nodes_with_the_same_secret_serve_each_other(cluster, tmp_path):
    file = secret(tmp_path, "secret", "correct horse battery staple")
    one, other = cluster.nodes(2, secret_file=file)
    data = register(one, "f", 2 * MIB)
    assert appears(other, "f").read_bytes() == data


@pytest.mark.parametrize("theirs", ["another secret of some length", None], ids=["other", "none"])
def test_without_the_secret_nothing_is_served(cluster, tmp_path, theirs):
    file = secret(tmp_path, "secret", "correct horse battery staple")
    options = {"secret_file": secret(tmp_path, "theirs", theirs)} if theirs else {}
    one = cluster.node(secret_file=file)
    other = cluster.node(read_timeout=2, **options)
    register(one, "f", 2 * MIB)
    path = appears(other, "f")
    with pytest.raises(OSError) as raised:
        path.read_bytes()
    assert raised.value.errno == 5
    assert received(other) == 0 and served(one) == 0
    eventually(lambda: "secret" in one.log + other.log)
    eventually(lambda: sum(node.metrics()["p2pfs_links_refused_total"] for node in (one, other)) > 0)


def test_a_secret_that_others_may_read_is_refused(cluster, tmp_path):
    file = secret(tmp_path, "secret", "correct horse battery staple")
    file.chmod(0o644)
    with pytest.raises(MountFailed) as raised:
        cluster.node(secret_file=file)
    assert raised.value.returncode not in (0, None)
    assert "chmod 600" in raised.value.log


# -- versions


def test_an_open_file_keeps_its_version(cluster):
    one, other = cluster.nodes(2, allow_overwrite=True)
    old = register(one, "f", 4 * MIB, 1)
    path = appears(other, "f")
    with open(path, "rb", buffering=0) as source:
        assert os.pread(source.fileno(), 1000, 0) == old[:1000]
        new = register(one, "f", 4 * MIB + 77, 2)
        eventually(lambda: os.stat(path).st_size == 4 * MIB + 77)
        assert path.read_bytes() == new
        assert b"".join(os.pread(source.fileno(), MIB, at * MIB) for at in range(4)) == old
        assert os.fstat(source.fileno()).st_size in (4 * MIB, 4 * MIB + 77)
    assert path.read_bytes() == new


def test_a_removed_file_is_read_to_its_end_by_who_has_it_open(two):
    data = register(two[0], "f", 4 * MIB, 1)
    path = appears(two[1], "f")
    two[1].cli("pull", "f")
    with open(path, "rb") as source:
        os.unlink(two[0].path("f"))
        eventually(lambda: not path.exists())
        assert source.read() == data
    eventually(lambda: two[1].status()["cache_used"] == 0)
    eventually(lambda: two[0].status()["cache_used"] == 0)


def test_a_tree_copied_in_is_a_tree_on_the_other_side(two, tmp_path, sh):
    tree = tmp_path / "tree"
    (tree / "sub/deep").mkdir(parents=True)
    for number, name in enumerate(["a", "sub/b", "sub/deep/c", "sub/deep/d"]):
        write_file(tree / name, number * 700001, seed=number)
    sh(f"cp -a {tree} {two[0].path('copied')}")
    os.symlink(tree, two[0].path("linked"))
    for name in ("a", "sub/b", "sub/deep/c", "sub/deep/d"):
        appears(two[1], f"copied/{name}")
        appears(two[1], f"linked/{name}")
    for name in ("copied", "linked"):
        out = tmp_path / f"out-{name}"
        shutil.copytree(two[1].path(name), out)
        sh(f"diff -r {tree} {out}")
