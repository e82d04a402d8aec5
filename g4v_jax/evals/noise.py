"""The denoiser's error by how much noise there is, with its condition and without: where a generator is good or weak.

May hold the measure on held-out clips; what whole renderings look like is judged in `videos.py`.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from g4v_jax import rng
from g4v_jax.data.records import Record
from g4v_jax.data.text import Render, Turn
from g4v_jax.diffusion.process import process
from g4v_jax.evals.figures import Figure
from g4v_jax.evals.videos import request
from g4v_jax.infer.assistant import Assistant
from g4v_jax.models.gpt4video import GPT4Video, merge
from g4v_jax.sharding import gathered
from g4v_jax.types import Batch

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # 1 is noise


def measure(
    assistant: Assistant, records: Sequence[Record], rendered: Callable[[Record], np.ndarray], split: str
) -> dict[str, Figure]:
    """Mean squared error of the denoiser's estimate at each of TIMES, on clips u8 [T H W 3] that `rendered` gives.

    The quantity of the generation loss, with the same noise for every model: "denoising/t0.5" under the clip's request
    and caption, "denoising_bare/t0.5" without a condition. A model whose two are equal does not listen.
    """
    errors, rows = [], assistant.spec.rows
    key = rng.stream(assistant.spec.seed, "noise")
    dialogues = (
        [*request(record, split, i), Turn("assistant", render=Render(record.caption, rendered(record)))]
        for i, record in enumerate(records)
    )
    for number, (used, batch) in enumerate(assistant.whole(dialogues)):
        keys = rng.row_keys(jax.random.fold_in(key, number * rows), rows)
        with jax.set_mesh(assistant.mesh):
            found = _errors(assistant.model, assistant.params, batch, keys)
        errors.append(np.asarray(found, np.float64)[..., :used])
    both = np.concatenate(errors, axis=-1)  # [2 times n]
    return {
        f"{name}/t{time}": Figure.mean(values)
        for name, rows in zip(("denoising", "denoising_bare"), both)
        for time, values in zip(TIMES, rows)
    }


@partial(jax.jit, static_argnums=0)
def _errors(model: GPT4Video, params: dict, batch: Batch, keys: jax.Array) -> jax.Array:
    """f32 [2 times B]: with the condition, without."""

    def call(method, *args):
        return model.apply({"params": params}, *args, method=method)

    path = process(model.denoiser.prediction)
    reading = call(lambda m, b: m.read(b), batch)
    states = merge(call(lambda m, r, b: m.query_states(r, b), reading, batch))
    x0 = call(lambda m, v: m.encode(v), batch.gen_targets)
    noise = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(keys)
    no = jnp.zeros(x0.shape[:1], bool)

    def at(one):
        time, context = one
        times = jnp.full(x0.shape[:1], time)
        estimate = call(lambda m, *a: m.denoise(*a), path.interpolate(x0, noise, times), times, context)
        return jnp.mean(jnp.square(estimate - path.target(x0, noise)), axis=tuple(range(1, x0.ndim)))

    contexts = jnp.stack([call(lambda m, s, d, b: m.conditioner(s, d, b), states, drop, no) for drop in (no, ~no)])
    times = jnp.tile(jnp.array(TIMES, jnp.float32), 2)
    found = jax.lax.map(at, (times, jnp.repeat(contexts, len(TIMES), axis=0)))
    return gathered(found.reshape(2, len(TIMES), -1))
