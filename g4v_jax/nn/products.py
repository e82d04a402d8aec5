"""The matrix products of linear maps, as the compiler of the machine takes them best.

May hold nothing but products. On one CPU they are of two matrices, whatever axes their operands have: a product over several
axes, as a weight's gradient is, makes XLA's CPU compiler copy its operands across the grain first. On a torus of TPUs they say
themselves how weights are gathered and gradients summed.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from g4v_jax import sharding, torus


def contract(x: jax.Array, kernel: jax.Array, dims: int, axes: tuple[str | None, ...] = ()) -> jax.Array:
    """The last `dims` axes of x with the first of a kernel: [... *in], [*in *out] -> [... *out].

    `axes`: logical names of the kernel's; by them it is gathered, and its gradient summed, where `torus.cut` says so.
    """
    rows, outputs, inputs = x.shape[: x.ndim - dims], kernel.shape[dims:], math.prod(kernel.shape[:dims])
    matrix = (inputs, math.prod(outputs))
    if sharding.on_one_cpu():
        return (x.reshape(math.prod(rows), inputs) @ kernel.reshape(matrix)).reshape(rows + outputs)
    cut = torus.cut((axes[:dims], axes[dims:]), matrix, rows)
    if cut is not None:
        return _by_sides(cut, x.reshape(rows + (inputs,)), kernel.reshape(matrix)).reshape(rows + outputs)
    # rows that are merged can no longer be cut over a mesh each by itself
    return jax.lax.dot_general(x, kernel, ((range(x.ndim - dims, x.ndim), range(dims)), ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_sides(cut: PartitionSpec, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[... I], [I O] -> [... O]; the kernel is cut by `cut`, and so is its gradient."""
    return x @ torus.whole(kernel, cut)


def _by_sides_forward(cut, x, kernel):
    learned, x, kernel = kernel.perturbed, x.value, kernel.value
    return x @ torus.whole(kernel, cut), (x if learned else None, kernel)


def _by_sides_backward(cut, kept, g):
    x, kernel = kept
    to_x = g @ torus.whole(kernel, cut).T  # gathered as before, so that one gather serves both in a layer done again
    if x is None:
        return to_x, None

    def own(x, g):
        rows = range(x.ndim - 1)
        return jax.lax.dot_general(x, g, ((rows, rows), ((), ())))

    return to_x, torus.scatter(own, x, g, cut)


_by_sides.defvjp(_by_sides_forward, _by_sides_backward, symbolic_zeros=True)


def score(x: jax.Array, table: jax.Array) -> jax.Array:
    """x [... D] with each row of a table [V D] -> f32 [... V]."""
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) if sharding.on_one_cpu() else x
    y = jax.lax.dot_general(flat, table, (((flat.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return y.reshape(x.shape[:-1] + table.shape[:1])
