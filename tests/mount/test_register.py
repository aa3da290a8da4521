"""When a file becomes registered, and when it must not: the last close, killed writers, links to local files."""

# ctest: timeout=600

import errno
import mmap
import os
import signal
import subprocess
import sys
import time

import pytest
from harness.data import digest, pattern, write_file
from harness.wait import eventually

MIB = 1 << 20


def fails_with(number, action, *arguments, **more):
    with pytest.raises(OSError) as caught:
        action(*arguments, **more)
    assert caught.value.errno == number, caught.value


def seen(node, name, content=None):
    def there():
        path = node.path(name)
        return path.exists() and (content is None or path.read_bytes() == content)

    eventually(there, what=f"{name} on {node.name}")


def python(program, *arguments, **more):
    """A process of its own that runs the program; its stdin and stdout are pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **more,
    )


def ready(process):
    assert process.stdout.readline() == "ready\n"


def go(process):
    process.stdin.write("go\n")
    process.stdin.flush()


# -- the last close registers


def test_close_registers_before_it_returns(two):
    a, b = two
    for index in range(20):
        a.path(f"f{index}").write_bytes(b"x")
        assert a.xattr(f"f{index}", "state") == "complete"
    seen(b, "f19")


def test_a_duplicate_keeps_it_open(two):
    a, b = two
    fd = os.open(a.path("f"), os.O_CREAT | os.O_WRONLY)
    other = os.dup(fd)
    os.write(fd, b"one ")
    os.close(fd)
    assert a.xattr("f", "state") == "writing"
    os.write(other, b"two")
    os.close(other)
    assert a.xattr("f", "state") == "complete"
    seen(b, "f", b"one two")


def test_a_shell_group_writes_one_file(two, sh):
    a, b = two
    sh(f"(echo a; echo b | cat; sh -c 'echo c') > {a.path('f')}")
    assert a.xattr("f", "state") == "complete"
    seen(b, "f", b"a\nb\nc\n")
    sh(f"exec 3> {a.path('g')}; echo x >&3; (sleep 0.5; echo y >&3) & exec 3>&-; wait")
    eventually(lambda: a.xattr("g", "state") == "complete")
    seen(b, "g", b"x\ny\n")


def test_two_opens_for_writing(two):
    a, b = two
    one = os.open(a.path("f"), os.O_CREAT | os.O_WRONLY)
    two_ = os.open(a.path("f"), os.O_WRONLY)
    os.write(one, b"ab")
    os.close(one)
    assert a.xattr("f", "state") == "writing"
    os.pwrite(two_, b"B", 1)
    os.close(two_)
    seen(b, "f", b"aB")


def test_a_child_inherits_it(two):
    a, b = two
    fd = os.open(a.path("f"), os.O_CREAT | os.O_WRONLY)
    child = python("import sys, os; sys.stdin.readline(); os.write(int(sys.argv[1]), b'child')", fd, pass_fds=[fd])
    os.write(fd, b"parent ")
    os.close(fd)
    assert a.xattr("f", "state") == "writing"
    go(child)
    assert child.wait() == 0
    eventually(lambda: a.xattr("f", "state") == "complete")
    seen(b, "f", b"parent child")


def test_a_mapping_that_outlives_the_descriptor(two):
    a, b = two
    fd = os.open(a.path("f"), os.O_CREAT | os.O_RDWR)
    os.ftruncate(fd, MIB)
    mapped = mmap.mmap(fd, MIB)  # keeps a duplicate
    mapped[0:5] = b"first"
    os.close(fd)
    assert a.xattr("f", "state") == "writing"
    mapped[MIB - 4 :] = b"last"
    mapped.close()
    eventually(lambda: a.xattr("f", "state") == "complete")
    seen(b, "f", b"first" + bytes(MIB - 9) + b"last")


def test_numpy_memmap(two):
    numpy = pytest.importorskip("numpy")
    a, b = two
    array = numpy.memmap(a.path("f"), dtype="float32", mode="w+", shape=(1000, 300))
    array[:] = numpy.arange(300_000, dtype="float32").reshape(1000, 300)
    array.flush()
    del array
    eventually(lambda: a.xattr("f", "state") == "complete")
    seen(b, "f")
    there = numpy.memmap(b.path("f"), dtype="float32", mode="r", shape=(1000, 300))
    assert float(there[999, 299]) == 299_999


# -- what must not be registered


def dropped(a, b, name):
    eventually(lambda: not a.path(name).exists(), what=f"{name} is gone")
    time.sleep(0.3)
    assert not b.path(name).exists()
    assert name in a.log and "not registered" in a.log


WRITER = """
import os, sys, time
fd = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
os.write(fd, b"half")
print("ready", flush=True)
sys.stdin.readline()
os._exit(3)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_writer_registers_nothing(two, number):
    a, b = two
    writer = python(WRITER, a.path("f"))
    ready(writer)
    assert a.path("f").read_bytes() == b"half"
    writer.send_signal(number)
    writer.wait()
    dropped(a, b, "f")
    a.path("f").write_bytes(b"whole")  # the name is free
    seen(b, "f", b"whole")


