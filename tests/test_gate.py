"""The hazard threshold against every cut there is, on scores with ties and gaps."""

import numpy as np
import pytest

from g4v_jax.safety.gate import ALIKE, choose_threshold


def judged(scores, labels, cut) -> tuple[float, float]:
    """(F1, share of safe turns blocked) of blocking what scores above `cut`, counted one turn at a time."""
    hits = alarms = misses = safe = 0
    for score, label in zip(scores, labels):
        hits += score > cut and label == 1
        alarms += score > cut and label != 1
        misses += score <= cut and label == 1
        safe += label != 1
    return 2 * hits / (2 * hits + alarms + misses), alarms / safe


def split(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores that lean toward their label and often coincide."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(40) % 4 == 0).astype(int)
    scores = np.clip(0.35 * labels + rng.normal(0.35, 0.25, 40), 0, 1)
    return np.round(scores, 2 if seed % 2 else 1).astype(np.float32), labels


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [0.0, 0.1, 1.0])
def test_no_cut_within_the_budget_is_much_better(seed, budget):
    scores, labels = split(seed)
    cut = choose_threshold(scores, labels, budget)
    f1, refused = judged(scores, labels, cut)
    assert refused <= budget and 0 <= cut <= 1
    every = [judged(scores, labels, other) for other in np.linspace(0, 1, 2003)]
    assert f1 >= max(f for f, share in every if share <= budget) - ALIKE


def test_the_budget_binds():
    """Without it the best cut would be lower."""
    scores, labels = [0.9, 0.6, 0.55, 0.5, 0.2, 0.1], [1, 0, 1, 1, 0, 0]
    assert 0.2 < choose_threshold(scores, labels, 0.5) < 0.5
    assert 0.6 < choose_threshold(scores, labels, 0.0) < 0.9


def test_a_cut_that_wins_by_one_turn_of_many_loses_against_a_wide_gap():
    scores = [0.01] * 60 + [0.03] + [0.02] + [0.9] * 120  # one hazard lies among the safe turns
    labels = [0] * 60 + [1] + [0] + [1] * 120
    assert choose_threshold(scores, labels, 0.05) == pytest.approx((0.03 + 0.9) / 2)


def test_among_equal_cuts_the_middle_of_the_widest_gap():
    assert choose_threshold([0.1, 0.3, 0.9], [0, 0, 1], 0.0) == pytest.approx(0.6)
    labels = [1, 0, 0, 1, 0]  # the first alone, or the first four: the same F1 of 2/3
    for scores, cut in (([0.95, 0.7, 0.6, 0.4, 0.35], 0.825), ([0.95, 0.9, 0.6, 0.4, 0.1], 0.25)):
        assert judged(scores, labels, 0.92)[0] == pytest.approx(judged(scores, labels, 0.37)[0]) == pytest.approx(2 / 3)
        assert choose_threshold(scores, labels, 1.0) == pytest.approx(cut)


def test_where_no_cut_keeps_the_budget_nothing_is_blocked():
    """Scores that float32 rounds to 1 lie above every cut below 1."""
    cut = choose_threshold([1.0, 1.0, 0.2], [0, 1, 0], 0.0)
    assert judged([1.0, 1.0, 0.2], [0, 1, 0], cut) == (0.0, 0.0)


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1], [-1, 0, 0]])
def test_a_missing_class_is_refused(labels):
    with pytest.raises(ValueError, match="needs safe and hazardous turns"):
        choose_threshold([0.1, 0.5, 0.9], labels, 0.1)
