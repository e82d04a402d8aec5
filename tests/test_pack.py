"""Packing: rows, slots and shifted indices against a naive construction, one example at a time."""

import dataclasses

import grain
import numpy as np
import pytest

from g4v_jax.data.pack import RowShape, example, pack, single
from g4v_jax.errors import UserError

SHAPE = RowShape(
    rows=3,
    tokens=40,
    clips=3,
    targets=2,
    hazards=4,
    summary_tokens=4,
    query_tokens=3,
    clip_frames=2,
    clip_size=4,
    target_frames=2,
    target_size=6,
)


def made(number: int) -> dict:
    """An example whose values tell its number: a clip in every second one, a target in every third."""
    rng = np.random.default_rng(number)
    clips, targets, hazards = number % 2, int(number % 3 == 0), number % 3
    words = int(rng.integers(3, 9))
    length = words + clips * SHAPE.summary_tokens + targets * SHAPE.query_tokens
    clip_index, query_index = np.full(length, -1), np.full(length, -1)
    clip_index[1 : 1 + clips * SHAPE.summary_tokens] = np.arange(clips * SHAPE.summary_tokens)
    query_index[length - targets * SHAPE.query_tokens :] = np.arange(targets * SHAPE.query_tokens)
    return example(
        SHAPE,
        tokens=np.full(length, number + 1),
        targets=np.full(length, number + 2),
        caption_weight=np.full(length, 0.5),
        refusal_weight=rng.random(length),
        clip_index=clip_index,
        query_index=query_index,
        clips=np.full((clips, 2, 4, 4, 3), number + 1),
        clip_times=np.full((clips, 2), number),
        gen_targets=np.full((targets, 2, 6, 6, 3), number + 1),
        gen_blocked=np.full(targets, number % 2),
        hazard_position=rng.integers(0, length, hazards),
        hazard_label=np.full(hazards, number % 2),
    )


@pytest.fixture(scope="module")
def batches() -> list:
    stream = grain.MapDataset.range(60).map(made).to_iter_dataset(grain.ReadOptions(num_threads=0))
    return list(pack(stream, SHAPE, bins=4))


def test_every_example_arrives_whole_with_its_own_slots(batches):
    seen = []
    for batch in batches:
        for row in range(SHAPE.rows):
            clip, target, hazard = 0, 0, 0  # slots that earlier examples of the row have taken
            for segment in range(1, batch.segments[row].max() + 1):
                place = np.flatnonzero(batch.segments[row] == segment)
                number = int(batch.tokens[row, place[0]]) - 1
                want = made(number)
                seen.append(number)
                np.testing.assert_array_equal(place, np.arange(place[0], place[0] + len(want["tokens"])))
                np.testing.assert_array_equal(batch.positions[row, place], np.arange(len(place)))
                for name in ("tokens", "targets", "caption_weight", "refusal_weight"):
                    np.testing.assert_array_equal(getattr(batch, name)[row, place], want[name])
                for index in range(len(place)):
                    q, n = want["clip_index"][index], want["query_index"][index]
                    assert batch.clip_index[row, place[index]] == (q if q < 0 else q + 4 * clip)
                    assert batch.query_index[row, place[index]] == (n if n < 0 else n + 3 * target)
                for k in range(len(want["clips"])):
                    np.testing.assert_array_equal(batch.clips[row, clip + k], want["clips"][k])
                    np.testing.assert_array_equal(batch.clip_times[row, clip + k], want["clip_times"][k])
                for g in range(len(want["gen_targets"])):
                    np.testing.assert_array_equal(batch.gen_targets[row, target + g], want["gen_targets"][g])
                    assert batch.gen_blocked[row, target + g] == want["gen_blocked"][g]
                for e in range(len(want["hazard_label"])):
                    assert batch.hazard_position[row, hazard + e] == place[0] + want["hazard_position"][e]
                    assert batch.hazard_label[row, hazard + e] == want["hazard_label"][e]
                clip, target, hazard = (
                    clip + len(want["clips"]),
                    target + len(want["gen_targets"]),
                    hazard + len(want["hazard_label"]),
                )
            assert batch.clip_mask[row].tolist() == [slot < clip for slot in range(SHAPE.clips)]
            assert batch.gen_mask[row].tolist() == [slot < target for slot in range(SHAPE.targets)]
            assert (batch.hazard_label[row, hazard:] == -1).all()
            empty = batch.segments[row] == 0
            assert not batch.tokens[row, empty].any() and not batch.caption_weight[row, empty].any()
            assert (batch.clip_index[row, empty] == -1).all() and (batch.query_index[row, empty] == -1).all()
    assert len(seen) == len(set(seen)) > 40


