"""Optimizers and schedules by name (optax), and which leaf gets which rule."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from g4v_jax.errors import UserError, nearest
from g4v_jax.trees import flatten, unflatten

STATISTIC = re.compile(r".*/latent_(mean|square)")  # moving averages, learned as gradients of a quadratic
OPTIMIZERS = ("adamw", "adafactor", "muon")
MOMENTS = ("float32", "bfloat16")
FINEST_B2 = 0.99  # that bfloat16 resolves: with more, a second moment moves by less than its last bit
SCHEDULES = ("constant", "linear", "cosine", "stepwise")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW for all leaves, or Adafactor (Shazeer & Stern 2018: second moments as rows and columns, no first), or Muon for the matrices inside layers with AdamW for the rest (Jordan et al. 2024), and for
    all of the towers in `adamw_towers`: Muon's iterations cost more than the step where a tower is large and rows few.
    `moments`: what the state is kept in between steps; within one it is float32.

    Warmup is linear; `linear` and `cosine` decay to `final` times the peak over the run, `stepwise` multiplies the rate
    by `decay` every `decay_steps`.
    """

    name: str = "adamw"
    moments: str = "float32"
    learning_rate: float = 1e-3
    muon_learning_rate: float = 0.02
    muon_steps: int = 5  # Newton-Schulz iterations
    adamw_towers: tuple[str, ...] = ()
    warmup_steps: int = 100
    schedule: str = "cosine"
    final: float = 0.0
    decay: float = 1.0
    decay_steps: int = 1000
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    multipliers: dict = dataclasses.field(default_factory=dict)  # tower -> factor on its learning rates
    statistic_rate: float = 0.02  # of latent statistics: mean ← mean + rate·(batch mean - mean)

    def __post_init__(self):
        for field, known in (("name", OPTIMIZERS), ("moments", MOMENTS), ("schedule", SCHEDULES)):
            value = getattr(self, field)
            if value not in known:
                raise UserError(f"optimizer.{field}: unknown {value!r}{nearest(value, known)}")
        if self.moments == "bfloat16" and self.b2 > FINEST_B2:
            raise UserError(f"optimizer.moments: bfloat16 cannot follow b2 = {self.b2}; set optimizer.b2 to {FINEST_B2} or less")
        if self.decay_steps < 1:
            raise UserError(f"optimizer.decay_steps is {self.decay_steps}; it must be at least 1")
        for tower, factor in self.multipliers.items():
            if isinstance(factor, bool) or not isinstance(factor, int | float) or factor <= 0:
                raise UserError(f"optimizer.multipliers.{tower} is {factor!r}; expected a factor above 0")

    def rate(self, peak: float, steps: int) -> optax.Schedule:
        """Learning rate by step for a run of `steps`."""
        decay_steps = max(1, steps - self.warmup_steps)
        stairs = {start: self.decay for start in range(self.decay_steps, decay_steps, self.decay_steps)}
        after = {
            "constant": optax.constant_schedule(peak),
            "linear": optax.linear_schedule(peak, self.final * peak, decay_steps),
            "cosine": optax.cosine_decay_schedule(peak, decay_steps, alpha=self.final),
            "stepwise": optax.piecewise_constant_schedule(peak, stairs),
        }[self.schedule]
        warmup = optax.linear_schedule(peak / max(1, self.warmup_steps), peak, max(1, self.warmup_steps))
        return optax.join_schedules([warmup, after], [self.warmup_steps])

    def build(self, steps: int) -> optax.GradientTransformation:
        """The transformation for a run of `steps`; its state follows the trainable tree leaf by leaf.

        Its `init` raises UserError where a multiplier names no trainable tower.
        """
        adam = dict(b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay, mask=_decayed)
        rate = self.rate(self.learning_rate, steps)
        rules = {
            "adamw": self._adafactor(rate) if self.name == "adafactor" else optax.adamw(rate, **adam),
            "statistic": optax.sgd(self.statistic_rate),
        }
        if self.name == "muon":
            rules["muon"] = muon(
                self.rate(self.muon_learning_rate, steps),
                ns_steps=self.muon_steps,
                weight_decay=self.weight_decay,
                muon_weight_dimension_numbers=_map_paths(self._muon_axes),
            )
        learned = optax.partition(rules, _map_paths(self._rule))
        if self.moments != "float32":
            learned = _kept_in(learned, jnp.dtype(self.moments))
        clip = optax.masked(optax.clip_by_global_norm(self.clip_norm), _map_paths(lambda p, _: not STATISTIC.match(p)))
        scales = [optax.masked(optax.scale(factor), _in_tower(name)) for name, factor in self.multipliers.items()]
        return optax.chain(clip, learned, *scales)

    def _adafactor(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """With decay as AdamW has it, times the rate, and steps of that rate whatever a weight's size."""
        update = optax.adafactor(None, multiply_by_parameter_scale=False)
        decay = optax.add_decayed_weights(self.weight_decay, _decayed)
        return optax.chain(update, optax.scale(-1.0), decay, optax.scale_by_learning_rate(rate))

    def _rule(self, path: str, leaf) -> str:
        if STATISTIC.match(path):
            return "statistic"
        return "muon" if self.name == "muon" and self._muon_axes(path, leaf) else "adamw"

    def _muon_axes(self, path: str, leaf) -> MuonDimensionNumbers | None:
        return None if path.split("/")[0] in self.adamw_towers else _matrix_axes(path, leaf)


def _kept_in(inner: optax.GradientTransformation, dtype) -> optax.GradientTransformation:
    """`inner`, whose arrays of float32 lie in `dtype` between steps; scalars stay as they are."""

    def narrow(state):
        return jax.tree.map(lambda x: x.astype(dtype) if x.ndim and x.dtype == jnp.float32 else x, state)

    def update(gradients, state, params=None):
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == dtype else x, state)
        updates, state = inner.update(gradients, wide, params)
        return updates, narrow(state)

    return optax.GradientTransformation(lambda params: narrow(inner.init(params)), update)


def _map_paths(function):
    """function(path, leaf) -> a function of a whole tree, as optax's masks and labels want it."""

    def over(tree):
        # optax hands masked-out leaves over as empty nodes: flatten keeps only real ones
        return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})

    return over


def _in_tower(tower: str):
    """Mask of one tower's learned leaves."""

    def mask(tree):
        if tower not in tree:
            raise UserError(f"optimizer.multipliers: no trainable tower {tower!r}{nearest(tower, tree)}")
        return _map_paths(lambda path, _: path.split("/")[0] == tower and not STATISTIC.match(path))(tree)

    return mask


def _decayed(tree):
    """Weight decay for kernels only, not for norms, biases and tables."""
    return _map_paths(lambda path, _: path.endswith("kernel"))(tree)


def _matrix_axes(path: str, leaf) -> MuonDimensionNumbers | None:
    """Muon's (reduction, output) axes of a kernel stacked over layers [L in... out...], or None for all else."""
    if "/layers/" not in path or not path.endswith("/kernel"):
        return None
    axes = tuple(range(1, leaf.ndim))
    inputs = 2 if path.endswith("/o/kernel") else 1
    given, made = axes[:inputs], axes[inputs:]
    if inputs == 2 and math.prod(leaf.shape[axis] for axis in given) == leaf.shape[-1]:
        # of two sides alike the second is contracted; where it is the one that fsdp splits, every device does all the work
        given, made = made, given
    return MuonDimensionNumbers(reduction_axis=given, output_axis=made)
