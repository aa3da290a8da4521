"""The tools that people use, on a mount; and mounting itself, well and badly."""

# ctest: timeout=600

import filecmp
import os
import signal
import socket
import stat
import subprocess
import sys
import time

import pytest
from harness import fuse
from harness.data import digest, write_file
from harness.env import BINARY
from harness.node import MountFailed, run_p2pfs
from harness.wait import eventually

MIB = 1 << 20


@pytest.fixture
def checkpoint(tmp_path):
    """A small tree with what checkpoints have: large and small files, modes, times, a tag."""
    tree = tmp_path / "ckpt"
    os.makedirs(tree / "shards/empty dir")
    write_file(tree / "shards/model-1", 9 * MIB + 1, seed=1)
    write_file(tree / "shards/model 2", 3 * MIB, seed=2)
    (tree / "config.json").write_text('{"a": 1}\n')
    (tree / "empty").touch()
    (tree / "run.sh").write_text("#!/bin/sh\necho ran\n")
    os.chmod(tree / "run.sh", 0o755)
    os.chmod(tree / "config.json", 0o640)
    os.chown(tree / "config.json", 12, 34)
    os.symlink("shards/model-1", tree / "latest")
    os.link(tree / "empty", tree / "also-empty")
    for name in ("shards/model-1", "config.json", "shards"):
        os.utime(tree / name, (1_111_111_111, 1_222_222_222))
    return tree


def listing(tree):
    """What there is: kinds, modes, owners, sizes, whole seconds."""
    found = {}
    for directory, subdirectories, files in os.walk(tree):
        for name in subdirectories + files:
            path = os.path.join(directory, name)
            st = os.lstat(path)
            link = os.readlink(path) if stat.S_ISLNK(st.st_mode) else None
            size = st.st_size if stat.S_ISREG(st.st_mode) else 0
            mtime = int(st.st_mtime) if stat.S_ISREG(st.st_mode) else 0
            mode = 0 if link else st.st_mode
            found[os.path.relpath(path, tree)] = (mode, st.st_uid, st.st_gid, size, mtime, link)
    return found


def same_bytes(one, other):
    for name, (_, _, _, _, _, link) in listing(one).items():
        if link is None and os.path.isfile(os.path.join(one, name)):
            assert filecmp.cmp(os.path.join(one, name), os.path.join(other, name), shallow=False), name


TOOLS = {
    "cp -a": "cp -a {source} {to}",
    "cp -r --preserve": "cp -r --preserve=all {source} {to}",
    "rsync -a": "rsync -a {source}/ {to}/",
    "rsync -aHX --inplace": "rsync -aH --inplace {source}/ {to}/",
    "tar": "mkdir {to} && tar -C {source} -cf - . | tar -C {to} -xpf -",
    "cpio": "mkdir {to} && cd {source} && find . -print0 | cpio -0pdm --quiet {to}",
}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tree_is_copied_in_with_modes_owners_and_times(two, checkpoint, sh, tool):
    a, b = two
    if sh(f"command -v {tool.split()[0]}", check=False).returncode != 0:
        pytest.skip(f"{tool.split()[0]} is not installed")
    done = sh(TOOLS[tool].format(source=checkpoint, to=a.path("copy")))
    assert done.stderr == ""
    expected = listing(checkpoint)
    assert listing(a.path("copy")) == expected
    eventually(lambda: listing(b.path("copy")) == expected)
    same_bytes(checkpoint, b.path("copy"))
    assert sh(str(b.path("copy/run.sh"))).stdout == "ran\n"


def test_rsync_twice_changes_nothing(node, checkpoint, sh):
    sh(f"rsync -a {checkpoint}/ {node.path('copy')}/")
    before = node.xattr("copy/config.json", "version")
    again = sh(f"rsync -ai {checkpoint}/ {node.path('copy')}/").stdout
    assert [line for line in again.splitlines() if not line.startswith(".d")] == []
    assert node.xattr("copy/config.json", "version") == before


def test_a_tree_is_copied_out(two, checkpoint, tmp_path, sh):
    a, b = two
    sh(f"cp -a {checkpoint} {a.path('ckpt')}")
    eventually(lambda: listing(b.path("ckpt")) == listing(checkpoint))
    sh(f"rsync -a {b.path('ckpt')}/ {tmp_path}/out/")
    sh(f"tar -C {b.dir} -cf {tmp_path}/out.tar ckpt")
    sh(f"mkdir {tmp_path}/untar && tar -C {tmp_path}/untar -xpf {tmp_path}/out.tar")
    for out in (tmp_path / "out", tmp_path / "untar/ckpt"):
        assert listing(out) == listing(checkpoint)
        same_bytes(checkpoint, out)


