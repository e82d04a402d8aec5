"""Products of two matrices, as one CPU takes them, against those of all axes that every other machine takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import normal

from g4v_jax import sharding
from g4v_jax.nn import products

ONE, ALL = "matrices", "all axes"


def mesh_of(which: str):
    """A context in which products are of two matrices, or of all axes."""
    mesh = sharding.one_device()
    if which == ONE:
        return jax.set_mesh(mesh)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(mesh.axis_sizes, mesh.axis_names, mesh.axis_types))


def both_ways(product, x, other):
    """(values, gradients by both operands) in each context."""
    for which in (ONE, ALL):
        with mesh_of(which):
            yield product(x, other), jax.grad(lambda x, other: jnp.sum(jnp.sin(product(x, other))), argnums=(0, 1))(x, other)


@pytest.mark.parametrize("shapes, dims", [(((2, 3, 5), (5, 7)), 1), (((2, 3, 4, 5), (4, 5, 6)), 2), (((3, 5), (5, 2, 4)), 1)])
def test_a_product_of_matrices_is_that_of_all_axes(shapes, dims):
    x, kernel = (jnp.asarray(normal(*shape)) for shape in shapes)
    (ours, our_gradients), (wanted, gradients) = both_ways(lambda x, kernel: products.contract(x, kernel, dims), x, kernel)
    np.testing.assert_allclose(ours, wanted, rtol=2e-5, atol=2e-5)
    for one, other in zip(our_gradients, gradients):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-5), (jnp.bfloat16, 2e-2)])
def test_a_score_of_matrices_is_that_of_all_axes(dtype, tolerance):
    x, table = jnp.asarray(normal(2, 3, 5), dtype), jnp.asarray(normal(7, 5), dtype)
    (ours, our_gradients), (wanted, gradients) = both_ways(products.score, x, table)
    assert ours.dtype == wanted.dtype == jnp.float32
    np.testing.assert_allclose(ours, wanted, rtol=tolerance, atol=tolerance)
    for one, other in zip(our_gradients, gradients):
        assert one.dtype == other.dtype == dtype
        np.testing.assert_allclose(np.float32(one), np.float32(other), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("which, axes", [(ONE, 2), (ALL, 3)])
def test_one_cpu_takes_matrices_and_any_other_machine_all_axes(which, axes):
    x, kernel = jax.ShapeDtypeStruct((2, 5, 3), jnp.float32), jax.ShapeDtypeStruct((3, 4), jnp.float32)
    with mesh_of(which):
        steps = jax.make_jaxpr(lambda x, kernel: products.contract(x, kernel, 1))(x, kernel).eqns
    (product,) = [step for step in steps if step.primitive.name == "dot_general"]
    assert product.invars[0].aval.ndim == axes


def test_several_cpus_take_all_axes():
    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices()[:2]), ("fsdp",))):
        assert sharding.platform() == "cpu" and not sharding.on_one_cpu()
