"""The cases `read`, `register` and `arrive` of scripts/bench: what programs do with files of a mount, beside the same
bytes on a tmpfs of huge pages, where they lie, and by what serves files over HTTP.

There is no row for NFS: it needs nfsd and nfs in the kernel, which the machines that this was written on have not.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

from bench.loaders import Http, timed, turned
from harness.node import run_p2pfs
from harness.wait import eventually

MIB = 1 << 20
RCLONE = 256 * MIB  # what rclone reads of a complete file: a second or two

# How it is read, what that is called, and its goal beside the same file elsewhere.
READS = (
    ("dd", "dd bs=1M", ">= 0.95"),
    ("mmap", "mmap, a byte of each page", None),
    ("shared", "mmap, sum, shared", ">= 0.95"),
    ("private", "mmap, sum, private", ">= 0.95"),
    ("splice", "splice", ">= 0.95"),
    ("sendfile", "sendfile", None),
    ("direct", "O_DIRECT, 1 MiB", ">= 0.95"),
    ("fio", "fio psync, 4 KiB at random", ">= 0.85"),
)


def missing(*programs):
    """Whether one of them is not here, which is said."""
    absent = [name for name in programs if shutil.which(name) is None]
    if absent:
        print(f"bench: rows without {', '.join(absent)} (scripts/bootstrap --bench)", file=sys.stderr)
    return bool(absent)


# -- Complete files


def dd(bench, path):
    said = bench.run("sh", "-c", 'LC_ALL=C exec dd if="$0" of=/dev/null bs=1M 2>&1', path)
    took = re.search(r"(\d+) bytes .*copied, ([\d.e-]+) s", said)
    return int(took[1]) / 1e9 / float(took[2])


def fio(bench, path):
    out = bench.run(
        "fio", "--name=random", f"--filename={path}", "--readonly", "--allow_file_create=0", "--ioengine=psync",
        "--rw=randread", "--bs=4k", "--norandommap", "--invalidate=0", "--time_based", "--runtime=500ms",
        "--output-format=json",
    )  # fmt: skip
    return json.loads(out)["jobs"][0]["read"]["bw_bytes"] / 1e9


def read_each(bench, how, paths):
    """GB/s of each path, which take turns: from the first to the last and back."""
    if how in ("dd", "fio"):
        one = {"dd": dd, "fio": fio}[how]
        there = [one(bench, path) for path in paths]
        back = [one(bench, path) for path in reversed(paths)]
        return [statistics.harmonic_mean(pair) for pair in zip(there, reversed(back))]
    lines = bench.run(bench.program("bench_read"), how, MIB, *paths).splitlines()
    return [int(size) / 1e9 / float(seconds) for size, seconds in map(str.split, lines)]


def cpu_of(pid):
    """Seconds that the process's threads have run, by the scheduler's own clock: /proc/PID/stat counts in 10 ms."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text(encoding="ascii").split()[0]) for task in tasks) / 1e9


def cpu_of_reading(node, path):
    """The same, while somebody reads a file: opening it and closing it are requests to that process, reading is not."""
    room = bytearray(MIB)
    with open(path, "rb", buffering=0) as file:
        before = cpu_of(node.pid)
        while file.readinto(room):
            pass
        return cpu_of(node.pid) - before


def taken_bytes():
    """Of this machine's memory by programs, files in memory and the page cache."""
    table = Path("/proc/meminfo").read_text(encoding="ascii")
    return sum(int(re.search(rf"^{key}:\s+(\d+)", table, re.M)[1]) * 1024 for key in ("Cached", "AnonPages"))


def read_by_eight(bench, path):
    """Bytes that the whole machine takes more while eight processes read a file that is here."""
    command = [bench.program("bench_read"), "shared", str(MIB), path]
    most = before = taken_bytes()
    readers = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(8)]
    while any(reader.poll() is None for reader in readers):
        most = max(most, taken_bytes())
        time.sleep(0.01)
    return most - before


def read(bench):
    cluster = bench.cluster()
    local, http = bench.home / "local", None
    try:
        node = cluster.node("a")
        source = bench.source(bench.size)
        bench.run("cp", source, node.path("file"))
        bench.run("cp", source, local)
        os.symlink(local, node.path("link"))
        eventually(
            lambda: all(bench.sealed(node.path(name)) for name in ("file", "link")), 60, "both are digested"
        )
        places = {"mount": node.path("file"), "huge": source, "link": node.path("link"), "local": local}
        pids = [node.pid]
        if not missing("nginx", "rclone"):
            cache = ("--vfs-cache-mode", "full", "--cache-dir", bench.home / "rclone-cache")
            http = Http(bench.home, bench.source(min(bench.size, RCLONE)), 1, *cache)
            dd(bench, http.file(0))
            pids += http.pids()
        hows = [row for row in READS if row[0] != "fio" or not missing("fio")]
        turns = count()

        def once():
            result, turn = {}, next(turns)
            with bench.watch(pids) as watch:
                for how, *_ in hows:
                    # O_DIRECT where they lie measures the disk
                    keys = turned(turn, list(places)[: 2 if how == "direct" else 4])
                    rates = read_each(bench, how, [places[key] for key in keys])
                    result.update({(how, key): rate for key, rate in zip(keys, rates)})
                if http:
                    result["rclone", "dd"] = dd(bench, http.file(0))
                    (result["rclone", "shared"],) = read_each(bench, "shared", [http.file(0)])
                result["cpu"] = cpu_of_reading(node, places["mount"])
            result["memory"] = read_by_eight(bench, node.path("file"))
            return watch.others, result

        once()  # the first read warms
        results, note = bench.quiet(bench.options.rounds, once)
        for place, beside, name in (("mount", "huge", "complete"), ("link", "local", "in place")):
            for how, what, goal in hows:
                if (how, place) in results[0]:
                    bench.add_beside("read", f"{name}: {what} (of the same on {beside})", results, (how, place),
                                     (how, beside), goal=goal, note=note)  # fmt: skip
        if http:
            for how, what in (("dd", "dd bs=1M"), ("shared", "mmap, sum, shared")):
                bench.add_beside("read", f"rclone mount, all in its cache: {what} (of the same on huge)", results,
                                 ("rclone", how), (how, "huge"))  # fmt: skip
        bench.table.add("read", "CPU of the mount's process while the complete file, once open, is read",
                        [1000 * r["cpu"] for r in results], "ms", goal="0")  # fmt: skip
        added = [result["memory"] for result in results]
        bench.table.add("read", "memory that 8 readers by mmap add", [value / 1e6 for value in added], "MB",
                        ratio=1 + statistics.median(added) / bench.size, goal="<= 1.02")  # fmt: skip
    finally:
        if http:
            http.close()
        local.unlink(missing_ok=True)
        for size in {bench.size, min(bench.size, RCLONE)}:
            bench.source(size).unlink()
        cluster.cleanup()


