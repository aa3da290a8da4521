"""Metadata in a plain HTTP key-value service: what it cannot promise, what stands there already, who
may look, and the service of scripts/metadata-server itself."""
# ctest: timeout=240

import errno
import json
import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from harness import data
from harness.node import refused
from harness.services import Http, secret_file
from harness.wait import eventually

STATE = "p2pfs.state"


@pytest.fixture
def service(tmp_path):
    one = Http(tmp_path / "service").start()
    yield one
    one.kill()


def names(node):
    return sorted(os.listdir(node.dir))


def is_unsupported(change, *arguments):
    with pytest.raises(OSError) as raised:
        change(*arguments)
    assert raised.value.errno == errno.EOPNOTSUPP, raised.value


def write(path):
    with open(path, "wb") as out:
        out.write(b"x")


# -- a service without preconditions


def test_without_preconditions_names_are_read_and_nothing_is_changed(
    service, make_cluster, mounts
):
    cluster = make_cluster(service.url())
    a = cluster.node()
    a.path("dir").mkdir()
    a.path("dir/model").write_bytes(data.pattern(3 << 20))
    os.symlink("dir", a.path("latest"))
    service.extra = ["--plain"]
    service.restart()
    eventually(lambda: not a.status()["online"] and "no longer honours" in a.log)
    with pytest.raises(OSError):
        write(a.path("never"))
    before = service.ask("GET", STATE)[1]

    c = cluster.node()
    assert "does not honour If-Match" in c.log
    assert names(c) == ["dir", "latest"] and os.readlink(c.path("latest")) == "dir"
    assert c.path("dir/model").read_bytes() == data.pattern(3 << 20)
    is_unsupported(os.mkdir, c.path("d"))
    is_unsupported(os.rename, c.path("dir"), c.path("moved"))
    is_unsupported(os.unlink, c.path("dir/model"))
    is_unsupported(os.unlink, c.path("latest"))
    is_unsupported(os.symlink, "dir", c.path("tag"))
    is_unsupported(os.symlink, "/etc/hostname", c.path("in-place"))
    is_unsupported(write, c.path("file"))
    assert names(c) == names(a) == ["dir", "latest"]
    assert service.ask("GET", STATE)[1] == before, "something was written"

    service.extra = []
    service.restart()
    eventually(lambda: a.status()["online"])
    a.path("again").write_bytes(b"x")
    eventually(lambda: c.path("again").read_bytes() == b"x")
    is_unsupported(os.mkdir, c.path("d"))  # until it is mounted again


def test_a_service_without_preconditions_that_is_empty_is_refused(service, make_cluster, mounts):
    service.extra = ["--plain"]
    service.restart()
    refused(make_cluster(service.url()), "does not honour If-Match")
    assert service.ask("GET", STATE)[0] == 404


# -- what stands there already


@pytest.mark.parametrize(
    "value, says",
    [
        (b"<html>welcome</html>", "no metadata of p2pfs"),
        (b"", "no metadata of p2pfs"),
        (b"[" * 100_000, "no metadata of p2pfs"),
        (b'{"v":99,"epoch":"e","revision":1,"leases":{},"keys":{}}', "another version"),
        (b'{"v":1,"epoch":"e","revision":1,"base":"","base_revision":0,"leases":{},'
         b'"keys":{"t/i":[2,"x"]}}', "no metadata of p2pfs"),
        (b'{"v":1,"epoch":"e","revision":1,"base":"","base_revision":0,"leases":{},'
         b'"keys":{"t/i":[1,"x","00000000000000aa"]}}', "no metadata of p2pfs"),
        (b"x" * (10 << 20), "too large"),
    ],
    ids=["html", "empty", "deep", "version", "revision", "lease", "large"],
)  # fmt: skip
def test_what_is_not_ours_is_left_alone(service, make_cluster, mounts, value, says):
    assert service.ask("PUT", STATE, value)[0] == 200
    refused(make_cluster(service.url()), says)
    assert service.ask("GET", STATE)[1] == value


def test_a_document_that_somebody_breaks_is_an_outage(service, make_cluster, mounts):
    a, b = make_cluster(service.url()).nodes(2)
    a.path("x").write_bytes(data.pattern(1 << 20))
    eventually(b.path("x").exists)
    service.ask("PUT", STATE, b"oops")
    eventually(lambda: not a.status()["online"] and not b.status()["online"])
    assert names(a) == names(b) == ["x"]
    with pytest.raises(OSError):
        write(a.path("never"))
    assert service.ask("GET", STATE)[1] == b"oops"
    service.ask("DELETE", STATE)
    eventually(lambda: a.status()["online"] and b.status()["online"])
    eventually(lambda: b.path("x").read_bytes() == data.pattern(1 << 20), what="a holds it again")
    b.path("y").write_bytes(b"y")
    eventually(lambda: a.path("y").read_bytes() == b"y")
    assert names(a) == names(b) == ["x", "y"]


