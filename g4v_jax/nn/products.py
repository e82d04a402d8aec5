"""The matrix products of linear maps, with gradients that suit the machine.

JAX makes a kernel's gradient as its transpose. A TPU's or GPU's compiler takes either; a CPU's then lets the element-wise work before
the product write its results across the grain, at a tenth of the speed. May hold products whose gradient has a rule of its own.
"""

from functools import partial

import jax
import jax.numpy as jnp

from g4v_jax import sharding


def contract(x: jax.Array, kernel: jax.Array, dims: int) -> jax.Array:
    """The last `dims` axes of x with the first of a kernel: [... *in], [*in *out] -> [... *out]."""
    return (_contract if sharding.platform() == "cpu" else _plain_contract)(x, kernel, dims)


def score(x: jax.Array, table: jax.Array) -> jax.Array:
    """x [... D] with each row of a table [V D] -> f32 [... V]."""
    return (_score if sharding.platform() == "cpu" else _plain_score)(x, table)


def _plain_contract(x, kernel, dims):
    return jax.lax.dot_general(x, kernel, ((range(x.ndim - dims, x.ndim), range(dims)), ((), ())))


def _plain_score(x, table):
    return jax.lax.dot_general(x, table, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _contract(x, kernel, dims):
    return _plain_contract(x, kernel, dims)


def _contract_forward(x, kernel, dims):
    return _plain_contract(x, kernel, dims), (x, kernel)


def _contract_backward(dims, inputs, g):
    x, kernel = inputs
    outputs, rows = range(dims, kernel.ndim), range(x.ndim - dims)
    back = jax.lax.dot_general(g, kernel, ((range(g.ndim - len(outputs), g.ndim), outputs), ((), ())))
    return back, jax.lax.dot_general(x, g, ((rows, rows), ((), ())))


@jax.custom_vjp
def _score(x, table):
    return _plain_score(x, table)


def _score_forward(x, table):
    return _plain_score(x, table), (x, table)


def _score_backward(inputs, g):
    x, table = inputs
    rows = range(x.ndim - 1)
    g = jax.lax.optimization_barrier(g)  # written once, as it lies, for both products
    back = jax.lax.dot_general(g, table, (((g.ndim - 1,), (0,)), ((), ())))
    return back.astype(x.dtype), jax.lax.dot_general(g, x, ((rows, rows), ((), ()))).astype(table.dtype)


_contract.defvjp(_contract_forward, _contract_backward)
_score.defvjp(_score_forward, _score_backward)