# -- Files that are written


def register(bench):
    cluster = bench.cluster()
    small = bench.tmpfs / "small"
    try:
        node = cluster.node("a")
        source = bench.source(bench.size)
        small.mkdir()
        for k in range(1000):
            (small / f"{k}").write_bytes(os.urandom(4096))
        turns, names = count(), count()

        def copied(key, to):
            bench.warm(bench.size)
            seconds = timed(lambda: bench.run("cp", source, to))
            if key == "mount":
                eventually(lambda: bench.sealed(to), 60, "it is digested, which is not the next one's cost")
            return bench.size / 1e9 / seconds

        def once():
            result = {}
            places = {
                "tmpfs": bench.tmpfs / "copy",
                "huge": bench.huge / "copy",
                "mount": node.path(f"f{next(names)}"),
            }
            with bench.watch([node.pid]) as watch:
                for key in turned(next(turns), places):
                    result[key] = copied(key, places[key])
                for path in places.values():
                    path.unlink()
                result["link"] = 1000 * timed(lambda: os.symlink(source, node.path("link")))
                node.path("link").unlink()
                result["small"] = 1000 / timed(lambda: bench.run("cp", "-r", small, node.path("small")))
                shutil.rmtree(node.path("small"))
            return watch.others, result

        once()
        results, note = bench.quiet(bench.options.rounds, once)
        add = bench.table.add
        add("register", "cp to tmpfs", [r["tmpfs"] for r in results], "GB/s", note=note)
        bench.add_beside("register", "cp to the mount (of huge tmpfs)", results, "mount", "huge", goal=">= 0.95",
                         note=note)  # fmt: skip
        add("register", "ln -s of the file", [r["link"] for r in results], "ms")
        add("register", "cp -r of 1000 files of 4 KiB", [r["small"] for r in results], "files/s")
    finally:
        shutil.rmtree(small, ignore_errors=True)
        bench.source(bench.size).unlink()
        cluster.cleanup()


# -- Files that are not here yet


def arrive(bench):
    cluster = bench.cluster()
    source, disk, http = bench.source(bench.size), bench.home / "fetched", None
    try:
        a, b, c = cluster.node("a"), cluster.node("b"), cluster.node("c", open="wait")
        shutil.copyfile(source, a.path("file"))
        path, waits = b.path("file"), c.path("file")
        for other in (path, waits):
            eventually(other.exists, 5, "the other nodes see the file")
        pids = [a.pid, b.pid, c.pid]
        if not missing("nginx", "rclone", "curl"):
            http = Http(bench.home, source, 4 * bench.options.rounds + 1)
            pids += http.pids()
        turns, names = count(), count()

        def cat(file):
            with open(os.devnull, "wb") as nowhere:
                subprocess.run(["cat", file], stdout=nowhere, check=True)

        def fetched():
            bench.run("curl", "-sf", "-o", disk, http.url(0))
            cat(disk)

        def once():
            result = {}
            ways = {"pull": lambda: run_p2pfs("pull", path), "cat": lambda: cat(path), "wait": lambda: cat(waits)}
            if http:
                ways |= {"http": fetched, "rclone": lambda: cat(http.file(next(names)))}
            with bench.watch(pids) as watch:
                for way in turned(next(turns), ways):
                    for copy in (path, waits):
                        eventually(lambda copy=copy: bench.evicted(copy), 30, "the copy is evicted")
                    bench.warm(bench.size)
                    seconds = timed(ways[way])
                    result[way] = bench.size / 1e9 / seconds
                    if way == "pull":
                        result["then"] = bench.size / 1e9 / (seconds + timed(lambda: cat(path)))
                    disk.unlink(missing_ok=True)
            return watch.others, result

        once()
        results, note = bench.quiet(bench.options.rounds, once)
        bench.table.add("arrive", "p2pfs pull", [r["pull"] for r in results], "GB/s", note=note)
        for key, what, goal in (
            ("cat", "cat of a file that is not here yet (of p2pfs pull)", ">= 0.90"),
            ("wait", "the same with open=wait", None),
            ("then", "p2pfs pull, and cat when it is complete", None),
            ("http", "curl from nginx to the disk, then cat", None),
            ("rclone", "cat of it in an rclone mount of nginx", None),
        ):
            if key in results[0]:
                bench.add_beside("arrive", what, results, key, "pull", goal=goal, note=note)
    finally:
        if http:
            http.close()
        disk.unlink(missing_ok=True)
        source.unlink()
        cluster.cleanup()
