"""Multi-head attention for every tower: self or cross, grouped queries, rotary, masked, with a KV cache."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from g4v_jax import sharding
from g4v_jax.nn import kernels, rope
from g4v_jax.nn.kernels import Packed
from g4v_jax.nn.linear import Linear
from g4v_jax.nn.norms import RMSNorm
from g4v_jax.sharding import constrain

MASKED = -1e30  # added to the score of a key that may not be looked at
PARTS, SHORTEST = 4, 64  # into how many parts the queries under a causal mask are cut on CPUs, and the shortest one


@struct.dataclass
class Cache:
    """Keys and values of one layer, or of all with a leading L axis."""

    keys: jax.Array  # [B T H_kv d]
    values: jax.Array  # [B T H_kv d]


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Packed | jax.Array | None = None,
    kernel: str = "auto",
    axes: tuple[str | None, ...] = ("rows", "patches", "heads", "kv_heads"),
) -> jax.Array:
    """softmax(q·kᵀ/√d + mask)·v.

    q [B S H d], k and v [B T H_kv d] with H a multiple of H_kv, mask bool [B S T] (True = may look) or `Packed` -> [B S H d].
    Softmax in float32. Each row of the mask must allow at least one key. `kernel`: see `kernels.choose`, which raises
    UserError; `axes`: see `kernels.splash`.
    """
    chosen = kernels.choose(kernel, sharding.platform(), q, k, mask)
    if chosen == "splash":
        return kernels.splash(q, k, v, mask, axes)
    if chosen == "cudnn":
        return kernels.cudnn(q, k, v, mask)
    if not isinstance(mask, Packed):
        return plain(q, k, v, mask)
    whole = sharding.shards(axes[1]) == 1  # queries that lie over devices are in parts already
    run = _in_parts if mask.causal and whole and sharding.platform() == "cpu" else plain
    return run(q, k, v, mask.allowed())


def _in_parts(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """`plain` under a causal mask: parts of the queries, each with the keys up to its end, so that few scores are in vain."""
    length = q.shape[1]
    parts = max(1, min(PARTS, length // SHORTEST))
    ends = [length * part // parts for part in range(parts + 1)]
    out = jnp.zeros_like(q)  # written into: the compiler asks of each number of a concatenation which part it is of
    for a, b in itertools.pairwise(ends):
        out = jax.lax.dynamic_update_slice(out, plain(q[:, a:b], k[:, :b], v[:, :b], mask[:, a:b, :b]), (0, a, 0, 0))
    return out


def plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """`attend` in plain XLA, with all scores in memory."""
    batch, length, heads, dim = q.shape
    groups = k.shape[2]
    # heads lead and the queries of a group lie in one axis: plain batched matmuls, which CPUs run 3 x faster
    q = q.reshape(batch, length, groups, heads // groups, dim).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, groups, -1, dim) * dim**-0.5
    scores = jnp.einsum("bnsd,bntd->bnst", q, k.transpose(0, 2, 1, 3), preferred_element_type=jnp.float32)
    if mask is not None:
        bias = jnp.where(mask, 0.0, MASKED)[:, None, None]
        scores = (scores.reshape(batch, groups, -1, *mask.shape[1:]) + bias).reshape(scores.shape)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("bnst,bntd->bnsd", weights.astype(v.dtype), v.transpose(0, 2, 1, 3)) / total.astype(v.dtype)
    out = out.reshape(batch, groups, heads // groups, length, dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, dim)


def write(buffer: jax.Array, new: jax.Array, index: jax.Array | None) -> jax.Array:
    """Write new [B s H d] into buffer [B T H d]: at its beginning (index None), or at each row's `index` i32 [B].

    With an index, several rows take one key each: a scatter of more is slow on every machine, and raises ValueError.
    """
    if index is None:
        return jax.lax.dynamic_update_slice(buffer, new, (0, 0, 0, 0))
    if len(buffer) == 1:
        return jax.lax.dynamic_update_slice(buffer, new, (0, index[0], 0, 0))
    if new.shape[1] != 1:
        raise ValueError(f"{new.shape[1]} keys a row at an index; only one can be written")
    here = jnp.arange(buffer.shape[1]) == index[:, None]
    return jnp.where(here[:, :, None, None], new, buffer)


def past_mask(positions: jax.Array, keys: int, window: int | None = None) -> jax.Array:
    """positions i32 [B S] of queries -> bool [B S T] over a cache of T = `keys` places, one a position; `window`: see `Packed`."""
    places = jnp.arange(keys)
    mask = places <= positions[:, :, None]
    return mask if window is None else mask & (places > positions[:, :, None] - window)


class Attention(nn.Module):
    """x [B S D] attends to itself, or to `context` [B T D'], and returns [B S D].

    `qk_norm`: "head" normalises each head (Qwen3), "full" the whole width (Wan2.1), None neither.
    `lora`: which of q, k, v, o carry LoRA.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    qk_norm: str | None = None
    use_bias: bool = False
    out_bias: bool | None = None  # of o; None: as use_bias
    norm_eps: float = 1e-6
    lora: tuple[str, ...] = ()
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    fused: bool = False  # one map `qkv` for all three, heads unsplit: for self-attention without LoRA
    rows_axis: str = "rows"  # logical name of x's first axis
    length_axis: str = "patches"  # and of its length: the LLM's is "sequence"
    kernel: str = "auto"  # see `kernels.choose`
    split_heads: bool = True  # over the mesh's tensor axis; False where their number rarely divides by it

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        *,
        mask: Packed | jax.Array | None = None,
        theta: jax.Array | None = None,
        cache: Cache | None = None,
        index: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """theta: rotary angles of x's positions. With a cache, this call's keys are written into it: see `write`."""
        if self.qk_norm not in (None, "head", "full"):
            raise ValueError(f"unknown qk_norm {self.qk_norm!r}")
        source = x if context is None else context
        kv_heads = self.num_kv_heads or self.num_heads

        source_axis = self.length_axis if context is None else "keys"
        heads_axis, kv_heads_axis = ("heads", "kv_heads") if self.split_heads else (None, None)

        def project(name, value, length, heads, axis):
            y = self._linear(name, (heads, self.head_dim), ("embed", axis, "head_dim"))(value)
            return constrain(y, self.rows_axis, length, axis, "head_dim")  # before keys are gathered, for the backward pass

        if self.fused:
            qkv = project("qkv", x, self.length_axis, self.num_heads + 2 * kv_heads, None)
            q, k, v = jnp.split(qkv, (self.num_heads, self.num_heads + kv_heads), axis=2)
        else:
            q = project("q", x, self.length_axis, self.num_heads, heads_axis)
            k = project("k", source, source_axis, kv_heads, kv_heads_axis)
            v = project("v", source, source_axis, kv_heads, kv_heads_axis)
        if self.qk_norm:
            q, k = self._normalise("q_norm", q), self._normalise("k_norm", k)
        if theta is not None:
            q, k = rope.rotate(q, theta), rope.rotate(k, theta)
        if cache is not None:
            cache = Cache(write(cache.keys, k, index), write(cache.values, v, index))
            k, v = cache.keys, cache.values
        k = constrain(k, self.rows_axis, "keys", kv_heads_axis, "head_dim")
        v = constrain(v, self.rows_axis, "keys", kv_heads_axis, "head_dim")
        axes = (self.rows_axis, self.length_axis, heads_axis, kv_heads_axis)
        out = constrain(attend(q, k, v, mask, self.kernel, axes), *axes[:3], "head_dim")
        out = checkpoint_name(out, kernels.SAVED)
        return self._linear("o", (x.shape[-1],), (heads_axis, "head_dim", "embed"))(out), cache

    def _linear(self, name, outputs, axes) -> Linear:
        rank = self.lora_rank if name in self.lora else 0
        bias = self.out_bias if name == "o" and self.out_bias is not None else self.use_bias
        return Linear(outputs, axes, bias, rank, self.lora_alpha, self.lora_dropout, name=name)

    def _normalise(self, name, x):
        norm = RMSNorm(self.norm_eps, name=name)
        if self.qk_norm == "head":
            return norm(x)
        return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)
