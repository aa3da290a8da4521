"""Real p2pfs processes with real mounts."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from . import fuse
from .env import BINARY, SLOWNESS, die_with_parent
from .wait import eventually

# What a sanitizer writes to stderr when it has found something.
_FINDING = re.compile(r"(ERROR: (Address|Leak)Sanitizer|WARNING: ThreadSanitizer|: runtime error: )")


class MountFailed(Exception):
    """The process ended, or did not serve in time."""

    def __init__(self, message, returncode, log):
        super().__init__(f"{message}\n{log}")
        self.returncode = returncode
        self.log = log


class _Ports:
    """A hundred loopback ports that no other process of the tests uses: it listens at the first of them, for as long as
    it lives. The kernel gives none of them to anybody who asks for any port (those begin at 32768)."""

    def __init__(self):
        for first in range(10000, 20000, 100):
            self.guard = socket.socket()
            try:
                self.guard.bind(("127.0.0.1", first))
                self.guard.listen()
            except OSError:
                self.guard.close()
                continue
            self.turn = itertools.cycle(range(first + 1, first + 100))
            return
        raise RuntimeError("all ports for tests are taken: 127.0.0.1:10000 to 19999")

    def free(self):
        for port in itertools.islice(self.turn, 99):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    continue
            return port
        raise RuntimeError("this test uses more than 99 ports")


_ports = _Ports()  # before a test enters a network of its own, where nobody would see the guard


def free_port():
    """A loopback port that nothing listens on, and that nobody else is given before the test listens there."""
    return _ports.free()


def run_p2pfs(*arguments, check=True, timeout=120, **more):
    """Runs the p2pfs command line to its end; output is text. check=True raises on failure."""
    done = subprocess.run(
        [str(BINARY), *map(os.fspath, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=timeout * SLOWNESS,
        check=False,
        **more,
    )
    if check and done.returncode != 0:
        raise AssertionError(
            f"p2pfs {' '.join(map(str, arguments))} ended with {done.returncode}\n"
            f"{done.stdout}{done.stderr}"
        )
    return done


def _kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


class Node:
    """One p2pfs mount in the foreground, as a child of the test.

    Options are those of -o: Node(..., cache_size="64M", allow_overwrite=True).
    """

    def __init__(self, name, meta, home, **options):
        self.name = name
        self.meta = meta
        self.dir = Path(home) / name
        self.log_file = Path(home) / f"{name}.log"
        self.process = None
        self.env = dict(os.environ)
        self.before = []  # words before the command, such as nsenter's
        self.host = "127.0.0.1"
        self.options = {"node": name, "listen": f"127.0.0.1:{free_port()}", **options}
        self.dir.mkdir(parents=True, exist_ok=True)

    # -- its life

    def command(self):
        words = []
        for key, value in self.options.items():
            if value is None or value is False:
                continue
            text = str(value).replace("\\", "\\\\").replace(",", "\\,")
            words.append(key if value is True else f"{key}={text}")
        mount = [str(BINARY), self.meta, str(self.dir), "-f", "-o", ",".join(words)]
        return [*self.before, *mount]

    def start(self, wait=True, seconds=60):
        """Starts the process, and returns when the mount serves (or raises MountFailed)."""
        assert self.process is None or self.process.poll() is not None, f"{self.name} runs already"
        with open(self.log_file, "ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.env,
                preexec_fn=die_with_parent,
            )
        if wait:
            self.wait_ready(seconds)
        return self

    def wait_ready(self, seconds=60):
        deadline = time.monotonic() + seconds * SLOWNESS
        while True:
            code = self.process.poll()
            if code is not None:
                raise MountFailed(f"{self.name} ended with {code}", code, self.log)
            if fuse.mounted_at(self.dir) and self._serves():
                return
            if time.monotonic() > deadline:
                raise MountFailed(f"{self.name} not mounted in {seconds} s", None, self.log)
            time.sleep(0.005)

    def _serves(self):
        try:
            os.stat(self.dir / ".p2pfs/status.json")
            return True
        except OSError:
            return False

    @property
    def pid(self):
        return self.process.pid

    def alive(self):
        return self.process is not None and self.process.poll() is None

    def mounted(self):
        return fuse.mounted_at(self.dir) is not None

    def wait_exit(self, seconds=60):
        """The exit status of the process, -N for signal N."""
        try:
            return self.process.wait(seconds * SLOWNESS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {seconds} s\n{self.log}") from None

    def stop(self, seconds=60):
        """SIGTERM; the node must unmount and end with 0."""
        self.process.send_signal(signal.SIGTERM)
        code = self.wait_exit(seconds)
        assert code == 0, f"{self.name} ended with {code} after SIGTERM\n{self.log}"
        eventually(lambda: not self.mounted(), what=f"{self.name} unmounted")

    def umount(self, seconds=60):
        """umount(8); the node must end with 0."""
        done = subprocess.run(["umount", self.dir], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        code = self.wait_exit(seconds)
        assert code == 0, f"{self.name} ended with {code} after umount\n{self.log}"

    def kill9(self, unmount=True):
        """SIGKILL. The dead mount is detached, unless the test wants to see it (ENOTCONN)."""
        self.process.kill()
        self.process.wait()
        if unmount:
            fuse.force_unmount(self.dir)

    def pause(self):
        """Stops it; on a busy machine the last of its threads goes on for a while after the signal."""
        self.process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")
        eventually(lambda: all(") T" in (task / "stat").read_text() for task in tasks.iterdir()))

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def restart(self, **options):
        """Stops it if it runs, and starts it again with these options changed."""
        if self.alive():
            self.stop()
        self.options.update(options)
        return self.start()

    def abort(self):
        """Ends the process and fails every request of its mount; safe at any time, from any thread."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        fuse.abort(self.dir)

    def cleanup(self):
        self.abort()
        if self.process is not None:
            self.process.wait()
        fuse.force_unmount(self.dir)

    # -- looking at it

    def path(self, *parts):
        return self.dir.joinpath(*parts)

    @property
    def log(self):
        try:
            return self.log_file.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def sanitizer_finding(self):
        """The sanitizer's report in this node's log, or None."""
        text = self.log
        match = _FINDING.search(text)
        return None if match is None else text[match.start() : match.start() + 6000]

    def status(self):
        return json.loads(self.path(".p2pfs/status.json").read_text())

    def peers(self):
        return json.loads(self.path(".p2pfs/peers.json").read_text())

    def metrics(self):
        """Prometheus samples by name, labels included: {'x_total{a="b"}': 1.0}."""
        samples = {}
        for line in self.path(".p2pfs/metrics").read_text().splitlines():
            if line and not line.startswith("#"):
                key, value = line.rsplit(" ", 1)
                samples[key] = float(value)
        return samples

    def xattr(self, name, key):
        """user.p2pfs.KEY of a file on the mount, as text."""
        return os.getxattr(self.path(name), f"user.p2pfs.{key}").decode()

    def rss(self):
        """Resident memory of the process that belongs to itself alone, in bytes (no page cache)."""
        with open(f"/proc/{self.pid}/status", encoding="ascii") as table:
            for line in table:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
        raise AssertionError("no RssAnon")

    def cli(self, command, *arguments, **more):
        """p2pfs COMMAND with paths on this mount: cli('info', 'a/b') runs p2pfs info DIR/a/b.

        An argument that begins with - is passed as it is; so is one that is absolute.
        """
        words = [
            word if str(word).startswith("-") else str(self.dir / word) for word in arguments
        ]
        return run_p2pfs(command, *words, **more)


