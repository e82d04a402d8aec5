"""The pipeline: one order whatever the threads, exact resume, shares of processes, the cache, damaged records."""

import dataclasses
import functools
import json
import logging
import re
from collections import Counter

import jax
import numpy as np
import pytest
from folder import TEXTS, make

from g4v_jax.data import records
from g4v_jax.data.pack import RowShape
from g4v_jax.data.pipeline import FrameCache, Pipeline
from g4v_jax.data.text import Tokenizer
from g4v_jax.data.world.phrases import QUESTIONS, REFUSALS, REQUESTS
from g4v_jax.errors import UserError
from g4v_jax.train import processes

SHAPE = RowShape(
    rows=4,
    tokens=256,
    clips=6,
    targets=4,
    hazards=14,
    summary_tokens=8,
    query_tokens=4,
    clip_frames=3,
    clip_size=16,
    target_frames=2,
    target_size=16,
)
MIXTURE = dict(caption=0.3, generate=0.3, blocked=0.1, refuse_clip=0.1, refuse_request=0.1, dialogue=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    records.build(make(path / "source"), path / "records")
    return str(path / "records")


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for table in (QUESTIONS, REQUESTS, REFUSALS) for texts in table.values() for text in texts]
    return Tokenizer.train([*TEXTS, *texts], 400)


@pytest.fixture
def open_(folder, tokenizer):
    """Open a pipeline over the folder; closed after the test."""
    opened = []

    def start(process_index=0, process_count=1, shape=SHAPE, **fields):
        spec = Pipeline(**dict(records=folder, mixture=MIXTURE, bins=4, threads=2) | fields)
        opened.append(spec.open(tokenizer, shape, process_index, process_count))
        return opened[-1]

    yield start
    for stream in opened:
        stream.close()


def assert_equal(one, other):
    for name, first, second in zip(
        [field.name for field in dataclasses.fields(one)], jax.tree.leaves(one), jax.tree.leaves(other), strict=True
    ):
        np.testing.assert_array_equal(first, second, err_msg=name)


def take(stream, count):
    return [next(stream) for _ in range(count)]


def test_the_order_does_not_depend_on_threads(open_):
    streams = [open_(threads=threads) for threads in (0, 1, 4)]
    for _ in range(3):
        first, *others = (next(stream) for stream in streams)
        for other in others:
            assert_equal(first, other)


def test_the_seed_chooses_the_order(open_):
    one, other = (next(open_(seed=seed)).tokens for seed in (0, 1))
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_resume_is_exact(open_, taken):
    stream = open_()
    take(stream, taken)
    state = json.loads(json.dumps(stream.get_state()))
    wanted = take(stream, 3)
    fresh = open_(threads=1)
    next(fresh)  # a stream that already ran must be moved as well
    fresh.set_state(state)
    for one, other in zip(wanted, take(fresh, 3)):
        assert_equal(one, other)
    assert fresh.get_state() == stream.get_state()


def test_another_process_count_goes_on_at_the_same_place(open_, caplog):
    stream = open_()
    take(stream, 5)
    state = stream.get_state()
    halves = [open_(index, 2) for index in range(2)]
    for half in halves:
        half.set_state(state)
        assert next(half).tokens.shape == (2, 256)
        (there,) = half.get_state()["streams"].values()
        assert there["parent"]["next_index"] >= state["streams"]["0"]["parent"]["next_index"] // 2
    assert "number of its shards differ" in caplog.text


@pytest.mark.parametrize("count", [2, 4])
def test_shards_make_the_same_batches_in_any_number_of_processes(open_, count):
    whole = open_(shards=4)
    shares = [open_(index, count, shards=4) for index in range(count)]

    def assert_same():
        parts = [next(share) for share in shares]
        assert_equal(next(whole), jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts))

    assert_same()
    joined = functools.reduce(processes.joined, (share.get_state() for share in shares))
    assert joined == whole.get_state()
    whole = open_(shards=4)  # and it goes on from what they saved
    whole.set_state(joined)
    assert_same()


def test_processes_share_the_examples_without_overlap(open_, tokenizer):
    def captions(stream):
        found = Counter()
        while sum(found.values()) < 60:
            batch = next(stream)
            for row, segment in zip(*np.nonzero(np.diff(batch.segments, prepend=0, axis=1) > 0)):
                words = batch.tokens[row, batch.segments[row] == batch.segments[row, segment]]
                found[tokenizer.decode(words).split("level ")[-1]] += 1
        return found

    whole = dict(mixture={"caption": 1}, shape=dataclasses.replace(SHAPE, rows=2))
    shares = [captions(open_(index, 2, **whole)) for index in range(2)]
    together = shares[0] + shares[1]
    assert len(together) == 6 and max(together.values()) - min(together.values()) <= 12


