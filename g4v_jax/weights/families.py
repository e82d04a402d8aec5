"""All families of published towers, and which of them a config.json names."""

import importlib

from g4v_jax.errors import UserError, nearest
from g4v_jax.weights.tables import Family

ROOMS = ("llm", "vision", "abstractor", "wan", "modelscope")


def families() -> dict[str, Family]:
    """Every family by name."""
    found = {}
    for room in ROOMS:
        found |= {family.name: family for family in importlib.import_module(f"g4v_jax.weights.{room}").FAMILIES}
    return found


def by_name(name: str) -> Family:
    """Raises UserError for an unknown name, with the nearest."""
    known = families()
    if name not in known:
        raise UserError(f"unknown family {name!r}{nearest(name, known)}")
    return known[name]


def recognise(config: dict, where: str, tower: str | None = None) -> Family:
    """The family that a config.json names by `architectures` or `_class_name`, or else by `model_type`.

    Raises UserError for an unknown one, with the known, and where the checkpoint holds several towers and `tower` does
    not say which.
    """
    named = (config.get("architectures") or [config.get("_class_name")])[0]
    known = families().values()
    found = [family for family in known if named in family.architectures]
    if named is None:
        found = [family for family in known if config.get("model_type") == family.name]
    if not found:
        names = sorted({name for family in known for name in family.architectures})
        raise UserError(f"{where}: unknown architecture {named!r}; known: {', '.join(names)}")
    chosen = [family for family in found if tower in (None, family.tower)]
    if len(chosen) != 1:
        towers = ", ".join(family.tower for family in found)
        raise UserError(f"{where}: holds {towers}; say which by --tower" + (f", not {tower!r}" if tower else ""))
    return chosen[0]


def fitting(tower: str, module) -> Family:
    """The first family that can express a tower's module. Raises UserError with every family's reason."""
    reasons = []
    for family in families().values():
        if family.tower == tower:
            why = family.fits(module) if type(module) is family.module else f"it is a {type(module).__name__}"
            if why is None:
                return family
            reasons.append(f"{family.name}: {why}")
    raise UserError(f"{tower} has no published layout ({'; '.join(reasons) or 'no family has such a tower'})")
