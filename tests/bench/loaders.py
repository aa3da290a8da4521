"""The case `loaders` of scripts/bench: safetensors, torch and llama.cpp load a model from a mount, beside the same bytes
on tmpfs with huge pages, and beside what serves files over HTTP.

What a loader has only mapped it has not loaded: here every page is touched before the clock stops.
"""

import itertools
import os
import shutil
import statistics
import subprocess
import time

from harness import frameworks
from harness.env import die_with_parent
from harness.frameworks import GGUF, Frameworks
from harness.node import free_port, run_p2pfs
from harness.wait import eventually

MIB = 1 << 20
TENSOR = 32 * MIB

# One line for each load: which, and the file. It answers with the seconds.
LOADER = """
import sys, time, torch
from safetensors.torch import load, load_file, save_file
ways = {
    "safetensors": load_file,
    "safetensors eager": lambda path: load(open(path, "rb").read()),
    "torch": torch.load,
    "torch mmap": lambda path: torch.load(path, mmap=True),
}
def made(size, count):
    return {f"layer.{i}": torch.randint(0, 256, (size,), dtype=torch.uint8) for i in range(count)}
def timed(way, path):
    begun = time.monotonic()
    loaded = ways[way](path)
    touched = sum(int(tensor[::4096].sum()) for tensor in loaded.values())
    return time.monotonic() - begun
for line in sys.stdin:
    way, path, *numbers = line.rstrip("\\n").split("\\t")
    if way == "make":
        tensors = made(*map(int, numbers))
        save_file(tensors, path + ".safetensors")
        torch.save(tensors, path + ".pt")
        del tensors
        print(0, flush=True)
    else:
        print(timed(way, path), flush=True)
"""

NGINX = """
daemon off; master_process off; user root; error_log stderr; pid {home}/pid;
events {{}}
http {{
    access_log off; sendfile on; sendfile_max_chunk 4m;
    server {{ listen 127.0.0.1:{port}; root {root}; autoindex on; }}
}}
"""


class Loader:
    """One process that loads, so that no import is measured."""

    def __init__(self, runner):
        self.process = subprocess.Popen(
            runner.command(runner.interpreter(), "-c", LOADER),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env=runner.environment(), preexec_fn=die_with_parent,
        )  # fmt: skip

    def ask(self, *words):
        self.process.stdin.write("\t".join(map(str, words)) + "\n")
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("the loader ended")
        return float(answer)

    def close(self):
        self.process.communicate()


class Http:
    """A file by HTTP: nginx, and rclone's mount of it, under names of which each can be read once."""

    def __init__(self, home, file, count, *rclone):
        self.root, self.mount = file.parent / "served", home / "rclone"
        for folder in (self.root, self.mount):
            folder.mkdir()
        for k in range(count):
            os.link(file, self.root / f"{k}.safetensors")
        port = free_port()
        conf = home / "nginx.conf"
        conf.write_text(NGINX.format(home=home, port=port, root=self.root))
        self.processes = [self._start("nginx", "-p", home, "-c", conf)]
        self.base = f"http://127.0.0.1:{port}"
        eventually(lambda: subprocess.run(["curl", "-sf", self.base], capture_output=True).returncode == 0, 10)
        self.rclone = shutil.which("rclone") is not None
        if self.rclone:
            self.processes.append(
                self._start("rclone", "mount", ":http:", self.mount, "--http-url", self.base, "--read-only", *rclone)
            )
            eventually(lambda: os.path.ismount(self.mount), 20)

    def url(self, k):
        return f"{self.base}/{k}.safetensors"

    def file(self, k):
        return self.mount / f"{k}.safetensors"

    def pids(self):
        return [process.pid for process in self.processes]

    @staticmethod
    def _start(*words):
        return subprocess.Popen(
            list(map(str, words)), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, preexec_fn=die_with_parent,
        )  # fmt: skip

    def close(self):
        subprocess.run(["umount", "-l", self.mount], capture_output=True, check=False)
        for process in self.processes:
            process.terminate()
            process.wait()
        shutil.rmtree(self.root)
        self.mount.rmdir()


def timed(what):
    begun = time.monotonic()
    what()
    return time.monotonic() - begun


def turned(turn, things):
    """They take turns in being the first: `turn` counts the rounds."""
    return list(things)[:: 1 if turn % 2 else -1]


def on_huge_pages(made):
    """What a framework writes piece by piece does not get them all; a copy does."""
    path = made.with_name(made.name.replace("made", "model"))
    shutil.copyfile(made, path)
    made.unlink()
    return path


