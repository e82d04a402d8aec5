"""What to do where a step does not fit: what is large, and which fields of the config make it smaller.

May hold the sentence that a user reads; each piece of advice names a field and a value that the config does not have yet.
"""

from collections import Counter

from g4v_jax.build import Build
from g4v_jax.plan.account import held, scores_of_attention
from g4v_jax.plan.chips import GIB

NAMES = {"trainable": "learned", "ema": "average", "llm": "LLM"}  # where a user reads another word
CHUNKS = 8  # of a row, where scores over the vocabulary are large


def advise(build: Build) -> str:
    """One sentence on the largest things in memory, and one on what to try, largest gain first."""
    return f"the largest are {', '.join(largest(build))}; try {', or '.join(remedies(build))}"


def largest(build: Build, count: int = 4) -> list[str]:
    """The largest arrays that one device holds before a step begins, or must hold within it, by name and GiB."""
    sizes: Counter = Counter()
    for part, path, size in held(build):
        if part != "batch":
            sizes[f"{NAMES.get(part, part)} {'/'.join(path)}"] += size
    name, tower = build.main
    rows, length = rows_a_device(build), build.length
    tokens = length // build.mesh.shape["context"]
    if name == "llm":
        sizes["scores over the vocabulary"] = rows * tokens // getattr(build.objective.spec, "chunks", 1) * _vocabulary(build) * 4
    sizes["scores of attention"] = rows * tokens * scores_of_attention(build, tower, length) * 4
    if tower.remat == "none":
        width = tower.dim * 8 + tower.mlp_dim * 3 // build.mesh.shape["tensor"]
        sizes[f"the {NAMES.get(name, name)}'s layers, all kept"] = rows * tokens * tower.num_layers * width * build.compute.itemsize
    return [f"{name} {size / GIB:.2f} GiB" for name, size in sizes.most_common(count)]


def remedies(build: Build) -> list[str]:
    """Changes of fields that make a step smaller, and what they do not already say."""
    rows, found = rows_a_device(build), []
    if rows > 1:
        found.append(f"step.micro_batches={build.step.micro_batches * rows} (one row a device at a time)")
    name, tower = build.main
    if tower.remat != "full":
        found.append(f'model.{name}.remat="full"')
    chunks = getattr(build.objective.spec, "chunks", 0)
    if chunks == 1 and build.shape.tokens % CHUNKS == 0:
        found.append(f"losses.chunks={CHUNKS}")
    if build.mesh.shape["fsdp"] * build.mesh.shape["tensor"] * build.mesh.shape["context"] < build.mesh.size:
        found.append("mesh.fsdp larger and mesh.replica smaller")
    if rows == 1 and build.mesh.shape["context"] == 1:
        found.append("mesh.context=2 (a row over two devices)")
    return [*found, "more devices"]


def rows_a_device(build: Build) -> int:
    """Rows of a micro-batch on one device."""
    share = build.mesh.shape["replica"] * build.mesh.shape["fsdp"] * build.step.micro_batches
    return max(1, build.shape.rows // share)


def _vocabulary(build: Build) -> int:
    return build.tokenizer.vocab_size // build.mesh.shape["tensor"]
