# ctest: timeout=400
# ctest: jobs=3
"""What can be seen of a mount while it works: metrics, peers, why, top; and the limits of its rates."""

import json
import os
import pty
import re
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from harness.data import write_file
from harness.env import BINARY, SOURCE
from harness.node import MountFailed, free_port, run_p2pfs
from harness.services import Redis
from harness.wait import eventually

MIB = 1 << 20


def register(node, name, size, seed=0):
    write_file(node.path(name), size, seed=seed)


def appears(name, *nodes):
    for node in nodes:
        eventually(node.path(name).exists, what=f"{name} on {node.name}")


def cat(path):
    """Reads a file to its end without the page cache's help; what it printed on stderr."""
    return subprocess.run(
        ["dd", f"if={path}", "of=/dev/null", "bs=1M", "iflag=direct"],
        capture_output=True,
        text=True,
        check=False,
    )


def pulling(*nodes, name="f"):
    """Pulls on all of them at once; join what it returns."""
    threads = [
        threading.Thread(target=node.cli, args=("pull", name), kwargs={"check": False})
        for node in nodes
    ]
    for thread in threads:
        thread.start()
    return threads


def documented():
    """Metrics of the manual: {name: type}."""
    page = (SOURCE / "man/p2pfs.1").read_text()
    section = page[page.index(".Sh METRICS") : page.index(".Sh ENVIRONMENT")]
    return dict(re.findall(r"^\.It Li (p2pfs_\w+) Pq (gauge|counter)", section, re.MULTILINE))


# -- metrics


def test_the_manual_has_every_metric_and_no_other(node):
    text = node.path(".p2pfs/metrics").read_text()
    served = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    assert served == documented()
    assert set(re.findall(r"^# HELP (\S+) \S.*\.$", text, re.MULTILINE)) == set(served)
    for name, kind in served.items():
        assert re.fullmatch(r"p2pfs(_[a-z]+)+", name), name
        assert name.endswith("_total") == (kind == "counter"), name
    for line in text.splitlines():
        assert line.startswith("#") or re.fullmatch(r'p2pfs_\w+(\{.*\})? [0-9.]+', line), line


class Sampler(threading.Thread):
    """Looks at the metrics of nodes over and over; moved() says which had more than one value."""

    def __init__(self, *nodes):
        super().__init__(daemon=True)
        self.nodes = list(nodes)
        self.seen = {}
        self.ended = False

    def look(self):
        for node in list(self.nodes):
            for key, value in node.metrics().items():
                self.seen.setdefault(key, {}).setdefault(node.name, set()).add(value)

    def run(self):
        while not self.ended:
            try:
                self.look()
            except OSError:
                pass
            time.sleep(0.02)

    def moved(self):
        names = set()
        for key, by_node in self.seen.items():
            first = [sorted(values) for values in by_node.values()]
            if any(len(values) > 1 for values in first) or len(set(map(tuple, first))) > 1:
                names.add(key.split("{")[0])
        if len([key for key in self.seen if key.startswith("p2pfs_info{")]) > 1:
            names.add("p2pfs_info")
        return names


