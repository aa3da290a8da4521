"""What this run tests, and on what kind of machine."""

import ctypes
import os
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2]
BINARY = Path(os.environ.get("P2PFS_BIN", SOURCE / "build/rel/bin/p2pfs")).resolve()
SANITIZE = os.environ.get("P2PFS_SANITIZE", "")
# Deadlines are for a plain build; sanitizers slow everything down, and so does the emulation of scripts/guest.
SLOWNESS = {"": 1, "address": 3, "thread": 6}[SANITIZE] * int(os.environ.get("P2PFS_SLOWNESS", "1"))

CLONE_NEWNS = 0x00020000
MS_PRIVATE = 1 << 18
MS_REC = 16384
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def why_no_mounts():
    """The reason why this machine cannot mount, or None."""
    if not os.path.exists("/dev/fuse"):
        return "/dev/fuse is missing"
    if os.geteuid() != 0:
        return "not root"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"/dev/fuse: {error.strerror}"
    return None


def enter_own_mount_namespace():
    """From here on this process's mounts are its own: they vanish with it, however it ends.

    To look at them from outside while a test runs: nsenter -m -t PID.
    """
    if _libc.unshare(CLONE_NEWNS) != 0:
        return False
    if _libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) != 0:
        raise OSError(ctypes.get_errno(), "cannot make the mounts private")
    control = Path("/sys/fs/fuse/connections")
    if control.is_dir() and not os.path.ismount(control):
        _libc.mount(b"fusectl", bytes(control), b"fusectl", 0, None)
    return True


def die_with_parent():
    """For a child between fork and exec: SIGKILL when the test process ends in any way."""
    _libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)
