"""The texts of a data set, and the tokenizer: learned from them, or an imported LLM's."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from g4v_jax.data import records
from g4v_jax.data.text import Tokenizer
from g4v_jax.data.world.phrases import QUESTIONS, REFUSALS, REQUESTS
from g4v_jax.errors import UserError

FILE = "tokenizer.json"


def texts(directory: str) -> Iterator[str]:
    """Every text that training may show: captions, paraphrases, dialogues, and the phrasings of tasks."""
    present = records.splits(directory)
    for group in records.GROUPS:
        if f"train_{group}" not in present:
            continue
        for record in records.read(directory, "train", group):
            yield from (record.caption, *record.paraphrases)
            for turn in record.dialogue:
                yield turn["text"]
                yield turn.get("render", {}).get("caption", "")
    yield from QUESTIONS["train"]
    yield from (request.replace("{caption}", "") for request in REQUESTS["train"])
    for refusals in REFUSALS.values():
        yield from refusals


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
    """Which tokenizer: one learned from the records' texts, or that of an imported LLM with its chat format."""

    vocab_size: int  # of the model, with the special tokens
    path: str = ""  # folder of the imported LLM; "": learned


def make_tokenizer(directory: str, spec: TokenizerSpec) -> int:
    """Learn the tokenizer of a data set and leave it there, unless it is there or comes from an LLM -> its size."""
    path = Path(directory) / FILE
    if spec.path:
        return load_tokenizer(directory, spec).vocab_size
    if path.exists():
        known = Tokenizer.load(path)
        if known.vocab_size <= spec.vocab_size:
            return known.vocab_size
    learned = Tokenizer.train(texts(directory), spec.vocab_size)
    learned.save(path)
    return learned.vocab_size


def load_tokenizer(directory: str, spec: TokenizerSpec, workdir: str | Path | None = None, keep: bool = True) -> Tokenizer:
    """The tokenizer of a run (kept in its workdir), or else of its LLM or of its data set, then copied into the workdir
    where it is to `keep` it.

    Raises UserError where there is none, or where it knows more tokens than the model.
    """
    own = Path(workdir) / FILE if workdir else None
    path = own if own and own.exists() else Path(spec.path or directory) / FILE
    if not path.exists():
        hint = "import the LLM with g4v import" if spec.path else "make the records with g4v data build"
        raise UserError(f"{path}: no tokenizer here; {hint}")
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > spec.vocab_size:
        raise UserError(
            f"{path} knows {tokenizer.vocab_size} tokens, the model only {spec.vocab_size}; raise tokenizer.vocab_size"
        )
    if own and keep and path != own:
        tokenizer.save(own)
    return tokenizer