def test_mv_in_and_out(two, checkpoint, tmp_path, sh):
    a, b = two
    expected = listing(checkpoint)
    sh(f"cp -a {checkpoint} {tmp_path}/second && mv {tmp_path}/second {a.path('moved')}")
    eventually(lambda: listing(b.path("moved")) == expected)
    assert not (tmp_path / "second").exists()
    sh(f"mv {b.path('moved')} {b.path('again')}")
    eventually(lambda: a.path("again").exists() and not a.path("moved").exists())
    same_bytes(checkpoint, a.path("again"))


def test_copies_inside_the_mount(node, checkpoint, sh):
    sh(f"cp -a {checkpoint} {node.path('one')}")
    sh(f"cp -r {node.path('one')} {node.path('two')}")
    sh(f"cp --reflink=auto {node.path('one/config.json')} {node.path('config')}")
    same_bytes(checkpoint, node.path("two"))
    assert node.path("config").read_text() == '{"a": 1}\n'


def test_dd_find_du_and_friends(node, sh):
    sh(f"dd if=/dev/urandom of={node.path('f')} bs=1M count=8 status=none")
    sh(f"dd if={node.path('f')} of=/dev/null bs=1M iflag=direct status=none")
    sh(f"dd if=/dev/zero of={node.path('g')} bs=1M count=4 oflag=direct conv=fsync status=none")
    assert sh(f"cat {node.path('f')} | sha256sum").stdout.split()[0] == digest(node.path("f"))
    assert sh(f"find {node.dir} -type f -size +4M | wc -l").stdout.strip() == "1"
    assert int(sh(f"du -sk {node.dir}").stdout.split()[0]) >= 12 << 10
    sh(f"install -m 600 /etc/hostname {node.path('h')} && cmp /etc/hostname {node.path('h')}")
    sh(f"df {node.dir} && df -i {node.dir} && stat -f {node.dir}")
    assert "p2pfs" in sh(f"findmnt -no FSTYPE {node.dir}").stdout
    sh(f"truncate -s 10M {node.path('t')}")
    assert node.path("t").stat().st_size == 10 * MIB


def test_mv_overwrites_nothing(node, sh):
    node.path("f").write_text("old")
    node.path("g").write_text("new")
    assert "Operation not permitted" in sh(f"mv -f {node.path('g')} {node.path('f')}", check=False).stderr
    assert "Operation not permitted" in sh(f"echo x > {node.path('f')}", check=False).stderr + "Operation not permitted"
    assert "Operation not permitted" in sh(f"cp /etc/hostname {node.path('f')}", check=False).stderr
    assert node.path("f").read_text() == "old"


def test_torch_saves_and_loads(two):
    torch = pytest.importorskip("torch")
    a, b = two
    tensors = {"weight": torch.arange(300_000, dtype=torch.float32).reshape(300, 1000), "n": 7}
    torch.save(tensors, a.path("model.pt"))
    eventually(lambda: b.path("model.pt").exists())
    loaded = torch.load(b.path("model.pt"))
    assert torch.equal(loaded["weight"], tensors["weight"]) and loaded["n"] == 7


# -- mounting


def p2pfs(*words, **more):
    return run_p2pfs(*words, check=False, **more)


def take_down(home):
    """Whatever is mounted there; nothing, when the test went well."""
    subprocess.run(["umount", "-l", home], capture_output=True, check=False)


def test_it_goes_to_the_background_when_it_serves(cluster):
    home = cluster.home / "m"
    home.mkdir()
    done = p2pfs(cluster.meta, home, "-o", "node=bg")
    try:
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert fuse.mounted_at(home)
        assert (home / ".p2pfs/status.json").read_text()
        mount = fuse.mounted_at(home)
        assert mount[1:3] == ("fuse.p2pfs", cluster.meta)
        (home / "f").write_text("x")
        subprocess.run(["umount", home], check=True)
        again = p2pfs(cluster.meta, home, "-o", "node=bg")  # at once, while the first one ends
        assert (again.returncode, again.stderr) == (0, "")
        assert os.listdir(home) == ["f"]  # nobody holds its bytes, but the name stays
        subprocess.run(["fusermount3", "-u", home], check=True)
    finally:
        take_down(home)


@pytest.fixture
def installed():
    """p2pfs where mount(8), which brings a PATH of its own, finds it; in this run's mount namespace only."""
    if not os.path.isdir("/usr/local/bin"):
        pytest.skip("no /usr/local/bin to mount over")
    subprocess.run(["mount", "--bind", BINARY.parent, "/usr/local/bin"], check=True)
    yield
    subprocess.run(["umount", "-l", "/usr/local/bin"], check=True)  # a process may just be ending


