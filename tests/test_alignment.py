"""The warm start of the summarizer: which clip a word belongs to, the loss by hand, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from g4v_jax.build import Build
from g4v_jax.losses.alignment import clip_before

TRAINED = ("summarizer/.*", "queries")


@pytest.fixture(scope="module")
def build() -> Build:
    return Build(tiny.config(objective="alignment", losses={}, trainable=TRAINED, ema=()), tuple(jax.devices()[:1]))


@pytest.fixture(scope="module")
def batch(build):
    return tiny.batch(5, build.shape)


def plainly(batch, tokens: int) -> np.ndarray:
    """`clip_before`, place by place."""
    slots = np.full(batch.tokens.shape, -1)
    for row in range(len(slots)):
        last = {}
        for place, segment in enumerate(batch.segments[row]):
            if batch.clip_index[row, place] >= 0:
                last[segment] = batch.clip_index[row, place] // tokens
            slots[row, place] = last.get(segment, -1) if segment else -1
    return slots


def test_a_word_belongs_to_the_last_clip_of_its_own_dialogue(build, batch):
    tokens = build.model.summarizer.tokens
    found = np.asarray(clip_before(batch, tokens))
    np.testing.assert_array_equal(found, plainly(batch, tokens))
    assert len(set(found.ravel())) > 2  # none, the first clip, and a later one


def test_the_loss_is_that_of_a_bag_of_words(build, batch):
    params = {name: tiny.params()[name] for name in ("vision", "summarizer", "llm", "queries")}
    with jax.set_mesh(build.mesh):
        term = tiny.jit(build.objective.terms)(params, batch, None, None)["words"]
        count = build.objective.counts(batch)["words"]

        def watch(model, clips, times):
            return model.watch(clips, times)

        shape = batch.clips.shape
        clips, times = batch.clips.reshape(-1, *shape[2:]), batch.clip_times.reshape(-1, shape[2])
        summary = tiny.jit(lambda p: build.model.apply({"params": p}, clips, times, method=watch))(params)
    summary = np.asarray(summary, np.float64)[:, :-1].mean(1).reshape(*shape[:2], -1)
    scores = 8.0 * summary @ np.asarray(params["llm"]["embedding"]["table"], np.float64).T
    log = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    slots, expected, words = plainly(batch, build.model.summarizer.tokens), 0.0, 0
    for row, place in np.argwhere(batch.caption_weight > 0):
        if slots[row, place] >= 0:
            expected -= log[row, slots[row, place], batch.targets[row, place]]
            words += 1
    assert words > 10 and float(term.count) == float(count) == words
    np.testing.assert_allclose(float(term.sum), expected, rtol=1e-5)


def test_only_what_it_uses_is_there_and_the_summarizer_learns(build, batch):
    assert set(build.blueprint.shapes) == {"vision", "summarizer", "llm", "queries"}
    assert set(build.blueprint.shapes["llm"]) == {"embedding"}
    with jax.set_mesh(build.mesh):
        params = {name: tiny.params()[name] for name in build.blueprint.shapes}

        def loss(summarizer):
            term = build.objective.terms(params | {"summarizer": summarizer}, batch, None, None)["words"]
            return term.sum / term.count

        step = tiny.jit(jax.value_and_grad(loss))
        summarizer, history = params["summarizer"], []
        for _ in range(30):
            value, gradient = step(summarizer)
            history.append(float(value))
            summarizer = jax.tree.map(lambda x, g: x - 0.02 * jnp.sign(g), summarizer, gradient)
    assert history[-1] < 0.7 * history[0]


def test_a_batch_without_clips_counts_nothing(build):
    empty = tiny.batch(6, build.shape, ("generate",))
    assert float(build.objective.counts(empty)["words"]) == 0