def test_tokens_are_hardly_padded_and_words_are_well_formed(open_, tokenizer):
    # examples of this folder have about 45 tokens: rows of eight of them leave little room unused
    shape = dataclasses.replace(SHAPE, tokens=384, targets=6, hazards=20)
    stream = open_(bins=16, shape=shape)
    batches = take(stream, 12)
    padding = np.mean([batch.segments == 0 for batch in batches])
    assert padding < 0.06
    for batch in batches:
        assert (batch.clip_index.max(axis=1) < SHAPE.clips * SHAPE.summary_tokens).all()
        read = np.take_along_axis(batch.tokens, batch.hazard_position, axis=1)
        assert (read[batch.hazard_label >= 0] == tokenizer.ids["<|end|>"]).all()
        assert ((batch.clip_index >= 0).sum(axis=1) == SHAPE.summary_tokens * batch.clip_mask.sum(axis=1)).all()
        assert ((batch.query_index >= 0).sum(axis=1) == SHAPE.query_tokens * batch.gen_mask.sum(axis=1)).all()


def test_clips_are_decoded_once_where_they_fit(open_):
    stream = open_()
    take(stream, 10)
    assert stream.cache.decoded <= 2 * (6 + 4 + 7) + 8  # two sizes of each, and some decoded by two threads at once
    assert stream.counts["skipped"] == 0


def test_the_cache_is_bounded_and_keeps_what_was_used_last(folder, caplog):
    split = records.read(folder, "train", "clips")
    bytes_each = 2 * 8 * 8 * 3 + 2 * 4
    cache = FrameCache(3 * bytes_each, records.footage)
    for index in (0, 1, 2, 0, 3):  # 1 is the oldest when 3 comes
        cache.footage(split[index], 0, 2, 8, 8)
    assert cache.used == cache.capacity and cache.decoded == 4
    assert "do not fit cache_mib" in caplog.text and len(caplog.records) == 1
    cache.footage(split[0], 0, 2, 8, 8)
    cache.footage(split[2], 0, 2, 8, 8)
    assert cache.decoded == 4
    frames, _ = cache.footage(split[1], 0, 2, 8, 8)
    assert cache.decoded == 5 and cache.used <= cache.capacity
    with pytest.raises(ValueError, match="read-only"):
        frames[0] = 0
    np.testing.assert_array_equal(frames, records.footage(split[1], 0, 2, 8, 8)[0])


def test_records_damaged_on_disk_are_skipped_and_counted(tmp_path, tokenizer, caplog):
    records.build(make(tmp_path / "source", clips=12, hazards=0, dialogues=0), tmp_path / "records")
    (shard,) = (tmp_path / "records").glob("*train_clips*")
    data = bytearray(shard.read_bytes())
    data[300] ^= 255  # inside the first record
    shard.write_bytes(data)
    stream = Pipeline(str(tmp_path / "records"), {"caption": 1}, bins=2).open(tokenizer, SHAPE)
    with caplog.at_level(logging.WARNING):
        take(stream, 6)
    stream.close()
    assert stream.counts["skipped"] > 1
    assert len([entry for entry in caplog.records if "record 0 is damaged" in entry.message]) == 1


def test_a_task_that_never_fits_is_an_error_not_a_hang(open_):
    shape = dataclasses.replace(SHAPE, clip_frames=7)  # the clips have six
    with pytest.raises(UserError, match="no example of task 'caption' could be made; the last: .*6 frames, 7 wanted"):
        take(open_(shape=shape, mixture={"caption": 1}), 1)


def test_mistakes_are_named(open_):
    for message, fields in {
        "unknown task 'captoin'.*did you mean 'caption'": dict(mixture={"captoin": 1}),
        "the mixture is empty": dict(mixture={"caption": 0}),
        "must not be negative": dict(mixture={"caption": -1}),
        "unknown split 'dev'": dict(split="dev"),
        "train_dialogues has no records of kind 'talks'.*did you mean 'talk'": dict(mixture={"dialogue/talks": 1}),
        "task 'blocked' needs test_hazards": dict(split="test", mixture={"caption": 1, "blocked": 1}),
        "no records here": dict(records="/nowhere"),
        "4 rows do not divide over 3 processes": dict(process_count=3),
        r"4 rows do not divide over 8 shards \(data.shards\)": dict(shards=8),
        r"2 shards do not divide over 4 process": dict(shards=2, process_count=4),
    }.items():
        with pytest.raises(UserError, match=message):
            open_(**fields)


def test_a_task_of_one_kind_draws_from_no_other(open_, tokenizer):
    asked = set()
    for batch in take(open_(mixture={"dialogue/short": 1}), 2):
        text = " ".join(tokenizer.decode(row) for row in batch.tokens)
        asked |= set(re.findall(r"what is in clip (\d)", text))
    assert asked == {"2", "5"}  # see `folder.make`


def test_pixels_draw_from_clips_and_hazards(open_):
    batch = next(open_(mixture={"pixels": 1}, shape=dataclasses.replace(SHAPE, tokens=4)))
    assert batch.gen_mask.all() and not batch.caption_weight.any() and not batch.clip_mask.any()
    levels = batch.gen_targets[:, :, 0, 0, 0, 0]
    assert (levels > 115).any() and (levels < 115).any()  # hazards are the brighter clips of the folder
