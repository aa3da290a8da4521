"""Complete files are read by the kernel alone (FUSE passthrough): who gets it, what stays of it, what ends it."""

# ctest: timeout=300
# ctest: label=passthrough

import collections
import ctypes
import errno
import json
import mmap
import multiprocessing
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
from harness.data import pattern
from harness.node import run_p2pfs
from harness.wait import eventually

MIB = 1 << 20
SIZE = 24 * MIB + 4321
OPENS = 3000


@pytest.fixture
def through(two):
    """Two nodes whose kernel reads complete files by itself."""
    for node in two:
        status = node.status()
        if status["io_path"] != "passthrough":
            pytest.skip(f"no FUSE passthrough here: {status['io_path_why']}")
    return two


def pull(node, name):
    """Once the node has heard of it."""
    eventually(node.path(name).exists, what=f"{name} on {node.name}")
    run_p2pfs("pull", node.path(name))


def opens(node):
    return node.status()["passthrough_opens"]


def mapped(file):
    return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


def mapped_alone(path, size):
    """A mapping without a descriptor beside it, which Python's mmap would keep; it stays until unmap()."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int] + [ctypes.c_long]
    with open(path, "rb") as file:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    assert address != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
    return (ctypes.c_char * size).from_address(address)


def unmap(kept):
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.munmap(ctypes.c_void_p(ctypes.addressof(kept)), ctypes.c_size_t(len(kept))) == 0


def test_complete_files_are_read_through_in_every_way(through, tmp_path):
    a, b = through
    data = pattern(SIZE, 1)
    a.path("f").write_bytes(data)
    assert a.path("f").read_bytes() == data
    assert opens(a) == 1
    pull(b, "f")
    with open(b.path("f"), "rb", buffering=0) as file:
        assert opens(b) == 1
        hits = b.status()["bytes_received"]
        assert os.pread(file.fileno(), 100, SIZE - 50) == data[-50:]
        assert os.pread(file.fileno(), 100, SIZE) == b""
        assert mapped(file)[:] == data
        private = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
        private[:4] = b"mine"
        assert os.pread(file.fileno(), 4, 0) == data[:4]
        with open(tmp_path / "copy", "wb", buffering=0) as copy:
            while os.sendfile(copy.fileno(), file.fileno(), None, MIB):
                pass
        assert (tmp_path / "copy").read_bytes() == data
        assert b.status()["bytes_received"] == hits
    assert b.path("f").stat().st_size == SIZE


def open_often(path):
    failed = collections.Counter()
    for _ in range(OPENS):
        try:
            os.close(os.open(path, os.O_RDONLY))
        except OSError as error:
            failed[errno.errorcode[error.errno]] += 1
    return failed


def test_many_that_open_a_complete_file_at_once_all_read_through(through, tmp_path):
    a, _ = through
    (tmp_path / "local").write_bytes(pattern(MIB, 12))
    a.path("f").symlink_to(tmp_path / "local")
    with multiprocessing.get_context("fork").Pool(12) as readers:
        assert sum(readers.map(open_often, 12 * [str(a.path("f"))]), collections.Counter()) == {}
    assert opens(a) == 12 * OPENS


def test_direct_reads_go_through(through):
    a, _ = through
    data = pattern(4 * MIB, 2)
    a.path("f").write_bytes(data)
    file = os.open(a.path("f"), os.O_RDONLY | os.O_DIRECT)
    room = mmap.mmap(-1, MIB)
    try:
        assert os.preadv(file, [room], MIB) == MIB
        assert room[:] == data[MIB : 2 * MIB]
    finally:
        os.close(file)
    assert opens(a) == 1


def test_who_held_an_arriving_file_goes_on_while_newcomers_read_through(through):
    a, b = through
    data = pattern(SIZE, 3)
    a.path("f").write_bytes(data)
    eventually(b.path("f").exists, what="f on b")
    with open(b.path("f"), "rb") as early:
        assert early.read(10) == data[:10]
        early_map = mapped(early)
        run_p2pfs("wait", "--complete", b.path("f"))
        assert opens(b) == 0
        with open(b.path("f"), "rb") as late:
            assert opens(b) == 1
            assert os.fstat(late.fileno()).st_ino == os.fstat(early.fileno()).st_ino
            assert late.read() == data
            assert mapped(late)[:] == data
            # without a name to look up there is no second nodeid to go to
            with open(f"/proc/self/fd/{early.fileno()}", "rb") as again:
                assert again.read() == data
            assert early.read() == data[10:]
            assert early_map[:] == data
        early_map.close()
    assert b.path("f").read_bytes() == data
    assert opens(b) >= 2


def test_a_mapping_keeps_its_bytes_when_the_copy_is_evicted_and_the_memory_needed(through):
    a, b = through
    size = 66 * MIB  # of the size that storage keeps for the next replica
    first, second = pattern(size, 4), pattern(size, 5)
    a.path("first").write_bytes(first)
    a.path("second").write_bytes(second)
    pull(b, "first")
    kept = mapped_alone(b.path("first"), size)
    run_p2pfs("evict", b.path("first"))
    eventually(b.path("second").exists, what="second on b")
    assert b.path("second").read_bytes() == second
    assert kept.raw == first


def file_held(node, size):
    """The unnamed file of this size among those that the node holds open, as a path."""
    for entry in Path(f"/proc/{node.pid}/fd").iterdir():
        try:
            if os.stat(entry).st_size == size and os.readlink(entry).endswith(" (deleted)"):
                return entry
        except OSError:
            pass  # closed meanwhile
    raise AssertionError(f"{node.name} holds no file of {size} bytes")


def test_memory_comes_back_when_the_last_mapping_goes(through):
    a, b = through
    if b.status()["storage"] != "huge tmpfs":
        pytest.skip("replicas do not lie on a tmpfs of the node's own")
    data = pattern(SIZE, 11)
    a.path("f").write_bytes(data)
    a.path("other").write_bytes(pattern(MIB + 77))
    for name in ("f", "other"):
        run_p2pfs("pull", b.path(name))
    other = file_held(b, MIB + 77)  # tells how full the tmpfs is on which both lie

    def taken():
        room = os.statvfs(other)
        return (room.f_blocks - room.f_bfree) * room.f_frsize

    kept = mapped_alone(b.path("f"), SIZE)
    run_p2pfs("evict", b.path("f"))
    assert kept.raw == data
    assert taken() >= SIZE
    unmap(kept)
    eventually(lambda: taken() < SIZE, what="its memory comes back")


def test_a_mapping_outlives_a_killed_daemon(through):
    a, b = through
    data = pattern(SIZE, 6)
    a.path("f").write_bytes(data)
    pull(b, "f")
    with open(b.path("f"), "rb", buffering=0) as file:
        kept = mapped(file)
        b.kill9()
        assert kept[:] == data
        assert os.pread(file.fileno(), 10, 100) == data[100:110]
    kept.close()


def test_unlinking_leaves_the_open_file_and_its_mapping(through):
    a, b = through
    data = pattern(SIZE, 7)
    a.path("f").write_bytes(data)
    pull(b, "f")
    with open(b.path("f"), "rb") as file:
        kept = mapped(file)
        a.path("f").unlink()
        eventually(lambda: not b.path("f").exists(), what="the name is gone on b")
        assert file.read() == data
    assert kept[:] == data
    kept.close()


def test_a_file_in_place_is_read_through_until_it_changes(through, tmp_path):
    a, _ = through
    data = pattern(SIZE, 8)
    (tmp_path / "local").write_bytes(data)
    a.path("f").symlink_to(tmp_path / "local")
    assert a.path("f").read_bytes() == data
    assert opens(a) == 1
    with open(tmp_path / "local", "r+b") as local:
        local.write(b"changed")
    with open(a.path("f"), "rb", buffering=0) as file, pytest.raises(OSError) as caught:
        file.read(10)
    assert caught.value.errno == errno.EIO
    assert opens(a) == 1


def test_what_is_read_through_cannot_be_written(through):
    a, b = through
    a.path("f").write_bytes(pattern(MIB, 9))
    pull(b, "f")
    with open(b.path("f"), "rb") as file:
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC):
            with pytest.raises(OSError) as caught:
                os.open(b.path("f"), flags)
            assert caught.value.errno == errno.EPERM
        with pytest.raises((PermissionError, ValueError)):
            mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_WRITE)


def creates(node):
    return node.status()["passthrough_creates"]


def read_all(path):
    with open(path, "rb", buffering=0) as file:
        return file.readall()


def test_what_is_opened_for_writing_alone_is_written_through(through, tmp_path):
    a, b = through
    data = pattern(SIZE, 13)
    (tmp_path / "source").write_bytes(data)
    subprocess.run(["cp", tmp_path / "source", a.path("f")], check=True)
    assert creates(a) == 1
    assert read_all(a.path("f")) == data
    eventually(b.path("f").exists, what="f on b")
    assert b.path("f").read_bytes() == data
    eventually(lambda: json.loads(run_p2pfs("info", "--json", a.path("f")).stdout)["sealed"], what="its digest")
    eventually(lambda: json.loads(run_p2pfs("info", "--json", b.path("f")).stdout)["sealed"], what="its digest on b")
    # what has not been digested yet is pulled all the same
    (tmp_path / "source").write_bytes(data[::-1])
    for k in range(5):
        subprocess.run(["cp", tmp_path / "source", a.path(f"again{k}")], check=True)
        eventually(b.path(f"again{k}").exists, what="it on b")
        assert b.path(f"again{k}").read_bytes() == data[::-1]
    assert creates(a) == 6


@pytest.mark.parametrize("size", [0, 1, 4096, 4 * MIB - 1, 4 * MIB, 9 * MIB + 5])
def test_written_through_in_any_order(through, size):
    a, b = through
    data = bytearray(size)
    file = os.open(a.path("f"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
    for seed, at in enumerate(range(size - 1, 0, -max(1, size // 7))):
        piece = pattern(min(70000, size - at), 20 + seed)
        assert os.pwrite(file, piece, at) == len(piece)
        data[at : at + len(piece)] = piece
        assert os.fstat(file).st_size == size
    os.ftruncate(file, size // 2)
    del data[size // 2 :]
    assert a.path("f").stat().st_size == size // 2
    assert read_all(a.path("f")) == data
    with open(a.path("f"), "ab") as more:  # a second writer, who appends
        more.write(b"the end")
    data += b"the end"
    os.fsync(file)
    os.posix_fallocate(file, 0, len(data) + 4000)
    data += bytes(4000)
    eventually(lambda: a.path("f").exists() and not b.path("f").exists(), what="only a knows it")
    os.close(file)
    assert creates(a) == 1
    assert read_all(a.path("f")) == data
    assert a.path("f").stat().st_mode & 0o777 == 0o640
    eventually(b.path("f").exists, what="f on b")
    assert b.path("f").read_bytes() == data
    with pytest.raises(PermissionError):
        os.open(a.path("f"), os.O_WRONLY)


def test_times_of_what_is_written_through(through):
    a, _ = through
    with open(a.path("f"), "wb", buffering=0) as file:
        begun = os.fstat(file.fileno()).st_mtime_ns
        time.sleep(0.02)
        file.write(pattern(5 * MIB, 40))
        assert os.fstat(file.fileno()).st_mtime_ns > begun
        os.utime(file.fileno(), ns=(10**18, 10**18))
        assert os.fstat(file.fileno()).st_mtime_ns == 10**18
    assert a.path("f").stat().st_mtime_ns == 10**18
    with open(a.path("g"), "wb", buffering=0) as file:
        os.utime(file.fileno(), ns=(10**18, 10**18))
        file.write(b"later")
    assert a.path("g").stat().st_mtime_ns > 10**18


def test_who_writes_through_and_is_killed_registers_nothing(through):
    a, b = through
    writer = subprocess.Popen(["sh", "-c", f"exec dd if=/dev/zero bs=1M count=8 of={a.path('f')} && kill -9 $$"])
    writer.wait()
    writer = subprocess.Popen(["dd", "if=/dev/zero", "bs=1M", f"of={a.path('g')}", "count=100000"])
    eventually(lambda: a.path("g").exists() and a.path("g").stat().st_size > 8 * MIB, what="some of it")
    writer.kill()
    writer.wait()
    eventually(lambda: not a.path("g").exists(), what="the name is gone")
    assert creates(a) == 2
    eventually(lambda: "g: not registered" in a.log)
    eventually(b.path("f").exists, what="f on b")
    assert not b.path("g").exists()


def test_readers_and_mappings_of_what_is_written_through(through):
    a, _ = through
    data = pattern(6 * MIB, 41)
    with open(a.path("f"), "wb", buffering=0) as file:
        file.write(data)
        with open(a.path("f"), "rb", buffering=0) as reader:
            kept = mapped(reader)
            assert kept[:] == data
            file.seek(100)
            file.write(b"changed")
            assert kept[100:107] == b"changed"
        with pytest.raises(OSError) as caught:  # could change the bytes for ever after
            os.open(a.path("f"), os.O_RDWR)
        assert caught.value.errno == errno.EBUSY
    data = data[:100] + b"changed" + data[107:]
    assert kept[:] == data
    assert read_all(a.path("f")) == data
    a.path("f").unlink()
    assert kept[:] == data
    kept.close()


def test_what_is_opened_to_be_mapped_is_written_by_way_of_the_daemon(through):
    a, b = through
    with open(a.path("f"), "w+b") as file:
        file.write(b"being written")
        file.flush()
        assert a.path("f").read_bytes() == b"being written"
        with open(a.path("f"), "r+b") as second, open(a.path("f"), "ab") as third:
            second.write(b"BEING")
            third.write(b" by three")
    assert (opens(a), creates(a)) == (0, 0)
    assert a.path("f").read_bytes() == b"BEING written by three"
    assert opens(a) == 1
    eventually(b.path("f").exists, what="f on b")


def test_a_descriptor_that_nobody_knew_of_cannot_part_the_nodes(through):
    """It is on its way through a socket when the file is closed, so that no process has it."""
    a, b = through
    data = pattern(6 * MIB, 42)
    here, there = socket.socketpair()
    file = os.open(a.path("f"), os.O_WRONLY | os.O_CREAT)
    os.write(file, data)
    socket.send_fds(here, [b"x"], [file])
    os.close(file)
    eventually(b.path("f").exists, what="it is registered")
    late = socket.recv_fds(there, 1, 1)[1][0]
    os.pwrite(late, b"late", 0)
    os.pwrite(late, b"late", 7 * MIB)
    os.close(late)
    eventually(lambda: json.loads(run_p2pfs("info", "--json", a.path("f")).stdout)["sealed"], what="its digest")
    assert "what was added is cut off" in a.log
    assert read_all(a.path("f")) == b"late" + data[4:]
    assert b.path("f").read_bytes() == b"late" + data[4:]
    here.close()
    there.close()


def test_a_full_cache_stops_who_writes_through(cluster):
    """Nothing of it is registered, though the room comes back before the writer's close."""
    node = cluster.node(cache_size="2G")
    if node.status()["io_path"] != "passthrough":
        pytest.skip("no FUSE passthrough here")
    written = 0
    piece = bytes(64 * MIB)
    file = os.open(node.path("f"), os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError) as caught:
        while written < 4 << 30:
            written += os.write(file, piece)
    assert caught.value.errno == errno.ENOSPC
    assert (2 << 30) <= written < (3 << 30)
    with pytest.raises(OSError) as caught:
        os.close(file)
    assert caught.value.errno == errno.ENOSPC
    assert not node.path("f").exists()
    assert "cache is full" in node.log


