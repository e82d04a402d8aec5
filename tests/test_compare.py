"""Runs compared on the same samples: known differences are found, chance is not, and other samples are refused."""

import itertools
import json

import numpy as np
import pytest
from scipy import stats

from g4v_jax.errors import UserError
from g4v_jax.evals import compare as runs
from g4v_jax.evals import figures


def write(folder, name: str, scores: dict, split: str = "test", fingerprint: str = "f1", clips: dict | None = None):
    path = folder / f"{name}.json"
    runs.write_samples(path, split, fingerprint, scores, clips)
    return path


def named(values) -> dict[str, float]:
    return {f"s{i:03}": value for i, value in enumerate(values)}


# The test


def test_a_known_difference_is_found_and_signed(tmp_path):
    rng = np.random.default_rng(0)
    a = rng.normal(0.5, 0.2, 80)
    paths = [
        write(tmp_path, "a", {"better": named(a), "same": named(a), "worse": named(a)}),
        write(
            tmp_path,
            "b",
            {
                "better": named(a + rng.normal(0.1, 0.1, 80)),
                "same": named(a + rng.normal(0.0, 0.1, 80)),
                "worse": named(a - 0.01),
            },
        ),
    ]
    found = runs.compare(paths)
    better, same, worse = found.rows
    assert (found.split, found.fingerprint, found.alone) == ("test", "f1", {})
    assert better.p_holm < 0.001 and 0 < better.difference.low < 0.1 < better.difference.high
    assert same.p > 0.05 and same.difference.low < 0 < same.difference.high
    assert worse.difference.value == pytest.approx(-0.01) and worse.p == pytest.approx(1 / 10_001)
    for row in found.rows:
        assert row.difference.value == pytest.approx(row.b_value - row.a_value)
        assert row.a_value == pytest.approx(a.mean()) and row.difference.n == 80
        assert (row.a, row.b, row.left_out) == (str(paths[0]), str(paths[1]), 0)
    assert runs.compare(paths) == found  # the same draws every time


def test_few_samples_are_tested_exactly():
    values = np.array([0.4, -0.1, 0.7, 0.2, 0.0, 0.5])
    sums = [sum(s * v for s, v in zip(signs, values)) for signs in itertools.product((1, -1), repeat=6)]
    wanted = np.mean([abs(one) >= values.sum() - 1e-12 for one in sums])
    assert runs.sign_flip(values) == pytest.approx(wanted)
    assert runs.sign_flip([1.0] * 5) == 2 / 2**5 and runs.sign_flip([0.0, 0.0]) == runs.sign_flip([]) == 1
    assert runs.sign_flip(-values) == pytest.approx(wanted)


def test_many_samples_are_tested_as_the_sign_test_is():
    """Differences of right and wrong answers: 60 to one side, 40 to the other."""
    wanted = stats.binomtest(60, 100).pvalue
    assert runs.sign_flip([1.0] * 60 + [-1.0] * 40 + [0.0] * 500) == pytest.approx(wanted, abs=0.01)


def test_chance_is_called_a_difference_as_often_as_said():
    """Of 200 comparisons of equal runs 10 are expected below 5 %; all of p is uniform."""
    rng = np.random.default_rng(1)
    found = [runs.sign_flip(rng.normal(0, 1, 40) * rng.gamma(1, 1, 40), flips=1000) for _ in range(200)]
    low, high = stats.binom.interval(0.999, 200, 0.05)
    assert low <= np.sum(np.array(found) <= 0.05) <= high
    assert stats.kstest(found, "uniform").pvalue > 0.001


