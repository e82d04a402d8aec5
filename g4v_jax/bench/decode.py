"""Greedy decoding of a language model alone under the clock."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from g4v_jax import rng, sharding, trees
from g4v_jax.bench.clock import timed
from g4v_jax.build import Build
from g4v_jax.infer.decode import Decoder
from g4v_jax.weights.forward import FORWARD, example


class Decoding:
    """A config's LLM with weights and prompts of chance, which writes a fixed number of tokens."""

    def __init__(self, build: Build, batch: int, prompt: int, new: int):
        """`batch` prompts of `prompt` tokens, `new` tokens each."""
        module = build.llm.clone(parent=None, lora=(), lora_rank=0)
        draw = np.random.default_rng(0)
        self.new, self.prompts = new, draw.integers(0, module.vocab_size, (batch, prompt)).tolist()
        mesh = sharding.one_device()

        def init(key):
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example("llm", module))
            return nn.meta.unbox(module.init(key, zeros, jnp.float32, method=FORWARD["llm"])["params"])

        with jax.set_mesh(mesh):
            params = jax.jit(init)(rng.stream(0, "init"))
        self.parameters = trees.count(params)
        self.decoder = Decoder(module, params, mesh)

    def run(self, times: int) -> list[float]:
        """Seconds of each of so many answers, prompts read and all."""
        return timed(lambda: self.decoder.greedy(self.prompts, self.new), times)