def test_who_writes_through_gets_the_room_of_what_others_hold_too(cluster, tmp_path):
    """And nothing of what only this node holds."""
    a, b = cluster.node(cache_size="2G"), cluster.node()
    if a.status()["io_path"] != "passthrough":
        pytest.skip("no FUSE passthrough here")
    a.path("own").write_bytes(own := pattern(64 * MIB, 22))
    (tmp_path / "others").write_bytes(others := 10 * pattern(60 * MIB, 23))
    b.path("others").symlink_to(tmp_path / "others")
    eventually(a.path("others").exists, what="others on a")
    pull(a, "others")
    assert os.getxattr(a.path("others"), "user.p2pfs.state") == b"complete"
    piece = pattern(64 * MIB, 24)
    with open(a.path("new"), "wb", buffering=0) as file:
        for _ in range(27):
            assert file.write(piece) == len(piece)
    assert creates(a) == 2
    assert os.getxattr(a.path("others"), "user.p2pfs.resident") != str(len(others)).encode()
    with open(a.path("new"), "rb", buffering=0) as file:
        for _ in range(27):
            assert file.read(len(piece)) == piece
        assert not file.read(1)
    assert read_all(a.path("own")) == own
    assert b.path("own").read_bytes() == own
    with open(a.path("others"), "rb", buffering=0) as file:
        with pytest.raises(OSError) as caught:
            os.pread(file.fileno(), MIB, 300 * MIB)
        assert caught.value.errno == errno.ENOSPC
        a.path("new").unlink()

        def arrives():
            return os.pread(file.fileno(), MIB, 300 * MIB) == others[300 * MIB : 301 * MIB]

        eventually(arrives, what="what there is room for again")


