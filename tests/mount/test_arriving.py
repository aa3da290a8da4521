# ctest: timeout=300
# ctest: label=tsan
"""Files that are opened before they are here: who waits in open, for how long, and what looking at a header moves."""

import errno
import json
import mmap
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from harness.data import pattern
from harness.node import run_p2pfs
from harness.wait import eventually

MIB = 1 << 20
FORK = multiprocessing.get_context("fork")


def appears(node, name):
    eventually(node.path(name).exists, what=f"{name} on {node.name}")
    return node.path(name)


def resident(path):
    return int(os.getxattr(path, "user.p2pfs.resident"))


def complete(path):
    return resident(path) == os.path.getsize(path)


def evicted(node, name):
    def gone():
        if resident(node.path(name)):
            node.cli("evict", name, check=False)
        return resident(node.path(name)) == 0

    eventually(gone, what=f"{name} is evicted")


def waiting(node, count):
    eventually(lambda: node.status()["readers_waiting"] >= count, what=f"{count} opens waiting")


def opener(path):
    """A process that opens a file, and reads a byte of it."""
    code = "import os,sys;os.pread(os.open(sys.argv[1],os.O_RDONLY),1,0)"
    return subprocess.Popen([sys.executable, "-c", code, path], stderr=subprocess.PIPE, text=True)


def test_readers_of_other_files_go_on_while_64_wait(cluster):
    """They wait for shards of a file that takes minutes to come; the others are answered by the mount's process too."""
    slow, quick = cluster.node(shard_size="1M", max_upload="64K"), cluster.node()
    reader = cluster.node(read_timeout=600)
    piece, data = pattern(MIB, 1), pattern(8 * MIB, 2)
    slow.path("slow").write_bytes(70 * piece)
    quick.path("quick").write_bytes(data)
    came = []
    with open(appears(reader, "slow"), "rb") as stalled, open(appears(reader, "quick"), "rb", buffering=0) as file:

        def reads(shard):
            came.append(os.pread(stalled.fileno(), 4096, shard * MIB) == piece[:4096])

        assert os.pread(file.fileno(), len(data), 0) == data
        threads = [threading.Thread(target=reads, args=(shard,)) for shard in range(70)]
        for thread in threads:
            thread.start()
        waiting(reader, 64)
        for _ in range(8):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(file.fileno(), len(data), 0) == data
            assert reader.path("quick").read_bytes() == data
        assert reader.status()["readers_waiting"] >= 64
        run_p2pfs("limit", "--upload=0", slow.dir)
        for thread in threads:
            thread.join()
    assert came == 70 * [True]


# -- open=wait


@pytest.fixture
def held(cluster):
    """A node with open=wait, whose opens of "f" wait, because the only holder is stopped; until its lease has ended."""
    holder = cluster.node(name="holder")
    reader = cluster.node(name="reader", open="wait", read_timeout=600)
    holder.path("f").write_bytes(pattern(8 * MIB))
    reader.path("mine").write_bytes(pattern(MIB, 1))
    appears(reader, "f")
    holder.pause()
    yield reader, holder
    holder.resume()


def test_an_open_waits_until_all_is_here_and_keeps_nobody_else(held):
    reader, holder = held
    opened = []

    def opens():
        with open(reader.path("f"), "rb", buffering=0) as file:
            opened.append(complete(reader.path("f")))
            opened.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)[:] == pattern(8 * MIB))

    through = reader.status()["passthrough_opens"]
    threads = [threading.Thread(target=opens) for _ in range(24)]  # more than there are workers
    for thread in threads:
        thread.start()
    waiting(reader, len(threads))
    assert reader.path("mine").read_bytes() == pattern(MIB, 1)
    assert sorted(os.listdir(reader.dir)) == ["f", "mine"]
    assert opened == []
    holder.resume()
    for thread in threads:
        thread.join()
    assert opened == 2 * len(threads) * [True]
    if reader.status()["io_path"] == "passthrough":
        assert reader.status()["passthrough_opens"] == through + len(threads) + 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "SIGINT"])
def test_a_process_that_waits_in_open_is_killed_at_once(held, number):
    process = opener(held[0].path("f"))
    waiting(held[0], 1)
    process.send_signal(number)
    assert process.wait() == -number
    eventually(lambda: held[0].status()["readers_waiting"] == 0)


def test_the_mount_ends_while_opens_wait(held):
    processes = [opener(held[0].path("f")) for _ in range(4)]
    waiting(held[0], 4)
    held[0].process.send_signal(signal.SIGTERM)
    assert held[0].wait_exit() == 0
    for process in processes:
        assert process.wait() != 0


def test_an_open_fails_when_nothing_comes(cluster):
    holder = cluster.node(name="holder")
    reader = cluster.node(name="reader", open="wait", read_timeout=1)
    holder.path("f").write_bytes(pattern(2 * MIB))
    appears(reader, "f")
    holder.pause()
    with pytest.raises(OSError) as raised:
        os.open(reader.path("f"), os.O_RDONLY)
    assert raised.value.errno == errno.EIO
    holder.resume()
    assert eventually(reader.path("f").read_bytes) == pattern(2 * MIB)


def test_an_open_that_waits_brings_all_even_on_demand(cluster):
    a, b = cluster.node(), cluster.node(open="wait", fetch="demand")
    a.path("f").write_bytes(pattern(6 * MIB))
    with open(appears(b, "f"), "rb"):
        assert complete(b.path("f"))