def flip_a_byte(node, size):
    """Damages the memory in which the node keeps a replica of that size."""
    for entry in Path(f"/proc/{node.pid}/fd").iterdir():
        try:
            known = os.stat(entry)
            if "(deleted)" not in os.readlink(entry) or known.st_size != size:
                continue
            with open(entry, "r+b", buffering=0) as memory:
                byte = os.pread(memory.fileno(), 1, size // 2)
                os.pwrite(memory.fileno(), bytes([byte[0] ^ 0x40]), size // 2)
            return
        except FileNotFoundError:
            pass
    raise AssertionError(f"{node.name} has no replica of {size} bytes")


def test_every_documented_metric_moves(make_cluster, tmp_path):
    service = Redis(tmp_path / "service").start()
    try:
        cluster = make_cluster(service.url())
        a = cluster.node()
        sampler = Sampler(a)
        sampler.start()
        b = cluster.node(read_timeout=6)
        d = cluster.node(cache_size="128M", read_timeout=6)
        sampler.nodes += [b, d]

        # one for which pages are cleared ahead
        os.symlink(write_file(tmp_path / "large", 64 * MIB), a.path("large"))
        eventually(lambda: b.status()["reserve"] == 64 * MIB, 60)

        # two that pull at once from a slow one, with a reader on top
        a.path("dir").mkdir()
        os.symlink("f", a.path("link"))
        register(a, "f", 40 * MIB)
        appears("f", b, d)
        a.cli("limit", "--upload=16M", "")
        b.cli("limit", "--download=200M", "")
        threads = pulling(b, d)
        assert cat(b.path("f")).returncode == 0
        for thread in threads:
            thread.join()
        assert cat(d.path("f")).returncode == 0

        # a holder that has become very slow: others are asked too
        eventually(lambda: d.cli("evict", "f", check=False).returncode == 0)  # once the kernel has told of the close
        a.cli("limit", "--upload=256K", "")
        d.cli("pull", "f")
        a.cli("limit", "--upload=0", "")

        # one that sends wrong bytes
        register(a, "damaged", 5 * MIB, seed=1)
        appears("damaged", b)
        eventually(lambda: not a.xattr("damaged", "digest").endswith(":"))
        flip_a_byte(a, 5 * MIB)
        assert "Input/output error" in cat(b.path("damaged")).stderr

        # one that is no peer
        with socket.create_connection(a.status()["listen"].rsplit(":", 1)) as link:
            link.sendall(b"GET / HTTP/1.0\r\n\r\n")
            link.shutdown(socket.SHUT_WR)
            try:
                link.recv(1)
            except ConnectionResetError:
                pass

        service.kill()
        eventually(lambda: a.metrics()["p2pfs_metadata_online"] == 0)
        service.start()
        eventually(lambda: a.metrics()["p2pfs_metadata_online"] == 1)

        # one that dies while it sends
        register(a, "late", 8 * MIB, seed=2)
        appears("late", d)
        a.cli("limit", "--upload=1M", "")
        before = d.status()["bytes_received"]
        threads = pulling(d, name="late")
        eventually(lambda: d.status()["bytes_received"] > before)
        sampler.nodes.remove(a)
        a.kill9()
        for thread in threads:
            thread.join()

        sampler.ended = True
        sampler.join()
        sampler.look()
        rdma = {name for name in documented() if "rdma" in name}  # moved in tests/guest
        assert set(documented()) - rdma - sampler.moved() == set()
        assert sampler.moved() - set(documented()) == set()
    finally:
        service.kill()


# -- metrics over HTTP


def fetch(port, path="/metrics", **more):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", **more)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, None, 20) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def names_of(text):
    return re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)


def test_metrics_over_http(cluster):
    port = free_port()
    try:
        node = cluster.node(metrics=f"127.0.0.1:{port}")
    except MountFailed as failure:
        if "libmicrohttpd" in failure.log:
            pytest.skip("built without libmicrohttpd")
        raise
    kind, text = fetch(port)
    assert kind.startswith("text/plain; version=0.0.4")
    assert names_of(text) == names_of(node.path(".p2pfs/metrics").read_text())
    assert fetch(port, "/metrics?x=1")[1].startswith("# HELP p2pfs_info")
    assert fetch(port, method="HEAD")[1] == ""
    for path, method, code in (("/else", "GET", 404), ("/metrics", "PUT", 405)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            fetch(port, path, method=method)
        assert refused.value.code == code

    # connections that say nothing hold up neither the mount nor, when they go, anybody else
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
    register(node, "f", MIB)
    assert node.metrics()["p2pfs_files"] == 1
    for link in idle:
        link.close()
    eventually(lambda: "p2pfs_files 1" in fetch(port)[1])

    with pytest.raises(MountFailed) as taken:
        cluster.node(metrics=f"127.0.0.1:{port}")
    assert f"metrics=127.0.0.1:{port}" in taken.value.log and "in use" in taken.value.log
    for wrong in ("nonsense", "127.0.0.1:99999"):
        with pytest.raises(MountFailed) as refused:
            cluster.node(metrics=wrong)
        assert f"metrics={wrong}" in refused.value.log


# -- peers, why, top


@pytest.fixture
def three(cluster):
    """Two that have "f", and one that has not."""
    a, b, d = cluster.nodes(3)
    register(a, "f", 24 * MIB + 5)
    appears("f", b, d)
    b.cli("pull", "f")
    return a, b, d


def test_why_tells_from_whom_each_shard_came(three):
    a, b, d = three
    done = d.cli("why", "f", check=False)
    assert done.returncode == 1 and "p2pfs pull" in done.stderr
    d.cli("pull", "f")
    why = json.loads(d.cli("why", "--json", "f").stdout)
    shards = why["shards"]
    assert shards == 25 and why["shards_present"] == why["shards_pulled"] == shards
    assert [one["shard"] for one in why["each"]] == list(range(shards))
    assert why["bytes_pulled"] == why["size"] == 24 * MIB + 5
    assert {one["node"] for one in why["each"]} <= {a.name, b.name}
    assert {one["transport"] for one in why["each"]} == {"tcp"}
    for row in why["from"]:
        mine = [one for one in why["each"] if one["node"] == row["node"]]
        assert row["shards"] == len(mine) and row["missed"] == sum(one["missed"] for one in mine)
        for key in ("queued_s", "wire_s", "verify_s"):
            assert abs(row[key] - sum(one[key] for one in mine)) < 1e-6
    assert 0 < len(why["slowest"]) <= 5
    text = d.cli("why", "f").stdout
    assert text.startswith("f: 25 of 25 shards are here, 25 were pulled: 24.0 MiB in ")
    assert re.search(rf"^({a.name}|{b.name}) +tcp +\d+ ", text, re.MULTILINE)

    assert "no shard of it was pulled" in a.cli("why", "f").stdout
    d.cli("evict", "f")
    assert d.cli("why", "f", check=False).returncode == 1
    a.path("dir").mkdir()
    done = a.cli("why", "dir", check=False)
    assert done.returncode == 1 and "is a directory" in done.stderr


def test_peers_tells_how_well_each_does(three):
    a, b, d = three
    eventually(lambda: {peer["node"] for peer in d.peers()["peers"]} == {a.name, b.name})
    d.cli("pull", "f")
    peers = {peer["node"]: peer for peer in d.peers()["peers"]}
    assert sum(peer["received"] for peer in peers.values()) == 24 * MIB + 5
    assert sum(peer["verified"] for peer in peers.values()) == 25
    eventually(lambda: any(peer["rate_down"] for peer in d.peers()["peers"]))
    for peer in peers.values():
        assert peer["transport"] in ("tcp", "") and peer["address"] and peer["live"]
        assert peer["quarantine_s"] == 0 and not peer["quarantined"]
    text = d.cli("peers", "").stdout
    assert re.match(r"NODE +ADDRESS +STATE +OVER +DOWN +UP +GOT +SENT ", text)
    assert re.search(rf"^{a.name} +127\.0\.0\.1:\d+ ", text, re.MULTILINE)


def test_top_shows_progress(three):
    a, b, d = three
    for node in (a, b):
        node.cli("limit", "--upload=1M", "")
    a.path("dir").mkdir()
    appears("dir", d)
    threads = pulling(d)
    eventually(lambda: d.status()["pulls_running"] == 1)
    eventually(lambda: d.status()["bytes_received"] > 0)
    eventually(lambda: any(peer["rate_down"] for peer in d.peers()["peers"]))
    text = d.cli("top", "--once", "dir").stdout  # any path below the mount will do
    assert text.startswith(f"{d.name}: down ") and "cache " in text
    assert re.search(r"^ *\d+% +24\.0 MiB +0\.0\d\d +\d+:\d\d +\d+ +0 +f$", text, re.MULTILINE), text
    assert re.search(rf"^{a.name} +\S+ \S+/s ", text, re.MULTILINE)
    frames = json.loads(d.cli("top", "--once", "--json", "").stdout)
    [pull] = frames["pulls"]
    assert pull["name"] == "f" and pull["shards"] == 25 and pull["whole"]

    follow = subprocess.Popen(
        [BINARY, "top", "--json", "--interval=0.1", d.dir], stdout=subprocess.PIPE, text=True
    )
    one, other = json.loads(follow.stdout.readline()), json.loads(follow.stdout.readline())
    assert other["clock_s"] > one["clock_s"]
    follow.terminate()
    follow.wait()
    follow.stdout.close()
    for node in (a, b):
        node.cli("limit", "--upload=0", "")
    for thread in threads:
        thread.join()
    eventually(lambda: "nothing is being pulled" in d.cli("top", "--once", "").stdout)
    for words in (["--interval=0"], ["--interval", "soon"], ["a", "b"]):
        assert run_p2pfs("top", *words, check=False).returncode == 2


def test_top_on_a_terminal_draws_over_itself(node):
    ours, its = pty.openpty()
    top = subprocess.Popen([BINARY, "top", "--interval=0.1", node.dir], stdout=its)
    os.close(its)
    text = ""
    while text.count("\033[H\033[2J") < 3:
        text += os.read(ours, 4096).decode()  # EIO if it ended: then the test fails
    assert "nothing is being pulled" in text
    top.terminate()
    top.wait()
    os.close(ours)


# -- limits


@pytest.mark.parametrize("kind", ["upload", "download"])
def test_a_limit_is_not_exceeded(cluster, kind):
    rate = 16 * MIB
    size = 20 * MIB
    limits = {f"max_{kind}": "16M"}
    a = cluster.node(**(limits if kind == "upload" else {}))
    b = cluster.node(**(limits if kind == "download" else {}))
    register(a, "f", size)
    appears("f", b)
    began = time.monotonic()
    b.cli("pull", "f")
    seconds = time.monotonic() - began
    # never faster; how near it comes is measured by scripts/bench, for here others use the machine
    assert size / seconds < rate * 1.1
    assert b.metrics()["p2pfs_received_bytes_total"] == size
    limited = a if kind == "upload" else b
    assert limited.metrics()[f"p2pfs_{kind}_limit_bytes_per_second"] == rate
    assert "at most 16.0 MiB/s" in limited.cli("status", "").stdout


def test_a_limit_holds_for_all_peers_together_and_can_be_lifted(cluster):
    a, b, d = cluster.nodes(3)
    register(a, "f", 32 * MIB)
    appears("f", b, d)
    assert json.loads(a.cli("limit", "--upload=4M", "--json", "").stdout)["max_upload"] == 4 * MIB
    began = time.monotonic()
    threads = pulling(b, d)
    time.sleep(1)
    served = a.status()["bytes_served"]
    assert served <= 4 * MIB * (time.monotonic() - began + 0.5) + 2 * MIB
    text = a.cli("limit", "--upload=0", "").stdout
    assert text == "upload: no limit\ndownload: no limit\n"
    for thread in threads:
        thread.join()
    assert b.status()["bytes_received"] >= 32 * MIB and d.status()["bytes_received"] >= 32 * MIB


def test_a_reader_goes_before_the_rest_under_a_limit(cluster):
    a = cluster.node(max_upload="4M")
    b = cluster.node()
    register(a, "f", 64 * MIB)
    appears("f", b)
    with open(b.path("f"), "rb", buffering=0) as source:
        assert len(os.pread(source.fileno(), 4096, 0)) == 4096  # the whole file begins to come
        assert len(os.pread(source.fileno(), 4096, 60 * MIB)) == 4096
        assert b.status()["bytes_received"] < 40 * MIB  # it did not wait for what lies before
        a.cli("limit", "--upload=0", "")


def test_wrong_limits(node):
    for words in (["--upload=1K"], ["--download", "much"], ["a", "b"]):
        assert run_p2pfs("limit", *words, check=False).returncode == 2
    assert node.cli("limit", "").stdout == "upload: no limit\ndownload: no limit\n"


def test_an_idle_seeder_serves_readers_first_and_the_rest_in_the_end(cluster):
    a = cluster.node(seed="idle", max_download="4M")
    b, d = cluster.nodes(2)
    assert a.status()["seed"] == "idle" and b.status()["seed"] == "normal"
    register(a, "f", 16 * MIB)
    register(d, "other", 256 * MIB)
    appears("f", b)
    appears("other", a)
    work = pulling(a, name="other")  # it has work of its own, for longer than this test takes
    eventually(lambda: a.status()["pulls_running"] == 1)
    with open(b.path("f"), "rb", buffering=0) as source:
        for at in (9, 3, 12):
            assert len(os.pread(source.fileno(), 4096, at * MIB)) == 4096
    before = b.status()["bytes_received"]
    assert before < 16 * MIB  # nobody waits for the rest, so it comes slowly
    eventually(lambda: b.status()["bytes_received"] > before)
    a.cli("limit", "--download=0", "")
    for thread in work:
        thread.join()
    b.cli("pull", "f")  # and at once when the work is done
