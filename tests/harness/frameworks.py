"""Frameworks that load models, as programs of their own: this machine's python3, and a newer Debian's in a folder
(scripts/bootstrap --frameworks), which run on this kernel and see the same mounts."""

import os
import subprocess
import sys
from pathlib import Path

from harness.env import SLOWNESS

ROOT = Path(os.environ.get("P2PFS_FRAMEWORKS", "/usr/local/lib/p2pfs-frameworks"))
LIB = "/usr/lib/x86_64-linux-gnu"

# The folder was unpacked and never installed: its alternatives are chosen by path. What is mounted
# into it is so in a namespace of the command's own.
ENTER = """
set -e
mount --rbind /proc "$0/proc"
mount --rbind /dev "$0/dev"
mount -t tmpfs none "$0/tmp"
mkdir -p "$0$1"
mount --rbind "$1" "$0$1"
shift
exec chroot "$0" "$@"
"""


# Writes a model of llama.cpp with weights by chance and a vocabulary of bytes: FILE WIDTH LAYERS
GGUF = """
import sys, numpy
from gguf import GGUFWriter, TokenType
rows, heads = 259, 4
width, layers = map(int, sys.argv[2:])
chance = numpy.random.default_rng(7)
out = GGUFWriter(sys.argv[1], "llama")
out.add_context_length(64)
out.add_embedding_length(width)
out.add_block_count(layers)
out.add_feed_forward_length(2 * width)
out.add_head_count(heads)
out.add_head_count_kv(heads)
out.add_layer_norm_rms_eps(1e-5)
out.add_rope_dimension_count(width // heads)
out.add_vocab_size(rows)
out.add_tokenizer_model("llama")
out.add_token_list(["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)])
out.add_token_scores([0.0] * rows)
out.add_token_types([TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256)
out.add_bos_token_id(1)
out.add_eos_token_id(2)
def tensor(name, *shape):
    out.add_tensor(name, chance.standard_normal(shape, dtype="float32") / 8)
tensor("token_embd.weight", rows, width)
tensor("output_norm.weight", width)
tensor("output.weight", rows, width)
for i in range(layers):
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        tensor(f"blk.{i}.{name}.weight", width, width)
    for name in ("ffn_gate", "ffn_up"):
        tensor(f"blk.{i}.{name}.weight", 2 * width, width)
    tensor(f"blk.{i}.ffn_down.weight", width, 2 * width)
    tensor(f"blk.{i}.attn_norm.weight", width)
    tensor(f"blk.{i}.ffn_norm.weight", width)
out.write_header_to_file()
out.write_kv_data_to_file()
out.write_tensors_to_file()
out.close()
"""


def why_none():
    """The reason why the newer frameworks cannot run here, or None."""
    if not (ROOT / "version").exists():
        return f"nothing in {ROOT} (scripts/bootstrap --frameworks)"
    return None


class Frameworks:
    """Runs programs that see `home` and what is mounted below it under the same path."""

    def __init__(self, home, newer):
        self.home = home
        self.newer = newer

    def command(self, *words):
        """For a program of the newer Debian."""
        return ["unshare", "--mount", "sh", "-c", ENTER, str(ROOT), str(self.home), *map(str, words)]

    def environment(self):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if self.newer:
            env.pop("PYTHONDONTWRITEBYTECODE", None)  # nobody has compiled what lies there
            env["LD_LIBRARY_PATH"] = f"{LIB}/blas:{LIB}/lapack"
        return env

    def run(self, *words, timeout=150):
        """What it said; fails when it did."""
        done = subprocess.run(
            self.command(*words) if self.newer else list(map(str, words)),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", env=self.environment(), timeout=timeout * SLOWNESS, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{words[:3]} ended with {done.returncode}\n{done.stdout}"
        return done.stdout

    def interpreter(self):
        return "/usr/bin/python3" if self.newer else sys.executable

    def python(self, script, *arguments):
        return self.run(self.interpreter(), "-c", script, *arguments)
