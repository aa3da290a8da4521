"""Hosts of their own: network namespaces, each with a veth to a hub where the services listen."""

import ctypes
import os
import subprocess
import time
from pathlib import Path

from .env import die_with_parent

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _ip(*words, inside=()):
    done = subprocess.run(
        [*inside, "ip", *map(str, words)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(map(str, words))}: {done.stderr.strip()}")


class Network:
    """with Network() as net: ... the calling thread, and what it starts, is in the hub."""

    service = "10.77.0.1"  # where services listen

    def __init__(self):
        self._home = None
        self._hosts = []

    def __enter__(self):
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        if _libc.unshare(CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "no network namespace of its own")
        _ip("link", "set", "lo", "up")
        _ip("addr", "add", f"{self.service}/32", "dev", "lo")
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        return self

    def __exit__(self, *_):
        for process in self._hosts:
            process.kill()
            process.wait()
        _libc.setns(self._home, CLONE_NEWNET)
        os.close(self._home)

    def host(self):
        """The address of a new host, and what goes before a command that is to run there."""
        ours = os.readlink("/proc/self/ns/net")
        process = subprocess.Popen(
            ["unshare", "--net", "sleep", "infinity"], preexec_fn=die_with_parent
        )
        self._hosts.append(process)
        while os.readlink(f"/proc/{process.pid}/ns/net") == ours:
            time.sleep(0.002)
        number = len(self._hosts)
        inside = ["nsenter", f"--net=/proc/{process.pid}/ns/net"]
        _ip("link", "add", f"h{number}", "type", "veth", "peer", "name", "eth0", "netns", process.pid)
        _ip("addr", "add", f"10.77.{number}.1/24", "dev", f"h{number}")
        _ip("link", "set", f"h{number}", "up")
        _ip("addr", "add", f"10.77.{number}.2/24", "dev", "eth0", inside=inside)
        _ip("link", "set", "lo", "up", inside=inside)
        _ip("link", "set", "eth0", "up", inside=inside)
        _ip("route", "add", "default", "via", f"10.77.{number}.1", inside=inside)
        return f"10.77.{number}.2", inside

    def cut(self, address, source=service):
        """What goes to that host from the source vanishes; nobody else is concerned."""
        _ip("rule", "add", "from", source, "to", address, "blackhole")

    def heal(self, address, source=service):
        _ip("rule", "del", "from", source, "to", address, "blackhole")
