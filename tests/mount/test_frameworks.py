# ctest: timeout=400
# ctest: label=plain
"""Frameworks save checkpoints into a mount and load them from others, cold and complete, by reading and by mapping."""

import subprocess
import sys

import pytest

from harness import frameworks
from harness.data import pattern
from harness.env import die_with_parent
from harness.frameworks import GGUF, Frameworks
from harness.wait import eventually

MIB = 1 << 20

# One process does all of a story: importing torch takes longer than loading. Its arguments are three mounts.
STORY = """
import os, sys, time, torch
a, b, c = sys.argv[1:]

def tensors():
    made = {}
    for i, count in enumerate((3_000_017, 1, 1 << 20, 777_777)):
        made[f"layer.{i}"] = torch.arange(count, dtype=torch.float32) * (i + 0.5)
    made["half"] = torch.arange(123_457).to(torch.bfloat16)
    made["square"] = torch.arange(1 << 20, dtype=torch.int64).reshape(1024, 1024)
    return made

def compare(loaded):
    wanted = tensors()
    assert set(loaded) == set(wanted), set(loaded) ^ set(wanted)
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)

def until(holds, what):
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.01)

def state(path):
    return os.getxattr(path, "user.p2pfs.state")

def everywhere(name, load):
    # Cold where nothing is of it, again when it is complete there, and where it was saved.
    path = f"{b}/{name}"
    until(lambda: os.path.exists(path) and state(path) == b"remote", f"{path} is seen, and who has it")
    load(path)
    until(lambda: state(path) == b"complete", f"{path} is complete")
    load(path)
    load(f"{a}/{name}")
"""
TORCH = STORY + """
torch.save(tensors(), a + "/step-1.pt")
everywhere("step-1.pt", lambda path: compare(torch.load(path)))
"""
NEWER = TORCH + """
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

torch.save(tensors(), a + "/step-2.pt")
everywhere("step-2.pt", lambda path: compare(torch.load(path, mmap=True)))

def peek(path):
    wanted = tensors()
    with safe_open(path, framework="pt", device="cpu") as file:
        assert set(file.keys()) == set(wanted)
        part = (slice(100, 200), slice(512, None))
        assert torch.equal(file.get_slice("square")[part], wanted["square"][part])
        assert torch.equal(file.get_tensor("half"), wanted["half"])

save_file(tensors(), a + "/model.safetensors")
everywhere("model.safetensors", lambda path: compare(load_file(path)))
peek(c + "/model.safetensors")
compare(load(open(c + "/model.safetensors", "rb").read()))
"""
TRANSFORMERS = STORY + """
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
torch.manual_seed(7)
model = LlamaForCausalLM(LlamaConfig(
    hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4, vocab_size=4096))
told = torch.arange(16).reshape(1, 16)
right = model.eval()(told).logits
model.save_pretrained(a + "/tiny")
def load(path):
    loaded = AutoModelForCausalLM.from_pretrained(os.path.dirname(path))
    assert torch.equal(loaded(told).logits, right)
everywhere("tiny/model.safetensors", load)
"""


@pytest.fixture
def three(cluster):
    return cluster.nodes(3)


@pytest.fixture
def machine(cluster):
    """The machine's own python3."""
    return Frameworks(cluster.home, newer=False)


@pytest.fixture
def newer(cluster):
    """Those of a newer Debian."""
    if (reason := frameworks.why_none()) is not None:
        pytest.skip(reason)
    return Frameworks(cluster.home, newer=True)


def seen(node, name):
    eventually(node.path(name).exists, what=f"{name} on {node.name}")
    return node.path(name)


def told(runner, nodes, story):
    runner.python(story, *(node.dir for node in nodes))
    for node in nodes[1:]:  # one transfer of each file, however often it was loaded
        resident = sum(
            path.stat().st_size
            for path in node.dir.rglob("*")
            if path.is_file() and node.xattr(path.relative_to(node.dir), "resident") != "0"
        )
        assert node.status()["bytes_received"] <= resident