class Cluster:
    """Nodes with one metadata service, in one directory of their own."""

    def __init__(self, home, meta=None):
        self.home = Path(home)
        self.meta_dir = self.home / "meta"
        if meta is None:
            self.meta_dir.mkdir(exist_ok=True)
            meta = f"local://{self.meta_dir}"
        self.meta = meta
        self.all = []

    def node(self, name=None, start=True, **options):
        """A new node, started unless start=False."""
        node = Node(name or f"n{len(self.all) + 1}", self.meta, self.home, **options)
        self.all.append(node)
        return node.start() if start else node

    def node_on(self, network, name=None, start=True, **options):
        """A new node on a host of its own, whose address is node.host."""
        host, before = network.host()
        node = self.node(name, start=False, **{"listen": f"{host}:7700", **options})
        node.host = host
        node.before = before
        return node.start() if start else node

    def nodes(self, count, **options):
        return [self.node(**options) for _ in range(count)]

    def daemons(self):
        """The pids of p2pfs processes of this cluster that are in the background."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = (entry / "cmdline").read_bytes()
                if os.fsencode(self.home) in words and os.readlink(entry / "exe") == str(BINARY):
                    found.append(int(entry.name))
            except OSError:
                pass  # it ended meanwhile
        children = {node.pid for node in self.all if node.process is not None}
        return [pid for pid in found if pid not in children]

    def abort(self):
        for node in self.all:
            node.abort()
        for pid in self.daemons():
            _kill(pid)
        for mount in fuse.mounts_below(self.home):
            fuse.abort(mount[0])

    def cleanup(self):
        """Ends all that lives; returns what the sanitizers found, as text."""
        for node in self.all:
            # A clean end lets the leak checker report; whoever does not end cleanly is killed.
            if node.alive():
                node.resume()
                node.process.send_signal(signal.SIGTERM)
        findings = []
        for node in self.all:
            if node.process is not None:
                try:
                    node.process.wait(5 * SLOWNESS)
                except subprocess.TimeoutExpired:
                    pass
            node.cleanup()
            if (finding := node.sanitizer_finding()) is not None:
                findings.append(f"{node.name}: {finding}")
        # mounts that a test made by itself, with mount(8) for one
        for mount in fuse.mounts_below(self.home):
            fuse.force_unmount(mount[0])
        for pid in self.daemons():
            _kill(pid)
        return "\n".join(findings)


def refused(cluster, *expected, **options):
    """What a mount that must not succeed says, in one line that contains all that is expected."""
    node = cluster.node(start=False, **options)
    with pytest.raises(MountFailed) as failure:
        node.start()
    lines = [line for line in failure.value.log.splitlines() if ": info:" not in line]
    assert len(lines) == 1, lines
    for text in expected:
        assert text in lines[0], lines[0]
    return lines[0]
