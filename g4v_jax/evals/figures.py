"""Figures with their 95 % intervals: what every line of a report is made of."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964  # two-sided 95 %
RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Figure:
    """A measured value, its 95 % interval, and the number of samples behind it."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def exact(cls, value: float, n: int = 1) -> "Figure":
        """A value that was counted or clocked, not estimated."""
        return cls(float(value), float(value), float(value), n)

    @classmethod
    def share(cls, hits: Sequence[bool]) -> "Figure":
        """Share of hits, with Wilson's interval (1927). Raises ValueError where there is nothing to count."""
        n = len(hits)
        if n == 0:
            raise ValueError("a share of nothing")
        p = float(np.mean(np.asarray(hits, bool)))
        centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
        return cls(p, max(0.0, centre - half), min(1.0, centre + half), n)

    @classmethod
    def mean(cls, values: Sequence[float]) -> "Figure":
        """Mean of values, with a percentile bootstrap interval."""
        values = np.asarray(values, np.float64)
        return cls.bootstrap(lambda rows: float(np.mean(values[rows])), len(values))

    @classmethod
    def bootstrap(cls, statistic, n: int) -> "Figure":
        """`statistic(row indices) -> float` over n samples, with a percentile bootstrap interval (fixed seed)."""
        if n == 0:
            raise ValueError("a statistic of nothing")
        rng = np.random.default_rng(0)
        draws = [statistic(rng.integers(n, size=n)) for _ in range(RESAMPLES)]
        low, high = np.percentile(draws, [2.5, 97.5])
        return cls(statistic(np.arange(n)), float(low), float(high), n)


def attribute_figures(prefix: str, right: Sequence[dict[str, bool]]) -> dict[str, Figure]:
    """Share of samples right in each attribute, and in all: {} where none has attributes that are judged."""
    known = [one for one in right if one]
    if not known:
        return {}
    figures = {f"{prefix}/attributes": Figure.share([all(one.values()) for one in known])}
    return figures | {f"{prefix}/{name}": Figure.share([one[name] for one in known]) for name in known[0]}
