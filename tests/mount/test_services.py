"""Mounts on real Redis, Valkey and etcd: what users of several nodes see, and who may look."""
# ctest: timeout=300
# ctest: jobs=3

import errno
import json
import os
import shutil
import socket
import subprocess
import threading
import time

import pytest

from harness import data, fuse
from harness.node import free_port, refused, run_p2pfs
from harness.services import KINDS, Etcd, Link, Redis, secret_file
from harness.wait import eventually


@pytest.fixture(params=list(KINDS))
def service(request, mounts, tmp_path):
    one = KINDS[request.param](tmp_path / "service").start()
    yield one
    one.kill()


def names(node):
    return sorted(os.listdir(node.dir))


# -- what users see


def test_what_is_copied_to_one_is_on_the_other_within_a_second(service, make_cluster, tmp_path):
    a, b = make_cluster(service.url()).nodes(2)
    source = data.write_file(tmp_path / "model", 20 << 20)
    shutil.copyfile(source, a.path("model"))
    eventually(lambda: names(b) == ["model"], what="listed on the other node")
    assert data.digest(b.path("model")) == data.digest(source)
    assert b.status()["backend"] in ("redis", "etcd", "http")
    os.unlink(b.path("model"))
    eventually(lambda: names(a) == [], what="gone on the other node")


def register(node, name, content, written, outcomes):
    """The close registers, and both come to it at once."""
    try:
        with open(node.path(name), "wb") as out:
            out.write(content)
            written.wait(60)
    except OSError as error:
        outcomes.append((node.name, error.errno))
    else:
        outcomes.append((node.name, 0))


def test_one_of_two_registrants_of_a_name_wins(service, make_cluster):
    a, b = make_cluster(service.url()).nodes(2)
    winners = []
    for i in range(20):
        outcomes, written = [], threading.Barrier(2)
        both = [
            threading.Thread(
                target=register, args=(n, f"n{i}", n.name.encode() * 50, written, outcomes)
            )
            for n in (a, b)
        ]
        for one in both:
            one.start()
        for one in both:
            one.join()
        assert sorted(error for _, error in outcomes) == [0, errno.EEXIST], outcomes
        winners.append(min(outcomes, key=lambda one: one[1])[0])
    for i, winner in enumerate(winners):
        for n in (a, b):
            eventually(lambda n=n: n.path(f"n{i}").read_bytes() == winner.encode() * 50)


def test_two_prefixes_do_not_see_each_other(service, make_cluster):
    a = make_cluster(service.url("first")).node("same-name")
    b = make_cluster(service.url("second")).node("same-name")
    a.path("x").write_bytes(b"of the first")
    b.path("y").write_bytes(b"of the second")
    time.sleep(1)
    assert names(a) == ["x"] and names(b) == ["y"]
    assert a.peers()["peers"] == [] and b.peers()["peers"] == []