def test_names_whose_base_is_lost_are_written_again(service, make_cluster, mounts, tmp_path):
    cluster = make_cluster(service.url())
    a = cluster.node()
    (tmp_path / "tree").mkdir()
    for i in range(200):
        (tmp_path / "tree" / f"f{i}").write_bytes(b"x")
    os.symlink(tmp_path / "tree", a.path("tree"))
    a.kill9()  # it would write them again
    base = json.loads(service.ask("GET", STATE)[1])["base"]
    assert base, "200 names need a base"
    assert service.ask("DELETE", f"p2pfs.base.{base}")[0] == 200
    service.restart()
    b = cluster.node()
    assert names(b) == []
    b.path("new").write_bytes(b"x")
    eventually(lambda: names(b) == ["new"])


@pytest.fixture
def front(service):
    """Answers for the service; from the first base on it takes no document, until it is mended."""

    class Front(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        broken = False
        bases = []

        def forward(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            key = self.path.partition("key=")[2]
            status, answer, tag = 503, b"", None
            if self.command == "PUT" and ".base." in key:
                Front.bases.append(key)
                Front.broken = Front.broken or len(Front.bases) == 1
            if not (Front.broken and self.command == "PUT" and key == STATE):
                headers = {n: self.headers[n] for n in ("If-Match", "If-None-Match") if n in self.headers}
                status, answer, tag = service.ask(self.command, key, body or None, headers)
            self.send_response(status)
            if tag:
                self.send_header("ETag", tag)
            if status != 304:
                self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            if status != 304:
                self.wfile.write(answer)

        do_GET = do_PUT = do_DELETE = forward

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Front)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Front.url = f"http://127.0.0.1:{server.server_port}/metadata"
    yield Front
    server.shutdown()
    server.server_close()


def test_bases_that_the_document_never_led_to_are_few_and_removed(
    front, service, make_cluster, mounts, tmp_path
):
    a = make_cluster(front.url).node()
    (tmp_path / "tree").mkdir()
    for i in range(200):
        (tmp_path / "tree" / f"f{i}").write_bytes(b"x")
    with pytest.raises(OSError):
        os.symlink(tmp_path / "tree", a.path("tree"))
    for i in range(30):
        with pytest.raises(OSError):
            os.mkdir(a.path(f"never{i}"))
    made = len(front.bases)
    front.broken = False
    eventually(lambda: a.status()["online"])
    a.path("x").write_bytes(b"x")

    def the_documents_base_alone_is_left():
        base = json.loads(service.ask("GET", STATE)[1])["base"]
        left = [key for key in front.bases if service.ask("GET", key)[0] == 200]
        return left == ([f"p2pfs.base.{base}"] if base else [])

    eventually(the_documents_base_alone_is_left)
    assert 1 <= made <= 4


def test_nodes_that_register_trees_at_once_all_come_through(service, make_cluster, mounts, tmp_path):
    nodes = make_cluster(service.url()).nodes(4)
    failed = []

    def register(node):
        source = tmp_path / f"of-{node.name}"
        source.mkdir()
        for i in range(600):
            (source / f"f{i}").write_bytes(b"x")

        def registered():
            try:
                os.symlink(source, node.path(node.name))
            except OSError as error:
                if error.errno == errno.ETIMEDOUT:  # so many writers, on a busy machine: nothing was registered
                    return False
                failed.append((node.name, error))
            return True

        try:
            eventually(registered)
        except AssertionError as error:
            failed.append((node.name, error))

    threads = [threading.Thread(target=register, args=(node,)) for node in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for node in nodes:
        eventually(lambda node=node: names(node) == sorted(n.name for n in nodes))
        assert all(len(os.listdir(node.path(name))) == 600 for name in names(node))


# -- who may look, and what else may answer


def test_user_and_password(service, make_cluster, mounts, tmp_path):
    right = secret_file(tmp_path / "right", user="p2pfs", password="s3cret")
    wrong = secret_file(tmp_path / "wrong", user="p2pfs", password="not-that")
    service.extra = ["--credentials", str(right)]
    service.restart()
    cluster = make_cluster(service.url())
    refused(cluster, "credentials=FILE")
    assert "not-that" not in refused(cluster, "credentials=FILE", credentials=wrong)
    a, b = cluster.nodes(2, credentials=right)
    a.path("x").write_bytes(b"seen")
    eventually(lambda: b.path("x").read_bytes() == b"seen")
    with open(f"/proc/{a.pid}/cmdline", "rb") as line, open("/proc/mounts") as table:
        assert b"s3cret" not in line.read() and "s3cret" not in table.read()
    assert "s3cret" not in a.log


@pytest.mark.parametrize("status, says", [(302, "not followed"), (500, "log"), (200, "nobody wrote")])
def test_what_is_no_such_service_is_refused(make_cluster, mounts, status, says):
    written = []

    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Location", "http://127.0.0.1:1/")
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def do_PUT(self):
            written.append(self.path)
            self.do_GET()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        refused(make_cluster(f"http://127.0.0.1:{server.server_port}/x"), says)
        assert not written
    finally:
        server.shutdown()
        server.server_close()


def test_malformed_urls_are_refused_by_name(make_cluster, mounts):
    for url, part in (
        ("http://", "HOST:PORT"),
        ("http://127.0.0.1:1/metadata", "is the service running"),
        ("http://127.0.0.1:1/metadata?key=x", "prefix"),
        ("http://127.0.0.1:1/metadata?prefix=a/b", "prefix"),
        ("https://127.0.0.1:1/metadata", "no metadata service"),
    ):
        refused(make_cluster(url), part)
    assert "s3cret" not in refused(make_cluster("http://me:s3cret@127.0.0.1:1/x"), "credentials=")


def test_a_path_that_ends_with_a_slash_has_its_keys_below(service, make_cluster, mounts):
    a, b = make_cluster(f"http://127.0.0.1:{service.port}/some/where/").nodes(2)
    a.path("x").write_bytes(b"seen")
    eventually(lambda: b.path("x").read_bytes() == b"seen")
    assert service.ask("GET", STATE)[0] == 404


# -- the server itself


def test_preconditions_of_the_server(service):
    assert service.ask("GET", "k")[0] == 404
    assert service.ask("DELETE", "k")[0] == 404
    assert service.ask("PUT", "k", b"1", {"If-Match": "*"})[0] == 412
    status, _, tag = service.ask("PUT", "k", b"1", {"If-None-Match": "*"})
    assert status == 200 and tag
    assert service.ask("PUT", "k", b"2", {"If-None-Match": "*"})[0] == 412
    assert service.ask("GET", "k", None, {"If-None-Match": tag})[:2] == (304, b"")
    assert service.ask("PUT", "k", b"2", {"If-Match": '"other"'})[0] == 412
    assert service.ask("PUT", "k", b"2", {"If-Match": f'"other", {tag}'})[0] == 200
    assert service.ask("DELETE", "k", None, {"If-Match": tag})[0] == 412
    assert service.ask("GET", "k")[1] == b"2"
    assert service.ask("GET", "k%20with%2Fall%3F")[0] == 404
    assert service.ask("PUT", "k%20with%2Fall%3F", b"3")[0] == 200
    assert service.ask("GET", "k%20with%2Fall%3F")[1] == b"3"
    assert service.ask("PUT", "large", b"x" * ((16 << 20) + 1))[0] == 413
    assert service.ask("DELETE", "k")[0] == 200


def test_the_servers_file_survives_a_torn_write_and_spares_other_files(service, tmp_path):
    for i in range(5):
        service.ask("PUT", f"k{i}", f"value {i}\n".encode())
    service.ask("DELETE", "k1")
    service.kill()
    values = service.data / "values"
    whole = values.read_bytes()
    for tail in (b"[", b'["/metadata?k9", 10', b'["/metadata?k9", 10]\n', b'["/metadata?k9", 10]\n123'):
        values.write_bytes(whole + tail)
        service.start()
        assert [service.ask("GET", f"k{i}")[0] for i in range(5)] == [200, 404, 200, 200, 200]
        assert service.ask("GET", "k4")[1] == b"value 4\n"
        assert service.ask("GET", "k9")[0] == 404
        service.kill()
        assert values.read_bytes() == whole
    other = tmp_path / "other"
    other.write_bytes(b"precious")
    run = subprocess.run(
        [service.program, "--listen", "127.0.0.1:0", "--file", other], capture_output=True, timeout=20
    )
    assert run.returncode == 1 and b"left alone" in run.stderr
    assert other.read_bytes() == b"precious"


def test_the_servers_file_is_made_smaller(service):
    for i in range(12):
        service.ask("PUT", "k", bytes([65 + i]) * (1 << 20))
    assert (service.data / "values").stat().st_size < 10 << 20
    service.restart()
    assert service.ask("GET", "k")[1] == b"L" * (1 << 20)