def test_the_machines_torch_saves_and_loads(three, machine):
    pytest.importorskip("torch")
    told(machine, three, TORCH)


def test_torch_and_safetensors_save_and_load_in_every_way(three, newer):
    told(newer, three, NEWER)


def test_transformers_save_and_load_a_model(three, newer):
    told(newer, three, TRANSFORMERS)


def test_numpy_maps_what_others_saved(three, machine):
    pytest.importorskip("numpy")
    save = """
import sys, numpy
numpy.save(sys.argv[1], numpy.arange(4_000_001, dtype="uint32").reshape(-1, 1))
"""
    load = """
import sys, numpy
mapped = numpy.load(sys.argv[1], mmap_mode="r")
assert isinstance(mapped, numpy.memmap) and mapped[-1, 0] == 4_000_000
assert (mapped[:, 0] == numpy.arange(4_000_001, dtype="uint32")).all()
private = numpy.load(sys.argv[1], mmap_mode="c")
private[17] = 5
assert private[17, 0] == 5 and mapped[17, 0] == 17
"""
    a, b, _ = three
    machine.python(save, a.path("array.npy"))
    machine.python(load, seen(b, "array.npy"))  # cold
    b.cli("wait", "array.npy")
    machine.python(load, b.path("array.npy"))


RANK = """
import mmap, sys
path = sys.argv[1]
with open(path, "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
print(sum(memoryview(mapped)[::4096]), flush=True)
sys.stdin.readline()
with open("/proc/self/smaps") as maps:
    ours = False
    for line in maps:
        words = line.split()
        if not words[0].endswith(":"):
            ours = path in line
        elif ours and words[0] == "Pss:":
            print(words[1], flush=True)
sys.stdin.readline()
"""


def ranks_load(path, count):
    """What each of `count` processes sums up, and the memory that their mappings take together, in bytes."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            preexec_fn=die_with_parent,
        )
        for _ in range(count)
    ]  # fmt: skip
    try:
        sums = [int(rank.stdout.readline()) for rank in ranks]
        for rank in ranks:
            rank.stdin.write("\n")
        kib = [int(rank.stdout.readline()) for rank in ranks]
    finally:
        for rank in ranks:
            rank.communicate("\n", timeout=30)
    return sums, sum(kib) * 1024


def test_eight_ranks_load_one_file_with_one_transfer_and_one_copy(two):
    a, b = two
    data = pattern(32 * MIB, 3)
    a.path("model").write_bytes(data)
    path = seen(b, "model")
    right = 8 * [sum(data[::4096])]
    assert ranks_load(path, 8)[0] == right  # cold, all at once
    b.cli("wait", "model")
    sums, taken = ranks_load(path, 8)
    assert sums == right
    assert taken <= 1.02 * len(data)
    assert b.status()["bytes_received"] == len(data)


def test_llama_cpp_loads_a_model_in_every_mode(three, newer):
    a, b, c = three
    runs = iter(range(100))

    def generates(model, mode):
        """It does not flush what it says at its end, so only that it loaded and generated shows."""
        newer.run("llama-completion", "-m", model, "--load-mode", mode, "-p", "one two", "-n", 2, "-t", 1,
                  "--temp", 0, "-no-cnv", "--no-warmup")  # fmt: skip

    def requantized(model):
        """Every weight, mapped."""
        out = newer.home / f"out{next(runs)}.gguf"
        newer.run("llama-quantize", "--allow-requantize", model, out, "f16", 1)
        return out.read_bytes()

    model = newer.home / "tiny.gguf"
    newer.python(GGUF, model, 256, 2)
    right = requantized(model)
    a.path("tiny.gguf").write_bytes(model.read_bytes())
    assert requantized(seen(b, "tiny.gguf")) == right  # cold
    generates(seen(c, "tiny.gguf"), "none")
    b.cli("wait", "tiny.gguf")
    assert requantized(b.path("tiny.gguf")) == right
    for mode in ("mmap", "none", "dio"):
        generates(b.path("tiny.gguf"), mode)
