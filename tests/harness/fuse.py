"""Mounts as the kernel sees them. Nothing here touches the mounted file system itself, because a
stuck daemon would take the caller with it."""

import os
import re
import subprocess


def _unescape(field):
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), field)


def mounts():
    """(mount point, file system type, source, device minor, id) of each mount, the topmost last."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            fields = line.rstrip("\n").split(" ")
            dash = fields.index("-")
            minor = int(fields[2].split(":")[1])
            found.append(
                (_unescape(fields[4]), fields[dash + 1], _unescape(fields[dash + 2]), minor, fields[0])
            )
    return found


def mounted_at(directory):
    """The FUSE mount at the directory as (point, type, source, minor, id), or None."""
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


def abort(directory):
    """Ends the FUSE connection of the mount at the directory, if there is one: every request of it,
    waiting or new, fails at once."""
    try:
        # Held open, the file system keeps its device number: without that, a mount that ends just now
        # hands its number to the next one, of another test. O_PATH asks the daemon nothing.
        root = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    except OSError:
        return
    try:
        with open(f"/proc/self/fdinfo/{root}", encoding="ascii") as info:
            mount_id = dict(line.split(":", 1) for line in info)["mnt_id"].strip()
        for mount in mounts():
            if mount[4] == mount_id and mount[1].startswith("fuse"):
                path = f"/sys/fs/fuse/connections/{mount[3]}/abort"
                with open(path, "w", encoding="ascii") as control:
                    control.write("1")
    except OSError:
        pass  # it is gone already, or fusectl is not mounted here
    finally:
        os.close(root)


def force_unmount(directory):
    """Aborts and detaches whatever FUSE mounts stand at the directory."""
    while mounted_at(directory) is not None:
        abort(directory)
        done = subprocess.run(
            ["umount", "-l", os.fspath(directory)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"umount -l {directory}: {done.stderr.strip()}")
