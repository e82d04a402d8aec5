"""The whole model: how the towers meet, position by position."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny

from g4v_jax.models.autoencoder_wan import WanAutoencoder
from g4v_jax.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def whole(model):
    """(batch, draws, what the model makes of them and of the parts on the way), all in numpy."""
    build = tiny.build()
    shape = build.shape
    batch = tiny.batch(0, shape)
    objective = replace(build.objective, spec=replace(build.objective.spec, noises=2))
    draws = objective.draw(jax.random.split(jax.random.key(5), shape.rows))

    def everything(m, batch, draws):
        reading = m.read(batch)
        clips, times = (x.reshape(-1, *x.shape[2:]) for x in (batch.clips, batch.clip_times))
        watched = m.watch(clips, times)
        states = m.query_states(reading, batch)
        return m(batch, draws), dict(inputs=reading.inputs, hidden=reading.hidden, watched=watched, states=states)

    with jax.set_mesh(build.mesh):
        out = tiny.jit(lambda p: model.apply({"params": p}, batch, draws, method=everything))(tiny.params())
    return jax.device_get((batch, draws, *out))


def test_a_row_holds_words_and_its_own_clips_and_queries(whole):
    batch, _, _, parts = whole
    table, queries = tiny.params()["llm"]["embedding"]["table"], tiny.params()["queries"]
    watched = parts["watched"].reshape(8, 2, 3, 32)  # B K Q D
    assert (batch.clip_index >= 0).sum() > 12 and (batch.query_index >= 2).sum() > 2
    for (b, s), clip in np.ndenumerate(batch.clip_index):
        query = batch.query_index[b, s]
        if clip >= 0:
            expected = watched[b, clip // 3, clip % 3]
        else:
            expected = queries[query % 2] if query >= 0 else table[batch.tokens[b, s]]
        np.testing.assert_allclose(parts["inputs"][b, s], expected, atol=1e-6)


def test_states_are_read_where_the_batch_says(whole):
    """Inputs and states of a slot's queries and the tokens before them, as far as they are of the same example."""
    batch, _, out, parts = whole
    hazard, window, inside, outside = tiny.params()["hazard"], tiny.build().model.caption_window, 0, 0
    for b, g in np.argwhere(batch.gen_mask):
        (first,) = np.flatnonzero(batch.query_index[b] == 2 * g)
        assert parts["states"][b, g].shape == (window + 2, 2, 32)
        for m, state in enumerate(parts["states"][b, g]):
            position = first - window + m
            own = position >= 0 and batch.segments[b, position] == batch.segments[b, first]
            expected = [parts[name][b, position] if own else np.zeros(32) for name in ("inputs", "hidden")]
            np.testing.assert_array_equal(state, expected)
            inside, outside = inside + own, outside + (not own and position >= 0)
    assert inside > 50 and outside > 5
    for b, e in np.argwhere(batch.hazard_label >= 0):
        state = np.float64(parts["hidden"][b, batch.hazard_position[b, e]])
        expected = state @ hazard["kernel"][:, 0] + hazard["bias"][0]
        assert out.hazard_logits[b, e] == pytest.approx(expected, abs=1e-5)


def test_the_velocity_is_that_of_each_slots_own_condition(model, whole):
    """Slot by slot: the null context where dropped, the blocked one where blocked and gated, else the queries' own."""
    batch, draws, out, parts = whole
    params = tiny.params()
    no = np.zeros(1, bool)
    condition = tiny.jit(lambda s: model.conditioner.apply({"params": params["conditioner"]}, s, no, no))
    encode = tiny.jit(
        lambda v: model.autoencoder.apply({"params": params["autoencoder"]}, v, method="encode_normalised")
    )
    denoise = tiny.jit(lambda *inputs: model.denoiser.apply({"params": params["denoiser"]}, *inputs))
    seen = set()
    for b, g in np.argwhere(batch.gen_mask):
        kind = "blocked" if batch.gen_blocked[b, g] & draws.gate[b, g] else "null" if draws.drop[b, g] else "own"
        seen.add((kind, bool(batch.gen_blocked[b, g])))
        context = condition(parts["states"][b, g][None]) if kind == "own" else params["conditioner"][kind][None]
        x0 = encode(batch.gen_targets[b, g][None])
        for k in range(2):
            noise, t = draws.noise[b, g, k][None], draws.times[b, g, k][None]
            velocity = denoise((1 - t) * x0 + t * noise, t, context)
            np.testing.assert_allclose(out.velocity[b, g, k], velocity[0], atol=2e-5)
            np.testing.assert_allclose(out.velocity_target[b, g, k], (noise - x0)[0], atol=1e-5)
    assert seen == {("blocked", True), ("own", True), ("null", True), ("own", False), ("null", False)}


@pytest.fixture(scope="module")
def wan(model):
    """(encode, clips of two rows u8 [2 3 5 8 8 3], the latents that each gets alone) of a model with Wan's autoencoder."""
    statistics = dict(latent_mean=(0.1,) * 4, latent_std=(2.0,) * 4)
    wan = WanAutoencoder(4, dim=8, multipliers=(1, 1), num_blocks=1, time_downsample=(True,), **statistics)
    clips = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 8, 8, 3), dtype=np.uint8)
    params = wan.init(jax.random.key(0), clips[0], method="encode_normalised")["params"]
    given = {"params": {"autoencoder": params, "queries": tiny.params()["queries"]}}

    def encode(clips):
        return model.clone(autoencoder=wan).apply(given, clips, method="encode")

    alone = tiny.jit(lambda clip: wan.apply({"params": params}, clip, method="encode_normalised"))
    return encode, clips, np.concatenate([alone(row[i : i + 1]) for row in clips for i in range(3)])


def test_wans_autoencoder_takes_a_rows_clips_one_after_the_other(wan):
    """Each gets the latents that it gets alone, and no convolution sees more than one of a row's."""
    encode, clips, wanted = wan
    np.testing.assert_allclose(tiny.jit(encode)(clips), wanted, atol=1e-5)
    found = re.findall(r":f32\[(\d+),[\d,]*\] = conv_general_dilated\[", str(jax.make_jaxpr(encode)(clips)))
    assert set(map(int, found)) <= {2, 2 * 2, 2 * 4} and len(found) > 10  # two rows; where space is halved, times their frames


def test_wans_autoencoder_shares_a_clips_height_over_context(wan):
    """The same latents, for less than half of a clip's work on each of four devices: their rows of pixels and what borders on them."""
    encode, clips, wanted = wan

    def arithmetic(**mesh) -> float:
        """Of one device."""
        with jax.set_mesh(make_mesh(mesh, jax.devices()[:4])):
            program = jax.jit(encode).lower(clips).compile()
            np.testing.assert_allclose(program(clips), wanted, atol=1e-5)
        return program.cost_analysis()["flops"]

    assert arithmetic(context=4) < 0.5 * arithmetic(tensor=4)
