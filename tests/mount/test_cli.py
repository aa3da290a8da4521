"""The subcommands as a user runs them, on real mounts."""

import json
import os
import re
import shutil
import subprocess
import threading
import time

import pytest

from harness import fuse
from harness.data import digest, pattern, write_file
from harness.env import BINARY
from harness.node import MountFailed, run_p2pfs
from harness.wait import eventually

MIB = 1 << 20


def answer(node, *words, **more):
    """The JSON that p2pfs COMMAND --json prints."""
    return json.loads(node.cli(*words, "--json", **more).stdout)


def failed(done, *words):
    """A failure: status 1, and one line on stderr with these words."""
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def entries(node, *words):
    return {entry["name"]: entry for entry in answer(node, "ls", *(words or [""]))["entries"]}


def ask(node, request):
    """One raw request to the control file."""
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    fd = os.open(node.path(".p2pfs/control"), os.O_RDWR)
    try:
        os.write(fd, body)
        text = b""
        while piece := os.read(fd, 1 << 16):
            text += piece
    finally:
        os.close(fd)
    return json.loads(text)


def strangers(*nodes):
    """How many p2pfs mounts this machine has besides the test's own."""
    own = {str(node.dir) for node in nodes}
    return sum(kind == "fuse.p2pfs" and point not in own for point, kind, *_ in fuse.mounts())


@pytest.fixture
def source(tmp_path):
    """A small checkpoint outside of any mount."""
    tree = tmp_path / "source"
    (tree / "sub").mkdir(parents=True)
    write_file(tree / "model.safetensors", 5 * MIB + 17, seed=1)
    (tree / "config.json").write_text("{}\n")
    (tree / "sub" / "empty").touch()
    return tree


# -- usage


def test_wrong_usage_is_2():
    for words in (
        ["info"],
        ["pull"],
        ["pull", "--nonsense", "x"],
        ["pull", "--quiet=1", "x"],
        ["wait"],
        ["wait", "--timeout", "soon", "x"],
        ["wait", "--timeout"],
        ["wait", "--complete", "--gone", "x"],
        ["register", "x"],
        ["ls", "a", "b"],
        ["version", "x"],
        ["help", "nonsense"],
        ["evict", "-f", "x"],
    ):
        done = run_p2pfs(*words, check=False)
        assert done.returncode == 2, words
        assert done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
        assert f"p2pfs {words[0]}:" in done.stderr and "usage:" in done.stderr


def test_a_path_outside_of_every_mount(tmp_path):
    for command in ("ls", "info", "status", "pull", "evict", "pin", "wait", "unregister", "peers"):
        failed(run_p2pfs(command, tmp_path, check=False), "not below a p2pfs mount", str(tmp_path))


def test_version():
    text = run_p2pfs("version").stdout
    number = re.match(r"p2pfs (\d+\.\d+\.\d+)\n", text)[1]
    assert json.loads(run_p2pfs("version", "--json").stdout)["version"] == number


# -- ls, info


def test_ls_shows_state_and_replicas(two, source):
    a, b = two
    shutil.copytree(source, a.path("ckpt"))
    os.symlink("ckpt", a.path("latest"))
    eventually(lambda: len(entries(b)) == 6)
    eventually(lambda: entries(b)["ckpt/model.safetensors"]["state"] == "remote")  # its holder is known
    here, there = entries(a), entries(b)
    assert here["ckpt"]["kind"] == "dir" and here["latest"]["target"] == "ckpt"
    model = "ckpt/model.safetensors"
    assert here[model]["size"] == 5 * MIB + 17
    assert here[model]["state"] == "complete"
    assert here[model]["replicas"] == 1 and here[model]["complete"] == 1
    assert here[model]["version"] == there[model]["version"] == b.xattr(model, "version")
    b.cli("pull", "ckpt")
    eventually(lambda: entries(b)[model]["complete"] == 2)
    assert entries(b)[model]["state"] == "complete"

    text = b.cli("ls", "ckpt").stdout
    row = next(line for line in text.splitlines() if line.endswith(" model.safetensors"))
    assert re.match(r"-rw-r--r--\s+5\.0 MiB\s+\d{4}-\d\d-\d\d \d\d:\d\d\s+complete\s+2\s", row), row
    assert any(line.endswith(" sub/empty") for line in text.splitlines())
    assert re.search(r"^l\S+ .* latest -> ckpt$", b.cli("ls", "").stdout, re.MULTILINE)
    assert b.cli("ls", "ckpt/config.json").stdout.endswith(" config.json\n")
    eventually(lambda: entries(b, "latest") == entries(b, "ckpt"))  # other holders may just be told of
    failed(b.cli("ls", "absent", check=False), "absent", "no such name")


