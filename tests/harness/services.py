"""Real metadata services on loopback ports, and what can happen to them."""

import base64
import http.client
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest


from .env import SLOWNESS, SOURCE, die_with_parent
from .node import free_port


class Service:
    """One server process with a directory of its own. Its data survives kill and restart, unless
    restart(empty=True)."""

    name = None
    program = None
    remedy = "scripts/bootstrap --test"
    host = "127.0.0.1"  # where it listens

    def __init__(self, home, extra=()):
        if shutil.which(self.program) is None:
            pytest.skip(f"{self.program} is not installed ({self.remedy})")
        self.home = Path(home)
        self.home.mkdir(parents=True, exist_ok=True)
        self.data = self.home / "data"
        self.log_file = self.home / "log"
        self.port = free_port()
        self.extra = list(extra)
        self.process = None

    def command(self):
        raise NotImplementedError

    def url(self, prefix="p2pfs", port=None):
        raise NotImplementedError

    def start(self, wait=True):
        """From the main thread only: the server dies with the thread that started it."""
        self.data.mkdir(exist_ok=True)
        with open(self.log_file, "ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.home,
                preexec_fn=die_with_parent,
            )
        return self.wait_ready() if wait else self

    def wait_ready(self):
        deadline = time.monotonic() + 60 * SLOWNESS
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{self.program} does not serve\n{self.log}")
            time.sleep(0.02)
        return self

    def answers(self):
        try:
            with socket.create_connection((self.host, self.port), 1):
                return True
        except OSError:
            return False

    @property
    def log(self):
        return self.log_file.read_text(errors="replace")[-4000:]

    def kill(self):
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        if self.process is not None:
            self.process.wait()

    def pause(self):
        self.process.send_signal(signal.SIGSTOP)

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def restart(self, empty=False):
        self.kill()
        if empty:
            shutil.rmtree(self.data)
        return self.start()


class Redis(Service):
    name = "redis"
    program = "redis-server"

    def command(self):
        return [
            self.program, "--port", str(self.port), "--bind", self.host,
            "--protected-mode", "no",
            "--dir", str(self.data), "--save", "", "--appendonly", "yes",
            "--appendfsync", "always", *self.extra,
        ]  # fmt: skip

    def url(self, prefix="p2pfs", port=None):
        return f"redis://{self.host}:{port or self.port}/0?prefix={prefix}"

    def answers(self):
        """It has loaded its data (an answer that wants a password will do)."""
        try:
            return not self.ask("PING").startswith("-LOADING")
        except OSError:
            return False

    def ask(self, *words, password=None):
        """The first line of the answer to one command, or a bulk string's text."""
        with socket.create_connection((self.host, self.port), 5) as link:
            stream = link.makefile("rwb")
            for command in ([["AUTH", password]] if password else []) + [words]:
                parts = [f"${len(str(w).encode())}\r\n{w}\r\n" for w in command]
                stream.write(f"*{len(parts)}\r\n{''.join(parts)}".encode())
                stream.flush()
                line = stream.readline().decode().rstrip("\r\n")
            if line.startswith("$") and line != "$-1":
                return stream.read(int(line[1:])).decode()
            if not line:
                raise OSError("the server closed the connection")
            return line

    def record(self, key, prefix="p2pfs"):
        """The record of a key, behind its revision and its lease."""
        return self.ask("HGET", f"{prefix}:kv", key).split(" ", 2)[2]

    def put_record(self, key, record, prefix="p2pfs"):
        """Behind the back of the nodes: no change is told."""
        revision, lease, _ = self.ask("HGET", f"{prefix}:kv", key).split(" ", 2)
        self.ask("HSET", f"{prefix}:kv", key, f"{revision} {lease} {record}")

    def requests(self):
        """How many commands it has carried out."""
        for line in self.ask("INFO", "stats").splitlines():
            if line.startswith("total_commands_processed:"):
                return int(line.split(":")[1])
        raise AssertionError("INFO says nothing of commands")


class Valkey(Redis):
    name = "valkey"
    program = "valkey-server"
    remedy = "Debian 13 has it, Debian 12 does not"


