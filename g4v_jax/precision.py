"""Which dtype holds and which computes: trainable float32, frozen and compute bfloat16 (float32 on CPU)."""

import jax
import jax.numpy as jnp


def compute_dtype(name: str, platform: str) -> jnp.dtype:
    """Resolve a config's dtype name; `auto` is bfloat16 on accelerators and float32 on "cpu", where bfloat16 is slower."""
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


def cast(tree, dtype: jnp.dtype):
    """Cast the floating leaves of a tree, leaving integers and booleans alone."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
