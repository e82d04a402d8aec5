"""The layers against loops in float64, and what they promise beyond values: LoRA, dropout, scanned depth."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from modules import apply, close, double, init
from tiny import normal

from g4v_jax.errors import UserError
from g4v_jax.nn.linear import Embedding, Linear, fan_in
from g4v_jax.nn.mlp import MLP
from g4v_jax.nn.norms import LayerNorm, RMSNorm
from g4v_jax.nn.stack import apart, residual, scan, stacked

pytestmark = pytest.mark.usefixtures("one_device")


# Norms


def test_rms_norm():
    x, scale = normal(2, 3, 8) * 5, normal(8)
    out = apply(RMSNorm(1e-3), {"scale": scale}, x)
    for index in np.ndindex(2, 3):
        row = np.float64(x[index])
        close(out[index], row / math.sqrt(np.mean(row**2) + 1e-3) * scale)


def test_layer_norm():
    x, scale, bias = normal(2, 3, 8) * 5 + 3, normal(8), normal(8, seed=1)
    out = apply(LayerNorm(1e-3), {"scale": scale, "bias": bias}, x)
    plain = apply(LayerNorm(1e-3, affine=False), {}, x)
    for index in np.ndindex(2, 3):
        row = np.float64(x[index])
        row = (row - row.mean()) / math.sqrt(row.var() + 1e-3)
        close(out[index], row * scale + bias)
        close(plain[index], row)


@pytest.mark.parametrize("norm", [RMSNorm(), LayerNorm(affine=False)])
def test_norms_compute_in_float32(norm):
    """The sum of 4096 squares near 10⁴ in bfloat16 would lose half of them."""
    x = jnp.bfloat16(normal(1, 4096) * 100)
    params = {"scale": np.ones(4096, np.float32)} if isinstance(norm, RMSNorm) else {}
    out = apply(norm, params, x)
    row = np.asarray(x, np.float64)
    row = row - row.mean() * isinstance(norm, LayerNorm)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(out), row / math.sqrt(np.mean(row**2)), rtol=2**-8, atol=1e-3)


# Linear maps and LoRA


def test_linear_contracts_several_axes():
    module = Linear((5, 2), ("heads", "head_dim", None, None), use_bias=True)
    x = normal(2, 3, 4, 6)
    params = init(module, x)
    expected = np.zeros((2, 3, 5, 2))
    for b, s, i, j in np.ndindex(expected.shape):
        expected[b, s, i, j] = np.sum(np.float64(x[b, s]) * params["kernel"][:, :, i, j]) + params["bias"][i, j]
    close(apply(module, params, x), expected)


def test_lora_adds_a_scaled_product_of_two_thin_maps():
    module = Linear((5,), ("embed", None), lora_rank=2, lora_alpha=6.0)
    x = normal(3, 4)
    params = double(init(module, x))
    kernel = params["kernel"] + 6.0 / 2 * params["lora_a"] @ params["lora_b"]
    close(apply(module, init(module, x), x), x @ kernel)


def test_lora_starts_at_the_base_map_and_can_leave_it():
    module = Linear((5,), ("embed", None), lora_rank=2)
    x = normal(3, 4)
    params = nn.meta.unbox(module.init(jax.random.key(0), x))["params"]
    np.testing.assert_array_equal(apply(module, params, x), apply(Linear((5,), ("embed", None)), params, x))
    gradient = jax.grad(lambda p: jnp.sum(module.apply({"params": p}, x) ** 2))(params)
    assert np.abs(gradient["lora_b"]).max() > 0 and np.abs(params["lora_a"]).max() > 0


def test_lora_dropout_acts_on_its_own_path_and_only_with_a_key():
    module = Linear((200,), ("embed", None), lora_rank=200, lora_alpha=200.0, lora_dropout=0.25)
    x = normal(200) + 5
    params = {"kernel": np.eye(200), "lora_a": np.eye(200), "lora_b": np.eye(200)}
    close(apply(module, params, x), 2 * x)

    def dropped(key):
        return np.asarray(apply(module, params, x, rngs={"dropout": jax.random.key(key)})) - x

    first = dropped(0)
    kept = np.abs(first) > 1e-6
    np.testing.assert_allclose(first[kept], x[kept] / 0.75, rtol=1e-5)
    assert 0.65 < kept.mean() < 0.85
    np.testing.assert_array_equal(first, dropped(0))
    assert (first != dropped(1)).any()


def test_fan_in_counts_all_input_axes():
    kernel = fan_in(2.0)(2)(jax.random.key(0), (10, 20, 500))
    assert float(jnp.std(kernel)) == pytest.approx(2 / math.sqrt(200), rel=0.01)


def test_maps_compute_in_the_dtype_of_their_input():
    module, x = Linear((5,), ("embed", None), use_bias=True, lora_rank=2), jnp.bfloat16(normal(3, 4))
    assert apply(module, init(module, x), x).dtype == jnp.bfloat16
    assert nn.meta.unbox(module.init(jax.random.key(0), x))["params"]["kernel"].dtype == jnp.float32


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


@pytest.mark.parametrize(
    "activation, function",
    [
        ("gelu", gelu),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ("quick_gelu", lambda x: x / (1 + np.exp(-1.702 * x))),
        ("silu", lambda x: x / (1 + np.exp(-x))),
    ],
)
@pytest.mark.parametrize("gated", [False, True])
def test_mlp(activation, function, gated):
    module = MLP(6, activation, gated, use_bias=True)
    x = normal(2, 3, 4)
    params = double(init(module, x))

    def linear(name, value):
        return value @ params[name]["kernel"] + params[name]["bias"]

    hidden = function(linear("gate", x)) * linear("up", x) if gated else function(linear("up", x))
    close(apply(module, init(module, x), x), linear("down", hidden))


def test_embedding_looks_rows_up_and_scores_against_them():
    module, table = Embedding(7, 4), normal(7, 4)
    tokens = np.array([[0, 6, 3], [3, 3, 1]])
    out = apply(module, {"table": table}, tokens)
    hidden = normal(2, 3, 4, seed=1)
    logits = apply(module, {"table": table}, hidden, method="attend")
    for index, token in np.ndenumerate(tokens):
        np.testing.assert_array_equal(out[index], table[token])
        close(logits[index], [np.dot(np.float64(hidden[index]), row) for row in table])
    assert apply(module, {"table": table}, tokens, jnp.bfloat16).dtype == jnp.bfloat16
    assert apply(module, {"table": table}, jnp.bfloat16(hidden), method="attend").dtype == jnp.float32


# Depth


class Layer(nn.Module):
    """tanh of a linear map, plus a number that all layers share, and one of its own."""

    @nn.compact
    def __call__(self, x, own, shared):
        x = jnp.tanh(Linear((4,), ("embed", None), name="map")(residual(x))) + shared + own
        return x, own * 2


@pytest.mark.parametrize("remat, unroll", [("none", 1), ("full", 1), ("dots", 3), ("attention", 1), ("offload", 1), ("none", 99)])
def test_scan_repeats_a_block(remat, unroll):
    x, own = normal(2, 4), np.array([0.1, 0.2, 0.3], np.float32)
    module = scan(Layer, num_layers=3, remat=remat, unroll=unroll, shared=1)
    params = init(module, x, own, 0.5)
    assert params["map"]["kernel"].shape == (3, 4, 4)

    def loss(x):
        out, layers = module.apply({"params": params}, x, own, 0.5)
        return jnp.sum(out**2), (out, layers)

    def by_hand(x):
        for i in range(3):
            x = jnp.tanh(x @ params["map"]["kernel"][i]) + 0.5 + own[i]
        return jnp.sum(x**2), x

    gradient, (out, layers) = jax.jit(jax.grad(loss, has_aux=True))(x)
    assert ("<host>" in str(jax.make_jaxpr(jax.grad(loss, has_aux=True))(x))) == (remat == "offload")
    expected, last = jax.grad(by_hand, has_aux=True)(x)
    close(out, last, scale=4)
    close(gradient, expected, scale=4)
    np.testing.assert_array_equal(layers, own * 2)


def test_scan_names_the_layer_axis_and_refuses_an_unknown_policy():
    module = scan(Layer, num_layers=3, remat="none", unroll=1, shared=1)
    boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), normal(2, 4), np.zeros(3), 0.0))
    assert boxed["params"]["map"]["kernel"].names == ("layers", "embed", None)
    with pytest.raises(UserError, match="remat 'sometimes' is not known; known: attention, dots, full"):
        scan(Layer, num_layers=3, remat="sometimes", unroll=1, shared=1)


def test_layers_lie_apart_where_no_loop_reads_them_and_can_be_stacked_again():
    params = {"a": {"layers": {"w": normal(2, 3)}, "rest": normal(4)}, "b": {"layers": {"w": normal(2, 5)}}}
    expected = jax.tree.map(np.copy, params)

    class Tower:
        num_layers = 2

        def __init__(self, unroll):
            self.unroll = unroll

    found = apart(params, {"a": Tower(2), "b": Tower(1)})
    assert params == {}  # what is taken apart is not held twice
    assert [leaf.shape for leaf in found["a"]["layers"]["w"]] == [(3,), (3,)] and found["b"]["layers"]["w"].shape == (2, 5)
    again = stacked(found)
    assert jax.tree.structure(again) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, again, expected)
