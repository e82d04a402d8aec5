"""Public sets of questions about videos: the files of MSVD-QA, MSRVTT-QA and ActivityNet-QA.

May hold the reading and checking of such files; what counts as right is the business of `questions.py`.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from g4v_jax.data.questions import Question
from g4v_jax.errors import UserError

# Questions of ActivityNet-QA by the numbers of their "type" (Yu et al. 2019).
ACTIVITYNET_KINDS = ("motion", "space", "time", "yes-no", "colour", "object", "location", "number", "other")
_AUXILIARIES = frozenset(  # "ca" and "wo": of can't and won't
    "is are was were am do does did can ca could has have had will wo would should may might must".split()
)
_ASKING = {"whom": "who", "whose": "who", "what's": "what", "who's": "who", "where's": "where"}
_ASKING |= {word: word for word in ("what", "who", "where", "when", "which", "why", "how")}


def kind_of(question: str) -> str:
    """Kind of a question by its words: "yes-no" where an auxiliary comes first, else its first question word, else
    "other". "how many" is a kind of its own beside "how".
    """
    tokens = re.findall(r"[a-z']+", question.lower().replace("’", "'"))
    if tokens and tokens[0].removesuffix("n't") in _AUXILIARIES:
        return "yes-no"
    for token, following in zip(tokens, [*tokens[1:], ""]):
        if token in _ASKING:
            return "how many" if (token, following) == ("how", "many") else _ASKING[token]
    return "other"


def read_msvd_qa(path: str | Path, mapping: str | Path) -> list[Question]:
    """MSVD-QA (Xu et al. 2017): a list of {"id", "video_id", "question", "answer"}, and youtube_mapping.txt, whose
    lines "name vidN" name the video file of `video_id` N. Kinds are those of `kind_of`.

    Raises UserError, naming file and entry, for one that is malformed or has no answer, an id that comes twice, and a
    video that the mapping lacks.
    """
    names: dict[str, str] = {}
    for number, line in enumerate(_read(mapping).splitlines(), 1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) != 2 or not re.fullmatch(r"vid\d+", parts[1]):
            raise UserError(f"{mapping}:{number}: expected a line 'name vidN', found {line[:80]!r}")
        if parts[1] in names:
            raise UserError(f"{mapping}:{number}: a second video for {parts[1]}; keep one of them")
        names[parts[1]] = _stem(parts[0], f"{mapping}:{number}")

    def stem(row: dict, where: str) -> str:
        key = f"vid{_id(row, 'video_id', where)}"
        if key not in names:
            raise UserError(f"{where}: {key} is not in {mapping}; give the mapping that belongs to these questions")
        return names[key]

    return _questions(path, stem)


def read_msrvtt_qa(path: str | Path) -> list[Question]:
    """MSRVTT-QA (Xu et al. 2017): a list of {"id", "video_id", "question", "answer", "category_id"}; the video file of
    `video_id` N is "videoN". Kinds are those of `kind_of`.

    Raises UserError, naming file and entry, for one that is malformed or has no answer, and an id that comes twice.
    """
    return _questions(path, lambda row, where: _stem(f"video{_id(row, 'video_id', where)}", where))


def read_activitynet_qa(questions: str | Path, answers: str | Path) -> list[Question]:
    """ActivityNet-QA (Yu et al. 2019): a list of {"question_id", "video_name", "question"}, and one of {"question_id",
    "answer", "type"}; the video file of a `video_name` is "v_" and that name. Kinds are ACTIVITYNET_KINDS.

    Raises UserError, naming file and entry, for one that is malformed, an id that comes twice, a question without an
    answer, and an answer without a question.
    """
    known: dict[str, tuple[str, str]] = {}
    for row, where in _entries(answers):
        key, number = _id(row, "question_id", where), row.get("type")
        if type(number) is not int or not 0 <= number < len(ACTIVITYNET_KINDS):
            raise UserError(f"{where}: 'type' must be a number from 0 to {len(ACTIVITYNET_KINDS) - 1}, not {number!r}")
        if key in known:
            raise UserError(f"{where}: a second answer to question {key!r}; keep one of them")
        known[key] = _text(row, "answer", where), ACTIVITYNET_KINDS[number]
    found: dict[str, Question] = {}
    for row, where in _entries(questions):
        key = _id(row, "question_id", where)
        if key not in known:
            raise UserError(f"{where}: question {key!r} has no answer in {answers}; give the file that belongs to it")
        name = _stem(f"v_{_text(row, 'video_name', where)}", where)
        _add(found, Question(key, name, _text(row, "question", where), *known[key]), where)
    if extra := sorted(known.keys() - found.keys()):
        raise UserError(f"{answers}: {len(extra)} answers without a question in {questions}; the first: {extra[0]!r}")
    return list(found.values())


def _questions(path: str | Path, stem: Callable[[dict, str], str]) -> list[Question]:
    found: dict[str, Question] = {}
    for row, where in _entries(path):
        asked, answer = _text(row, "question", where), _text(row, "answer", where)
        _add(found, Question(_id(row, "id", where), stem(row, where), asked, answer, kind_of(asked)), where)
    return list(found.values())


def _add(found: dict[str, Question], one: Question, where: str) -> None:
    if found.setdefault(one.id, one) is not one:
        raise UserError(f"{where}: a second question {one.id!r}; keep one of them")


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _entries(path: str | Path) -> Iterator[tuple[dict, str]]:
    try:
        rows = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: expected a list of entries {{...}} that is not empty")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}: entry {index}: expected an object {{...}}, found {type(row).__name__}")
        yield row, f"{path}: entry {index}"


def _text(row: dict, name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {name!r} must be a text that is not empty, not {value!r}")
    return value.strip()


def _id(row: dict, name: str, where: str) -> str:
    value = row.get(name)
    if type(value) not in (int, str) or not str(value).strip():
        raise UserError(f"{where}: {name!r} must be a number or a name, not {value!r}")
    return str(value).strip()


def _stem(name: str, where: str) -> str:
    if re.search(r"[/\\\0]|^\.", name):
        raise UserError(f"{where}: video {name!r} must be a file's name without folders")
    return name


LAYOUTS = {"msvd": read_msvd_qa, "msrvtt": read_msrvtt_qa, "activitynet": read_activitynet_qa}
