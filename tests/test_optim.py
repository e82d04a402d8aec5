"""Optimizers: schedules, AdamW and Muon against their formulas, and which leaf gets which rule."""

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec
from tiny import normal

from g4v_jax import trees
from g4v_jax.errors import UserError
from g4v_jax.sharding import make_mesh
from g4v_jax.train.optim import Optimizer

PEAK, WARMUP, TOTAL = 0.1, 4, 24


def weights() -> dict:
    """A layer's kernels, stacked twice, and leaves of every other kind."""
    return {
        "llm": {
            "layers": {
                "attention": {
                    "q": {"kernel": normal(2, 6, 2, 3), "lora_a": normal(2, 6, 2)},
                    "o": {"kernel": normal(2, 2, 3, 6, seed=1)},
                },
                "mlp": {"up": {"kernel": normal(2, 6, 8), "bias": normal(2, 8)}},
                "norm": {"scale": normal(2, 6)},
            },
            "embedding": {"table": normal(9, 6)},
            "head": {"kernel": normal(6, 9)},
        },
        "autoencoder": {"latent_mean": normal(4), "latent_square": normal(4, seed=1)},
    }


IN_LAYERS = {f"llm/layers/{name}/kernel" for name in ("attention/q", "attention/o", "mlp/up")}
KERNELS = IN_LAYERS | {"llm/head/kernel"}
STATISTICS = {"autoencoder/latent_mean", "autoencoder/latent_square"}


def updates_of(optimizer: Optimizer, gradients: list[dict]) -> list[dict]:
    """Flat updates of `weights()`, which stay as they are, under gradients given one after another."""
    built, params = optimizer.build(TOTAL), weights()
    state, update, updates = built.init(params), tiny.jit(built.update), []
    for gradient in gradients:
        new, state = update(gradient, state, params)
        updates.append(trees.flatten(jax.device_get(new)))
    return updates


