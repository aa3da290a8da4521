"""What a name, an open file and a version mean, on one mount and between two."""

# ctest: timeout=600

import ctypes
import errno
import mmap
import os
import signal
import stat
import subprocess
import threading
import time

import pytest
from harness.data import digest, pattern, write_file
from harness.wait import eventually

KIB, MIB = 1 << 10, 1 << 20
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


def renameat2(old, new, flags):
    if _libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def fails_with(number, action, *arguments, **more):
    with pytest.raises(OSError) as caught:
        action(*arguments, **more)
    assert caught.value.errno == number, caught.value


def seen(node, name, content=None):
    """The other node's change is there within a second."""

    def there():
        path = node.path(name)
        return path.exists() and (content is None or path.read_bytes() == content)

    eventually(there, what=f"{name} on {node.name}")


# -- names


def test_directories_come_and_go(two):
    a, b = two
    os.makedirs(a.path("x/y/z"))
    seen(b, "x/y/z")
    fails_with(errno.ENOTEMPTY, os.rmdir, a.path("x/y"))
    fails_with(errno.EEXIST, os.mkdir, a.path("x"))
    fails_with(errno.ENOENT, os.mkdir, a.path("no/where"))
    os.rmdir(b.path("x/y/z"))
    eventually(lambda: not a.path("x/y/z").exists())
    fails_with(errno.ENOTDIR, os.rmdir, a.path(".p2pfs/status.json"))


def test_names_are_bytes_and_their_lengths_are_limited(two):
    a, b = two
    longest = "n" * 255
    a.path(longest).write_text("x")
    fails_with(errno.ENAMETOOLONG, a.path("n" * 256).write_text, "x")
    odd = os.fsencode(a.dir) + b"/\xff\xfe \n\x01%2f"
    with open(odd, "wb") as out:
        out.write(b"odd")
    assert os.path.basename(odd) in os.listdir(os.fsencode(a.dir))
    other = os.fsencode(b.dir) + b"/\xff\xfe \n\x01%2f"
    eventually(lambda: os.path.exists(other))
    with open(other, "rb") as source:
        assert source.read() == b"odd"
    seen(b, longest)


def test_the_hidden_directory_is_reachable_but_not_listed(node):
    assert ".p2pfs" not in os.listdir(node.dir)
    assert set(os.listdir(node.path(".p2pfs"))) >= {"status.json", "peers.json", "metrics", "log"}
    assert node.status()
    fails_with(errno.EPERM, os.mkdir, node.path(".p2pfs/x"))
    fails_with(errno.EPERM, os.rmdir, node.path(".p2pfs"))
    fails_with(errno.EPERM, os.rename, node.path(".p2pfs"), node.path("p"))
    fails_with(errno.EPERM, node.path(".p2pfs/new").write_text, "x")
    node.path("f").write_text("x")
    fails_with(errno.EPERM, os.rename, node.path("f"), node.path(".p2pfs/f"))


def test_a_renamed_tree_moves_as_a_whole(two):
    a, b = two
    os.makedirs(a.path("step.tmp/sub"))
    for index in range(20):
        a.path(f"step.tmp/sub/{index}").write_text(str(index))
    stop, wrong = threading.Event(), []

    def watch():
        while not stop.is_set():
            try:
                names = os.listdir(b.path("step/sub"))
            except FileNotFoundError:
                continue
            if len(names) != 20:
                wrong.append(names)

    watcher = threading.Thread(target=watch)
    watcher.start()
    os.rename(a.path("step.tmp"), a.path("step"))
    eventually(lambda: b.path("step/sub/19").exists())
    stop.set()
    watcher.join()
    assert not wrong
    assert b.path("step/sub/7").read_text() == "7"
    fails_with(errno.EINVAL, os.rename, a.path("step"), a.path("step/sub/inside"))


def test_rename_flags(cluster):
    node, strict = cluster.node(allow_overwrite=True), cluster.node()
    for name in "ab":
        os.mkdir(node.path(name))
        node.path(name, "f").write_text(name)
    fails_with(errno.EEXIST, renameat2, node.path("a/f"), node.path("b/f"), RENAME_NOREPLACE)
    renameat2(node.path("a/f"), node.path("b/f"), RENAME_EXCHANGE)
    seen(strict, "a/f", b"b")
    fails_with(errno.EPERM, renameat2, strict.path("a/f"), strict.path("b/f"), RENAME_EXCHANGE)
    renameat2(strict.path("a"), strict.path("b"), RENAME_EXCHANGE)
    seen(node, "a/f", b"a")
    renameat2(node.path("a"), node.path("c"), RENAME_NOREPLACE)
    assert sorted(os.listdir(node.dir)) == ["b", "c"]


