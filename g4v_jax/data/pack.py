"""Packing: what one example is, and how examples become rows with slots, the `Batch`.

May hold the sizes of a row, the form of an example and index arithmetic; knows nothing of files, text or tasks.
Axis letters as in `types`; k g e r s are the clips, targets, hazard readings, preferences and tokens of one example.
"""

from collections.abc import Callable
from dataclasses import dataclass

import grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset

from g4v_jax.errors import UserError, nearest
from g4v_jax.types import Batch

Example = dict[str, np.ndarray]  # every feature below, each with a leading axis that may be of length zero


@dataclass(frozen=True)
class RowShape:
    """The static sizes of a batch. A slot count may be zero only where no task of the mixture needs that slot."""

    rows: int  # B
    tokens: int  # S
    clips: int  # K
    targets: int  # G
    hazards: int  # E
    summary_tokens: int  # Q
    query_tokens: int  # N
    clip_frames: int  # T of a clip to watch
    clip_size: int  # H and W of a clip to watch, pixels
    target_frames: int  # T of a clip to render
    target_size: int | tuple[int, int]  # H and W of a clip to render, pixels; one number is both
    preferences: int = 0  # R, pairs of a preferred and a rejected answer

    def __post_init__(self):
        slots = ("clips", "targets", "hazards", "preferences")
        _, *sides = self.target_shape
        if len(sides) != 2 or any(type(side) is not int for side in sides):
            raise UserError(f"row shape: target_size is {self.target_size}; it must be a whole number, or a height and a width")
        for name, value in vars(self).items():
            if np.min(value) < (0 if name in slots else 1):
                raise UserError(f"row shape: {name} is {value}; it must be at least {0 if name in slots else 1}")

    @property
    def clip_shape(self) -> tuple[int, int, int]:
        """(T, H, W) of a clip to watch."""
        return self.clip_frames, self.clip_size, self.clip_size

    @property
    def target_shape(self) -> tuple[int, int, int]:
        """(T, H, W) of a clip to render."""
        sides = (self.target_size, self.target_size) if isinstance(self.target_size, int) else self.target_size
        return self.target_frames, *sides


@dataclass(frozen=True)
class _Feature:
    capacity: str  # the field of RowShape that bounds the leading axis
    dtype: type
    padding: int = 0
    trailing: Callable[[RowShape], tuple[int, ...]] = lambda shape: ()  # the other axes


# In an example, indices and positions count from the example's own start; `to_batch` shifts them to the row's.
FEATURES = {
    "tokens": _Feature("tokens", np.int32),  # [s]
    "targets": _Feature("tokens", np.int32),  # [s]
    "caption_weight": _Feature("tokens", np.float32),  # [s]
    "refusal_weight": _Feature("tokens", np.float32),  # [s]
    "clip_index": _Feature("tokens", np.int32, -1),  # [s]
    "query_index": _Feature("tokens", np.int32, -1),  # [s]
    "clips": _Feature("clips", np.uint8, 0, lambda shape: (*shape.clip_shape, 3)),  # [k T H W 3]
    "clip_times": _Feature("clips", np.float32, 0, lambda shape: shape.clip_shape[:1]),  # [k T]
    "gen_targets": _Feature("targets", np.uint8, 0, lambda shape: (*shape.target_shape, 3)),  # [g T H W 3]
    "gen_blocked": _Feature("targets", np.bool_),  # [g]
    "hazard_position": _Feature("hazards", np.int32),  # [e]
    "hazard_label": _Feature("hazards", np.int32, -1),  # [e]
    "keep_weight": _Feature("tokens", np.float32),  # [s]
    "preference": _Feature("tokens", np.float32),  # [s]
    "offset": _Feature("tokens", np.int32),  # [s] where the dialogue that a token belongs to begins in the example
    "pairs": _Feature("preferences", np.int32),  # [r] zeros: that the example holds a pair of answers
}


def example(shape: RowShape, **features) -> Example:
    """Complete an example: absent features become empty, given ones are checked against the row.

    "keep_weight", "preference" and "offset" may be left out of an example with tokens: they are then zeros.

    Raises UserError where the example needs more tokens or slots than a row has, or frames of another size.
    """
    for name in features:
        if name not in FEATURES:
            raise ValueError(f"example: unknown feature {name!r}{nearest(name, FEATURES)}")
    blank = np.zeros(len(features.get("tokens", ())))
    features = {"keep_weight": blank, "preference": blank, "offset": blank} | features
    complete = {}
    for name, feature in FEATURES.items():
        trailing, capacity = feature.trailing(shape), getattr(shape, feature.capacity)
        value = np.asarray(features.get(name, ()), feature.dtype)
        value = value if value.size else np.zeros((0, *trailing), feature.dtype)
        if value.shape[1:] != trailing:
            raise UserError(f"example: {name} has shape {list(value.shape)}; the row expects [n, *{list(trailing)}]")
        if len(value) > capacity:
            raise UserError(
                f"example: {len(value)} {name} do not fit a row of {capacity}; "
                f"raise the row's {feature.capacity} or shorten the example"
            )
        complete[name] = value
    return complete


