"""Share numpy arrays and torch tensors with the nodes of a p2pfs cluster, straight from and into their memory.

    import p2pstore

    with p2pstore.Store("etcd://meta.example:2379", "10.0.0.2:12345") as store:
        store.register("llama/step-1000", [weights, bias])      # here
        ...
        store.get_replica("llama/step-1000", [weights, bias])   # elsewhere: into arrays that are there

A buffer is a torch tensor in the host's memory, a numpy array, or whatever else offers a contiguous buffer (bytearray,
mmap, memoryview). It is never copied, and is kept alive until unregister(), delete_replica() or close(). While it is
registered or pulled it must not be changed or resized.

A state_dict goes under two names: register_state_dict(store, name, tensors) and load_state_dict(store, name, into).

Needs libp2pstore.so.0: where the linker finds it, or at P2PSTORE_LIBRARY. No other package; numpy and torch only where
their arrays are passed. After os.fork() (multiprocessing: use "spawn") open a store of the process's own.
"""

import atexit
import ctypes
import errno
import json
import os
import sys
import threading
import weakref
from collections import namedtuple

__all__ = ["Store", "Request", "Entry", "Error", "register_state_dict", "load_state_dict", "version"]

SHARD = 64 << 20
STATES = {
    1: "offline", 2: "partial", 3: "available", 4: "pulling", 5: "replica", 6: "registered",
    7: "unknown",
}  # fmt: skip

# One registered name. sizes: of the buffers it was registered from; holders, complete: live nodes that have bytes of it,
# and all of it, None while the metadata service does not answer.
Entry = namedtuple("Entry", "name max_shard_size total_size sizes holders complete state origin")


class Error(OSError):
    """A call failed: errno, and a sentence that names the cause."""


class _Range(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("length", ctypes.c_uint64)]


class _Entry(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("max_shard_size", ctypes.c_uint64),
        ("total_size", ctypes.c_uint64),
        ("sizes", ctypes.POINTER(ctypes.c_uint64)),
        ("size_count", ctypes.c_size_t),
        ("holders", ctypes.c_int64),
        ("complete", ctypes.c_int64),
        ("state", ctypes.c_int),
        ("origin", ctypes.c_char_p),
    ]


def _load():
    name = os.environ.get("P2PSTORE_LIBRARY") or "libp2pstore.so.0"
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise ImportError(
            f"{error}; install p2pfs and run ldconfig, or set P2PSTORE_LIBRARY to libp2pstore.so"
        ) from None
    text, pointer, size = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t
    number, length, ranges = ctypes.c_int64, ctypes.c_uint64, ctypes.POINTER(_Range)
    out = ctypes.POINTER(pointer)
    for function, result, *arguments in (
        ("version", text),
        ("error", text),
        ("open", ctypes.c_int, text, text, ctypes.POINTER(text), out),
        ("close", ctypes.c_int, pointer),
        ("register_start", ctypes.c_int, pointer, text, ranges, size, length, text, pointer,
         pointer, out),
        ("unregister_start", ctypes.c_int, pointer, text, pointer, pointer, out),
        ("get_replica_start", ctypes.c_int, pointer, text, ranges, size, pointer, pointer, out),
        ("delete_replica_start", ctypes.c_int, pointer, text, pointer, pointer, out),
        ("request_status", ctypes.c_int, pointer),
        ("request_error", text, pointer),
        ("request_progress", None, pointer, ctypes.POINTER(length), ctypes.POINTER(length)),
        ("request_wait", ctypes.c_int, pointer, number),
        ("request_cancel", ctypes.c_int, pointer),
        ("request_free", None, pointer),
        ("list", ctypes.c_int, pointer, text, number, out),
        ("list_count", size, pointer),
        ("list_entry", ctypes.POINTER(_Entry), pointer, size),
        ("list_free", None, pointer),
    ):  # fmt: skip
        entry = getattr(library, f"p2pstore_{function}")
        entry.restype, entry.argtypes = result, arguments
    return library


_library = _load()


def version():
    """Of the library: "0.1.0"."""
    return _library.p2pstore_version().decode()


def _failed(status, text=None):
    return Error(-status, (text or _library.p2pstore_error()).decode(errors="replace"))


def _check(status):
    if status < 0:
        raise _failed(status)


def _milliseconds(timeout):
    return -1 if timeout is None else max(0, int(timeout * 1000))


# -- Buffers


def _torch_range(tensor):
    if tensor.device.type != "cpu":
        raise ValueError(f"a tensor on {tensor.device}: only memory of the host can be shared")
    if not tensor.is_contiguous():
        raise ValueError("a tensor that is not contiguous: pass tensor.contiguous()")
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()


