"""Counted arithmetic against sums done by hand: products, loops, branches, convolutions, and whose they are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from g4v_jax.nn import kernels
from g4v_jax.plan.account import arithmetic, model_arithmetic
from g4v_jax.plan import flops
from g4v_jax.sharding import make_mesh


def total(function, *arrays) -> int:
    return sum(flops.count(jax.make_jaxpr(function)(*arrays), ()).values())


A, B = np.zeros((3, 4), np.float32), np.zeros((4, 5), np.float32)
PRODUCT = 2 * 3 * 4 * 5


def test_products():
    assert total(jnp.dot, A, B) == PRODUCT
    batch = np.zeros((7, 3, 4), np.float32)
    assert total(lambda a, b: jnp.einsum("nij,jk->nik", a, b), batch, B) == 7 * PRODUCT
    assert total(lambda a: a + a, A) == 0


def test_a_gradient_is_two_products_more_and_a_rematerialised_one_three():
    def loss(a, b):
        return jnp.sum(jnp.tanh(a @ b))

    assert total(jax.grad(loss, argnums=(0, 1)), A, B) == 3 * PRODUCT
    assert total(jax.grad(jax.checkpoint(loss), argnums=(0, 1)), A, B) == 4 * PRODUCT


def needed(function, learned, *arrays) -> int:
    return sum(flops.model(jax.make_jaxpr(function)(*arrays), learned, ()).values())


def test_a_gradient_needs_a_product_for_each_operand_that_learns():
    def loss(a, b):
        return jnp.sum(jnp.tanh(a @ b))

    for function in (loss, jax.checkpoint(loss), jax.jit(loss)):
        for learned, often in (((True, True), 3), ((False, True), 2), ((False, False), 1)):
            assert needed(function, learned, A, B) == often * PRODUCT
    assert needed(lambda a, b: loss(jax.lax.stop_gradient(a), b), (True, True), A, B) == 2 * PRODUCT
    square = np.zeros((4, 4), np.float32)

    def loop(a, b, c):  # a frozen product, then one that learns: from the second turn on both have learned inputs
        return jax.lax.scan(lambda x, _: ((x @ b) @ c, None), a, length=6)[0]

    assert needed(loop, (False, False, True), A, square, square) == 6 * (2 + 3) * 2 * 3 * 4 * 4

    def branch(flag, a, b):
        return jax.lax.cond(flag, lambda: a @ b, lambda: a @ b @ b)

    assert needed(branch, (False, False, True), True, A, square) == (2 + 3) * 2 * 3 * 4 * 4


def test_what_is_needed_is_what_is_done_without_rematerialisation():
    build = tiny.build(4)
    done, model = arithmetic(build), model_arithmetic(build)
    done.pop("optimizer", None)
    assert model.keys() == done.keys()
    assert sum(model.values()) <= sum(done.values()) <= 1.03 * sum(model.values())


def test_loops_and_branches():
    square = np.zeros((4, 4), np.float32)

    def loop(a, b):
        return jax.lax.scan(lambda x, _: (x @ b, None), a, length=6)[0]

    assert total(loop, A, square) == 6 * 2 * 3 * 4 * 4
    assert total(jax.jit(loop), A, square) == 6 * 2 * 3 * 4 * 4

    def branch(flag, a, b):
        return jax.lax.cond(flag, lambda: a @ b, lambda: a @ b @ b)

    assert total(branch, True, A, square) == 2 * 2 * 3 * 4 * 4
    with pytest.raises(ValueError, match="without a known number of turns"):
        total(lambda a, b: jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ b, a), A, square)


def test_convolutions():
    x = np.zeros((2, 8, 8, 6), np.float32)
    for groups, features in ((1, 4), (2, 4), (6, 6)):
        kernel = np.zeros((3, 3, 6 // groups, features), np.float32)
        layout = dict(padding="SAME", feature_group_count=groups, dimension_numbers=("NHWC", "HWIO", "NHWC"))

        def convolve(x, kernel):
            return jax.lax.conv_general_dilated(x, kernel, (1, 1), **layout)

        once = 2 * 2 * 8 * 8 * features * 9 * 6 // groups
        assert total(convolve, x, kernel) == once
        gradient = jax.grad(lambda x, k: jnp.sum(jnp.square(convolve(x, k))), argnums=(0, 1))
        assert total(gradient, x, kernel) == 3 * once


def test_operations_belong_to_the_outermost_named_tower():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5, use_bias=False)(x)

    class Outer(nn.Module):
        def setup(self):
            self.llm, self.vision = Inner(), Inner()

        def __call__(self, x):
            return self.llm(self.vision(x) @ jnp.ones((5, 4)))

    params = Outer().init(jax.random.key(0), A)

    def loss(params, x):
        return jnp.sum(Outer().apply(params, x))

    found = flops.count(jax.make_jaxpr(jax.grad(loss))(params, A), ("llm", "vision"))
    assert found == {"vision": 2 * PRODUCT, flops.REST: 2 * PRODUCT, "llm": 3 * PRODUCT}


def test_a_step_is_counted_by_tower_the_same_on_any_mesh():
    """The frozen autoencoder only encodes; of the LLM at least three passes over every row."""
    one = arithmetic(tiny.build())
    assert set(one) >= {"vision", "summarizer", "llm", "conditioner", "autoencoder", "denoiser"}
    shape, llm = tiny.build().shape, tiny.build().model.llm
    head = llm.vocab_size * llm.dim
    assert one["llm"] >= 3 * 2 * shape.rows * shape.tokens * head
    assert arithmetic(tiny.build(8)) == one


def test_kernels_count_what_every_block_of_every_device_does():
    q = np.zeros((4, 512, 4, 16), np.float32)

    def attention(mask):
        return lambda q, w: kernels.splash(q, q, q, mask, ("rows", "sequence", "heads", "kv_heads"), interpret=True) @ w

    products = 2 * 2 * 4 * 4 * 512 * 512 * 16  # scores and values, of each row and head
    halves = kernels.Packed(np.ones((4, 512), np.int32))
    with jax.set_mesh(make_mesh({"fsdp": 2, "context": 2, "tensor": 2})):
        traced = {name: jax.make_jaxpr(attention(mask))(q, np.zeros((16, 3))) for name, mask in (("all", None), ("causal", halves))}
        gradient = jax.make_jaxpr(jax.grad(lambda q: attention(halves)(q, np.zeros((16, 3))).sum()))(q)
    for one in traced.values():
        assert sum(flops.count(one, ()).values()) == sum(flops.kernels(one, ()).values()) + 2 * 4 * 512 * 4 * 16 * 3
    assert sum(flops.kernels(traced["all"], ()).values()) == products
    # blocks of 256 queries on each device, of 512 keys: a block that a causal mask cuts is done whole
    assert sum(flops.kernels(traced["causal"], ()).values()) == products
    # the backward pass looks at the scores once more, and takes four products from them
    assert sum(flops.kernels(gradient, ()).values()) == products + 5 * products // 2