def test_a_tree_of_many_names_moves_at_once(service, make_cluster, tmp_path):
    a, b = make_cluster(service.url()).nodes(2)
    count = 2000 if service.name == "http" else 10000  # http has no room for more than 11,000
    (tmp_path / "tree").mkdir()
    for i in range(count):
        (tmp_path / "tree" / f"f{i}").write_bytes(b"x")
    os.symlink(tmp_path / "tree", a.path("before"))
    eventually(lambda: len(os.listdir(b.path("before"))) == count, what="all names on the other")
    seen = set()
    stop = threading.Event()

    def watch():
        while not stop.is_set():
            try:
                found = os.listdir(b.path("before"))
            except FileNotFoundError:
                found = []
            try:
                after = os.listdir(b.path("after"))
            except FileNotFoundError:
                after = []
            seen.add((len(found), len(after)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    os.rename(a.path("before"), a.path("after"))
    eventually(lambda: b.path("after/f17").exists(), what="moved on the other node")
    stop.set()
    watcher.join()
    assert not b.path("before").exists()
    # a look at one name after the other may fall on both sides of the move, never inside it
    assert all(one in (0, count) and two in (0, count) for one, two in seen), seen


def announcements(service):
    """Changes of holders' records so far."""
    return int(service.ask("XLEN", "p2pfs:feed:h").lstrip(":"))


def test_metadata_of_a_pull_does_not_grow_with_its_shards(make_cluster, mounts, tmp_path):
    service = Redis(tmp_path / "service").start()
    try:
        a, b = make_cluster(service.url()).nodes(2, shard_size="64K")
        announced = {}
        for shards in (16, 4096):
            data.write_file(a.path(f"m{shards}"), shards << 16)
            eventually(b.path(f"m{shards}").exists)
            before = service.requests(), announcements(service)
            run_p2pfs("pull", b.path(f"m{shards}"))
            eventually(lambda: b.xattr(f"m{shards}", "state") == "complete")
            eventually(lambda: b.xattr(f"m{shards}", "replicas") == "2", what="b has announced it")
            announced[shards] = announcements(service) - before[1]
            print(f"{shards} shards: {service.requests() - before[0]} requests of two nodes in the "
                  f"time of the pull, {announced[shards]} announcements")
        assert max(announced.values()) <= 4
    finally:
        service.kill()


# -- who may look


def assert_secret_is_nowhere(node, secret):
    assert secret not in node.log
    mount = fuse.mounted_at(node.dir)
    assert secret not in " ".join(map(str, mount))
    with open(f"/proc/{node.pid}/cmdline", encoding="utf-8") as words:
        assert secret not in words.read()
    assert secret not in json.dumps(node.status())


def test_redis_user_and_password_come_from_a_file(make_cluster, mounts, tmp_path):
    rule = "p2pfs on >s3cret ~p2pfs:* -@all +@read +@write +@scripting +select +time +info"
    service = Redis(tmp_path / "service", ["--requirepass", "admin"]).start()
    try:
        service.ask("ACL", "SETUSER", *rule.split(), password="admin")  # as in the man page
        one = make_cluster(service.url())
        refused(one, "wants a password", "credentials=FILE")
        wrong = secret_file(tmp_path / "wrong", user="p2pfs", password="not-that")
        assert "not-that" not in refused(one, "password is wrong", credentials=wrong)
        right = secret_file(tmp_path / "right", user="p2pfs", password="s3cret")
        os.chmod(right, 0o640)
        refused(one, "chmod 600", credentials=right)
        os.chmod(right, 0o600)
        a, b = one.nodes(2, credentials=right)
        a.path("x").write_bytes(b"seen")
        eventually(lambda: b.path("x").read_bytes() == b"seen")
        assert_secret_is_nowhere(a, "s3cret")
        old = one.node(start=False)
        old.env["MC_REDIS_PASSWORD"] = "admin"
        old.start()
        assert names(old) == ["x"]
        assert_secret_is_nowhere(old, "admin")
    finally:
        service.kill()


def test_a_password_in_the_url_is_refused(make_cluster, mounts):
    for url in ("redis://me:s3cret@127.0.0.1:1/0", "etcd://me:s3cret@127.0.0.1:1/x"):
        assert "s3cret" not in refused(make_cluster(url), "password", "credentials=FILE")


def test_malformed_and_dead_urls_are_refused_by_name(make_cluster, mounts):
    for url, part in (
        ("redis://127.0.0.1:99999", "port"),
        ("redis://127.0.0.1:6379/x", "database"),
        ("redis://127.0.0.1:6379?colour=red", "unknown part"),
        ("redis://127.0.0.1:1", "is the server running"),
        ("etcd://127.0.0.1", "HOST:PORT"),
        ("etcd://127.0.0.1:1", "is the service running"),
    ):
        refused(make_cluster(url), part)


def test_data_of_another_program_is_left_alone(make_cluster, mounts, tmp_path):
    service = Redis(tmp_path / "service").start()
    try:
        service.ask("SET", "p2pfs:state", "something else")
        refused(make_cluster(service.url()), "prefix")
        assert service.ask("GET", "p2pfs:state") == "something else"
        service.ask("HSET", "other:state", "format", "99", "epoch", "e", "revision", "1")
        refused(make_cluster(service.url("other")), "format")
    finally:
        service.kill()


def test_records_of_another_format_are_left_alone(service, make_cluster):
    if service.name == "http":
        pytest.skip("this test reaches into the records of Redis and etcd only")
    cluster = make_cluster(service.url())
    a = cluster.node()
    for name in ("later", "known"):
        a.path(name).write_bytes(name.encode())
    a.stop()
    key = "t/e/0000000000000001/later"
    record = service.record(key).replace('"v":1', '"v":2,"colour":"red"', 1)
    service.put_record(key, record)
    b = cluster.node()
    a.start()
    for node in (a, b):
        assert names(node) == ["known"]
        said = [line for line in node.log.splitlines() if "another format version" in line]
        assert len(said) == 1 and key in said[0] and "run the p2pfs that wrote it" in said[0]
        with pytest.raises(OSError) as raised:
            node.path("later").write_bytes(b"over it")
        assert raised.value.errno == errno.EIO
    b.path("new").write_bytes(b"new")
    eventually(lambda: a.path("new").read_bytes() == b"new")
    assert names(a) == ["known", "new"]
    b.stop()
    a.stop()
    assert service.record(key) == record


def test_etcd_user_and_password_and_their_token(make_cluster, mounts, tmp_path):
    service = Etcd(tmp_path / "service", ["--auth-token-ttl", "1"]).start()
    try:
        service.ask("auth/user/add", {"name": "root", "password": "r00t"})
        service.ask("auth/role/add", {"name": "root"})
        service.ask("auth/user/grant", {"user": "root", "role": "root"})
        service.ask("auth/enable", {})
        one = make_cluster(service.url())
        refused(one, "credentials=FILE")
        wrong = secret_file(tmp_path / "wrong", user="root", password="not-that")
        assert "not-that" not in refused(one, "password", credentials=wrong)
        right = secret_file(tmp_path / "right", user="root", password="r00t")
        a, b = one.nodes(2, credentials=right)
        a.path("x").write_bytes(b"seen")
        eventually(lambda: b.path("x").read_bytes() == b"seen")
        service.restart()  # tokens are in its memory
        eventually(lambda: a.status()["online"] and b.status()["online"])
        a.path("y").write_bytes(b"seen too")
        eventually(lambda: b.path("y").read_bytes() == b"seen too")
        register_many(a, tmp_path)
        sees_many(one.node(credentials=right))
        assert_secret_is_nowhere(a, "r00t")
    finally:
        service.kill()


def register_many(node, home):
    """More names than one page of a listing has."""
    (home / "many").mkdir()
    for i in range(600):
        (home / "many" / f"f{i}").write_bytes(b"x")
    os.symlink(home / "many", node.path("many"))


def sees_many(node, by_rpc=True):
    assert len(os.listdir(node.path("many"))) == 600
    assert ("does not answer gRPC" in node.log) != by_rpc


class WithoutRpc(Link):
    """Speaks HTTP/1 only, as many a proxy."""

    def _relay(self, near, far):
        if near.recv(3, socket.MSG_PEEK) == b"PRI":
            near.close()
            far.close()
        else:
            super()._relay(near, far)


def test_etcd_is_listed_with_grpc_and_without(make_cluster, mounts, tmp_path):
    service = Etcd(tmp_path / "service").start()
    link = WithoutRpc(service.port)
    try:
        register_many(make_cluster(service.url()).node(), tmp_path)
        sees_many(make_cluster(service.url()).node("direct"))
        sees_many(make_cluster(service.url(port=link.port)).node("proxied"), by_rpc=False)
    finally:
        link.close()
        service.kill()


def certificates(home):
    """ca.pem, server.pem and .key for 127.0.0.1, client.pem and .key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    home.mkdir()

    def run(*words):
        subprocess.run(["openssl", *words], cwd=home, check=True, capture_output=True)

    run("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.pem",
        "-subj", "/CN=test-ca", "-days", "2")  # fmt: skip
    for name in ("server", "client"):
        run("req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out",
            f"{name}.csr", "-subj", f"/CN={name}")  # fmt: skip
        (home / "ext").write_text("subjectAltName=IP:127.0.0.1\n"
                                  "extendedKeyUsage=serverAuth,clientAuth\n")  # fmt: skip
        run("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
            "-CAcreateserial", "-out", f"{name}.pem", "-days", "2", "-extfile", "ext")  # fmt: skip
    return home


def test_etcd_over_tls_with_a_client_certificate(make_cluster, mounts, tmp_path):
    keys = certificates(tmp_path / "keys")
    service = Etcd(
        tmp_path / "service",
        ["--cert-file", keys / "server.pem", "--key-file", keys / "server.key",
         "--trusted-ca-file", keys / "ca.pem", "--client-cert-auth"],
    )  # fmt: skip
    service.scheme = "https"
    service.start()
    try:
        one = make_cluster(service.url().replace("etcd:", "etcds:"))
        refused(one, "ca=", credentials=secret_file(tmp_path / "none"))
        known = {"ca": keys / "ca.pem"}
        refused(one, "cert", credentials=secret_file(tmp_path / "ca", **known))
        known |= {"cert": keys / "client.pem", "key": keys / "client.key"}
        a, b = one.nodes(2, credentials=secret_file(tmp_path / "all", **known))
        a.path("x").write_bytes(b"seen")
        eventually(lambda: b.path("x").read_bytes() == b"seen")
        register_many(a, tmp_path)
        sees_many(one.node(credentials=secret_file(tmp_path / "again", **known)))
    finally:
        service.kill()


def test_redis_over_tls_or_the_reason_why_not(make_cluster, mounts, tmp_path):
    keys = certificates(tmp_path / "keys")
    port = free_port()
    service = Redis(
        tmp_path / "service",
        ["--tls-cert-file", keys / "server.pem", "--tls-key-file", keys / "server.key",
         "--tls-ca-cert-file", keys / "ca.pem"],
    ).start()  # fmt: skip
    try:
        tls = service.ask("CONFIG", "SET", "tls-port", str(port))
        if not tls.startswith("+OK"):
            pytest.skip(f"this Redis has no TLS: {tls}")
        one = make_cluster(service.url(port=port).replace("redis:", "rediss:"))
        known = {name: keys / file for name, file in
                 (("ca", "ca.pem"), ("cert", "client.pem"), ("key", "client.key"))}  # fmt: skip
        secret = secret_file(tmp_path / "all", **known)
        if "tls: no" in run_p2pfs("version").stdout:
            refused(one, "rediss:// needs hiredis with TLS", credentials=secret)
            return
        refused(one, "ca=", credentials=secret_file(tmp_path / "none"))
        a, b = one.nodes(2, credentials=secret)
        a.path("x").write_bytes(b"seen")
        eventually(lambda: b.path("x").read_bytes() == b"seen")
        several = service.url(port=f"1,127.0.0.1:{port}").replace("redis:", "rediss:")
        c = make_cluster(several).node(credentials=secret)  # nothing answers at the first
        assert c.path("x").read_bytes() == b"seen"
    finally:
        service.kill()
