"""The cases `first`, `seek`, `flat` and `limit` of scripts/bench: how soon a reader has its bytes, whether many pulls
in a row stay as fast and leave nothing behind, and whether limits hold."""

import json
import os
import statistics
import subprocess
import time
from pathlib import Path

from bench import swarm
from harness.env import BINARY
from harness.wait import eventually

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
FAR = 10 * GIB  # the file of `seek`
AHEAD = 3.0  # seconds that its reader reads at the front before it seeks
PULLS, EDGE = 200, 20  # of `flat`: all, and those at either end that are compared
LIMIT, WINDOW = 64, 4  # MiB/s, and the seconds in which what comes through is counted


def _evict(bench, path):
    eventually(lambda: bench.evicted(path), 30, f"{path} is evicted")


def _visible(node, name="file"):
    eventually(node.path(name).exists, 30, f"{name} on {node.name}")
    return node.path(name)


def _pull(path):
    """Seconds of `p2pfs pull`, by its own clock."""
    done = subprocess.run([BINARY, "pull", "--json", path], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["seconds"]


def _read_timed(path, at):
    """Seconds to open a file and read 4 KiB of it."""
    begun = time.monotonic()
    fd = os.open(path, os.O_RDONLY)
    try:
        if len(os.pread(fd, 4096, at)) != 4096:
            raise AssertionError(f"{path} is short")
        return time.monotonic() - begun
    finally:
        os.close(fd)


# -- How soon a reader has its bytes


def first(bench):
    """Loopback, nothing here: for the first reader after mounting, which connects, and for later ones."""
    sizes, names = (64 * MIB, 2 * GIB), 4
    cluster = bench.cluster()
    times = {(size, when): [] for size in sizes for when in ("mounted", "later")}
    try:
        holder, reader = cluster.node("a"), cluster.node("b")
        for size in sizes:
            for k in range(names):
                os.symlink(bench.source(size), holder.path(f"{size}-{k}"))
                eventually(lambda: bench.sealed(holder.path(f"{size}-{k}")), 120, "it is digested")
        for _ in range(bench.options.rounds):
            for size in sizes:
                reader.restart()  # forgets what the kernel has of the files, too
                for k in range(names):
                    path = _visible(reader, f"{size}-{k}")
                    times[size, "later" if k else "mounted"].append(1e3 * _read_timed(path, 0))
                    _evict(bench, path)
    finally:
        cluster.cleanup()
        for size in sizes:
            bench.source(size).unlink()
    for (size, when), values in times.items():
        words = {"mounted": "first of a mount", "later": "a later file"}[when]
        bench.table.add("first", f"first 4 KiB of {size // MIB} MiB (shards of {size // MIB // 256 or 1}), {words}",
                        values, "ms", goal="< 10")  # fmt: skip


class _Far:
    """A file of 10 GiB in place on one host, and a reader on another, between them links that tc caps."""

    def __init__(self, bench):
        self.source = bench.huge / "far"
        self.net = swarm.Net(2, bench.options.rate, bench.options.congestion)
        self.cluster = bench.cluster()
        try:
            with open(self.source, "wb") as out:
                out.truncate(FAR)  # a hole: no memory, and nothing of it is compressed on the way
            holder, self.reader = self._node(0), self._node(1)
            os.symlink(self.source, holder.path("file"))
            self.path = _visible(self.reader)
            eventually(lambda: not holder.xattr("file", "digest").endswith(":"), 120, "the file is digested")
            self.shard = int(holder.xattr("file", "shard_size"))
        except BaseException:
            self.close()
            raise

    def _node(self, host):
        node = self.cluster.node(f"h{host}", start=False, listen=f"{self.net.address(host)}:7400")
        node.before = ["nsenter", f"--net={swarm.NETNS}/h{host}"]
        return node.start()

    def forget(self):
        """Nothing is here, and nothing comes any more."""
        self.reader.restart()
        _visible(self.reader)

    def landed(self):
        """Shards that are here."""
        return int(self.reader.xattr("file", "resident")) // self.shard

    def close(self):
        self.cluster.cleanup()
        self.net.close()
        self.source.unlink(missing_ok=True)


def seek(bench):
    """The end of a cold file of 10 GiB, at once, and by a reader that reads at the front when it seeks."""
    far = _Far(bench)
    try:
        one = far.shard * 8 / swarm.rate_bits(bench.options.rate)
        waited, landed = {"cold": [], "ahead": []}, {"cold": [], "ahead": []}
        for _ in range(bench.options.rounds):
            for when in waited:
                far.forget()
                if when == "ahead":
                    _read_timed(far.path, 0)
                    time.sleep(AHEAD)  # the rest goes on coming
                before = far.landed()
                waited[when].append(_read_timed(far.path, FAR - 4096))
                landed[when].append(far.landed() - before)
    finally:
        far.close()
    add = bench.table.add
    add("seek", f"a shard of {far.shard // MIB} MiB over {bench.options.rate}", [one], "s")
    for when, words in (("cold", "at once"), ("ahead", f"{AHEAD:.0f} s into the front")):
        add("seek", f"last 4 KiB of {FAR // GIB} GiB, {words} (of a shard's time)", waited[when], "s",
            ratio=statistics.median(waited[when]) / one)  # fmt: skip
        add("seek", f"... shards that landed meanwhile, of {FAR // far.shard}", landed[when], "")


# -- Whether it stays so


def _held(bench, node):
    """What a node holds: memory of its own, bytes of replicas, descriptors, threads."""
    proc = Path(f"/proc/{node.pid}")
    return {
        "memory of its own, MB": node.rss() / 1e6,
        "bytes of replicas, MB": bench.storage(node.pid) / 1e6,
        "descriptors": len(list((proc / "fd").iterdir())),
        "threads": len(list((proc / "task").iterdir())),
    }


def _flat_once(bench, size):
    """The rates of all pulls, and what both nodes held behind the first and behind the last of them."""
    cluster = bench.cluster()
    rates, held = [], []
    try:
        pair = cluster.node("a"), cluster.node("b")
        subprocess.run(["cp", bench.source(size), pair[0].path("file")], check=True)
        path = _visible(pair[1])
        bench.warm(2 * size)
        _pull(path)  # connects, and shows everybody their memory
        _evict(bench, path)
        with bench.watch([node.pid for node in pair]) as watch:
            for number in range(PULLS):
                rates.append(size / 1e9 / _pull(path))
                _evict(bench, path)
                if number in (EDGE - 1, PULLS - 1):
                    held.append([_held(bench, node) for node in pair])
        return watch.others, (rates, held)
    finally:
        cluster.cleanup()


def flat(bench):
    """Many pulls of a file in a row on one pair of mounts, each evicted behind it; every round has mounts of its own."""
    size = min(bench.size, 512 * MIB)
    rounds, note = bench.quiet(bench.options.rounds, lambda: _flat_once(bench, size))
    bench.source(size).unlink()
    begin = [statistics.median(rates[:EDGE]) for rates, _ in rounds]
    end = [statistics.median(rates[-EDGE:]) for rates, _ in rounds]
    add = bench.table.add
    add("flat", f"pulls of {size // MIB} MiB: the first {EDGE} of {PULLS}", begin, "GB/s", note=note)
    add("flat", f"... the last {EDGE} (of the first)", end, "GB/s", goal="0.95 .. 1.05",
        ratio=statistics.median(last / first for last, first in zip(end, begin)))  # fmt: skip
    for who, name in enumerate(("holder", "puller")):
        for what in rounds[0][1][0][who]:
            grown = [after[who][what] - before[who][what] for _, (before, after) in rounds]
            add("flat", f"... {name}: {what}, more than after {EDGE}", grown, "", goal="0")


# -- Whether limits hold


class _Limited:
    """One holder and two pullers of a file that a limit makes last; what comes through in some seconds."""

    def __init__(self, bench, cluster):
        self.bench, self.nodes = bench, [cluster.node(name) for name in "abc"]
        self.size = LIMIT * MIB * (WINDOW + 4)
        subprocess.run(["cp", bench.source(self.size), self.nodes[0].path("file")], check=True)
        bench.source(self.size).unlink()
        for node in self.nodes:
            _visible(node)

    def count(self, what, limited, pullers):
        """MiB/s, and cores that the limited node takes."""
        subprocess.run([BINARY, "limit", f"--{what}={LIMIT}M", limited.dir], check=True, capture_output=True)
        pulls = [subprocess.Popen([BINARY, "pull", "--quiet", node.path("file")]) for node in pullers]
        key = "bytes_served" if what == "upload" else "bytes_received"
        time.sleep(1)  # the burst and the first connections are over
        with self.bench.watch([limited.pid]) as watch:
            before = limited.status()[key]
            begun = time.monotonic()
            time.sleep(WINDOW)
            moved, took = limited.status()[key] - before, time.monotonic() - begun
        subprocess.run([BINARY, "limit", f"--{what}=0", limited.dir], check=True, capture_output=True)
        for pull in pulls:
            pull.wait()
        return moved / took / MIB, watch.each[0] / took

    def forget(self, *nodes):
        for node in nodes:
            _evict(self.bench, node.path("file"))


def limit(bench):
    """Bytes that a limit lets through, counted by the node that has it, against its rate."""
    cluster = bench.cluster()
    try:
        run = _Limited(bench, cluster)
        a, b, c = run.nodes

        def once():
            found = {}
            with bench.watch([node.pid for node in run.nodes]) as watch:
                found["max_upload, to one peer"] = run.count("upload", a, [b])
                run.forget(b)
                found["max_upload, to two peers"] = run.count("upload", a, [b, c])
                run.forget(b, c)
                found["max_download, from one peer"] = run.count("download", b, [b])
                found["max_download, from two peers"] = run.count("download", c, [c])
                run.forget(b, c)
            return watch.others, found

        results, note = bench.quiet(bench.options.rounds, once)
    finally:
        cluster.cleanup()
    for words in results[0]:
        rates, cores = zip(*(found[words] for found in results))
        bench.table.add("limit", f"{words}, {LIMIT} MiB/s", rates, "MiB/s", note=note,
                        ratio=statistics.median(rates) / LIMIT, goal="0.95 .. 1.05")  # fmt: skip
        bench.table.add("limit", "... CPU of the node that has it", cores, "cores")