def test_hard_links_are_names_of_one_version(two):
    a, b = two
    a.path("f").write_text("content")
    os.link(a.path("f"), a.path("g"))
    seen(b, "g", b"content")
    os.unlink(a.path("f"))
    assert a.path("g").read_text() == "content"
    assert a.xattr("g", "state") == "complete"


def test_what_is_no_file_is_refused(node):
    fails_with(errno.EPERM, os.mkfifo, node.path("fifo"))
    fails_with(errno.EPERM, os.mknod, node.path("null"), stat.S_IFCHR, os.makedev(1, 3))
    os.mknod(node.path("empty"), stat.S_IFREG | 0o640)
    assert node.path("empty").stat().st_size == 0
    assert stat.S_IMODE(node.path("empty").stat().st_mode) == 0o640 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


# -- writing


def test_written_in_any_order_and_seen_by_others_when_closed(two):
    a, b = two
    data = pattern(3 * MIB + 17)
    with open(a.path("f"), "wb", buffering=0) as out:
        for at in (2 * MIB, 0, MIB, 3 * MIB):
            out.seek(at)
            out.write(data[at : at + MIB])
        assert os.fstat(out.fileno()).st_size == len(data)
        assert a.path("f").read_bytes() == data  # on this node, while it is written
        assert a.xattr("f", "state") == "writing"
        time.sleep(1.2)
        assert not b.path("f").exists()
    seen(b, "f", data)
    assert a.path("f").read_bytes() == data
    assert a.xattr("f", "state") == "complete"
    assert a.xattr("f", "version") == b.xattr("f", "version")


def test_holes_read_as_zeros_and_truncation_works_while_writing(two):
    a, b = two
    with open(a.path("f"), "wb") as out:
        out.seek(5 * MIB)
        out.write(b"end")
        out.flush()
        os.ftruncate(out.fileno(), 5 * MIB + 1)
        os.truncate(a.path("f"), 4 * MIB)
        os.posix_fallocate(out.fileno(), 0, 4 * MIB + 10)
    seen(b, "f", bytes(4 * MIB + 10))


def test_a_registered_file_is_immutable(node):
    path = node.path("f")
    path.write_bytes(b"first")
    for mode in ("r+b", "ab", "wb"):
        fails_with(errno.EPERM, open, path, mode)
    fails_with(errno.EPERM, os.truncate, path, 0)
    fails_with(errno.EEXIST, open, path, "xb")
    assert path.read_bytes() == b"first"
    node.path("g").write_bytes(b"second")
    fails_with(errno.EPERM, os.rename, node.path("g"), path)
    assert path.read_bytes() == b"first"


def test_empty_files(two):
    a, b = two
    a.path("empty").touch()
    seen(b, "empty", b"")
    subprocess.run(["touch", "-d", "2001-02-03", a.path("old")], check=True)
    seen(b, "old", b"")
    assert time.gmtime(b.path("old").stat().st_mtime).tm_year == 2001


