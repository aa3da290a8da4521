"""The case `metadata` of scripts/bench: mounts on a real Redis and a real etcd, on loopback.

Both keep their data as p2pfs-metadata(5) tells operators to have it: Redis with appendonly and its
default of one fsync a second, etcd with its default of one fsync a transaction.
"""

import base64
import os
import re
import shutil
import subprocess
import time
import urllib.request

from harness.env import BINARY, die_with_parent
from harness.services import Etcd, Redis
from harness.wait import eventually

MIB = 1 << 20
NODES = 1000  # that send heartbeats at once
WINDOW = 10.0  # seconds in which they are counted
CHANGES = 100  # whose way to another mount is timed
SMALL = 1000  # files of one cp
PULL = 256 * MIB
SHARDS = (16, 4096)  # of the file that is pulled


class CountedRedis(Redis):
    small_goal = ">= 300"

    def __init__(self, home):
        super().__init__(home, ["--appendfsync", "everysec"])

    def _calls(self, *commands):
        stats = self.ask("INFO", "commandstats")
        found = dict(re.findall(r"^cmdstat_(\S+?):calls=(\d+)", stats, re.M))
        return sum(int(found.get(command, 0)) for command in commands)

    def operations(self):
        """What clients have sent; what a script calls inside is not counted."""
        return self._calls("evalsha", "eval", "xread")

    def requests(self):
        """Transactions and listings, without the heartbeats and looks at the feed that time brings."""
        return self._calls("hincrby", "zrangebylex")

    def records(self):
        """Bytes of each key with its record."""
        lines = subprocess.run(
            ["redis-cli", "-p", str(self.port), "HGETALL", "p2pfs:kv"],
            check=True, capture_output=True, text=True,
        ).stdout.splitlines()  # fmt: skip
        return [len(key) + len(record) for key, record in zip(lines[::2], lines[1::2])]


class CountedEtcd(Etcd):
    small_goal = ">= 100"

    def _messages(self):
        url = f"http://127.0.0.1:{self.port}/metrics"
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, None, 5) as got:
            text = got.read().decode()
        return re.findall(
            r'^grpc_server_msg_received_total\{grpc_method="(\w+)".*\} (\S+)$', text, re.M
        )

    def operations(self):
        return sum(float(count) for _, count in self._messages())

    def requests(self):
        return sum(float(count) for name, count in self._messages() if name in ("Txn", "Range"))

    def records(self):
        code = lambda text: base64.b64encode(text.encode()).decode()  # noqa: E731
        found = self.ask("kv/range", {"key": code("p2pfs/"), "range_end": code("p2pfs0")})
        plain = [[base64.b64decode(kv[part]) for part in ("key", "value")] for kv in found["kvs"]]
        return [len(key) + len(record) for key, record in plain]


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat", encoding="utf-8") as text:
        fields = text.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def small_files(bench, service, cluster):
    """cp of small files into the mount, as a user runs it."""
    small = bench.tmpfs / "small"
    small.mkdir()
    for k in range(SMALL):
        (small / f"{k}").write_bytes(os.urandom(4096))
    a, b = cluster.nodes(2)
    rates = []
    try:
        for k in range(bench.options.rounds):
            begun = time.monotonic()
            subprocess.run(["cp", "-r", small, a.path(f"small{k}")], check=True)
            rates.append(SMALL / (time.monotonic() - begun))
            eventually(lambda k=k: len(os.listdir(b.path(f"small{k}"))) == SMALL, 10)
            shutil.rmtree(a.path(f"small{k}"))
    finally:
        shutil.rmtree(small)
    bench.table.add("metadata", f"{service.name}: cp -r of {SMALL} files of 4 KiB", rates,
                    "files/s", goal=service.small_goal)  # fmt: skip
    return a, b


def changes(bench, service, a, b):
    """From the beginning of a change on one mount until the other one shows it."""
    took = []
    for k in range(CHANGES):
        there = str(b.path(f"change{k}"))
        begun = time.monotonic()
        os.mkdir(a.path(f"change{k}"))
        while not os.path.exists(there):
            if time.monotonic() - begun > 10:
                raise RuntimeError("a change did not reach the other mount")
            time.sleep(0.0002)
        took.append(1000 * (time.monotonic() - begun))
    bench.table.add("metadata", f"{service.name}: mkdir until the other mount shows it", took, "ms",
                    goal="< 50 ms")  # fmt: skip


