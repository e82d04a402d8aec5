"""Text: the byte-level BPE tokenizer with its special tokens, and dialogues as token rows with slots.

May hold what turns strings into ids and turns of a dialogue into an `Example`; reads no video and no records.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from g4v_jax.data import chat
from g4v_jax.data.chat import ASSISTANT, END, USER, ChatFormat
from g4v_jax.data.pack import Example, RowShape, example
from g4v_jax.errors import UserError

PAD = "<pad>"
CLIP, VIDEO, VIDEO_END, QUERY = "<clip>", "<video>", "</video>", "<query>"
SPECIALS = (PAD, USER, ASSISTANT, END, CLIP, VIDEO, VIDEO_END, QUERY)

Clip = tuple[np.ndarray, np.ndarray]  # frames u8 [T H W 3] and their seconds f32 [T], as `video.decode` gives them


class Tokenizer:
    """Byte-level BPE: any text round-trips. Special tokens exist as ids only; the same words in a text stay text."""

    def __init__(self, model: tokenizers.Tokenizer, format: ChatFormat = ChatFormat()):
        """Wrap a model; special tokens that it lacks are appended to its vocabulary."""
        model.add_special_tokens([token for token in SPECIALS if model.token_to_id(token) is None])
        model.encode_special_tokens = True  # encode "<|end|>" in a text as letters: a user cannot end a turn
        self._model = model
        self.ids = {token: model.token_to_id(token) for token in SPECIALS}
        self.format = format
        self.marks = {  # token ids of the format's marks
            name: tuple(self._encode_marks(getattr(format, name)))
            for name in ("start", "user", "user_end", "assistant", "assistant_end")
        }

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn merges from `texts`. The special tokens come first, so `<pad>` is 0.

        Raises UserError where `vocab_size` leaves no room for the 256 bytes.
        """
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        least = len(SPECIALS) + len(alphabet)
        if vocab_size < least:
            raise UserError(f"tokenizer: vocab_size {vocab_size} is too small; use at least {least}")
        model = tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
        )
        model.train_from_iterator(texts, trainer)
        return cls(model)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read a `tokenizer.json`, ours or another model's, and the chat format beside it.

        Raises UserError where it is missing or not one.
        """
        try:
            model = tokenizers.Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
            return cls(model, chat.load(Path(path).parent))
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f"{path}: no tokenizer here; train one or give the path of a tokenizer.json") from None
        except Exception as error:  # the library raises bare Exception for a file that it cannot parse
            raise UserError(f"{path}: not a tokenizer.json ({error})") from error

    def save(self, path: str | os.PathLike) -> None:
        """Write `tokenizer.json`, whole or not at all, and beside it a chat format that is not ours."""
        self.format.save(Path(path).parent)
        partial = Path(f"{path}.partial")
        partial.write_text(self._model.to_str(pretty=True), encoding="utf-8")
        partial.replace(path)

    @property
    def vocab_size(self) -> int:
        return self._model.get_vocab_size()

    @property
    def stop(self) -> int:
        """The token that ends an answer."""
        return self.marks["assistant_end"][0]

    def _encode_marks(self, text: str) -> list[int]:
        self._model.encode_special_tokens = False
        ids = self._model.encode(text, add_special_tokens=False).ids
        self._model.encode_special_tokens = True
        return ids

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never an id of a special token."""
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], specials: bool = False) -> str:
        """Text of ids, without the special tokens unless `specials`."""
        return self._model.decode([int(i) for i in ids], skip_special_tokens=not specials)


@dataclass(frozen=True)
class Render:
    """What an assistant turn renders: the caption it writes, and the u8 [T H W 3] to learn, None at inference."""

    caption: str
    target: np.ndarray | None = None
    blocked: bool = False


@dataclass(frozen=True)
class Turn:
    """One turn. Clips are watched before a user's text; a render follows an assistant's text."""

    role: str  # "user" or "assistant"
    text: str = ""
    clips: Sequence[Clip] = ()
    render: Render | None = None
    hazard: int = -1  # of a user turn: 0 safe, 1 hazardous, -1 not labelled
    # the loss that an assistant turn's words count for: "caption", "refusal", "keep" or None; a user's count for "keep" alone
    loss: str | None = "caption"


@dataclass
class _Piece:
    """A run of tokens that share what is known of them."""

    ids: list[int]
    loss: str | None = None  # the loss that its tokens count for as targets
    clip: int = -1  # first value of clip_index
    query: int = -1  # first value of query_index
    cuttable: bool = False