def test_exactly_one_of_many_creates_wins(node):
    wins = []

    def create():
        try:
            os.close(os.open(node.path("one"), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            wins.append(1)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=create) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1


def test_two_nodes_write_one_name_and_the_second_close_fails(two):
    a, b = two
    first, second = open(a.path("f"), "wb"), open(b.path("f"), "wb")
    first.write(b"first")
    second.write(b"second")
    first.close()
    fails_with(errno.EEXIST, second.close)
    seen(b, "f", b"first")
    assert a.path("f").read_bytes() == b"first"
    assert "not registered" in b.log


def test_a_draft_can_be_renamed_linked_to_and_removed(two):
    a, b = two
    os.mkdir(a.path("d"))
    with open(a.path("d/tmp"), "wb") as out:
        out.write(b"x")
        out.flush()
        fails_with(errno.ENOTEMPTY, os.rmdir, a.path("d"))
        fails_with(errno.EPERM, os.link, a.path("d/tmp"), a.path("other"))
        os.rename(a.path("d/tmp"), a.path("d/name"))
        os.rename(a.path("d"), a.path("e"))
        assert os.listdir(a.path("e")) == ["name"]
        out.write(b"y")
    seen(b, "e/name", b"xy")
    with open(a.path("gone"), "wb") as out:
        out.write(b"x")
        os.unlink(a.path("gone"))
        assert os.fstat(out.fileno()).st_nlink == 0
        out.write(b"y")
    assert not a.path("gone").exists()
    time.sleep(0.3)
    assert not b.path("gone").exists()


# -- versions


def test_overwriting_where_it_is_allowed(cluster):
    a, b = cluster.nodes(2, allow_overwrite=True)
    a.path("f").write_bytes(b"one")
    seen(b, "f", b"one")
    old_a, old_b = open(a.path("f"), "rb"), open(b.path("f"), "rb")
    first = a.xattr("f", "version")
    a.path("f").write_bytes(b"second")  # O_TRUNC
    seen(b, "f", b"second")
    assert a.path("f").read_bytes() == b"second"
    assert a.xattr("f", "version") != first
    with old_a, old_b:  # an open file keeps its version
        assert (old_a.read(), old_b.read()) == (b"one", b"one")
    b.path("g").write_bytes(b"third")
    os.rename(b.path("g"), b.path("f"))
    seen(a, "f", b"third")
    fails_with(errno.EPERM, open, a.path("f"), "r+b")
    fails_with(errno.EPERM, open, a.path("f"), "ab")


def test_an_open_file_outlives_its_name(two):
    a, b = two
    data = pattern(4 * MIB)
    a.path("f").write_bytes(data)
    seen(b, "f")
    with open(b.path("f"), "rb") as source:
        assert source.read(10) == data[:10]
        assert b.path("f").read_bytes() == data
        os.unlink(a.path("f"))
        eventually(lambda: not b.path("f").exists())
        eventually(lambda: os.fstat(source.fileno()).st_nlink == 0)
        source.seek(0)
        assert source.read() == data
    fails_with(errno.ENOENT, open, b.path("f"), "rb")


# -- reading


@pytest.fixture
def pulled(two):
    """A file registered on the first node, to be read from the second."""
    a, b = two
    write_file(a.path("f"), 24 * MIB + 4321, seed=3)
    seen(b, "f")
    return a.path("f"), b.path("f")


def test_read_in_pieces_from_the_end(pulled):
    here, there = pulled
    data = here.read_bytes()
    with open(there, "rb", buffering=0) as source:
        for at in range(len(data) - 100, 0, -(3 * MIB + 7)):
            assert os.pread(source.fileno(), 100, at) == data[at : at + 100]
        assert os.pread(source.fileno(), 100, len(data)) == b""
    assert digest(there) == digest(here)


@pytest.mark.parametrize("flags", [mmap.MAP_SHARED, mmap.MAP_PRIVATE])
def test_mmap(pulled, flags):
    here, there = pulled
    with open(there, "rb") as source:
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if flags == mmap.MAP_PRIVATE else 0)
        with mmap.mmap(source.fileno(), 0, flags=flags, prot=prot) as mapped:
            assert bytes(mapped) == here.read_bytes()
            if flags == mmap.MAP_PRIVATE:
                mapped[0:4] = b"mine"
                assert mapped[:4] == b"mine"
    assert there.read_bytes() == here.read_bytes()


def test_sendfile_splice_and_direct_io(pulled, tmp_path):
    here, there = pulled
    data = here.read_bytes()
    with open(there, "rb") as source, open(tmp_path / "copy", "wb") as out:
        at = 0
        while sent := os.sendfile(out.fileno(), source.fileno(), at, 8 * MIB):
            at += sent
    assert (tmp_path / "copy").read_bytes() == data
    reader, writer = os.pipe()
    with open(there, "rb") as source:
        assert os.splice(source.fileno(), writer, 4096, offset_src=MIB) == 4096
    assert os.read(reader, 4096) == data[MIB : MIB + 4096]
    os.close(reader)
    os.close(writer)
    direct = os.open(there, os.O_RDONLY | os.O_DIRECT)
    room = mmap.mmap(-1, MIB)
    assert os.preadv(direct, [room], 2 * MIB) == MIB
    assert room[:] == data[2 * MIB : 3 * MIB]
    os.close(direct)


