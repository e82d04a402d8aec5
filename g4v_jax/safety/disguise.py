"""What a text says under a disguise: spelled out, in letters that only look alike, or in base64.

May hold the undoing of disguises, for a text that is to be judged; what the model reads is never changed. Words that were
plain stay as they are, so a text without a disguise has no other reading.
"""

import base64
import binascii
import re
import unicodedata

LEET = str.maketrans("013457@$!", "oieastasi")
ALIKE = str.maketrans("аеорсухіѕԁһӏ", "aeopcyxisdhl")  # Cyrillic letters that look Latin
SPELLED = re.compile(r"\b(?:[^\W_][\s.\-_*]{1,3}){3,}[^\W_]\b")  # no sign is both letter and gap: that takes for ever
WIDE_GAP = re.compile(r"(?<=\w)(?:\s{2,3}|[/|])(?=\w)")
BASE64 = re.compile(r"[A-Za-z0-9+/]{11,}={0,2}")
MAX_TEXT = 20_000  # characters that are looked at
LONGEST_WORD = 24  # letters; what is longer is a code or an address


def readings(text: str) -> list[str]:
    """Other readings of a text, each once, without the text itself: what a reader who sees through it would read."""
    text = text[:MAX_TEXT]
    found = [unicodedata.normalize("NFKC", text).translate(ALIKE), _joined(text), _unleeted(text), *_decoded(text)]
    found += [_unleeted(found[1])]
    return list(dict.fromkeys(one for one in found if one and one != text))


def _joined(text: str) -> str:
    """Spelled-out words as words: "h a c k   a bank" is "hack a bank"."""

    def join(match: re.Match) -> str:
        words = WIDE_GAP.split(match.group())
        return " ".join(re.sub(r"[\s.\-_*]", "", word) for word in words)

    return SPELLED.sub(join, text)


def _unleeted(text: str) -> str:
    """Digits and signs inside words as the letters that they stand for; what is mostly digits stays, as "1990s"."""

    def letters(match: re.Match) -> str:
        word = match.group()
        end = len(word.rstrip(".,;:!?"))
        plain = re.search("[A-Za-z]", word) and 2 * sum(letter.isalpha() for letter in word) > end and end <= LONGEST_WORD
        return word[:end].translate(LEET) + word[end:] if plain else word

    return re.sub(r"\S+", letters, text)


def _decoded(text: str) -> list[str]:
    """What base64 in it says, where that is words."""
    found = []
    for match in BASE64.finditer(text):
        code = match.group().rstrip("=")
        try:
            words = base64.b64decode(code + "=" * (-len(code) % 4), validate=True).decode("utf-8")
        except (binascii.Error, UnicodeDecodeError):
            continue
        words = " ".join(words.split())  # such as the line break that `echo` puts at the end
        if words.isprintable() and re.search(r"[A-Za-z]{3}", words):
            found.append(words)
    return found