def test_a_writer_that_fails_registers_nothing(two):
    a, b = two
    writer = python(WRITER, a.path("f"))
    ready(writer)
    go(writer)
    assert writer.wait() == 3
    dropped(a, b, "f")


def test_cp_killed_in_the_middle(two):
    a, b = two
    os.mkfifo(a.path("..", "fifo"))
    copy = subprocess.Popen(["cp", "--copy-contents", a.path("..", "fifo"), a.path("f")])
    with open(a.path("..", "fifo"), "wb") as source:
        source.write(bytes(3 * MIB))
        eventually(lambda: a.path("f").stat().st_size > MIB)
        copy.kill()
        copy.wait()
    dropped(a, b, "f")


def test_a_normal_exit_without_close_registers(two):
    a, b = two
    program = WRITER.replace("os._exit(3)", "os._exit(0)")
    writer = python(program, a.path("f"))
    ready(writer)
    go(writer)
    assert writer.wait() == 0
    seen(b, "f", b"half")


def test_a_file_that_does_not_fit_registers_nothing(cluster):
    a = cluster.node(cache_size="16M")
    b = cluster.node()
    with pytest.raises(OSError) as caught:
        with open(a.path("f"), "wb", buffering=0) as out:
            for _ in range(32):
                out.write(bytes(MIB))
    assert caught.value.errno == errno.ENOSPC
    eventually(lambda: not a.path("f").exists())
    assert not b.path("f").exists()
    # the room comes back with the release, for which nobody waits
    eventually(lambda: a.path("small").write_bytes(bytes(MIB)))
    seen(b, "small")


# -- ln -s: in place


def test_a_link_to_a_file_registers_it_where_it_lies(two, tmp_path):
    a, b = two
    source = write_file(tmp_path / "model", 9 * MIB + 5)
    os.chmod(source, 0o640)
    os.utime(source, (1_000_000_000, 1_000_000_000))
    os.symlink(source, a.path("model"))
    assert a.path("model").is_file() and not a.path("model").is_symlink()
    assert a.xattr("model", "state") == "inplace"
    assert a.path("model").stat().st_mode & 0o7777 == 0o640
    assert a.path("model").stat().st_mtime == 1_000_000_000
    seen(b, "model")
    assert digest(b.path("model")) == digest(source)
    assert digest(a.path("model")) == digest(source)
    assert a.status()  # and the mount lives


def test_ln_from_the_shell_and_a_tree(two, tmp_path, sh):
    a, b = two
    tree = tmp_path / "tree"
    os.makedirs(tree / "sub/deep")
    for name in ("one", "sub/two", "sub/deep/three"):
        (tree / name).write_text(name)
    os.symlink("sub/two", tree / "tag")
    os.symlink(tree / "one", tree / "absolute")
    os.mkfifo(tree / "fifo")
    sh(f"ln -s {tree} {a.path('tree')}")
    assert a.path("tree").is_dir() and not a.path("tree").is_symlink()
    seen(b, "tree/sub/deep/three", b"sub/deep/three")
    eventually(lambda: len(os.listdir(b.path("tree"))) == 4)
    assert os.readlink(b.path("tree/tag")) == "sub/two"
    assert b.path("tree/absolute").read_text() == "one" and not b.path("tree/absolute").is_symlink()
    assert sorted(os.listdir(b.path("tree"))) == ["absolute", "one", "sub", "tag"]
    sh(f"ln -sf {tree}/one {a.path('name')}")
    assert a.path("name").read_text() == "one"


