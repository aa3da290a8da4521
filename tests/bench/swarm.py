"""One file to many hosts at once, each host in a network namespace with a capped link of its own.

The first host has the file. All others begin to fetch it at the same moment, by one method after the
other. A bridge joins the hosts; `tc tbf` caps what each sends and what each receives. Whatever the
method needs beside the hosts (p2pfs: Redis; aria2: a tracker) runs on one more host whose own link is not
capped, so that its messages count on the links of the hosts that talk to it.

Needs root and a mount namespace of the caller's own: names of network namespaces are kept in it, and
all of it is gone when the caller is, however that ends.
"""

import json
import os
import re
import selectors
import shutil
import statistics
import subprocess
import time
from pathlib import Path

from harness import env as harness_env
from harness.node import Node
from harness.wait import eventually

HERE = Path(__file__).resolve().parent
NETNS = Path("/run/netns")
TICK = os.sysconf("SC_CLK_TCK")
PYTHON = "/usr/bin/python3"
SERVICE = "10.77.1.1"
BURST, LATENCY = "256k", "50ms"  # of tbf
OTHERS_MAX = 0.15  # cores that other processes may take in a quiet run
HTTP_NODES = 4  # its line is known after so many
BITTORRENT = ("aria2", "libtorrent", "super")


class Missing(Exception):
    """This machine lacks what a method needs."""


class Failed(Exception):
    """A run that came to no end."""


def rate_bits(text):
    """Bits per second of '200mbit'; None when it is not a rate."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", text)
    return float(match[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[match[2]] if match else None


# -- The network


def _ip(*words):
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Failed(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _inside(host, *words):
    return ["nsenter", f"--net={NETNS / host}", *map(str, words)]


class Net:
    """Hosts h0 ... hN and `service`, each with eth0, on one bridge."""

    def __init__(self, hosts, rate, congestion):
        self.names = ["hub"]
        NETNS.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "bench", NETNS], check=True)
        try:
            self._add_hub()
            self._add("service", SERVICE, None, congestion)
            for i in range(hosts):
                self._add(f"h{i}", self.address(i), rate, congestion)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def address(host):
        return f"10.77.0.{host + 1}"

    def _add_hub(self):
        _ip("netns", "add", "hub")
        _ip("-n", "hub", "link", "add", "bridge", "type", "bridge")
        _ip("-n", "hub", "link", "set", "bridge", "up")

    def _add(self, name, address, rate, congestion):
        _ip("netns", "add", name)
        self.names.append(name)
        settings = ["net.ipv6.conf.all.disable_ipv6=1"]
        if congestion:
            settings.append(f"net.ipv4.tcp_congestion_control={congestion}")
        subprocess.run(_inside(name, "sysctl", "-qw", *settings), capture_output=True, check=False)
        _ip("-n", "hub", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("-n", "hub", "link", "set", name, "master", "bridge", "up")
        _ip("-n", name, "addr", "add", f"{address}/16", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        if rate:
            for where, device in ((name, "eth0"), ("hub", name)):
                subprocess.run(
                    ["tc", "-n", where, "qdisc", "add", "dev", device, "root", "tbf",
                     "rate", rate, "burst", BURST, "latency", LATENCY],
                    check=True,
                )  # fmt: skip

    def sent(self, host):
        """Bytes that a host has sent, by its interface's counter."""
        link = json.loads(_ip("-n", f"h{host}", "-j", "-s", "link", "show", "eth0"))
        return link[0]["stats64"]["tx"]["bytes"]

    def close(self):
        for name in reversed(self.names):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["umount", "-l", NETNS], check=False)


# -- CPU time


def _processes():
    """{pid: (parent, seconds of CPU of it and of its ended children)}"""
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                text = Path(entry.path, "stat").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue  # it has ended
            fields = text[text.rindex(")") + 2 :].split()
            found[int(entry.name)] = (int(fields[1]), sum(map(int, fields[11:15])) / TICK)
    return found


