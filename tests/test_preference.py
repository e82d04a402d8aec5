"""Preferences: two answers in one row that do not see each other, and DPO's loss against a plain computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from g4v_jax import trees
from g4v_jax.build import Build
from g4v_jax.data.pack import pair, single
from g4v_jax.data.text import Render, Turn, dialogue
from g4v_jax.errors import UserError
from g4v_jax.losses.captioning import token_divergences, token_losses, weighted
from g4v_jax.losses.joint import Joint
from g4v_jax.losses.preference import margins, preference, reference_hidden

ASKED = Turn("user", "hi", hazard=1)
CHOSEN, REJECTED = Turn("assistant", "a dot", loss="refusal"), Turn("assistant", "a red")
BETA = 0.3

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def build() -> Build:
    return tiny.build()


def one(build, *turns):
    return dialogue(turns, tiny.tokenizer(), build.shape)


@pytest.fixture(scope="module")
def both(build):
    """The pair as one example, and its two dialogues alone."""
    first, second = one(build, ASKED, CHOSEN), one(build, ASKED, REJECTED)
    return pair(first, second, build.shape), first, second


def test_a_pair_holds_both_dialogues_and_the_losses_of_the_first(build, both):
    example, first, second = both
    middle = len(first["tokens"])
    assert example["tokens"].tolist() == [*first["tokens"], *second["tokens"]]
    assert example["refusal_weight"][:middle].tolist() == first["refusal_weight"].tolist()
    assert not example["refusal_weight"][middle:].any() and not example["caption_weight"].any()
    assert example["hazard_label"].tolist() == [1] and len(example["pairs"]) == 1
    words, ids = tiny.tokenizer(), example["targets"]
    # "a " is said by both: what decides begins behind it, and ends with the end of the turn
    assert words.decode(ids[example["preference"] > 0], specials=True) == "dot<|end|>"
    assert words.decode(ids[example["preference"] < 0], specials=True) == "red<|end|>"


def test_the_two_answers_do_not_see_each_other(build, both):
    example, first, second = both
    other = one(build, Turn("user", "blue"), Turn("assistant", "go up"))
    packed = tiny.pack([[other, example], [first], [second]], build.shape)
    logits = jax.device_get(_logits(build, packed)[0])
    start, middle, end = np.cumsum([len(other["tokens"]), len(first["tokens"]), len(second["tokens"])])
    np.testing.assert_allclose(logits[0, start:middle], logits[1, : middle - start], atol=1e-5)
    np.testing.assert_allclose(logits[0, middle:end], logits[2, : end - middle], atol=1e-5)


def test_the_loss_is_dpo_with_lora_off_as_the_reference(build, both):
    example, first, second = both
    row = tiny.pack([[one(build, ASKED, CHOSEN), example]], build.shape)
    logits, inputs = _logits(build, row)
    reference = reference_logits(build, tiny.params()["llm"], inputs, row)
    term = preference(token_losses(logits, row.targets), token_losses(reference, row.targets), row, BETA)

    alone = single([first, second], build.shape)
    own, base = (_log_probability(build, alone, params) for params in (tiny.params(), _without_lora()))
    gain = own - base  # the shared beginning cancels
    assert abs(gain[0] - gain[1]) > 0.01
    assert float(term.count) == 1
    np.testing.assert_allclose(float(term.sum), np.log1p(np.exp(-BETA * (gain[0] - gain[1]))), rtol=1e-5)
    np.testing.assert_allclose(jax.device_get(margins(gains_of(logits, reference, row), row))[0, 0], gain[0] - gain[1], rtol=1e-4)


def test_an_llm_without_lora_has_a_uniform_reference(build, both):
    assert reference_hidden(build.model.llm.clone(lora=(), lora_rank=0), {}, None, None) is None
    example, first, second = both
    row = tiny.pack([[example]], build.shape)
    term = preference(token_losses(_logits(build, row)[0], row.targets), None, row, BETA)
    own = _log_probability(build, single([first, second], build.shape), tiny.params())
    np.testing.assert_allclose(float(term.sum), np.log1p(np.exp(-BETA * (own[0] - own[1]))), rtol=1e-5)


def test_the_reference_gets_no_gradient_and_the_policy_does(build, both):
    row = tiny.pack([[both[0]]], build.shape)

    def loss(llm):
        inputs = build.model.apply({"params": tiny.params()}, row, method="embed")
        return jnp.sum(reference_hidden(build.model.llm, llm, inputs, row))

    assert all(not leaf.any() for leaf in jax.tree.leaves(jax.device_get(tiny.jit(jax.grad(loss))(tiny.params()["llm"]))))
    objective: Joint = build.objective
    draws = objective.draw(jax.random.split(jax.random.key(0), build.shape.rows))

    def term(llm):
        return objective.terms(tiny.params() | {"llm": llm}, row, draws, jax.random.key(0))["preference"].sum

    found = jax.device_get(tiny.jit(jax.grad(term))(tiny.params()["llm"]))
    assert all(leaf.any() for path, leaf in trees.flatten(found).items() if "lora" in path)


def test_a_pair_that_does_not_fit_or_renders_is_its_first_dialogue_alone(build):
    long = one(build, Turn("user", "hi" * 12), CHOSEN)
    assert pair(long, long, build.shape) is long
    shown = Render("hi", np.zeros((5, 16, 16, 3), np.uint8))
    first = one(build, ASKED, CHOSEN)
    assert pair(first, one(build, ASKED, Turn("assistant", render=shown)), build.shape) is first


def reference_logits(build, llm, inputs, row):
    """Logits of the LLM with LoRA off."""
    hidden = reference_hidden(build.model.llm, llm, inputs, row)
    return build.model.llm.apply({"params": llm}, hidden, method="logits")


def gains_of(logits, reference, row):
    """log p less the reference's at each target, from plain softmaxes."""
    picked = [np.take_along_axis(np.asarray(jax.nn.log_softmax(x)), row.targets[..., None], 2)[..., 0] for x in (logits, reference)]
    return picked[0] - picked[1]