def test_any_bytes_in_names(two):
    a, b = two
    name = b"bad \xff 100% \n\x07 gr\xc3\xbc\xc3\x9f"
    with open(os.path.join(os.fsencode(a.dir), name), "wb") as out:
        out.write(b"bytes")
    encoded = "bad %FF 100%25 %0A%07 gr\u00fc\u00df"
    eventually(lambda: encoded in entries(b))
    text = os.fsdecode(name)
    assert answer(b, "info", text)["name"] == encoded
    assert b.cli("ls", "").stdout.count(text) == 1
    b.cli("pull", text)
    assert answer(b, "info", text)["state"] == "complete"
    a.cli("unregister", text)
    eventually(lambda: encoded not in entries(b))


def test_info_says_all(two, source):
    a, b = two
    shutil.copy(source / "model.safetensors", a.path("m"))
    eventually(lambda: answer(a, "info", "m")["sealed"])
    info = answer(a, "info", "m")
    assert info["kind"] == "file" and info["size"] == 5 * MIB + 17 and info["mode"] == "0644"
    assert info["state"] == "complete" and info["resident"] == info["size"]
    assert info["shards"] == info["shards_present"] == 6 and info["shard_size"] == MIB
    assert re.fullmatch(r"xxh3:[0-9a-f]{32}", info["digest"]) and info["sealed"]
    assert info["origin_node"] == a.name and "origin_path" not in info
    assert info["names"] == 1 and info["replicas"] == 1 and info["complete"] == 1
    [holder] = info["holders"]
    assert holder["node"] == a.name and holder["complete"] and holder["self"]
    assert holder["address"] == a.status()["address"]

    eventually(lambda: answer(b, "info", "m")["state"] == "remote")
    eventually(lambda: answer(b, "info", "m")["digest"] == info["digest"])
    seen = answer(b, "info", "m")
    assert seen["version"] == info["version"] and seen["resident"] == 0
    [holder] = seen["holders"]
    assert holder["node"] == a.name and not holder["self"]
    text = b.cli("info", "m").stdout
    assert re.search(r"^digest: +xxh3:", text, re.MULTILINE)
    assert re.search(rf"^holder: +{a.name} at 127\.0\.0\.1:\d+, complete$", text, re.MULTILINE)


def test_info_of_directories_and_links(two, source):
    a, b = two
    shutil.copytree(source, a.path("ckpt"))
    os.symlink("ckpt", a.path("latest"))
    eventually(lambda: answer(b, "info", "ckpt")["files"] == 3)
    info = answer(b, "info", "latest")
    assert info["kind"] == "dir" and info["name"] == "ckpt" and info["dirs"] == 1
    assert info["size"] == 5 * MIB + 17 + 3 and info["resident"] == 0
    b.cli("pull", "latest")
    info = answer(b, "info", "ckpt")
    assert info["files_complete"] == 3 and info["resident"] == info["size"]


# -- register, unregister


