"""Attention and rotary positions against loops in float64, and what they promise beyond values: parts, caches, packed rows."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from modules import apply, close, double, init
from tiny import normal

from g4v_jax.nn import rope
from g4v_jax.nn.attention import SHORTEST, Attention, Cache, attend, plain
from g4v_jax.nn.kernels import Packed
from g4v_jax.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("one_device")


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
    keys = keys_by_part(q, k, v, mask)
    assert len(keys) == 3 and sorted(keys) == keys and keys[0] < keys[-1] == length  # few scores are in vain


def keys_by_part(*args) -> list[int]:
    traced = jax.make_jaxpr(lambda *x: attend(*x, axes=("rows", "sequence", "heads", "kv_heads")))(*args)
    return [eqn.outvars[0].aval.shape[-1] for eqn in traced.eqns if eqn.primitive.name == "exp"]


@pytest.mark.parametrize("axis, parts", [("fsdp", 3), ("tensor", 3), ("context", 1)])
def test_on_several_cpus_queries_are_cut_unless_they_lie_over_devices(axis, parts):
    length = 3 * SHORTEST
    x = normal(2, length, 4, 8)
    with jax.set_mesh(make_mesh({axis: 8})):
        assert len(keys_by_part(x, x, x, Packed(np.ones((2, length), int)))) == parts


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