def test_a_waiting_reader_dies_at_once(two):
    a, b = two
    write_file(a.path("f"), 8 * MIB)
    seen(b, "f")
    a.pause()
    readers = [subprocess.Popen(["cat", b.path("f")], stdout=subprocess.DEVNULL) for _ in range(8)]
    try:
        time.sleep(0.7)
        assert all(reader.poll() is None for reader in readers)
        assert len(os.listdir(b.dir)) == 1  # others are not held up
        for reader, number in zip(readers, [signal.SIGINT, signal.SIGKILL] * 4):
            reader.send_signal(number)
        for reader in readers:
            reader.wait()
    finally:
        for reader in readers:
            reader.kill()
        a.resume()
    assert digest(b.path("f")) == digest(a.path("f"))


def test_no_holder_is_eio_within_the_timeout_and_works_when_one_returns(cluster):
    a = cluster.node()
    b = cluster.node(read_timeout=2)
    source = write_file(cluster.home / "source", 4 * MIB)
    os.symlink(source, a.path("f"))
    seen(b, "f")
    a.kill9()
    fails_with(errno.EIO, b.path("f").read_bytes)
    assert "f" in b.log
    a.start()
    eventually(lambda: b.path("f").read_bytes() == source.read_bytes())


# -- attributes


def test_modes_owners_and_times_are_kept_and_seen_by_all(two):
    a, b = two
    path = a.path("f")
    path.write_text("x")
    os.chmod(path, 0o4751)
    os.chown(path, 123, 456)
    os.utime(path, ns=(1, 1_234_567_890_123_456_789))
    mode = 0o751  # a change of owner takes the setuid bit
    there = b.path("f")

    def same():
        st = there.stat()
        return (stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid, st.st_mtime_ns) == (
            mode,
            123,
            456,
            1_234_567_890_123_456_789,
        )

    eventually(same)
    assert path.stat().st_ino == there.stat().st_ino
    os.mkdir(a.path("d"), 0o700)
    os.chmod(a.path("d"), 0o2775)
    os.chown(a.path("d"), 0, 789)
    a.path("d/f").write_text("x")
    os.mkdir(a.path("d/sub"))
    assert a.path("d/f").stat().st_gid == 789
    assert a.path("d/sub").stat().st_gid == 789
    assert a.path("d/sub").stat().st_mode & stat.S_ISGID


def test_the_root_is_what_the_directory_was(cluster):
    one = cluster.node(start=False)
    os.chmod(one.dir, 0o1771)
    os.chown(one.dir, 11, 22)
    one.start()
    st = one.dir.stat()
    assert (stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid) == (0o1771, 11, 22)
    assert st.st_ino == 1


def test_permissions_hold(cluster):
    node = cluster.node(allow_other=True)
    os.chmod(node.dir, 0o755)
    for parent in node.dir.parents:
        if parent != parent.parent and stat.S_IMODE(parent.stat().st_mode) == 0o700:
            os.chmod(parent, 0o711)
    node.path("secret").write_text("x")
    os.chmod(node.path("secret"), 0o600)

    def as_nobody(line):
        return subprocess.run(["/bin/sh", "-c", line], user=65534, group=65534, extra_groups=[],
                              capture_output=True, text=True, cwd="/", check=False)

    assert "Permission denied" in as_nobody(f"cat {node.path('secret')}").stderr
    assert "Permission denied" in as_nobody(f"echo > {node.path('new')}").stderr
    assert as_nobody(f"rm -f {node.path('secret')}").returncode != 0
    assert node.path("secret").read_text() == "x"


def test_extended_attributes(node):
    node.path("f").write_bytes(pattern(3 * MIB))
    names = os.listxattr(node.path("f"))
    assert {name.removeprefix("user.p2pfs.") for name in names} == {
        "version", "digest", "shard_size", "shards", "resident", "replicas", "sources", "state",
        "transport", "pinned",
    }
    eventually(lambda: not node.xattr("f", "digest").endswith(":"))
    values = {name: node.xattr("f", name.removeprefix("user.p2pfs.")) for name in names}
    assert len(values["user.p2pfs.version"]) == 32
    assert values["user.p2pfs.digest"].startswith("xxh3:") and len(values["user.p2pfs.digest"]) == 37
    assert values["user.p2pfs.shard_size"] == str(MIB)
    assert values["user.p2pfs.shards"] == "3"
    assert values["user.p2pfs.resident"] == str(3 * MIB)
    assert values["user.p2pfs.replicas"] == "1"
    assert values["user.p2pfs.pinned"] == "0"
    os.setxattr(node.path("f"), "user.p2pfs.pinned", b"1")
    assert node.xattr("f", "pinned") == "1"
    fails_with(errno.EINVAL, os.setxattr, node.path("f"), "user.p2pfs.pinned", b"maybe")
    fails_with(errno.EPERM, os.setxattr, node.path("f"), "user.p2pfs.state", b"x")
    fails_with(errno.EOPNOTSUPP, os.setxattr, node.path("f"), "user.other", b"x")
    fails_with(errno.ENODATA, os.getxattr, node.path("f"), "user.other")
    assert os.listxattr(node.dir) == []


