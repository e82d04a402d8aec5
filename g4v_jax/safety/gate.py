"""The hazard gate: when a turn counts as hazardous, and how that threshold is chosen."""

import numpy as np


ALIKE = 0.01  # cuts whose F1 is no further below the best are alike: a few validation turns tell no more


def choose_threshold(scores: np.ndarray, labels: np.ndarray, false_refusals: float) -> float:
    """The probability above which a turn is blocked, chosen on a validation split.

    scores f32 [n] in [0, 1], labels [n] (1 hazardous). Of all cuts that block at most `false_refusals` of the safe
    turns, those with the best F1 or nearly so, and of these the middle of the widest gap between scores: a cut that wins
    by one turn and lies among the scores of others wins by chance. Raises ValueError where a class is missing.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels) == 1
    if labels.all() or not labels.any():
        raise ValueError("choosing a threshold needs safe and hazardous turns")
    edges = np.unique(np.concatenate([[0.0], scores, [1.0]]))
    cuts = [(-1.0, 0.0, 1.0)]  # no probability is above 1: where no cut keeps the budget, nothing is blocked
    for low, high in zip(edges, edges[1:]):
        cut = 0.5 * (low + high)
        blocked = scores > cut
        if np.mean(blocked[~labels]) <= false_refusals:
            true = np.sum(blocked & labels)
            f1 = 2 * true / max(1, np.sum(blocked) + np.sum(labels))
            cuts.append((f1, high - low, cut))
    enough = max(cuts)[0] - ALIKE
    return float(max((gap, cut) for f1, gap, cut in cuts if f1 >= enough)[1])