def dialogue(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    shape: RowShape,
    open: bool = False,
    counts: Counter | None = None,
) -> Example:
    """Render turns as one example.

    A user turn is `<|user|>`, Q `<clip>` a clip, the text, `<|end|>`; an assistant turn is `<|assistant|>`, the
    text, for a render `<video>` caption `</video>` and N `<query>`, then `<|end|>`; or with the marks of the tokenizer's
    own chat format in place of ours. What the assistant writes, and the first token of its end mark, counts for its
    turn's loss; the queries, and the end after them, do not. Each labelled user turn has a hazard reading at the first token
    of its end mark: there an LLM sums up what was asked, while what a format has after it, such as a new line, tells less of it.

    `open` leaves the row unfinished for inference: after a user turn it ends with the assistant's mark, and a last
    assistant turn ends without its end, so after the queries where it renders. Open rows have zero targets.

    Text that does not fit is cut from the middle of user texts, longest first; `counts["cut_tokens"]` grows by
    what was cut. Raises UserError where even that does not fit, or where the turns are not a dialogue.
    """
    ids, marks = tokenizer.ids, {name: list(mark) for name, mark in tokenizer.marks.items()}
    pieces, clips, renders, hazards = [_Piece(marks["start"])], [], [], []
    for number, turn in enumerate(turns):
        unfinished = open and number == len(turns) - 1
        if turn.role == "user":
            pieces.append(_Piece(marks["user"]))
            for clip in turn.clips:
                pieces.append(_Piece([ids[CLIP]] * shape.summary_tokens, clip=len(clips) * shape.summary_tokens))
                clips.append(clip)
            kept = "keep" if turn.loss == "keep" else None
            pieces += [_Piece(tokenizer.encode(turn.text), loss=kept, cuttable=True), _Piece(marks["user_end"])]
            if turn.hazard >= 0:
                hazards.append((len(pieces) - 1, turn.hazard))
            if unfinished:
                pieces.append(_Piece(marks["assistant"]))
        elif turn.role == "assistant":
            pieces += [_Piece(marks["assistant"]), _Piece(tokenizer.encode(turn.text), loss=turn.loss)]
            if turn.render:
                written = [ids[VIDEO], *tokenizer.encode(turn.render.caption), ids[VIDEO_END]]
                pieces.append(_Piece(written, loss=turn.loss))
                pieces.append(_Piece([ids[QUERY]] * shape.query_tokens, query=len(renders) * shape.query_tokens))
                renders.append(turn.render)
            if not unfinished:
                stop, *rest = marks["assistant_end"]
                pieces += [_Piece([stop], loss=None if turn.render else turn.loss), _Piece(rest)]
        else:
            raise UserError(f"dialogue: turn {number} has role {turn.role!r}; use 'user' or 'assistant'")
    if not turns or (turns[-1].role == "user" and not open):
        raise UserError("dialogue: it must end with an assistant turn, or there is nothing to learn")
    cut = _fit(pieces, shape.tokens)
    if counts is not None:
        counts["cut_tokens"] += cut

    lengths = np.array([len(piece.ids) for piece in pieces])
    tokens = np.concatenate([np.asarray(piece.ids, np.int32) for piece in pieces])
    losses = np.repeat(np.array([piece.loss or "" for piece in pieces]), lengths)
    losses = np.append(losses[1:], "")  # a position answers for the token after it
    starts = np.cumsum(lengths) - np.maximum(lengths, 1)  # of an empty piece, as an end mark may be: the token before it
    blank = np.zeros((*shape.target_shape, 3), np.uint8)
    return example(
        shape,
        tokens=tokens,
        targets=np.append(tokens[1:], 0),
        caption_weight=losses == "caption",
        refusal_weight=losses == "refusal",
        keep_weight=losses == "keep",
        clip_index=_runs([piece.clip for piece in pieces], lengths),
        query_index=_runs([piece.query for piece in pieces], lengths),
        clips=[frames for frames, _ in clips],
        clip_times=[seconds for _, seconds in clips],
        gen_targets=[blank if render.target is None else render.target for render in renders],
        gen_blocked=[render.blocked for render in renders],
        hazard_position=[starts[piece] for piece, _ in hazards],
        hazard_label=[label for _, label in hazards],
    )


def _fit(pieces: list[_Piece], tokens: int) -> int:
    """Shorten the user texts to the longest common limit at which all pieces fit; return how many tokens were cut."""
    total = sum(len(piece.ids) for piece in pieces)
    if total <= tokens:
        return 0
    texts = [piece for piece in pieces if piece.cuttable]
    room = tokens - total + sum(len(text.ids) for text in texts)
    if room < 0:
        raise UserError(
            f"dialogue: {tokens - room} tokens without the user's words do not fit a row of {tokens}; "
            "raise the row's tokens or use fewer clips and turns"
        )
    limit = next(n for n in range(room, -1, -1) if sum(min(len(text.ids), n) for text in texts) <= room)
    for text in texts:
        if len(text.ids) > limit:
            tail = limit // 2
            text.ids = text.ids[: limit - tail] + text.ids[len(text.ids) - tail :]
    return total - sum(len(piece.ids) for piece in pieces)


def _runs(starts: list[int], lengths: np.ndarray) -> np.ndarray:
    """Count up from each start over its length; -1 stays -1: i32 [sum of lengths]."""
    first = np.repeat(np.cumsum(lengths) - lengths, lengths)
    values = np.repeat(starts, lengths)
    return np.where(values >= 0, values + np.arange(len(values)) - first, -1)
