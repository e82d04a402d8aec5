"""Feed-forward layers: plain and gated."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax

from g4v_jax.nn.linear import Linear
from g4v_jax.sharding import constrain

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP's
    "silu": jax.nn.silu,
}


class MLP(nn.Module):
    """x [B S D] -> [B S D] through width F. `gated`: down(act(gate(x)) · up(x)), as LLaMA has it."""

    mlp_dim: int
    activation: str = "gelu_tanh"
    gated: bool = False
    use_bias: bool = False
    lora_rank: int = 0
    lora_alpha: float = 16.0
    fused: bool = False  # one map for gate and up, without LoRA
    rows_axis: str = "rows"
    length_axis: str = "patches"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.activation]
        shared = dict(use_bias=self.use_bias, lora_rank=self.lora_rank, lora_alpha=self.lora_alpha)
        if self.fused:
            both = Linear((2, self.mlp_dim), ("embed", None, "mlp"), name="gate_up", **shared)(x)
            wide = both[..., 0, :], both[..., 1, :]
        else:
            names = ("gate", "up") if self.gated else ("up",)
            wide = [Linear((self.mlp_dim,), ("embed", "mlp"), name=name, **shared)(x) for name in names]
        h = constrain(_activate(act, *wide), self.rows_axis, self.length_axis, "mlp")
        return Linear((x.shape[-1],), ("mlp", "embed"), name="down", **shared)(h)


def _activate(act: Callable, x: jax.Array, *times: jax.Array) -> jax.Array:
    """act(x), by `times` where given. For the gradient only what goes in is kept: its steps are up to five arrays as wide."""
    return jax.checkpoint(lambda x, *times: math.prod(times, start=act(x)))(x, *times)
