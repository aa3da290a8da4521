# ctest: timeout=240
# ctest: label=plain
"""libp2pstore as its users meet it: installed, linked, with mounts in the same cluster, from Python."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness import env
from harness.data import pattern
from harness.node import free_port
from harness.services import Etcd, Http, Redis
from harness.wait import eventually

BUILD = env.BINARY.parents[1]
EXAMPLE = env.BINARY.parent / "p2p-store-example"

PROGRAM = """
#include <p2pstore.h>
#include <stdio.h>
#include <string.h>
int log_say = 1; /* the library's own names are not in the way */
int main(int argc, char **argv)
{
    static char bytes[100000] = "in memory";
    struct p2pstore_range range = {bytes, sizeof bytes};
    const char *options[] = {"listen=127.0.0.1:0", NULL};
    struct p2pstore *store;
    if (argc != 2 || p2pstore_open(argv[1], NULL, options, &store) < 0 ||
        p2pstore_register(store, "a/b", &range, 1, 64 << 20, NULL, 5000) < 0 ||
        p2pstore_unregister(store, "a/b", 5000) < 0 || p2pstore_close(store) < 0)
        return printf("%s\\n", p2pstore_error()), 1;
    puts(p2pstore_version());
    return 0;
}
"""

PROJECT = """
cmake_minimum_required(VERSION 3.25)
project(user C)
find_package(p2pstore 0.1 REQUIRED)
add_executable(shared user.c)
target_link_libraries(shared p2pstore::p2pstore)
add_executable(static user.c)
target_link_libraries(static p2pstore::static)
"""


def run(*command, **more):
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **more
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What an installation puts into a prefix."""
    prefix = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", BUILD, "--prefix", prefix)
    yield prefix
    shutil.rmtree(prefix)


@pytest.fixture
def user(installed, tmp_path):
    """A directory with a program in it, and the environment in which it finds the library."""
    (tmp_path / "user.c").write_text(PROGRAM)
    (tmp_path / "user.cc").write_text(PROGRAM)
    (tmp_path / "meta").mkdir()
    config = next(installed.rglob("p2pstore.pc"))
    text = config.read_text().replace("/usr/local", str(installed))
    config.write_text(text)
    return tmp_path, {
        **os.environ,
        "PKG_CONFIG_PATH": str(config.parent),
        "LD_LIBRARY_PATH": str(next(installed.rglob("libp2pstore.so")).parent),
    }


def flags(environment, *arguments):
    return run("pkg-config", *arguments, "p2pstore", env=environment).split()


@pytest.mark.parametrize("compiler", ["cc", "c++"])
def test_a_program_links_with_pkg_config(user, compiler):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    here, environment = user
    source = here / ("user.c" if compiler == "cc" else "user.cc")
    words = flags(environment, "--cflags", "--libs")
    run(compiler, "-Wall", "-Wextra", "-Werror", "-pedantic", source, "-o", here / "user", *words,
        env=environment)  # fmt: skip
    assert run(here / "user", f"local://{here}/meta", env=environment) == "0.1.0\n"


def test_the_program_in_the_readme_works(user):
    here, environment = user
    readme = (env.SOURCE / "README.md").read_text()
    (here / "share.c").write_text(re.search(r"```c\n(.*?)```", readme, re.DOTALL)[1])
    words = flags(environment, "--cflags", "--libs")
    run("cc", "-Wall", "-Wextra", "-Werror", here / "share.c", "-o", here / "share", *words)
    assert run(here / "share", f"local://{here}/meta", env=environment) == "trained\n"


def test_a_program_links_with_cmake_and_statically(user, installed):
    here, environment = user
    (here / "CMakeLists.txt").write_text(PROJECT)
    run("cmake", "-G", "Ninja", "-S", here, "-B", here / "build", f"-DCMAKE_PREFIX_PATH={installed}")
    run("cmake", "--build", here / "build")
    for name in ("shared", "static"):
        assert run(here / "build" / name, f"local://{here}/meta", env=environment) == "0.1.0\n"
    assert "libp2pstore" in run("ldd", here / "build/shared", env=environment)
    assert "libp2pstore" not in run("ldd", here / "build/static", env=environment)


