"""Peers of the test's own: one that speaks the protocol and says what it likes, and what stands between two nodes."""

import re
import socket
import struct
import threading
import time

from . import env


HEAD = struct.Struct(">HHIIQ")  # engine/tcp_link.h: kind, zero, id, length, offset
MESSAGE, DATA, END = 1, 2, 3


class Puller:
    """A peer that speaks the protocol, as a puller (engine/wire.h), and says what it likes."""

    HELLO, PROOF, ATTACH, ATTACHED, ASK, GRANT, DONE, PING, PONG = 1, 3, 4, 5, 8, 9, 13, 15, 16

    def __init__(self, node, name="evil"):
        host, port = node.options["listen"].rsplit(":", 1)
        self.link = socket.create_connection((host, int(port)), timeout=5)
        header = (env.SOURCE / "engine/wire.h").read_text()
        sizes = {
            name: int(re.search(rf"WIRE_{name}\s+(0x[0-9a-f]+|\d+)", header).group(1), 0)
            for name in ("MAGIC", "PROTOCOL", "NONCE")
        }
        hello = struct.pack(">IHH", sizes["MAGIC"], sizes["PROTOCOL"], len(name)) + name.encode()
        hello += struct.pack(">QQ", 7, 0) + bytes(sizes["NONCE"] + 1)
        self.link.sendall(b"p2pftcp1")
        self.greeted = False
        self.say((self.HELLO, hello), (self.PROOF, bytes(32)))

    def say(self, *messages):
        frames = b""
        for kind, body in messages:
            frames += struct.pack(">HHIIQB", 1, 0, 0, 1 + len(body), 0, kind) + body
        self.link.sendall(frames)

    def hear(self, *wanted):
        """The kind of the next message that is one of these; what comes before it is thrown away."""
        if not self.greeted:
            assert self._read(8) == b"p2pftcp1"
            self.greeted = True
        while True:
            frame, _, _, length, _ = HEAD.unpack(self._read(HEAD.size))
            body = self._read(length if frame != END else 0)
            if frame == MESSAGE and body[0] in wanted:
                return body[0]

    def _read(self, length):
        data = b""
        while len(data) < length:
            piece = self.link.recv(length - len(data))
            assert piece, "the link was ended"
            data += piece
        return data

    def listen(self, seconds):
        """Throws away what comes."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.link.settimeout(left)
            try:
                assert self.link.recv(1 << 20), "the link was ended"
            except TimeoutError:
                break
        self.link.settimeout(5)


class Recorder(threading.Thread):
    """Stands between two nodes and passes on what they say, with the first bytes changed."""

    def __init__(self, upstream, change, host="127.0.0.1"):
        super().__init__(daemon=True)
        self.upstream = upstream
        self.change = change
        self.server = socket.create_server((host, 0))
        self.address = f"{host}:{self.server.getsockname()[1]}"
        self.passed = 0
        self.start()

    def run(self):
        while True:
            try:
                down, _ = self.server.accept()
            except OSError:
                return
            try:
                up = socket.create_connection(self.upstream)
            except OSError:
                down.close()
                continue
            for one, other, change in ((down, up, None), (up, down, self.change)):
                threading.Thread(target=self.pump, args=(one, other, change), daemon=True).start()

    def pump(self, one, other, change):
        try:
            while data := one.recv(65536):
                self.passed += len(data)
                if change is not None:
                    data = change(data)
                    change = None
                other.sendall(data)
        except OSError:
            pass
        self.end(one, other)

    @staticmethod
    def end(*links):
        for link in links:
            try:
                link.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class Spoiler(Recorder):
    """Stands before a holder, which advertises it, and spoils what that sends in a way that can be changed meanwhile.

    None      nothing
    "flip"    a bit in each piece of a shard
    "starve"  every shard: it is granted and never comes
    "half"    the message after some: half of it, then silence
    """

    HALF_AFTER = 6  # messages: behind the greeting, and before others may have served all

    def __init__(self, upstream, host="127.0.0.1"):
        self.how = None
        self.spoilt = 0
        super().__init__(upstream, None, host)

    def pump(self, one, other, change):
        if one.getpeername() != self.upstream:
            super().pump(one, other, change)
            return
        try:
            self._spoil(one.makefile("rb"), other)
        except (OSError, struct.error):
            pass
        self.end(one, other)

    def _spoil(self, source, other):
        other.sendall(source.read(8))
        messages = 0
        while True:
            head = source.read(HEAD.size)
            kind, _, _, length, _ = HEAD.unpack(head)
            body = source.read(length if kind != END else 0)
            messages += kind == MESSAGE
            if self.how == "starve" and kind != MESSAGE:
                self.spoilt += 1
                continue
            if self.how == "flip" and kind == DATA:
                self.spoilt += 1
                body = bytes((body[0] ^ 1,)) + body[1:]
            if self.how == "half" and messages > self.HALF_AFTER:
                self.spoilt += 1
                other.sendall((head + body)[: (len(head) + len(body)) // 2])
                while source.read(65536):
                    pass
                return
            other.sendall(head + body)