def test_it_can_be_turned_off(two):
    a, b = two
    b.env["P2PFS_NO_PASSTHROUGH"] = "1"
    b.restart()
    data = pattern(SIZE, 10)
    a.path("f").write_bytes(data)
    eventually(b.path("f").exists, what="f on b")
    pull(b, "f")
    assert b.path("f").read_bytes() == data
    status = b.status()
    assert (status["io_path"], status["passthrough_opens"]) == ("buffered", 0)
    assert "P2PFS_NO_PASSTHROUGH" in status["io_path_why"]


def overlaid(node, tmp_path, name):
    """Whether an overlayfs can have the mount as its lower layer."""
    upper, work, merged = (tmp_path / f"{name}-{part}" for part in ("upper", "work", "merged"))
    for directory in (upper, work, merged):
        directory.mkdir()
    layers = f"lowerdir={node.dir},upperdir={upper},workdir={work}"
    done = subprocess.run(
        ["mount", "-t", "overlay", "-o", layers, "overlay", merged], capture_output=True, check=False
    )
    if done.returncode == 0:
        subprocess.run(["umount", merged], check=True)
    return done.returncode == 0


def test_an_overlay_lies_over_a_mount_that_reads_buffered_alone(through, tmp_path):
    a, b = through
    b.env["P2PFS_NO_PASSTHROUGH"] = "1"
    b.restart()
    where = tmp_path / "tmpfs"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "overlay", where], check=True)
    try:
        if not overlaid(b, where, "buffered"):
            pytest.skip("no overlayfs here")
        assert not overlaid(a, where, "through")
    finally:
        subprocess.run(["umount", where], check=True)