def test_mount_8_reaches_it(cluster, installed):
    home = cluster.home / "m"
    home.mkdir()
    line = f"{cluster.meta} {home} fuse.p2pfs _netdev,nofail,noauto,nosuid,x-systemd.automount,node=tab 0 0\n"
    (cluster.home / "fstab").write_text(line)
    commands = [
        ["mount", "-t", "fuse.p2pfs", cluster.meta, home, "-o", "node=m8,noexec"],
        ["mount", "-T", cluster.home / "fstab", home],
    ]
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert (home / ".p2pfs/status.json").read_text()
            options = subprocess.run(["findmnt", "-no", "OPTIONS", home], capture_output=True, text=True, check=True)
            assert ("noexec" if "-t" in command else "nosuid") in options.stdout
            subprocess.run(["umount", home], check=True)
        finally:
            take_down(home)
    done = subprocess.run([*commands[0][:-1], "cache_sise=1G"], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "did you mean cache_size" in done.stderr


def test_read_only(cluster):
    a, b = cluster.node(), cluster.node(ro=True)
    a.path("f").write_text("x")
    eventually(lambda: b.path("f").read_text() == "x")
    with pytest.raises(OSError):
        b.path("g").write_text("x")


def one_line(done, *words):
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


@pytest.mark.parametrize("flags", [["-f"], []])
def test_bad_directories_are_refused(cluster, flags):
    (cluster.home / "file").touch()
    (cluster.home / "full").mkdir()
    (cluster.home / "full/x").touch()
    one_line(p2pfs(cluster.meta, cluster.home / "missing", *flags), "missing", "mkdir")
    one_line(p2pfs(cluster.meta, cluster.home / "file", *flags), "file", "not a directory")
    one_line(p2pfs(cluster.meta, cluster.home / "full", *flags), "full", "not empty")
    node = cluster.node()
    one_line(p2pfs(cluster.meta, node.dir, *flags), "already", "umount")
    node.kill9(unmount=False)
    one_line(p2pfs(cluster.meta, node.dir, *flags), "dead mount", "umount -l")


@pytest.mark.parametrize("flags", [["-f"], []])
def test_bad_options_are_refused(cluster, flags):
    home = cluster.home / "m"
    home.mkdir()
    one_line(p2pfs(cluster.meta, home, *flags, "-o", "cache_sise=1G"), "cache_sise", "did you mean cache_size")
    one_line(p2pfs(cluster.meta, home, *flags, "-o", "transport=rdma"), "transport=rdma", "doctor")
    one_line(p2pfs("nonsense://x", home, *flags), "nonsense")
    one_line(p2pfs("local:///proc/nowhere", home, *flags), "/proc/nowhere")
    one_line(p2pfs(cluster.meta, home, *flags, "-o", "secret_file=/missing"), "/missing")
    (cluster.home / "secret").write_text("0123456789abcdef\n")
    os.chmod(cluster.home / "secret", 0o644)
    one_line(p2pfs(cluster.meta, home, *flags, "-o", f"secret_file={cluster.home}/secret"), "chmod 600")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        one_line(p2pfs(cluster.meta, home, *flags, "-o", f"listen=127.0.0.1:{port}"), str(port))
    assert not fuse.mounted_at(home)


def test_a_node_name_is_unique(cluster):
    cluster.node("same")
    home = cluster.home / "m"
    home.mkdir()
    one_line(p2pfs(cluster.meta, home, "-o", "node=same", timeout=30), "same", "node=")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_unmount(node, number):
    node.path("f").write_text("x")
    node.process.send_signal(number)
    assert node.wait_exit() == 0
    eventually(lambda: not node.mounted())


def test_it_ends_although_files_are_open_and_readers_wait(two):
    a, b = two
    write_file(a.path("f"), 4 * MIB)
    eventually(lambda: b.path("f").exists())
    a.pause()
    readers = [subprocess.Popen(["cat", b.path("f")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
               for _ in range(4)]
    holder = open(b.path("f"), "rb")
    time.sleep(0.5)
    try:
        b.process.send_signal(signal.SIGTERM)
        assert b.wait_exit() == 0
        for reader in readers:
            assert reader.wait() != 0
    finally:
        holder.close()
        a.resume()


def test_ten_thousand_names_are_listed(two):
    a, b = two
    program = """
import os, sys
for index in range(10000):
    os.symlink("target", os.path.join(sys.argv[1], f"name-{index:05d}"))
"""
    os.mkdir(a.path("d"))
    subprocess.run([sys.executable, "-c", program, a.path("d")], check=True)
    eventually(lambda: len(os.listdir(b.path("d"))) == 10000)
    done = subprocess.run(["ls", "-lR", b.dir], capture_output=True, text=True, check=True)
    assert done.stdout.count("name-") == 10000
