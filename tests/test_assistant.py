"""The model at use: decoding with a cache against decoding without, and rendering against the flow taken by hand."""

import dataclasses
import itertools
from functools import cache

import jax
import numpy as np
import pytest
import tiny

from g4v_jax import rng, trees
from g4v_jax.data.pack import single
from g4v_jax.data.text import END, VIDEO, VIDEO_END, Render, Turn, dialogue
from g4v_jax.infer.assistant import Assistant, Reply, SampleSpec, to_render

SPEC = SampleSpec(rows=3, max_tokens=6, steps=3, guidance=2.5, time_shift=2.0, seed=4)


BUILD = tiny.build()
MODEL = BUILD.model.clone(llm=BUILD.model.llm.clone(tied=False))  # tied, random weights say one token over and over


@cache
def params() -> dict:
    """Random weights with a head for the language model, and attention so strong that all that was said matters."""
    head = np.random.default_rng(1).normal(size=(32, 264)).astype(np.float32)
    flat = trees.flatten(tiny.params()) | {"llm/head/kernel": head}
    flat["llm/layers/attention/o/kernel"] = 8 * flat["llm/layers/attention/o/kernel"]
    return trees.unflatten(flat)


def make(kind=Assistant, threshold: float = 0.5) -> Assistant:
    """An assistant that has nothing to do with the others but their weights."""
    return kind(MODEL, params(), tiny.tokenizer(), BUILD.shape, SPEC, BUILD.mesh, threshold)


@pytest.fixture(scope="module")
def dialogues() -> list[list[Turn]]:
    """Four that end with a user's turn: short and long, without and with clips, one and two turns."""
    shape, generator = BUILD.shape, np.random.default_rng(0)

    def clip():
        return tiny.video(generator, *shape.clip_shape), np.array([0.0, 0.5], np.float32)

    return [
        [Turn("user", "hi")],
        [Turn("user", "what is this, in a few words", clips=[clip()])],
        [Turn("user", "look", clips=[clip(), clip()]), Turn("assistant", "two"), Turn("user", "and now")],
        [Turn("user", "go up")],
    ]


@pytest.fixture(scope="module")
def read():
    """(logits at an example's last token, hazard logits at given positions), from one whole pass over one row."""
    def run(params, batch, positions):
        def call(m):
            hidden = m.read(batch).hidden
            return m.llm.logits(hidden), m.hazard_logits(hidden, positions)

        return MODEL.apply({"params": params}, method=call)

    jitted = tiny.jit(run)

    def call(one, positions):
        batch = single([one], dataclasses.replace(BUILD.shape, rows=1, tokens=64))
        with jax.set_mesh(BUILD.mesh):
            logits, hazard = jax.device_get(jitted(params(), batch, np.array([positions])))
        return logits[0, len(one["tokens"]) - 1], hazard[0]

    return call


@pytest.fixture(scope="module")
def by_hand(dialogues, read) -> list[tuple[list[int], float]]:
    """(tokens, hazard) of each dialogue: the whole row is read again for every token."""
    results, tokenizer = [], tiny.tokenizer()
    shape = dataclasses.replace(BUILD.shape, tokens=64)
    for turns in dialogues:
        one = dialogue(turns, tokenizer, shape, open=True)
        end = np.flatnonzero(one["tokens"] == tokenizer.ids[END])[-1]  # of the last user turn
        tokens = []
        for _ in range(SPEC.max_tokens):
            logits, hazard = read(one, [end])
            tokens.append(int(np.argmax(logits)))
            grown = {"tokens": tokens[-1], "clip_index": -1, "query_index": -1}
            for name in ("tokens", "targets", "caption_weight", "refusal_weight", "clip_index", "query_index"):
                one[name] = np.append(one[name], np.array(grown.get(name, 0), one[name].dtype))
        results.append((tokens, float(1 / (1 + np.exp(-np.float64(hazard[0]))))))
    return results


class Stopping(Assistant):
    """Takes other tokens for the ends of an answer."""

    stops: tuple[int, int] = (-1, -1)

    @property
    def _stops(self):
        return self.stops


def stopping(*stops: int) -> Assistant:
    assistant = make(Stopping)
    assistant.stops = stops
    return assistant


def test_greedy_answers_equal_reading_everything_again_for_every_token(dialogues, by_hand):
    assert len({tuple(tokens) for tokens, _ in by_hand}) >= 3  # what is said depends on what was asked
    assistant = stopping(-1, -2)  # never
    for reply, (tokens, hazard) in zip(assistant.answer(dialogues), by_hand):
        words = tokens[: tokens.index(tiny.tokenizer().ids[VIDEO])] if tiny.tokenizer().ids[VIDEO] in tokens else tokens
        assert reply.text == tiny.tokenizer().decode(words).strip()
        assert reply.hazard == pytest.approx(hazard, abs=1e-5)