def test_register_one_file(two, source):
    a, b = two
    run_p2pfs("register", source / "model.safetensors", a.path("m"))
    info = answer(a, "info", "m")
    assert info["state"] == "inplace" and info["origin_path"] == str(source / "model.safetensors")
    eventually(lambda: answer(a, "info", "m")["sealed"])
    assert answer(a, "info", "m")["digest"].startswith("xxh3:")
    eventually(lambda: b.path("m").exists())
    assert digest(b.path("m")) == digest(source / "model.safetensors")
    assert a.status()["cache_used"] < MIB


def test_register_into_directories(two, source):
    a, _ = two
    a.path("d").mkdir()
    run_p2pfs("register", source / "config.json", a.path("d"))
    run_p2pfs("register", source / "config.json", source / "model.safetensors", a.path("new"))
    run_p2pfs("register", source, a.path("tree"))
    run_p2pfs("register", f"{source}/", a.path("d"))
    run_p2pfs("register", "config.json", a.path("relative"), cwd=source)
    names = {name for name, entry in entries(a).items() if entry["kind"] == "file"}
    files = ("config.json", "model.safetensors", "sub/empty")
    assert names == {
        "d/config.json",
        "new/config.json",
        "new/model.safetensors",
        "relative",
        *(f"tree/{file}" for file in files),
        *(f"d/source/{file}" for file in files),
    }


def test_register_refuses(two, source):
    a, _ = two
    model = source / "model.safetensors"
    failed(run_p2pfs("register", source / "absent", a.path("x"), check=False), "absent")
    failed(run_p2pfs("register", model, a.path("no/such/dir"), check=False), "mkdir")
    failed(run_p2pfs("register", "/dev/null", a.path("x"), check=False), "/dev/null", "regular")
    run_p2pfs("register", model, a.path("m"))
    line = failed(run_p2pfs("register", model, a.path("m"), check=False), "m")
    assert "exists" in line or "overwrite" in line
    failed(run_p2pfs("register", a.path("m"), a.path("again"), check=False), "inside the mount")
    failed(run_p2pfs("register", model, model, a.path("m"), check=False), "not a directory")
    failed(run_p2pfs("register", model, a.path(".p2pfs"), check=False), ".p2pfs")
    # several files: all or nothing
    failed(run_p2pfs("register", model, "/dev/null", a.path("set"), check=False), "/dev/null")
    assert set(entries(a)) == {"m"}


def test_unregister_a_tree_and_a_tag(two, source):
    a, b = two
    shutil.copytree(source, a.path("ckpt"))
    os.symlink("ckpt", a.path("latest"))
    eventually(lambda: len(entries(b)) == 6)
    b.cli("unregister", "latest")
    assert b.path("ckpt/config.json").exists() and not os.path.lexists(b.path("latest"))
    b.cli("unregister", "ckpt")
    assert entries(b) == {}
    eventually(lambda: entries(a) == {})
    failed(a.cli("unregister", "ckpt", check=False), "no such name")
    failed(a.cli("unregister", "", check=False), "root")
    eventually(lambda: a.status()["cache_used"] == 0)


# -- pull


def test_pull_closes_with_the_rate(two, source):
    a, b = two
    shutil.copytree(source, a.path("ckpt"))
    eventually(lambda: len(entries(b)) == 5)
    done = b.cli("pull", "ckpt/model.safetensors")
    size = 5 * MIB + 17
    line = r"1 file, 5\.0 MiB \(%d bytes\) pulled in (\d+\.\d+) s, (\d+\.\d+) GB/s\n" % size
    match = re.fullmatch(line, done.stdout)
    assert match and done.stderr == "", done
    seconds, rate = float(match[1]), float(match[2])  # both are rounded
    assert size / (seconds + 0.0006) / 1e9 - 0.006 < rate < size / (seconds - 0.0006) / 1e9 + 0.006
    assert b.xattr("ckpt/model.safetensors", "state") == "complete"
    again = b.cli("pull", "ckpt")
    assert "5.0 MiB were here already" in again.stdout and again.stdout.startswith("3 files, ")
    assert b.cli("pull", "--quiet", "ckpt").stdout == ""
    result = answer(b, "pull", "ckpt", "ckpt/config.json")
    assert result["ok"] and result["files"] == 3 and result["bytes_moved"] == 0
    assert result["bytes_here"] == size + 3
    assert digest(b.path("ckpt/model.safetensors")) == digest(source / "model.safetensors")


