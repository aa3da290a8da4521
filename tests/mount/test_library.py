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
from harness.services import Etcd, Redis
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


def test_a_program_links_with_cmake_and_statically(user, installed):
    here, environment = user
    (here / "CMakeLists.txt").write_text(PROJECT)
    run("cmake", "-S", here, "-B", here / "build", f"-DCMAKE_PREFIX_PATH={installed}")
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


@pytest.mark.parametrize("kind", ["etcd", "redis", "local"])
def test_the_steps_of_the_documents_work(tmp_path, kind):
    service = None
    if kind == "local":
        (tmp_path / "meta").mkdir()
        url = f"local://{tmp_path}/meta"
    else:
        service = {"etcd": Etcd, "redis": Redis}[kind](tmp_path / kind)
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
        eventually(path.exists, 20)
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