def test_the_libraries_export_the_map_and_nothing_else(installed):
    wanted = set(re.findall(r"^    (p2pstore_\w+);", (env.SOURCE / "engine/p2pstore.map").read_text(),
                            re.MULTILINE))  # fmt: skip
    shared = next(installed.rglob("libp2pstore.so"))
    names = run("nm", "-D", "--defined-only", "--with-symbol-versions", shared)
    exported = {line.split()[-1] for line in names.splitlines()} - {"P2PSTORE_0@@P2PSTORE_0"}
    exported -= {"P2PSTORE_0"}
    assert exported == {f"{name}@@P2PSTORE_0" for name in wanted}
    names = run("nm", "-g", "--defined-only", next(installed.rglob("libp2pstore.a")))
    assert set(re.findall(r" T (\w+)", names)) == wanted
    assert not re.search(r" [BDR] ", names)
    assert "libp2pstore.so.0" in run("readelf", "-d", shared)


# -- The program of the documents


def example(cmd, url, *more, **options):
    """p2p-store-example with the flags of the documents."""
    return subprocess.Popen(
        [
            EXAMPLE, f"--cmd={cmd}", f"--metadata_server={url}",
            f"--local_server_name=127.0.0.1:{free_port()}", "--device_name=erdma_0",
            "--file_size_mb=24", *more,
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "MC_GID_INDEX": "3"}, preexec_fn=env.die_with_parent, **options,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["etcd", "redis", "http", "local"])
def test_the_steps_of_the_documents_work(tmp_path, kind):
    service = None
    if kind == "local":
        (tmp_path / "meta").mkdir()
        url = f"local://{tmp_path}/meta"
    else:
        service = {"etcd": Etcd, "redis": Redis, "http": Http}[kind](tmp_path / kind)
        service.start()
        url = f"127.0.0.1:{service.port}" if kind == "etcd" else service.url()
    try:
        trainer = example("trainer", url)
        pullers = [example("inferencer", url) for _ in range(3)]
        for puller in pullers:
            said, _ = puller.communicate(timeout=60)
            assert puller.returncode == 0, said
            assert "every byte is right" in said and said.endswith("ALL DONE\n")
        trainer.send_signal(signal.SIGINT)
        said, _ = trainer.communicate(timeout=30)
        assert trainer.returncode == 0 and said.endswith("ALL DONE\n"), said
    finally:
        if service:
            service.kill()


# The steps that users of Mooncake's P2P Store know, to the letter, on three hosts of one network namespace.
LETTER = """
set -e
ip link set lo up
for i in 1 2 3; do ip address add 10.0.0.$i/32 dev lo; done
# This is 10.0.0.1
etcd --listen-client-urls http://0.0.0.0:2379 --advertise-client-urls http://10.0.0.1:2379 2>etcd.log &
until (exec 3<>/dev/tcp/10.0.0.1/2379) 2>/dev/null; do sleep 0.05; done
# This is 10.0.0.2
export MC_GID_INDEX=1
./p2p-store-example --cmd=trainer \\
                    --metadata_server=10.0.0.1:2379 \\
                    --local_server_name=10.0.0.2:12345 \\
                    --device_name=erdma_0 &
# This is 10.0.0.3
export MC_GID_INDEX=1
./p2p-store-example --cmd=inferencer \\
                    --metadata_server=10.0.0.1:2379 \\
                    --local_server_name=10.0.0.3:12346 \\
                    --device_name=erdma_1
kill %2
wait %2
kill %1
"""


def test_the_documents_commands_work_to_the_letter(tmp_path):
    for tool in ("etcd", "unshare", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} (scripts/bootstrap --test)")
    if os.geteuid() != 0:
        pytest.skip("not root: no network namespace of its own")
    (tmp_path / "p2p-store-example").symlink_to(EXAMPLE)
    said = run("unshare", "--net", "--pid", "--fork", "--kill-child", "bash", "-c", LETTER, cwd=tmp_path,
               timeout=60)  # fmt: skip
    assert said.count("every byte is right") == 1 and said.count("ALL DONE") == 2, said


