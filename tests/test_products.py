"""Products with gradients of their own, against those that JAX makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import normal

from g4v_jax import sharding
from g4v_jax.nn import products

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.parametrize("shapes, dims", [(((2, 3, 5), (5, 7)), 1), (((2, 3, 4, 5), (4, 5, 6)), 2), (((3, 5), (5, 2, 4)), 1)])
def test_a_products_own_gradients_are_jaxs(shapes, dims):
    x, kernel = (jnp.asarray(normal(*shape)) for shape in shapes)

    def gradients(product):
        return jax.grad(lambda x, kernel: jnp.sum(jnp.sin(product(x, kernel, dims))), argnums=(0, 1))(x, kernel)

    np.testing.assert_array_equal(products._contract(x, kernel, dims), products._plain_contract(x, kernel, dims))
    for ours, jaxs in zip(gradients(products._contract), gradients(products._plain_contract)):
        np.testing.assert_allclose(ours, jaxs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-5), (jnp.bfloat16, 2e-2)])
def test_a_scores_own_gradients_are_jaxs(dtype, tolerance):
    x, table = jnp.asarray(normal(2, 3, 5), dtype), jnp.asarray(normal(7, 5), dtype)

    def gradients(product):
        return jax.grad(lambda x, table: jnp.sum(jnp.sin(product(x, table))), argnums=(0, 1))(x, table)

    assert products._score(x, table).dtype == jnp.float32
    for ours, jaxs in zip(gradients(products._score), gradients(products._plain_score)):
        assert ours.dtype == jaxs.dtype == dtype
        np.testing.assert_allclose(np.float32(ours), np.float32(jaxs), rtol=tolerance, atol=tolerance)


def test_the_cpu_takes_its_own_rule_and_arithmetic_without_devices_the_plain_one():
    shapes = jax.ShapeDtypeStruct((2, 3), jnp.float32), jax.ShapeDtypeStruct((3, 4), jnp.float32)
    mesh = sharding.one_device()

    def text():
        return str(jax.make_jaxpr(lambda x, kernel: products.contract(x, kernel, 1))(*shapes))

    with jax.set_mesh(mesh):
        assert "custom_vjp" in text()
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(mesh.axis_sizes, mesh.axis_names, mesh.axis_types)):
        assert "custom_vjp" not in text()
