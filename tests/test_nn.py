"""The layers against loops in float64, and what they promise beyond values: caches, LoRA, dropout, scanned depth."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import normal

from g4v_jax.errors import UserError
from g4v_jax.nn import rope
from g4v_jax.nn.attention import SHORTEST, Attention, Cache, attend, plain
from g4v_jax.nn.kernels import Packed
from g4v_jax.nn.linear import Embedding, Linear, fan_in
from g4v_jax.nn.mlp import MLP
from g4v_jax.nn.norms import LayerNorm, RMSNorm
from g4v_jax.nn.stack import apart, residual, scan, stacked

pytestmark = pytest.mark.usefixtures("one_device")


def init(module, *args, **kwargs) -> dict:
    """Parameters of a module, every one random."""
    shapes = nn.meta.unbox(jax.eval_shape(lambda key: module.init(key, *args, **kwargs), jax.random.key(0)))["params"]
    leaves, structure = jax.tree.flatten(shapes)
    return structure.unflatten([normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)])


def apply(module, params, *args, **kwargs):
    return jax.jit(lambda p: module.apply({"params": p}, *args, **kwargs))(params)


def close(actual, expected, scale=1.0):
    """Equal to float32's accuracy, relative to the largest value expected."""
    expected = np.asarray(expected)
    assert np.shape(actual) == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * scale * max(1.0, np.abs(expected).max()))


def double(tree):
    return jax.tree.map(lambda x: np.array(x, np.float64), tree)


# Attention


def attend_by_loops(q, k, v, mask=None) -> np.ndarray:
    q, k, v = double((q, k, v))
    out = np.zeros_like(q)
    for b in range(q.shape[0]):
        for s in range(q.shape[1]):
            keys = [t for t in range(k.shape[1]) if mask is None or mask[b, s, t]]
            for head in range(q.shape[2]):
                group = head // (q.shape[2] // k.shape[2])
                weights = [math.exp(q[b, s, head] @ k[b, t, group] / math.sqrt(q.shape[3])) for t in keys]
                values = [weight * v[b, t, group] for weight, t in zip(weights, keys)]
                out[b, s, head] = sum(values) / sum(weights)
    return out


