"""Products of two matrices, as one CPU takes them, against those of all axes that every other machine takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import normal

from g4v_jax import sharding, torus
from g4v_jax.nn import products
from g4v_jax.plan import hlo
from g4v_jax.plan.collectives import collectives

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


Q, O = ("embed", "heads", "head_dim"), ("heads", "head_dim", "embed")


@pytest.mark.parametrize("names, dims, x, kernel", [
    (("embed", "mlp"), 1, (8, 3, 8), (8, 6)), (Q, 1, (16, 8), (8, 2, 4)), (O, 2, (8, 3, 2, 4), (2, 4, 8)),
])  # fmt: skip
@pytest.mark.parametrize("mesh", [dict(replica=2, fsdp=4), dict(fsdp=4, tensor=2)])
def test_by_the_sides_of_a_torus_a_product_is_the_same(mesh, names, dims, x, kernel):
    x, kernel = jnp.asarray(normal(*x)), jnp.asarray(normal(*kernel))

    def both(x, kernel):
        return jax.value_and_grad(lambda x, k: jnp.sum(jnp.sin(products.contract(x, k, dims, names))), argnums=(0, 1))(x, kernel)

    with jax.set_mesh(sharding.make_mesh(mesh)):
        wanted = jax.jit(both)(x, kernel)
        with torus.using((2, 2)):
            ours = jax.jit(lambda x, kernel: both(x, kernel))(x, kernel)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)
    assert "fsdp" in ours[1][1].sharding.spec  # the kernel's gradient is left where its part is kept


def test_by_sides_only_parts_over_tensor_are_sent():
    mesh = sharding.make_mesh(dict(fsdp=4, tensor=2))
    specs = PartitionSpec("fsdp"), PartitionSpec("fsdp", "tensor")
    x, kernel = (jax.device_put(jnp.asarray(normal(*shape)), NamedSharding(mesh, spec)) for shape, spec in zip(((8, 3, 16), (16, 32)), specs))

    def loss(x, kernel):
        return jnp.sum(jnp.sin(products.contract(x, kernel, 1, ("embed", "mlp"))))

    with jax.set_mesh(mesh), torus.using((2, 2)):
        text = jax.jit(jax.grad(loss, argnums=1)).lower(x, kernel).compile().as_text()
    sent = {(one.kind, one.axis): one.bytes for one in collectives(hlo.parse(text), mesh, lambda scope: "all")}
    part = 16 * 32 // 2 * 4 * 3 // 4
    assert sent == {("all-gather", "fsdp"): part, ("reduce-scatter", "fsdp"): part}


def primitives(jaxpr) -> set[str]:
    """The names of all operations, also of those inside others."""
    found = set()
    for eqn in jaxpr.eqns:
        inner = [one for value in eqn.params.values() for one in (getattr(value, "jaxpr", value),) if hasattr(one, "eqns")]
        found |= {eqn.primitive.name}.union(*map(primitives, inner))
    return found


@pytest.mark.parametrize("mesh, rows, learned, by_sides, sums", [
    (dict(fsdp=8), 8, True, True, True),
    (dict(fsdp=8), 8, False, True, False),  # a frozen kernel has no gradient to sum
    (dict(fsdp=8), 4, True, False, False),  # rows that are not spread over all devices
    (dict(fsdp=4, context=2), 8, True, False, False),
])  # fmt: skip
def test_when_a_product_goes_by_sides(mesh, rows, learned, by_sides, sums):
    x, kernel = jnp.ones((rows, 3, 8)), jnp.ones((8, 16))

    def loss(x, kernel):
        return jnp.sum(products.contract(x, kernel, 1, ("embed", "mlp")))

    with jax.set_mesh(sharding.make_mesh(mesh)), torus.using((2, mesh["fsdp"] // 2)):
        names = primitives(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1) if learned else 0))(x, kernel).jaxpr)
    assert ("all_gather" in names, "reduce_scatter" in names) == (by_sides, sums)