def test_shapes_and_types_are_static(batches):
    want = {
        "tokens": (np.int32, (3, 40)),
        "refusal_weight": (np.float32, (3, 40)),
        "clips": (np.uint8, (3, 3, 2, 4, 4, 3)),
        "clip_mask": (np.bool_, (3, 3)),
        "clip_times": (np.float32, (3, 3, 2)),
        "clip_index": (np.int32, (3, 40)),
        "gen_targets": (np.uint8, (3, 2, 2, 6, 6, 3)),
        "gen_blocked": (np.bool_, (3, 2)),
        "hazard_position": (np.int32, (3, 4)),
    }
    for batch in [*batches, single([made(3)], SHAPE), single([], SHAPE)]:
        for name, (dtype, shape) in want.items():
            assert (getattr(batch, name).dtype, getattr(batch, name).shape) == (dtype, shape), name


def test_a_clip_to_render_may_be_wide():
    assert SHAPE.target_shape == (2, 6, 6)
    wide = dataclasses.replace(SHAPE, target_size=(4, 10))
    assert wide.target_shape == (2, 4, 10)
    given = dict(tokens=[1], targets=[2], caption_weight=[1], refusal_weight=[0], clip_index=[-1], query_index=[-1], gen_blocked=[False])
    batch = single([example(wide, **given, gen_targets=np.ones((1, 2, 4, 10, 3)))], wide)
    assert batch.gen_targets.shape == (wide.rows, wide.targets, 2, 4, 10, 3) and batch.gen_targets[0, 0].all()
    with pytest.raises(UserError, match=r"expects \[n, \*\[2, 4, 10, 3\]\]"):
        example(wide, **given, gen_targets=np.ones((1, 2, 10, 4, 3)))
    for size in ((4,), (4, 10, 3), (4, 0), (4.5, 10), ("4", 10)):
        with pytest.raises(UserError, match="row shape: target_size is"):
            dataclasses.replace(SHAPE, target_size=size)


def test_single_puts_one_example_in_a_row():
    batch = single([made(3), made(2)], SHAPE)
    assert (batch.hazard_label[2] == -1).all() and not batch.clip_mask[2].any()
    assert batch.segments.max(axis=1).tolist() == [1, 1, 0]
    for row, number in enumerate((3, 2)):
        want = made(number)
        length = len(want["tokens"])
        np.testing.assert_array_equal(batch.tokens[row, :length], want["tokens"])
        np.testing.assert_array_equal(batch.clip_index[row, :length], want["clip_index"])
        np.testing.assert_array_equal(batch.hazard_position[row, : number % 3], want["hazard_position"])
    with pytest.raises(UserError, match="4 examples do not fit 3 rows"):
        single([made(0)] * 4, SHAPE)


def test_examples_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="41 tokens do not fit a row of 40; raise the row's tokens"):
        example(SHAPE, tokens=np.zeros(41))
    with pytest.raises(UserError, match="4 clips do not fit a row of 3"):
        example(SHAPE, clips=np.zeros((4, 2, 4, 4, 3)))
    with pytest.raises(UserError, match=r"clips has shape \[1, 2, 5, 5, 3\]"):
        example(SHAPE, clips=np.zeros((1, 2, 5, 5, 3)))
    with pytest.raises(ValueError, match="did you mean 'tokens'"):
        example(SHAPE, tokans=[1])
    with pytest.raises(UserError, match="rows is 0"):
        RowShape(0, *[1] * 10)


def test_a_row_may_lack_slots():
    shape = RowShape(2, 8, 0, 0, 0, 4, 4, 2, 4, 2, 4)
    words = example(shape, tokens=[1, 2], targets=[2, 0], caption_weight=[1, 0], refusal_weight=[0, 0],
                    clip_index=[-1, -1], query_index=[-1, -1])  # fmt: skip
    batch = single([words], shape)
    assert batch.clips.shape == (2, 0, 2, 4, 4, 3) and batch.hazard_label.shape == (2, 0)
    stream = grain.MapDataset.source([words] * 8).to_iter_dataset(grain.ReadOptions(num_threads=0))
    packed = next(iter(pack(stream, shape, bins=2)))
    assert packed.segments.tolist() == [[1, 1, 2, 2, 3, 3, 4, 4]] * 2
