"""The language model: a LLaMA-family decoder with grouped queries, LoRA by name, and a KV cache.

References: LLaMA (Touvron et al. 2023), Llama 2/3 (rope scaling), SmolLM2 (tied), Mistral (sliding window), Qwen2 (qkv
bias), Qwen3 (qk-norm); each agrees with transformers' implementation (see `weights/llm.py`).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from g4v_jax.nn import rope
from g4v_jax.nn.attention import Attention
from g4v_jax.nn.kernels import Packed
from g4v_jax.nn.linear import Embedding, Linear
from g4v_jax.nn.mlp import MLP
from g4v_jax.nn.norms import RMSNorm
from g4v_jax.nn.stack import residual, scan
from g4v_jax.sharding import constrain

ATTENTION_LORA = ("q", "k", "v", "o")


class Block(nn.Module):
    """One pre-norm decoder layer."""

    attention: dict
    mlp: dict
    norm_eps: float

    @nn.compact
    def __call__(self, x, cache, theta, mask, index):
        x = residual(x)
        h = RMSNorm(self.norm_eps, name="attention_norm")(x)
        h, cache = Attention(name="attention", **self.attention)(h, mask=mask, theta=theta, cache=cache, index=index)
        x = constrain(x + h, "rows", "sequence", "embed")
        h = MLP(name="mlp", **self.mlp)(RMSNorm(self.norm_eps, name="mlp_norm")(x))
        return constrain(x + h, "rows", "sequence", "embed"), cache


class LLM(nn.Module):
    """Decoder over vectors: embed, run, and score are separate, since summary tokens enter between them.

    `lora`: the maps that carry LoRA, of q, k, v, o, mlp. `rope_scaling`: see `rope.rescale`. `sliding_window`: how many
    positions a token looks back, itself included. `added_tokens`: rows of the vocabulary behind a published table's.
    """

    vocab_size: int
    dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    rope_base: float = 10_000.0
    rope_scaling: dict | None = None
    sliding_window: int | None = None
    norm_eps: float = 1e-5
    qk_norm: str | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = True
    added_tokens: int = 0
    lora: tuple[str, ...] = ()
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    attention: str = "auto"  # kernel, see `nn/kernels.py`
    remat: str = "none"
    unroll: int = 1

    def block_fields(self, fused: bool = False) -> dict:
        """Fields of one `Block`, its maps `fused` or not. Raises ValueError for an unknown map of LoRA."""
        unknown = set(self.lora) - {*ATTENTION_LORA, "mlp"}
        if unknown:
            raise ValueError(f"llm.lora: unknown map {sorted(unknown)}; known: {', '.join(ATTENTION_LORA)}, mlp")
        attention = dict(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            qk_norm=self.qk_norm,
            use_bias=self.qkv_bias,
            out_bias=self.out_bias,
            norm_eps=self.norm_eps,
            lora=tuple(name for name in self.lora if name in ATTENTION_LORA),
            lora_rank=self.lora_rank,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            fused=fused,
            kernel=self.attention,
            length_axis="sequence",
        )
        mlp = dict(
            mlp_dim=self.mlp_dim,
            activation="silu",
            gated=True,
            use_bias=self.mlp_bias,
            lora_rank=self.lora_rank if "mlp" in self.lora else 0,
            lora_alpha=self.lora_alpha,
            fused=fused,
            length_axis="sequence",
        )
        return dict(attention=attention, mlp=mlp, norm_eps=self.norm_eps)

    def setup(self):
        self.embedding = Embedding(self.vocab_size, self.dim, self.added_tokens)
        self.layers = scan(Block, self.num_layers, self.remat, self.unroll, 3, **self.block_fields())
        self.norm = RMSNorm(self.norm_eps)
        if not self.tied:
            self.head = Linear((self.vocab_size,), ("embed", "vocab"))
            if self.added_tokens:
                self.head_added = Linear((self.added_tokens,), ("embed", "channels"))

    def embed(self, tokens: jax.Array, dtype) -> jax.Array:
        """tokens i32 [B S] -> [B S D]."""
        return constrain(self.embedding(tokens, dtype), "rows", "sequence", "embed")

    def hidden(self, x: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
        """x [B S D], positions and segments i32 [B S] -> final normed states [B S D]; causal within segments."""
        theta = rope.angles(positions, self.head_dim, self.rope_base, self.rope_scaling)
        x, _ = self.layers(x, None, theta, Packed(segments, window=self.sliding_window), None)
        return self.norm(x)

    def head_of(self, params: dict) -> dict:
        """Of this tower's parameters those that `logits` reads."""
        names = ("embedding",) if self.tied else ("head", "head_added")
        return {name: params[name] for name in names if name in params}

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [B S D] -> [B S V] float32."""
        if self.tied:
            logits = self.embedding.attend(hidden)
        else:
            logits = self.head(hidden).astype(jnp.float32)
            if self.added_tokens:
                logits = jnp.concatenate([logits, self.head_added(hidden).astype(jnp.float32)], axis=-1)
        return constrain(logits, "rows", "sequence", "vocab")