def test_the_example_says_what_is_wrong(tmp_path):
    wrong = [
        (["--cmd=trainer", "--metadata_server=127.0.0.1:1"], 1, "127.0.0.1:1"),
        (["--cmd=dance", "--metadata_server=127.0.0.1:1"], 2, "usage"),
        (["--cmd=trainer"], 2, "usage"),
        (["--cmd=trainer", f"--metadata_server=local://{tmp_path}", "--protocol=rdma"], 1, "RDMA"),
    ]
    for words, code, says in wrong:
        done = subprocess.run([EXAMPLE, *words], capture_output=True, text=True, check=False)
        assert done.returncode == code and says in done.stderr, done


# -- Library and mounts in one cluster


def test_what_a_program_registers_is_a_file_on_every_mount(two):
    a, b = two
    trainer = example("trainer", a.meta, "--name=models/llama/weights")
    try:
        path = a.path("models/llama/weights")
        eventually(lambda: path.exists() and b.path("models/llama/weights").exists())
        assert path.stat().st_size == 24 << 20
        bytes_a = path.read_bytes()
        assert bytes_a == b.path("models/llama/weights").read_bytes()
        puller = example("inferencer", a.meta, "--name=models/llama/weights")
        assert puller.communicate(timeout=60)[0].endswith("ALL DONE\n")
        os.symlink("llama", a.path("models/latest"))
        eventually(lambda: b.path("models/latest/weights").exists())
        assert b.path("models/latest/weights").read_bytes() == bytes_a
    finally:
        trainer.send_signal(signal.SIGTERM)
        assert trainer.communicate(timeout=30)[0].endswith("ALL DONE\n")
    eventually(lambda: not path.exists())


# -- Python


@pytest.fixture
def p2pstore(monkeypatch):
    """The module, with the library of this build."""
    monkeypatch.setenv("P2PSTORE_LIBRARY", str(BUILD / "lib/libp2pstore.so"))
    monkeypatch.syspath_prepend(str(env.SOURCE / "scripts/python"))
    import p2pstore as module  # pylint: disable=import-outside-toplevel,import-error

    return module


@pytest.fixture
def stores(p2pstore, tmp_path):
    """Two stores of one cluster."""
    (tmp_path / "meta").mkdir()
    url = f"local://{tmp_path}/meta"
    with p2pstore.Store(url, "a", listen="127.0.0.1:0", read_timeout=5) as a:
        with p2pstore.Store(url, "b", listen="127.0.0.1:0", read_timeout=5) as b:
            yield a, b


def known(store, name):
    """Waits until the store has heard of the name, and of somebody who has it."""
    return eventually(lambda: next((e for e in store.list(name) if e.name == name and e.holders), None))


def test_numpy_arrays_are_pulled_in_place(stores):
    numpy = pytest.importorskip("numpy")
    a, b = stores
    source = [numpy.arange(300007, dtype="int64"), numpy.ones((3, 5), dtype="float32")]
    source[0].flags.writeable = False
    target = [numpy.zeros_like(array) for array in source]
    a.register("arrays", source, max_shard_size=1 << 20)
    entry = known(b, "arrays")
    assert entry.sizes == [array.nbytes for array in source] and entry.origin == "a"
    assert entry.state == "available" and entry.holders == 1 and b.count("arr") == 1
    b.get_replica("arrays", target)
    assert all((x == y).all() for x, y in zip(source, target))
    assert known(b, "arrays").state == "replica"
    b.delete_replica("arrays")
    a.unregister("arrays")
    with pytest.raises(ValueError):
        b.get_replica("arrays", source)  # read-only
    with pytest.raises(ValueError):
        a.register("arrays", numpy.zeros((4, 4)).T)