def cpu_spent():
    """Seconds of CPU that the machine has spent on us, and on other user processes. The kernel's own threads
    count as ours, since they carry our packets."""
    with open("/proc/stat", encoding="ascii") as table:
        user, nice, system, _, _, irq, softirq = map(int, table.readline().split()[1:8])
    found = _processes()
    ours = {os.getpid(), 2}
    strangers = 0.0
    for pid, (_, seconds) in found.items():
        path = []
        while pid in found and pid not in ours:
            path.append(pid)
            pid = found[pid][0]
        if pid in ours:
            ours.update(path)
        else:
            strangers += seconds
    return (user + nice + system + irq + softirq) / TICK - strangers, strangers


# -- Methods: each makes the file arrive at every host


class Method:
    """serve() on the first host, then get(host) for all others: a process whose stdout tells a line, or ends,
    when that host has the whole file. get() is all that the clock sees."""

    programs = ()

    def __init__(self, net, hosts, source, home):
        for program in self.programs:
            if shutil.which(program) is None:
                raise Missing(f"{program} is not installed (scripts/bootstrap --bench)")
        self.net, self.hosts, self.source, self.home = net, hosts, source, home
        self.size = source.stat().st_size
        self.processes = []

    def folder(self, host):
        folder = self.home / f"h{host}"
        folder.mkdir(exist_ok=True)
        return folder

    def file(self, host):
        """Where the file is in the end."""
        return self.folder(host) / self.source.name

    def start(self, host, *words, **more):
        """A process on a host; its stdout is a pipe, the rest goes to a log."""
        with open(self.home / f"{host}.log", "ab") as log:
            process = subprocess.Popen(
                _inside(host, *words),
                stdin=more.pop("stdin", subprocess.DEVNULL),
                stdout=more.pop("stdout", subprocess.PIPE),
                stderr=log,
                preexec_fn=harness_env.die_with_parent,
                **more,
            )
        self.processes.append(process)
        return process

    @staticmethod
    def listening(host, address, port):
        """Waits until a port of a host answers."""
        probe = f"exec 3<>/dev/tcp/{address}/{port}"

        def answers():
            return subprocess.run(
                _inside(host, "bash", "-c", probe), capture_output=True, check=False
            ).returncode == 0  # fmt: skip

        eventually(answers, 10, f"port {port} of {host}")

    def serve(self):
        raise NotImplementedError

    def get(self, host):
        raise NotImplementedError

    def close(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()


class Chain(Method):
    """A relay: host by host."""

    def serve(self):
        self.start("h0", self.program, "serve", f"{self.net.address(0)}:7000", self.source)
        # its one connection is for the next host, so nothing probes the port: relays try until it answers

    def get(self, host):
        return self.start(
            f"h{host}", self.program, "relay", f"{self.net.address(host)}:7000",
            f"{self.net.address(host - 1)}:7000", self.file(host), self.size,
        )  # fmt: skip


class Http(Method):
    """curl from one nginx."""

    programs = ("nginx", "curl")

    def serve(self):
        folder = self.folder(0)
        temporary = "".join(
            f"{kind}_temp_path {folder}/{kind};"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (folder / "nginx.conf").write_text(
            f"daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error; user root;\n"
            "events { worker_connections 1024; }\n"
            f"http {{ access_log off; sendfile on; tcp_nopush on; sendfile_max_chunk 2m; {temporary}\n"
            f"server {{ listen {self.net.address(0)}:8080; root {self.source.parent}; }} }}\n"
        )
        self.start("h0", "nginx", "-p", folder, "-c", folder / "nginx.conf")
        self.listening("h0", self.net.address(0), 8080)

    def get(self, host):
        url = f"http://{self.net.address(0)}:8080/{self.source.name}"
        return self.start(f"h{host}", "curl", "-sSf", "-o", self.file(host), url)


class Torrent(Method):
    def torrent(self):
        """Makes the torrent; returns its info hash."""
        if subprocess.run([PYTHON, "-c", "import libtorrent"], capture_output=True, check=False).returncode:
            raise Missing("python3-libtorrent is not installed (scripts/bootstrap --bench)")
        return subprocess.run(
            [PYTHON, HERE / "swarm_torrent.py", "make", self.source, self.home / "torrent",
             f"http://{SERVICE}:6969/announce"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip


class Aria2(Torrent):
    """BitTorrent by aria2, with opentracker."""

    programs = ("aria2c", "opentracker")
    options = (
        "--no-conf=true --quiet=true --summary-interval=0 --disable-ipv6=true --interface=eth0 "
        "--enable-dht=false --enable-dht6=false --bt-enable-lpd=false --enable-peer-exchange=true "
        "--file-allocation=none --disk-cache=64M --listen-port=6881-6881 --bt-tracker-interval=1 "
        "--bt-max-peers=0 --bt-request-peer-speed-limit=0 --max-overall-upload-limit=0 "
        "--seed-ratio=0.0 --seed-time=9999"
    ).split()

    def serve(self):
        tracker = self.home / "tracker"
        tracker.mkdir()
        (tracker / "known").write_text(self.torrent() + "\n")
        os.chmod(tracker, 0o755)
        self.start("service", "opentracker", "-w", "/known", "-i", SERVICE, "-p", 6969, "-P", 6969,
                   "-u", "nobody", "-d", tracker, stdout=subprocess.DEVNULL)  # fmt: skip
        self.file(0).symlink_to(self.source)
        self._client(0, "--check-integrity=false", "--bt-seed-unverified=true")
        self.listening("h0", self.net.address(0), 6881)
        time.sleep(1.5)  # the tracker hears of it

    def _client(self, host, *more):
        return self.start(
            f"h{host}", "aria2c", *self.options, f"--bt-external-ip={self.net.address(host)}",
            *more, "-d", self.folder(host), self.home / "torrent",
        )  # fmt: skip

    def get(self, host):
        return self._client(host, "--on-bt-download-complete=/bin/echo")


class Libtorrent(Torrent):
    """BitTorrent by libtorrent; every client runs already and knows all the others' addresses."""

    seed = "seed"

    def _client(self, host, what, *peers):
        return self.start(
            f"h{host}", PYTHON, HERE / "swarm_torrent.py", what, self.home / "torrent", self.folder(host),
            self.net.address(host), *peers, stdin=subprocess.PIPE,
        )  # fmt: skip

    def serve(self):
        self.torrent()
        self.file(0).symlink_to(self.source)
        clients = [self._client(0, self.seed)]
        for host in range(1, self.hosts):
            clients.append(self._client(host, "get", *map(self.net.address, range(host))))
        for client in clients:
            client.stdout.readline()
        self.clients = clients

    def get(self, host):
        self.clients[host].stdin.write(b"go\n")
        self.clients[host].stdin.flush()
        return self.clients[host]


class Super(Libtorrent):
    """... with super-seeding."""

    seed = "super"


class _Mount(Node):
    def command(self):
        return _inside(self.name, *super().command())


class P2pfs(Method):
    """`p2pfs pull` on all mounts at once."""

    programs = ("redis-server",)
    options = {"shard_size": "512K"}  # a shard is passed on when it is whole: what slow links and such files want

    def __init__(self, *words):
        super().__init__(*words)
        self.mounts = []

    def serve(self):
        self.start("service", "redis-server", "--bind", SERVICE, "--protected-mode", "no",
                   "--save", "", "--dir", self.home, stdout=subprocess.DEVNULL)  # fmt: skip
        self.listening("service", SERVICE, 6379)
        for host in range(self.hosts):
            listen = f"{self.net.address(host)}:7400"
            self.mounts.append(_Mount(f"h{host}", f"redis://{SERVICE}:6379", self.home, listen=listen,
                                      **self.options))  # fmt: skip
        for mount in self.mounts:
            mount.start(wait=False)
        for mount in self.mounts:
            mount.wait_ready(20)
        shutil.copyfile(self.source, self.file(0))
        for host in range(1, self.hosts):
            eventually(self.file(host).exists, 10, f"host {host} sees the file")
        self._settle()

    def _settle(self):
        """Waits until no mount clears pages any more for what it may pull: hosts have cores of their own to do so, but
        here all share a few, and would take them from the first seconds of those that pull."""
        held, since = None, time.monotonic()
        while time.monotonic() - since < 1.5:
            time.sleep(0.1)
            if (now := [mount.status()["reserve"] for mount in self.mounts]) != held:
                held, since = now, time.monotonic()

    def folder(self, host):
        return self.mounts[host].dir

    def get(self, host):
        return self.start(f"h{host}", harness_env.BINARY, "pull", "--json", self.file(host))

    def close(self):
        for mount in self.mounts:
            mount.cleanup()
        super().close()


class Default(P2pfs):
    """... with shards of the size that mounts choose by themselves."""

    options = {}


METHODS = {
    "chain": Chain,
    "p2pfs": P2pfs,
    "default": Default,
    "aria2": Aria2,
    "libtorrent": Libtorrent,
    "super": Super,
    "http": Http,
}


# -- One run


def _same(source, path, piece=4 << 20):
    """Whether two files are equal; leaves nothing of the second in the page cache."""
    with open(source, "rb", buffering=0) as one, open(path, "rb", buffering=0) as two:
        while True:
            want, got = one.read(piece), b""
            while len(got) < len(want) and (more := two.read(len(want) - len(got))):
                got += more
            if want != got:
                return False
            if not want:
                os.posix_fadvise(two.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                return two.read(1) == b""


def _wait_all(method, gets, begun, limit):
    """Seconds after which each host had the file, by host."""
    done = {}
    with selectors.DefaultSelector() as waiting:
        for host, process in gets.items():
            waiting.register(process.stdout, selectors.EVENT_READ, host)
        while len(done) < len(gets):
            left = begun + limit - time.monotonic()
            if left <= 0:
                raise Failed(f"{len(gets) - len(done)} hosts without the file after {limit:.0f} s")
            for key, _ in waiting.select(left):
                now = time.monotonic() - begun
                host = key.data
                if key.fileobj.readline() == b"" and gets[host].wait() != 0:
                    log = (method.home / f"h{host}.log").read_text(errors="replace")
                    raise Failed(f"host {host} failed: {log[-500:]}")
                done[host] = now
                waiting.unregister(key.fileobj)
    return done


def run_once(kind, nodes, source, home, rate, congestion, prepare=None):
    """One file to `nodes` hosts by one method; what came of it. `prepare` is called before."""
    size = source.stat().st_size
    ideal = size * 8 / rate_bits(rate)
    copies = nodes if kind is Http else 3
    home.mkdir()
    net = Net(nodes + 1, rate, congestion)
    method = None
    try:
        method = kind(net, nodes + 1, source, home)
        if prepare:
            prepare()
        method.serve()
        time.sleep(0.3)
        sent, spent, begun = net.sent(0), cpu_spent(), time.monotonic()
        gets = {host: method.get(host) for host in range(1, nodes + 1)}
        done = _wait_all(method, gets, begun, 30 + 1.5 * ideal * copies)
        took = time.monotonic() - begun
        cpu, others = (after - before for before, after in zip(spent, cpu_spent()))
        sent = net.sent(0) - sent
        for host in range(1, nodes + 1):
            if not _same(source, method.file(host)):
                raise Failed(f"host {host} has wrong bytes")
        times = sorted(done.values())
        return {
            "first": times[0] / ideal,
            "median": statistics.median(times) / ideal,
            "last": times[-1] / ideal,
            "seconds": times,
            "copies": sent / size,
            "cpu": cpu / (nodes * size / 1e9),
            "others": others / took,
        }
    finally:
        if method:
            method.close()
        net.close()
        shutil.rmtree(home, ignore_errors=True)


# -- The case


def _line(row, rows):
    """A line of the table."""
    best = [
        other["last"]
        for other in rows
        if other["method"] in BITTORRENT and other["rounds"]
        and all(other[key] == row[key] for key in ("nodes", "size", "rate"))
    ]  # fmt: skip
    note = row["note"]
    figures = ["-"] * 6
    if row["rounds"]:
        lasts = [one["last"] for one in row["rounds"]]
        figures = [f"{row[key]:.2f}" for key in ("first", "median", "last", "copies", "cpu")]
        figures.insert(3, f"{min(lasts):.2f} .. {max(lasts):.2f}")
        if row["others"] > OTHERS_MAX:
            note += f"Busy: others took {row['others']:.1f} cores. "
        if row["method"] == "p2pfs" and best:
            note += f"{min(best) / row['last']:.2f} x as fast as BitTorrent."
    head = (row["rate"], f"{row['size'] >> 20}", f"{row['nodes']}", row["method"])
    return (*head, *figures, f"{len(row['rounds'])}", note)


def text(rows):
    """The table as text. Times are in units of size / rate, copies are what the first host sent over size."""
    lines = [("links", "MiB", "nodes", "method", "first", "median", "last", "min .. max", "copies", "CPU s/GB",
              "rounds", "")]  # fmt: skip
    lines += [_line(row, rows) for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    commits = sorted({one["commit"] for row in rows for one in row["rounds"]})
    head = f"times over size / rate of a link; copies: sent by the first host; commit {', '.join(commits)}\n"
    return head + "\n".join(
        "  ".join(
            cell.ljust(widths[i]) if i in (0, 3, 11) else cell.rjust(widths[i])
            for i, cell in enumerate(line)
        ).rstrip()
        for line in lines
    )


def _row_of(rows, nodes, name, size, rate):
    """The row of these, a new one where there is none."""
    wanted = {"nodes": nodes, "method": name, "size": size, "rate": rate}
    for row in rows:
        if all(row[key] == value for key, value in wanted.items()):
            return row
    rows.append({**wanted, "rounds": [], "note": ""})
    return rows[-1]


def _medians(row):
    for key in ("first", "median", "last", "copies", "cpu", "others"):
        values = [one[key] for one in row["rounds"]]
        row[key] = statistics.median(values) if values else None


def run_all(options, source, home, program, prepare, say, commit, rows, save):
    """Every method for every number of nodes, taking turns within a round; rows of medians, with those of earlier
    runs, whose rounds count too. They are saved after each round, so that a run that is cut off loses none."""
    Chain.program = program("bench_chain")
    size = source.stat().st_size
    for nodes in options.nodes:
        methods = [name for name in options.methods if name != "http" or nodes <= HTTP_NODES]
        if methods != options.methods:
            say(f"swarm: {nodes} nodes, http: left out: one server's link is shared by all, so it takes {nodes} x")
        turns = {name: _row_of(rows, nodes, name, size, options.rate) for name in methods}
        for number in range(options.rounds):
            for name, row in turns.items():
                say(f"swarm: {nodes} nodes, {name}, round {number + 1} ...")
                try:
                    where = home / f"swarm-{nodes}-{name}-{number}"
                    found = run_once(METHODS[name], nodes, source, where, options.rate,
                                     options.congestion, lambda: prepare(nodes))  # fmt: skip
                    row["rounds"].append({**found, "commit": commit})
                except Missing as error:
                    row["note"] = str(error)
                except Exception as error:  # whatever became of one round, the others count
                    row["note"] = "Some rounds failed. "
                    say(f"swarm: {nodes} nodes, {name}: {error}")
                _medians(row)
                rows.sort(key=lambda row: (rate_bits(row["rate"]), row["nodes"], list(METHODS).index(row["method"])))
                save(rows)