def _buffer_range(buffer, writable):
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise ValueError("a buffer that is not contiguous: pass a copy that is")
    if view.readonly and writable:
        raise ValueError("a buffer that is read-only cannot be pulled into")
    interface = getattr(buffer, "__array_interface__", None)
    if interface:  # numpy, read-only arrays too
        return interface["data"][0], view.nbytes
    if view.nbytes == 0:
        return 0, 0
    if not view.readonly:
        return ctypes.addressof(ctypes.c_char.from_buffer(view)), view.nbytes
    raise ValueError(f"the address of a read-only {type(buffer).__name__} is not known: wrap it in numpy")


def _ranges(buffers, writable):
    """The ranges, and what keeps them alive."""
    torch = sys.modules.get("torch")
    if (torch and isinstance(buffers, torch.Tensor)) or hasattr(buffers, "__array_interface__"):
        buffers = [buffers]
    try:
        buffers = [buffers] if memoryview(buffers) else [buffers]
    except TypeError:
        buffers = list(buffers)
    ranges, kept = (_Range * max(1, len(buffers)))(), []
    for i, buffer in enumerate(buffers):
        if torch and isinstance(buffer, torch.Tensor):
            address, length = _torch_range(buffer)
            kept.append(buffer)
        else:
            address, length = _buffer_range(buffer, writable)
            # An exported view keeps a bytearray or mmap from being resized or closed.
            kept.append(memoryview(buffer))
        ranges[i] = _Range(address, length)
    return ranges, len(buffers), kept


def _let_go(kept):
    for buffer in kept or ():
        if isinstance(buffer, memoryview):
            buffer.release()


# -- Requests


class Request:
    """One call under way. wait() returns when it has succeeded, and raises Error when it has failed."""

    def __init__(self, store, name, handle, kept, gives):
        self.name = name
        self._store, self._handle = store, handle
        self._kept = kept  # what its success or failure is about
        self._gives = gives  # ended, it gives that back, whatever its status

    def done(self):
        return _library.p2pstore_request_status(self._handle) != -errno.EINPROGRESS

    def progress(self):
        """(bytes that have arrived, all of them) of a pull; (0, 0) of other calls."""
        done, total = ctypes.c_uint64(), ctypes.c_uint64()
        _library.p2pstore_request_progress(self._handle, done, total)
        return done.value, total.value

    def wait(self, timeout=None):
        """Error with errno ETIMEDOUT after `timeout` seconds; the request goes on then."""
        # In slices, so that Ctrl-C is heard.
        left = _milliseconds(timeout)
        while True:
            part = 200 if left < 0 else min(left, 200)
            status = _library.p2pstore_request_wait(self._handle, part)
            left -= part if left >= 0 else 0
            if status != -errno.EINPROGRESS or left == 0:
                break
        if status == -errno.EINPROGRESS:
            raise Error(errno.ETIMEDOUT, f"{self.name}: not done in {timeout:g} s")
        self._store._settle(self, status)
        if status < 0:
            raise _failed(status, _library.p2pstore_request_error(self._handle))

    def cancel(self):
        """True: it has ended, and nothing touches its memory any more. False: it was over before."""
        status = _library.p2pstore_request_cancel(self._handle)
        if status not in (0, -errno.EALREADY):
            raise _failed(status)
        if status == 0:
            self._store._settle(self, -errno.ECANCELED)
        return status == 0

    def __del__(self):
        if self._handle:
            _library.p2pstore_request_free(self._handle)


_stores = weakref.WeakSet()


@atexit.register
def _close_all():
    """Before the interpreter frees what the library reads."""
    for store in list(_stores):
        store.close()


