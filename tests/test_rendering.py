"""The warm start of the generator: its conditions are made of words alone, and it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from g4v_jax.build import Build
from g4v_jax.errors import UserError

TRAINED = ("denoiser/.*", "conditioner/.*", "queries")


def make(**changes) -> Build:
    losses = {"noises": 2, "drop_rate": 0.3}
    config = tiny.config(objective="rendering", losses=losses, trainable=TRAINED, ema=(), **changes)
    return Build(config, tuple(jax.devices()[:1]))


@pytest.fixture(scope="module")
def build() -> Build:
    return make()


@pytest.fixture(scope="module")
def batch(build):
    return tiny.batch(5, build.shape)


def test_nothing_of_the_llm_but_its_words_is_held(build):
    assert set(build.blueprint.shapes) == {"llm", "conditioner", "autoencoder", "denoiser", "queries"}
    assert set(build.blueprint.shapes["llm"]) == {"embedding"}


def test_conditions_are_the_words_of_the_caption_and_no_states(build, batch):
    """Slot by slot, from the table: the window before the queries where it is of the same example, and the queries."""
    params, model = tiny.params(), build.model
    draws = build.objective.draw(jax.random.split(jax.random.key(5), build.shape.rows))
    table, window, count = params["llm"]["embedding"]["table"], model.caption_window, model.num_queries
    condition = tiny.jit(lambda s, d, b: model.conditioner.apply({"params": params["conditioner"]}, s, d, b))
    encode = tiny.jit(lambda v: model.autoencoder.apply({"params": params["autoencoder"]}, v, method="encode_normalised"))
    denoise = tiny.jit(lambda *inputs: model.denoiser.apply({"params": params["denoiser"]}, *inputs))
    used = {name: params[name] for name in build.blueprint.shapes}
    with jax.set_mesh(build.mesh):
        out = tiny.jit(lambda p, *a: model.apply({"params": p}, *a, method="generate_from_words"))(used, batch, draws)
        velocity, target = jax.device_get(out)
        terms = tiny.jit(build.objective.terms)(used, batch, draws, None)
        for b, g in np.argwhere(batch.gen_mask)[:6]:
            first = int(np.argmax(batch.query_index[b] == g * count))
            words = np.zeros((1, window + count, 2, table.shape[1]), np.float32)
            for place in range(window):
                at = first - window + place
                if at >= 0 and batch.segments[b, at] == batch.segments[b, first]:
                    words[0, place, 0] = 0 if batch.clip_index[b, at] >= 0 else table[batch.tokens[b, at]]
            words[0, window:, 0] = params["queries"]
            flags = [np.asarray(x)[b : b + 1, g] for x in (draws.drop, batch.gen_blocked & draws.gate)]
            context = condition(words, *flags)
            x0 = encode(batch.gen_targets[b, g][None])
            for k in range(2):
                noise, t = np.asarray(draws.noise)[b, g, k][None], np.asarray(draws.times)[b, g, k][None]
                expected = denoise((1 - t) * x0 + t * noise, t, context)
                np.testing.assert_allclose(velocity[b, g, k], expected[0], atol=2e-5)
                np.testing.assert_allclose(target[b, g, k], (noise - x0)[0], atol=1e-5)
    errors = np.mean(np.square(np.float64(velocity) - target), axis=(2, 3, 4, 5, 6))
    for name, mask in (("generation", ~batch.gen_blocked), ("blocked", batch.gen_blocked)):
        chosen = batch.gen_mask & mask
        assert float(terms[name].sum) == pytest.approx(errors[chosen].sum(), rel=1e-4)
        assert float(terms[name].count) == chosen.sum() == float(build.objective.counts(batch)[name])


def test_it_learns(build, batch):
    draws = build.objective.draw(jax.random.split(jax.random.key(5), build.shape.rows))
    with jax.set_mesh(build.mesh):
        params = {name: tiny.params()[name] for name in build.blueprint.shapes}

        def loss(trained):
            term = build.objective.terms(params | trained, batch, draws, None)["generation"]
            return term.sum / term.count

        step = tiny.jit(jax.value_and_grad(loss))
        trained, history = {name: params[name] for name in ("conditioner", "denoiser", "queries")}, []
        for _ in range(30):
            value, gradient = step(trained)
            history.append(float(value))
            trained = jax.tree.map(lambda x, g: x - 0.005 * jnp.sign(g), trained, gradient)
    assert history[-1] < 0.8 * history[0]


def test_it_needs_something_to_render():
    with pytest.raises(UserError, match="rows.targets is 0; objective 'rendering' needs 1"):
        make(rows__targets=0).objective  # noqa: B018
