"""The train step: one program for every mixture, exact accumulation, packing that changes nothing, and learning."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import normal

from g4v_jax import trees
from g4v_jax.build import Build
from g4v_jax.errors import UserError
from g4v_jax.losses.captioning import head_losses, in_chunks, token_losses, weighted
from g4v_jax.losses.reconstruction import Reconstruction, ReconstructionSpec
from g4v_jax.losses.safety import detection, detection_count
from g4v_jax.train.optim import Optimizer
from g4v_jax.train.step import StepSpec, make_gradient_cosines
from g4v_jax.types import Term

MIXES = [mix for size in range(4) for mix in itertools.combinations(tiny.TASKS, size)]
STEPS = 60


# One program


@pytest.fixture(scope="module")
def build() -> Build:
    return tiny.build(8)


@pytest.fixture(scope="module")
def step(build):
    """Compiled once for the tests that follow, whatever their batches hold."""
    return tiny.step(build, build.optimizer, build.step)


@pytest.fixture(scope="module")
def trained(build, step):
    """(states before and after, frozen before and after, metrics of every step) of many steps on one batch."""
    with jax.set_mesh(build.mesh):
        state, frozen = tiny.state(build, build.optimizer)
        before, still = jax.device_get((state, frozen))
        batch = tiny.put(tiny.batch(1, build.shape), build)
        history = []
        for _ in range(STEPS):
            state, metrics = step(state, frozen, batch)
            history.append(metrics)
        after, frozen = jax.device_get((state, frozen))
    return before, after, still, frozen, jax.device_get(history)


def test_every_mixture_of_tasks_runs_in_one_program(build, step):
    state, frozen = tiny.state(build, build.optimizer)
    for mix in MIXES:
        batch = tiny.batch(3, build.shape, mix)  # with every kind of example in it
        with jax.set_mesh(build.mesh):
            state, metrics = step(state, frozen, tiny.put(batch, build))
        metrics = jax.device_get(metrics)
        assert all(np.isfinite(value) for value in metrics.values()), mix
        for term, task in tiny.TERMS.items():
            assert (metrics[f"loss/{term}"] > 0) if task in mix else (metrics[f"loss/{term}"] == 0), (mix, term)
        renders = "generate" in mix or "safety" in mix
        reached = {tower: metrics[f"gradient/{tower}"] > 0 for tower in ("llm", "vision", "denoiser", "hazard")}
        watches = "caption" in mix or "safety" in mix
        assert reached == {"llm": bool(mix), "vision": watches, "denoiser": renders, "hazard": "safety" in mix}, mix
        assert metrics["work/tokens"] == (batch.segments > 0).sum()
        assert metrics["work/padding"] == pytest.approx((batch.segments == 0).mean())
        assert metrics["work/clips"] == batch.clip_mask.sum() and metrics["work/targets"] == batch.gen_mask.sum()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state)))
    assert int(state.step) == len(MIXES) == 8
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    "term, factor", [("caption", 50), ("refusal", 50), ("hazard", 10), ("generation", 1.6), ("blocked", 1.6)]
)
def test_each_loss_falls_on_one_batch(trained, term, factor):
    history = [metrics[f"loss/{term}"] for metrics in trained[-1]]
    first, last = np.mean(history[:3]), np.mean(history[-10:])
    assert last * factor < first, f"{first:.3f} -> {last:.3f}"


def test_what_is_frozen_stays_and_what_is_not_moves(build, trained):
    before, after, still, frozen, history = trained
    towers = {path.split("/")[0] for path in trees.flatten(build.blueprint.shapes)}
    assert set(frozen) == {"autoencoder"} and set(after.trainable) == towers - {"autoencoder"}
    measured = {name.removeprefix("gradient/") for name in history[0] if name.startswith("gradient/")}
    assert measured == set(after.trainable)
    jax.tree.map(np.testing.assert_array_equal, frozen, still)
    for path, leaf in trees.flatten(after.trainable).items():
        assert (leaf != trees.flatten(before.trainable)[path]).any(), path
    assert int(after.step) == STEPS


def test_the_average_follows_the_trainable_leaves(build, step):
    state, frozen = tiny.state(build, build.optimizer)
    batch = tiny.put(tiny.batch(3, build.shape), build)
    averages = jax.tree.map(np.float64, jax.device_get(state.ema))
    assert set(averages) == {"denoiser", "queries"}
    for _ in range(3):
        with jax.set_mesh(build.mesh):
            state, _ = step(state, frozen, batch)
        now = trees.flatten(jax.device_get(state.trainable))
        averages = trees.unflatten({path: 0.9 * old + 0.1 * now[path] for path, old in trees.flatten(averages).items()})
        tiny.assert_close(state.ema, averages)


@pytest.mark.parametrize("field", ["trainable", "ema"])
def test_a_pattern_that_matches_nothing_is_named(field):
    config = tiny.config(**{field: ("denoiser/.*", "llmm/.*")})
    with pytest.raises(UserError, match=f"{field}: pattern 'llmm/.*' matches no parameter; did you mean 'llm'"):
        Build(config).blueprint.trainable


def test_the_average_of_what_is_frozen_is_refused():
    config = tiny.config(trainable=("llm/.*",), ema=("denoiser/.*",))
    with pytest.raises(UserError, match="ema: pattern 'denoiser/.*' matches no parameter"):
        Build(config).blueprint.ema


# Accumulation and packing, on one device


def test_micro_batches_change_neither_losses_nor_gradients():
    build = tiny.build()
    batch = tiny.batch(9, build.shape)
    counts = {  # of each of four micro-batches: a mean of their means would be another number
        "caption": batch.caption_weight.sum(1).reshape(2, 4).sum(0),
        "refusal": batch.refusal_weight.sum(1).reshape(2, 4).sum(0),
        "generation": (batch.gen_mask & ~batch.gen_blocked).sum(1).reshape(2, 4).sum(0),
    }
    assert all(len(set(count.tolist())) > 1 for count in counts.values()), counts
    results = []
    for pieces in (1, 4):
        step = tiny.step(build, tiny.keep_gradients(), StepSpec(micro_batches=pieces))
        with jax.set_mesh(build.mesh):
            state, metrics = step(*tiny.state(build, tiny.keep_gradients()), tiny.put(batch, build))
        results.append(jax.device_get((state.opt_state, metrics)))
    (gradients, metrics), (accumulated, again) = results
    assert all(leaf.any() for leaf in jax.tree.leaves(gradients))
    tiny.assert_close(accumulated, gradients, tolerance=4e-6)
    for name, value in metrics.items():
        assert again[name] == pytest.approx(value, rel=1e-6), name
        assert value > 0, name


@pytest.fixture(scope="module")
def forward():
    """(terms, outputs) of a batch and draws, jitted."""
    build = tiny.build()

    @tiny.jit
    def run(params, batch, draws):
        terms = build.objective.terms(params, batch, draws, jax.random.key(0))
        return terms, build.model.apply({"params": params}, batch, draws)

    def call(batch, draws):
        with jax.set_mesh(build.mesh):
            return jax.device_get(run(tiny.params(), batch, draws))

    return call


@pytest.fixture(scope="module")
def packed():
    """(examples by row, batch, draws): several examples a row."""
    shape = tiny.build().shape
    rows = tiny.examples(5, shape)
    draws = tiny.build().objective.draw(jax.random.split(jax.random.key(5), shape.rows))
    return rows, tiny.pack(rows, shape), jax.device_get(draws)


def test_packing_changes_nothing(forward, packed):
    """One example a row, each with the draws of its slots, must give the same outputs and losses."""
    rows, batch, draws = packed
    shape = tiny.build().shape
    examples = [(row, one) for row, many in enumerate(rows) for one in many]
    assert len(examples) > 1.5 * shape.rows
    apart = tiny.pack([[one] for _, one in examples], dataclasses.replace(shape, rows=len(examples)))
    moved = jax.tree.map(lambda x: np.zeros((len(examples), *x.shape[1:]), x.dtype), draws)
    slots, next_slot = [], [0] * shape.rows
    for number, (row, one) in enumerate(examples):
        for g in range(len(one["gen_targets"])):
            slots.append((row, next_slot[row], number, g))
            for there, here in zip(jax.tree.leaves(moved), jax.tree.leaves(draws)):
                there[number, g] = here[row, next_slot[row]]
            next_slot[row] += 1

    terms, out = forward(batch, draws)
    terms_apart, out_apart = forward(apart, moved)
    for name, term in terms.items():
        assert term.count == terms_apart[name].count > 0, name
        assert term.sum == pytest.approx(terms_apart[name].sum, rel=1e-5), name
    start = {row: 0 for row in range(shape.rows)}
    for number, (row, one) in enumerate(examples):
        place = slice(start[row], start[row] + len(one["tokens"]))
        np.testing.assert_allclose(out.hidden[row, place], out_apart.hidden[number, : len(one["tokens"])], atol=1e-4)
        start[row] = place.stop
    for row, g, number, h in slots:
        np.testing.assert_allclose(out.velocity[row, g], out_apart.velocity[number, h], atol=1e-4)


def test_a_neighbour_changes_nothing(forward, packed):
    """Another first example in a row, with other words, clips and targets: the examples behind it stay as they are."""
    rows, batch, draws = packed
    shape = tiny.build().shape
    row = next(i for i, many in enumerate(rows) if len(many[0]["gen_targets"]) == 1 and batch.gen_mask[i].sum() == 2)
    first = dict(rows[row][0])
    first["tokens"] = (first["tokens"] + 100) % 264
    first["clips"], first["gen_targets"] = 255 - first["clips"], 255 - first["gen_targets"]
    changed = tiny.pack([*rows[:row], [first, *rows[row][1:]], *rows[row + 1 :]], shape)
    _, before = forward(batch, draws)
    _, after = forward(changed, draws)
    length = len(first["tokens"])
    assert (np.abs(after.hidden[row, :length] - before.hidden[row, :length]).max(axis=-1) > 1e-3).all()
    assert np.abs(after.velocity[row, 0] - before.velocity[row, 0]).max() > 1e-3
    np.testing.assert_allclose(after.hidden[row, length:], before.hidden[row, length:], atol=1e-6)
    np.testing.assert_allclose(after.velocity[row, 1], before.velocity[row, 1], atol=1e-6)
    others = np.arange(shape.rows) != row
    np.testing.assert_allclose(after.hidden[others], before.hidden[others], atol=1e-6)


# The terms


def test_cross_entropy_counts_weighted_targets():
    logits, targets = normal(2, 3, 5) * 4, np.array([[0, 4, 2], [1, 1, 3]])
    weights = np.array([[1, 0, 0.5], [0, 0, 2]], np.float32)
    expected = 0.0
    for b, s in np.ndindex(2, 3):
        row = np.float64(logits[b, s])
        expected -= weights[b, s] * np.log(np.exp(row[targets[b, s]]) / np.exp(row).sum())
    term = weighted(token_losses(logits, targets), weights)
    assert float(term.sum) == pytest.approx(expected, rel=1e-5) and float(term.count) == 3.5


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_token_losses_gradient_is_softmax_less_the_target(cpus):
    logits, targets = normal(2, 3, 5) * 4, np.array([[0, 4, 2], [1, 1, 3]])
    weights = np.array([[1, 0, 0.5], [0, 0, 2]], np.float32)
    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices()[:cpus]), ("fsdp",))):
        losses, back = jax.vjp(token_losses, jnp.asarray(logits), jnp.asarray(targets))
        found = back(jnp.asarray(weights))[0]
    softmax = np.exp(np.float64(logits)) / np.exp(np.float64(logits)).sum(-1, keepdims=True)
    np.testing.assert_allclose(losses, -np.log(np.take_along_axis(softmax, targets[..., None], -1)[..., 0]), rtol=1e-5)
    np.testing.assert_allclose(found, weights[..., None] * (softmax - np.eye(5)[targets]), rtol=1e-5, atol=1e-6)


def test_scoring_in_chunks_changes_neither_losses_nor_gradients_but_what_is_held():
    states, table, targets = normal(2, 12, 8), normal(8, 50), np.arange(24).reshape(2, 12)

    def loss(states, table, chunks):
        return jnp.sum(in_chunks(lambda t, x: token_losses(x @ table, t), chunks, targets, states) ** 2)

    whole = jax.value_and_grad(loss, argnums=(0, 1))(states, table, 1)
    for chunks in (3, 12):
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(jax.value_and_grad(loss, argnums=(0, 1))(states, table, chunks))):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        text = str(jax.make_jaxpr(jax.grad(loss, argnums=1), static_argnums=2)(states, table, chunks))
        assert "f32[2,12,50]" not in text and f"f32[2,{12 // chunks},50]" in text
    with pytest.raises(ValueError, match="12 places do not divide into 5 chunks"):
        loss(states, table, 5)


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_heads_losses_are_of_its_scores_however_wide_and_a_frozen_one_keeps_no_scores(cpus):
    states, table, targets = normal(2, 6, 8), normal(8, 1031), np.arange(12).reshape(2, 6) * 90  # an odd width, cut in halves

    def loss(states, table, chunks):
        return jnp.sum(in_chunks(lambda t, x: head_losses(lambda w, x: x @ w, table, x, t), chunks, targets, states) ** 2)

    def plain(states, table):
        scores = states @ table
        return jnp.sum((jax.nn.logsumexp(scores, -1) - jnp.take_along_axis(scores, targets[..., None], -1)[..., 0]) ** 2)

    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices()[:cpus]), ("fsdp",))):
        expected = jax.value_and_grad(plain, argnums=(0, 1))(states, table)
        for chunks in (1, 3):
            found = jax.value_and_grad(loss, argnums=(0, 1))(states, table, chunks)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
                np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
            for argument, products in ((0, 2), ((0, 1), 3 if chunks == 1 else 4)):  # in chunks scores are made again
                text = str(jax.make_jaxpr(jax.grad(loss, argnums=argument), static_argnums=2)(states, table, chunks))
                assert text.count("dot_general[") == products


@pytest.mark.parametrize("positive_weight", [1.0, 3.0])
def test_detection_weighs_hazards_and_leaves_empty_slots_out(positive_weight):
    logits, labels = normal(2, 3) * 5, np.array([[0, 1, -1], [1, -1, -1]])
    expected = count = 0.0
    for index in np.ndindex(2, 3):
        if labels[index] >= 0:
            probability = 1 / (1 + np.exp(-np.float64(logits[index])))
            weight = positive_weight if labels[index] else 1.0
            expected -= weight * np.log(probability if labels[index] else 1 - probability)
            count += weight
    term = detection(logits, labels, positive_weight)
    assert float(term.sum) == pytest.approx(expected, rel=1e-5)
    assert float(term.count) == float(detection_count(labels, positive_weight)) == count
    assert np.isfinite(detection(np.full((1, 2), 1e4, np.float32), np.array([[0, 1]]), 1.0).sum)


def test_counts_are_those_of_the_terms(forward, packed):
    _, batch, draws = packed
    terms, _ = forward(batch, draws)
    counts = tiny.build().objective.counts(batch)
    assert {name: float(count) for name, count in counts.items()} == {n: float(t.count) for n, t in terms.items()}


# Gradient cosines


class Towards:
    """Terms whose gradients are known: a, its double, its opposite, one at a right angle to it, and nothing."""

    directions = {"a": (3, 4), "double": (6, 8), "opposite": (-3, -4), "across": (-4, 3), "nothing": (0, 0)}
    weights = dict.fromkeys(directions, 1.0)

    def draw(self, row_keys):
        return row_keys

    def terms(self, params, batch, draws, dropout):
        return {n: Term(jnp.dot(params["w"], jnp.array(d, jnp.float32)), 1.0) for n, d in self.directions.items()}


def test_gradient_cosines():
    build = tiny.build()
    state, _ = tiny.state(build, tiny.keep_gradients())
    state = state.replace(trainable={"w": jnp.ones(2)})
    cosines = jax.device_get(jax.jit(make_gradient_cosines(Towards(), 0))(state, {}, tiny.batch(0, build.shape)))
    assert len(cosines) == 10
    expected = {"a·double": 1, "a·opposite": -1, "double·opposite": -1, "a·across": 0, "across·double": 0}
    expected |= {f"{name}·nothing": 0 for name in ("a", "across", "double")}
    for pair, value in expected.items():
        assert cosines[f"cosine/{pair}"] == pytest.approx(value, abs=1e-6), pair
    assert all(-1.000001 <= value <= 1.000001 for value in cosines.values())


# The autoencoder's stage


def test_reconstruction_and_its_moving_statistics():
    """Terms against loops; and one step moves each statistic toward that of the batch's latents by the stated rate."""
    build = tiny.build()
    spec = ReconstructionSpec(saturated_weight=2.0, latent_noise=0.1)
    objective = Reconstruction(build.model.autoencoder, spec, build.latents)
    batch = tiny.batch(6, build.shape)
    used = np.argwhere(batch.gen_mask)
    assert 0 < len(used) < batch.gen_mask.size
    params = {"autoencoder": tiny.params()["autoencoder"]}
    draws = objective.draw(jax.random.split(jax.random.key(6), build.shape.rows))

    def loss(params):
        terms = objective.terms(params, batch, draws, None)
        return sum(objective.weights[name] * term.sum / term.count for name, term in terms.items()), terms

    def reconstructed(video, noise):
        return build.model.autoencoder.apply({"params": params["autoencoder"]}, video, noise, 0.1)

    @tiny.jit
    def one_step(params):
        gradients, terms = jax.grad(loss, has_aux=True)(params)
        optimizer = Optimizer().build(10)
        return optimizer.update(gradients, optimizer.init(params), params)[0], terms

    with jax.set_mesh(build.mesh):
        updates, terms = jax.device_get(one_step(params))
        one = tiny.jit(reconstructed)
        outs = [one(batch.gen_targets[b, g][None], draws[b, :, g][:, None]) for b, g in used]
    errors, kls, means = [], [], []
    for (b, g), out in zip(used, jax.device_get(outs)):
        pixels = batch.gen_targets[b, g].astype(np.float64) / 127.5 - 1
        error = np.abs(out.video[0] - pixels)
        saturated = pixels.max(-1, keepdims=True) - pixels.min(-1, keepdims=True) > 0.6
        errors.append(np.mean((error + error**2 / 2) * np.where(saturated, 3.0, 1.0)))
        mean, log_variance = np.float64(out.mean[0]), np.float64(out.log_variance[0])
        kls.append(np.mean((mean**2 + np.exp(log_variance) - 1 - log_variance) / 2))
        means.append(mean)
    assert terms["reconstruction"].sum == pytest.approx(sum(errors), rel=1e-4)
    assert terms["kl"].sum == pytest.approx(sum(kls), rel=1e-4)
    assert all(term.count == len(used) for term in terms.values())

    updates, old = updates["autoencoder"], jax.tree.map(np.float64, params["autoencoder"])
    mean = np.mean(means, axis=(0, 1, 2, 3))
    square = np.mean(np.square(means), axis=(0, 1, 2, 3))
    np.testing.assert_allclose(updates["latent_mean"], 0.02 * (mean - old["latent_mean"]), atol=1e-6)
    np.testing.assert_allclose(updates["latent_square"], 0.02 * (square - old["latent_square"]), atol=1e-5)