def test_hazards_alone_are_those_of_the_answers(dialogues):
    expected = [reply.hazard for reply in make().answer(dialogues)]
    np.testing.assert_allclose(make().hazards(dialogues), expected, rtol=1e-6)


def test_a_reply_tells_how_much_of_its_own_dialogue_was_cut(dialogues):
    long = [Turn("user", "go up " * BUILD.shape.tokens)]
    short, cut = make().answer([dialogues[0], long])
    assert short.cut == 0 < cut.cut
    assert make().answer([dialogues[0]])[0].cut == 0


def test_answers_do_not_depend_on_who_else_is_asked(dialogues):
    """Four in two parts of three rows, or each alone: other rows, another length, other slots."""
    assistant = stopping(-1, -2)
    together = assistant.answer(dialogues)
    for turns, reply in zip(dialogues, together):
        alone = assistant.answer([turns])[0]
        assert (alone.text, alone.caption) == (reply.text, reply.caption)
        assert alone.hazard == pytest.approx(reply.hazard, abs=1e-5)
    assert assistant.answer([]) == []


def test_an_answer_ends_at_its_stop_while_others_go_on(dialogues, by_hand):
    said = [tokens for tokens, _ in by_hand]
    stop, number, other = next(  # a token that one answer comes to after its first, and another never
        (token, number, other)
        for number, other in itertools.permutations(range(4), 2)
        for token in said[number]
        if token != said[number][0] and token not in said[other]
    )
    ended, whole = stopping(stop, -2).answer([dialogues[number], dialogues[other]])
    decode = tiny.tokenizer().decode
    assert ended.text == decode(said[number][: said[number].index(stop)]).strip()
    assert whole.text == decode(said[other]).strip()


def test_a_caption_stands_between_its_marks():
    assistant, ids = make(), tiny.tokenizer().ids
    hi, red = (tiny.tokenizer().encode(text) for text in ("hi", " red"))

    def reply(*tokens):
        return assistant._reply(np.array(tokens), 0.25)

    assert reply(*hi, ids[END], ids[END]) == Reply("hi", None, 0.25)
    assert reply(*hi, ids[VIDEO], *red, ids[VIDEO_END], ids[VIDEO_END]) == Reply("hi", "red", 0.25)
    assert reply(ids[VIDEO], *red, ids[VIDEO_END]) == Reply("", "red", 0.25)
    assert reply(ids[VIDEO], *red, ids[END]) == Reply("", None, 0.25)  # not closed: nothing to render
    assert reply(*hi, ids[VIDEO], *red) == Reply("hi", None, 0.25)  # cut off
    request = [Turn("user", "show me")]
    assert to_render(request, Reply("here", "red", 0.1)) == [*request, Turn("assistant", "here", render=Render("red"))]


@pytest.fixture(scope="module")
def requests(dialogues) -> list[list[Turn]]:
    return [to_render(turns, Reply("", caption, 0.0)) for turns, caption in zip(dialogues, ("red", "a dot", "up"))]


@pytest.fixture(scope="module")
def rendered(requests):
    """What each assistant makes of the requests, by the threshold and whether the gate is on."""
    return {
        (threshold, gate): make(threshold=threshold).render(requests, gate=gate)
        for threshold, gate in ((0.0, True), (0.0, False), (1.0, True))
    }