def model(bench, loader):
    """The model's files on tmpfs with huge pages, and on the node that serves it."""
    size = bench.options.size or 1024 * MIB
    loader.ask("make", bench.huge / "made", TENSOR, size // TENSOR)
    return [on_huge_pages(bench.huge / f"made{end}") for end in (".safetensors", ".pt")]


def warm_rows(bench, loader, b, files, size):
    """Complete files."""
    ways = {"safetensors": 0, "safetensors eager": 0, "torch": 1, "torch mmap": 1}
    turns = itertools.count()

    def once():
        result, turn = {}, next(turns)
        with bench.watch([b.pid, loader.process.pid]) as watch:
            for way, index in ways.items():
                for key, path in turned(turn, (("mount", b.path(files[index].name)), ("huge", files[index]))):
                    bench.warm(size)
                    result[way, key] = size / 1e9 / loader.ask(way, path)
        return watch.others, result

    once()
    results, note = bench.quiet(bench.options.rounds, once)
    for way in ways:
        bench.add_beside("loaders", f"{way}, complete file (of huge tmpfs)", results, (way, "mount"),
                         (way, "huge"), goal=None if way.endswith("eager") else ">= 0.95", note=note)


def llama_rows(bench, runner, a, b):
    """A process of llama.cpp from its start to its first token."""
    made = bench.huge / "made.gguf"
    runner.python(GGUF, made, 1024, max(1, (bench.options.size or 1024 * MIB) // (40 * MIB)))
    file = on_huge_pages(made)
    shutil.copyfile(file, a.path(file.name))
    eventually(b.path(file.name).exists, 5, "the second node sees the file")
    run_p2pfs("pull", b.path(file.name))
    size = file.stat().st_size
    modes = ("mmap", "none")
    turns = itertools.count()

    def started(model, mode):
        return timed(lambda: runner.run(
            "llama-completion", "-m", model, "--load-mode", mode, "-p", "a", "-n", 1, "-no-cnv", "--no-warmup"
        ))  # fmt: skip

    def once():
        result, turn = {}, next(turns)
        with bench.watch([b.pid]) as watch:
            for mode in modes:
                for key, path in turned(turn, (("mount", b.path(file.name)), ("huge", file))):
                    bench.warm(size)
                    result[mode, key] = size / 1e9 / started(path, mode)
        return watch.others, result

    once()
    results, note = bench.quiet(bench.options.rounds, once)
    for mode in modes:
        bench.add_beside("loaders", f"llama.cpp --load-mode {mode}, to the first token (of huge tmpfs)", results,
                         (mode, "mount"), (mode, "huge"), goal=">= 0.95", note=note)


def cold_rows(bench, loader, nodes, files, http, size):
    """A file that nothing is here of: pulled and loaded at once, and what others do instead."""
    path, streamed = (node.path(files[0].name) for node in nodes[1:])
    pids = [*http.pids(), *(process.pid for process in (*nodes, loader.process))]
    serial = iter(range(1 << 20))

    def away(path=path):
        eventually(lambda: bench.evicted(path), 30, "the copy is evicted")
        bench.warm(size)

    def fetched():
        target = bench.huge / "fetched.safetensors"
        run = ["curl", "-sf", "-o", target, http.url(0)]
        seconds = timed(lambda: subprocess.run(run, check=True)) + loader.ask("safetensors", target)
        target.unlink()
        return seconds

    def once():
        result = {}
        with bench.watch(pids) as watch:
            away()
            result["pull"] = timed(lambda: run_p2pfs("pull", path))
            result["warm"] = loader.ask("safetensors", path)
            away()
            result["mapped"] = loader.ask("safetensors", path)
            away()
            result["eager"] = loader.ask("safetensors eager", path)
            away(streamed)
            result["streamed"] = loader.ask("safetensors", streamed)
            bench.warm(size)
            result["http"] = fetched()
            if http.rclone:
                bench.warm(size)
                result["rclone"] = loader.ask("safetensors", http.file(next(serial)))
        return watch.others, result

    once()
    results, note = bench.quiet(bench.options.rounds, once)

    def seconds(key):
        return [result[key] for result in results]

    longer = max(statistics.median(seconds("pull")), statistics.median(seconds("warm")))
    add = bench.table.add
    add("loaders", "p2pfs pull of it", seconds("pull"), "s", note=note)
    add("loaders", "safetensors, complete file", seconds("warm"), "s", note=note)
    for key, what, goal in (
        ("mapped", "safetensors, cold: pulled while it is loaded (of the longer of both)", "<= 1.3"),
        ("streamed", "the same with open=stream", None),
        ("eager", "safetensors, cold, read whole before it is parsed", None),
        ("http", "curl from nginx, then load", None),
        ("rclone", "rclone mount of nginx, load", None),
    ):
        if key in results[0]:
            values = seconds(key)
            add("loaders", what, values, "s", ratio=statistics.median(values) / longer, goal=goal, note=note)


def run(bench):
    if (reason := frameworks.why_none()) is not None:
        raise RuntimeError(reason)
    cluster = bench.cluster()
    loader = http = None
    try:
        a, b, c = cluster.node("a"), cluster.node("b"), cluster.node("c", open="stream")
        runner = Frameworks(bench.home, newer=True)
        maker = Loader(runner)
        files = model(bench, maker)
        maker.close()
        size = files[0].stat().st_size
        for file in files:
            shutil.copyfile(file, a.path(file.name))
        http = Http(bench.home, files[0], 4 * bench.options.rounds + 1)
        for file in files:
            eventually(b.path(file.name).exists, 5, "the second node sees the file")
            run_p2pfs("pull", b.path(file.name))
        loader = Loader(runner)  # sees what is mounted by now
        warm_rows(bench, loader, b, files, size)
        cold_rows(bench, loader, (a, b, c), files, http, size)
        llama_rows(bench, runner, a, b)
    finally:
        for one in (loader, http):
            if one:
                one.close()
        cluster.cleanup()