class Store:
    """This process as a node of the cluster. Arguments as for p2pstore_open: options by name, such as
    listen="10.0.0.2:0", secret_file="/etc/p2pfs/secret", allow_overwrite=True. Any thread may use it."""

    def __init__(self, metadata, node=None, **options):
        words = [
            key if value is True else f"{key}={value}"
            for key, value in options.items()
            if value is not None and value is not False
        ]
        array = (ctypes.c_char_p * (len(words) + 1))(*(os.fsencode(word) for word in words), None)
        handle = ctypes.c_void_p()
        self._handle = None
        self._lock = threading.Lock()
        self._kept = {}  # name -> what the library may touch
        node = None if node is None else os.fsencode(node)
        _check(_library.p2pstore_open(os.fsencode(metadata), node, array, ctypes.byref(handle)))
        self._handle = handle
        self._pid = os.getpid()
        _stores.add(self)

    def close(self):
        """Offers nothing any more, ends what is under way, and lets go of all buffers."""
        with self._lock:
            handle, self._handle = self._handle, None
        if handle and self._pid == os.getpid():
            _check(_library.p2pstore_close(handle))
            for kept in self._kept.values():
                _let_go(kept)
            self._kept.clear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        self.close()

    def _open(self):
        if not self._handle:
            raise ValueError("the store is closed")
        return self._handle

    def _settle(self, request, status):
        """A request has ended: lets go of the buffers that the library has let go of."""
        with self._lock:
            if (status < 0 or request._gives) and self._kept.get(request.name) is request._kept:
                _let_go(self._kept.pop(request.name, None))

    def _start(self, function, name, kept, *arguments):
        """kept: the buffers that the library is given; None: it gives back those that it has."""
        handle = ctypes.c_void_p()
        gives = kept is None
        with self._lock:
            status = function(self._open(), os.fsencode(name), *arguments, None, None,
                              ctypes.byref(handle))  # fmt: skip
            if status < 0:
                _let_go(kept)
                _check(status)
            if gives:
                kept = self._kept.get(name)
            else:
                self._kept[name] = kept
        return Request(self, name, handle, kept, gives)

    def register_start(self, name, buffers, max_shard_size=SHARD, location=None):
        ranges, count, kept = _ranges(buffers, False)
        location = None if location is None else os.fsencode(location)
        return self._start(_library.p2pstore_register_start, name, kept, ranges, count,
                           max_shard_size, location)  # fmt: skip

    def get_replica_start(self, name, buffers):
        ranges, count, kept = _ranges(buffers, True)
        return self._start(_library.p2pstore_get_replica_start, name, kept, ranges, count)

    def unregister_start(self, name):
        return self._start(_library.p2pstore_unregister_start, name, None)

    def delete_replica_start(self, name):
        return self._start(_library.p2pstore_delete_replica_start, name, None)

    def _wait(self, request, timeout):
        try:
            request.wait(timeout)
        except (Error, KeyboardInterrupt):
            if not request.done():
                request.cancel()
            raise

    def register(self, name, buffers, max_shard_size=SHARD, location=None, timeout=30):
        """The buffers, one behind the other, as a new version under the name. Nothing is copied."""
        self._wait(self.register_start(name, buffers, max_shard_size, location), timeout)

    def get_replica(self, name, buffers, timeout=None):
        """Pulls the name into the buffers, which together have its size; from then on passes it on."""
        self._wait(self.get_replica_start(name, buffers), timeout)

    def unregister(self, name, timeout=30):
        """Takes back the buffers, and the name from the whole cluster."""
        self._wait(self.unregister_start(name), timeout)

    def delete_replica(self, name, timeout=30):
        """Takes back the buffers of a pull; the name stays."""
        self._wait(self.delete_replica_start(name), timeout)

    def _list(self, prefix, timeout):
        handle = ctypes.c_void_p()
        _check(_library.p2pstore_list(self._open(), os.fsencode(prefix), _milliseconds(timeout),
                                      ctypes.byref(handle)))  # fmt: skip
        return handle

    def count(self, prefix="", timeout=10):
        """How many entries list() would return, without making them."""
        handle = self._list(prefix, timeout)
        try:
            return _library.p2pstore_list_count(handle)
        finally:
            _library.p2pstore_list_free(handle)

    def list(self, prefix="", timeout=10):
        """An Entry for every registered name that begins with prefix, in order."""
        handle = self._list(prefix, timeout)
        try:
            found = []
            for i in range(_library.p2pstore_list_count(handle)):
                e = _library.p2pstore_list_entry(handle, i).contents
                found.append(
                    Entry(
                        os.fsdecode(e.name), e.max_shard_size, e.total_size,
                        e.sizes[: e.size_count], None if e.holders < 0 else e.holders,
                        None if e.complete < 0 else e.complete, STATES.get(e.state, "unknown"),
                        os.fsdecode(e.origin),
                    )
                )  # fmt: skip
            return found
        finally:
            _library.p2pstore_list_free(handle)


# -- A state_dict: its tensors in their order under NAME/tensors, what they are under NAME/index.json


def _index(tensors):
    return {
        key: {"dtype": str(t.dtype).replace("torch.", ""), "shape": list(t.shape)}
        for key, t in tensors.items()
    }


def register_state_dict(store, name, tensors, max_shard_size=SHARD):
    """Registers the tensors (a state_dict, or any dict of tensors or arrays) where they lie. unregister both
    NAME/index.json and NAME/tensors before they are changed."""
    store.register(f"{name}/tensors", list(tensors.values()), max_shard_size)
    index = bytearray(json.dumps(_index(tensors)).encode())
    store.register(f"{name}/index.json", index)


def load_state_dict(store, name, into, timeout=None):
    """Pulls it into the tensors of `into` (of the same keys, types and shapes; nothing is allocated for them)."""
    entries = [e for e in store.list(f"{name}/index.json") if e.name == f"{name}/index.json"]
    if not entries:
        raise Error(errno.ENOENT, f"{name}: no such state_dict is registered")
    index = bytearray(entries[0].total_size)
    store.get_replica(f"{name}/index.json", index, timeout)
    store.delete_replica(f"{name}/index.json")
    theirs, ours = json.loads(index), _index(into)
    if theirs != ours:
        wrong = sorted(k for k in {*theirs, *ours} if theirs.get(k) != ours.get(k))
        raise ValueError(f"{name}: {len(wrong)} tensors differ in name, type or shape: {wrong[:3]}")
    store.get_replica(f"{name}/tensors", [into[key] for key in theirs], timeout)