def test_a_tree_in_place_costs_no_descriptor_when_its_readers_have_left(two, tmp_path):
    a, b = two
    tree = tmp_path / "tree"
    tree.mkdir()
    for index in range(100):
        (tree / str(index)).write_bytes(pattern(5000 + index, index))
    before = len(os.listdir(f"/proc/{a.pid}/fd"))
    os.symlink(tree, a.path("tree"))
    eventually(lambda: len(os.listdir(b.path("tree"))) == 100)
    b.cli("pull", "tree")
    for index in range(100):
        assert b.path(f"tree/{index}").read_bytes() == pattern(5000 + index, index)
    eventually(lambda: len(os.listdir(f"/proc/{a.pid}/fd")) < before + 10, what="the files closed")


def test_links_that_cannot_be_registered(node, tmp_path):
    fails_with(errno.ENOENT, os.symlink, tmp_path / "missing", node.path("f"))
    os.mkfifo(tmp_path / "fifo")
    fails_with(errno.EINVAL, os.symlink, tmp_path / "fifo", node.path("f"))
    fails_with(errno.EINVAL, os.symlink, "/dev/null", node.path("f"))
    node.path("inside").write_text("x")
    fails_with(errno.EINVAL, os.symlink, node.path("inside"), node.path("f"))
    os.symlink(node.path("inside"), tmp_path / "back")
    fails_with(errno.EINVAL, os.symlink, tmp_path / "back", node.path("f"))
    assert "use a relative target" in node.log
    (tmp_path / "x").write_text("x")
    fails_with(errno.EEXIST, os.symlink, tmp_path / "x", node.path("inside"))
    assert os.listdir(node.dir) == ["inside"]


def test_a_user_registers_only_what_he_may_read(cluster):
    node = cluster.node(allow_other=True, start=False)
    os.chmod(node.dir, 0o777)
    for parent in node.dir.parents:
        if parent != parent.parent and not parent.stat().st_mode & 0o001:
            os.chmod(parent, 0o711)
    node.start()
    for name, mode in (("open", 0o644), ("closed", 0o600), ("group", 0o640)):
        (cluster.home / name).write_text(name)
        os.chmod(cluster.home / name, mode)
    os.chown(cluster.home / "group", 0, 4321)

    def link(name, groups=()):
        return subprocess.run(["ln", "-s", cluster.home / name, node.path(name)], user=65534, group=65534,
                              extra_groups=groups, capture_output=True, text=True, cwd="/", check=False)

    assert "Permission denied" in link("closed").stderr
    assert link("open").returncode == 0
    assert "Permission denied" in link("group").stderr
    assert link("group", groups=[4321]).returncode == 0
    assert sorted(os.listdir(node.dir)) == ["group", "open"]


@pytest.mark.parametrize("harm", ["changed", "shrunk", "gone"])
def test_a_source_that_changes_is_never_read_wrong(two, tmp_path, harm):
    a, b = two
    source = write_file(tmp_path / "model", 8 * MIB)
    os.symlink(source, a.path("f"))
    seen(b, "f")
    if harm == "changed":
        with open(source, "r+b") as out:
            out.seek(5 * MIB)
            out.write(b"changed")
    elif harm == "shrunk":
        os.truncate(source, MIB)
    else:
        source.unlink()
    for node in (a, b):
        fails_with(errno.EIO, node.path("f").read_bytes)
    assert "f" in a.log
    a.path("other").write_text("the mount lives")
    seen(b, "other", b"the mount lives")
    os.unlink(a.path("f"))


def test_an_empty_file_in_place(two, tmp_path):
    a, b = two
    (tmp_path / "empty").touch()
    os.symlink(tmp_path / "empty", a.path("empty"))
    seen(b, "empty", b"")


# -- rm unregisters


def test_rm_unregisters_everywhere(two, sh):
    a, b = two
    os.makedirs(a.path("d/e"))
    for index in range(10):
        a.path(f"d/e/{index}").write_bytes(pattern(MIB, index))
    seen(b, "d/e/9", pattern(MIB, 9))
    sh(f"rm -r {b.path('d')}")
    eventually(lambda: not a.path("d").exists())
    eventually(lambda: os.statvfs(a.dir).f_blocks == 0, what="the bytes are dropped")


def test_what_is_being_written_when_the_mount_ends(cluster):
    a = cluster.node()
    out = open(a.path("f"), "wb", buffering=0)
    out.write(b"half")
    a.stop()
    assert "f: not registered: the mount ended" in a.log
    with pytest.raises(OSError):
        out.close()
    a.start()
    assert os.listdir(a.dir) == []