def test_df_shows_registered_and_resident(two):
    a, b = two
    a.path("f").write_bytes(bytes(4 * MIB))
    seen(b, "f")
    here, there = os.statvfs(a.dir), os.statvfs(b.dir)
    assert here.f_blocks * here.f_frsize == 4 * MIB
    assert here.f_bfree == 0
    assert there.f_blocks * there.f_frsize == 4 * MIB
    assert (there.f_blocks - there.f_bfree) * there.f_frsize == 0
    assert here.f_namemax == 255


# -- directories while they change


def test_listing_is_true_under_concurrent_change(node):
    os.mkdir(node.path("d"))
    stay = {f"stay{index:04d}" for index in range(600)}
    for name in stay:
        os.mkdir(node.path("d", name))
    stop = threading.Event()

    def churn():
        turn = 0
        while not stop.is_set():
            os.mkdir(node.path("d", f"churn{turn}"))
            os.rmdir(node.path("d", f"churn{turn}"))
            turn += 1

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(20):
            names = os.listdir(node.path("d"))
            assert len(names) == len(set(names))
            assert stay <= set(names)
    finally:
        stop.set()
        thread.join()


def test_a_tree_that_replaces_another_is_never_seen_empty(two):
    a, b = two
    for name in ("one", "two"):
        os.mkdir(a.path(name))
        a.path(name, "f").write_text(name)
    seen(b, "two/f")
    stop, wrong = threading.Event(), []

    def watch():
        while not stop.is_set():
            try:
                if os.listdir(b.path("one")) != ["f"] or b.path("one/f").read_text() not in ("one", "two"):
                    wrong.append("half")
            except OSError as error:
                wrong.append(str(error))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(30):
        renameat2(a.path("one"), a.path("two"), RENAME_EXCHANGE)
        time.sleep(0.04)
    stop.set()
    watcher.join()
    assert not wrong


def test_removing_while_listing(node):
    os.mkdir(node.path("d"))
    for index in range(500):
        os.mkdir(node.path("d", str(index)))
    with os.scandir(node.path("d")) as entries:
        for entry in entries:
            os.rmdir(entry.path)
    os.rmdir(node.path("d"))


# -- relative links


def test_tags_flip_atomically(two, sh):
    a, b = two
    for step in ("1000", "2000"):
        os.mkdir(a.path(f"step-{step}"))
        a.path(f"step-{step}/w").write_text(step)
    sh(f"cd {a.dir} && ln -s step-1000 latest")
    seen(b, "latest/w", b"1000")
    assert os.readlink(b.path("latest")) == "step-1000"
    sh(f"cd {a.dir} && ln -sfn step-2000 latest")
    eventually(lambda: b.path("latest/w").read_text() == "2000")
    sh(f"cd {a.dir} && ln -s step-1000 new && mv -T new latest")
    eventually(lambda: b.path("latest/w").read_text() == "1000")
    stop, wrong = threading.Event(), []

    def watch(node):
        while not stop.is_set():
            try:
                value = node.path("latest/w").read_text()
                assert value in ("1000", "2000"), value
                assert os.listdir(node.path("latest")) == ["w"]
            except (OSError, AssertionError) as error:
                wrong.append(f"{node.name}: {error}")

    watchers = [threading.Thread(target=watch, args=(node,)) for node in two]
    for watcher in watchers:
        watcher.start()
    for turn in range(40):
        os.symlink(f"step-{1 + turn % 2}000", a.path("next"))
        os.rename(a.path("next"), a.path("latest"))
        time.sleep(0.05)
    stop.set()
    for watcher in watchers:
        watcher.join()
    assert not wrong
    sh(f"cd {a.dir} && ln -s ../elsewhere/x dangling")
    assert os.readlink(a.path("dangling")) == "../elsewhere/x"