@pytest.mark.parametrize("window", [None, 70])
def test_causal_attention_in_parts_of_the_queries_is_attention(window):
    length = 3 * SHORTEST + 5
    q, k, v = normal(2, length, 4, 8), normal(2, length, 2, 8, seed=1), normal(2, length, 2, 8, seed=2)
    mask = Packed(np.repeat([[1], [2]], length, 1).cumsum(1) // 90, window=window)

    def loss(run, q, k, v):
        return jnp.sum(jnp.sin(run(q, k, v)))

    parts = jax.value_and_grad(lambda *x: loss(lambda q, k, v: attend(q, k, v, mask), *x), argnums=(0, 1, 2))
    whole = jax.value_and_grad(lambda *x: loss(lambda q, k, v: plain(q, k, v, mask.allowed()), *x), argnums=(0, 1, 2))
    for a, b in zip(jax.tree.leaves(parts(q, k, v)), jax.tree.leaves(whole(q, k, v))):
        close(a, b, scale=10)
    keys = [eqn.outvars[0].aval.shape[-1] for eqn in jax.make_jaxpr(attend)(q, k, v, mask).eqns if eqn.primitive.name == "exp"]
    assert len(keys) == 3 and sorted(keys) == keys and keys[0] < keys[-1] == length  # few scores are in vain


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_attend_is_softmax_over_the_allowed_keys(groups, masked):
    q, k, v = normal(2, 3, 4, 6), normal(2, 5, groups, 6, seed=1), normal(2, 5, groups, 6, seed=2)
    mask = normal(2, 3, 5) > 0
    mask[:, :, 2] = True
    close(attend(q, k, v, mask if masked else None), attend_by_loops(q, k, v, mask if masked else None))


def test_large_scores_do_not_overflow_and_forbidden_keys_weigh_nothing():
    q = np.full((1, 1, 1, 4), 100, np.float32)
    k = np.stack([np.full((1, 1, 4), x, np.float32) for x in (100, -100, 100)], axis=1)
    v = np.array([1, 7, 1e30], np.float32).reshape(1, 3, 1, 1) * np.ones(4, np.float32)
    np.testing.assert_array_equal(attend(q, k, v, np.array([[[True, True, False]]])), np.ones((1, 1, 1, 4)))


def test_packed():
    segments = np.array([[1, 1, 2, 2, 2, 0], [1, 2, 3, 0, 0, 0]])
    causal, both = (Packed(jnp.array(segments), causal=causal).allowed() for causal in (True, False))
    for b in range(2):
        for s in range(6):
            for t in range(6):
                same = segments[b, s] == segments[b, t]
                assert both[b, s, t] == same and causal[b, s, t] == (same and t <= s)


def attention_by_loops(params, x, context, mask, theta, qk_norm, eps=1e-6) -> np.ndarray:
    params, x, source = double((params, x, x if context is None else context))

    def project(name, value):
        out = np.einsum("bsd,dhe->bshe", value, params[name]["kernel"])
        return out + params[name].get("bias", 0)

    def normalise(name, value):
        for b, s in np.ndindex(value.shape[:2]):
            if qk_norm == "head":
                for h in range(value.shape[2]):
                    rms = math.sqrt(np.mean(value[b, s, h] ** 2) + eps)
                    value[b, s, h] *= params[name]["scale"] / rms
            elif qk_norm == "full":
                rms = math.sqrt(np.mean(value[b, s] ** 2) + eps)
                value[b, s] *= params[name]["scale"].reshape(value.shape[2:]) / rms
        return value

    q, k, v = normalise("q_norm", project("q", x)), normalise("k_norm", project("k", source)), project("v", source)
    if theta is not None:
        q, k = rotate_by_complex(q, theta), rotate_by_complex(k, theta)
    out = attend_by_loops(q, k, v, mask)
    return np.einsum("bshe,hed->bsd", out, params["o"]["kernel"]) + params["o"].get("bias", 0)


@pytest.mark.parametrize(
    "fields, cross, masked",
    [
        (dict(num_heads=2), False, False),
        (dict(num_heads=4, num_kv_heads=2, qk_norm="head"), False, True),
        (dict(num_heads=2, use_bias=True, qk_norm="full"), True, False),
    ],
)
def test_attention(fields, cross, masked):
    module = Attention(head_dim=4, **fields)
    x, context = normal(2, 5, 6), normal(2, 3, 7) if cross else None
    theta = None if cross else np.asarray(rope.angles(np.arange(5), 4), np.float64)
    mask = np.asarray(Packed(jnp.array([[1, 1, 2, 2, 2], [1, 1, 1, 1, 0]])).allowed()) if masked else None
    options = dict(context=context, mask=mask, theta=None if theta is None else jnp.float32(theta))
    params = init(module, x, **options)
    out, cache = apply(module, params, x, **options)
    assert cache is None
    close(out, attention_by_loops(params, x, context, mask, theta, fields.get("qk_norm")), scale=4)


def test_an_unknown_qk_norm_is_named():
    with pytest.raises(ValueError, match="unknown qk_norm 'heads'"):
        Attention(2, 4, qk_norm="heads").init(jax.random.key(0), normal(1, 2, 6))


def test_a_token_at_a_time_with_a_cache_equals_all_at_once():
    """Rows start at different places of their caches; what lies behind a row's own tokens is never looked at."""
    module = Attention(4, 4, num_kv_heads=2, qk_norm="head")
    lengths, x = [5, 3], normal(2, 5, 6)
    theta = rope.angles(jnp.arange(5), 4)
    params = init(module, x)
    mask = np.tril(np.ones((5, 5), bool))[None].repeat(2, 0)
    full, _ = apply(module, params, x, mask=mask, theta=theta)

    @jax.jit
    def step(x, index, cache):
        allowed = jnp.arange(8)[None, None] <= index[:, None, None]
        return module.apply(
            {"params": params}, x, mask=allowed, theta=rope.angles(index[:, None], 4), cache=cache, index=index
        )

    junk = Cache(jnp.full((2, 8, 2, 4), 1e9), jnp.full((2, 8, 2, 4), 1e9))
    cache, places = junk, np.zeros(2, np.int32)
    while (places < lengths).any():
        tokens = np.stack([x[b, min(places[b], lengths[b] - 1)] for b in range(2)])[:, None]
        out, cache = step(tokens, jnp.array(np.minimum(places, np.array(lengths) - 1)), cache)
        for b in range(2):
            if places[b] < lengths[b]:
                close(out[b, 0], full[b, places[b]], scale=4)
        places += 1
    np.testing.assert_array_equal(cache.keys[1, 3:], junk.keys[1, 3:])


# Rotary positions


def rotate_by_complex(x, theta) -> np.ndarray:
    """Pair i, (x[i], x[i + d/2]), as one complex number turned by theta[i]."""
    x, half = np.asarray(x, np.float64), x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * np.asarray(theta, np.float64))[..., None, :]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def test_angles():
    positions = np.array([[0, 1], [7, 100]])
    expected = np.zeros((2, 2, 3))
    for (b, s), position in np.ndenumerate(positions):
        for i in range(3):
            expected[b, s, i] = position * 500.0 ** (-2 * i / 6)
    np.testing.assert_allclose(rope.angles(jnp.array(positions), 6, 500.0), expected, rtol=1e-6)


def test_rotate():
    x, theta = normal(2, 3, 4, 6), np.asarray(rope.angles(jnp.arange(6).reshape(2, 3), 6))
    close(rope.rotate(x, theta), rotate_by_complex(x, theta))
    close(rope.rotate(x, theta[0]), rotate_by_complex(x, np.stack([theta[0]] * 2)))
    assert rope.rotate(jnp.bfloat16(x), theta).dtype == jnp.bfloat16


def test_scores_depend_on_distance_alone():
    q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)

    def score(i, j):
        turned = [rope.rotate(x, rope.angles(jnp.array([[at]]), 8)) for x, at in ((q, i), (k, j))]
        return float(jnp.vdot(*turned))

    assert score(9, 4) == pytest.approx(score(5, 0), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(5, 1), abs=1e-2)


def test_grid_angles_split_the_head_over_time_height_and_width():
    assert rope.axis_dims(128) == (44, 42, 42) and rope.axis_dims(6) == (2, 2, 2) and rope.axis_dims(32) == (12, 10, 10)
    theta = np.asarray(rope.grid_angles((2, 3, 4), 128))
    assert theta.shape == (24, 64)
    row = 0
    for t in range(2):
        for h in range(3):
            for w in range(4):
                expected = []
                for place, dim in ((t, 44), (h, 42), (w, 42)):
                    expected += [place * 10_000.0 ** (-2 * i / dim) for i in range(dim // 2)]
                np.testing.assert_allclose(theta[row], expected, rtol=1e-5)
                row += 1


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