def pulls(bench, service, cluster):
    """What the service is asked for while a file of few or of many shards is pulled."""
    puller = cluster.node("puller")
    for shards in SHARDS:
        registrar = cluster.node(f"of-{shards}", shard_size=PULL // shards)
        asked = []
        for k in range(bench.options.rounds):
            name = f"{shards}-shards-{k}"
            with open(registrar.path(name), "wb") as out:
                for _ in range(PULL // MIB):
                    out.write(os.urandom(64) * (MIB // 64))
            eventually(puller.path(name).exists, 5)
            if puller.xattr(name, "shards") != str(shards):
                raise RuntimeError(f"{name} has {puller.xattr(name, 'shards')} shards")
            before = service.requests()
            subprocess.run([BINARY, "pull", puller.path(name)], check=True, capture_output=True)
            eventually(lambda name=name: puller.xattr(name, "state") == "complete", 5)
            time.sleep(0.3)  # the last announcement
            asked.append(service.requests() - before)
            for node in (puller, registrar):
                node.path(name).unlink(missing_ok=True)
        bench.table.add("metadata", f"{service.name}: requests of a pull of {shards} shards", asked,
                        "requests", goal="equal")  # fmt: skip
        registrar.stop()
    puller.stop()


def names(bench, service, cluster, a):
    """The first mount of a cluster with many names."""
    count, folders = bench.options.names, 100
    tree = bench.tmpfs / "tree"
    try:
        for k in range(folders):
            (tree / f"folder-{k:03}").mkdir(parents=True)
        for k in range(count):
            with open(tree / f"folder-{k % folders:03}/shard-{k:06}.bin", "wb") as out:
                out.write(b"x")
        begun = time.monotonic()
        os.symlink(tree, a.path("tree"))
        linked = time.monotonic() - begun
        eventually(lambda: all_sealed(a), 600, "every file has been read once")
        times = [mount_and_list(cluster, k, count) for k in range(bench.options.rounds)]
    finally:
        shutil.rmtree(tree)
    bench.table.add("metadata", f"{service.name}: first mount, and a listing of {count} names",
                    times, "s", goal="<= 3 s")  # fmt: skip
    bench.table.add("metadata", f"{service.name}: ln -s of that tree", [linked], "s")


def all_sealed(node):
    """Nothing is read and sealed in the background any more."""
    before = cpu_seconds(node.pid)
    time.sleep(1)
    return cpu_seconds(node.pid) - before < 0.1


def mount_and_list(cluster, serial, count):
    """Seconds from the start of the process to the last name of a listing."""
    node = cluster.node(f"fresh{serial}", start=False)
    begun = time.monotonic()
    node.start(seconds=60)
    found = sum(len(files) for _, _, files in os.walk(node.dir))
    took = time.monotonic() - begun
    node.stop()
    if found != count:
        raise RuntimeError(f"{found} of {count} names were listed")
    return took


def heartbeats(bench, service):
    """Many nodes that do nothing but live, all of them holders of one version of 2 TiB."""
    nodes = subprocess.Popen(
        [bench.program("bench_nodes"), service.url(), str(NODES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    )
    try:
        if not nodes.stdout.readline().startswith("ready"):
            raise RuntimeError("the nodes did not come up")
        time.sleep(5)  # until all of them know all of them
        rates, cores = [], []
        for _ in range(3):
            operations, cpu, begun = service.operations(), cpu_seconds(service.process.pid), time.monotonic()
            time.sleep(WINDOW)
            seconds = time.monotonic() - begun
            rates.append((service.operations() - operations) / seconds)
            cores.append((cpu_seconds(service.process.pid) - cpu) / seconds)
        sizes = service.records()
    finally:
        nodes.stdin.close()
        nodes.wait(120)
    if len(sizes) < 2 * NODES:
        raise RuntimeError(f"{len(sizes)} records for {NODES} nodes and their announcements")
    add = bench.table.add
    add("metadata", f"{service.name}: heartbeats of {NODES} nodes", rates, "operations/s")
    add("metadata", f"{service.name}: ... the server's CPU", cores, "cores")
    add("metadata", f"{service.name}: largest record, 2 TiB held by {NODES} nodes", [max(sizes)],
        "bytes", goal="<< 1.5 MiB", note=f"{len(sizes)} records, {sum(sizes)} bytes")  # fmt: skip


def run(bench):
    for kind in (CountedRedis, CountedEtcd):
        if shutil.which(kind.program) is None:
            raise RuntimeError(f"{kind.program} is not installed ({kind.remedy})")
        service = kind(bench.home / kind.name).start()
        cluster = bench.cluster(service.url())
        try:
            a, b = small_files(bench, service, cluster)
            changes(bench, service, a, b)
            pulls(bench, service, cluster)
            names(bench, service, cluster, a)
        finally:
            cluster.cleanup()
            service.kill()
        service = kind(bench.home / f"{kind.name}-nodes").start()
        try:
            heartbeats(bench, service)
        finally:
            service.kill()
