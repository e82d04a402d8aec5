"""Conversions in bounded memory: a model of 1.1 GB in and out, and onto a mesh of two processes, each in its own Python.

Peaks are of resident memory beyond what the interpreter and its imports hold, read from /proc.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from network import free_address

from g4v_jax.weights.tensors import Writer

ROOT = Path(__file__).parent.parent
MIB = 2**20
DIM, MLP, LAYERS, VOCAB = 2048, 8192, 4, 1024
LARGEST = 4 * DIM * MLP  # bytes of one tensor
PEAK = """
import re, sys
def now(field):
    with open("/proc/self/status") as status:
        return int(re.search(field + r":\\s+(\\d+) kB", status.read())[1]) * 1024
def reset():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
"""
CONVERT = (
    PEAK
    + """
import jax, numpy
jax.numpy.zeros(1).block_until_ready()
from g4v_jax import cli
from g4v_jax.commands import weights
from g4v_jax import build
from g4v_jax.train import saved
from g4v_jax.weights import adapter, convert, folder, leaves, parity, tables
from g4v_jax.weights.families import families
families()
reset()
base = now("VmRSS")
cli.run(sys.argv[1:])
print("PEAK", now("VmHWM") - base)
"""
)
LOAD = (
    PEAK
    + """
import jax
from pathlib import Path
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]), local_device_ids=[0])
from g4v_jax import sharding
from g4v_jax.weights.folder import TowerFolder
tower, mesh = TowerFolder(Path(sys.argv[1])), sharding.make_mesh({"fsdp": 2})
shapes = tower.shapes(mesh)
reset()
base = now("VmRSS")
params = tower.load(shapes)
peak = now("VmHWM") - base
held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
assert all(leaf.is_fully_addressable is False for leaf in jax.tree.leaves(params))
print("PEAK", peak, held, whole)
"""
)
RUN = """
import sys
sys.path.insert(0, "tests")
import jax, numpy, tiny
from pathlib import Path
from g4v_jax import config as configs
from g4v_jax.train.checkpoint import Checkpoints
from g4v_jax.train.state import TrainState
from g4v_jax.weights.folder import TowerFolder
tower, out = TowerFolder(Path(sys.argv[1])), Path(sys.argv[2])
config = tiny.config(tokenizer__vocab_size=tower.module.vocab_size)
config.model.llm = {k: v for k, v in tower.about["fields"].items() if k != "vocab_size" and v is not None}
configs.save(config, out)
with Checkpoints(out, every_steps=1, keep=1) as checkpoints:
    checkpoints.save_frozen({"llm": tower.load_whole()}, {"llm": str(tower.path)})
    state = TrainState(numpy.ones((), numpy.int32), {"queries": numpy.ones((2, 2048))}, (), {})
    checkpoints.save(1, state, {}, {}, force=True)
(out / "tokenizer.json").write_text("{}")
"""


def python(script: str, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def peak(process: subprocess.Popen) -> list[int]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    return [int(number) for number in out[out.index("PEAK") + 4 :].split()]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A LLaMA of 1.1 GB in float32 and five shards, written a tensor at a time."""
    folder = tmp_path_factory.mktemp("published")
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=DIM, intermediate_size=MLP)
    config |= dict(num_hidden_layers=LAYERS, num_attention_heads=16, vocab_size=VOCAB, tie_word_embeddings=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards = [{"model.embed_tokens.weight": (VOCAB, DIM), "model.norm.weight": (DIM,)}]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        shard = {f"{at}self_attn.{name}_proj.weight": (DIM, DIM) for name in "qkvo"}
        shard |= {f"{at}mlp.{name}_proj.weight": (MLP, DIM) for name in ("gate", "up")}
        shard |= {f"{at}mlp.down_proj.weight": (DIM, MLP)}
        shards.append(shard | {f"{at}{name}_layernorm.weight": (DIM,) for name in ("input", "post_attention")})
    draw = np.random.default_rng(0)
    for number, shard in enumerate(shards):
        with Writer(folder / f"model-{number}.safetensors", {n: (np.float32, s) for n, s in shard.items()}) as writer:
            for name, shape in shard.items():
                writer.write(name, draw.standard_normal(shape, np.float32))
    return folder


def test_import_export_and_loading(published, tmp_path):
    sizes = [path.stat().st_size for path in published.glob("*.safetensors")]
    assert sum(sizes) > 1e9
    allowed = 1.3 * max(sizes) + LARGEST
    made = peak(python(CONVERT, "import", published, f"--out={tmp_path / 'tower'}", "--compare=no"))[0]
    assert made <= allowed, f"import: {made / MIB:.0f} MiB, allowed {allowed / MIB:.0f}"
    written = peak(
        python(CONVERT, "export", tmp_path / "tower", f"--out={tmp_path / 'out'}", "--shard_gb=0.3", "--compare=no")
    )[0]
    assert written <= allowed, f"export: {written / MIB:.0f} MiB, allowed {allowed / MIB:.0f}"
    done = python(RUN, tmp_path / "tower", tmp_path / "run")
    assert done.wait() == 0, done.stderr.read()[-2000:]
    flags = ("--tower=llm", f"--out={tmp_path / 'of_run'}", "--shard_gb=0.3", "--compare=no")
    of_run = peak(python(CONVERT, "export", tmp_path / "run", *flags))[0]
    assert of_run <= allowed, f"export of a run: {of_run / MIB:.0f} MiB, allowed {allowed / MIB:.0f}"
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "of_run/llm" / file.name).read_bytes()
    figures = {"import": made, "export": written, "of a run": of_run, "allowed": allowed}
    print(", ".join(f"{name} {value / MIB:.0f} MiB" for name, value in figures.items()))

    address = free_address()
    both = [python(LOAD, tmp_path / "tower", address, number) for number in range(2)]
    for most, held, whole in map(peak, both):
        assert held < 0.6 * whole
        assert most <= 1.3 * held + LARGEST, f"loading: {most / MIB:.0f} MiB for {held / MIB:.0f} held"
        print(f"loading: {most / MIB:.0f} MiB at most for {held / MIB:.0f} of {whole / MIB:.0f} MiB")