def random_gradients(seed: int, scale: float = 1.0) -> dict:
    paths = trees.flatten(weights())
    return trees.unflatten({path: scale * normal(*leaf.shape, seed=seed) for path, leaf in paths.items()})


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules(schedule):
    rate = Optimizer(schedule=schedule, warmup_steps=WARMUP, final=0.2).rate(PEAK, TOTAL)
    for step in range(WARMUP):
        assert float(rate(step)) == pytest.approx(PEAK * (1 + step * 3 / 4) / 4)  # from a quarter of the peak
    half = (TOTAL + WARMUP) // 2
    expected = {"constant": (PEAK, PEAK), "linear": (0.6 * PEAK, 0.2 * PEAK), "cosine": (0.6 * PEAK, 0.2 * PEAK)}
    assert (float(rate(half)), float(rate(TOTAL))) == pytest.approx(expected[schedule])
    assert float(rate(WARMUP)) == pytest.approx(PEAK)
    quarter = {"constant": 1, "linear": 0.8, "cosine": 0.2 + 0.8 * (1 + 0.5**0.5) / 2}
    assert float(rate(WARMUP + (TOTAL - WARMUP) // 4)) == pytest.approx(quarter[schedule] * PEAK)
    assert float(Optimizer(warmup_steps=0).rate(PEAK, TOTAL)(0)) == pytest.approx(PEAK)


def test_unknown_names_are_refused_with_the_nearest():
    for field, value, known in (("name", "adam", "adamw"), ("moments", "float16", "bfloat16"), ("schedule", "cosinus", "cosine")):
        with pytest.raises(UserError, match=f"optimizer.{field}: unknown '{value}'; did you mean '{known}'"):
            Optimizer(**{field: value})


def test_adamw_follows_its_formula_and_decays_kernels_alone():
    """Three steps in float64: gradients clipped together, without the statistics, which only follow their average."""
    optimizer = Optimizer(learning_rate=PEAK, warmup_steps=WARMUP, weight_decay=0.3, clip_norm=2.0, statistic_rate=0.05)
    gradients = [random_gradients(1, 10.0), random_gradients(2, 0.01), random_gradients(3, 1.0)]
    updates = updates_of(optimizer, gradients)
    first, second = {}, {}
    for step, (gradient, update) in enumerate(zip(gradients, updates)):
        gradient = trees.flatten(jax.tree.map(np.float64, gradient))
        norm = np.sqrt(sum(np.sum(g**2) for path, g in gradient.items() if path not in STATISTICS))
        assert (norm > 2.0) == (step != 1)  # the second is not clipped
        rate = PEAK * (1 + step * 3 / 4) / 4
        for path, param in trees.flatten(weights()).items():
            if path in STATISTICS:
                expected = -0.05 * gradient[path]
            else:
                g = gradient[path] * min(1.0, 2.0 / norm)
                first[path] = 0.9 * first.get(path, 0.0) + 0.1 * g
                second[path] = 0.95 * second.get(path, 0.0) + 0.05 * g**2
                direction = first[path] / (1 - 0.9 ** (step + 1))
                direction = direction / (np.sqrt(second[path] / (1 - 0.95 ** (step + 1))) + 1e-8)
                expected = -rate * (direction + (0.3 * param if path in KERNELS else 0.0))
            np.testing.assert_allclose(update[path], expected, atol=2e-6, rtol=1e-5, err_msg=path)


def test_adafactor_steps_by_its_rate_and_keeps_rows_and_columns():
    optimizer = Optimizer(name="adafactor", learning_rate=PEAK, warmup_steps=0, clip_norm=1e9)
    update = updates_of(optimizer, [random_gradients(1)])[0]
    for path, gradient in trees.flatten(random_gradients(1)).items():
        if path not in STATISTICS:  # the first second moment is the gradient's own square
            np.testing.assert_allclose(update[path], -PEAK * np.sign(gradient), rtol=1e-3, err_msg=path)
    kernel = {"llm": {"layers": {"mlp": {"up": {"kernel": normal(3, 256, 512)}}}}}
    held = sum(leaf.size for leaf in jax.tree.leaves(optimizer.build(TOTAL).init(kernel)))
    assert held < 3 * (256 + 512) + 20


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_moments_in_bfloat16_take_half_the_memory_and_nearly_the_same_steps(name):
    gradients = [random_gradients(seed) for seed in range(8)]
    whole, half = (Optimizer(name=name, learning_rate=PEAK, warmup_steps=0, moments=kind) for kind in ("float32", "bfloat16"))
    for one, other in zip(updates_of(whole, gradients), updates_of(half, gradients)):
        for path in one:
            error = np.linalg.norm(one[path] - other[path]) / np.linalg.norm(one[path])
            assert error < (0.05 if path not in IN_LAYERS or name != "muon" else 0.1), path
    sizes = [sum(x.nbytes for x in jax.tree.leaves(one.build(TOTAL).init(weights())) if x.ndim) for one in (whole, half)]
    assert sizes[1] * 2 == sizes[0] > 0


def test_bfloat16_does_not_resolve_slow_averages():
    with pytest.raises(UserError, match="bfloat16 cannot follow b2 = 0.999; set optimizer.b2 to 0.99 or less"):
        Optimizer(moments="bfloat16", b2=0.999)


def test_muon_makes_the_updates_of_layer_kernels_orthogonal_and_leaves_the_rest_to_adamw():
    options = dict(learning_rate=PEAK, muon_learning_rate=PEAK, warmup_steps=0, schedule="constant")
    muon = updates_of(Optimizer(name="muon", **options), [random_gradients(1)])[0]
    adamw = updates_of(Optimizer(**options), [random_gradients(1)])[0]
    for path in muon.keys() - IN_LAYERS:
        np.testing.assert_allclose(muon[path], adamw[path], atol=1e-6, err_msg=path)
    gradients = trees.flatten(random_gradients(1))
    for path in IN_LAYERS:
        for gradient, layer in zip(gradients[path], muon[path]):  # as matrices, each takes 6 numbers in
            before, after = (np.linalg.svd(x.reshape(6, -1), compute_uv=False) for x in (gradient, layer))
            assert after.max() < 2 * after.min() and before.max() > 2 * before.min(), path


def test_muons_work_is_shared_by_the_devices_that_split_the_weights():
    """Of every kind of kernel, 8 devices together do at most 2 % more than one alone."""
    dim = 32
    shapes = {"attention/q": (2, dim, 4, 8), "attention/o": (2, 4, 8, dim), "mlp/up": (2, dim, 48), "mlp/down": (2, 48, dim)}
    split = {name: [None if axis == 0 or size != dim else "fsdp" for axis, size in enumerate(shape)] for name, shape in shapes.items()}
    optimizer = Optimizer(name="muon").build(TOTAL)

    def arithmetic(name: str, devices: int) -> float:
        mesh = make_mesh({"fsdp": -1}, jax.devices()[:devices])

        def placed(shape):
            spec = PartitionSpec(*split[name]) if shape.shape == shapes[name] else PartitionSpec()
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec))

        params = trees.unflatten({f"llm/layers/{name}/kernel": jax.ShapeDtypeStruct(shapes[name], np.float32)})
        params, state = (jax.tree.map(placed, tree) for tree in (params, jax.eval_shape(optimizer.init, params)))
        update = jax.jit(lambda *given: optimizer.update(*given)[0], out_shardings=jax.tree.map(lambda leaf: leaf.sharding, params))
        return update.lower(params, state, params).compile().cost_analysis()["flops"]

    for name in shapes:
        assert 8 * arithmetic(name, 8) <= 1.02 * arithmetic(name, 1), name


