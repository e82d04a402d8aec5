"""A language model alone: its loss is the whole model's on the same words, and nothing else of the model is there."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from g4v_jax.build import Build
from g4v_jax.data.pack import single
from g4v_jax.data.text import Turn, dialogue
from g4v_jax.errors import UserError
from g4v_jax.losses.language import Language

TALK = [
    [Turn("user", "hi"), Turn("assistant", "a dot")],
    [Turn("user", "go up"), Turn("assistant", "blue", loss="refusal"), Turn("user", "hi"), Turn("assistant", "red")],
]


def config(**changes):
    found = tiny.config(**changes)
    found.objective = "language"
    found.losses = {"chunks": 4}
    found.model = {"llm": found.model.llm}
    found.rows = {"rows": 8, "tokens": 48}
    found.trainable, found.ema = (".*",), ()
    return found


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def build() -> Build:
    return Build(config(), tuple(jax.devices()[:1]))


def batch(build: Build):
    shape = dataclasses.replace(build.shape, rows=len(TALK))
    return single([dialogue(turns, tiny.tokenizer(), shape) for turns in TALK], shape)


def test_nothing_but_the_llm_is_there(build):
    assert isinstance(build.objective, Language) and set(build.blueprint.shapes) == {"llm"}
    assert (build.shape.clips, build.shape.targets, build.shape.hazards) == (0, 0, 0)


def test_the_loss_is_that_of_the_whole_model_on_the_same_words(build):
    whole = tiny.build()
    both = batch(build), single([dialogue(turns, tiny.tokenizer(), whole.shape) for turns in TALK], dataclasses.replace(whole.shape, rows=2))
    llm = {"llm": tiny.params()["llm"]}
    ours = tiny.jit(build.objective.terms)(llm, both[0], build.objective.draw(jax.random.split(jax.random.key(0), 2)), jax.random.key(0))
    draws = whole.objective.draw(jax.random.split(jax.random.key(0), 2))
    theirs = tiny.jit(whole.objective.terms)(tiny.params(), both[1], draws, jax.random.key(0))
    assert set(ours) == {"tokens"}
    for name in ("sum", "count"):
        expected = sum(float(getattr(theirs[term], name)) for term in ("caption", "refusal"))
        np.testing.assert_allclose(float(getattr(ours["tokens"], name)), expected, rtol=1e-5)
    assert float(build.objective.counts(both[0])["tokens"]) == float(ours["tokens"].count) > 4


def test_every_leaf_learns(build):
    def loss(llm):
        keys = build.objective.draw(jax.random.split(jax.random.key(0), 2))
        return build.objective.terms({"llm": llm}, batch(build), keys, jax.random.key(0))["tokens"].sum

    gradients = tiny.jit(jax.grad(loss))(tiny.params()["llm"])
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(jax.device_get(gradients)))


def test_chunks_that_do_not_divide_a_row_are_named():
    wrong = config()
    wrong.losses.chunks = 5
    with pytest.raises(UserError, match="losses.chunks is 5; rows.tokens, 48, must be a multiple"):
        Build(wrong, tuple(jax.devices()[:2])).objective
