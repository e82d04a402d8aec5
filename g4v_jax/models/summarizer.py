"""The video summarizer: learned spatial and temporal queries turn a clip into a few tokens in the LLM's space.

GPT4Video (Wang et al. 2023, §3.1) after mPLUG-Owl's visual abstractor: queries cross-attend to the tower's features
(keys and values: features and queries together); the projections of both query sets are summed and an end vector
is appended. The paper's mode sees no frame order. `time_encoding` adds to each feature when its frame is, in seconds
and as a share of the clip, and to the temporal queries how the frames change over the clip.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from g4v_jax.nn import rope
from g4v_jax.nn.attention import Attention
from g4v_jax.nn.linear import Linear
from g4v_jax.nn.mlp import MLP
from g4v_jax.nn.norms import LayerNorm
from g4v_jax.nn.stack import residual, scan

TIME_FEATURES = 32  # sines and cosines of a frame's seconds and of its share of the clip
SECONDS_SCALE = 16.0  # one position is 1/16 s
SHARE_SCALE = 4.0  # a clip is four positions long
COURSE = 4  # cosines that describe how a clip's frames change: its mean and three slow movements


class Block(nn.Module):
    """Queries look at the features and at each other, then think."""

    num_heads: int
    head_dim: int
    mlp_dim: int

    @nn.compact
    def __call__(self, queries, layer, features):
        queries = residual(queries)
        normed = LayerNorm(name="query_norm")(queries)
        context = jnp.concatenate([LayerNorm(name="feature_norm")(features), normed], axis=1)
        h, _ = Attention(self.num_heads, self.head_dim, use_bias=True, name="attention")(normed, context)
        queries = queries + h
        h = MLP(self.mlp_dim, "gelu_tanh", use_bias=True, name="mlp")(LayerNorm(name="mlp_norm")(queries))
        return queries + h, layer


class Summarizer(nn.Module):
    """Clip features -> Q = num_queries + 1 summary tokens of the LLM's width.

    `output_scale` multiplies the tokens: a published LLM reads vectors as large as its words (rms 0.14 in SmolLM2), and
    hardly learns from larger ones.
    """

    dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_queries: int
    llm_dim: int
    time_encoding: bool = True
    output_scale: float = 1.0
    remat: str = "none"
    unroll: int = 1

    @property
    def tokens(self) -> int:
        """Q: summary tokens a clip."""
        return self.num_queries + 1

    @nn.compact
    def __call__(self, features: jax.Array, times: jax.Array) -> jax.Array:
        """features [X T P D_vision], times f32 [X T] seconds -> [X Q D_llm]."""
        x = Linear((self.dim,), ("embed", None), name="features")(features)
        if self.time_encoding:
            start, end = times[:, :1], times[:, -1:]
            share = (times - start) / jnp.maximum(end - start, 1e-3)  # of the clip
            places = jnp.stack([times * SECONDS_SCALE, share * SHARE_SCALE], axis=-1)
            theta = rope.angles(places, TIME_FEATURES // 2).reshape(*times.shape, -1)
            waves = jnp.concatenate([jnp.sin(theta), jnp.cos(theta)], axis=-1).astype(x.dtype)
            x = x + Linear((self.dim,), ("channels", "embed"), name="time")(waves)[:, :, None]
        x = x.reshape(x.shape[0], -1, self.dim)

        def table(name, shape, axes, std=1.0):
            init = nn.with_logical_partitioning(nn.initializers.normal(std), axes)
            return self.param(name, init, shape, jnp.float32).astype(x.dtype)

        queries = table("queries", (2 * self.num_queries, self.dim), ("channels", "embed"))
        queries = jnp.broadcast_to(queries, (x.shape[0], *queries.shape))
        if self.time_encoding:
            course = Linear((self.num_queries, self.dim), ("embed", None, None), name="course")
            temporal = course(self._course(features, share))
            queries = queries + jnp.pad(temporal, ((0, 0), (self.num_queries, 0), (0, 0)))
        fields = dict(num_heads=self.num_heads, head_dim=self.dim // self.num_heads, mlp_dim=self.mlp_dim)
        queries, _ = scan(Block, self.num_layers, self.remat, self.unroll, 1, **fields, name="layers")(queries, None, x)
        queries = LayerNorm(name="norm")(queries)
        spatial, temporal = jnp.split(queries, 2, axis=1)
        tokens = Linear((self.llm_dim,), ("embed", None), name="spatial")(spatial)
        tokens = tokens + Linear((self.llm_dim,), ("embed", None), name="temporal")(temporal)
        tokens = tokens * jnp.asarray(self.output_scale, tokens.dtype)
        end = table("end", (self.llm_dim,), ("embed",), 0.02)
        return jnp.concatenate([tokens, jnp.broadcast_to(end, (x.shape[0], 1, self.llm_dim))], axis=1)

    def _course(self, features: jax.Array, share: jax.Array) -> jax.Array:
        """The lowest cosine coefficients over time of what the frames show, [X COURSE·D_vision].

        A motion is the difference of what two frames show. Attention over all frames at once learns to take it very
        slowly; here it is a linear map of these coefficients, for any number of frames at any times.
        """
        looks = jax.nn.softmax(Linear((1,), ("embed", None), name="look")(features).astype(jnp.float32), axis=2)
        frames = jnp.sum(looks.astype(features.dtype) * features, axis=2)
        waves = jnp.cos(jnp.pi * share[..., None] * jnp.arange(COURSE)).astype(frames.dtype)
        return jnp.einsum("xtk,xtd->xkd", waves, frames).reshape(frames.shape[0], -1) / share.shape[1]
