"""A whole model of a few thousand weights, random packed batches for it, and states of it on any mesh.

Every weight is random, those too that training starts at zero: a silent map would hide what stands behind it.
"""

import zlib
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from g4v_jax import trees
from g4v_jax.build import Build
from g4v_jax.data.pack import FEATURES, Example, RowShape, example, pair, to_batch
from g4v_jax.data.text import Render, Tokenizer, Turn, dialogue
from g4v_jax.sharding import put_batch
from g4v_jax.train.state import TrainState
from g4v_jax.train.step import StepSpec, make_step
from g4v_jax.types import Batch

TASKS = ("caption", "generate", "safety")
TERMS = {  # of the joint objective -> the task it comes from
    "caption": "caption",
    "generation": "generate",
    "refusal": "safety",
    "hazard": "safety",
    "blocked": "safety",
    "preference": "safety",
    "keep": "caption",
}
WORDS = ("red", "hi", "a dot", "go up", "no", "blue")
DANGERS = ("gun", "bomb", "fire")
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
KINDS = {
    "caption": ("watch", "compare", "chat"),
    "generate": ("render", "render"),
    "safety": ("refuse_clip", "refuse_request", "blocked", "harmless", "prefer"),
}


def jit(function, **options):
    """`jax.jit` that compiles several times faster, to slower code: programs of tests run only a few times."""
    return jax.jit(function, compiler_options=QUICK, **options)


def normal(*shape, seed=0) -> np.ndarray:
    """The same normal numbers, float32, for the same shape and seed."""
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def config(**changes) -> ConfigDict:
    """A config that `Build` reads; every size that a mesh axis splits divides by 8.

    `changes`: fields by path, with two underscores for a dot: rows__tokens=64.
    """
    config = ConfigDict(
        {
            "tokenizer": {"vocab_size": 264},
            "model": {
                "vision": {
                    "image_size": 16,
                    "patch_size": 8,
                    "dim": 32,
                    "mlp_dim": 32,
                    "num_layers": 1,
                    "num_heads": 8,
                },
                "summarizer": {"dim": 32, "mlp_dim": 32, "num_layers": 1, "num_heads": 8, "num_queries": 2},
                "llm": {
                    "dim": 32,
                    "mlp_dim": 32,
                    "num_layers": 2,
                    "num_heads": 16,
                    "num_kv_heads": 8,
                    "head_dim": 4,
                    "lora": ("q", "v"),
                    "lora_rank": 2,
                },
                "conditioner": {"dim": 16},
                "caption_window": 12,  # reaches over the start of most examples
                "autoencoder": {"latent_channels": 8, "patch": 4, "dim": 16},
                "denoiser": {"dim": 48, "mlp_dim": 32, "num_layers": 1, "num_heads": 8},
            },
            "rows": {
                "rows": 8,
                "tokens": 48,
                "clips": 2,
                "targets": 2,
                "hazards": 4,
                "preferences": 2,
                "query_tokens": 2,
                "clip_frames": 2,
                "target_frames": 5,
                "target_size": 16,
            },
            "data": {"records": "unused", "mixture": {"caption": 1.0}},
            "trainable": ("(?!autoencoder/).*",),
            "ema": ("denoiser/.*", "queries"),
            "optimizer": {"learning_rate": 0.01, "warmup_steps": 5, "schedule": "constant"},
            "step": {"ema_decay": 0.9},
            "losses": {"drop_rate": 0.3, "keep": 0.1},
            "train": {"steps": 100},
        }
    )
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in changes.items()})
    return config


@cache
def build(devices: int = 1, **mesh: int) -> Build:
    """The parts of `config()` on the first `devices` devices; `mesh`: sizes of its axes."""
    changed = config()
    changed.mesh = mesh or {"fsdp": -1}
    return Build(changed, tuple(jax.devices()[:devices]))


@cache
def tokenizer() -> Tokenizer:
    """Bytes and special tokens only: as many ids as `config()` says."""
    return Tokenizer.train(WORDS, 264)


@cache
def params(seed: int = 0) -> dict:
    """Numpy weights of every tower, none of them silent; each leaf's from its path, whatever else the model has."""

    def leaf(path, shape):
        value = np.random.default_rng([seed, zlib.crc32(path.encode())]).normal(size=shape).astype(np.float32)
        name = path.split("/")[-1]
        if name == "scale":
            return 1 + 0.2 * value
        if name == "latent_square":
            return 1 + np.abs(value)
        fan_in = np.prod(shape[:-1]) if name == "kernel" else 16
        return value * np.float32(fan_in**-0.5)

    shapes = trees.flatten(build().blueprint.shapes)
    return trees.unflatten({path: leaf(path, shape.shape) for path, shape in shapes.items()})


def state(build: Build, optimizer: optax.GradientTransformation) -> tuple[TrainState, dict]:
    """(training state, frozen tree) of `params()` on the mesh of `build`."""
    trainable, frozen = trees.split(params(), build.blueprint.trainable)
    ema, _ = trees.split(trainable, build.blueprint.ema)
    whole = TrainState(np.zeros((), np.int32), trainable, optimizer.init(trainable), ema)

    def put(tree, shapes):
        return jax.tree.map(lambda x, s: jax.device_put(jnp.array(x), s.sharding), tree, shapes)

    return put(whole, build.blueprint.state_shapes(optimizer)), put(frozen, build.blueprint.frozen_shapes)