def test_muon_treats_each_layer_alone():
    one, other = random_gradients(1), random_gradients(1)
    for path, leaf in trees.flatten(other).items():
        if path in IN_LAYERS:
            leaf[1] = normal(*leaf[1].shape, seed=9)
    options = Optimizer(name="muon", warmup_steps=0, clip_norm=1e6)
    a, b = (updates_of(options, [gradients])[0] for gradients in (one, other))
    for path in IN_LAYERS:
        np.testing.assert_allclose(a[path][0], b[path][0], atol=1e-6)
        assert np.abs(a[path][1] - b[path][1]).max() > 1e-3


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_without_a_gradient_kernels_decay_and_nothing_else_moves(name):
    optimizer = Optimizer(name=name, learning_rate=PEAK, muon_learning_rate=PEAK, warmup_steps=0, weight_decay=0.5)
    update = updates_of(optimizer, [jax.tree.map(np.zeros_like, weights())])[0]
    for path, param in trees.flatten(weights()).items():
        expected = -PEAK * 0.5 * param if path in KERNELS else np.zeros_like(param)
        np.testing.assert_allclose(update[path], expected, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_a_multiplier_scales_all_learned_updates_of_its_tower(name):
    options = dict(name=name, learning_rate=PEAK, muon_learning_rate=PEAK, warmup_steps=0, weight_decay=0.5)
    plain = updates_of(Optimizer(**options), [random_gradients(1)])[0]
    scaled = updates_of(Optimizer(**options, multipliers={"llm": 3.0, "autoencoder": 2.0}), [random_gradients(1)])[0]
    for path in plain:
        factor = 1.0 if path in STATISTICS else 3.0
        np.testing.assert_allclose(scaled[path], factor * plain[path], rtol=1e-5, err_msg=path)


def test_adamw_takes_the_matrices_of_its_towers():
    options = dict(learning_rate=PEAK, muon_learning_rate=3 * PEAK, warmup_steps=0)
    adamw, muon, both = (
        updates_of(Optimizer(name=name, adamw_towers=towers, **options), [random_gradients(1)])[0]
        for name, towers in (("adamw", ()), ("muon", ()), ("muon", ("llm",)))
    )
    matrices = {path for path in muon if not np.array_equal(muon[path], adamw[path])}
    assert matrices and any(path.startswith("llm/") for path in matrices)
    for path in both:
        expected = adamw if path.startswith("llm/") else muon
        np.testing.assert_allclose(both[path], expected[path], rtol=1e-5, err_msg=path)


def test_a_multiplier_of_no_tower_or_no_factor_is_named():
    with pytest.raises(UserError, match="optimizer.multipliers: no trainable tower 'lm'; did you mean 'llm'"):
        Optimizer(multipliers={"lm": 2.0}).build(TOTAL).init(weights())
    for factor in (0.0, -1.0, "2", True):
        with pytest.raises(UserError, match="optimizer.multipliers.llm is .*; expected a factor above 0"):
            Optimizer(multipliers={"llm": factor})
