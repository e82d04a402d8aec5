"""The linear map every tower uses, with LoRA as two of its fields, and the embedding table."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from g4v_jax.nn.products import contract, score
from g4v_jax.sharding import constrain


def fan_in(scale: float = 1.0):
    """Initializer: normal of variance scale²/fan_in, where all but the output dims of the kernel are fan-in."""

    def make(inputs: int):
        def init(key, shape, dtype=jnp.float32):
            return jax.random.normal(key, shape, dtype) * scale / math.sqrt(max(1, math.prod(shape[:inputs])))

        return init

    return make


def zeros(inputs: int):
    """Initializer of maps that must start silent (residual gates, output heads)."""
    del inputs
    return nn.initializers.zeros_init()


class Linear(nn.Module):
    """y [..., *outputs] = x [..., *in] · kernel [*in, *outputs] + bias + (alpha/rank) · x·A·B.

    The dtype of the computation is that of x. LoRA (Hu et al. 2021): A normal, B zero, so that training starts at
    the base map; `lora_rank` 0 makes no LoRA parameters. Its dropout is on where a `dropout` key is given.
    """

    outputs: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical names of the kernel's dims, inputs then outputs
    use_bias: bool = False
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    kernel_init: object = fan_in()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs = len(self.axes) - len(self.outputs)
        in_shape, in_axes, out_axes = x.shape[-inputs:], self.axes[:inputs], self.axes[inputs:]

        def param(name, init, shape, axes):
            return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32).astype(x.dtype)

        kernel = param("kernel", self.kernel_init(inputs), in_shape + self.outputs, self.axes)
        y = contract(x, kernel, inputs, self.axes)
        if self.use_bias:
            y = y + param("bias", nn.initializers.zeros_init(), self.outputs, out_axes)
        if self.lora_rank:
            a = param("lora_a", fan_in()(inputs), in_shape + (self.lora_rank,), in_axes + ("lora",))
            b = param("lora_b", nn.initializers.zeros_init(), (self.lora_rank,) + self.outputs, ("lora",) + out_axes)
            dropped = nn.Dropout(self.lora_dropout, deterministic=not self.has_rng("dropout"))(x)
            y = y + contract(contract(dropped, a, inputs), b, 1) * (self.lora_alpha / self.lora_rank)
        return y


class Embedding(nn.Module):
    """Token table [V D]: rows for input tokens, and, where tied, the output head.

    `added` further rows are a parameter of their own, so that they can be learned beside a frozen published table.
    """

    vocab_size: int
    dim: int
    added: int = 0
    init_std: float = 0.02

    def setup(self):
        init = nn.with_logical_partitioning(nn.initializers.normal(self.init_std), ("vocab", "embed"))
        self.table = self.param("table", init, (self.vocab_size, self.dim), jnp.float32)
        if self.added:
            init = nn.with_logical_partitioning(nn.initializers.normal(self.init_std), ("channels", "embed"))
            self.extra = self.param("added", init, (self.added, self.dim), jnp.float32)

    def __call__(self, tokens: jax.Array, dtype=jnp.float32) -> jax.Array:
        """tokens i32 [...] -> [... D]. A one-sided gather: the table's width is made whole first (see sharding)."""
        table = constrain(self.table.astype(dtype), "vocab", "embed")
        if not self.added:
            return jnp.take(table, tokens, axis=0)
        # two tables, never joined: the gradient of a joined one would be as large as a frozen vocabulary
        words = jnp.take(table, jnp.minimum(tokens, self.vocab_size - 1), axis=0)
        own = jax.nn.one_hot(tokens - self.vocab_size, self.added, dtype=dtype)
        extra = jnp.einsum("...a,ad->...d", own, self.extra.astype(dtype))
        return jnp.where((tokens < self.vocab_size)[..., None], words, extra)

    def attend(self, x: jax.Array) -> jax.Array:
        """x [... D] -> logits [... V] float32, with the table kept as (V, D), the faster layout on CPU."""
        logits = score(x, self.table.astype(x.dtype))
        return jnp.concatenate([logits, score(x, self.extra.astype(x.dtype))], axis=-1) if self.added else logits