class Etcd(Service):
    name = "etcd"
    program = "etcd"
    scheme = "http"

    def __init__(self, home, extra=()):
        super().__init__(home, extra)
        self.peer_port = free_port()
        self.member = "default"
        self.cluster = [self]

    def peer(self):
        return f"http://127.0.0.1:{self.peer_port}"

    def command(self):
        client = f"{self.scheme}://{self.host}:{self.port}"
        peer = self.peer()
        members = ",".join(f"{one.member}={one.peer()}" for one in self.cluster)
        # alone it elects itself at once; members of a busy machine need patience with each other
        heartbeat, election = (50, 500) if len(self.cluster) == 1 else (100, 1500)
        return [
            self.program, "--name", self.member, "--data-dir", str(self.data / "etcd"),
            "--listen-client-urls", client, "--advertise-client-urls", client,
            "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
            "--initial-cluster", members,
            "--heartbeat-interval", str(heartbeat), "--election-timeout", str(election),
            *self.extra,
        ]  # fmt: skip

    def url(self, prefix="p2pfs", port=None):
        return f"etcd://{self.host}:{port or self.port}/{prefix}"

    def answers(self):
        """It has a leader, or at least wants TLS."""
        if self.scheme != "http":
            return super().answers()
        try:
            self.ask("kv/range", {"key": "YQ=="})
            return True
        except urllib.error.HTTPError as error:
            return error.code < 500
        except OSError:
            return False

    def ask(self, path, request, token=None):
        headers = {"Content-Type": "application/json"}
        if token:
            headers["Authorization"] = token
        ask = urllib.request.Request(
            f"http://{self.host}:{self.port}/v3/{path}", json.dumps(request).encode(), headers
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(ask, None, 5) as got:
            return json.load(got)

    def record(self, key, prefix="p2pfs"):
        """The record of a key."""
        code = base64.b64encode(f"{prefix}/{key}".encode()).decode()
        return base64.b64decode(self.ask("kv/range", {"key": code})["kvs"][0]["value"]).decode()

    def put_record(self, key, record, prefix="p2pfs"):
        code = lambda text: base64.b64encode(text.encode()).decode()  # noqa: E731
        self.ask("kv/put", {"key": code(f"{prefix}/{key}"), "value": code(record)})

    def keys(self, prefix):
        """All keys that begin with the prefix."""
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        code = lambda text: base64.b64encode(text.encode()).decode()  # noqa: E731
        found = self.ask(
            "kv/range", {"key": code(prefix), "range_end": code(end), "keys_only": True}
        )
        return [base64.b64decode(kv["key"]).decode() for kv in found.get("kvs", [])]


class Http(Service):
    name = "http"
    program = str(SOURCE / "scripts/metadata-server")

    def command(self):
        return [
            "/usr/bin/python3", self.program, "--listen", f"{self.host}:{self.port}",
            "--file", str(self.data / "values"), *self.extra,
        ]  # fmt: skip

    def url(self, prefix="p2pfs", port=None):
        return f"http://{self.host}:{port or self.port}/metadata?prefix={prefix}"

    def ask(self, method, key, value=None, headers=()):
        """Status, body and tag of an answer, whatever it is."""
        link = http.client.HTTPConnection(self.host, self.port, timeout=5)
        try:
            link.request(method, f"/metadata?key={key}", value, dict(headers))
            answer = link.getresponse()
            return answer.status, answer.read(), answer.getheader("ETag")
        finally:
            link.close()


def etcd_cluster(home, count):
    """Members of one etcd cluster, all started; their URL is that of the first and the others."""
    members = [Etcd(Path(home) / f"m{i}") for i in range(count)]
    for i, one in enumerate(members):
        one.member = f"m{i}"
        one.cluster = members
    for one in members:
        one.start(wait=False)
    for one in members:
        one.wait_ready()
    hosts = ",".join(f"127.0.0.1:{one.port}" for one in members)
    return members, f"etcd://{hosts}/p2pfs"


class Link:
    """A TCP relay to a service, that can be cut (bytes vanish, nothing is refused) or slowed."""

    def __init__(self, port):
        self.target = port
        self.delay = 0.0
        self._open = threading.Event()
        self._open.set()
        self._end = False
        self._ages = 0  # connections older than this end
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, for_good=False):
        """for_good: connections that there are now end when it is healed, with what was on its way."""
        self._open.clear()
        self._ages += for_good

    def heal(self):
        self._open.set()

    def close(self):
        self._end = True
        self._open.set()
        self._listener.close()

    def _accept(self):
        while not self._end:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target), 5)
            except OSError:
                if self._end:
                    return
                near.close()  # the service is down
                continue
            threading.Thread(target=self._relay, args=(near, far), daemon=True).start()

    def _relay(self, near, far):
        age = self._ages
        with near, far:
            while True:
                ready, _, _ = select.select([near, far], [], [], 1)
                self._open.wait()
                if self._end or age < self._ages:
                    return
                for one in ready:
                    try:
                        data = one.recv(65536)
                        if not data:
                            return
                        if self.delay:
                            time.sleep(self.delay)
                        (far if one is near else near).sendall(data)
                    except OSError:
                        return


KINDS = {kind.name: kind for kind in (Redis, Valkey, Etcd, Http)}


def secret_file(path, **fields):
    """A credentials file as p2pfs wants it."""
    path.write_text("".join(f"{key}={value}\n" for key, value in fields.items()))
    os.chmod(path, 0o600)
    return path
