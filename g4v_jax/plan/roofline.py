"""How fast a compiled step can be at best: its arithmetic, memory traffic and transfers against what a chip can do.

May hold bounds only. The step's bound is the largest of its parts' bounds, as if everything overlapped and every unit ran at its
published peak: no run is faster, and how much slower real ones are is told by `calibration`.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from g4v_jax.plan.chips import Chip
from g4v_jax.plan.collectives import Collective
from g4v_jax.plan.compiled import Compiled


@dataclasses.dataclass(frozen=True)
class Bound:
    """Least seconds of one step on one device, by what limits it."""

    compute_s: float
    hbm_s: float
    ici_s: float
    dcn_s: float
    mfu: float = 0.0  # model FLOPs over what the devices could do in `step_s`

    @property
    def step_s(self) -> float:
        return max(self.compute_s, self.hbm_s, self.ici_s, self.dcn_s)

    @property
    def limit(self) -> str:
        """Name of what takes longest."""
        named = {"arithmetic": self.compute_s, "memory": self.hbm_s, "links": self.ici_s, "slow network": self.dcn_s}
        return max(named, key=named.get)

    def as_dict(self) -> dict:
        return dataclasses.asdict(self) | {"step_s": self.step_s}


def bound(chip: Chip, flops: float, traffic: float, sent: Sequence[Collective], model_flops: float) -> Bound:
    """Of one device's operations, bytes of memory traffic and collectives; `model_flops` of a device, for the MFU."""
    busy: Counter = Counter()  # seconds of the links of each side of the torus; what goes along others may go at once
    for one in sent:
        if not one.slow:
            busy.update(dict.fromkeys([side for side, _ in one.along] or [None], one.bytes / link_rate(chip, one.along)))
    slow = sum(one.bytes for one in sent if one.slow)
    found = Bound(
        flops / chip.flops, traffic / chip.hbm_rate, max(busy.values(), default=0.0), slow / chip.dcn_rate
    )
    return dataclasses.replace(found, mfu=model_flops / chip.flops / found.step_s if found.step_s else 0.0)


def step_bound(chip: Chip, compiled: Compiled, devices: int, model_flops: dict[str, float]) -> tuple[Bound, dict[str, Bound]]:
    """(the whole step's bound, each tower's); `model_flops` by tower over all devices. Only for chips with known rates.

    What a compiled text does not show of the arithmetic, kernels written by hand, counts as often as the model needs it.
    """
    share = {tower: count / devices for tower, count in model_flops.items()}
    done = {tower: max(compiled.flops.get(tower, 0), share.get(tower, 0)) for tower in {*compiled.flops, *share}}
    towers = {}
    for tower in sorted({*done, *compiled.traffic}):
        sent = [one for one in compiled.collectives if one.tower == tower]
        towers[tower] = bound(chip, done.get(tower, 0), compiled.traffic.get(tower, 0), sent, share.get(tower, 0))
    whole = bound(chip, sum(done.values()), sum(compiled.traffic.values()), compiled.collectives, sum(share.values()))
    return whole, towers


def link_rate(chip: Chip, along: tuple[tuple[int, int], ...]) -> float:
    """Bytes a second that a device sends to others of a group that spans these sides (see `Collective`).

    On a torus: both directions of every side, one where a side does not close to a ring; through a switch all links at once.
    Infinite between the cores of one chip.
    """
    if not chip.dims:
        return chip.link_rate
    if not along:
        return float("inf")
    return sum(chip.link_rate * (2 if size % chip.wraps == 0 else 1) for _, size in along) / chip.devices
