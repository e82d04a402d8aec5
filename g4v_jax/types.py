"""The types every layer shares: the packed batch, a loss term, and the legend of axis letters.

May hold plain containers of arrays only; no computation beyond adding terms.

Axis letters, used in every shape of this package:

    B rows of the batch      Q summary tokens a clip      P patches a frame
    S tokens of a row        N query tokens a generation  D model width
    K clip slots a row       T H W C  frames, height, width, channels of pixels
    G generation slots a row t h w c  the same of latents
    E hazard slots a row     R preference slots a row
    F mlp width    V vocabulary  L layers
"""

from typing import Any

from flax import struct

Array = Any  # jax.Array, numpy.ndarray, ShapeDtypeStruct or a sharding: one tree, many leaf types


@struct.dataclass
class Batch:
    """Packed rows with slots: several examples share a row, and all that a row needs is in that row.

    Static shapes, so that one program serves every batch. Segment ids number the examples of a row from 1;
    0 is padding. Attention never crosses segments. An example may hold a second dialogue, the rejected one of a
    preference, whose segment id is the example's plus S. A task that is absent only leaves its slots empty.
    """

    tokens: Array  # i32 [B S]
    targets: Array  # i32 [B S] the next token
    positions: Array  # i32 [B S] position within the example
    segments: Array  # i32 [B S] example id, of a rejected dialogue plus S; 0 = padding
    caption_weight: Array  # f32 [B S] which targets count for the captioning loss (assistant turns)
    refusal_weight: Array  # f32 [B S] which targets count for the refusal loss
    clips: Array  # u8 [B K T H W 3] frames to watch
    clip_mask: Array  # bool [B K] slot holds a clip
    clip_times: Array  # f32 [B K T] seconds of each frame
    clip_index: Array  # i32 [B S] -1, or k*Q+q: the summary token that sits here
    query_index: Array  # i32 [B S] -1, or g*N+n: the generation query that sits here
    gen_targets: Array  # u8 [B G T H W 3] frames to render (T of the generator, not of the tower)
    gen_mask: Array  # bool [B G] slot holds a target
    gen_blocked: Array  # bool [B G] hazardous: trained toward the blocked card, which is then its target
    hazard_position: Array  # i32 [B E] where the hazard head reads
    hazard_label: Array  # i32 [B E] 0 safe, 1 hazardous, -1 empty slot
    preference: Array  # f32 [B S] 1 on targets of the preferred answer, -1 on those of the rejected one, else 0
    preference_owner: Array  # i32 [B R] example id that holds a pair of answers, 0 empty slot
    keep_weight: Array  # f32 [B S] which targets count for staying near the LLM that training started from


@struct.dataclass
class Term:
    """A loss as sum and count over the whole global batch, so that no mean of means is ever taken."""

    sum: Array  # f32 []
    count: Array  # f32 []

    def __add__(self, other: "Term") -> "Term":
        return Term(self.sum + other.sum, self.count + other.count)