def test_the_interval_covers_the_truth_as_often_as_said(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESAMPLES", 200)
    rng, hits = np.random.default_rng(2), 0
    a = named(np.zeros(60))
    for _ in range(100):
        paths = [write(tmp_path, "a", {"x": a}), write(tmp_path, "b", {"x": named(rng.normal(0.3, 1, 60))})]
        row = runs.compare(paths).rows[0]
        hits += row.difference.low <= 0.3 <= row.difference.high
    low, high = stats.binom.interval(0.999, 100, 0.95)
    assert low <= hits <= high


def test_samples_of_one_clip_are_one(tmp_path):
    """Eight copies of five differences are no more certain than the five."""
    values, names = [0.5, 0.4, 0.6, 0.3, 0.7], [f"s{i:03}" for i in range(40)]
    clips = {name: f"clip{i // 8}" for i, name in enumerate(names)}
    scores = [{"x": named(np.zeros(40))}, {"x": named(np.repeat(values, 8))}]
    together = runs.compare([write(tmp_path, f"{i}", one, clips=clips) for i, one in enumerate(scores)]).rows[0]
    apart = runs.compare([write(tmp_path, f"{i}", one) for i, one in enumerate(scores)]).rows[0]
    assert together.p == 2 / 2**5 and apart.p < 0.001
    assert together.difference.value == apart.difference.value == pytest.approx(0.5) and together.difference.n == 40
    width = together.difference.high - together.difference.low
    assert width > 2 * (apart.difference.high - apart.difference.low)


# Holm


def test_holm_is_worked_out_by_hand_and_monotone():
    assert runs.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert runs.holm([0.5, 0.9]) == [1.0, 1.0] and runs.holm([]) == [] and runs.holm([0.2]) == [0.2]
    values = np.random.default_rng(0).random(30)
    corrected, order = np.array(runs.holm(list(values))), np.argsort(values)
    assert np.all(np.diff(corrected[order]) >= 0) and np.all(corrected >= values) and corrected.max() <= 1


# Samples that belong together


def test_shared_samples_alone_are_compared(tmp_path):
    a = write(tmp_path, "a", {"x": {"1": 0.0, "2": 1.0, "3": 0.0}, "mine": {"1": 0}})
    b = write(tmp_path, "b", {"x": {"2": 1.0, "3": 1.0, "4": 0.0}, "y": {"1": 1}})
    c = write(tmp_path, "c", {"x": {"1": 1.0, "2": 1.0, "3": 1.0}, "y": {"1": 1}})
    found = runs.compare([a, b, c])
    assert [(row.b, row.difference.n, row.left_out) for row in found.rows] == [(str(b), 2, 2), (str(c), 3, 0)]
    assert (found.rows[0].a_value, found.rows[0].b_value) == (0.5, 1.0)
    assert found.alone == {"mine": [str(a)], "y": [str(b), str(c)]}
    text = runs.table(found)
    assert "2 samples of one run alone left out" in text and f"not compared: mine, which only {a} has" in text
    assert f"A: {a}" in text and f"B: {c}" in text and "+0.5000" in text
    stored = json.loads(runs.as_json(found))
    assert stored["rows"][1]["difference"]["n"] == 3 and stored["seed"] == 0 and stored["correction"].startswith("Holm")


def test_runs_on_other_samples_are_refused(tmp_path):
    a = write(tmp_path, "a", {"x": {"1": 0.0}}, clips={"1": "c"})
    for other, said in [
        (write(tmp_path, "b", {"x": {"1": 0.0}}, split="train"), "b.json: split 'train' is not 'test' of .*a.json"),
        (write(tmp_path, "c", {"x": {"1": 0.0}}, fingerprint="f2"), "c.json: fingerprint 'f2' is not 'f1' of .*a.json"),
        (write(tmp_path, "d", {"y": {"1": 0.0}}), "a.json shares no figure"),
        (write(tmp_path, "e", {"x": {"2": 0.0}}), "e.json: 'x' has no sample in common with .*a.json"),
        (write(tmp_path, "f", {"x": {"1": 0.0}}, clips={"1": "d"}), "f.json: '1' is of another clip than in .*a.json"),
        (a, "give two different files"),
    ]:
        with pytest.raises(UserError, match=said) as error:
            runs.compare([a, other])
        assert "\n" not in str(error.value)
    for paths in ([], [a]):
        with pytest.raises(UserError, match="give two different files"):
            runs.compare(paths)


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "not a file of samples"),
        ("[]", "without 'split' and 'fingerprint'"),
        ('{"split": "test", "scores": {"x": {"1": 0}}}', "without 'split' and 'fingerprint'"),
        ('{"split": "test", "fingerprint": "f1", "scores": {}}', "'scores' must be"),
        ('{"split": "test", "fingerprint": "f1", "scores": {"x": {}}}', "'x' must be"),
        ('{"split": "test", "fingerprint": "f1", "scores": {"x": {"1": NaN}}}', "'x' of '1' is nan"),
        ('{"split": "test", "fingerprint": "f1", "scores": {"x": {"1": 1%s}}}' % ("0" * 400), "'x' of '1' is 1000"),
        ('{"split": "test", "fingerprint": "f1", "scores": {"x": {"1": "0"}}}', "'x' of '1' is '0'"),
        ('{"split": "test", "fingerprint": "f1", "scores": {"x": {"1": true}}}', "'x' of '1' is True"),
        ('{"split": "test", "fingerprint": "f1", "scores": {"x": {"1": 0}}, "clips": 3}', "'clips' must"),
    ],
)
def test_faults_of_a_file_are_named(tmp_path, text, said):
    good, bad = write(tmp_path, "a", {"x": {"1": 0.0}}), tmp_path / "bad.json"
    bad.write_text(text)
    with pytest.raises(UserError, match=said) as error:
        runs.compare([good, bad])
    assert str(bad) in str(error.value)
    with pytest.raises(UserError, match="absent.json: not a file of samples"):
        runs.compare([good, tmp_path / "absent.json"])


def test_what_was_asked_in_other_phrasings_is_not_compared(tmp_path):
    """Parts that were measured on other numbers of samples are left out by name; where nothing is left, it is an error."""
    scores = {"caption/x": {"a": 0.0, "b": 1.0}, "safety/right": {"a": 1.0, "b": 0.0}}
    paths = [tmp_path / "one", tmp_path / "two"]
    for path, captions in zip(paths, ("64", "200")):
        runs.write_samples(path, "test", "abc", scores, counts={"caption": captions, "safety": "8"})
    found = runs.compare(paths)
    assert [row.figure for row in found.rows] == ["safety/right"] and found.unlike == {"caption/x": [str(paths[1])]}
    assert f"not compared: caption/x, of which {paths[1]} has another number of samples" in runs.table(found)
    runs.write_samples(paths[1], "test", "abc", scores, counts={"caption": "200", "safety": "9"})
    with pytest.raises(UserError, match="caption/x, safety/right were measured on other numbers of samples"):
        runs.compare(paths)