def step(build: Build, optimizer: optax.GradientTransformation, spec: StepSpec = StepSpec()):
    """The jitted train step, as `g4v train` jits it; to be called under the mesh of `build`."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, build.blueprint.state_shapes(optimizer))
    made = make_step(build.objective, optimizer, spec, seed=0)
    return jit(made, donate_argnums=0, out_shardings=(shardings, None))


def keep_gradients() -> optax.GradientTransformation:
    """An optimizer that changes nothing and whose state is the gradient."""
    return optax.GradientTransformation(
        init=lambda params: jax.tree.map(jnp.zeros_like, params),
        update=lambda gradients, state, params: (jax.tree.map(jnp.zeros_like, gradients), gradients),
    )


def assert_close(actual: dict, expected: dict, tolerance: float = 1e-6) -> None:
    """Equal trees: every leaf to `tolerance` of the largest value of its tower.

    Not of its own: some gradients are sums that vanish (a key's bias moves no softmax) and leave rounding alone.
    """
    actual, expected = trees.flatten(jax.device_get(actual)), trees.flatten(jax.device_get(expected))
    assert actual.keys() == expected.keys()
    largest = {}
    for path, leaf in expected.items():
        tower = path.split("/")[0]
        largest[tower] = max(largest.get(tower, 0.0), np.abs(leaf).max())
    for path, leaf in actual.items():
        allowed = tolerance * largest[path.split("/")[0]]
        np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=allowed, err_msg=path)


def video(rng: np.random.Generator, frames: int, height: int, width: int) -> np.ndarray:
    """Random u8 [frames height width 3]."""
    return rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def turns(kind: str, rng: np.random.Generator, shape: RowShape, label: bool) -> list[Turn]:
    """A dialogue of a kind. `label`: user turns carry a hazard label."""
    safe, hazardous = (0, 1) if label else (-1, -1)
    asked, said, danger = (str(rng.choice(words)) for words in (WORDS, WORDS, DANGERS))

    def clip():
        seconds = np.sort(rng.random(shape.clip_frames)).astype(np.float32)
        return video(rng, *shape.clip_shape), seconds

    def render(blocked=False):
        return Render(said, video(rng, *shape.target_shape), blocked)

    return {
        "watch": lambda: [Turn("user", asked, [clip()], hazard=safe), Turn("assistant", said)],
        "compare": lambda: [Turn("user", "", [clip(), clip()], hazard=safe), Turn("assistant", said)],
        "chat": lambda: [Turn("user", asked, loss="keep"), Turn("assistant", said, loss="keep")],
        "render": lambda: [Turn("user", asked, hazard=safe), Turn("assistant", render=render(), loss=None)],
        "refuse_clip": lambda: [Turn("user", "", [clip()], hazard=hazardous), Turn("assistant", "no", loss="refusal")],
        "refuse_request": lambda: [Turn("user", danger, hazard=hazardous), Turn("assistant", "no", loss="refusal")],
        "blocked": lambda: [
            Turn("user", danger, hazard=hazardous),
            Turn("assistant", render=render(blocked=True), loss=None),
        ],
        "harmless": lambda: [Turn("user", asked, hazard=safe), Turn("assistant", said, loss=None)],
        "prefer": lambda: [Turn("user", danger, hazard=hazardous), Turn("assistant", said, loss="refusal")],
    }[kind]()


def made(kind: str, rng: np.random.Generator, shape: RowShape, label: bool) -> Example:
    """An example of a kind."""
    said = turns(kind, rng, shape, label)
    one = dialogue(said, tokenizer(), shape)
    if kind != "prefer":
        return one
    return pair(one, dialogue([*said[:-1], Turn("assistant", "never")], tokenizer(), shape), shape)


def examples(seed: int, shape: RowShape, tasks: tuple[str, ...] = TASKS) -> list[list[Example]]:
    """Random examples of `tasks`, a list for each row, each row filled until the next one drawn does not fit.

    Each kind of each task is there at least once where there are rows enough.
    """
    rng = np.random.default_rng(seed)
    kinds = [kind for task in tasks for kind in KINDS[task]]
    rows = []
    for row in range(shape.rows if kinds else 0):
        rows.append([])
        kind = kinds[row % len(kinds)]
        while True:
            one = made(kind, rng, shape, "safety" in tasks)
            if any(sum(len(e[n]) for e in [*rows[-1], one]) > getattr(shape, f.capacity) for n, f in FEATURES.items()):
                break
            rows[-1].append(one)
            kind = str(rng.choice(kinds))
    return rows


def pack(rows: list[list[Example]], shape: RowShape) -> Batch:
    """Examples laid into rows in the order given; rows that are not given are empty."""
    packed = {}
    for name, feature in FEATURES.items():
        size = (shape.rows, getattr(shape, feature.capacity))
        packed[name] = np.full((*size, *example(shape)[name].shape[1:]), feature.padding, feature.dtype)
        owners = packed[f"{name}_segment_ids"] = np.zeros(size, np.int32)
        positions = packed[f"{name}_positions"] = np.zeros(size, np.int32)
        for number, row in enumerate(rows):
            start = 0
            for segment, one in enumerate(row, 1):
                place = slice(start, start + len(one[name]))
                packed[name][number, place] = one[name]
                owners[number, place] = segment
                positions[number, place] = np.arange(len(one[name]))
                start = place.stop
    return to_batch(packed, shape)


def batch(seed: int, shape: RowShape, tasks: tuple[str, ...] = TASKS) -> Batch:
    """A random packed batch of `tasks` in numpy."""
    return pack(examples(seed, shape, tasks), shape)


def put(batch: Batch, build: Build) -> Batch:
    """A batch on the mesh of `build`."""
    return put_batch(batch, build.mesh)
