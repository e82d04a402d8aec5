"""Distances between two sets of features: Fréchet, its value for endless samples, and the kernel distance.

May hold statistics of arrays [N D], in float64; where features come from (`i3d` or any tower) is not known here.
"""

from collections.abc import Callable

import numpy as np

from g4v_jax.errors import UserError
from g4v_jax.evals.figures import Z, Figure

DRAWS = 50  # half samples behind an interval
SHARES = np.linspace(0.4, 1.0, 7)  # of the samples, that `extrapolated` looks at
REPEATS = 5  # draws of each share, averaged

Distance = Callable[[np.ndarray, np.ndarray], float]


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance of the Gaussians with the moments of a [N D] and b [M D]; FVD on features of I3D.

    |μa - μb|² + tr(Σa + Σb - 2(ΣaΣb)^½) (Heusel et al. 2017, eq. 6; Unterthiner et al. 2018), with unbiased
    covariances, which may be rank-deficient. Too large by an amount that falls as 1/N, and large where N is not far
    above D: compare values of the same N and M only, or see `extrapolated`. Raises UserError for N or M below 2.
    """
    a, b = _checked(a, b)
    mean_a, mean_b = a.mean(0), b.mean(0)
    root_a, root_b = _root(a - mean_a), _root(b - mean_b)
    # with Σ = RᵀR, the eigenvalues of ΣaΣb are the squared singular values of RaRbᵀ: no matrix root is taken
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    squares = np.sum((mean_a - mean_b) ** 2) + np.sum(root_a**2) + np.sum(root_b**2)
    return float(max(0.0, squares - 2 * cross))


def extrapolated(a: np.ndarray, b: np.ndarray) -> float:
    """`frechet` of endless samples, estimated: FID∞ of Chong & Forsyth (2020) with both sets finite.

    The bias is c_a/N + c_b/M + ..., so shares f of both sets (drawn without replacement, fixed seed) lie on a line in
    1/f, whose value at 0 is returned; it may be slightly negative. A line only where the smallest share (0.4) has
    clearly more samples than the features have directions that vary; below that it still removes too little.
    Raises UserError for N or M below 5.
    """
    a, b = _checked(a, b, least=5)
    rng = np.random.default_rng(0)
    values = []
    for share in SHARES:
        repeats = REPEATS if share < 1 else 1
        values.append(np.mean([frechet(_some(rng, a, share), _some(rng, b, share)) for _ in range(repeats)]))
    return float(np.polyfit(1 / SHARES, values, 1)[1])


def kernel(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased estimate of the squared MMD of a [N D] and b [M D] under the kernel (x·y/D + 1)³.

    KID's kernel (Bińkowski et al. 2018, §4); KVD (Unterthiner et al. 2018) is such a distance on features of I3D. Over
    all samples at once: memory grows as N² + M². Has no bias for small N, and so may be slightly negative. Raises
    UserError for N or M below 2.
    """
    a, b = _checked(a, b)

    def pairs(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x):
        similar = pairs(x, x)
        return (similar.sum() - np.trace(similar)) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * pairs(a, b).mean())


def framewise(a: np.ndarray, b: np.ndarray, distance: Distance = frechet) -> float:
    """`distance` of the frames of clips, whichever clip they are of: features a [N T D] and b [M T' D] of frames.

    FID over frames (Heusel et al. 2017), blind to motion. The frames of a clip resemble each other: it has fewer
    independent samples than frames. Raises what `distance` raises.
    """
    return distance(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]))


def figure(distance: Distance, a: np.ndarray, b: np.ndarray, draws: int = DRAWS) -> Figure:
    """`distance(a, b)` with a 95 % interval over a's and b's samples [N ...] and [M ...]; n is the smaller number.

    The standard error is the deviation of `draws` distances between random halves of both sets (the delete-half
    jackknife; Shao & Wu 1989). A bootstrap would not do: samples that are drawn twice make a set narrower than it is,
    which moves all draws to one side of the value. The interval says how far other samples of this size would lie,
    and nothing of the bias of `frechet`. Raises UserError for N or M below 4.
    """
    for x in (a, b):
        if len(x) < 4:
            raise UserError(f"a distance with an interval needs 4 samples of each set, not {len(x)}")
    rng = np.random.default_rng(0)
    halves = [distance(_some(rng, a, 0.5), _some(rng, b, 0.5)) for _ in range(draws)]
    value, half = distance(a, b), Z * float(np.std(halves, ddof=1))
    return Figure(value, value - half, value + half, min(len(a), len(b)))


def _checked(a: np.ndarray, b: np.ndarray, least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features {a.shape} and {b.shape} are not [N D] and [M D]")
    for x in (a, b):
        if len(x) < least:
            raise UserError(f"a distance between sets needs {least} samples of each, not {len(x)}; take more clips")
        if not np.isfinite(x).all():
            raise UserError("a distance between sets: some features are not finite; the clips' model is broken")
    return a.astype(np.float64), b.astype(np.float64)


def _root(centred: np.ndarray) -> np.ndarray:
    """R [min(N, D) D] with RᵀR the unbiased covariance of N centred samples."""
    root = centred / np.sqrt(len(centred) - 1)
    return np.linalg.qr(root, mode="r") if len(root) > root.shape[1] else root


def _some(rng: np.random.Generator, x: np.ndarray, share: float) -> np.ndarray:
    """That share of the samples without repetition, all of them in order for 1."""
    return x if share == 1 else x[rng.choice(len(x), max(2, round(share * len(x))), replace=False)]
