"""Parameter trees by path: `tower/layers/attention/q/kernel` names one leaf, patterns name many."""

import re
from collections.abc import Iterable

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from g4v_jax.errors import UserError, nearest


def flatten(tree: dict) -> dict:
    """Nested dict to {path: leaf}."""
    return flatten_dict(tree, sep="/")


def unflatten(flat: dict) -> dict:
    """{path: leaf} to nested dict."""
    return unflatten_dict(flat, sep="/")


def matching(paths: Iterable[str], patterns: Iterable[str], field: str) -> set[str]:
    """Paths that any of the regular expressions matches whole.

    Raises UserError, naming the config field, where a pattern matches nothing.
    """
    paths, chosen = list(paths), set()
    for pattern in patterns:
        hits = {path for path in paths if re.fullmatch(pattern, path)}
        if not hits:
            towers = {path.split("/")[0] for path in paths}
            raise UserError(f"{field}: pattern {pattern!r} matches no parameter{nearest(pattern.split('/')[0], towers)}")
        chosen |= hits
    return chosen


def split(tree: dict, chosen: set[str]) -> tuple[dict, dict]:
    """Split into (leaves whose path is chosen, the others)."""
    flat = flatten(tree)
    inside = {path: leaf for path, leaf in flat.items() if path in chosen}
    return unflatten(inside), unflatten({path: leaf for path, leaf in flat.items() if path not in chosen})


def merge(*trees: dict) -> dict:
    """Union of trees whose paths are disjoint. Raises ValueError where they are not."""
    flat = {}
    for tree in trees:
        part = flatten(tree)
        clash = flat.keys() & part.keys()
        if clash:
            raise ValueError(f"trees overlap: {sorted(clash)[:3]}")
        flat |= part
    return unflatten(flat)


def count(tree) -> int:
    """Number of parameters in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
