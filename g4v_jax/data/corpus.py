"""The texts of a data set, and the tokenizer learned from them."""

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


def learn_tokenizer(directory: str, vocab_size: int) -> int:
    """Learn the tokenizer of a data set and leave it there, unless it is there already -> its vocabulary's size."""
    path = Path(directory) / FILE
    if path.exists():
        known = Tokenizer.load(path)
        if known.vocab_size <= vocab_size:
            return known.vocab_size
    learned = Tokenizer.train(texts(directory), vocab_size)
    learned.save(path)
    return learned.vocab_size


def load_tokenizer(directory: str, workdir: str | Path | None = None, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a run (kept in its workdir) or else of a data set, which is then copied into the workdir.

    Raises UserError where there is none, or where it knows more tokens than the model's `vocab_size`.
    """
    own = Path(workdir) / FILE if workdir else None
    path = own if own and own.exists() else Path(directory) / FILE
    if not path.exists():
        raise UserError(f"{path}: no tokenizer here; make the records with g4v data build")
    tokenizer = Tokenizer.load(path)
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(f"{path} knows {tokenizer.vocab_size} tokens, the model only {vocab_size}; raise tokenizer.vocab_size")
    if own and path != own:
        tokenizer.save(own)
    return tokenizer
