"""The matrix products of linear maps, as the compiler of the machine takes them best.

May hold nothing but products. On one CPU they are of two matrices, whatever axes their operands have: a product over several
axes, as a weight's gradient is, makes XLA's CPU compiler copy its operands across the grain first.
"""

import math

import jax
import jax.numpy as jnp

from g4v_jax import sharding


def contract(x: jax.Array, kernel: jax.Array, dims: int) -> jax.Array:
    """The last `dims` axes of x with the first of a kernel: [... *in], [*in *out] -> [... *out]."""
    if not sharding.on_one_cpu():  # axes that are merged can no longer be cut over a mesh each by itself
        return jax.lax.dot_general(x, kernel, ((range(x.ndim - dims, x.ndim), range(dims)), ((), ())))
    rows, outputs, inputs = x.shape[: x.ndim - dims], kernel.shape[dims:], math.prod(kernel.shape[:dims])
    y = x.reshape(math.prod(rows), inputs) @ kernel.reshape(inputs, math.prod(outputs))
    return y.reshape(rows + outputs)


def score(x: jax.Array, table: jax.Array) -> jax.Array:
    """x [... D] with each row of a table [V D] -> f32 [... V]."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if sharding.on_one_cpu() else x
    y = jax.lax.dot_general(flat, table, (((flat.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return y.reshape(x.shape[:-1] + table.shape[:1])
