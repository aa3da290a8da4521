"""Random histories on two mounts against a plain model of what a user may expect.

P2PFS_SEED repeats a history, P2PFS_STEPS makes it longer.
"""

import errno
import mmap
import os
import random
import stat
import time

import pytest

from harness import env
from harness.wait import eventually

STEPS = int(os.environ.get("P2PFS_STEPS", "1500" if not env.SANITIZE else "300"))
SEED = os.environ.get("P2PFS_SEED")

NAMES = ["a", "b", "c", "sub", "step-1.tmp", "with blank", "\udcff\udc80 bytes", "ü", "x" * 255]
SIZES = [0, 1, 4095, 4096, 70000, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 2500000]


class Model:
    """Names as nested dictionaries: bytes are a file, str a relative link, dict a directory."""

    def __init__(self):
        self.root = {}

    def get(self, path):
        at = self.root
        for name in path:
            if not isinstance(at, dict) or name not in at:
                return None
            at = at[name]
        return at

    def paths(self, kind=object, at=None, prefix=()):
        """Every path of a kind, not the root."""
        for name, value in sorted((self.root if at is None else at).items()):
            if isinstance(value, kind):
                yield (*prefix, name)
            if isinstance(value, dict):
                yield from self.paths(kind, value, (*prefix, name))

    def directories(self):
        return [(), *self.paths(dict)]

    def put(self, path, value):
        self.get(path[:-1])[path[-1]] = value

    def remove(self, path):
        del self.get(path[:-1])[path[-1]]


def tree(directory):
    """What a mount shows, in the model's form; files by size and link targets only."""
    found = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_symlink():
                found[entry.name] = os.readlink(entry.path)
            elif entry.is_dir():
                found[entry.name] = tree(entry.path)
            else:
                found[entry.name] = entry.stat().st_size
    return found


def sizes(model):
    return {
        name: sizes(value)
        if isinstance(value, dict)
        else len(value)
        if isinstance(value, bytes)
        else value
        for name, value in model.items()
    }


