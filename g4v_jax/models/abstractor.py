"""The paper's summarizer to the letter: mPLUG-Owl-video's visual abstractor, for its published weights.

GPT4Video (Wang et al. 2023, §3.1) takes it over as it is. The computation and its quirks are those of the public source
of mPLUG-Owl (Ye et al. 2023; github.com/X-PLUG/mPLUG-Owl, folder mplug_owl_video). `models/summarizer.py` is our own,
which also sees when each frame is. May hold this one module.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from g4v_jax.nn.attention import Attention
from g4v_jax.nn.linear import Linear
from g4v_jax.nn.norms import LayerNorm
from g4v_jax.nn.stack import residual, scan
from g4v_jax.sharding import constrain


class Block(nn.Module):
    """Queries look at the features and at each other, then think.

    As published, the residual path starts from the normalised queries, and the MLP normalises its hidden width.
    """

    num_heads: int
    head_dim: int
    mlp_dim: int
    norm_eps: float

    @nn.compact
    def __call__(self, queries, layer, features):
        queries = LayerNorm(1e-5, name="query_norm")(residual(queries))
        context = jnp.concatenate([queries, LayerNorm(1e-5, name="feature_norm")(features)], axis=1)
        h, _ = Attention(self.num_heads, self.head_dim, use_bias=True, name="attention")(queries, context)
        queries = queries + h
        h = LayerNorm(1e-5, name="mlp_norm")(queries)
        gate = Linear((self.mlp_dim,), ("embed", "mlp"), use_bias=True, name="gate")(h)
        h = jax.nn.silu(gate) * Linear((self.mlp_dim,), ("embed", "mlp"), use_bias=True, name="up")(h)
        h = LayerNorm(self.norm_eps, name="hidden_norm")(constrain(h, "rows", "patches", "mlp"))
        return queries + Linear((queries.shape[-1],), ("mlp", "embed"), use_bias=True, name="down")(h), layer


class Abstractor(nn.Module):
    """Clip features -> Q = num_queries + 1 summary tokens of the LLM's width.

    Features of all frames are one sequence, which tells of no order. A clip of one frame is taken for a picture: it is
    seen by the spatial queries alone.
    """

    dim: int  # of the features too
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_queries: int
    llm_dim: int
    patches: int  # P: features a frame
    norm_eps: float = 1e-6
    remat: str = "none"
    unroll: int = 1

    @property
    def tokens(self) -> int:
        """Q: summary tokens a clip."""
        return self.num_queries + 1

    @property
    def feature_shape(self) -> tuple[int, int]:
        """(P, D_vision) of a frame's features."""
        return self.patches, self.dim

    @nn.compact
    def __call__(self, features: jax.Array, times: jax.Array) -> jax.Array:
        """features [X T P D_vision], times f32 [X T] (not looked at) -> [X Q D_llm]."""
        clips, frames = times.shape

        def table(name, shape, axes):
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)
            value = self.param(name, init, shape, jnp.float32).astype(features.dtype)
            return jnp.broadcast_to(value, (clips, *value.shape))

        spatial = table("spatial_queries", (self.num_queries, self.dim), ("channels", "embed"))
        temporal = table("temporal_queries", (self.num_queries, self.dim), ("channels", "embed"))
        queries = jnp.concatenate([spatial, temporal], axis=1) if frames > 1 else spatial
        features = features.reshape(clips, -1, self.dim)
        fields = dict(
            num_heads=self.num_heads,
            head_dim=self.dim // self.num_heads,
            mlp_dim=self.mlp_dim,
            norm_eps=self.norm_eps,
        )
        stack = scan(Block, self.num_layers, self.remat, self.unroll, 1, **fields, name="layers")
        queries, _ = stack(queries, None, features)
        spatial, temporal = jnp.split(queries, [self.num_queries], axis=1)
        tokens = Linear((self.llm_dim,), ("embed", None), use_bias=True, name="spatial")(spatial)
        change = Linear((self.llm_dim,), ("embed", None), use_bias=True, name="temporal")(temporal)
        tokens = tokens + change if frames > 1 else tokens
        return jnp.concatenate([tokens, table("end", (1, self.llm_dim), (None, "embed"))], axis=1)