def test_pull_shows_a_bar_on_a_terminal(two, tmp_path):
    a, b = two
    write_file(a.path("big"), 192 * MIB, seed=7)
    eventually(lambda: b.path("big").exists())
    done = subprocess.run(
        ["script", "-qec", f"{BINARY} pull {b.path('big')}", "/dev/null"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.rstrip().endswith("GB/s")
    if "%" in done.stdout:  # a fast machine is done before the first bar is due
        assert re.search(r"\[#* *\] +\d+%  \S+ \w+ of 192\.0 MiB  \d+\.\d\d GB/s", done.stdout)


def test_many_files_in_one_pull(two):
    a, b = two
    a.path("many").mkdir()
    for i in range(300):
        a.path(f"many/{i:03}").write_bytes(pattern(5000 + i, seed=i))
    eventually(lambda: len(entries(b)) == 301)
    result = answer(b, "pull", "many")
    assert result["files"] == 300 and result["files_failed"] == 0
    assert result["bytes_moved"] == sum(5000 + i for i in range(300))
    for i in (0, 150, 299):
        assert b.path(f"many/{i:03}").read_bytes() == pattern(5000 + i, seed=i)


def test_pull_fails_with_the_cause(cluster, source):
    a = cluster.node()
    b = cluster.node(read_timeout=3)
    shutil.copy(source / "model.safetensors", a.path("m"))
    shutil.copy(source / "config.json", a.path("c"))
    eventually(lambda: b.path("c").exists())
    b.cli("pull", "c")
    a.stop()
    eventually(lambda: answer(b, "info", "m")["state"] == "offline")
    done = b.cli("pull", "m", "c", check=False)
    assert done.returncode == 1
    assert "cannot pull 'm'" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stdout.startswith("1 file, ")
    failed(b.cli("pull", "absent", check=False), "absent", "no such name")
    failed(
        run_p2pfs("pull", b.path("c"), cluster.node().path("c"), check=False), "another mount"
    )
    a.start()
    shutil.copy(source / "model.safetensors", a.path("m2"))
    eventually(lambda: b.cli("pull", "m2", check=False).returncode == 0)


def test_pull_of_more_than_the_cache_holds(cluster):
    a = cluster.node()
    b = cluster.node(cache_size="16M")
    a.path("t").mkdir()
    for i in range(6):
        write_file(a.path(f"t/{i}"), 4 * MIB, seed=i)
    eventually(lambda: len(entries(b)) == 7)
    failed(b.cli("pull", "t", check=False), "24.0 MiB do not fit the cache of 16.0 MiB", "cache_size=")
    assert b.status()["bytes_received"] == 0
    b.cli("pull", "t/0", "t/1", "t/2")
    b.cli("pull", "t/3", "t/4", "t/5")  # evicts what was used least recently
    assert answer(b, "info", "t")["resident"] <= 16 * MIB
    assert [entries(b)[f"t/{i}"]["state"] for i in (3, 4, 5)] == ["complete"] * 3


# -- evict, pin


def test_evict_keeps_the_last_copy(two, source):
    a, b = two
    shutil.copy(source / "model.safetensors", a.path("m"))
    eventually(lambda: b.path("m").exists())
    failed(a.cli("evict", "m", check=False), "m", "--force")
    b.cli("pull", "m")
    eventually(lambda: entries(a)["m"]["complete"] == 2)
    text = a.cli("evict", "m").stdout
    assert text == "evicted 1 files, 5.0 MiB\n"
    assert answer(a, "info", "m")["resident"] == 0
    eventually(lambda: a.status()["cache_used"] == 0)
    assert a.cli("evict", "m").stdout.startswith("evicted 0 files")
    failed(b.cli("evict", "m", check=False), "--force")
    b.cli("evict", "--force", "m")
    eventually(lambda: entries(b)["m"]["state"] == "offline")
    a.cli("wait", "--offline", "--timeout=60", "m")


def test_evict_spares_open_and_pinned_files(two, source):
    a, b = two
    shutil.copytree(source, a.path("ckpt"))
    eventually(lambda: len(entries(b)) == 5)
    b.cli("pull", "ckpt")
    with open(b.path("ckpt/model.safetensors"), "rb") as model:
        model.read(10)
        failed(b.cli("evict", "--force", "ckpt/model.safetensors", check=False), "it is open")
    b.cli("pin", "ckpt")
    assert answer(b, "info", "ckpt/config.json")["pinned"]
    assert "complete,pinned" in b.cli("ls", "ckpt").stdout
    failed(b.cli("evict", "ckpt", check=False), "pinned", "unpin")
    b.cli("unpin", "ckpt")
    eventually(lambda: b.cli("evict", "ckpt", check=False).returncode == 0)
    assert answer(b, "info", "ckpt")["resident"] == 0


def test_evict_says_that_a_pull_runs(cluster, tmp_path):
    a, b = cluster.node(), cluster.node(max_download="1M")
    write_file(tmp_path / "m", 64 * MIB)
    a.path("m").symlink_to(tmp_path / "m")
    eventually(lambda: b.path("m").exists())
    with open(b.path("m"), "rb", buffering=0) as file:
        assert file.read(1)
    failed(b.cli("evict", "m", check=False), "it is being pulled")


def test_evict_right_after_a_pull(two, source):
    a, b = two
    shutil.copy(source / "model.safetensors", a.path("m"))
    eventually(lambda: b.path("m").exists())
    for _ in range(5):
        b.cli("pull", "m")
        assert b.cli("evict", "m").stdout.startswith("evicted 1 files")


def test_evict_right_after_a_close(two, source):
    """The kernel tells of a close a moment after it: evict waits for that."""
    a, b = two
    shutil.copyfile(source / "model.safetensors", a.path("m"))
    eventually(lambda: b.path("m").exists())
    for _ in range(5):
        b.cli("pull", "m")  # the kernel may have the pages of the last round
        b.path("m").read_bytes()
        assert b.cli("evict", "m").stdout.startswith("evicted 1 files")


def test_evict_leaves_files_that_lie_elsewhere(two, source):
    a, _ = two
    run_p2pfs("register", source, a.path("tree"))
    failed(a.cli("evict", "--force", "tree/config.json", check=False), "registered where it lies")
    assert a.cli("evict", "tree").stdout == "evicted 0 files, 0 B\n"
    assert a.path("tree/config.json").read_text() == "{}\n"


# -- wait


def test_wait_for_a_name(two, source):
    a, b = two
    failed(b.cli("wait", "--timeout=0.2", "late/c", check=False), "late/c", "does not exist")
    waiting = subprocess.Popen([BINARY, "wait", "--timeout=60", b.path("late/sub/empty")])
    time.sleep(0.3)
    assert waiting.poll() is None
    shutil.copytree(source, a.path("late"))
    assert waiting.wait() == 0
    line = failed(b.cli("wait", "--complete", "--timeout=0.2", "late", check=False))
    assert "files are here" in line
    waiting = threading.Thread(target=b.cli, args=("wait", "--complete", "--timeout=60", "late"))
    waiting.start()
    b.cli("pull", "late")
    waiting.join()
    b.cli("wait", "--online", "--timeout=60", "late/config.json")
    threading.Timer(0.3, a.cli, ("unregister", "late")).start()
    b.cli("wait", "--gone", "--timeout=60", "late")


# -- status, peers, metrics, doctor


def test_status_says_how_it_fares(two, source):
    a, b = two
    shutil.copytree(source, a.path("ckpt"))
    eventually(lambda: a.status()["peers_live"] == 1)
    status = answer(a, "status", "")
    assert status["node"] == a.name and status["mountpoint"] == str(a.dir)
    assert status["backend"] == "local" and status["online"]
    assert status["files"] == 3 and status["dirs"] == 2 and status["symlinks"] == 0
    assert status["bytes"] == 5 * MIB + 17 + 3
    assert 0 < status["cache_used"] <= status["cache_limit"]
    assert status["storage"] in ("huge tmpfs", "memfd") and status["loop"] in ("io_uring", "epoll")
    assert status["transports"] == ["tcp"] and status["lanes"] >= 1
    assert status["fetch"] == "whole" and status["io_path"] in ("buffered", "passthrough")
    assert status["peers_live"] == 1 and status["pid"] == a.pid
    assert re.fullmatch(r"[0-9a-f]{16}", status["boot"]) and int(status["boot"], 16) != 0
    report = a.status()
    assert set(report) == set(status) - {"ok", "storage_huge_pages"}
    text = a.cli("status", "ckpt/sub").stdout
    assert re.search(rf"^node: +{a.name} at 127\.0\.0\.1:\d+", text, re.MULTILINE)
    assert re.search(r"^metadata: +local:.*online$", text, re.MULTILINE)


def test_peers_count_what_moved(two, source):
    a, b = two
    shutil.copy(source / "model.safetensors", a.path("m"))
    eventually(lambda: b.path("m").exists())
    b.cli("pull", "m")
    size = 5 * MIB + 17
    [peer] = answer(b, "peers", "")["peers"]
    assert peer["node"] == a.name and peer["live"] and peer["received"] == size
    assert peer["verified"] == 6 and peer["corrupt"] == 0
    assert peer["address"] == a.status()["address"]
    [peer] = eventually(lambda: [p for p in a.peers()["peers"] if p["sent"] == size])
    assert peer["node"] == b.name
    text = b.cli("peers", "").stdout
    assert re.search(rf"^{a.name}\s+127\.0\.0\.1:\d+\s+(live|connected)\s", text, re.MULTILINE)
    a.stop()
    eventually(lambda: not b.peers()["peers"][0]["live"])
    eventually(lambda: " gone " in b.cli("peers", "").stdout)


def test_metrics_are_prometheus_text(two, source):
    a, b = two
    shutil.copy(source / "model.safetensors", a.path("m"))
    eventually(lambda: b.path("m").exists())
    b.cli("pull", "m")
    text = b.path(".p2pfs/metrics").read_text()
    types = dict(re.findall(r"^# TYPE (\w+) (gauge|counter)$", text, re.MULTILINE))
    helps = dict(re.findall(r"^# HELP (\w+) (.+)$", text, re.MULTILINE))
    assert set(types) == set(helps)
    samples = b.metrics()
    names = {key.split("{")[0] for key in samples}
    by_device = {name for name in types if "rdma_device" in name}  # where there is one
    assert names - by_device == set(types) - by_device
    for name, kind in types.items():
        assert name.startswith("p2pfs_")
        assert name.endswith("_total") == (kind == "counter"), name
    assert samples["p2pfs_received_bytes_total"] == 5 * MIB + 17
    assert samples["p2pfs_shards_fetched_total"] == 6
    assert samples["p2pfs_files"] == 1 and samples["p2pfs_peers_live"] == 1
    assert samples[f'p2pfs_peer_received_bytes_total{{peer="{a.name}"}}'] == 5 * MIB + 17


def test_doctor(two):
    a, b = two
    others = strangers(*two)
    for node in two:
        eventually(lambda node=node: node.status()["peers_live"] == 1)
    done = run_p2pfs("doctor", check=False)  # mounts of others may lack peers
    assert re.search(r"^good +/dev/fuse", done.stdout, re.MULTILINE)
    assert not re.search(rf" ({a.name}|{b.name}) at ", done.stdout)
    done_json = run_p2pfs("doctor", "--json", check=False)
    report = json.loads(done_json.stdout)
    assert report["ok"] == (done_json.returncode == 0)
    assert report["ok"] == all(finding["level"] != "stop" for finding in report["findings"])
    levels = {finding["what"]: finding["level"] for finding in report["findings"]}
    assert levels["/dev/fuse"] == "good" and {"kernel", "libfuse", "storage", "TCP"} <= set(levels)
    assert f"{2 + others} here, " in done.stdout
    assert others or "2 here, 2 of them answer" in done.stdout
    assert f"of {b.dir}: 1 of 1 answer by TCP" in done.stdout
    a.kill9(unmount=False)
    done = run_p2pfs("doctor", check=False)
    assert done.returncode == 1 and "marked STOP" in done.stderr
    assert f"umount -l {a.dir}" in done.stdout
    assert f"of {b.dir}: 0 of 1 answer by TCP" in done.stdout  # its lease has not ended
    assert re.search(rf"^STOP +peer by TCP +{a.name} at .*\n +-> .*firewalls", done.stdout, re.MULTILINE)
    assert others or "2 here, 1 of them answer" in done.stdout


def test_doctor_names_a_mount_that_hangs(two):
    a, _ = two
    a.pause()
    try:
        text = run_p2pfs("doctor", check=False).stdout
    finally:
        a.resume()
    assert f"{a.dir} does not answer" in text


# -- finding the mount


def test_a_stale_mount_is_named_with_the_remedy(node):
    node.path("x").write_bytes(b"x")
    node.kill9(unmount=False)
    for path in ("", "x", "no/such/name"):
        for command in ("status", "info", "pull"):
            failed(node.cli(command, path, check=False), f"umount -l {node.dir}")


def test_a_mount_is_found_from_anywhere(cluster, source, tmp_path):
    node = cluster.node("n1")
    shutil.copytree(source, node.path("ckpt"))
    assert json.loads(run_p2pfs("status", "--json", cwd=node.path("ckpt")).stdout)["node"] == "n1"
    if not strangers(node):
        assert json.loads(run_p2pfs("status", "--json").stdout)["node"] == "n1"
    link = tmp_path / "link"
    link.symlink_to(node.dir)
    inner = tmp_path / "inner"
    inner.symlink_to(node.path("ckpt"))
    for path in (link, link / "ckpt", inner, inner / "config.json", link / "ckpt/../ckpt/sub"):
        assert run_p2pfs("info", path).returncode == 0
    found = json.loads(run_p2pfs("info", "--json", inner / "config.json").stdout)
    assert found["name"] == "ckpt/config.json"
    found = json.loads(run_p2pfs("info", "--json", "config.json", cwd=node.path("ckpt")).stdout)
    assert found["name"] == "ckpt/config.json"
    bound = tmp_path / "bound"
    bound.mkdir()
    subprocess.run(["mount", "--bind", node.path("ckpt"), bound], check=True)
    try:
        found = json.loads(run_p2pfs("info", "--json", bound / "config.json").stdout)
        assert found["name"] == "ckpt/config.json"
    finally:
        subprocess.run(["umount", bound], check=True)


def test_a_mount_point_with_odd_characters(make_cluster, source):
    cluster = make_cluster()
    node = cluster.node("plain", start=False)
    node.dir = cluster.home / "with space\tand tab\\ #"
    node.dir.mkdir()
    node.start()
    shutil.copy(source / "config.json", node.path("c"))
    assert json.loads(run_p2pfs("status", "--json", node.path("c")).stdout)["node"] == "plain"
    run_p2pfs("pull", node.path("c"))


def test_several_mounts_need_a_name(two, tmp_path):
    count = 2 + strangers(*two)
    failed(run_p2pfs("status", cwd=tmp_path, check=False), f"{count} p2pfs mounts", "name one")


# -- the control file itself


def test_bad_requests_are_answered(node):
    for body in (b"garbage", b"[1]", b"{}", b'{"op": 3}', b'{"op": "\xff"}', b"{" * 2000):
        reply = ask(node, body)
        assert reply["ok"] is False and reply["errno"] > 0 and reply["error"], body
    assert "another version" in ask(node, {"op": "nonsense"})["error"]
    for op in ("info", "pull", "evict", "pin"):
        reply = ask(node, {"op": op, "path": "no/such"})
        assert reply["errno"] == 2 and "no/such" in reply["error"]
    assert not ask(node, {"op": "register", "name": "x"})["ok"]
    assert not ask(node, {"op": "register", "files": ["relative"], "name": "x"})["ok"]
    assert not ask(node, {"op": "register", "files": [3], "name": "x"})["ok"]
    assert not ask(node, {"op": "progress", "job": 77})["ok"]
    assert not ask(node, {"op": "info", "path": "a%00b"})["ok"]
    assert not ask(node, {"op": "info", "path": "../etc"})["ok"]
    assert not ask(node, {"op": "info", "path": "x/" * 30000})["ok"]
    with pytest.raises(OSError):
        ask(node, b'{"op": "status", "pad": "' + b"x" * 70000 + b'"}')
    assert node.alive() and ask(node, {"op": "status"})["ok"]


def test_changing_is_for_root_and_the_mounting_user(cluster, source):
    node = cluster.node(allow_other=True)
    node.dir.parent.chmod(0o755)
    node.dir.parent.parent.chmod(0o755)
    shutil.copy(source / "config.json", node.path("c"))
    reachable = shutil.copy(BINARY, node.dir.parent / "p2pfs")  # the build may lie in a private home

    def as_nobody(*words):
        return subprocess.run(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", reachable, *words],
            capture_output=True,
            text=True,
            check=False,
        )

    assert as_nobody("version").returncode == 0
    assert as_nobody("status", node.dir).returncode == 0
    assert as_nobody("ls", node.dir).returncode == 0
    for command in ("evict", "pin", "unregister", "pull"):
        failed(as_nobody(command, node.path("c")), "root and the user who mounted")
    assert node.path("c").read_text() == "{}\n"


def test_many_requests_at_once(node, source):
    shutil.copytree(source, node.path("ckpt"))
    problems = []

    def many():
        try:
            for _ in range(40):
                assert ask(node, {"op": "ls", "path": ""})["ok"]
                assert ask(node, {"op": "info", "path": "ckpt/config.json"})["ok"]
                node.status(), node.peers(), node.metrics()
        except Exception as problem:  # pylint: disable=broad-except
            problems.append(problem)

    threads = [threading.Thread(target=many) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_unmounting_while_requests_wait(two):
    a, b = two
    write_file(a.path("big"), 64 * MIB, seed=3)
    eventually(lambda: b.path("big").exists())
    a.pause()
    try:
        pulling = subprocess.Popen(
            [BINARY, "pull", b.path("big")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        time.sleep(0.5)
        b.stop()
        assert pulling.wait() == 1
    finally:
        a.resume()
    assert fuse.mounted_at(b.dir) is None


def test_a_congestion_control_that_is_not_there_is_named(cluster):
    node = cluster.node(start=False, tcp_congestion="nonsense")
    with pytest.raises(MountFailed) as raised:
        node.start()
    assert "tcp_congestion=nonsense" in raised.value.log.splitlines()[-1]


def test_max_read_mounts(cluster):
    node = cluster.node(max_read=65536)
    assert "max_read=65536" in open("/proc/mounts", encoding="utf-8").read()
    node.path("f").write_bytes(b"x" * 300000)
    assert node.path("f").read_bytes() == b"x" * 300000