def test_the_kernel_reads_ahead_by_1_mib(cluster):
    """By itself, 128 KiB: eight times the requests."""
    device = os.stat(cluster.node().dir).st_dev
    knob = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    if not os.access(knob, os.W_OK):
        pytest.skip(f"{knob} cannot be written here")
    eventually(lambda: knob.read_text(encoding="ascii") == "1024\n")


# -- open=auto


def test_the_first_open_never_waits_and_a_slow_pull_holds_up_nobody(cluster):
    a = cluster.node()
    b = cluster.node(max_download="1M")
    data = pattern(8 * MIB)
    a.path("f").write_bytes(data)
    with open(appears(b, "f"), "rb") as first:
        assert resident(b.path("f")) == 0
        assert os.pread(first.fileno(), 1, 0) == data[:1]
        with open(b.path("f"), "rb"):
            assert not complete(b.path("f"))
    assert b.status()["passthrough_opens"] == 0


def reads_and_opens_again(path, barrier, answers):
    with open(path, "rb", buffering=0) as first:
        barrier.wait()
        first.read(8)
        barrier.wait()
        with open(path, "rb", buffering=0) as second:
            right = os.pread(second.fileno(), 100, 5 * MIB) == pattern(8 * MIB)[5 * MIB : 5 * MIB + 100]
            answers.put(complete(path) and right)


def test_who_opens_it_again_after_its_begin_reads_through(cluster):
    """Eight processes at once, as tensor-parallel ranks are. A slow machine may need a few tries until the pull is fast
    enough to be waited for."""
    a, b = cluster.node(), cluster.node()
    if b.status()["io_path"] != "passthrough":
        pytest.skip(f"no FUSE passthrough here: {b.status()['io_path_why']}")
    a.path("f").write_bytes(pattern(8 * MIB))
    path = appears(b, "f")

    def all_through():
        evicted(b, "f")
        before = b.status()["passthrough_opens"]
        barrier, answers = FORK.Barrier(8), FORK.Queue()
        ranks = [FORK.Process(target=reads_and_opens_again, args=(path, barrier, answers)) for _ in range(8)]
        for rank in ranks:
            rank.start()
        said = [answers.get() for _ in ranks]
        for rank in ranks:
            rank.join()
        return all(said) and b.status()["passthrough_opens"] == before + len(ranks)

    eventually(all_through, 40)


# -- headers


def safetensors(size, seed):
    header = json.dumps({"t": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + pattern(size, seed)


def header_of(path):
    with open(path, "rb") as file:
        return json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))


def header_by_mapping(path):
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        return json.loads(mapped[8 : 8 + struct.unpack("<Q", mapped[:8])[0]])


@pytest.fixture
def shards(cluster):
    """Two nodes, of whose files a shard has 4 MiB: Python reads 1 MiB at once, and the kernel ahead of it."""
    return cluster.node(shard_size="4M"), cluster.node()


@pytest.mark.parametrize("look", [header_of, header_by_mapping])
def test_looking_at_the_headers_of_a_model_costs_one_shard_each(shards, look):
    a, b = shards
    a.path("model").mkdir()
    count, size = 8, 20 * MIB
    for k in range(count):
        a.path(f"model/{k}.safetensors").write_bytes(safetensors(size, k))
    for k in range(count):
        assert look(appears(b, f"model/{k}.safetensors"))["t"]["shape"] == [size]
    eventually(lambda: b.status()["pulls_running"] == 0)
    assert b.status()["bytes_received"] == count * 4 * MIB
    # whoever goes on gets the file ahead of his reading
    path = b.path("model/3.safetensors")
    with open(path, "rb") as file:
        assert os.pread(file.fileno(), 100, 9 * MIB) == safetensors(size, 3)[9 * MIB : 9 * MIB + 100]
        eventually(lambda: complete(path))
    assert path.read_bytes() == safetensors(size, 3)
    assert resident(b.path("model/4.safetensors")) == 4 * MIB


def test_a_header_of_gguf_is_no_reason_to_pull_and_other_files_are_pulled_at_the_first_read(shards):
    a, b = shards
    for name in ("m.gguf", "m.bin"):
        a.path(name).write_bytes(b"GGUF" + pattern(24 * MIB))
        with open(appears(b, name), "rb") as file:
            assert file.read(4) == b"GGUF"
    eventually(lambda: complete(b.path("m.bin")))
    eventually(lambda: b.status()["pulls_running"] == 0)
    assert resident(b.path("m.gguf")) == 4 * MIB
    with open(b.path("m.gguf"), "rb") as file:
        os.pread(file.fileno(), 1, 20 * MIB)
        eventually(lambda: complete(b.path("m.gguf")))


@pytest.mark.parametrize("name", ["m.safetensors", "m.gguf"])
def test_a_reader_who_follows_the_header_has_his_tensor_before_half_of_the_rest(cluster, name):
    """Of 256 shards, which take 16 s, he wants 8 in the middle: in another order, half of them would hardly do."""
    a, b = cluster.node(shard_size="256K"), cluster.node(max_download="4M")
    size = 64 * MIB
    data = safetensors(size, 1)
    a.path(name).write_bytes(data)
    begin = len(data) - size + size // 2
    with open(appears(b, name), "rb", buffering=0) as file:
        assert file.read(8) == data[:8]
        for at in range(begin, begin + 2 * MIB, MIB // 4):
            assert os.pread(file.fileno(), MIB // 4, at) == data[at : at + MIB // 4]
        assert resident(b.path(name)) < size // 2