class History:
    """One run: does at random what may be done, and what may not."""

    def __init__(self, nodes, seed):
        self.nodes = nodes
        self.random = random.Random(seed)
        self.model = Model()
        self.trace = []
        self.open = []  # (descriptor, bytes) of files that were opened earlier
        self.last = None  # the node that made the last change

    # -- choosing

    def node(self):
        return self.random.choice(self.nodes)

    def content(self):
        return self.random.randbytes(self.random.choice(SIZES))

    def existing(self, kind=object):
        paths = list(self.model.paths(kind))
        return self.random.choice(paths) if paths else None

    def place(self):
        """A path whose directory exists; it may be taken."""
        directories = [path for path in self.model.directories() if len(path) < 4]
        return (*self.random.choice(directories), self.random.choice(NAMES))

    # -- acting

    def at(self, node, path):
        return os.path.join(node.dir, *path)

    def settle(self, node):
        """Another node's changes may take a second to be seen; one's own, none."""
        if self.last not in (None, node):
            self.check(node)
        self.last = node

    def attempt(self, expected, act):
        """Runs it; expected: None, or the errors of which one must come."""
        try:
            act()
        except OSError as error:
            name = errno.errorcode.get(error.errno, str(error.errno))
            assert expected and name in expected.split("|"), f"{error!r}, expected {expected}"
            return False
        assert not expected, f"succeeded, expected {expected}"
        return True

    def step(self):
        actions = {
            self.write: 6,
            self.read: 6,
            self.map: 2,
            self.hold: 2,
            self.read_held: 3,
            self.mkdir: 3,
            self.symlink: 2,
            self.hard_link: 1,
            self.rename: 5,
            self.unlink: 3,
            self.rmdir: 2,
            self.truncate: 1,
            self.overwrite: 2,
        }
        action = self.random.choices(list(actions), list(actions.values()))[0]
        action()

    def say(self, node, what, *details):
        self.trace.append(f"{node.name} {what} " + " ".join(repr(detail) for detail in details))

    def write(self):
        node, path, content = self.node(), self.place(), self.content()
        if self.model.get(path) is not None:
            return
        self.settle(node)
        self.say(node, "write", path, len(content))
        cuts = sorted(self.random.randrange(len(content) + 1) for _ in range(3))
        pieces = list(zip([0, *cuts], [*cuts, len(content)]))
        self.random.shuffle(pieces)
        with open(self.at(node, path), "xb", buffering=0) as out:
            if pieces and not content:
                os.ftruncate(out.fileno(), 0)
            for start, end in pieces:
                assert os.pwrite(out.fileno(), content[start:end], start) == end - start
        self.model.put(path, content)

    def read(self):
        path = self.existing(bytes)
        if path is None:
            return
        node = self.node()
        self.settle(node)
        self.say(node, "read", path)
        content = self.model.get(path)
        with open(self.at(node, path), "rb", buffering=0) as source:
            start = self.random.randrange(len(content) + 1)
            length = self.random.randrange(len(content) - start + 1)
            assert os.pread(source.fileno(), length, start) == content[start : start + length]
            if self.random.random() < 0.5:
                assert source.read(len(content) + 1) == content
            assert os.pread(source.fileno(), 100, len(content)) == b""

    def map(self):
        path = self.existing(bytes)
        if path is None or not self.model.get(path):
            return
        node = self.node()
        self.settle(node)
        self.say(node, "mmap", path)
        content = self.model.get(path)
        with open(self.at(node, path), "rb") as source:
            with mmap.mmap(source.fileno(), 0, prot=mmap.PROT_READ) as view:
                at = self.random.randrange(len(content))
                assert view[at : at + 5000] == content[at : at + 5000]
                if self.random.random() < 0.3:
                    assert view[:] == content

    def hold(self):
        path = self.existing(bytes)
        if path is None or len(self.open) >= 8:
            return
        node = self.node()
        self.settle(node)
        self.say(node, "open", path)
        content = self.model.get(path)
        fd = os.open(self.at(node, path), os.O_RDONLY)
        assert os.pread(fd, len(content) + 1, 0) == content  # so that all of it is here
        self.open.append((fd, content, path))

    def read_held(self):
        """An open file keeps its version, whatever has become of its name."""
        if not self.open:
            return
        number = self.random.randrange(len(self.open))
        fd, content, path = self.open[number]
        self.trace.append(f"read held {path!r}")
        start = self.random.randrange(len(content) + 1)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, 100000, start) == content[start : start + 100000]
        if self.random.random() < 0.4:
            os.close(fd)
            del self.open[number]

    def mkdir(self):
        node, path = self.node(), self.place()
        self.settle(node)
        self.say(node, "mkdir", path)
        taken = self.model.get(path) is not None
        if self.attempt("EEXIST" if taken else None, lambda: os.mkdir(self.at(node, path))):
            self.model.put(path, {})

    def symlink(self):
        node, path = self.node(), self.place()
        target = self.random.choice(["a", "sub/a", "../nowhere", "b"])
        self.settle(node)
        self.say(node, "symlink", path, target)
        taken = self.model.get(path) is not None
        if self.attempt(
            "EEXIST" if taken else None, lambda: os.symlink(target, self.at(node, path))
        ):
            self.model.put(path, target)

    def hard_link(self):
        source = self.existing(bytes)
        if source is None:
            return
        node, path = self.node(), self.place()
        self.settle(node)
        self.say(node, "link", source, path)
        taken = self.model.get(path) is not None
        if self.attempt(
            "EEXIST" if taken else None,
            lambda: os.link(self.at(node, source), self.at(node, path)),
        ):
            self.model.put(path, self.model.get(source))

    def rename(self):
        source = self.existing()
        if source is None:
            return
        node, path = self.node(), self.place()
        moved, there = self.model.get(source), self.model.get(path)
        self.settle(node)
        self.say(node, "rename", source, path)
        if path == source or (
            there is not None and moved is there and isinstance(moved, bytes)
        ):
            expected = "" if path == source else "|"
        elif path[: len(source)] == source:
            expected = "EINVAL"
        elif isinstance(moved, dict) and there is not None and not isinstance(there, dict):
            expected = "ENOTDIR"
        elif isinstance(moved, dict) and there:
            expected = "ENOTEMPTY|EEXIST"
        elif not isinstance(moved, dict) and isinstance(there, dict):
            expected = "EISDIR|ENOTEMPTY" if source[: len(path)] == path else "EISDIR"
        elif isinstance(there, bytes):
            expected = "EPERM|EEXIST"
        else:
            expected = ""
        if expected == "|":  # two names of one file: nothing happens, or it is refused
            return
        if self.attempt(
            expected, lambda: os.rename(self.at(node, source), self.at(node, path))
        ) and path != source:
            self.model.remove(source)
            self.model.put(path, moved)

    def unlink(self):
        path = self.existing()
        if path is None:
            return
        node = self.node()
        self.settle(node)
        self.say(node, "unlink", path)
        expected = "EISDIR|EPERM" if isinstance(self.model.get(path), dict) else None
        if self.attempt(expected, lambda: os.unlink(self.at(node, path))):
            self.model.remove(path)

    def rmdir(self):
        path = self.existing()
        if path is None:
            return
        node = self.node()
        value = self.model.get(path)
        self.settle(node)
        self.say(node, "rmdir", path)
        expected = None
        if not isinstance(value, dict):
            expected = "ENOTDIR"
        elif value:
            expected = "ENOTEMPTY|EEXIST"
        if self.attempt(expected, lambda: os.rmdir(self.at(node, path))):
            self.model.remove(path)

    def truncate(self):
        path = self.existing(bytes)
        if path is None:
            return
        node = self.node()
        self.settle(node)
        self.say(node, "truncate", path)
        self.attempt("EPERM|EROFS|EEXIST", lambda: os.truncate(self.at(node, path), 3))

    def overwrite(self):
        path = self.existing(bytes)
        if path is None:
            return
        node = self.node()
        self.settle(node)
        self.say(node, "overwrite", path)
        flags = self.random.choice([os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC])
        self.attempt("EPERM|EROFS|EEXIST", lambda: os.close(os.open(self.at(node, path), flags)))

    # -- judging

    def check(self, node):
        """Before long the node shows what the model says."""
        expected = sizes(self.model.root)
        deadline = time.monotonic() + 30 * env.SLOWNESS
        while True:
            try:
                shown = tree(node.dir)
            except OSError:
                shown = None  # a name went while it was listed
            if shown == expected:
                return
            assert time.monotonic() < deadline, f"{node.name} shows {shown}, not {expected}"
            time.sleep(0.01)

    def check_all(self):
        """Every byte of every file on every node."""
        for node in self.nodes:
            self.check(node)
            for path in self.model.paths(bytes):
                with open(self.at(node, path), "rb") as source:
                    assert source.read() == self.model.get(path), (node.name, path)
                status = os.lstat(self.at(node, path))
                assert stat.S_ISREG(status.st_mode)
                assert status.st_size == len(self.model.get(path))

    def close(self):
        for fd, _, _ in self.open:
            os.close(fd)


def play(nodes, seed, steps):
    print(f"P2PFS_SEED={seed} P2PFS_STEPS={steps}")
    history = History(nodes, seed)
    began = time.monotonic()
    done = 0
    try:
        while done < steps and time.monotonic() - began < 30:
            history.step()
            done += 1
            if done % 100 == 0:
                history.check_all()
        history.check_all()
    except BaseException:
        print(f"after step {done}, the last of them:", *history.trace[-30:], sep="\n  ")
        raise
    finally:
        history.close()
    names = len(list(history.model.paths()))
    print(f"{done} steps in {time.monotonic() - began:.1f} s, {names} names")
    return history


@pytest.mark.parametrize("run", range(1 if SEED else 2))
def test_two_mounts_do_what_the_model_does(cluster, run):
    nodes = cluster.nodes(2)
    seed = SEED or random.SystemRandom().randrange(1 << 32)
    history = play(nodes, int(seed), STEPS)
    # and so it is after both have been mounted anew (what they held has gone with them)
    expected = sizes(history.model.root)
    for node in nodes:
        node.restart()
    for node in nodes:
        eventually(lambda node=node: tree(node.dir) == expected)