def _without_lora() -> dict:
    flat = trees.flatten(tiny.params())
    return trees.unflatten({path: leaf * (not path.endswith("lora_b")) for path, leaf in flat.items()})


def _logits(build, batch, params=None):
    """(logits, what the LLM read) of a batch."""

    def run(params, batch):
        def call(model, batch):
            reading = model.read(batch)
            return model.llm.logits(reading.hidden), reading.inputs

        return build.model.apply({"params": params}, batch, method=call)

    return tiny.jit(run)(params or tiny.params(), batch)


def _log_probability(build, batch, params) -> np.ndarray:
    """Of the last answer of each row: f64 [B]."""
    logits = np.asarray(_logits(build, batch, params)[0], np.float64)
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log, batch.targets[..., None], 2)[..., 0]
    return (picked * (batch.caption_weight + batch.refusal_weight)).sum(1)


def test_keep_is_the_divergence_from_the_llm_with_lora_off(build):
    row = tiny.pack([[one(build, Turn("user", "hi", loss="keep"), Turn("assistant", "a dot", loss="keep"))]], build.shape)
    logits, inputs = _logits(build, row)
    reference = reference_logits(build, tiny.params()["llm"], inputs, row)
    term = weighted(token_divergences(reference, logits), row.keep_weight)
    ours, base = (np.asarray(jax.nn.log_softmax(x), np.float64) for x in (logits, _logits(build, row, _without_lora())[0]))
    expected = (np.exp(base) * (base - ours)).sum(-1) * row.keep_weight
    assert float(term.count) == row.keep_weight.sum() > 4 and expected.sum() > 1e-3
    np.testing.assert_allclose(float(term.sum), expected.sum(), rtol=1e-4)
    assert abs(float(jnp.sum(token_divergences(logits, logits) * row.keep_weight))) < 1e-5


def test_the_divergences_gradient_is_what_jax_makes_of_the_formula():
    def formula(reference, logits):
        base = jax.nn.log_softmax(jax.lax.stop_gradient(reference))
        return jnp.sum(jnp.exp(base) * (base - jax.nn.log_softmax(logits)), axis=-1)

    reference, logits, g = tiny.normal(2, 3, 301), tiny.normal(2, 3, 301, seed=1), tiny.normal(2, 3, seed=2)
    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices()[:1]), ("fsdp",))):  # the sum by halves
        (ours, back), (theirs, their_back) = (jax.vjp(f, reference, logits) for f in (token_divergences, formula))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        for a, b in zip(back(jnp.asarray(g)), their_back(jnp.asarray(g))):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_without_keep_such_talk_is_learned_like_captions(build):
    row = tiny.pack([[one(build, Turn("user", "hi", loss="keep"), Turn("assistant", "a dot", loss="keep"))]], build.shape)
    plain = Build(tiny.config(losses__keep=0.0), tuple(jax.devices()[:1])).objective.counts(row)
    kept = build.objective.counts(row)
    assert float(plain["caption"]) == float(kept["keep"]) > 0 and float(plain["keep"]) == float(kept["caption"]) == 0
    with pytest.raises(UserError, match="losses.keep stays near the LLM with LoRA off"):
        Build(tiny.config(model__llm__lora=(), model__llm__lora_rank=0)).objective
