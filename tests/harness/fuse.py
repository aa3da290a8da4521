"""Mounts as the kernel sees them. Nothing here touches the mounted file system itself, because a
stuck daemon would take the caller with it."""

import os
import re
import subprocess


def _unescape(field):
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), field)


def mounts():
    """(mount point, file system type, source, device minor) of each mount, the topmost last."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            fields = line.rstrip("\n").split(" ")
            dash = fields.index("-")
            minor = int(fields[2].split(":")[1])
            found.append(
                (_unescape(fields[4]), fields[dash + 1], _unescape(fields[dash + 2]), minor)
            )
    return found


def mounted_at(directory):
    """The FUSE mount at the directory as (point, type, source, minor), or None."""
    for mount in reversed(mounts()):
        if mount[0] == str(directory) and mount[1].startswith("fuse"):
            return mount
    return None


def mounts_below(directory):
    """The FUSE mounts at or below the directory."""
    prefix = str(directory)
    return [
        mount
        for mount in mounts()
        if mount[1].startswith("fuse") and (mount[0] + "/").startswith(prefix + "/")
    ]


def abort(minor):
    """Ends a FUSE connection: every request of it, waiting or new, fails at once."""
    try:
        with open(f"/sys/fs/fuse/connections/{minor}/abort", "w", encoding="ascii") as control:
            control.write("1")
    except OSError:
        pass  # it is gone already, or fusectl is not mounted here


def force_unmount(directory):
    """Aborts and detaches whatever FUSE mounts stand at the directory."""
    while (mount := mounted_at(directory)) is not None:
        abort(mount[3])
        done = subprocess.run(
            ["umount", "-l", os.fspath(directory)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"umount -l {directory}: {done.stderr.strip()}")