def flow_by_hand(requests, condition: str) -> np.ndarray:
    """The clips of requests, one Euler step at a time, with the null context for guidance.

    `condition`: "own", or the name of a learned context.
    """
    weights = params()
    shape = dataclasses.replace(BUILD.shape, rows=1, tokens=64)

    @tiny.jit
    def own(params, batch):
        def call(m):
            states = m.query_states(m.read(batch), batch)[:, batch.gen_mask.sum() - 1]
            return m.conditioner(states, np.zeros(1, bool), np.zeros(1, bool))

        return MODEL.apply({"params": params}, method=call)

    velocity = tiny.jit(lambda params, *x: MODEL.apply({"params": params}, *x, method="denoise"))
    decode = tiny.jit(
        lambda params, z: MODEL.apply({"params": params}, method=lambda m: m.autoencoder.decode_normalised(z))
    )
    times = [SPEC.time_shift * t / (1 + (SPEC.time_shift - 1) * t) for t in np.linspace(1, 0, SPEC.steps + 1)]
    keys = rng.row_keys(jax.random.fold_in(rng.stream(SPEC.seed, "sample"), 0), SPEC.rows)
    clips = []
    for key, turns in zip(keys, requests):
        null = weights["conditioner"]["null"][None]
        if condition != "own":
            context = weights["conditioner"][condition][None]
        else:
            context = own(weights, single([dialogue(turns, tiny.tokenizer(), shape, open=True)], shape))
        x = np.asarray(jax.random.normal(key, MODEL.autoencoder.latent_shape(5, 16, 16)))[None]
        for now, after in zip(times, times[1:]):
            t = np.array([now], np.float32)
            with_it, without = velocity(weights, x, t, context), velocity(weights, x, t, null)
            x = x + np.float32(after - now) * np.asarray(without + SPEC.guidance * (with_it - without))
        clips.append(np.asarray(decode(weights, x))[0])
    return np.stack(clips)


def assert_same_picture(actual, expected):
    """Equal but for a level where float32 rounded the other way."""
    difference = np.abs(actual.astype(int) - expected.astype(int))
    assert difference.max() <= 1 and np.mean(difference > 0) < 0.01


def test_a_talk_may_have_rendered_before(requests):
    """Of two clips in a talk the last one is rendered, beside a talk that has only one."""
    second = to_render([Turn("user", "go up")], Reply("", "a dot", 0.0))
    talks = [[*requests[0], *second], requests[2]]
    clips, _ = make(threshold=1.0).render(talks)
    with jax.set_mesh(BUILD.mesh):
        assert_same_picture(clips, flow_by_hand(talks, "own"))
    alone, _ = make(threshold=1.0).render([requests[0]])
    assert np.mean(clips[:1] != alone) > 0.1


def test_a_closed_gate_renders_from_the_blocked_context_alone(requests, rendered):
    clips, closed = rendered[0.0, True]
    assert closed.tolist() == [True] * 3 and clips.shape == (3, 5, 16, 16, 3) and clips.dtype == np.uint8
    with jax.set_mesh(BUILD.mesh):
        assert_same_picture(clips, flow_by_hand(requests, "blocked"))


def test_an_open_gate_renders_what_was_asked_for(requests, rendered):
    clips, closed = rendered[1.0, True]
    assert not closed.any()
    with jax.set_mesh(BUILD.mesh):
        assert_same_picture(clips, flow_by_hand(requests, "own"))
    assert np.mean(clips != rendered[0.0, True][0]) > 0.1


def test_without_the_gate_it_never_closes(rendered):
    clips, closed = rendered[0.0, False]
    assert not closed.any()
    np.testing.assert_array_equal(clips, rendered[1.0, True][0])


def test_without_a_condition_every_request_is_alike(requests):
    clips, closed = make(threshold=0.0).render(requests, gate=False, bare=True)
    assert not closed.any()
    with jax.set_mesh(BUILD.mesh):
        assert_same_picture(clips, flow_by_hand(requests, "null"))


def test_the_gate_closes_above_the_threshold_for_each_request_alone(requests):
    """By the hazard of the last user turn: a threshold between the scores closes for some."""
    scores = [reply.hazard for reply in make().answer([turns[:-1] for turns in requests])]
    middle = float(np.mean(np.sort(scores)[1:]))
    _, closed = make(threshold=middle).render(requests)
    assert closed.tolist() == [score > middle for score in scores] and 0 < closed.sum() < 3


def test_a_clip_is_a_function_of_seed_place_and_request_alone(requests, rendered):
    clips, _ = rendered[1.0, True]
    assistant = make(threshold=1.0)
    again, _ = assistant.render([requests[0], requests[2], requests[2]])
    np.testing.assert_array_equal(again[0], clips[0])
    assert (again[1] != again[2]).any()  # another place, other noise
    assert_same_picture(again[2], clips[2])
    np.testing.assert_array_equal(assistant.render(requests, seed=SPEC.seed)[0], clips)
    assert np.mean(assistant.render(requests, seed=SPEC.seed + 1)[0] != clips) > 0.5


def test_a_wide_clip_is_rendered_wide(requests):
    shape = dataclasses.replace(BUILD.shape, target_size=(8, 24))
    clips, _ = Assistant(MODEL, params(), tiny.tokenizer(), shape, SPEC, BUILD.mesh, 1.0).render(requests)
    assert clips.shape == (3, 5, 8, 24, 3) and clips.std() > 10
