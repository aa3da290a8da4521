#!/usr/bin/python3
"""RDMA beside ib_read_bw, in the guest of scripts/guest: `scripts/bench rdma` runs this there.

  rdma.py BUILD ROUNDS MIB

Prints rows of the table of scripts/bench, as JSON. Everything goes from rxe0 to rxe1 over the same wire, in turns.
Soft-RoCE sends from kernel threads that belong to no process, so the machine's CPU counts both ends; ib_read_bw polls
without a pause, with -e it sleeps as p2pfs does. A pull's rate is the daemon's own, from the first ask to the last shard
verified, as ib_read_bw's is without its start; how long the whole command took has a row of its own."""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BUILD, ROUNDS, SIZE = Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3]) << 20
os.environ["P2PFS_BIN"] = str(BUILD / "bin/p2pfs")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# pylint: disable=wrong-import-position
from harness.guest import HOSTS  # noqa: E402
from harness.node import Cluster  # noqa: E402
from harness.wait import eventually  # noqa: E402

TICK = os.sysconf("SC_CLK_TCK")
SLICE = 256 << 10  # of a READ, as the transport has it


def machine_cpu():
    words = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()
    user, nice, system, _, _, irq, softirq = map(int, words[1:8])
    return (user + nice + system + irq + softirq) / TICK


def process_cpu(pid):
    words = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(words[11]) + int(words[12])) / TICK


def gid_index(host):
    """Of RoCE v2 over IPv4."""
    wanted = "".join(f"{int(byte):02x}" for byte in host.ipv4.split("."))
    port = Path(f"/sys/class/infiniband/{host.device}/ports/1")
    for index in range(16):
        gid = (port / f"gids/{index}").read_text(encoding="ascii").strip().replace(":", "")
        kind = (port / f"gid_attrs/types/{index}").read_text(encoding="ascii").strip()
        if gid.endswith("ffff" + wanted) and kind == "RoCE v2":
            return index
    raise RuntimeError(f"{host.device} has no GID for {host.ipv4}")


class Row:
    """Rounds of one method: the clock, the source's process, the machine."""

    def __init__(self):
        self.rates, self.source, self.machine, self.verifying, self.commands = [], [], [], [], []

    def add(self, size, seconds, source, machine):
        self.rates.append(size / seconds / 1e6)
        self.source.append(source / size * 1e9)
        self.machine.append(machine / size * 1e9)

    def told(self, name, base):
        """As rows of the table of scripts/bench."""

        def row(what, mine, unit, of=None):
            ratio = of and statistics.median(mine) / statistics.median(of)
            return {"what": what, "values": mine, "unit": unit, "ratio": ratio}

        yield row(f"{name} (of ib_read_bw's)", self.rates, "MB/s", base.rates)
        yield row(f"{name}: CPU of the source's process", self.source, "s/GB")
        yield row(f"{name}: CPU of the machine (of ib_read_bw's)", self.machine, "s/GB", base.machine)
        if self.verifying:
            yield row(f"{name}: verifying", self.verifying, "of the time")
            yield row(f"{name}: the whole command", self.commands, "s")