def test_torch_tensors_are_pulled_in_place(stores, p2pstore):
    torch = pytest.importorskip("torch")
    a, b = stores
    source = torch.nn.Linear(400, 300).state_dict()
    source["half"] = torch.randn(1000).to(torch.bfloat16)
    source["empty"] = torch.zeros(0)
    target = {key: torch.zeros_like(tensor) for key, tensor in source.items()}
    places = {key: tensor.data_ptr() for key, tensor in target.items()}
    p2pstore.register_state_dict(a, "step-1", source)
    known(b, "step-1/index.json")
    p2pstore.load_state_dict(b, "step-1", target)
    assert all(torch.equal(source[key], target[key]) for key in source)
    assert places == {key: tensor.data_ptr() for key, tensor in target.items()}
    with pytest.raises(ValueError, match="4 tensors differ"):
        p2pstore.load_state_dict(b, "step-1", {"weight": torch.zeros(3)})
    with pytest.raises(ValueError, match="contiguous"):
        a.register("x", torch.zeros(4, 4).t())


def test_errors_carry_an_errno_and_a_sentence(stores, p2pstore):
    a, b = stores
    with pytest.raises(p2pstore.Error, match="no such name") as failed:
        b.get_replica("nothing", bytearray(5))
    assert failed.value.errno == 2
    a.register("bytes", bytearray(b"hello"))
    known(b, "bytes")
    for wrong, number in ((bytearray(4), 90), (bytearray(6), 90)):
        with pytest.raises(p2pstore.Error) as failed:
            b.get_replica("bytes", wrong)
        assert failed.value.errno == number
        wrong.append(1)  # let go of: it can be resized again
    with pytest.raises(p2pstore.Error) as failed:
        a.register("bytes", bytearray(5))
    assert failed.value.errno == 17
    with pytest.raises(p2pstore.Error, match="colour"):
        p2pstore.Store("local:///tmp", "c", colour="red")
    target = bytearray(5)
    b.get_replica("bytes", target)
    assert target == b"hello"
    with pytest.raises(BufferError):
        target.append(1)  # others may read it
    b.delete_replica("bytes")
    target.append(1)
    a.close()
    with pytest.raises(ValueError, match="closed"):
        a.list()


def test_a_fork_is_told_to_open_its_own(stores, p2pstore):
    a, _ = stores
    child = os.fork()
    if child == 0:
        try:
            a.list()
        except p2pstore.Error as error:
            os._exit(0 if "forked" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def test_requests_show_progress_and_can_be_cancelled(stores, p2pstore):
    a, b = stores
    source = bytearray(64 << 20)
    a.register("zeros", source, max_shard_size=65536)
    known(b, "zeros")
    target = bytearray(64 << 20)
    request = b.get_replica_start("zeros", target)
    if request.cancel():
        with pytest.raises(p2pstore.Error):
            request.wait()
        target.append(0)
        target = bytearray(64 << 20)
        request = b.get_replica_start("zeros", target)
    request.wait(60)
    assert request.done() and request.progress() == (64 << 20, 64 << 20)


def test_what_cp_registered_is_pulled_by_a_program(node, p2pstore, tmp_path):
    data = pattern(3 << 20, 5)
    (tmp_path / "file").write_bytes(data)
    shutil.copy(tmp_path / "file", node.path("file"))
    target = bytearray(len(data))
    with p2pstore.Store(node.meta, "program", listen="127.0.0.1:0") as store:
        entry = known(store, "file")
        assert entry.sizes == [len(data)]
        store.get_replica("file", target)
        assert target == data
        with pytest.raises(p2pstore.Error, match="pulled, not registered"):
            store.unregister("file")
        eventually(lambda: node.xattr("file", "replicas") == "2")


def test_a_state_dict_goes_to_four_inferencers(p2pstore):
    pytest.importorskip("torch")
    del p2pstore
    program = env.SOURCE / "scripts/python/p2pstore-state-dict"
    said = run(sys.executable, program, "--megabytes", "8")
    assert said.count("all right") == 4 and said.endswith("ALL DONE\n")


def test_the_module_is_installed(installed):
    assert next(installed.rglob("p2pstore.py")).parent.name == "dist-packages"
    assert os.access(Path(installed) / "bin/p2pstore-state-dict", os.X_OK)