def pair(chosen: Example, rejected: Example, shape: RowShape) -> Example:
    """One example of two dialogues that differ in their last answer, for the preference of the first over the second.

    The losses of words and hazards are the first one's. Both watch the same clips. From the first token on that differs,
    what the weights of each name as its answer has "preference" 1 and -1; before it both are the same. Only `chosen`
    comes back, without preference, where the two do not fit a row together, and where the rejected one renders.
    """
    first, second = len(chosen["tokens"]), len(rejected["tokens"])
    if first + second > shape.tokens or len(rejected["gen_targets"]):
        return chosen
    shared = min(first, second)
    same = np.cumprod(chosen["tokens"][:shared] == rejected["tokens"][:shared])
    begins = int(same.sum()) - 1  # the place whose target is the first token that differs

    def side(one: Example) -> np.ndarray:
        weight = one["caption_weight"] + one["refusal_weight"] + one["keep_weight"]
        return (weight > 0) & (np.arange(len(weight)) >= begins)

    weights = ("caption_weight", "refusal_weight", "keep_weight")
    silent = {name: np.zeros(second) for name in weights}
    both = {
        name: np.concatenate([chosen[name], (rejected | silent)[name]])
        for name in ("tokens", "targets", *weights, "clip_index", "query_index")
    }
    preference = np.concatenate([side(chosen).astype(np.float32), -side(rejected).astype(np.float32)])
    offset = np.repeat([0, first], [first, second])
    return example(shape, **(chosen | both | dict(preference=preference, offset=offset, pairs=[0])))


def pack(examples: grain.IterDataset, shape: RowShape, bins: int) -> grain.IterDataset:
    """Pack examples first-fit into rows, `bins` rows at a time, and group rows into a `Batch` of numpy arrays.

    More bins pad less (about 5 % of tokens at 4 bins, 3.5 % at 16), but restoring an iterator reads up to
    `bins` rows of examples again, and that many rows are buffered.
    """
    rows = FirstFitPackIterDataset(
        examples,
        length_struct={name: getattr(shape, feature.capacity) for name, feature in FEATURES.items()},
        padding_struct={name: feature.padding for name, feature in FEATURES.items()},
        num_packing_bins=bins,
        shuffle_bins=False,
    )
    return rows.batch(shape.rows, drop_remainder=True).map(lambda packed: to_batch(packed, shape))


def single(examples: list[Example], shape: RowShape) -> Batch:
    """One example a row, the rest of the batch empty, for inference and evaluation.

    Raises UserError where there are more examples than rows.
    """
    if len(examples) > shape.rows:
        raise UserError(f"{len(examples)} examples do not fit {shape.rows} rows; pass fewer at a time")
    packed = {}
    for name, feature in FEATURES.items():
        size = (shape.rows, getattr(shape, feature.capacity))
        packed[name] = np.full((*size, *feature.trailing(shape)), feature.padding, feature.dtype)
        packed[f"{name}_segment_ids"] = np.zeros(size, np.int32)
        packed[f"{name}_positions"] = np.zeros(size, np.int32)
        for row, one in enumerate(examples):
            length = len(one[name])
            packed[name][row, :length] = one[name]
            packed[f"{name}_segment_ids"][row, :length] = 1
            packed[f"{name}_positions"][row, :length] = np.arange(length)
    return to_batch(packed, shape)


def to_batch(packed: dict[str, np.ndarray], shape: RowShape) -> Batch:
    """Turn packed rows (each feature with its `_segment_ids` and `_positions`, leading axis B) into a `Batch`.

    Indices of an example are shifted by the slots, and hazard positions by the tokens, of the examples before
    it in its row.
    """
    segments, offset = packed["tokens_segment_ids"], packed["offset"]
    clip_segments = packed["clips_segment_ids"]
    target_segments = packed["gen_targets_segment_ids"]
    hazard_segments = packed["hazard_position_segment_ids"]
    clip_shift = shape.summary_tokens * _earlier(clip_segments, segments)
    query_shift = shape.query_tokens * _earlier(target_segments, segments)
    clip_index, query_index = packed["clip_index"], packed["query_index"]
    return Batch(
        tokens=packed["tokens"],
        targets=packed["targets"],
        positions=packed["tokens_positions"] - offset,
        segments=segments + np.where(offset > 0, segments.shape[1], 0).astype(np.int32),
        caption_weight=packed["caption_weight"],
        refusal_weight=packed["refusal_weight"],
        clips=packed["clips"],
        clip_mask=clip_segments > 0,
        clip_times=packed["clip_times"],
        clip_index=np.where(clip_index >= 0, clip_index + clip_shift, -1),
        query_index=np.where(query_index >= 0, query_index + query_shift, -1),
        gen_targets=packed["gen_targets"],
        gen_mask=target_segments > 0,
        gen_blocked=packed["gen_blocked"],
        hazard_position=packed["hazard_position"] + _earlier(segments, hazard_segments),
        hazard_label=packed["hazard_label"],
        preference=packed["preference"],
        preference_owner=packed["pairs_segment_ids"],
        keep_weight=packed["keep_weight"],
    )


def _earlier(owners: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """For each cell of `segments` [B m], how many cells of `owners` [B n] belong to earlier examples: i32 [B m]."""
    owned = owners[:, None, :]
    return np.sum((owned > 0) & (owned < segments[:, :, None]), axis=-1, dtype=np.int32)