def ib_read_bw(row, events):
    count = max(SIZE // SLICE, 8)
    common = ["ib_read_bw", "-s", str(SLICE), "-n", str(count), "-F", "-N"] + ["-e"] * events
    server = [*common, "-d", HOSTS[0].device, "-x", str(gid_index(HOSTS[0]))]
    client = [*common, "-d", HOSTS[1].device, "-x", str(gid_index(HOSTS[1])), "127.0.0.1"]
    with subprocess.Popen(server, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as source:
        time.sleep(1)
        before = machine_cpu()
        said = subprocess.run(client, capture_output=True, text=True, timeout=120, check=True).stdout
        machine = machine_cpu() - before
        _, _, usage = os.wait4(source.pid, 0)
        source.returncode = 0
    average = re.search(rf"^ {SLICE} +{count} +\S+ +(\S+)", said, re.MULTILINE)
    size = count * SLICE
    row.add(size, size / (float(average[1]) * (1 << 20)), usage.ru_utime + usage.ru_stime, machine)


def bench(row, home, block):
    common = [BUILD / "bin/p2pfs", "bench", f"--metadata_server=local://{home}", "--threads=1"]
    name = f"{HOSTS[0].ipv4}:7401"
    target = [*common, "--mode=target", "--buffer_size=16M", f"--local_server_name={name}"]
    with subprocess.Popen(target, stdout=subprocess.PIPE, text=True) as source:
        source.stdout.readline()
        machine, process = machine_cpu(), process_cpu(source.pid)
        said = subprocess.run(
            [*common, f"--segment_id={name}", f"--local_server_name={HOSTS[1].ipv4}:7402", "--buffer_size=16M",
             f"--block_size={block}", f"--batch_size={(8 << 20) // block}", "--duration=3"],
            capture_output=True, text=True, timeout=120, check=True,
        ).stdout  # fmt: skip
        closing = re.search(r"duration (\S+), batch count (\d+)", said)
        size = int(closing[2]) * (8 << 20)
        row.add(size, float(closing[1]), process_cpu(source.pid) - process, machine_cpu() - machine)
        source.terminate()


def pull(row, again, home, serial, transport):
    """The first pull of a mount that was idle for so long that it has prepared what memory it may, and one into pages that
    a pull has used."""
    home = home / f"pull{serial}"
    home.mkdir()
    cluster = Cluster(home)
    try:
        source = cluster.node("source", listen=f"{HOSTS[0].ipv4}:7411", transport=transport)
        puller = cluster.node("puller", listen=f"{HOSTS[1].ipv4}:7412", transport=transport)
        block = os.urandom(1 << 20)
        with open(source.path("f"), "wb") as out:
            for _ in range(SIZE >> 20):
                out.write(block)
        eventually(puller.path("f").exists, 10, "the name")
        eventually(lambda: puller.status()["reserve"] >= SIZE, 60, "the pages are prepared")
        for mine in (row, again):
            machine, process, begun = machine_cpu(), process_cpu(source.pid), time.monotonic()
            puller.cli("pull", "--quiet", puller.path("f"), timeout=200)
            seconds = time.monotonic() - begun
            spent = process_cpu(source.pid) - process, machine_cpu() - machine
            why = json.loads(puller.cli("why", "--json", "f").stdout)
            came = {shard["transport"] for shard in why["each"]}
            if came != {transport}:
                raise RuntimeError(f"shards came by {came}")
            verifying = sum(shard.get("verify_s", 0) for shard in why["each"])
            mine.add(SIZE, why["took_s"], *spent)
            mine.verifying.append(verifying / why["took_s"])
            mine.commands.append(seconds)
            puller.cli("evict", "f")
    finally:
        cluster.cleanup()


def main():
    rows = {}
    with tempfile.TemporaryDirectory() as home:
        for serial in range(ROUNDS):
            for name, measure in {
                "ib_read_bw": lambda row: ib_read_bw(row, False),
                "ib_read_bw -e": lambda row: ib_read_bw(row, True),
                "p2pfs bench, 256 KiB blocks": lambda row: bench(row, home, SLICE),
                "p2pfs bench, 4 MiB blocks": lambda row: bench(row, home, 4 << 20),
            }.items():
                measure(rows.setdefault(name, Row()))
            for transport in ("rdma", "tcp"):
                by = f"p2pfs pull by {transport.upper()}"
                first, again = (rows.setdefault(name, Row()) for name in (by, f"{by}, into pages used before"))
                pull(first, again, Path(home), f"{transport}{serial}", transport)
    table = [row for name in rows for row in rows[name].told(name, rows["ib_read_bw"])]
    command = [BUILD / "bench/bench_register", HOSTS[0].device, "64"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for line in said.splitlines():
        pages, there, back = line.split()
        for what, rate in (("register", there), ("deregister", back)):
            table.append({"what": f"{what} memory, {pages} pages", "values": [float(rate)], "unit": "GB/s", "ratio": None})
    print(json.dumps(table))


if __name__ == "__main__":
    main()
